//! Which mark belongs to which port of which service on this node.
//!
//! A mark that is given back is **retired**: the kernel may still have rules and connections with it. It
//! becomes free with [`Marks::commit`], and then goes to the end of the line: every other free mark is given
//! out before it.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use crate::model::{
    ids::{Mark, PortId, Scope, ServiceKey},
    node::MarkMask,
};

/// Who a mark belongs to.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct MarkOwner {
    /// The service.
    pub service: ServiceKey,
    /// Its port.
    pub port: PortId,
    /// Which of its two marks; [`Scope::Vip`] where the scopes share one.
    pub scope: Scope,
}

/// The marks of a node.
#[derive(Debug)]
pub struct Marks {
    mask: MarkMask,
    held: HashMap<MarkOwner, Mark>,
    taken: HashSet<Mark>,
    /// What owners that have not turned up yet had.
    previous: HashMap<MarkOwner, Mark>,
    retired: BTreeSet<Mark>,
    /// In use by others: seen on services in the kernel that are not ours.
    foreign: BTreeSet<Mark>,
    /// Given back, the longest-free first. Marks that were never used come before them, by number.
    free: VecDeque<Mark>,
    next_unused: u32,
    starving: BTreeSet<MarkOwner>,
}

impl Marks {
    /// Marks under a mask. `previous` owners get theirs back; `retired` ones stay out until [`Self::commit`].
    pub fn new(
        mask: MarkMask,
        previous: HashMap<MarkOwner, Mark>,
        mut retired: BTreeSet<Mark>,
        foreign: BTreeSet<Mark>,
    ) -> Self {
        let mut seen = HashSet::new();
        let usable = |mark: &Mark| mask.covers(*mark) && *mark != mask.sentinel() && !foreign.contains(mark);
        // Of another mask: nobody gets them again, but they may be in the kernel.
        retired.extend(previous.values().filter(|mark| !mask.covers(**mark)));
        let previous: HashMap<MarkOwner, Mark> = {
            let mut sorted: Vec<_> = previous.into_iter().collect();
            sorted.sort();
            sorted.into_iter().filter(|(_, mark)| usable(mark) && seen.insert(*mark)).collect()
        };
        retired.retain(|mark| *mark != mask.sentinel() && !seen.contains(mark));
        Self {
            mask,
            held: HashMap::new(),
            // Kept for their old owners; retired when those turn out to be gone.
            taken: previous.values().copied().collect(),
            previous,
            retired,
            foreign,
            free: VecDeque::new(),
            next_unused: 0,
            starving: BTreeSet::new(),
        }
    }

    /// The mark of an owner: its old one, a new one, or none when there are none left.
    pub fn claim(&mut self, owner: &MarkOwner) -> Option<Mark> {
        if let Some(mark) = self.held.get(owner) {
            return Some(*mark);
        }
        let mark = self.previous.remove(owner).or_else(|| self.fresh());
        match mark {
            Some(mark) => {
                self.taken.insert(mark);
                self.held.insert(owner.clone(), mark);
                self.starving.remove(owner);
            }
            None => drop(self.starving.insert(owner.clone())),
        }
        mark
    }

    fn fresh(&mut self) -> Option<Mark> {
        while let Some(mark) = self.mask.nth(self.next_unused) {
            self.next_unused += 1;
            if self.is_free(mark) {
                return Some(mark);
            }
        }
        let at = self.free.iter().position(|mark| self.is_free(*mark))?;
        self.free.remove(at)
    }

    fn is_free(&self, mark: Mark) -> bool {
        !self.taken.contains(&mark) && !self.retired.contains(&mark) && !self.foreign.contains(&mark)
    }

    /// Gives a mark back.
    pub fn release(&mut self, owner: &MarkOwner) {
        self.starving.remove(owner);
        if let Some(mark) = self.held.remove(owner).or_else(|| self.previous.remove(owner)) {
            self.taken.remove(&mark);
            self.retired.insert(mark);
        }
    }

    /// Whether an owner that has not turned up yet has a mark from an earlier run.
    pub fn remembers(&self, owner: &MarkOwner) -> bool {
        self.previous.contains_key(owner)
    }

    /// Retires those of these marks that nobody has or had, and says which.
    pub fn retire_strays(&mut self, marks: &BTreeSet<Mark>) -> BTreeSet<Mark> {
        let known = |mark: &Mark| {
            *mark == self.mask.sentinel()
                || self.taken.contains(mark)
                || self.foreign.contains(mark)
                || self.retired.contains(mark)
        };
        let strays: BTreeSet<Mark> = marks.iter().filter(|mark| !known(mark)).copied().collect();
        if !strays.is_empty() {
            self.free.retain(|mark| !strays.contains(mark));
            self.retired.extend(&strays);
        }
        strays
    }

