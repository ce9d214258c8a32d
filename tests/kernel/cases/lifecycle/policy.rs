//! Traffic policies.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::super::dns::{SERVERS, answers_with};
use super::remove::{LATE, ways_to};
use super::{Cluster, PROTOS, serve_from, two_nodes, vip, web};
use crate::check;
use crate::client::{Flows, Probe};
use crate::manifests::{Endpoint, Manifests};
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::server::everywhere;
use crate::topology::Topology;

pub fn register(suite: &mut Suite) {
    suite.add("lifecycle::local_policies", &Matrix::pair(), local);
    suite.add("lifecycle::near_endpoints", &Matrix::pair(), near);
}

/// Both policies Local: everybody gets the endpoints of the node, with the client's address kept, and a refusal where the
/// node has none. Edits change one without the other.
fn local(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| {
        web(t, m, &["p11", "p12", "p22"])?;
        m.service("web").set("internalTrafficPolicy", json!("Local"));
        m.service("web").set("externalTrafficPolicy", json!("Local"));
        Ok(())
    })?;
    let both: [(u8, &[&str]); 2] = [(1, &["p11", "p12"]), (2, &["p22"])];
    for family in Family::ALL {
        for proto in PROTOS {
            for (node, servers) in both {
                let tally = c.t.ext.connect(proto, c.t.node(node).at(family, 30080), 4)?;
                check::even(&tally, servers)?;
                check::seen_as(&tally, &[c.t.ext.ip(family)])?;
                let pod = c.t.pod(if node == 1 { "p12" } else { "p21" });
                let tally = pod.connect(proto, vip(family, 80)?, 4)?;
                check::even(&tally, servers)?;
                check::server_saw(&tally, servers[0], pod.ip(family))?;
                check::even(&c.t.node(node).connect(proto, vip(family, 80)?, 2)?, servers)?;
            }
        }
    }
    // None left on n2.
    c.change(|t, m| {
        serve_from(t, m, "web", &["p11", "p12"]);
        Ok(())
    })?;
    // It is closed, and not left to whoever listens there.
    c.t.node(2).serve_as(LATE, &everywhere(&[30080], false))?;
    for family in Family::ALL {
        for proto in PROTOS {
            for (host, dst) in ways_to(&c.t, 2, 1, family) {
                check::refused(&host.connect(proto, dst, 1)?)
                    .with_context(|| format!("from {} to {dst}", host.name))?;
            }
            check::refused(&c.t.pod("p21").connect(proto, vip(family, 80)?, 1)?)?;
            check::refused(&c.t.node(2).connect(proto, vip(family, 80)?, 1)?)?;
            check::even(&c.t.ext.connect(proto, c.t.node(1).at(family, 30080), 4)?, &["p11", "p12"])?;
        }
    }
    // Only the internal policy back to Cluster, then only the external one.
    c.change(|_, m| {
        m.service("web").set("internalTrafficPolicy", json!("Cluster"));
        Ok(())
    })?;
    for family in Family::ALL {
        for proto in PROTOS {
            check::even(&c.t.pod("p21").connect(proto, vip(family, 80)?, 4)?, &["p11", "p12"])?;
            check::refused(&c.t.ext.connect(proto, c.t.node(2).at(family, 30080), 1)?)?;
        }
    }
    c.t.node(2).stop_serving(LATE);
    c.change(|_, m| {
        m.service("web").set("internalTrafficPolicy", json!("Local"));
        m.service("web").set("externalTrafficPolicy", json!("Cluster"));
        Ok(())
    })?;
    for family in Family::ALL {
        for proto in PROTOS {
            check::refused(&c.t.pod("p21").connect(proto, vip(family, 80)?, 1)?)?;
            let tally = c.t.ext.connect(proto, c.t.node(2).at(family, 30080), 4)?;
            check::even(&tally, &["p11", "p12"])?;
            check::seen_as(&tally, &[c.t.node(2).ip(family)])?;
        }
    }
    let report = c.service(1, "web")?;
    ensure!(report["readyEndpoints"] == 2, "{report:#}");
    c.in_sync()
}

