//! One pool of numbers and who holds which: VIPs of a family by their offset in the range, or published
//! ports of a protocol.
//!
//! **Firm** claims name their numbers: a manifest's explicit value, or the lock file's. They are served in
//! the order (rank, claimant): whoever overlaps an earlier winner loses as a whole. **Automatic** claims get
//! what no firm claim speaks of: the number that they had, else the first free one from their hash on.
//! A change is worked through in proportion to what it touches, and the outcome of firm claims does not
//! depend on the order of changes.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::model::ids::{PortId, ServiceKey};

/// Who claims: a service, or one port of it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Claimant {
    /// The service.
    pub service: ServiceKey,
    /// Its port; `None` for a VIP.
    pub port: Option<PortId>,
}

/// Where a firm claim comes from; the first wins.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Rank {
    /// Something that does not ask us, as the node port of a core Service.
    Outside,
    /// The manifest: of two the one whose object is older ([`crate::model::service::Service::created`]).
    Explicit(u64),
    /// The lock file.
    Locked,
}

/// A claim on certain numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Firm {
    /// Where it comes from.
    pub rank: Rank,
    /// First number.
    pub first: u128,
    /// How many; at least 1.
    pub count: u32,
}

impl Firm {
    fn numbers(self) -> std::ops::Range<u128> {
        self.first..self.first.saturating_add(self.count.into())
    }
}

/// What a claimant asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// These numbers or nothing.
    Explicit {
        /// First number.
        first: u128,
        /// How many.
        count: u32,
        /// When the object that asks was created.
        created: u64,
    },
    /// This one, whoever else asks for it.
    Outside {
        /// The number.
        number: u128,
    },
    /// Any number; the hash says where the search begins.
    Automatic {
        /// Hash of the claimant's name.
        hash: u64,
        /// The lock file's number.
        locked: Option<u128>,
    },
}

/// What came of a claim.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It has its numbers, from this one on.
    Held {
        /// The first number.
        first: u128,
        /// It had another one, which this claimant took away.
        moved_by: Option<Box<(u128, Claimant)>>,
    },
    /// An earlier firm claim has one of its numbers.
    Taken {
        /// The number.
        number: u128,
        /// Who has it.
        by: Claimant,
    },
    /// Nothing is free.
    Exhausted,
}

#[derive(Debug)]
struct Entry {
    firm: Option<Firm>,
    /// Hash of an automatic claim; a locked claim has both.
    auto: Option<u64>,
    /// The numbers that it owns.
    held: Option<Firm>,
    outcome: Option<Outcome>,
    /// Number to take again if it is free.
    sticky: Option<u128>,
    moved_by: Option<Box<(u128, Claimant)>>,
}

/// The numbers of a pool that are given out automatically: `low..split` is used when `split..end` is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bands {
    /// First number.
    pub low: u128,
    /// First number of the preferred band.
    pub split: u128,
    /// End of both.
    pub end: u128,
}

impl Bands {
    fn contains(self, number: u128) -> bool {
        (self.low..self.end).contains(&number)
    }

    /// Every number once, in the order in which a claim with this hash tries them.
    fn probe(self, hash: u64) -> impl Iterator<Item = u128> {
        let rotate = move |from: u128, to: u128| {
            let size = to.saturating_sub(from);
            let start = if size == 0 { 0 } else { u128::from(hash) % size };
            (0..size).map(move |i| from + (start + i) % size)
        };
        rotate(self.split, self.end).chain(rotate(self.low, self.split))
    }
}

/// Numbers and who holds them.
#[derive(Debug)]
pub struct Pool {
    bands: Bands,
    entries: HashMap<Claimant, Entry>,
    /// Firm claims that speak of a number, winning or not.
    firm: HashMap<u128, BTreeSet<(Rank, Claimant)>>,
    owner: HashMap<u128, Claimant>,
    /// Numbers never given out automatically.
    excluded: HashSet<u128>,
    /// Numbers that the lock file keeps, present or not.
    locked: HashMap<u128, Claimant>,
    /// Numbers of claimants of earlier runs that have not turned up yet.
    kept: HashMap<u128, Claimant>,
    /// Automatic claims that found nothing.
    starving: BTreeSet<Claimant>,
    firm_work: BTreeSet<(Rank, Claimant)>,
    auto_work: BTreeSet<Claimant>,
    /// How many numbers of the bands have an owner.
    used: usize,
    /// How many there are to own.
    capacity: usize,
    freed: bool,
}

