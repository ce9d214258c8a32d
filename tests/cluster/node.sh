#!/usr/bin/env bash
# A real node, from `helm install` to `helm uninstall`: the control plane runs here (up.sh); kubelet, containerd, kube-proxy and
# pods in a VM of their own; the image is built from the Dockerfile (image.sh). The last line is the sum.
#
#   tests/cluster/node.sh [--keep] [CASE…]      --keep: leaves all of it up, to look at, and to run again in seconds
#
# MESHLB_IMAGE=FILE   a docker-archive of docker.io/library/meshlb:test, instead of building it
# MESHLB_VM_NAME=NAME the VM's name (node)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export MESHLB_CLUSTER_NAME=${MESHLB_CLUSTER_NAME:-node} MESHLB_VM=${MESHLB_VM_NAME:-node} MESHLB_VM_MEMORY=${MESHLB_VM_MEMORY:-5G}
. "$here/lib.sh"
keep=; [ "${1:-}" != --keep ] || { keep=1; shift; }
[ "$(id -u)" = 0 ] || die "a node needs root"
"$here/setup.sh"
need_helm
if [ ! -e "$cache/node/usr/bin/containerd" ]; then
  say "node: unpacking Debian's containerd, runc and CNI plugins into $cache/node: they run the pods in the VM; nothing is installed or started"
  unpack_debian "$cache/node.new" containerd runc containernetworking-plugins
  mv "$cache/node.new" "$cache/node"
fi
proxy=
finish() {
  [ -z "$proxy" ] || kill "$proxy" 2>/dev/null || true
  if [ -n "$keep" ]; then say "node: left up; tests/vm/down.sh with MESHLB_VM=$MESHLB_VM and tests/cluster/up.sh --stop with MESHLB_CLUSTER_NAME=$MESHLB_CLUSTER_NAME end it"; return; fi
  "$here/../vm/down.sh"; "$here/up.sh" --stop
}
trap finish EXIT
image=${MESHLB_IMAGE:-$cache/meshlb-image.tar}
[ -n "${MESHLB_IMAGE:-}" ] || "$here/image.sh" "$image"

running >/dev/null || "$here/up.sh"
port=$(cat "$dir/port")
kube=${KUBE_BIN:-$(kube_dir)}
# How the API server reaches kubelet: QEMU's user network is not a network of this machine's, so by a proxy.
if [ ! -e "$dir/kubelet-port" ]; then
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])' >"$dir/kubelet-port"
fi
kubelet_port=$(cat "$dir/kubelet-port")
python3 "$here/node/connect.py" "$dir/connect.sock" "10.0.2.15:10250=127.0.0.1:$kubelet_port" >"$dir/connect.log" 2>&1 &
proxy=$!
if ! grep -q egress "$dir/kube-apiserver.args"; then
  cat >"$dir/egress.yaml" <<Y
apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- {name: cluster, connection: {proxyProtocol: HTTPConnect, transport: {uds: {udsName: $dir/connect.sock}}}}
Y
  # The accounts of kubelet and kube-proxy, with the rights that every cluster gives them.
  printf '%s\n' "node-token,system:node:n1,n1,system:nodes" "proxy-token,system:kube-proxy,proxy" >>"$dir/tokens.csv"
  apiserver_args "$kube" --egress-selector-config-file "$dir/egress.yaml" --kubelet-preferred-address-types InternalIP
fi
config() { # config TOKEN: a kubeconfig for programs in the VM
  cat <<Y
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://10.0.2.100:6443", certificate-authority-data: $(base64 -w0 <"$dir/pki/ca.crt")}}]
users: [{name: it, user: {token: $1}}]
contexts: [{name: test, context: {cluster: test, user: it}}]
current-context: test
Y
}
if ! vm_up; then
  to_apiserver "$dir/to-apiserver" "$port"
  # Everything is shut but the API server, and from here kubelet.
  MESHLB_VM_QEMU_OPTS="-netdev user,id=host,restrict=on,guestfwd=tcp:10.0.2.100:6443-cmd:$dir/to-apiserver,hostfwd=tcp:127.0.0.1:$kubelet_port-10.0.2.15:10250 -device virtio-net-pci,netdev=host" \
    "$here/../vm/up.sh"
fi
share=$vm/node; mkdir -p "$share"
export MESHLB_NODE_SHARE=$share
if [ ! -e "$share/ready" ] || [ "$(cat "$share/ready")" != "$(vm_pid)" ]; then
  rm -rf "$share"; mkdir -p "$share"
  cp "$here"/node/{guest.sh,client.py,containerd.toml,cni.conflist,kubelet.yaml} "$share/"
  cp -L "$kube/kube" "$share/kube"; cp "$image" "$share/meshlb.tar"
  "$here/image.sh" --pause "$share/pause.tar"; "$here/image.sh" --web "$share/web.tar"
  config node-token >"$share/kubelet.kubeconfig"; config proxy-token >"$share/proxy.kubeconfig"
  "$here/../vm/run.sh" -t 900 bash "$share/guest.sh" "$share" "$cache/node"
  vm_pid >"$share/ready"
fi
export HELM KUBECTL="$kube/kubectl" KUBECONFIG="$dir/kubeconfig"
python3 "$here/node/cases.py" "$@"
