//! Endpoints that are not ready, go away and come back.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde_json::json;

use super::{Cluster, PROTOS, VIPS, serve_from, two_nodes, vip, wait_until, web};
use crate::check;
use crate::client::{FlowReport, Flows, Probe};
use crate::machine::patience;
use crate::manifests::Endpoint;
use crate::runner::{Cx, Family, Matrix, Proto, Skip, Suite};
use crate::topology::Host;

pub fn register(suite: &mut Suite) {
    suite.add("lifecycle::not_ready_gets_nothing", &Matrix::pair(), not_ready);
    suite.add("lifecycle::drain_to_the_deadline", &Matrix::pair().families(), drain_to_the_deadline);
    suite.add("lifecycle::half_closed_drains", &Matrix::pair(), |cx| half_closed(cx, &["p11"]));
    suite.add("lifecycle::half_closed_drains_the_last", &Matrix::pair(), |cx| half_closed(cx, &[]));
    suite.add("lifecycle::drain_ends_early", &Matrix::pair(), drain_ends_early);
    suite.add("lifecycle::drain_over_a_restart", &Matrix::pair(), drain_over_restart);
    suite.add("lifecycle::drain_with_hashing", &Matrix::pair(), hashing);
    suite.add("lifecycle::published_ends_with_its_endpoint", &Matrix::pair(), published_ends);
    suite.add("lifecycle::sctp_drains", &Matrix::pair(), sctp_drains);
    suite.add("lifecycle::udp_client_moves", &Matrix::pair(), udp_moves);
    suite.add("lifecycle::udp_client_of_a_moved_vip", &Matrix::pair(), udp_vip_moves);
}

/// How long a client of UDP waits before it sends again.
const UDP_PATIENCE: Duration = Duration::from_millis(700);

/// What these pods answer from both sides.
fn served_by(c: &Cluster, servers: &[&str]) -> Result<()> {
    for family in Family::ALL {
        for proto in PROTOS {
            check::even(&c.t.pod("p11").connect(proto, vip(family, 80)?, 8)?, servers)?;
            check::even(&c.t.ext.connect(proto, c.t.node(1).at(family, 30080), 8)?, servers)?;
        }
    }
    Ok(())
}

fn not_ready(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p12", "p21", "p22"]))?;
    served_by(&c, &["p11", "p12", "p21", "p22"])?;
    let set = |c: &mut Cluster, change: fn(Endpoint, &Host) -> Endpoint| {
        c.change(|t, m| {
            for family in Family::ALL {
                let endpoints = t.pods.iter().map(|p| change(Endpoint::of(p, family), p)).collect();
                m.slice("web", family, endpoints);
            }
            Ok(())
        })
    };
    // Not ready, and terminating while others are ready: nothing.
    set(&mut c, |e, pod| match pod.name.as_str() {
        "p12" => e.not_ready(),
        "p22" => e.terminating(true),
        _ => e,
    })?;
    served_by(&c, &["p11", "p21"])?;
    // None is ready, but some still serve while they terminate.
    set(&mut c, |e, pod| e.terminating(pod.node == 2))?;
    served_by(&c, &["p21", "p22"])?;
    set(&mut c, |e, _| e)?;
    served_by(&c, &["p11", "p12", "p21", "p22"])
}

fn slow(c: &Cluster, on: &Host, proto: Proto, family: Family, published: bool, n: usize) -> Result<Flows> {
    let to = if published { c.t.node(1).at(family, 30080) } else { vip(family, 80)? };
    // A client of UDP gives up soon and sends again; TCP waits for machines that stall.
    let patience = if proto == Proto::Udp { UDP_PATIENCE } else { Duration::from_secs(3) };
    let probe = Probe::new(proto, to).within(patience);
    Flows::start(&on.ns, &probe, n, Duration::from_millis(50))
}

fn of<'a>(flows: &'a [FlowReport], server: &'a str) -> impl Iterator<Item = &'a FlowReport> {
    flows.iter().filter(move |f| f.servers.first().is_some_and(|s| s == server))
}

