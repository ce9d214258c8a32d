//! Allocations after a lost state file.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    allocate::{Allocations, Lock, allocate},
    model::{
        ids::{Family, Mark, PortId, ServiceKey},
        kernel::{Element, Elements, Target},
        node::NodeConfig,
        service::Service,
    },
};

/// Allocations after a lost state file: VIPs and published ports as their names give them, marks as the
/// kernel has them for the same addresses and ports, so that connections go on.
pub(super) fn recover_allocations(
    elements: &Elements,
    node: &NodeConfig,
    services: &BTreeMap<ServiceKey, Arc<Service>>,
    lock: &Lock,
    foreign: &BTreeSet<Mark>,
) -> Allocations {
    let fresh = allocate(services, node, Allocations::default(), lock.clone(), foreign.clone());
    let mut out = fresh.allocations();
    let mark_at = |addr, port: &PortId, number| {
        let target = Target { addr, protocol: port.protocol, port: number };
        elements.get(&Element::Vip(target)).copied().flatten()
    };
    for kept in out.services.values_mut() {
        let vips: Vec<_> = kept.vips.iter().map(|(_, vip)| *vip).collect();
        let ingress: Vec<_> = Family::ALL.into_iter().filter_map(|f| node.ingress(f)).collect();
        kept.marks = kept
            .marks
            .keys()
            .filter_map(|port| {
                let by_vip = vips.iter().find_map(|vip| mark_at(*vip, port, port.port));
                let published = kept.published.get(port);
                let by_port = || published.and_then(|n| ingress.iter().find_map(|a| mark_at(*a, port, *n)));
                Some((*port, by_vip.or_else(by_port)?))
            })
            .collect();
        kept.ingress_marks = kept
            .ingress_marks
            .keys()
            .filter_map(|port| {
                let number = kept.published.get(port)?;
                Some((*port, ingress.iter().find_map(|a| mark_at(*a, port, *number))?))
            })
            .collect();
    }
    // Everything else that our sets lead to is not given out until it is gone from the kernel.
    let used: BTreeSet<Mark> = out
        .services
        .values()
        .flat_map(|k| k.marks.values().chain(k.ingress_marks.values()))
        .copied()
        .collect();
    out.retired_marks = elements.values().flatten().filter(|mark| !used.contains(mark)).copied().collect();
    out
}
