#!/usr/bin/env bash
# meshlb on the other architecture, without a machine of it: every test that needs no kernel of its own runs under QEMU's user
# emulation (which has no netlink for netfilter and IPVS), and the image is built for it from the Dockerfile, with the program in it
# started.
#
#   tests/arm64.sh [--no-image]
. "$(dirname "$0")/vm/lib.sh"
here=$(cd "$(dirname "$0")" && pwd)
triple=aarch64-unknown-linux-gnu
image=1; [ "${1:-}" != --no-image ] || image=
[ "$(uname -m)" = x86_64 ] || die "this is for a machine of x86-64"
[ "$(id -u)" = 0 ] || die "programs of another architecture are told to the kernel by root"
want=()
[ -x /usr/bin/aarch64-linux-gnu-gcc ] || want+=(gcc-aarch64-linux-gnu)
[ -e /usr/aarch64-linux-gnu/include/stdio.h ] || want+=(libc6-dev-arm64-cross)
[ -x /usr/bin/qemu-aarch64-static ] || want+=(qemu-user-static)
[ -x /usr/bin/arch-test ] || want+=(arch-test)
if [ ${#want[@]} -gt 0 ]; then
  say "arm64: installing from Debian: ${want[*]} (compiler and C library to link with; the emulator; what mmdebstrap tries it with)"
  apt-get -qq update >&2
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${want[@]}" >/dev/null
fi
if ! rustc --print target-libdir --target "$triple" 2>/dev/null | xargs -r ls >/dev/null 2>&1; then
  command -v rustup >/dev/null || die "this needs rustup, which has Rust's library for $triple"
  say "arm64: installing Rust's library for $triple with rustup"
  rustup -q target add "$triple"
fi

# The kernel starts programs for arm64 by the emulator, as long as this runs; unless it does so anyway. F: in a container's root too.
binfmt=/proc/sys/fs/binfmt_misc entry='' mounted=''
forget() {
  [ -z "$entry" ] || echo -1 >"$binfmt/$entry"
  [ -z "$mounted" ] || umount "$binfmt"
}
trap forget EXIT
if [ ! -e "$binfmt/register" ]; then
  mount -t binfmt_misc none "$binfmt" || die "the kernel has no binfmt_misc (or lets nobody use it here): it can't start programs of another architecture"
  mounted=1
fi
if [ ! -e "$binfmt/qemu-aarch64" ]; then
  say "arm64: the kernel is told (binfmt_misc) to start programs for arm64 by QEMU, until this ends"
  header='\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  printf '%s' ":qemu-aarch64:M::$header:$mask:/usr/bin/qemu-aarch64-static:F" >"$binfmt/register"
  entry=qemu-aarch64
fi

failed=0
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
# The C library is where Debian puts it on a machine of another architecture; tests start the program without any environment.
libc=/usr/aarch64-linux-gnu/lib
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C link-arg=-Wl,--dynamic-linker=$libc/ld-linux-aarch64.so.1 -C link-arg=-Wl,-rpath,$libc"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTDOCFLAGS=$CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS
# Without the right to make network namespaces, tests that want one are skipped. promtool has to be there: in this emulation a
# program that is not can't be told from one that ends at once.
promtool=$(prometheus_dir) || die "no promtool: run make setup"
PATH=$PATH:$promtool CARGO_BUILD_TARGET=$triple \
  setpriv --bounding-set=-sys_admin,-net_admin env -u MESHLB_NO_SKIP \
  cargo test --manifest-path "$here/../Cargo.toml" --workspace --locked --no-fail-fast || failed=1
if [ -z "$image" ]; then :
elif "$here/cluster/image.sh" --arm64 "$cache/meshlb-arm64.tar"; then echo "image for arm64: 1 passed; 0 failed"
else echo "image for arm64: 0 passed; 1 failed"; failed=1; fi
exit $failed
