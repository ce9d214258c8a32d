//! `meshlb agent`: keeps the kernel as a folder says.

use std::{
    collections::BTreeMap,
    path::Path,
    process::ExitCode,
    sync::mpsc::{self, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use tracing::{error, info, warn};

use super::{
    options::Options,
    session::{Keeper, Session, problems_of},
};
use crate::{
    dataplane::monitor::Monitor,
    instance::Instance,
    model::ids::ServiceKey,
    reconcile::{
        Engine, Turn,
        agent::{Agent, Input, Observer, Pace},
    },
    source::{self, Problem, SourceMessage, problem::Severity},
};

/// Runs until SIGTERM or SIGINT. The kernel keeps what it has when the agent goes, however it goes.
///
/// # Errors
/// What kept it from starting.
pub fn run(options: &Options, source: &Path) -> Result<ExitCode> {
    super::log(options)?;
    let source = std::path::absolute(source)?;
    let ranges: Vec<String> = options.vip_cidr.iter().map(ToString::to_string).collect();
    let about = format!(
        "`meshlb agent`, pid {}, folder {}, ranges {}",
        std::process::id(),
        source.display(),
        ranges.join(" ")
    );
    let _instance = Instance::take(about)?;
    let session = Session::open(options, Some(&source), false)?;
    let (sender, inputs) = mpsc::channel();
    stop_on_signal(sender.clone())?;
    let addresses = sender.clone();
    let ranges = session.engine.settings().node.ranges;
    let _monitor = Monitor::spawn(ranges, move |_| {
        // The receiver is gone only when the agent ends.
        let _ = addresses.send(Input::NodeChanged);
    })?;
    follow(&source, session.engine.settings().node.clone(), sender)?;
    let pace = Pace { resync: options.resync, probe: Duration::from_secs(1) };
    info!(node = %session.engine.settings().node.name, renderer = session.engine.dataplane.netfilter.name(), source = %source.display(), "agent starts");
    let keeper = Watcher { keeper: session.keeper, told: BTreeMap::new() };
    Agent::new(session.engine, keeper, pace).run(&inputs);
    Ok(ExitCode::SUCCESS)
}

/// Forwards what the folder says.
fn follow(source: &Path, config: crate::model::node::NodeConfig, inputs: Sender<Input>) -> Result<()> {
    let (sender, messages) = mpsc::channel();
    source::watch::watch(source, config, sender)?;
    thread::Builder::new().name("source".into()).spawn(move || {
        let mut complete = true;
        let mut synced = false;
        let mut known: Vec<Problem> = Vec::new();
        for message in messages {
            let input = match message {
                SourceMessage::Events(events, seen) => Some(Input::Events(events, seen)),
                SourceMessage::Synced => {
                    synced = true;
                    Some(Input::Synced { complete })
                }
                SourceMessage::Problems(problems) => {
                    tell(&known, &problems);
                    let now = problems.iter().all(|p| p.severity < Severity::Error);
                    known = problems;
                    let changed = now != complete;
                    complete = now;
                    (changed && synced).then_some(Input::Synced { complete })
                }
            };
            if let Some(input) = input {
                if inputs.send(input).is_err() {
                    return;
                }
            }
        }
    })?;
    Ok(())
}

/// Logs problems that are new, and those that are over.
fn tell(known: &[Problem], now: &[Problem]) {
    for problem in now.iter().filter(|p| !known.contains(p)) {
        match problem.severity {
            Severity::Error | Severity::Refused => error!("{problem}"),
            Severity::Warning => warn!("{problem}"),
            Severity::Note => info!("{problem}"),
        }
    }
    for problem in known.iter().filter(|p| p.severity > Severity::Note && !now.contains(p)) {
        info!("no longer: {problem}");
    }
}

fn stop_on_signal(inputs: Sender<Input>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let (Ok(mut term), Ok(mut int)) =
                (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
            else {
                error!("signals can't be handled: only SIGKILL will end this process");
                return;
            };
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            let _ = inputs.send(Input::Stop);
        });
    })?;
    Ok(())
}

/// Keeps the state file and tells people what they need to know.
struct Watcher {
    keeper: Keeper,
    /// Problems that were logged, by service.
    told: BTreeMap<ServiceKey, Vec<String>>,
}

impl Observer for Watcher {
    fn before_apply(&mut self, engine: &Engine) -> Result<(), String> {
        self.keeper.save(engine).map_err(|e| format!("{e:#}"))
    }

    fn after_turn(&mut self, engine: &Engine, turn: &Turn, _: Option<Instant>) {
        if let Err(e) = self.keeper.save(engine) {
            error!("{e:#}");
        }
        for key in &turn.services {
            let now: Vec<String> = engine
                .merged()
                .services()
                .get(key)
                .map(|service| problems_of(engine, service))
                .unwrap_or_default();
            let before = self.told.remove(key).unwrap_or_default();
            for line in now.iter().filter(|line| !before.contains(line)) {
                warn!("{key}: {line}");
            }
            for line in before.iter().filter(|line| !now.contains(line)) {
                info!("{key}: no longer: {line}");
            }
            if !now.is_empty() {
                self.told.insert(key.clone(), now);
            }
        }
    }

    fn turn_failed(&mut self, _: &str) {}

    fn drift(&mut self, _: &str) {}

    fn heartbeat(&mut self, _: &Engine, _: bool, _: bool) {}
}
