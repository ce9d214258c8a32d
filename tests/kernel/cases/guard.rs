//! Whatever others delete or mark, a packet for a virtual address or a published port never reaches a socket of the node.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::check;
use crate::client::{Probe, Tally};
use crate::manifests::Manifests;
use crate::ns::Output;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::everywhere;
use crate::topology::{Host, Node, Topology, all};

pub(super) use super::support::{VIPS, vip};

/// On `n1`, and later than us, on the published number.
const LATE: &str = "HOST-late";
/// On `n1`, an endpoint.
const OWN: &str = "NET-n1";

pub fn register(suite: &mut Suite) {
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]);
        suite.add_slow("guard::after_deletions", &one, Duration::from_secs(200), deletions);
        suite.add_slow("guard::foreign_marks", &one, Duration::from_secs(180), foreign_marks);
    }
}

/// A shell script on a node; `iptables` in it is of the case's flavour.
pub(super) fn sh(cx: &Cx, node: &Node, script: &str) -> Result<Output> {
    let path = &cx.meshlb()?.path;
    node.ns.run_env(&["sh", "-ec", script], &[("PATH", path)], "")?.ok()
}

/// All at the same time, some at once. With the place and the answer of each.
pub(super) fn ask(jobs: &[(&Host, Probe)]) -> Result<Vec<Tally>> {
    let mut out = Vec::new();
    for some in jobs.chunks(12) {
        out.extend(all(some.iter().map(|(from, probe)| || from.probe(probe)))?);
    }
    Ok(out)
}

/// To the service by `n1`: at its address and its published port, from everywhere.
pub(super) fn to_service<'a>(t: &'a Topology, protos: &[Proto]) -> Result<Vec<(&'a Host, Probe)>> {
    let mut out = Vec::new();
    for family in Family::ALL {
        let n1 = t.node(1).at(family, 30080);
        let local = SocketAddr::new(family.localhost(), 30080);
        let from: [(&Host, SocketAddr); 8] = [
            (t.pod("p11"), vip(family, 80)?),
            (t.node(1), vip(family, 80)?),
            (t.pod("p11"), n1),
            (t.pod("p21"), n1),
            (t.node(2), n1),
            (t.node(1), n1),
            (t.node(1), local),
            (&t.ext, n1),
        ];
        for (host, dst) in from {
            out.extend(protos.iter().map(|p| (host, Probe::new(*p, dst).within(Duration::from_secs(3)))));
        }
    }
    Ok(out)
}

/// To what no service has, where the node has sockets.
pub(super) fn to_nothing(t: &Topology) -> Result<Vec<(&Host, Probe)>> {
    let mut out = Vec::new();
    for family in Family::ALL {
        let spare: IpAddr = family.pick("10.200.9.9", "fd00:200::909").parse()?;
        let ingress: IpAddr = family.pick("10.200.0.1", "fd00:200::1").parse()?;
        let hosts: [&Host; 2] = [t.pod("p11"), t.node(1)];
        for host in hosts {
            for proto in [Proto::Tcp, Proto::Udp] {
                for dst in [vip(family, 22)?, SocketAddr::new(spare, 80), SocketAddr::new(ingress, 8080)] {
                    out.push((host, Probe::new(proto, dst).within(Duration::from_secs(2))));
                }
            }
        }
    }
    Ok(out)
}

/// Every one is answered by a pod.
pub(super) fn works(t: &Topology, protos: &[Proto]) -> Result<()> {
    works_by(t, protos, &t.pod_names())
}

/// Every one is answered by one of these.
pub(super) fn works_by(t: &Topology, protos: &[Proto], servers: &[&str]) -> Result<()> {
    for tally in ask(&to_service(t, protos)?)? {
        check::among(&tally, servers)?;
    }
    Ok(())
}