impl Pool {
    /// An empty pool. `excluded` numbers are never given out automatically.
    pub fn new(bands: Bands, excluded: HashSet<u128>) -> Self {
        let excluded_here = excluded.iter().filter(|n| bands.contains(**n)).count();
        let size = usize::try_from(bands.end.saturating_sub(bands.low)).unwrap_or(usize::MAX);
        Self {
            capacity: size.saturating_sub(excluded_here),
            bands,
            entries: HashMap::new(),
            firm: HashMap::new(),
            owner: HashMap::new(),
            excluded,
            locked: HashMap::new(),
            kept: HashMap::new(),
            starving: BTreeSet::new(),
            firm_work: BTreeSet::new(),
            auto_work: BTreeSet::new(),
            used: 0,
            freed: false,
        }
    }

    /// Replaces the numbers that the lock file keeps.
    pub fn set_locked(&mut self, locked: HashMap<u128, Claimant>) {
        self.locked = locked;
        self.freed = true;
    }

    /// Keeps a number for a claimant that may turn up: nobody gets it by chance.
    pub fn keep(&mut self, number: u128, who: Claimant) {
        self.kept.entry(number).or_insert(who);
    }

    /// Ends what [`Self::keep`] began.
    pub fn forget(&mut self, number: u128, who: &Claimant) {
        if self.kept.get(&number) == Some(who) {
            self.kept.remove(&number);
            self.freed = true;
        }
    }

    /// Whether a number may be given out automatically at all.
    pub fn usable(&self, number: u128) -> bool {
        self.bands.contains(number) && !self.excluded.contains(&number)
    }

    /// States, changes or withdraws (`None`) a claim. `sticky` is the number that it had before, for claims
    /// that are new here. Takes effect with [`Self::settle`].
    pub fn claim(&mut self, who: &Claimant, want: Option<Want>, sticky: Option<u128>) {
        let (firm, auto) = match want {
            None => return self.withdraw(who),
            Some(Want::Explicit { first, count, created }) => {
                (Some(Firm { rank: Rank::Explicit(created), first, count }), None)
            }
            Some(Want::Outside { number }) => {
                (Some(Firm { rank: Rank::Outside, first: number, count: 1 }), None)
            }
            Some(Want::Automatic { hash, locked }) => {
                let locked = locked.filter(|n| self.usable(*n));
                (locked.map(|first| Firm { rank: Rank::Locked, first, count: 1 }), Some(hash))
            }
        };
        let old = match self.entries.get_mut(who) {
            Some(entry) if entry.firm == firm && entry.auto == auto => return,
            Some(entry) => {
                entry.auto = auto;
                std::mem::replace(&mut entry.firm, firm)
            }
            None => {
                let entry = Entry { firm, auto, held: None, outcome: None, sticky, moved_by: None };
                self.entries.insert(who.clone(), entry);
                None
            }
        };
        if old != firm {
            self.unregister(who, old);
            if let Some(firm) = firm {
                for number in firm.numbers() {
                    self.firm.entry(number).or_default().insert((firm.rank, who.clone()));
                }
            }
        }
        // An explicit value that turns automatic keeps its number; anything else is given up in settle.
        match firm {
            Some(firm) => drop(self.firm_work.insert((firm.rank, who.clone()))),
            None => drop(self.auto_work.insert(who.clone())),
        }
    }

    fn withdraw(&mut self, who: &Claimant) {
        self.release(who);
        let Some(entry) = self.entries.remove(who) else { return };
        self.unregister(who, entry.firm);
        self.starving.remove(who);
        self.auto_work.remove(who);
    }

