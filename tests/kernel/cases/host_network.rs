//! Endpoints on the host network: a service's endpoint is a socket of a node, of this one or of another, and still no other
//! socket of the node is reached.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guard::{ask, refused};
use crate::check;
use crate::client::Probe;
use crate::manifests::Manifests;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::everywhere;
use crate::topology::{Builder, Host, Node, PodNetwork, Topology, Underlay};

const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];
/// Where the endpoints listen.
const TARGET: u16 = 9090;
/// A number that is published and that its endpoints listen on themselves.
const SAME: u16 = 30083;
/// The same, with endpoints on both nodes.
const SAME_ON_BOTH: u16 = 30087;

/// A service: name, last part of its addresses, published port, target port, endpoints.
type Case = (&'static str, u8, u16, u16, &'static [&'static str]);

const SERVICES: [Case; 6] = [
    ("mixed", 5, 30080, TARGET, &["n1", "n2", "p11", "p21"]),
    ("own", 6, 30081, TARGET, &["n1"]),
    ("other", 7, 30082, TARGET, &["n2"]),
    ("same-mixed", 8, SAME, SAME, &["n1", "p21"]),
    ("both-nodes", 9, 30085, TARGET, &["n1", "n2"]),
    ("same-both", 10, SAME_ON_BOTH, SAME_ON_BOTH, &["n1", "n2"]),
];

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(90);
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]);
        let all = one.clone().families().protos(&PROTOS);
        suite.add_slow("host_network::from_everywhere", &all, limit, from_everywhere);
        suite.add_slow("host_network::held_by_a_socket", &one, limit, held);
    }
    suite.add_slow("host_network::on_an_overlay", &Matrix::pair(), limit * 2, on_an_overlay);
}

/// Every pod and node listens on both ports; the outside client has a route to the virtual addresses by `n1`.
fn spec() -> Builder {
    Topology::builder().nodes(2).ports(&[TARGET, SAME]).host_ports(&[22, 80, 8080]).vip_route(1)
}

fn vip(family: Family, last: u8, port: u16) -> Result<SocketAddr> {
    let text = family.pick(format!("10.200.0.{last}"), format!("fd00:200::{last:x}"));
    Ok(SocketAddr::new(text.parse()?, port))
}

/// What a host's server for services calls itself: not `HOST-…`, as the sockets that nobody may reach.
fn server_name(host: &str) -> String {
    if host.starts_with('n') { format!("NET-{host}") } else { host.to_owned() }
}

fn late_name(node: &Node) -> String {
    format!("HOST-late-{}", node.name)
}

fn host<'a>(t: &'a Topology, name: &str) -> &'a Host {
    t.nodes.iter().map(|n| &**n).chain(&t.pods).find(|h| h.name == name).unwrap_or(&t.ext)
}

fn serve(t: &Topology) -> Result<()> {
    for node in &t.nodes {
        // Only `n1` has an endpoint on that number: on `n2` its listener would be a stranger's.
        let ports: &[u16] =
            if node.index == 1 { &[TARGET, SAME_ON_BOTH, SAME] } else { &[TARGET, SAME_ON_BOTH] };
        node.serve_as(&server_name(&node.name), &everywhere(ports, false))?;
    }
    Ok(())
}

fn describe(t: &Topology, m: &mut Manifests) -> Result<()> {
    for (name, last, published, target, endpoints) in SERVICES {
        let vips = [format!("10.200.0.{last}"), format!("fd00:200::{last:x}")];
        let service = m.service(name).vips(&vips.each_ref().map(String::as_str))?;
        for proto in PROTOS {
            service.port(proto, 80, target, Some(published));
        }
        let hosts: Vec<_> = endpoints.iter().map(|e| host(t, e)).collect();
        m.endpoints(name, &hosts);
    }
    Ok(())
}

