//! Published ports that a socket of the host holds already (design decision 5).

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    dataplane::Listener,
    model::{ids::Protocol, node::NodeFacts},
};

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
