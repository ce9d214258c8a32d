//! The renderer without iptables: one nft table, replaced or changed in one transaction.

use std::collections::BTreeSet;

use super::{
    Fingerprint, Parts, accept, exec, hash,
    legacy_pace::LegacyPace,
    nftread::NftReader,
    nftwrite, outline,
    parts::{nft_chains, part_name, save_parts, set_differences},
    remove,
    rules_nft::{chain_names, table_text},
    sets::{Kind, Layout, NftContents, PREFIX, nft_contents, nft_to_elements},
    xtables::Variant,
};
use crate::{
    dataplane::{ElementChange, Error, Netfilter, NetfilterState, Probe, ProgramState, ipset::Ipset},
    model::{
        ids::{Family, Mark},
        kernel::{Elements, Program},
    },
};

/// The hash of rules that are needed and not there.
const NONE: u64 = 0;
/// So often may a refused transaction be halved: enough to find four bad ones among thousands.
const SPLITS: usize = 64;

/// The nftables renderer.
#[derive(Debug)]
pub struct Nftables {
    reader: NftReader,
    ipset: Ipset,
    runs: u64,
    fingerprint: Option<Fingerprint>,
    known: Option<Elements>,
    generation: Option<u32>,
    legacy: LegacyPace,
    /// Families that the rules are for.
    served: Vec<Family>,
    /// Families whose iptables-nft drops what we accept, and where only its owner can let it pass.
    advised: BTreeSet<Family>,
}

/// What we need in the filter table of an iptables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Need {
    /// It drops nothing.
    Nothing,
    /// Rules of ours that accept.
    Rules,
    /// The same, but we can't write them: no program is installed for that, or its owner has used nft there, and would find rules
    /// in it that nft can't write back. He is told what to do ([`super::advice`]).
    Owner,
}

