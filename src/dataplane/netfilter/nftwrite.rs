//! Writing our nft table: all of it, or changes of its elements in one transaction.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use super::{
    exec,
    nftread::NftReader,
    rules_nft::{ASKS_SOCKET, TABLE, emptied_text, full_text, install_text, rehearsal_text},
    sets::{Kind, Layout, NftKey, nft_elements, nft_name},
};
use crate::{
    dataplane::{ElementChange, Error},
    model::{
        ids::{Family, Protocol},
        kernel::{Element, Elements, Program, Target},
    },
};

/// From this many keys on, reading whole sets costs less than asking for each key.
const LOOKUPS: usize = 64;

/// Runs nft on this text, as one transaction.
pub(crate) fn run(text: &str) -> Result<(), Error> {
    exec::run("nft", &["-f", "-"], text).map(drop)
}

/// Runs a change, and keeps the generation at which all that is in nf_tables is known to be ours as it should be.
pub(crate) fn transaction(
    reader: &mut NftReader,
    text: &str,
    generation: &mut Option<u32>,
) -> Result<(), Error> {
    if text.is_empty() {
        return Ok(());
    }
    let before = reader.generation()?;
    run(text)?;
    // Only when nobody else wrote in between is that so still.
    let after = reader.generation()?;
    let alone = *generation == Some(before) && after == before.wrapping_add(1);
    *generation = alone.then_some(after);
    Ok(())
}

/// From this many elements on it is worth a process of its own that the kernel has its modules before they come: for each that
/// it loads in the middle of a transaction it begins that anew (`nfnl_err_reset` and the replay in `nfnetlink_rcv_batch`).
const MANY: usize = 1000;

/// Makes our table this, whatever is there.
pub(crate) fn install(
    reader: &mut NftReader,
    program: &Program,
    elements: &Elements,
    layout: Layout,
) -> Result<(), Error> {
    let (emptied, names) = emptied_text(program, layout);
    let there = reader.names()?;
    // What is alike is filled anew where it is. (Refused where it is of another kind, or without what DNS needs: see below.)
    if !there.is_empty()
        && there.is_subset(&names)
        && run(&(emptied + &full_text(program, elements, layout))).is_ok()
    {
        return Ok(());
    }
    if there.is_empty() && elements.len() > MANY {
        // Whatever is wrong with it is told by what comes next.
        let _ = run(&rehearsal_text(program, layout));
    }
    let text = install_text(program, elements, layout);
    run(&text).or_else(|e| {
        // Kernels before 5.13, or without nft_socket: DNS is then refused while no agent runs, and not dropped.
        let plain = text.replace(ASKS_SOCKET, "");
        if matches!(e, Error::Failed { .. }) { run(&plain).map_err(|_| e) } else { Err(e) }
    })
}

type Wanted = BTreeMap<(Kind, Family, NftKey), Option<Option<u32>>>;

/// The text that makes these changes, empty when there is nothing to do. `known` is what was there before.
///
/// nft refuses to add a key to a map with another value and to delete what is not there, and a refusal undoes
/// the whole transaction. So we look first.
pub(crate) fn change_text<'a>(
    reader: &mut NftReader,
    known: Option<&Elements>,
    changes: impl IntoIterator<Item = &'a ElementChange>,
    layout: Layout,
) -> Result<String, Error> {
    let none = Elements::new();
    let wanted = wanted(known.unwrap_or(&none), changes, layout);
    let current = current(reader, &wanted)?;
    let mut dels: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut adds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (place, want) in &wanted {
        let (kind, family, key) = place;
        let set = nft_name(*kind, *family);
        let have = current.get(place).copied();
        if have.is_some() && have != *want {
            dels.entry(set.clone()).or_default().push(key.to_string());
        }
        if let Some(value) = want.filter(|_| have != *want) {
            adds.entry(set).or_default().push(match value {
                Some(value) => format!("{key} : {value:#x}"),
                None => key.to_string(),
            });
        }
    }
    let mut out = String::new();
    for (verb, all) in [("delete", dels), ("add", adds)] {
        for (set, keys) in all {
            let _ = writeln!(out, "{verb} element {TABLE} {set} {{ {} }}", keys.join(", "));
        }
    }
    Ok(out)
}

/// What each key should be after the changes: absent, or there with this value.
fn wanted<'a>(
    known: &Elements,
    changes: impl IntoIterator<Item = &'a ElementChange>,
    layout: Layout,
) -> Wanted {
    let mut wanted = Wanted::new();
    let mut gone: BTreeSet<Target> = BTreeSet::new();
    for change in changes {
        match change {
            ElementChange::Put(element, mark) => {
                if let Element::Published(target) = element {
                    gone.remove(target);
                }
                for (kind, key, value) in nft_elements(element, *mark, layout) {
                    wanted.insert((kind, element.family(), key), Some(value));
                }
            }
            ElementChange::Del(element) => {
                if let Element::Published(target) = element {
                    gone.insert(*target);
                }
                for (kind, key, _) in nft_elements(element, None, layout) {
                    if kind != Kind::Addresses {
                        wanted.insert((kind, element.family(), key), None);
                    }
                }
            }
        }
    }
    if layout == Layout::Whole {
        // An address goes with the last port that is published on it.
        for addr in gone.iter().map(|t| t.addr).collect::<BTreeSet<_>>() {
            let place = (Kind::Addresses, Family::of(&addr), NftKey::Addr(addr));
            if !published_on(known, addr).any(|t| !gone.contains(t)) {
                wanted.entry(place).or_insert(None);
            }
        }
    }
    wanted
}

fn published_on(known: &Elements, addr: IpAddr) -> impl Iterator<Item = &Target> {
    let end = |protocol, port| Element::Published(Target { addr, protocol, port });
    known.range(end(Protocol::Tcp, 0)..=end(Protocol::Sctp, u16::MAX)).filter_map(|(e, _)| match e {
        Element::Published(t) => Some(t),
        _ => None,
    })
}

/// What the kernel holds: key by set, with the mark in maps.
type Found = BTreeMap<(Kind, Family, NftKey), Option<u32>>;

fn current(reader: &mut NftReader, wanted: &Wanted) -> Result<Found, Error> {
    let mut out = BTreeMap::new();
    if wanted.len() <= LOOKUPS {
        for place @ (kind, family, key) in wanted.keys() {
            if let Some(value) = reader.lookup(*kind, *family, key)? {
                out.insert(*place, value);
            }
        }
        return Ok(out);
    }
    let sets: BTreeSet<_> = wanted.keys().map(|(kind, family, _)| (*kind, *family)).collect();
    let (contents, _) = reader.contents(sets)?;
    for ((kind, family), keys) in contents {
        out.extend(keys.into_iter().map(|(key, value)| ((kind, family, key), value)));
    }
    Ok(out)
}
