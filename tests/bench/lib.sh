# shellcheck shell=bash
# Shared by the rows. Needs MESHLB_BIN, HELPER_BIN (examples/bench-helper), OUT (for the table) and WORK (scratch space).
set -euo pipefail
export LC_ALL=C
SERVICES=${MESHLB_BENCH_SERVICES:-10000}
REPEAT=${MESHLB_BENCH_REPEAT:-5}
RENDERERS=${MESHLB_BENCH_RENDERERS:-iptables-nft nftables}
NODE_IP=192.168.50.1
VIP_CIDR=10.200.0.0/16
METRICS=127.0.0.1:9477
NODE=node
MISSED=0
AGENT=

say() { echo "bench: $*"; }
missed() { say "NOT MEASURED: $*"; MISSED=1; }
in_ns() { ip netns exec "$1" "${@:2}"; }

# Nanoseconds since some moment; no process.
now() { local t=$EPOCHREALTIME; NOW=$((${t/./} * 1000)); }
# elapsed COMMAND…: sets ELAPSED to nanoseconds.
elapsed() { local start; now; start=$NOW; "$@"; now; ELAPSED=$((NOW - start)); }
# Median, least and most of the numbers on standard input.
summary() { sort -g | awk '{ v[NR] = $1 } END { if (NR == 0) exit 1; m = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2; print m, v[1], v[NR] }'; }
ms() { awk -v ns="$1" 'BEGIN { printf (ns < 1e8 ? "%.2f" : "%.0f"), ns / 1e6 }'; }

# row NAME WHAT MEASURED SPREAD GOAL VERDICT: a line of the final table.
row() { printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$@" >>"$OUT/table"; echo "       $1 $2: $3 ($4) goal $5 $6"; }
# ratio_row NAME WHAT "<="|">="|- GOAL FILE: FILE has one "A B" a repetition; the ratio of each, their median and spread.
ratio_row() {
  local name=$1 what=$2 sign=$3 goal=$4 file=$5
  local median least most verdict
  read -r median least most < <(awk '$2 > 0 { printf "%.6f\n", $1 / $2 }' "$file" | summary) || { missed "$name $what"; return; }
  verdict=$(awk -v m="$median" -v g="$goal" -v s="$sign" 'BEGIN { if (s == "-") print ""; else print ((s == "<=" ? m <= g : m >= g) ? "met" : "NOT MET") }')
  row "$name" "$what" "$(printf %.3f "$median")" "$(printf '%.3f–%.3f, n=%d' "$least" "$most" "$(wc -l <"$file")")" "$([ "$sign" = - ] || echo "$sign $goal")" "$verdict"
}

# A node that is programmed, alone in its namespace, with a link so that it has an address: node_up [NAME], and on_node and the
# agent of that name from then on.
node_up() {
  NODE=${1:-node}
  node_down "$NODE"
  ip netns add "mlbb-$NODE"
  on_node ip link set lo up
  ip link add "mlbb-$NODE" type veth peer name eth0 netns "mlbb-$NODE"
  ip link set "mlbb-$NODE" up
  on_node ip addr add $NODE_IP/24 dev eth0
  on_node ip link set eth0 up
  on_node ip route add default via 192.168.50.254
}
node_down() { ip netns del "mlbb-$1" 2>/dev/null || true; ip link del "mlbb-$1" 2>/dev/null || true; rm -rf "$WORK/state-$1" "$WORK/run-$1"; }
on_node() { ip netns exec "mlbb-$NODE" "$@"; }

# meshlb RENDERER COMMAND…
meshlb() {
  local renderer=$1; shift
  on_node "$MESHLB_BIN" "$@" --node n1 --node-ip $NODE_IP --vip-cidr "$VIP_CIDR" --renderer "$renderer" \
    --state-dir "$WORK/state-$NODE" --run-dir "$WORK/run-$NODE"
}
# agent_start RENDERER DIR: sets AGENT to its process. (A function in the background would be a shell of its own.)
agent_start() {
  ip netns exec "mlbb-$NODE" env -i PATH="$PATH" "$MESHLB_BIN" agent --source "$2" --node n1 --node-ip $NODE_IP --vip-cidr "$VIP_CIDR" --renderer "$1" \
    --state-dir "$WORK/state-$NODE" --run-dir "$WORK/run-$NODE" --resync 3600 --log-format json >"$WORK/agent-$NODE.log" 2>&1 &
  AGENT=$!
}
# Waits until the agent says that the kernel is as it should be.
agent_ready() { on_node "$HELPER_BIN" ready "$AGENT" "$METRICS" || { tail -5 "$WORK/agent-$NODE.log"; return 1; }; }
agent_stop() {
  [ -n "$AGENT" ] || return 0
  kill "$AGENT" 2>/dev/null || true
  wait "$AGENT" 2>/dev/null || true
  AGENT=
}
metric() { on_node curl -sf "http://$METRICS/metrics" | awk -v name="$1" 'index($0, name) == 1 { sum += $NF } END { printf "%.9f\n", sum }'; }