    /// Removes a firm claim from the index; the others on its numbers have to be looked at again.
    fn unregister(&mut self, who: &Claimant, firm: Option<Firm>) {
        let Some(firm) = firm else { return };
        for number in firm.numbers() {
            let Some(claims) = self.firm.get_mut(&number) else { continue };
            claims.remove(&(firm.rank, who.clone()));
            self.firm_work.extend(claims.iter().cloned());
            if claims.is_empty() {
                self.firm.remove(&number);
                self.freed = true;
            }
        }
        self.firm_work.remove(&(firm.rank, who.clone()));
    }

    /// Gives up all numbers of a claimant. Later firm claims on them are looked at again.
    fn release(&mut self, who: &Claimant) {
        let Some(held) = self.entries.get_mut(who).and_then(|e| e.held.take()) else { return };
        for number in held.numbers() {
            if self.owner.get(&number) == Some(who) {
                self.owner.remove(&number);
                self.used -= usize::from(self.usable(number));
                self.freed = true;
            }
            if let Some(claims) = self.firm.get(&number) {
                self.firm_work.extend(claims.iter().filter(|(_, c)| c != who).cloned());
            }
        }
    }

    fn take(&mut self, who: &Claimant, what: Firm) {
        for number in what.numbers() {
            self.owner.insert(number, who.clone());
            self.used += usize::from(self.usable(number));
        }
        if let Some(entry) = self.entries.get_mut(who) {
            entry.held = Some(what);
            entry.sticky = None;
        }
    }

    /// Works all changes through. Returns the claimants that got, lost or changed something.
    pub fn settle(&mut self) -> BTreeSet<Claimant> {
        let mut changed = BTreeSet::new();
        loop {
            while let Some((rank, who)) = self.firm_work.pop_first() {
                self.settle_firm(rank, &who, &mut changed);
            }
            self.settle_automatic(&mut changed);
            if self.firm_work.is_empty() && self.auto_work.is_empty() {
                return changed;
            }
        }
    }

    fn settle_firm(&mut self, rank: Rank, who: &Claimant, changed: &mut BTreeSet<Claimant>) {
        let Some(firm) = self.entries.get(who).and_then(|e| e.firm).filter(|f| f.rank == rank) else {
            return;
        };
        let me = (rank, who.clone());
        let blocker = firm.numbers().find_map(|number| {
            let earlier =
                self.firm.get(&number)?.range(..&me).find(|(_, other)| self.has_won(other, number))?;
            Some((number, earlier.1.clone()))
        });
        if let Some((number, by)) = blocker {
            let Some(entry) = self.entries.get(who) else { return };
            if entry.auto.is_some() {
                // What the lock file wanted is taken: any other number will do.
                if entry.held.is_none_or(|held| held.rank == Rank::Locked && held == firm) {
                    self.release(who);
                    self.note_moved(who, number, by);
                    self.auto_work.insert(who.clone());
                }
            } else {
                self.release(who);
                self.conclude(who, Outcome::Taken { number, by }, changed);
            }
            return;
        }
        if self.entries.get(who).and_then(|e| e.held) != Some(firm) {
            self.release(who);
            for number in firm.numbers() {
                let Some(victim) = self.owner.get(&number).filter(|o| *o != who).cloned() else { continue };
                self.release(&victim);
                let Some(entry) = self.entries.get(&victim) else { continue };
                if let Some(theirs) = entry.firm {
                    self.firm_work.insert((theirs.rank, victim.clone()));
                }
                if entry.auto.is_some() {
                    self.note_moved(&victim, number, who.clone());
                    self.auto_work.insert(victim);
                }
            }
            self.take(who, firm);
        }
        self.starving.remove(who);
        self.auto_work.remove(who);
        if let Some(entry) = self.entries.get_mut(who) {
            entry.moved_by = None;
        }
        self.conclude(who, Outcome::Held { first: firm.first, moved_by: None }, changed);
    }

