//! `meshlb apply`: one turn, then the end.

use std::{path::Path, process::ExitCode, time::Instant};

use anyhow::Result;
use jiff::Timestamp;

use super::{
    options::Options,
    print,
    session::{Purpose, Session, notes_of},
};
use crate::{instance::Instance, source::Origin};

/// Makes the kernel as the folder says. Objects that are wrong keep what they had.
///
/// # Errors
/// What kept it from trying at all.
pub fn run(options: &Options, dir: &Path) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let _instance = Instance::take(format!("`meshlb apply`, pid {}", std::process::id()))?;
    let mut session = Session::open(options, Some(Origin::folder(dir)?), Purpose::Apply)?;
    session.keeper.refuse_emptied()?;
    let wrong = session.report_problems();
    let start = Instant::now();
    let ops = session.engine.prepare(true, Timestamp::now())?;
    session.save()?;
    let failures = session.engine.apply(&ops);
    session.save()?;
    let took = start.elapsed();
    let mut conflicts = 0;
    for service in session.engine.merged().services().values() {
        for problem in session.problems_of(service) {
            print::err(format_args!("{}: {problem}", service.key));
            conflicts += 1;
        }
        for note in notes_of(&session.engine, service) {
            print::err(format_args!("note: {}: {note}", service.key));
        }
    }
    if let Some(advice) = super::lock::advice(session.engine.allocator(), dir) {
        print::err(&advice);
    }
    for advice in super::report::firewall_advice(&session.engine) {
        print::err(&advice);
    }
    for failure in failures.iter().filter(|f| !f.follows) {
        print::err(format_args!("{}: {}", failure.op, failure.error));
    }
    print::out(format_args!(
        "{} services, {} changes, {} failed in {:.1} ms\n",
        session.engine.merged().services().len(),
        ops.len(),
        failures.len(),
        took.as_secs_f64() * 1e3
    ))?;
    Ok(if failures.is_empty() && !wrong && conflicts == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
