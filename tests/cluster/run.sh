#!/usr/bin/env bash
# Runs the tests against a real control plane, or those whose name contains one of the FILTERs: etcd, kube-apiserver and the
# controllers on loopback ports, started and ended by the tests. What they need is built or unpacked once (setup.sh).
#
#   tests/cluster/run.sh [--list] [FILTER…]
#
# KUBE_BIN=DIR     with etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kubectl, instead of building them
# MESHLB_BIN=FILE  the meshlb to test, instead of the one that is built
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/setup.sh"
. "$here/lib.sh"
cd "$here/../.."
built=$(mktemp); trap 'rm -f "$built"' EXIT
cargo test -q --no-run --test cluster --message-format=json-render-diagnostics >"$built" || { echo "cluster tests: 0 passed, 1 failed (it does not build)"; exit 1; }
for a in "$@"; do [ "$a" != --list ] || exec "$(executable test cluster)" "$@"; done
if ! running >/dev/null; then
  trap 'rm -f "$built"; "$here/up.sh" --stop' EXIT
  "$here/up.sh"
fi
MESHLB_FAKETIME=$(faketime_lib || true) MESHLB_CLUSTER=$dir KUBE_BIN=${KUBE_BIN:-$(kube_dir)} MESHLB_BIN=${MESHLB_BIN:-$(executable bin meshlb)} "$(executable test cluster)" "$@"
