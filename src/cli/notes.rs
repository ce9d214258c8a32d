//! What is to be told of a service: why it is not served as it is declared, or differs from what one might expect.

use crate::{
    compile::{
        CompiledService,
        service::{is_served, wanted_families},
    },
    model::service::{Mode, TrafficDistribution},
    reconcile::Engine,
};

/// What keeps a service from being served as declared: allocation conflicts and blocked ports.
pub fn problems_of(engine: &Engine, service: &CompiledService) -> Vec<String> {
    let mut out = told_of(engine, service, true);
    let unserved = unserved_families(engine, service);
    if let Some((false, families)) = &unserved {
        out.push(format!(
            "not served here: this node serves no {families} (it has no such address, or no such --vip-cidr)"
        ));
    }
    for ((protocol, port), _) in engine.late_listeners().iter().filter(|(_, key)| **key == service.key) {
        out.push(format!(
            "published port {protocol} {port}: a socket of this host that came later listens on it too; \
             what is sent to this node's published addresses goes to the service"
        ));
    }
    out
}

/// What is to be known of a service that is served as declared: a value of it that has moved, a port that answers on other
/// nodes only because it is to.
pub fn notes_of(engine: &Engine, service: &CompiledService) -> Vec<String> {
    let declared = engine.snapshot().services().get(&service.key);
    let in_vain = declared.is_some_and(|s| s.distribution == TrafficDistribution::SameZone)
        && engine.settings().node.zone.is_none();
    let zone = in_vain.then(|| {
        "trafficDistribution: PreferSameZone has no effect here, since this node's zone is not known: label its Node \
         topology.kubernetes.io/zone, or give --topology-zone"
            .to_owned()
    });
    let family = unserved_families(engine, service).filter(|(others, _)| *others).map(|(_, families)| {
        format!("served by its other address only: this node serves no {families} (it has no such address)")
    });
    told_of(engine, service, false).into_iter().chain(zone).chain(family).collect()
}

/// Families of a service that this node does not serve, and whether it serves others of it. `None` where it serves all.
fn unserved_families(engine: &Engine, service: &CompiledService) -> Option<(bool, String)> {
    let declared = engine.snapshot().services().get(&service.key)?;
    // Its names are answered whatever is programmed.
    if declared.mode == Mode::Dnsrr && declared.ports.iter().all(|port| port.publish.is_none()) {
        return None;
    }
    let node = &engine.settings().node;
    let (served, unserved): (Vec<_>, Vec<_>) = wanted_families(declared, &service.vips)
        .into_iter()
        .partition(|family| is_served(*family, node, engine.facts()));
    let names: Vec<String> = unserved.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| (!served.is_empty(), names.join(" and no ")))
}

/// What compile says of a port with `publish.mode: Host` on a node that has none of its endpoints.
const ELSEWHERE: &str = "no endpoint on this node (mode Host)";

/// Whether a port is not published here for no reason but that it is published on other nodes.
pub fn is_elsewhere(why_not_published: &str) -> bool {
    why_not_published == ELSEWHERE
}

fn told_of(engine: &Engine, service: &CompiledService, wrong: bool) -> Vec<String> {
    let conflicts = engine.allocator().get(&service.key).map(|a| a.conflicts.as_slice()).unwrap_or_default();
    let conflicts = conflicts.iter().filter(|c| c.is_blocking() == wrong).map(ToString::to_string);
    let ports = service.ports.iter().filter_map(|port| {
        let why = port.not_published.as_ref().filter(|why| is_elsewhere(why) != wrong)?;
        Some(format!("port {}: not published on this node: {why}", port.spec.label()))
    });
    conflicts.chain(ports).collect()
}
