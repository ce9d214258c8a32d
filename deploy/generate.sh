#!/usr/bin/env bash
# Writes deploy/meshlb.yaml: the chart with its default values, in namespace meshlb-system, without what only Helm reads.
#   deploy/generate.sh [--check]     --check: says whether the file is what would be written, and writes nothing
# HELM=FILE  the helm to use
set -euo pipefail
cd "$(dirname "$0")/.."
helm=${HELM:-helm} namespace=meshlb-system out=deploy/meshlb.yaml

render() {
  cat <<Y
# Written by deploy/generate.sh from charts/meshlb. Do not edit: change values in an overlay (kustomization.yaml).
apiVersion: v1
kind: Namespace
metadata:
  name: $namespace
  labels:
    app.kubernetes.io/name: meshlb
    # The agents use the host's network, paths of the host, and CAP_NET_ADMIN.
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/audit: privileged
    pod-security.kubernetes.io/warn: privileged
Y
  # A Helm without a cluster takes Kubernetes for whatever it was built with.
  "$helm" template meshlb charts/meshlb --namespace "$namespace" --kube-version 1.31.0 --no-hooks | sed -e '/^# Source: /d' -e '/^ *helm\.sh\/chart: /d' \
    -e '/^ *app\.kubernetes\.io\/managed-by: Helm$/d' -e '/^  annotations:$/{N;/helm\.sh\/resource-policy/d}'
}

new=$(mktemp); trap 'rm -f "$new"' EXIT
render >"$new"
if [ "${1:-}" = --check ]; then
  diff -u "$out" "$new" >&2 || { echo "$out is not what the chart renders: run deploy/generate.sh" >&2; exit 1; }
else
  cat "$new" >"$out"
fi
