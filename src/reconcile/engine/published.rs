//! Connections by published ports: conntrack goes on with them, whatever becomes of the IPVS service that led them first.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::Engine;
use crate::{
    compile::{CompiledPort, CompiledService},
    model::{
        ids::{Family, Mark, PortId, Protocol, Scope},
        kernel::{Element, PublishedFlows, RealServerKey, VirtualServerKey},
    },
    plan::Observed,
};

/// What clients from outside connect to for a port of a service, and who may answer them: by whatever mark, since that changes
/// with a policy and leaves open connections where they are.
pub(super) struct Published {
    id: PortId,
    pub(super) mark: Option<Mark>,
    pub(super) protocol: Protocol,
    pub(super) to: BTreeSet<(IpAddr, u16)>,
    reals: BTreeSet<RealServerKey>,
}

impl Published {
    /// Whether such connections are this port's.
    pub(super) fn has(&self, protocol: Protocol, real: &RealServerKey, to: &(IpAddr, u16)) -> bool {
        self.protocol == protocol && self.to.contains(to) && self.reals.contains(real)
    }
}

/// The published ports of a service, by its entries and not by where they lead now: without a destination that takes new
/// connections that is nowhere.
pub(super) fn published(service: &CompiledService) -> Vec<Published> {
    let of = |port: &CompiledPort| {
        let to: BTreeSet<_> =
            service.elements.keys().filter(|e| port.publishes(e)).filter_map(connected_to).collect();
        let marks: BTreeSet<Mark> = port.marks.values().copied().collect();
        let theirs = service.reals.keys().filter(|(server, _)| marks.contains(&server.mark));
        Published {
            id: port.spec.id(),
            mark: port.marks.get(&Scope::Ingress).copied(),
            protocol: port.spec.protocol,
            to,
            reals: theirs.map(|(_, real)| *real).collect(),
        }
    };
    service.ports.iter().filter(|port| port.published.is_some()).map(of).collect()
}

fn connected_to(element: &Element) -> Option<(IpAddr, u16)> {
    match element {
        Element::Published(to) => Some((to.addr, to.port)),
        Element::Loopback(Family::V4, _, port) => Some((Ipv4Addr::LOCALHOST.into(), *port)),
        Element::Loopback(Family::V6, _, port) => Some((Ipv6Addr::LOCALHOST.into(), *port)),
        _ => None,
    }
}

/// Connections that a service has let go of: to a destination that is its port's no longer, or by a port that is not published
/// any more. With another number they go on.
pub(super) fn let_go(old: &CompiledService, new: Option<&CompiledService>) -> Vec<PublishedFlows> {
    let now: BTreeMap<PortId, BTreeSet<RealServerKey>> =
        new.map(published).unwrap_or_default().into_iter().map(|port| (port.id, port.reals)).collect();
    let mut out = Vec::new();
    for port in published(old).into_iter().filter(|port| port.protocol != Protocol::Udp) {
        let still = now.get(&port.id);
        for real in port.reals.iter().filter(|real| still.is_none_or(|still| !still.contains(*real))) {
            let family = Family::of(&real.addr);
            let to = port.to.iter().filter(|(addr, _)| Family::of(addr) == family).copied().collect();
            out.push(PublishedFlows { protocol: port.protocol, real: *real, to });
        }
    }
    out
}

impl Engine {
    /// At the first look: connections that an earlier run left, by published ports to destinations that are wanted no longer.
    pub(super) fn note_unwanted(&mut self, observed: &Observed) {
        let desired = self.merged.state();
        let mut out: BTreeMap<(Protocol, RealServerKey), BTreeSet<(IpAddr, u16)>> = BTreeMap::new();
        for (element, mark) in &observed.elements {
            let (protocol, Some(to)) = (protocol_of(element), connected_to(element)) else { continue };
            let here = self.facts.publishes_at(&to.0);
            if protocol.is_none_or(|p| p == Protocol::Udp) || !here {
                continue;
            }
            let server =
                |mark: &Option<Mark>| mark.map(|mark| VirtualServerKey { family: element.family(), mark });
            let Some(have) = server(mark).and_then(|key| observed.virtual_servers.get(&key)) else {
                continue;
            };
            let wanted = desired.elements.get(element);
            let want = wanted.and_then(server).and_then(|key| desired.virtual_servers.get(&key));
            if want.is_some_and(|want| want.reals == have.reals) {
                continue;
            }
            let owner = wanted.copied().flatten().and_then(|mark| self.merged.owner(mark));
            let owner = owner.or_else(|| wanted.and_then(|_| self.merged.owner_of(element)));
            let service = owner.and_then(|key| self.merged.services().get(key));
            let goes_on = |real: &RealServerKey| {
                service.is_some_and(|service| service.reals.keys().any(|(_, other)| other == real))
            };
            for real in have.reals.keys().filter(|real| !goes_on(real)) {
                out.entry((protocol.unwrap_or(Protocol::Tcp), *real)).or_default().insert(to);
            }
        }
        let flows = out.into_iter().map(|((protocol, real), to)| PublishedFlows { protocol, real, to });
        self.overdue.extend(flows);
    }
}

fn protocol_of(element: &Element) -> Option<Protocol> {
    match element {
        Element::Published(to) => Some(to.protocol),
        Element::Loopback(_, protocol, _) => Some(*protocol),
        _ => None,
    }
}
