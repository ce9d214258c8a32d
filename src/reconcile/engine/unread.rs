//! What the source can't speak for, since it can't be read, stays as it is.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use super::Engine;
use crate::{
    compile::{
        RealState,
        service::{Drains, Kept},
    },
    dataplane::ElementChange,
    model::{
        ids::{Mark, Protocol, ServiceKey},
        kernel::{Element, Elements, KernelState, VirtualServer, VirtualServerKey},
        unread::Unread,
    },
    plan::{Observed, Op},
};

impl Engine {
    /// The source has told everything that could be read. Services of earlier runs that it does not have are gone, unless they
    /// may be in what is `unread`: then they are left alone.
    pub fn synced(&mut self, unread: Unread) {
        let unseen = self.allocator.remembered().filter(|key| !self.snapshot.services().contains_key(*key));
        let (held, gone): (BTreeSet<_>, BTreeSet<_>) = unseen.cloned().partition(|key| unread.may_have(key));
        // What of theirs has no mark was overlooked so far, and is to be compared now.
        self.trusted &= self.held.is_subset(&held);
        let before = std::mem::replace(&mut self.held, held);
        self.unread = unread;
        self.keep_of_turned_up(&before);
        let groups = self.unread_marks();
        for (key, local) in std::mem::take(&mut self.kept) {
            let (server, _) = key;
            if groups.as_ref().is_none_or(|marks| marks.contains(&server.mark)) {
                self.kept.insert(key, local);
            } else {
                self.dirty.extend(self.merged.owner(server.mark).cloned());
            }
        }
        // Nobody is there to end them.
        let marks: BTreeSet<Mark> =
            gone.iter().flat_map(|key| self.allocator.remembered_marks(key)).collect();
        self.drains.retain(|(server, _), _| !marks.contains(&server.mark));
        self.allocator.forget(&gone);
        self.served.retain(|key, _| !gone.contains(key));
        self.generation += u64::from(!gone.is_empty());
        self.trusted &= gone.is_empty();
    }

    /// Services that were left alone and are there now are the source's again, though it may yet tell what of it can't be read.
    pub(super) fn take_back_held(&mut self) {
        let here = |key: &&ServiceKey| self.snapshot.services().contains_key(*key);
        let back: BTreeSet<ServiceKey> = self.held.iter().filter(here).cloned().collect();
        if back.is_empty() {
            return;
        }
        self.keep_of_turned_up(&back);
        self.held.retain(|key| !back.contains(key));
        // What of theirs was overlooked so far is to be compared now.
        self.trusted = false;
    }

    /// Services that were left alone and can be read now, while some of their endpoints can't: these stay.
    fn keep_of_turned_up(&mut self, before: &BTreeSet<ServiceKey>) {
        let mut marks = BTreeSet::new();
        for key in before {
            let service = self.snapshot.services().get(key);
            if service.is_some_and(|service| self.unread.may_have_endpoints(&service.group())) {
                marks.extend(self.allocator.remembered_marks(key));
            }
        }
        let found = present(&self.known.virtual_servers, &self.known.elements, &self.drains, |mark| {
            marks.contains(mark)
        });
        self.kept.extend(found);
    }

    /// Marks of services some of whose endpoints can't be read; `None` is all.
    fn unread_marks(&self) -> Option<BTreeSet<Mark>> {
        if self.unread.anything {
            return None;
        }
        let mut marks = BTreeSet::new();
        for (key, service) in self.snapshot.services() {
            if self.unread.may_have_endpoints(&service.group()) {
                marks.extend(self.allocator.get(key).into_iter().flat_map(|a| a.marks.values().copied()));
                marks.extend(self.allocator.remembered_marks(key));
            }
        }
        Some(marks)
    }

