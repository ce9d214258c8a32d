//! `meshlb cleanup`: removes everything that meshlb ever programmed in this network namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    process::ExitCode,
};

use anyhow::Result;

use super::{
    keeper::{self, Left, Purpose},
    options::Options,
    print, session,
};
use crate::{
    dataplane::{
        Error, Host as _, Ipvs as _, IpvsChange, Netfilter,
        host::{LinuxHost, REQUIRED},
        ipvs::KernelIpvs,
        netfilter::{Iptables, Nftables, Variant},
    },
    instance::{self, Instance},
    model::{
        ids::{Family, Mark},
        kernel::{Program, Timeouts, VirtualServerKey},
        node::MarkMask,
    },
    state::State,
};

/// Removes routes, entries, rules and IPVS services, in the order in which nothing reaches a wrong
/// place, then puts sysctls and timeouts back where they are still as we set them. Goes on after an
/// error and reports all of them.
///
/// # Errors
/// What kept it from trying at all.
pub fn run(options: &Options) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let _instance =
        Instance::take(format!("`meshlb cleanup`, pid {}", std::process::id())).map_err(|e| match e {
            instance::Error::Taken(other) => {
                anyhow::anyhow!("stop the agent first, or it puts everything back: {other}")
            }
            other => other.into(),
        })?;
    let Cleaned { errors, kept } = clean(options)?;
    if let Some(kept) = &kept {
        print::err(format_args!("note: {kept}"));
    }
    if errors.is_empty() {
        print::out("nothing of meshlb is left in this network namespace\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    for error in &errors {
        print::err(error);
    }
    Ok(ExitCode::FAILURE)
}

/// What became of it.
#[derive(Debug)]
pub struct Cleaned {
    /// What could not be removed.
    pub errors: Vec<String>,
    /// What stays as it is for the sake of others.
    pub kept: Option<String>,
}

/// The same for who holds the network namespace already.
///
/// # Errors
/// What kept it from trying at all.
pub fn clean(options: &Options) -> Result<Cleaned> {
    session::need_rights()?;
    let settings = options.settings()?;
    let Left { mut dir, state, .. } = keeper::open_state(options, Purpose::Apply)?;
    // Each on its own: what can't be reached keeps nothing else from being cleaned.
    let mut errors: Vec<String> = Vec::new();
    let mut host = LinuxHost::new(options.proc_sys.clone());
    let mut netfilter =
        session::renderer(options, &state).map_err(|e| errors.push(format!("rules and sets: {e:#}"))).ok();
    let mut ipvs = if Path::new("/proc/net/ip_vs").exists() {
        KernelIpvs::open().map_err(|e| errors.push(format!("IPVS services: {e}"))).ok()
    } else {
        // Without the module there is none.
        None
    };

    // Which IPVS services are ours: marks that the state file knows, and marks that our sets lead to.
    let facts = host.facts(&settings.addresses).unwrap_or_default();
    let base = crate::compile::base::compile_base(&settings.node, &facts, Default::default(), vec![], None);
    let mut marks = BTreeSet::new();
    if state.is_of_boot(&keeper::boot_id()) {
        marks = state.allocations.known_marks();
    }
    if let Some(netfilter) = &mut netfilter {
        match netfilter.observe(&base.program) {
            Ok(found) => {
                marks.extend(found.elements.iter().filter(|(e, _)| e.is_mark()).filter_map(|(_, m)| *m));
            }
            Err(e) => errors.push(e.to_string()),
        }
    }
    // Without its record it can't be told which renderer there was.
    marks.extend(marks_in_sets(netfilter.as_ref().map(|n| n.name()), &base.program));
    // Our sentinel has no destination; one that has is another program's service with that mark.
    let sentinels = [Some(settings.node.mask), MarkMask::new(state.mark_mask).ok()];
    for mark in sentinels.into_iter().flatten().map(MarkMask::sentinel) {
        let is_anothers = |ipvs: &mut KernelIpvs, family| {
            ipvs.reals(VirtualServerKey { family, mark }).is_ok_and(|reals| !reals.is_empty())
        };
        let anothers =
            ipvs.as_mut().is_some_and(|ipvs| Family::ALL.into_iter().any(|f| is_anothers(ipvs, f)));
        if !anothers {
            marks.insert(mark);
        }
    }

    let ranges = if state.ranges.is_empty() { settings.node.ranges } else { state.ranges };
    let ranges = ranges.iter().map(|(_, range)| *range).chain(state.earlier_ranges.iter().copied());
    let mut ranges: BTreeSet<_> = ranges.collect();
    // Of whatever run, though its state was lost.
    match host.our_ranges() {
        Ok(found) => ranges.extend(found),
        Err(e) => errors.push(e.to_string()),
    }
    for range in ranges {
        if let Err(e) = host.del_vip_route(Family::of(&range.addr()), &range) {
            errors.push(e.to_string());
        }
    }
    if let Some(Err(e)) = netfilter.as_mut().map(|netfilter| netfilter.remove()) {
        errors.push(e.to_string());
    }
    // Without the module nobody has a service.
    let foreign = ipvs.as_mut().is_some_and(|ipvs| remove_services(ipvs, &marks, &mut errors));
    let unrestored = restore(&mut host, ipvs.as_mut(), &state, foreign, &mut errors);
    let mut kept = None;
    if errors.is_empty() {
        super::record::Record::new(&options.run_dir).clear()?;
        if unrestored.is_empty() {
            dir.clear()?;
        } else {
            // What was there before us is known nowhere else.
            let what = unrestored.to_string();
            let Unrestored { sysctls, ipvs_timeouts } = unrestored;
            dir.save(&State { boot_id: state.boot_id, sysctls, ipvs_timeouts, ..State::default() })?;
            dir.save_drains(&[])?;
            kept = Some(format!(
                "{what} stay as we set them, since another program has IPVS services here that may need them; what they \
                 were is in {}: `meshlb cleanup` puts them back when those services are gone",
                options.state_dir.display()
            ));
        }
    }
    Ok(Cleaned { errors, kept })
}

