#!/usr/bin/env python3
"""Cases of run.sh, which sets HELM, KUBECTL, KUBE_SCORE, KUBERNETES_VALIDATE, PROMTOOL, MESHLB_BIN and, for those on a control plane, KUBECONFIG."""

import http.server
import json
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = "charts/meshlb"
VALUES = sorted((ROOT / "tests/chart/values").glob("*.yaml"))
EVERYTHING = ("-f", "tests/chart/values/everything.yaml")
LEAST = ("-f", "tests/chart/values/least.yaml")
HELM = os.environ["HELM"]
KUBECTL = os.environ["KUBECTL"]
NAMESPACE = "meshlb-system"


class Skipped(Exception):
    pass


# The CRDs are long: the one in C takes a tenth of the time, where PyYAML has it.
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Refuses a key that comes twice, as the API server does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        double = {key for key in keys if keys.count(key) > 1}
        assert not double, f"twice at {node.start_mark}: {double}"
        return super().construct_mapping(node, deep)


def load(text):
    return [d for d in yaml.load_all(text, Loader) if d is not None]


def run(*command, ok=True, env=None, stdin=None):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})}, input=stdin)
    if ok:
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr or done.stdout}"
    return done


def template(*flags, release="meshlb", chart=CHART, ok=True):
    # Without a version, Helm takes Kubernetes for whatever it was built with.
    return run(HELM, "template", release, chart, "-n", NAMESPACE, "--kube-version", "1.31.0", *flags, ok=ok)


def render(*flags):
    """Objects by (kind, name)."""
    text = template(*flags).stdout
    out = {}
    for d in load(text):
        key = d["kind"], d["metadata"]["name"]
        assert key not in out, key
        out[key] = d
    return out


def pod(objects, kind, name):
    return objects[kind, name]["spec"]["template"]["spec"]


def config(objects, role):
    return load(objects["ConfigMap", "meshlb"]["data"][f"{role}.yaml"])[0]


def equal(have, want):
    assert have == want, f"\n  have {json.dumps(have, sort_keys=True)}\n  want {json.dumps(want, sort_keys=True)}"


# Without a control plane.


def lints():
    for flags in [(), *(("-f", str(v)) for v in VALUES)]:
        run(HELM, "lint", "--strict", "--kube-version", "1.31.0", CHART, *flags)


def schemas_of_the_oldest_and_the_newest_kubernetes():
    others = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
    texts = {flags: template(*flags).stdout for flags in [(), *(("-f", str(v)) for v in VALUES)]}
    texts["deploy"] = (ROOT / "deploy/meshlb.yaml").read_text()
    for what, text in texts.items():
        objects = [d for d in load(text) if d["kind"] not in others]
        assert objects, what
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump_all(objects, file)
            file.flush()
            for version in ("1.31.0", "1.37.0"):
                run(os.environ["KUBERNETES_VALIDATE"], "--strict", "--quiet", "-k", version, file.name)


def scores():
    everywhere = [
        # A limit on CPU would only delay changes, which are bursts.
        "--ignore-container-cpu-limit",
        # The tag is a version, or a digest wins; a node that can't reach the registry has to be able to start its agent.
        "--ignore-test=container-image-pull-policy",
        # Nothing writes to its own file system, which is read-only, and kubelet rotates the logs. A node whose kubelet does not count local
        # storage (localStorageCapacityIsolation: false, as without root) would take no pod that asks for some.
        "--ignore-test=container-ephemeral-storage-request-and-limit",
    ]
    by_kind = {
        "Deployment": [],
        "DaemonSet": [
            # On the host's network no NetworkPolicy applies.
            "--ignore-test=pod-networkpolicy",
            # Only root may program the kernel.
            "--ignore-test=container-security-context-user-group-id",
        ],
        # They are there for a moment, as hooks, to ask the API server or the pods; a policy would have to come and go with them.
        "Job": ["--ignore-test=pod-networkpolicy"],
        "Pod": ["--ignore-test=pod-networkpolicy"],
    }
    objects = load(template("--set", "networkPolicy.enabled=true").stdout)
    equal(sorted({d["kind"] for d in objects} & {*by_kind, "CronJob", "StatefulSet", "ReplicaSet"}), sorted(by_kind))
    for kind, flags in by_kind.items():
        # What selects pods is looked at beside them.
        beside = [d for d in objects if d["kind"] == kind or (kind == "Deployment" and d["kind"] in ("NetworkPolicy", "PodDisruptionBudget"))]
        run(os.environ["KUBE_SCORE"], "score", "--kubernetes-version", "v1.31", "--exit-one-on-warning", *everywhere, *flags, "-",
            stdin=yaml.safe_dump_all(beside))


def default_objects():
    kinds = sorted(key for key in render("--no-hooks"))
    equal([list(k) for k in kinds], [list(k) for k in sorted([
        ("ClusterRole", "meshlb-system-meshlb-agent"),
        ("ClusterRole", "meshlb-system-meshlb-controller"),
        ("ClusterRoleBinding", "meshlb-system-meshlb-agent"),
        ("ClusterRoleBinding", "meshlb-system-meshlb-controller"),
        ("ConfigMap", "meshlb"),
        ("CustomResourceDefinition", "meshnodes.meshlb.dev"),
        ("CustomResourceDefinition", "meshservices.meshlb.dev"),
        ("DaemonSet", "meshlb-agent"),
        ("Deployment", "meshlb-controller"),
        ("PodDisruptionBudget", "meshlb-controller"),
        ("Role", "meshlb-agent"),
        ("Role", "meshlb-controller"),
        ("RoleBinding", "meshlb-agent"),
        ("RoleBinding", "meshlb-controller"),
        ("Service", "meshlb-agent-metrics"),
        ("Service", "meshlb-controller-health"),
        ("ServiceAccount", "meshlb-agent"),
        ("ServiceAccount", "meshlb-controller"),
        ("ValidatingAdmissionPolicy", "meshlb-system-meshlb-agent"),
        ("ValidatingAdmissionPolicyBinding", "meshlb-system-meshlb-agent"),
    ])])
    hooks = {key: d["metadata"]["annotations"]["helm.sh/hook"] for key, d in render().items() if "helm.sh/hook" in d["metadata"].get("annotations", {})}
    equal(sorted([*key, hook] for key, hook in hooks.items()), [
        ["ClusterRole", "meshlb-system-meshlb-uninstall", "pre-delete"],
        ["ClusterRoleBinding", "meshlb-system-meshlb-uninstall", "pre-delete"],
        ["Job", "meshlb-uninstall", "pre-delete"],
        ["Pod", "meshlb-test-ready", "test"],
        ["Role", "meshlb-uninstall", "pre-delete"],
        ["RoleBinding", "meshlb-uninstall", "pre-delete"],
        ["ServiceAccount", "meshlb-uninstall", "pre-delete"],
    ])


def switches():
    more = set(render(*EVERYTHING)) - set(render())
    equal(sorted(map(list, more)), [["NetworkPolicy", "meshlb-controller"], ["PodMonitor", "meshlb"], ["PodMonitor", "meshlb-controller"], ["PrometheusRule", "meshlb"]])
    least = render(*LEAST)
    equal(sorted(kind for kind, _ in least), ["ConfigMap", "DaemonSet", "Deployment"])
    # Rights and the policy by themselves: who may not make roles may have the policy, and the other way round.
    policy = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    roles = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    for switch, without in [("rbac", roles), ("admissionPolicy", policy)]:
        equal(sorted({kind for kind, _ in set(render()) - set(render("--set", f"{switch}.create=false"))}), sorted(without))
    names = {kind: name for kind, name in least}
    for kind, account in [("DaemonSet", "agent-account"), ("Deployment", "controller-account")]:
        equal(pod(least, kind, names[kind])["serviceAccountName"], account)


def labels_and_namespaces():
    standard = {"name", "instance", "version", "managed-by", "part-of"}
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    for flags in [(), *(("-f", str(v)) for v in VALUES)]:
        for (kind, name), d in render(*flags).items():
            have = {label.removeprefix("app.kubernetes.io/") for label in d["metadata"]["labels"]}
            assert standard <= have, f"{kind} {name} is without {standard - have}"
            want = None if kind in cluster_wide else NAMESPACE
            assert d["metadata"].get("namespace") == want, f"{kind} {name}: namespace"
            template = d["spec"].get("template") if kind in ("DaemonSet", "Deployment") else None
            if template:
                selector = d["spec"]["selector"]["matchLabels"]
                assert selector.items() <= template["metadata"]["labels"].items(), f"{kind} {name}: selector"
                assert set(selector) == {f"app.kubernetes.io/{x}" for x in ("name", "instance", "component")}, selector


