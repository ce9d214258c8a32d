//! Published ports and sockets of the host: who was there first keeps the port.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Engine, Served, compiling::Compiling};
use crate::{
    compile::{
        endpoints::{Place, serving, target_port},
        service::served_families,
    },
    dataplane::{Error, Listener, executor::Dataplane},
    model::{
        endpoints::Slice,
        ids::{Family, Mark, Protocol, ServiceKey},
        kernel::{Element, Target},
        service::{Publish, PublishMode, Service, ServicePort},
    },
    reconcile::listeners::{answering, held},
};

impl Compiling<'_> {
    /// Published ports that are about to be programmed for the first time, while a socket of the host
    /// holds them, are not taken from it. False where the kernel would have to be asked and can't be now.
    pub(super) fn find_blocked(
        &mut self,
        dirty: &BTreeSet<ServiceKey>,
        kernel: Option<&mut Dataplane>,
    ) -> Result<bool, Error> {
        let mut wanted: BTreeMap<(Protocol, u16), ServiceKey> = BTreeMap::new();
        let mut ports: Vec<(&ServiceKey, BTreeSet<(Protocol, u16)>)> = Vec::new();
        // A port that changes hands is ours all along.
        let before: BTreeSet<_> =
            dirty.iter().filter_map(|key| self.served.get(key)).flatten().copied().collect();
        for key in dirty {
            let (Some(service), Some(allocation)) =
                (self.snapshot.services().get(key), self.allocator.get(key))
            else {
                continue;
            };
            let families = served_families(service, &allocation.vips, &self.settings.node, self.facts);
            let slices = self.snapshot.slices_for(service);
            for port in &service.ports {
                let Some(&first) = allocation.published.get(&port.id()) else { continue };
                // A number that is not published here is anybody's: who has it when it is to be is asked then. So it is in no
                // family of this node, but a claim that was made outlasts the loss of an address.
                let here = if families.is_empty() {
                    self.served.get(key).is_some_and(|had| had.contains(&(port.protocol, first)))
                } else {
                    self.is_published_here(service, port, &slices, &families)
                };
                if !here {
                    continue;
                }
                let last = first.saturating_add(port.span().saturating_sub(1));
                let host = port.publish.as_ref().is_some_and(|publish| publish.mode == PublishMode::Host);
                let numbers: BTreeSet<_> = (first..=last).map(|number| (port.protocol, number)).collect();
                for number in &numbers {
                    if !before.contains(number) && !self.is_live(*number, host) {
                        wanted.insert(*number, key.clone());
                    }
                }
                ports.push((key, numbers));
            }
        }
        let mut found = BTreeSet::new();
        if !wanted.is_empty() {
            let Some(kernel) = kernel else { return Ok(false) };
            let listeners = kernel.host.listeners()?;
            let asked: BTreeSet<_> = wanted.keys().copied().collect();
            found = self.held(&asked, &listeners, &wanted);
        }
        self.blocked.retain(|_, owner| !dirty.contains(owner));
        let mut served = Served::new();
        // A range is served whole or not at all.
        for (key, numbers) in ports.into_iter().filter(|(_, numbers)| numbers.is_disjoint(&found)) {
            served.entry(key.clone()).or_default().extend(numbers);
        }
        for key in dirty {
            let new = served.remove(key);
            if self.served.get(key) != new.as_ref() {
                *self.generation += 1;
            }
            match new {
                Some(new) => self.served.insert(key.clone(), new),
                None => self.served.remove(key),
            };
        }
        for port in found {
            if let Some(owner) = wanted.remove(&port) {
                self.blocked.insert(port, owner);
            }
        }
        Ok(true)
    }

    /// Whether a published port is anything to this node: it has one of its addresses and, where only nodes with an endpoint
    /// publish it, an endpoint.
    fn is_published_here(
        &self,
        service: &Service,
        port: &ServicePort,
        slices: &[Arc<Slice>],
        families: &[Family],
    ) -> bool {
        let Some(publish) = &port.publish else { return false };
        if !self.facts.publishes_at_one_of(&publish.addresses) {
            return false;
        }
        if publish.mode != PublishMode::Host {
            return true;
        }
        let (place, reach) = (Place::of(&self.settings.node), service.external(publish.mode));
        families.iter().any(|family| !serving(service, port, slices, *family, place, reach).is_empty())
    }

    /// Those of these ports that a socket of the host holds, where the service answers; not its own endpoint's.
    fn held(
        &self,
        asked: &BTreeSet<(Protocol, u16)>,
        listeners: &[Listener],
        owners: &BTreeMap<(Protocol, u16), ServiceKey>,
    ) -> BTreeSet<(Protocol, u16)> {
        let own = |protocol, port| {
            owners.get(&(protocol, port)).is_some_and(|key| self.has_own_endpoint(key, protocol, port))
        };
        let on = |protocol, port| {
            let Some(key) = owners.get(&(protocol, port)) else { return BTreeSet::new() };
            let (service, allocation) = (self.snapshot.services().get(key), self.allocator.get(key));
            let families = service
                .zip(allocation)
                .map(|(service, a)| served_families(service, &a.vips, &self.settings.node, self.facts))
                .unwrap_or_default();
            answering(self.publish_of(key, protocol, port), &families, self.facts)
        };
        held(asked, listeners, on, own)
    }

    /// How a service publishes a port by this number.
    fn publish_of(&self, key: &ServiceKey, protocol: Protocol, number: u16) -> Option<&Publish> {
        let published = &self.allocator.get(key)?.published;
        let service = self.snapshot.services().get(key)?;
        let covers = |port: &&ServicePort| {
            let first = published.get(&port.id());
            port.protocol == protocol
                && first.is_some_and(|first| (*first..first.saturating_add(port.span())).contains(&number))
        };
        service.ports.iter().find(covers)?.publish.as_ref()
    }

    /// Whether the kernel leads packets for a published port to us already: so it is after a lost state file. Where only nodes
    /// with an endpoint publish it, what leads nowhere is no claim.
    fn is_live(&self, (protocol, port): (Protocol, u16), host: bool) -> bool {
        self.facts.published_addresses.iter().any(|&addr| {
            let entry = self.known.elements.get(&Element::Published(Target { addr, protocol, port }));
            entry.is_some_and(|mark| !host || *mark != Some(Mark::NOWHERE))
        })
    }

    /// Whether a service has an endpoint on the host network of this node that listens on that port.
    pub(super) fn has_own_endpoint(&self, key: &ServiceKey, protocol: Protocol, port: u16) -> bool {
        let Some(service) = self.snapshot.services().get(key) else { return false };
        let published = || service.ports.iter().filter(|p| p.protocol == protocol && p.publish.is_some());
        self.snapshot.slices_for(service).iter().any(|slice| {
            let told = slice.ports.iter().any(|p| p.protocol == protocol && p.port == Some(port));
            // A slice need not tell the number that it is asked for.
            let asked = || {
                published().any(|p| match target_port(p, &slice.ports) {
                    Some(0) => p.covers(port),
                    number => number == Some(port),
                })
            };
            (told || asked()) && slice.endpoints.iter().any(|e| self.facts.all_addresses.contains(&e.address))
        })
    }
}

