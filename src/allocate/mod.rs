//! Who gets which virtual IP, published port and mark. Pure: no clock, no I/O.
//!
//! Automatic values start from a hash of the service's name ([`hash::stable`]) and probe on from there, in the
//! upper band of the range (KEP-3070, KEP-3668), so that every node that is given the same folder comes to the
//! same values. Where two names collide the answer depends on what was there first: `meshlb.lock`
//! ([`lock::Lock`]) settles that for good, and [`Allocator::unsettled`] names the services it should hold.
//!
//! | value | explicit in the manifest | in the lock file | automatic |
//! |---|---|---|---|
//! | beats | lock file and automatic | automatic | – |
//! | two of one rank | the older wins, of equal age the first key; the other has none | never happens | – |
//! | a loser | is told by whom, and heals | becomes automatic | moves, and says so |

pub mod aliases;
pub mod conflict;
pub mod hash;
pub mod lock;
pub mod marks;
pub mod pool;
mod wants;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

pub use conflict::Conflict;
pub use lock::Lock;
pub use wants::offset;

use crate::model::{
    ids::{Family, Mark, PerFamily, PortId, Protocol, Scope, ServiceKey},
    node::NodeConfig,
    service::{Service, ServicePort},
};
use marks::{MarkOwner, Marks};
use pool::{Claimant, Outcome, Pool, Want};

/// What one service has.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ServiceAllocation {
    /// Virtual IPs.
    pub vips: PerFamily<IpAddr>,
    /// Published port (of a range: the first) by port.
    pub published: BTreeMap<PortId, u16>,
    /// Marks. The two scopes of a port have the same one unless their endpoints can differ.
    pub marks: BTreeMap<(PortId, Scope), Mark>,
    /// What it could not get as asked.
    pub conflicts: Vec<Conflict>,
}

/// What all services have: what the state file keeps.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Allocations {
    /// By service.
    #[serde(default)]
    pub services: BTreeMap<ServiceKey, Kept>,
    /// Marks that the kernel may still have, though no service has them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub retired_marks: BTreeSet<Mark>,
}

impl Allocations {
    /// Every mark that the kernel may have because of us.
    pub fn known_marks(&self) -> BTreeSet<Mark> {
        let kept = self.services.values().flat_map(|k| k.marks.values().chain(k.ingress_marks.values()));
        kept.chain(&self.retired_marks).copied().collect()
    }
}

/// What one service had.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// Virtual IPs.
    #[serde(default, skip_serializing_if = "PerFamily::is_empty")]
    pub vips: PerFamily<IpAddr>,
    /// Published port by port.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub published: BTreeMap<PortId, u16>,
    /// Mark by port, of the scope VIP or of both.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub marks: BTreeMap<PortId, Mark>,
    /// Mark by port of the scope ingress, where it has its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ingress_marks: BTreeMap<PortId, Mark>,
}

/// The allocator of one node, or of a mesh. Work is in proportion to what changes.
#[derive(Debug)]
pub struct Allocator {
    config: NodeConfig,
    lock: Lock,
    previous: Allocations,
    vips: PerFamily<Pool>,
    ports: BTreeMap<Protocol, Pool>,
    marks: Marks,
    current: HashMap<ServiceKey, ServiceAllocation>,
    known: HashMap<ServiceKey, Arc<Service>>,
    /// For a whole mesh: marks are each node's own.
    without_marks: bool,
    /// Ports that something else has on every node, and what.
    outside: BTreeMap<(Protocol, u16), ServiceKey>,
}

impl Allocator {
    /// An allocator that remembers `previous` values: each is kept while nothing firm is against it.
    /// `foreign` marks are in the kernel on services that are not ours.
    pub fn new(config: NodeConfig, previous: Allocations, lock: Lock, foreign: BTreeSet<Mark>) -> Self {
        let mut had = HashMap::new();
        for (service, kept) in &previous.services {
            for (scope, marks) in [(Scope::Vip, &kept.marks), (Scope::Ingress, &kept.ingress_marks)] {
                let owner = |port: &PortId| MarkOwner { service: service.clone(), port: *port, scope };
                had.extend(marks.iter().map(|(port, mark)| (owner(port), *mark)));
            }
        }
        let mut allocator = Self {
            marks: Marks::new(config.mask, had, previous.retired_marks.clone(), foreign),
            vips: wants::vip_pools(&config),
            ports: wants::port_pools(&config),
            lock: Lock::default(),
            config,
            previous,
            current: HashMap::new(),
            known: HashMap::new(),
            without_marks: false,
            outside: BTreeMap::new(),
        };
        allocator.put_lock(lock);
        let services: Vec<ServiceKey> = allocator.previous.services.keys().cloned().collect();
        services.iter().for_each(|service| allocator.for_kept_numbers(service, Pool::keep));
        allocator
    }

