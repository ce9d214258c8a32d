//! One thing that is wrong on a node, or can't be had there, and everything else as it should be.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::guard::sh;
use super::healing::{full_turns, within};
use super::support::{ADMIN, http, metric, served, start, vip, wait_until, web_on_one_node};
use crate::check;
use crate::client::{Flows, Probe};
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::topology::Topology;

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(180);
    suite.add_slow("apart::healing_while_something_fails", &Matrix::pair(), limit, failing);
    suite.add("apart::left_alone_through_new_rules", &Matrix::pair(), left_alone);
    let nftables = Matrix::once().with_renderers(&[Renderer::Nftables]);
    suite.add("apart::one_family_begins_to_drop", &nftables, one_family);
    suite.add("apart::link_down_and_up", &Matrix::pair(), link);
    suite.add("apart::cleanup_without_its_memory", &Matrix::pair(), forgotten);
}

/// A route of somebody else's in the place of ours: it can't be put there, and is told. What is healed and followed otherwise
/// is healed and followed all the same, without reading everything each time.
fn failing(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    sh(cx, n1, "ip -6 route add local fd00:200::/112 dev lo proto static")?;
    cx.will_clean(n1);
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("another program has this route", Duration::from_secs(20))?;
    served(&t, &["p11", "p12"])?;
    let (status, body) = http(n1, ADMIN, "/readyz")?;
    ensure!(status == 503 && body.contains("another program has this route"), "/readyz: {status} {body}");
    // Tried again less and less often, and then the rest is known.
    sleep(Duration::from_secs(4));
    let flush = match cx.renderer() {
        Renderer::Nftables => "nft flush chain inet meshlb in; nft flush map inet meshlb vips-4",
        _ => "iptables -t mangle -F; ip6tables -t mangle -F; ipset flush meshlb-vips-4",
    };
    let before = n1.snapshot()?;
    for script in ["ipvsadm -C", flush] {
        sh(cx, n1, script)?;
        let broken = Instant::now();
        loop {
            sleep(Duration::from_millis(200));
            let took = broken.elapsed();
            if before.diff(&n1.snapshot()?).is_empty() {
                cx.note(format!("{script}: healed after {took:?}"));
                break;
            }
            ensure!(took < within(), "{script}: not healed after {took:?}:\n{}", agent.log_text());
        }
        served(&t, &["p11", "p12"]).context(script)?;
    }
    // A change is a turn of that service alone.
    let (turns, count) = (full_turns(n1) + failed_turns(n1), incremental(n1));
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    wait_until("the change", within(), || Ok(served(&t, &["p11"]).is_ok()))?;
    let (turns, count) = (full_turns(n1) + failed_turns(n1) - turns, incremental(n1) - count);
    cx.note(format!("one change: {count} small turns, {turns} of everything"));
    ensure!(count > 0.5, "the change was no turn of its own:\n{}", agent.log_text());
    let told = agent.log_text().lines().filter(|l| l.contains("another program has this route")).count();
    ensure!(told <= 2, "told {told} times:\n{}", agent.log_text());
    // It can be had: all is well.
    sh(cx, n1, "ip -6 route del local fd00:200::/112 dev lo proto static")?;
    wait_until("ready", Duration::from_secs(40), || Ok(http(n1, ADMIN, "/readyz")?.0 == 200))?;
    served(&t, &["p11"])?;
    agent.kill();
    Ok(())
}

