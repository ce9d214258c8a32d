//! A running agent puts back what others take away.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::guard::{BOTH, VIPS, sh, works};
use super::support::{ADMIN, http, metric};
use crate::check;
use crate::machine::patience;
use crate::manifests::Manifests;
use crate::program::Agent;
use crate::runner::{Cx, Matrix, Proto, Renderer, Suite};
use crate::snapshot::Snapshot;
use crate::topology::{Node, Topology};

/// How long healing may take.
pub(super) const WITHIN: Duration = Duration::from_secs(5);

/// How long it may take here, where a machine may be emulated.
pub(super) fn within() -> Duration {
    patience(WITHIN)
}

/// How slowly programs run at the moment. Healing is a look each second, and then a dozen programs of iptables and nft, which
/// take a second together in an emulated machine at rest and five in one that shares its processors with another. A look at a
/// node's tables runs as many of them: it is the measure.
#[derive(Default)]
pub(super) struct Pace(Vec<Duration>);

impl Pace {
    /// Looks at a node's tables, by the clock.
    pub(super) fn look(&mut self, node: &Node) -> Result<Snapshot> {
        let start = Instant::now();
        let seen = node.snapshot()?;
        self.0.push(start.elapsed());
        Ok(seen)
    }

    /// Demands that half of these times are what healing may take, at this pace.
    pub(super) fn demand(mut self, cx: &Cx, mut times: Vec<Duration>) -> Result<()> {
        let half = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            times.get(times.len() / 2).copied().context("nothing was measured")
        };
        let (look, took) = (half(&mut self.0)?, half(&mut times)?);
        let allowed = WITHIN.max(Duration::from_secs(2) + 3 * look);
        cx.note(format!("half of it took {took:?} or less, half of the looks at the tables {look:?}"));
        ensure!(
            took <= allowed,
            "half of it took longer than {allowed:?}, where a look takes {look:?}: {times:?}"
        );
        Ok(())
    }
}

/// The turns of all things that a node's agent has ended well.
pub(super) fn full_turns(node: &Node) -> f64 {
    metric(node, r#"meshlb_reconciles_total{outcome="success",kind="full"}"#).unwrap_or(0.0)
}

/// Whether something was seen too late, in seconds. It is a look each second, whatever the machine; putting it back takes time.
/// The rules of iptables-legacy are read by a program, and so rarely that it costs little (docs/how-it-works.md).
fn seen_late(seen: f32, renderer: Renderer) -> bool {
    let limit = if renderer == Renderer::IptablesLegacy { within() } else { WITHIN };
    seen > limit.as_secs_f32()
}

/// Waits until the agent has ended another such turn, for as long as no healing takes. Looking at its tables meanwhile would
/// only take the processors from it.
pub(super) fn turned(node: &Node, before: f64) {
    let start = Instant::now();
    while full_turns(node) <= before && start.elapsed() < within() {
        sleep(Duration::from_millis(30));
    }
}

pub fn register(suite: &mut Suite) {
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]);
        suite.add_slow("healing::agent", &one, Duration::from_secs(180), heals);
    }
    let pair = Matrix::pair();
    suite.add_slow("healing::source_that_cannot_be_read", &pair, Duration::from_secs(90), unreadable);
}

/// All nodes programmed, and an agent on the first.
fn set_up(cx: &Cx) -> Result<(Arc<Topology>, Manifests, Agent)> {
    let meshlb = cx.meshlb()?;
    let t = cx.topology(&Topology::builder())?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    m.service("second").vips(&["10.200.0.6", "fd00:200::6"])?.port(Proto::Tcp, 80, 8080, None);
    m.endpoints("second", &[t.pod("p11")]);
    cx.apply(&t, &mut m)?;
    let agent = meshlb.agent(t.node(1), &m.dir)?;
    let end = Instant::now() + Duration::from_secs(15);
    while drifts(t.node(1)).is_err() {
        ensure!(Instant::now() < end, "no metrics; the agent's log:\n{}", agent.log_text());
        sleep(Duration::from_millis(100));
    }
    sleep(Duration::from_millis(1500));
    works(&t, &BOTH).context("before anything was taken away")?;
    Ok((t, m, agent))
}

