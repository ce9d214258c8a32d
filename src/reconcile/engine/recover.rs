//! Allocations after a lost state file.
//!
//! What follows from a service's name (and the lock file) is the first guess. The kernel does not know names, but it knows
//! where each address leads: where another's endpoints are behind the guess and this service's own behind another address,
//! history had given it that one, and it keeps it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use crate::{
    allocate::{Allocations, Lock, allocate},
    model::{
        ids::{Family, Mark, PortId, Protocol, ServiceKey},
        kernel::{Element, Target, VirtualServerKey},
        node::NodeConfig,
        snapshot::Snapshot,
    },
    plan::Observed,
};

/// VIPs and published ports as their names give them or as the kernel has them for the same endpoints; marks as the kernel
/// has them for these, so that connections go on.
pub(super) fn recover_allocations(
    observed: &Observed,
    node: &NodeConfig,
    snapshot: &Snapshot,
    lock: &Lock,
) -> Allocations {
    let foreign = observed.foreign_marks.clone();
    let fresh = allocate(snapshot.services(), node, Allocations::default(), lock.clone(), foreign);
    let mut out = fresh.allocations();
    let kernel = Kernel::new(observed, node, snapshot);
    for family in Family::ALL {
        kernel.settle_vips(&mut out, family, lock);
    }
    for protocol in Protocol::ALL {
        kernel.settle_ports(&mut out, protocol, lock);
    }
    kernel.take_marks(&mut out);
    // Everything else that our sets lead to is not given out until it is gone from the kernel.
    let used = out.known_marks();
    let led_to = observed.elements.values().flatten();
    let led_to = led_to.filter(|mark| **mark != Mark::NOWHERE && !used.contains(mark));
    out.retired_marks = led_to.copied().collect();
    out
}

/// What the kernel says about addresses and ports.
struct Kernel<'a> {
    observed: &'a Observed,
    snapshot: &'a Snapshot,
    ingress: Vec<IpAddr>,
    /// Entries that lead to IPVS, by mark.
    leading: HashMap<Mark, Vec<Target>>,
}

impl<'a> Kernel<'a> {
    fn new(observed: &'a Observed, node: &NodeConfig, snapshot: &'a Snapshot) -> Self {
        let mut leading = HashMap::<_, Vec<_>>::new();
        for (element, mark) in &observed.elements {
            if let (Element::Vip(target), Some(mark)) = (element, mark) {
                leading.entry(*mark).or_default().push(*target);
            }
        }
        let ingress = Family::ALL.into_iter().filter_map(|f| node.ingress(f)).collect();
        Self { observed, snapshot, ingress, leading }
    }

    fn mark_at(&self, addr: IpAddr, protocol: Protocol, port: u16) -> Option<Mark> {
        self.observed.elements.get(&Element::Vip(Target { addr, protocol, port })).copied().flatten()
    }

    fn mark_of_published(&self, protocol: Protocol, number: u16) -> Option<Mark> {
        self.ingress.iter().find_map(|ingress| self.mark_at(*ingress, protocol, number))
    }

    fn endpoints_of(&self, service: &ServiceKey) -> BTreeSet<IpAddr> {
        let service = self.snapshot.services().get(service);
        let slices = service.map(|service| self.snapshot.slices_for(service)).unwrap_or_default();
        slices.iter().flat_map(|s| &s.endpoints).map(|e| e.address).collect()
    }

    /// Whether a mark leads to endpoints of this service; `None` where nothing can be compared.
    fn leads_to(&self, mark: Mark, service: &ServiceKey) -> Option<bool> {
        self.leads_to_one_of(mark, &self.endpoints_of(service))
    }

    fn leads_to_one_of(&self, mark: Mark, endpoints: &BTreeSet<IpAddr>) -> Option<bool> {
        if endpoints.is_empty() {
            return None;
        }
        let servers = Family::ALL.into_iter().filter_map(|family| {
            self.observed.virtual_servers.get(&VirtualServerKey { family, mark }).map(|server| &server.reals)
        });
        let mut found = servers.flat_map(|reals| reals.keys().map(|real| real.addr)).peekable();
        found.peek()?;
        Some(found.any(|addr| endpoints.contains(&addr)))
    }

    /// Entries that lead to endpoints of this service.
    fn leading_to(&self, service: &ServiceKey) -> impl Iterator<Item = &Target> {
        let endpoints = self.endpoints_of(service);
        let marks = self
            .leading
            .iter()
            .filter(move |(mark, _)| self.leads_to_one_of(**mark, &endpoints) == Some(true));
        marks.flat_map(|(_, targets)| targets)
    }

