//! Taking everything of ours away, whichever renderer made it.

use super::{nftread::NftReader, nftwrite, sets::PREFIX, xtables::Variant};
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
pub(crate) fn chains(variant: Variant) -> Result<u64, Error> {
    let (mut writes, mut errors) = (0, Vec::new());
    for family in Family::ALL {
        match variant.saved(family).and_then(|saved| variant.put(family, &[], &saved)) {
            Ok(wrote) => writes += u64::from(wrote),
            Err(Error::MissingProgram { .. }) => {}
            Err(e) => errors.push(e),
        }
    }
    collect(errors).map(|()| writes)
}

/// Removes our ipsets.
pub(crate) fn sets(ipset: &mut Ipset) -> Result<(), Error> {
    let mut errors = Vec::new();
    for header in ipset.headers()?.iter().filter(|h| h.name.starts_with(PREFIX)) {
        errors.extend(ipset.destroy(&header.name).err());
    }
    collect(errors)
}

/// Removes everything: chains first, because they refer to the sets. Returns how often it wrote.
pub(crate) fn everything(ipset: &mut Ipset, reader: &mut NftReader) -> (u64, Result<(), Error>) {
    let (mut writes, mut errors) = (0, Vec::new());
    for variant in Variant::ALL {
        match chains(variant) {
            Ok(n) => writes += n,
            Err(e) => errors.push(e),
        }
    }
    match reader.has_table() {
        Ok(true) => {
            writes += 1;
            errors.extend(nftwrite::remove().err());
        }
        Ok(false) => {}
        Err(e) => errors.push(e),
    }
    errors.extend(sets(ipset).err());
    (writes, collect(errors))
}
