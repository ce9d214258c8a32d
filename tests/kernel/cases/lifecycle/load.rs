//! Changes under load: no connection may fail.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Cluster, serve_from, two_nodes, vip, web, writes};
use crate::check;
use crate::client::{Flows, Load, Probe};
use crate::runner::{Cx, Family, Matrix, Proto, Suite};

pub fn register(suite: &mut Suite) {
    let slow = Duration::from_secs(120);
    suite.add_heavy("lifecycle::edits_under_load", &Matrix::renderers(), slow, edits);
    suite.add_slow("lifecycle::schedulers", &Matrix::pair(), slow, schedulers);
    suite.add_slow("lifecycle::restarts_under_load", &Matrix::pair(), slow, restarts);
    suite.add_slow("lifecycle::upgrade_under_load", &Matrix::pair(), slow, upgrade);
}

/// Connections by VIP and by the published port, over TCP and UDP and both families, all the time.
struct Loads(Vec<(&'static str, Load)>);

impl Loads {
    fn start(c: &Cluster) -> Result<Loads> {
        let start = |from: &crate::topology::Host, proto, to| {
            let probe = Probe::new(proto, to).within(Duration::from_secs(4));
            Load::start(&from.ns, &Probe { pause: Duration::from_millis(10), ..probe }, 1)
        };
        let n2 = |family| c.t.node(2).at(family, 30080);
        Ok(Loads(vec![
            ("TCP by VIP", start(c.t.pod("p12"), Proto::Tcp, vip(Family::V4, 80)?)),
            ("TCP by VIP, v6", start(c.t.node(1), Proto::Tcp, vip(Family::V6, 80)?)),
            ("UDP by VIP", start(c.t.pod("p12"), Proto::Udp, vip(Family::V4, 80)?)),
            ("TCP published", start(&c.t.ext, Proto::Tcp, n2(Family::V4))),
            ("UDP published, v6", start(&c.t.ext, Proto::Udp, n2(Family::V6))),
        ]))
    }

    /// Ends them. With `taken_away`, endpoints went meanwhile: a datagram on its way to one of them is lost, as on any network.
    fn stop(self, cx: &Cx, taken_away: bool) -> Result<()> {
        let may_be_lost = if taken_away { 2 } else { 0 };
        let mut failed = Vec::new();
        for (what, load) in self.0 {
            let report = load.stop()?;
            cx.note(format!("{what}: {} connections, slowest {:?}", report.answered(), report.slowest));
            let lost =
                report.errors.iter().filter(|(_, e)| what.starts_with("UDP") && e == "timeout").count();
            if report.errors.len() > lost || lost > may_be_lost || report.answered() < 50 {
                failed.push(format!("{what}: {} answered, errors {:?}", report.answered(), report.errors));
            }
        }
        ensure!(failed.is_empty(), "under load: {failed:#?}");
        Ok(())
    }
}

fn edits(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p12", "p21"])?;
        m.service("web").port(Proto::Tcp, 81, 8081, Some(30090));
        // Changing it is another case: the kernel has no scheduler at all for a moment.
        m.service("web").set("scheduler", json!("wrr"));
        serve_from(t, m, "web", &["p11", "p12", "p21"]);
        Ok(())
    })?;
    let loads = Loads::start(&c)?;
    let begun = Instant::now();
    let note = |what: &str| cx.note(format!("{:.1} s: {what}", begun.elapsed().as_secs_f32()));
    c.change(|_, m| {
        m.service("web").set("weights", json!({"p11": 3, "p21": 2}));
        Ok(())
    })?;
    note("weights");
    let tally = c.t.pod("p12").connect(Proto::Tcp, vip(Family::V4, 81)?, 6)?;
    check::answered(&tally)?;
    let shares: Vec<_> = ["p11", "p12", "p21"].iter().map(|s| tally.servers.get(*s).copied()).collect();
    ensure!(shares == [Some(3), Some(1), Some(2)], "weights 3, 1, 2: {tally}");
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11", "p12", "p21", "p22"]);
        m.service("web").set("weights", json!({}));
        Ok(())
    })?;
    note("scaled up");
    // Everybody listens on both.
    c.change(|_, m| {
        m.service("web").ports.iter_mut().filter(|p| p.port == 80).for_each(|p| p.target = 8081);
        m.slices.iter_mut().flat_map(|s| &mut s.ports).for_each(|p| p.2 = 8081);
        Ok(())
    })?;
    note("target port");
    ensure!(
        c.t.pod("p12")
            .connect(Proto::Tcp, vip(Family::V4, 80)?, 2)?
            .answers
            .iter()
            .all(|a| a.local.port() == 8081),
        "the new target port is not used"
    );
    c.change(|t, m| {
        serve_from(t, m, "web", &["p12", "p22"]);
        m.slices.iter_mut().flat_map(|s| &mut s.ports).for_each(|p| p.2 = 8081);
        Ok(())
    })?;
    note("scaled down");
    c.change(|_, m| {
        m.service("web").ports.iter_mut().filter(|p| p.port == 81).for_each(|p| p.publish = Some(30091));
        Ok(())
    })?;
    note("another published port");
    check::even(&c.t.ext.connect(Proto::Tcp, c.t.node(1).at(Family::V4, 30091), 4)?, &["p12", "p22"])?;
    c.change(|t, m| {
        for i in 0..200 {
            let name = format!("s{i}");
            m.service(&name).port(Proto::Tcp, 80, 8080, Some(0));
            serve_from(t, m, &name, &["p11", "p21"]);
        }
        Ok(())
    })?;
    note("200 services added");
    c.change(|_, m| {
        (0..200).for_each(|i| m.remove(&format!("s{i}")));
        Ok(())
    })?;
    note("200 services removed");
    loads.stop(cx, true)?;
    c.in_sync()
}

