//! What the source can't speak for, since it can't be read, stays as it is.

use std::collections::{BTreeSet, HashMap};

use super::Engine;
use crate::{
    compile::{
        RealState,
        service::{Drains, Kept},
    },
    model::{
        ids::{Mark, ServiceKey},
        kernel::{Element, Elements, VirtualServer, VirtualServerKey},
        unread::Unread,
    },
    plan::Observed,
};

impl Engine {
    /// The source has told everything that could be read. Services of earlier runs that it does not have are gone, unless they
    /// may be in what is `unread`: then they are left alone.
    pub fn synced(&mut self, unread: Unread) {
        let unseen = self.allocator.remembered().filter(|key| !self.snapshot.services().contains_key(*key));
        let (held, gone): (BTreeSet<_>, BTreeSet<_>) = unseen.cloned().partition(|key| unread.may_have(key));
        if !self.held.is_subset(&held) {
            self.compare_held();
        }
        let before = std::mem::replace(&mut self.held, held);
        self.unread = unread;
        self.let_go_of_nameless();
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
        self.compare_held();
    }

    /// What of some services was overlooked so far is to be compared now, and their connections are to be looked through.
    pub(super) fn compare_held(&mut self) {
        self.trusted = false;
        self.swept = false;
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
