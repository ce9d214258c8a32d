#!/usr/bin/env python3
"""Cases of node.sh, which sets HELM, KUBECTL, KUBECONFIG and MESHLB_NODE_SHARE. They are one story: each goes on from the one before."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[3]
SHARE = os.environ["MESHLB_NODE_SHARE"]
NS = "meshlb-system"
IMAGE = ("--set", "image.repository=docker.io/library/meshlb,image.tag=test,image.pullPolicy=Never")
# A node's address, seen from outside the cluster.
NODE = "192.168.60.1"
# Everything on this node is emulated.
PATIENCE = int(os.environ.get("MESHLB_NODE_PATIENCE", "300"))


def run(*command, ok=True, stdin=None, seconds=900):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=stdin, timeout=seconds)
    if ok:
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout} {done.stderr}"
    return done


def helm(*args, **more):
    return run(os.environ["HELM"], *args, "-n", NS, **more)


def kubectl(*args, **more):
    return run(os.environ["KUBECTL"], *args, **more)


def get(*args):
    return json.loads(kubectl("get", *args, "-o", "json").stdout)


def apply(*objects):
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def vm(script, ok=True, seconds=600):
    """A script on the node."""
    return run("tests/vm/run.sh", "-t", str(seconds), ok=ok, stdin=f"export PATH=/run/kube:$PATH\n{script}\n", seconds=seconds + 60)


def until(what, check, seconds=PATIENCE):
    """Waits until `check` returns something true; tells what it said last."""
    end = time.monotonic() + seconds
    while True:
        try:
            last = check()
            if last:
                return last
        except AssertionError as e:
            last = str(e)
        assert time.monotonic() < end, f"not after {seconds} s: {what}: {last}"
        time.sleep(1)


def ask(*places, n=10, where="ip netns exec client"):
    return json.loads(vm(f"{where} python3 /run/client.py ask {n} {' '.join(places)}").stdout)


def answers(names, *places, n=10, where="ip netns exec client"):
    """All answer, everyone of them, nobody else."""
    got = ask(*places, n=n, where=where)
    assert not got["errors"] and sorted(got["answers"]) == sorted(names), f"{places}: {got}, wanted {names}"
    return got


def refused(*places, where="ip netns exec client"):
    got = ask(*places, n=1, where=where)
    assert not got["answers"] and all("refused" in e for e in got["first"]), f"{places}: {got}, wanted a refusal"


def pods(namespace, label):
    """Those that run and are not on their way out."""
    return [p for p in get("pods", "-n", namespace, "-l", label)["items"] if "deletionTimestamp" not in p["metadata"]]


def agents():
    return pods(NS, "app.kubernetes.io/component=agent")


def names():
    return [p["metadata"]["name"] for p in pods("default", "app=vote")]


def ready(pod):
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def agent_ready():
    found = agents()
    return len(found) == 1 and ready(found[0]) and found[0]


def service():
    return get("meshservice", "vote")


def vip():
    return service()["status"]["vips"][0]


class Load:
    """Connections from outside, one after another, while something is done."""

    def __init__(self, *places):
        self.file = f"/run/load-{time.monotonic_ns()}"
        vm(f"setsid ip netns exec client python3 /run/client.py load {self.file}.stop {' '.join(places)} >{self.file} 2>&1 </dev/null &")

    def stop(self, least):
        said = vm(f"touch {self.file}.stop; for _ in $(seq 60); do [ -s {self.file} ] && break; sleep 0.5; done; cat {self.file}").stdout
        got = json.loads(said)
        count = sum(got["answers"].values())
        assert not got["errors"] and count >= least, f"under load: {got}, at least {least} wanted"
        return f"{count} connections, 0 errors"


SERVER = r"""
use IO::Socket::INET; $| = 1; $SIG{TERM} = sub { exit 0 }; $SIG{PIPE} = "IGNORE";
my $s = IO::Socket::INET->new(LocalPort => 8080, Listen => 128, ReuseAddr => 1) or die;
my $b = "$ENV{HOSTNAME}\n"; my $l = length $b;
while (1) { my $c = $s->accept or next; while (<$c>) { last if /^\r?$/ } print $c "HTTP/1.0 200 OK\r\nContent-Length: $l\r\n\r\n$b"; close $c }
"""


def deployment():
    labels = {"app": "vote"}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "vote", "namespace": "default"},
            "spec": {"replicas": 2, "selector": {"matchLabels": labels},
                     "template": {"metadata": {"labels": labels}, "spec": {
                         "terminationGracePeriodSeconds": 20,
                         "containers": [{
                             "name": "vote", "image": "docker.io/library/meshlb:test", "imagePullPolicy": "Never", "command": ["perl", "-e", SERVER],
                             "ports": [{"name": "http", "containerPort": 8080}],
                             "readinessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 2, "timeoutSeconds": 5},
                             # Its end is seen by everybody before it stops to answer.
                             "lifecycle": {"preStop": {"exec": {"command": ["sleep", "8"]}}},
                         }]}}}}


VOTE = {"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService", "metadata": {"name": "vote", "namespace": "default"},
        "spec": {"selector": {"app": "vote"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080, "publish": {"port": 30080}}]}}


def node_is_ready():
    vm("/run/proxy.sh iptables")
    until("the node is Ready", lambda: any(ready(n) for n in get("nodes")["items"]))
    # The API server's own address; up.sh has it write none, since it listens on loopback.
    apply({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
           "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
           "endpoints": [{"addresses": ["10.0.2.100"]}], "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}]})
    until("the Service `kubernetes` answers on the node",
          lambda: vm("curl -sk --max-time 10 https://10.96.0.1/version", ok=False).stdout.find("gitVersion") > 0)


def helm_installs():
    helm("install", "meshlb", "charts/meshlb", "--create-namespace", *IMAGE, "--wait", "--timeout", f"{2 * PATIENCE}s")
    assert len(agents()) == 1 and len(pods(NS, "app.kubernetes.io/component=controller")) == 2
    # `--wait` is content with all but maxUnavailable, which is one, of a DaemonSet's pods.
    until("the agent is ready", agent_ready)


def agent_exec(*command, **more):
    return kubectl("exec", "-n", NS, "daemonset/meshlb-agent", "--", *command, **more)


def it_has_the_charts_rights_and_no_more():
    status = dict(line.split(":\t", 1) for line in agent_exec("cat", "/proc/1/status").stdout.splitlines() if ":\t" in line)
    # NET_BIND_SERVICE, NET_ADMIN and NET_RAW are bits 10, 12 and 13.
    for field in ("CapEff", "CapPrm", "CapBnd"):
        assert int(status[field], 16) == 0x3400, f"{field} {status[field]}"
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", status
    assert "Read-only file system" in agent_exec("touch", "/x", ok=False).stderr
    assert "Read-only file system" in agent_exec("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward", ok=False).stderr


def serves_a_deployment():
    apply(deployment(), VOTE)
    kubectl("rollout", "status", "deployment/vote", f"--timeout={PATIENCE}s")
    def is_true(kind):
        conditions = {c["type"]: c for c in service().get("status", {}).get("conditions", [])}
        return conditions.get(kind, {}).get("status") == "True" or None
    until("the MeshService is Ready", lambda: is_true("Ready"))
    # Counts are written at most every five seconds.
    until("its endpoints are counted", lambda: service()["status"]["endpoints"] == {"ready": 2, "total": 2})
    until("outside, by the published port", lambda: answers(names(), f"{NODE}:30080"))
    address = vip()
    answers(names(), f"{address}:80", f"{NODE}:30080", "127.0.0.1:30080", where="")
    answers(names(), f"{address}:80")
    # From a pod, itself an endpoint.
    for pod in names():
        code = f'exec 3<>/dev/tcp/{address}/80; printf "GET / HTTP/1.0\\r\\n\\r\\n" >&3; tail -1 <&3'
        seen = {kubectl("exec", pod, "--", "bash", "-c", code).stdout.strip() for _ in range(4)}
        assert seen == set(names()), f"from {pod}: {seen}"
    refused(f"{address}:81", f"{address}:22")
    refused(f"{address}:81", where="")


def kubectl_exec_shows_and_explains():
    shown = agent_exec("meshlb", "show").stdout
    for text in ("default/vote", vip(), "30080"):
        assert text in shown, shown
    explained = agent_exec("meshlb", "explain", "default/vote").stdout
    for text in [vip(), "30080", *(p["status"]["podIP"] for p in pods("default", "app=vote"))]:
        assert text in explained, explained


def helm_test_passes():
    said = helm("test", "meshlb", "--logs", "--timeout", f"{PATIENCE}s").stdout
    assert "controller at" in said and "agent at" in said, said
    # Helm leaves it, so that its log can be read; docs/install.md says so.
    kubectl("delete", "pod", "meshlb-test-ready", "-n", NS)


def a_rollout_of_the_pods_under_load():
    load = Load(f"{NODE}:30080", f"{vip()}:80")
    before = names()
    kubectl("rollout", "restart", "deployment/vote")
    kubectl("rollout", "status", "deployment/vote", f"--timeout={2 * PATIENCE}s")
    until("the old pods are gone", lambda: not set(before) & {p["metadata"]["name"] for p in get("pods", "-l", "app=vote")["items"]})
    answers(names(), f"{NODE}:30080")
    return load.stop(100)


def helm_upgrades_under_load():
    before = agents()[0]["metadata"]["uid"]
    load = Load(f"{NODE}:30080", f"{vip()}:80")
    helm("upgrade", "meshlb", "charts/meshlb", *IMAGE, "--set", "config.resync=30", "--wait", "--timeout", f"{2 * PATIENCE}s")
    kubectl("rollout", "status", "daemonset/meshlb-agent", "-n", NS, f"--timeout={PATIENCE}s")
    after = until("one agent, ready", agent_ready)["metadata"]["uid"]
    assert before != after, "the agent was not replaced"
    said = load.stop(100)
    # And it follows changes.
    kubectl("scale", "deployment/vote", "--replicas=3")
    kubectl("rollout", "status", "deployment/vote", f"--timeout={PATIENCE}s")
    until("the third pod answers", lambda: answers(names(), f"{NODE}:30080", n=12))
    kubectl("scale", "deployment/vote", "--replicas=2")
    until("two pods", lambda: len(names()) == 2)
    until("the third pod is not asked any more", lambda: answers(names(), f"{NODE}:30080"))
    return said


def agents_template(*changes):
    """Changes the DaemonSet as nobody should: JSON patches below its pods' spec."""
    patch = [{"op": op, "path": f"/spec/template/spec/{path}", "value": value} for op, path, value in changes]
    kubectl("patch", "daemonset", "meshlb-agent", "-n", NS, "--type=json", "-p", json.dumps(patch))


