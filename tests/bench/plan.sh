#!/usr/bin/env bash
# Row 8: compiling and comparing alone: plan.sh OUT. It needs no kernel and runs on this machine. Time by criterion, which caches of the
# processor have a part in; and instructions, by valgrind.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/../.."
out=$1
echo "bench: --- plan"
criterion=${CARGO_TARGET_DIR:-target}/criterion/growth
# Figures of an earlier run must not stand in for one that fails.
rm -rf "$criterion"
cargo bench --locked --bench plan -- --noplot 2>&1 | grep -E 'time:|^error' || echo "bench: the benchmark has said nothing"
# growth WHAT GOAL UNIT: exponent of a power law through the points ("services amount") of OUT/plan-WHAT, by least squares: 1 is linear, 0 is
# constant.
growth() {
  awk -v what="$1" -v goal="$2" -v unit="$3" '
    { x = log($1); y = log($2); n++; sx += x; sy += y; sxx += x * x; sxy += x * y; each = each sprintf("%s%.2f", n > 1 ? ", " : "", $2 / $1 / 1000); all = all sprintf("%s%.2f", n > 1 ? ", " : "", $2 / 1000) }
    END {
      slope = (n * sxy - sx * sy) / (n * sxx - sx * sx); constant = goal < 1
      printf "plan\t%s: growth exponent over 10, 1000, 10000 services\t%.3f\t%s %s %s\t<= %s\t%s\n", what, slope, constant ? all : each, unit, constant ? "in all" : "each", goal, slope <= goal ? "met" : "NOT MET"
    }' "$out/plan-$1" | tee -a "$out/table"
}
for what in compile plan-all-new plan-all-same plan-one; do
  : >"$out/plan-$what"
  for n in 10 1000 10000; do
    f=$criterion/$what/$n/new/estimates.json
    [ -e "$f" ] || { echo "bench: NOT MEASURED: $what $n"; exit 1; }
    echo "$n $(sed 's/.*"median":{[^{]*{[^}]*},"point_estimate":\([0-9.e+]*\).*/\1/' "$f")" >>"$out/plan-$what"
  done
  growth "$what" "$([ "$what" = plan-one ] && echo 0.1 || echo 1.1)" µs
done

if ! command -v valgrind >/dev/null; then
  echo "bench: installing valgrind: it counts instructions"
  $([ "$(id -u)" = 0 ] || echo sudo) apt-get -qq install -y --no-install-recommends valgrind >/dev/null
fi
bench=$(cargo bench --locked --bench plan --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))/\1/p')
uncounted() { echo "bench: NOT MEASURED: instructions: valgrind says nothing, or the calls are others than in benches/plan.rs"; exit 1; }
# counted FUNCTION: instructions of each call of it, in order, with all that it calls.
counted() {
  rm -f "$out"/callgrind.*
  valgrind --tool=callgrind --callgrind-out-file="$out/callgrind" "--toggle-collect=$1" "--dump-after=$1" "$bench" --test >/dev/null 2>&1
  find "$out" -name 'callgrind.*' | sort -V | xargs -r sed -s -n 's/^summary: //p'
  rm -f "$out"/callgrind*
}
# For each number of services there are two calls of compile: the benchmark's, and one for what plan_all compares. Of that one call has nothing
# to begin with, and two have everything.
counted plan::compile | awk 'NR % 2 == 1 { print 10 ^ (NR == 1 ? 1 : NR == 3 ? 3 : 4), $1 } END { exit NR != 6 }' >"$out/plan-compile-instructions" || uncounted
counted meshlb::plan::diff::plan_all >"$out/plan-calls"
for what in new same; do
  awk -v first="$([ $what = new ] && echo 1 || echo 2)" 'NR % 3 == first % 3 { print 10 ^ (NR < 4 ? 1 : NR < 7 ? 3 : 4), $1 } END { exit NR != 9 }' "$out/plan-calls" \
    >"$out/plan-plan-all-$what-instructions" || uncounted
done
for what in compile plan-all-new plan-all-same; do growth "$what-instructions" 1.1 "thousand instructions"; done