def a_key_that_is_given_and_the_charts_comes_once():
    """What is given wins, but where the chart can't work with it: labels that are selected by, and what restarts pods."""
    flags = ["--set", "podMonitor.enabled=true,prometheusRule.enabled=true"]
    values = {
        role: {
            "nodeSelector": {"kubernetes.io/os": "other", "example.com/pool": "edge"},
            "podLabels": {"app.kubernetes.io/component": "mine", "app.kubernetes.io/instance": "mine", "app.kubernetes.io/name": "mine", "app.kubernetes.io/part-of": "mine"},
            "podAnnotations": {"checksum/config": "mine", "kubectl.kubernetes.io/default-container": "mine"},
        }
        for role in ("agent", "controller")
    } | {
        "podMonitor": {"labels": {"app.kubernetes.io/instance": "mine"}},
        "prometheusRule": {"labels": {"app.kubernetes.io/instance": "mine"}, "alertLabels": {"severity": "mine"}},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(values, file)
        file.flush()
        objects = render(*flags, "-f", file.name)
    before = render(*flags)
    for kind, role in [("DaemonSet", "agent"), ("Deployment", "controller")]:
        spec, was = (o[kind, f"meshlb-{role}"]["spec"] for o in (objects, before))
        equal(spec["selector"], was["selector"])
        metadata = spec["template"]["metadata"]
        equal(metadata["labels"], was["template"]["metadata"]["labels"] | {"app.kubernetes.io/part-of": "mine"})
        equal(metadata["annotations"], was["template"]["metadata"]["annotations"] | {"kubectl.kubernetes.io/default-container": "mine"})
        equal(spec["template"]["spec"]["nodeSelector"], values[role]["nodeSelector"])
    equal(pod(objects, "Job", "meshlb-uninstall")["nodeSelector"], values["controller"]["nodeSelector"])
    for kind, name in [("PodMonitor", "meshlb"), ("PodMonitor", "meshlb-controller"), ("PrometheusRule", "meshlb")]:
        equal(objects[kind, name]["metadata"]["labels"], before[kind, name]["metadata"]["labels"] | {"app.kubernetes.io/instance": "mine"})
    assert all(rule["labels"]["severity"] == "mine" for rule in objects["PrometheusRule", "meshlb"]["spec"]["groups"][0]["rules"])


def two_releases_do_not_meet():
    a = set(render())
    text = template("--set", "crds.install=false", release="other").stdout
    b = {(d["kind"], d["metadata"]["name"]) for d in load(text)}
    equal(sorted(a & b), [])


def names_that_look_like_something_else():
    """Whatever Helm and Kubernetes allow as names stays text, and is a name that the API server takes."""
    label = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?")
    for release, namespace, flags, fullname in [
        ("123", "456", (), "meshlb-123"),
        ("1e3", "0x1f", (), "meshlb-1e3"),
        ("true", "null", (), "true-meshlb"),
        ("2026.11.30", "2026-11-30", (), "meshlb-2026-11-30"),
        ("a.b", "1-2", ("--set", "nameOverride=a"), "a-b"),
        ("v0.1.0.meshlb", "on", (), "v0-1-0-meshlb"),
        ("a" * 53, "1" * 63, (), "a" * 40),
        # The cut would come behind a dash.
        ("a" * 39 + "-b", "y", (), "a" * 39),
        ("a" * 38 + "--b", "y", (), "a" * 38),
        ("meshlb", "no", ("--set-string", "fullnameOverride=null,nameOverride=true"), "null"),
        ("meshlb", "no", ("--set-string", "agent.serviceAccount.name=1,controller.serviceAccount.name=2,uninstall.serviceAccountName=3"), "meshlb"),
    ]:
        for more in ((), EVERYTHING):
            # A list: of two objects that the tests took for one, one would be lost.
            objects = load(template("-n", namespace, *more, *flags, release=release).stdout)
            equal(len(objects), len(load(template(*more, *flags).stdout)))
            have = {(d["kind"], d["metadata"]["name"]) for d in objects}
            assert {("DaemonSet", f"{fullname}-agent"), ("Deployment", f"{fullname}-controller"), ("ConfigMap", fullname)} <= have, sorted(have)
            for d in objects:
                kind, metadata = d["kind"], d["metadata"]
                what = f"{release} in {namespace}: {kind} {metadata['name']}"
                assert isinstance(metadata["name"], str) and metadata.get("namespace", namespace) == namespace, what
                assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", metadata["name"]), what
                if kind == "Service":
                    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", metadata["name"]), what
                for value in metadata["labels"].values():
                    assert isinstance(value, str) and label.fullmatch(value) and len(value) <= 63, (what, value)
                if kind in ("DaemonSet", "Deployment", "Job"):
                    template_ = d["spec"]["template"]
                    assert all(isinstance(v, str) for v in [*template_["metadata"]["labels"].values(), *template_["metadata"].get("annotations", {}).values()]), what
                    assert d.get("spec", {}).get("selector", {}).get("matchLabels", {}).items() <= template_["metadata"]["labels"].items(), what
                    account = template_["spec"]["serviceAccountName"]
                    assert isinstance(account, str) and (kind == "Job" or ("ServiceAccount", account) in have), what
                    assert all(("ConfigMap", v["configMap"]["name"]) in have for v in template_["spec"].get("volumes", []) if "configMap" in v), what
                if kind.endswith("RoleBinding"):
                    assert (d["roleRef"]["kind"], d["roleRef"]["name"]) in have, what
                    assert all(isinstance(s["name"], str) and s["namespace"] == namespace for s in d["subjects"]), what
                if kind == "PodMonitor":
                    equal(d["spec"]["namespaceSelector"]["matchNames"], [namespace])
    # What would not be a name is refused.
    for flag in ("fullnameOverride=1", "fullnameOverride=A", "fullnameOverride=a.b", "nameOverride=a_b", "nameOverride=-a"):
        done = template("--set-string", flag, ok=False)
        assert done.returncode != 0 and flag.partition("=")[0] in done.stderr, f"{flag}: {done.stderr or 'accepted'}"


def crd_is_the_repositorys():
    for name in ("meshservice", "meshnode"):
        want = (ROOT / f"crds/{name}.yaml").read_text()
        assert (ROOT / CHART / f"files/{name}.yaml").read_text() == want, f"cp crds/{name}.yaml charts/meshlb/files/ && deploy/generate.sh"
        have = render()["CustomResourceDefinition", f"{name}s.meshlb.dev"]
        # Uninstalling must not take MeshServices with it.
        equal(have["metadata"].pop("annotations"), {"helm.sh/resource-policy": "keep"})
        have["metadata"].pop("labels")
        equal(have, load(want)[0])


def versions_are_one():
    cargo = re.search(r'\[workspace\.package\]\s+version = "(.*)"', (ROOT / "Cargo.toml").read_text())[1]
    chart = load((ROOT / CHART / "Chart.yaml").read_text())[0]
    equal(chart["appVersion"], cargo)
    equal(re.search(r"^ARG VERSION=(.*)$", (ROOT / "Dockerfile").read_text(), re.M)[1], cargo)
    equal(pod(render(), "DaemonSet", "meshlb-agent")["containers"][0]["image"], f"meshlb:{cargo}")
    digest = pod(render(*EVERYTHING), "DaemonSet", "meshlb-agent")["containers"][0]["image"]
    assert digest.startswith("registry.example.com/mesh/meshlb@sha256:"), digest


def deploy_is_the_chart():
    run("deploy/generate.sh", "--check")
    have = load((ROOT / "deploy/meshlb.yaml").read_text())
    built = load(run(KUBECTL, "kustomize", "deploy").stdout)
    order = lambda d: (d["kind"], d["metadata"]["name"])
    equal(sorted(built, key=order), sorted(have, key=order))
    text = (ROOT / "deploy/meshlb.yaml").read_text()
    for word in ("helm", "Helm"):
        assert word not in text, f"deploy/meshlb.yaml says {word}"


def rights():
    objects = render()
    role = lambda kind, name: [(r["apiGroups"], r["resources"], r.get("resourceNames"), r["verbs"]) for r in objects[kind, name]["rules"]]
    pools = [f"meshlb-pool-{p}" for p in ("ipv4", "ipv6", "tcp", "udp", "sctp")]
    equal(role("ClusterRole", "meshlb-system-meshlb-agent"), [
        (["meshlb.dev"], ["meshservices"], None, ["list", "watch"]),
        (["discovery.k8s.io"], ["endpointslices"], None, ["list", "watch"]),
        ([""], ["nodes"], None, ["list", "watch"]),
        (["meshlb.dev"], ["meshnodes"], None, ["list", "watch", "create", "patch"]),
        (["meshlb.dev"], ["meshnodes/status"], None, ["patch"]),
    ])
    equal(role("Role", "meshlb-agent"), [([""], ["configmaps"], ["meshlb-uninstall"], ["list", "watch"])])
    equal(role("ClusterRole", "meshlb-system-meshlb-uninstall"), [(["meshlb.dev"], ["meshnodes"], None, ["list", "deletecollection"])])
    equal(role("Role", "meshlb-uninstall"), [
        ([""], ["configmaps"], None, ["create"]),
        ([""], ["configmaps"], ["meshlb-uninstall"], ["delete"]),
        (["apps"], ["daemonsets"], ["meshlb-agent"], ["get"]),
        ([""], ["pods"], None, ["list"]),
    ])
    equal(role("ClusterRole", "meshlb-system-meshlb-controller"), [
        (["meshlb.dev"], ["meshservices"], None, ["list", "watch"]),
        (["meshlb.dev"], ["meshservices/status"], None, ["patch"]),
        (["meshlb.dev"], ["meshnodes"], None, ["list", "watch"]),
        ([""], ["nodes"], None, ["list", "watch"]),
        (["discovery.k8s.io"], ["endpointslices"], None, ["list", "watch"]),
        ([""], ["services"], None, ["list", "watch", "create", "patch", "delete"]),
        (["events.k8s.io"], ["events"], None, ["create"]),
    ])
    equal(role("Role", "meshlb-controller"), [
        (["coordination.k8s.io"], ["leases"], None, ["create"]),
        (["coordination.k8s.io"], ["leases"], ["meshlb-controller"], ["get", "update"]),
        (["apps"], ["daemonsets"], None, ["list", "watch"]),
        ([""], ["configmaps"], None, ["create"]),
        ([""], ["configmaps"], pools, ["get", "update"]),
    ])
    for kind, name in [("ClusterRoleBinding", "meshlb-system-meshlb-agent"), ("ClusterRoleBinding", "meshlb-system-meshlb-controller"), ("RoleBinding", "meshlb-controller"),
                       ("RoleBinding", "meshlb-agent"), ("ClusterRoleBinding", "meshlb-system-meshlb-uninstall"), ("RoleBinding", "meshlb-uninstall")]:
        binding = objects[kind, name]
        equal(binding["roleRef"]["name"], name)
        account = "meshlb-" + name.rsplit("-", 1)[1]
        equal(binding["subjects"], [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}])


