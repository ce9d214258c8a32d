//! Nodes, agents and a controller on a real API server, with the rights of the chart. Endpoints are the bed's pods: their Pods'
//! statuses are written here, their EndpointSlices by Kubernetes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cases::support::{ready, wait_until, wait_until_ok};
use crate::check;
use crate::client::Tally;
use crate::kube::{Controller, Kube, NAMESPACE, Relay};
use crate::program::{Agent, Meshlb};
use crate::runner::{Cx, Family, Proto};
use crate::topology::{Host, Node, Topology};

/// How long what has changed may take to be everywhere.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Some object, to get or to delete it.
pub fn named(api: &str, kind: &str, namespace: Option<&str>, name: &str) -> Value {
    let mut object = json!({"apiVersion": api, "kind": kind, "metadata": {"name": name}});
    if let Some(namespace) = namespace {
        object["metadata"]["namespace"] = namespace.into();
    }
    object
}

/// What a condition says: `STATUS REASON: MESSAGE`.
pub fn condition(object: &Value, type_: &str) -> String {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions
        .filter(|c| c["type"] == type_)
        .map(|c| {
            let text = |field: &str| c[field].as_str().unwrap_or_default().to_owned();
            format!("{} {}: {}", text("status"), text("reason"), text("message"))
        })
        .collect()
}

/// A MeshService of both families with a `selector` of pods labelled `app: NAME`: port 80 to 8080, TCP and UDP, published.
pub fn mesh_service(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": {"app": name},
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "http", "port": 80, "targetPort": 8080, "publish": {}},
                {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 8080, "publish": {}},
            ],
        },
    })
}

/// The usual one.
pub fn service() -> Value {
    mesh_service("default", "vote")
}

/// What a status grants: both VIPs, and the published ports of TCP and UDP.
#[derive(Debug, Clone, PartialEq)]
pub struct Granted {
    pub vips: Vec<SocketAddr>,
    pub ports: [u16; 2],
}

impl Granted {
    fn of(object: &Value) -> Option<Granted> {
        let status = &object["status"];
        let vip = |i: usize| status["vips"][i].as_str().and_then(|text| text.parse().ok());
        let port = |protocol: &str| {
            let ports = status["ports"].as_array()?;
            let port = ports.iter().find(|p| p["protocol"] == protocol && p["port"] == 80)?;
            u16::try_from(port["publishedPort"].as_u64()?).ok()
        };
        let vips = [vip(0)?, vip(1)?].map(|ip| SocketAddr::new(ip, 80)).to_vec();
        Some(Granted { vips, ports: [port("TCP")?, port("UDP")?] })
    }
}

/// What a service is granted, as soon as that is all of it.
pub fn granted(kube: &Kube, object: &Value) -> Result<Granted> {
    let mut last = Value::Null;
    let mut found = None;
    wait_until("the status grants VIPs and ports", PATIENCE, || {
        last = kube.get(object)?;
        found = Granted::of(&last);
        Ok(found.is_some())
    })
    .with_context(|| format!("{:#}", last["status"]))?;
    found.context("nothing is granted")
}

/// Waits until a condition begins so.
pub fn says(kube: &Kube, object: &Value, type_: &str, start: &str) -> Result<Value> {
    let mut last = Value::Null;
    wait_until(&format!("{type_} {start}"), PATIENCE, || {
        last = kube.get(object)?;
        let current = last["metadata"]["generation"] == last["status"]["observedGeneration"];
        Ok(current && condition(&last, type_).starts_with(start))
    })
    .with_context(|| format!("{:#}", last["status"]))?;
    Ok(last)
}

/// From everywhere, all of them evenly; each node's published port too.
pub fn works(t: &Topology, granted: &Granted, names: &[&str]) -> Result<()> {
    from_everywhere(t, granted, names, &|tally| check::even(tally, names))
}

/// The same while a load takes its turns, too: these and no others.
pub fn works_beside_a_load(t: &Topology, granted: &Granted, names: &[&str]) -> Result<()> {
    from_everywhere(t, granted, names, &|tally| check::among(tally, names))
}

