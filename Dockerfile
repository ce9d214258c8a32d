# syntax=docker/dockerfile:1
# The image of both programs, `meshlb agent` and `meshlb controller`.
#
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg REVISION="$(git rev-parse HEAD)" -t REGISTRY/meshlb:0.1.0 --push .
#
# Bases are pinned by tags that are not moved (a date, a patch release). Pin digests too where you build for production:
# --build-arg RUST=rust@sha256:… --build-arg DEBIAN=debian@sha256:…
# Both are bookworm: the binary is linked to the glibc that it runs with.
ARG RUST=docker.io/library/rust:1.95.0-slim-bookworm
ARG DEBIAN=docker.io/library/debian:bookworm-20260824-slim

# Runs on the builder's own architecture and cross-compiles: under emulation rustc is many times slower.
FROM --platform=$BUILDPLATFORM ${RUST} AS build
ARG TARGETARCH
WORKDIR /src
# For another architecture: its Rust library, and a C compiler and libc to link with (a dependency has C and assembler parts).
# What cargo has to know of it goes into /build.env. No here-documents: not every builder reads them.
RUN set -eu; \
    here=$(dpkg --print-architecture); arch=${TARGETARCH:-$here}; \
    case $arch in \
      amd64) cpu=x86_64 ;; \
      arm64) cpu=aarch64 ;; \
      *) echo "meshlb is not built for $arch" >&2; exit 1 ;; \
    esac; \
    triple=$cpu-unknown-linux-gnu; gcc=$cpu-linux-gnu-gcc; \
    if [ "$arch" != "$here" ]; then \
      apt-get update; \
      apt-get install -y --no-install-recommends "gcc-$(echo $cpu | tr _ -)-linux-gnu" "libc6-dev-$arch-cross"; \
      rm -rf /var/lib/apt/lists/*; \
      rustup target add "$triple"; \
    fi; \
    { echo "export CARGO_BUILD_TARGET=$triple"; \
      echo "export CARGO_TARGET_$(echo $triple | tr a-z- A-Z_)_LINKER=$gcc"; \
      echo "export CC_$(echo $triple | tr - _)=$gcc"; \
    } >/build.env
# Cargo wants every target that Cargo.toml names to be there, tests and benches too.
COPY Cargo.toml Cargo.lock ./
COPY crates crates
COPY src src
COPY examples examples
COPY benches benches
COPY tests tests
# Downloads and objects stay in the builder's cache, not in a layer. (target/ has a folder for each architecture.)
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    set -eu; . /build.env; \
    cargo build --release --locked --bin meshlb; \
    install -D -m 0755 "target/$CARGO_BUILD_TARGET/release/meshlb" /out/meshlb

FROM ${DEBIAN}
# iptables (both flavours), nftables: what rules are programmed with. kmod: iptables loads its modules with it.
# ipset: not needed by meshlb; shows people on a node what iptables rules look up.
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables ipset nftables kmod \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log /var/cache/ldconfig
COPY --from=build /out/meshlb /usr/local/bin/meshlb
# No USER: the agent must be root, since added capabilities are given to root only. The controller needs nothing, and the
# chart runs it as 65532.
ENTRYPOINT ["meshlb"]
CMD ["--help"]
# Last, so that they change no layer.
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="meshlb" \
      org.opencontainers.image.description="Kubernetes service load balancing in the kernel: node agent and controller" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-20260824-slim"