    /// What is in the kernel for services that are left alone, where these are the IPVS services that it has.
    fn left_alone(&self, servers: &HashMap<VirtualServerKey, VirtualServer>) -> LeftAlone {
        // One that has turned up elsewhere meanwhile is held no longer.
        let held = || self.held.iter().filter(|key| !self.snapshot.services().contains_key(*key));
        let marks: BTreeSet<Mark> = held().flat_map(|key| self.allocator.remembered_marks(key)).collect();
        let theirs = servers.iter().filter(|(key, _)| marks.contains(&key.mark));
        let endpoints = theirs.flat_map(|(_, server)| server.reals.keys().map(|real| real.addr)).collect();
        let remembered = held().flat_map(|key| self.allocator.remembered_ports(key));
        let served = held().filter_map(|key| self.served.get(key)).flatten().copied();
        LeftAlone { marks, endpoints, ports: remembered.chain(served).collect() }
    }

    /// The observed state without what belongs to services that the source does not have but may be
    /// meant to have: they are left as they are.
    pub(super) fn without_held(&self, observed: &Observed) -> Observed {
        let left = self.left_alone(&observed.virtual_servers);
        let wanted = &self.merged.state().elements;
        let mut out = observed.clone();
        out.virtual_servers.retain(|key, _| !left.marks.contains(&key.mark));
        out.elements.retain(|element, mark| wanted.contains_key(element) || !left.has(element, *mark));
        out
    }

    /// Entries of theirs go with nobody else's: the last readable service that had the same endpoints, say.
    pub(super) fn spare_held(&self, ops: &mut Vec<Op>) {
        let deleted = |op: &Op| match op {
            Op::Element(ElementChange::Del(element)) => Some(*element),
            _ => None,
        };
        if self.held.is_empty() || !ops.iter().any(|op| deleted(op).is_some()) {
            return;
        }
        let left = self.left_alone(&self.known.virtual_servers);
        ops.retain(|op| {
            deleted(op).is_none_or(|element| {
                !left.has(&element, self.known.elements.get(&element).copied().flatten())
            })
        });
    }

    /// What the rules are installed with, which replaces all entries: the desired state, and the entries of what is left alone.
    pub fn to_install(&self) -> Cow<'_, KernelState> {
        let desired = self.merged.state();
        if self.held.is_empty() {
            return Cow::Borrowed(desired);
        }
        let left = self.left_alone(&self.known.virtual_servers);
        let known = self.known.elements.iter();
        let entries: Vec<_> =
            known.filter(|(e, mark)| left.has(e, **mark)).map(|(e, mark)| (*e, *mark)).collect();
        if entries.is_empty() {
            return Cow::Borrowed(desired);
        }
        let mut out = desired.clone();
        for (element, mark) in entries {
            out.elements.entry(element).or_insert(mark);
        }
        Cow::Owned(out)
    }

    /// What of the source can't be read.
    pub fn unread(&self) -> &Unread {
        &self.unread
    }

    /// Services that are left alone because the source can't be read completely.
    pub fn held(&self) -> &BTreeSet<ServiceKey> {
        &self.held
    }

    /// Destinations that are left as they are because the source can't be read completely.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Some of the source can't be read: destinations that it does not name may be meant to be there all the same. What is
    /// named is let go of as it is compiled.
    pub(super) fn keep_unread(&mut self, observed: &Observed) {
        let marks = self.unread_marks();
        let unread = |mark: &Mark| marks.as_ref().is_none_or(|marks| marks.contains(mark));
        let found = present(&observed.virtual_servers, &observed.elements, &self.drains, unread);
        self.kept.extend(found);
        for service in self.merged.services().values() {
            for (key, _) in service.reals.iter().filter(|(_, info)| info.state == RealState::Ready) {
                self.kept.remove(key);
            }
        }
    }
}

/// The destinations of IPVS services with such marks, but for those that drain, with whether they are on this node.
fn present(
    servers: &HashMap<VirtualServerKey, VirtualServer>,
    elements: &Elements,
    drains: &Drains,
    of: impl Fn(&Mark) -> bool,
) -> Kept {
    let theirs = servers.iter().filter(|(key, _)| of(&key.mark));
    let reals = theirs.flat_map(|(key, server)| server.reals.keys().map(|real| (*key, *real)));
    reals
        .filter(|key| !drains.contains_key(key))
        .map(|(key, real)| ((key, real), elements.contains_key(&Element::Local(real.addr))))
        .collect()
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