fn from_everywhere(
    t: &Topology,
    granted: &Granted,
    names: &[&str],
    right: &dyn Fn(&Tally) -> Result<()>,
) -> Result<()> {
    let n = 2 * names.len();
    for vip in &granted.vips {
        for proto in [Proto::Tcp, Proto::Udp] {
            for from in [t.pod("p11"), t.pod("p32"), t.node(2)] {
                right(&from.connect(proto, *vip, n)?)?;
            }
        }
    }
    for node in &t.nodes {
        for (proto, port) in [Proto::Tcp, Proto::Udp].into_iter().zip(granted.ports) {
            for family in Family::ALL {
                right(&t.ext.connect(proto, node.at(family, port), n)?)?;
            }
        }
    }
    Ok(())
}

/// A pod of the bed as an object, with a label `app`.
pub fn pod(namespace: &str, host: &Host, app: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{app}-{}", host.name), "namespace": namespace, "labels": {"app": app}},
        "spec": {"nodeName": format!("n{}", host.node), "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0, "containers": [{"name": "server", "image": "server"}]},
    })
}

/// Makes these pods the ready ones of an app, and deletes the others.
pub fn pods(kube: &Kube, t: &Topology, namespace: &str, app: &str, names: &[&str]) -> Result<()> {
    for host in &t.pods {
        let object = pod(namespace, host, app);
        if names.contains(&host.name.as_str()) {
            kube.apply(&object)?;
            kube.pod_is(&object, &[host.v4.to_string(), host.v6.to_string()], true)?;
        } else {
            kube.delete(&object)?;
        }
    }
    Ok(())
}

/// The endpoints of the usual service.
pub fn endpoints(kube: &Kube, t: &Topology, names: &[&str]) -> Result<()> {
    pods(kube, t, "default", "vote", names)
}

/// All of it. Dropped, the programs end; what they have programmed is the case's to clean.
pub struct Bed {
    pub kube: Kube,
    pub t: Arc<Topology>,
    pub controller: Option<Controller>,
    meshlb: Meshlb,
    agents: Vec<Option<Agent>>,
    relays: Vec<Option<Relay>>,
    dir: PathBuf,
}

impl Bed {
    /// Nothing of an earlier case is left on the API server, each node has its agent.
    pub fn start(cx: &mut Cx) -> Result<Bed> {
        let mut bed = Bed::without_agents(cx)?;
        for k in 1..=bed.t.nodes.len() {
            bed.start_agent(k)?;
        }
        Ok(bed)
    }

    /// The same, with no agent yet.
    pub fn without_agents(cx: &mut Cx) -> Result<Bed> {
        let kube = Kube::find()?;
        let t = cx.topology(&Topology::builder().ports(&[8080, 8081]))?;
        clear(&kube)?;
        for node in &t.nodes {
            kube.register(node)?;
            cx.will_clean(node);
        }
        let controller = Some(kube.controller(&cx.dir)?);
        let meshlb = cx
            .meshlb()?
            .clone()
            .flag("--metrics-listen=0.0.0.0:9477")
            .flag(&format!("--namespace={NAMESPACE}"))
            // What the API server says of the node.
            .flag("--node-ip=");
        let relays = t.nodes.iter().map(|node| kube.relay(&node.ns).map(Some)).collect::<Result<_>>()?;
        let agents = t.nodes.iter().map(|_| None).collect();
        Ok(Bed { kube, t, controller, meshlb, agents, relays, dir: cx.dir.clone() })
    }

    /// One more flag for agents that are started from now on.
    pub fn add_flag(&mut self, flag: &str) {
        self.meshlb = self.meshlb.clone().flag(flag);
    }

    /// Its agent as it is to be started on node `k`.
    pub fn meshlb(&self, k: usize) -> Result<Meshlb> {
        let file = self.kube.kubeconfig_of_agent(&self.dir, self.node(k)?)?;
        Ok(self.meshlb.clone().flag(&format!("--kubeconfig={}", file.display())))
    }

    fn node(&self, k: usize) -> Result<&Node> {
        self.t.nodes.get(k - 1).context("no such node")
    }

