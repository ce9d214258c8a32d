#!/usr/bin/env bash
# In the VM: guest.sh SHARE PACKAGES makes it a node: network, containerd, images, kubelet, kube-proxy; and a client beside it.
set -euo pipefail
share=$1 packages=$2
export PATH=$packages/usr/sbin:$packages/usr/bin:$PATH
until_true() { local n=$1; shift; for _ in $(seq "$n"); do ! "$@" >/dev/null 2>&1 || return 0; sleep 1; done; echo "not in $n s: $*"; return 1; }

modprobe -a virtio_net overlay br_netfilter nf_conntrack veth bridge
for _ in $(seq 50); do link=$(ls -d /sys/bus/virtio/drivers/virtio_net/virtio*/net/* 2>/dev/null | head -1) && [ -n "$link" ] && break; sleep 0.1; done
# Not eth0: that is what links in namespaces are called while they are made.
ip link set "${link##*/}" down; ip link set "${link##*/}" name host0; ip addr add 10.0.2.15/24 dev host0; ip link set host0 up
# Nothing gets out by it: the VM's network is shut (see node.sh).
ip route add default via 10.0.2.2
sysctl -q -w net.ipv4.ip_forward=1
# A machine outside the cluster.
ip netns add client
ip link add client0 type veth peer name eth0 netns client
ip addr add 192.168.60.1/24 dev client0; ip link set client0 up
ip -n client addr add 192.168.60.2/24 dev eth0; ip -n client link set eth0 up; ip -n client link set lo up
ip -n client route add default via 192.168.60.1

mount --make-rshared /
for d in /var/lib/containerd /var/lib/kubelet /var/lib/cni /var/lib/meshlb /var/log; do mkdir -p $d; mount -t tmpfs tmpfs $d; done
# In memory: programs start faster than from the share.
mkdir -p /run/kube /run/cni-bin /etc/cni/net.d
cp "$share/kube" /run/kube/kube; cp "$packages"/usr/lib/cni/* /run/cni-bin/; cp "$share/client.py" /run/
for p in kubelet kube-proxy; do ln -s kube /run/kube/$p; done
ln -s "$packages/usr/bin/ctr" /run/kube/
cp "$share/cni.conflist" /etc/cni/net.d/10-pods.conflist

setsid containerd --config "$share/containerd.toml" >/var/log/containerd.log 2>&1 </dev/null &
until_true 120 ctr version
for image in pause meshlb web; do ctr -n k8s.io images import "$share/$image.tar"; done
setsid /run/kube/kubelet --config "$share/kubelet.yaml" --kubeconfig "$share/kubelet.kubeconfig" --hostname-override n1 --node-ip 10.0.2.15 \
  --housekeeping-interval 60s --root-dir /var/lib/kubelet --cert-dir /var/lib/kubelet/pki >/var/log/kubelet.log 2>&1 </dev/null &
cat >/run/proxy.sh <<'P'
#!/usr/bin/env bash
# proxy.sh MODE|stop: ends kube-proxy and removes what it has programmed, and starts it in a mode.
if [ -e /run/proxy.pid ]; then
  pid=$(cat /run/proxy.pid); kill "$pid" 2>/dev/null
  # Nobody may be there who takes its status: a dead one has no program.
  for _ in $(seq 300); do readlink "/proc/$pid/exe" >/dev/null || break; sleep 0.2; done; rm /run/proxy.pid
  /run/kube/kube-proxy --cleanup >>/var/log/proxy.log 2>&1
fi
[ "$1" != stop ] || exit 0
# A full comparison every ten seconds, so that minutes show many of them. With nftables node ports are the first address's alone
# by default.
setsid /run/kube/kube-proxy --kubeconfig KUBECONFIG --hostname-override n1 --cluster-cidr 10.244.0.0/16 --proxy-mode "$1" \
  --nodeport-addresses 0.0.0.0/0 --iptables-sync-period 10s --ipvs-sync-period 10s --conntrack-max-per-core 0 >>/var/log/proxy.log 2>&1 </dev/null &
echo $! >/run/proxy.pid
P
sed -i "s|KUBECONFIG|$share/proxy.kubeconfig|" /run/proxy.sh; chmod +x /run/proxy.sh
until_true 120 curl -sk https://10.0.2.15:10250/healthz
