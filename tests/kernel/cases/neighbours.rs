//! Beside other programs: nothing of theirs is touched, and they do not break us.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::guard::{BOTH, VIPS, refused, sh, to_nothing, to_service, vip, works, works_by};
use super::healing::drifts;
use super::support;
use crate::check;
use crate::client::{Flows, Load, Probe};
use crate::manifests::Manifests;
use crate::program::{Meshlb, Program as _};
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::{Listen, everywhere};
use crate::topology::{Host, Topology};

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(120);
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]);
        suite.add_slow("neighbours::are_not_touched", &one, limit * 2, foreign_state);
        suite.add_slow("neighbours::policy_drop", &one, limit, policy_drop);
        suite.add_slow("neighbours::host_socket_was_first", &one, limit, socket_first);
        suite.add_slow("neighbours::node_port_of_another", &one, limit, node_port);
        suite.add("neighbours::ipvs_and_marks_of_another", &one, their_ipvs);
        if renderer != Renderer::Nftables {
            suite.add_slow("neighbours::renderer_is_changed_under_load", &one, limit, renderer_change);
            suite.add_slow("neighbours::flavour_is_changed_under_load", &one, limit, flavour_change);
        }
    }
    suite.add_slow("neighbours::two_agents", &Matrix::pair(), limit, two_agents);
    suite.add("neighbours::mark_taken_meanwhile", &Matrix::pair(), mark_taken);
    // These have another topology.
    suite.add_slow("neighbours::only_declared_ports", &Matrix::pair(), limit, declared_only);
    let nft = Matrix::once().with_renderers(&[Renderer::IptablesNft, Renderer::Nftables]);
    suite.add_slow("neighbours::firewall_that_comes_later", &nft, limit, firewall_later);
}

const FOREIGN: &str = "
for i in iptables ip6tables; do
  $i -N FOREIGN; $i -A INPUT -p tcp --dport 4711 -j FOREIGN; $i -A FOREIGN -j RETURN
  $i -t nat -N FOREIGN; $i -t nat -A POSTROUTING -p tcp --dport 4711 -j FOREIGN; $i -t nat -A FOREIGN -j MASQUERADE
  $i -t mangle -A PREROUTING -p tcp --dport 4711 -j MARK --set-mark 0x100
  $i -t mangle -A OUTPUT -j MARK --or-mark 0x10000
  $i -t raw -A PREROUTING -p udp --dport 4711 -j NOTRACK
done
ipset create foreign hash:ip; ipset add foreign 10.9.9.9
ipset create mesh-lb hash:ip,port skbinfo; ipset add mesh-lb 10.9.9.9,tcp:80 skbmark 0x100
nft add table inet foreign
nft add chain inet foreign input '{ type filter hook input priority 101; policy accept; }'
nft add rule inet foreign input tcp dport 4711 counter accept
nft add table ip mesh
nft add set ip mesh vips '{ type ipv4_addr; }'
ipvsadm -A -t 192.168.50.1:4712 -s rr; ipvsadm -a -t 192.168.50.1:4712 -r 10.244.2.11:8080 -m
ipvsadm -A -f 65537 -s rr; ipvsadm -a -f 65537 -r 10.244.2.11:8080 -m
ipvsadm -A -f 256 -s rr; ipvsadm -a -f 256 -r 10.99.0.1:81 -m
ipvsadm -A -f 256 -6 -s rr; ipvsadm -a -f 256 -6 -r [fd00:99::1]:81 -m
ip route add 10.99.0.0/24 via 192.168.50.2; ip route add local 10.98.0.0/24 dev lo; ip route add 10.97.0.0/24 via 192.168.50.2 table 100
ip -6 route add fd00:99::/64 via fd00:50::2
ip rule add pref 100 fwmark 0x100 lookup 100
ip link add kube-ipvs0 type dummy; ip addr add 10.96.0.10/32 dev kube-ipvs0
echo 2 > /proc/sys/net/ipv4/conf/all/rp_filter
";

const FOREIGN_GONE: &str = "
for i in iptables ip6tables; do
  $i -D INPUT -p tcp --dport 4711 -j FOREIGN; $i -F FOREIGN; $i -X FOREIGN
  $i -t nat -D POSTROUTING -p tcp --dport 4711 -j FOREIGN; $i -t nat -F FOREIGN; $i -t nat -X FOREIGN
  $i -t mangle -F PREROUTING; $i -t mangle -F OUTPUT; $i -t raw -F PREROUTING
