//! When turns happen: on events, after failures, on suspicion and at every resync.

use std::{
    collections::{BTreeMap, HashMap},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tracing::{debug, error, info, warn};

use super::{
    engine::{Drift, Engine, Turn},
    rotation::Rotation,
    steady::Steady,
};
use crate::{
    allocate::Lock,
    dataplane::Probe,
    model::{ids::ServiceKey, node::NodeSays, refusal::Refusal, snapshot::Event, unread::Unread},
    plan::Op,
};

/// What wakes the agent.
#[derive(Debug)]
pub enum Input {
    /// Objects changed; the time is when the change was seen.
    Events(Vec<Event>, Instant),
    /// The folder's lock file says something else now.
    Lock(Lock),
    /// The source has told everything it has, but for what could not be used. Sent again when that changes.
    Synced(Unread),
    /// What the source knows of this node.
    Node(NodeSays),
    /// Services that this node alone does not accept, and why: all of them.
    Refused(BTreeMap<ServiceKey, Refusal>),
    /// Addresses, links or routes of the node changed.
    NodeChanged,
    /// The process is to end; the kernel keeps what it has.
    Stop,
    /// Nothing will be heard of the source any more, which should not be.
    SourceLost,
    /// All that was programmed is to be removed, by the caller.
    HoldOff,
}

/// Told about everything that happens, for metrics, state files and logs.
pub trait Observer {
    /// Before these operations are applied: allocations and drains must be safe first.
    ///
    /// # Errors
    /// A text; the turn is put off.
    fn before_apply(&mut self, engine: &Engine, ops: &[Op]) -> Result<(), String>;
    /// After a turn. `since` is when the oldest event that it handled was seen.
    fn after_turn(&mut self, engine: &Engine, turn: &Turn, since: Option<Instant>);
    /// A turn could not even be prepared.
    fn turn_failed(&mut self, engine: &Engine, error: &str);
    /// The cheap look found something of ours changed: a turn follows.
    fn drift(&mut self, what: &str);
    /// What a full look found changed by others, by kind.
    fn drifted(&mut self, drift: &Drift);
    /// The source has services that this node alone does not accept: all of them, and why.
    fn refused(&mut self, services: BTreeMap<ServiceKey, Refusal>);
    /// The loop is alive.
    fn heartbeat(&mut self, engine: &Engine, synced: bool, in_sync: bool);
}

/// Intervals of the loop.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Full comparison.
    pub resync: Duration,
    /// Cheap look. Healing takes at most a few of them.
    pub probe: Duration,
}

/// What looking at all IPVS services may cost: after one that took a time there is none for [`SERVICES_CHEAP`] times as long, for
/// three seconds at most (so what is gone is seen within four, and is back within five), but
/// for [`SERVICES_FAST`] times as long in any case, and where it took longer than that, for [`SERVICES_DEAR`] times: where nothing
/// happens, all the agent does takes no more than a percent of a core, of which the rest takes the more the slower the core is.
const SERVICES_CHEAP: u32 = 1000;
const SERVICES_SOON: Duration = Duration::from_secs(3);
const SERVICES_FAST: (Duration, u32) = (Duration::from_millis(33), 120);
const SERVICES_DEAR: u32 = 200;
/// And so many times as long where there are more or fewer services than there were: somebody has just taken some out. The second
/// where that was nothing to us: somebody goes on changing their own.
const SERVICES_COUNTED: (u32, u32) = (10, 100);
/// This many services, with their destinations, are looked at one by one with each probe, in rotation: fewer where that takes
/// longer than the time here, but always some, so that an emptied table is seen at once.
const REALS_PER_PROBE: (usize, usize) = (4, 16);
const REALS_TIME: Duration = Duration::from_micros(500);
/// The host's sockets are listed every this many probes: while one of them keeps a port from being published, and to
/// notice those that come later.
const BLOCKED_EVERY: u32 = 5;
const LATE_EVERY: u32 = 30;
/// What is found changed again so soon after it was put back is somebody's who goes on.
const AT_ONCE_AGAIN: Duration = Duration::from_secs(10);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How long to wait before the next try, ever longer.
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_FIRST)
    }
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(BACKOFF_MAX);
        now
    }
}

