#!/usr/bin/env bash
# What the tests against a real control plane need, and why. Says what it installs; nothing the second time.
#   etcd                       Debian's, unpacked into the cache, not installed
#   libfaketime                Debian's, unpacked into the cache, not installed
#   kube (tests/cluster/kube, or kube-1.31 with MESHLB_KUBE=1.31)  kube-apiserver, kube-controller-manager, kube-scheduler, kubectl in one program, built from the Go modules
# KUBE_BIN=DIR with programs of those names (and etcd) takes the place of both.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
[ -z "${KUBE_BIN:-}" ] || exit 0

need_etcd "the API server keeps its objects in it"
if ! faketime_lib >/dev/null; then
  say "setup: unpacking Debian's libfaketime into $cache/faketime: a controller gets a clock that jumps from it; nothing is installed"
  unpack_debian "$cache/faketime" libfaketime
fi
kube=$(kube_dir)
if [ ! -x "$kube/kube" ]; then
  need_go "it builds Kubernetes"; go=$(go_bin)
  say "setup: building Kubernetes $(kube_version) into $kube: a real control plane for the tests (some ten minutes, once)"
  mkdir -p "$kube"
  (cd "$kube_module" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly "$go" build -trimpath \
    -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$(kube_version)" -o "$kube/kube.new" .)
  mv "$kube/kube.new" "$kube/kube"
fi
for part in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl kubelet; do ln -sfn kube "$kube/$part"; done
ln -sfn "$(etcd_bin)" "$kube/etcd"
