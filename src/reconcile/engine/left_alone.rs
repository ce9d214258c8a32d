//! What the kernel has for services that are left alone stays as it was found, and comes back when others take it away.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use super::Engine;
use crate::{
    dataplane::ElementChange,
    model::{
        ids::{Mark, Protocol, ServiceKey},
        kernel::{Element, Elements, KernelState, VirtualServer, VirtualServerKey},
    },
    plan::{Observed, Op},
};

/// What was found at the first look for services that the source does not have but may be meant to have.
#[derive(Default)]
pub(super) struct Spared {
    servers: HashMap<VirtualServerKey, VirtualServer>,
    elements: Elements,
    /// Marks of services whose names were lost with the state: any of them may be in what can't be read.
    nameless: BTreeSet<Mark>,
}

impl Engine {
    /// At the first look: what is there for services that are left alone.
    pub(super) fn note_spared(&mut self, observed: &Observed, state_is_lost: bool) {
        if state_is_lost && self.may_miss_services() {
            self.spared.nameless = self.allocator.retired_marks().clone();
        }
        let marks = self.marks_left_alone();
        if marks.is_empty() && self.held.is_empty() {
            return;
        }
        let theirs = |key: &VirtualServerKey| marks.contains(&key.mark);
        let servers = observed.virtual_servers.iter().filter(|(key, _)| theirs(key));
        self.spared.servers = servers.map(|(key, server)| (*key, server.clone())).collect();
        let left = self.left_alone();
        let elements = observed.elements.iter().filter(|(element, mark)| left.has(element, **mark));
        self.spared.elements = elements.map(|(element, mark)| (*element, *mark)).collect();
    }

    fn may_miss_services(&self) -> bool {
        self.unread.anything || !self.unread.services.is_empty()
    }

    /// Once all services can be read, whoever has not turned up is gone.
    pub(super) fn let_go_of_nameless(&mut self) {
        if !self.spared.nameless.is_empty() && !self.may_miss_services() {
            self.spared.nameless.clear();
            self.compare_held();
        }
    }

    /// Marks that lead to what is left alone, though no service is known that has them.
    pub(super) fn nameless(&self) -> &BTreeSet<Mark> {
        &self.spared.nameless
    }

    /// Services that are left alone, without those that have turned up meanwhile.
    fn still_held(&self) -> impl Iterator<Item = &ServiceKey> {
        self.held.iter().filter(|key| !self.snapshot.services().contains_key(*key))
    }

    fn marks_left_alone(&self) -> BTreeSet<Mark> {
        let marks = self.still_held().flat_map(|key| self.allocator.remembered_marks(key));
        marks.chain(self.spared.nameless.iter().copied()).collect()
    }

    /// What is in the kernel for services that are left alone.
    fn left_alone(&self) -> LeftAlone {
        let marks = self.marks_left_alone();
        let theirs = self.spared.servers.iter().filter(|(key, _)| marks.contains(&key.mark));
        let endpoints = theirs.flat_map(|(_, server)| server.reals.keys().map(|real| real.addr)).collect();
        let remembered = self.still_held().flat_map(|key| self.allocator.remembered_ports(key));
        let served = self.still_held().filter_map(|key| self.served.get(key)).flatten().copied();
        LeftAlone { marks, endpoints, ports: remembered.chain(served).collect() }
    }

    fn leaves_none_alone(&self) -> bool {
        self.held.is_empty() && self.spared.nameless.is_empty()
    }

    /// The observed state without what is left alone: nothing of it is to be ended.
    pub(super) fn without_left_alone<'a>(&self, observed: &'a Observed) -> Cow<'a, Observed> {
        if self.leaves_none_alone() {
            return Cow::Borrowed(observed);
        }
        let left = self.left_alone();
        let wanted = &self.merged.state().elements;
        let mut out = observed.clone();
        out.virtual_servers.retain(|key, _| !left.marks.contains(&key.mark));
        out.elements.retain(|element, mark| wanted.contains_key(element) || !left.has(element, *mark));
        Cow::Owned(out)
    }

    /// What the kernel should have: the desired state, and what is left alone as it was found.
    pub fn with_left_alone(&self) -> Cow<'_, KernelState> {
        let desired = self.merged.state();
        if self.leaves_none_alone() {
            return Cow::Borrowed(desired);
        }
        let left = self.left_alone();
        let mut out = desired.clone();
        for (key, server) in self.spared.servers.iter().filter(|(key, _)| left.marks.contains(&key.mark)) {
            out.virtual_servers.entry(*key).or_insert_with(|| server.clone());
        }
        for (element, mark) in self.spared.elements.iter().filter(|(e, mark)| left.has(e, **mark)) {
            out.elements.entry(*element).or_insert(*mark);
        }
        Cow::Owned(out)
    }

    /// Entries of theirs go with nobody else's: the last readable service that had the same endpoints, say.
    pub(super) fn spare_left_alone(&self, ops: &mut Vec<Op>) {
        let deleted = |op: &Op| match op {
            Op::Element(ElementChange::Del(element)) => Some(*element),
            _ => None,
        };
        if self.leaves_none_alone() || !ops.iter().any(|op| deleted(op).is_some()) {
            return;
        }
        let left = self.left_alone();
        ops.retain(|op| {
            deleted(op).is_none_or(|element| {
                !left.has(&element, self.known.elements.get(&element).copied().flatten())
            })
        });
    }
}

/// What is in the kernel for services that are left alone.
struct LeftAlone {
    marks: BTreeSet<Mark>,
    endpoints: HashSet<IpAddr>,
    ports: HashSet<(Protocol, u16)>,
}

impl LeftAlone {
    /// Whether an entry is theirs, if nobody else wants it.
    fn has(&self, element: &Element, mark: Option<Mark>) -> bool {
        match (element, mark) {
            (_, Some(mark)) if mark != Mark::NOWHERE => self.marks.contains(&mark),
            (Element::Vip(_), _) => false,
            (Element::Published(to), _) => self.ports.contains(&(to.protocol, to.port)),
            (Element::Loopback(_, protocol, port), _) => self.ports.contains(&(*protocol, *port)),
            (Element::Endpoint(addr) | Element::Local(addr), _) => self.endpoints.contains(addr),
            (Element::Own(to), _) => self.endpoints.contains(&to.addr),
        }
    }
}