/// The loop.
pub struct Agent<O> {
    engine: Engine,
    observer: O,
    pace: Pace,
    synced: bool,
    in_sync: bool,
    node_dirty: bool,
    oldest: Option<Instant>,
    backoff: Backoff,
    /// The same for a kernel, or notes on disk, that can't be read or written at all.
    unreadable: Backoff,
    retry_at: Option<Instant>,
    /// What others have changed is to be put back now, whatever fails besides.
    heal_now: bool,
    /// What was healed last, and when: what comes back at once has to wait for the next retry.
    healed: Option<(String, Instant)>,
    next_resync: Instant,
    next_probe: Instant,
    probes: u32,
    rotation: Rotation,
    /// No look at all of IPVS before.
    services_rest: Instant,
    /// The same where the number of services has changed.
    services_counted: Instant,
    logged: HashMap<String, Instant>,
    source_lost: bool,
    /// How many destinations were left alone when that was told last.
    kept_told: usize,
    clock: Steady,
    /// By how many seconds the wall clock was ahead of it when that was told last.
    ahead: i64,
}

/// From so many seconds on it is told that the wall clock was set.
const CLOCK_SET: u64 = 5;

impl<O: Observer> Agent<O> {
    /// A loop around an engine.
    pub fn new(engine: Engine, observer: O, pace: Pace) -> Self {
        let now = Instant::now();
        Self {
            engine,
            observer,
            pace,
            synced: false,
            in_sync: false,
            node_dirty: true,
            oldest: None,
            backoff: Backoff::default(),
            unreadable: Backoff::default(),
            retry_at: None,
            heal_now: false,
            healed: None,
            next_resync: now + pace.resync,
            next_probe: now + pace.probe,
            probes: 0,
            rotation: Rotation::new(REALS_PER_PROBE.0, REALS_PER_PROBE.1, REALS_TIME),
            services_rest: now,
            services_counted: now,
            logged: HashMap::new(),
            source_lost: false,
            kept_told: 0,
            clock: Steady::new(),
            ahead: 0,
        }
    }

