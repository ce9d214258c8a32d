//! Virtual addresses and published ports: kept, given back, fought over.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Cluster, PROTOS, VIPS, publish, serve_from, two_nodes, vip, wait_until, web};
use crate::check;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::server::everywhere;

pub fn register(suite: &mut Suite) {
    let slow = Duration::from_secs(150);
    suite.add_slow("lifecycle::addresses_and_ports_are_kept", &Matrix::pair(), slow, kept);
    suite.add("lifecycle::history_is_read_from_the_kernel", &Matrix::pair(), history);
    suite.add("lifecycle::published_port_conflict", &Matrix::pair(), conflict);
    suite.add("lifecycle::published_port_changes", &Matrix::pair(), port_changes);
    suite.add("lifecycle::host_mode", &Matrix::pair(), host_mode);
    suite.add("lifecycle::dnsrr_published", &Matrix::pair(), dnsrr);
}

/// What a service was given: its addresses and published ports.
fn given(service: &Value) -> Result<(Vec<String>, Vec<u64>)> {
    let vips = service["vips"].as_array().context("no vips")?;
    let ports = service["ports"].as_array().context("no ports")?;
    let vips = vips.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    Ok((vips, ports.iter().filter_map(|p| p["publishedPort"].as_u64()).collect()))
}

/// Automatic ones stay, and are the same on every node, whatever happens to the service, its endpoints and the agents.
fn kept(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        m.service("auto").port(Proto::Tcp, 80, 8080, Some(0)).port(Proto::Udp, 80, 8080, Some(0));
        serve_from(t, m, "auto", &["p11", "p21"]);
        Ok(())
    })?;
    let first = given(&c.service(1, "auto")?)?;
    ensure!(first.0.len() == 2 && first.1.len() == 2, "two addresses and two ports: {first:?}");
    ensure!(first.1.iter().all(|p| (30000..=32767).contains(p)), "out of the range: {first:?}");
    let same = |c: &Cluster, when: &str, servers: &[&str]| -> Result<()> {
        for node in [1, 2] {
            let now = given(&c.service(node, "auto")?)?;
            ensure!(
                now.0 == first.0 && now.1.starts_with(&first.1),
                "n{node}, {when}: {first:?}, now {now:?}"
            );
        }
        let port = u16::try_from(*first.1.first().context("no port")?)?;
        let udp = u16::try_from(*first.1.get(1).context("no port for UDP")?)?;
        for address in &first.0 {
            let ip = address.parse()?;
            check::even(&c.t.pod("p12").connect(Proto::Tcp, SocketAddr::new(ip, 80), 4)?, servers)?;
            let node = c.t.node(2).at(Family::of(ip), port);
            check::even(&c.t.ext.connect(Proto::Tcp, node, 4)?, servers)?;
            let datagrams = c.t.node(2).at(Family::of(ip), udp);
            check::even(&c.t.pod("p12").connect(Proto::Udp, SocketAddr::new(ip, 80), 4)?, servers)?;
            check::even(&c.t.ext.connect(Proto::Udp, datagrams, 4)?, servers)?;
        }
        Ok(())
    };
    same(&c, "at first", &["p11", "p21"])?;
    c.change(|t, m| {
        serve_from(t, m, "auto", &[]);
        m.service("auto").port(Proto::Tcp, 81, 8081, Some(0)).set("scheduler", json!("wrr"));
        // A neighbour that wants some too.
        m.service("aaa").port(Proto::Tcp, 80, 8080, Some(0));
        serve_from(t, m, "aaa", &["p11"]);
        Ok(())
    })?;
    c.change(|t, m| {
        serve_from(t, m, "auto", &["p12", "p22"]);
        Ok(())
    })?;
    same(&c, "after edits", &["p12", "p22"])?;
    c.terminate()?;
    c.start_agents()?;
    same(&c, "after a restart", &["p12", "p22"])?;
    // What sysctls were before is lost too, so that cleanup can't put them back.
    cx.taint();
    // A lost state directory: names give the same addresses, the kernel the same marks.
    c.kill();
    for node in &c.t.nodes {
        std::fs::remove_dir_all(node.state_dir())?;
    }
    c.start_agents()?;
    same(&c, "after the state was lost", &["p12", "p22"])?;
    // And a damaged one: half of a file, and what is no JSON at all.
    c.terminate()?;
    for (node, whole) in c.t.nodes.iter().zip([false, true]) {
        let file = node.state_dir().join("state.json");
        let text = std::fs::read_to_string(&file)?;
        std::fs::write(&file, if whole { "\0\0\0\0" } else { &text[..text.len() / 2] })?;
    }
    c.start_agents()?;
    for (node, agent) in c.t.nodes.iter().zip(&c.agents) {
        ensure!(
            agent.log_text().contains("was set aside as"),
            "{} says nothing:\n{}",
            node.name,
            agent.log_text()
        );
    }
    same(&c, "after the state was damaged", &["p12", "p22"])?;
    c.in_sync()
}

