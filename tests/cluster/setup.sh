#!/usr/bin/env bash
# What the tests against a real control plane need, and why. Says what it installs; nothing the second time.
#   etcd                       Debian's, unpacked into the cache, not installed
#   libfaketime                Debian's, unpacked into the cache, not installed
#   kube (tests/cluster/kube, or kube-1.31 with MESHLB_KUBE=1.31)  kube-apiserver, kube-controller-manager, kube-scheduler, kubectl in one program, built from the Go modules
# KUBE_BIN=DIR with programs of those names (and etcd) takes the place of both.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
[ -z "${KUBE_BIN:-}" ] || exit 0

if ! etcd_bin >/dev/null; then
  say "setup: unpacking Debian's etcd into $cache/etcd: the API server keeps its objects in it; nothing is installed or started"
  unpack_debian "$cache/etcd" etcd-server
fi
if ! faketime_lib >/dev/null; then
  say "setup: unpacking Debian's libfaketime into $cache/faketime: a controller gets a clock that jumps from it; nothing is installed"
  unpack_debian "$cache/faketime" libfaketime
fi
kube=$(kube_dir)
if [ ! -x "$kube/kube" ]; then
  go=$(go_bin) || {
    say "setup: unpacking Go $go_version (from the Go module proxy) into $cache/go: it builds Kubernetes"
    command -v unzip >/dev/null || as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends unzip >/dev/null
    mkdir -p "$cache/go.new"
    curl -fsSL "https://proxy.golang.org/golang.org/toolchain/@v/v0.0.1-go$go_version.linux-$(dpkg --print-architecture).zip" -o "$cache/go.zip"
    unzip -q "$cache/go.zip" -d "$cache/go.new" && rm -f "$cache/go.zip"
    rm -rf "$cache/go"; mv "$cache/go.new"/golang.org/toolchain@* "$cache/go"; rm -rf "$cache/go.new"; chmod -R +x "$cache/go/bin" "$cache/go/pkg/tool"
    go=$(go_bin)
  }
  say "setup: building Kubernetes $(kube_version) into $kube: a real control plane for the tests (some ten minutes, once)"
  mkdir -p "$kube"
  (cd "$kube_module" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly "$go" build -trimpath \
    -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$(kube_version)" -o "$kube/kube.new" .)
  mv "$kube/kube.new" "$kube/kube"
fi
for part in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl kubelet; do ln -sfn kube "$kube/$part"; done
ln -sfn "$(etcd_bin)" "$kube/etcd"