impl Nftables {
    /// The renderer, in the network namespace of the thread that uses it.
    ///
    /// # Errors
    /// When nft is not installed or the kernel has no nf_tables.
    pub fn new() -> Result<Self, Error> {
        if exec::find("nft").is_none() {
            return Err(exec::missing("nft"));
        }
        let mut reader = NftReader::new();
        reader.generation()?;
        Ok(Self {
            reader,
            ipset: Ipset::new(),
            runs: 0,
            fingerprint: None,
            known: None,
            generation: None,
            legacy: LegacyPace::default(),
            served: Vec::new(),
            advised: BTreeSet::new(),
        })
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

    /// What this host keeps us from doing: nothing, with nft.
    pub fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    fn sets(program: Option<&Program>) -> Vec<(Kind, Family)> {
        let wanted = |f: &Family| program.is_none_or(|p| p.families.get(*f).is_some());
        Family::ALL
            .into_iter()
            .filter(wanted)
            .flat_map(|f| Layout::Whole.kinds().iter().map(move |k| (*k, f)))
            .collect()
    }

    fn program_hash(program: &Program) -> u64 {
        let mut texts = vec![table_text(program, &NftContents::new(), Layout::Whole)];
        for family in Family::ALL {
            texts.extend(
                accept::rules(program, family).into_iter().map(|r| format!("{} {}", r.chain, r.text)),
            );
        }
        hash::texts(texts.iter().map(String::as_str))
    }

    /// Whether this variant of iptables drops what we accept, and who can help it. `there` is what iptables-nft has of ours.
    fn need(&mut self, variant: Variant, family: Family, there: &Parts) -> Result<Need, Error> {
        match variant {
            Variant::Nft if !self.reader.iptables_blocks(family)? => Ok(Need::Nothing),
            // Those that are there do their work, whoever can read them.
            Variant::Nft if there.keys().any(|name| name.contains(" filter ")) => Ok(Need::Rules),
            Variant::Nft
                if variant.installed() && works(variant.reads(family, "filter"))?.unwrap_or(false) =>
            {
                Ok(Need::Rules)
            }
            Variant::Nft => Ok(Need::Owner),
            Variant::Legacy if !variant.installed() => Ok(Need::Nothing),
            Variant::Legacy => {
                let blocks = works(variant.saved(family))?.is_some_and(|saved| accept::blocks(&saved));
                Ok(if blocks { Need::Rules } else { Need::Nothing })
            }
        }
    }

    /// What iptables-nft has of ours, where this is that variant.
    fn there(&mut self, variant: Variant, family: Family) -> Result<Parts, Error> {
        match variant {
            Variant::Nft => nft_chains(&mut self.reader, family),
            Variant::Legacy => Ok(Parts::new()),
        }
    }

    /// Writes everything; returns a part that was gone again when it was read back.
    fn install_once(&mut self, program: &Program, elements: &Elements) -> Result<Option<String>, Error> {
        self.fingerprint = None;
        self.known = None;
        self.generation = None;
        self.runs += 1;
        self.served = program.families.iter().map(|(family, _)| family).collect();
        nftwrite::install(&mut self.reader, program, elements, Layout::Whole)?;
        // Also takes away what the iptables renderer left there, which would do the same work twice.
        self.put_accepting_rules(program)?;
        let generation = self.reader.generation()?;
        let mut parts = self.reader.table_parts(&chain_names(Some(program), Layout::Whole))?;
        let accepting = self.iptables_parts(program, &Variant::ALL)?.0;
        let chains = chain_names(Some(program), Layout::Whole).into_iter();
        let gone = super::missing(chains.map(|chain| format!("inet meshlb {chain}")), &parts)
            .or_else(|| accepting.iter().find(|(_, hash)| **hash == NONE).map(|(part, _)| part.clone()));
        if gone.is_some() {
            return Ok(gone);
        }
        parts.extend(accepting);
        self.fingerprint = Some(Fingerprint { program: Self::program_hash(program), parts });
        self.generation = Some(generation);
        self.known = Some(elements.clone());
        self.legacy.looked();
        Ok(None)
    }

    /// Our chains in iptables: `(needed, other)`, by what the accepting rules of `program` need.
    fn iptables_parts(
        &mut self,
        program: &Program,
        variants: &[Variant],
    ) -> Result<(Parts, Vec<String>), Error> {
        let (mut needed, mut others) = (Parts::new(), Vec::new());
        for variant in variants {
            for family in Family::ALL {
                let served = program.families.get(family).is_some();
                let there = match variant {
                    Variant::Nft => nft_chains(&mut self.reader, family)?,
                    Variant::Legacy => save_parts(family, &variant.saved(family)?),
                };
                let need = if served { self.need(*variant, family, &there)? } else { Need::Nothing };
                let mut found = false;
                for (name, hash) in there {
                    if need != Need::Nothing && name.contains(" filter ") {
                        found = true;
                        needed.insert(format!("{variant}: {name}"), hash);
                    } else {
                        others.push(format!("{variant}: {name}"));
                    }
                }
                if *variant == Variant::Nft && need == Need::Owner && !found {
                    self.advised.insert(family);
                } else if *variant == Variant::Nft {
                    self.advised.remove(&family);
                }
                if need == Need::Rules && !found {
                    // Not in any fingerprint, so that this counts as a difference.
                    needed.insert(
                        format!("{variant}: the accepting rules that a dropping {family} filter needs"),
                        NONE,
                    );
                }
            }
        }
        Ok((needed, others))
    }

    /// Makes the changes in one transaction. One element that the kernel refuses undoes all of it: then each half is tried
    /// by itself, `splits` times in all, so that what can be done is done.
    fn change(&mut self, changes: &[ElementChange], splits: &mut usize) -> Vec<Result<(), Error>> {
        let result = self.transaction(changes);
        if matches!(result, Err(Error::Failed { .. })) && changes.len() > 1 && *splits > 0 {
            *splits -= 1;
            let (first, second) = changes.split_at(changes.len() / 2);
            let mut results = self.change(first, splits);
            results.extend(self.change(second, splits));
            return results;
        }
        let results = vec![result; changes.len()];
        if let Some(known) = self.known.as_mut() {
            super::note(known, changes, &results);
        }
        results
    }

    fn transaction(&mut self, changes: &[ElementChange]) -> Result<(), Error> {
        let (reader, known) = (&mut self.reader, self.known.as_ref());
        let text = nftwrite::change_text(reader, known, changes, Layout::Whole)?;
        self.runs += u64::from(!text.is_empty());
        nftwrite::transaction(reader, &text, &mut self.generation)
    }

    fn put_accepting_rules(&mut self, program: &Program) -> Result<(), Error> {
        for variant in Variant::ALL.into_iter().filter(|v| v.installed()) {
            for family in Family::ALL {
                let there = self.there(variant, family)?;
                let wanted = self.need(variant, family, &there)? == Need::Rules;
                // A program that does not work is in nobody's way where it has nothing to do.
                let is_nft = variant == Variant::Nft;
                if is_nft && !wanted && there.is_empty() {
                    continue;
                }
                let saved = match variant.saved(family) {
                    Err(Error::Failed { .. }) if !wanted && !is_nft => continue,
                    saved => saved?,
                };
                let mut rules = if wanted { accept::rules(program, family) } else { Vec::new() };
                let wrote = match variant.put(family, &rules, &saved) {
                    // A kernel without xt_ipvs: the rest works without. Tables before this one may be written already.
                    Err(Error::MissingFeature { .. }) if rules.iter().any(accept::asks_ipvs) => {
                        rules.retain(|rule| !accept::asks_ipvs(rule));
                        variant.put(family, &rules, &variant.saved(family)?)
                    }
                    other => other,
                };
                self.runs += u64::from(wrote?);
            }
        }
        Ok(())
    }
}

/// What a program says; `None` where it does not work here, and trying again won't help.
fn works<T>(found: Result<T, Error>) -> Result<Option<T>, Error> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e @ (Error::Permission { .. } | Error::Transient { .. })) => Err(e),
        Err(e) => {
            tracing::debug!("{e}");
            Ok(None)
        }
    }
}

