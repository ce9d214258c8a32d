//! Published ports that a socket of the host holds already (design decision 5).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::{
    dataplane::Listener,
    model::{
        ids::{Family, Protocol},
        node::NodeFacts,
        service::Publish,
    },
};

/// The addresses of this node that a published port answers on: its own and 127.0.0.1 and ::1, or those of them that
/// the port names; of the families that its service has.
pub fn answering(publish: Option<&Publish>, families: &[Family], facts: &NodeFacts) -> BTreeSet<IpAddr> {
    let (v4, v6) = (facts.primary.v4.is_some(), facts.primary.v6.is_some());
    let loopback = [v4.then_some(Ipv4Addr::LOCALHOST.into()), v6.then_some(Ipv6Addr::LOCALHOST.into())];
    let all = facts.published_addresses.iter().copied().chain(loopback.into_iter().flatten());
    let wanted = |addr: &IpAddr| publish.is_none_or(|p| p.addresses.is_empty() || p.addresses.contains(addr));
    all.filter(|addr| families.contains(&Family::of(addr))).filter(wanted).collect()
}

/// Those of `ports` that a socket holds, on an address that `on` says, and that are not the service's own host-network
/// endpoint.
pub fn held(
    ports: &BTreeSet<(Protocol, u16)>,
    listeners: &[Listener],
    on: impl Fn(Protocol, u16) -> BTreeSet<IpAddr>,
    own: impl Fn(Protocol, u16) -> bool,
) -> BTreeSet<(Protocol, u16)> {
    let mut by_port: BTreeMap<(Protocol, u16), Vec<&Listener>> = BTreeMap::new();
    for listener in listeners {
        by_port.entry((listener.protocol, listener.port)).or_default().push(listener);
    }
    let taken = |protocol, port| {
        by_port.get(&(protocol, port)).is_some_and(|all| {
            let addresses = on(protocol, port);
            all.iter().any(|l| addresses.iter().any(|addr| l.takes(*addr, protocol, port)))
        })
    };
    let holds = |(protocol, port): &&(Protocol, u16)| taken(*protocol, *port) && !own(*protocol, *port);
    ports.iter().filter(holds).copied().collect()
}