def documented_rights_are_the_charts():
    """The table in docs/install.md is what is bound elsewhere where rbac.create is false."""
    section = (ROOT / "docs/install.md").read_text().split("### The rights, one by one\n")[1].split("\n##")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    equal(rows[0], ["account", "where", "apiGroup", "resources", "names", "verbs"])
    words = lambda cell: cell.replace("`", "").replace(",", " ").split()
    documented = [(account, where, words(group)[0].replace("core", ""), words(resources), words(names), words(verbs))
                  for account, where, group, resources, names, verbs in rows[2:]]
    objects = render()
    have = [
        (account, where, group, rule["resources"], rule.get("resourceNames", []), rule["verbs"])
        for account in ("agent", "controller", "uninstall")
        for where, kind, name in [("cluster", "ClusterRole", f"{NAMESPACE}-meshlb-{account}"), ("namespace", "Role", f"meshlb-{account}")]
        for rule in objects[kind, name]["rules"]
        for group in rule["apiGroups"]
    ]
    assert all(set(rule) <= {"apiGroups", "resources", "resourceNames", "verbs"} for (kind, _), d in objects.items() if kind.endswith("Role") for rule in d["rules"])
    equal(documented, have)
    # Whom they are bound to is said, too.
    for account in ("agent", "controller", "uninstall"):
        assert f"`meshlb-{account}`" in section, account


