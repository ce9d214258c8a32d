//! What experiments with the kernel have shown to matter, each with packets.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::support::{one_node, served, start, vip, wait_until, web, web_on_one_node};
use crate::check;
use crate::client::Probe;
use crate::runner::{Cx, Family, Matrix, Proto, Skip, Suite};
use crate::topology::{Host, Topology};

pub fn register(suite: &mut Suite) {
    let both = Matrix::pair();
    suite.add("facts::endpoint_without_a_node", &both, nodeless);
    suite.add("facts::addresses_come_and_go", &both, addresses);
    suite.add("facts::sctp_is_refused_at_once", &both, sctp);
    suite.add("facts::own_addresses_that_others_do_not_know", &both, own_addresses);
    suite.add("facts::closed_port_is_told", &both, closed_port);
    suite.add("facts::node_gets_another_address", &both, renumbered);
}

/// An endpoint that says of no node that it is there counts as elsewhere, and reaches itself all the same.
fn nodeless(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder().nodes(2))?;
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11", "p21"])?;
    for slice in &mut m.slices {
        slice.endpoints.iter_mut().for_each(|e| e.node = None);
    }
    cx.apply(&t, &mut m)?;
    for family in Family::ALL {
        for proto in [Proto::Tcp, Proto::Udp] {
            check::even(&t.pod("p11").connect(proto, vip(family, 80)?, 6)?, &["p11", "p21"])?;
            let tally = t.ext.connect(proto, t.node(1).at(family, 30080), 6)?;
            check::even(&tally, &["p11", "p21"])?;
            check::seen_as(&tally, &[t.node(1).ip(family)])?;
        }
    }
    Ok(())
}

/// Published ports follow the node's addresses, and leave those alone that are not the node's.
fn addresses(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11"])?;
    let n1 = t.node(1);
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let more: SocketAddr = "192.168.50.77:30080".parse()?;
    let answered = || Ok(t.ext.connect(Proto::Tcp, more, 1)?.failed() == 0);
    n1.ip_batch("addr add 192.168.50.77/24 dev eth0\n")?;
    wait_until("a new address answers", Duration::from_secs(10), answered)?;
    n1.ip_batch("addr del 192.168.50.77/24 dev eth0\n")?;
    // As kube-proxy's ipvs mode, and BGP speakers, hold addresses; and one that is of the link alone.
    n1.ip_batch("link add dummy7 type dummy\nlink set dummy7 up\naddr add 192.168.60.1/32 dev dummy7\naddr add 169.254.7.7/32 dev eth0\n")?;
    std::thread::sleep(Duration::from_secs(3));
    for address in ["192.168.60.1:30080", "169.254.7.7:30080"] {
        let to: SocketAddr = address.parse()?;
        check::refused(&n1.connect(Proto::Tcp, to, 2)?).context(address)?;
        check::refused(&t.pod("p12").connect(Proto::Tcp, to, 2)?).context(address)?;
    }
    // From such an address IPVS can't reach an endpoint of IPv6: who asks there is refused, not kept waiting.
    let to = SocketAddrV6::new("fe80::1".parse()?, 30080, 0, index(t.pod("p12"), "eth0")?);
    check::refused(&t.pod("p12").connect(Proto::Tcp, to, 2)?).context("the link-local address")?;
    check::only(&t.ext.connect(Proto::Tcp, n1.at(Family::V4, 30080), 2)?, "p11")?;
    // The one that went is nobody's.
    let gone = t.ext.probe(&Probe::new(Proto::Tcp, more).within(Duration::from_millis(500)))?;
    ensure!(gone.answered() == 0, "an address that is gone still answers: {gone}");
    n1.ip_batch("link del dummy7\naddr del 169.254.7.7/32 dev eth0\n")
}

fn sctp(cx: &mut Cx) -> Result<()> {
    if !Proto::Sctp.available() {
        return Err(Skip("this kernel has no SCTP".to_owned()).into());
    }
    let (t, mut m) = web_on_one_node(cx, &["p11"])?;
    m.service("s").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Sctp, 80, 8080, Some(30090));
    cx.apply(&t, &mut m)?;
    let n1 = t.node(1);
    // IPv6 has no error that SCTP acts on.
    for (from, to) in [
        (t.pod("p11"), vip(Family::V4, 22)?),
        (t.pod("p11"), "10.200.0.7:80".parse()?),
        (&t.ext, n1.at(Family::V4, 30090)),
        (&**n1, vip(Family::V4, 22)?),
    ] {
        let tally = from.probe(&Probe::new(Proto::Sctp, to).within(Duration::from_secs(2)))?;
        // What a socket is told of protocol-unreachable.
        let refused =
            tally.answered() == 0 && tally.errors.keys().all(|e| e == "ENOPROTOOPT" || e == "EPERM");
        ensure!(
            refused && tally.slowest.as_millis() < 900,
            "{} -> {to}: not refused at once: {tally}",
            from.name
        );
    }
    Ok(())
}

