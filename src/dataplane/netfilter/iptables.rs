//! The renderer that operators know how to look at: iptables rules and ipsets, and a small nft table for
//! what iptables has no place for.

mod contents;

use std::collections::{BTreeMap, HashMap};

use self::contents::in_small_table;
use super::{
    Fingerprint, Parts, exec, hash,
    legacy_pace::LegacyPace,
    nftread::NftReader,
    nftwrite, outline,
    parts::{nft_chains, part_name, save_parts, set_differences},
    remove,
    rules_iptables::{CHAINS, Guard, Options, rules},
    rules_nft::{chain_names, hand_over_text, table_text},
    sets::{Layout, NftContents, PREFIX, SCRATCH, Stores, nft_contents, set_name},
    xtables::Variant,
};
use crate::{
    dataplane::{
        ElementChange, Error, Netfilter, NetfilterState, Probe, ProgramState,
        ipset::{Ipset, MAX_ELEMENTS, SetType},
    },
    model::{
        ids::Family,
        kernel::{Elements, Program},
    },
};

/// The iptables renderer.
#[derive(Debug)]
pub struct Iptables {
    variant: Variant,
    stores: Stores,
    pub(super) options: Options,
    ipset: Ipset,
    reader: NftReader,
    runs: u64,
    fingerprint: Option<Fingerprint>,
    /// What our sets hold, as far as we know.
    known: Option<Elements>,
    /// How many entries each ipset holds; made from `known` when needed.
    counts: Option<BTreeMap<String, u32>>,
    /// The nf_tables generation up to which all is known to be ours.
    generation: Option<u32>,
    legacy: LegacyPace,
    /// Families whose rules stand, though not all could be written.
    stands: Vec<Family>,
    /// Elements that the kernel would not take into an ipset.
    refused: Elements,
    /// Why, after an installation.
    unfilled: Option<Error>,
    /// How many entries an ipset may have.
    max_elements: u32,
}

impl Iptables {
    /// The renderer for one variant, in the network namespace of the thread that uses it.
    ///
    /// # Errors
    /// When the variant's programs are not installed.
    pub fn new(variant: Variant) -> Result<Self, Error> {
        if !variant.installed() {
            return Err(exec::missing(&format!("{variant}-restore")));
        }
        let mut reader = NftReader::new();
        let nft = reader.available() && exec::find("nft").is_some();
        let mut ipset = Ipset::new();
        let pairs = ipset.has_type(SetType::Pair);
        Ok(Self::with(variant, Stores { nft, pairs }, ipset, reader))
    }

    fn with(variant: Variant, stores: Stores, ipset: Ipset, reader: NftReader) -> Self {
        let Stores { nft, pairs } = stores;
        let guard = if nft { Guard::Nft } else { Guard::Filter { security: variant == Variant::Legacy } };
        Self {
            variant,
            stores,
            options: Options { guard, hairpin: pairs, ..Options::default() },
            ipset,
            reader,
            runs: 0,
            fingerprint: None,
            known: None,
            counts: None,
            generation: None,
            legacy: LegacyPace::default(),
            stands: Vec::new(),
            refused: Elements::new(),
            unfilled: None,
            max_elements: MAX_ELEMENTS,
        }
    }

    /// The same without the nft table, as on a host that can't have it.
    #[cfg(test)]
    pub(super) fn without_nft(variant: Variant) -> Self {
        let mut ipset = Ipset::new();
        let pairs = ipset.has_type(SetType::Pair);
        Self::with(variant, Stores { nft: false, pairs }, ipset, NftReader::new())
    }