    fn settle_vips(&self, out: &mut Allocations, family: Family, lock: &Lock) {
        let (mut guesses, mut firm) = (BTreeMap::new(), BTreeSet::new());
        for (key, kept) in &out.services {
            let Some(vip) = kept.vips.get(family) else { continue };
            let explicit = self.snapshot.services().get(key).is_some_and(|s| s.vips.contains(vip));
            if explicit || lock.services.get(key).is_some_and(|l| l.vips.get(family).is_some()) {
                firm.insert(*vip);
            } else {
                guesses.insert(key.clone(), *vip);
            }
        }
        let has_port = |key: &ServiceKey, target: &Target| {
            let ports = self.snapshot.services().get(key).into_iter().flat_map(|s| &s.ports);
            ports.into_iter().any(|p| (p.protocol, p.port) == (target.protocol, target.port))
        };
        let confirmed = |key: &ServiceKey, vip: IpAddr| {
            let service = self.snapshot.services().get(key)?;
            let mark = service.ports.iter().find_map(|p| self.mark_at(vip, p.protocol, p.port))?;
            self.leads_to(mark, key)
        };
        let others = |key: &ServiceKey| {
            let vip = |t: &&Target| Family::of(&t.addr) == family && !self.ingress.contains(&t.addr);
            let vips = self.leading_to(key).filter(vip).filter(|t| has_port(key, t));
            vips.map(|t| t.addr).collect()
        };
        for (key, vip) in settle(guesses, firm, confirmed, others) {
            if let Some(kept) = out.services.get_mut(&key) {
                kept.vips.set(family, vip);
            }
        }
    }

    fn settle_ports(&self, out: &mut Allocations, protocol: Protocol, lock: &Lock) {
        let (mut guesses, mut firm) = (BTreeMap::new(), BTreeSet::new());
        for (key, kept) in &out.services {
            for (port, number) in kept.published.iter().filter(|(port, _)| port.protocol == protocol) {
                let spec = self.snapshot.services().get(key);
                let spec = spec.and_then(|s| s.ports.iter().find(|p| p.id() == *port));
                let explicit = spec.is_none_or(|p| p.publish.as_ref().is_none_or(|p| p.port.is_some()));
                if explicit || lock.services.get(key).is_some_and(|l| l.published.contains_key(port)) {
                    firm.extend((0..spec.map_or(1, |p| p.span())).map(|n| number.saturating_add(n)));
                } else {
                    guesses.insert((key.clone(), *port), *number);
                }
            }
        }
        // A port that shares its mark with its VIP's is known by that.
        let by_vip: BTreeMap<(ServiceKey, PortId), Mark> = guesses
            .keys()
            .filter_map(|(key, port)| {
                let kept = out.services.get(key).filter(|kept| !kept.ingress_marks.contains_key(port))?;
                let mark = kept.vips.iter().find_map(|(_, vip)| self.mark_at(*vip, protocol, port.port))?;
                Some(((key.clone(), *port), mark))
            })
            .collect();
        let confirmed = |who: &(ServiceKey, PortId), number: u16| {
            let found = self.mark_of_published(protocol, number)?;
            by_vip.get(who).map_or_else(|| self.leads_to(found, &who.0), |mark| Some(found == *mark))
        };
        let others = |who: &(ServiceKey, PortId)| {
            let published = |t: &&Target| t.protocol == protocol && self.ingress.contains(&t.addr);
            let targets: Vec<&Target> = match by_vip.get(who) {
                Some(mark) => self.leading.get(mark).into_iter().flatten().collect(),
                None => self.leading_to(&who.0).collect(),
            };
            targets.into_iter().filter(published).map(|t| t.port).collect()
        };
        for ((key, port), number) in settle(guesses, firm, confirmed, others) {
            let Some(kept) = out.services.get_mut(&key) else { continue };
            match number {
                Some(number) => drop(kept.published.insert(port, number)),
                None => drop(kept.published.remove(&port)),
            }
        }
    }

    /// Marks, where the kernel has them for the addresses and ports.
    fn take_marks(&self, out: &mut Allocations) {
        for kept in out.services.values_mut() {
            let vips: Vec<_> = kept.vips.iter().map(|(_, vip)| *vip).collect();
            let published = &kept.published;
            let by_port = |port: &PortId| self.mark_of_published(port.protocol, *published.get(port)?);
            let by_vip =
                |port: &PortId| vips.iter().find_map(|vip| self.mark_at(*vip, port.protocol, port.port));
            let marks = kept.marks.keys();
            kept.marks =
                marks.filter_map(|port| Some((*port, by_vip(port).or_else(|| by_port(port))?))).collect();
            let marks = kept.ingress_marks.keys();
            kept.ingress_marks = marks.filter_map(|port| Some((*port, by_port(port)?))).collect();
        }
    }
}

