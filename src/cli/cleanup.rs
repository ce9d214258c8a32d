//! `meshlb cleanup`: removes everything that meshlb ever programmed in this network namespace.

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::{Result, bail};

use super::{options::Options, session};
use crate::{
    dataplane::{IpvsChange, host::REQUIRED},
    instance::Instance,
    model::{ids::Mark, kernel::Element},
};

/// Removes routes, entries, rules and IPVS services, in the order in which nothing reaches a wrong
/// place, then puts sysctls and timeouts back where they are still as we set them. Goes on after an
/// error and reports all of them.
///
/// # Errors
/// What kept it from trying at all.
pub fn run(options: &Options) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    if let Some(other) = crate::instance::other() {
        bail!("stop the agent first, or it puts everything back: {other}");
    }
    let _instance = Instance::take(format!("`meshlb cleanup`, pid {}", std::process::id()))?;
    session::need_rights()?;
    let settings = options.settings()?;
    let (mut dir, state) = session::open_state(options)?;
    let mut dataplane = session::dataplane(options, &state)?;
    let mut errors: Vec<String> = Vec::new();

    // Which IPVS services are ours: marks that the state file knows, and marks that our sets lead to.
    let facts = dataplane.host.facts(&settings.addresses).unwrap_or_default();
    let base = crate::compile::base::compile_base(&settings.node, &facts, Default::default(), vec![], None);
    let mut marks: BTreeSet<Mark> = state.allocations.known_marks();
    match dataplane.netfilter.observe(&base.program) {
        Ok(found) => marks.extend(found.elements.iter().filter(|(e, _)| led_by(e)).filter_map(|(_, m)| *m)),
        Err(e) => errors.push(e.to_string()),
    }
    marks.insert(settings.node.mask.sentinel());

    let ranges = if state.ranges.is_empty() { settings.node.ranges } else { state.ranges };
    for (family, range) in ranges.iter() {
        if let Err(e) = dataplane.host.del_vip_route(family, range) {
            errors.push(e.to_string());
        }
    }
    if let Err(e) = dataplane.netfilter.remove() {
        errors.push(e.to_string());
    }
    let keep = |mark: Mark| marks.contains(&mark);
    match dataplane.ipvs.dump_services(&keep) {
        Ok(found) => {
            let changes: Vec<_> = found.into_keys().map(IpvsChange::DelService).collect();
            errors.extend(
                dataplane.ipvs.apply(&changes).into_iter().filter_map(|r| r.err().map(|e| e.to_string())),
            );
        }
        Err(e) => errors.push(e.to_string()),
    }
    let foreign = dataplane.ipvs.foreign(&keep).unwrap_or_default();
    restore(&mut dataplane, &state, !foreign.is_empty(), &mut errors);
    if errors.is_empty() {
        dir.clear()?;
        super::record::Record::new(&options.run_dir).clear()?;
        println!("nothing of meshlb is left in this network namespace");
        return Ok(ExitCode::SUCCESS);
    }
    for error in &errors {
        eprintln!("meshlb: {error}");
    }
    Ok(ExitCode::FAILURE)
}

fn led_by(element: &Element) -> bool {
    element.is_mark()
}

/// Sysctls go back only where they still have our value and no foreign IPVS service may depend on them
/// (design decision 9); the same for timeouts.
fn restore(
    dataplane: &mut crate::dataplane::executor::Dataplane,
    state: &crate::state::State,
    foreign: bool,
    errors: &mut Vec<String>,
) {
    for required in REQUIRED {
        let (Some(original), Some(_)) = (state.sysctls.get(required.path), required.restore) else {
            continue;
        };
        let ours = matches!(dataplane.host.sysctl(required.path), Ok(Some(v)) if v == required.value);
        if ours
            && !foreign
            && original != required.value
            && let Err(e) = dataplane.host.set_sysctl(required.path, original)
        {
            errors.push(e.to_string());
        }
    }
    if let (Some((ours, before)), false) = (state.ipvs_timeouts, foreign)
        && dataplane.ipvs.timeouts().is_ok_and(|now| now == ours)
        && let Err(e) = dataplane.ipvs.set_timeouts(before)
    {
        errors.push(e.to_string());
    }
}
