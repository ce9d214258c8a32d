//! Published ports that a socket of the host holds already (design decision 5).

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    compile::CompiledService,
    dataplane::Listener,
    model::{
        ids::{Protocol, ServiceKey},
        kernel::{Element, Elements},
        node::NodeFacts,
    },
};

/// A published port with a listening socket on one of its addresses.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Held {
    /// Protocol.
    pub protocol: Protocol,
    /// Published port.
    pub port: u16,
}

/// Those of `ports` that a socket holds and that are not the service's own host-network endpoint.
pub fn held(
    ports: &BTreeSet<(Protocol, u16)>,
    listeners: &[Listener],
    facts: &NodeFacts,
    own: impl Fn(Protocol, u16) -> bool,
) -> BTreeSet<(Protocol, u16)> {
    let mut by_port: BTreeMap<(Protocol, u16), Vec<&Listener>> = BTreeMap::new();
    for listener in listeners {
        by_port.entry((listener.protocol, listener.port)).or_default().push(listener);
    }
    let takes = |listener: &Listener| {
        facts.published_addresses.iter().any(|addr| listener.takes(*addr, listener.protocol, listener.port))
    };
    ports
        .iter()
        .filter(|(protocol, port)| {
            by_port.get(&(*protocol, *port)).is_some_and(|all| all.iter().any(|l| takes(l)))
                && !own(*protocol, *port)
        })
        .copied()
        .collect()
}

/// Published ports that elements lead packets for.
pub fn live_ports(elements: &Elements) -> BTreeSet<(Protocol, u16)> {
    elements
        .keys()
        .filter_map(|element| match element {
            Element::Published(target) => Some((target.protocol, target.port)),
            _ => None,
        })
        .collect()
}

/// Published ports of compiled services, with their owners.
pub fn published_ports<'a>(
    services: impl Iterator<Item = &'a CompiledService>,
) -> BTreeMap<(Protocol, u16), ServiceKey> {
    let mut out = BTreeMap::new();
    for service in services {
        for port in &service.ports {
            let Some(first) = port.published else { continue };
            for number in first..=first.saturating_add(port.spec.span().saturating_sub(1)) {
                out.insert((port.spec.protocol, number), service.key.clone());
            }
        }
    }
    out
}
