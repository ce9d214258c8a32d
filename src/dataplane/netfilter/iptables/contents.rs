//! What the iptables renderer keeps in sets: reading them, filling them, changing them, counting them.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use nix::errno::Errno;

use super::Iptables;
use crate::{
    dataplane::{
        ElementChange, Error,
        ipset::{Change, Header, Key, SetSpec, SkbMark, Verb},
        netfilter::{
            nftwrite,
            parts::set_differences,
            sets::{
                Kind, SCRATCH, Stores, ipset_element, ipset_entries, ipset_spec, nft_contents,
                nft_to_elements, set_name,
            },
        },
    },
    model::{
        ids::{Family, Mark},
        kernel::{Element, Elements, Program},
    },
};

impl Iptables {
    /// Elements in the ipsets, and what is wrong with them.
    pub(super) fn elements(&mut self, program: &Program) -> Result<(Elements, Vec<String>), Error> {
        let (mut elements, mut wrong) = (Elements::new(), Vec::new());
        for family in Self::families(program) {
            for kind in self.stores.ipsets() {
                let name = set_name(kind, family);
                let Some(listing) = self.ipset.list(&name)? else { continue };
                if listing.strange > 0 {
                    wrong.push(format!("ipset {name} has {} entries that are not ours", listing.strange));
                }
                let foreign = |m: &SkbMark| m.mask != program.mask;
                if let Some(entry) = listing.entries.iter().find(|e| e.mark.as_ref().is_some_and(foreign)) {
                    wrong.push(format!(
                        "ipset {name}: {} has another mark mask than {:#x}",
                        entry.key, program.mask
                    ));
                }
                elements.extend(listing.entries.iter().filter_map(|e| ipset_element(kind, family, e)));
            }
            // The second set of endpoints.
            if !self.stores.pairs {
                continue;
            }
            let name = set_name(Kind::Hairpin, family);
            if let Some(listing) = self.ipset.list(&name)? {
                let want = |e: &Element| matches!(e, Element::Endpoint(_)) && e.family() == family;
                let wanted = elements.keys().filter(|e| want(e)).count();
                let present = listing.entries.iter().filter(|e| match e.key {
                    Key::Pair(a, b) => a == b && elements.contains_key(&Element::Endpoint(a)),
                    _ => false,
                });
                if present.count() != wanted || listing.entries.len() != wanted {
                    wrong.push(format!("ipset {name} differs from {}", set_name(Kind::Endpoints, family)));
                }
            }
        }
        if self.stores.nft {
            // The loopback map is only in nft.
            let loopback = Self::families(program).map(|f| (Kind::Loopback, f));
            let (contents, _) = self.reader.contents(loopback)?;
            elements.extend(nft_to_elements(&contents));
            wrong.extend(self.nft_differences(program, &elements)?);
        }
        Ok((elements, wrong))
    }

    /// Sets of the small table that differ from what these elements ask for.
    pub(super) fn nft_differences(
        &mut self,
        program: &Program,
        elements: &Elements,
    ) -> Result<Vec<String>, Error> {
        let sets: Vec<_> = Self::families(program)
            .flat_map(|f| self.stores.layout().kinds().iter().map(move |k| (*k, f)))
            .collect();
        let (have, strange) = self.reader.contents(sets.iter().copied())?;
        let want = nft_contents(&self.guarded(elements), self.stores.layout());
        Ok(set_differences(&sets, &want, &have, strange))
    }

