//! What goes leaves nothing, and what has nobody to serve it says so.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};

use super::{Cluster, PROTOS, serve_from, two_nodes, vip, web};
use crate::check;
use crate::client::Probe;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::server::everywhere;
use crate::topology::{Host, Topology};

/// Sockets of the nodes, later than us, on the published number.
pub(super) const LATE: &str = "HOST-late";

pub fn register(suite: &mut Suite) {
    suite.add("lifecycle::deleted_service_leaves_nothing", &Matrix::pair(), deleted);
    suite.add("lifecycle::no_endpoints_refuses", &Matrix::pair(), no_endpoints);
}

/// A service comes and goes: the kernel is as before it, to the line; and after cleanup as before any.
fn deleted(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        m.service("stays").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 80, 8080, Some(30070));
        serve_from(t, m, "stays", &["p11", "p22"]);
        Ok(())
    })?;
    let before = c.t.snapshots()?;
    c.change(|t, m| web(t, m, &["p11", "p12", "p21", "p22"]))?;
    for proto in PROTOS {
        check::answered(&c.t.pod("p11").connect(proto, vip(Family::V4, 80)?, 4)?)?;
        check::answered(&c.t.ext.connect(proto, c.t.node(1).at(Family::V6, 30080), 4)?)?;
    }
    c.change(|_, m| {
        m.remove("web");
        Ok(())
    })?;
    for (before, after) in before.iter().zip(c.t.snapshots()?) {
        check::same(before, &after, "left by a deleted service")?;
    }
    for family in Family::ALL {
        for proto in PROTOS {
            check::refused(&c.t.pod("p11").connect(proto, vip(family, 80)?, 1)?)?;
            check::refused(&c.t.ext.connect(proto, c.t.node(1).at(family, 30080), 1)?)?;
        }
        check::even(&c.t.ext.connect(Proto::Tcp, c.t.node(2).at(family, 30070), 4)?, &["p11", "p22"])?;
    }
    c.in_sync()?;
    // The last one goes too; then everything. The runner looks at what is left after that.
    c.change(|_, m| {
        m.remove("stays");
        Ok(())
    })?;
    let report = c.show(1)?;
    ensure!(report["services"].as_array().is_some_and(Vec::is_empty), "{report:#}");
    c.terminate()?;
    cx.cleanup(&c.t)?;
    check::nothing_left(&c.t)
}

/// At once, everywhere, while the address still answers a ping; and it serves as soon as there is an endpoint.
fn no_endpoints(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &[]))?;
    for family in Family::ALL {
        for proto in PROTOS {
            check::refused(&c.t.pod("p11").connect(proto, vip(family, 80)?, 2)?)?;
            check::refused(&c.t.node(1).connect(proto, vip(family, 80)?, 2)?)?;
        }
        let hosts = [c.t.pod("p11"), &**c.t.node(2)];
        for host in hosts {
            let pong = host.ping(vip(family, 0)?.ip())?;
            ensure!(pong.is_ok(), "the address does not answer a ping from {}: {pong:?}", host.name);
        }
    }
    // Not by a socket of the node either, whoever asks.
    let late = everywhere(&[30080], false);
    c.t.nodes.iter().try_for_each(|node| node.serve_as(LATE, &late))?;
    published_is_refused(&c)?;
    // Who is refused may ask again, by the same port.
    let by_lo = |family: Family| {
        Probe::new(Proto::Tcp, SocketAddr::new(family.localhost(), 30080)).bound_port(45_678)
    };
    for family in Family::ALL {
        check::refused(&by_lo(family).run(&c.t.node(1).ns)?)?;
    }
    c.change(|t, m| {
        serve_from(t, m, "web", &["p21"]);
        Ok(())
    })?;
    for family in Family::ALL {
        check::only(&by_lo(family).run(&c.t.node(1).ns)?, "p21").context("by the port that was refused")?;
    }
    for proto in PROTOS {
        check::only(&c.t.pod("p11").connect(proto, vip(Family::V4, 80)?, 2)?, "p21")?;
        check::only(&c.t.ext.connect(proto, c.t.node(1).at(Family::V6, 30080), 2)?, "p21")?;
    }
    c.change(|t, m| {
        serve_from(t, m, "web", &[]);
        Ok(())
    })?;
    for proto in PROTOS {
        check::refused(&c.t.pod("p11").connect(proto, vip(Family::V4, 80)?, 2)?)?;
        check::refused(&c.t.ext.connect(proto, c.t.node(1).at(Family::V6, 30080), 2)?)?;
    }
    // What drains is what nothing new comes to.
    published_is_refused(&c)?;
    c.t.nodes.iter().for_each(|node| node.stop_serving(LATE));
    c.in_sync()
}

/// At once, on both nodes, from outside, a pod, the other node and the node itself.
fn published_is_refused(c: &Cluster) -> Result<()> {
    for family in Family::ALL {
        for (node, other) in [(1, 2), (2, 1)] {
            for (host, dst) in ways_to(&c.t, node, other, family) {
                for proto in PROTOS {
                    check::refused(&host.connect(proto, dst, 2)?)
                        .with_context(|| format!("from {} to {dst} on n{node}", host.name))?;
                }
            }
        }
    }
    Ok(())
}

/// All the ways to the published port of a node.
pub(super) fn ways_to(t: &Topology, node: u8, other: u8, family: Family) -> [(&Host, SocketAddr); 5] {
    let (own, dst) = (t.node(node), t.node(node).at(family, 30080));
    let pod = t.pod(if node == 1 { "p11" } else { "p21" });
    let by_lo = SocketAddr::new(family.localhost(), 30080);
    [(&t.ext, dst), (pod, dst), (t.node(other), dst), (own, dst), (own, by_lo)]
}
