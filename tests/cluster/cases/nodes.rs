//! MeshNodes: what agents say, what comes of it in a service's status, and the end of an installation.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use meshlb::{
    meshnode::{
        Fault, Faults, Report, State,
        writer::{self, Handle, Request},
    },
    model::{
        ids::{PerFamily, ServiceKey},
        node::{MarkMask, NodeConfig, ReservedPorts},
    },
    source::{SourceMessage, kube},
};
use serde_json::Value;

use super::controller::{
    Controller, NAMESPACE, PATIENCE, condition, get, msvc, prepare, service, until, until_condition,
};
use crate::{Case, island::Islander, kubectl::Cluster};

pub const CASES: [Case; 6] = [
    ("nodes::what_fails_on_a_node_is_in_the_status", fails_and_heals),
    ("nodes::agent_that_cannot_start_says_so", cannot_start),
    ("nodes::agent_that_refuses_what_the_controller_accepts_says_so", refuses),
    ("nodes::report_waits_for_the_api_server", waits),
    ("nodes::agents_use_the_charts_rights_and_no_others", rights),
    ("nodes::uninstall_names_who_has_not_cleaned_up", uninstall),
];

/// No node but those of the case.
fn alone(cluster: &Cluster, own: &str) -> Result<()> {
    prepare(cluster, own)?;
    cluster.kubectl(&["delete", "node,meshnode", "--all"], "")?.good()?;
    cluster
        .kubectl(&["delete", "configmap", "meshlb-uninstall", "--ignore-not-found", "-n", NAMESPACE], "")?
        .good()?;
    Ok(())
}

