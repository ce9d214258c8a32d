//! One service, from everywhere: what must work on any node program.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::check;
use crate::client::Probe;
use crate::runner::{Cx, Matrix, Proto, Renderer, Suite};
use crate::topology::{Host, PodNetwork, Topology};

const VIPS: [&str; 2] = ["10.200.0.5", "fd00:200::5"];
/// Of a service whose only endpoint is `p11`.
const ALONE: [&str; 2] = ["10.200.0.6", "fd00:200::6"];

pub fn register(suite: &mut Suite) {
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]).families();
        let protos = one.clone().protos(&Proto::ALL);
        let two = one.clone().protos(&[Proto::Tcp, Proto::Udp]);
        suite.add("vip::from_a_pod", &protos, from_pod);
        suite.add("vip::from_a_node", &protos, from_node);
        suite.add("vip::from_outside", &protos, from_outside);
        suite.add("vip::unallocated_is_refused", &one, unallocated);
        suite.add("routing_mesh::published_port_on_every_node", &protos, published);
        suite.add("routing_mesh::from_inside", &protos, published_inside);
        suite.add("routing_mesh::published_number_of_a_client", &two, number_of_a_client);
        suite.add("vip::hairpin", &protos, hairpin);
        suite.add("vip::from_outside_to_bridges", &protos, from_outside_to_bridges);
    }
}

fn vip(cx: &Cx, port: u16) -> Result<SocketAddr> {
    let [v4, v6] = VIPS;
    Ok(SocketAddr::new(cx.family().pick(v4, v6).parse()?, port))
}

/// Three nodes, two pods each, all of them endpoints of one service; one of them is the only one of another.
fn set_up(cx: &Cx) -> Result<Arc<Topology>> {
    cx.shared(&Topology::builder().vip_route(1), |t, m| {
        m.standard(t, "vote", &VIPS)?;
        let alone = m.service("self").vips(&ALONE)?;
        for proto in Proto::ALL.into_iter().filter(|p| p.available()) {
            alone.port(proto, 80, 8080, None);
        }
        m.endpoints("self", &[t.pod("p11")]);
        Ok(())
    })
}

/// From everywhere: even, and the servers see whom they should.
fn from_pod(cx: &mut Cx) -> Result<()> {
    let (t, proto) = (set_up(cx)?, cx.proto()?);
    for pod in ["p11", "p32"] {
        let pod = t.pod(pod);
        let tally = pod.connect(proto, vip(cx, 80)?, 12)?;
        check::even(&tally, &t.pod_names())?;
        // Itself it sees under its node's address (hairpin), everybody else sees the pod.
        for other in t.pods.iter().filter(|p| p.name != pod.name) {
            check::server_saw(&tally, &other.name, pod.ip(cx.family()))?;
        }
    }
    Ok(())
}

fn from_node(cx: &mut Cx) -> Result<()> {
    let (t, proto) = (set_up(cx)?, cx.proto()?);
    let n = t.node(1);
    let tally = n.connect(proto, vip(cx, 80)?, 12)?;
    check::even(&tally, &t.pod_names())?;
    check::seen_as(&tally, &[n.ip(cx.family())])
}

/// A client that has a route to the addresses by one of the nodes.
fn from_outside(cx: &mut Cx) -> Result<()> {
    let t = set_up(cx)?;
    outside(cx, &t)
}

fn from_outside_to_bridges(cx: &mut Cx) -> Result<()> {
    let spec = Topology::builder().pod_network(PodNetwork::Bridge { br_netfilter: true }).vip_route(1);
    let t = cx.shared(&spec, |t, m| m.standard(t, "vote", &VIPS).map(|_| ()))?;
    outside(cx, &t)
}

fn outside(cx: &Cx, t: &Topology) -> Result<()> {
    let (proto, family) = (cx.proto()?, cx.family());
    let tally = t.ext.connect(proto, vip(cx, 80)?, 12)?;
    check::even(&tally, &t.pod_names())?;
    // As with a published port: endpoints elsewhere answer to the node.
    for pod in &t.pods {
        let seen = if pod.node == 1 { t.ext.ip(family) } else { t.node(1).ip(family) };
        check::server_saw(&tally, &pod.name, seen)?;
    }
    Ok(())
}

fn hairpin(cx: &mut Cx) -> Result<()> {
    let (t, proto) = (set_up(cx)?, cx.proto()?);
    let alone = SocketAddr::new(cx.family().pick(ALONE[0], ALONE[1]).parse()?, 80);
    check::only(&t.pod("p11").connect(proto, alone, 3)?, "p11")
}

fn unallocated(cx: &mut Cx) -> Result<()> {
    let t = set_up(cx)?;
    let spare: SocketAddr = SocketAddr::new(cx.family().pick("10.200.9.9", "fd00:200::909").parse()?, 22);
    let hosts: [&Host; 2] = [t.pod("p11"), t.node(1)];
    for host in hosts {
        for proto in [Proto::Tcp, Proto::Udp] {
            for dst in [spare, vip(cx, 22)?, vip(cx, 8080)?] {
                check::refused(&host.connect(proto, dst, 1)?)?;
            }
        }
    }
    ensure!(t.pod("p11").ping(vip(cx, 0)?.ip())?.is_ok(), "the address does not answer a ping");
    Ok(())
}

fn published(cx: &mut Cx) -> Result<()> {
    let (t, proto, family) = (set_up(cx)?, cx.proto()?, cx.family());
    for node in &t.nodes {
        let tally = t.ext.connect(proto, node.at(family, 30080), 6)?;
        check::even(&tally, &t.pod_names())?;
        // The client's address is kept where the endpoint is on the node that was asked.
        for pod in &t.pods {
            let seen = if pod.node == node.index { t.ext.ip(family) } else { node.ip(family) };
            check::server_saw(&tally, &pod.name, seen)?;
        }
    }
    Ok(())
}

fn published_inside(cx: &mut Cx) -> Result<()> {
    let (t, proto, family) = (set_up(cx)?, cx.proto()?, cx.family());
    let n1 = t.node(1).at(family, 30080);
    let own: [&Host; 4] = [t.pod("p11"), t.pod("p21"), t.node(2), t.node(1)];
    for from in own {
        check::even(&from.connect(proto, n1, 6)?, &t.pod_names())?;
    }
    let local = SocketAddr::new(family.localhost(), 30080);
    check::even(&t.node(1).connect(proto, local, 6)?, &t.pod_names())?;
    Ok(())
}

/// A client whose own port happens to be a published number: it is answered there, by whoever it asks.
fn number_of_a_client(cx: &mut Cx) -> Result<()> {
    let (t, proto, family) = (set_up(cx)?, cx.proto()?, cx.family());
    let (n1, n2) = (t.node(1), t.node(2));
    let from = |host: &Host, dst| host.probe(&Probe::new(proto, dst).bound_port(30080));
    check::answered(&from(&t.ext, n2.at(family, 30080))?)?;
    // A node that asks itself: what it answers has a published number as its destination.
    let local = SocketAddr::new(family.localhost(), 22);
    for dst in [local, n1.at(family, 22)] {
        check::only(&from(n1, dst)?, "HOST-n1").with_context(|| dst.to_string())?;
    }
    check::only(&from(n1, n2.at(family, 22))?, "HOST-n2")?;
    // The published port is as it was, also there.
    let local = SocketAddr::new(family.localhost(), 30080);
    check::even(&n1.connect(proto, local, 6)?, &t.pod_names())
}
