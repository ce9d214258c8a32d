//! What outlives the process: read when a command starts, written when something of it changed.

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use tracing::warn;

use super::{options::Options, record::Record};
use crate::{
    model::kernel::{RealServerKey, VirtualServerKey},
    reconcile::Engine,
    source::{Origin, watch::emptied},
    state::{Drain, PublishedPorts, State, StateDir},
};

/// Writes down what has to outlive the process.
pub struct Keeper {
    pub(super) dir: StateDir,
    pub(super) record: Record,
    pub(super) state: State,
    /// Where services come from.
    pub source: Origin,
    /// The engine's generation that is in the state.
    pub(super) generation: Option<u64>,
    /// Whether the state has something that its file has not.
    pub(super) stale: bool,
    /// Whether it has something of the kernel that the record has not.
    pub(super) unrecorded: bool,
    /// Whether there is a file, if not the newest: what was in the kernel before us is in it.
    pub(super) on_disk: bool,
}

impl Keeper {
    /// The folder that an earlier run has served services from, if it is the one of this run.
    pub fn folder(&self) -> Option<crate::source::watch::FolderId> {
        let same = self.state.source.as_ref() == Some(&self.source);
        self.state.folder.filter(|_| same && !self.state.allocations.services.is_empty())
    }

    /// Who reads the source once does not take an empty folder for one that was emptied: its file system is not mounted, mostly.
    ///
    /// # Errors
    /// That it is.
    pub fn refuse_emptied(&self) -> Result<()> {
        match (self.source.dir(), self.folder()) {
            (Some(dir), Some(before)) if emptied(dir, before) => bail!(
                "{}: was replaced by an empty folder (unmounted?); what was in it stays in force. If it is meant to be \
                 empty, put an empty file none.yaml into it",
                dir.display()
            ),
            _ => Ok(()),
        }
    }

    /// First labels of the names that services answered when the state was written.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        let own = self.state.allocations.services.keys().map(|key| &*key.name);
        own.chain(self.state.labels.iter().map(String::as_str))
    }

    /// Whether an earlier state is on disk. Where a newer one can't be written, it is better to go on with that than to
    /// leave the kernel with endpoints that are dead: what a restart then does not find is which automatic values
    /// depended on history, and drains.
    pub fn on_disk(&self) -> bool {
        self.on_disk
    }

    /// Writes the engine's allocations, drains and fingerprints down, where they changed. They are compared one by one:
    /// the text of all of it takes long to make.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn save(&mut self, engine: &Engine) -> Result<()> {
        let settings = engine.settings();
        let state = &mut self.state;
        if self.generation != Some(engine.generation()) {
            self.stale |= put(&mut state.allocations, engine.allocator().allocations());
            let runs = engine.served().iter().map(|(key, ports)| (key.clone(), PublishedPorts::runs(ports)));
            self.stale |= put(&mut state.served, runs.collect());
            self.stale |= put(&mut state.nameless, engine.nameless().clone());
            self.stale |= put(&mut state.labels, super::dns::labels(engine, &state.allocations));
            // Of one that is empty, or was put in the place of another one, it is when there is something in it.
            if let Some(folder) = self.source.dir().and_then(crate::source::watch::filled) {
                self.stale |= put(&mut state.folder, Some(folder));
            }
            self.generation = Some(engine.generation());
        }
        self.stale |= put(&mut state.source, Some(self.source.clone()));
        self.stale |= put(&mut state.node, settings.node.name.to_string());
        self.stale |= put(&mut state.ranges, settings.node.ranges);
        self.stale |= put(&mut state.earlier_ranges, engine.earlier_ranges().clone());
        self.stale |= put(&mut state.mark_mask, settings.node.mask.bits());
        let originals = engine.sysctl_originals(&state.sysctls);
        let timeouts = engine.timeouts(state.ipvs_timeouts);
        let fingerprint = engine.dataplane.netfilter.fingerprint().unwrap_or_default();
        let mut kernel = put(&mut state.renderer, engine.dataplane.netfilter.name().to_owned());
        kernel |= put(&mut state.netfilter, fingerprint);
        kernel |= put(&mut state.sysctls, originals);
        kernel |= put(&mut state.ipvs_timeouts, timeouts);
        self.stale |= kernel;
        self.unrecorded |= kernel;
        if self.stale {
            self.dir.save(state).context("state.json can't be written")?;
            self.stale = false;
            self.on_disk = true;
        }
        if std::mem::take(&mut self.unrecorded) {
            self.record.save(state);
        }
        let drains: Vec<Drain> = engine.drains().iter().map(kept).collect();
        self.dir.save_drains(&drains).context("drains.json can't be written")?;
        Ok(())
    }
}

