#!/usr/bin/env bash
# Measures our DNS beside CoreDNS, in turn on one machine, both with the same names: docs/performance.md says what came out.
# dnsperf (Debian's) counts answers a second, a client of our own how long they take at a fixed rate. dnsperf takes more of a core for
# a question than our server does for its answer, so with two cores it counts itself; kxdpgun (of Debian's knot-dnsutils) sends by XDP,
# so many a second, whatever comes back: with a server on one core and it on the other, that finds the most that are all answered.
# MESHLB_BENCH_SERVICES (10000), MESHLB_BENCH_REPEAT (3), MESHLB_BENCH_SECONDS (8) of each measurement.
. "$(dirname "$0")/lib.sh"
dns_setup; dns_build
services=${MESHLB_BENCH_SERVICES:-10000} repeat=${MESHLB_BENCH_REPEAT:-3} seconds=${MESHLB_BENCH_SECONDS:-8}
mkdir "$work/dir"
"$HELPER" manifests "$work/dir" "$services"
"$HELPER" names "$services" >"$work/hosts"
awk '{print $2, "A"}' "$work/hosts" | shuf --random-source=/dev/zero >"$work/queries"
# Names of others: a CoreDNS has them, and both forward to it with a cache.
for i in $(seq 1000); do echo "192.0.2.$((i % 250)) w$i.example.com"; done >"$work/others"
awk '{print $2, "A"}' "$work/others" >"$work/other-queries"
BEHIND=127.77.0.3
cat >"$work/Corefile.behind" <<C
. {
  bind $BEHIND
  hosts $work/others {
    ttl 3600
  }
}
C
ready_name=w1.example.com start behind $BEHIND "$(dns_dir)/coredns" -conf "$work/Corefile.behind" -quiet
rss() { awk '$1 == "VmRSS:" {printf "%.1f", $2 / 1024}' "/proc/$1/status"; }
median() { sort -n | awk '{v[NR] = $1} END {printf "%.3f (%.3f–%.3f, n=%d)", v[int((NR + 1) / 2)], v[1], v[NR], NR}'; }
ticks() { awk '{sub(/.*\) /, ""); print $12 + $13}' "/proc/$1/stat"; }
# With two cores, one of them dnsperf's, answers a second say as much of dnsperf as of a server; so the server's CPU time is taken, too.
qps() { # qps ADDRESS FILE PID: answers a second, and microseconds of CPU for each
  local before n
  before=$(ticks "$3")
  n=$(answers "$1" "$2")
  awk -v n="$n" -v t=$(($(ticks "$3") - before)) -v hz="$(getconf CLK_TCK)" -v s="$seconds" 'BEGIN {printf "%.0f %.2f\n", n, t / hz * 1e6 / (n * s)}'
}
answers() { # answers ADDRESS FILE
  dnsperf -s "$1" -d "$2" -l "$seconds" -c 8 -q 100 -T 1 2>/dev/null | awk '/Queries per second/ {print $4} /Queries lost/ && $3 > 0 {print "lost", $3 > "/dev/stderr"}'
}
# The names as CoreDNS is to have them.
our_zone() { printf 'mesh.internal {\n  bind %s\n  hosts %s {\n    ttl 30\n  }\n}\n' $THEIRS "$work/hosts"; }
# Until ours has read the names.
until_answered() {
  until [ "$(${IN_CLIENT[@]+"${IN_CLIENT[@]}"} dig +short @$OURS "$(head -1 "$work/queries" | cut -d' ' -f1)")" ]; do sleep 0.2; done
}
p99() { "$HELPER" latency "$1:53" "$services" 5000 "$seconds"; }

ready_name=s00000.default.mesh.internal coredns <<C
$(our_zone)
. {
  bind $THEIRS
  forward . $BEHIND
  cache 3600
}
C
theirs=$STARTED
begun=$(date +%s%N)
# A limit, as an agent has, that the only client there is does not reach.
rate=100000000
serve "$work/dir" --dns-upstream $BEHIND; ours=$STARTED
until_answered
echo "bench: $services services are answered $((($(date +%s%N) - begun) / 1000000)) ms after the start"
for ((i = 1; i <= repeat; i++)); do
  for what in zone cached; do
    if [ $what = zone ]; then file=$work/queries; else file=$work/other-queries; fi
    read -r a acpu <<<"$(qps $OURS "$file" "$ours")"; read -r b bcpu <<<"$(qps $THEIRS "$file" "$theirs")"
    awk -v a="$a" -v b="$b" 'BEGIN {printf "%.4f\n", a / b}' >>"$work/$what"
    awk -v a="$acpu" -v b="$bcpu" 'BEGIN {printf "%.4f\n", b / a}' >>"$work/$what-cpu"
    echo "bench: $what: $a and $b answers a second, $acpu and $bcpu µs of CPU each"
  done
  read -r a50 a99 alost <<<"$(p99 $OURS)"; read -r b50 b99 blost <<<"$(p99 $THEIRS)"
  awk -v a="$a99" -v b="$b99" 'BEGIN {printf "%.4f\n", a / b}' >>"$work/p99"
  echo "bench: at 5,000 questions a second: p50 $a50 and $b50 µs, p99 $a99 and $b99 µs, without an answer $alost and $blost"
