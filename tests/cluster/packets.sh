#!/usr/bin/env bash
# The kernel tests that need a control plane: it runs here, at full speed; controller, agents, kernels and pods live in the VM,
# or here too where this kernel has IPVS.
#
#   tests/cluster/packets.sh [FILTER…]        (default: kube)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/setup.sh"
. "$here/lib.sh"
cd "$here/../.."
[ $# -gt 0 ] || set -- kube
# What was up before is left up.
was_up=$(running) || was_up=
holder=
stop() { [ -z "$holder" ] || kill "$holder" 2>/dev/null; rm -f "$dir"/hold/*; [ -n "$was_up" ] || "$here/up.sh" --stop; }
trap stop EXIT
[ -n "$was_up" ] || "$here/up.sh"
kubectl() { "${KUBE_BIN:-$(kube_dir)}/kubectl" --kubeconfig "$dir/kubeconfig" "$@"; }
kubectl apply --server-side -f crds/ >/dev/null
kubectl create namespace meshlb-system --dry-run=client -o yaml | kubectl apply -f - >/dev/null
kubectl wait --for=condition=Established --timeout=30s crd/meshservices.meshlb.dev >/dev/null
kubectl delete lease --all -n meshlb-system >/dev/null
# The accounts, rights and policy that the chart makes; programs run in the bed's nodes instead of pods.
awk 'BEGIN { RS = "---\n" } /(^|\n)kind: (ServiceAccount|(Cluster)?Role|(Cluster)?RoleBinding|ValidatingAdmissionPolicy(Binding)?)\n/ { print "---"; print }' deploy/meshlb.yaml | kubectl apply -f - >/dev/null
# A case in the VM can't stop what runs here: it asks by an object, `hold`.
kubectl delete configmap hold -n meshlb-system --ignore-not-found >/dev/null
(
  done=
  while sleep 1; do
    read -r what seconds id < <(kubectl get configmap hold -n meshlb-system -o jsonpath='{.data.what} {.data.seconds} {.metadata.uid}' 2>/dev/null) || true
    [ -n "${id:-}" ] && [ "$id" != "$done" ] || continue
    case $what in kube-apiserver | etcd) ;; *) continue ;; esac
    done=$id; touch "$dir/hold/$what"; sleep "$seconds"; rm -f "$dir/hold/$what"
  done
) & holder=$!
# No kubelet says that it is alive: Kubernetes would take the nodes' pods out of service after some seconds.
if ! grep -q node-lifecycle "$dir/kube-controller-manager.args"; then
  echo '--controllers=*,-node-lifecycle-controller' >>"$dir/kube-controller-manager.args"
  touch "$dir/hold/kube-controller-manager"; sleep 1; rm "$dir/hold/kube-controller-manager"
fi
need_helm; need_prometheus
"$HELM" template meshlb charts/meshlb -n meshlb-system --kube-version "$(kube_version)" --set podMonitor.enabled=true --show-only templates/podmonitor.yaml >"$dir/podmonitors.yaml"
port=$(cat "$dir/port")
# The certificate in the file, since the VM sees another root.
ca=$(base64 -w0 <"$dir/pki/ca.crt")
given=$dir/kubeconfig-packets-$$
# The neighbour on the nodes, found beside the kubeconfig.
proxy=$(readlink -f "${KUBE_BIN:-$(kube_dir)}/kube-proxy"); ln -f "$proxy" "$dir/kube-proxy" 2>/dev/null || cp "$proxy" "$dir/kube-proxy"
config() { sed -e "s|https://127.0.0.1:$port|https://$1|" -e "s|certificate-authority: [^ }]*|certificate-authority-data: $ca|" "$dir/kubeconfig"; }
if [ "$(id -u)" = 0 ] && { [ -e /proc/net/ip_vs ] || { modprobe -q ip_vs 2>/dev/null && [ -e /proc/net/ip_vs ]; }; }; then
  config "127.0.0.1:$port" >"$given"
  MESHLB_KUBECONFIG_FOR_TESTS=$given MESHLB_AUDIT_LOG=$dir/audit.log MESHLB_PODMONITORS=$dir/podmonitors.yaml MESHLB_PROMETHEUS=$PROMETHEUS tests/kernel/run.sh --host "$@"
else
  config 10.0.2.100:6443 >"$given"
  to_apiserver "$dir/to-apiserver" "$port"
  # Everything is shut but the API server.
  export MESHLB_VM=${MESHLB_VM_NAME:-kube} MESHLB_VM_MEMORY=${MESHLB_VM_MEMORY:-4G} MESHLB_VM_QEMU_OPTS="-netdev user,id=host,restrict=on,guestfwd=tcp:10.0.2.100:6443-cmd:$dir/to-apiserver -device virtio-net-pci,netdev=host"
  tests/vm/up.sh
  trap 'tests/vm/down.sh; stop' EXIT
  tests/vm/run.sh <<'V'
set -e
[ ! -e /sys/class/net/host0 ] || exit 0
modprobe virtio_net
for _ in $(seq 50); do link=$(ls -d /sys/bus/virtio/drivers/virtio_net/virtio*/net/* 2>/dev/null | head -1) && [ -n "$link" ] && break; sleep 0.1; done
# Not eth0: that is what links in namespaces are called while they are made.
ip link set "${link##*/}" down; ip link set "${link##*/}" name host0; ip addr add 10.0.2.15/24 dev host0; ip link set host0 up
V
  MESHLB_KUBECONFIG_FOR_TESTS=/host$given MESHLB_AUDIT_LOG=/host$dir/audit.log MESHLB_PODMONITORS=/host$dir/podmonitors.yaml MESHLB_PROMETHEUS=/host$PROMETHEUS tests/kernel/run.sh --vm "$@"
fi