/// An address that a service has by chance of history, and not by its name, stays with it when the state is lost: the kernel
/// tells whose endpoints are behind it.
fn history(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        m.service("late").port(Proto::Tcp, 80, 8080, Some(0));
        serve_from(t, m, "late", &["p11", "p21"]);
        Ok(())
    })?;
    let by_name = given(&c.service(1, "late")?)?;
    // Somebody else has what its name would give it, asking for exactly that.
    c.change(|_, m| {
        m.remove("late");
        Ok(())
    })?;
    let vips: Vec<&str> = by_name.0.iter().map(String::as_str).collect();
    let port = u16::try_from(*by_name.1.first().context("no port")?)?;
    c.change(|t, m| {
        m.service("first").vips(&vips)?.port(Proto::Tcp, 80, 8080, Some(port));
        serve_from(t, m, "first", &["p12"]);
        Ok(())
    })?;
    c.change(|t, m| {
        m.service("late").port(Proto::Tcp, 80, 8080, Some(0));
        serve_from(t, m, "late", &["p11", "p21"]);
        Ok(())
    })?;
    let elsewhere = given(&c.service(1, "late")?)?;
    ensure!(elsewhere.0.iter().all(|vip| !by_name.0.contains(vip)), "{elsewhere:?}, by name {by_name:?}");
    ensure!(elsewhere.1 != by_name.1, "{elsewhere:?}, by name {by_name:?}");
    c.change(|_, m| {
        m.remove("first");
        Ok(())
    })?;
    cx.taint();
    c.kill();
    for node in &c.t.nodes {
        std::fs::remove_dir_all(node.state_dir())?;
    }
    c.start_agents()?;
    for node in [1, 2] {
        let now = given(&c.service(node, "late")?)?;
        ensure!(now == elsewhere, "n{node}: {now:?} without its state, before {elsewhere:?}");
    }
    for vip in &elsewhere.0 {
        let to = SocketAddr::new(vip.parse()?, 80);
        check::even(&c.t.pod("p12").connect(Proto::Tcp, to, 4)?, &["p11", "p21"])?;
    }
    c.in_sync()
}