/// Established flows of removed endpoints go on until the deadline, by VIP and by published port; nothing new gets there.
/// One of the endpoints comes back meanwhile and keeps its flows.
fn drain_to_the_deadline(cx: &mut Cx) -> Result<()> {
    let family = cx.family();
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p12", "p21", "p22"])?;
        m.service("web").set("drain", json!({"timeoutSeconds": 15}));
        Ok(())
    })?;
    let inside = slow(&c, c.t.pod("p11"), Proto::Tcp, family, false, 4)?;
    let outside = slow(&c, &c.t.ext, Proto::Tcp, family, true, 4)?;
    let begun = Instant::now();
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11", "p12"]);
        Ok(())
    })?;
    let removed = begun.elapsed();
    for (from, to) in [(c.t.pod("p11"), vip(family, 80)?), (&c.t.ext, c.t.node(1).at(family, 30080))] {
        check::even(&from.connect(Proto::Tcp, to, 8)?, &["p11", "p12"])?;
    }
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11", "p12", "p22"]);
        Ok(())
    })?;
    check::even(&c.t.pod("p11").connect(Proto::Tcp, vip(family, 80)?, 6)?, &["p11", "p12", "p22"])?;
    for flow in inside.now().iter().chain(&outside.now()) {
        ensure!(flow.errors.is_empty() && flow.exchanges > 5, "a flow ended before the deadline: {flow:?}");
    }
    wait_until("the drained endpoint is out of IPVS", Duration::from_secs(20), || {
        Ok(!c.has_real(1, c.t.pod("p21").ip(family))?)
    })?;
    let over = begun.elapsed();
    cx.note(format!("removed after {removed:?}, out of IPVS after {over:?}"));
    ensure!(over > Duration::from_secs(14), "the drain ended early: {over:?}");
    std::thread::sleep(Duration::from_secs(2));
    for (what, flows) in [("inside", inside.stop()?), ("outside", outside.stop()?)] {
        for server in ["p11", "p12", "p22"] {
            ensure!(of(&flows, server).count() == 1, "{what}: {flows:?}");
            for flow in of(&flows, server) {
                ensure!(flow.errors.is_empty() && flow.servers.len() == 1, "{what}: {flow:?}");
            }
        }
        for flow in of(&flows, "p21") {
            cx.note(format!("{what}: the drained flow: {:?}", flow.errors));
            let first = flow.errors.first().map(|(at, _)| *at);
            ensure!(flow.servers == ["p21"], "{what}: the flow moved: {flow:?}");
            ensure!(
                first.is_some_and(|at| at > Duration::from_secs(14)),
                "{what}: must go on to the deadline and then end: {flow:?}"
            );
        }
    }
    c.in_sync()
}

/// A client that has said all and still reads: IPVS counts its connection among the inactive ones, and it goes on all the
/// same, whether other endpoints are left (`p11`) or none.
fn half_closed(cx: &mut Cx, left: &[&str]) -> Result<()> {
    const PORT: u16 = 9090;
    let answers_after = Duration::from_secs(8);
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        let service = m.service("web").vips(&VIPS)?;
        // Not published: conntrack is asked about published ports in any case.
        service.port(Proto::Tcp, 80, PORT, None).set("drain", json!({"timeoutSeconds": 20}));
        serve_from(t, m, "web", &["p21"]);
        Ok(())
    })?;
    let begun = Instant::now();
    let mut clients = Vec::new();
    for family in Family::ALL {
        let here = SocketAddr::new(c.t.pod("p21").ip(family), PORT);
        let listener = c.t.pod("p21").ns.enter(|| Ok(TcpListener::bind(here)?))?;
        let sides = [(c.t.pod("p11"), vip(family, 80)?), (c.t.node(1), vip(family, 80)?)];
        let count = sides.len();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().take(count).flatten() {
                std::thread::spawn(move || -> std::io::Result<()> {
                    stream.read_to_end(&mut Vec::new())?;
                    std::thread::sleep(answers_after);
                    stream.write_all(b"late")
                });
            }
        });
        for (from, to) in sides {
            let mut stream =
                from.ns.enter(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(4))?))?;
            stream.set_read_timeout(Some(answers_after * 2))?;
            stream.shutdown(Shutdown::Write)?;
            clients.push((
                to,
                std::thread::spawn(move || {
                    let mut said = String::new();
                    stream.read_to_string(&mut said).map(|_| said)
                }),
            ));
        }
    }
    c.change(|t, m| {
        serve_from(t, m, "web", left);
        Ok(())
    })?;
    ensure!(begun.elapsed() < answers_after, "too slow a machine: removed after {:?}", begun.elapsed());
    for (to, client) in clients {
        let said = client.join().map_err(|_| anyhow!("a client panicked"))?;
        ensure!(said.as_ref().is_ok_and(|s| s == "late"), "by {to}: {said:?}");
    }
    wait_until("the drained endpoint is out of IPVS", Duration::from_secs(12), || {
        Ok(!c.has_real(1, c.t.pod("p21").ip(Family::V4))? && !c.has_real(1, c.t.pod("p21").ip(Family::V6))?)
    })?;
    cx.note(format!("out of IPVS after {:?}", begun.elapsed()));
    c.in_sync()
}

