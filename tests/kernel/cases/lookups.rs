//! Names as programs look them up: by resolvers of glibc, musl and Go in pods.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use serde_json::json;

use super::dns::{SERVERS, ZONE, server, use_server, web_alone};
use super::support::{ready, start};
use crate::program::Agent;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::{Host, PodNetwork, Topology};

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(600);
    suite.add_slow("dns::round_robin", &Matrix::once(), limit, round_robin);
    suite.add_slow("dns::round_robin_on_a_bridge", &Matrix::once(), limit, on_a_bridge);
    suite.add_slow("dns::restarted_under_load", &Matrix::pair(), limit, under_load);
}

/// Programs that print what a resolver of another library finds, `tests/kernel/run.sh` builds them: musl's always, Go's where
/// there is a Go.
pub(super) fn resolvers() -> Result<Vec<String>> {
    let dir =
        std::env::var_os("MESHLB_RESOLVERS").context("MESHLB_RESOLVERS: tests/kernel/run.sh sets it")?;
    let [musl, go] = ["client-musl", "client-go"].map(|name| Path::new(&dir).join(name));
    ensure!(musl.exists(), "no {}", musl.display());
    let all = [musl, go].into_iter().filter(|path| path.exists());
    Ok(all.map(|path| path.to_string_lossy().into_owned()).collect())
}

/// Round robin by names: even, by weight; and what sorting by rule 9 of RFC 6724 makes of it.
fn round_robin(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder().nodes(2))?;
    let mut m = cx.manifests()?;
    let pods = ["p12", "p21", "p22"];
    let hosts: Vec<&Host> = pods.iter().map(|p| t.pod(p)).collect();
    for (name, answer) in [("shuffle", "Shuffle"), ("single", "Single"), ("weighted", "Single")] {
        let service = m.service(name);
        service.set("mode", json!("DNSRR")).set("dns", json!({"answer": answer, "ttlSeconds": 0}));
        service.port(Proto::Tcp, 8080, 8080, None);
        if name == "weighted" {
            service.set("weights", json!({"p12": 3, "p22": 0}));
        }
        m.endpoints(name, &hosts);
    }
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let p11 = t.pod("p11");
    let servers: Vec<&str> = SERVERS.to_vec();
    use_server(cx, p11, &servers[..1], ZONE, "ndots:1")?;
    // What is answered first by the server itself.
    let mut firsts: BTreeMap<IpAddr, usize> = BTreeMap::new();
    let at = SocketAddr::new(SERVERS[0].parse()?, 53);
    p11.ns.enter(|| {
        for _ in 0..MANY {
            let found = meshlb::dns::ask::addresses(at, &format!("shuffle.{ZONE}."), RecordType::AAAA);
            let found = found.map_err(anyhow::Error::msg)?;
            let [first, _, _] = found[..] else { bail!("not all: {found:?}") };
            *firsts.entry(first).or_default() += 1;
        }
        Ok(())
    })?;
    ensure!(is_even(&firsts), "not shuffled: {firsts:?}");
    cx.note(format!("Shuffle, first on the wire: {firsts:?}"));
    // IPv6 sorts by the longest matching prefix, and p12 is p11's neighbour.
    let skewed = p11.ns.enter(|| first_v6(&format!("shuffle.{ZONE}"), 300))?;
    cx.note(format!("Shuffle, chosen by getaddrinfo: {skewed:?}"));
    let near = t.pod("p12").ip(Family::V6);
    ensure!(skewed.get(&near) == Some(&300), "sorting was expected to choose {near} every time: {skewed:?}");
    // A thousand connections, each to what getaddrinfo gives first.
    let mut reached: BTreeMap<IpAddr, usize> = BTreeMap::new();
    for _ in 0..1002 {
        let chosen = p11.ns.enter(|| first_v6(&format!("single.{ZONE}"), 1))?;
        let address = *chosen.keys().next().context("none")?;
        let tally = p11.connect(Proto::Tcp, SocketAddr::new(address, 8080), 1)?;
        ensure!(tally.answered() == 1, "{tally}");
        *reached.entry(address).or_default() += 1;
    }
    cx.note(format!("Single, connected to: {reached:?}"));
    let even = reached.len() == 3 && reached.values().all(|n| (301..=367).contains(n));
    ensure!(even, "not within 10 %: {reached:?}");
    // And where nothing sorts.
    let v4 = first_v4(p11, &format!("shuffle.{ZONE}"), MANY)?;
    cx.note(format!("Shuffle over IPv4 with a /32 of the pod's own, chosen by getaddrinfo: {v4:?}"));
    ensure!(is_even(&v4), "not even: {v4:?}");
    let weighted = p11.ns.enter(|| first_v6(&format!("weighted.{ZONE}"), 400))?;
    cx.note(format!("weights 3, 1, 0: {weighted:?}"));
    let counts: BTreeSet<usize> = weighted.values().copied().collect();
    ensure!(counts == BTreeSet::from([100, 300]), "not by weight: {weighted:?}");
    // Each asks for IPv4 once: one round is one of each. What is lost is asked again, and is another's turn.
    for client in resolvers()? {
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..60 {
            let out = p11.run(&[&client, &format!("single.{ZONE}")])?.ok()?;
            *found.entry(out.stdout.trim().to_owned()).or_default() += 1;
        }
        cx.note(format!("Single, found by {client}: {found:?}"));
        ensure!(found.len() == 3 && found.values().all(|n| (18..=22).contains(n)), "{client}: {found:?}");
    }
    Ok(())
}

