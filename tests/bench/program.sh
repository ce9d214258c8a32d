# shellcheck shell=bash
# Rows 3 and 5: a whole state into an empty kernel, and meeting one that is right already.

# State of the kernel as the standard tools save it, into $WORK/saved, numbers instead of names.
save_state() {
  local renderer=$1
  mkdir -p "$WORK/saved"
  on_node ipvsadm -Sn >"$WORK/saved/ipvs"
  # A name of a protocol makes ipset read /etc/protocols for every line.
  on_node ipset save | sed 's/,tcp:/,6:/' >"$WORK/saved/ipset"
  if [ "$renderer" = nftables ]; then on_node nft list table inet meshlb >"$WORK/saved/nft"; fi
}
# A node of its own each time. In an emptied one the kernel looks for every destination that is added among all those that were deleted
# in the last two minutes (ip_vs_trash_get_dest, a list), and that would be what is measured.
fresh_node() { node_down "$NODE"; node_up "$NODE"; }
restore_state() {
  on_node ipvsadm -R <"$WORK/saved/ipvs"
  if [ "$1" = nftables ]; then on_node nft -f "$WORK/saved/nft"; else on_node ipset restore <"$WORK/saved/ipset"; fi
}

row_cold() {
  local renderer i took file other
  "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"
  for renderer in $RENDERERS; do
    node_up
    say "$renderer: the state to compare with"
    meshlb "$renderer" apply "$WORK/many" >"$WORK/apply.out" 2>&1 || true
    tail -1 "$WORK/apply.out"
    save_state "$renderer"
    say "$(grep -c -- '^-a' "$WORK/saved/ipvs") destinations, $(grep -c '^add' "$WORK/saved/ipset" || true) ipset entries"
    file=$OUT/cold-$renderer other=$OUT/cold-whole-$renderer
    : >"$file"; : >"$other"
    for ((i = 1; i <= REPEAT; i++)); do
      fresh_node
      elapsed restore_state "$renderer"; local tools=$ELAPSED
      fresh_node
      elapsed apply_quietly "$renderer"; local whole=$ELAPSED
      took=$(took_ns "$WORK/apply.out") || { missed "cold: apply says no time"; return; }
      echo "$took $tools" >>"$file"
      echo "$whole $tools" >>"$other"
      say "$renderer: standard tools $(ms "$tools") ms, snapshot to kernel $(ms "$took") ms, whole process $(ms "$whole") ms"
      # It must be the same state, or the times mean nothing.
      if [ "$(on_node ipvsadm -Sn | sort)" != "$(sort "$WORK/saved/ipvs")" ]; then missed "cold: IPVS is not the same afterwards"; return; fi
    done
    ratio_row cold "$renderer: $SERVICES services × 5, snapshot to kernel / standard tools" "<=" 0.4 "$file"
    ratio_row cold "$renderer: the same, whole process with reading the YAML" - "" "$other"
    node_down node
  done
}
apply_quietly() { meshlb "$1" apply "$WORK/many" >"$WORK/apply.out" 2>&1 || true; }
# The line `… in 123.4 ms` of apply.
took_ns() { awk '/ services, .* failed in [0-9.]+ ms/ { for (i = 1; i < NF; i++) if ($i == "in") t = $(i + 1) } END { if (t == "") exit 1; printf "%.0f\n", t * 1e6 }' "$1"; }

row_restart() {
  local renderer i line file other writes
  "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"
  for renderer in $RENDERERS; do
    node_up
    apply_quietly "$renderer"
    tail -1 "$WORK/apply.out"
    file=$OUT/restart-$renderer other=$OUT/restart-tools-$renderer
    : >"$file"; : >"$other"; : >"$OUT/restart-writes-$renderer"
    for ((i = 1; i <= REPEAT; i++)); do
      line=$(on_node "$HELPER_BIN" dumps "$renderer" $NODE_IP 1 2>"$WORK/dumps.err") || { cat "$WORK/dumps.err"; missed "restart: dumps"; return; }
      local dumps=$((${line% *} + ${line#* }))
      agent_start "$renderer" "$WORK/many"
      agent_ready || { missed restart; return; }
      local turn; turn=$(awk -v s="$(metric 'meshlb_reconcile_duration_seconds_sum{kind="full"}')" 'BEGIN { printf "%.0f", s * 1e9 }')
      local turns; turns=$(metric 'meshlb_reconciles_total{'); turns=${turns%.*}
      writes=$(metric 'meshlb_kernel_writes_total'); writes=${writes%.*}
      agent_stop
      elapsed dump_by_tools "$renderer"; local tools=$ELAPSED
      echo "$turn $dumps" >>"$file"; echo "$turn $tools" >>"$other"; echo "$writes" >>"$OUT/restart-writes-$renderer"
      say "$renderer: dumps $(ms "$dumps") ms (IPVS $(ms "${line% *}")), agent's $turns turn(s) $(ms "$turn") ms, $writes writes; ipvsadm, ipset, nft, iptables dump in $(ms "$tools") ms"
    done
    ratio_row restart "$renderer: first turn on a matching kernel / the dumps alone" "<=" 1.2 "$file"
    ratio_row restart "$renderer: the same / dumps by ipvsadm, ipset, iptables, nft" - "" "$other"
    writes=$(summary <"$OUT/restart-writes-$renderer")
    row restart "$renderer: writes to the kernel" "${writes##* }" "most of $REPEAT" "= 0" "$([ "${writes##* }" = 0 ] && echo met || echo "NOT MET")"
    node_down node
  done
}
dump_by_tools() {
  on_node ipvsadm -Sn >/dev/null
  on_node nft list table inet meshlb >/dev/null
  if [ "$1" != nftables ]; then
    on_node ipset save >/dev/null
    on_node iptables-save >/dev/null
  fi
}
