# shellcheck shell=bash
# Shared by the scripts of this folder.
. "$(dirname "${BASH_SOURCE[0]}")/../vm/lib.sh"
cluster=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
go_version=1.26.0

# The newest control plane that is supported; MESHLB_KUBE=1.31 for the oldest.
kube_module="$cluster/kube${MESHLB_KUBE:+-$MESHLB_KUBE}"
kube_version() { awk '$1 == "k8s.io/kubernetes" {print $2; exit}' "$kube_module/go.mod"; }
# One folder for each version of what is built.
kube_dir() { echo "$cache/kube/$(kube_version)-$(cat "$kube_module"/{go.mod,main.go} | sha256sum | cut -c1-12)"; }
etcd_bin() { [ -x "$cache/etcd/usr/bin/etcd" ] && echo "$cache/etcd/usr/bin/etcd"; }
faketime_lib() { local lib; for lib in "$cache"/faketime/usr/lib/*/faketime/libfaketimeMT.so.1; do [ -e "$lib" ] && echo "$lib"; done | grep .; }
# A Go that is new enough.
go_bin() {
  local go
  for go in "$(command -v go)" /usr/local/go/bin/go "$cache/go/bin/go"; do
    [ -x "$go" ] || continue
    printf '%s\n' "$go_version" "$(GOTOOLCHAIN=local "$go" env GOVERSION | sed 's/^go//')" | sort -CV && { echo "$go"; return; }
  done
  return 1
}
need_go() { # need_go WHY
  ! go_bin >/dev/null || return 0
  say "setup: unpacking Go $go_version (from the Go module proxy) into $cache/go: $1"
  command -v unzip >/dev/null || as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends unzip >/dev/null
  mkdir -p "$cache/go.new"
  curl -fsSL "https://proxy.golang.org/golang.org/toolchain/@v/v0.0.1-go$go_version.linux-$(dpkg --print-architecture).zip" -o "$cache/go.zip"
  unzip -q "$cache/go.zip" -d "$cache/go.new" && rm -f "$cache/go.zip"
  rm -rf "$cache/go"; mv "$cache/go.new"/golang.org/toolchain@* "$cache/go"; rm -rf "$cache/go.new"; chmod -R +x "$cache/go/bin" "$cache/go/pkg/tool"
  go_bin >/dev/null
}
need_etcd() { # need_etcd WHY
  ! etcd_bin >/dev/null || return 0
  say "setup: unpacking Debian's etcd into $cache/etcd: $1; nothing is installed or started"
  unpack_debian "$cache/etcd" etcd-server
}

# What is kept of the running control plane, and its keeper's pid if it is there.
dir=$cache/cluster-${MESHLB_CLUSTER_NAME:-default}${MESHLB_KUBE:+-$MESHLB_KUBE}
running() { local pid; pid=$(cat "$dir/pid" 2>/dev/null) && grep -qs "cluster/up.sh" "/proc/$pid/cmdline" && echo "$pid"; }

# apiserver_args BIN ARG…: starts the running API server anew with more arguments.
apiserver_args() {
  local bin=$1; shift
  printf '%s\n' "$@" >>"$dir/kube-apiserver.args"
  touch "$dir/hold/kube-apiserver"
  while "$bin/kubectl" --kubeconfig "$dir/kubeconfig" get --raw /readyz >/dev/null 2>&1; do sleep 0.2; done
  rm "$dir/hold/kube-apiserver"
  local start=$SECONDS
  until "$bin/kubectl" --kubeconfig "$dir/kubeconfig" get --raw /readyz >/dev/null 2>&1; do
    [ $((SECONDS - start)) -lt 90 ] || die "the API server does not come back; the end of its log, $dir/kube-apiserver.log: $(grep 'command failed' "$dir/kube-apiserver.log" | tail -1)"
    sleep 0.3
  done
}

# to_apiserver FILE PORT: writes what QEMU starts for each connection from a VM to the API server.
to_apiserver() {
  cat >"$1" <<R
#!$BASH
exec 3<>/dev/tcp/127.0.0.1/$2
cat <&3 & cat >&3
kill \$!
R
  chmod +x "$1"
}

# Sets HELM to a helm, built if need be.
need_helm() {
  local helm_version=v3.18.6
  HELM=${HELM:-$cache/helm/$helm_version/helm}
  [ ! -x "$HELM" ] || return 0
  say "building Helm $helm_version (from the Go module proxy) into $cache/helm: it renders and installs the chart"
  mkdir -p "$cache/helm/$helm_version"
  CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=mod GOBIN=$cache/helm/$helm_version nice -n 10 "$(go_bin)" install \
    -trimpath -ldflags "-s -w -X helm.sh/helm/v3/internal/version.version=$helm_version" "helm.sh/helm/v3/cmd/helm@$helm_version"
}

# Sets KUBE_SCORE and KUBERNETES_VALIDATE, which look at manifests without a cluster.
need_manifest_checkers() {
  local score=v1.20.0 validate=1.37.0
  KUBE_SCORE=${KUBE_SCORE:-$cache/kube-score/$score/kube-score}
  [ -x "$KUBE_SCORE" ] || {
    say "building kube-score $score (from the Go module proxy) into $cache/kube-score: it reads the rendered chart for what is missing in it"
    mkdir -p "${KUBE_SCORE%/*}"
    CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=mod GOBIN=${KUBE_SCORE%/*} nice -n 10 "$(go_bin)" install \
      -trimpath -ldflags "-s -w" "github.com/zegl/kube-score/cmd/kube-score@$score"
  }
  KUBERNETES_VALIDATE=${KUBERNETES_VALIDATE:-$cache/kubernetes-validate/$validate/bin/kubernetes-validate}
  [ -x "$KUBERNETES_VALIDATE" ] || {
    python3 -c 'import venv, ensurepip' 2>/dev/null || {
      say "installing python3-venv from Debian: a place for kubernetes-validate, which Debian does not package"
      as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3-venv >/dev/null
    }
    say "installing kubernetes-validate $validate (PyPI) into $cache/kubernetes-validate: it has the schemas of the oldest and the newest Kubernetes"
    python3 -m venv "$cache/kubernetes-validate/$validate"
    "$cache/kubernetes-validate/$validate/bin/pip" -q install "kubernetes-validate==$validate"
  }
}

# Sets PROMETHEUS to one that knows Kubernetes, built if need be: Debian's is built without.
need_prometheus() {
  local version=v0.316.0 # of the Go module: Prometheus 3.16.0
  PROMETHEUS=${PROMETHEUS:-$cache/prometheus-kubernetes/$version/prometheus}
  [ ! -x "$PROMETHEUS" ] || return 0
  say "building Prometheus $version (from the Go module proxy, minutes) into $cache/prometheus-kubernetes: it finds agents as the chart's PodMonitor says"
  mkdir -p "${PROMETHEUS%/*}"
  CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=mod GOBIN=${PROMETHEUS%/*} nice -n 10 "$(go_bin)" install \
    -trimpath -ldflags "-s -w" -tags remove_all_sd,enable_kubernetes_sd "github.com/prometheus/prometheus/cmd/prometheus@$version"
}
