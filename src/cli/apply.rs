//! `meshlb apply`: one turn, then the end. Beside an agent that follows the same folder it waits for that one's.

use std::{
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use jiff::Timestamp;
use tracing::subscriber::{self, NoSubscriber};

use super::{keeper::Purpose, notes::notes_of, options::Options, print, session::Session};
use crate::{
    instance::{self, Instance},
    plan::Op,
    source::Origin,
};

/// An agent that follows the same folder has so long to do what it says: more than what it may take to see a change where nothing
/// tells it of changes.
const PATIENCE: Duration = Duration::from_secs(90);
/// So many changes that are still to be done are told.
const TOLD: usize = 10;

/// Makes the kernel as the folder says. Objects that are wrong keep what they had.
///
/// # Errors
/// What kept it from trying at all.
pub fn run(options: &Options, dir: &Path) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let _instance = match Instance::take(about()) {
        Ok(instance) => instance,
        Err(instance::Error::Taken(other)) if follows(&other, dir)? => match beside(options, dir)? {
            Beside::Done(code) => return Ok(code),
            Beside::Alone(instance) => instance,
        },
        Err(e) => return Err(e.into()),
    };
    let mut session = Session::open(options, Some(Origin::folder(dir)?), Purpose::Apply)?;
    session.keeper.refuse_emptied()?;
    let wrong = session.report_problems();
    let start = Instant::now();
    let ops = session.engine.prepare(true, Timestamp::now())?;
    // Where there is an earlier state, endpoints that are gone do not stay because a disk is full.
    let saved = session.save();
    if !session.keeper.on_disk() {
        saved?;
    }
    let failures = session.engine.apply(&ops);
    let saved = session.save();
    let took = start.elapsed();
    let served = tell(&session, dir);
    for failure in failures.iter().filter(|f| !f.follows) {
        print::err(format_args!("{}: {}", failure.op, failure.error));
    }
    if let Err(e) = &saved {
        print::err(format_args!("{e:#}"));
    }
    print::out(format_args!(
        "{} services, {} changes, {} failed in {:.1} ms\n",
        session.engine.merged().services().len(),
        ops.len(),
        failures.len(),
        took.as_secs_f64() * 1e3
    ))?;
    Ok(if failures.is_empty() && !wrong && served && saved.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn about() -> String {
    format!("`meshlb apply`, pid {}", std::process::id())
}

/// Whether the one that says this of itself (`cli/agent.rs`) is an agent that follows this folder.
fn follows(other: &str, dir: &Path) -> Result<bool> {
    let source = format!(", source {}, ", Origin::folder(dir)?);
    Ok(other.starts_with("`meshlb agent`") && other.contains(&source))
}

/// How waiting for an agent ended.
enum Beside {
    Done(ExitCode),
    /// It has ended meanwhile.
    Alone(Instance),
}

/// An agent follows the folder: it makes the changes, and they are waited for.
fn beside(options: &Options, dir: &Path) -> Result<Beside> {
    super::session::need_rights()?;
    let look = || -> Result<(Session, Vec<Op>)> {
        let mut session = Session::open(options, Some(Origin::folder(dir)?), Purpose::Look)?;
        session.keeper.refuse_emptied()?;
        let (ops, _) = session.prepare()?;
        Ok((session, ops))
    };
    let start = Instant::now();
    loop {
        let other = match Instance::take(about()) {
            Ok(instance) => return Ok(Beside::Alone(instance)),
            Err(instance::Error::Taken(other)) => other,
            Err(e) => return Err(e.into()),
        };
        let looked = Instant::now();
        // What there is to tell is told once, at the end.
        let (_, ops) = subscriber::with_default(NoSubscriber::default(), look)?;
        if !ops.is_empty() && start.elapsed() < PATIENCE {
            // With thousands of services a look is dear.
            thread::sleep(looked.elapsed().max(Duration::from_millis(200)));
            continue;
        }
        let (session, ops) = look()?;
        let wrong = session.report_problems();
        let served = tell(&session, dir);
        for op in ops.iter().take(TOLD) {
            print::err(format_args!("not done yet: {op}"));
        }
        if let more @ 1.. = ops.len().saturating_sub(TOLD) {
            print::err(format_args!("and {more} more"));
        }
        if !ops.is_empty() {
            print::err("the agent's log and its /readyz say why");
        }
        print::out(format_args!(
            "{} services, followed by {other}\n",
            session.engine.merged().services().len()
        ))?;
        let done = ops.is_empty() && !wrong && served;
        return Ok(Beside::Done(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agent_with_this_folder_is_waited_for() {
        let said = |source: &str| format!("`meshlb agent`, pid 7, source {source}, ranges 10.200.0.0/16");
        assert!(follows(&said("/etc/meshlb"), Path::new("/etc/meshlb")).unwrap());
        for other in [
            said("/etc/meshlb/more"),
            said("kube"),
            "`meshlb apply`, pid 7".into(),
            "`meshlb cleanup`".into(),
        ] {
            assert!(!follows(&other, Path::new("/etc/meshlb")).unwrap(), "{other}");
        }
    }
}