/// `web`, and `rr` for DNS, from three pods, of which p11 is in zone z1, p12 in z2 and p21 in z1; those in `away` are not ready.
fn zoned(t: &Topology, m: &mut Manifests, away: &[&str]) {
    for family in Family::ALL {
        let endpoints = [("p11", "z1"), ("p12", "z2"), ("p21", "z1")].map(|(pod, zone)| {
            let endpoint = Endpoint { zone: Some(zone.to_owned()), ..Endpoint::of(t.pod(pod), family) };
            if away.contains(&pod) { endpoint.not_ready() } else { endpoint }
        });
        for service in ["web", "rr"] {
            m.slice(service, family, endpoints.clone().into());
        }
    }
}

/// `trafficDistribution`: the near endpoints serve while there are any, by virtual IP and published port, and are what a name in
/// mode DNSRR has; what is open stays.
fn near(cx: &mut Cx) -> Result<()> {
    // Both nodes are in z1.
    let meshlb = cx.meshlb()?.clone().flag("--topology-zone=z1");
    let mut c = Cluster::start_with(cx, meshlb, &two_nodes(), |t, m| {
        web(t, m, &["p11"])?;
        m.service("rr").set("mode", json!("DNSRR")).port(Proto::Tcp, 80, 8080, None);
        zoned(t, m, &[]);
        Ok(())
    })?;
    let served = |c: &Cluster, nodes: [&[&str]; 2]| -> Result<()> {
        for family in Family::ALL {
            let (server, kind) = family.pick((SERVERS[0], "A"), (SERVERS[1], "AAAA"));
            for (client, servers) in ["p12", "p22"].into_iter().zip(nodes) {
                let mut all: Vec<_> = servers.iter().map(|pod| c.t.pod(pod).ip(family).to_string()).collect();
                all.sort();
                let all: Vec<_> = all.iter().map(String::as_str).collect();
                answers_with(c.t.pod(client), server, "rr.default.mesh.internal", kind, &all)?;
            }
            for proto in PROTOS {
                for (node, servers) in (1..).zip(nodes) {
                    let n = 2 * servers.len();
                    check::even(
                        &c.t.pod(if node == 1 { "p12" } else { "p22" }).connect(
                            proto,
                            vip(family, 80)?,
                            n,
                        )?,
                        servers,
                    )?;
                    check::even(&c.t.ext.connect(proto, c.t.node(node).at(family, 30080), n)?, servers)?;
                }
            }
        }
        Ok(())
    };
    let prefer = |c: &mut Cluster, what: Value, away: &[&str]| {
        c.change(|t, m| {
            for service in ["web", "rr"] {
                m.service(service).set("trafficDistribution", what.clone());
            }
            zoned(t, m, away);
            Ok(())
        })
    };
    let all: &[&str] = &["p11", "p12", "p21"];
    served(&c, [all, all])?;
    let flows = Flows::start(
        &c.t.pod("p22").ns,
        &Probe::new(Proto::Tcp, vip(Family::V4, 80)?),
        3,
        std::time::Duration::from_millis(100),
    )?;
    prefer(&mut c, json!("PreferSameZone"), &[])?;
    served(&c, [&["p11", "p21"], &["p11", "p21"]])?;
    prefer(&mut c, json!("PreferSameNode"), &[])?;
    served(&c, [&["p11", "p12"], &["p21"]])?;
    let flows = flows.stop()?;
    ensure!(flows.iter().all(|f| f.errors.is_empty() && f.exchanges > 3), "{flows:?}");
    // None on n2: then those in its zone; none there either: then all.
    prefer(&mut c, json!("PreferSameNode"), &["p21"])?;
    served(&c, [&["p11", "p12"], &["p11"]])?;
    prefer(&mut c, json!("PreferSameZone"), &["p11", "p21"])?;
    served(&c, [&["p12"], &["p12"]])?;
    c.in_sync()
}