/// Schedulers that choose by address go on choosing an endpoint that drains: the client then gets another one, and is not refused.
fn hashing(cx: &mut Cx) -> Result<()> {
    let all = ["p11", "p12", "p21", "p22"];
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &all))?;
    for name in ["mh", "sh", "dh"] {
        c.change(|t, m| {
            m.service("web").set("scheduler", json!(name));
            serve_from(t, m, "web", &all);
            Ok(())
        })?;
        let (v4, v6) = (vip(Family::V4, 80)?, vip(Family::V6, 80)?);
        // The endpoint that this client is led to goes, with a connection of it open.
        let from = c.t.pod("p12");
        let chosen = from.connect(Proto::Tcp, v4, 1)?.servers.keys().next().cloned();
        let chosen = chosen.ok_or_else(|| anyhow!("{name}: nobody answers"))?;
        let flows = slow(&c, c.t.pod("p12"), Proto::Tcp, Family::V4, false, 2)?;
        let left: Vec<&str> = all.into_iter().filter(|pod| *pod != chosen).collect();
        c.change(|t, m| {
            serve_from(t, m, "web", &left);
            Ok(())
        })?;
        ensure!(
            name == "dh" || c.has_real(1, c.t.pod(&chosen).ip(Family::V4))?,
            "{name}: {chosen} does not drain"
        );
        for client in ["p11", "p12", "p21", "p22"] {
            for to in [v4, v6] {
                check::among(&c.t.pod(client).connect(Proto::Tcp, to, 3)?, &left)?;
            }
        }
        for family in Family::ALL {
            check::among(&c.t.ext.connect(Proto::Tcp, c.t.node(1).at(family, 30080), 3)?, &left)?;
        }
        let flows = flows.stop()?;
        ensure!(name == "dh" || flows.iter().all(|f| f.errors.is_empty()), "{name}: {flows:?}");
    }
    c.in_sync()
}

/// Where nothing is to drain, a connection by a published port ends with its endpoint, as one by the VIP does; and with the port,
/// and with the service. The others go on.
fn published_ends(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p12", "p21"])?;
        m.service("web").set("drain", json!({"timeoutSeconds": 0}));
        Ok(())
    })?;
    let published = |c: &Cluster| -> Result<Vec<Flows>> {
        Family::ALL.into_iter().map(|family| slow(c, &c.t.ext, Proto::Tcp, family, true, 6)).collect()
    };
    let ended = |what: &str, flows: Vec<Flows>, goes_on: &[&str]| -> Result<()> {
        std::thread::sleep(Duration::from_millis(4500));
        for flow in flows.into_iter().map(Flows::stop).collect::<Result<Vec<_>>>()?.iter().flatten() {
            let server = flow.servers.first().map(String::as_str).unwrap_or_default();
            let fine = flow.errors.is_empty();
            ensure!(fine == goes_on.contains(&server) && flow.servers.len() == 1, "{what}: {flow:?}");
        }
        Ok(())
    };
    let flows = published(&c)?;
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11", "p12"]);
        Ok(())
    })?;
    ended("an endpoint is gone", flows, &["p11", "p12"])?;
    let flows = published(&c)?;
    c.change(|_, m| {
        m.service("web").set("drain", json!({"timeoutSeconds": 30}));
        m.service("web").ports.iter_mut().for_each(|p| p.publish = None);
        Ok(())
    })?;
    ended("nothing is published", flows, &[])?;
    c.change(|_, m| {
        m.service("web").ports.iter_mut().for_each(|p| p.publish = Some(30080));
        Ok(())
    })?;
    let flows = published(&c)?;
    c.change(|_, m| {
        m.remove("web");
        Ok(())
    })?;
    ended("the service is gone", flows, &[])?;
    c.in_sync()
}

