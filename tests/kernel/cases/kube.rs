//! From an object in a real API server to packets: a controller, an agent on every node.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::support::wait_until;
use crate::check;
use crate::client::{Load, Probe};
use crate::kube::Kube;
use crate::program::Agent;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::{Host, Topology};

pub fn register(suite: &mut Suite) {
    // Where there is none, these are no cases, rather than ones that are left out.
    if std::env::var_os(crate::kube::KUBECONFIG).is_none_or(|file| file.is_empty()) {
        return;
    }
    suite.add_slow("kube::from_apply_to_delete", &Matrix::pair(), Duration::from_secs(300), story);
    suite.add_slow("kube::told_by_nodes_and_uninstalled", &Matrix::pair(), Duration::from_secs(300), told);
}

const PATIENCE: Duration = Duration::from_secs(40);

fn condition(object: &Value, type_: &str) -> String {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions
        .filter(|c| c["type"] == type_)
        .map(|c| {
            let text = |field: &str| c[field].as_str().unwrap_or_default().to_owned();
            format!("{} {}: {}", text("status"), text("reason"), text("message"))
        })
        .collect()
}

pub(super) fn service() -> Value {
    json!({
        "apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService",
        "metadata": {"name": "vote", "namespace": "default"},
        "spec": {
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "http", "port": 80, "targetPort": 8080, "publish": {}},
                {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 8080, "publish": {}},
            ],
        },
    })
}

pub(super) fn slice(family: Family, pods: &[&Host]) -> Value {
    let endpoint = |pod: &&Host| {
        json!({"addresses": [pod.ip(family).to_string()], "nodeName": format!("n{}", &pod.name[1..2]),
            "targetRef": {"kind": "Pod", "name": pod.name}})
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("vote-{}", family.pick(4, 6)), "namespace": "default",
            "labels": {"kubernetes.io/service-name": "vote"}},
        "addressType": family.address_type(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 8080, "protocol": "UDP"}],
        "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

pub(super) fn endpoints(kube: &Kube, t: &Topology, names: &[&str]) -> Result<()> {
    let pods: Vec<&Host> = names.iter().map(|name| t.pod(name)).collect();
    Family::ALL.into_iter().try_for_each(|family| kube.apply(&slice(family, &pods)))
}

/// What the status grants: both VIPs, and the published ports of TCP and UDP.
pub(super) struct Granted {
    pub vips: Vec<SocketAddr>,
    pub ports: [u16; 2],
}

pub(super) fn granted(kube: &Kube) -> Result<Granted> {
    let mut found = None;
    wait_until("the status grants VIPs and ports", PATIENCE, || {
        let status = kube.get(&service())?["status"].clone();
        let vip = |i: usize| status["vips"][i].as_str().and_then(|text| text.parse().ok());
        let port = |protocol: &str| {
            let ports = status["ports"].as_array()?;
            let port = ports.iter().find(|p| p["protocol"] == protocol)?;
            u16::try_from(port["publishedPort"].as_u64()?).ok()
        };
        let (Some(v4), Some(v6), Some(tcp), Some(udp)) = (vip(0), vip(1), port("TCP"), port("UDP")) else {
            return Ok(false);
        };
        let vips = [v4, v6].map(|ip| SocketAddr::new(ip, 80)).to_vec();
        found = Some(Granted { vips, ports: [tcp, udp] });
        Ok(true)
    })?;
    found.context("nothing is granted")
}

/// From everywhere, all of them evenly; each node's published port too.
pub(super) fn works(t: &Topology, granted: &Granted, names: &[&str]) -> Result<()> {
    let n = 2 * names.len();
    for vip in &granted.vips {
        for proto in [Proto::Tcp, Proto::Udp] {
            for from in [t.pod("p11"), t.pod("p32"), t.node(2)] {
                check::even(&from.connect(proto, *vip, n)?, names)?;
            }
        }
    }
    for node in &t.nodes {
        for (proto, port) in [Proto::Tcp, Proto::Udp].into_iter().zip(granted.ports) {
            for family in Family::ALL {
                check::even(&t.ext.connect(proto, node.at(family, port), n)?, names)?;
            }
        }
    }
    Ok(())
}

