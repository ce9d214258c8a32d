#!/usr/bin/env bash
# Boots the VM and leaves it up (at most MESHLB_VM_HOURS, 3). Emulation only: KVM is never used.
# Its root is this machine's file system, read-only to it (writes stay in the VM's memory).
# MESHLB_VM_SHARES=DIR: a folder that it may write to, as it is called here.
# MESHLB_VM=NAME for a second one, MESHLB_VM_MEMORY (2G), MESHLB_VM_CPUS (2), MESHLB_VM_QEMU_OPTS for more of qemu's.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
vm_up && { say "vm: already up"; exit 0; }
"$here/setup.sh"
kernel=$(kernel_image) vng=$(vng_bin)
! vm_pid >/dev/null || "$here/down.sh"
rm -rf "$queue"; mkdir -p "$queue"; : >"$vm/console.log"
# The loop that runs in the VM is copied: what the VM has read once must not change under it.
cp "$here/guest.sh" "$vm/guest.sh"
rm -rf "$vm/root" "$vm/root.tar"
say "vm: booting ${kernel##*/} (console: $vm/console.log)"
shares=(); [ -z "${MESHLB_VM_SHARES:-}" ] || shares=("--rwdir=$MESHLB_VM_SHARES")
# -erms: without it the kernel and libc copy eight bytes at a time, not one, which an emulator does as slowly.
# norandmaps: QEMU translates a program anew for each address it finds it at; at the same one each time, programs start two
# to three times as fast. mitigations=off: an emulated processor pays a tenth for what only real ones need against Spectre.
# no_timer_check: on a busy machine an emulated timer interrupt comes too late for the kernel's check, and it panics.
qemu="-cpu max,-erms -fsdev local,id=hostfs,path=/,security_model=none,readonly=on,multidevs=remap -device virtio-9p-pci,fsdev=hostfs,mount_tag=hostfs"
append=(); for o in panic=-1 no_timer_check norandmaps mitigations=off; do append+=(--append "$o"); done
cd "$vm"
# udev is absent in containers and virtme-ng then loses the output and status: both go through the shared folder.
# vng starts its neighbour virtme-run by name.
PATH=$(dirname "$vng"):$PATH setsid timeout $((3600 * ${MESHLB_VM_HOURS:-3})) "$vng" -v --disable-kvm --force-9p --run "$kernel" \
  --cpus "${MESHLB_VM_CPUS:-2}" --memory "${MESHLB_VM_MEMORY:-2G}" --user root --qemu-opts="$qemu ${MESHLB_VM_QEMU_OPTS:-}" \
  "${append[@]}" --rwdir="$vm" ${shares[@]+"${shares[@]}"} -- "bash $vm/guest.sh $queue" >"$vm/console.log" 2>&1 </dev/null &
pid=$!; echo "$pid" >"$vm/pid"
start=$SECONDS
"$here/tools.sh" "$vm/root"; tar -C "$vm/root" -cf "$vm/root.tar.new" .; rm -rf "$vm/root"; mv "$vm/root.tar.new" "$vm/root.tar"
while [ ! -e "$queue/ready" ]; do
  if vm_fatal || ! kill -0 "$pid" 2>/dev/null || [ $((SECONDS - start)) -gt "${MESHLB_VM_BOOT_SECONDS:-180}" ]; then
    tail -30 "$vm/console.log" >&2; kill "$pid" 2>/dev/null || true
    die "the VM did not come up in $((SECONDS - start)) s; the end of its console is above, all of it in $vm/console.log"
  fi
  sleep 0.2
done
say "vm: up after $((SECONDS - start)) s"