/// An association over SCTP goes on to the deadline, as a TCP connection does, and new ones go elsewhere.
fn sctp_drains(cx: &mut Cx) -> Result<()> {
    if !Proto::Sctp.available() {
        return Err(Skip("this kernel has no SCTP".to_owned()).into());
    }
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        let service = m.service("web").vips(&VIPS)?;
        service.port(Proto::Sctp, 80, 8080, Some(30080)).set("drain", json!({"timeoutSeconds": 8}));
        serve_from(t, m, "web", &["p11", "p21"]);
        Ok(())
    })?;
    let inside = slow(&c, c.t.pod("p11"), Proto::Sctp, Family::V4, false, 2)?;
    let outside = slow(&c, &c.t.ext, Proto::Sctp, Family::V4, true, 2)?;
    let begun = Instant::now();
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11"]);
        Ok(())
    })?;
    let address = vip(Family::V4, 80)?;
    check::only(&c.t.pod("p12").connect(Proto::Sctp, address, 4)?, "p11")?;
    wait_until("the drained endpoint is out of IPVS", Duration::from_secs(20), || {
        Ok(!c.has_real(1, c.t.pod("p21").ip(Family::V4))?)
    })?;
    let over = begun.elapsed();
    ensure!(over > Duration::from_secs(7), "the drain ended early: {over:?}");
    for (what, flows) in [("inside", inside.stop()?), ("outside", outside.stop()?)] {
        ensure!(of(&flows, "p11").count() == 1 && of(&flows, "p21").count() == 1, "{what}: {flows:?}");
        for flow in &flows {
            let first = flow.errors.first().map(|(at, _)| *at);
            let early = first.is_some_and(|at| at < Duration::from_secs(7));
            ensure!(!early && flow.servers.len() == 1, "{what}: a flow ended before the deadline: {flow:?}");
        }
    }
    c.in_sync()
}

/// When the last connection is gone, so is the endpoint, long before the deadline: IPv4 by the virtual IP, IPv6 by the published
/// port.
fn drain_ends_early(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p21"])?;
        m.service("web").set("drain", json!({"timeoutSeconds": 600}));
        Ok(())
    })?;
    let flows = [
        slow(&c, c.t.pod("p11"), Proto::Tcp, Family::V4, false, 2)?,
        slow(&c, &c.t.ext, Proto::Tcp, Family::V6, true, 2)?,
    ];
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11"]);
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(2500));
    let (v4, v6) = (c.t.pod("p21").ip(Family::V4), c.t.pod("p21").ip(Family::V6));
    for addr in [v4, v6] {
        ensure!(c.has_real(1, addr)?, "{addr} went while it had a connection");
    }
    let states = c.service(1, "web")?;
    ensure!(states.to_string().contains("\"draining\""), "show has no draining endpoint: {states:#}");
    ensure!(!c.has_real(2, v4)? && !c.has_real(2, v6)?, "kept where it had no connection");
    for flows in flows {
        let flows = flows.stop()?;
        ensure!(flows.iter().all(|f| f.errors.is_empty()), "{flows:?}");
    }
    let took =
        wait_until("the endpoint is let go after its last connection", Duration::from_secs(6), || {
            Ok(!c.has_real(1, v4)? && !c.has_real(1, v6)?)
        })?;
    cx.note(format!("let go {took:?} after its last connection"));
    c.in_sync()
}

/// The deadline survives the agent, and `timeoutSeconds: 0` cuts at once.
fn drain_over_restart(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p12", "p21"])?;
        m.service("web").set("drain", json!({"timeoutSeconds": 15}));
        Ok(())
    })?;
    let flows = slow(&c, c.t.pod("p11"), Proto::Tcp, Family::V4, false, 3)?;
    let published = slow(&c, &c.t.ext, Proto::Tcp, Family::V6, true, 3)?;
    let begun = Instant::now();
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11", "p12"]);
        Ok(())
    })?;
    c.kill();
    c.start_agents()?;
    let p21 = Family::ALL.map(|family| c.t.pod("p21").ip(family));
    check::even(&c.t.pod("p11").connect(Proto::Tcp, vip(Family::V4, 80)?, 6)?, &["p11", "p12"])?;
    for addr in p21 {
        let there = begun.elapsed() > Duration::from_secs(14) || c.has_real(1, addr)?;
        ensure!(there, "the restart ended the drain of {addr}");
    }
    wait_until("the deadline of before the restart", Duration::from_secs(20), || {
        Ok(!c.has_real(1, p21[0])? && !c.has_real(1, p21[1])?)
    })?;
    let over = begun.elapsed();
    cx.note(format!("out of IPVS after {over:?}"));
    ensure!(over > Duration::from_secs(14) && over < Duration::from_secs(22), "the deadline moved: {over:?}");
    for flows in [flows.stop()?, published.stop()?] {
        ensure!(of(&flows, "p12").all(|f| f.errors.is_empty()), "{flows:?}");
    }
    c.change(|t, m| {
        m.service("web").set("drain", json!({"timeoutSeconds": 0}));
        serve_from(t, m, "web", &["p11"]);
        Ok(())
    })?;
    ensure!(!c.has_real(1, c.t.pod("p12").ip(Family::V4))?, "timeoutSeconds 0 does not cut");
    c.in_sync()
}

