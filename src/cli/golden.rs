//! What `show`, `explain` and `plan` print: shapes that others read.

use insta::Settings;

use super::{dns::all_names, explain::explain, plan::Plan, report::report, show};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    dns::zone::Zone,
    model::kernel::{Element, RealServerKey},
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
    (report, Plan::new(&engine, &ops))
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
