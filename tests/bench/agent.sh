# shellcheck shell=bash
# Rows 4, 6 and 7: what the agent costs while it runs.

# Two agents, one with ten services and one with many: sets SMALL and LARGE to their processes.
two_agents() {
  local renderer=$1
  "$HELPER_BIN" manifests "$WORK/few" 10
  "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"
  node_up small; agent_start "$renderer" "$WORK/few"; agent_ready; SMALL=$AGENT
  node_up node; agent_start "$renderer" "$WORK/many"; agent_ready; LARGE=$AGENT
}
row_change() {
  local renderer file times=${MESHLB_BENCH_CHANGES:-40}
  for renderer in $RENDERERS; do
    two_agents "$renderer"
    file=$OUT/change-$renderer
    "$HELPER_BIN" changes "$LARGE" "$WORK/many" "$SERVICES" "$SMALL" "$WORK/few" 10 "$times" >"$file.all" || { missed change; return; }
    grep -v children "$file.all" >"$file"
    # Means would count the agents' rescans; medians of each side are what a change costs.
    local large small
    large=$(awk '{ print $1 }' "$file" | summary); small=$(awk '{ print $2 }' "$file" | summary)
    say "$renderer: CPU of the agent for a change: $SERVICES services $(ms "${large%% *}") ms, 10 services $(ms "${small%% *}") ms (medians of $times)"
    say "$renderer: CPU of the programs that it runs for a change ($SERVICES services, 10 services; ns): $(sed -n 's/^children //p' "$file.all")"
    row change "$renderer: own CPU, one endpoint of $SERVICES services / of 10" \
      "$(awk -v a="${large%% *}" -v b="${small%% *}" 'BEGIN { printf "%.3f", a / b }')" \
      "$(awk '{ printf "%.6f\n", $1 / $2 }' "$file" | summary | awk -v n="$times" '{ printf "%.3f–%.3f, n=%d", $2, $3, n }')" "<= 1.2" \
      "$(awk -v a="${large%% *}" -v b="${small%% *}" 'BEGIN { print (a / b <= 1.2 ? "met" : "NOT MET") }')"
    agent_stop; AGENT=$SMALL; agent_stop
    node_down small; node_down node
  done
}

vm_hwm() { awk -v field="$2" '$1 == field ":" { print $2 }' "/proc/$1/status"; }
row_memory() {
  local renderer peak now
  "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"
  for renderer in $RENDERERS; do
    node_up; agent_start "$renderer" "$WORK/many"; agent_ready
    "$HELPER_BIN" quiet "$AGENT"
    peak=$(vm_hwm "$AGENT" VmHWM) now=$(vm_hwm "$AGENT" VmRSS)
    agent_stop
    # Once more: a start with a state file and a kernel that is right already.
    agent_start "$renderer" "$WORK/many"; agent_ready
    local again; again=$(vm_hwm "$AGENT" VmHWM)
    agent_stop
    row memory "$renderer: peak resident memory of the agent" "$(awk -v k="$peak" 'BEGIN { printf "%.1f MiB", k / 1024 }')" \
      "$(awk -v k="$again" -v n="$now" 'BEGIN { printf "restart %.1f, at rest %.1f", k / 1024, n / 1024 }')" "< 64 MiB" \
      "$(awk -v k="$peak" 'BEGIN { print (k / 1024 < 64 ? "met" : "NOT MET") }')"
    node_down node
  done
}

row_idle() {
  local renderer i begin end share seconds=${MESHLB_BENCH_IDLE_SECONDS:-90}
  "$HELPER_BIN" manifests "$WORK/many" "$SERVICES"
  for renderer in $RENDERERS; do
    node_up; agent_start "$renderer" "$WORK/many"; agent_ready
    "$HELPER_BIN" quiet "$AGENT"; sleep 5
    : >"$OUT/idle-$renderer"
    for i in 1 2 3; do
      begin=$("$HELPER_BIN" cpu "$AGENT"); now; local start=$NOW
      sleep $((seconds / 3))
      end=$("$HELPER_BIN" cpu "$AGENT"); now
      awk -v c=$((end - begin)) -v t=$((NOW - start)) 'BEGIN { printf "%.4f\n", 100 * c / t }' >>"$OUT/idle-$renderer"
    done
    agent_stop
    share=$(awk '{ s += $1 } END { printf "%.3f", s / NR }' "$OUT/idle-$renderer")
    row idle "$renderer: CPU of the idle agent, $seconds s" "$share %" "$(summary <"$OUT/idle-$renderer" | awk '{ printf "%.3f–%.3f %%, n=3", $2, $3 }')" "<= 1 %" \
      "$(awk -v s="$share" 'BEGIN { print (s <= 1 ? "met" : "NOT MET") }')"
    node_down node
  done
}
