#!/usr/bin/env bash
# Runs the kernel tests, or those whose name contains one of the FILTERs.
#
#   tests/kernel/run.sh [--vm|--host] [--nocapture] [--list] [FILTER…]
#   tests/kernel/run.sh [--vm|--host] --demo      the demo instead (tests/demo.sh)
#
# Where the kernel has IPVS and you are root they run here, in network namespaces of their own; elsewhere in one VM, which
# is booted for the run, or left as it is if it was up already (make vm-up), which makes one case a matter of seconds.
# What it needs it installs, saying what and why (tests/vm/setup.sh).
#
# MESHLB_KERNEL_PROGRAM=reference  programs the nodes by tests/kernel/reference.rs instead of meshlb
# MESHLB_BIN=FILE                  the meshlb to test, instead of the one that is built
# MESHLB_KERNEL_FULL=1             also without a FILTER every case with both flavours of iptables, not with one of them, and
#                                  the heavy cases with each renderer
# MESHLB_KERNEL_TURN=N             which of them, and which heavy cases, a run without a FILTER takes [default: the day since 1970]
# MESHLB_KERNEL_SECONDS            the limit for the whole run (4300)
# MESHLB_KERNEL_VMS=N              the whole run in so many VMs at once (one a core, at most 4); one if the VM is up already
# MESHLB_KERNEL_UNLOAD=1           on a host: also the tests that unload ip_vs
# Details of failed cases end up in target/kernel-test/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
vm_dir=$repo/tests/vm
. "$vm_dir/lib.sh"

where= what="kernel tests" args=()
for a in "$@"; do
  case $a in
    --vm) where=vm ;;
    --host) where=host ;;
    --demo) what=demo args=("$a" ${args[@]+"${args[@]}"}) ;;
    *) args+=("$a") ;;
  esac
done
has_ipvs() { [ -e /proc/net/ip_vs ] || { modprobe -q ip_vs 2>/dev/null && [ -e /proc/net/ip_vs ]; }; }
if [ -z "$where" ]; then
  if [ "$(id -u)" = 0 ] && has_ipvs; then where=host
  else
    where=vm
    if [ "$(id -u)" != 0 ]; then reason="you are not root"; else reason="this kernel ($(uname -r)) has no IPVS"; fi
    echo "$what: in a VM, since $reason"
  fi
fi

if [ $where = host ]; then "$vm_dir/setup.sh" --host; else "$vm_dir/setup.sh"; fi

