//! What `show`, `explain` and `plan` print: shapes that others read.

use insta::Settings;

use super::{dns::all_names, explain::explain, plan::Plan, report::report, show};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    dns::zone::Zone,
    model::{
        kernel::{Element, RealServerKey},
        unread::Unread,
    },
    reconcile::tests::{now, turn, vote},
};

fn golden(name: &str, text: &str) {
    let mut settings = Settings::clone_current();
    settings.set_snapshot_path("../../tests/golden");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// The service `vote` as it should be, or with an endpoint and a set entry that somebody has taken out.
fn told(damaged: bool) -> (super::report::Report, Plan) {
    let kernel = FakeKernel::default();
    turn(&mut vote(&kernel, Allocations::default()), true);
    if damaged {
        let mut state = kernel.lock();
        let gone = RealServerKey { addr: "10.244.1.12".parse().unwrap(), port: 8080 };
        for server in state.state.virtual_servers.values_mut() {
            std::sync::Arc::make_mut(&mut server.reals).remove(&gone);
        }
        state.state.elements.retain(|e, _| !matches!(e, Element::Vip(t) if t.port == 80));
    }
    let mut engine = vote(&kernel, Allocations::default());
    let (ops, observed) = engine.prepare_full(now()).unwrap();
    let zone = Zone::new("mesh.local", engine.settings().node.ranges).unwrap();
    let names = all_names(zone, &engine);
    let report = report(&mut engine, &observed, vec![], &names, &|_| vec![], &|_| true).unwrap();
    (report, Plan::new(&engine, &ops, &observed))
}

#[test]
fn json() {
    let (report, plan) = told(false);
    golden("show-json", &serde_json::to_string_pretty(&report).unwrap());
    assert!(serde_json::to_string(&plan).unwrap().ends_with("\"changes\":[]}"));
    golden("plan-json", &serde_json::to_string_pretty(&told(true).1).unwrap());
}

#[test]
fn text() {
    let dns = "10.200.0.2:53".parse().ok();
    let (mut report, _) = told(false);
    for name in &mut report.services[0].names {
        name.state = Some("ok".into());
    }
    golden("show", &show::summary(&report));
    golden("show-wide", &show::wide(&report));
    golden("explain", &explain(&report, &report.services[0], dns));
    let (report, _) = told(true);
    golden("explain-damaged", &explain(&report, &report.services[0], dns));
}

#[test]
fn plan_from_nothing() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    let (ops, observed) = engine.prepare_full(now()).unwrap();
    let plan = Plan::new(&engine, &ops, &observed);
    golden("plan-fresh", &plan.text());
    golden("plan-fresh-json", &serde_json::to_string_pretty(&plan).unwrap());
    // Each entry that an installation brings.
    let desired = engine.merged().state().elements.keys();
    assert!(desired.clone().count() >= 8);
    for element in desired {
        let line = format!("+ set {element}");
        assert!(plan.text().lines().any(|l| l.starts_with(&line)), "{element} is not in the plan");
    }
}

#[test]
fn entries_that_are_shared_belong_to_the_path() {
    use crate::{
        model::fixtures::{endpoint, published, slice},
        reconcile::tests::{engine, service_with},
    };
    let node = crate::model::fixtures::facts().primary.v4.unwrap().to_string();
    for gone in ["local", "endpoints", "own"] {
        let kernel = FakeKernel::default();
        let feed = || {
            let mut engine = engine(&kernel, Allocations::default());
            engine.feed([
                service_with("vote", published(80, 8080, Some(30080))),
                crate::model::snapshot::Event::Slice(slice(
                    "vote",
                    vec![endpoint("10.244.1.11", "n1"), endpoint("10.244.2.11", "n2"), endpoint(&node, "n1")],
                )),
            ]);
            engine.synced(Unread::default());
            engine
        };
        turn(&mut feed(), true);
        kernel.lock().state.elements.retain(|e, _| !e.to_string().starts_with(&format!("{gone} ")));
        let mut engine = feed();
        let (ops, observed) = engine.prepare_full(now()).unwrap();
        assert!(!ops.is_empty(), "nothing of {gone} was there");
        let zone = Zone::new("mesh.local", engine.settings().node.ranges).unwrap();
        let names = all_names(zone, &engine);
        let report = report(&mut engine, &observed, vec![], &names, &|_| vec![], &|_| true).unwrap();
        assert_ne!(show::state(&report.services[0]), "ok", "{gone}");
        let text = explain(&report, &report.services[0], None);
        assert!(
            text.lines().any(|l| l.contains("set entry") && l.contains(gone) && l.ends_with(": missing")),
            "{text}"
        );
    }
}

#[test]
fn a_port_of_mode_host_without_endpoint_is_no_problem() {
    use crate::{
        model::{
            fixtures::published,
            service::{Publish, PublishMode},
        },
        reconcile::tests::{endpoints, engine, service_with},
    };
    let kernel = FakeKernel::default();
    let mut port = published(80, 8080, Some(30080));
    port.publish = port.publish.map(|p| Publish { mode: PublishMode::Host, ..p });
    let mut engine = engine(&kernel, Allocations::default());
    engine.feed([service_with("vote", port), endpoints("vote", &[])]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let service = engine.merged().services().values().next().unwrap().clone();
    assert!(service.ports[0].not_published.is_some());
    assert_eq!(super::notes::problems_of(&engine, &service), Vec::<String>::new());
    let (_, observed) = engine.prepare_full(now()).unwrap();
    let zone = Zone::new("mesh.local", engine.settings().node.ranges).unwrap();
    let names = all_names(zone, &engine);
    let report = report(&mut engine, &observed, vec![], &names, &|_| vec![], &|_| true).unwrap();
    assert_eq!(show::state(&report.services[0]), "ok");
    let text = explain(&report, &report.services[0], None);
    assert!(
        text.contains("published 30080: not on this node: no endpoint on this node (mode Host)"),
        "{text}"
    );
}