impl Netfilter for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn outline(&self, program: &Program) -> Vec<String> {
        let mut out = outline::nft(program, Layout::Whole);
        for variant in Variant::ALL.into_iter().filter(|v| v.installed()) {
            for family in Family::ALL {
                if variant.saved(family).is_ok_and(|saved| accept::blocks(&saved)) {
                    let chains = outline::iptables(family, &accept::rules(program, family));
                    out.extend(chains.into_iter().map(|chain| format!("{chain} ({})", variant.name())));
                }
            }
        }
        out
    }

    fn observe(&mut self, want: &Program) -> Result<NetfilterState, Error> {
        self.served = want.families.iter().map(|(family, _)| family).collect();
        let generation = self.reader.generation()?;
        let mut parts = self.reader.table_parts(&chain_names(Some(want), Layout::Whole))?;
        let table = !parts.is_empty();
        let (needed, mut leftovers) = self.iptables_parts(want, &Variant::ALL)?;
        parts.extend(needed);
        let sets = Self::sets(Some(want));
        let (contents, strange) = self.reader.contents(sets.iter().copied())?;
        let elements = nft_to_elements(&contents);
        let program = match &self.fingerprint {
            _ if !table => ProgramState::Absent,
            None => ProgramState::Drifted(vec![
                "there are rules of ours, but no record of how they were installed".to_owned(),
            ]),
            Some(f) if f.program != Self::program_hash(want) => {
                ProgramState::Drifted(vec!["the rules are those of another configuration".to_owned()])
            }
            Some(f) => {
                let mut wrong = f.differences(&parts);
                // Several sets hold parts of one element, and they must agree.
                wrong.extend(set_differences(
                    &sets,
                    &nft_contents(&elements, Layout::Whole),
                    &contents,
                    strange,
                ));
                if wrong.is_empty() { ProgramState::Installed } else { ProgramState::Drifted(wrong) }
            }
        };
        let headers = self.ipset.headers()?;
        leftovers.extend(
            headers.iter().filter(|h| h.name.starts_with(PREFIX)).map(|h| format!("ipset {}", h.name)),
        );
        let mut led_to = BTreeSet::new();
        for header in headers.iter().filter(|h| h.marks && h.name.starts_with(PREFIX)) {
            let entries = self.ipset.list(&header.name)?.map(|listing| listing.entries).unwrap_or_default();
            led_to.extend(entries.iter().filter_map(|entry| entry.mark).map(|mark| Mark(mark.value)));
        }
        self.generation = (program == ProgramState::Installed).then_some(generation);
        self.known = Some(elements.clone());
        self.legacy.looked();
        Ok(NetfilterState { program, elements, leftovers, led_to })
    }

    fn install(&mut self, program: &Program, elements: &Elements) -> Result<(), Error> {
        super::until_complete(|| self.install_once(program, elements))
    }

    fn apply(&mut self, _program: &Program, changes: &[ElementChange]) -> Vec<Result<(), Error>> {
        let mut splits = SPLITS;
        self.change(changes, &mut splits)
    }

    fn remove_leftovers(&mut self) -> Result<(), Error> {
        let mut errors = Vec::new();
        for variant in Variant::ALL {
            for family in Family::ALL {
                // The accepting rules are not left over where they are needed.
                let need = if self.fingerprint.is_some() {
                    self.there(variant, family).and_then(|there| self.need(variant, family, &there))
                } else {
                    Ok(Need::Nothing)
                };
                let done = need.and_then(|need| {
                    let but = (need != Need::Nothing).then_some("filter");
                    remove::chains_of(variant, family, but, &mut self.reader)
                });
                match done {
                    Ok(wrote) => self.runs += wrote,
                    Err(e) => errors.push(e),
                }
            }
        }
        errors.extend(remove::sets(&mut self.ipset).err());
        remove::collect(errors)
    }

    fn remove(&mut self) -> Result<(), Error> {
        let (writes, result) = remove::everything(&mut self.ipset, &mut self.reader);
        self.runs += writes;
        self.fingerprint = None;
        self.known = None;
        self.generation = None;
        result
    }

    fn probe(&mut self) -> Result<Probe, Error> {
        let (Some(fingerprint), Some(known)) = (&self.fingerprint, &self.known) else {
            return Ok(Probe::Changed("not installed or not looked at yet".into()));
        };
        let generation = self.reader.generation()?;
        let moved = self.generation != Some(generation);
        if moved {
            // Somebody wrote to nf_tables: is ours still as it was?
            let mut parts = self.reader.table_parts(&chain_names(None, Layout::Whole))?;
            for family in Family::ALL {
                let chains = nft_chains(&mut self.reader, family)?;
                parts.extend(
                    chains.into_iter().map(|(name, hash)| (format!("{}: {name}", Variant::Nft), hash)),
                );
            }
            let mut expected = fingerprint.clone();
            let legacy = format!("{}: ", Variant::Legacy);
            expected.parts.retain(|name, _| !name.starts_with(&legacy));
            if let Some(what) = expected.differences(&parts).into_iter().next() {
                return Ok(Probe::Changed(what));
            }
            let sets = Self::sets(None);
            let (have, strange) = self.reader.contents(sets.iter().copied())?;
            let wrong = set_differences(&sets, &nft_contents(known, Layout::Whole), &have, strange);
            if let Some(what) = wrong.into_iter().next() {
                return Ok(Probe::Changed(what));
            }
            for family in &self.served {
                let settled = accepts(fingerprint, Variant::Nft, *family) || self.advised.contains(family);
                if !settled && self.reader.iptables_blocks(*family)? {
                    return Ok(Probe::Changed(begun_to_drop(Variant::Nft, *family)));
                }
            }
        }
        if self.legacy.due() {
            let accepting = format!("{}: ", Variant::Legacy);
            let mut parts = Parts::new();
            let mut blocked = None;
            for (family, saved) in self.legacy.look() {
                let saved = saved?;
                let accepted =
                    !self.served.contains(&family) || accepts(fingerprint, Variant::Legacy, family);
                if !accepted && accept::blocks(&saved) {
                    blocked.get_or_insert(family);
                }
                let ours =
                    save_parts(family, &saved).into_iter().filter(|(name, _)| name.contains(" filter "));
                parts.extend(ours.map(|(name, hash)| (format!("{accepting}{name}"), hash)));
            }
            let mut expected = fingerprint.clone();
            expected.parts.retain(|name, _| name.starts_with(&accepting));
            if let Some(what) = expected.differences(&parts).into_iter().next() {
                return Ok(Probe::Changed(what));
            }
            if let Some(family) = blocked {
                return Ok(Probe::Changed(begun_to_drop(Variant::Legacy, family)));
            }
        }
        self.generation = Some(generation);
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

/// Whether our accepting rules stand in the chains of this iptables.
fn accepts(fingerprint: &Fingerprint, variant: Variant, family: Family) -> bool {
    let ours = format!("{variant}: {}", part_name(family, "filter", ""));
    fingerprint.parts.keys().any(|name| name.starts_with(&ours))
}

fn begun_to_drop(variant: Variant, family: Family) -> String {
    format!("{variant} INPUT or FORWARD has begun to drop {family} packets")
}