    /// Retires what owners of these services had that have not turned up.
    pub fn forget(&mut self, services: &BTreeSet<ServiceKey>) {
        let gone: Vec<MarkOwner> =
            self.previous.keys().filter(|owner| services.contains(&owner.service)).cloned().collect();
        gone.iter().for_each(|owner| self.release(owner));
    }

    /// The kernel has none of these retired marks any more: they are free again. Returns the owners that now may
    /// get one.
    pub fn commit(&mut self, free: &BTreeSet<Mark>) -> BTreeSet<ServiceKey> {
        // Numbers that were never given out are found by themselves.
        let known = self.retired.intersection(free).copied().filter(|mark| self.is_used_up(*mark));
        let known: Vec<Mark> = known.collect();
        self.free.extend(known);
        self.retired.retain(|mark| !free.contains(mark));
        self.starving.iter().map(|owner| owner.service.clone()).collect()
    }

    /// Whether it is one of ours to give, and those that were never given out come after it.
    fn is_used_up(&self, mark: Mark) -> bool {
        let ours = self.mask.covers(mark) && mark != self.mask.sentinel();
        ours && self.mask.nth(self.next_unused).is_none_or(|next| mark < next)
    }

    /// Marks on services in the kernel that are not ours. Returns the services that have to give theirs up.
    pub fn set_foreign(&mut self, foreign: BTreeSet<Mark>) -> BTreeSet<ServiceKey> {
        let back: Vec<Mark> = self.foreign.difference(&foreign).copied().collect();
        let back: Vec<Mark> =
            back.into_iter().filter(|m| self.is_used_up(*m) && self.is_known_nowhere(*m)).collect();
        self.free.extend(back);
        self.foreign = foreign;
        let evicted: Vec<MarkOwner> = self
            .held
            .iter()
            .filter(|(_, mark)| self.foreign.contains(mark))
            .map(|(owner, _)| owner.clone())
            .collect();
        // Of those that have not turned up yet, too.
        let remembered = self.previous.iter().filter(|(_, mark)| self.foreign.contains(mark));
        let remembered: Vec<MarkOwner> = remembered.map(|(owner, _)| owner.clone()).collect();
        for owner in evicted.iter().chain(&remembered) {
            self.release(owner);
        }
        let starving = self.starving.iter().map(|owner| owner.service.clone());
        evicted.iter().map(|owner| owner.service.clone()).chain(starving).collect()
    }

    /// Marks of others, as last set.
    pub fn foreign(&self) -> &BTreeSet<Mark> {
        &self.foreign
    }

    fn is_known_nowhere(&self, mark: Mark) -> bool {
        !self.taken.contains(&mark) && !self.retired.contains(&mark) && !self.free.contains(&mark)
    }

    /// Owners and their marks.
    pub fn held(&self) -> impl Iterator<Item = (&MarkOwner, Mark)> {
        self.held.iter().chain(&self.previous).map(|(owner, mark)| (owner, *mark))
    }

    /// Marks waiting for [`Self::commit`].
    pub fn retired(&self) -> &BTreeSet<Mark> {
        &self.retired
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixtures::config;

    /// What the kernel may have with another mask is to be asked about, and is nobody's afterwards.
    #[test]
    fn marks_of_another_mask_are_retired_and_never_given_out() {
        let owner = |name: &str| MarkOwner {
            service: ServiceKey::new("default", name),
            port: "80/TCP".parse().unwrap(),
            scope: Scope::Vip,
        };
        let mask = config().mask;
        let other = (1..u32::MAX).map(Mark).find(|mark| !mask.covers(*mark)).unwrap();
        let mut marks = Marks::new(mask, [(owner("a"), other)].into(), BTreeSet::new(), BTreeSet::new());
        assert_eq!(marks.retired(), &[other].into());
        let own = marks.claim(&owner("a")).unwrap();
        assert!(mask.covers(own));
        marks.commit(&[other].into());
        assert!(marks.retired().is_empty());
        // Another program's that went is as little ours to give.
        let theirs = Mark(5);
        assert!(!mask.covers(theirs));
        marks.set_foreign([theirs].into());
        marks.set_foreign(BTreeSet::new());
        let all: BTreeSet<_> = (0..20_000).filter_map(|n| marks.claim(&owner(&format!("b{n}")))).collect();
        assert!(!all.contains(&other) && !all.contains(&theirs) && all.len() > 100);
    }
}
