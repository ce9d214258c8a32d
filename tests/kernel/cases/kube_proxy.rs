//! The real kube-proxy on the same nodes, in each of its modes, there before us and started after us: its Services and ours go
//! on working, and neither takes away what is the other's.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::kube::bed::{Bed, Granted, endpoints, granted, service, works};
use super::support::{metric, wait_until_ok};
use crate::check;
use crate::client::{Load, Probe};
use crate::kube::KUBECONFIG;
use crate::program::Agent;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::topology::{Host, Node, Topology};

pub fn register(suite: &mut Suite) {
    if program().is_none() {
        return;
    }
    // Ours by the same means as theirs, where there is a choice.
    let with = |renderer| Matrix::once().with_renderers(&[renderer]);
    let limit = Duration::from_secs(900) + 2 * time_together();
    suite.add_slow("kube_proxy::iptables", &with(Renderer::IptablesNft), limit, |cx| beside(cx, "iptables"));
    suite.add_slow("kube_proxy::nftables", &with(Renderer::Nftables), limit, |cx| beside(cx, "nftables"));
    suite.add_slow("kube_proxy::ipvs", &with(Renderer::IptablesNft), limit, |cx| beside(cx, "ipvs"));
}

/// packets.sh puts it beside the kubeconfig.
fn program() -> Option<PathBuf> {
    let kubeconfig = std::env::var_os(KUBECONFIG).filter(|file| !file.is_empty())?;
    Some(Path::new(&kubeconfig).with_file_name("kube-proxy")).filter(|file| file.exists())
}

/// kube-proxy takes most of a minute to its first rules on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long both run side by side, in each order: `MESHLB_TOGETHER_SECONDS`, or two minutes. Both compare the whole state every
/// ten seconds.
fn time_together() -> Duration {
    let given = std::env::var("MESHLB_TOGETHER_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(given.unwrap_or(120))
}

const CLUSTER_IP: &str = "10.96.77.80:80";
const NODE_PORT: u16 = 30900;
const LOCAL_NODE_PORT: u16 = 30901;
const THEIRS: [&str; 3] = ["p11", "p22", "p31"];

/// A Service without a selector, whose endpoints are ours to write.
fn core_service(name: &str, node_port: u16, policy: &str) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"type": "NodePort", "externalTrafficPolicy": policy,
            "ports": [{"port": 80, "targetPort": 8080, "nodePort": node_port}]},
    });
    if name == "web" {
        service["spec"]["clusterIP"] = json!("10.96.77.80");
    }
    service
}

