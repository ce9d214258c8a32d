//! Connections by published ports: conntrack goes on with them, whatever becomes of the IPVS service that led them first.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::Engine;
use crate::{
    compile::{CompiledPort, CompiledService},
    model::{
        ids::{Family, Mark, PortId, Protocol, Scope, ServiceKey},
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
    /// Those that the entries lead to. A flow of datagrams has no end that another policy could wait for.
    led_to: BTreeSet<RealServerKey>,
    /// All, with their marks: IPVS may still have a flow of before an edit by one that no entry leads to.
    by_mark: BTreeSet<(Mark, RealServerKey)>,
}

impl Published {
    /// Whether this destination is one of its.
    pub(super) fn has_real(&self, real: &RealServerKey) -> bool {
        self.reals.contains(real)
    }

    /// Whether such connections are this port's.
    pub(super) fn has(&self, protocol: Protocol, real: &RealServerKey, to: &(IpAddr, u16)) -> bool {
        let reals = if protocol == Protocol::Udp { &self.led_to } else { &self.reals };
        self.protocol == protocol && self.to.contains(to) && reals.contains(real)
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
        let ingress = port.marks.get(&Scope::Ingress);
        let led_to = theirs.clone().filter(|(server, _)| Some(&server.mark) == ingress);
        Published {
            id: port.spec.id(),
            mark: ingress.copied(),
            protocol: port.spec.protocol,
            to,
            led_to: led_to.map(|(_, real)| *real).collect(),
            by_mark: theirs.clone().map(|(server, real)| (server.mark, *real)).collect(),
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
/// any more. With another number they go on, but for UDP, which has no end: whoever has the number then is to have its datagrams.
/// The plan finds UDP flows to a destination that goes by a number that stays with its mark. One whose policy was edited may go on
/// where it was, as long as IPVS remembers it and has the destination by another mark; with that it ends.
pub(super) fn let_go(old: &CompiledService, new: Option<&CompiledService>) -> Vec<PublishedFlows> {
    let now: BTreeMap<PortId, Published> =
        new.map(published).unwrap_or_default().into_iter().map(|port| (port.id, port)).collect();
    let mut out = Vec::new();
    for port in published(old) {
        let still = now.get(&port.id);
        let udp = port.protocol == Protocol::Udp;
        let goes_on = |real: &RealServerKey, to: &(IpAddr, u16)| {
            still.is_some_and(|still| {
                if !udp {
                    return still.has_real(real);
                }
                let was_led = port.led_to.contains(real);
                let is_led = still.led_to.contains(real);
                let plan_sees = was_led && still.mark == port.mark;
                let has = |(_, other): &&(Mark, RealServerKey)| other == real;
                let stays = || port.by_mark.iter().filter(has).all(|other| still.by_mark.contains(other));
                still.to.contains(to) && (is_led || plan_sees || (!was_led && stays()))
            })
        };
        for real in &port.reals {
            let family = Family::of(&real.addr);
            let to = port.to.iter().filter(|to| Family::of(&to.0) == family && !goes_on(real, to));
            let to: BTreeSet<_> = to.copied().collect();
            if !to.is_empty() {
                out.push(PublishedFlows { protocol: port.protocol, real: *real, to });
            }
        }
    }
    out
}

/// What of these connections none of these ports goes on with.
pub(super) fn given_up(flows: &PublishedFlows, by: &[Published]) -> Option<PublishedFlows> {
    let goes_on = |to: &(IpAddr, u16)| by.iter().any(|port| port.has(flows.protocol, &flows.real, to));
    let to: BTreeSet<_> = flows.to.iter().filter(|to| !goes_on(to)).copied().collect();
    (!to.is_empty()).then(|| PublishedFlows { to, ..flows.clone() })
}

impl Engine {
    /// At the first look: connections that an earlier run left, by published ports to destinations that are wanted no longer.
    pub(super) fn note_unwanted(&mut self, observed: &Observed) {
        let desired = &self.merged.state();
        // Entries by where they lead. Those that lead nowhere had destinations once, of which some may be draining.
        let mut entries: HashMap<(Family, Mark), Vec<Entry<'_>>> = HashMap::new();
        let leads_as_it_did = |element: &Element, mark: Mark| {
            let key = VirtualServerKey { family: element.family(), mark };
            let (have, want) = (observed.virtual_servers.get(&key), desired.virtual_servers.get(&key));
            desired.elements.get(element) == Some(&Some(mark))
                && have.zip(want).is_some_and(|(have, want)| have.reals == want.reals)
        };
        for (element, mark) in &observed.elements {
            let (Some((protocol, _)), Some(to)) = (element.published_number(), connected_to(element)) else {
                continue;
            };
            if mark.is_some_and(|mark| leads_as_it_did(element, mark)) {
                continue;
            }
            if let Some(mark) = mark.filter(|_| self.facts.publishes_at(&to.0)) {
                entries.entry((element.family(), mark)).or_default().push(Entry { element, protocol, to });
            }
        }
        if entries.is_empty() {
            return;
        }
        let owners = self.owners_of_entries();
        let remembered = self.allocator.remembered_owners();
        let mut ports = Ports::default();
        let mut out: BTreeMap<(Protocol, RealServerKey), BTreeSet<(IpAddr, u16)>> = BTreeMap::new();
        for (key, have) in &observed.virtual_servers {
            let want = desired.virtual_servers.get(key);
            let unwanted = |real: &&RealServerKey| want.is_none_or(|want| !want.reals.contains_key(*real));
            let by_mark = entries.get(&(key.family, key.mark)).map_or(&[][..], Vec::as_slice);
            let nowhere = entries.get(&(key.family, Mark::NOWHERE)).map_or(&[][..], Vec::as_slice);
            let gone: Vec<_> = have.reals.keys().filter(unwanted).collect();
            // By the entries that led here all destinations may be unwanted, by the others those that were draining.
            let led = by_mark.iter().map(|entry| (entry, have.reals.keys().collect::<Vec<_>>()));
            let others = nowhere.iter().filter(|_| !gone.is_empty()).map(|entry| (entry, gone.clone()));
            let had = self.still_published(key.mark, &remembered);
            for (entry, reals) in led.chain(others) {
                let udp = entry.protocol == Protocol::Udp;
                let had_by = |ports: &mut Ports, matches: &dyn Fn(&Published) -> bool| {
                    had.is_some_and(|(service, id)| {
                        ports.of(service).iter().any(|port| port.id == id && matches(port))
                    })
                };
                // The plan sees to UDP flows by a number that stays with its mark.
                let stays = desired.elements.get(entry.element) == Some(&Some(key.mark));
                if udp && stays && had_by(&mut ports, &|port| port.to.contains(&entry.to)) {
                    continue;
                }
                for real in reals {
                    let goes_on = owners.get(entry.element).is_some_and(|service| {
                        ports.of(service).iter().any(|port| port.has(entry.protocol, real, &entry.to))
                    }) || !udp && had_by(&mut ports, &|port| port.has_real(real));
                    if !goes_on {
                        out.entry((entry.protocol, *real)).or_default().insert(entry.to);
                    }
                }
            }
        }
        let flows = out.into_iter().map(|((protocol, real), to)| PublishedFlows { protocol, real, to });
        self.overdue.extend(flows);
    }

    /// The services that have the entries of published ports now.
    fn owners_of_entries(&self) -> HashMap<&Element, &CompiledService> {
        let services = self.merged.services().values();
        services
            .flat_map(|service| {
                let published = service.elements.keys().filter(|element| element.is_published());
                published.map(move |element| (element, &**service))
            })
            .collect()
    }

    /// The port that had a mark, if it is published, by whatever number: it goes on with the connections too.
    fn still_published(
        &self,
        mark: Mark,
        remembered: &HashMap<Mark, (&ServiceKey, PortId)>,
    ) -> Option<(&CompiledService, PortId)> {
        let (key, id) = match self.merged.owner(mark) {
            Some(key) => {
                let ports = &self.merged.services().get(key)?.ports;
                (key, ports.iter().find(|port| port.marks.values().any(|theirs| *theirs == mark))?.spec.id())
            }
            // An edit may have taken the mark from it meanwhile.
            None => *remembered.get(&mark)?,
        };
        let service = self.merged.services().get(key)?;
        let published = |port: &CompiledPort| port.published.is_some() && port.spec.id() == id;
        service.ports.iter().any(published).then_some((&**service, id))
    }
}

/// An entry of a published port that an earlier run left.
struct Entry<'a> {
    element: &'a Element,
    protocol: Protocol,
    to: (IpAddr, u16),
}

/// Published ports of services, each worked out once.
#[derive(Default)]
struct Ports(HashMap<ServiceKey, Vec<Published>>);

impl Ports {
    fn of(&mut self, service: &CompiledService) -> &[Published] {
        self.0.entry(service.key.clone()).or_insert_with(|| published(service))
    }
}