/// Of two that ask for the same number the first by name has it, wherever they meet; the other is told who has it, and is
/// served when that one goes.
fn conflict(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        m.service("second").port(Proto::Tcp, 80, 8080, Some(30080));
        serve_from(t, m, "second", &["p11"]);
        // The same number over UDP is somebody else's.
        m.service("other").port(Proto::Udp, 80, 8080, Some(30080));
        serve_from(t, m, "other", &["p12"]);
        Ok(())
    })?;
    let served_by = |c: &Cluster, tcp: &str| -> Result<()> {
        for family in Family::ALL {
            let at = c.t.node(2).at(family, 30080);
            check::only(&c.t.ext.connect(Proto::Tcp, at, 3)?, tcp)?;
            check::only(&c.t.ext.connect(Proto::Udp, at, 3)?, "p12")?;
        }
        Ok(())
    };
    served_by(&c, "p11")?;
    c.change(|t, m| {
        m.service("first").port(Proto::Tcp, 80, 8080, Some(30080));
        serve_from(t, m, "first", &["p22"]);
        Ok(())
    })?;
    served_by(&c, "p22")?;
    let second = c.service(1, "second")?;
    let problems = second["problems"].to_string();
    ensure!(
        ["default/first", "30080/TCP"].iter().all(|text| problems.contains(text)),
        "the conflict does not name the owner: {problems}"
    );
    ensure!(c.agents.iter().all(|a| a.log_text().contains("of default/first")), "nor does the log");
    let address = second["vips"][0].as_str().unwrap_or_default().parse()?;
    check::only(&c.t.pod("p21").connect(Proto::Tcp, SocketAddr::new(address, 80), 2)?, "p11")?;
    c.change(|_, m| {
        m.remove("first");
        Ok(())
    })?;
    served_by(&c, "p11")?;
    let problems = c.service(1, "second")?["problems"].clone();
    ensure!(problems == json!([]), "the conflict does not heal: {problems}");
    c.in_sync()
}

/// The first number that can be published, the last, one of the node's own sockets at other times, and one of the range.
const EDGES: [u16; 4] = [1, 80, 65535, 30085];

/// Another number: the new one answers, the old one no longer; then none; ranges; several numbers for one target port.
fn port_changes(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p21"])?;
        t.nodes.iter().for_each(|n| n.stop_serving(&format!("HOST-{}", n.name)));
        let edges = m.service("edges");
        for (port, published) in (80..).zip(EDGES) {
            for proto in PROTOS {
                edges.port(proto, port, 8080, Some(published));
            }
        }
        serve_from(t, m, "edges", &["p11", "p22"]);
        let range = m.service("range").port(Proto::Tcp, 9000, 9000, None).port(Proto::Udp, 9000, 9000, None);
        for port in &mut range.ports {
            port.more.insert("endPort".to_owned(), json!(9001));
            port.more.insert("targetPort".to_owned(), Value::Null);
            port.more.insert("publish".to_owned(), publish("Ingress", 9000));
        }
        range.vips(&["10.200.0.6", "fd00:200::6"])?;
        serve_from(t, m, "range", &["p12", "p22"]);
        Ok(())
    })?;
    for family in Family::ALL {
        for proto in PROTOS {
            for port in [9000, 9001] {
                let to = SocketAddr::new(family.pick("10.200.0.6", "fd00:200::6").parse()?, port);
                check::even(&c.t.pod("p11").connect(proto, to, 4)?, &["p12", "p22"])?;
            }
            check::even(&c.t.ext.connect(proto, c.t.node(1).at(family, 9001), 4)?, &["p12", "p22"])?;
            for published in EDGES {
                let tally = c.t.ext.connect(proto, c.t.node(2).at(family, published), 2)?;
                check::even(&tally, &["p11", "p22"]).with_context(|| format!("published as {published}"))?;
            }
            let beyond = SocketAddr::new(family.pick("10.200.0.6", "fd00:200::6").parse()?, 9002);
            check::refused(&c.t.pod("p11").connect(proto, beyond, 1)?)?;
            check::even(&c.t.ext.connect(proto, c.t.node(1).at(family, 30080), 4)?, &["p11", "p21"])?;
        }
    }
    c.change(|_, m| {
        m.service("web").ports.iter_mut().for_each(|p| p.publish = Some(30081));
        Ok(())
    })?;
    for family in Family::ALL {
        for proto in PROTOS {
            check::even(&c.t.ext.connect(proto, c.t.node(2).at(family, 30081), 4)?, &["p11", "p21"])?;
            check::refused(&c.t.ext.connect(proto, c.t.node(2).at(family, 30080), 1)?)?;
        }
    }
    c.change(|_, m| {
        m.service("web").ports.iter_mut().for_each(|p| p.publish = None);
        Ok(())
    })?;
    for proto in PROTOS {
        check::refused(&c.t.ext.connect(proto, c.t.node(1).at(Family::V4, 30081), 1)?)?;
        check::even(&c.t.pod("p12").connect(proto, vip(Family::V6, 80)?, 4)?, &["p11", "p21"])?;
    }
    // Of two numbers for one target, one goes.
    c.change(|_, m| {
        m.service("edges").ports.retain(|p| p.publish != Some(80));
        Ok(())
    })?;
    for node in &c.t.nodes {
        let listen = everywhere(&[22, 80, 8080], Proto::Sctp.available());
        node.serve_as(&format!("HOST-{}", node.name), &listen)?;
    }
    for proto in PROTOS {
        let n2 = c.t.node(2);
        check::only(&c.t.ext.connect(proto, n2.at(Family::V4, 80), 2)?, "HOST-n2")?;
        check::even(&c.t.ext.connect(proto, n2.at(Family::V4, 30085), 2)?, &["p11", "p22"])?;
    }
    c.in_sync()
}