    /// What was read back after the last installation, for the state file.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.fingerprint.clone()
    }

    /// Tells what an earlier process installed. Without it the first observation of rules that are there
    /// finds them drifted, and they are installed once more.
    pub fn set_fingerprint(&mut self, fingerprint: Option<Fingerprint>) {
        self.fingerprint = fingerprint;
    }

    /// What this host keeps us from doing, each as one line for people.
    pub fn warnings(&self) -> Vec<String> {
        if self.stores.nft {
            return Vec::new();
        }
        let how = "install the package nftables and load the module nf_tables";
        let mut out = vec![
            format!(
                "without nft, a VIP port whose IPVS service is missing can reach a socket of this host, and so can a \
                 published port after its rules were flushed by others; {how}"
            ),
            format!("without nft, published ports don't answer on 127.0.0.1 and ::1; {how}"),
        ];
        if !self.stores.pairs {
            out.push("without hash:net,net and nft, an endpoint can't reach itself by its service; load the module ip_set_hash_netnet".to_owned());
        }
        if self.variant == Variant::Nft {
            out.push(format!(
                "without nft, a mark bit that another program sets on packets to VIPs keeps them from IPVS; {how}"
            ));
        }
        out
    }

    fn program_hash(&self, program: &Program) -> u64 {
        let mut texts = vec![self.variant.name().to_owned()];
        for family in Family::ALL {
            texts.extend(
                rules(program, family, self.options)
                    .into_iter()
                    .map(|r| format!("{} {} {}", r.table, r.chain, r.text)),
            );
        }
        if self.stores.nft {
            texts.push(table_text(program, &NftContents::new(), self.stores.layout()));
        }
        hash::texts(texts.iter().map(String::as_str))
    }

    fn families(program: &Program) -> impl Iterator<Item = Family> + use<> {
        let both = [program.families.v4.is_some(), program.families.v6.is_some()];
        Family::ALL.into_iter().zip(both).filter_map(|(f, there)| there.then_some(f))
    }

    /// Hashes of all of ours that is there, without the sets' contents.
    fn parts(&mut self, program: Option<&Program>) -> Result<Parts, Error> {
        let mut parts = Parts::new();
        if self.stores.nft {
            let chains = chain_names(program, self.stores.layout());
            parts.extend(self.reader.table_parts(&chains)?);
        } else if self.reader.has_table()? {
            // Of a run when there was nft: nobody keeps it up to date any more.
            parts.insert("inet meshlb".to_owned(), hash::START);
        }
        for family in Family::ALL {
            match self.variant {
                Variant::Nft => parts.extend(nft_chains(&mut self.reader, family)?),
                Variant::Legacy => parts.extend(save_parts(family, &self.variant.saved(family)?)),
            }
        }
        for header in self.ipset.headers()? {
            if header.name.starts_with(PREFIX) && header.name != SCRATCH {
                // One that holds less than ours was put in its place, and is made anew.
                let small = if header.max_elements < self.max_elements { " small" } else { "" };
                let kind = format!("{} {} {}{small}", header.type_name, header.family, header.marks);
                parts.insert(format!("ipset {}", header.name), hash::texts([kind.as_str()]));
            }
        }
        Ok(parts)
    }

    fn put_table(&mut self, program: &Program, elements: &Elements) -> Result<(), Error> {
        self.runs += 1;
        let layout = self.stores.layout();
        nftwrite::install(&mut self.reader, program, elements, layout)
    }

    /// Writes everything; returns a part that was gone again when it was read back.
    fn install_once(&mut self, program: &Program, elements: &Elements) -> Result<Option<String>, Error> {
        self.fingerprint = None;
        self.known = None;
        self.counts = None;
        self.generation = None;
        self.stands.clear();
        self.refused.clear();
        let (refused, reason) = self.fill_sets(program, elements)?;
        // The guard first: it only refuses what IPVS did not take. But where a table stands, it may be the
        // other renderer's, which does all the work until our rules do it too.
        let guarded = self.stores.nft && self.reader.has_table()?;
        if self.stores.nft && !guarded {
            self.put_table(program, elements)?;
        }
        // A family that this kernel or host has no means for keeps the other from nothing.
        let mut unwritten = None;
        for family in Family::ALL {
            let rules = rules(program, family, self.options);
            let written =
                self.variant.saved(family).and_then(|saved| self.variant.put(family, &rules, &saved));
            match written {
                Ok(wrote) => self.runs += u64::from(wrote),
                Err(e) if unwritten.is_none() => unwritten = Some((family, e)),
                Err(e) => return Err(e),
            }
        }
        if guarded {
            // What only the nftables renderer's table has.
            let whole = self.reader.table_parts(&["post-4".to_owned(), "post-6".to_owned()])?;
            let whole = whole.contains_key("inet meshlb post-4") || whole.contains_key("inet meshlb post-6");
            if let (true, Some((family, e))) = (whole, &unwritten) {
                // The other renderer's table does for both families what our rules do for one of them only.
                self.runs += 1;
                if let Err(e) = nftwrite::install(&mut self.reader, program, elements, Layout::Whole) {
                    tracing::debug!("{e}");
                }
                self.stands.extend(Family::ALL.into_iter().filter(|other| other != family));
                return Err(e.clone());
            }
            if whole {
                self.runs += 1;
                // One that somebody has changed may refuse it; it is replaced all the same.
                if let Err(e) = nftwrite::run(&hand_over_text(program)) {
                    tracing::debug!("{e}");
                }
            }
            self.put_table(program, elements)?;
        } else if unwritten.is_none() && !self.stores.nft && self.reader.has_table()? {
            self.runs += 1;
            self.reader.delete_table()?;
        }
        for header in self.ipset.headers()?.iter().filter(|h| h.name.starts_with(PREFIX)) {
            let wanted =
                Self::families(program).any(|f| self.stores.ipsets().any(|k| set_name(k, f) == header.name));
            if !wanted {
                self.ipset.destroy(&header.name)?;
            }
        }
        if let Some((family, e)) = unwritten {
            self.stands.extend(Family::ALL.into_iter().filter(|other| *other != family));
            return Err(e);
        }
        let generation = self.reader.generation().ok();
        let parts = self.parts(Some(program))?;
        if let Some(part) = super::missing(self.expected_parts(program), &parts) {
            return Ok(Some(part));
        }
        self.fingerprint = Some(Fingerprint { program: self.program_hash(program), parts });
        self.generation = generation;
        let mut known = elements.clone();
        known.retain(|element, _| !refused.contains_key(element));
        self.known = Some(known);
        self.legacy.looked();
        self.stands.extend(Family::ALL);
        self.unfilled = reason.map(|e| match (e, refused.len()) {
            (Error::Failed { object, reason }, n) if n > 1 => {
                Error::Failed { object, reason: format!("{reason} (and {} more; all else is served)", n - 1) }
            }
            (e, _) => e,
        });
        self.refused = refused;
        Ok(None)
    }

    /// Names of the parts that an installed program has.
    fn expected_parts(&self, program: &Program) -> Vec<String> {
        let mut names = Vec::new();
        if self.stores.nft {
            let chains = chain_names(Some(program), self.stores.layout());
            names.extend(chains.into_iter().map(|chain| format!("inet meshlb {chain}")));
        }
        for family in Self::families(program) {
            let rules = rules(program, family, self.options);
            for c in CHAINS.iter().filter(|c| rules.iter().any(|r| r.table == c.table && r.chain == c.name)) {
                names.push(part_name(family, c.table, c.name));
                let jump = c.builtin.map(|builtin| format!("{builtin} jump to {}", c.name));
                names.extend(jump.map(|jump| part_name(family, c.table, &jump)));
            }
            names.extend(self.stores.ipsets().map(|kind| format!("ipset {}", set_name(kind, family))));
        }
        names
    }
}