/// The sum of the drift counters.
pub(super) fn drifts(node: &Node) -> Result<f64> {
    let (status, text) = http(node, ADMIN, "/metrics")?;
    ensure!(status == 200, "{text}");
    let counts = text.lines().filter(|l| l.starts_with("meshlb_drift_total"));
    Ok(counts.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// What is broken, and how.
fn scripts(renderer: Renderer) -> Vec<(&'static str, String)> {
    let mark = "$(awk '$1 == \"FWM\" { print $2; exit }' /proc/net/ip_vs)";
    let first = r#"m=$(ipvsadm -Sn | awk '$1 == "-a" && / 10\.244/ { print $3; exit }')"#;
    let mut out = vec![
        ("ipvsadm -C", "ipvsadm -C".to_owned()),
        ("one service deleted", format!("ipvsadm -D -f $((0x{mark}))")),
        (
            "one destination deleted",
            "ipvsadm -Sn | grep -m1 -- '-f .* -r 10.244' | sed 's/ -w .*//; s/^-a/-d/; s/ -m$//' | xargs ipvsadm".to_owned(),
        ),
        ("one destination's weight 0", "ipvsadm -Sn | grep -m1 -- '-f .* -r 10.244' | sed 's/^-a/-e/; s/ -w .*/ -w 0/' | xargs ipvsadm".to_owned()),
        ("one service's scheduler changed", format!("{first}; ipvsadm -E -f $m -s wlc")),
        ("one service made persistent", format!("{first}; ipvsadm -E -f $m -s rr -p 60")),
        ("one destination too many", format!("{first}; ipvsadm -a -f $m -r 10.244.9.9:8080 -m")),
        (
            "all destinations of a service deleted",
            format!("{first}; ipvsadm -Sn | awk -v m=$m '$1 == \"-a\" && $3 == m && / 10\\.244/ {{ print \"-d -f\", m, $4, $5 }}' | xargs -L 1 ipvsadm"),
        ),
        ("routes deleted", "ip route del local 10.200.0.0/16 dev lo; ip -6 route del local fd00:200::/112 dev lo".to_owned()),
        ("lo down and up", "ip link set lo down; ip link set lo up".to_owned()),
        ("a sysctl changed", "echo 0 > /proc/sys/net/ipv4/vs/conntrack".to_owned()),
        ("nft table deleted", "nft delete table inet meshlb".to_owned()),
    ];
    if renderer == Renderer::Nftables {
        out.extend([
            ("nft chain flushed", "nft flush chain inet meshlb in".to_owned()),
            ("nft map flushed", "nft flush map inet meshlb vips-4".to_owned()),
            (
                "nft element deleted",
                "nft delete element inet meshlb vips-6 '{ fd00:200::5 . tcp . 80 }'".to_owned(),
            ),
            ("nft flush ruleset", "nft flush ruleset".to_owned()),
        ]);
    } else {
        for table in ["filter", "nat", "mangle"] {
            let what = match table {
                "filter" => "iptables -F",
                "nat" => "iptables -t nat -F",
                _ => "iptables -t mangle -F",
            };
            out.push((what, format!("iptables -t {table} -F; ip6tables -t {table} -F")));
        }
        out.extend([
            ("one jump deleted", "iptables -t mangle -D INPUT -m comment --comment meshlb -j MESHLB-INPUT".to_owned()),
            ("ipset flushed", "ipset flush meshlb-vips-4".to_owned()),
            ("ipset entry deleted", "ipset del meshlb-published-6 fd00:50::1,tcp:30080".to_owned()),
            (
                "rules and ipsets destroyed",
                "for t in security filter nat mangle; do for i in iptables ip6tables; do
                   $i -t $t -F; $i -t $t -S | sed -n 's/^-N \\(MESHLB-.*\\)/\\1/p' | while read c; do $i -t $t -X $c; done
                 done; done 2>/dev/null || true; ipset destroy 2>/dev/null || true"
                    .to_owned(),
            ),
        ]);
        if renderer == Renderer::IptablesNft {
            out.push(("nft flush ruleset", "nft flush ruleset".to_owned()));
        }
    }
    out
}

fn heals(cx: &mut Cx) -> Result<()> {
    let (t, _m, mut agent) = set_up(cx)?;
    let n1 = t.node(1);
    let (mut late, mut times, mut pace) = (Vec::new(), Vec::new(), Pace::default());
    let before = n1.snapshot()?;
    for (what, script) in scripts(cx.renderer()) {
        let (counted, turns) = (drifts(n1)?, full_turns(n1));
        sh(cx, n1, &script).context(what)?;
        let start = Instant::now();
        // The agent counts before it puts anything back.
        while drifts(n1)? <= counted && start.elapsed() < within() {
            sleep(Duration::from_millis(30));
        }
        let seen = start.elapsed();
        turned(n1, turns);
        // Healed is what is as it was, in the tables and for packets. Looking takes up to two seconds here, which are not the
        // agent's: what counts is when the look began that finds all of it well.
        let took = loop {
            let began = start.elapsed();
            let diff = before.diff(&pace.look(n1)?);
            let working = if diff.is_empty() { works(&t, &[Proto::Tcp]) } else { Ok(()) };
            match working {
                Ok(()) if diff.is_empty() => break began,
                _ if start.elapsed() < Duration::from_secs(25) => sleep(Duration::from_millis(50)),
                Ok(()) => bail!("{what}: seen after {seen:?}, but not as before:\n{}", diff.join("\n")),
                Err(e) => return Err(e.context(format!("{what}: seen after {seen:?}, but not healed"))),
            }
        };
        let now = drifts(n1)?;
        let (seen, all) = (seen.as_secs_f32(), took.as_secs_f32());
        cx.note(format!("{what}: seen after {seen:.1} s, healed after {all:.1} s, drift {counted} -> {now}"));
        if took > within() || seen_late(seen, cx.renderer()) {
            late.push(format!("{what}: seen after {seen:.1} s, healed after {all:.1} s"));
        }
        times.push(took);
        if now <= counted {
            late.push(format!("{what}: not counted as drift"));
        }
    }
    works(&t, &BOTH)?;
    ensure!(agent.alive(), "the agent has ended");
    let code = agent.terminate(Duration::from_secs(5))?;
    ensure!(code == 0, "the agent ended with {code}");
    check::same(&before, &n1.snapshot()?, "the agent's end changed something")?;
    ensure!(late.is_empty(), "{}", late.join("\n"));
    // The processors of an emulated machine are now and then elsewhere; not half of the time.
    pace.demand(cx, times)
}

/// A folder that is gone or broken deletes nothing, neither at the start nor later.
fn unreadable(cx: &mut Cx) -> Result<()> {
    let (t, mut m, mut agent) = set_up(cx)?;
    let n1 = t.node(1);
    let before = n1.snapshot()?;
    let away = cx.dir.join("away");
    std::fs::rename(&m.dir, &away)?;
    sleep(Duration::from_secs(3));
    check::same(&before, &n1.snapshot()?, "the folder is gone")?;
    works(&t, &[Proto::Tcp]).context("the folder is gone")?;
    ensure!(agent.alive(), "the agent has ended:\n{}", agent.log_text());
    // One that starts now knows nothing.
    agent.terminate(Duration::from_secs(5))?;
    let meshlb = cx.meshlb()?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    sleep(Duration::from_secs(3));
    check::same(&before, &n1.snapshot()?, "started without a folder")?;
    cx.note(format!("without a folder the agent is {}", if agent.alive() { "waiting" } else { "gone" }));
    let waiting = agent.alive();
    std::fs::rename(&away, &m.dir)?;
    if !waiting {
        agent = meshlb.agent(n1, &m.dir)?;
    }
    // Broken and empty files in it.
    sleep(Duration::from_secs(2));
    let file = m.dir.join("vote.yaml");
    let good = std::fs::read_to_string(&file)?;
    for bad in ["{broken", ""] {
        std::fs::write(&file, bad)?;
        sleep(Duration::from_secs(2));
        if bad.is_empty() {
            // An empty file is a readable one that says nothing.
            break;
        }
        check::same(&before, &n1.snapshot()?, "a file is broken")?;
    }
    std::fs::write(&file, good)?;
    let end = Instant::now() + WITHIN * 3;
    while let Err(e) = works(&t, &[Proto::Tcp]) {
        ensure!(Instant::now() < end, "the file is back: {e:#}");
        sleep(Duration::from_millis(100));
    }
    // And it still follows.
    m.remove("second");
    m.write()?;
    sleep(Duration::from_secs(2));
    let gone = t.pod("p11").connect(Proto::Tcp, "10.200.0.6:80".parse::<std::net::SocketAddr>()?, 1)?;
    check::refused(&gone)?;
    drop(agent);
    Ok(())
}