fn node(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.apply(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"))
}

/// The agent's writer for a node.
pub(super) fn writer(cluster: &Cluster, name: &str) -> Result<Handle> {
    let access = kube::config(Some(&cluster.kubeconfig()))?;
    let settings = writer::Settings { node: name.to_owned(), namespace: Some(NAMESPACE.to_owned()) };
    Ok(writer::start(access, settings, || {})?)
}

fn serving(failing: &[&ServiceKey]) -> Report {
    let fault = |key: &&ServiceKey| {
        let message = "published port 30080/TCP is held by a socket of this node".to_owned();
        ((*key).clone(), Fault { reason: "PublishedPortHeld", message })
    };
    let named: Vec<_> = failing.iter().map(fault).collect();
    Report {
        renderer: "nftables".into(),
        addresses: vec![IpAddr::from([192, 168, 50, 1])],
        count: named.len(),
        named,
        ..Report::of(State::Serving)
    }
}

fn mesh_node(cluster: &Cluster, name: &str) -> Result<Value> {
    get(cluster, &["meshnode", name])
}

fn slice(cluster: &Cluster, namespace: &str, name: &str) -> Result<()> {
    cluster.apply(&format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: [{{port: 8080}}]\n\
         metadata: {{name: {name}-1, namespace: {namespace}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         endpoints: [{{addresses: [10.244.1.1]}}]\n"
    ))
}

fn fails_and_heals(cluster: &Cluster) -> Result<()> {
    alone(cluster, "fails")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    for name in ["vote", "other"] {
        slice(cluster, "fails", name)?;
        service(cluster, "fails", name, "{ports: [{port: 80}]}")?;
    }
    for name in ["vote", "other"] {
        until_condition(cluster, "fails", name, "Programmed", "Unknown NoAgents")?;
        until_condition(cluster, "fails", name, "Ready", "Unknown NoAgents")?;
    }
    // Without a Node there is nothing to report about.
    let n1 = writer(cluster, "n1")?;
    n1.report(serving(&[]));
    ensure!(!n1.flush(Duration::from_secs(4)), "written without a Node");
    node(cluster, "n1")?;
    until("n1 has reported", PATIENCE, || Ok(n1.flush(Duration::ZERO)))?;
    let made = mesh_node(cluster, "n1")?;
    let uid = get(cluster, &["node", "n1"])?["metadata"]["uid"].clone();
    ensure!(made["metadata"]["ownerReferences"][0]["uid"] == uid, "{made:#}");
    ensure!(condition(&made, "Serving").starts_with("True Serving"), "{made:#}");
    let table = cluster.kubectl(&["get", "meshnodes", "-o", "wide"], "")?.good()?;
    for text in ["SERVING", "FAILING", "nftables", "192.168.50.1", env!("CARGO_PKG_VERSION"), "True"] {
        ensure!(table.contains(text), "no {text}:\n{table}");
    }
    let explained = cluster.kubectl(&["explain", "meshnode.status.failing.services"], "")?.good()?;
    ensure!(explained.contains("PublishedPortHeld"), "{explained}");
    for name in ["vote", "other"] {
        until_condition(cluster, "fails", name, "Programmed", "True Programmed")?;
        until_condition(cluster, "fails", name, "Ready", "True Serving")?;
    }
    // One fails.
    let other = msvc(cluster, "fails", "other")?;
    n1.report(serving(&[&ServiceKey::new("fails", "vote")]));
    let vote = until_condition(cluster, "fails", "vote", "Programmed", "False PublishedPortHeld")?;
    ensure!(condition(&vote, "Programmed").contains("n1: published port 30080/TCP"), "{:#}", vote["status"]);
    ensure!(condition(&vote, "Ready").starts_with("False PublishedPortHeld"), "{:#}", vote["status"]);
    ensure!(
        msvc(cluster, "fails", "other")?["metadata"]["resourceVersion"]
            == other["metadata"]["resourceVersion"],
        "the other one was written"
    );
    until("an Event", PATIENCE, || {
        let events = cluster.kubectl(&["get", "events", "-n", "fails"], "")?.good()?;
        Ok(events.contains("PublishedPortHeld"))
    })?;
    n1.report(serving(&[]));
    until_condition(cluster, "fails", "vote", "Programmed", "True Programmed")?;
    // What somebody deletes is made again; what is as it should be is not written.
    cluster.kubectl(&["delete", "meshnode", "n1"], "")?.good()?;
    until("it is there again", PATIENCE, || Ok(mesh_node(cluster, "n1").is_ok()))?;
    until("with its status", PATIENCE, || Ok(n1.flush(Duration::ZERO)))?;
    let version = mesh_node(cluster, "n1")?["metadata"]["resourceVersion"].clone();
    let again = writer(cluster, "n1")?;
    again.report(serving(&[]));
    until("an agent that starts again finds it so", PATIENCE, || Ok(again.flush(Duration::ZERO)))?;
    std::thread::sleep(Duration::from_secs(4));
    ensure!(mesh_node(cluster, "n1")?["metadata"]["resourceVersion"] == version, "written without a change");
    drop(again);
    // It goes with its Node, by Kubernetes' own hand, and with it what it said.
    n1.report(serving(&[&ServiceKey::new("fails", "vote")]));
    until_condition(cluster, "fails", "vote", "Programmed", "False")?;
    drop(n1);
    cluster.kubectl(&["delete", "node", "n1"], "")?.good()?;
    until_condition(cluster, "fails", "vote", "Programmed", "Unknown NoAgents")?;
    until("it has gone with the Node", Duration::from_secs(60), || Ok(mesh_node(cluster, "n1").is_err()))?;
    Ok(())
}

/// The real agent, without the right to change a kernel.
fn cannot_start(cluster: &Cluster) -> Result<()> {
    alone(cluster, "cannot")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    service(cluster, "cannot", "vote", "{ports: [{port: 80}]}")?;
    node(cluster, "n1")?;
    let kubeconfig = cluster.kubeconfig();
    let (program, kubeconfig) = (cluster.program().to_string_lossy(), kubeconfig.to_string_lossy());
    let drop_right = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"];
    let agent = ["agent", "--source=kube", "--node=n1", "--namespace", NAMESPACE, "--metrics-listen=off"];
    let flags = ["--run-dir={dir}/run", "--state-dir={dir}/state", "--kubeconfig", &kubeconfig];
    let mut agent = Islander::start(cluster, &[&drop_right[..], &[&program], &agent, &flags].concat())?;
    let code = agent.ends(PATIENCE)?;
    ensure!(code == 1 && agent.log().contains("CAP_NET_ADMIN"), "exit {code}:\n{}", agent.log());
    let said = mesh_node(cluster, "n1")?;
    ensure!(condition(&said, "Serving").starts_with("False StartFailed"), "{said:#}");
    ensure!(condition(&said, "Serving").contains("CAP_NET_ADMIN"), "{said:#}");
    let vote = until_condition(cluster, "cannot", "vote", "Programmed", "False NodeFailing")?;
    ensure!(condition(&vote, "Programmed").contains("n1: see its MeshNode"), "{:#}", vote["status"]);
    ensure!(!agent.dir().join("state").join("state.json").exists(), "something was programmed");
    cluster.kubectl(&["delete", "node", "n1"], "")?.good()?;
    Ok(())
}

/// An agent with other flags, or an older one, is alone in not serving a service: that is in the service's status.
fn refuses(cluster: &Cluster) -> Result<()> {
    alone(cluster, "refuses")?;
    node(cluster, "n1")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    slice(cluster, "refuses", "vote")?;
    let publish = |port: u16| {
        service(cluster, "refuses", "vote", &format!("{{ports: [{{port: 80, publish: {{port: {port}}}}}]}}"))
    };
    publish(30_099)?;
    let config = NodeConfig {
        name: "n1".into(),
        ranges: PerFamily { v4: Some("10.200.0.0/16".parse()?), v6: None },
        publish_range: 30000..=32767,
        reserved: vec![ReservedPorts { ports: 30_099..=30_099, protocol: None }],
        mask: MarkMask::default(),
        zone: None,
    };
    let (sender, messages) = std::sync::mpsc::channel();
    kube::watch(kube::config(Some(&cluster.kubeconfig()))?, config, false, sender)?;
    // What the agent's loop does with it.
    let n1 = writer(cluster, "n1")?;
    let mut faults = Faults::default();
    let mut report = |within: Duration| -> Result<()> {
        while let Ok(message) = messages.recv_timeout(within) {
            if let SourceMessage::Refused(services) = message {
                faults.not_understood(services);
            }
        }
        let (count, named) = faults.named();
        n1.report(Report { count, named, not_understood: faults.refusals(), ..serving(&[]) });
        Ok(())
    };
    until_condition(cluster, "refuses", "vote", "Accepted", "True")?;
    report(Duration::from_secs(3))?;
    let vote = until_condition(cluster, "refuses", "vote", "Programmed", "False NotUnderstood")?;
    ensure!(
        condition(&vote, "Programmed").contains("n1: spec.ports[0].publish.port"),
        "{:#}",
        vote["status"]
    );
    ensure!(condition(&vote, "Ready").starts_with("False NotUnderstood"), "{:#}", vote["status"]);
    publish(30_100)?;
    report(Duration::from_secs(3))?;
    until_condition(cluster, "refuses", "vote", "Ready", "True Serving")?;
    // What the controller does not accept either is its own to tell.
    service(cluster, "refuses", "vote", "{vips: [10.9.9.9], ports: [{port: 80}]}")?;
    until_condition(cluster, "refuses", "vote", "Accepted", "False Invalid")?;
    report(Duration::from_secs(3))?;
    until("n1 has reported", PATIENCE, || Ok(n1.flush(Duration::ZERO)))?;
    ensure!(mesh_node(cluster, "n1")?["status"]["failing"]["count"] == 0, "{:#}", mesh_node(cluster, "n1")?);
    drop(n1);
    cluster.kubectl(&["delete", "node", "n1"], "")?.good()?;
    Ok(())
}

fn waits(cluster: &Cluster) -> Result<()> {
    alone(cluster, "waits")?;
    node(cluster, "n1")?;
    let n1 = writer(cluster, "n1")?;
    n1.report(serving(&[]));
    until("n1 has reported", PATIENCE, || Ok(n1.flush(Duration::ZERO)))?;
    cluster.hold("kube-apiserver", true)?;
    let vote = ServiceKey::new("waits", "vote");
    n1.report(serving(&[&vote]));
    let written = n1.flush(Duration::from_secs(15));
    cluster.hold("kube-apiserver", false)?;
    ensure!(!written, "written without an API server");
    cluster.wait_ready()?;
    until("it is written when the API server is back", Duration::from_secs(90), || {
        Ok(mesh_node(cluster, "n1")?["status"]["failing"]["count"] == 1)
    })?;
    // And without the CRD, until it is there again.
    cluster.kubectl(&["delete", "crd", "meshnodes.meshlb.dev"], "")?.good()?;
    n1.report(serving(&[]));
    ensure!(!n1.flush(Duration::from_secs(5)), "written without the CRD");
    cluster.install_crds()?;
    until("it is written when the CRD is back", Duration::from_secs(90), || {
        Ok(mesh_node(cluster, "n1").is_ok_and(|n| n["status"]["failing"]["count"] == 0))
    })?;
    cluster.kubectl(&["delete", "node", "n1"], "")?.good()?;
    Ok(())
}

/// What of the chart is an agent's, but for the DaemonSet.
fn agents_objects() -> Result<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/meshlb.yaml"))?;
    let kinds = ["ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"];
    let policies = ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"];
    let wanted = |object: &&str| {
        let mut kind = kinds.iter().chain(&policies);
        kind.any(|kind| object.contains(&format!("\nkind: {kind}\n"))) && object.contains("component: agent")
    };
    let objects: Vec<&str> = text.split("\n---\n").filter(wanted).collect();
    ensure!(objects.len() == 7, "{} objects of the agent's in deploy/meshlb.yaml", objects.len());
    Ok(objects.join("\n---\n"))
}

/// The source and the writer with the account that the chart gives to an agent.
fn rights(cluster: &Cluster) -> Result<()> {
    alone(cluster, "rights")?;
    for name in ["n1", "n2"] {
        node(cluster, name)?;
    }
    cluster.apply(&agents_objects()?)?;
    cluster.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: agent-n1, namespace: {NAMESPACE}}}, spec: {{nodeName: n1, \
         serviceAccountName: meshlb-agent, containers: [{{name: c, image: c}}]}}}}"
    ))?;
    let from = cluster.audited();
    let bound = ["--bound-object-kind=Pod", "--bound-object-name=agent-n1"];
    let kubeconfig = cluster.kubeconfig_of(NAMESPACE, "meshlb-agent", &bound)?;
    let access = || kube::config(Some(kubeconfig.path()));
    let (sender, messages) = std::sync::mpsc::channel();
    let config = NodeConfig {
        name: "n1".into(),
        ranges: PerFamily { v4: Some("10.200.0.0/16".parse()?), v6: None },
        publish_range: 30000..=32767,
        reserved: vec![],
        mask: MarkMask::default(),
        zone: None,
    };
    kube::watch(access()?, config, true, sender)?;
    loop {
        match messages.recv_timeout(PATIENCE).context("the source is not read")? {
            SourceMessage::Synced => break,
            SourceMessage::Problems(problems) => ensure!(problems.is_empty(), "{problems:?}"),
            _ => {}
        }
    }
    let write = |name: &str| -> Result<Handle> {
        let settings = writer::Settings { node: name.into(), namespace: Some(NAMESPACE.to_owned()) };
        let writer = writer::start(access()?, settings, || {})?;
        writer.report(serving(&[]));
        Ok(writer)
    };
    let own = write("n1")?;
    until("its own MeshNode is written", PATIENCE, || Ok(own.flush(Duration::ZERO)))?;
    ensure!(
        matches!(own.wait_for_request(PATIENCE), Request::None(_)),
        "it does not know whether it is asked"
    );
    // Of another node it may not.
    let other = write("n2")?;
    ensure!(
        !other.flush(Duration::from_secs(8)) && mesh_node(cluster, "n2").is_err(),
        "another node's is written"
    );
    drop((other, messages));
    // Every right is used. Server-side apply is `patch` in the audit log, also where it makes an object.
    let asked = cluster.asked_by("meshlb-agent", from)?;
    let mut unused = Vec::new();
    for (kind, name) in [("clusterrole", "meshlb-system-meshlb-agent"), ("role", "meshlb-agent")] {
        let role = get(cluster, &[kind, name, "-n", NAMESPACE])?;
        for rule in role["rules"].as_array().context("no rules")? {
            let texts = |field: &str| -> Vec<String> {
                let all = rule[field].as_array().into_iter().flatten();
                all.filter_map(|text| text.as_str().map(str::to_owned)).collect()
            };
            for resource in texts("resources") {
                let used =
                    |verb: &String| asked.iter().any(|a| a.starts_with(&format!("{verb} {resource} ")));
                let left = texts("verbs").into_iter().filter(|verb| !used(verb));
                unused.extend(left.map(|verb| format!("{verb} {resource}")));
            }
        }
    }
    ensure!(unused == ["create meshnodes"], "not used: {unused:?}; asked for: {asked:?}");
    // That one is: without it none is made.
    drop(own);
    cluster.kubectl(&["delete", "meshnode", "n1"], "")?.good()?;
    let role = get(cluster, &["clusterrole", "meshlb-system-meshlb-agent"])?;
    let less = serde_json::to_string(&role)?.replace("\"create\",", "");
    ensure!(!less.contains("\"create\""), "{role:#}");
    cluster.kubectl(&["replace", "-f", "-"], &less)?.good()?;
    std::thread::sleep(Duration::from_secs(1));
    let own = write("n1")?;
    ensure!(!own.flush(Duration::from_secs(8)), "made without the right to");
    cluster.apply(&agents_objects()?)?;
    until("it is made when it may be", Duration::from_secs(30), || Ok(own.flush(Duration::ZERO)))?;
    drop(own);
    cluster
        .kubectl(&["delete", "pod", "agent-n1", "-n", NAMESPACE, "--force", "--grace-period=0"], "")?
        .good()?;
    cluster.kubectl(&["delete", "-f", "-"], &agents_objects()?)?.good()?;
    cluster.kubectl(&["delete", "node", "n1", "n2"], "")?.good()?;
    Ok(())
}