/// Look-ups whose outcome is chance.
const MANY: usize = 900;

/// Whether three had a third of [`MANY`] each, within a quarter: more than five times the standard deviation.
fn is_even(of: &BTreeMap<IpAddr, usize>) -> bool {
    of.len() == 3 && of.values().all(|n| (225..=375).contains(n))
}

/// A pod with the network of its node's other pods as its own (a /24) prefers those: glibc sorts by rule 9 of RFC 3484 in IPv4, too,
/// what is in a client's own subnet.
fn on_a_bridge(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let bridge = PodNetwork::Bridge { br_netfilter: true };
    let t = cx.topology(&Topology::builder().nodes(2).pod_network(bridge))?;
    let mut m = cx.manifests()?;
    let hosts: Vec<&Host> = ["p12", "p21", "p22"].iter().map(|p| t.pod(p)).collect();
    let service = m.service("shuffle");
    service.set("mode", json!("DNSRR")).set("dns", json!({"answer": "Shuffle", "ttlSeconds": 0}));
    service.port(Proto::Tcp, 8080, 8080, None);
    m.endpoints("shuffle", &hosts);
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let p11 = t.pod("p11");
    use_server(cx, p11, &SERVERS[..1], ZONE, "ndots:1")?;
    let first = first_v4(p11, &format!("shuffle.{ZONE}"), 100)?;
    cx.note(format!("Shuffle over IPv4 on a bridge, chosen by getaddrinfo: {first:?}"));
    let own = t.pod("p12").ip(Family::V4);
    ensure!(
        first == BTreeMap::from([(own, 100)]),
        "sorting was expected to choose {own} every time: {first:?}"
    );
    Ok(())
}

/// The first IPv6 address that getaddrinfo gives, in this thread's namespace.
fn first_v6(name: &str, n: usize) -> Result<BTreeMap<IpAddr, usize>> {
    let mut out = BTreeMap::new();
    for _ in 0..n {
        let mut found = (name, 80_u16).to_socket_addrs().with_context(|| name.to_owned())?;
        let first = found.find(|a| a.is_ipv6()).context("no IPv6 address")?;
        *out.entry(first.ip()).or_insert(0) += 1;
    }
    Ok(out)
}

fn first_v4(host: &Host, name: &str, n: usize) -> Result<BTreeMap<IpAddr, usize>> {
    host.ns.enter(|| {
        let mut out = BTreeMap::new();
        for _ in 0..n {
            let mut found = (name, 80_u16).to_socket_addrs().with_context(|| name.to_owned())?;
            let first = found.find(|a| a.is_ipv4()).context("no IPv4 address")?;
            *out.entry(first.ip()).or_insert(0) += 1;
        }
        Ok(out)
    })
}

