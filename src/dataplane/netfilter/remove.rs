//! Taking everything of ours away, whichever renderer made it.

use std::time::Duration;

use super::{nftread::NftReader, rules_iptables::TABLES, sets::PREFIX, xtables::Variant};
use crate::{
    dataplane::{Error, ipset::Ipset},
    model::ids::Family,
};

/// What failed, as one error; `Ok` when nothing did.
pub(crate) fn collect(errors: Vec<Error>) -> Result<(), Error> {
    let mut errors = errors;
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        n => {
            let reason = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            Err(Error::Failed { object: format!("{n} things"), reason })
        }
    }
}

/// Removes our chains and jumps from one variant of iptables. Returns how often it wrote.
pub(crate) fn chains(variant: Variant, reader: &mut NftReader) -> Result<u64, Error> {
    let (mut writes, mut errors) = (0, Vec::new());
    for family in Family::ALL {
        match chains_of(variant, family, None, reader) {
            Ok(n) => writes += n,
            Err(e) => errors.push(e),
        }
    }
    collect(errors).map(|()| writes)
}

/// The same for one family, `but` for one table.
pub(crate) fn chains_of(
    variant: Variant,
    family: Family,
    but: Option<&str>,
    reader: &mut NftReader,
) -> Result<u64, Error> {
    let by_program = variant.saved(family).and_then(|mut saved| {
        but.into_iter().for_each(|table| saved.leave_out(table));
        variant.put(family, &[], &saved)
    });
    if variant == Variant::Legacy {
        return match by_program {
            Err(Error::MissingProgram { .. }) => Ok(0),
            other => other.map(u64::from),
        };
    }
    // What iptables-nft has seen is one thing, what is there another: it may not be installed any more.
    if let Err(e) = &by_program {
        tracing::debug!("{e}; our chains are removed without it");
    }
    let mut writes = u64::from(matches!(by_program, Ok(true)));
    for table in TABLES.into_iter().rev().filter(|t| Some(*t) != but) {
        let left = reader.ours(family, table)?;
        if !left.is_empty() {
            reader.delete(family, table, &left)?;
            writes += 1;
        }
    }
    Ok(writes)
}

/// How often, and after how long a rest, a set is tried that is still in use: the kernel lets go of what deleted rules refer to a
/// little later.
const TRIES: u32 = 20;
const REST: Duration = Duration::from_millis(50);

/// Removes our ipsets.
pub(crate) fn sets(ipset: &mut Ipset) -> Result<(), Error> {
    let mut errors = Vec::new();
    let mut tries = TRIES;
    for header in ipset.headers()?.iter().filter(|h| h.name.starts_with(PREFIX)) {
        let mut done = ipset.destroy(&header.name);
        while matches!(done, Err(Error::Transient { .. })) && tries > 0 {
            tries -= 1;
            std::thread::sleep(REST);
            done = ipset.destroy(&header.name);
        }
        errors.extend(done.err());
    }
    collect(errors)
}

/// Removes everything: chains first, because they refer to the sets. Returns how often it wrote.
pub(crate) fn everything(ipset: &mut Ipset, reader: &mut NftReader) -> (u64, Result<(), Error>) {
    let (mut writes, mut errors) = (0, Vec::new());
    for variant in Variant::ALL {
        match chains(variant, reader) {
            Ok(n) => writes += n,
            Err(e) => errors.push(e),
        }
    }
    match reader.has_table() {
        Ok(true) => {
            writes += 1;
            errors.extend(reader.delete_table().err());
        }
        Ok(false) => {}
        Err(e) => errors.push(e),
    }
    errors.extend(sets(ipset).err());
    (writes, collect(errors))
}
