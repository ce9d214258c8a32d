//! A firewall that is loaded anew takes our rules out with all others: iptables-persistent by `iptables-restore`, the
//! service nftables by a file that begins with `flush ruleset`. A running agent puts ours back and leaves theirs.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::guard::sh;
use super::healing::{Pace, drifts, full_turns, turned, within};
use super::support::{served, start, vip, web_on_one_node};
use crate::client::{Flows, Load, Probe};
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::everywhere;
use crate::snapshot::Snapshot;
use crate::topology::{Node, Topology};

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(240);
    suite.add_slow("reload::firewall", &Matrix::renderers(), limit, reloads);
}

/// What a machine's own firewall has in its file: everything closed but SSH and ping.
fn rules(family: Family) -> String {
    let (icmp, lan) = family.pick(("icmp", "192.168.50.0/24"), ("ipv6-icmp", "fd00:50::/64"));
    format!(
        "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n:FOREIGN - [0:0]\n\
         -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n\
         -A INPUT -p {icmp} -j ACCEPT\n-A INPUT -j FOREIGN\n\
         -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         -A FOREIGN -s {lan} -p tcp -m tcp --dport 22 -j ACCEPT\nCOMMIT\n\
         *nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
         -A PREROUTING -p tcp -m tcp --dport 2222 -j REDIRECT --to-ports 22\nCOMMIT\n\
         *mangle\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
         :POSTROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 22 -j MARK --set-xmark 0x10000/0x10000\nCOMMIT\n"
    )
}

/// The same, as far as a table of nft may close things: what it drops nobody can let in.
const NFTABLES: &str = "flush ruleset
table inet firewall {
  chain input {
    type filter hook input priority filter; policy accept;
    ct state established,related accept
    tcp dport 23 drop
  }
  chain forward { type filter hook forward priority filter; policy accept; tcp dport 23 drop; }
}
";

/// A way to load it: what it is called, the script, and lines that must be there afterwards.
struct Reload {
    what: &'static str,
    script: String,
    lines: Vec<String>,
}

