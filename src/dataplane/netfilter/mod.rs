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
mod legacy_pace;
mod nftables;
mod nftclear;
mod nftread;
mod nftwrite;
mod outline;
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
mod odd_tests;
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

/// How often an installation is tried that others undo before it has been read back.
const ATTEMPTS: usize = 3;

/// Installs until what was written is still there when it is read back. `install` returns the first part that is
/// not, which another program has taken away meanwhile: a fingerprint of that would call it right for good.
pub(crate) fn until_complete(
    mut install: impl FnMut() -> Result<Option<String>, Error>,
) -> Result<(), Error> {
    let mut missing = String::new();
    for _ in 0..ATTEMPTS {
        match install()? {
            None => return Ok(()),
            Some(part) => missing = part,
        }
    }
    let reason = "another program has taken it away while the rules were written".to_owned();
    Err(Error::Transient { object: missing, reason })
}

/// The first of the expected parts that is not there, or is empty.
pub(crate) fn missing(expected: impl IntoIterator<Item = String>, parts: &Parts) -> Option<String> {
    expected.into_iter().find(|name| parts.get(name).is_none_or(|hash| *hash == hash::START))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_when_it_is_read_back_is_installed_again() {
        let expected = || ["filter INPUT".to_owned(), "nat INPUT".to_owned()];
        let whole = Parts::from([("filter INPUT".to_owned(), 1), ("nat INPUT".to_owned(), 2)]);
        let emptied = Parts::from([("filter INPUT".to_owned(), 1), ("nat INPUT".to_owned(), hash::START)]);
        let gone = Parts::from([("nat INPUT".to_owned(), 2)]);
        let mut seen = vec![whole, emptied, gone.clone()];
        until_complete(|| Ok(missing(expected(), &seen.pop().unwrap()))).unwrap();
        assert!(seen.is_empty(), "it was content with less");
        let error = until_complete(|| Ok(missing(expected(), &gone))).unwrap_err();
        assert!(error.to_string().contains("filter INPUT: another program"), "{error}");
    }
}
