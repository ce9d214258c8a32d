//! Tunnels between the nodes, bridges under the pods, and a narrow link behind a virtual address.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::guard::{BOTH, VIPS, ask, refused, sh, to_nothing, to_service, vip, works};
use super::support::covered;
use crate::check;
use crate::client::Probe;
use crate::ns::COMMAND_LIMIT;
use crate::program::Meshlb;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::everywhere;
use crate::topology::{Builder, Host, PodNetwork, Topology, Underlay};

pub fn register(suite: &mut Suite) {
    type Case = fn(&mut Cx) -> Result<()>;
    let kinds: [(&str, Case); 11] = [
        ("underlays::bridge", |cx| carries(cx, &bridge(true).rp_filter(1), &[Family::V4], None)),
        ("underlays::bridge_with_br_netfilter_off", |cx| {
            switches_br_netfilter_on(cx, &bridge(false).rp_filter(1))
        }),
        ("underlays::vxlan", |cx| {
            let spec =
                Topology::builder().vip_route(1).underlay(Underlay::Vxlan).cni_masquerade().rp_filter(1);
            carries(cx, &spec, &Family::ALL, None)
        }),
        ("underlays::vxlan_bridge", |cx| {
            carries(cx, &bridge(true).underlay(Underlay::Vxlan).rp_filter(1), &[Family::V4], None)
        }),
        ("underlays::vxlan_bridge_with_br_netfilter_off", |cx| {
            switches_br_netfilter_on(cx, &bridge(false).underlay(Underlay::Vxlan).rp_filter(1))
        }),
        ("underlays::vxlan_bridge_without_br_netfilter", without_br_netfilter),
        ("underlays::ipip", |cx| {
            carries(
                cx,
                &Topology::builder().vip_route(1).underlay(Underlay::Ipip).cni_masquerade().rp_filter(1),
                &Family::ALL,
                None,
            )
        }),
        ("underlays::wireguard", |cx| {
            carries(
                cx,
                &Topology::builder().vip_route(1).underlay(Underlay::Wireguard).cni_masquerade().rp_filter(1),
                &Family::ALL,
                None,
            )
        }),
        ("underlays::marks_that_others_touch", strangers),
        ("underlays::out_of_window", out_of_window),
        ("underlays::narrow_link", narrow),
    ];
    for (name, run) in kinds {
        suite.add_slow(name, &Matrix::renderers(), Duration::from_secs(90), run);
    }
}

fn bridge(br_netfilter: bool) -> Builder {
    Topology::builder().vip_route(1).pod_network(PodNetwork::Bridge { br_netfilter }).cni_masquerade()
}

/// Where bridged packets pass by netfilter, we switch it on, and cleanup leaves it on, since others may rely on it by then.
fn switches_br_netfilter_on(cx: &mut Cx, spec: &Builder) -> Result<()> {
    carries(cx, spec, &[Family::V4], None)?;
    let t = cx.topology(spec)?;
    cx.cleanup(&t)?;
    for node in &t.nodes {
        for key in ["net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"] {
            ensure!(node.ns.sysctl_get(key)? == "1", "{key} is off on {}", node.name);
            node.ns.sysctl(key, "0")?;
        }
    }
    Ok(())
}