/// Puts a value in the place of another; whether it is a different one.
fn put<T: PartialEq>(place: &mut T, value: T) -> bool {
    let different = *place != value;
    *place = value;
    different
}

fn kept(((server, real), until): (&(VirtualServerKey, RealServerKey), &Timestamp)) -> Drain {
    Drain {
        family: server.family,
        mark: server.mark,
        address: real.addr,
        port: real.port,
        deadline_unix_ms: u64::try_from(until.as_millisecond()).unwrap_or(0),
    }
}

pub(super) fn running(drain: &Drain) -> ((VirtualServerKey, RealServerKey), Timestamp) {
    let server = VirtualServerKey { family: drain.family, mark: drain.mark };
    let real = RealServerKey { addr: drain.address, port: drain.port };
    let until =
        i64::try_from(drain.deadline_unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    ((server, real), until.unwrap_or(Timestamp::UNIX_EPOCH))
}

/// What a session is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// To look at the kernel.
    Look,
    /// To change it once.
    Apply,
    /// To keep it; the source is followed and not read here.
    Agent,
}

/// What earlier runs left.
pub struct Left {
    /// Where it is kept.
    pub dir: StateDir,
    /// Allocations and what was there before us.
    pub state: State,
    /// Drains that run.
    pub drains: Vec<Drain>,
    /// Whether the state has something that its file has not.
    pub stale: bool,
}

/// Reads what earlier runs left. Who only looks leaves the files and the directory as they are: they may be a running
/// agent's.
///
/// # Errors
/// It can't be read, or the directory can't be made.
pub fn open_state(options: &Options, purpose: Purpose) -> Result<Left> {
    let about = || format!("--state-dir {}", options.state_dir.display());
    let mut left = if purpose == Purpose::Look {
        let state = State::peek(&options.state_dir);
        let drains = crate::state::peek_drains(&options.state_dir);
        for e in state.as_ref().err().into_iter().chain(drains.as_ref().err()) {
            warn!("{e}: what follows is without it");
        }
        Left {
            dir: StateDir::at(&options.state_dir),
            state: state.unwrap_or_default(),
            drains: drains.unwrap_or_default(),
            stale: false,
        }
    } else {
        let mut dir = StateDir::open(&options.state_dir).with_context(about)?;
        let (state, note) = dir.load().with_context(about)?;
        let (drains, drains_note) = dir.load_drains().with_context(about)?;
        for note in note.into_iter().chain(drains_note) {
            warn!("{note}");
        }
        Left { dir, stale: state.node.is_empty(), state, drains }
    };
    // What sysctls were before us is of that start of the machine: since then they are what it makes them.
    if !left.state.is_of_boot(&boot_id()) {
        left.state.sysctls.clear();
        left.state.ipvs_timeouts = None;
    }
    left.stale |= Record::new(&options.run_dir).complete(&mut left.state);
    Ok(left)
}

/// Which start of the machine this is; empty where the kernel does not say. It is the kernel's own, so not below `--proc-sys`,
/// where a container has no more than the host's network settings.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}
