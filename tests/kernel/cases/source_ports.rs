//! One client, one source port, several addresses that lead to the same endpoint: connections that would look the same behind
//! the load balancer.

use std::net::SocketAddr;

use anyhow::{Context, Result};

use crate::check;
use crate::client::Probe;
use crate::runner::{Cx, Matrix, Proto, Renderer, Suite};
use crate::topology::{Host, Topology};

pub fn register(suite: &mut Suite) {
    for renderer in Renderer::ALL {
        let all = Matrix::once().with_renderers(&[renderer]).families().protos(&[Proto::Tcp, Proto::Udp]);
        suite.add("routing_mesh::source_port_is_used_again", &all, used_again);
    }
}

/// Two services for each endpoint: one on a pod, one on a node.
const SERVICES: [(&str, u8, u16, &str); 4] =
    [("a", 5, 30080, "p21"), ("b", 6, 30081, "p21"), ("c", 7, 30082, "n2"), ("d", 8, 30083, "n2")];

/// The last packets of a connection that has been closed, on two machines. Before they have come, IPVS and conntrack know two
/// connections that differ in nothing behind the load balancer, and answers go to either.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(40);

fn used_again(cx: &mut Cx) -> Result<()> {
    let (proto, family) = (cx.proto()?, cx.family());
    let spec = Topology::builder().nodes(2).ports(&[9090]).host_ports(&[]).vip_route(1);
    let t = cx.shared(&spec, |t, m| {
        t.node(2).serve_as("NET-n2", &crate::server::everywhere(&[9090], false))?;
        for (name, last, published, endpoint) in SERVICES {
            let vips = [format!("10.200.0.{last}"), format!("fd00:200::{last:x}")];
            let service = m.service(name).vips(&vips.each_ref().map(String::as_str))?;
            for proto in [Proto::Tcp, Proto::Udp] {
                service.port(proto, 80, 9090, Some(published));
            }
            let endpoint: &Host = if endpoint == "n2" { t.node(2) } else { t.pod(endpoint) };
            m.endpoints(name, &[endpoint]);
        }
        Ok(())
    })?;
    let (n1, n2) = (t.node(1), t.node(2));
    let clients: [&Host; 6] = [t.pod("p11"), t.pod("p22"), t.pod("p21"), n1, n2, &t.ext];
    let mut wrong = Vec::new();
    for (port, client) in (41_000..).zip(clients) {
        for (_, last, published, endpoint) in SERVICES {
            let vip = family.pick(format!("10.200.0.{last}"), format!("fd00:200::{last:x}"));
            let mut to =
                vec![SocketAddr::new(vip.parse()?, 80), n1.at(family, published), n2.at(family, published)];
            if client.name.starts_with('n') {
                to.push(SocketAddr::new(family.localhost(), published));
            }
            for dst in to {
                let tally = client.probe(&Probe::new(proto, dst).bound_port(port).closed())?;
                let name = if endpoint == "n2" { "NET-n2" } else { endpoint };
                if let Err(e) = check::only(&tally, name) {
                    wrong.push(format!("{e:#}"));
                }
                std::thread::sleep(PAUSE);
            }
        }
    }
    if !wrong.is_empty() {
        return Err(anyhow::anyhow!("{}", wrong.join("\n"))).context("answers by one source port");
    }
    Ok(())
}
