#!/usr/bin/env bash
# Records again what flannel and Calico program on a node: builds the real programs, runs each in a network namespace of the VM
# that is made as a node of the test topology (tests/kernel/topology.rs), and writes what is then in the kernel into this folder.
#
#   tests/kernel/rulesets/record.sh [flannel] [calico]     both, if none is named
#   tests/kernel/rulesets/record.sh --here DIR NAME…       in the VM: in namespaces of this machine, into DIR
#
# What is kept is ~/.cache/meshlb/flannel and ~/.cache/meshlb/calico; etcd is Debian's, unpacked. The VM is that of MESHLB_VM, left
# as it was. Calico's releases are no versions of a Go module (v3 without /v3 in its path, and parts replaced by its own folders): its
# source is cloned, or is in CALICO_SOURCE; what it needs comes from the Go module proxy.
flannel_version=v0.28.10 calico_version=v3.32.1
flannel_released=2026-10-08 calico_released=2026-06-24
. "$(dirname "$0")/../../cluster/lib.sh"
here=$(cd "$(dirname "$0")" && pwd)
flanneld=$cache/flannel/$flannel_version/flanneld felix=$cache/calico/$calico_version/calico-felix

build() { GOTOOLCHAIN=local nice -n 10 "$(go_bin)" build -buildvcs=false -trimpath "$@"; }
need_flannel() {
  [ -x "$flanneld" ] && return
  say "record: building flannel $flannel_version (from the Go module proxy, a minute) into $cache/flannel: its rules are recorded"
  local source=$cache/flannel/source module
  rm -rf "$source"; mkdir -p "${flanneld%/*}"
  module=$(cd "$cache" && GOTOOLCHAIN=local "$(go_bin)" mod download -json "github.com/flannel-io/flannel@$flannel_version" | sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p')
  cp -r "$module" "$source"; chmod -R u+w "$source"
  # The backend for Tencent's cloud has nothing to do with rules, and not every proxy has the module that it needs.
  sed -i '/backend\/tencentvpc"/d' "$source/main.go"
  # Its backend `udp` is in C.
  (cd "$source" && CGO_ENABLED=1 build -ldflags "-s -w -X github.com/flannel-io/flannel/pkg/version.Version=$flannel_version" -o "$flanneld" .)
  rm -rf "$source"
}
need_calico() {
  [ -x "$felix" ] && return
  local source=${CALICO_SOURCE:-$cache/calico/source-$calico_version}
  [ -d "$source" ] || {
    say "record: cloning Calico $calico_version into $source"
    git clone -q --depth 1 --branch "$calico_version" https://github.com/projectcalico/calico "$source"
  }
  say "record: building Felix, Calico's agent, $calico_version (its modules from the Go module proxy, ten minutes) into $cache/calico: its rules are recorded"
  mkdir -p "${felix%/*}"
  # Without C there is no eBPF data plane in it.
  (cd "$source" && CGO_ENABLED=0 build -ldflags "-s -w -X github.com/projectcalico/calico/pkg/buildinfo.Version=$calico_version" -o "$felix" ./felix/cmd/calico-felix)
}

# In the VM, each recording in a namespace of its own.
pids=()
end() { ip netns pids record 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true; pids=(); ip netns del record 2>/dev/null || true; }
in_ns() { ip netns exec record "$@"; }
# Node 1 of the topology with its two pods, and an empty etcd.
node() {
  ip netns add record
  local link address
  in_ns ip link set lo up
  for link in eth0 v11 v12; do
    in_ns ip link add $link type veth peer name $link-peer
    in_ns ip link set $link-peer up; in_ns ip link set $link up
  done
  in_ns sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.eth0.accept_dad=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
  for address in 192.168.50.1/24 fd00:50::1/64; do in_ns ip addr add $address dev eth0; done
  in_ns ip route add default via 192.168.50.254
  in_ns ip -6 route add default via fd00:50::fe
  ip netns exec record "$(etcd_bin)" --data-dir "$work/etcd-$1" --unsafe-no-fsync --listen-peer-urls http://127.0.0.1:2380 >"$result/etcd.log" 2>&1 & pids+=($!); disown
  wait_for "etcd answers" in_ns curl -fs http://127.0.0.1:2379/health
}
# put KEY: standard input into etcd.
put() { in_ns curl -fsS -o "$work/put" http://127.0.0.1:2379/v3/kv/put -d "{\"key\": \"$(printf %s "$1" | base64 -w 0)\", \"value\": \"$(base64 -w 0)\"}"; }
# wait_for WHAT COMMAND…: until it goes well, at most two minutes.
wait_for() {
  local what=$1 start=$SECONDS pid; shift
  while [ $((SECONDS - start)) -lt 120 ]; do
    "$@" >/dev/null 2>&1 && return
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null || break 2; done
    sleep 0.5
  done
  tail -n 40 "$result"/*.log >&2; die "not within two minutes, or a program has ended: $what"
}
# settled FILE PATTERN: what save writes has the pattern, and is what it was two seconds ago.
settled() {
  save >"$1.new"
  grep -q -- "$2" "$1.new" && cmp -s "$1" "$1.new" || { mv "$1.new" "$1"; sleep 2; return 1; }
}
# Without counters and without the lines that say when it was saved.
xtables() { "$1-save" | sed -E '/^#/d; s/\[[0-9]+:[0-9]+\]/[0:0]/'; }
# with FLAVOUR: PATH with iptables of this flavour.
with() {
  local p
  rm -rf "$work/programs"; mkdir "$work/programs"
  for p in {iptables,ip6tables}{,-save,-restore}; do
    ln -s "$(command -v "${p%%-*}-$1${p#"${p%%-*}"}")" "$work/programs/$p"
  done
  PATH=$work/programs:$path
}
head_of() { # head_of PROGRAM MODE
  echo "# What $1 programs on a node, recorded by record.sh on $(date +%F), on Linux $(uname -r): $2."
}

# flannel FLAVOUR, of iptables, or nftables for its nftables mode. As its chart starts it, but that its subnet comes from etcd.
flannel() {
  local p
  with "${1/nftables/nft}"
  node flannel-$1
  # Docker's policy, which flannel's rules for pods are there for; those in a table of nft's can't help against it.
  [ "$1" = nftables ] || for p in iptables ip6tables; do in_ns env PATH="$PATH" "$p" -P FORWARD DROP; done
  put /coreos.com/network/config <<J
{"Network": "10.244.0.0/16", "SubnetLen": 24, "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.1.0",
 "EnableIPv6": true, "IPv6Network": "fd00:244::/32", "IPv6SubnetLen": 64, "IPv6SubnetMin": "fd00:244:1::", "IPv6SubnetMax": "fd00:244:1::",
 "EnableNFTables": $([ "$1" = nftables ] && echo true || echo false), "Backend": {"Type": "vxlan"}}
J
  ip netns exec record env PATH="$PATH" "$flanneld" --ip-masq --iface=eth0 --etcd-endpoints=http://127.0.0.1:2379 \
    --subnet-file="$work/subnet-$1.env" >"$result/flanneld.log" 2>&1 & pids+=($!); disown
}
calico() {
  with "${1/nftables/nft}"
  node calico-$1
  local j
  # As calico-node writes it when it starts on a cluster, and kube-controllers for the namespace and its service account.
  resource clusterinformations/default ClusterInformation '"clusterGUID": "00000000000000000000000000000000", "calicoVersion": "'$calico_version'", "clusterType": "k8s,bgp", "datastoreReady": true'
  resource felixconfigurations/default FelixConfiguration '"logSeverityScreen": "Info", "reportingInterval": "0s"'
  resource tiers/default Tier '"order": 1000000, "defaultAction": "Deny"'
  resource tiers/kube-admin Tier '"order": 1000, "defaultAction": "Pass"'
  resource tiers/kube-baseline Tier '"order": 10000000, "defaultAction": "Pass"'
  resource ippools/default-ipv4-ippool IPPool '"cidr": "10.244.0.0/16", "ipipMode": "Always", "vxlanMode": "Never", "natOutgoing": true, "blockSize": 26, "nodeSelector": "all()", "allowedUses": ["Workload", "Tunnel"]'
  # natOutgoing: as the test topology needs it; the default for IPv6 is without.
  resource ippools/default-ipv6-ippool IPPool '"cidr": "fd00:244::/32", "ipipMode": "Never", "vxlanMode": "Never", "natOutgoing": true, "blockSize": 122, "nodeSelector": "all()", "allowedUses": ["Workload", "Tunnel"]'
  resource profiles/kns.default Profile '"ingress": [{"action": "Allow", "source": {}, "destination": {}}], "egress": [{"action": "Allow", "source": {}, "destination": {}}], "labelsToApply": {"pcns.projectcalico.org/name": "default"}'
  resource profiles/ksa.default.default Profile '"labelsToApply": {"pcsa.projectcalico.org/name": "default"}'
  for j in 1 2 3; do
    resource nodes/n$j Node '"addresses": [{"address": "192.168.50.'$j'/24", "type": "CalicoNodeIP"}, {"address": "fd00:50::'$j'/64", "type": "CalicoNodeIP"}], "bgp": {"ipv4Address": "192.168.50.'$j'/24", "ipv6Address": "fd00:50::'$j'/64", "ipv4IPIPTunnelAddr": "10.244.'$j'.254"}'
  done
  for j in 1 2; do
    resource workloadendpoints/default/n1-k8s-p1$j-eth0 WorkloadEndpoint '"orchestrator": "k8s", "node": "n1", "pod": "p1'$j'", "endpoint": "eth0", "serviceAccountName": "default", "interfaceName": "v1'$j'", "ipNetworks": ["10.244.1.1'$j'/32", "fd00:244:1::1'$j'/128"], "profiles": ["kns.default", "ksa.default.default"]' \
      '"labels": {"projectcalico.org/namespace": "default", "projectcalico.org/orchestrator": "k8s", "projectcalico.org/serviceaccount": "default"}, '
  done
  # The first two lines are calico-node's felix.cfg and what its manifest sets, but for IPv6; then what is of this place, and that
  # nothing of an eBPF data plane is looked for, which this Felix is built without.
  ip netns exec record env PATH="$PATH" FELIX_METADATAADDR=none FELIX_LOGFILEPATH=none FELIX_LOGSEVERITYFILE=none FELIX_LOGSEVERITYSYS=none \
    FELIX_DEFAULTENDPOINTTOHOSTACTION=ACCEPT FELIX_IPV6SUPPORT=true FELIX_IPINIPMTU=0 FELIX_VXLANMTU=0 FELIX_WIREGUARDMTU=0 \
    FELIX_IPTABLESBACKEND="${1/nftables/auto}" FELIX_NFTABLESMODE="$([ "$1" = nftables ] && echo Enabled || echo Disabled)" \
    DATASTORE_TYPE=etcdv3 ETCD_ENDPOINTS=http://127.0.0.1:2379 FELIX_FELIXHOSTNAME=n1 FELIX_INTERFACEPREFIX=v \
    FELIX_USAGEREPORTINGENABLED=false FELIX_ENDPOINTSTATUSPATHPREFIX="$work" FELIX_DebugSkipCTLBCleanup=true "$felix" --config-file=/dev/null >"$result/felix.log" 2>&1 & pids+=($!); disown
}
# resource PLURAL/NAME KIND SPEC [METADATA]: an object of Calico's.
resource() {
  local name=${1#*/} namespace=
  [ "$name" = "${name#*/}" ] || namespace='"namespace": "'${name%/*}'", '
  put "/calico/resources/v3/projectcalico.org/$1" <<J
{"apiVersion": "projectcalico.org/v3", "kind": "$2", "spec": {$3}, "metadata": {"name": "${name##*/}", $namespace${4:-}"uid": "00000000-0000-0000-0000-000000000000", "creationTimestamp": "2026-01-01T00:00:00Z"}}
J
}

record() { # record NAME FLAVOUR VERSION PATTERN-V4 PATTERN-V6
  local name=$1 flavour=$2 what=$3 family out=$result/$1
  say "record: $name, $flavour"
  "$name" "$flavour"
  if [ "$flavour" = nftables ]; then
    save() { in_ns nft -s list ruleset; }
    wait_for "$name has written its tables" settled "$work/dump" "$4"
    { head_of "$what" "nftables mode"; cat "$work/dump"; } >"$out.nft"
  else
    for family in iptables ip6tables; do
      save() { in_ns env PATH="$PATH" bash -c "$(declare -f xtables); xtables $family"; }
      rm -f "$work/dump"
      wait_for "$name has written its rules with $family-$flavour" settled "$work/dump" "$4"
      { head_of "$what" "iptables mode, saved by $family-save"; cat "$work/dump"; } >"$out.$flavour.$family"
    done
    in_ns ipset save >"$work/sets"
    [ ! -s "$work/sets" ] || { head_of "$what" "its ipsets"; cat "$work/sets"; } >"$out.$flavour.ipset"
  fi
  end
}

if [ "${1:-}" = --here ]; then
  result=$2; shift 2
  path=$PATH work=$(mktemp -d); trap 'end; rm -rf "$work"' EXIT
  for module in br_netfilter ip_tables ip6_tables ipip vxlan; do modprobe -q $module || true; done
  for name; do
    for flavour in nft legacy nftables; do
      case $name in
        flannel) record flannel $flavour "flannel $flannel_version (of $flannel_released, backend vxlan)" FLANNEL-FWD.*ACCEPT\\\|masquerade ;;
        calico) record calico $flavour "Calico $calico_version (Felix of $calico_released, one pool a family with natOutgoing)" 'tw-v12' ;;
      esac
    done
  done
  exit 0