impl Netfilter for Iptables {
    fn name(&self) -> &'static str {
        self.variant.name()
    }

    fn outline(&self, program: &Program) -> Vec<String> {
        let nft = self.stores.nft.then(|| outline::nft(program, self.stores.layout()));
        let chains = Self::families(program)
            .flat_map(|family| outline::iptables(family, &rules(program, family, self.options)));
        let sets = outline::ipsets(self.stores, Self::families(program));
        sets.into_iter().chain(nft.into_iter().flatten()).chain(chains).collect()
    }

    fn observe(&mut self, want: &Program) -> Result<NetfilterState, Error> {
        // Read first: whatever is written after this moment raises it again.
        let generation = self.reader.generation().ok();
        let parts = self.parts(Some(want))?;
        let (elements, mut wrong) = self.elements(want)?;
        let program = match &self.fingerprint {
            _ if parts.is_empty() => ProgramState::Absent,
            None => ProgramState::Drifted(vec![
                "there are rules of ours, but no record of how they were installed".to_owned(),
            ]),
            Some(f) if f.program != self.program_hash(want) => {
                ProgramState::Drifted(vec!["the rules are those of another configuration".to_owned()])
            }
            Some(f) => {
                wrong.extend(f.differences(&parts));
                if wrong.is_empty() { ProgramState::Installed } else { ProgramState::Drifted(wrong) }
            }
        };
        let mut leftovers = Vec::new();
        for family in Family::ALL {
            let other = match self.variant.other() {
                Variant::Nft => nft_chains(&mut self.reader, family)?,
                other @ Variant::Legacy => save_parts(family, &other.saved(family)?),
            };
            leftovers.extend(other.into_keys().map(|part| format!("{}: {part}", self.variant.other())));
        }
        self.generation = generation.filter(|_| program == ProgramState::Installed);
        self.known = Some(elements.clone());
        self.counts = None;
        self.legacy.looked();
        let led_to = self.marks_of_table()?;
        Ok(NetfilterState { program, elements, leftovers, led_to })
    }

    fn install(&mut self, program: &Program, elements: &Elements) -> Result<(), Error> {
        super::until_complete(|| self.install_once(program, elements))?;
        self.unfilled.take().map_or(Ok(()), Err)
    }

    fn stands(&self, family: Family) -> bool {
        self.stands.contains(&family)
    }

    fn apply(&mut self, program: &Program, changes: &[ElementChange]) -> Vec<Result<(), Error>> {
        let puts: Vec<_> = changes
            .iter()
            .filter(|c| in_small_table(c, self.stores) && matches!(c, ElementChange::Put(..)))
            .collect();
        let dels: Vec<_> = changes
            .iter()
            .filter(|c| in_small_table(c, self.stores) && matches!(c, ElementChange::Del(_)))
            .collect();
        // The guard knows a published port before packets are led to it, and until they no longer are.
        let put = self.nft_changes(&puts);
        let mut results = self.ipset_changes(program, &changes.iter().collect::<Vec<_>>());
        for (change, result) in changes.iter().zip(&results) {
            match change {
                ElementChange::Put(element, mark)
                    if result.is_err() && put.is_ok() && in_small_table(change, self.stores) =>
                {
                    self.refused.insert(*element, *mark);
                }
                ElementChange::Put(element, _) | ElementChange::Del(element) => {
                    self.refused.remove(element);
                }
            }
        }
        // A Del that a later Put takes back must not undo it.
        let put_last: HashMap<_, bool> = changes
            .iter()
            .map(|change| match change {
                ElementChange::Put(element, _) => (element, true),
                ElementChange::Del(element) => (element, false),
            })
            .collect();
        let stays = |change: &&&ElementChange| matches!(**change, ElementChange::Del(element) if put_last.get(element) == Some(&true));
        let dels: Vec<_> = dels.iter().filter(|change| !stays(change)).copied().collect();
        let del = self.nft_changes(&dels);
        for (change, result) in changes.iter().zip(&mut results) {
            let nft = match change {
                _ if !in_small_table(change, self.stores) => continue,
                ElementChange::Put(..) => &put,
                ElementChange::Del(_) => &del,
            };
            if let (Err(e), Ok(())) = (nft, &result) {
                *result = Err(e.clone());
            }
        }
        self.note(changes, &results);
        results
    }

    fn remove_leftovers(&mut self) -> Result<(), Error> {
        self.runs += remove::chains(self.variant.other(), &mut self.reader)?;
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Error> {
        let (writes, result) = remove::everything(&mut self.ipset, &mut self.reader);
        self.runs += writes;
        self.fingerprint = None;
        self.known = None;
        self.counts = None;
        self.generation = None;
        self.refused.clear();
        result
    }

    fn probe(&mut self) -> Result<Probe, Error> {
        let (Some(fingerprint), Some(_)) = (self.fingerprint.clone(), &self.known) else {
            return Ok(Probe::Changed("not installed or not looked at yet".into()));
        };
        if let Some(what) = self.probe_sets()? {
            return Ok(Probe::Changed(what));
        }
        let generation = self.reader.generation().ok();
        let moved = generation != self.generation || (self.stores.nft && generation.is_none());
        let legacy = self.variant == Variant::Legacy && self.legacy.due();
        if !moved && !legacy {
            return Ok(Probe::Unchanged);
        }
        let mut expected = fingerprint;
        let mut parts = Parts::new();
        if self.stores.nft && moved {
            parts.extend(self.reader.table_parts(&chain_names(None, self.stores.layout()))?);
        }
        let is_nft_part = |name: &str| name.starts_with("inet ");
        let rules = if self.variant == Variant::Nft { moved } else { legacy };
        if rules {
            match self.variant {
                Variant::Nft => {
                    for family in Family::ALL {
                        parts.extend(nft_chains(&mut self.reader, family)?);
                    }
                }
                Variant::Legacy => {
                    for (family, saved) in self.legacy.look() {
                        parts.extend(save_parts(family, &saved?));
                    }
                }
            }
        }
        expected.parts.retain(|name, _| {
            if name.starts_with("ipset ") {
                false
            } else if is_nft_part(name) {
                self.stores.nft && moved
            } else {
                rules
            }
        });
        if let Some(what) = expected.differences(&parts).into_iter().next() {
            return Ok(Probe::Changed(what));
        }
        if self.stores.nft && moved {
            let known = self.known.as_ref();
            let want =
                known.map(|k| nft_contents(&self.guarded(k), self.stores.layout())).unwrap_or_default();
            let sets: Vec<_> = Family::ALL
                .iter()
                .flat_map(|f| self.stores.layout().kinds().iter().map(move |k| (*k, *f)))
                .collect();
            let (have, strange) = self.reader.contents(sets.iter().copied())?;
            let wrong = set_differences(&sets, &want, &have, strange);
            if let Some(what) = wrong.into_iter().next() {
                return Ok(Probe::Changed(what));
            }
        }
        self.generation = generation;
        Ok(Probe::Unchanged)
    }

    fn warnings(&self) -> Vec<String> {
        Self::warnings(self)
    }

    fn fingerprint(&self) -> Option<serde_json::Value> {
        Self::fingerprint(self).and_then(|f| serde_json::to_value(f).ok())
    }

    fn set_fingerprint(&mut self, fingerprint: serde_json::Value) {
        Self::set_fingerprint(self, serde_json::from_value(fingerprint).ok());
    }

    fn writes(&self) -> u64 {
        self.ipset.writes() + self.runs
    }
}