/// Only nodes with an endpoint answer, each with its own, and the client's address is kept.
fn host_mode(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p12"])?;
        m.service("web").ports.iter_mut().for_each(|p| {
            p.more.insert("publish".to_owned(), publish("Host", 30080));
        });
        Ok(())
    })?;
    for family in Family::ALL {
        for proto in PROTOS {
            let tally = c.t.ext.connect(proto, c.t.node(1).at(family, 30080), 4)?;
            check::even(&tally, &["p11", "p12"])?;
            check::seen_as(&tally, &[c.t.ext.ip(family)])?;
            check::refused(&c.t.ext.connect(proto, c.t.node(2).at(family, 30080), 1)?)?;
            check::even(&c.t.pod("p21").connect(proto, vip(family, 80)?, 4)?, &["p11", "p12"])?;
        }
    }
    let why = c.service(2, "web")?["ports"][0]["notPublished"].to_string();
    ensure!(why.contains("no endpoint on this node"), "show on n2 says {why}");
    c.change(|t, m| {
        serve_from(t, m, "web", &["p22"]);
        Ok(())
    })?;
    for proto in PROTOS {
        check::only(&c.t.ext.connect(proto, c.t.node(2).at(Family::V4, 30080), 2)?, "p22")?;
        let n1 = c.t.node(1).at(Family::V4, 30080);
        wait_until("n1 no longer answers", Duration::from_secs(5), || {
            Ok(check::refused(&c.t.ext.connect(proto, n1, 1)?).is_ok())
        })?;
    }
    c.in_sync()
}

/// No virtual address, but the published port is balanced all the same.
fn dnsrr(cx: &mut Cx) -> Result<()> {
    let c = Cluster::start(cx, &two_nodes(), |t, m| {
        let service = m.service("web").set("mode", json!("DNSRR"));
        for proto in PROTOS {
            service.port(proto, 80, 8080, Some(30080));
        }
        serve_from(t, m, "web", &["p11", "p21"]);
        Ok(())
    })?;
    let service = c.service(1, "web")?;
    ensure!(service["vips"] == json!([]) && service["mode"] == "DNSRR", "{service:#}");
    for family in Family::ALL {
        for proto in PROTOS {
            for node in [1, 2] {
                let to = c.t.node(node).at(family, 30080);
                check::even(&c.t.ext.connect(proto, to, 4)?, &["p11", "p21"])?;
            }
        }
    }
    let unused = SocketAddr::new(VIPS[0].parse()?, 80);
    check::refused(&c.t.pod("p11").connect(Proto::Tcp, unused, 1)?)?;
    c.in_sync()
}