def agents_pod():
    for flags, state in [((), "/var/lib/meshlb"), (EVERYTHING, "/srv/meshlb")]:
        objects = render(*flags)
        spec = pod(objects, "DaemonSet", "meshlb-agent")
        (container,) = spec["containers"]
        security = container["securityContext"]
        dns = [] if config(objects, "agent")["dns-listen"] == ["off"] else ["NET_BIND_SERVICE"]
        equal(security["capabilities"], {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"] + dns})
        assert not security["privileged"] and not security["allowPrivilegeEscalation"] and security["readOnlyRootFilesystem"]
        equal(spec["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
        assert spec["hostNetwork"] and not spec.get("hostPID") and not spec.get("hostIPC")
        equal({v["name"]: (v["hostPath"]["path"], v["hostPath"].get("type")) for v in spec["volumes"] if "hostPath" in v}, {
            "state": (state, "DirectoryOrCreate"),
            "run": ("/run/meshlb", "DirectoryOrCreate"),
            "xtables-lock": ("/run/xtables.lock", "FileOrCreate"),
            "sysctls": ("/proc/sys/net", "Directory"),
            "modules": ("/lib/modules", None),
        })
        mounts = {m["name"]: m for m in container["volumeMounts"]}
        equal(set(mounts) == {v["name"] for v in spec["volumes"]}, True)
        assert all(mounts[m].get("readOnly") for m in ("config", "modules"))
        # Every path that the program is told of is a mount.
        flags_ = config(objects, "agent")
        equal(mounts["state"]["mountPath"], flags_["state-dir"])
        equal(mounts["run"]["mountPath"], flags_["run-dir"])
        equal(mounts["sysctls"]["mountPath"], flags_["proc-sys"] + "/net")
        env = {e["name"]: e for e in container["env"]}
        equal(env["MESHLB_CONFIG"]["value"], mounts["config"]["mountPath"] + "/agent.yaml")
        equal(env["MESHLB_NODE"]["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName")
        equal(env["MESHLB_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"], "metadata.namespace")
        equal(container["args"], ["agent", "--source=kube"])
        equal(spec["priorityClassName"], "system-node-critical")
        assert container["resources"]["requests"]
        listen = flags_["metrics-listen"]
        host = None if listen.startswith("0.0.0.0") else listen.rsplit(":", 1)[0]
        for probe, path in [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")]:
            want = {"path": path, "port": "metrics"} | ({"host": host} if host else {})
            equal(container[probe]["httpGet"], want)
        equal(container["ports"][0]["containerPort"], int(listen.rsplit(":", 1)[1]))
    equal(pod(render(), "DaemonSet", "meshlb-agent")["tolerations"], [{"operator": "Exists"}])


def controllers_pod():
    for flags in [(), EVERYTHING]:
        objects = render(*flags)
        spec = pod(objects, "Deployment", "meshlb-controller")
        (container,) = spec["containers"]
        equal(container["securityContext"]["capabilities"], {"drop": ["ALL"]})
        assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
        assert not spec.get("hostNetwork") and not any("hostPath" in v for v in spec["volumes"])
        equal(container["args"], ["controller", "--namespace=$(POD_NAMESPACE)"])
        assert spec["affinity"]["podAntiAffinity"] and spec["topologySpreadConstraints"]
    assert ("PodDisruptionBudget", "meshlb-controller") not in render("--set", "controller.replicas=1")
    host = {e["name"]: e.get("value") for e in pod(render(*EVERYTHING), "Deployment", "meshlb-controller")["containers"][0]["env"]}
    equal((host["KUBERNETES_SERVICE_HOST"], host["KUBERNETES_SERVICE_PORT"]), ("api.example.com", "6443"))


def network_policy():
    """What the controllers may reach: the API server, and DNS where that has a name."""
    def egress(*flags):
        rules = render("--set", "networkPolicy.enabled=true", *flags)["NetworkPolicy", "meshlb-controller"]["spec"]["egress"]
        return [([(p["port"], p["protocol"]) for p in rule["ports"]], rule.get("to")) for rule in rules]

    ports, dns = [(443, "TCP"), (6443, "TCP")], ([(53, "UDP"), (53, "TCP")], None)
    equal(egress(), [(ports, None)])
    equal(egress("--set", "apiServer.host=192.0.2.1"), [(ports, None)])
    equal(egress("--set", "apiServer.host=fd00::1,apiServer.port=8443"), [([*ports, (8443, "TCP")], None)])
    equal(egress("--set", "apiServer.host=api.example.com,apiServer.port=8443,networkPolicy.apiServerCIDRs={192.0.2.0/24}"),
          [([*ports, (8443, "TCP")], [{"ipBlock": {"cidr": "192.0.2.0/24"}}]), dns])
    # Nothing is opened for a port that nobody uses.
    equal(egress("--set", "apiServer.port=8443"), [(ports, None)])


def uninstalls_job():
    for flags, account, seconds in [((), "meshlb-uninstall", 120), (EVERYTHING, "uninstaller", 300)]:
        objects = render(*flags)
        job = objects["Job", "meshlb-uninstall"]
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        equal(container["args"], ["uninstall", "--namespace=$(POD_NAMESPACE)", "--daemonset=meshlb-agent", f"--timeout={seconds}"])
        equal((spec["serviceAccountName"], spec["restartPolicy"], job["spec"]["backoffLimit"]), (account, "Never", 0))
        # It names nodes before it is ended.
        assert job["spec"]["activeDeadlineSeconds"] > seconds
        equal(container["securityContext"]["capabilities"], {"drop": ["ALL"]})
        assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
        assert ("DaemonSet", "meshlb-agent") in objects
        if os.environ.get("MESHLB_BIN"):
            run(os.environ["MESHLB_BIN"], *container["args"], "--help")
    assert "meshlb-uninstall" not in template("-s", "templates/controller/rbac.yaml").stdout


def configuration_is_flags():
    known = set()
    for file, struct in [("options", "Options"), ("dns", "DnsOptions")]:
        text = (ROOT / f"src/cli/{file}.rs").read_text().split(f"pub struct {struct} {{")[1].split("\n}")[0]
        known |= {name.replace("_", "-") for name in re.findall(r"^    pub (\w+):", text, re.M)}
    for flags in [(), ("--set-json", "config.publish-reserved=[]"), *(("-f", str(v)) for v in VALUES)]:
        objects = render(*flags)
        name = next(name for kind, name in objects if kind == "ConfigMap")
        for role in ("agent", "controller"):
            text = objects["ConfigMap", name]["data"][f"{role}.yaml"]
            unknown = set(load(text)[0]) - known
            assert not unknown, f"no flags: {unknown}"
            if os.environ.get("MESHLB_BIN"):
                with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                    file.write(text)
                    file.flush()
                    # `crd` needs nothing, and every command looks at all flags first.
                    run(os.environ["MESHLB_BIN"], "--config", file.name, "--node", "n1", "crd")
    equal(config(render(), "agent")["metrics-listen"], "0.0.0.0:9477")
    six = render("-f", "tests/chart/values/ipv6.yaml")
    equal(config(six, "agent")["metrics-listen"], "[::]:9477")
    assert "publish-addresses" not in config(six, "agent")
    # To programs, too, an empty list is here `none`, and not their default.
    equal(config(render("--set-json", "config.publish-reserved=[]"), "agent")["publish-reserved"], [])


def defaults_are_the_programs():
    """But for those that a comment in values.yaml gives a reason for."""
    options = "".join((ROOT / f"src/cli/{file}.rs").read_text() for file in ("options", "dns"))
    values = load((ROOT / CHART / "values.yaml").read_text())[0]["config"]
    for flag, value in values.items():
        variable = "MESHLB_" + flag.upper().replace("-", "_")
        attribute = re.search(rf'env = "{variable}".*?\n    pub ', options, re.S)[0]
        default = re.search(r'default_value = "(.*?)"', attribute)
        have = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if flag == "vip-cidr":
            assert default[1].startswith(have + ","), default[1]
        else:
            equal(have, default[1] if default else "")


def null_is_as_if_not_given():
    """Helm takes a default away where a value is null. A group of values is then as it is by default, and of a single one nothing is left at most."""
    values = load((ROOT / CHART / "values.yaml").read_text())[0]

    def paths(map_, path=()):
        for key, value in map_.items():
            yield (*path, key), value
            if isinstance(value, dict):
                yield from paths(value, (*path, key))

    def leaves(value, path):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from leaves(inner, (*path, key))
        elif path[0] == "ConfigMap" and path[2:3] == ("data",) and len(path) == 4:
            yield from leaves(load(value)[0], path)
        elif path[-1] != "checksum/config":
            yield path, json.dumps(value)

    def everything(*flags):
        return {key: leaf for (kind, name), d in render(*on, *flags).items() for key, leaf in leaves(d, (kind, name))}

    with tempfile.TemporaryDirectory() as dir_:
        file = pathlib.Path(dir_) / "on.yaml"
        file.write_text(json.dumps({group: {"enabled": True} for group in ("podMonitor", "prometheusRule", "networkPolicy")}))
        on = ("-f", str(file))
        before = everything()
        # These are Kubernetes' and Prometheus', which know what it means that there are none.
        nothing = {"tolerations", "priorityClassName", "interval", "resources", "requests", "limits", "cpu", "memory"}
        for path, value in paths(values):
            after = everything("--set", ".".join(path) + "=null")
            gone = {key: leaf for key, leaf in before.items() if after.get(key) != leaf}
            more = {key: leaf for key, leaf in after.items() if key not in before or key in gone}
            what = f"{'.'.join(path)}=null: less {gone}, more {more}"
            # Where one of several is gone, what is left of its map may be {}.
            assert not {key: leaf for key, leaf in more.items() if leaf not in ("{}", "null")}, what
            if path[0] == "config":
                assert all(key[0] == "ConfigMap" for key in gone), what
                assert path == ("config",) or {key[-1] for key in gone} <= {path[-1]}, what
            elif path in {("podMonitor",), ("prometheusRule",), ("networkPolicy",)} or path[-1] == "enabled" and path[0] in ("podMonitor", "prometheusRule", "networkPolicy"):
                assert gone and {key[0].lower() for key in gone} == {path[0].lower()}, what
            elif value and path[-1] in nothing:
                assert gone, what
            else:
                assert not gone, what
    # Some keys of a map that others gave.
    for role, kind in [("agent", "DaemonSet"), ("controller", "Deployment")]:
        no = [f"{role}.nodeSelector.kubernetes\\.io/os", f"{role}.nodeSelector.a", f"{role}.podLabels.a", f"{role}.podAnnotations.a", f"{role}.serviceAccount.annotations.a"]
        for key in no:
            objects = render("--set-string", f"{role}.nodeSelector.b=c", "--set", f"{key}=null")
            spec = objects[kind, f"meshlb-{role}"]["spec"]["template"]
            assert spec["spec"]["nodeSelector"] == {"b": "c"} | ({} if key == no[0] else {"kubernetes.io/os": "linux"}), key
            assert "a" not in spec["metadata"]["labels"] and "a" not in spec["metadata"]["annotations"], key
            assert "a" not in (objects["ServiceAccount", f"meshlb-{role}"]["metadata"].get("annotations") or {}), key
    # All at once, under names that are numbers, and as a part of another chart.
    no_values = ("--set", ",".join(f"{key}=null" for key in values))
    named = lambda text: sorted([d["kind"], d["metadata"]["name"]] for d in load(text))
    for release, namespace in [("meshlb", NAMESPACE), ("123", "456")]:
        equal(*(named(template("-n", namespace, *flags, release=release).stdout) for flags in (no_values, ())))
    with tempfile.TemporaryDirectory() as dir_:
        parent = pathlib.Path(dir_)
        (parent / "Chart.yaml").write_text("apiVersion: v2\nname: parent\nversion: 0.1.0\n")
        shutil.copytree(ROOT / CHART, parent / "charts/meshlb")
        (parent / "values.yaml").write_text(json.dumps({"meshlb": {"config": {"dns-listen": None, "vip-cidr": None}, "agent": None}}))
        for flags in [(), ("--set", "meshlb.config.resync=null,meshlb.controller.health=null")]:
            equal(named(template(*flags, chart=parent).stdout), named(template().stdout))


def defaults_in_templates_are_those_of_values():
    """What templates take where a value is null. Only what is empty or the programs' own anyway is left out there."""
    values = load((ROOT / CHART / "values.yaml").read_text())[0]
    text = (ROOT / CHART / "templates/_values.tpl").read_text()
    (have,) = load(re.search(r'define "meshlb.defaults" -}}\n(.*?){{- end }}', text, re.S)[1])

    def without(map_):
        out = {key: without(value) if isinstance(value, dict) else value for key, value in map_.items()}
        return {key: value for key, value in out.items() if value not in ("", [], {})}

    values["config"] = {key: value for key, value in values["config"].items() if key in have["config"]}
    equal(have, without(values))


def changed_configuration_restarts_pods():
    sum_ = lambda kind, *flags: next(d for (k, _), d in render(*flags).items() if k == kind)["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
    for kind in ("DaemonSet", "Deployment"):
        assert sum_(kind) == sum_(kind, "--set", "podMonitor.enabled=true")
        assert sum_(kind) != sum_(kind, "--set", "config.log-level=debug")
    # The agents' own settings are no reason to restart controllers.
    assert sum_("Deployment") == sum_("Deployment", "--set", "agent.metrics.port=9999")


def wrong_values_are_refused():
    for flag, word in [
        ("agnet.metrics.port=1", "agnet"),
        ("config.vip-cird={10.0.0.0/8}", "vip-cird"),
        ("config.vip-cidr=10.0.0.0/8", "vip-cidr"),
        ("config.vip-cidr={10.0.0.0}", "vip-cidr"),
        ("config.vip-cidr={10.0.0.0/8,10.1.0.0/16,fd00::/112}", "vip-cidr"),
        ("config.vip-cidr={10.0.0.0/16,10.1.0.0/16}", "of one family"),
        ("config.vip-cidr={fd00::/112,fd01::/112}", "of one family"),
        ("config.renderer=ipvs", "renderer"),
        ("config.mark-mask=0xzz", "mark-mask"),
        ("config.publish-range=30000", "publish-range"),
        ("config.publish-reserved={ssh}", "publish-reserved"),
        ("config.ipvs-timeouts=1h", "ipvs-timeouts"),
        ("config.resync=0", "resync"),
        ("config.log-format=xml", "log-format"),
        ("config.metrics-listen=:1", "metrics-listen"),
        ("agent.metrics.port=70000", "port"),
        ("agent.metrics.address=eth0", "address"),
        ("agent.maxUnavailable=0", "maxUnavailable"),
        ("agent.stateDir=var", "stateDir"),
        ("controller.replicas=0", "replicas"),
        ("controller.health.address=127.0.0.1", "address"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=latest", "digest"),
        ("podMonitor.interval=often", "interval"),
        ("networkPolicy.apiServerCIDRs={10.0.0.1}", "apiServerCIDRs"),
        ("uninstall.timeoutSeconds=0", "timeoutSeconds"),
        ("crds.install=maybe", "install"),
    ]:
        done = template("--set", flag, ok=False)
        assert done.returncode != 0 and word in done.stderr, f"{flag}: {done.stderr or 'accepted'}"


def ranges_are_refused_as_by_the_programs():
    """In one line that names value and range, before anything is installed that could not start."""
    binary = os.environ.get("MESHLB_BIN")

    def program_refuses(flag, value):
        # In an empty folder nothing is asked of a kernel.
        with tempfile.TemporaryDirectory() as dir_:
            where = [f"--state-dir={dir_}/state", f"--run-dir={dir_}/run", "--node=n1", f"--{flag}={value}"]
            done = run(binary, *where, "lock", dir_, ok=False)
        assert done.returncode in (0, 1, 2), done
        return done.returncode != 0

    good, bad = False, True
    for flag, value, refused in [
        ("vip-cidr", "10.0.0.0/29", good), ("vip-cidr", "10.0.0.5/29", good), ("vip-cidr", "10.0.0.0/30", bad), ("vip-cidr", "10.0.0.0/32", bad),
        ("vip-cidr", "10.0.0.0/33", bad), ("vip-cidr", "10.0.0.0/0", bad), ("vip-cidr", "10.0.0/16", bad), ("vip-cidr", "10.0.0.256/16", bad),
        ("vip-cidr", "0.1.0.0/16", bad), ("vip-cidr", "1.2.3.4/1", bad), ("vip-cidr", "127.3.0.0/16", bad), ("vip-cidr", "127.0.0.0/7", good),
        ("vip-cidr", "169.254.7.0/24", bad), ("vip-cidr", "169.0.0.0/8", good), ("vip-cidr", "223.0.0.0/8", good), ("vip-cidr", "224.0.0.0/8", bad),
        ("vip-cidr", "239.1.0.0/16", bad), ("vip-cidr", "240.0.0.0/8", good),
        ("vip-cidr", "fd00::/126", good), ("vip-cidr", "fd00::/127", bad), ("vip-cidr", "fd00::/128", bad), ("vip-cidr", "fd00::/129", bad),
        ("vip-cidr", "fd00::/0", bad), ("vip-cidr", "::/64", bad), ("vip-cidr", "::1/112", bad), ("vip-cidr", "ff05::/112", bad), ("vip-cidr", "FF00::/8", bad),
        ("vip-cidr", "fe80::/64", bad), ("vip-cidr", "febf::/16", bad), ("vip-cidr", "fec0::/10", good), ("vip-cidr", "::ffff:10.0.0.0/104", bad),
        ("publish-range", "30000-32767", good), ("publish-range", "5-5", good), ("publish-range", "1-65535", good), ("publish-range", "00030-0040", good),
        ("publish-range", "32767-30000", bad), ("publish-range", "0-1", bad), ("publish-range", "1-65536", bad),
        ("publish-reserved", "22", good), ("publish-reserved", "22/tcp", good), ("publish-reserved", "8-9/udp", good),
        ("publish-reserved", "0/tcp", bad), ("publish-reserved", "70000", bad), ("publish-reserved", "9-8/udp", bad),
    ]:
        one = "publish-range" == flag
        done = template("--set-string", f"config.{flag}=" + (value if one else f"{{{value}}}"), ok=False)
        assert (done.returncode != 0) == refused, f"{flag}={value}: {done.stderr or 'accepted'}"
        if refused:
            lines = [line for line in done.stderr.splitlines() if line and not line.startswith("Use --debug")]
            assert len(lines) == 1 and f"config.{flag}: {value} " in lines[0], done.stderr
        if binary:
            equal([flag, value, program_refuses(flag, value)], [flag, value, refused])
    # The minimum is the one that docs/cli.md tells.
    said = " ".join((ROOT / "docs/cli.md").read_text().split())
    assert "an IPv4 range is a /29 at least and an IPv6 range a /126" in said


def values_are_documented_and_in_the_schema():
    schema = json.loads((ROOT / CHART / "values.schema.json").read_text())
    values = load((ROOT / CHART / "values.yaml").read_text())[0]

    def compare(have, known, path):
        extra = set(known.get("properties", {})) - set(have) - {"global"}
        assert not extra, f"in the schema only: {path} {extra}"
        for key, value in have.items():
            assert key in known["properties"], f"not in the schema: {path}.{key}"
            if isinstance(value, dict) and known["properties"][key].get("properties"):
                compare(value, known["properties"][key], f"{path}.{key}")

    compare(values, schema, "")
    lines = (ROOT / CHART / "values.yaml").read_text().splitlines()
    top_only = {"image", "crds", "rbac", "admissionPolicy", "metrics", "health", "apiServer", "services", "podMonitor", "prometheusRule", "networkPolicy", "uninstall",
                "serviceAccount", "podDisruptionBudget", "podLabels"}
    inside = None
    for before, line in zip(lines, lines[1:]):
        key = re.match(r"( *)([\w-]+):", line)
        if not key:
            continue
        indent = len(key[1])
        # What is inside resources is Kubernetes', not ours.
        if inside is not None and indent > inside:
            continue
        inside = indent if key[2] == "resources" else None
        assert key[2] in top_only or before.strip().startswith("#"), f"no comment: {line}"


def alerts():
    rules = render(*EVERYTHING)["PrometheusRule", "meshlb"]["spec"]
    documented = (ROOT / "docs/metrics.md").read_text()
    for rule in rules["groups"][0]["rules"]:
        for name in re.findall(r"meshlb_\w+", re.sub(r'job="[^"]*"', "", rule["expr"])):
            assert name.removesuffix("_bucket") in documented, f"no such series: {name}"
        assert rule["labels"]["team"] == "network" and set(rule["annotations"]) == {"summary", "description"}
        jobs = set(re.findall(r'job="([^"]*)"', rule["expr"]))
        assert jobs in ({f"{NAMESPACE}/meshlb"}, {f"{NAMESPACE}/meshlb-controller"}), rule["expr"]
    # Between two scrapes a good turn is as old as they are apart, however short the resync is.
    for resync, stale in [(1, 180), (1.5, 180), (60, 180), (300, 900)]:
        rules_ = render("--set", "prometheusRule.enabled=true", "--set-json", f"config.resync={resync}")["PrometheusRule", "meshlb"]["spec"]["groups"][0]["rules"]
        (rule,) = (rule for rule in rules_ if rule["alert"] == "MeshlbNoTurn")
        assert rule["expr"].endswith(f" > {stale}") and f"more than {stale} s ago; there is one each {resync} s" in rule["annotations"]["description"], rule
    assert os.environ["PROMTOOL"], "no promtool: tests/vm/setup.sh unpacks it"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(rules, file)
        file.flush()
        run(os.environ["PROMTOOL"], "check", "rules", file.name)


def each_alert_fires_and_does_not():
    """With series as programs give them: tests/chart/alerts has a file for each alert, of when it fires, with which text, and when it does not."""
    rules = render("--set", "prometheusRule.enabled=true")["PrometheusRule", "meshlb"]["spec"]
    files = sorted((ROOT / "tests/chart/alerts").glob("*.yaml"))
    equal([file.stem for file in files], sorted(rule["alert"] for rule in rules["groups"][0]["rules"]))
    with tempfile.TemporaryDirectory() as dir_:
        (pathlib.Path(dir_) / "rules.yaml").write_text(json.dumps(rules))
        for file in files:
            shutil.copy(file, dir_)
            (said,) = load(file.read_text())
            asked = [check for test in said["tests"] for check in test["alert_rule_test"]]
            equal({check["alertname"] for check in asked} == {file.stem}, True)
            assert any(check.get("exp_alerts") for check in asked), f"{file.name}: it never fires"
            # Each way of not firing is a test of its own; that it takes its time is not enough.
            assert any(not any(check.get("exp_alerts") for check in test["alert_rule_test"]) for test in said["tests"]), f"{file.name}: it always fires"
        run(os.environ["PROMTOOL"], "test", "rules", *(f"{dir_}/{file.name}" for file in files))


def alerts_are_documented():
    """The table in docs/metrics.md."""
    rows = re.findall(r"^\| `(Meshlb\w+)` \|.*\| (\w+) \| (\w+) \|$", (ROOT / "docs/metrics.md").read_text(), re.M)
    rules = render("--set", "prometheusRule.enabled=true")["PrometheusRule", "meshlb"]["spec"]["groups"][0]["rules"]
    equal([list(row) for row in rows], [[rule["alert"], rule["for"], rule["labels"]["severity"]] for rule in rules])


def notes_are_right():
    # Helm shows them only after it has asked a cluster for its version: here they are a template like others.
    with tempfile.TemporaryDirectory() as dir_:
        chart = pathlib.Path(dir_) / "meshlb"
        shutil.copytree(ROOT / CHART, chart)
        (chart / "templates/NOTES.txt").rename(chart / "files/NOTES.txt")
        (chart / "templates/notes.yaml").write_text('kind: Notes\ntext: {{ tpl (.Files.Get "files/NOTES.txt") . | toJson }}\n')
        def of(*flags):
            (text,) = (d["text"] for d in load(template(*flags, chart=chart).stdout) if d["kind"] == "Notes")
            return text
        notes = of()
        two = of("--set", "config.vip-cidr={10.96.4.0/22,fd00:200::/112},config.zone=mesh.example")
        elsewhere = of("--set", "config.dns-listen={192.0.2.1:5300}")
        off = of("--set", "config.dns-listen={off}")
        equal(of("--set", "config.vip-cidr=null,config.dns-listen=null,config.zone=null,crds=null,rbac=null"), notes)
        equal(of("--set", "config=null"), notes)
        # By its default name no registry has the image.
        pulled = of("--set", "image.repository=registry.example.com/meshlb")
        assert "meshlb:0.1.0" in notes and "ImagePullBackOff" in notes and "ImagePullBackOff" not in pulled, notes + pulled
        # By which address of it a range is given says nothing of where its names are answered.
        at_of = {"10.200.0.1/16": "10.200.0.2", "10.200.7.0/16": "10.200.0.2", "10.255.255.255/9": "10.128.0.2", "192.168.1.130/25": "192.168.1.130",
                 "FD00:0200::/112": "FD00:0200::2", "fd00:200::1/112": "DNS-ADDRESS", "fd00:200:0:1::/48": "DNS-ADDRESS",
                 "fd00:200:0:0:0:0:0:0/112": "DNS-ADDRESS", "fd00:1:2:3:4:5:6::/112": "DNS-ADDRESS"}
        ranges = {range_: of("--set", f"config.vip-cidr={{{range_}}}") for range_ in at_of}
    objects = render()
    for kind, name in re.findall(r"(daemonset)/(\S+)", notes):
        assert ("DaemonSet", name) in objects, name
    for file in re.findall(r"deploy/\S+", notes):
        assert (ROOT / file).exists(), file
    assert "10.200.0.0/16" in notes and NAMESPACE in notes
    # CoreDNS joins in by what is to be copied.
    for text, zone, at in [(notes, "mesh.internal", "10.200.0.2"), (two, "mesh.example", "10.96.4.2"), (elsewhere, "mesh.internal", "192.0.2.1:5300")]:
        block = re.search(r"^  (\S+):53 \{\n((?:      .*\n)+)  \}$", text, re.M)
        assert block and block[1] == zone and f"forward . {at}\n" in block[2], text
    for range_, text in ranges.items():
        assert f"forward . {at_of[range_]}\n" in text, (range_, text)
        assert ("DNS-ADDRESS stands for" in text) == (at_of[range_] == "DNS-ADDRESS"), text
    assert "10.96.4.2, fd00:200::2" in two and "Corefile" not in off, two + off


def helm_test_asks_both():
    """The script of the test's pod, against servers that say what it is to hear."""
    ready, asked = set(), []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            port = self.server.server_address[1]
            asked.append((port, self.path))
            self.send_response(200 if port in ready else 503)
            self.end_headers()
            self.wfile.write(b"[-] kernel: not as it should be\n")

        def log_message(self, *_):
            pass

    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = [s.server_address[1] for s in servers]
    objects = render("--set", f"agent.metrics.port={ports[0]},controller.health.port={ports[1]}")
    (container,) = objects["Pod", "meshlb-test-ready"]["spec"]["containers"]
    equal(container["command"], ["bash", "-c"])
    env = {e["name"]: e.get("value") for e in container["env"]}
    equal(env["CONTROLLERS"], "$(MESHLB_CONTROLLER_HEALTH_SERVICE_HOST)")
    script = container["args"][0]
    here = {"HOST_IP": "127.0.0.1", "CONTROLLERS": "127.0.0.1"}
    ready.update(ports)
    out = run("bash", "-c", script, env=here)
    assert "agent at 127.0.0.1 is ready" in out.stdout and "controller at 127.0.0.1 is ready" in out.stdout, out.stdout
    equal(sorted(asked), sorted((port, "/readyz") for port in ports))
    # It does not wait two minutes here.
    ready.remove(ports[0])
    out = run("bash", "-c", script.replace("-gt 120", "-gt 3"), env=here, ok=False)
    assert out.returncode == 1 and "agent at 127.0.0.1 is not ready" in out.stdout and "[-] kernel" in out.stdout, out.stdout
    assert "not asked" in render(*EVERYTHING)["Pod", "meshlb-test-ready"]["spec"]["containers"][0]["args"][0]
    for server in servers:
        server.shutdown()


def examples_are_valid():
    for file in sorted((ROOT / "deploy/examples").glob("*.yaml")):
        assert load(file.read_text()), file
        if os.environ.get("MESHLB_BIN"):
            run(os.environ["MESHLB_BIN"], "check", str(file))


# On a control plane.


def kubectl(*args, ok=True, stdin=None):
    return run(KUBECTL, *args, ok=ok, stdin=stdin)


def get(*args):
    return json.loads(kubectl("get", *args, "-o", "json").stdout)


def ours():
    """Every object of any kind that has our name, is in our namespace or is a node's report (which has the node's name), as KIND NAME. Kubernetes' own are left out, and Events, which end by themselves."""
    kinds = [k for k in kubectl("api-resources", "--verbs=list", "-o", "name").stdout.split() if k.partition(".")[0] != "events"]
    columns = "custom-columns=K:.kind,NS:.metadata.namespace,N:.metadata.name"
    rows = [row.split() for row in kubectl("get", ",".join(kinds), "-A", "--no-headers", "-o", columns).stdout.splitlines()]
    own = {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}
    return {f"{kind} {name}" for kind, namespace, name in rows if (namespace == NAMESPACE or "meshlb" in name or kind == "MeshNode") and (kind, name) not in own}


# What docs/install.md says that stays, and what an API server makes for a CRD. (No controller runs here that would take the Lease.)
STAYS = {"CustomResourceDefinition meshservices.meshlb.dev", "CustomResourceDefinition meshnodes.meshlb.dev", "APIService v1alpha1.meshlb.dev",
         f"Namespace {NAMESPACE}"}


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            if result := what():
                return result
        except (AssertionError, LookupError):
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


NODE = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "chart-node", "labels": {"kubernetes.io/os": "linux", "kubernetes.io/hostname": "chart-node"}}}


def server_install_upgrade_uninstall():
    kubectl("apply", "-f", "-", stdin=json.dumps(NODE))
    room = {"status": {"capacity": {"cpu": "4", "memory": "8Gi", "pods": "110"}, "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
                       "conditions": [{"type": "Ready", "status": "True", "reason": "x", "message": "", "lastHeartbeatTime": None, "lastTransitionTime": None}]}}
    kubectl("patch", "node", "chart-node", "--subresource=status", "--type=merge", "-p", json.dumps(room))
    # An earlier CRD of the chart: the upgrade must reach it.
    run(HELM, "install", "meshlb", CHART, "-n", NAMESPACE, "--create-namespace")
    crd = "meshservices.meshlb.dev"
    kubectl("patch", "crd", crd, "--type=json", "-p", '[{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns/0"}]')
    kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=privileged")
    # The API server admits the pods, the scheduler places them: nothing runs them here.
    def placed(component, count):
        pods = get("pods", "-n", NAMESPACE, "-l", f"app.kubernetes.io/component={component}")["items"]
        return len(pods) == count and all(p["spec"].get("nodeName") == "chart-node" for p in pods) and pods
    agent = until(lambda: placed("agent", 1))[0]
    controller = until(lambda: placed("controller", 2))[0]
    assert agent["spec"]["priority"] > controller["spec"]["priority"] > 1_000_000_000
    # Pod Security has nothing against the controllers.
    said = kubectl("label", "--dry-run=server", "--overwrite", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted").stderr
    assert "meshlb-agent" in said and "meshlb-controller" not in said, said

    run(HELM, "upgrade", "meshlb", CHART, "-n", NAMESPACE, "--set", "networkPolicy.enabled=true,config.log-level=debug")
    columns = get("crd", crd)["spec"]["versions"][0]["additionalPrinterColumns"]
    equal(columns[0]["name"], "Mode")
    rights_on_the_server()
    agents_write_their_own_mesh_node(agent)

    kubectl("apply", "-f", "-", stdin='{"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService", "metadata": {"name": "stays", "namespace": "default"}, "spec": {"ports": [{"port": 80}]}}')
    if os.environ.get("MESHLB_BIN"):
        uninstall_by_its_job(agent)
    else:
        run(HELM, "uninstall", "meshlb", "-n", NAMESPACE, "--no-hooks")
    kubectl("get", "meshservice", "stays")
    # Replica sets go with a moment's delay, pods with a kubelet's help: not here.
    def nothing_else():
        left = {object_ for object_ in ours() if not object_.startswith("Pod ")} - STAYS
        assert not left, left
        return True
    until(nothing_else)
    assert STAYS <= ours(), ours()
    # And once more, with the CRD that stayed.
    run(HELM, "install", "meshlb", CHART, "-n", NAMESPACE)
    run(HELM, "uninstall", "meshlb", "-n", NAMESPACE, "--no-hooks")
    kubectl("delete", "meshservice", "stays")
    kubectl("delete", "node", "chart-node")
    kubectl("delete", "pods", "-n", NAMESPACE, "--all", "--force", "--grace-period=0")


def token_of(account, pod=None):
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod['metadata']['name']}", f"--bound-object-uid={pod['metadata']['uid']}"] if pod else []
    return kubectl("create", "token", f"meshlb-{account}", "-n", NAMESPACE, *bound).stdout.strip()


MESH_NODE = {"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshNode"}


def agents_write_their_own_mesh_node(agent):
    own, unbound = token_of("agent", agent), token_of("agent")

    def write(token, name, *more, ok=True):
        text = json.dumps(MESH_NODE | {"metadata": {"name": name}})
        return kubectl("--token", token, "apply", "--server-side", "--field-manager=meshlb-agent", *more, "-f", "-", stdin=text, ok=ok)

    cluster = json.loads(kubectl("config", "view", "--raw", "-o", "json").stdout)["clusters"][0]["cluster"]
    ca = ssl.create_default_context(cafile=cluster["certificate-authority"])

    # As an agent does it; `apply` of kubectl 1.31 knows no subresources.
    def say(token, name, version):
        """What the API server says against it."""
        body = json.dumps(MESH_NODE | {"metadata": {"name": name}, "status": {"version": version}}).encode()
        url = f"{cluster['server']}/apis/meshlb.dev/v1alpha1/meshnodes/{name}/status?fieldManager=meshlb-agent"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/apply-patch+yaml"}
        try:
            urllib.request.urlopen(urllib.request.Request(url, body, headers, method="PATCH"), context=ca, timeout=30).close()
            return None
        except urllib.error.HTTPError as e:
            return json.load(e)["message"]

    # Policies take a moment to be in force.
    until(lambda: "only" in write(own, "other", "--dry-run=server", ok=False).stderr)
    write(own, "chart-node")
    assert say(own, "chart-node", "1") is None
    for token, why in [(own, "for node chart-node, and not for other"), (unbound, "not bound to a node, and not for other")]:
        said = write(token, "other", ok=False)
        assert said.returncode != 0 and "an agent writes the MeshNode of its own node only" in said.stderr and why in said.stderr, said
    # The policy is about agents: an administrator may.
    kubectl("apply", "-f", "-", stdin=json.dumps(MESH_NODE | {"metadata": {"name": "other"}}))
    said = say(own, "other", "2")
    assert "an agent writes the MeshNode of its own node only" in said, said
    said = say(unbound, "chart-node", "2")
    assert "not bound to a node" in said, said
    kubectl("delete", "meshnode", "other")


def as_account(account, dir_):
    access = load(pathlib.Path(os.environ["KUBECONFIG"]).read_text())[0]
    access["users"][0]["user"] = {"token": token_of(account)}
    (dir_ / "kubeconfig").write_text(json.dumps(access))
    return str(dir_ / "kubeconfig")


def uninstall_by_its_job(agent):
    """`helm uninstall` as an operator runs it; what no kubelet runs here is run by us, as the account that the Job has."""
    helm = subprocess.Popen([HELM, "uninstall", "meshlb", "-n", NAMESPACE, "--timeout", "180s"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        (pod_,) = until(lambda: get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=uninstall")["items"])
        with tempfile.TemporaryDirectory() as dir_:
            args = [a.replace("$(POD_NAMESPACE)", NAMESPACE) for a in pod_["spec"]["containers"][0]["args"]]
            flags = ["--kubeconfig", as_account("uninstall", pathlib.Path(dir_))]
            # Nothing runs the agent here, so it has not.
            said = run(os.environ["MESHLB_BIN"], *[a for a in args if "timeout" not in a], "--timeout=3", *flags, ok=False)
            assert said.returncode == 1 and "node chart-node is not cleaned up after 3 s" in said.stderr, said
            owner = get("configmap", "meshlb-uninstall", "-n", NAMESPACE)["metadata"]["ownerReferences"][0]
            equal((owner["kind"], owner["name"]), ("DaemonSet", "meshlb-agent"))
            assert helm.poll() is None, "helm did not wait for its Job"
            # It asks anew, and the agent has to answer that.
            uid = lambda: get("configmap", "meshlb-uninstall", "-n", NAMESPACE)["metadata"]["uid"]
            before = uid()
            again = subprocess.Popen([os.environ["MESHLB_BIN"], *args, *flags], stdout=subprocess.PIPE, text=True)
            until(lambda: "meshlb-uninstall" in kubectl("get", "configmap", "-n", NAMESPACE, "-o", "name").stdout and uid() != before)
            done = {"type": "CleanedUp", "status": "True", "reason": "CleanedUp", "message": uid(), "lastTransitionTime": "2026-01-01T00:00:00Z"}
            kubectl("patch", "meshnode", "chart-node", "--subresource=status", "--type=merge", "-p", json.dumps({"status": {"conditions": [done]}}))
            said = again.communicate(timeout=180)[0]
            assert again.returncode == 0 and "1 nodes are clean" in said, said
        kubectl("patch", "pod", pod_["metadata"]["name"], "-n", NAMESPACE, "--subresource=status", "--type=merge", "-p", '{"status": {"phase": "Succeeded"}}')
        assert helm.wait(120) == 0, helm.stdout.read()
    finally:
        helm.kill()
    # Its rights are those that it needed.
    asked = {(group, resource, verb) for group, resource, verb, _ in asked_for("meshlb-uninstall")}
    objects = render()
    rules = [r for kind, name in [("ClusterRole", f"{NAMESPACE}-meshlb-uninstall"), ("Role", "meshlb-uninstall")] for r in objects[kind, name]["rules"]]
    equal(sorted(asked), sorted({(r["apiGroups"][0], r["resources"][0], verb) for r in rules for verb in r["verbs"]}))
    # The request goes with the DaemonSet that it belongs to.
    until(lambda: kubectl("get", "configmap", "meshlb-uninstall", "-n", NAMESPACE, ok=False).returncode != 0)


def rights_on_the_server():
    def may(account, verb, resource, *more):
        return kubectl("auth", "can-i", verb, resource, "--as", f"system:serviceaccount:{NAMESPACE}:meshlb-{account}", *more, ok=False).stdout.strip() == "yes"

    own, other = ("-n", NAMESPACE), ("-n", "default")
    for account, verb, resource, more, want in [
        ("agent", "watch", "meshservices.meshlb.dev", ("-A",), True),
        ("agent", "list", "endpointslices.discovery.k8s.io", ("-A",), True),
        ("agent", "list", "nodes", (), True),
        ("agent", "get", "secrets", own, False),
        ("agent", "patch", "meshservices.meshlb.dev/status", other, False),
        ("agent", "update", "nodes", (), False),
        ("agent", "patch", "meshnodes.meshlb.dev/status", (), True),
        ("agent", "delete", "meshnodes.meshlb.dev", (), False),
        ("agent", "watch", "configmaps/meshlb-uninstall", own, True),
        ("agent", "watch", "configmaps/meshlb", own, False),
        ("agent", "create", "configmaps", own, False),
        ("controller", "watch", "meshnodes.meshlb.dev", (), True),
        ("controller", "patch", "meshnodes.meshlb.dev/status", (), False),
        ("agent", "create", "events.events.k8s.io", other, False),
        ("controller", "watch", "services", ("-A",), True),
        ("controller", "create", "services", other, True),
        ("controller", "patch", "meshservices.meshlb.dev/status", other, True),
        ("controller", "update", "meshservices.meshlb.dev", other, False),
        ("controller", "update", "leases.coordination.k8s.io/meshlb-controller", own, True),
        ("controller", "update", "leases.coordination.k8s.io/other", own, False),
        ("controller", "update", "configmaps/meshlb-pool-tcp", own, True),
        ("controller", "update", "configmaps/meshlb", own, False),
        ("controller", "create", "configmaps", own, True),
        ("controller", "create", "configmaps", other, False),
        ("controller", "get", "secrets", own, False),
        ("controller", "create", "events.events.k8s.io", other, True),
        ("controller", "list", "pods", ("-A",), False),
    ]:
        # can-i reads TYPE/NAME as a name, and a subresource by its own flag.
        if "/status" in resource:
            resource, more = resource.removesuffix("/status"), (*more, "--subresource=status")
        assert may(account, verb, resource, *more) == want, f"{account}: {verb} {resource} {more}: not {want}"


def asked_for(account):
    """(group, resource, verb, name) of every request that the account made."""
    out = set()
    for line in pathlib.Path(os.environ["AUDIT_LOG"]).read_text().splitlines():
        entry = json.loads(line)
        if entry["user"]["username"] == f"system:serviceaccount:{NAMESPACE}:{account}" and (ref := entry.get("objectRef")):
            resource = "/".join(filter(None, (ref["resource"], ref.get("subresource"))))
            out.add((ref.get("apiGroup", ""), resource, entry["verb"], ref.get("name", "")))
    return out


def server_controller_uses_its_rights_and_no_others():
    """The real program, with the account's own token."""
    binary = os.environ.get("MESHLB_BIN")
    if not binary or run(binary, "controller", "--help", ok=False).returncode:
        raise Skipped("no MESHLB_BIN that has a controller")
    run(HELM, "install", "meshlb", CHART, "-n", NAMESPACE, "--create-namespace", "--set", "config.vip-cidr={10.200.0.0/16,fd00:200::/112}")
    token = kubectl("create", "token", "meshlb-controller", "-n", NAMESPACE).stdout.strip()
    access = load(pathlib.Path(os.environ["KUBECONFIG"]).read_text())[0]
    access["users"][0]["user"] = {"token": token}
    settings = load(get("configmap", "meshlb", "-n", NAMESPACE)["data"]["controller.yaml"])[0]
    # debug: an Event that may not be written is no more than that.
    settings |= {"metrics-listen": "off", "log-level": "debug"}
    temporary = tempfile.TemporaryDirectory()
    dir_ = pathlib.Path(temporary.name)
    (dir_ / "kubeconfig").write_text(json.dumps(access))
    (dir_ / "config.yaml").write_text(json.dumps(settings))
    log = open(dir_ / "log", "w+")
    flags = ["--namespace", NAMESPACE, "--kubeconfig", dir_ / "kubeconfig", "--config", dir_ / "config.yaml"]

    def start():
        return subprocess.Popen([ROOT / binary, "controller", *flags], stdout=log, stderr=log)

    def end():
        program.terminate()
        code = program.wait(20)
        assert code == 0, f"exit {code}: {(dir_ / 'log').read_text()}"
        assert not get("lease", "meshlb-controller", "-n", NAMESPACE)["spec"].get("holderIdentity"), "the Lease was not given back"

    def refused():
        return [line for line in (dir_ / "log").read_text().splitlines() if "forbidden" in line]

    def seen(what):
        until(lambda: refused() or what())
        assert not refused(), refused()

    program = start()
    try:
        kubectl("apply", "-f", "deploy/examples/published-ports.yaml")
        seen(lambda: any(c["type"] == "Allocated" and c["status"] == "True" for c in get("msvc", "web")["status"]["conditions"]))
        seen(lambda: get("service", "web")["metadata"]["ownerReferences"][0]["kind"] == "MeshService")
        seen(lambda: any(e["regarding"]["kind"] == "MeshService" for e in get("events.events.k8s.io")["items"]))
        # Without a selector the Service goes, by the controller's own hand; with it, it comes back.
        for _ in range(2):
            kubectl("patch", "msvc", "web", "--type=merge", "-p", '{"spec": {"selector": null}}')
            seen(lambda: kubectl("get", "service", "web", ok=False).returncode != 0)
            kubectl("apply", "-f", "deploy/examples/published-ports.yaml")
            seen(lambda: kubectl("get", "service", "web"))
        # Another selector is another one of the Service's.
        kubectl("patch", "msvc", "web", "--type=merge", "-p", '{"spec": {"selector": {"more": "yes"}}}')
        seen(lambda: get("service", "web")["spec"]["selector"].get("more") == "yes")
        for port in (30085, 30086, 30087):
            change = [{"op": "replace", "path": "/spec/ports/0/publish/port", "value": port}]
            kubectl("patch", "msvc", "web", "--type=json", "-p", json.dumps(change))
            seen(lambda: get("msvc", "web")["status"]["ports"][0]["publishedPort"] == port)
        # The next leader begins by writing every pool.
        end()
        program = start()
        seen(lambda: ("", "configmaps", "update", "meshlb-pool-sctp") in asked_for("meshlb-controller"))
        end()
        rules = [r for kind, name in [("clusterrole", f"{NAMESPACE}-meshlb-controller"), ("role", "meshlb-controller")]
                 for r in get(kind, name, "-n", NAMESPACE)["rules"]]
    finally:
        program.kill()
        kubectl("delete", "--ignore-not-found", "-f", "deploy/examples/published-ports.yaml", ok=False)
        run(HELM, "uninstall", "meshlb", "-n", NAMESPACE, "--no-hooks", ok=False)
        log.close()
        temporary.cleanup()
    asked = asked_for("meshlb-controller")
    unused = [(group, resource, verb, name)
              for r in rules for group in r["apiGroups"] for resource in r["resources"] for verb in r["verbs"] for name in r.get("resourceNames", [None])
              if not any(a[:3] == (group, resource, verb) and name in (None, a[3]) for a in asked)]
    assert not unused, f"never used: {unused}"


def server_takes_manifests():
    kubectl("create", "namespace", NAMESPACE, ok=False)
    # Pods are refused before it is there.
    until(lambda: kubectl("get", "serviceaccount", "default", "-n", NAMESPACE))
    for flags in [(), ("-f", "tests/chart/values/ipv6.yaml", "--set", "prometheusRule.enabled=false"),
                  (*EVERYTHING, "--set", "podMonitor.enabled=false,prometheusRule.enabled=false")]:
        text = template(*flags).stdout
        kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
    kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "deploy/meshlb.yaml")
    kubectl("apply", "--dry-run=server", "-k", "deploy")
    kubectl("apply", "-f", "crds/")
    kubectl("wait", "--for=condition=Established", "crd/meshservices.meshlb.dev", "crd/meshnodes.meshlb.dev")
    kubectl("create", "namespace", "vote", ok=False)
    for file in sorted((ROOT / "deploy/examples").glob("*.yaml")):
        kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(file))
    kubectl("delete", "crd", "meshservices.meshlb.dev", "meshnodes.meshlb.dev")


CASES = [lints, schemas_of_the_oldest_and_the_newest_kubernetes, scores, default_objects, switches, labels_and_namespaces,
         a_key_that_is_given_and_the_charts_comes_once, names_that_look_like_something_else, two_releases_do_not_meet, crd_is_the_repositorys,
         versions_are_one, deploy_is_the_chart, rights, documented_rights_are_the_charts, agents_pod, controllers_pod, network_policy,
         uninstalls_job, configuration_is_flags, defaults_are_the_programs, null_is_as_if_not_given, defaults_in_templates_are_those_of_values,
         changed_configuration_restarts_pods, wrong_values_are_refused, ranges_are_refused_as_by_the_programs,
         values_are_documented_and_in_the_schema, alerts, each_alert_fires_and_does_not, alerts_are_documented, notes_are_right, helm_test_asks_both,
         examples_are_valid]
SERVER_CASES = [server_takes_manifests, server_install_upgrade_uninstall, server_controller_uses_its_rights_and_no_others]


def main():
    cases = CASES + (SERVER_CASES if os.environ.get("MESHLB_CHART_SERVER") else [])
    filters = sys.argv[1:]
    passed = failed = skipped = 0
    for case in cases:
        if filters and not any(f in case.__name__ for f in filters):
            continue
        start = time.monotonic()
        try:
            case()
        except Skipped as e:
            skipped += 1
            print(f"SKIPPED chart::{case.__name__}: {e}")
        except Exception as e:  # every case is run, whatever an earlier one did
            failed += 1
            where = traceback.extract_tb(e.__traceback__)[-1]
            print(f"FAILED chart::{case.__name__} ({where.name}:{where.lineno}): {e}")
        else:
            passed += 1
            print(f"ok chart::{case.__name__} ({time.monotonic() - start:.1f} s)")
    print(f"chart tests: {passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or skipped or not passed else 0


sys.exit(main())