/// Every one is refused at once.
pub(super) fn refused(jobs: &[(&Host, Probe)]) -> Result<()> {
    let short: Vec<(&Host, Probe)> =
        jobs.iter().map(|(h, p)| (*h, p.clone().within(Duration::from_millis(1500)))).collect();
    let tallies = ask(&short)?;
    // The worst first: an answer.
    for tally in tallies.iter().filter(|t| t.answered() > 0) {
        check::refused(tally)?;
    }
    for tally in &tallies {
        // Several at a time under emulation: slow is not what is looked for here.
        let known = ["ECONNREFUSED", "EPERM"];
        ensure!(tally.errors.keys().all(|e| known.contains(&e.as_str())), "not refused: {tally}");
    }
    Ok(())
}

pub(super) const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// Three programmed nodes, and on the first a late listener on the published port.
fn set_up(cx: &Cx) -> Result<(Arc<Topology>, Manifests)> {
    cx.meshlb()?;
    let t = cx.topology(&Topology::builder())?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    let own = m.service("z-own").vips(&["10.200.0.6", "fd00:200::6"])?;
    for proto in BOTH {
        own.port(proto, 80, 9090, Some(30081));
    }
    m.endpoints("z-own", &[t.node(1)]);
    t.node(1).serve_as(OWN, &everywhere(&[9090], false))?;
    cx.apply(&t, &mut m)?;
    t.node(1).serve_as(LATE, &everywhere(&[30080, 30081], Proto::Sctp.available()))?;
    works(&t, &BOTH).context("before anything was deleted")?;
    for tally in ask(&further(&t, Duration::from_secs(6))?)? {
        check::answered(&tally).context("before anything was deleted")?;
    }
    Ok((t, m))
}

/// To a service whose endpoint is a socket of the node itself; and by SCTP to the one that has pods.
fn further(t: &Topology, within: Duration) -> Result<Vec<(&Host, Probe)>> {
    let mut out = Vec::new();
    for family in Family::ALL {
        let by_vip: SocketAddr = family.pick("10.200.0.6:80", "[fd00:200::6]:80").parse()?;
        let (by_node, by_lo) = (t.node(1).at(family, 30081), SocketAddr::new(family.localhost(), 30081));
        let from: [(&Host, SocketAddr); 5] = [
            (t.pod("p11"), by_vip),
            (t.node(1), by_vip),
            (t.node(1), by_node),
            (t.node(1), by_lo),
            (&t.ext, by_node),
        ];
        out.extend(from.into_iter().flat_map(|(host, dst)| BOTH.map(|proto| (host, Probe::new(proto, dst)))));
        if Proto::Sctp.available() {
            let to = [(t.pod("p11"), vip(family, 80)?), (&t.ext, t.node(1).at(family, 30080))];
            out.extend(to.map(|(host, dst)| (host, Probe::new(Proto::Sctp, dst))));
        }
    }
    Ok(out.into_iter().map(|(host, probe)| (host, probe.within(within))).collect())
}

/// Whoever of those is answered is by the service's own endpoints. With their number.
fn by_nobody_else(t: &Topology) -> Result<usize> {
    let tallies = ask(&further(t, Duration::from_millis(1500))?)?;
    for tally in &tallies {
        ensure!(tally.servers.keys().all(|s| !s.starts_with("HOST")), "a host socket answered: {tally}");
    }
    Ok(tallies.iter().filter(|tally| tally.answered() > 0).count())
}