    /// Whether a firm claim of `who` holds `number` now, as a firm claim.
    fn has_won(&self, who: &Claimant, number: u128) -> bool {
        let entry = self.entries.get(who);
        entry.is_some_and(|e| e.held.is_some() && e.held == e.firm) && self.owner.get(&number) == Some(who)
    }

    fn note_moved(&mut self, who: &Claimant, from: u128, by: Claimant) {
        if let Some(entry) = self.entries.get_mut(who) {
            entry.moved_by = Some(Box::new((from, by)));
        }
    }

    fn settle_automatic(&mut self, changed: &mut BTreeSet<Claimant>) {
        let mut work = std::mem::take(&mut self.auto_work);
        if std::mem::take(&mut self.freed) {
            work.extend(self.starving.iter().cloned());
        }
        // Who keeps a number goes before who looks for one.
        work.retain(|who| {
            let Some(entry) = self.entries.get(who) else { return false };
            if entry.auto.is_none() {
                return false;
            }
            let kept = entry.held.map(|held| held.first).or(entry.sticky);
            let Some(number) = kept.filter(|n| self.can_keep(*n, who)) else { return true };
            self.settle_at(who, number, changed);
            false
        });
        for who in work {
            let Some(hash) = self.entries.get(&who).and_then(|e| e.auto) else { continue };
            let full = self.used >= self.capacity;
            let found = if full { None } else { self.bands.probe(hash).find(|n| self.free_for(*n, &who)) };
            match found {
                Some(number) => self.settle_at(&who, number, changed),
                None => {
                    self.release(&who);
                    self.starving.insert(who.clone());
                    self.conclude(&who, Outcome::Exhausted, changed);
                }
            }
        }
    }

    fn settle_at(&mut self, who: &Claimant, number: u128, changed: &mut BTreeSet<Claimant>) {
        let what = Firm { rank: Rank::Locked, first: number, count: 1 };
        if self.entries.get(who).and_then(|e| e.held) != Some(what) {
            self.release(who);
            self.take(who, what);
        }
        self.starving.remove(who);
        let moved_by = self.entries.get(who).and_then(|e| e.moved_by.clone());
        self.conclude(who, Outcome::Held { first: number, moved_by }, changed);
    }

    /// Whether a number that `who` had may stay with it: claims that lost it to others don't count.
    fn can_keep(&self, number: u128, who: &Claimant) -> bool {
        self.usable(number) && self.owner.get(&number).is_none_or(|owner| owner == who)
    }

    /// Whether a number may be given to `who` anew.
    fn free_for(&self, number: u128, who: &Claimant) -> bool {
        self.usable(number)
            && self.owner.get(&number).is_none_or(|owner| owner == who)
            && self.firm.get(&number).is_none_or(|claims| claims.iter().all(|(_, c)| c == who))
            && self.locked.get(&number).is_none_or(|owner| owner == who)
            && self.kept.get(&number).is_none_or(|owner| owner == who)
    }

    fn conclude(&mut self, who: &Claimant, outcome: Outcome, changed: &mut BTreeSet<Claimant>) {
        let Some(entry) = self.entries.get_mut(who) else { return };
        if entry.outcome.as_ref() != Some(&outcome) {
            entry.outcome = Some(outcome);
            changed.insert(who.clone());
        }
    }

    /// What came of a claim, after [`Self::settle`].
    pub fn outcome(&self, who: &Claimant) -> Option<&Outcome> {
        self.entries.get(who)?.outcome.as_ref()
    }

    /// Automatic claims whose number follows from what came before and not from names alone, with the claimant
    /// that has their place, if any. Elsewhere they may come out differently.
    pub fn unsettled(&self) -> Vec<(Claimant, Option<Claimant>)> {
        let firm = |n: &u128| self.firm.contains_key(n) || self.locked.contains_key(n) || !self.usable(*n);
        self.entries
            .iter()
            .filter(|(_, entry)| entry.firm.is_none())
            .filter_map(|(who, entry)| {
                let place = self.bands.probe(entry.auto?).find(|n| !firm(n))?;
                (entry.held?.first != place).then(|| (who.clone(), self.owner.get(&place).cloned()))
            })
            .collect()
    }
}
