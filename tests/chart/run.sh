#!/usr/bin/env bash
# Tests of charts/meshlb, deploy/ and what belongs to them. The last line is the sum.
#
#   tests/chart/run.sh [--server] [FILTER…]
#
# --server  also installs, upgrades and removes the chart on a real control plane (tests/cluster), started and ended here
# HELM=FILE, KUBE_SCORE=FILE, KUBERNETES_VALIDATE=FILE, KUBE_BIN=DIR (with kubectl; with --server the control plane's programs too): instead of building them
# MESHLB_BIN=FILE: the program that is to understand the configuration [default: it is built]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# A control plane of our own: `helm install` makes cluster-wide objects.
export MESHLB_CLUSTER_NAME=${MESHLB_CLUSTER_NAME:+$MESHLB_CLUSTER_NAME-}chart
"$here/../cluster/setup.sh"
. "$here/../cluster/lib.sh"
cd "$here/../.."

need_helm
need_manifest_checkers
python3 -c 'import yaml' 2>/dev/null || {
  say "chart: installing python3-yaml from Debian: the checks read what is rendered with it"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3-yaml >/dev/null
}
if [ -z "${MESHLB_BIN:-}" ]; then
  built=$(mktemp)
  cargo build -q --locked --bin meshlb --message-format=json-render-diagnostics >"$built" || { rm -f "$built"; echo "0 passed, 1 failed (it does not build)"; exit 1; }
  MESHLB_BIN=$(executable bin meshlb); rm -f "$built"
fi
PROMTOOL=$(d=$(prometheus_dir) && echo "$d/promtool") || PROMTOOL=
export HELM KUBE_SCORE KUBERNETES_VALIDATE MESHLB_BIN PROMTOOL KUBECTL=${KUBE_BIN:-$(kube_dir)}/kubectl

if [ "${1:-}" = --server ]; then
  shift
  if ! running >/dev/null; then
    trap '"$here/../cluster/up.sh" --stop' EXIT
    "$here/../cluster/up.sh"
  fi
  export KUBECONFIG=$dir/kubeconfig MESHLB_CHART_SERVER=1 AUDIT_LOG=$dir/audit.log
fi
python3 "$here/cases.py" "$@"