    /// An allocator for all nodes: virtual IPs and published ports, and no marks, which are each node's own.
    pub fn for_mesh(config: NodeConfig, previous: Allocations) -> Self {
        let allocator = Self::new(config, previous, Lock::default(), BTreeSet::new());
        Self { without_marks: true, ..allocator }
    }

    /// Takes in which ports something else has on every node (node ports of core Services), and what that is called: claims
    /// on them lose. Takes effect with the next [`Self::update`].
    pub fn set_outside(&mut self, outside: BTreeMap<(Protocol, u16), ServiceKey>) {
        let claimant = |protocol: Protocol, number: u16, who: &ServiceKey| Claimant {
            service: who.clone(),
            port: Some(PortId { port: number, protocol }),
        };
        for ((protocol, number), who) in &self.outside {
            if outside.get(&(*protocol, *number)) != Some(who)
                && let Some(pool) = self.ports.get_mut(protocol)
            {
                pool.claim(&claimant(*protocol, *number, who), None, None);
            }
        }
        for ((protocol, number), who) in &outside {
            if let Some(pool) = self.ports.get_mut(protocol) {
                let want = Want::Outside { number: (*number).into() };
                pool.claim(&claimant(*protocol, *number, who), Some(want), None);
            }
        }
        self.outside = outside;
    }

    /// Every number that an earlier run gave to a service, with its pool.
    fn for_kept_numbers(&mut self, service: &ServiceKey, mut act: impl FnMut(&mut Pool, u128, Claimant)) {
        let Some(kept) = self.previous.services.get(service) else { return };
        for (family, pool) in [(Family::V4, &mut self.vips.v4), (Family::V6, &mut self.vips.v6)] {
            let number = self
                .config
                .ranges
                .get(family)
                .zip(kept.vips.get(family))
                .and_then(|(r, v)| wants::offset(r, v));
            if let Some((pool, number)) = pool.as_mut().zip(number) {
                act(pool, number, Claimant { service: service.clone(), port: None });
            }
        }
        for (port, number) in &kept.published {
            if let Some(pool) = self.ports.get_mut(&port.protocol) {
                act(pool, u128::from(*number), Claimant { service: service.clone(), port: Some(*port) });
            }
        }
    }

    /// Takes a new lock file in. The services whose values differ afterwards come with the next
    /// [`Self::update`].
    pub fn set_lock(&mut self, lock: Lock) -> BTreeSet<ServiceKey> {
        let differs = |key: &ServiceKey| self.lock.services.get(key) != lock.services.get(key);
        let changed: BTreeSet<ServiceKey> =
            self.lock.services.keys().chain(lock.services.keys()).filter(|k| differs(k)).cloned().collect();
        self.put_lock(lock);
        changed
    }

    fn put_lock(&mut self, lock: Lock) {
        for (family, pool) in [(Family::V4, &mut self.vips.v4), (Family::V6, &mut self.vips.v6)] {
            let Some((pool, range)) = pool.as_mut().zip(self.config.ranges.get(family)) else { continue };
            let locked = lock.services.iter().filter_map(|(service, kept)| {
                let number = wants::offset(range, kept.vips.get(family)?)?;
                Some((number, Claimant { service: service.clone(), port: None }))
            });
            pool.set_locked(locked.collect());
        }
        for (protocol, pool) in &mut self.ports {
            let locked = lock.services.iter().flat_map(|(service, kept)| {
                let mine = kept.published.iter().filter(|(port, _)| port.protocol == *protocol);
                mine.map(|(port, n)| {
                    (u128::from(*n), Claimant { service: service.clone(), port: Some(*port) })
                })
            });
            pool.set_locked(locked.collect());
        }
        self.lock = lock;
    }