/// Killed, ended and started again under load: nobody with the usual retry sees it.
fn under_load(cx: &mut Cx) -> Result<()> {
    let (meshlb, t, m, agent) = web_alone(cx)?;
    let n1 = t.node(1);
    // As resolv.conf(5) has it by default: 5 s, twice. Either family's server is asked.
    let hosts = [(t.pod("p11"), Family::V4), (t.pod("p12"), Family::V6)];
    for (host, family) in hosts {
        use_server(cx, host, &[server(family)], ZONE, "ndots:1")?;
    }
    let stop = AtomicBool::new(false);
    let loads = thread::scope(|scope| -> Result<Vec<(usize, Duration)>> {
        let mut all = Vec::new();
        for i in 0..7 {
            let (host, _) = hosts[i % 2];
            let stop = &stop;
            all.push(scope.spawn(move || host.ns.enter(|| repeat(stop, by_glibc))));
        }
        let (host, family) = hosts[1];
        let (stop, at) = (&stop, SocketAddr::new(server(family).parse()?, 53));
        all.push(scope.spawn(move || host.ns.enter(|| repeat(stop, || by_tcp(at)))));
        let restart = || -> Result<Agent> {
            let mut agent = agent;
            for by_kill in [true, false, true] {
                thread::sleep(Duration::from_secs(1));
                if by_kill {
                    agent.kill();
                } else {
                    agent.terminate(Duration::from_secs(20))?;
                }
                agent = meshlb.agent(n1, &m.dir)?;
                ready(n1, &mut agent)?;
                // A question that was lost is asked once more, 5 s later: that must not meet the next end.
                thread::sleep(Duration::from_secs(5));
            }
            Ok(agent)
        };
        let restarted = restart();
        stop.store(true, Ordering::Relaxed);
        let done = all.into_iter().map(|load| load.join().map_err(|_| anyhow::anyhow!("a load panicked"))?);
        let done = done.collect::<Result<Vec<_>>>();
        drop(restarted?);
        done
    })?;
    let asked: usize = loads.iter().map(|(n, _)| n).sum();
    let slowest = loads.iter().map(|(_, slowest)| *slowest).max().unwrap_or_default();
    cx.note(format!(
        "{asked} lookups by {} threads over three restarts, the slowest took {slowest:?}",
        loads.len()
    ));
    ensure!(loads.iter().all(|(n, _)| *n > 20), "too few lookups: {loads:?}");
    Ok(())
}

/// Looks names up until it is to stop; how often, and how long the slowest took.
fn repeat(stop: &AtomicBool, lookup: impl Fn() -> Result<Vec<IpAddr>>) -> Result<(usize, Duration)> {
    let vips: [IpAddr; 2] = ["10.200.0.5".parse()?, "fd00:200::5".parse()?];
    let (mut n, mut slowest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let found = lookup().with_context(|| format!("query {n}, after {:?}", begun.elapsed()))?;
        ensure!(!found.is_empty() && found.iter().all(|ip| vips.contains(ip)), "query {n}: {found:?}");
        slowest = slowest.max(begun.elapsed());
        n += 1;
        // Eight that never rest would leave the agent no processor to start on.
        thread::sleep(Duration::from_millis(10));
    }
    Ok((n, slowest))
}

fn by_glibc() -> Result<Vec<IpAddr>> {
    let name = format!("web.{ZONE}");
    let found = (name.as_str(), 80_u16).to_socket_addrs()?;
    Ok(found.map(|a| a.ip()).collect())
}

/// As a resolver with `use-vc` does: a connection that ends without an answer is made again.
fn by_tcp(at: SocketAddr) -> Result<Vec<IpAddr>> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from_ascii(format!("web.{ZONE}."))?, RecordType::A));
    let bytes = question.to_vec()?;
    let ask = || -> Result<Message> {
        let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&[&u16::try_from(bytes.len())?.to_be_bytes()[..], &bytes].concat())?;
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer)?;
        Ok(Message::from_vec(&answer)?)
    };
    let answer = ask().or_else(|_| ask()).or_else(|_| ask())?;
    Ok(answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect())
}