def nowhere():
    agents_template(("add", "nodeSelector/nobody", "here"))
    until("no agent is left", lambda: not get("pods", "-n", NS, "-l", "app.kubernetes.io/component=agent")["items"])


def cleanup():
    """What docs/install.md says for a node whose agent has gone."""
    said = vm("""ctr -n k8s.io run --rm --net-host --privileged \
        --mount type=bind,src=/run/meshlb,dst=/run/meshlb,options=rbind:rw --mount type=bind,src=/var/lib/meshlb,dst=/var/lib/meshlb,options=rbind:rw \
        docker.io/library/meshlb:test cleanup meshlb cleanup --node n1 2>&1""").stdout
    assert "nothing of meshlb is left" in said, said


def left_on_the_node():
    """Whatever of ours is in the kernel."""
    return vm("""{ iptables-save; ip6tables-save; iptables-legacy-save; ipset list -n; nft list tables; } 2>/dev/null | grep -i meshlb
        ipvsadm -Sn | grep -e '-f '; ip route show table local | grep 10.200.0.0; true""").stdout.strip()


def each_capability_is_needed():
    """Each is taken away in turn, on a node where nothing is programmed yet."""
    path = "containers/0/securityContext/capabilities/add"
    added = get("daemonset", "meshlb-agent", "-n", NS)["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]["add"]
    # What the log then says: our own words without NET_ADMIN; the failure of the kernel's without NET_RAW.
    said = {"NET_ADMIN": "no CAP_NET_ADMIN", "NET_RAW": "Can't open socket to ipset",
            "NET_BIND_SERVICE": "DNS can't be served on 10.200.0.2:53: Permission denied"}
    assert sorted(added) == sorted(said), added
    for dropped in added:
        nowhere()
        cleanup()
        agents_template(("replace", path, [c for c in added if c != dropped]), ("remove", "nodeSelector/nobody", None))
        log = lambda: kubectl("logs", "-n", NS, agents()[0]["metadata"]["name"]).stdout if agents() else ""
        until(f"the agent without {dropped} says why", lambda: said[dropped] in log())
        if dropped == "NET_BIND_SERVICE":
            # Only names are lost by it.
            until("it serves all the same", lambda: agent_ready() and answers(names(), f"{NODE}:30080"))
            continue
        # Whatever it tries, it does not get there.
        for _ in range(10):
            assert not agent_ready(), f"an agent without {dropped} is ready"
            time.sleep(1)
        got = ask(f"{NODE}:30080", n=1)
        assert not got["answers"], f"without {dropped}: {got}"
    # Without NET_ADMIN the kernel itself refuses; with it alone it does not.
    for given, phase in ((["NET_RAW"], "Failed"), (["NET_ADMIN"], "Succeeded")):
        apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe", "namespace": NS}, "spec": {
            "restartPolicy": "Never", "hostNetwork": True, "containers": [{
                "name": "probe", "image": "docker.io/library/meshlb:test", "imagePullPolicy": "Never",
                "command": ["sh", "-c", "nft add table inet probe && nft delete table inet probe"],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], "add": given}}}]}})
        until(f"nft with {given} alone: {phase}", lambda: get("pod", "probe", "-n", NS)["status"]["phase"] == phase)
        kubectl("delete", "pod", "probe", "-n", NS)
    agents_template(("replace", path, added))
    until("the agent with its rights is ready", agent_ready)
    until("it serves", lambda: answers(names(), f"{NODE}:30080"))