    /// Takes changed, new and vanished services in. Returns all whose allocation is different now: those among
    /// `changed`, their victims, and those that healed.
    pub fn update(
        &mut self,
        changed: &BTreeSet<ServiceKey>,
        services: &BTreeMap<ServiceKey, Arc<Service>>,
    ) -> BTreeSet<ServiceKey> {
        let mut touched = changed.clone();
        for key in changed {
            let new = services.get(key);
            let old = match new {
                Some(service) => self.known.insert(key.clone(), service.clone()),
                None => {
                    self.for_kept_numbers(key, |pool, number, who| pool.forget(number, &who));
                    self.previous.services.remove(key);
                    self.known.remove(key)
                }
            };
            if old.is_none() {
                // From here on its claims speak for it: who keeps a number goes before who looks for one.
                self.for_kept_numbers(key, |pool, number, who| pool.forget(number, &who));
                if let Some(new) = new.filter(|_| !self.without_marks) {
                    self.release_remembered_marks(new);
                }
            }
            self.state_claims(key, old.as_deref(), new.map(Arc::as_ref));
            if let Some(old) = old.filter(|_| !self.without_marks) {
                // Before anything is taken; what is given back stays out until the kernel no longer has it.
                self.release_marks(&old, new.map(Arc::as_ref));
            }
        }
        for pool in self.pools_mut() {
            touched.extend(pool.settle().into_iter().map(|who| who.service));
        }
        let mut different = BTreeSet::new();
        for key in touched {
            let new = self.known.get(&key).cloned().map(|service| self.collect(&service));
            let same = self.current.get(&key) == new.as_ref();
            match new {
                Some(allocation) => drop(self.current.insert(key.clone(), allocation)),
                None => drop(self.current.remove(&key)),
            }
            if !same {
                different.insert(key);
            }
        }
        different
    }

    /// Marks that a service had in an earlier run and needs no more, since it was edited meanwhile.
    fn release_remembered_marks(&mut self, service: &Service) {
        let Some(kept) = self.previous.services.get(&service.key) else { return };
        let wanted = wants::marks(service, &self.config);
        let had = [(Scope::Vip, &kept.marks), (Scope::Ingress, &kept.ingress_marks)];
        let had = had.into_iter().flat_map(|(scope, marks)| marks.keys().map(move |port| (scope, *port)));
        let owners = had.map(|(scope, port)| MarkOwner { service: service.key.clone(), port, scope });
        let unwanted: Vec<_> = owners.filter(|had| !wanted.iter().any(|(_, owner)| owner == had)).collect();
        unwanted.iter().for_each(|owner| self.marks.release(owner));
    }

    fn pools_mut(&mut self) -> impl Iterator<Item = &mut Pool> {
        self.vips.v4.iter_mut().chain(self.vips.v6.iter_mut()).chain(self.ports.values_mut())
    }

    fn state_claims(&mut self, key: &ServiceKey, old: Option<&Service>, new: Option<&Service>) {
        let kept = self.previous.services.get(key);
        let locked = self.lock.services.get(key);
        let vip = Claimant { service: key.clone(), port: None };
        for (family, pool) in [(Family::V4, &mut self.vips.v4), (Family::V6, &mut self.vips.v6)] {
            let Some((pool, range)) = pool.as_mut().zip(self.config.ranges.get(family)) else { continue };
            let want = new.and_then(|s| wants::vip(s, family, &self.config, locked));
            let sticky = kept.and_then(|k| wants::offset(range, k.vips.get(family)?));
            pool.claim(&vip, want, sticky);
        }
        let ports = |s: Option<&Service>| -> Vec<PortId> {
            s.map_or_else(Vec::new, |s| s.ports.iter().map(|p| p.id()).collect())
        };
        let gone: Vec<PortId> = ports(old).into_iter().filter(|id| !ports(new).contains(id)).collect();
        let none = BTreeMap::new();
        // Nodes that follow folders come to the same values by themselves, whatever was there before.
        let had = match old {
            _ if !self.without_marks => &none,
            Some(_) => self.current.get(key).map_or(&none, |allocation| &allocation.published),
            None => kept.map_or(&none, |kept| &kept.published),
        };
        let config = &self.config;
        let wanted = new.into_iter().flat_map(|s| {
            s.ports.iter().map(move |p| {
                let sticky = kept.and_then(|k| k.published.get(&p.id())).copied();
                let sticky = sticky.or_else(|| wants::carried(had, s, p)).map(u128::from);
                (p.id(), wants::published(s, p, config, locked), sticky)
            })
        });
        for (id, want, sticky) in wanted.chain(gone.into_iter().map(|id| (id, None, None))) {
            let Some(pool) = self.ports.get_mut(&id.protocol) else { continue };
            pool.claim(&Claimant { service: key.clone(), port: Some(id) }, want, sticky);
        }
    }

