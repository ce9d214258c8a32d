#!/usr/bin/env bash
# Measures the way from a change in a real API server to the kernel of three nodes, with few services and with many, and the
# memory of an agent beside a kube-proxy with as many Services, and of a controller: docs/performance.md says what came out.
# MESHLB_BENCH_SERVICES (5000)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export MESHLB_CLUSTER_NAME=${MESHLB_CLUSTER_NAME:-bench}
"$here/setup.sh"
. "$here/lib.sh"
cd "$here/../.."
few=10 many=${MESHLB_BENCH_SERVICES:-5000}
trap '"$here/up.sh" --stop' EXIT
running >/dev/null || "$here/up.sh"
kubectl() { "${KUBE_BIN:-$(kube_dir)}/kubectl" --kubeconfig "$dir/kubeconfig" "$@"; }
kubectl apply --server-side -f crds/ >/dev/null
kubectl create namespace meshlb-system --dry-run=client -o yaml | kubectl apply -f - >/dev/null
built=$(mktemp); cargo build -q --bin meshlb --message-format=json-render-diagnostics >"$built"; meshlb=$(executable bin meshlb); rm -f "$built"

# A core Service and a MeshService of the same name, which have the same five endpoints.
objects() { # objects FIRST LAST
  awk -v first="$1" -v last="$2" 'BEGIN {
    for (n = first; n < last; n++) {
      name = sprintf("s%05d", n)
      printf "---\napiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {ports: [{port: 80, targetPort: 8080}]}\n", name
      printf "---\napiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {name: %s}\nspec: {ports: [{port: 80, targetPort: 8080}]}\n", name
      printf "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: %s, labels: {kubernetes.io/service-name: %s}}\naddressType: IPv4\nports: [{name: \"\", port: 8080, protocol: TCP}]\nendpoints:\n", name, name
      for (i = n * 5; i < n * 5 + 5; i++) printf "- {addresses: [10.100.%d.%d], conditions: {ready: true}}\n", i / 256, i % 256
    }
  }'
}
controller() { # sets CONTROLLER to its process
  "$meshlb" controller --namespace meshlb-system --metrics-listen off --kubeconfig "$dir/kubeconfig" >"$dir/bench-controller.log" 2>&1 & CONTROLLER=$!
}
lost() { tail -5 "$dir/bench-controller.log" >&2; kill "$CONTROLLER"; die "$1"; }
ended() { # ended WHAT SERVICES: ends it and tells what memory it took, now and at most
  awk -v what="$1" -v services="$2" '$1 == "VmRSS:" {now = $2 / 1024} $1 == "VmHWM:" {most = $2 / 1024} END {printf "bench: %s %d %.1f %.1f\n", what, services, now, most}' \
    "/proc/$CONTROLLER/status" | tee -a "$out"
  kill "$CONTROLLER"; wait "$CONTROLLER" || true
}
grow() { # grow FIRST LAST: makes them, has them allocated, and has a controller find all as it is
  local start=$SECONDS again
  objects "$1" "$2" | kubectl create -f - >/dev/null
  controller
  until [ "$(kubectl get msvc -o jsonpath='{range .items[*]}{.status.vips[0]}{"\n"}{end}' | grep -c .)" = "$2" ]; do
    [ $((SECONDS - start)) -lt 1200 ] || lost "not all are allocated"
    sleep 2
  done
  ended allocating "$2"
  : >"$dir/bench-controller.log"
  controller
  again=$SECONDS
  until grep -q "everything has been read" "$dir/bench-controller.log"; do
    [ $((SECONDS - again)) -lt 60 ] || lost "the controller has not read everything"
    sleep 1
  done
  sleep 20
  ended started "$2"
  say "bench: $2 services are there, after $((SECONDS - start)) s"
}
out=$(mktemp)
first=0
for n in $few $many; do
  grow $first "$n"; first=$n
  MESHLB_KUBE_BENCH=$n "$here/packets.sh" kube_bench | tee -a "$out"
done
echo
awk -v few="$few" -v many="$many" '
  /^bench: latency/ {p50[$3] = $4; p99[$3] = $5}
  /^bench: (agent|kube-proxy|allocating|started)/ {now[$2, $3] = $4; most[$2, $3] = $5}
  END {
    if (!(few in p50) || !(many in p50)) exit 1
    printf "from the API to the kernel of three nodes, p50 with %d services / with %d:  %.3f (%.1f ms / %.1f ms)  goal <= 1.3\n", many, few, p50[many] / p50[few], p50[many], p50[few]
    printf "the same, p99:                                                             %.3f (%.1f ms / %.1f ms)\n", p99[many] / p99[few], p99[many], p99[few]
    printf "resident memory of an agent / of kube-proxy, %d services:                 %.3f (%.1f MiB / %.1f MiB)\n", many, now["agent", many] / now["kube-proxy", many], now["agent", many], now["kube-proxy", many]
    printf "at most:                                                                   %.3f (%.1f MiB / %.1f MiB)\n", most["agent", many] / most["kube-proxy", many], most["agent", many], most["kube-proxy", many]
    printf "resident memory of a controller that has given %d services their addresses:  %.1f MiB, at most %.1f MiB\n", many, now["allocating", many], most["allocating", many]
    printf "of one that finds all as it is:                                            %.1f MiB, at most %.1f MiB\n", now["started", many], most["started", many]
  }' "$out" || { rm -f "$out"; die "a row could not be measured"; }
rm -f "$out"
