#!/usr/bin/env bash
# image.sh FILE          builds the Dockerfile with what Debian has (buildah); FILE is a docker-archive of docker.io/library/meshlb:test
# image.sh --arm64 FILE  the same for arm64 (docker.io/library/meshlb:test-arm64), on a kernel that starts such programs: see tests/arm64.sh
# image.sh --pause FILE  the image that holds a pod's namespaces, as registry.test/pause:1
# image.sh --web FILE    what answers on port 80 with its host's name, in the place of docker.io/library/nginx:1.29
#
# No registry of images is asked: both base images are made here, one from Debian's packages and one from that and this
# machine's Rust; for another architecture, from that and what rustup installs, as the official one is made.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
what=meshlb arch=; case ${1:-} in --pause | --web) what=${1#--}; shift ;; --arm64) arch=arm64; shift ;; esac
file=$1
[ "$(id -u)" = 0 ] || die "building an image needs root"
want=()
command -v buildah >/dev/null || want+=(buildah)
command -v mmdebstrap >/dev/null || want+=(mmdebstrap)
if [ ${#want[@]} -gt 0 ]; then
  say "image: installing from Debian: ${want[*]} (buildah builds the Dockerfile, mmdebstrap makes its base image)"
  apt-get -qq update >&2
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${want[@]}" >/dev/null
fi
images=$cache/images; mkdir -p "$images"
# Its own storage. chroot: no service and no container runtime is needed. TMPDIR holds the caches of RUN --mount=type=cache.
export TMPDIR=$images/tmp BUILDAH_ISOLATION=chroot; mkdir -p "$TMPDIR"
b() { buildah --root "$images/storage" --runroot "$images/run" --storage-driver overlay "$@"; }
base() { # base NAME FROM TAR [CONFIG…]
  local c; c=$(b from --pull-never "$2"); local name=$1 tar=$3; shift 3
  b add -q "$c" "$tar" / >/dev/null
  [ $# = 0 ] || b config "$@" "$c"
  b commit -q --rm "$c" "$name" >/dev/null
}
push() { rm -f "$file.new"; b push -q "$1" "docker-archive:$file.new:$1" >&2; mv "$file.new" "$file"; }
if [ $what = web ]; then
  cat >"$images/web" <<'P'
use IO::Socket::INET; $| = 1; $SIG{TERM} = sub { exit 0 }; $SIG{PIPE} = "IGNORE";
my $s = IO::Socket::INET->new(LocalPort => 80, Listen => 128, ReuseAddr => 1) or die;
my $b = "$ENV{HOSTNAME}\n"; my $l = length $b;
while (1) { my $c = $s->accept or next; while (<$c>) { last if /^\r?$/ } print $c "HTTP/1.0 200 OK\r\nContent-Length: $l\r\n\r\n$b"; close $c }
P
  # Debian's image has perl.
  c=$(b from --pull-never docker.io/library/meshlb:test); b add -q "$c" "$images/web" /web >/dev/null
  b config --entrypoint '["perl", "/web"]' --cmd '' "$c"; b commit -q --rm "$c" docker.io/library/nginx:1.29 >/dev/null
  push docker.io/library/nginx:1.29
  exit 0
fi
if [ $what = pause ]; then
  echo 'int pause(void); void *signal(int, void (*)(int)); void _exit(int); void stop(int s) { _exit(s * 0); } int main(void) { signal(15, stop); for (;;) pause(); }' \
    | gcc -static -O1 -w -x c - -o "$images/pause"
  c=$(b from scratch); b add -q "$c" "$images/pause" /pause >/dev/null; b config --entrypoint '["/pause"]' "$c"
  b commit -q --rm "$c" registry.test/pause:1 >/dev/null
  push registry.test/pause:1
  exit 0
fi
rust=$(rustc --version | cut -d' ' -f2)
debian() { # debian NAME [ARCH]
  ! b inspect --type image "$1" >/dev/null 2>&1 || return 0
  say "image: making a base image of Debian 12${2:+ for $2}"
  # As debian:bookworm-slim: without manual pages and translations.
  mmdebstrap --quiet --mode=root --variant=minbase ${2:+--architectures=$2} --include=usr-is-merged --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --customize-hook='rm -rf "$1"/var/cache/apt/*.bin "$1"/var/log/*.log' bookworm "$images/debian.tar" /etc/apt/sources.list.d/debian.sources
  base "$1" scratch "$images/debian.tar" --cmd bash
  rm -f "$images/debian.tar"
}
with_rust() { # with_rust NAME PATH [CONFIG…]: what is in $images/rust, and Debian's gcc, which the official image has too
  local c name=$1 path=$2; shift 2
  # crates.io is reached as this machine reaches it.
  install -D -m 0644 /etc/ssl/certs/ca-certificates.crt "$images/rust/etc/ssl/certs/ca-certificates.crt"
  tar -C "$images/rust" -cf "$images/rust.tar" .
  base "$name-only" localhost/debian:bookworm "$images/rust.tar" --env CARGO_HOME=/usr/local/cargo \
    --env "PATH=$path:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$@"
  rm -rf "$images/rust" "$images/rust.tar"
  c=$(b from --pull-never "$name-only")
  b run "$c" sh -c 'apt-get -qq update && apt-get -qq install -y --no-install-recommends gcc libc6-dev >/dev/null && rm -rf /var/lib/apt/lists/*' >&2
  b commit -q --rm "$c" "$name" >/dev/null
}
debian localhost/debian:bookworm
tag=docker.io/library/meshlb:test${arch:+-$arch}
if [ -z "$arch" ]; then
  bases=("localhost/rust:$rust" localhost/debian:bookworm)
  if ! b inspect --type image "${bases[0]}" >/dev/null 2>&1; then
    say "image: making a base image of Rust $rust"
    rm -rf "$images/rust"; mkdir -p "$images/rust/usr/local"
    cp -rL "$(rustc --print sysroot)" "$images/rust/usr/local/rustup"; rm -rf "$images/rust/usr/local/rustup/share"
    with_rust "${bases[0]}" /usr/local/rustup/bin
  fi
else
  bases=("localhost/rustup:$rust" "localhost/debian-$arch:bookworm")
  debian "${bases[1]}" "$arch"
  if ! b inspect --type image "${bases[0]}" >/dev/null 2>&1; then
    say "image: making a base image of Rust $rust with rustup"
    rm -rf "$images/rust"; mkdir -p "$images/rust/usr/local/bin"
    cp -L "$(command -v rustup)" "$images/rust/usr/local/bin/rustup-init"
    with_rust "localhost/rustup-init:$rust" /usr/local/cargo/bin --env RUSTUP_HOME=/usr/local/rustup
    c=$(b from --pull-never "localhost/rustup-init:$rust")
    b run "$c" rustup-init -q -y --no-modify-path --profile minimal --default-toolchain "$rust" >&2
    b commit -q --rm "$c" "${bases[0]}" >/dev/null
  fi
fi
start=$SECONDS
# What a builder says of platforms: Debian's buildah wants all images of a build to be of one, whatever their stages say, so no
# image says that it is for another one until it is done.
platforms=(); [ -z "$arch" ] || platforms=(--build-arg "BUILDPLATFORM=linux/$(dpkg --print-architecture)" --build-arg "TARGETARCH=$arch")
b bud --pull-never --layers ${platforms[@]+"${platforms[@]}"} --build-arg RUST="${bases[0]}" --build-arg DEBIAN="${bases[1]}" \
  --build-arg REVISION="$(git -C "$here" rev-parse HEAD)" -t "$tag" "$here/../.." >"$images/build.log" 2>&1 \
  || { tail -40 "$images/build.log" >&2; die "the image does not build; all of it in $images/build.log"; }
if [ -n "$arch" ]; then
  c=$(b from --pull-never "$tag"); b config --arch "$arch" "$c"; b commit -q --rm "$c" "$tag" >/dev/null
fi
push "$tag"
say "image: built in $((SECONDS - start)) s, $(du -m "$file" | cut -f1) MB: $file"
# The program in it starts, and what it programs rules with. (nft asks for netlink first, which an emulated program has not.)
c=$(b from --pull-never ${arch:+--arch "$arch"} "$tag")
programs=(meshlb iptables-legacy); [ -n "$arch" ] || programs+=(nft)
for program in "${programs[@]}"; do
  b run "$c" "$program" --version >&2 || { b rm "$c" >/dev/null; die "$program in the image does not start"; }
done
b rm "$c" >/dev/null