    /// Gives back the marks that a service no longer needs.
    fn release_marks(&mut self, old: &Service, new: Option<&Service>) {
        let owners = |s: &Service| wants::marks(s, &self.config).into_iter().map(|(_, owner)| owner);
        let needed: BTreeSet<MarkOwner> = new.into_iter().flat_map(owners).collect();
        let had: Vec<MarkOwner> = owners(old).filter(|owner| !needed.contains(owner)).collect();
        had.iter().for_each(|owner| self.marks.release(owner));
    }

    fn collect(&mut self, service: &Service) -> ServiceAllocation {
        let mut found = ServiceAllocation::default();
        if service.mode == crate::model::service::Mode::Vip {
            self.collect_vips(service, &mut found);
        }
        if wants::missing_range(service, &self.config).is_some() {
            return found;
        }
        for port in &service.ports {
            let who = Claimant { service: service.key.clone(), port: Some(port.id()) };
            let outcome = self.ports.get(&port.protocol).and_then(|pool| pool.outcome(&who));
            self.collect_port(port.id(), outcome.cloned(), &mut found);
        }
        self.compare_with_lock(service, &mut found);
        self.release_moved_marks(service, &found);
        let marks = if self.without_marks { Vec::new() } else { wants::marks(service, &self.config) };
        for (scopes, owner) in marks {
            match self.marks.claim(&owner) {
                Some(mark) => found.marks.extend(scopes.into_iter().map(|scope| ((owner.port, scope), mark))),
                None => {
                    found.conflicts.push(Conflict::MarksExhausted { port: owner.port, scope: owner.scope })
                }
            }
        }
        found
    }

    /// IPVS goes on with a flow of datagrams by its addresses, whatever the mark and for as long as there are any: when a virtual IP
    /// is another service's, its clients would stay with this one. They leave with its mark's IPVS service.
    fn release_moved_marks(&mut self, service: &Service, new: &ServiceAllocation) {
        let before = self.current.get(&service.key).map(|old| old.vips);
        let before = before.or_else(|| Some(self.previous.services.get(&service.key)?.vips));
        let moved = |(family, vip): (Family, &IpAddr)| new.vips.get(family) != Some(vip);
        if self.without_marks || !before.is_some_and(|before| before.iter().any(moved)) {
            return;
        }
        for port in service.ports.iter().filter(|port| port.protocol == Protocol::Udp) {
            let owner = MarkOwner { service: service.key.clone(), port: port.id(), scope: Scope::Vip };
            self.marks.release(&owner);
        }
    }

    /// Adds what the lock file says in vain.
    fn compare_with_lock(&self, service: &Service, found: &mut ServiceAllocation) {
        let Some(locked) = self.lock.services.get(&service.key).filter(|_| service.granted.is_none()) else {
            return;
        };
        let mut pairs = Vec::new();
        let explicit = |family| service.vips.iter().any(|vip| Family::of(vip) == family);
        for (family, vip) in locked.vips.iter().filter(|(family, _)| !explicit(*family)) {
            let given = found.vips.get(family);
            pairs.extend(given.map(|given| (format!("virtual IP {vip}"), format!("virtual IP {given}"))));
        }
        let automatic =
            |port: &&ServicePort| port.publish.as_ref().is_some_and(|publish| publish.port.is_none());
        for id in service.ports.iter().filter(automatic).map(ServicePort::id) {
            let of = |number: &u16| format!("published port {number}/{}", id.protocol);
            pairs
                .extend(locked.published.get(&id).zip(found.published.get(&id)).map(|(l, g)| (of(l), of(g))));
        }
        let differing = pairs.into_iter().filter(|(locked, given)| locked != given);
        found.conflicts.extend(differing.map(|(locked, given)| Conflict::LockNotFollowed { locked, given }));
    }