/// Two services change their virtual IPs: who goes on sending to one is answered by whoever has it now.
fn udp_vip_moves(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11"])?;
        m.service("other").vips(&["10.200.0.6", "fd00:200::6"])?.port(Proto::Udp, 80, 8080, None);
        m.endpoints("other", &[t.pod("p12")]);
        Ok(())
    })?;
    let mut flows = Vec::new();
    for family in Family::ALL {
        let probe = Probe::new(Proto::Udp, vip(family, 80)?).within(UDP_PATIENCE);
        flows.push(Flows::start(&c.t.pod("p21").ns, &probe, 2, Duration::from_millis(50))?);
    }
    std::thread::sleep(Duration::from_millis(500));
    c.change(|_, m| {
        let mine = std::mem::take(&mut m.service("web").vips);
        let theirs = std::mem::replace(&mut m.service("other").vips, mine);
        m.service("web").vips = theirs;
        Ok(())
    })?;
    std::thread::sleep(patience(Duration::from_secs(2)));
    for flow in flows.into_iter().map(Flows::stop).collect::<Result<Vec<_>>>()?.iter().flatten() {
        ensure!(flow.servers == ["p11", "p12"], "{flow:?}");
    }
    Ok(())
}

/// Clients that send from one port all the time leave a removed endpoint within two seconds, and only those do. Where the
/// agents alone take longer to act on the change than that, they leave with the turn.
fn udp_moves(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p12", "p21", "p22"]))?;
    let n1: &Host = c.t.node(1);
    let mut kinds = Vec::new();
    for family in Family::ALL {
        for (host, published) in [(c.t.pod("p11"), false), (&c.t.ext, true), (n1, false), (n1, true)] {
            let what = format!("{family} {} {}", host.name, if published { "published" } else { "vip" });
            kinds.push((what, slow(&c, host, Proto::Udp, family, published, 4)?, Instant::now()));
        }
        let local = Probe::new(Proto::Udp, SocketAddr::new(family.localhost(), 30080));
        let local = local.within(UDP_PATIENCE);
        let flows = Flows::start(&n1.ns, &local, 4, Duration::from_millis(50))?;
        kinds.push((format!("{family} loopback"), flows, Instant::now()));
    }
    std::thread::sleep(Duration::from_millis(300));
    let (before, wrote) = (c.turns(), Instant::now());
    // p11 is an endpoint on this node, p21 is on the other and, by the published port, masqueraded.
    c.write(|t, m| {
        serve_from(t, m, "web", &["p12", "p22"]);
        Ok(())
    })?;
    let turned =
        wait_until(
            "n1's agent has acted",
            Duration::from_secs(5),
            || Ok(c.turns().first() > before.first()),
        )?;
    ensure!(turned < patience(Duration::from_millis(1500)), "the agent acts only after {turned:?}");
    // A client that was waiting for an answer sends again when its patience is over.
    // And the slices of the two families are in two files, which may be two turns.
    let allowed = Duration::from_secs(2).max(turned + patience(UDP_PATIENCE));
    std::thread::sleep(allowed.saturating_sub(wrote.elapsed()));
    let in_time: Vec<Vec<FlowReport>> = kinds.iter().map(|(_, flows, _)| flows.now()).collect();
    cx.note(format!("the agent turned after {turned:?}, looked at {:?} after the change", wrote.elapsed()));
    std::thread::sleep(Duration::from_millis(1500));
    for ((what, flows, started), early) in kinds.into_iter().zip(in_time) {
        let flows = flows.stop()?;
        let limit = wrote.duration_since(started) + allowed;
        for (flow, early) in flows.iter().zip(&early) {
            let first = flow.servers.first().map(String::as_str).unwrap_or_default();
            if ["p12", "p22"].contains(&first) {
                ensure!(flow.undisturbed(), "{what}: disturbed: {flow:?}");
                continue;
            }
            let last = early.servers.last().map(String::as_str).unwrap_or_default();
            ensure!(["p12", "p22"].contains(&last), "{what}: still not moved after {allowed:?}: {early:?}");
            // A timeout may be an answer that came late. What was asked before can be lost for good, later it can't.
            let (until, later): (Vec<_>, Vec<_>) = flow.errors.iter().partition(|(at, _)| *at < limit);
            let waited = later.iter().all(|(_, e)| e == "timeout");
            ensure!(waited && flow.lost <= until.len(), "{what}: errors after {limit:?}: {flow:?}");
        }
        for server in ["p11", "p12", "p21", "p22"] {
            ensure!(of(&flows, server).count() == 1, "{what}: not spread: {flows:?}");
        }
    }
    c.in_sync()
}