done
echo "bench: memory of the names alone: $("$HELPER" memory "$work/dir") MiB"
echo "bench: resident memory with $services services: $(rss "$ours") MiB, CoreDNS $(rss "$theirs") MiB"
"$HELPER" changes $OURS:53 "$work/dir" 200
stop "$ours"; stop "$theirs"

[ "$(nproc)" -gt 1 ] || die "with one core the last row can't be measured"
# Both once more, on the first core and behind a veth pair, one after another; who asks, on the last core.
OURS=10.77.0.1 THEIRS=10.77.0.2
apart_end() { local n; for n in server client; do ip netns del "mlbd-$n" 2>/dev/null || true; done; }
trap 'stop_all; apart_end; rm -rf "$work"' EXIT
apart_end
ip netns add mlbd-server; ip netns add mlbd-client
ip link add server netns mlbd-server type veth peer name client netns mlbd-client
ip -n mlbd-server addr add $OURS/24 dev server; ip -n mlbd-server addr add $THEIRS/24 dev server; ip -n mlbd-client addr add 10.77.0.3/24 dev client
for n in server client; do ip -n mlbd-$n link set lo up; ip -n mlbd-$n link set $n up; done
IN_SERVER=(ip netns exec mlbd-server taskset -c 0) IN_CLIENT=(ip netns exec mlbd-client taskset -c $(($(nproc) - 1)))
share() { # share RATE ADDRESS: of so many questions a second, parts of a thousand that are answered, in three seconds
  # It chooses a core by itself, the first unless it is told; and the queue of the link is still the last one's for a moment.
  local i
  for i in 1 2 3 4 5; do
    "${IN_CLIENT[@]}" kxdpgun -F $(($(nproc) - 1)) -t 3 -Q "$1" -i "$work/queries" "$2" >"$work/kxdpgun" 2>&1 || true
    grep -q busy "$work/kxdpgun" || break
    sleep 1
  done
  awk -v rate="$1" '/^total queries/ {asked = $3} /^total replies/ {if (asked < rate * 3 * 0.98) exit; print int($3 * 1000 / asked); exit}' "$work/kxdpgun"
}
most() { # most ADDRESS: the most questions a second of which all are answered but one in a thousand, within 3 %
  local good=0 bad=0 next=20000 got
  while [ $bad = 0 ] || [ $((bad - good)) -gt $((good * 3 / 100)) ]; do
    got=$(share $next "$1")
    [ -n "$got" ] || { cat "$work/kxdpgun" >&2; die "kxdpgun can't ask that often"; }
    if [ "$got" -ge 999 ]; then good=$next; else bad=$next; fi
    if [ $bad = 0 ]; then next=$((next * 3 / 2)); else next=$(((good + bad) / 2)); fi
  done
  echo $good
}
for ((i = 1; i <= repeat; i++)); do
  serve "$work/dir" --dns-allow 10.77.0.0/24
  until_answered
  a=$(most $OURS); stop "$STARTED"
  ready_name=s00000.default.mesh.internal coredns <<C
$(our_zone)
C
  b=$(most $THEIRS); stop "$STARTED"
  awk -v a="$a" -v b="$b" 'BEGIN {printf "%.4f\n", a / b}' >>"$work/apart"
  echo "bench: the most a second that are all answered, by one core: $a and $b"
done
echo
echo "answers a second for our zone / CoreDNS with the hosts plugin:  $(median <"$work/zone")  goal >= 2"
echo "the most that are all answered a second, by one core / CoreDNS: $(median <"$work/apart")  goal >= 2"
echo "answers a second for cached names of others / CoreDNS:          $(median <"$work/cached")  goal >= 1"
echo "answers for a second of CPU, our zone / CoreDNS:                $(median <"$work/zone-cpu")"
echo "answers for a second of CPU, cached / CoreDNS:                  $(median <"$work/cached-cpu")"
echo "p99 for our zone at 5,000 a second / CoreDNS:                   $(median <"$work/p99")"