    fn collect_vips(&self, service: &Service, found: &mut ServiceAllocation) {
        if let Some(family) = wants::missing_range(service, &self.config) {
            found.conflicts.push(Conflict::RangeMissing { family });
            return;
        }
        let who = Claimant { service: service.key.clone(), port: None };
        for family in wants::families(service, &self.config) {
            let Some((pool, range)) = self.vips.get(family).zip(self.config.ranges.get(family)) else {
                continue;
            };
            let address = |n: u128| crate::model::node::nth_address(range, n);
            match pool.outcome(&who) {
                Some(Outcome::Held { first, moved_by }) => {
                    found.vips.set(family, address(*first));
                    if let Some((from, by)) = moved_by.as_deref()
                        && let (Some(from), Some(to)) = (address(*from), address(*first))
                    {
                        found.conflicts.push(Conflict::VipMoved { from, to, by: by.service.clone() });
                    }
                }
                Some(Outcome::Taken { number, by }) => {
                    if let Some(vip) = address(*number) {
                        found.conflicts.push(Conflict::VipTaken { vip, by: by.service.clone() });
                    }
                }
                Some(Outcome::Exhausted) => found.conflicts.push(Conflict::VipsExhausted { family }),
                // Not granted yet: the mesh's allocator says why.
                None if service.granted.is_some() => {}
                None => {
                    let vip = service.vips.iter().find(|vip| Family::of(vip) == family);
                    found.conflicts.extend(vip.map(|vip| Conflict::VipUnusable { vip: *vip }));
                }
            }
        }
    }

    fn collect_port(&self, port: PortId, outcome: Option<Outcome>, found: &mut ServiceAllocation) {
        let number = |n: u128| u16::try_from(n).unwrap_or(0);
        match outcome {
            None => {}
            Some(Outcome::Held { first, moved_by }) => {
                found.published.insert(port, number(first));
                if let Some((from, by)) = moved_by.map(|moved| *moved) {
                    let (from, to) = (number(from), number(first));
                    found.conflicts.push(Conflict::PortMoved { port, from, to, by: by.service });
                }
            }
            Some(Outcome::Taken { number: n, by }) => found.conflicts.push(Conflict::PortTaken {
                port,
                number: number(n),
                by_port: by.port.unwrap_or(port),
                by: by.service,
            }),
            Some(Outcome::Exhausted) => found.conflicts.push(Conflict::PortsExhausted { port }),
        }
    }

    /// Services of earlier runs that have not turned up yet: what they had is kept for them.
    pub fn remembered(&self) -> impl Iterator<Item = &ServiceKey> {
        self.previous.services.keys().filter(|key| !self.known.contains_key(*key))
    }

    /// Marks that are kept for a service of an earlier run.
    pub fn remembered_marks(&self, key: &ServiceKey) -> impl Iterator<Item = Mark> {
        let kept = self.previous.services.get(key);
        kept.into_iter().flat_map(|k| k.marks.values().chain(k.ingress_marks.values()).copied())
    }

    /// Which service, and which of its ports, had a mark in an earlier run, unless the service is known to be gone.
    pub fn remembered_owners(&self) -> HashMap<Mark, (&ServiceKey, PortId)> {
        let all = self.previous.services.iter();
        all.flat_map(|(key, kept)| {
            let marks = kept.marks.iter().chain(&kept.ingress_marks);
            marks.map(move |(port, mark)| (*mark, (key, *port)))
        })
        .collect()
    }

    /// Published ports (of a range: the first) that are kept for a service of an earlier run.
    pub fn remembered_ports(&self, key: &ServiceKey) -> impl Iterator<Item = (Protocol, u16)> {
        let kept = self.previous.services.get(key);
        kept.into_iter().flat_map(|k| k.published.iter().map(|(port, number)| (port.protocol, *number)))
    }