/// From a pod, a node and the outside, to local and remote endpoints. Datagrams that are more than one packet only in the
/// families of `big`: those of IPv6 that come over a bridge IPVS finds too big, whatever their size (docs/coexistence.md).
fn carries(cx: &mut Cx, spec: &Builder, big: &[Family], meshlb: Option<&Meshlb>) -> Result<()> {
    let t = cx.topology(spec)?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    // Endpoints on the host network, which are reached past the tunnel.
    let hosts = m.service("hosts").vips(&["10.200.0.9", "fd00:200::9"])?;
    for proto in BOTH {
        hosts.port(proto, 80, 9090, Some(30089));
    }
    m.endpoints("hosts", &[t.node(1), t.node(2)]);
    for node in &t.nodes[..2] {
        node.serve_as(&format!("NET-{}", node.name), &everywhere(&[9090], false))?;
    }
    match meshlb {
        None => cx.apply(&t, &mut m)?,
        Some(meshlb) => cx.apply_by(meshlb, &t, &mut m)?,
    }
    let outer = OuterLinks::watch(&t)?;
    works(&t, &BOTH)?;
    for family in Family::ALL {
        for proto in BOTH {
            let tally = t.pod("p11").connect(proto, vip(family, 80)?, 6)?;
            check::even(&tally, &t.pod_names())?;
            // Itself it sees under the node's address, and so it does with its neighbours where bridged packets pass by
            // netfilter; everybody else sees the pod.
            let others = t.pods.iter().filter(|p| p.name != "p11" && (meshlb.is_none() || p.node > 1));
            for pod in others {
                check::server_saw(&tally, &pod.name, t.pod("p11").ip(family))?;
            }
            check::even(&t.node(1).connect(proto, vip(family, 80)?, 6)?, &t.pod_names())?;
            // By VIP, too, where endpoints elsewhere answer to the node that was asked.
            let tally = t.ext.connect(proto, vip(family, 80)?, 6)?;
            check::even(&tally, &t.pod_names()).context("from outside, by VIP")?;
            let tally = t.ext.connect(proto, t.node(2).at(family, 30080), 6)?;
            check::even(&tally, &t.pod_names())?;
            for pod in t.pods.iter().filter(|p| p.node == 2) {
                check::server_saw(&tally, &pod.name, t.ext.ip(family))?;
            }
        }
        let by_vip: SocketAddr = family.pick("10.200.0.9:80", "[fd00:200::9]:80").parse()?;
        let from: [(&Host, SocketAddr); 4] = [
            (t.pod("p11"), by_vip),
            (t.node(1), by_vip),
            (&t.ext, t.node(1).at(family, 30089)),
            (&t.ext, t.node(3).at(family, 30089)),
        ];
        for (from, dst) in from {
            for proto in BOTH {
                let tally = from.connect(proto, dst, 4)?;
                check::even(&tally, &["NET-n1", "NET-n2"]).context("host network")?;
            }
        }
        if big.contains(&family) {
            let probe = Probe::new(Proto::Udp, vip(family, 80)?).bytes(4000).times(6);
            check::answered(&t.pod("p11").probe(&probe)?)?;
        }
        let much = Probe::new(Proto::Tcp, t.node(1).at(family, 30080)).bytes(100_000).times(6);
        check::even(&t.ext.probe(&much)?, &t.pod_names())?;
    }
    t.nodes[..2].iter().for_each(|n| n.stop_serving(&format!("NET-{}", n.name)));
    refused(&to_nothing(&t)?)?;
    if Proto::Sctp.available() {
        check::even(&t.pod("p11").connect(Proto::Sctp, vip(Family::V4, 80)?, 6)?, &t.pod_names())?;
    }
    outer.unmarked()
}

/// What leaves the nodes by their outer links is looked at: none of it may have a bit of our marks. What a tunnel puts around
/// a packet keeps that packet's mark, and IPVS would take it for a service's: on VXLAN that is a kernel panic, elsewhere
/// nobody notices. Not multicast: in reports of IPv6 groups, which the kernel makes itself, what is read as the mark is another
/// field (`reserved_tailroom` shares its place in `struct sk_buff`). A table of ours in each node, for so long as a case sends packets, which its end takes out.
struct OuterLinks<'a>(&'a Topology);

impl<'a> OuterLinks<'a> {
    /// To this port a datagram goes that is given a mark after everybody's rules: it shows that marks are counted at all.
    const CONTROL: u16 = 9;
    const TABLE: &'static str = "table inet outer-link {
  counter leaked { }
  counter control { }
  set which-4 { typeof ip saddr . ip daddr . meta l4proto . th dport . meta mark; flags dynamic; size 32; }
  set which-6 { typeof ip6 daddr . meta l4proto . th dport . meta mark; flags dynamic; size 32; }
  chain last {
    type filter hook postrouting priority 300; policy accept;
    oifname eth0 udp dport 9 meta mark set meta mark or 0x2abc
    oifname eth0 udp dport 9 meta mark and 0x3fff != 0 counter name control accept
    ip6 daddr ff00::/8 accept
    oifname eth0 meta mark and 0x3fff != 0 add @which-4 { ip saddr . ip daddr . meta l4proto . th dport . meta mark }
    oifname eth0 meta mark and 0x3fff != 0 add @which-6 { ip6 daddr . meta l4proto . th dport . meta mark }
    oifname eth0 meta mark and 0x3fff != 0 counter name leaked
  }
}
";

    fn watch(t: &'a Topology) -> Result<OuterLinks<'a>> {
        for node in &t.nodes {
            node.ns.run_with(&["nft", "-f", "-"], Self::TABLE, COMMAND_LIMIT)?.ok()?;
        }
        Ok(OuterLinks(t))
    }

    /// Ends it, and demands that none had a mark.
    fn unmarked(self) -> Result<()> {
        for node in &self.0.nodes {
            let other = self.0.node(if node.index == 1 { 2 } else { 1 });
            let to = other.at(Family::V4, Self::CONTROL);
            node.probe(&Probe::new(Proto::Udp, to).within(Duration::from_millis(300)))?;
            let text = node.run(&["nft", "list", "counters", "table", "inet", "outer-link"])?.ok()?.stdout;
            let which = node.run(&["nft", "list", "table", "inet", "outer-link"])?.ok()?.stdout;
            node.run(&["nft", "delete", "table", "inet", "outer-link"])?.ok()?;
            let packets = |name: &str| -> Result<u64> {
                let rest = text.split_once(&format!("counter {name} {{")).context("no counter")?.1;
                let number = rest.split_whitespace().nth(1).and_then(|n| n.parse().ok());
                number.with_context(|| format!("no {name} in:\n{text}"))
            };
            ensure!(packets("control")? > 0, "a mark is not counted on {}:\n{text}", node.name);
            let leaked = packets("leaked")?;
            ensure!(leaked == 0, "{leaked} packets left {} with a mark of ours:\n{which}", node.name);
        }
        Ok(())
    }
}

