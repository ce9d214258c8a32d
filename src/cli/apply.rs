//! `meshlb apply`: one turn, then the end. Beside an agent that follows the same folder it waits for that one's.

use std::{
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use jiff::Timestamp;

use super::{
    options::Options,
    print,
    session::{Purpose, Session, notes_of},
};
use crate::{
    instance::{self, Instance},
    source::Origin,
    state::State,
};

/// An agent that follows the same folder has so long to do what it says.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes the kernel as the folder says. Objects that are wrong keep what they had.
///
/// # Errors
/// What kept it from trying at all.
pub fn run(options: &Options, dir: &Path) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let _instance = match Instance::take(format!("`meshlb apply`, pid {}", std::process::id())) {
        Ok(instance) => instance,
        Err(instance::Error::Taken(other)) if is_followed(options, dir)? => {
            return beside(options, dir, &other);
        }
        Err(e) => return Err(e.into()),
    };
    let mut session = Session::open(options, Some(Origin::folder(dir)?), Purpose::Apply)?;
    session.keeper.refuse_emptied()?;
    let wrong = session.report_problems();
    let start = Instant::now();
    let ops = session.engine.prepare(true, Timestamp::now())?;
    session.save()?;
    let failures = session.engine.apply(&ops);
    session.save()?;
    let took = start.elapsed();
    let served = tell(&session, dir);
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
    Ok(if failures.is_empty() && !wrong && served { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the agent, or the last `apply`, had its services from this folder.
fn is_followed(options: &Options, dir: &Path) -> Result<bool> {
    let state = State::peek(&options.state_dir).unwrap_or_default();
    Ok(state.source == Some(Origin::folder(dir)?))
}

/// An agent follows the folder: it makes the changes, and they are waited for.
fn beside(options: &Options, dir: &Path, other: &str) -> Result<ExitCode> {
    let start = Instant::now();
    loop {
        let looked = Instant::now();
        let mut session = Session::open(options, Some(Origin::folder(dir)?), Purpose::Look)?;
        session.keeper.refuse_emptied()?;
        let (ops, _) = session.prepare()?;
        if !ops.is_empty() && start.elapsed() < PATIENCE {
            // With thousands of services a look is dear.
            thread::sleep(looked.elapsed().max(Duration::from_millis(200)));
            continue;
        }
        let wrong = session.report_problems();
        let served = tell(&session, dir);
        for op in &ops {
            print::err(format_args!("still to do after {} s: {op}", PATIENCE.as_secs()));
        }
        print::out(format_args!(
            "{} services, followed by {other}\n",
            session.engine.merged().services().len()
        ))?;
        return Ok(if ops.is_empty() && !wrong && served { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
}

/// Tells what keeps services from being served as declared, and what else is to be known. Whether all are.
fn tell(session: &Session, dir: &Path) -> bool {
    let mut served = true;
    for service in session.engine.merged().services().values() {
        for problem in session.problems_of(service) {
            print::err(format_args!("{}: {problem}", service.key));
            served = false;
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
    served
}
