#!/usr/bin/env bash
# A prompt for the VM: each line is run there by bash. (Its namespaces: `ip netns`, then `ip netns exec mlb-n1 …`.)
here=$(cd "$(dirname "$0")" && pwd)
"$here/up.sh"
while read -r -e -p "vm# " line; do
  [ -n "$line" ] || continue
  [ "$line" != exit ] || break
  history -s "$line"
  "$here/run.sh" bash -c "$line" || echo "(status $?)"
done