/// Others add a bit to our packets, or take away some of what marks them or clears the mark: no mark leaves for that. (Over
/// IPIP, where a mark that leaves does not take the test's kernel along.)
fn strangers(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder().underlay(Underlay::Ipip).cni_masquerade().rp_filter(1))?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    cx.apply(&t, &mut m)?;
    let n1 = t.node(1);
    let outer = OuterLinks::watch(&t)?;
    n1.ns.run_with(&["nft", "-f", "-"], LATE_BIT, COMMAND_LIMIT)?.ok()?;
    works(&t, &BOTH).context("with another program's bit")?;
    outer.unmarked().context("with another program's bit")?;
    n1.run(&["nft", "delete", "table", "inet", "foreign"])?.ok()?;
    let script = if cx.renderer() == Renderer::Nftables {
        "nft flush set inet meshlb addresses-4; nft flush set inet meshlb addresses-6"
    } else {
        "iptables -t mangle -F; ip6tables -t mangle -F"
    };
    let outer = OuterLinks::watch(&t)?;
    sh(cx, n1, script)?;
    // Not all of it works then.
    let short = Duration::from_millis(800);
    let jobs = to_service(&t, &BOTH)?;
    let jobs: Vec<_> = jobs.into_iter().map(|(host, probe)| (host, probe.within(short).times(3))).collect();
    let answered = ask(&jobs)?.iter().filter(|tally| tally.answered() > 0).count();
    cx.note(format!("{answered} of {} were answered", jobs.len()));
    outer.unmarked().context(script)
}

/// After IPVS and before the mark is cleared.
const LATE_BIT: &str = "table inet foreign {
  chain last { type filter hook postrouting priority 0; meta mark set meta mark or 0x10000; }
}
";

/// Segments that conntrack takes for a mistake, since they are far out of the window. IPVS would send them on all the same, and
/// then they were the first ones of another connection for conntrack, which is not to one of our addresses.
fn out_of_window(cx: &mut Cx) -> Result<()> {
    let spec = Topology::builder().underlay(Underlay::Ipip).cni_masquerade().rp_filter(1);
    let t = cx.topology(&spec)?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    m.endpoints("vote", &[t.pod("p21")]);
    cx.apply(&t, &mut m)?;
    let outer = OuterLinks::watch(&t)?;
    let n1 = t.node(1);
    n1.ns.run_with(&["nft", "-f", "-"], INVALID, COMMAND_LIMIT)?.ok()?;
    for family in Family::ALL {
        let dst = vip(family, 80)?;
        t.pod("p11").ns.enter(|| stray_segments(dst))?;
    }
    let seen = n1.run(&["nft", "list", "counters", "table", "inet", "seen"])?.ok()?.stdout;
    n1.run(&["nft", "delete", "table", "inet", "seen"])?.ok()?;
    ensure!(!seen.contains("packets 0 "), "none was taken for a mistake:\n{seen}");
    outer.unmarked()
}

/// Counts what comes for the virtual addresses and conntrack takes for a mistake, by family.
const INVALID: &str = "table inet seen {
  counter v4 { }
  counter v6 { }
  chain first {
    type filter hook prerouting priority 0; policy accept;
    ip daddr 10.200.0.0/16 ct state invalid counter name v4
    ip6 daddr fd00:200::/112 ct state invalid counter name v6
  }
}
";

