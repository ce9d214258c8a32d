#!/usr/bin/env bash
# Inside the VM: runs the jobs that appear in the queue, one after another, until the file `stop` appears.
# A job is NAME.sh; its output goes to NAME.out, its status to NAME.rc; NAME.cancel ends it.
cd "$1" || exit 1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs -o size=75% tmpfs /tmp 2>/dev/null
touch ready
while [ ! -e stop ]; do
  for f in *.sh; do
    [ -e "$f" ] || continue
    b=${f%.sh}
    cp "$f" /run/job.sh; rm -f "$f"
    (cd / && exec setsid bash /run/job.sh) >"$b.out" 2>&1 </dev/null &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
      [ -e "$b.cancel" ] && { kill -- -$pid; sleep 2; kill -9 -- -$pid; } 2>/dev/null
      sleep 0.1
    done
    wait $pid; rc=$?
    echo $rc >"$b.rc.new"; mv "$b.rc.new" "$b.rc"
  done
  sleep 0.1
done