/// Who keeps which number: first those whose guess the kernel confirms; then those for whom it knows exactly one other that
/// nobody has; then the guesses that nothing speaks against. The rest have none, and are given one like newcomers.
fn settle<K: Ord + Clone, V: Ord + Copy>(
    guesses: BTreeMap<K, V>,
    mut taken: BTreeSet<V>,
    confirmed: impl Fn(&K, V) -> Option<bool>,
    others: impl Fn(&K) -> BTreeSet<V>,
) -> BTreeMap<K, Option<V>> {
    let verdicts: BTreeMap<K, Option<bool>> =
        guesses.iter().map(|(who, guess)| (who.clone(), confirmed(who, *guess))).collect();
    let is = |who: &K, verdict| verdicts.get(who).copied().flatten() == Some(verdict);
    taken.extend(guesses.iter().filter(|(who, _)| is(who, true)).map(|(_, guess)| *guess));
    let mut out = BTreeMap::new();
    for who in guesses.keys().filter(|who| !is(who, true)) {
        let mut free = others(who).into_iter().filter(|number| !taken.contains(number));
        if let (Some(only), None) = (free.next(), free.next()) {
            taken.insert(only);
            out.insert(who.clone(), Some(only));
        }
    }
    for (who, guess) in guesses.iter().filter(|(who, _)| !is(who, true)) {
        if !out.contains_key(who) {
            let keeps = !is(who, false) && taken.insert(*guess);
            out.insert(who.clone(), keeps.then_some(*guess));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use crate::{
        allocate::{Allocations, Kept},
        dataplane::fake::FakeKernel,
        model::{fixtures::published, ids::ServiceKey, unread::Unread},
        reconcile::{
            Engine,
            tests::{endpoints, engine, service_with, turn},
        },
    };

    /// Services with their endpoints' address, on a kernel and with what an earlier run knew.
    fn run(kernel: &FakeKernel, services: &[(&str, &str)], previous: Allocations) -> (Engine, Vec<String>) {
        let mut engine = engine(kernel, previous);
        for (name, address) in services {
            engine.feed([service_with(name, published(80, 8080, None)), endpoints(name, &[*address])]);
        }
        engine.synced(Unread::default());
        let ops = turn(&mut engine, true);
        (engine, ops)
    }

    fn had(values: &[(&str, &str, u16)]) -> Allocations {
        let mut previous = Allocations::default();
        for (name, vip, number) in values {
            let mut kept = Kept::default();
            kept.vips.v4 = Some(vip.parse().unwrap());
            kept.published.insert("80/TCP".parse().unwrap(), *number);
            previous.services.insert(ServiceKey::new("default", *name), kept);
        }
        previous
    }

    #[test]
    fn what_history_gave_is_read_from_the_kernel() {
        let kernel = FakeKernel::default();
        let services = [("vote", "10.244.1.11"), ("result", "10.244.1.12")];
        let (engine, _) =
            run(&kernel, &services, had(&[("vote", "10.200.9.9", 31_111), ("result", "10.200.9.8", 31_112)]));
        let before = engine.allocator().allocations();
        let (engine, ops) = run(&kernel, &services, Allocations::default());
        assert_eq!(engine.allocator().allocations(), before);
        assert_eq!(ops, Vec::<String>::new());
    }

    #[test]
    fn two_that_have_what_the_others_name_says_keep_it() {
        let kernel = FakeKernel::default();
        let services = [("vote", "10.244.1.11"), ("result", "10.244.1.12")];
        let (engine, _) = run(&FakeKernel::default(), &services, Allocations::default());
        let of = |name: &str| engine.allocator().get(&ServiceKey::new("default", name)).unwrap().clone();
        let (vote, result) = (of("vote"), of("result"));
        let value = |a: &crate::allocate::ServiceAllocation| {
            (a.vips.v4.unwrap().to_string(), *a.published.values().next().unwrap())
        };
        let ((v, vn), (r, rn)) = (value(&vote), value(&result));
        let (engine, _) = run(&kernel, &services, had(&[("vote", &r, rn), ("result", &v, vn)]));
        let before = engine.allocator().allocations();
        let (engine, ops) = run(&kernel, &services, Allocations::default());
        assert_eq!(engine.allocator().allocations(), before);
        assert_eq!(ops, Vec::<String>::new());
    }

    #[test]
    fn what_leads_elsewhere_is_not_taken_for_ours() {
        let kernel = FakeKernel::default();
        run(&kernel, &[("old", "10.244.1.11")], had(&[("old", "10.200.9.9", 31_111)]));
        // Another service, with another endpoint: it gets what its own name says.
        let (fresh, _) = run(&FakeKernel::default(), &[("new", "10.244.1.12")], Allocations::default());
        let (engine, _) = run(&kernel, &[("new", "10.244.1.12")], Allocations::default());
        let of = |engine: &Engine| {
            let found = engine.allocator().get(&ServiceKey::new("default", "new")).unwrap();
            (found.vips, found.published.clone())
        };
        assert_eq!(of(&engine), of(&fresh));
    }
}