/// Connects, and sends segments with a sequence number that is half the space away from where it should be, whatever that is.
fn stray_segments(dst: SocketAddr) -> Result<()> {
    let connection = TcpStream::connect_timeout(&dst, Duration::from_secs(5))?;
    let own = connection.local_addr()?;
    let domain = if dst.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let raw = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
    let octets = |addr: &SocketAddr| match addr.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    for quarter in 0..4 {
        // RFC 9293, 3.1: an ACK without data.
        let mut segment = Vec::new();
        segment.extend(own.port().to_be_bytes());
        segment.extend(dst.port().to_be_bytes());
        let sequence = (0x1111_1111_u32 + (quarter << 30)).to_be_bytes();
        segment.extend([sequence, sequence].concat());
        segment.extend([5 << 4, 0x10, 4, 0, 0, 0, 0, 0]);
        let pseudo = [octets(&own), octets(&dst), vec![0, 6, 0, 20], segment.clone()].concat();
        let mut sum: u32 =
            pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let sum = !u16::try_from(sum)?;
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        raw.send_to(&segment, &SocketAddr::new(dst.ip(), 0).into())?;
    }
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// A kernel without the module, as `meshlb` sees it: bridged packets pass by netfilter, and there is no sysctl to change that.
/// So pods behind one bridge that reach each other by a virtual address are masqueraded.
fn without_br_netfilter(cx: &mut Cx) -> Result<()> {
    let empty = cx.dir.join("empty");
    fs::create_dir_all(&empty)?;
    let meshlb = covered(cx, "no-br-netfilter", &empty, "/proc/sys/net/bridge")?;
    let spec = bridge(false).underlay(Underlay::Vxlan).rp_filter(1);
    carries(cx, &spec, &[Family::V4], Some(&meshlb))?;
    let t = cx.topology(&spec)?;
    let n1 = t.node(1);
    ensure!(n1.ns.sysctl_get("net.bridge.bridge-nf-call-iptables")? == "0", "it is on");
    // By the bridge's own address, one on the bridge; as itself, one elsewhere.
    let tally = t.pod("p11").connect(Proto::Tcp, vip(Family::V4, 80)?, t.pods.len())?;
    for pod in &t.pods {
        if pod.name == "p11" {
            continue;
        }
        if pod.node == 1 {
            ensure!(check::server_saw(&tally, &pod.name, t.pod("p11").ip(Family::V4)).is_err(), "{tally}");
        } else {
            check::server_saw(&tally, &pod.name, t.pod("p11").ip(Family::V4))?;
        }
    }
    Ok(())
}

/// The link from `n1` to its pod takes less than the pod itself believes, so only ICMP can tell senders.
fn narrow(cx: &mut Cx) -> Result<()> {
    // The kernel remembers what it learned: nobody else gets this topology.
    let t = cx.fresh_topology(&Topology::builder())?;
    cx.taint();
    // By the routes, not by the link: a veth drops silently what is bigger than its own MTU, and that would be the answers.
    let narrow = "ip route replace $(ip route show 10.244.1.11) mtu 1300
        ip -6 route replace $(ip -6 route show fd00:244:1::11) mtu 1300";
    t.node(1).run(&["sh", "-ec", narrow])?.ok()?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    m.endpoints("vote", &[t.pod("p11")]);
    cx.apply(&t, &mut m)?;
    let outer = OuterLinks::watch(&t)?;
    for family in Family::ALL {
        let far = vip(family, 80)?;
        let senders: [(&crate::topology::Host, std::net::SocketAddr, &str); 5] = [
            (t.pod("p12"), far, "pod on the same node"),
            (t.pod("p21"), far, "pod elsewhere"),
            (t.node(2), far, "node elsewhere"),
            (&t.ext, t.node(1).at(family, 30080), "outside, the endpoint's node"),
            (&t.ext, t.node(2).at(family, 30080), "outside, another node"),
        ];
        for (from, dst, what) in senders {
            let probe = Probe::new(Proto::Tcp, dst).bytes(100_000).within(Duration::from_secs(10));
            let tally = from.probe(&probe)?;
            check::only(&tally, "p11").with_context(|| format!("{what}, {family}"))?;
            let route = from.run(&["ip", "route", "get", &dst.ip().to_string()])?.ok()?.stdout;
            cx.note(format!("{what}, {family}: {:?}, {}", tally.slowest, route.trim().replace('\n', " ")));
            if from.name != "n2" {
                ensure!(route.contains("mtu 1300"), "{what}, {family}: no smaller MTU learned: {route}");
            }
            // A datagram that is too big as it is: those after the first know it. IPVS takes no IPv6 datagram of the node's own
            // that has to be cut: it looks at the whole of it, before it is (docs/coexistence.md, known limits).
            if from.name == "n2" && family == Family::V6 {
                continue;
            }
            let probe = Probe::new(Proto::Udp, dst).bytes(1400).times(3).within(Duration::from_secs(1));
            let tally = from.probe(&probe)?;
            cx.note(format!("{what}, {family}, UDP: {tally}"));
            ensure!(tally.answered() >= 2 && tally.servers.keys().eq(["p11"]), "{what}, {family}: {tally}");
        }
    }
    outer.unmarked()
}