/// Programmed nodes, and on each of them sockets that came later on the published numbers.
fn set_up(cx: &Cx) -> Result<Arc<Topology>> {
    cx.meshlb()?;
    let t = cx.shared(&spec(), |t, m| {
        // The endpoints are there first: theirs is one of the published numbers.
        serve(t)?;
        t.nodes.iter().for_each(|n| n.stop_serving(&late_name(n)));
        describe(t, m)
    })?;
    for node in &t.nodes {
        let late: Vec<u16> = SERVICES.iter().filter(|s| s.2 != s.3).map(|s| s.2).collect();
        node.serve_as(&late_name(node), &everywhere(&late, false))?;
    }
    Ok(t)
}

fn from_everywhere(cx: &mut Cx) -> Result<()> {
    let (proto, family) = (cx.proto()?, cx.family());
    let t = set_up(cx)?;
    ask_from_everywhere(&t, proto, family)
}

/// The same where pods are behind bridges and reach each other through a tunnel, and nodes do not: what goes to an endpoint of
/// the host network goes past the tunnel.
fn on_an_overlay(cx: &mut Cx) -> Result<()> {
    let bridge = PodNetwork::Bridge { br_netfilter: true };
    let spec = spec().pod_network(bridge).underlay(Underlay::Vxlan).cni_masquerade().rp_filter(1);
    let t = cx.topology(&spec)?;
    serve(&t)?;
    let mut m = cx.manifests()?;
    describe(&t, &mut m)?;
    cx.apply(&t, &mut m)?;
    for family in Family::ALL {
        for proto in PROTOS {
            ask_from_everywhere(&t, proto, family).with_context(|| format!("{proto}, {family}"))?;
        }
    }
    t.nodes.iter().for_each(|n| n.stop_serving(&server_name(&n.name)));
    Ok(())
}

fn ask_from_everywhere(t: &Topology, proto: Proto, family: Family) -> Result<()> {
    let (n1, n2) = (t.node(1), t.node(2));
    for (name, last, published, target, endpoints) in SERVICES {
        let servers: Vec<String> = endpoints.iter().map(|e| server_name(e)).collect();
        let address = vip(family, last, 80)?;
        let local = SocketAddr::new(family.localhost(), published);
        let (by_n1, by_n2) = (n1.at(family, published), n2.at(family, published));
        let mut jobs: Vec<(&Host, SocketAddr)> = vec![(n1, local), (n2, local)];
        for from in [t.pod("p11"), t.pod("p12"), t.pod("p22"), n1, n2] {
            jobs.extend([(from, address), (from, by_n1), (from, by_n2)]);
        }
        jobs.extend([(&t.ext, by_n1), (&t.ext, by_n2)]);
        jobs.push((&t.ext, address));
        for (from, dst) in jobs {
            let tally = from.connect(proto, dst, 2 * servers.len())?;
            if published == target {
                // What a node sends to such an endpoint on another node is for that node's published port: it is
                // spread once more there.
                check::among(&tally, &servers).with_context(|| name.to_owned())?;
                continue;
            }
            check::even(&tally, &servers).with_context(|| name.to_owned())?;
            // Whom the endpoints of `n1` and `n2` see: the client where they are on the node that was asked.
            let asked = if dst == by_n2 || (from.name == "n2" && dst == local) { 2 } else { 1 };
            if from.name == "ext" && dst.ip() != address.ip() {
                for endpoint in endpoints {
                    let at = host(t, endpoint);
                    // Through a tunnel it is the tunnel's address.
                    if t.spec.is_overlay() && endpoint.starts_with('p') && at.node != asked {
                        continue;
                    }
                    let node = if asked == 1 { n1 } else { n2 };
                    let seen = if at.node == asked { t.ext.ip(family) } else { node.ip(family) };
                    check::server_saw(&tally, &server_name(endpoint), seen)
                        .with_context(|| name.to_owned())?;
                }
            }
        }
    }
    // What is on the host network is an endpoint under its own address, and under nobody else's.
    let mut jobs = Vec::new();
    for from in [t.pod("p11"), t.pod("p22"), n1, n2, &t.ext] {
        for (address, port) in [(5, TARGET), (6, SAME), (6, 22), (7, 30081), (8, SAME), (99, 80), (1, TARGET)]
        {
            jobs.push((from, Probe::new(proto, vip(family, address, port)?)));
        }
    }
    refused(&jobs)?;
    // And still there for those who ask for it by its own address.
    for from in [t.pod("p11"), n2, &t.ext] {
        let tallies = ask(&[(from, Probe::new(proto, n1.at(family, TARGET)))])?;
        check::only(&tallies[0], "NET-n1")?;
    }
    Ok(())
}