/// What others can do to us; each is refused from then on.
fn scripts(renderer: Renderer) -> Vec<(&'static str, String)> {
    let services = "ipvsadm -C".to_owned();
    let flush = |tables: &str| {
        format!("for t in {tables}; do iptables -t $t -F; ip6tables -t $t -F; done 2>/dev/null || true")
    };
    let mut out = vec![("services deleted", services.clone())];
    let (marks, everything, entries, sets) = if renderer == Renderer::Nftables {
        let each = |what: &str| ["4", "6"].map(|d| what.replace('#', d)).join("\n");
        (
            "nft flush chain inet meshlb in; nft flush chain inet meshlb out".to_owned(),
            format!(
                "nft flush chain inet meshlb in; nft flush chain inet meshlb out; nft flush chain inet meshlb vip-first\n{}",
                flush("filter nat mangle")
            ),
            "nft delete element inet meshlb vips-4 { 10.200.0.5 . tcp . 80, 10.200.0.5 . udp . 80, 10.200.0.1 . tcp . 30080, 10.200.0.1 . udp . 30080 }
             nft delete element inet meshlb vips-6 { fd00:200::5 . tcp . 80, fd00:200::5 . udp . 80, fd00:200::1 . tcp . 30080, fd00:200::1 . udp . 30080 }
             nft flush map inet meshlb published-marks-4; nft flush map inet meshlb published-marks-6
             nft flush map inet meshlb loopback-4; nft flush map inet meshlb loopback-6"
                .to_owned(),
            each("nft flush map inet meshlb vips-#; nft flush map inet meshlb published-marks-#; nft flush map inet meshlb loopback-#"),
        )
    } else {
        (
            flush("mangle"),
            flush("security filter nat mangle raw"),
            "for f in tcp udp; do
               ipset del meshlb-vips-4 10.200.0.5,$f:80; ipset del meshlb-vips-4 10.200.0.1,$f:30080
               ipset del meshlb-vips-6 fd00:200::5,$f:80; ipset del meshlb-vips-6 fd00:200::1,$f:30080
               ipset del meshlb-published-4 192.168.50.1,$f:30080; ipset del meshlb-published-6 fd00:50::1,$f:30080
             done"
                .to_owned(),
            "ipset flush".to_owned(),
        )
    };
    let together = format!("{services}\n{everything}\n{sets}");
    out.extend([
        ("mark rules flushed", marks),
        ("all rules flushed", everything),
        ("set entries deleted", entries),
        ("sets flushed", sets),
        ("all of it", together),
    ]);
    out
}

fn deletions(cx: &mut Cx) -> Result<()> {
    let (t, m) = set_up(cx)?;
    for (what, script) in scripts(cx.renderer()) {
        let flows = udp_of_the_node(&t);
        for tally in ask(&flows)? {
            check::among(&tally, &t.pod_names()).with_context(|| format!("before: {what}"))?;
        }
        sh(cx, t.node(1), &script).context(what)?;
        // Conntrack knows these already: nothing about them is new.
        for tally in ask(&flows)? {
            let host = tally.servers.keys().any(|server| server.starts_with("HOST"));
            ensure!(!host, "{what}: a datagram of a flow under way came to a socket of the host: {tally}");
        }
        let result = check_refused(&t, cx.renderer(), what, &BOTH);
        result.with_context(|| what.to_owned())?;
        let answered = by_nobody_else(&t).with_context(|| what.to_owned())?;
        ensure!(answered == 0 || !script.contains("ipvsadm"), "{what}, and {answered} are still answered");
        cx.note(format!("{what}: refused"));
        // Without services it is another case.
        if !script.contains("ipvsadm") {
            sh(cx, t.node(1), FOREIGN_BIT)?;
            let result = check_refused(&t, cx.renderer(), what, &BOTH);
            result.with_context(|| format!("{what}, and a foreign bit"))?;
            sh(cx, t.node(1), FOREIGN_BIT_GONE)?;
        }
        // The socket is there all the time, and does not get the port for that.
        cx.apply_on(t.node(1), &m)?;
        works(&t, &[Proto::Tcp]).with_context(|| format!("{what}, put back"))?;
    }
    works(&t, &BOTH).context("after the last apply")?;
    [LATE, OWN].iter().for_each(|server| t.node(1).stop_serving(server));
    Ok(())
}

/// Flows of UDP from the node to its own published port, which the next call goes on with.
fn udp_of_the_node(t: &Topology) -> Vec<(&Host, Probe)> {
    let mut out: Vec<(&Host, Probe)> = Vec::new();
    for family in Family::ALL {
        for (dst, port) in
            [(t.node(1).at(family, 30080), 46_001), (SocketAddr::new(family.localhost(), 30080), 46_002)]
        {
            let probe = Probe::new(Proto::Udp, dst).bound_port(port).within(Duration::from_millis(1500));
            out.push((t.node(1), probe));
        }
    }
    out
}

