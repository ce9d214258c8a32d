//! Traffic policies.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Cluster, PROTOS, serve_from, two_nodes, vip, web};
use crate::check;
use crate::runner::{Cx, Family, Matrix, Suite};

pub fn register(suite: &mut Suite) {
    suite.add("lifecycle::local_policies", &Matrix::pair(), local);
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
    for family in Family::ALL {
        for proto in PROTOS {
            check::refused(&c.t.ext.connect(proto, c.t.node(2).at(family, 30080), 1)?)?;
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
