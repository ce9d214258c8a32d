#!/usr/bin/env bash
# Measures meshlb and prints a table: docs/performance.md says what each row means and what came out.
#
#   tests/bench/run.sh [--vm|--host] [ROW…]        rows: traffic services cold restart agent plan
#
# Where the kernel has IPVS and you are root it measures here, in network namespaces of its own; elsewhere in one VM, which is
# booted for it (or left as it is if it was up). Almost everything is a ratio of two things done in turn in one kernel, so
# that it means the same on a slow or emulated machine. What it needs it installs, and says so (tests/vm/setup.sh).
# Exits with 1 when something could not be measured; a goal that is not met is said in the table.
#
# MESHLB_BENCH_SERVICES   services of the large state (10000); each has five endpoints
# MESHLB_BENCH_REPEAT     repetitions of what takes long (5)
# MESHLB_BENCH_RENDERERS  "iptables-nft nftables"
# MESHLB_BENCH_IDLE_SECONDS  how long an idle agent is watched (180)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
vm_dir=$repo/tests/vm
. "$vm_dir/lib.sh"
command -v cargo >/dev/null || [ ! -e "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
command -v cargo >/dev/null || { echo "bench: there is no cargo here: install Rust (https://rustup.rs) first" >&2; exit 1; }

where= rows=()
for a in "$@"; do
  case $a in
    --vm) where=vm ;;
    --host) where=host ;;
    traffic | services | cold | restart | agent | plan) rows+=("$a") ;;
    *) echo "bench: no row is called $a (traffic services cold restart agent plan)" >&2; exit 2 ;;
  esac
done
[ ${#rows[@]} -gt 0 ] || rows=(traffic services cold restart agent plan)
has_ipvs() { [ -e /proc/net/ip_vs ] || { modprobe -q ip_vs 2>/dev/null && [ -e /proc/net/ip_vs ]; }; }
if [ -z "$where" ]; then
  if [ "$(id -u)" = 0 ] && has_ipvs; then where=host
  else
    where=vm
    echo "bench: in a VM, since $(if [ "$(id -u)" != 0 ]; then echo "you are not root"; else echo "this kernel ($(uname -r)) has no IPVS"; fi)"
  fi
fi
if [ $where = host ]; then "$vm_dir/setup.sh" --host; else "$vm_dir/setup.sh"; fi
if ! command -v iperf3 >/dev/null; then
  echo "bench: installing iperf3: it measures the throughput"
  if [ "$(id -u)" = 0 ]; then s=; else s=sudo; fi
  $s apt-get -qq install -y --no-install-recommends iperf3 >/dev/null
fi

cd "$repo"
echo "bench: building meshlb, optimised (the first time takes minutes)"
built=$(mktemp)
cargo build --release --locked --bin meshlb --example bench-helper --message-format=json-render-diagnostics >"$built" || { rm -f "$built"; echo "bench: it does not build"; exit 1; }
meshlb_bin=$(executable bin meshlb) helper_bin=$(executable example bench-helper)
rm -f "$built"
out=${CARGO_TARGET_DIR:-$repo/target}/bench
rm -rf "$out"; mkdir -p "$out"
rc=0

kernel_rows=()
for r in "${rows[@]}"; do [ "$r" = plan ] || kernel_rows+=("$r"); done
if [ ${#kernel_rows[@]} -gt 0 ]; then
  vars="MESHLB_BENCH_SERVICES MESHLB_BENCH_REPEAT MESHLB_BENCH_RENDERERS MESHLB_BENCH_IDLE_SECONDS MESHLB_BENCH_CHANGES"
  if [ $where = host ]; then
    work=$(mktemp -d)
    MESHLB_BIN=$meshlb_bin HELPER_BIN=$helper_bin OUT=$out WORK=$work "$here/rows.sh" "${kernel_rows[@]}" || rc=$?
    rm -rf "$work"
  else
    if ! vm_up; then
      trap '"$vm_dir/down.sh"' EXIT
      "$vm_dir/up.sh"
    fi
    run=$vm/run-$$-$(date +%s)
    rm -rf "$vm"/run-*; mkdir -p "$run/out"
    for f in "$meshlb_bin" "$helper_bin"; do strip -g -o "$run/${f##*/}" "$f" 2>/dev/null || cp "$f" "$run/"; done
    cp "$here"/*.sh "$run/"
    MESHLB_VM_ENV=$vars "$vm_dir/run.sh" -t "${MESHLB_BENCH_SECONDS:-5400}" <<EOT || rc=$?
rm -rf /tmp/root/bench; mkdir -p /tmp/root/bench/out /tmp/root/bench/work
cp $(printf %q "$run")/{*.sh,$(printf %q "${meshlb_bin##*/}"),$(printf %q "${helper_bin##*/}")} /tmp/root/bench/
/tmp/in-tools env MESHLB_BIN=/bench/${meshlb_bin##*/} HELPER_BIN=/bench/${helper_bin##*/} OUT=/bench/out WORK=/bench/work \
  bash /bench/rows.sh ${kernel_rows[*]}
rc=\$?
cp -r /tmp/root/bench/out $(printf %q "$run")/
rm -rf /tmp/root/bench
exit \$rc
EOT
    cp -r "$run/out/." "$out/" 2>/dev/null || true; rm -rf "$run"
  fi
fi
case " ${rows[*]} " in *" plan "*) "$here/plan.sh" "$out" || rc=1 ;; esac

echo
echo "machine: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores, $(if [ $where = vm ]; then echo "kernel rows in an emulated VM (QEMU TCG)"; else echo "no VM"; fi)"
echo "kernel:  $(cat "$out/kernel" 2>/dev/null || uname -r)"
echo
{ printf 'row\twhat\tmeasured\tspread\tgoal\t\n'; cat "$out/table" 2>/dev/null || true; } | awk -F'\t' '
  { for (i = 1; i <= NF; i++) { cell[NR, i] = $i; if (length($i) > width[i]) width[i] = length($i) } n = NF > n ? NF : n }
  END { for (r = 1; r <= NR; r++) { line = ""; for (i = 1; i <= n; i++) line = line sprintf("%-" width[i] "s  ", cell[r, i]); sub(/ +$/, "", line); print line } }'
[ $rc = 0 ] || echo "bench: something could not be measured: see above"
exit $rc