/// The listener on a published number is reported unless it is the service's own endpoint.
fn held(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&spec())?;
    let n1 = t.node(1);
    serve(&t)?;
    n1.serve_as("HOST-first", &everywhere(&[30084], false))?;
    let mut m = cx.manifests()?;
    describe(&t, &mut m)?;
    // Its endpoint is on this node, but it is not what holds the published number.
    let held = m.service("held").vips(&["10.200.0.20", "fd00:200::14"])?;
    for proto in PROTOS {
        held.port(proto, 80, TARGET, Some(30084));
    }
    m.endpoints("held", &[n1, t.pod("p21")]);
    // A socket of the right number, and nobody's endpoint on this node.
    let foreign = m.service("foreign-same").vips(&["10.200.0.21", "fd00:200::15"])?;
    for proto in PROTOS {
        foreign.port(proto, 80, 30086, Some(30086));
    }
    m.endpoints("foreign-same", &[t.node(2)]);
    n1.serve_as("HOST-first-too", &everywhere(&[30086], false))?;
    m.write()?;
    cx.will_clean(n1);
    let dir = m.dir.to_string_lossy().into_owned();
    let out = meshlb.run(n1, &["apply", &dir])?;
    let show = meshlb.run(n1, &["show", "-o", "wide"])?.ok()?;
    cx.note(&out);
    for (what, text) in [("apply", &out.stderr), ("show", &show.stdout)] {
        for port in ["TCP 30084", "UDP 30084", "TCP 30086", "UDP 30086"] {
            let told = text.lines().any(|l| l.contains(port) && l.contains("held by a socket of this host"));
            ensure!(told, "{what} does not tell that {port} is held: {text}");
        }
        let own = [SAME, SAME_ON_BOTH].map(|port| port.to_string());
        let wrong = text.lines().find(|l| l.contains("held") && own.iter().any(|port| l.contains(port)));
        ensure!(wrong.is_none(), "{what} takes the service's own endpoint for somebody else: {wrong:?}");
    }
    for family in Family::ALL {
        for proto in PROTOS {
            check::only(&t.ext.connect(proto, n1.at(family, 30084), 2)?, "HOST-first")?;
            check::only(&t.ext.connect(proto, n1.at(family, 30086), 2)?, "HOST-first-too")?;
            check::even(&t.ext.connect(proto, n1.at(family, SAME), 4)?, &["NET-n1", "p21"])?;
            check::even(&t.pod("p12").connect(proto, vip(family, 20, 80)?, 4)?, &["NET-n1", "p21"])?;
        }
    }
    // The endpoint leaves the service: its socket stays, and is nobody's who asks for the service.
    m.endpoints("same-mixed", &[t.pod("p21")]);
    m.write()?;
    meshlb.run(n1, &["apply", &dir])?;
    for family in Family::ALL {
        for proto in PROTOS {
            check::only(&t.ext.connect(proto, n1.at(family, SAME), 3)?, "p21")?;
            check::only(&n1.connect(proto, n1.at(family, SAME), 3)?, "p21")?;
            check::only(&n1.connect(proto, SocketAddr::new(family.localhost(), SAME), 3)?, "p21")?;
        }
    }
    for name in ["HOST-first", "HOST-first-too"] {
        n1.stop_serving(name);
    }
    t.nodes.iter().for_each(|n| n.stop_serving(&server_name(&n.name)));
    Ok(())
}