fn story(cx: &mut Cx) -> Result<()> {
    let kube = Kube::find()?;
    let t = cx.topology(&Topology::builder())?;
    kube.delete(&service())?;
    let controller = kube.controller(&cx.dir)?;
    let flag = format!("--kubeconfig={}", kube.kubeconfig_of_nodes(&cx.dir)?.display());
    let meshlb = cx.meshlb()?.clone().flag(&flag);
    let mut relays = Vec::new();
    let mut agents: Vec<Agent> = Vec::new();
    for node in &t.nodes {
        cx.will_clean(node);
        relays.push(kube.relay(&node.ns)?);
        agents.push(meshlb.start(node, &["agent", "--source", "kube"], "agent.log")?);
    }
    kube.apply(&service())?;
    endpoints(&kube, &t, &["p11", "p21", "p31"])?;
    let given = granted(&kube).with_context(|| controller.log())?;
    let all = ["p11", "p21", "p31"];
    let took = wait_until("it works from everywhere", PATIENCE, || Ok(works(&t, &given, &all).is_ok()));
    cx.note(format!("works after {took:?}; {:?}", given.vips));
    works(&t, &given, &all)?;
    // Fewer endpoints under a load.
    let load = Load::start(
        &t.pod("p12").ns,
        &Probe { pause: Duration::from_millis(20), ..Probe::new(Proto::Tcp, given.vips[0]) },
        1,
    );
    endpoints(&kube, &t, &["p21", "p31", "p32"])?;
    let now = ["p21", "p31", "p32"];
    wait_until("another endpoint", PATIENCE, || Ok(works(&t, &given, &now).is_ok()))?;
    let report = load.stop()?;
    ensure!(report.errors.is_empty() && report.answered() > 10, "the load: {report:?}");
    // The API server can't be reached from one node, whose agent is killed and started meanwhile: all goes on.
    relays.remove(0);
    let first = agents.remove(0);
    first.kill();
    let mut first = meshlb.start(t.node(1), &["agent", "--source", "kube"], "agent.log")?;
    first.wait_for_log("can't be reached", PATIENCE)?;
    std::thread::sleep(Duration::from_secs(2));
    works(&t, &given, &now).context("an agent started without the API server")?;
    endpoints(&kube, &t, &["p21", "p32"])?;
    relays.push(kube.relay(&t.node(1).ns)?);
    let then = ["p21", "p32"];
    wait_until("what has changed meanwhile", PATIENCE, || Ok(works(&t, &given, &then).is_ok()))?;
    agents.push(first);
    // Gone.
    kube.delete(&service())?;
    wait_until("it is refused", PATIENCE, || {
        let tally = t.pod("p11").connect(Proto::Tcp, given.vips[0], 1)?;
        Ok(check::refused(&tally).is_ok())
    })?;
    for family in Family::ALL {
        kube.delete(&slice(family, &[]))?;
    }
    for agent in &mut agents {
        ensure!(agent.alive(), "an agent has ended:\n{}", agent.log_text());
    }
    Ok(())
}

