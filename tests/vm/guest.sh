#!/usr/bin/env bash
# Inside the VM: runs the jobs that appear in the queue, one after another, until the file `stop` appears.
# A job is NAME.sh; its output goes to NAME.out, its status to NAME.rc; NAME.cancel ends it.
cd "$1" || exit 1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
# /tmp/root: the programs the tests run, in memory (see tools.sh). What is mounted under /run is seen in both roots.
mount -t tmpfs -o size=75% tmpfs /tmp
while [ ! -e ../root.tar ]; do sleep 0.1; done
mkdir -p /tmp/root && mount -t tmpfs -o size=60% tmpfs /tmp/root && tar -C /tmp/root -xf ../root.tar
mount --make-shared /run
for d in proc sys dev run; do mount --rbind /$d /tmp/root/$d; done
# The machine's own files, for programs that are too much for a copy in memory: chroot /host firewalld. By a share of its own,
# whose files the kernel keeps once it has read them: Python asks for thousands. What is written stays in memory.
mkdir -p /tmp/hostfs /tmp/written/files /tmp/written/work /tmp/root/host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 hostfs /tmp/hostfs
mount -t overlay -o lowerdir=/tmp/hostfs,upperdir=/tmp/written/files,workdir=/tmp/written/work overlay /tmp/root/host
for d in proc sys dev run; do mount --rbind /$d /tmp/root/host/$d; done
mount -t tmpfs tmpfs /tmp/root/host/tmp
modules=/lib/modules/$(uname -r)
for r in /tmp/root /tmp/root/host; do mkdir -p "$r$modules"; mount --bind "$(readlink -f "$modules")" "$r$modules"; done
cat >/tmp/in-tools <<'X'
#!/bin/bash
# in-tools COMMAND…: with the programs in memory as the root. A root by pivot_root, not chroot: entering a mount namespace
# made in there would leave a chroot.
exec unshare -m --propagation unchanged bash -c '
  cd /tmp/root && mkdir -p old && pivot_root . old && cd / && mount --make-rprivate old && umount -l old && exec "$@"' in-tools "$@"
X
chmod +x /tmp/in-tools
# A pause without a program: starting `sleep` ten times a second takes an eighth of what an emulated machine can do.
mkfifo /run/never; exec 9<>/run/never
pause() { read -r -t 0.1 -u 9; }
touch ready
while [ ! -e stop ]; do
  for f in *.sh; do
    [ -e "$f" ] || continue
    b=${f%.sh}
    cp "$f" /run/job.sh; rm -f "$f"
    (cd / && exec setsid bash /run/job.sh 9<&-) >"$b.out" 2>&1 </dev/null &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
      [ -e "$b.cancel" ] && { kill -- -$pid; sleep 2; kill -9 -- -$pid; } 2>/dev/null
      pause
    done
    wait $pid; rc=$?
    echo $rc >"$b.rc.new"; mv "$b.rc.new" "$b.rc"
  done
  pause
done
