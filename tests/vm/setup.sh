#!/usr/bin/env bash
# Makes this machine ready for the kernel tests, says what it installs and why, and does nothing the second time.
# usage: setup.sh [--host]     --host: only what the tests need on a kernel that has IPVS itself (no VM)
# MESHLB_KERNEL=backports       the VM gets the newer kernel of Debian's backports
. "$(dirname "$0")/lib.sh"
host_only=; [ "${1:-}" = --host ] && host_only=1

want=() why=()
need() { # need COMMAND PACKAGE WHY
  command -v "$1" >/dev/null || { want+=("$2"); why+=("$2: $3"); }
}
need cc gcc "links Rust programs (with libc6-dev)"
[ -e /usr/include/stdio.h ] || { want+=(libc6-dev); why+=("libc6-dev: the C library's start files, for linking"); }
need ip iproute2 "makes the network namespaces, links and routes of the test nodes"
need iptables iptables "one of the two renderers programs the kernel with it; both its flavours are tested"
need ipset ipset "holds the (address, port) to mark map for that renderer"
need nft nftables "the other renderer, and the guard table"
need ipvsadm ipvsadm "shows the IPVS table when a case fails"
need conntrack conntrack "shows and empties the connection table between cases"
need python3 python3 "runs firewalld in one case"
need modprobe kmod "loads ip_vs and friends"
need wg wireguard-tools "makes the keys of the WireGuard overlay"
need strace strace "counts what an agent that starts again writes"
need dig bind9-dnsutils "asks the DNS server"
need musl-gcc musl-tools "builds a client with musl's resolver, the one of images on Alpine, which asks the DNS server too"
need tcpdump tcpdump "shows packets when a case is looked into by hand"
need curl curl "the client of the demo (make demo)"
if [ -z "$host_only" ]; then
  need qemu-system-x86_64 qemu-system-x86 "the emulator that runs a kernel with IPVS (KVM is not used)"
  need busybox busybox-static "the first program in the VM, until this machine's files are mounted"
  vng_bin >/dev/null || {
    python3 -c 'import venv, ensurepip' 2>/dev/null || { want+=(python3-venv); why+=("python3-venv: a place for virtme-ng, which Debian 12 does not package"); }
  }
fi
if [ ${#want[@]} -gt 0 ]; then
  say "setup: installing from Debian:"; printf '  - %s\n' "${why[@]}" >&2
  as_root apt-get -qq update >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${want[@]}" >/dev/null
fi
if ! prometheus_dir >/dev/null; then
  say "setup: unpacking Debian's prometheus into $cache/prometheus: it scrapes an agent in one case; nothing is installed or started"
  unpack_debian "$cache/prometheus" prometheus
fi
if [ -z "$(firewalld_dir)" ]; then
  say "setup: unpacking Debian's firewalld and its libraries into $cache/firewalld: its reloads are one case; nothing is installed or started"
  unpack_debian "$cache/firewalld.new" firewalld python3-firewall python3-dbus python3-gi python3-nftables python3-cap-ng \
    gir1.2-glib-2.0 libgirepository-1.0-1 libglib2.0-0 libffi8 libnftables1 libjansson4 dbus-daemon dbus-session-bus-common libdbus-1-3 \
    libcap-ng0 libexpat1 libapparmor1 libaudit1 libsystemd0 libpcre2-8-0
  (cd "$cache/firewalld.new" && /usr/bin/python3 -m compileall -q usr/lib/python3/dist-packages)
  mv "$cache/firewalld.new" "$cache/firewalld"
fi
[ -n "$host_only" ] && exit 0

if ! vng_bin >/dev/null; then
  say "setup: installing virtme-ng (PyPI) into $cache/venv: it boots a kernel with this machine's files as a read-only root"
  mkdir -p "$cache"; python3 -m venv "$cache/venv"; "$cache/venv/bin/pip" -q install 'virtme-ng==1.42'
fi

if [ -z "$(kernel_image)" ]; then
  package=${MESHLB_KERNEL_PACKAGE:-}
  case ${MESHLB_KERNEL:-} in
    '') ;;
    backports)
      # Lists of its own: what this machine installs from stays as it is.
      lists=$kernels/apt; mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
      codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
      echo "deb http://deb.debian.org/debian $codename-backports main" >"$lists/sources.list"
      apt_options=(-o "Dir::Etc::sourcelist=$lists/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::Lists=$lists/lists" -o "Dir::Cache=$lists/cache")
      apt-get -qq "${apt_options[@]}" update >&2
      ;;
    *) die "MESHLB_KERNEL can be backports, not $MESHLB_KERNEL" ;;
  esac
  if [ -z "$package" ]; then
    [ ${#apt_options[@]} -gt 0 ] || apt-cache show linux-image-amd64 >/dev/null 2>&1 || as_root apt-get -qq update >&2
    package=$(apt-cache ${apt_options[@]+"${apt_options[@]}"} depends linux-image-amd64 | awk '/Depends:/{print $2; exit}')
  fi
  [ -n "$package" ] || die "apt knows no linux-image-amd64"
  release=${package#linux-image-} dir=$kernels/${package#linux-image-}
  say "setup: unpacking Debian's kernel $release into $dir: it has IPVS; nothing is installed or booted on this machine"
  unpack_debian "$dir.new" "$package"
  depmod -b "$dir.new" "$release"
  rm -rf "$dir"; mv "$dir.new" "$dir"
fi