/// Marks that entries of other renderers than this one lead to, as far as they can be read.
fn marks_in_sets(but: Option<&str>, program: &Program) -> Vec<Mark> {
    type Open = fn() -> Result<Box<dyn Netfilter>, Error>;
    let all: [Open; 3] = [
        || Ok(Box::new(Iptables::new(Variant::Nft)?)),
        || Ok(Box::new(Iptables::new(Variant::Legacy)?)),
        || Ok(Box::new(Nftables::new()?)),
    ];
    let others = all.into_iter().filter_map(|open| open().ok()).filter(|other| Some(other.name()) != but);
    let found = others.filter_map(|mut other| other.observe(program).ok());
    let entries = found.flat_map(|found| found.elements);
    entries.filter(|(element, _)| element.is_mark()).filter_map(|(_, mark)| mark).collect()
}

/// Removes the services with these marks. Whether there are others, of other programs: where that can't be found out, there may be.
fn remove_services(ipvs: &mut KernelIpvs, marks: &BTreeSet<Mark>, errors: &mut Vec<String>) -> bool {
    let keep = |mark: Mark| marks.contains(&mark);
    // Until none is told of: a dump may lack some while others change theirs.
    for _ in 0..3 {
        match ipvs.dump_services(&keep) {
            Ok(found) if found.is_empty() => break,
            Ok(found) => {
                let changes: Vec<_> = found.into_keys().map(IpvsChange::DelService).collect();
                let failed = ipvs.apply(&changes).into_iter().filter_map(Result::err);
                errors.extend(failed.map(|e| e.to_string()));
            }
            Err(e) => {
                errors.push(e.to_string());
                break;
            }
        }
    }
    match ipvs.foreign(&keep) {
        Ok(foreign) => !foreign.is_empty(),
        Err(e) => {
            errors.push(format!(
                "sysctls and timeouts stay as they are, since it can't be seen who uses them: {e}"
            ));
            true
        }
    }
}

/// What would have gone back but for others, with what it was.
#[derive(Default)]
struct Unrestored {
    sysctls: BTreeMap<String, String>,
    ipvs_timeouts: Option<(Timeouts, Timeouts)>,
}

impl Unrestored {
    fn is_empty(&self) -> bool {
        self.sysctls.is_empty() && self.ipvs_timeouts.is_none()
    }
}

impl fmt::Display for Unrestored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<String> = self.sysctls.keys().map(|path| path.replace('/', ".")).collect();
        names.extend(self.ipvs_timeouts.map(|_| "the IPVS timeouts".to_owned()));
        f.write_str(&names.join(", "))
    }
}

/// Sysctls go back only where they still have our value and no foreign IPVS service may depend on them
/// (design decision 9); the same for timeouts. Names those that would have gone back but for that.
fn restore(
    host: &mut LinuxHost,
    ipvs: Option<&mut KernelIpvs>,
    state: &State,
    foreign: bool,
    errors: &mut Vec<String>,
) -> Unrestored {
    let mut unrestored = Unrestored::default();
    for required in REQUIRED {
        let (Some(original), Some(_)) = (state.sysctls.get(required.path), required.restore) else {
            continue;
        };
        let ours = matches!(host.sysctl(required.path), Ok(Some(v)) if v == required.value);
        if !ours || original == required.value {
            continue;
        }
        if foreign {
            unrestored.sysctls.insert(required.path.into(), original.clone());
        } else if let Err(e) = host.set_sysctl(required.path, original) {
            errors.push(e.to_string());
        }
    }
    if let (Some((ours, before)), Some(ipvs)) = (state.ipvs_timeouts, ipvs)
        && before != ours
        && ipvs.timeouts().is_ok_and(|now| now == ours)
    {
        if foreign {
            unrestored.ipvs_timeouts = state.ipvs_timeouts;
        } else if let Err(e) = ipvs.set_timeouts(before) {
            errors.push(e.to_string());
        }
    }
    unrestored
}
