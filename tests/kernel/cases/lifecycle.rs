//! What happens over time beside running agents: endpoints and services come, change and go, agents too.

mod clock;
mod drain;
mod identity;
mod load;
mod policy;
mod remove;
mod tell;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::support::{VIPS, metric, vip, wait_until};
use crate::manifests::Manifests;
use crate::program::{Agent, Meshlb};
use crate::runner::{Cx, Proto, Suite};
use crate::topology::{Builder, Node, Topology, all};

pub fn register(suite: &mut Suite) {
    clock::register(suite);
    drain::register(suite);
    identity::register(suite);
    policy::register(suite);
    remove::register(suite);
    tell::register(suite);
    load::register(suite);
}

/// The protocols that these cases try.
const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];
/// Two nodes with two pods each: `p11`, `p12`, `p21`, `p22`.
fn two_nodes() -> Builder {
    Topology::builder().nodes(2).ports(&[8080, 8081, 9000, 9001])
}

/// `web`: TCP and UDP port 80, published as 30080, on port 8080 of these pods.
fn web(t: &Topology, m: &mut Manifests, pods: &[&str]) -> Result<()> {
    let service = m.service("web").vips(&VIPS)?;
    for proto in PROTOS {
        service.port(proto, 80, 8080, Some(30080));
    }
    serve_from(t, m, "web", pods);
    Ok(())
}

/// Makes these pods the endpoints of a service.
fn serve_from(t: &Topology, m: &mut Manifests, service: &str, pods: &[&str]) {
    let hosts: Vec<_> = pods.iter().map(|p| t.pod(p)).collect();
    m.endpoints(service, &hosts);
}

/// A topology with an agent on each node that follows the same folder.
struct Cluster {
    t: Arc<Topology>,
    m: Manifests,
    meshlb: Meshlb,
    agents: Vec<Agent>,
}

impl Cluster {
    /// Starts the agents and waits until they have programmed their nodes.
    fn start(
        cx: &Cx,
        spec: &Builder,
        describe: impl FnOnce(&Topology, &mut Manifests) -> Result<()>,
    ) -> Result<Cluster> {
        let meshlb = cx.meshlb()?.clone();
        Cluster::start_with(cx, meshlb, spec, describe)
    }

    /// The same with this `meshlb`.
    fn start_with(
        cx: &Cx,
        meshlb: Meshlb,
        spec: &Builder,
        describe: impl FnOnce(&Topology, &mut Manifests) -> Result<()>,
    ) -> Result<Cluster> {
        let t = cx.topology(spec)?;
        let mut m = cx.manifests()?;
        describe(&t, &mut m)?;
        m.write()?;
        t.nodes.iter().for_each(|n| cx.will_clean(n));
        let mut cluster = Cluster { t, m, meshlb, agents: Vec::new() };
        let start = Instant::now();
        cluster.start_agents()?;
        cx.note(format!("agents up in {:.1} s", start.elapsed().as_secs_f32()));
        Ok(cluster)
    }

    /// Starts an agent on each node and waits for its first turn.
    fn start_agents(&mut self) -> Result<()> {
        for node in &self.t.nodes {
            self.agents.push(self.meshlb.agent(node, &self.m.dir)?);
        }
        self.settled(&vec![0; self.t.nodes.len()])
    }

    /// The number of turns that each agent has done because of its source, and not of a drain that was over; 0 for one that
    /// does not answer.
    fn turns(&self) -> Vec<u64> {
        let turns = |n| metric(n, "meshlb_source_to_kernel_seconds_count").unwrap_or(0.0);
        self.t.nodes.iter().map(|n| turns(n) as u64).collect()
    }

    /// Waits until each agent has done another turn, and then no more.
    fn settled(&self, before: &[u64]) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(40);
        let (mut last, mut quiet) = (Vec::new(), 0);
        loop {
            let now = self.turns();
            // A change of two files may be two turns, one some time after the other.
            quiet = if now == last { quiet + 1 } else { 0 };
            if quiet >= 2 && now.iter().zip(before).all(|(now, before)| now > before) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the agents do not settle: {before:?}, then {now:?} turns");
            last = now;
            std::thread::sleep(Duration::from_millis(350));
        }
    }

    /// Changes the manifests and waits until the agents have acted on it.
    fn change(&mut self, f: impl FnOnce(&Topology, &mut Manifests) -> Result<()>) -> Result<()> {
        let before = self.turns();
        f(&self.t, &mut self.m)?;
        self.m.write()?;
        self.settled(&before)
    }

    /// Changes the manifests and goes on at once.
    fn write(&mut self, f: impl FnOnce(&Topology, &mut Manifests) -> Result<()>) -> Result<()> {
        f(&self.t, &mut self.m)?;
        self.m.write()
    }

    /// `meshlb show -o json` on a node.
    fn show(&self, node: u8) -> Result<Value> {
        let out = self.meshlb.run(self.t.node(node), &["show", "-o", "json"])?.ok()?.stdout;
        serde_json::from_str(&out).with_context(|| format!("show -o json says:\n{out}"))
    }

    /// A service's part of [`Cluster::show`].
    fn service(&self, node: u8, name: &str) -> Result<Value> {
        let report = self.show(node)?;
        let found = report["services"].as_array().and_then(|s| s.iter().find(|s| s["name"] == name));
        found.cloned().with_context(|| format!("no {name} in {report:#}"))
    }

    /// `meshlb plan` has nothing to say on any node. The entries of an endpoint that has drained go a moment after it.
    fn in_sync(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        all(self.t.nodes.iter().map(|node| {
            move || loop {
                let out = self.meshlb.run(node, &["plan"])?;
                // A line for each change, and one with their number.
                let leaving = |line: &str| {
                    line.starts_with("- set local ")
                        || line.starts_with("- set endpoints ")
                        || line.ends_with(" changes")
                };
                if out.status != 2 || !out.stdout.lines().all(leaving) || Instant::now() > end {
                    ensure!(out.status == 0, "not in sync on {}: {out}", node.name);
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }))?;
        Ok(())
    }

    /// Whether IPVS on a node has this destination, on any port.
    fn has_real(&self, node: u8, addr: IpAddr) -> Result<bool> {
        let listed = self.t.node(node).run(&["ipvsadm", "-Ln"])?.ok()?.stdout;
        let text = if addr.is_ipv4() { format!("-> {addr}:") } else { format!("-> [{addr}]:") };
        Ok(listed.contains(&text))
    }

    /// `SIGTERM` to all agents; they must end well.
    fn terminate(&mut self) -> Result<()> {
        for agent in self.agents.drain(..) {
            let status = agent.terminate(Duration::from_secs(5))?;
            ensure!(status == 0, "an agent ends with status {status} after SIGTERM");
        }
        Ok(())
    }

    /// `SIGKILL` to all agents.
    fn kill(&mut self) {
        self.agents.drain(..).for_each(Agent::kill);
    }
}

/// Writing commands that a node's agent has sent to the kernel since it started; none yet is 0.
fn writes(node: &Node) -> f64 {
    metric(node, "meshlb_kernel_writes_total").unwrap_or(0.0)
}

/// `publish` in full, for [`crate::manifests::Port::more`].
fn publish(mode: &str, port: u16) -> Value {
    json!({"mode": mode, "port": port})
}
