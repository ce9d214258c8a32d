//! Connections by published ports: conntrack goes on with them, whatever becomes of the IPVS service that led them first.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::Engine;
use crate::{
    compile::{CompiledPort, CompiledService},
    model::{
        ids::{Family, Mark, PortId, Protocol, Scope},
        kernel::{Element, PublishedFlows, RealServerKey},
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
    /// Whether this destination is one of its.
    pub(super) fn has_real(&self, real: &RealServerKey) -> bool {
        self.reals.contains(real)
    }

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

/// An entry of a published port: itself, its protocol, and what clients connect to.
type Entry<'a> = (&'a Element, Protocol, (IpAddr, u16));

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
        let desired = &self.merged.state();
        // Entries by where they lead. Those that lead nowhere had destinations once, of which some may be draining.
        let mut entries: HashMap<(Family, Mark), Vec<Entry<'_>>> = HashMap::new();
        for (element, mark) in &observed.elements {
            let (Some(protocol), Some(to)) = (protocol_of(element), connected_to(element)) else { continue };
            if let Some(mark) = mark.filter(|_| protocol != Protocol::Udp && self.facts.publishes_at(&to.0)) {
                entries.entry((element.family(), mark)).or_default().push((element, protocol, to));
            }
        }
        let mut out: BTreeMap<(Protocol, RealServerKey), BTreeSet<(IpAddr, u16)>> = BTreeMap::new();
        for (key, have) in &observed.virtual_servers {
            let want = desired.virtual_servers.get(key);
            let unwanted = |real: &&RealServerKey| want.is_none_or(|want| !want.reals.contains_key(*real));
            let by_mark = entries.get(&(key.family, key.mark)).map_or(&[][..], Vec::as_slice);
            let nowhere = entries.get(&(key.family, Mark::NOWHERE)).map_or(&[][..], Vec::as_slice);
            let leads_as_it_did = |element: &Element| {
                desired.elements.get(element) == Some(&Some(key.mark))
                    && want.is_some_and(|want| want.reals == have.reals)
            };
            for (element, protocol, to) in by_mark.iter().filter(|(element, ..)| !leads_as_it_did(element)) {
                let services = self.go_on_in(element, key.mark);
                for real in have.reals.keys().filter(|real| !have_real(&services, real)) {
                    out.entry((*protocol, *real)).or_default().insert(*to);
                }
            }
            let gone: Vec<_> = have.reals.keys().filter(unwanted).collect();
            for (element, protocol, to) in nowhere.iter().filter(|_| !gone.is_empty()) {
                let services = self.go_on_in(element, key.mark);
                for real in gone.iter().filter(|real| !have_real(&services, real)) {
                    out.entry((*protocol, **real)).or_default().insert(*to);
                }
            }
        }
        let flows = out.into_iter().map(|((protocol, real), to)| PublishedFlows { protocol, real, to });
        self.overdue.extend(flows);
    }

    /// The services that go on with connections by an entry that an earlier run left: the one that has the entry now, and the one
    /// whose port had the mark, if that is published by whatever number.
    fn go_on_in(&self, element: &Element, mark: Mark) -> Vec<&CompiledService> {
        let services = self.merged.services();
        let owner = match self.merged.state().elements.get(element) {
            Some(Some(mark)) if *mark != Mark::NOWHERE => self.merged.owner(*mark),
            Some(_) => self.merged.owner_of(element),
            None => None,
        };
        let by_mark = match self.merged.owner(mark) {
            Some(key) => services.get(key).filter(|service| {
                let has = |port: &CompiledPort| {
                    port.published.is_some() && port.marks.values().any(|theirs| *theirs == mark)
                };
                service.ports.iter().any(has)
            }),
            // An edit may have taken the mark from it meanwhile.
            None => self
                .allocator
                .remembered_owner(mark)
                .and_then(|key| services.get(key))
                .filter(|service| service.ports.iter().any(|port| port.published.is_some())),
        };
        let owner = owner.and_then(|key| services.get(key));
        owner.into_iter().chain(by_mark).map(|service| &**service).collect()
    }
}

fn have_real(services: &[&CompiledService], real: &RealServerKey) -> bool {
    services.iter().any(|service| service.reals.keys().any(|(_, other)| other == real))
}

fn protocol_of(element: &Element) -> Option<Protocol> {
    match element {
        Element::Published(to) => Some(to.protocol),
        Element::Loopback(_, protocol, _) => Some(*protocol),
        _ => None,
    }
}