/// Every scheduler of this kernel that needs no more than a name, live. Open connections go on.
fn schedulers(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p12", "p21"]))?;
    let probe = Probe::new(Proto::Tcp, vip(Family::V4, 80)?).within(Duration::from_secs(4));
    let flows = Flows::start(&c.t.pod("p12").ns, &probe, 3, Duration::from_millis(50))?;
    for name in ["wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "mh", "fo", "ovf", "rr"] {
        c.change(|_, m| {
            m.service("web").set("scheduler", json!(name));
            Ok(())
        })?;
        let table = c.t.node(1).run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
        let named =
            table.lines().filter(|l| l.starts_with("-A -f ") && l.contains(&format!("-s {name}"))).count();
        ensure!(named >= 2, "no service has the scheduler {name}:\n{table}");
        let tally = c.t.pod("p12").connect(Proto::Tcp, vip(Family::V4, 80)?, 6)?;
        check::among(&tally, &["p11", "p12", "p21"])?;
        if matches!(name, "dh" | "sh" | "mh") {
            ensure!(tally.servers.len() == 1, "{name} does not stick: {tally}");
        }
    }
    for flow in flows.stop()? {
        ensure!(flow.errors.is_empty() && flow.servers.len() == 1, "an open connection: {flow:?}");
    }
    c.in_sync()
}

/// An agent with other rules than the one before it: they are replaced, and nobody notices.
fn upgrade(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p12", "p21", "p22"]))?;
    let before = c.t.snapshots()?;
    let loads = Loads::start(&c)?;
    std::thread::sleep(Duration::from_secs(1));
    c.terminate()?;
    for node in &c.t.nodes {
        let file = node.state_dir().join("state.json");
        let mut state: Value = serde_json::from_slice(&fs::read(&file)?)?;
        // What the last one has written is not what this one would write.
        let was = state.pointer_mut("/netfilter/program").context("no fingerprint in the state")?;
        *was = json!(1);
        fs::write(&file, state.to_string())?;
    }
    c.start_agents()?;
    for node in &c.t.nodes {
        let n = writes(node);
        ensure!(n > 0.5, "the agent of {} has not replaced the rules", node.name);
        cx.note(format!("{}: {n} writes", node.name));
    }
    loads.stop(cx, false)?;
    for (before, after) in before.iter().zip(c.t.snapshots()?) {
        check::same(before, &after, "changed by an upgrade to the same rules")?;
    }
    c.in_sync()
}

/// SIGTERM, SIGKILL, and back each time: nobody notices, and nothing is written.
fn restarts(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p12", "p21", "p22"]))?;
    let before = c.t.snapshots()?;
    let loads = Loads::start(&c)?;
    std::thread::sleep(Duration::from_secs(1));
    for way in ["SIGTERM", "SIGKILL"] {
        if way == "SIGTERM" {
            c.terminate()?
        } else {
            c.kill()
        }
        std::thread::sleep(Duration::from_secs(1));
        c.start_agents()?;
        for node in &c.t.nodes {
            let n = writes(node);
            ensure!(n < 0.5, "the agent of {} wrote {n} times after {way} and a restart", node.name);
        }
    }
    loads.stop(cx, false)?;
    for (before, after) in before.iter().zip(c.t.snapshots()?) {
        check::same(before, &after, "changed by restarts")?;
    }
    c.in_sync()
}