fn ways(renderer: Renderer) -> Vec<Reload> {
    let mut out = Vec::new();
    let mut script = String::new();
    for family in Family::ALL {
        let _ = write!(script, "{} <<'END'\n{}END\n", family.iptables_restore(), rules(family));
    }
    let lines: Vec<String> = Family::ALL
        .iter()
        .flat_map(|f| {
            rules(*f).lines().filter(|l| l.starts_with("-A")).map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    // Some of them hit us while we put ours back.
    let often = format!("for i in 1 2 3 4 5 6; do\n{script}sleep 0.3\ndone\n");
    out.push(Reload { what: "iptables-restore", script, lines: lines.clone() });
    // With nftables only what lets our packets in stands there.
    if renderer != Renderer::Nftables {
        out.push(Reload { what: "iptables-restore six times", script: often, lines });
    }
    let lines = ["tcp dport 23 drop", "ct state established,related accept"].map(str::to_owned).to_vec();
    out.push(Reload {
        what: "nft -f with flush ruleset",
        script: format!("nft -f - <<'END'\n{NFTABLES}END\n"),
        lines,
    });
    out.push(Reload { what: "nft flush ruleset", script: "nft flush ruleset".to_owned(), lines: Vec::new() });
    out
}

/// A socket of the host that was not there when the number was published.
const LATE: &str = "HOST-late";

/// Between two connections of a client.
const PAUSE: Duration = Duration::from_millis(60);

/// New connections all the time, by everything that a client can use.
fn loads(t: &Topology) -> Result<Vec<(&'static str, Load)>> {
    let n1 = t.node(1);
    let load = |ns, proto, dst: SocketAddr| {
        let probe = Probe::new(proto, dst).within(Duration::from_millis(600));
        Load::start(ns, &Probe { pause: PAUSE, ..probe }, 1)
    };
    Ok(vec![
        ("pod to VIP", load(&t.pod("p12").ns, Proto::Tcp, vip(Family::V4, 80)?)),
        ("pod to VIP, UDP, v6", load(&t.pod("p12").ns, Proto::Udp, vip(Family::V6, 80)?)),
        ("node to VIP", load(&n1.ns, Proto::Tcp, vip(Family::V4, 80)?)),
        ("outside to published", load(&t.ext.ns, Proto::Tcp, n1.at(Family::V4, 30080))),
        ("outside to published, v6", load(&t.ext.ns, Proto::Tcp, n1.at(Family::V6, 30080))),
    ])
}

fn reloads(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let mut agent = start(cx, &meshlb, &t, &m)?;
    served(&t, &["p11", "p12"])?;
    // What a published number leads to where nothing of ours is left.
    n1.serve_as(LATE, &everywhere(&[30080], false))?;
    let ours = n1.snapshot()?.ours();
    let (mut late, mut times, mut pace) = (Vec::new(), Vec::new(), Pace::default());
    for way in ways(cx.renderer()) {
        let what = way.what;
        let flow = |ns, dst| Flows::start(ns, &Probe::new(Proto::Tcp, dst), 1, Duration::from_millis(100));
        let flows = [
            flow(&t.pod("p12").ns, vip(Family::V4, 80)?)?,
            flow(&t.ext.ns, n1.at(Family::V4, 30080))?,
            flow(&t.ext.ns, n1.at(Family::V6, 30080))?,
        ];
        let (loads, counted, turns) = (loads(&t)?, drifts(n1)?, full_turns(n1));
        let started = Instant::now();
        sleep(Duration::from_millis(500));
        let begun = Instant::now();
        sh(cx, n1, &way.script).context(what)?;
        let loaded = begun.elapsed();
        turned(n1, turns);
        let whole = healed(cx, n1, &ours, &way, begun, &mut pace)?;
        let worked: Vec<usize> = flows.iter().flat_map(Flows::now).map(|f| f.exchanges).collect();
        let (mut first, mut last, mut window) = (Duration::MAX, Duration::ZERO, Duration::ZERO);
        let since = |at: Duration| at.saturating_sub(begun.duration_since(started));
        for (name, load) in loads {
            let report = load.stop()?;
            let wrong: usize =
                report.servers.iter().filter(|(s, _)| s.starts_with("HOST")).map(|(_, n)| n).sum();
            let errors = &report.errors;
            let (from, to) = (errors.first().map(|e| since(e.0)), errors.last().map(|e| since(e.0)));
            cx.note(format!(
                "{what}: {name}: {} answered, {wrong} by a socket of the host, {} failed, from {from:?} to {to:?}: {:?}",
                report.answered(),
                errors.len(),
                errors.iter().map(|(at, e)| format!("{:.1} {e}", since(*at).as_secs_f32())).collect::<Vec<_>>(),
            ));
            if let (Some(from), Some(to)) = (from, to) {
                (first, last) = (first.min(from), last.max(to));
            }
            ensure!(report.answered() > 10, "{what}: {name}: {report:?}");
            // Without its guard, which is gone with all the rest, a packet for a VIP is the host's.
            ensure!(wrong == 0 || what.starts_with("nft"), "{what}: {name}: {report:?}");
            if wrong > 0 {
                window = window.max(report.span_of("HOST") + PAUSE);
            }
        }
        cx.note(format!(
            "{what}: loaded in {loaded:?}, all of ours was back after {whole:?}; new connections failed from {first:?} to {last:?}"
        ));
        cx.note(format!("{what}: sockets of the host were reached for {window:?}"));
        times.push(whole.saturating_sub(loaded));
        let allowed = loaded + within();
        if last.max(whole).max(window) > allowed {
            late.push(format!(
                "{what}: {whole:?}, a connection failed after {last:?}, sockets of the host for {window:?}, of {allowed:?}"
            ));
        }
        served(&t, &["p11", "p12"]).with_context(|| format!("{what}: healed"))?;
        if drifts(n1)? <= counted {
            late.push(format!("{what}: not counted as drift"));
        }
        sleep(Duration::from_millis(300));
        for (i, (flow, before)) in
            flows.into_iter().flat_map(|f| f.stop().unwrap_or_default()).zip(worked).enumerate()
        {
            // By VIP it is IPVS that knows the connection. One by a published port is translated by conntrack, whose
            // hooks go with the last rule that needs them: iptables-legacy has its own.
            if i > 0 && what.starts_with("nft") && cx.renderer() != Renderer::IptablesLegacy {
                cx.note(format!("{what}: a connection by the published port: {flow:?}"));
                continue;
            }
            ensure!(
                flow.errors.is_empty() && flow.exchanges > before,
                "{what}: a connection under way did not go on after {before} exchanges: {flow:?}"
            );
        }
    }
    cx.note(agent.log_text());
    ensure!(agent.alive(), "the agent has ended:\n{}", agent.log_text());
    agent.kill();
    n1.stop_serving(LATE);
    cx.cleanup(&t)?;
    sh(
        cx,
        n1,
        "nft flush ruleset; for i in iptables ip6tables; do $i -P INPUT ACCEPT; $i -P FORWARD ACCEPT
         for t in filter nat mangle; do $i -t $t -F; $i -t $t -X; done; done",
    )?;
    ensure!(late.is_empty(), "{}", late.join("\n"));
    // As of healing: not half of the time.
    pace.demand(cx, times)
}

/// Waits until ours is as it was, and demands that theirs is there.
fn healed(
    cx: &Cx,
    n1: &Node,
    ours: &Snapshot,
    way: &Reload,
    begun: Instant,
    pace: &mut Pace,
) -> Result<Duration> {
    let took = loop {
        sleep(Duration::from_millis(400));
        let took = begun.elapsed();
        let mut diff = ours.diff(&pace.look(n1)?.ours());
        if cx.renderer() == Renderer::Nftables && way.what.starts_with("iptables") {
            // More than there was before: what lets our packets in where iptables drops.
            let more = |l: &String| l.starts_with("+[iptables") || l.starts_with("+[ip6tables");
            let found = diff.iter().any(more);
            diff.retain(|l| !more(l));
            if !found {
                diff.push("nothing of ours in iptables".to_owned());
            }
        }
        if diff.is_empty() {
            break took;
        }
        ensure!(
            took < Duration::from_secs(20),
            "{}: not as before after {took:?}:\n{}",
            way.what,
            diff.join("\n")
        );
    };
    let nft = way.what.starts_with("nft");
    let list = if nft { "nft list ruleset" } else { "iptables-save; ip6tables-save" };
    let text = sh(cx, n1, list)?.stdout;
    for line in &way.lines {
        ensure!(text.lines().any(|l| l.trim() == line), "{}: {line:?} is gone:\n{text}", way.what);
    }
    Ok(took)
}
