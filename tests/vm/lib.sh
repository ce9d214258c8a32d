# shellcheck shell=bash
# Shared by the scripts of this folder. Everything they keep is under $MESHLB_CACHE:
#   kernel/RELEASE/   Debian's stock kernel, unpacked, not installed; with MESHLB_KERNEL=backports kernel-backports/RELEASE/
#   venv/             virtme-ng, where the machine has none
#   vm-NAME/          one VM: console.log, pid, queue/ (jobs in, output and status out)
set -euo pipefail
cache=${MESHLB_CACHE:-$HOME/.cache/meshlb}
kernels=$cache/kernel${MESHLB_KERNEL:+-$MESHLB_KERNEL}
vm=$cache/vm-${MESHLB_VM:-default}${MESHLB_KERNEL:+-$MESHLB_KERNEL}
queue=$vm/queue
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else die "this needs root (or sudo): $*"; fi; }

# The VM's process, if it is there and is ours.
vm_pid() {
  local pid
  pid=$(cat "$vm/pid" 2>/dev/null) || return 1
  grep -qs vng "/proc/$pid/cmdline" && echo "$pid"
}
vm_up() { vm_pid >/dev/null && [ -e "$queue/ready" ]; }

# What the console says when the kernel has given up, or nothing.
vm_panic() { grep -m1 -aE 'Kernel panic|BUG: |Oops: |general protection fault|Out of memory: Killed' "$vm/console.log" 2>/dev/null; }
vm_fatal() { grep -qaE 'Kernel panic|end Kernel panic' "$vm/console.log" 2>/dev/null; }
vm_trace() { grep -naE -m1 'Kernel panic|BUG: |Oops: |general protection fault' "$vm/console.log" | cut -d: -f1 | { read -r n || n=1; tail -n +$((n > 5 ? n - 5 : 1)) "$vm/console.log" | head -60; }; }

# executable KIND NAME: of what `cargo --message-format=json… >$built` has told of.
executable() { grep "\"kind\":\[\"$1\"\]" "$built" | grep "\"name\":\"$2\"" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1; }

# unpack_debian DIR PACKAGE…: into a new folder, with nothing installed; apt is given $apt_options.
apt_options=()
unpack_debian() {
  local dir=$1 p; shift
  apt-cache ${apt_options[@]+"${apt_options[@]}"} show "$1" >/dev/null 2>&1 || as_root apt-get -qq update >&2
  rm -rf "$dir"; mkdir -p "$dir"
  (cd "$dir" && apt-get -qq -o APT::Sandbox::User=root ${apt_options[@]+"${apt_options[@]}"} download "$@" >&2 && for p in ./*.deb; do dpkg-deb -x "$p" .; done && rm -f ./*.deb)
}

# The virtme-ng to use.
vng_bin() { command -v vng || { [ -x "$cache/venv/bin/vng" ] && echo "$cache/venv/bin/vng"; }; }

# The folder with prometheus and promtool, or nothing.
prometheus_dir() {
  local p
  p=$(command -v prometheus) && command -v promtool >/dev/null && { dirname "$p"; return; }
  [ -x "$cache/prometheus/usr/bin/promtool" ] && echo "$cache/prometheus/usr/bin"
}

# The folder that Debian's firewalld is unpacked in, or nothing.
firewalld_dir() { if [ -e "$cache/firewalld/usr/sbin/firewalld" ]; then echo "$cache/firewalld"; fi; }

# The unpacked kernel with IPVS, newest first, or nothing.
kernel_image() {
  local f
  for f in $(ls -1 "$kernels"/*/boot/vmlinuz-* 2>/dev/null | sort -rV); do
    [ -e "${f%/boot/*}/lib/modules/${f##*/vmlinuz-}/modules.dep.bin" ] && { echo "$f"; return; }
  done
}
