//! From an object in a real API server to packets: a controller, an agent on every node, all with the rights of the chart.

pub(super) mod bed;
mod edits;
mod outage;
mod quiet;
mod rows;
mod scraped;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use self::bed::{Bed, PATIENCE, condition, endpoints, granted, named, says, service};
use super::support::wait_until;
use crate::check;
use crate::client::{Load, Probe};
use crate::kube::NAMESPACE;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::Topology;

pub fn register(suite: &mut Suite) {
    // Where there is none, these are no cases, rather than ones that are left out.
    if std::env::var_os(crate::kube::KUBECONFIG).is_none_or(|file| file.is_empty()) {
        return;
    }
    let limit = Duration::from_secs(300);
    suite.add_slow("kube::from_apply_to_delete", &Matrix::pair(), limit, story);
    suite.add_slow("kube::told_by_nodes_and_uninstalled", &Matrix::pair(), limit, told);
    suite.add_slow("kube::edited_in_every_field", &Matrix::pair(), limit * 2, edits::edited);
    suite.add_slow("kube::rows", &Matrix::once(), limit, rows::rows);
    suite.add_slow("kube::numbers_exhausted", &Matrix::once(), limit, rows::exhausted);
    suite.add_slow("kube::bad_input", &Matrix::once(), limit, rows::bad);
    suite.add_slow("kube::quiet_minute", &Matrix::once(), limit, quiet::quiet);
    suite.add_slow("kube::away_for_minutes", &Matrix::once(), limit * 2, outage::outage);
    suite.add_slow("kube::server_and_etcd_are_stopped", &Matrix::once(), limit * 3, outage::stopped);
    suite.add_slow("kube::prometheus_finds_agents", &Matrix::once(), limit, scraped::scraped);
}

/// From nothing to packets, other endpoints under a load, and nothing again.
fn story(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::start(cx)?;
    let t = bed.t.clone();
    bed.kube.apply(&service())?;
    let all = ["p11", "p21", "p31"];
    endpoints(&bed.kube, &t, &all)?;
    let given = granted(&bed.kube, &service())?;
    let took = bed.until_served(&given, &all)?;
    cx.note(format!("works after {took:?}; {:?}", given.vips));
    says(&bed.kube, &service(), "Ready", "True")?;
    // Other endpoints under a load.
    let probe = Probe { pause: Duration::from_millis(20), ..Probe::new(Proto::Tcp, given.vips[0]) };
    let load = Load::start(&t.pod("p12").ns, &probe, 1);
    let now = ["p21", "p31", "p32"];
    endpoints(&bed.kube, &t, &now)?;
    bed.until_served_beside_a_load(&given, &now)?;
    let report = load.stop()?;
    ensure!(report.errors.is_empty() && report.answered() > 10, "the load: {report:?}");
    // None at all, and gone.
    endpoints(&bed.kube, &t, &[])?;
    bed.until_refused(t.pod("p11"), given.vips[0])?;
    says(&bed.kube, &service(), "Ready", "False NoEndpoints")?;
    endpoints(&bed.kube, &t, &now)?;
    bed.until_served(&given, &now)?;
    bed.kube.delete(&service())?;
    bed.until_refused(t.pod("p11"), given.vips[0])?;
    bed.alive()?;
    bed.end()
}

/// A socket holds a published port on one node: its MeshNode says so, and the status. Then meshlb is uninstalled, and comes back.
fn told(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::without_agents(cx)?;
    let t = bed.t.clone();
    let mesh_node = |k: u8| named("meshlb.dev/v1alpha1", "MeshNode", None, &format!("n{k}"));
    let request = named("v1", "ConfigMap", Some(NAMESPACE), "meshlb-uninstall");
    let socket = t.node(2).ns.enter(|| Ok(std::net::TcpListener::bind("0.0.0.0:30099")?))?;
    (1..=3).try_for_each(|k| bed.start_agent(k))?;
    let mut object = service();
    object["spec"]["ports"] =
        json!([{"name": "http", "port": 80, "targetPort": 8080, "publish": {"port": 30099}}]);
    bed.kube.apply(&object)?;
    let all = ["p11", "p21", "p31"];
    endpoints(&bed.kube, &t, &all)?;
    let programmed = |bed: &Bed, start: &str| {
        let log = bed.controller.as_ref().map(|c| c.log()).unwrap_or_default();
        says(&bed.kube, &service(), "Programmed", start).with_context(|| log)
    };
    programmed(
        &bed,
        "False PublishedPortHeld: 1 node does not serve it as it should be: n2: published port 30099/TCP is held",
    )?;
    let found = bed.kube.get(&mesh_node(2))?;
    ensure!(found["status"]["failing"]["count"] == 1, "{found:#}");
    ensure!(condition(&found, "Serving").starts_with("True"), "{found:#}");
    // The others serve it, and this one its virtual IP.
    let vip: SocketAddr = {
        let status = bed.kube.get(&service())?["status"].clone();
        SocketAddr::new(status["vips"][0].as_str().context("no VIP")?.parse()?, 80)
    };
    let works = |t: &Topology| -> Result<()> {
        check::even(&t.node(2).connect(Proto::Tcp, vip, 6)?, &all)?;
        check::even(&t.ext.connect(Proto::Tcp, t.node(1).at(Family::V4, 30099), 6)?, &all)
    };
    works(&t)?;
    drop(socket);
    programmed(&bed, "True Programmed")?;
    check::even(&t.ext.connect(Proto::Tcp, t.node(2).at(Family::V4, 30099), 6)?, &all)?;
    // The end.
    bed.kube.apply(&request)?;
    for k in 1..=3 {
        let mut last = Value::Null;
        wait_until("it has cleaned up", PATIENCE, || {
            last = bed.kube.get(&mesh_node(k))?;
            Ok(condition(&last, "CleanedUp").starts_with("True CleanedUp"))
        })
        .with_context(|| format!("{last:#}"))?;
    }
    programmed(&bed, "Unknown NoAgents")?;
    check::nothing_left(&t)?;
    // An agent that starts now programs nothing.
    bed.take_agent(1)?.kill();
    bed.start_agent(1)?;
    bed.agent(1)?.wait_for_log("nothing of meshlb is left", PATIENCE)?;
    std::thread::sleep(Duration::from_secs(3));
    check::nothing_left(&t)?;
    bed.alive()?;
    // Withdrawn, they end, and are started again.
    bed.kube.delete(&request)?;
    for k in 1..=3 {
        let mut agent = bed.take_agent(k)?;
        wait_until("it ends", Duration::from_secs(60), || Ok(!agent.alive()))?;
        ensure!(agent.log_text().contains("the uninstallation was withdrawn"), "{}", agent.log_text());
        bed.start_agent(k)?;
    }
    programmed(&bed, "True Programmed")?;
    wait_until("it works as before", PATIENCE, || Ok(works(&t).is_ok()))?;
    bed.end()
}