/// A socket holds a published port on one node: its MeshNode says so, and the status. Then meshlb is uninstalled, and comes back.
fn told(cx: &mut Cx) -> Result<()> {
    let kube = Kube::find()?;
    let t = cx.topology(&Topology::builder())?;
    let named = |api: &str, kind: &str, name: &str| json!({"apiVersion": api, "kind": kind, "metadata": {"name": name}});
    let mesh_node = |k: u8| named("meshlb.dev/v1alpha1", "MeshNode", &format!("n{k}"));
    let mut request = named("v1", "ConfigMap", "meshlb-uninstall");
    request["metadata"]["namespace"] = "meshlb-system".into();
    kube.delete(&service())?;
    kube.delete(&request)?;
    for k in 1..=3 {
        kube.delete(&mesh_node(k))?;
        kube.apply(&named("v1", "Node", &format!("n{k}")))?;
    }
    let socket = t.node(2).ns.enter(|| Ok(std::net::TcpListener::bind("0.0.0.0:30099")?))?;
    let controller = kube.controller(&cx.dir)?;
    let flag = format!("--kubeconfig={}", kube.kubeconfig_of_nodes(&cx.dir)?.display());
    let meshlb = cx.meshlb()?.clone().flag(&flag);
    let arguments = ["agent", "--source", "kube", "--namespace", "meshlb-system"];
    let mut relays = Vec::new();
    let mut agents: Vec<Agent> = Vec::new();
    for node in &t.nodes {
        cx.will_clean(node);
        relays.push(kube.relay(&node.ns)?);
        agents.push(meshlb.start(node, &arguments, "agent.log")?);
    }
    let mut object = service();
    object["spec"]["ports"] =
        json!([{"name": "http", "port": 80, "targetPort": 8080, "publish": {"port": 30099}}]);
    kube.apply(&object)?;
    endpoints(&kube, &t, &["p11", "p21", "p31"])?;
    let says = |start: &str| -> Result<()> {
        let mut last = Value::Null;
        let found = wait_until(start, PATIENCE, || {
            last = kube.get(&service())?;
            Ok(condition(&last, "Programmed").starts_with(start))
        });
        found.with_context(|| format!("{:#}\n{}", last["status"], controller.log()))?;
        Ok(())
    };
    says(
        "False PublishedPortHeld: 1 node does not serve it as it should be: n2: published port 30099/TCP is held",
    )?;
    let found = kube.get(&mesh_node(2))?;
    ensure!(found["status"]["failing"]["count"] == 1, "{found:#}");
    ensure!(condition(&found, "Serving").starts_with("True"), "{found:#}");
    // The others serve it, and this one its virtual IP.
    let vip: SocketAddr = {
        let vip = kube.get(&service())?["status"]["vips"][0].as_str().context("no VIP")?.parse()?;
        SocketAddr::new(vip, 80)
    };
    let all = ["p11", "p21", "p31"];
    let works = |t: &Topology| -> Result<()> {
        check::even(&t.node(2).connect(Proto::Tcp, vip, 6)?, &all)?;
        check::even(&t.ext.connect(Proto::Tcp, t.node(1).at(Family::V4, 30099), 6)?, &all)
    };
    works(&t)?;
    drop(socket);
    says("True Programmed")?;
    check::even(&t.ext.connect(Proto::Tcp, t.node(2).at(Family::V4, 30099), 6)?, &all)?;
    // The end.
    kube.apply(&request)?;
    for k in 1..=3 {
        wait_until("it has cleaned up", PATIENCE, || {
            Ok(condition(&kube.get(&mesh_node(k))?, "CleanedUp").starts_with("True CleanedUp"))
        })
        .with_context(|| agents[usize::from(k) - 1].log_text())?;
    }
    says("Unknown NoAgents")?;
    check::nothing_left(&t)?;
    // An agent that starts now programs nothing.
    agents.remove(0).kill();
    let mut again = meshlb.start(t.node(1), &arguments, "agent.log")?;
    again.wait_for_log("nothing of meshlb is left", PATIENCE)?;
    std::thread::sleep(Duration::from_secs(3));
    check::nothing_left(&t)?;
    agents.push(again);
    for agent in &mut agents {
        ensure!(agent.alive(), "an agent has ended:\n{}", agent.log_text());
    }
    // Withdrawn, they end, and are started again.
    kube.delete(&request)?;
    for agent in &mut agents {
        wait_until("it ends", Duration::from_secs(60), || Ok(!agent.alive()))?;
        ensure!(agent.log_text().contains("the uninstallation was withdrawn"), "{}", agent.log_text());
    }
    for node in &t.nodes {
        agents.push(meshlb.start(node, &arguments, "agent.log")?);
    }
    says("True Programmed")?;
    wait_until("it works as before", PATIENCE, || Ok(works(&t).is_ok()))?;
    kube.delete(&service())?;
    for family in Family::ALL {
        kube.delete(&slice(family, &[]))?;
    }
    for k in 1..=3 {
        kube.delete(&named("v1", "Node", &format!("n{k}")))?;
    }
    Ok(())
}
