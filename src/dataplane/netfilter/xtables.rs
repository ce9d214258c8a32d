//! The programs of one iptables variant: reading its rules, writing them, and removing ours.

use std::{fmt, str::FromStr};

use super::{
    exec,
    nftclear::Ours,
    nftread::NftReader,
    rules_iptables::{CHAINS, Rule, Saved, TABLES, jump, parse_save, restore_text},
};
use crate::{dataplane::Error, model::ids::Family};

/// Which kernel interface an iptables program writes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Variant {
    /// nf_tables, through iptables-nft.
    Nft,
    /// The old tables.
    Legacy,
}

impl Variant {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Nft, Self::Legacy];

    /// The other one.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    /// The renderer's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "iptables-nft",
            Self::Legacy => "iptables-legacy",
        }
    }

    /// The program for this family that ends in `restore` or `save`. Where a distribution ships one variant
    /// only, its program has no variant in its name.
    fn program(self, family: Family, what: &str) -> String {
        let ip = if family == Family::V4 { "iptables" } else { "ip6tables" };
        let full = format!("{ip}-{}-{what}", self.word());
        let plain = format!("{ip}-{what}");
        if exec::find(&full).is_none() && plain_variant() == Some(self) && exec::find(&plain).is_some() {
            return plain;
        }
        full
    }

    /// Whether its programs are installed.
    pub fn installed(self) -> bool {
        exec::find(&self.program(Family::V4, "restore")).is_some()
            && exec::find(&self.program(Family::V4, "save")).is_some()
    }

    /// Whether this kernel has any of its tables in this network namespace; only told for the old tables,
    /// where looking with the program would make them.
    pub(crate) fn has_tables(self, family: Family) -> bool {
        let names = match (self, family) {
            (Self::Nft, _) => return true,
            // /proc/net is the namespace of the process, this thread may be in another.
            (Self::Legacy, Family::V4) => "/proc/thread-self/net/ip_tables_names",
            (Self::Legacy, Family::V6) => "/proc/thread-self/net/ip6_tables_names",
        };
        std::fs::read_to_string(names).is_ok_and(|text| !text.trim().is_empty())
    }

    /// What iptables-save prints.
    pub(crate) fn save_text(self, family: Family) -> Result<String, Error> {
        if !self.has_tables(family) {
            return Ok(String::new());
        }
        exec::run(&self.program(family, "save"), &[] as &[&str], "")
    }

    /// What is there; nothing where the program is not installed.
    pub(crate) fn saved(self, family: Family) -> Result<Saved, Error> {
        match self.save_text(family) {
            Ok(text) => Ok(parse_save(&text)),
            Err(Error::MissingProgram { .. }) => Ok(Saved::default()),
            Err(e) => Err(e),
        }
    }

    /// Writes a text, leaving other chains alone.
    pub(crate) fn restore(self, family: Family, text: &str) -> Result<(), Error> {
        exec::run(&self.program(family, "restore"), &["--noflush", "-w", "5"], text).map(drop)
    }

    /// Whether it can read this table: iptables-nft can't where somebody has used nft there.
    pub(crate) fn reads(self, family: Family, table: &str) -> Result<bool, Error> {
        Ok(!self.saved(family)?.unreadable.iter().any(|t| t == table))
    }

    /// Makes exactly these rules of ours be there. Returns whether it wrote.
    pub(crate) fn put(self, family: Family, rules: &[Rule], saved: &Saved) -> Result<bool, Error> {
        let mut saved = saved.clone();
        let cleared = clear_unreadable(family, rules, &mut saved)?;
        let text = restore_text(rules, &saved);
        if text.is_empty() {
            return Ok(cleared);
        }
        self.restore(family, &text).map(|()| true)
    }
}

/// Looks at the tables that iptables-nft can't read, and takes away what of ours is not wanted there: it can't be told to delete
/// a rule among those that it doesn't understand, though it writes new ones.
fn clear_unreadable(family: Family, rules: &[Rule], saved: &mut Saved) -> Result<bool, Error> {
    let mut cleared = false;
    // What leads packets to IPVS goes first.
    for table in TABLES.into_iter().rev().filter(|t| saved.unreadable.iter().any(|u| u == t)) {
        let mut reader = NftReader::new();
        let mut unwanted = Ours::default();
        let found = reader.ours(family, table)?;
        let wanted: Vec<_> = CHAINS
            .iter()
            .filter(|c| c.table == table && rules.iter().any(|r| r.table == table && r.chain == c.name))
            .collect();
        for jump_found in found.jumps {
            let (from, to) = (jump_found.from.as_str(), jump_found.to.as_str());
            let line = (table.to_owned(), jump(from, to));
            let ours = wanted.iter().any(|c| c.builtin == Some(from) && c.name == to);
            if ours && jump_found.plain && !saved.jumps.contains(&line) {
                saved.jumps.push(line);
            } else {
                unwanted.jumps.push(jump_found);
            }
        }
        for chain in found.chains {
            if wanted.iter().any(|c| c.name == chain) {
                saved.chains.push((table.to_owned(), chain));
            } else {
                unwanted.chains.push(chain);
            }
        }
        if !unwanted.is_empty() {
            reader.delete(family, table, &unwanted)?;
            cleared = true;
        }
    }
    Ok(cleared)
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Variant {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|v| v.name() == s)
            .ok_or_else(|| format!("{s:?} is not an iptables variant"))
    }
}

/// What the program `iptables` without a variant in its name writes.
pub(crate) fn plain_variant() -> Option<Variant> {
    let text = exec::run("iptables", &["--version"], "").ok()?;
    // Before 1.8 there was only one, and it printed no variant.
    Some(if text.contains("nf_tables") { Variant::Nft } else { Variant::Legacy })
}
