//! What experiments with the kernel have shown to matter, each with packets.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::support::{start, vip, wait_until, web, web_on_one_node};
use crate::check;
use crate::client::Probe;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::Topology;

pub fn register(suite: &mut Suite) {
    let both = Matrix::pair();
    suite.add("facts::endpoint_without_a_node", &both, nodeless);
    suite.add("facts::addresses_come_and_go", &both, addresses);
    suite.add("facts::sctp_is_refused_at_once", &both, sctp);
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
    check::only(&t.ext.connect(Proto::Tcp, n1.at(Family::V4, 30080), 2)?, "p11")?;
    // The one that went is nobody's.
    let gone = t.ext.probe(&Probe::new(Proto::Tcp, more).within(Duration::from_millis(500)))?;
    ensure!(gone.answered() == 0, "an address that is gone still answers: {gone}");
    n1.ip_batch("link del dummy7\naddr del 169.254.7.7/32 dev eth0\n")
}

fn sctp(cx: &mut Cx) -> Result<()> {
    if !Proto::Sctp.available() {
        cx.note("this kernel has no SCTP");
        return Ok(());
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
