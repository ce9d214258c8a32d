//! The netfilter program: what finds the mark of a packet, sends published ports to IPVS, masquerades where
//! an endpoint could not answer otherwise, and refuses what IPVS did not take.
//!
//! There are two renderers of it. [`Iptables`] writes iptables rules and ipsets, with a small nft table
//! beside them for what iptables can't do; [`Nftables`] writes one nft table. In both, the number of rules
//! does not depend on the number of services: those are elements of sets and maps.
//!
//! Rules are read back over netlink and compared by hash with what was read after they were installed (a
//! [`Fingerprint`]), because no two versions of the tools print a rule alike.

mod accept;
mod detect;
mod exec;
mod hash;
mod iptables;
mod nftables;
mod nftread;
mod nftwrite;
mod parts;
mod remove;
mod rules_iptables;
mod rules_nft;
mod sets;
mod xtables;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod kernel_tests;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ElementChange, Error};
use crate::model::kernel::Elements;

pub use detect::{Detection, RendererChoice, advice, detect};
pub use iptables::Iptables;
pub use nftables::Nftables;
pub use xtables::Variant;

/// Hashes of what is in the kernel, by chain.
pub(crate) type Parts = BTreeMap<String, u64>;

/// What the kernel held right after a program was installed. Kept in the state file, it tells an agent that
/// starts again whether the rules are still those.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Hash of the program's text.
    pub program: u64,
    /// Hashes of the chains as they were read back.
    pub parts: BTreeMap<String, u64>,
}

impl Fingerprint {
    /// The differences between then and now, as texts that name the chain; empty when there are none.
    pub(crate) fn differences(&self, now: &Parts) -> Vec<String> {
        let mut out = Vec::new();
        for (name, hash) in &self.parts {
            match now.get(name) {
                None => out.push(format!("{name} is missing")),
                Some(other) if other != hash => out.push(format!("{name} was changed")),
                Some(_) => {}
            }
        }
        out.extend(
            now.keys()
                .filter(|name| !self.parts.contains_key(*name))
                .map(|name| format!("{name} is not ours")),
        );
        out
    }
}

/// Writes changes that succeeded into what we know of our sets.
pub(crate) fn note(known: &mut Elements, changes: &[ElementChange], results: &[Result<(), Error>]) {
    for (change, result) in changes.iter().zip(results) {
        if result.is_err() {
            continue;
        }
        match change {
            ElementChange::Put(element, mark) => {
                known.insert(*element, *mark);
            }
            ElementChange::Del(element) => {
                known.remove(element);
            }
        }
    }
}