    /// Starts the agent of a node, with a kubeconfig that it had before if there is one: it may be cut off.
    pub fn start_agent(&mut self, k: usize) -> Result<()> {
        let file = self.dir.join(format!("kubeconfig-n{k}"));
        let meshlb = if file.exists() {
            self.meshlb.clone().flag(&format!("--kubeconfig={}", file.display()))
        } else {
            self.meshlb(k)?
        };
        let agent = meshlb.start(self.node(k)?, &["agent", "--source=kube"], "agent.log")?;
        *self.agents.get_mut(k - 1).context("no such node")? = Some(agent);
        Ok(())
    }

    /// The agent of a node.
    pub fn agent(&mut self, k: usize) -> Result<&mut Agent> {
        self.agents.get_mut(k - 1).and_then(Option::as_mut).context("no such agent")
    }

    /// Waits until the agent of a node says that it is ready.
    pub fn until_ready(&mut self, k: usize) -> Result<()> {
        let node = self.t.nodes.get(k - 1).context("no such node")?;
        let agent = self.agents.get_mut(k - 1).and_then(Option::as_mut).context("no such agent")?;
        ready(node, agent)
    }

    /// Takes the agent of a node out.
    pub fn take_agent(&mut self, k: usize) -> Result<Agent> {
        self.agents.get_mut(k - 1).and_then(Option::take).context("no such agent")
    }

    /// Whether a node can reach the API server.
    pub fn reachable(&mut self, k: usize, reachable: bool) -> Result<()> {
        let relay = if reachable { Some(self.kube.relay(&self.node(k)?.ns)?) } else { None };
        *self.relays.get_mut(k - 1).context("no such node")? = relay;
        Ok(())
    }

    /// All agents still run.
    pub fn alive(&mut self) -> Result<()> {
        for agent in self.agents.iter_mut().flatten() {
            ensure!(agent.alive(), "an agent has ended:\n{}", agent.log_text());
        }
        Ok(())
    }

    /// Waits until these, and they alone, answer everywhere, evenly.
    pub fn until_served(&self, granted: &Granted, names: &[&str]) -> Result<Duration> {
        self.until(names, || works(&self.t, granted, names))
    }

    /// The same while a load takes its turns, too.
    pub fn until_served_beside_a_load(&self, granted: &Granted, names: &[&str]) -> Result<Duration> {
        self.until(names, || works_beside_a_load(&self.t, granted, names))
    }

    fn until(&self, names: &[&str], works: impl Fn() -> Result<()>) -> Result<Duration> {
        wait_until_ok(&format!("{names:?} answer from everywhere"), PATIENCE, works)
    }

    /// Waits until a connection is refused.
    pub fn until_refused(&self, from: &Host, to: SocketAddr) -> Result<Tally> {
        let mut last = None;
        wait_until(&format!("{to} is refused"), PATIENCE, || {
            let tally = from.connect(Proto::Tcp, to, 1)?;
            let refused = check::refused(&tally).is_ok();
            last = Some(tally);
            Ok(refused)
        })
        .with_context(|| format!("{last:?}"))?;
        last.context("nothing was tried")
    }

    /// Deletes what the case has made on the API server.
    pub fn end(mut self) -> Result<()> {
        self.alive()?;
        clear(&self.kube)
    }
}

/// Deletes all MeshServices, pods, nodes and MeshNodes, and what asks for the uninstallation.
pub fn clear(kube: &Kube) -> Result<()> {
    const MESHLB: &str = "meshlb.dev/v1alpha1";
    kube.delete(&named("v1", "ConfigMap", Some(NAMESPACE), "meshlb-uninstall"))?;
    for (api, kind) in [(MESHLB, "MeshService"), ("v1", "Pod"), (MESHLB, "MeshNode"), ("v1", "Node")] {
        for object in kube.list(&named(api, kind, None, ""))? {
            kube.delete(&object)?;
        }
    }
    // Slices that a case has written by hand belong to nobody.
    for slice in kube.list(&named("discovery.k8s.io/v1", "EndpointSlice", None, ""))? {
        if slice["metadata"]["ownerReferences"][0].is_null() && slice["metadata"]["name"] != "kubernetes" {
            kube.delete(&slice)?;
        }
    }
    wait_until("Kubernetes has taken the Services along", PATIENCE, || {
        let own = |s: &Value| s["metadata"]["ownerReferences"][0]["kind"] == "MeshService";
        Ok(!kube.list(&named("v1", "Service", None, ""))?.iter().any(own))
    })?;
    Ok(())
}