    /// What the small table holds where the ipsets hold these: the guard knows also what the ipsets could not take, which is
    /// refused then instead of reaching a socket of this host.
    pub(super) fn guarded<'a>(&self, elements: &'a Elements) -> Cow<'a, Elements> {
        if self.refused.is_empty() {
            return Cow::Borrowed(elements);
        }
        let mut all = self.refused.clone();
        all.extend(elements);
        Cow::Owned(all)
    }

    /// Marks that the other renderer's maps lead to, where its table stands.
    pub(super) fn marks_of_table(&mut self) -> Result<BTreeSet<Mark>, Error> {
        let maps = Family::ALL
            .into_iter()
            .flat_map(|f| [Kind::Vips, Kind::PublishedMarks, Kind::Loopback].map(|kind| (kind, f)));
        let (contents, _) = self.reader.contents(maps)?;
        Ok(contents.values().flat_map(BTreeMap::values).flatten().map(|mark| Mark(*mark)).collect())
    }

    /// Fills all ipsets with these elements. What the kernel refuses keeps nothing else out: returns those elements, and the
    /// first reason.
    pub(super) fn fill_sets(
        &mut self,
        program: &Program,
        elements: &Elements,
    ) -> Result<(Elements, Option<Error>), Error> {
        self.ipset.destroy(SCRATCH)?;
        let there = self.ipset.headers()?;
        let mut refused = Elements::new();
        let mut reason: Option<Error> = None;
        for kind in self.stores.ipsets() {
            for family in Self::families(program) {
                let spec = ipset_spec(kind, family, self.max_elements);
                let old = match there.iter().find(|h| h.name == spec.name) {
                    Some(other) if !other.swaps_with(&spec) => {
                        self.remove_unlike(other)?;
                        None
                    }
                    old => old,
                };
                let into = if old.is_some() { SCRATCH.to_owned() } else { spec.name.clone() };
                self.ipset.create(&SetSpec { name: into.clone(), ..spec.clone() })?;
                let (owners, changes): (Vec<&Element>, Vec<Change>) = elements
                    .iter()
                    .filter(|(e, _)| e.family() == family)
                    .flat_map(|(e, m)| {
                        ipset_entries(e, *m, program.mask, self.stores).map(move |found| (e, found))
                    })
                    .filter(|(_, (k, _))| *k == kind)
                    .map(|(e, (_, entry))| (e, Change { set: into.clone(), verb: Verb::Add, entry }))
                    .unzip();
                for ((owner, change), result) in
                    owners.into_iter().zip(&changes).zip(self.ipset.change(&changes))
                {
                    let why = match result {
                        Ok(()) => continue,
                        Err(Error::Failed { reason, .. }) => reason,
                        // What memory has no room for any more.
                        Err(Error::Transient { reason, .. }) if reason == Errno::ENOMEM.desc() => reason,
                        Err(e) => return Err(e),
                    };
                    refused.insert(*owner, elements.get(owner).copied().flatten());
                    reason.get_or_insert_with(|| Error::Failed {
                        object: format!("ipset {} {}", spec.name, change.entry.key),
                        reason: why.replace(SCRATCH, &spec.name),
                    });
                }
                if old.is_some() {
                    self.ipset.swap(SCRATCH, &spec.name)?;
                    self.ipset.destroy(SCRATCH)?;
                }
            }
        }
        Ok((refused, reason))
    }

    /// Destroys a set that has one of our names and another type than ours, unless a rule uses it, which can't be ours.
    fn remove_unlike(&mut self, other: &Header) -> Result<(), Error> {
        if other.references == 0 {
            return self.ipset.destroy(&other.name);
        }
        Err(Error::Failed {
            object: format!("ipset {}", other.name),
            reason: format!(
                "is of the type {}, which is not ours, and used by rules of others: `iptables-save | grep {name}`, and for IPv6 \
                 `ip6tables-save`, shows them (or a list:set: `ipset list`); when they are gone it is replaced",
                other.type_name,
                name = other.name
            ),
        })
    }

    pub(super) fn ipset_changes(
        &mut self,
        program: &Program,
        changes: &[&ElementChange],
    ) -> Vec<Result<(), Error>> {
        let mut all = Vec::new();
        let mut owners = Vec::new();
        for (at, change) in changes.iter().enumerate() {
            let (verb, element, mark) = match change {
                ElementChange::Put(element, mark) => (Verb::Add, element, *mark),
                ElementChange::Del(element) => (Verb::Del, element, None),
            };
            for (kind, entry) in ipset_entries(element, mark, program.mask, self.stores) {
                all.push(Change { set: set_name(kind, element.family()), verb, entry });
                owners.push(at);
            }
        }
        let mut results = vec![Ok(()); changes.len()];
        for (at, result) in owners.into_iter().zip(self.ipset.change(&all)) {
            if result.is_err() {
                results[at] = result;
            }
        }
        results
    }

    /// The part of the changes that concerns the small table, in one transaction.
    pub(super) fn nft_changes(&mut self, changes: &[&ElementChange]) -> Result<(), Error> {
        if !self.stores.nft || changes.is_empty() {
            return Ok(());
        }
        let (reader, known) = (&mut self.reader, self.known.as_ref());
        let text = nftwrite::change_text(reader, known, changes.iter().copied(), self.stores.layout())?;
        self.runs += u64::from(!text.is_empty());
        nftwrite::transaction(reader, &text, &mut self.generation)
    }

    /// Keeps what we know of our sets, and how many entries they hold, in step with changes.
    pub(super) fn note(&mut self, changes: &[ElementChange], results: &[Result<(), Error>]) {
        let Some(known) = self.known.as_mut() else { return };
        if let Some(counts) = self.counts.as_mut() {
            let mut there = BTreeMap::new();
            for (change, _) in changes.iter().zip(results).filter(|(_, result)| result.is_ok()) {
                let (ElementChange::Put(element, _) | ElementChange::Del(element)) = change;
                let put = matches!(change, ElementChange::Put(..));
                let before = there.insert(*element, put).unwrap_or_else(|| known.contains_key(element));
                if before == put {
                    continue;
                }
                for (kind, _) in ipset_entries(element, None, 0, self.stores) {
                    let count = counts.entry(set_name(kind, element.family())).or_default();
                    *count = if put { *count + 1 } else { count.saturating_sub(1) };
                }
            }
        }
        crate::dataplane::netfilter::note(known, changes, results);
    }

    pub(super) fn expected_counts(&mut self) -> &BTreeMap<String, u32> {
        let known = self.known.as_ref();
        let stores = self.stores;
        self.counts.get_or_insert_with(|| {
            let mut counts = BTreeMap::new();
            for (element, mark) in known.into_iter().flatten() {
                for (kind, _) in ipset_entries(element, *mark, 0, stores) {
                    *counts.entry(set_name(kind, element.family())).or_default() += 1;
                }
            }
            counts
        })
    }

    pub(super) fn probe_sets(&mut self) -> Result<Option<String>, Error> {
        let headers = self.ipset.headers()?;
        let expected: Vec<_> = self
            .fingerprint
            .iter()
            .flat_map(|f| f.parts.keys().filter_map(|k| k.strip_prefix("ipset ")).map(str::to_owned))
            .collect();
        let counts = self.expected_counts();
        for name in expected {
            let want = counts.get(&name).copied().unwrap_or_default();
            match headers.iter().find(|h| h.name == name) {
                None => return Ok(Some(format!("ipset {name} is missing"))),
                Some(h) if h.elements != want => {
                    return Ok(Some(format!("ipset {name} has {} entries instead of {want}", h.elements)));
                }
                Some(_) => {}
            }
        }
        Ok(None)
    }
}

/// Whether a change concerns the nft table beside iptables.
pub(super) fn in_small_table(change: &ElementChange, stores: Stores) -> bool {
    let (ElementChange::Put(element, _) | ElementChange::Del(element)) = change;
    match element {
        Element::Published(_) | Element::Own(_) | Element::Loopback(..) => stores.nft,
        Element::Endpoint(_) => stores.nft && !stores.pairs,
        Element::Vip(_) | Element::Local(_) => false,
    }
}

#[cfg(test)]
impl Iptables {
    /// As on a kernel whose sets hold less.
    pub(in crate::dataplane::netfilter) fn limit_sets(&mut self, max_elements: u32) {
        self.max_elements = max_elements;
    }

    /// How many programs it has run for writing.
    pub(in crate::dataplane::netfilter) fn runs(&self) -> u64 {
        self.runs
    }
}