fn check_refused(t: &Topology, renderer: Renderer, what: &str, protos: &[Proto]) -> Result<()> {
    let mut jobs = to_service(t, protos)?;
    // What 127.0.0.1 needs is in chains and maps of the nft table that these scripts leave alone.
    let loopback_is_whole = match what {
        "mark rules flushed" | "all rules flushed" => true,
        "sets flushed" | "set entries deleted" => renderer != Renderer::Nftables,
        _ => false,
    };
    if loopback_is_whole {
        // It may go on working, but only by its own endpoints.
        let (local, others): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|(_, p)| p.dst.ip().is_loopback());
        for tally in ask(&local)? {
            ensure!(tally.servers.keys().all(|s| !s.starts_with("HOST")), "a host socket answered: {tally}");
        }
        jobs = others;
    }
    jobs.extend(to_nothing(t)?);
    refused(&jobs)
}

/// A bit outside our field on every packet, before and after our own rules; `iptables -F` leaves it there.
const FOREIGN_BIT: &str = "nft -f - <<'X'
table inet foreign {
  chain first { type filter hook prerouting priority -302; meta mark set meta mark or 0x10000; }
  chain in { type filter hook input priority 80; meta mark set meta mark or 0x10000; }
  chain out { type filter hook output priority -302; meta mark set meta mark or 0x10000; }
  chain last { type filter hook output priority -101; meta mark set meta mark or 0x10000; }
}
X";
const FOREIGN_BIT_GONE: &str = "nft delete table inet foreign";

/// One of each kind that goes alone. The first mark is that of the port of TCP, the second that of UDP.
fn singles(renderer: Renderer) -> Vec<(&'static str, String)> {
    let (entry, other_entry, rule, nat, published) = if renderer == Renderer::Nftables {
        (
            "nft delete element inet meshlb vips-4 '{ 10.200.0.5 . tcp . 80 }'",
            "nft delete element inet meshlb vips-6 '{ fd00:200::5 . udp . 80 }'",
            "nft -a list chain inet meshlb in | sed -n 's/^[[:space:]][[:space:]].* # handle \\([0-9]*\\)$/\\1/p' | head -1 |
               xargs nft delete rule inet meshlb in handle",
            "nft flush chain inet meshlb vip-first",
            "nft flush set inet meshlb published-4; nft flush set inet meshlb published-6",
        )
    } else {
        (
            "ipset del meshlb-vips-4 10.200.0.5,tcp:80",
            "ipset del meshlb-vips-6 fd00:200::5,udp:80",
            "iptables -t mangle -D MESHLB-INPUT 1; ip6tables -t mangle -D MESHLB-INPUT 1",
            "iptables -t nat -F; ip6tables -t nat -F",
            "ipset flush meshlb-published-4; ipset flush meshlb-published-6",
        )
    };
    let mut out = vec![
        ("one service", "ipvsadm -D -f 256".to_owned()),
        ("one service, v6", "ipvsadm -D -f 256 -6".to_owned()),
        ("the services of UDP", "ipvsadm -D -f 257; ipvsadm -D -f 257 -6".to_owned()),
        ("one entry", entry.to_owned()),
        ("one entry, v6 and UDP", other_entry.to_owned()),
        ("one rule", rule.to_owned()),
        ("nat alone", nat.to_owned()),
        ("published ports alone", published.to_owned()),
        ("filter alone", "iptables -F; ip6tables -F".to_owned()),
    ];
    if renderer == Renderer::Nftables {
        out.extend(CHAINS.map(|chain| (chain, format!("nft flush chain inet meshlb {chain}"))));
    }
    out
}

/// Chains of the nftables renderer that nothing else here empties alone.
const CHAINS: [&str; 5] = ["out", "lo-out", "lo-guard", "vip-first-out", "refuse"];
/// Where others do the work meanwhile, or nothing had to be done: all is answered as before.
const UNNOTICED: [&str; 5] = ["one rule", "filter alone", "lo-guard", "vip-first-out", "refuse"];