fn core_slice(name: &str, pods: &[&Host]) -> Value {
    let endpoint =
        |pod: &&Host| json!({"addresses": [pod.ip(Family::V4).to_string()], "nodeName": node_of(pod)});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

fn node_of(pod: &Host) -> String {
    format!("n{}", &pod.name[1..2])
}

/// kube-proxy on a node.
pub(super) fn start_proxy(node: &Node, mode: &str, kubeconfig: &Path) -> Result<Agent> {
    let program = program().context("no kube-proxy")?;
    std::fs::create_dir_all(&node.dir)?;
    let flag = |name: &str, value: &str| format!("--{name}={value}");
    let command = [
        program.display().to_string(),
        flag("kubeconfig", &kubeconfig.display().to_string()),
        flag("hostname-override", &node.name),
        flag("cluster-cidr", "10.244.0.0/16"),
        flag("proxy-mode", mode),
        flag("iptables-sync-period", "10s"),
        flag("ipvs-sync-period", "10s"),
        // These are the whole machine's.
        flag("conntrack-max-per-core", "0"),
    ];
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    Agent::spawn(&node.ns, &command, &[], node.dir.join("kube-proxy.log"))
}

/// Removes what kube-proxy has programmed on a node. After its ipvs mode it can't delete chains of its other modes to which it still
/// jumps from chains of that mode, says so and ends with 1, without us too: the second time there is nothing in the way.
pub(super) fn clear_proxy(node: &Node, mode: &str) -> Result<()> {
    let program = program().context("no kube-proxy")?.display().to_string();
    let clean = || node.ns.run_with(&[&program, "--cleanup"], "", PATIENCE);
    if mode == "ipvs" {
        clean()?;
    }
    clean()?.ok().map(drop)
}

/// kube-proxy on every node.
struct Proxies {
    mode: &'static str,
    running: Vec<Agent>,
}

impl Proxies {
    fn start(t: &Topology, mode: &'static str, kubeconfig: &Path) -> Result<Proxies> {
        let start = |node| start_proxy(node, mode, kubeconfig);
        Ok(Proxies { mode, running: t.nodes.iter().map(start).collect::<Result<_>>()? })
    }

    /// Ends them and takes out what they have programmed, as one does who changes the mode.
    fn stop(self, t: &Topology) -> Result<()> {
        drop(self.running);
        t.nodes.iter().try_for_each(|node| clear_proxy(node, self.mode))
    }

    fn alive(&mut self) -> Result<()> {
        for proxy in &mut self.running {
            ensure!(proxy.alive(), "kube-proxy in {} mode has ended:\n{}", self.mode, proxy.log_text());
        }
        Ok(())
    }
}

/// ClusterIP, NodePort and NodePort with policy Local.
fn theirs_work(t: &Topology) -> Result<()> {
    let cluster_ip: SocketAddr = CLUSTER_IP.parse()?;
    for from in [t.pod("p12"), t.pod("p32"), t.node(2)] {
        check::among(&from.connect(Proto::Tcp, cluster_ip, 6)?, &THEIRS).context("ClusterIP")?;
    }
    for node in &t.nodes {
        check::among(&t.ext.connect(Proto::Tcp, node.at(Family::V4, NODE_PORT), 6)?, &THEIRS)
            .context("NodePort")?;
    }
    // p22 alone, which is no endpoint of ours: by its own node, with the client's address kept.
    let tally = t.ext.connect(Proto::Tcp, t.node(2).at(Family::V4, LOCAL_NODE_PORT), 4)?;
    check::only(&tally, "p22").context("NodePort, policy Local")?;
    check::seen_as(&tally, &[t.ext.ip(Family::V4)]).context("NodePort, policy Local")
}

/// Ours, theirs, and no way from one to the other.
fn both_work(t: &Topology, given: &Granted, ours: &[&str]) -> Result<()> {
    works(t, given, ours).context("a MeshService")?;
    theirs_work(t).context("a core Service")?;
    for vip in &given.vips {
        let node_port = SocketAddr::new(vip.ip(), NODE_PORT);
        for from in [t.pod("p12"), t.node(1)] {
            check::refused(&from.connect(Proto::Tcp, node_port, 2)?).context("their node port at our VIP")?;
        }
    }
    Ok(())
}

fn together(t: &Topology, given: &Granted, ours: &[&str], proxies: &mut Proxies) -> Result<String> {
    let drift = || t.nodes.iter().map(|node| metric(node, "meshlb_drift_total")).sum::<Result<f64>>();
    let slow = |dst: SocketAddr| Probe { pause: Duration::from_millis(100), ..Probe::new(Proto::Tcp, dst) };
    let before = drift()?;
    let loads = [
        Load::start(&t.pod("p12").ns, &slow(given.vips[0]), 1),
        Load::start(&t.ext.ns, &slow(t.node(3).at(Family::V4, given.ports[0])), 1),
        Load::start(&t.pod("p32").ns, &slow(CLUSTER_IP.parse()?), 1),
        Load::start(&t.ext.ns, &slow(t.node(1).at(Family::V4, NODE_PORT)), 1),
    ];
    let together = time_together();
    std::thread::sleep(together);
    let mut connections = 0;
    for (what, load) in
        ["our VIP", "our published port", "their ClusterIP", "their NodePort"].iter().zip(loads)
    {
        let report = load.stop()?;
        ensure!(
            report.errors.is_empty() && report.answered() > 100,
            "{what}, {together:?} together: {report:?}"
        );
        connections += report.answered();
    }
    both_work(t, given, ours)?;
    proxies.alive()?;
    let drifted = drift()? - before;
    ensure!(drifted == 0.0, "{drifted} changes of what is ours, by kube-proxy in {} mode", proxies.mode);
    Ok(format!("{together:?} together: {connections} connections, 0 errors, nothing of ours changed"))
}

fn beside(cx: &mut Cx, mode: &'static str) -> Result<()> {
    // kube-proxy leaves sysctls behind.
    cx.taint();
    let mut bed = Bed::without_agents(cx)?;
    bed.add_flag("--resync=10");
    let t = bed.t.clone();
    // As by a default route, which the bed's nodes have not: a node's own connection to a ClusterIP needs one before NAT sees it.
    for node in &t.nodes {
        node.run(&["ip", "route", "add", "10.96.0.0/16", "dev", "eth0"])?.ok()?;
    }
    let objects = [
        core_service("web", NODE_PORT, "Cluster"),
        core_service("near", LOCAL_NODE_PORT, "Local"),
        core_slice("web", &THEIRS.map(|name| t.pod(name))),
        core_slice("near", &[t.pod("p22")]),
    ];
    for object in &objects {
        bed.kube.apply(object)?;
    }
    let done = told(cx, &mut bed, mode);
    for object in objects.iter().rev() {
        bed.kube.delete(object)?;
    }
    if done.is_err() {
        for node in &t.nodes {
            let log = std::fs::read_to_string(node.dir.join("kube-proxy.log")).unwrap_or_default();
            let end: Vec<&str> = log.lines().rev().take(5).collect();
            cx.note(format!("kube-proxy on {}: {}", node.name, end.join("\n")));
        }
    }
    done.and_then(|()| bed.end())
}

fn told(cx: &mut Cx, bed: &mut Bed, mode: &'static str) -> Result<()> {
    let (t, ours) = (bed.t.clone(), ["p11", "p21", "p31"]);
    let t = &*t;
    let kubeconfig = bed.kube.kubeconfig_of_nodes(&cx.dir)?;
    // They are there first.
    let mut proxies = Proxies::start(t, mode, &kubeconfig)?;
    let took = settled("their Services work without us", || theirs_work(t))?;
    cx.note(format!("kube-proxy works after {took:?}"));
    bed.kube.apply(&service())?;
    endpoints(&bed.kube, t, &ours)?;
    let given = granted(&bed.kube, &service())?;
    (1..=3).try_for_each(|k| bed.start_agent(k))?;
    settled("both work, kube-proxy first", || both_work(t, &given, &ours))?;
    cx.note(together(t, &given, &ours, &mut proxies).context("kube-proxy first")?);
    // They go, with all that is theirs. IPVS goes as a whole when they do, and comes back.
    proxies.stop(t)?;
    let took = settled("ours work when kube-proxy has cleaned up", || works(t, &given, &ours))?;
    cx.note(format!("ours work {took:?} after kube-proxy's cleanup"));
    // They come second.
    let mut proxies = Proxies::start(t, mode, &kubeconfig)?;
    settled("both work, kube-proxy second", || both_work(t, &given, &ours))?;
    cx.note(together(t, &given, &ours, &mut proxies).context("kube-proxy second")?);
    bed.alive()?;
    // We go, and nothing of theirs with us.
    let before: Vec<_> = t.nodes.iter().map(|node| theirs(node, mode)).collect::<Result<_>>()?;
    (1..=3).try_for_each(|k| bed.take_agent(k).map(drop))?;
    cx.cleanup(t)?;
    theirs_work(t).context("core Services after our cleanup")?;
    for (node, before) in t.nodes.iter().zip(before) {
        let now = theirs(node, mode)?;
        ensure!(
            now == before,
            "{}: our cleanup has changed what is kube-proxy's:\n{before}\nthen\n{now}",
            node.name
        );
    }
    proxies.alive()?;
    proxies.stop(t)
}

/// Tries until it holds.
fn settled(what: &str, f: impl Fn() -> Result<()>) -> Result<Duration> {
    wait_until_ok(what, PATIENCE, f)
}

/// What kube-proxy has programmed, without counters.
fn theirs(node: &Node, mode: &str) -> Result<String> {
    let script = match mode {
        "nftables" => "nft -s list table ip kube-proxy | grep -v counter",
        "ipvs" => {
            "ipvsadm -Sn | grep -v -- '-f'; ipset list -n | grep KUBE | sort; iptables-save -t nat | grep -e '-A KUBE'"
        }
        _ => "iptables-save -t nat | grep -e '-A KUBE'",
    };
    let out = node.run(&["bash", "-c", script])?.ok()?.stdout;
    ensure!(!out.trim().is_empty(), "{}: nothing of kube-proxy's is there", node.name);
    Ok(out)
}
