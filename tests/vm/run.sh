#!/usr/bin/env bash
# Runs a command (or, without one, the script on standard input) in the VM, shows its output as it comes, exits with
# its status. The VM must be up (up.sh). -t SECONDS: the limit (600).
# Remember that the VM caches what it reads of this machine's files: give it new content under a new name.
. "$(dirname "$0")/lib.sh"
limit=600; [ "${1:-}" = -t ] && { limit=$2; shift 2; }
vm_up || die "the VM is not up: tests/vm/up.sh (or: make vm-up)"
job=$queue/$(date +%s%N)
{
  for v in ${MESHLB_VM_ENV:-}; do [ -z "${!v+set}" ] || echo "export $v=$(printf %q "${!v}")"; done
  if [ $# -gt 0 ]; then printf '%q ' "$@"; echo; else cat; fi
} >"$job.tmp"
trap 'touch "$job.cancel"; exit 130' INT TERM
mv "$job.tmp" "$job.sh"
start=$SECONDS pos=1
while :; do
  end=; [ -e "$job.rc" ] && end=1
  if [ -e "$job.out" ]; then
    tail -c +$pos "$job.out" >"$job.part"; size=$(stat -c %s "$job.part")
    [ "$size" = 0 ] || { cat "$job.part"; pos=$((pos + size)); }
  fi
  [ -z "$end" ] || break
  if vm_fatal || ! vm_pid >/dev/null; then
    sleep 1
    echo; echo "vm: the VM is gone. Its console ($vm/console.log) says:"; vm_trace
    exit 125
  fi
  if [ $((SECONDS - start)) -gt "$limit" ]; then
    touch "$job.cancel"; echo; echo "vm: no end after $limit s, cancelled"; exit 124
  fi
  sleep 0.2
done
rc=$(cat "$job.rc"); rm -f "$job".*
if panic=$(vm_panic); then echo "vm: NOTE, the kernel's console has: $panic (tests/vm/down.sh, then up.sh, for a fresh one)"; fi
exit "$rc"