fi

names=("$@"); [ ${#names[@]} -gt 0 ] || names=(flannel calico)
need_go "it builds both programs"; need_etcd "flannel and Calico read from it what they program"
for name in "${names[@]}"; do
  case $name in flannel | calico) "need_$name" ;; *) die "record.sh knows no $name" ;; esac
done
vm_up || { trap '"$here/../../vm/down.sh"' EXIT; "$here/../../vm/up.sh"; }
# A fresh name each time: the VM may have read the old files.
run=$vm/record-$$; rm -rf "$vm"/record-*; mkdir -p "$run/out"
mkdir -p "$run/tests/kernel/rulesets"; cp "$here/record.sh" "$run/tests/kernel/rulesets/"; cp -r "$here/../../vm" "$here/../../cluster" "$run/tests/"
MESHLB_CACHE=$cache MESHLB_VM_ENV=MESHLB_CACHE "$here/../../vm/run.sh" -t 1800 bash "$run/tests/kernel/rulesets/record.sh" --here "$run/out" "${names[@]}"
for name in "${names[@]}"; do
  # Both flavours of iptables save the same lines, in another order.
  for family in iptables ip6tables; do
    diff <(sort "$run/out/$name.nft.$family") <(sort "$run/out/$name.legacy.$family") >&2 || die "$name has not written the same with both flavours of iptables"
    cp "$run/out/$name.nft.$family" "$here/$name.$family"
  done
  [ ! -e "$run/out/$name.nft.ipset" ] || cp "$run/out/$name.nft.ipset" "$here/$name.ipset"
  cp "$run/out/$name.nft" "$here/"
done
rm -rf "$run"
