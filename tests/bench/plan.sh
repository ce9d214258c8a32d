#!/usr/bin/env bash
# Row 8: compiling and comparing alone, by criterion: plan.sh OUT. It needs no kernel and runs on this machine.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/../.."
out=$1
echo "bench: --- plan"
criterion=${CARGO_TARGET_DIR:-target}/criterion/growth
# Figures of an earlier run must not stand in for one that fails.
rm -rf "$criterion"
cargo bench --locked --bench plan -- --noplot 2>&1 | grep -E 'time:|^error' || echo "bench: the benchmark has said nothing"
for what in compile plan-all-new plan-all-same plan-one; do
  : >"$out/plan-$what"
  for n in 10 1000 10000; do
    f=$criterion/$what/$n/new/estimates.json
    [ -e "$f" ] || { echo "bench: NOT MEASURED: $what $n"; exit 1; }
    echo "$n $(sed 's/.*"median":{[^{]*{[^}]*},"point_estimate":\([0-9.e+]*\).*/\1/' "$f")" >>"$out/plan-$what"
  done
  # Exponent of a power law through the points, by least squares: 1 is linear, 0 is constant.
  awk -v what="$what" '
    { x = log($1); y = log($2); n++; sx += x; sy += y; sxx += x * x; sxy += x * y; each = each sprintf("%s%.2f", n > 1 ? ", " : "", $2 / $1 / 1000); all = all sprintf("%s%.2f", n > 1 ? ", " : "", $2 / 1000) }
    END {
      slope = (n * sxy - sx * sy) / (n * sxx - sx * sx); constant = what == "plan-one"; goal = constant ? 0.1 : 1.1
      printf "plan\t%s: growth exponent over 10, 1000, 10000 services\t%.3f\t%s µs %s\t<= %s\t%s\n", what, slope, constant ? all : each, constant ? "in all" : "each", goal, slope <= goal ? "met" : "NOT MET"
    }' "$out/plan-$what" | tee -a "$out/table"
done
