# shellcheck shell=bash
# Shared by the scripts of this folder: what they need, and the servers they start. Everything is on loopback:
#   127.77.0.1:53   meshlb's DNS, as an agent serves it, on a kernel in memory
#   127.77.0.2:53   CoreDNS
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
dns=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OURS=127.77.0.1 THEIRS=127.77.0.2

# Where CoreDNS and the clients are; one folder for each version of what is built.
dns_dir() { echo "$cache/dns/$(cat "$dns"/coredns/{go.mod,main.go} "$dns"/client/* | sha256sum | cut -c1-12)"; }

# Says what it installs or builds, and why; nothing the second time.
dns_setup() {
  local want=() dir go
  command -v dig >/dev/null || want+=(bind9-dnsutils)
  command -v dnsperf >/dev/null || want+=(dnsperf)
  command -v kxdpgun >/dev/null || want+=(knot-dnsutils)
  command -v musl-gcc >/dev/null || want+=(musl-tools)
  /usr/bin/python3 -c 'import dns.resolver' 2>/dev/null || want+=(python3-dnspython)
  if [ ${#want[@]} -gt 0 ]; then
    say "dns: installing ${want[*]} from Debian: dig and other resolvers (musl's, dnspython) ask, dnsperf and kxdpgun measure"
    as_root apt-get -qq update >&2
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${want[@]}" >/dev/null
  fi
  dir=$(dns_dir)
  [ -x "$dir/coredns" ] && return
  mkdir -p "$dir"
  go=$(go_bin) || { "$cluster/setup.sh"; go=$(go_bin); }
  say "dns: building CoreDNS $(awk '$2 == "github.com/coredns/coredns" {print $3} $1 == "github.com/coredns/coredns" {print $2}' "$dns/coredns/go.mod") and a client with Go's own resolver into $dir (some minutes, once)"
  cc -O1 -o "$dir/client-glibc" "$dns/client/client.c"
  musl-gcc -O1 -static -o "$dir/client-musl" "$dns/client/client.c"
  (cd "$dns/client" && CGO_ENABLED=0 GO111MODULE=off "$go" build -o "$dir/client-go" client.go)
  (cd "$dns/coredns" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly "$go" build -trimpath -ldflags "-s -w" -o "$dir/coredns.new" .)
  mv "$dir/coredns.new" "$dir/coredns"
}

# Sets HELPER to our server and what asks it, optimised.
dns_build() {
  local built
  built=$(mktemp)
  (cd "$dns/../.." && cargo build --release --locked --example dns-helper --message-format=json-render-diagnostics) >"$built" || { rm -f "$built"; die "it does not build"; }
  HELPER=$(executable example dns-helper)
  rm -f "$built"
}

PIDS=()
# Words before a command that runs where servers, and where clients are.
IN_SERVER=() IN_CLIENT=()
# start NAME ADDRESS COMMAND…: in the background, its output in $work/NAME.log; waits until it answers something.
start() {
  local name=$1 at=$2 i; shift 2
  ${IN_SERVER[@]+"${IN_SERVER[@]}"} "$@" >"$work/$name.log" 2>&1 & PIDS+=($!)
  for ((i = 0; i < 600; i++)); do
    kill -0 $! 2>/dev/null || { cat "$work/$name.log" >&2; die "$name has ended"; }
    ${IN_CLIENT[@]+"${IN_CLIENT[@]}"} dig +time=1 +tries=1 "@$at" "${ready_name:-mesh.internal}" SOA 2>/dev/null | grep -q 'status: NOERROR\|status: NXDOMAIN' && { STARTED=$!; return; }
    sleep 0.2
  done
  cat "$work/$name.log" >&2; die "$name does not answer"
}
# Answers a second that a client gets: not limited where all of them are one client's.
rate=0
serve() { # serve DIR [FLAG…]
  local dir=$1; shift
  start meshlb $OURS "$HELPER" serve "$dir" --vip-cidr 10.200.0.0/14 --dns-listen $OURS --dns-rate "$rate" --log-level warn "$@"
}
coredns() { # coredns CONFIG, on standard input
  cat >"$work/Corefile"
  start coredns $THEIRS "$(dns_dir)/coredns" -conf "$work/Corefile" -quiet
}
stop() { # stop PID
  kill "$1" 2>/dev/null || true; wait "$1" 2>/dev/null || true
}
stop_all() { local p; for p in ${PIDS[@]+"${PIDS[@]}"}; do stop "$p"; done; PIDS=(); }
work=$(mktemp -d)
trap 'stop_all; rm -rf "$work"' EXIT