fn failed_turns(node: &crate::topology::Node) -> f64 {
    metric(node, r#"meshlb_reconciles_total{outcome="failure",kind="full"}"#).unwrap_or(0.0)
}

fn incremental(node: &crate::topology::Node) -> f64 {
    metric(node, r#"meshlb_reconciles_total{outcome="success",kind="incremental"}"#).unwrap_or(0.0)
}

/// A file that can't be read holds a service while the agent starts, and then the rules are taken out: they come back with that
/// service's entries. A service of another file that went meanwhile is gone all the same where only one object is wrong.
fn left_alone(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.service("other").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("other", &[t.pod("p11")]);
    cx.apply(&t, &mut m)?;
    let before = n1.snapshot()?;
    let file = m.dir.join("web.yaml");
    let good = fs::read_to_string(&file)?;
    fs::write(&file, "{broken")?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("left as they are", Duration::from_secs(20))?;
    sleep(Duration::from_secs(2));
    check::same(&before, &n1.snapshot()?, "a file is broken")?;
    let flush = match cx.renderer() {
        Renderer::Nftables => "nft flush table inet meshlb",
        _ => "for t in filter nat mangle; do iptables -t $t -F; ip6tables -t $t -F; done",
    };
    sh(cx, n1, flush)?;
    wait_until("the rules are back", Duration::from_secs(20), || {
        Ok(before.diff(&n1.snapshot()?).is_empty())
    })?;
    served(&t, &["p11", "p12"])?;
    agent.kill();
    // Only that object is wrong: another one that is gone is not kept for it, nor an endpoint.
    let wrong = good.replacen("\"port\": 80,", "\"port\": 70000,", 1);
    ensure!(wrong != good, "the file has no port to make wrong:\n{good}");
    fs::write(&file, wrong)?;
    fs::remove_file(m.dir.join("other.yaml"))?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("left as they are", Duration::from_secs(20))?;
    let gone = "10.200.0.7:81".parse::<std::net::SocketAddr>()?;
    wait_until("the other service is gone", Duration::from_secs(10), || {
        let probe = Probe::new(Proto::Tcp, gone).within(Duration::from_millis(500));
        Ok(t.pod("p12").probe(&probe)?.answered() == 0)
    })?;
    served(&t, &["p11", "p12"])?;
    agent.kill();
    Ok(())
}

/// iptables' own chains begin to drop IPv4, and IPv6 some time after that: our packets are let in, both times.
fn one_family(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let mut agent = start(cx, &meshlb, &t, &m)?;
    served(&t, &["p11", "p12"])?;
    for iptables in ["iptables", "ip6tables"] {
        let script = format!(
            "{iptables} -A INPUT -p icmp -j ACCEPT; {iptables} -A INPUT -p ipv6-icmp -j ACCEPT
             {iptables} -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT
             {iptables} -P INPUT DROP; {iptables} -P FORWARD DROP"
        );
        // One of the protocols is none of each family's.
        sh(cx, n1, &format!("{{ {script}; }} 2>/dev/null || true"))?;
        let begun = Instant::now();
        while let Err(e) = works(&t) {
            let took = begun.elapsed();
            ensure!(took < within(), "{iptables} drops, after {took:?}: {e:#}\n{}", agent.log_text());
            sleep(Duration::from_millis(200));
        }
        cx.note(format!("{iptables}: let in after {:?}", begun.elapsed()));
        sleep(Duration::from_secs(2));
    }
    ensure!(agent.alive(), "{}", agent.log_text());
    let healed = agent.log_text().lines().filter(|l| l.contains("healing: ")).count();
    ensure!(healed <= 4, "healed {healed} times:\n{}", agent.log_text());
    agent.kill();
    sh(
        cx,
        n1,
        "for i in iptables ip6tables; do $i -P INPUT ACCEPT; $i -P FORWARD ACCEPT; $i -F INPUT; $i -F FORWARD; done",
    )?;
    Ok(())
}

/// The node's link is set down, by which its IPv6 addresses go, and up again: connections between its own pods go on.
fn link(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone().flag("--node-ip=");
    let (t, mut m) = web_on_one_node(cx, &["p11"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.taint();
    let mut agent = start(cx, &meshlb, &t, &m)?;
    let flows = Family::ALL
        .into_iter()
        .map(|family| {
            let probe = Probe::new(Proto::Tcp, vip(family, 80)?).within(Duration::from_secs(4));
            Flows::start(&t.pod("p12").ns, &probe, 2, Duration::from_millis(100))
        })
        .collect::<Result<Vec<_>>>()?;
    sleep(Duration::from_millis(500));
    sh(cx, n1, "ip link set eth0 down")?;
    sleep(Duration::from_millis(1500));
    let address = n1.v6;
    sh(cx, n1, &format!("ip link set eth0 up; ip addr add {address}/64 dev eth0 nodad 2>/dev/null || true"))?;
    sleep(Duration::from_secs(6));
    for flow in flows.into_iter().map(Flows::stop).collect::<Result<Vec<_>>>()?.iter().flatten() {
        ensure!(flow.errors.is_empty() && flow.exchanges > 20, "{flow:?}\n{}", agent.log_text());
    }
    for family in Family::ALL {
        check::only(&t.pod("p12").connect(Proto::Tcp, vip(family, 80)?, 2)?, "p11")?;
    }
    ensure!(agent.alive(), "{}", agent.log_text());
    agent.kill();
    cx.cleanup(&t)
}

/// New connections from a pod and from outside, in both families.
fn works(t: &Topology) -> Result<()> {
    for family in Family::ALL {
        let n1 = t.node(1);
        for (from, to) in [(t.pod("p12"), vip(family, 80)?), (&t.ext, n1.at(family, 30080))] {
            let probe = Probe::new(Proto::Tcp, to).within(Duration::from_millis(700));
            ensure!(from.probe(&probe)?.answered() == 1, "{to} from {}", from.name);
        }
    }
    Ok(())
}

/// `cleanup` on a node that has lost all notes, and takes another renderer for the one that was in use.
fn forgotten(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.service("inside").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, None);
    m.endpoints("inside", &[t.pod("p11")]);
    let alone = n1.snapshot()?;
    cx.apply(&t, &mut m)?;
    for dir in [n1.state_dir(), n1.run_dir()] {
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    let mut other = meshlb;
    other.choice = Some(match cx.renderer() {
        Renderer::Nftables => "iptables",
        _ => "nftables",
    });
    other.run(n1, &["cleanup"])?.ok()?;
    let table = n1.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
    ensure!(table.trim().is_empty(), "IPVS services are left:\n{table}");
    let mut left = alone.diff(&n1.snapshot()?);
    // What they were was noted, and the notes are gone.
    left.retain(|line| !line.contains("sysctl") && !line.contains("timeout"));
    ensure!(left.is_empty(), "left:\n{}", left.join("\n"));
    cx.taint();
    Ok(())
}