/// The number of a link.
fn index(host: &Host, link: &str) -> Result<u32> {
    let text = host.run(&["cat", &format!("/sys/class/net/{link}/ifindex")])?.ok()?.stdout;
    Ok(text.trim().parse()?)
}

/// What a node sends from an address that other nodes know no way to, as that of a bridge for containers, is answered all the
/// same, where answers that come by an unexpected link are dropped (`rp_filter`).
fn own_addresses(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder().nodes(2).rp_filter(1))?;
    let n1 = t.node(1);
    n1.ip_batch(
        "link add docker0 type bridge\nlink set docker0 up\naddr add 172.17.0.1/16 dev docker0\n\
         addr add fd00:172::1/64 dev docker0 nodad\n",
    )?;
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11", "p21"])?;
    cx.apply(&t, &mut m)?;
    for family in Family::ALL {
        let docker: IpAddr = family.pick("172.17.0.1", "fd00:172::1").parse()?;
        for proto in [Proto::Tcp, Proto::Udp] {
            let places = [
                vip(family, 80)?,
                n1.at(family, 30080),
                SocketAddr::new(docker, 30080),
                t.node(2).at(family, 30080),
            ];
            for to in places {
                // To the other node it goes as it is, and that one has no way back.
                let from = (to != t.node(2).at(family, 30080)).then_some(docker);
                let mut probe = Probe::new(proto, to).times(4);
                probe.bind = from;
                check::even(&n1.probe(&probe)?, &["p11", "p21"])
                    .with_context(|| format!("{from:?} -> {to}"))?;
            }
        }
    }
    n1.ip_batch("link del docker0\n")
}

/// A port that an endpoint does not listen on: the client is told at once, as if it had asked the endpoint itself.
fn closed_port(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder().nodes(2))?;
    let mut m = cx.manifests()?;
    let service = m.service("closed").vips(&["10.200.0.8", "fd00:200::8"])?;
    for proto in [Proto::Tcp, Proto::Udp] {
        service.port(proto, 80, 9999, Some(30091));
    }
    m.endpoints("closed", &[t.pod("p11"), t.pod("p21"), t.node(1), t.node(2)]);
    cx.apply(&t, &mut m)?;
    let n1 = t.node(1);
    for family in Family::ALL {
        let address = SocketAddr::new(family.pick("10.200.0.8", "fd00:200::8").parse()?, 80);
        for proto in [Proto::Tcp, Proto::Udp] {
            for (from, to) in [
                (t.pod("p12"), address),
                (&**n1, address),
                (&t.ext, n1.at(family, 30091)),
                (t.pod("p22"), n1.at(family, 30091)),
            ] {
                let tally = from.connect(proto, to, 4)?;
                check::refused(&tally).with_context(|| format!("{} -> {to}, {proto}", from.name))?;
            }
        }
    }
    Ok(())
}

/// The route of the VIPs names an address of the node as the source of what the node itself sends. It stays when that address
/// is deleted, and nothing would be answered any more.
fn renumbered(cx: &mut Cx) -> Result<()> {
    let t = cx.fresh_topology(&one_node())?;
    cx.taint();
    let n1 = t.node(1);
    n1.ns.sysctl("net.ipv4.conf.eth0.promote_secondaries", "1")?;
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11"])?;
    m.write()?;
    let meshlb = cx.meshlb()?.clone().flag("--node-ip=");
    let _agent = start(cx, &meshlb, &t, &m)?;
    let routes = || -> Result<String> {
        let line = "ip route show table local 10.200.0.0/16; ip -6 route show table local fd00:200::/112";
        Ok(n1.run(&["sh", "-ec", line])?.ok()?.stdout)
    };
    let before = routes()?;
    ensure!(before.contains("src 192.168.50.1 ") && before.contains("src fd00:50::1 "), "{before}");
    served(&t, &["p11"])?;
    n1.ip_batch(
        "addr add 192.168.50.71/24 dev eth0\naddr add fd00:50::71/64 dev eth0 nodad\n\
         addr del 192.168.50.1/24 dev eth0\naddr del fd00:50::1/64 dev eth0\n\
         route replace 10.244.1.11/32 dev v11 src 192.168.50.71\nroute replace 10.244.1.12/32 dev v12 src 192.168.50.71\n",
    )?;
    let follows = || -> Result<bool> {
        let now = routes()?;
        Ok(now.contains("src 192.168.50.71 ") && now.contains("src fd00:50::71 "))
    };
    wait_until("the routes have the new address", Duration::from_secs(10), follows)?;
    for family in Family::ALL {
        let new = SocketAddr::new(family.pick("192.168.50.71", "fd00:50::71").parse()?, 30080);
        for proto in [Proto::Tcp, Proto::Udp] {
            check::only(&n1.connect(proto, vip(family, 80)?, 2)?, "p11")?;
            check::only(&t.pod("p12").connect(proto, vip(family, 80)?, 2)?, "p11")?;
            check::only(&t.ext.connect(proto, new, 2)?, "p11")?;
            check::only(&n1.connect(proto, SocketAddr::new(family.localhost(), 30080), 2)?, "p11")?;
        }
    }
    Ok(())
}
