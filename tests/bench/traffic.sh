# shellcheck shell=bash
# Rows 1 and 2: what a connection through a VIP costs, and whether the number of services matters to it.
#
#   client ── 10.NET.1.0/24 ── node ── 10.NET.2.0/24 ── pod        the pod is on the node: both ways are the same but for IPVS

POD_PORT=8080
# Straight to the pod is another port: with one for both, connections timed out (it was not looked into; a port of the client that
# is used by both ways within two minutes gives both the same addresses and ports at the pod).
DIRECT_PORT=8081

# A client and a pod on the node that was made last: traffic_links NET. Both may be on several nodes.
traffic_links() {
  local net=$1 n=1 end
  for end in client pod; do
    ip netns add "mlbb-$end" 2>/dev/null || true
    ip -n "mlbb-$end" link set lo up
    ip link add "$end-$net" netns "mlbb-$NODE" type veth peer name "$NODE-$net" netns "mlbb-$end"
    ip -n "mlbb-$NODE" addr add "10.$net.$n.1/24" dev "$end-$net"
    ip -n "mlbb-$NODE" link set "$end-$net" up
    ip -n "mlbb-$end" addr add "10.$net.$n.2/24" dev "$NODE-$net"
    ip -n "mlbb-$end" link set "$NODE-$net" up
    n=2
  done
  ip -n mlbb-client route add "10.$net.2.0/24" via "10.$net.1.1"
  ip -n mlbb-client route add "$VIP_CIDR" via "10.$net.1.1"
  ip -n mlbb-pod route add "10.$net.1.0/24" via "10.$net.2.1"
  ip netns exec mlbb-client sysctl -qw net.ipv4.ip_local_port_range="1024 65535"
}
# The service that is measured: traffic_service DIR VIP NET.
traffic_service() {
  cat >"$1/traffic.yaml" <<X
apiVersion: meshlb.dev/v1alpha1
kind: MeshService
metadata: {name: traffic}
spec:
  vips: [$2]
  ports:
  - {name: accept, port: 80, targetPort: $POD_PORT}
  - {name: iperf, port: 5201}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: traffic-1, labels: {kubernetes.io/service-name: traffic}}
addressType: IPv4
ports: [{name: accept, port: $POD_PORT, protocol: TCP}, {name: iperf, port: 5201, protocol: TCP}]
endpoints:
- {addresses: [10.$3.2.2], nodeName: n1, conditions: {ready: true}}
X
}
traffic_servers() {
  ip netns exec mlbb-pod "$HELPER_BIN" accept "0.0.0.0:$POD_PORT" & PIDS+=($!)
  ip netns exec mlbb-pod "$HELPER_BIN" accept "0.0.0.0:$DIRECT_PORT" & PIDS+=($!)
  ip netns exec mlbb-pod iperf3 -s >"$WORK/iperf-server.log" 2>&1 & PIDS+=($!)
  sleep 1
}
throughput() { # throughput ADDRESS: sets RATE to bits per second that arrived
  ip netns exec mlbb-client iperf3 -c "$1" -t "${MESHLB_BENCH_IPERF_SECONDS:-2}" -J >"$WORK/iperf.json" || { cat "$WORK/iperf.json"; return 1; }
  RATE=$(awk '/"sum_received"/ { in_sum = 1 } in_sum && /"bits_per_second"/ { gsub(/[^0-9.e+]/, "", $2); printf "%.0f", $2; exit }' "$WORK/iperf.json")
  [ -n "$RATE" ]
}

# rates NAME SIGN GOAL: connect rate and throughput by the VIP over those straight to the pod. Short turns, many of them: a machine
# that does something else meanwhile then slows both.
VIP=10.200.0.10 DIRECT=10.244.2.2
rates() {
  local name=$1 sign=$2 goal=$3 i file
  file=$OUT/connect-$name
  ip netns exec mlbb-client "$HELPER_BIN" connect "${MESHLB_BENCH_CONNECT_SECONDS:-1}" $((REPEAT * 6)) "$VIP:80" "$DIRECT:$DIRECT_PORT" >"$file"
  ratio_row connect "$name: connect rate, VIP / direct" "$sign" "$goal" "$file"
  file=$OUT/throughput-$name; : >"$file"
  throughput "$DIRECT"
  for ((i = 1; i <= REPEAT * 2; i++)); do
    throughput "$VIP"; local through=$RATE
    throughput "$DIRECT"
    echo "$through $RATE" >>"$file"
  done
  ratio_row throughput "$name: bulk throughput, VIP / direct" "$sign" "$goal" "$file"
}

row_traffic() {
  local renderer
  for renderer in $RENDERERS; do
    mkdir -p "$WORK/one"; traffic_service "$WORK/one" $VIP 244
    node_up; traffic_links 244
    meshlb "$renderer" apply "$WORK/one"
    traffic_servers
    rates "$renderer" ">=" 0.95
    finish
  done
  # The same by IPVS alone, set up by hand: how much of the cost is the kernel's.
  node_up; traffic_links 244
  on_node sysctl -qw net.ipv4.ip_forward=1 net.ipv4.vs.conntrack=1
  on_node ip route add local "$VIP_CIDR" dev lo
  on_node iptables -t nat -A POSTROUTING -s 127.0.0.2 -j MASQUERADE
  local ports
  for ports in 80:$POD_PORT 5201:5201; do
    on_node ipvsadm -A -t "$VIP:${ports%:*}" -s rr
    on_node ipvsadm -a -t "$VIP:${ports%:*}" -r "$DIRECT:${ports#*:}" -m
  done
  traffic_servers
  rates "ipvsadm alone" - ""
  finish
}

row_services() {
  local renderer file
  for renderer in $RENDERERS; do
    rm -rf "$WORK/one"; mkdir -p "$WORK/one"; traffic_service "$WORK/one" 10.201.0.10 244
    "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"; traffic_service "$WORK/many" 10.200.0.10 245
    VIP_CIDR=10.201.0.0/16 node_up small; VIP_CIDR=10.201.0.0/16 traffic_links 244
    VIP_CIDR=10.201.0.0/16 meshlb "$renderer" apply "$WORK/one"
    node_up node; traffic_links 245
    meshlb "$renderer" apply "$WORK/many" 2>&1 | tail -1
    traffic_servers
    file=$OUT/services-$renderer
    ip netns exec mlbb-client "$HELPER_BIN" connect "${MESHLB_BENCH_CONNECT_SECONDS:-1}" $((REPEAT * 6)) 10.200.0.10:80 10.201.0.10:80 >"$file"
    ratio_row services "$renderer: connect rate, $SERVICES services / 1" ">=" 0.97 "$file"
    finish
  done
}