cd "$repo"
[ "$what" != demo ] || echo "demo: building meshlb (the first time takes minutes)"
built=$(mktemp)
cargo test -q --no-run --test kernel --message-format=json-render-diagnostics >"$built" || { rm -f "$built"; echo "$what: 0 passed, 1 failed (it does not build)"; exit 1; }
test_bin=$(executable test kernel) meshlb_bin=${MESHLB_BIN:-$(executable bin meshlb)}
codec_bin=
if [ ${#args[@]} = 0 ]; then
  # The whole run: the codec's own tests against the kernel come first, with nothing else there yet.
  cargo test -q --no-run -p ipvs-netlink --test kernel --message-format=json-render-diagnostics >"$built" || { rm -f "$built"; echo "$what: 0 passed, 1 failed (it does not build)"; exit 1; }
  codec_bin=$(executable test kernel)
fi
rm -f "$built"
# Clients with other resolvers than glibc's, for cases about DNS; Go's where there is a Go.
resolvers=$cache/resolvers/$(cat "$repo"/tests/dns/client/client.{c,go} | sha256sum | cut -c1-12)
if [ ! -x "$resolvers/client-musl" ]; then
  mkdir -p "$resolvers"
  musl-gcc -O1 -static -o "$resolvers/musl.$$" "$repo/tests/dns/client/client.c"
  mv "$resolvers/musl.$$" "$resolvers/client-musl"
fi
if [ ! -x "$resolvers/client-go" ] && go=$(PATH=$PATH:/usr/local/go/bin:$cache/go/bin command -v go); then
  if (cd "$repo/tests/dns/client" && CGO_ENABLED=0 GO111MODULE=off GOTOOLCHAIN=local "$go" build -ldflags "-s -w" -o "$resolvers/go.$$" client.go); then
    mv "$resolvers/go.$$" "$resolvers/client-go"
  else
    rm -f "$resolvers/go.$$"; echo "kernel tests: no client with Go's resolver, since $go does not build it"
  fi
fi
out=${CARGO_TARGET_DIR:-$repo/target}/kernel-test
for a in ${args[@]+"${args[@]}"}; do [ "$a" != --list ] || exec "$test_bin" "${args[@]}"; done
rm -rf "$out"; mkdir -p "$out"
# Each day the thin run takes other renderers of the cases of which it takes but one.
export MESHLB_KERNEL_TURN=${MESHLB_KERNEL_TURN:-$(($(date +%s) / 86400))}
if [ ${#args[@]} = 0 ] && [ "${MESHLB_KERNEL_FULL:-}" != 1 ] && [ "$what" != demo ]; then
  echo "kernel tests: turn $MESHLB_KERNEL_TURN (MESHLB_KERNEL_TURN=$MESHLB_KERNEL_TURN runs the same cases again)"
fi

if [ $where = host ]; then
  # A machine's own ip_vs may be in use.
  skip=()
  if [ "$what" != demo ] && [ -z "${MESHLB_KERNEL_UNLOAD:-}" ]; then
    echo "kernel tests: those that unload ip_vs are left out on this host (MESHLB_KERNEL_UNLOAD=1 runs them)"
    skip=(--skip errors::no_ip_vs)
    args+=("${skip[@]}")
  fi
  [ -z "$codec_bin" ] || MESHLB_KERNEL_TESTS=1 "$codec_bin" --ignored --test-threads 1 ${skip[@]+--skip a_reload_of_the_module}
  PATH=$PATH:$(prometheus_dir) MESHLB_FIREWALLD=$(firewalld_dir) MESHLB_RESOLVERS=$resolvers MESHLB_KERNEL=1 MESHLB_BIN=$meshlb_bin MESHLB_KERNEL_OUT=$out exec "$test_bin" ${args[@]+"${args[@]}"}
fi

# in_vm NAME CLAIMS CODEC: in the VM of that name, which is left as it was. With CLAIMS, a folder, several VMs share the
# cases. CODEC, if any, runs first.
in_vm() {
  export MESHLB_VM=$1; shift
  . "$vm_dir/lib.sh"
  local claims=$1 codec=$2 run rc f
  if ! vm_up; then
    trap '"$vm_dir/down.sh"' EXIT
    MESHLB_VM_SHARES=$claims "$vm_dir/up.sh"
  fi
  # Fresh names each time: the VM may have read the old files. Without debug information they load faster.
  run=$vm/run-$$-$(date +%s)
  rm -rf "$vm"/run-*; mkdir -p "$run/out"
  cp "$test_bin" "$run/cases"
  cp "$resolvers"/client-* "$run/"
  [ -z "$codec" ] || cp "$codec" "$run/codec"
  for f in "$run/cases" ${codec:+"$run/codec"} "$meshlb_bin"; do strip -g -o "$run/${f##*/}.s" "$f" 2>/dev/null && mv "$run/${f##*/}.s" "$run/${f##*/}" || [ -e "$run/${f##*/}" ] || cp "$f" "$run/"; done
  [ -z "$prometheus" ] || cp "$(prometheus_dir)"/prom{etheus,tool} "$run/"
  MESHLB_KERNEL_PROGRAM=${MESHLB_KERNEL_PROGRAM:-} MESHLB_FIREWALLD=$(firewalld_dir) MESHLB_KERNEL_FULL=${MESHLB_KERNEL_FULL:-} \
    MESHLB_KUBECONFIG_FOR_TESTS=${MESHLB_KUBECONFIG_FOR_TESTS:-} MESHLB_KERNEL_CLAIMS=$claims MESHLB_KUBE_BENCH=${MESHLB_KUBE_BENCH:-} \
    MESHLB_VM_ENV="MESHLB_KUBE_BENCH MESHLB_KERNEL_PROGRAM MESHLB_KERNEL_FULL MESHLB_KERNEL_TURN MESHLB_FIREWALLD MESHLB_KUBECONFIG_FOR_TESTS MESHLB_AUDIT_LOG MESHLB_PODMONITORS MESHLB_PROMETHEUS MESHLB_TOGETHER_SECONDS MESHLB_LOG_LEVEL" \
    "$vm_dir/run.sh" -t "${MESHLB_KERNEL_SECONDS:-4300}" <<EOF
rm -rf /tmp/root/kernel-test; mkdir /tmp/root/kernel-test
cp $(printf '%q ' "$run/cases" ${codec:+"$run/codec"} "$run/${meshlb_bin##*/}") /tmp/root/kernel-test/
cp $(printf %q "$run")/client-* /tmp/root/kernel-test/
mkdir -p /tmp/root/kernel-test/out
[ -z "$prometheus" ] || cp $run/prom{etheus,tool} /tmp/root/usr/bin/
claims=
[ -z "$claims" ] || { mkdir -p /tmp/root/kernel-test/claims; mount --bind $(printf %q "$claims") /tmp/root/kernel-test/claims; claims=/kernel-test/claims; }
codec=0
[ ! -e /tmp/root/kernel-test/codec ] || /tmp/in-tools env MESHLB_KERNEL_TESTS=1 /kernel-test/codec --ignored --test-threads 1 || codec=\$?
/tmp/in-tools env MESHLB_KERNEL=1 MESHLB_RESOLVERS=/kernel-test MESHLB_BIN=/kernel-test/${meshlb_bin##*/} MESHLB_KERNEL_OUT=/kernel-test/out RUST_BACKTRACE=${RUST_BACKTRACE:-0} \
  MESHLB_KERNEL_CLAIMS="\$claims" /kernel-test/cases $(printf '%q ' ${args[@]+"${args[@]}"})
rc=\$?
[ \$rc != 0 ] || rc=\$codec
cp -r /tmp/root/kernel-test/out $run/
[ -z "\$claims" ] || umount /tmp/root/kernel-test/claims
exit \$rc
EOF
  rc=$?
  cp -r "$run/out/." "$out/" 2>/dev/null; rm -rf "$run"
  return $rc
}

# Prometheus is 100 MB, so only for those who ask for it.
prometheus=
# Not by a pipe: grep ends at the first line, and a program that can't say the rest has failed.
if grep -q '^scrape::' <<<"$("$test_bin" --list ${args[@]+"${args[@]}"})"; then prometheus=1; fi
name=${MESHLB_VM:-default}
cores=$(nproc)
vms=${MESHLB_KERNEL_VMS:-$((cores < 4 ? cores : 4))}
if [ ${#args[@]} -gt 0 ] || [ "$vms" -lt 2 ] || vm_up; then
  set +e
  (in_vm "$name" "" "$codec_bin"); exit
fi
# The whole run takes a VM for each core: in an emulated machine with two processors one waits for the other. Each takes the
# next cases that no other has.
echo "kernel tests: in $vms VMs at once"
claims=$cache/claims-$name; rm -rf "$claims"; mkdir -p "$claims"
export MESHLB_VM_CPUS=${MESHLB_VM_CPUS:-1}
rc=0 parts=()
for ((i = 2; i <= vms; i++)); do
  (set +e; in_vm "$name-$i" "$claims" "") >"$claims.$i.log" 2>&1 & parts+=($!)
done
trap 'kill "${parts[@]}" 2>/dev/null' INT TERM
(set +e; in_vm "$name" "$claims" "$codec_bin") || rc=$?
for ((i = 2; i <= vms; i++)); do
  wait "${parts[i - 2]}" || rc=$?
  echo; echo "== VM $i"; cat "$claims.$i.log"
done
rm -rf "$claims" "$claims".*.log
exit $rc
