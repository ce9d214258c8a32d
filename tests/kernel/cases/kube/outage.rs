//! The API server can't be reached for minutes, and much changes meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::bed::{Bed, PATIENCE, endpoints, granted, mesh_service, pods, service};
use crate::cases::support::wait_until;
use crate::check;
use crate::client::{Flows, Load, Probe};
use crate::kube::NAMESPACE;
use crate::runner::{Cx, Family, Proto};

/// Longer than any request may take, and than a connection goes unnoticed that says nothing any more.
const AWAY: Duration = Duration::from_secs(150);

pub fn outage(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::start(cx)?;
    let (t, before, after) = (bed.t.clone(), ["p11", "p21", "p31"], ["p11", "p22", "p31"]);
    let goes = mesh_service("default", "goes");
    let comes = mesh_service("default", "comes");
    for object in [&service(), &goes] {
        bed.kube.apply(object)?;
    }
    endpoints(&bed.kube, &t, &before)?;
    pods(&bed.kube, &t, "default", "goes", &["p11", "p21"])?;
    let given = granted(&bed.kube, &service())?;
    let going = granted(&bed.kube, &goes)?;
    bed.until_served(&given, &before)?;
    bed.until_served(&going, &["p11", "p21"])?;
    let probe = |proto, to| Probe { pause: Duration::from_millis(50), ..Probe::new(proto, to) };
    let published = t.node(2).at(Family::V6, given.ports[0]);
    let loads = [
        ("TCP by VIP", Load::start(&t.pod("p12").ns, &probe(Proto::Tcp, given.vips[0]), 1)),
        ("UDP by VIP", Load::start(&t.pod("p32").ns, &probe(Proto::Udp, given.vips[1]), 1)),
        ("TCP published", Load::start(&t.ext.ns, &probe(Proto::Tcp, published), 1)),
    ];
    let open = Flows::start(
        &t.pod("p12").ns,
        &Probe::new(Proto::Tcp, given.vips[0]),
        3,
        Duration::from_millis(200),
    )?;
    let programmed = t.snapshots()?;
    let start = Instant::now();
    (1..=3).try_for_each(|k| bed.reachable(k, false))?;
    // The controller, which is not on a node, goes on.
    endpoints(&bed.kube, &t, &after)?;
    bed.kube.delete(&goes)?;
    bed.kube.apply(&comes)?;
    pods(&bed.kube, &t, "default", "comes", &["p12", "p32"])?;
    let coming = granted(&bed.kube, &comes)?;
    // An agent that is started now takes over what it finds.
    std::thread::sleep(Duration::from_secs(5));
    bed.take_agent(2)?.kill();
    bed.start_agent(2)?;
    bed.agent(2)?.wait_for_log("can't be reached", PATIENCE)?;
    std::thread::sleep(AWAY.saturating_sub(start.elapsed()));
    for (k, (programmed, now)) in programmed.iter().zip(t.snapshots()?).enumerate() {
        check::same(programmed, &now, &format!("on n{}, without the API server", k + 1))?;
    }
    bed.until_served_beside_a_load(&given, &before).context("as before the outage")?;
    bed.until_served_beside_a_load(&going, &["p11", "p21"]).context("as before the outage")?;
    bed.alive()?;
    let back = Instant::now();
    (1..=3).try_for_each(|k| bed.reachable(k, true))?;
    bed.until_served_beside_a_load(&given, &after).context("what has changed meanwhile")?;
    bed.until_served_beside_a_load(&coming, &["p12", "p32"]).context("what has come meanwhile")?;
    for from in [t.pod("p12"), t.node(2)] {
        bed.until_refused(from, going.vips[0]).context("what has gone meanwhile")?;
    }
    cx.note(format!("away for {:?}; all was there {:?} later", back - start, back.elapsed()));
    for (what, load) in loads {
        let report = load.stop()?;
        cx.note(format!("{what}: {} answered, slowest {:?}", report.answered(), report.slowest));
        let lost = report.errors.iter().filter(|(_, e)| what.starts_with("UDP") && e == "timeout").count();
        ensure!(
            report.errors.len() == lost && lost <= 2 && report.answered() > 200,
            "{what}: {} answered, {:?}",
            report.answered(),
            report.errors
        );
    }
    // Those to the endpoint that has gone had their drain.
    for flow in open.stop()? {
        let gone = flow.servers.first().is_some_and(|s| s == "p21");
        ensure!(gone || flow.errors.is_empty(), "an open connection: {flow:?}");
    }
    bed.end()
}

/// The API server itself is stopped for minutes, and then etcd: for the controller, too, which loses its Lease. What was served
/// is served, by an agent that is started meanwhile too; afterwards numbers are given as ever, and none twice.
pub fn stopped(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::start(cx)?;
    let t = bed.t.clone();
    let all = ["p11", "p21", "p31"];
    bed.kube.apply(&service())?;
    endpoints(&bed.kube, &t, &all)?;
    let given = granted(&bed.kube, &service())?;
    bed.until_served(&given, &all)?;
    let mut vips = vec![given.vips[0]];
    for (what, away) in [("kube-apiserver", Duration::from_secs(100)), ("etcd", Duration::from_secs(20))] {
        let probe = |to| Probe { pause: Duration::from_millis(50), ..Probe::new(Proto::Tcp, to) };
        let loads = [
            Load::start(&t.pod("p12").ns, &probe(given.vips[0]), 1),
            Load::start(&t.ext.ns, &probe(t.node(2).at(Family::V6, given.ports[0])), 1),
        ];
        let programmed = t.snapshots()?;
        let hold = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hold", "namespace": NAMESPACE},
            "data": {"what": what, "seconds": away.as_secs().to_string()}});
        bed.kube.delete(&hold)?;
        bed.kube.apply(&hold)?;
        let since = Instant::now();
        std::thread::sleep(Duration::from_secs(4));
        bed.take_agent(2)?.kill();
        bed.start_agent(2)?;
        bed.until_served_beside_a_load(&given, &all).with_context(|| format!("without {what}"))?;
        // A request may hang for as long.
        wait_until(&format!("{what} is back"), away + PATIENCE, || Ok(bed.kube.get(&service()).is_ok()))?;
        let gone = since.elapsed();
        ensure!(
            gone > away - Duration::from_secs(5),
            "{what} was there after {gone:?} already: this says nothing"
        );
        for (k, (programmed, now)) in programmed.iter().zip(t.snapshots()?).enumerate() {
            check::same(programmed, &now, &format!("on n{}, without {what}", k + 1))?;
        }
        // Somebody leads again, and gives what is free.
        let new = mesh_service("default", if what == "etcd" { "later" } else { "new" });
        wait_until("an object can be written", PATIENCE, || Ok(bed.kube.apply(&new).is_ok()))?;
        let name = new["metadata"]["name"].as_str().context("no name")?;
        pods(&bed.kube, &t, "default", name, &["p12", "p32"])?;
        let other = granted(&bed.kube, &new)?;
        bed.until_served_beside_a_load(&other, &["p12", "p32"])?;
        ensure!(!vips.contains(&other.vips[0]), "{other:?} is given twice");
        vips.push(other.vips[0]);
        ensure!(granted(&bed.kube, &service())? == given, "what was granted has changed");
        cx.note(format!("without {what} for {gone:?}"));
        for load in loads {
            let report = load.stop()?;
            ensure!(report.errors.is_empty() && report.answered() > 200, "without {what}: {report:?}");
        }
    }
    bed.end()
}
