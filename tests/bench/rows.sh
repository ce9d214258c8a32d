#!/usr/bin/env bash
# The rows that need a kernel with IPVS, in it: rows.sh ROW…
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
. "$here/program.sh"
. "$here/agent.sh"
. "$here/traffic.sh"
: >"$OUT/table"
uname -srm >"$OUT/kernel"
for m in ip_vs ip_vs_rr xt_set ip_set_hash_ipport ip_set_hash_ip ip_set_hash_netnet nf_tables nf_conntrack; do modprobe -q $m 2>/dev/null || true; done
PIDS=()
finish() { for p in ${PIDS[@]+"${PIDS[@]}"}; do kill "$p" 2>/dev/null || true; done; PIDS=(); for n in node small pod client; do node_down $n; done; }
trap finish EXIT
for row in "$@"; do
  say "--- $row"
  # A row that fails must not take the others with it. (No `||` here: bash would then ignore every error inside.)
  set +e
  ( set -e; "row_$row"; exit $MISSED )
  rc=$?
  set -e
  [ $rc = 0 ] || { [ $rc = 1 ] || say "status $rc"; missed "$row"; }
  finish
done
exit $MISSED
