//! The machine's clock is set while agents run.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::super::support::{vip, wait_until};
use super::{Cluster, serve_from, two_nodes, web};
use crate::check;
use crate::client::{Flows, Load, Probe};
use crate::machine;
use crate::ns;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};

pub fn register(suite: &mut Suite) {
    // A machine of somebody's keeps its time.
    if machine::emulated() {
        suite.add("lifecycle::clock_is_set", &Matrix::pair(), clock);
    }
}

/// Hours ahead and back, in the middle of a drain: no connection fails, the drain neither ends nor stays, each jump is told in
/// one line, and the folder is followed whatever the times of its files are.
fn clock(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p21"])?;
        m.service("web").set("drain", json!({"timeoutSeconds": 25}));
        Ok(())
    })?;
    let to = vip(Family::V4, 80)?;
    let load = Load::start(
        &c.t.pod("p12").ns,
        &Probe { pause: Duration::from_millis(20), ..Probe::new(Proto::Tcp, to) },
        1,
    );
    let probe = Probe::new(Proto::Tcp, to).within(Duration::from_secs(3));
    let flows = Flows::start(&c.t.pod("p22").ns, &probe, 4, Duration::from_millis(50))?;
    std::thread::sleep(Duration::from_millis(300));
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11"]);
        Ok(())
    })?;
    let drained = c.t.pod("p21").ip(Family::V4);
    let ahead = Ahead::by(3 * 3600)?;
    std::thread::sleep(Duration::from_secs(4));
    ensure!(c.has_real(2, drained)?, "the drain ended with the clock");
    // Files of the future.
    c.change(|t, m| {
        m.endpoints("more", &[t.pod("p12")]);
        m.service("more").vips(&["10.200.0.9"])?.port(Proto::Tcp, 80, 8080, None);
        Ok(())
    })?;
    drop(ahead);
    std::thread::sleep(Duration::from_secs(2));
    c.change(|t, m| {
        m.endpoints("more", &[t.pod("p22")]);
        Ok(())
    })?;
    check::only(
        &c.t.pod("p11").connect(Proto::Tcp, "10.200.0.9:80".parse::<std::net::SocketAddr>()?, 2)?,
        "p22",
    )?;
    for flow in flows.now() {
        ensure!(flow.errors.is_empty() && flow.servers.len() == 1, "{flow:?}");
    }
    wait_until("the drain is over", Duration::from_secs(40), || Ok(!c.has_real(2, drained)?))?;
    drop(flows);
    let report = load.stop()?;
    ensure!(report.errors.is_empty() && report.answered() > 50, "{report:?}");
    for agent in &c.agents {
        let log = agent.log_text();
        let told = log.lines().filter(|line| line.contains("the clock of this machine was set")).count();
        ensure!(told == 2, "told {told} times of two jumps:\n{log}");
    }
    c.in_sync()
}

/// Sets the machine's clock ahead, and back when it is dropped.
struct Ahead(u64);

impl Ahead {
    fn by(seconds: u64) -> Result<Ahead> {
        set_clock(|now| now + seconds)?;
        Ok(Ahead(seconds))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let _ = set_clock(|now| now.saturating_sub(self.0));
    }
}

fn set_clock(to: impl FnOnce(u64) -> u64) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let at = format!("@{}", to(now));
    ns::run_here(&["date", "-s", &at], &[], "", ns::COMMAND_LIMIT)?
        .ok()
        .context("setting the clock")
        .map(drop)
}