done
ipset destroy foreign; ipset destroy mesh-lb
nft delete table inet foreign; nft delete table ip mesh
ipvsadm -D -t 192.168.50.1:4712; ipvsadm -D -f 65537; ipvsadm -D -f 256; ipvsadm -D -f 256 -6
ip route del 10.99.0.0/24; ip route del local 10.98.0.0/24; ip route del 10.97.0.0/24 table 100; ip -6 route del fd00:99::/64
ip rule del pref 100
ip link del kube-ipvs0
ipvsadm --set 900 120 300
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
";

/// Chains, sets, tables, IPVS services, routes, rules and sysctls of others survive everything that we do.
fn foreign_state(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    sh(cx, n1, FOREIGN)?;
    // What an IPVS service brings along by itself is not what is looked for.
    let with_neighbours = n1.snapshot()?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    cx.apply(&t, &mut m)?;
    let unchanged = |what: &str| -> Result<()> {
        let now = n1.snapshot()?;
        check::foreign_unchanged(&with_neighbours, &now).context(what.to_owned())?;
        let lines: Vec<String> = now.lines().map(|(_, l)| l.to_owned()).collect();
        // Their service has a mark of our field, so the snapshot takes it for ours.
        let theirs: Vec<_> = lines.iter().filter(|l| l.contains(" -f 256 ")).collect();
        let reals = ["-r 10.99.0.1:81", "-r [fd00:99::1]:81"];
        let same = reals.iter().all(|r| theirs.iter().any(|l| l.contains(r)));
        ensure!(same && theirs.len() == 4, "{what}: their IPVS service has changed: {theirs:#?}");
        Ok(())
    };
    unchanged("after apply")?;
    works(&t, &BOTH).context("with neighbours")?;
    // Edits.
    m.endpoints("vote", &[t.pod("p11"), t.pod("p21")]);
    m.service("more").vips(&["10.200.0.7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("more", &[t.pod("p12")]);
    m.write()?;
    cx.apply_on(n1, &m)?;
    unchanged("after an edit")?;
    m.remove("more");
    m.write()?;
    cx.apply_on(n1, &m)?;
    unchanged("after a removal")?;
    works(&t, &BOTH).context("after edits")?;
    // An agent: what it puts back, that it starts without a memory, and that it takes over from the other renderer.
    let other = if cx.renderer() == Renderer::Nftables { Renderer::IptablesNft } else { Renderer::Nftables };
    let other = Meshlb { renderer: other, ..meshlb.clone() };
    for (what, program) in
        [("as it was", &meshlb), ("without its state", &meshlb), ("the other renderer", &other)]
    {
        if what == "without its state" {
            std::fs::remove_dir_all(n1.state_dir())?;
        }
        let agent = support::start(cx, program, &t, &m)?;
        unchanged(what)?;
        let counted = drifts(n1)?;
        sh(cx, n1, "nft delete table inet meshlb; ip route del local 10.200.0.0/16 dev lo")?;
        support::wait_until("it is healed", Duration::from_secs(20), || {
            Ok(drifts(n1)? > counted && works(&t, &[Proto::Tcp]).is_ok())
        })?;
        unchanged(&format!("healed, {what}"))?;
        let code = agent.terminate(Duration::from_secs(5))?;
        ensure!(code == 0, "{what}: the agent ended with {code}");
    }
    cx.apply_on(n1, &m)?;
    unchanged("by the first renderer again")?;
    cx.cleanup(&t)?;
    let end = n1.snapshot()?;
    // A foreign IPVS service may have come to depend on these: they keep our value while there is one.
    const KEPT: [&str; 3] =
        ["net.ipv4.vs.conntrack", "net.ipv4.vs.expire_nodest_conn", "net.ipv4.conf.all.arp_ignore"];
    let is_kept = |line: &String| {
        line.contains("[ipvs timeouts]") || KEPT.iter().any(|key| line.contains(&format!("[sysctl] {key}=")))
    };
    let changed: Vec<String> = with_neighbours.diff(&end).into_iter().filter(|line| !is_kept(line)).collect();
    ensure!(changed.is_empty(), "after cleanup:\n{}", changed.join("\n"));
    sh(cx, n1, FOREIGN_GONE)?;
    for key in KEPT {
        ensure!(n1.ns.sysctl_get(key)? == "1", "{key} was put back under a foreign service");
        n1.ns.sysctl(key, "0")?;
    }
    Ok(())
}

/// Another program takes the marks that come next, between two looks at the kernel: a new service gets none of them.
fn mark_taken(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    m.write()?;
    let _agent = support::start(cx, &meshlb, &t, &m)?;
    let theirs = || -> Result<Vec<String>> {
        let all = n1.ns.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
        Ok(all
            .lines()
            .filter(|l| l.contains("10.99.0.1:81") || l.contains("-s lblc"))
            .map(str::to_owned)
            .collect())
    };
    sh(
        cx,
        n1,
        "for mark in $(seq 256 290); do
            ipvsadm -A -f $mark -s lblc 2>/dev/null && ipvsadm -a -f $mark -r 10.99.0.1:81 -m || true
        done",
    )?;
    let before = theirs()?;
    ensure!(before.len() > 50, "too few services of the other program: {before:#?}");
    m.service("more").vips(&["10.200.0.7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("more", &[t.pod("p12"), t.pod("p21")]);
    m.write()?;
    let to = SocketAddr::new([10, 200, 0, 7].into(), 81);
    support::wait_until("the new service is served", Duration::from_secs(10), || {
        Ok(t.pod("p11").connect(Proto::Tcp, to, 1)?.failed() == 0)
    })?;
    check::even(&t.pod("p11").connect(Proto::Tcp, to, 4)?, &["p12", "p21"])?;
    // The next full look has them in view, and leaves them alone too.
    sleep(Duration::from_secs(6));
    ensure!(theirs()? == before, "before: {before:#?}\nafter: {:#?}", theirs()?);
    works(&t, &[Proto::Tcp])?;
    // Marks that were ours and are given back are anybody's, too.
    let marks = || -> Result<BTreeSet<String>> {
        let all = n1.ns.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
        let words =
            all.lines().filter(|l| l.starts_with("-A -f")).filter_map(|l| l.split_whitespace().nth(2));
        Ok(words.map(str::to_owned).collect())
    };
    let had = marks()?;
    m.remove("more");
    m.write()?;
    support::wait_until("its marks are given back", Duration::from_secs(15), || {
        Ok(marks()?.len() < had.len())
    })?;
    let free: Vec<_> = had.difference(&marks()?).cloned().collect();
    sleep(Duration::from_secs(2));
    for mark in &free {
        sh(cx, n1, &format!("ipvsadm -A -f {mark} -s lblc; ipvsadm -a -f {mark} -r 10.99.0.1:81 -m"))?;
    }
    let before = theirs()?;
    sleep(Duration::from_secs(6));
    m.service("again").vips(&["10.200.0.8"])?.port(Proto::Tcp, 82, 8080, Some(30082));
    m.endpoints("again", &[t.pod("p12")]);
    m.write()?;
    let to = SocketAddr::new([10, 200, 0, 8].into(), 82);
    support::wait_until("another service is served", Duration::from_secs(10), || {
        Ok(t.pod("p11").connect(Proto::Tcp, to, 1)?.failed() == 0)
    })?;
    ensure!(theirs()? == before, "marks {free:?}, before: {before:#?}\nafter: {:#?}", theirs()?);
    // They go before we do: what a foreign service may depend on would stay otherwise.
    sh(
        cx,
        n1,
        "ipvsadm -Sn | awk '/-s lblc/ {print $3}' | while read -r mark; do ipvsadm -D -f $mark; done",
    )?;
    Ok(())
}

/// A service of TCP and UDP with an endpoint on each of two nodes.
fn vote_of_two(t: &Topology, m: &mut Manifests) -> Result<()> {
    let service = m.service("vote").vips(&VIPS)?;
    for proto in BOTH {
        service.port(proto, 80, 8080, Some(30080));
    }
    m.endpoints("vote", &[t.pod("p11"), t.pod("p21")]);
    Ok(())
}

/// Another program's IPVS services, as keepalived's or kube-proxy's, keep their clients' addresses, and its marks of our field
/// stay on its packets.
fn their_ipvs(cx: &mut Cx) -> Result<()> {
    cx.meshlb()?;
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    vote_of_two(&t, &mut m)?;
    cx.apply(&t, &mut m)?;
    // To a pod that is an endpoint of ours, and to one that is none.
    for (port, pod) in [(4711, "p11"), (4712, "p12")] {
        for family in Family::ALL {
            let (node, real) = (n1.at(family, port), t.pod(pod).at(family, 8080));
            for flag in ["-t", "-u"] {
                sh(
                    cx,
                    n1,
                    &format!("ipvsadm -A {flag} {node} -s rr; ipvsadm -a {flag} {node} -r {real} -m"),
                )?;
            }
        }
    }
    sh(
        cx,
        n1,
        "for i in iptables ip6tables; do $i -t mangle -A PREROUTING -p tcp --dport 8080 -j MARK --set-mark 0x234; done
         nft -f - <<'X'
table inet theirs {
  counter marked { }
  chain last { type filter hook postrouting priority 300; tcp dport 8080 ct original proto-dst 8080 meta mark 0x234 counter name marked; }
}
X",
    )?;
    for (port, pod) in [(4711, "p11"), (4712, "p12")] {
        for (family, proto) in Family::ALL.into_iter().flat_map(|f| BOTH.map(|p| (f, p))) {
            for from in [&t.ext, t.pod("p21")] {
                let tally = from.connect(proto, n1.at(family, port), 2)?;
                check::only(&tally, pod)?;
                check::seen_as(&tally, &[from.ip(family)])
                    .with_context(|| format!("{} to {port}", from.name))?;
            }
        }
    }
    // Past all services, to the pods themselves.
    for family in Family::ALL {
        check::only(&t.pod("p21").connect(Proto::Tcp, t.pod("p11").at(family, 8080), 2)?, "p11")?;
    }
    let counted = n1.ns.run(&["nft", "list", "counter", "inet", "theirs", "marked"])?.ok()?.stdout;
    ensure!(!counted.contains("packets 0 "), "their mark is gone from their packets: {counted}");
    works_by(&t, &BOTH, &["p11", "p21"])?;
    sh(
        cx,
        n1,
        "nft delete table inet theirs
         for i in iptables ip6tables; do $i -t mangle -D PREROUTING -p tcp --dport 8080 -j MARK --set-mark 0x234; done
         for f in -t -u; do for p in 4711 4712; do ipvsadm -D $f 192.168.50.1:$p; ipvsadm -D $f [fd00:50::1]:$p; done; done",
    )?;
    Ok(())
}

/// As kube-proxy programs it: mark 0x4000, DNAT, masquerade.
fn node_port(cx: &mut Cx) -> Result<()> {
    cx.meshlb()?;
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let rules = |verb: &str| {
        let mut text = String::new();
        for (i, to) in [("iptables", "10.244.2.11:8080"), ("ip6tables", "[fd00:244:2::11]:8080")] {
            for p in ["tcp", "udp"] {
                for chain in ["PREROUTING", "OUTPUT"] {
                    text += &format!(
                        "{i} -t mangle {verb} {chain} -p {p} --dport 31000 -m addrtype --dst-type LOCAL -j MARK --or-mark 0x4000\n\
                         {i} -t nat {verb} {chain} -p {p} --dport 31000 -m addrtype --dst-type LOCAL -j DNAT --to-destination {to}\n"
                    );
                }
            }
            text += &format!("{i} -t nat {verb} POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE\n");
        }
        text
    };
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    for order in ["before us", "after us"] {
        if order == "before us" {
            sh(cx, n1, &rules("-A"))?;
            cx.apply(&t, &mut m)?;
        } else {
            sh(cx, n1, &rules("-D"))?;
            sh(cx, n1, &rules("-I"))?;
        }
        for family in Family::ALL {
            for proto in BOTH {
                let tally = t.ext.connect(proto, n1.at(family, 31000), 2)?;
                check::only(&tally, "p21").context(order)?;
                check::seen_as(&tally, &[n1.ip(family)]).context(order)?;
                let from_pod = t
                    .pod("p11")
                    .probe(&Probe::new(proto, vip(family, 31000)?).within(Duration::from_secs(2)))?;
                check::refused(&from_pod).with_context(|| format!("{order}: a VIP and their node port"))?;
                let from_node =
                    n1.probe(&Probe::new(proto, vip(family, 31000)?).within(Duration::from_secs(2)))?;
                if from_node.answered() > 0 {
                    bail!("{order}: a VIP answers their node port from the node: {from_node}");
                }
            }
        }
        works(&t, &BOTH).context(order)?;
    }
    sh(cx, n1, &rules("-D"))?;
    Ok(())
}

/// A host firewall that drops what it does not know.
fn policy_drop(cx: &mut Cx) -> Result<()> {
    cx.meshlb()?;
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let close = "for i in iptables ip6tables; do
        for c in INPUT FORWARD; do $i -A $c -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; $i -P $c DROP; done
      done
      ip6tables -A INPUT -p ipv6-icmp -j ACCEPT; iptables -A INPUT -i lo -s 127.0.0.0/8 -j ACCEPT";
    let open = "for i in iptables ip6tables; do
        for c in INPUT FORWARD; do $i -P $c ACCEPT; $i -D $c -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; done
      done
      ip6tables -D INPUT -p ipv6-icmp -j ACCEPT; iptables -D INPUT -i lo -s 127.0.0.0/8 -j ACCEPT";
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    // An endpoint on the node's own network: to reach it from the node, a packet has to come in by lo.
    let own = m.service("own").vips(&["10.200.0.6", "fd00:200::6"])?;
    for proto in BOTH {
        own.port(proto, 80, 9090, Some(30081));
    }
    m.endpoints("own", &[n1]);
    n1.serve_as("NET-n1", &everywhere(&[9090], false))?;
    for order in ["the firewall first", "the firewall later"] {
        if order == "the firewall first" {
            sh(cx, n1, close)?;
            cx.apply(&t, &mut m)?;
        } else {
            sh(cx, n1, open)?;
            cx.cleanup(&t)?;
            cx.apply(&t, &mut m)?;
            sh(cx, n1, close)?;
            cx.apply_on(n1, &m)?;
        }
        // It does drop: a socket of the node, and a pod behind it.
        let short = Duration::from_millis(700);
        let closed = t.ext.probe(&Probe::new(Proto::Tcp, n1.at(Family::V4, 8080)).within(short))?;
        check::dropped(&closed).context("the firewall itself")?;
        // `p21` → VIP ends at pods of n1 as well: the firewall does not let those through, by design.
        for (from, probe) in to_service(&t, &BOTH)? {
            let tally = from.probe(&probe)?;
            check::among(&tally, &t.pod_names()).with_context(|| order.to_owned())?;
        }
        for (family, proto) in Family::ALL.into_iter().flat_map(|f| BOTH.map(|p| (f, p))) {
            let by_vip: SocketAddr = family.pick("10.200.0.6:80", "[fd00:200::6]:80").parse()?;
            let (by_node, by_lo) = (n1.at(family, 30081), SocketAddr::new(family.localhost(), 30081));
            let from: [(&Host, SocketAddr); 5] =
                [(n1, by_vip), (n1, by_node), (n1, by_lo), (t.pod("p11"), by_vip), (&t.ext, by_node)];
            for (from, dst) in from {
                let tally = from.connect(proto, dst, 2)?;
                check::only(&tally, "NET-n1").with_context(|| order.to_owned())?;
            }
        }
        // Refused by us or dropped by them: no socket of the node either way.
        for (from, probe) in to_nothing(&t)? {
            let tally = from.probe(&probe.within(Duration::from_millis(300)))?;
            ensure!(tally.answered() == 0, "{order}: {tally}");
        }
    }
    n1.stop_serving("NET-n1");
    cx.cleanup(&t)?;
    sh(cx, n1, open)?;
    Ok(())
}

/// A firewall that is loaded while the agent runs: it is noticed, and what the agent says to add is enough.
fn firewall_later(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder().vip_route(1))?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    m.write()?;
    let mut agent = support::start(cx, &meshlb, &t, &m)?;
    for node in &t.nodes[1..] {
        cx.apply_on(node, &m)?;
    }
    works(&t, &BOTH)?;
    sh(
        cx,
        n1,
        "nft -f - <<'X'
table inet strict {
  chain in { type filter hook input priority 0; policy drop; ct state established,related accept; iifname lo accept; meta l4proto ipv6-icmp accept; }
  chain forwarding { type filter hook forward priority 0; policy drop; meta l4proto ipv6-icmp accept; }
}
X",
    )?;
    let short = Duration::from_millis(700);
    let closed = t.ext.probe(&Probe::new(Proto::Tcp, vip(Family::V4, 80)?).within(short))?;
    check::dropped(&closed).context("the firewall itself")?;
    agent.wait_for_log("nft insert rule", Duration::from_secs(45))?;
    let show = meshlb.run(n1, &["show"])?.ok()?.stdout;
    let log = agent.log_text();
    let commands: std::collections::BTreeSet<&str> =
        log.lines().filter_map(|l| Some(&l[l.find("nft insert rule")?..])).collect();
    for command in &commands {
        ensure!(show.contains(command), "show does not say `{command}`: {show}");
        sh(cx, n1, command)?;
    }
    cx.note(commands.iter().copied().collect::<Vec<_>>().join("\n"));
    works(&t, &BOTH).context("with what the agent said to add")?;
    for family in Family::ALL {
        for dst in [vip(family, 80)?, n1.at(family, 30080)] {
            check::among(&t.ext.connect(Proto::Tcp, dst, 6)?, &t.pod_names())?;
        }
    }
    sh(cx, n1, "nft delete table inet strict")?;
    Ok(())
}

/// S22: with sockets of TCP and UDP on the node, bound to every address and to the VIP itself, a VIP has its declared ports and no others.
fn declared_only(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder().vip_route(1))?;
    let mut m = cx.manifests()?;
    let service = m.service("narrow").vips(&VIPS)?;
    service.port(Proto::Tcp, 80, 8080, Some(30080));
    m.endpoints("narrow", &[t.pod("p11"), t.pod("p21")]);
    cx.apply(&t, &mut m)?;
    // Sockets on the virtual address itself. (One of IPv6 can't be had: the address is nowhere on the node.)
    let bound = [Proto::Tcp, Proto::Udp].map(|proto| Ok(Listen { proto, addr: vip(Family::V4, 82)? }));
    let bound: Vec<Listen> = bound.into_iter().collect::<Result<_>>()?;
    t.node(1).serve_as("HOST-bound", &bound)?;
    let mut jobs = to_nothing(&t)?;
    for family in Family::ALL {
        for port in [22, 82, 8080, 30080] {
            for from in [t.pod("p11"), &t.ext] {
                jobs.push((from, Probe::new(Proto::Tcp, vip(family, port)?)));
            }
        }
        // Declared for TCP alone.
        jobs.push((t.pod("p11"), Probe::new(Proto::Udp, vip(family, 80)?)));
        jobs.push((&t.ext, Probe::new(Proto::Udp, vip(family, 80)?)));
        jobs.push((t.pod("p11"), Probe::new(Proto::Udp, vip(family, 82)?)));
        check::among(&t.pod("p11").connect(Proto::Tcp, vip(family, 80)?, 4)?, &["p11", "p21"])?;
        ensure!(t.pod("p11").ping(vip(family, 0)?.ip())?.is_ok(), "no answer to a ping");
    }
    refused(&jobs)?;
    t.node(1).stop_serving("HOST-bound");
    Ok(())
}

/// S23: a socket that was there first keeps its port, and we say so; one that comes later changes nothing.
fn socket_first(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    vote_of_two(&t, &mut m)?;
    m.write()?;
    cx.will_clean(n1);
    n1.serve_as("FIRST", &everywhere(&[30080], false))?;
    let out = meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?;
    cx.note(&out);
    let held = ["TCP", "UDP"].map(|proto| format!("{proto} 30080 is held by a socket of this host"));
    ensure!(held.iter().all(|h| out.stderr.contains(h)), "apply does not speak of both ports: {out}");
    let show = meshlb.run(n1, &["show", "-o", "wide"])?.ok()?;
    cx.note(&show);
    ensure!(held.iter().all(|h| show.stdout.contains(h)), "show does not speak of both ports: {show}");
    for family in Family::ALL {
        for proto in BOTH {
            check::only(&t.ext.connect(proto, n1.at(family, 30080), 2)?, "FIRST")?;
            let local = SocketAddr::new(family.localhost(), 30080);
            check::only(&n1.connect(proto, local, 2)?, "FIRST")?;
            check::among(&t.pod("p12").connect(proto, vip(family, 80)?, 4)?, &["p11", "p21"])?;
        }
    }
    // It goes: the port is ours with the next turn. Then another comes.
    n1.stop_serving("FIRST");
    cx.apply_on(n1, &m)?;
    let ours = |when: &str| -> Result<()> {
        for family in Family::ALL {
            for dst in [n1.at(family, 30080), SocketAddr::new(family.localhost(), 30080)] {
                let from = if dst.ip().is_loopback() { &**n1 } else { &t.ext };
                for proto in BOTH {
                    check::among(&from.connect(proto, dst, 4)?, &["p11", "p21"])
                        .with_context(|| when.to_owned())?;
                }
            }
        }
        Ok(())
    };
    ours("the first socket is gone")?;
    for (name, listen) in [("LATER", everywhere(&[30080], false)), ("LATER-LO", on_loopback(30080))] {
        n1.serve_as(name, &listen)?;
        ours("a socket came later")?;
        cx.apply_on(n1, &m)?;
        ours("a socket came later, and another turn")?;
        let show = meshlb.run(n1, &["show", "-o", "wide"])?.ok()?;
        let later = "a socket of this host that came later";
        let told = |proto: &str| show.stdout.lines().any(|l| l.contains(later) && l.contains(proto));
        ensure!(told("TCP") && told("UDP"), "show does not speak of both: {show}");
        n1.stop_serving(name);
    }
    // One that listens on loopback alone was first.
    n1.serve_as("LOOPBACK", &on_loopback(30099))?;
    m.service("vote").port(Proto::Tcp, 81, 8080, Some(30099)).port(Proto::Udp, 81, 8080, Some(30099));
    m.write()?;
    let out = meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?;
    let held = ["TCP", "UDP"].map(|proto| format!("{proto} 30099 is held by a socket of this host"));
    ensure!(held.iter().all(|h| out.stderr.contains(h)), "apply does not speak of both ports: {out}");
    for family in Family::ALL {
        for proto in BOTH {
            check::only(&n1.connect(proto, SocketAddr::new(family.localhost(), 30099), 2)?, "LOOPBACK")?;
        }
    }
    n1.stop_serving("LOOPBACK");
    Ok(())
}

/// TCP and UDP on this host's loopback addresses and nowhere else.
pub(super) fn on_loopback(port: u16) -> Vec<Listen> {
    let at = |proto| move |family: Family| Listen { proto, addr: SocketAddr::new(family.localhost(), port) };
    BOTH.into_iter().flat_map(|proto| Family::ALL.map(at(proto))).collect()
}

/// The second is refused, by name, and the first goes on.
fn two_agents(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    cx.apply(&t, &mut m)?;
    let mut first = meshlb.agent(n1, &m.dir)?;
    first.wait_for_log("agent starts", Duration::from_secs(15))?;
    let before = n1.snapshot()?;
    let dir = m.dir.to_string_lossy().into_owned();
    // With another folder: with the agent's own it waits for that one.
    let elsewhere = cx.dir.join("elsewhere");
    std::fs::create_dir_all(&elsewhere)?;
    let elsewhere = elsewhere.to_string_lossy().into_owned();
    let commands: [&[&str]; 3] = [&["agent", "--source", &dir], &["apply", &elsewhere], &["cleanup"]];
    for command in commands {
        let out = meshlb.run(n1, command)?;
        cx.note(&out);
        ensure!(out.status != 0, "`{}` beside an agent succeeded: {out}", command.join(" "));
        let text = format!("{}{}", out.stdout, out.stderr);
        ensure!(text.contains("`meshlb agent`, pid ") && text.contains(&dir), "unclear: {out}");
    }
    // Nor with ranges and folders of its own: the kernel's tables and our names in them are the same.
    let binary = meshlb.binary.to_string_lossy().into_owned();
    let own = |name: &str| cx.dir.join(name).to_string_lossy().into_owned();
    let (state, run) = (format!("--state-dir={}", own("state")), format!("--run-dir={}", own("run")));
    let other = [&binary, "agent", "--source", &dir, "--node=n1", "--vip-cidr=10.201.0.0/16", &state, &run];
    let out = n1.ns.run_env(&other, &[("PATH", &meshlb.path)], "")?;
    cx.note(&out);
    ensure!(out.status != 0 && out.stderr.contains("`meshlb agent`, pid "), "with another range: {out}");
    ensure!(first.alive(), "the first agent has ended:\n{}", first.log_text());
    check::same(&before, &n1.snapshot()?, "the second one changed something")?;
    works(&t, &[Proto::Tcp])?;
    // When the first is killed, the next one can start at once.
    first.kill();
    let mut next = meshlb.agent(n1, &m.dir)?;
    sleep(Duration::from_secs(2));
    ensure!(next.alive(), "after a kill:\n{}", next.log_text());
    works(&t, &[Proto::Tcp])
}

/// iptables → nftables → iptables, and no connection notices.
fn renderer_change(cx: &mut Cx) -> Result<()> {
    change_to(cx, Renderer::Nftables)
}

/// From one flavour of iptables to the other, and back.
fn flavour_change(cx: &mut Cx) -> Result<()> {
    let other = match cx.renderer() {
        Renderer::IptablesNft => Renderer::IptablesLegacy,
        _ => Renderer::IptablesNft,
    };
    change_to(cx, other)?;
    // Tables that were looked at are there: no trace of ours.
    cx.taint();
    Ok(())
}

fn change_to(cx: &Cx, other: Renderer) -> Result<()> {
    let first = cx.meshlb()?.clone();
    let second = Meshlb { renderer: other, ..first.clone() };
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    cx.apply(&t, &mut m)?;
    works(&t, &BOTH)?;
    let at_first = n1.snapshot()?;
    let (mut loads, mut flows) = (Vec::new(), Vec::new());
    for family in Family::ALL {
        // Slow enough that an emulated machine has time for the change itself.
        let pause = Duration::from_millis(120);
        let probe = |proto, dst: SocketAddr| Probe { pause, ..Probe::new(proto, dst) };
        let (by_vip, published) = (vip(family, 80)?, n1.at(family, 30080));
        for proto in BOTH {
            let start = |ns, dst| Load::start(ns, &probe(proto, dst), 1);
            loads.push((format!("{proto}, pod to VIP"), start(&t.pod("p12").ns, by_vip)));
            loads.push((format!("{proto}, outside to published"), start(&t.ext.ns, published)));
        }
        loads.push(("node to VIP".to_owned(), Load::start(&n1.ns, &probe(Proto::Tcp, by_vip), 1)));
        // Connections that were there before, some to endpoints of this node and some to those of others.
        for (what, ns, dst) in [("VIP", &t.pod("p12").ns, by_vip), ("published", &t.ext.ns, published)] {
            let interval = Duration::from_millis(300);
            flows.push((what, Flows::start(ns, &probe(Proto::Tcp, dst), 2, interval)?));
        }
    }
    let start = Instant::now();
    sleep(Duration::from_millis(500));
    let mut times = Vec::new();
    for program in [&second, &first] {
        times.push(start.elapsed());
        program.apply(n1, &m)?;
        times.push(start.elapsed());
        sleep(Duration::from_secs(1));
        let now = n1.snapshot()?;
        // Of the one that was there before: sets are both flavours', and so is the small table.
        let was = if program.renderer == other { first.renderer } else { other };
        let theirs = |section: &str| match (was, other) {
            (_, Renderer::Nftables) => section.contains("tables") || section == "ipset",
            (Renderer::IptablesNft, _) => section.ends_with("-nft-save"),
            _ => section.ends_with("-legacy-save"),
        };
        if program.renderer == other || other != Renderer::Nftables {
            let ours = |line: &str| line.to_ascii_lowercase().contains("meshlb");
            let left: Vec<_> = now
                .lines()
                .filter(|(section, line)| theirs(section) && ours(line))
                .map(|(section, line)| format!("[{section}] {line}"))
                .collect();
            ensure!(left.is_empty(), "left of {was}:\n{}", left.join("\n"));
        }
        if program.renderer != other {
            check::same(&at_first.ours(), &now.ours(), "back again")?;
        }
        if program.renderer != other && other == Renderer::Nftables {
            check::same(&at_first, &now, "back to iptables")?;
        }
    }
    let mut failed = Vec::new();
    for (what, flow) in flows {
        for flow in flow.stop()? {
            if !flow.errors.is_empty() || flow.exchanges < 4 {
                failed.push(format!("an open connection by {what}: {flow:?}"));
            }
        }
    }
    for (what, load) in loads {
        let report = load.stop()?;
        cx.note(format!("{what}: {} answered, slowest {:?}", report.answered(), report.slowest));
        if report.answered() < 10 || !report.errors.is_empty() {
            failed.push(format!("{what}: {} answered, errors {:?}", report.answered(), report.errors));
        }
        let wrong: Vec<_> = report.servers.keys().filter(|s| s.starts_with("HOST")).collect();
        ensure!(wrong.is_empty(), "{what}: answered by {wrong:?}");
    }
    ensure!(failed.is_empty(), "changes at {times:?}:\n{}", failed.join("\n"));
    works(&t, &BOTH)
}
