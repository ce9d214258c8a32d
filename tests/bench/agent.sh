# shellcheck shell=bash
# What the agent costs while it runs (change, memory, idle), and how soon it heals: one life of an agent gives all of them.

# Two agents, one with ten services and one with many: sets SMALL and LARGE to their processes.
two_agents() {
  local renderer=$1
  "$HELPER_BIN" manifests "$WORK/few" 10
  "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"
  node_up small; agent_start "$renderer" "$WORK/few"; agent_ready; SMALL=$AGENT
  node_up node; agent_start "$renderer" "$WORK/many"; agent_ready; LARGE=$AGENT
}
vm_hwm() { awk -v field="$2:" '$1 == field { print $2 }' "/proc/$1/status"; }

row_agent() {
  local renderer
  for renderer in $RENDERERS; do
    two_agents "$renderer"
    "$HELPER_BIN" quiet "$LARGE"
    agent_memory "$renderer"
    agent_change "$renderer"
    # Then one of them alone: where another network namespace has IPVS services, the kernel's list of them leaves some out.
    AGENT=$SMALL; agent_stop; node_down small
    NODE=node
    "$HELPER_BIN" quiet "$LARGE"
    agent_idle "$renderer"
    agent_heal "$renderer"
    AGENT=$LARGE; agent_stop; node_down node
  done
}

agent_memory() {
  local peak now
  peak=$(vm_hwm "$LARGE" VmHWM) now=$(vm_hwm "$LARGE" VmRSS)
  row memory "$1: peak resident memory of the agent, $SERVICES services × 5" "$(awk -v k="$peak" 'BEGIN { printf "%.1f MiB", k / 1024 }')" \
    "$(awk -v n="$now" 'BEGIN { printf "at rest %.1f MiB, n=1", n / 1024 }')" "< 64 MiB" "$(awk -v k="$peak" 'BEGIN { print (k / 1024 < 64 ? "met" : "NOT MET") }')"
}

agent_idle() {
  local i begin end start share seconds=${MESHLB_BENCH_IDLE_SECONDS:-180} file=$OUT/idle-$1
  sleep 3
  : >"$file"
  for i in 1 2 3; do
    begin=$("$HELPER_BIN" cpu "$LARGE"); now; start=$NOW
    sleep $((seconds / 3))
    end=$("$HELPER_BIN" cpu "$LARGE"); now
    awk -v c=$((end - begin)) -v t=$((NOW - start)) 'BEGIN { printf "%.4f\n", 100 * c / t }' >>"$file"
  done
  share=$(awk '{ s += $1 } END { printf "%.3f", s / NR }' "$file")
  row idle "$1: CPU of the idle agent, $SERVICES services, $seconds s" "$share %" "$(summary <"$file" | awk '{ printf "%.3f–%.3f %%, n=3", $2, $3 }')" "<= 1 %" \
    "$(awk -v s="$share" 'BEGIN { print (s <= 1 ? "met" : "NOT MET") }')"
}

agent_change() {
  local file=$OUT/change-$1 times=${MESHLB_BENCH_CHANGES:-40} large small
  "$HELPER_BIN" changes "$LARGE" "$WORK/many" "$SERVICES" "$SMALL" "$WORK/few" 10 "$times" >"$file.all" || { missed change; return; }
  grep -v children "$file.all" >"$file"
  # A mean would count rescans and looks that fall into the time; the median of each side is what a change costs.
  large=$(awk '{ print $1 }' "$file" | summary); small=$(awk '{ print $2 }' "$file" | summary)
  say "$1: CPU of the agent for a change: $SERVICES services $(ms "${large%% *}") ms, 10 services $(ms "${small%% *}") ms (medians of $times)"
  say "$1: CPU of the programs that it runs for a change, $SERVICES services and 10, in ns: $(sed -n 's/^children //p' "$file.all")"
  row change "$1: own CPU, one endpoint of $SERVICES services / of 10" \
    "$(awk -v a="${large%% *}" -v b="${small%% *}" 'BEGIN { printf "%.3f", a / b }')" \
    "$(awk '{ printf "%.6f\n", $1 / $2 }' "$file" | summary | awk -v n="$times" '{ printf "%.3f–%.3f, n=%d", $2, $3, n }')" "<= 1.2" \
    "$(awk -v a="${large%% *}" -v b="${small%% *}" 'BEGIN { print (a / b <= 1.2 ? "met" : "NOT MET") }')"
}

# Takes a service, or a destination, away behind the agent's back, and waits until it is there again.
agent_heal() {
  local file=$OUT/heal-$1 i service what start median least most
  on_node ipvsadm -Sn | awk '$1 == "-a"' >"$WORK/destinations"
  for what in service destination; do
    : >"$file-$what"
    for i in 1 2 3 4 5; do
      # All over the table.
      read -r _ _ service _ real _ < <(sed -n "$(($(wc -l <"$WORK/destinations") * i / 6))p" "$WORK/destinations")
      now; start=$NOW
      if [ $what = service ]; then on_node ipvsadm -D -f "$service"; else on_node ipvsadm -d -f "$service" -r "$real"; fi
      until on_node ipvsadm -Ln -f "$service" 2>/dev/null | grep -q " $real "; do
        now; [ $(((NOW - start) / 1000000000)) -lt 600 ] || { missed "heal: the $what $service $real did not come back"; return; }
        sleep 0.2
      done
      now; awk -v t=$((NOW - start)) 'BEGIN { printf "%.2f\n", t / 1e9 }' >>"$file-$what"
      "$HELPER_BIN" quiet "$LARGE"
    done
    read -r median least most < <(summary <"$file-$what")
    row heal "$1: a $what of $SERVICES services × 5 that was taken away is back after" "$median s" "$(printf '%.1f–%.1f s, n=5' "$least" "$most")" \
      "<= 5 s" "$(awk -v m="$most" 'BEGIN { print (m <= 5 ? "met" : "NOT MET") }')"
  done
}
