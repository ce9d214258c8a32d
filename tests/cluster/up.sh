#!/usr/bin/env bash
# Starts a control plane on loopback ports and leaves it up: etcd, kube-apiserver, kube-controller-manager, kube-scheduler.
# Writes $dir/kubeconfig (admin). `up.sh --stop` ends it. MESHLB_CLUSTER_NAME=NAME for a second one.
#
# A program that ends is started again; `touch $dir/hold/etcd` (or kube-apiserver …) ends it and keeps it down until the file is gone.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

stop() {
  local pid; pid=$(running) || return 0
  kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq 100); do [ -e "/proc/$pid" ] || break; sleep 0.1; done
}

# The process that keeps the parts up, until it is told to end.
keep() {
  local part pid log
  declare -A pids=()
  trap 'touch "$dir/ending"' TERM INT
  while [ ! -e "$dir/ending" ]; do
    for part in etcd kube-apiserver kube-controller-manager kube-scheduler; do
      pid=${pids[$part]:-}
      if [ -n "$pid" ] && ! kill -0 "$pid" 2>/dev/null; then pids[$part]='' pid=''; fi
      if [ -e "$dir/hold/$part" ]; then
        # SIGKILL: what is tested is the sudden end.
        [ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || true
      elif [ -z "$pid" ]; then
        log=$dir/$part.log
        mapfile -t arguments <"$dir/$part.args"
        "$bin/$part" "${arguments[@]}" >>"$log" 2>&1 &
        pids[$part]=$!
      fi
    done
    sleep 0.2
  done
  for pid in "${pids[@]}"; do [ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || true; done
  rm -f "$dir/pid"
}

case ${1:-} in
  --stop) stop; exit 0 ;;
  --keep) bin=$2; keep; exit 0 ;;
  "") ;;
  *) die "up.sh knows no $1" ;;
esac

"$here/setup.sh"
bin=${KUBE_BIN:-$(kube_dir)}
if running >/dev/null; then say "cluster: already up"; exit 0; fi
rm -rf "$dir"; mkdir -p "$dir/hold" "$dir/pki" "$dir/etcd"; chmod 700 "$dir"
read -r etcd peer api kcm scheduler < <(python3 - <<'P'
import socket
socks = [socket.socket() for _ in range(5)]
for s in socks: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in socks))
P
)
cd "$dir/pki"
{
  openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=meshlb-test -keyout ca.key -out ca.crt
  openssl req -newkey rsa:2048 -nodes -subj /CN=kube-apiserver -keyout apiserver.key -out apiserver.csr
  # 10.0.2.100: where the VM finds it; 10.96.0.1: the Service `kubernetes`.
  openssl x509 -req -days 3650 -CA ca.crt -CAkey ca.key -CAcreateserial -in apiserver.csr -out apiserver.crt \
    -extfile <(echo subjectAltName=IP:127.0.0.1,IP:10.0.2.100,IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc)
  openssl genrsa -out sa.key 2048
} >"$dir/pki.log" 2>&1 || { cat "$dir/pki.log" >&2; die "no certificates"; }
token=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo "$token,admin,admin,system:masters" >"$dir/tokens.csv"
cat >"$dir/kubeconfig" <<Y
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://127.0.0.1:$api", certificate-authority: $dir/pki/ca.crt}}]
users: [{name: admin, user: {token: $token}}]
contexts: [{name: test, context: {cluster: test, user: admin}}]
current-context: test
Y
echo "$api" >"$dir/port"
printf '%s\n' --data-dir "$dir/etcd" --listen-client-urls "http://127.0.0.1:$etcd" --advertise-client-urls "http://127.0.0.1:$etcd" \
  --listen-peer-urls "http://127.0.0.1:$peer" --unsafe-no-fsync >"$dir/etcd.args"
printf '%s\n' --etcd-servers "http://127.0.0.1:$etcd" --secure-port "$api" --bind-address 127.0.0.1 --endpoint-reconciler-type none \
  --tls-cert-file "$dir/pki/apiserver.crt" --tls-private-key-file "$dir/pki/apiserver.key" \
  --service-account-key-file "$dir/pki/sa.key" --service-account-signing-key-file "$dir/pki/sa.key" \
  --service-account-issuer https://kubernetes.default.svc --service-cluster-ip-range 10.96.0.0/16,fd00:96::/112 --token-auth-file "$dir/tokens.csv" \
  --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction --allow-privileged --cert-dir "$dir/pki" \
  --audit-policy-file "$dir/audit.yaml" --audit-log-path "$dir/audit.log" >"$dir/kube-apiserver.args"
# What our accounts ask for is written down: it is counted, and a right that is never used is to go.
cat >"$dir/audit.yaml" <<Y
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, userGroups: ["system:serviceaccounts:meshlb-system"]}
- {level: None}
Y
printf '%s\n' --kubeconfig "$dir/kubeconfig" --bind-address 127.0.0.1 --secure-port "$kcm" --cert-dir "$dir/pki" --root-ca-file "$dir/pki/ca.crt" \
  --service-account-private-key-file "$dir/pki/sa.key" --use-service-account-credentials >"$dir/kube-controller-manager.args"
printf '%s\n' --kubeconfig "$dir/kubeconfig" --bind-address 127.0.0.1 --secure-port "$scheduler" --cert-dir "$dir/pki" >"$dir/kube-scheduler.args"
setsid "$BASH" "$here/up.sh" --keep "$bin" >"$dir/keep.log" 2>&1 </dev/null &
echo $! >"$dir/pid"
start=$SECONDS
until "$bin/kubectl" --kubeconfig "$dir/kubeconfig" get --raw /readyz >/dev/null 2>&1 \
  && "$bin/kubectl" --kubeconfig "$dir/kubeconfig" get serviceaccount default >/dev/null 2>&1; do
  if [ $((SECONDS - start)) -gt 90 ]; then tail -5 "$dir"/*.log >&2; stop; die "the control plane did not come up in 90 s; its logs are in $dir"; fi
  sleep 0.3
done
say "cluster: Kubernetes $(kube_version) up after $((SECONDS - start)) s (kubeconfig: $dir/kubeconfig)"