NODE_PORT = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "core", "namespace": "default"},
             "spec": {"type": "NodePort", "selector": {"app": "vote"}, "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30900}]}}


def beside_kube_proxy_in_each_mode():
    """It changes its mode under us: each time it removes what it had and starts anew. (The kernel tests have more of it.)"""
    apply(NODE_PORT)
    core = get("service", "core")["spec"]["clusterIP"]
    ours, theirs = f"{NODE}:30080", f"{NODE}:30900"
    address = vip()

    def both():
        answers(names(), ours, theirs, f"{address}:80", n=6)
        answers(names(), ours, theirs, f"{address}:80", f"{core}:80", n=6, where="")
        refused(f"{address}:30900")
        return True

    notes = []
    for mode in ("nftables", "ipvs", "iptables"):
        vm(f"/run/proxy.sh {mode}")
        until(f"both work with kube-proxy in {mode} mode", both)
        load = Load(ours, theirs)
        # Four of its whole comparisons.
        time.sleep(40)
        notes.append(f"{mode}: {load.stop(50)}")
        both()
        assert agent_ready()
    kubectl("delete", "service", "core")
    return "; ".join(notes)


def ours():
    """Every object of any kind that has our name, is in our namespace or is a node's report (which has the node's name), as KIND NAME. Kubernetes' own are left out, and Events, which end by themselves."""
    kinds = [k for k in kubectl("api-resources", "--verbs=list", "-o", "name").stdout.split() if k.partition(".")[0] != "events"]
    columns = "custom-columns=K:.kind,NS:.metadata.namespace,N:.metadata.name"
    rows = [row.split() for row in kubectl("get", ",".join(kinds), "-A", "--no-headers", "-o", columns).stdout.splitlines()]
    own = {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}
    return {f"{kind} {name}" for kind, namespace, name in rows if (namespace == NS or "meshlb" in name or kind == "MeshNode") and (kind, name) not in own}


# What docs/install.md says that stays, and what an API server makes for a CRD.
STAYS = rf"CustomResourceDefinition mesh(services|nodes)\.meshlb\.dev|APIService v1alpha1\.meshlb\.dev|Namespace {NS}|Lease meshlb-controller|ConfigMap meshlb-pool-(ipv4|ipv6|tcp|udp|sctp)|Pod meshlb-test-ready"


def helm_uninstall_leaves_nothing():
    # A chart that clears nodes says so by a hook; without one, docs/install.md has a command.
    clears = "pre-delete" in helm("get", "hooks", "meshlb").stdout
    helm("uninstall", "meshlb", "--wait", "--timeout", f"{2 * PATIENCE}s")
    until("its pods are gone", lambda: not get("pods", "-n", NS, "-l", "app.kubernetes.io/part-of=meshlb")["items"])
    # No object of a person's is deleted.
    assert service()["spec"]["ports"][0]["publish"]["port"] == 30080
    if not clears:
        answers(names(), f"{NODE}:30080")
        cleanup()
        kubectl("delete", "meshnodes", "--all")
    left = left_on_the_node()
    assert not left, f"left on the node: {left}"
    def nothing_else():
        left = {object_ for object_ in ours() if not re.fullmatch(STAYS, object_)}
        assert not left, left
        return True
    until("its objects are gone", nothing_else)
    refused(f"{NODE}:30080")
    # The node goes on: kube-proxy's rules are there.
    assert "gitVersion" in vm("curl -sk --max-time 20 https://10.96.0.1/version").stdout
    return "cleared by the chart" if clears else "cleared by `meshlb cleanup`"


def readme_commands():
    """The commands of the README's section On Kubernetes, word for word, and its vote.yaml."""
    section = (ROOT / "README.md").read_text().split("## On Kubernetes\n", 1)[1].split("\n## ", 1)[0]
    blocks = dict(re.findall(r"```(yaml|sh)\n(.*?)```", section, re.S))
    uninstall = " ".join(re.search(r"`(helm uninstall[^`]*)`", section)[1].split())
    return blocks["yaml"], blocks["sh"].splitlines(), uninstall


def the_readme_word_for_word():
    manifest, commands, uninstall = readme_commands()
    kubectl("delete", "deployment,meshservice", "vote", "--ignore-not-found")
    # No registry is asked: the image under the name that the chart has by default.
    vm("ctr -n k8s.io images tag --force docker.io/library/meshlb:test docker.io/library/meshlb:0.1.0")
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "vote.yaml").write_text(manifest)
        (place / "charts").symlink_to(ROOT / "charts")
        for name in ("helm", "kubectl"):
            (place / name).symlink_to(os.environ[name.upper()])
        path = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

        def shell(command):
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=path, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
            return done.stdout

        for command in commands:
            if not command.startswith("curl"):
                said = shell(command)
            if command.startswith("kubectl get"):
                assert "vote" in said and vip() in said and "30080" in said, said
        curl = [c.split("#")[0].split() for c in commands if c.startswith("curl")]
        assert curl == [["curl", "http://ANY-NODE:30080"]], curl
        kubectl("rollout", "status", "deployment/vote", f"--timeout={PATIENCE}s")
        until("all three are asked", lambda: answers(names(), f"{NODE}:30080", n=12))
        said = vm(f"ip netns exec client curl -s http://{NODE}:30080").stdout.strip()
        assert said in names(), said
        shell(uninstall)
    until("its pods are gone", lambda: not get("pods", "-n", NS, "-l", "app.kubernetes.io/part-of=meshlb")["items"])
    assert service(), "the MeshService is gone"
    left = left_on_the_node()
    assert not left, f"left on the node: {left}"


CASES = [node_is_ready, helm_installs, it_has_the_charts_rights_and_no_more, serves_a_deployment, kubectl_exec_shows_and_explains,
         helm_test_passes, a_rollout_of_the_pods_under_load, helm_upgrades_under_load, beside_kube_proxy_in_each_mode,
         each_capability_is_needed, helm_uninstall_leaves_nothing, the_readme_word_for_word]


def main():
    passed = failed = 0
    for case in CASES:
        if sys.argv[1:] and not any(f in case.__name__ for f in sys.argv[1:]):
            continue
        start = time.monotonic()
        try:
            note = case()
        except Exception as e:  # a later one may tell more of it
            failed += 1
            where = traceback.extract_tb(e.__traceback__)[-1]
            print(f"FAILED node::{case.__name__} ({where.name}:{where.lineno}): {e}", flush=True)
        else:
            passed += 1
            print(f"ok node::{case.__name__} ({time.monotonic() - start:.1f} s){f': {note}' if note else ''}", flush=True)
    print(f"node tests: {passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


sys.exit(main())
