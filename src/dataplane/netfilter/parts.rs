//! What is there of ours, part by part, and how it differs from what should be: both renderers look in the same way.

use std::collections::BTreeMap;

use super::{
    Parts, hash,
    nftread::NftReader,
    rules_iptables::{CHAINS, Saved, target},
    sets::{Kind, NftContents, nft_name},
};
use crate::{dataplane::Error, model::ids::Family};

/// Chains and jumps that iptables-nft made, over netlink.
pub(super) fn nft_chains(reader: &mut NftReader, family: Family) -> Result<Parts, Error> {
    let mut parts = Parts::new();
    for c in CHAINS {
        if let Some(hash) = reader.iptables_chain(family, c.table, c.name)? {
            parts.insert(part_name(family, c.table, c.name), hash);
        }
        let Some(builtin) = c.builtin else { continue };
        if let Some(hash) = reader.iptables_jump(family, c.table, builtin, c.name)? {
            parts.insert(part_name(family, c.table, &format!("{builtin} jump to {}", c.name)), hash);
        }
    }
    Ok(parts)
}

/// The same from the output of iptables-save.
pub(super) fn save_parts(family: Family, saved: &Saved) -> Parts {
    let mut parts = Parts::new();
    for (table, chain) in &saved.chains {
        let lines = saved.rules.iter().filter(|(t, l)| t == table && l.split(' ').nth(1) == Some(chain));
        parts.insert(part_name(family, table, chain), hash::texts(lines.map(|(_, l)| l.as_str())));
    }
    for (table, line) in &saved.jumps {
        let (from, to) = (line.split(' ').nth(1), target(line));
        let name = format!("{} jump to {}", from.unwrap_or_default(), to.unwrap_or_default());
        let part = parts.entry(part_name(family, table, &name)).or_insert(hash::START);
        *part = hash::bytes(*part, line.as_bytes());
    }
    parts
}

pub(super) fn part_name(family: Family, table: &str, what: &str) -> String {
    format!("{} {table} {what}", if family == Family::V4 { "iptables" } else { "ip6tables" })
}

/// Sets whose contents differ, as texts that name them.
pub(super) fn set_differences(
    sets: &[(Kind, Family)],
    want: &NftContents,
    have: &NftContents,
    strange: usize,
) -> Vec<String> {
    let mut out = Vec::new();
    if strange > 0 {
        out.push(format!("{strange} elements in sets of table inet meshlb are not ours"));
    }
    for place @ (kind, family) in sets {
        let (want, have) = (want.get(place), have.get(place));
        let empty = BTreeMap::new();
        let (want, have) = (want.unwrap_or(&empty), have.unwrap_or(&empty));
        if want == have {
            continue;
        }
        let missing = want.iter().find(|(k, v)| have.get(k) != Some(v)).map(|(k, _)| format!("lacks {k}"));
        // An address that nothing is published on any more does no harm.
        let extra = have
            .keys()
            .find(|k| !want.contains_key(k) && *kind != Kind::Addresses)
            .map(|k| format!("has {k}, which is not ours"));
        if let Some(what) = missing.or(extra) {
            out.push(format!("set {} of table inet meshlb {what}", nft_name(*kind, *family)));
        }
    }
    out
}
