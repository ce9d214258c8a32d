# shellcheck shell=bash
# Shared by the scripts of this folder.
. "$(dirname "${BASH_SOURCE[0]}")/../vm/lib.sh"
cluster=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
go_version=1.26.0

kube_version() { awk '$1 == "k8s.io/kubernetes" {print $2}' "$cluster/kube/go.mod"; }
# One folder for each version of what is built.
kube_dir() { echo "$cache/kube/$(kube_version)-$(cat "$cluster"/kube/{go.mod,main.go} | sha256sum | cut -c1-12)"; }
etcd_bin() { [ -x "$cache/etcd/usr/bin/etcd" ] && echo "$cache/etcd/usr/bin/etcd"; }
# A Go that is new enough.
go_bin() {
  local go
  for go in "$(command -v go)" /usr/local/go/bin/go "$cache/go/bin/go"; do
    [ -x "$go" ] || continue
    printf '%s\n' "$go_version" "$(GOTOOLCHAIN=local "$go" env GOVERSION | sed 's/^go//')" | sort -CV && { echo "$go"; return; }
  done
  return 1
}

# What is kept of the running control plane, and its keeper's pid if it is there.
dir=$cache/cluster-${MESHLB_CLUSTER_NAME:-default}
running() { local pid; pid=$(cat "$dir/pid" 2>/dev/null) && grep -qs "cluster/up.sh" "/proc/$pid/cmdline" && echo "$pid"; }