/// Whoever answers, it is no socket of the node. With the number of answers.
fn no_host_socket(t: &Topology) -> Result<usize> {
    let mut jobs = to_service(t, &BOTH)?;
    jobs.extend(to_nothing(t)?);
    let short = Duration::from_millis(800);
    let jobs: Vec<_> = jobs.into_iter().map(|(h, p)| (h, p.within(short))).collect();
    let tallies = ask(&jobs)?;
    for tally in &tallies {
        ensure!(tally.servers.keys().all(|s| !s.starts_with("HOST")), "a host socket answered: {tally}");
    }
    Ok(tallies.iter().filter(|t| t.answered() > 0).count())
}

/// Bits that others add to the mark.
fn foreign_marks(cx: &mut Cx) -> Result<()> {
    let (t, m) = set_up(cx)?;
    let n1 = t.node(1);
    let with = |chains: &str, verb: &str, mark: &str| {
        format!(
            "for c in {chains}; do for i in iptables ip6tables; do $i -t mangle {verb} $c -m comment --comment foreign {mark}; done; done"
        )
    };
    // Outside our field, before and after our own rules.
    let (chains, mark) = ("PREROUTING INPUT OUTPUT", "-j MARK --or-mark 0x10000");
    sh(cx, n1, &format!("{}; {}", with(chains, "-A", mark), with(chains, "-I", mark)))?;
    works(&t, &BOTH).context("a foreign bit")?;
    refused(&to_nothing(&t)?).context("a foreign bit")?;
    sh(cx, n1, "ipvsadm -C")?;
    let mut jobs = to_service(&t, &BOTH)?;
    jobs.extend(to_nothing(&t)?);
    refused(&jobs).context("a foreign bit, services deleted")?;
    cx.apply_on(n1, &m)?;
    sh(cx, n1, &format!("{0}; {0}", with(chains, "-D", mark)))?;
    sh(cx, n1, FOREIGN_BIT)?;
    let whole = no_host_socket(&t)?;
    for (what, script) in singles(cx.renderer()) {
        sh(cx, n1, &script).context(what)?;
        let answered = no_host_socket(&t).with_context(|| format!("{what} deleted, and a foreign bit"))?;
        by_nobody_else(&t).with_context(|| format!("{what} deleted, and a foreign bit"))?;
        cx.note(format!("{what} deleted: {answered} of {whole} answered"));
        ensure!(UNNOTICED.contains(&what) || answered < whole, "{what} deleted, and nobody notices");
        cx.apply_on(n1, &m)?;
    }
    sh(cx, n1, FOREIGN_BIT_GONE)?;
    // Inside our field, on ports without a service; a service has the mark 0x100.
    let services = n1.ns.proc_net("ip_vs")?;
    ensure!(services.contains("00000100"), "no service has mark 0x100 here:\n{services}");
    let mark = "-j MARK --set-xmark 0x10100/0xffffffff";
    sh(cx, n1, &with("PREROUTING OUTPUT", "-I", mark))?;
    refused(&to_nothing(&t)?).context("a foreign mark of our field")?;
    works(&t, &BOTH).context("a foreign mark of our field")?;
    sh(cx, n1, &with("PREROUTING OUTPUT", "-D", mark))?;
    // After our own rules nothing can be promised but this: no socket of the node.
    let mark = "-j MARK --or-mark 0x100";
    sh(cx, n1, &with("INPUT OUTPUT", "-A", mark))?;
    for tally in ask(&to_nothing(&t)?)? {
        ensure!(tally.servers.keys().all(|s| !s.starts_with("HOST")), "a host socket answered: {tally}");
    }
    sh(cx, n1, &with("INPUT OUTPUT", "-D", mark))?;
    [LATE, OWN].iter().for_each(|server| n1.stop_serving(server));
    Ok(())
}