impl Engine {
    /// Published ports that earlier runs served.
    pub fn set_served(&mut self, served: Served) {
        self.served = served;
    }

    /// Published ports that are served here, by service.
    pub fn served(&self) -> &Served {
        &self.served
    }

    /// Published ports that a host socket keeps us from serving here, with their services.
    pub fn blocked(&self) -> &BTreeMap<(Protocol, u16), ServiceKey> {
        &self.blocked
    }

    /// Served ports that a socket of the host holds too: it came later, and gets nothing of what is sent to the published
    /// addresses.
    pub fn late_listeners(&self) -> &BTreeMap<(Protocol, u16), ServiceKey> {
        &self.late
    }

    /// Looks again at the host's sockets: who has gone frees a port that was blocked, who has come is noted. Services for
    /// which either changes are settled again.
    ///
    /// # Errors
    /// When the sockets can't be listed.
    pub fn recheck_listeners(&mut self) -> Result<(), Error> {
        if self.blocked.is_empty() && self.served.is_empty() {
            return Ok(());
        }
        let listeners: Vec<Listener> = self.dataplane.host.listeners()?;
        let ports: BTreeSet<_> = self.blocked.keys().copied().collect();
        let (compiling, _) = self.divide();
        let still = compiling.held(&ports, &listeners, compiling.blocked);
        for (port, owner) in &self.blocked {
            if !still.contains(port) {
                self.dirty.insert(owner.clone());
            }
        }
        let heard: BTreeSet<_> = listeners.iter().map(|l| (l.protocol, l.port)).collect();
        let mut late = BTreeMap::new();
        for (key, ports) in &self.served {
            for port in ports.intersection(&heard) {
                late.insert(*port, key.clone());
            }
        }
        let asked: BTreeSet<_> = late.keys().copied().collect();
        let found = self.divide().0.held(&asked, &listeners, &late);
        late.retain(|port, _| found.contains(port));
        if late != self.late {
            self.dirty.extend(late.values().chain(self.late.values()).cloned());
            self.late = late;
        }
        Ok(())
    }
}