    /// Runs until it is told to end, or until every sender is gone. `false` when that is because the source was lost: the
    /// process should be started anew.
    pub fn run(mut self, inputs: &Receiver<Input>) -> bool {
        loop {
            match inputs.recv_timeout(self.patience()) {
                Ok(input) => {
                    let mut stop = self.take(input);
                    // Whatever is there already belongs to the same turn.
                    while let Ok(more) = inputs.try_recv() {
                        stop |= self.take(more);
                    }
                    if stop {
                        return !self.source_lost;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return true,
            }
            self.step();
            self.observer.heartbeat(&self.engine, self.synced, self.in_sync);
        }
    }

    fn take(&mut self, input: Input) -> bool {
        match input {
            Input::Events(events, seen) => {
                self.engine.feed(events);
                self.oldest = Some(self.oldest.map_or(seen, |old| old.min(seen)));
            }
            Input::Lock(lock) => {
                if self.engine.set_lock(lock) {
                    info!("meshlb.lock has changed");
                }
            }
            Input::Synced(unread) => {
                if !self.synced {
                    info!(services = self.engine.snapshot().services().len(), "source synced");
                }
                self.synced = true;
                self.engine.synced(unread);
                if !self.engine.held().is_empty() {
                    let held: Vec<String> = self.engine.held().iter().map(ToString::to_string).collect();
                    warn!(
                        services = held.join(", "),
                        "left as they are, since what the source says of them can't be used"
                    );
                }
            }
            Input::Node(says) => {
                self.engine.set_node(says);
                self.node_dirty = true;
            }
            Input::Refused(services) => self.observer.refused(services),
            Input::NodeChanged => self.node_dirty = true,
            Input::Stop => {
                info!("stopping; the kernel keeps what it has");
                return true;
            }
            Input::SourceLost => {
                error!(
                    "what reads the source has ended: so does the agent, to be started anew; the kernel keeps what it has"
                );
                self.source_lost = true;
                return true;
            }
            Input::HoldOff => return true,
        }
        false
    }

    /// How long nothing has to be done.
    fn patience(&self) -> Duration {
        let now = Instant::now();
        let mut until = self.next_probe;
        if let Some(retry) = self.retry_at {
            until = until.min(retry);
        }
        until.saturating_duration_since(now).min(self.pace.probe)
    }

    fn step(&mut self) {
        let now = Instant::now();
        if self.node_dirty {
            match self.engine.refresh_node() {
                Ok(changed) => {
                    self.node_dirty = self.engine.misses_family();
                    if changed {
                        info!(addresses = ?self.engine.facts().published_addresses, "node addresses");
                    }
                }
                Err(e) => self.complain(&format!("addresses of this node: {e}")),
            }
        }
        // Nothing is ever deleted, nor added, before the source has told everything.
        if !self.synced {
            if now >= self.next_probe {
                self.next_probe = now + self.pace.probe;
            }
            return;
        }
        if now >= self.next_probe {
            self.next_probe = now + self.pace.probe;
            self.probe();
        }
        let resync = now >= self.next_resync;
        if resync {
            self.next_resync = now + self.pace.resync;
            self.engine.distrust();
        }
        let may_retry = self.retry_at.is_none_or(|at| now >= at);
        if self.retry_at.is_some() && may_retry && !self.engine.failing().is_empty() {
            self.engine.distrust();
        }
        let now = std::mem::take(&mut self.heal_now) || may_retry || self.engine.is_dirty();
        if (self.engine.is_dirty() || self.engine.needs_full()) && now {
            self.turn();
        }
    }

    fn turn(&mut self) {
        let since = self.oldest.take();
        let full = self.engine.needs_full();
        let start = Instant::now();
        let ops = match self.engine.prepare(full, self.clock.now()) {
            Ok(ops) => ops,
            Err(e) => {
                self.oldest = since;
                self.failed(&e.to_string());
                return;
            }
        };
        let drift = self.engine.take_drift();
        if !drift.is_empty() {
            self.observer.drifted(&drift);
        }
        // Nothing has to be on disk for what is not done.
        if !ops.is_empty()
            && let Err(e) = self.observer.before_apply(&self.engine, &ops)
        {
            self.engine.distrust();
            self.oldest = since;
            self.failed(&e);
            return;
        }
        let failures = self.engine.apply(&ops);
        let services = self.engine.take_settled();
        let turn = Turn { full, services, ops, failures, took: start.elapsed() };
        for op in &turn.ops {
            debug!("{op}");
        }
        if turn.failures.is_empty() && !self.engine.failing().is_empty() {
            // It has its own time.
            self.in_sync = false;
        } else if turn.failures.is_empty() {
            self.in_sync = true;
            self.backoff = Backoff::default();
            self.retry_at = None;
            self.logged.clear();
        } else {
            if self.engine.needs_full() {
                // The change is made when it is made: what failed is still to come.
                self.oldest = since;
            }
            self.in_sync = false;
            let causes = turn.failures.iter().filter(|f| !f.follows);
            let lines: Vec<String> = causes.map(|f| format!("{}: {}", f.op, f.error)).collect();
            for line in lines.iter().take(10) {
                self.complain(line);
            }
            if lines.len() > 10 {
                self.complain(&format!("and {} more changes failed", lines.len() - 10));
            }
            // What fails each time has its own pace; another failure may be over at once.
            if self.engine.failed_anew() {
                self.backoff = Backoff::default();
            }
            // What others change does not put it off.
            let due = self.retry_at.is_none_or(|at| start >= at);
            if self.engine.needs_full() || due {
                self.retry_at = Some(Instant::now() + self.backoff.next());
            }
        }
        if !turn.ops.is_empty() {
            info!(
                changes = turn.ops.len(),
                failed = turn.failures.len(),
                full = turn.full,
                took_ms = turn.took.as_millis() as u64,
                "programmed"
            );
        }
        let kept = self.engine.kept().len();
        if kept != std::mem::replace(&mut self.kept_told, kept) && kept > 0 {
            warn!(
                destinations = kept,
                "left as they are, since the source does not name them and can't be read completely"
            );
        }
        self.observer.after_turn(&self.engine, &turn, since);
    }

    fn failed(&mut self, error: &str) {
        self.in_sync = false;
        self.complain(error);
        self.observer.turn_failed(&self.engine, error);
        self.retry_at = Some(Instant::now() + self.unreadable.next());
    }

    /// The same line again only after a minute.
    fn complain(&mut self, line: &str) {
        let now = Instant::now();
        self.logged.retain(|_, at| now.duration_since(*at) <= Duration::from_secs(60));
        if !self.logged.contains_key(line) {
            self.logged.insert(line.to_owned(), now);
            error!("{line}");
        }
    }

    /// A clock that was set does no harm; who wonders about times in the log should find it there.
    fn watch_clock(&mut self) {
        let ahead = self.clock.ahead(Timestamp::now()).as_secs();
        let set = ahead.saturating_sub(self.ahead);
        if set.unsigned_abs() >= CLOCK_SET {
            self.ahead = ahead;
            warn!(
                seconds = set,
                "the clock of this machine was set, or it slept; drains end by the time that it was awake"
            );
        }
    }

    fn probe(&mut self) {
        self.watch_clock();
        self.probes = self.probes.wrapping_add(1);
        let now = self.clock.now();
        if !self.engine.drains().is_empty()
            && let Err(e) = self.engine.expire_drains(now)
        {
            self.complain(&e.to_string());
        }
        let sockets = if self.engine.blocked().is_empty() { LATE_EVERY } else { BLOCKED_EVERY };
        if self.probes.is_multiple_of(sockets)
            && let Err(e) = self.engine.recheck_listeners()
        {
            self.complain(&e.to_string());
        }
        if self.engine.needs_full() {
            return;
        }
        match self.look() {
            Ok(None) => self.unreadable = Backoff::default(),
            Ok(Some(what)) => {
                self.unreadable = Backoff::default();
                warn!("healing: {what}");
                self.observer.drift(&what);
                let again = self
                    .healed
                    .as_ref()
                    .is_some_and(|(last, at)| *last == what && at.elapsed() < AT_ONCE_AGAIN);
                self.heal_now = !again;
                // It has to wait, but not as long as what fails each time.
                let soon = Instant::now() + AT_ONCE_AGAIN / 2;
                self.retry_at = self.retry_at.map(|at| at.min(soon));
                self.healed = Some((what, Instant::now()));
                self.engine.distrust();
            }
            Err(e) => {
                self.complain(&e);
                self.engine.distrust();
                self.retry_at = Some(Instant::now() + self.unreadable.next());
            }
        }
    }

    /// The cheap look: rules and sets by their own probe, IPVS as often as it may cost, destinations in rotation, routes.
    fn look(&mut self) -> Result<Option<String>, String> {
        if let Probe::Changed(what) = self.engine.dataplane.netfilter.probe().map_err(|e| e.to_string())? {
            return Ok(Some(what));
        }
        let start = Instant::now();
        let due = start >= self.services_rest;
        if due || (start >= self.services_counted && self.engine.counts_otherwise()) {
            let before = thread_cpu();
            let found = self.engine.look_at_all();
            // CPU time: a busy machine makes a look longer, not dearer.
            let took = thread_cpu().saturating_sub(before);
            self.services_rest = start + services_pause(took);
            let for_nothing = !due && matches!(found, Ok(None));
            let times = if for_nothing { SERVICES_COUNTED.1 } else { SERVICES_COUNTED.0 };
            self.services_counted = start + took * times;
            if let Some(found) = found.map_err(|e| e.to_string())? {
                return Ok(Some(found));
            }
        }
        self.engine.look_at_some(&mut self.rotation).map_err(|e| e.to_string())
    }
}

/// How long all of IPVS is not looked at, after a look that took so long.
pub(super) fn services_pause(took: Duration) -> Duration {
    let times = if took <= SERVICES_FAST.0 { SERVICES_FAST.1 } else { SERVICES_DEAR };
    (took * SERVICES_CHEAP).min(SERVICES_SOON).max(took * times)
}

/// CPU time of this thread so far.
fn thread_cpu() -> Duration {
    let now = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID.now();
    now.map_or(Duration::ZERO, Duration::from)
}
