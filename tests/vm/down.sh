#!/usr/bin/env bash
# Ends the VM and waits until it is gone.
. "$(dirname "$0")/lib.sh"
pid=$(vm_pid) || exit 0
touch "$queue/stop"
for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || { say "vm: down"; exit 0; }; sleep 0.2; done
kill "$pid" 2>/dev/null || true
for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || { say "vm: down (it had to be stopped)"; exit 0; }; sleep 0.2; done
die "the VM (process $pid) does not end"