/// What a node's agent says when it has cleaned up as it was asked last.
fn cleaned(node: &Handle) -> Report {
    let asked = match node.request() {
        Request::Uninstall(asked) => asked,
        _ => Default::default(),
    };
    Report::of(State::HeldOff { asked, cleaned: Ok(()) })
}

fn uninstall(cluster: &Cluster) -> Result<()> {
    alone(cluster, "uninstall")?;
    ["n1", "n2"].iter().try_for_each(|name| node(cluster, name))?;
    // One whose agent does not answer.
    let n2 = writer(cluster, "n2")?;
    n2.report(serving(&[]));
    until("n2 has reported", PATIENCE, || Ok(n2.flush(Duration::ZERO)))?;
    let command =
        |more: &[&str]| cluster.meshlb(&[&["uninstall", "--namespace", NAMESPACE], more].concat(), "");
    let asked = std::thread::spawn({
        let cluster = cluster.clone();
        move || cluster.meshlb(&["uninstall", "--namespace", NAMESPACE, "--timeout", "25"], "")
    });
    until("n2 is asked", PATIENCE, || Ok(matches!(n2.request(), Request::Uninstall(_))))?;
    let kubeconfig = cluster.kubeconfig();
    let (program, kubeconfig) = (cluster.program().to_string_lossy(), kubeconfig.to_string_lossy());
    let agent =
        [&*program, "agent", "--source=kube", "--node=n1", "--namespace", NAMESPACE, "--metrics-listen=off"];
    let flags = ["--run-dir={dir}/run", "--state-dir={dir}/state", "--kubeconfig", &kubeconfig];
    // A real one that starts in the middle of it, in a namespace of its own: it holds off at once.
    let mut n1 = Islander::start(cluster, &[&agent[..], &flags].concat())?;
    let out = asked.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    ensure!(!out.ok, "n2 has not cleaned up: {out:?}\n{}", n1.log());
    ensure!(out.stdout.contains("n1: cleaned up"), "{out:?}\n{}", n1.log());
    ensure!(
        out.stderr.contains("node n2 is not cleaned up after 25 s: its agent has not answered"),
        "{out:?}"
    );
    ensure!(!out.stderr.contains("node n1"), "{out:?}");
    let said = mesh_node(cluster, "n1")?;
    ensure!(condition(&said, "CleanedUp").starts_with("True CleanedUp"), "{said:#}");
    let wait = ["wait", "--for=condition=CleanedUp", "--timeout=1s", "meshnode/n1"];
    cluster.kubectl(&wait, "")?.good()?;
    // An answer to an earlier request is none.
    n2.report(cleaned(&n2));
    until("n2 has reported", PATIENCE, || Ok(n2.flush(Duration::ZERO)))?;
    let out = command(&["--timeout", "5"])?;
    ensure!(
        !out.ok && out.stderr.contains("node n2") && out.stderr.contains("has answered another request"),
        "{out:?}"
    );
    // When all have, all is done, and nobody makes anything anew; the next one finds it as the first did.
    for time in 1..=2 {
        let before = n2.request();
        let done = AtomicBool::new(false);
        let out = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    if n2.request() != before && matches!(n2.request(), Request::Uninstall(_)) {
                        n2.report(cleaned(&n2));
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
            let out = command(&["--timeout", "25"]);
            done.store(true, Ordering::Relaxed);
            out
        })?
        .good()?;
        // The second one knows of nodes by their answers alone, of which the first ends it.
        ensure!(!out.contains("0 nodes") && out.contains("nodes are clean"), "{time}: {out}");
        std::thread::sleep(Duration::from_secs(5));
        if time == 1 {
            ensure!(out.contains("2 nodes are clean"), "{out}");
            let left = get(cluster, &["meshnodes"])?;
            ensure!(left["items"].as_array().is_some_and(Vec::is_empty), "{left:#}");
        }
        ensure!(n1.runs(), "{}", n1.log());
    }
    // Nobody's request is no obstacle for the next installation.
    let out = command(&["--daemonset", "nowhere"])?.good()?;
    ensure!(out.contains("there is no DaemonSet") && out.contains("nothing to do"), "{out}");
    ensure!(get(cluster, &["configmap", "meshlb-uninstall", "-n", NAMESPACE]).is_err(), "it stays");
    command(&["--timeout", "1"])?;
    // Withdrawn, the agent ends, so that it is started again.
    let out = command(&["--cancel"])?.good()?;
    ensure!(out.contains("withdrawn"), "{out}");
    ensure!(command(&["--cancel"])?.good()?.contains("nothing to withdraw"), "twice");
    let code = n1.ends(Duration::from_secs(60))?;
    ensure!(code == 0 && n1.log().contains("withdrawn"), "exit {code}:\n{}", n1.log());
    n2.report(serving(&[]));
    until("n2 has reported", PATIENCE, || Ok(n2.flush(Duration::ZERO)))?;
    let wrong = command(&["--daemonset", "nowhere"])?;
    ensure!(!wrong.ok && wrong.stderr.contains("these nodes are not clean: n2"), "{wrong:?}");
    cluster.kubectl(&["delete", "node", "n1", "n2"], "")?.good().context("nodes")?;
    Ok(())
}
