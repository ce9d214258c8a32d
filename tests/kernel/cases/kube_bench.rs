//! From a change in the API server to the kernel of every node, and what an agent takes beside a kube-proxy.
//! `tests/cluster/bench.sh` makes the services, runs this once with few and once with many, and divides.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use meshlb::dataplane::Ipvs as _;
use meshlb::dataplane::ipvs::KernelIpvs;
use meshlb::model::ids::{Family as ModelFamily, Mark};
use meshlb::model::kernel::VirtualServerKey;
use serde_json::{Value, json};

use super::kube_proxy::{clear_proxy, start_proxy};
use super::support::{http, metric, wait_until};
use crate::kube::Kube;
use crate::runner::{Cx, Matrix, Renderer, Suite};
use crate::topology::{Node, Topology};

/// How many services there are.
const SERVICES: &str = "MESHLB_KUBE_BENCH";
/// Changes that are measured, of this many services in turn.
const CHANGES: usize = 200;
const CHANGED: usize = 10;
/// On an emulated machine reading thousands of objects takes minutes.
const PATIENCE: Duration = Duration::from_secs(900);

pub fn register(suite: &mut Suite) {
    if std::env::var_os(SERVICES).is_none_or(|n| n.is_empty()) {
        return;
    }
    let matrix = Matrix::once().with_renderers(&[Renderer::IptablesNft]);
    suite.add_slow("kube_bench::row", &matrix, Duration::from_secs(3000), row);
}

/// One of the five endpoints of service `n`, as bench.sh has made them.
fn endpoint(n: usize, i: usize) -> Ipv4Addr {
    let at = n * 5 + i;
    // Below 256 each, for up to 13,107 services.
    Ipv4Addr::new(10, 100, (at / 256 % 256) as u8, (at % 256) as u8)
}

/// The five endpoints of service `n` and another one.
fn slice(n: usize, more: Ipv4Addr) -> Value {
    let all = (0..5).map(|i| endpoint(n, i)).chain([more]);
    let endpoints: Vec<Value> =
        all.map(|a| json!({"addresses": [a.to_string()], "conditions": {"ready": true}})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("s{n:05}"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{n:05}")}},
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    })
}

/// Marks of the services that change, on this node: found by their first endpoints. (`show` takes minutes to print thousands of
/// services on an emulated machine.)
fn marks(ipvs: &mut KernelIpvs) -> Result<BTreeMap<usize, Mark>> {
    let servers = ipvs.dump(&|_| true)?;
    let find = |n: usize| {
        let first = IpAddr::from(endpoint(n, 0));
        let found = servers.iter().find(|(_, server)| server.reals.keys().any(|real| real.addr == first));
        Ok((n, found.with_context(|| format!("no service leads to {first}"))?.0.mark))
    };
    (0..CHANGED).map(find).collect()
}

/// Says when it is ready, and then when each destination that is asked for is there.
fn look(node: &Node, wanted: Receiver<(usize, IpAddr)>, seen: Sender<Instant>) -> Result<()> {
    node.ns.enter(move || {
        let mut ipvs = KernelIpvs::open()?;
        let marks = marks(&mut ipvs)?;
        seen.send(Instant::now())?;
        for (service, addr) in wanted {
            let key = VirtualServerKey { family: ModelFamily::V4, mark: marks[&service] };
            let end = Instant::now() + Duration::from_secs(60);
            while !ipvs.reals(key)?.keys().any(|real| real.addr == addr) {
                ensure!(Instant::now() < end, "{}: {addr} is not there after a minute", node.name);
                thread::sleep(Duration::from_millis(2));
            }
            seen.send(Instant::now())?;
        }
        Ok(())
    })
}

/// Resident memory in MiB: now, and at most (proc(5)).
fn memory(pid: u32) -> Result<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).context("no such field")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

fn row(cx: &mut Cx) -> Result<()> {
    let services: usize = std::env::var(SERVICES)?.parse()?;
    let kube = Kube::find()?;
    let t = cx.topology(&Topology::builder())?;
    let kubeconfig = kube.kubeconfig_of_nodes(&cx.dir)?;
    let meshlb = cx.meshlb()?.clone().flag(&format!("--kubeconfig={}", kubeconfig.display()));
    let (mut relays, mut agents) = (Vec::new(), Vec::new());
    for node in &t.nodes {
        cx.will_clean(node);
        relays.push(kube.relay(&node.ns)?);
        agents.push(meshlb.start(node, &["agent", "--source", "kube"], "agent.log")?);
    }
    wait_until("every node has programmed all", PATIENCE, || {
        let is = |node: &Node, series: &str, value: f64| metric(node, series).is_ok_and(|v| v == value);
        Ok(t.nodes
            .iter()
            .all(|node| is(node, "meshlb_services", services as f64) && is(node, "meshlb_in_sync", 1.0)))
    })?;
    let mut times = thread::scope(|scope| -> Result<Vec<Duration>> {
        let mut lookers = Vec::new();
        for node in &t.nodes {
            let ((wanted, wants), (sees, seen)) = (channel(), channel());
            lookers.push((wanted, seen, scope.spawn(move || look(node, wants, sees))));
        }
        // They have found what to look at.
        for (_, seen, _) in &lookers {
            seen.recv_timeout(Duration::from_secs(120))?;
        }
        let mut times = Vec::new();
        for i in 0..CHANGES {
            let number = u8::try_from(i % 250)?;
            let more = Ipv4Addr::new(10, 245, number, u8::try_from(services % 251)? + 1);
            lookers.iter().try_for_each(|(wanted, ..)| wanted.send((i % CHANGED, more.into())))?;
            let begun = Instant::now();
            kube.apply(&slice(i % CHANGED, more))?;
            let mut last = begun;
            for (_, seen, _) in &lookers {
                last = last.max(seen.recv_timeout(Duration::from_secs(70))?);
            }
            times.push(last.duration_since(begun));
            thread::sleep(Duration::from_millis(100));
        }
        for (wanted, _, looker) in lookers {
            drop(wanted);
            match looker.join() {
                Ok(done) => done?,
                Err(_) => anyhow::bail!("a looker panicked"),
            }
        }
        Ok(times)
    })?;
    times.sort();
    let ms = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1000.0;
    println!("bench: latency {services} {:.1} {:.1}", ms(50), ms(99));
    let (now, most) = memory(agents[0].pid())?;
    println!("bench: agent {services} {now:.1} {most:.1}");
    // The other program has its Services too, and runs where ours has been.
    drop(agents);
    let mut proxy = start_proxy(t.node(1), "nftables", &kubeconfig)?;
    wait_until("kube-proxy has written its rules", PATIENCE, || {
        ensure!(proxy.alive(), "kube-proxy has ended:\n{}", proxy.log_text());
        let Ok((200, text)) = http(t.node(1), "127.0.0.1:10249", "/metrics") else { return Ok(false) };
        let synced =
            text.lines().find_map(|l| l.strip_prefix("kubeproxy_sync_proxy_rules_last_timestamp_seconds"));
        Ok(synced.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).is_some_and(|at| at > 0.0))
    })?;
    let (now, most) = memory(proxy.pid())?;
    println!("bench: kube-proxy {services} {now:.1} {most:.1}");
    drop(proxy);
    clear_proxy(t.node(1), "nftables")
}