    /// Whether every mark that a service needs is kept for it from an earlier run.
    pub fn remembers(&self, service: &Service) -> bool {
        wants::marks(service, &self.config).iter().all(|(_, owner)| self.marks.remembers(owner))
    }

    /// Keeps nothing for services that will not turn up any more.
    pub fn forget(&mut self, gone: &BTreeSet<ServiceKey>) {
        for key in gone {
            self.for_kept_numbers(key, |pool, number, who| pool.forget(number, &who));
            self.previous.services.remove(key);
        }
        self.marks.forget(gone);
    }

    /// What a service has.
    pub fn get(&self, key: &ServiceKey) -> Option<&ServiceAllocation> {
        self.current.get(key)
    }

    /// Every service and what it has, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&ServiceKey, &ServiceAllocation)> {
        self.current.iter()
    }

    /// The kernel has none of these retired marks any more. Returns the services that may get a mark now: pass
    /// them to [`Self::update`].
    pub fn commit(&mut self, free: &BTreeSet<Mark>) -> BTreeSet<ServiceKey> {
        self.marks.commit(free)
    }

    /// Whether [`Self::commit`] has anything to do.
    pub fn has_retired_marks(&self) -> bool {
        !self.marks.retired().is_empty()
    }

    /// Marks that were given back, and that the kernel may still have.
    pub fn retired_marks(&self) -> &BTreeSet<Mark> {
        self.marks.retired()
    }

    /// Retires those of these marks, all of them in the kernel because of us, that nothing is known of, and says which.
    pub fn retire_strays(&mut self, marks: &BTreeSet<Mark>) -> BTreeSet<Mark> {
        self.marks.retire_strays(marks)
    }

    /// Marks of services in the kernel that are not ours, as far as known.
    pub fn foreign_marks(&self) -> &BTreeSet<Mark> {
        self.marks.foreign()
    }

    /// Marks of services in the kernel that are not ours. Returns the services to pass to [`Self::update`].
    pub fn set_foreign_marks(&mut self, foreign: BTreeSet<Mark>) -> BTreeSet<ServiceKey> {
        self.marks.set_foreign(foreign)
    }

    /// Services whose automatic values follow from history and not from their names alone, with the service
    /// whose name stands in their way, if it is still there.
    pub fn unsettled(&self) -> BTreeMap<ServiceKey, Option<ServiceKey>> {
        let pools = self.vips.iter().map(|(_, pool)| pool).chain(self.ports.values());
        pools.flat_map(Pool::unsettled).map(|(who, by)| (who.service, by.map(|by| by.service))).collect()
    }

    /// What the state file keeps.
    pub fn allocations(&self) -> Allocations {
        let mut services: BTreeMap<ServiceKey, Kept> = BTreeMap::new();
        for (key, allocation) in &self.current {
            let kept = services.entry(key.clone()).or_default();
            kept.vips = allocation.vips;
            kept.published = allocation.published.clone();
        }
        for (owner, mark) in self.marks.held() {
            let kept = services.entry(owner.service.clone()).or_default();
            match owner.scope {
                Scope::Vip => kept.marks.insert(owner.port, mark),
                Scope::Ingress => kept.ingress_marks.insert(owner.port, mark),
            };
        }
        for key in self.remembered() {
            services.insert(key.clone(), self.previous.services[key].clone());
        }
        // What is somebody else's is not to be taken for ours by a later run.
        let foreign = self.marks.foreign();
        for kept in services.values_mut().filter(|_| !foreign.is_empty()) {
            kept.marks.retain(|_, mark| !foreign.contains(mark));
            kept.ingress_marks.retain(|_, mark| !foreign.contains(mark));
        }
        services.retain(|_, kept| *kept != Kept::default());
        let retired_marks = self.marks.retired().difference(foreign).copied().collect();
        Allocations { services, retired_marks }
    }
}

/// All services at once, from nothing but what was before: for `apply`, `plan` and `lock`.
pub fn allocate(
    services: &BTreeMap<ServiceKey, Arc<Service>>,
    config: &NodeConfig,
    previous: Allocations,
    lock: Lock,
    foreign: BTreeSet<Mark>,
) -> Allocator {
    let mut allocator = Allocator::new(config.clone(), previous, lock, foreign);
    allocator.update(&services.keys().cloned().collect(), services);
    allocator
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
