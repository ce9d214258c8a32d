//! What the source can't speak for, since it can't be read completely, stays as it is.

use std::collections::BTreeSet;

use super::Engine;
use crate::{
    compile::{RealState, service::Kept},
    model::{
        ids::{Mark, ServiceKey},
        kernel::Element,
    },
    plan::Observed,
};

impl Engine {
    /// The source has told everything it has. Services of earlier runs that it does not have are gone,
    /// unless it is not `complete`: then they may be in what could not be read, and are left alone.
    pub fn synced(&mut self, complete: bool) {
        let unseen = self
            .allocator
            .remembered()
            .filter(|key| !self.snapshot.services().contains_key(*key))
            .cloned()
            .collect::<BTreeSet<_>>();
        let held = if complete { BTreeSet::new() } else { unseen.clone() };
        // What of theirs has no mark was overlooked so far, and is to be compared now.
        self.trusted &= self.held.is_subset(&held);
        self.held = held;
        self.complete = complete;
        if complete {
            for (server, _) in std::mem::take(&mut self.kept).into_keys() {
                self.dirty.extend(self.merged.owner(server.mark).cloned());
            }
            self.allocator.forget(&unseen);
            self.served.retain(|key, _| !unseen.contains(key));
            self.generation += u64::from(!unseen.is_empty());
            self.trusted &= unseen.is_empty();
        }
    }

    /// The observed state without what belongs to services that the source does not have but may be
    /// meant to have: they are left as they are.
    pub(super) fn without_held(&self, observed: &Observed) -> Observed {
        let marks: BTreeSet<Mark> =
            self.held.iter().flat_map(|key| self.allocator.remembered_marks(key)).collect();
        let wanted = &self.merged.state().elements;
        let mut out = observed.clone();
        out.virtual_servers.retain(|key, _| !marks.contains(&key.mark));
        out.elements.retain(|element, mark| match mark {
            // Nobody can say whose these are.
            Some(Mark::NOWHERE) | None => wanted.contains_key(element),
            Some(mark) => !marks.contains(mark),
        });
        out
    }

    /// Services that are left alone because the source can't be read completely.
    pub fn held(&self) -> &BTreeSet<ServiceKey> {
        &self.held
    }

    /// Destinations that are left as they are because the source can't be read completely.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// The source can't be read completely: destinations that it does not name may be meant to be there all the same. What is
    /// named is let go of as it is compiled.
    pub(super) fn keep_unread(&mut self, observed: &Observed) {
        for (key, server) in &observed.virtual_servers {
            for real in server.reals.keys().filter(|real| !self.drains.contains_key(&(*key, **real))) {
                let local = observed.elements.contains_key(&Element::Local(real.addr));
                self.kept.insert((*key, *real), local);
            }
        }
        for service in self.merged.services().values() {
            for (key, _) in service.reals.iter().filter(|(_, info)| info.state == RealState::Ready) {
                self.kept.remove(key);
            }
        }
    }
}
