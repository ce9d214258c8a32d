//! One turn: take events in, allocate, compile, plan, apply, remember.

mod bridges;
mod compiling;
mod drains;
mod drift;
mod earlier;
mod known;
mod lasting;
mod left_alone;
mod look;
mod marks;
mod node;
mod ports;
mod published;
mod recover;
mod unread;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashSet},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use jiff::Timestamp;
use tracing::debug;

use bridges::Bridges;
pub use drift::Drift;
use left_alone::Spared;
use marks::Others;

use crate::{
    allocate::{Allocations, Allocator, Lock},
    compile::{
        Merged,
        service::{Drains, Kept},
    },
    dataplane::{
        AddressRules, ElementChange, Error, IpvsChange, ProgramState,
        executor::{Dataplane, Failure, withhold},
    },
    model::{
        ids::{Mark, PerFamily, Protocol, ServiceKey},
        kernel::{Element, KernelState, PublishedFlows, Timeouts, VirtualServer, VirtualServerKey},
        node::{NodeConfig, NodeFacts, NodeSays},
        snapshot::{Event, Snapshot},
        unread::Unread,
    },
    plan::{Observed, Op, plan, plan_all},
};

/// What the operator set, as the engine needs it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's configuration.
    pub node: NodeConfig,
    /// How its addresses are chosen.
    pub addresses: AddressRules,
    /// IPVS timeouts to set; `None` leaves the kernel's.
    pub timeouts: Option<Timeouts>,
}

/// What one turn did.
#[derive(Default, Debug)]
pub struct Turn {
    /// Whether the kernel was read first.
    pub full: bool,
    /// Services that were compiled for it.
    pub services: BTreeSet<ServiceKey>,
    /// Operations, in their order.
    pub ops: Vec<Op>,
    /// Those that failed.
    pub failures: Vec<Failure>,
    /// Time spent, without waiting.
    pub took: Duration,
}

/// Sources' view, allocations and what we know of the kernel, in one place. Not a thread: the caller
/// drives it.
pub struct Engine {
    settings: Settings,
    /// What the settings said of the node at first: it outweighs the source.
    given: NodeSays,
    /// Ranges of this node's pods, once the source has said them.
    pods: Option<Vec<IpNet>>,
    /// The kernel side.
    pub dataplane: Dataplane,
    snapshot: Snapshot,
    allocator: Allocator,
    /// Grows whenever allocations change.
    generation: u64,
    /// Set until the first look at the kernel when there is no state of earlier runs: marks are then taken
    /// over from the kernel.
    recover: Option<Lock>,
    merged: Merged,
    facts: NodeFacts,
    /// Since when there has been no address of a family that there was.
    lost: PerFamily<Instant>,
    /// How long such a family is served on.
    pub(super) family_grace: Duration,
    bridges: Bridges,
    /// What we wrote or read last. Only worth something while `trusted`.
    known: KernelState,
    trusted: bool,
    /// Whether the last changes all went well: whatever is different then is not our doing.
    known_good: bool,
    drift: Drift,
    drains: Drains,
    /// Destinations of earlier runs that the source can't speak for yet.
    kept: Kept,
    /// What of the source can't be read, as far as it has told.
    unread: Unread,
    /// What failed when it was last tried.
    failing: Vec<Failure>,
    /// Whether one of them had not failed in the turn before.
    failed_anew: bool,
    /// Whether the kernel was read for the changes that were prepared last.
    full: bool,
    /// Whether the kernel has been looked at.
    looked: bool,
    /// What is left alone.
    spared: Spared,
    /// Whether what an earlier run left was looked through for connections that nobody wants any more.
    swept: bool,
    /// Whether there was nothing of ours in it then.
    bare: bool,
    /// Connections by published ports that a service has let go of, and that conntrack would go on with.
    overdue: BTreeSet<PublishedFlows>,
    /// For so many looks the kernel's list of IPVS services is not asked for, since it left out too many.
    partly_listed: u32,
    /// For so many looks at such a list that left out few, those are not searched for what is not wanted.
    strangers_rest: u32,
    /// By how many the services that the kernel counts were more than those we know of, when they were looked at last.
    not_known: Option<i64>,
    /// What could not be taken out of conntrack; no comparison finds it again.
    flows_left: Vec<Op>,
    /// How often that was tried.
    flows_tried: u8,
    blocked: BTreeMap<(Protocol, u16), ServiceKey>,
    /// Published ports that are served here, by service: a socket that comes later does not get them.
    served: Served,
    /// Served ports with a socket of the host that came later.
    late: BTreeMap<(Protocol, u16), ServiceKey>,
    dirty: BTreeSet<ServiceKey>,
    held: BTreeSet<ServiceKey>,
    /// Services that were compiled since the caller asked last.
    settled: BTreeSet<ServiceKey>,
    /// Values that required sysctls had before the first change, by path.
    originals: BTreeMap<String, String>,
    timeouts_before: Option<Timeouts>,
    earlier_ranges: BTreeSet<IpNet>,
    /// Marks that we have given out now or earlier and that the kernel may still have.
    ours: BTreeSet<Mark>,
}

/// After so many changes what we know of the kernel and what it should be are put together in memory again.
const SHARE_AFTER: usize = 100;

/// Published ports by service.
pub type Served = BTreeMap<ServiceKey, BTreeSet<(Protocol, u16)>>;

impl Engine {
    /// An engine that knows nothing of its kernel yet: its first turn has to be a full one.
    pub fn new(
        settings: Settings,
        dataplane: Dataplane,
        previous: Allocations,
        lock: Lock,
        drains: Drains,
    ) -> Self {
        let ours = previous.known_marks();
        let given = NodeSays {
            addresses: settings.addresses.node_ips,
            zone: settings.node.zone.clone(),
            pods: vec![],
        };
        Self {
            given,
            pods: None,
            recover: previous.services.is_empty().then(|| lock.clone()),
            allocator: Allocator::new(settings.node.clone(), previous, lock, BTreeSet::new()),
            generation: 0,
            settings,
            dataplane,
            snapshot: Snapshot::default(),
            merged: Merged::default(),
            facts: NodeFacts::default(),
            lost: PerFamily::default(),
            family_grace: node::FAMILY_GRACE,
            bridges: Bridges::default(),
            known: KernelState::default(),
            trusted: false,
            known_good: false,
            drift: Drift::new(),
            drains,
            kept: Kept::new(),
            unread: Unread::default(),
            failing: Vec::new(),
            failed_anew: false,
            full: false,
            looked: false,
            spared: Spared::default(),
            swept: false,
            bare: false,
            overdue: BTreeSet::new(),
            partly_listed: 0,
            strangers_rest: 0,
            not_known: None,
            flows_left: Vec::new(),
            flows_tried: 0,
            blocked: BTreeMap::new(),
            served: Served::new(),
            late: BTreeMap::new(),
            dirty: BTreeSet::new(),
            held: BTreeSet::new(),
            settled: BTreeSet::new(),
            originals: BTreeMap::new(),
            timeouts_before: None,
            earlier_ranges: BTreeSet::new(),
            ours,
        }
    }

    /// Takes events in; nothing happens before the next turn.
    pub fn feed(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.snapshot.apply(event, &mut self.dirty);
        }
    }

    /// Takes a new lock file in; nothing happens before the next turn. Whether it says something else about a
    /// service that is there.
    pub fn set_lock(&mut self, lock: Lock) -> bool {
        if let Some(recover) = &mut self.recover {
            recover.clone_from(&lock);
        }
        // A service that has not been told of is not gone for it.
        let mut changed = self.allocator.set_lock(lock);
        changed.retain(|key| self.snapshot.services().contains_key(key));
        let any = !changed.is_empty();
        self.dirty.extend(changed);
        any
    }

    /// Whether a turn has something to do.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// The services.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The desired state and the services it came from.
    pub fn merged(&self) -> &Merged {
        &self.merged
    }

    /// Grows whenever [`Self::allocator`]'s allocations change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The allocator, for its conflicts and for the state file.
    pub fn allocator(&self) -> &Allocator {
        &self.allocator
    }

    /// Values that sysctls had before we changed them, with those that earlier runs noted.
    pub fn sysctl_originals(&self, earlier: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut out = self.originals.clone();
        out.extend(earlier.iter().map(|(path, value)| (path.clone(), value.clone())));
        out
    }

    /// The timeouts that we set, and those before, unless an earlier run noted them.
    pub fn timeouts(&self, earlier: Option<(Timeouts, Timeouts)>) -> Option<(Timeouts, Timeouts)> {
        // Who leaves them alone now has still set them then.
        let Some(ours) = self.settings.timeouts else { return earlier };
        let before = earlier.map(|(_, before)| before).or(self.timeouts_before)?;
        Some((ours, before))
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether the kernel had nothing of ours when it was first looked at, as after a start of the machine.
    pub fn found_nothing(&self) -> bool {
        self.bare
    }

    /// Forgets what we know of the kernel: the next turn reads it.
    pub fn distrust(&mut self) {
        self.trusted = false;
    }

    /// Whether the next turn reads the kernel first.
    pub fn needs_full(&self) -> bool {
        !self.trusted
    }

    /// Whether a mark is one of ours: given out now or earlier by this node, or the sentinel.
    fn is_ours(ours: &BTreeSet<Mark>, settings: &Settings, mark: Mark) -> bool {
        mark == settings.node.mask.sentinel() || ours.contains(&mark)
    }

    /// What is to be done now, without doing it; `full` reads the kernel first.
    ///
    /// # Errors
    /// When the kernel can't be read. The next turn then reads all of it.
    pub fn prepare(&mut self, full: bool, now: Timestamp) -> Result<Vec<Op>, Error> {
        self.take_back_held();
        if !full
            && self.trusted
            && let Some(ops) = self.or_distrust(|engine| engine.prepare_changed(now))?
        {
            self.full = false;
            return Ok(ops);
        }
        self.prepare_full(now).map(|(ops, _)| ops)
    }

    /// Services may have been compiled when something can't be read, and what is to be done for them is not known any more.
    fn or_distrust<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        act(self).inspect_err(|_| self.trusted = false)
    }

    /// The same for what has changed; `None` where all has to be looked at.
    fn prepare_changed(&mut self, now: Timestamp) -> Result<Option<Vec<Op>>, Error> {
        let touched = self.settle(now, Others::Ask)?;
        // Each change of a service touches all of its elements; only endpoints that came or went matter here.
        let (want, have) = (&self.merged.state().elements, &self.known.elements);
        let moved = |e: &Element| want.contains_key(e) != have.contains_key(e);
        if touched.elements.iter().any(|e| matches!(e, Element::Local(_)) && moved(e)) {
            self.refresh_bridges()?;
        }
        if !self.trusted {
            return Ok(None);
        }
        let mut ops = plan(self.merged.state(), &self.known, &touched);
        self.spare_left_alone(&mut ops);
        ops.extend(self.overdue.iter().cloned().map(Op::CutFlows));
        ops.extend(self.flows_to_retry());
        Ok(Some(ops))
    }

    /// Reads the kernel, compares all of it, and gives what it found besides.
    ///
    /// # Errors
    /// When the kernel can't be read.
    pub fn prepare_full(&mut self, now: Timestamp) -> Result<(Vec<Op>, Observed), Error> {
        self.full = true;
        self.take_back_held();
        self.or_distrust(|engine| engine.look_and_compare(now))
    }

    fn look_and_compare(&mut self, now: Timestamp) -> Result<(Vec<Op>, Observed), Error> {
        let begun = Instant::now();
        let first = self.merged.services().is_empty();
        if first {
            self.foresee_bridges()?;
        }
        // Of a service that is as an earlier run left it, nothing depends on what the kernel has, but for drains; those that
        // have yet to begin are found by `adopt`.
        let independent = first && self.drains.is_empty() && self.remembers_all();
        let mut observed = if independent { self.observe_while_compiling(now)? } else { self.observe()? };
        let read = begun.elapsed();
        self.refuse_foreign_sentinel(&observed)?;
        self.find_drift(&observed);
        self.adopt(&mut observed)?;
        let adopted = begun.elapsed();
        self.trusted = true;
        self.settle(now, Others::Seen)?;
        self.name_numbers();
        self.refresh_bridges()?;
        if !self.trusted {
            // What the rules should be has changed meanwhile: look at them with that in mind.
            observed = self.observe()?;
            self.trusted = true;
            self.know(&observed);
            self.complete_left_alone(&mut observed)?;
        }
        self.share();
        if !std::mem::replace(&mut self.swept, true) {
            let seen = self.without_left_alone(&observed);
            self.note_unwanted(&seen);
        }
        // First of all: the rules that guard their addresses may be about to go.
        let mut ops = self.earlier_routes()?;
        ops.extend(plan_all(&self.with_left_alone(), &observed));
        ops.extend(self.overdue.iter().cloned().map(Op::CutFlows));
        ops.extend(self.flows_to_retry());
        self.note_originals(&ops);
        debug!(
            read_ms = read.as_millis() as u64,
            adopted_ms = adopted.as_millis() as u64,
            all_ms = begun.elapsed().as_millis() as u64,
            independent,
            "the kernel was read and compared"
        );
        Ok((ops, observed))
    }

    /// Whether the kernel has an entry that leads there, as far as is known.
    pub fn is_led(&self, element: &Element, marks: &BTreeSet<Mark>) -> bool {
        self.known.elements.get(element).copied().flatten().is_some_and(|mark| marks.contains(&mark))
    }

    /// Services of which no turn has told yet: they have changed, or were compiled and not programmed.
    pub fn untold(&self) -> impl Iterator<Item = &ServiceKey> {
        self.dirty.union(&self.settled)
    }

    /// Services that were compiled since the last call.
    pub fn take_settled(&mut self) -> BTreeSet<ServiceKey> {
        std::mem::take(&mut self.settled)
    }

    fn observe(&mut self) -> Result<Observed, Error> {
        if self.merged.state().program.is_none() {
            self.set_base();
        }
        let (ours, settings) = (&self.ours, &self.settings);
        let ranges = settings.node.ranges;
        self.dataplane.observe(self.merged.state(), &ranges, &|mark| Self::is_ours(ours, settings, mark))
    }

    /// Our sentinel never has a destination. One that has some when we first look is another program's.
    fn refuse_foreign_sentinel(&self, observed: &Observed) -> Result<(), Error> {
        let sentinel = self.settings.node.mask.sentinel();
        let with_reals = |(key, server): &(&VirtualServerKey, &VirtualServer)| {
            key.mark == sentinel && !server.reals.is_empty()
        };
        match observed.virtual_servers.iter().find(with_reals) {
            Some((key, _)) if !self.looked && !self.ours.contains(&sentinel) => Err(Error::Failed {
                object: format!("IPVS service {key}"),
                reason: format!(
                    "another program has it, and we need this mark: choose another --mark-mask, or remove it \
                     (`ipvsadm -D -f {}`)",
                    sentinel.0
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Takes what the kernel has into account: marks that lead where we want to lead keep doing so
    /// (after a lost state file), and real servers that are there without being wanted are drained.
    fn adopt(&mut self, observed: &mut Observed) -> Result<(), Error> {
        self.know(observed);
        self.ours.extend(observed.led_to.iter().copied().filter(|mark| *mark != Mark::NOWHERE));
        let recover = self.recover.take();
        let state_is_lost = recover.is_some();
        let mut unknown = BTreeSet::new();
        if let Some(lock) = recover {
            let found = recover::recover_allocations(observed, &self.settings.node, &self.snapshot, &lock);
            unknown.clone_from(&found.retired_marks);
            self.allocator =
                Allocator::new(self.settings.node.clone(), found, lock, observed.foreign_marks.clone());
            self.dirty.extend(self.snapshot.services().keys().cloned());
        } else {
            self.dirty.extend(self.allocator.set_foreign_marks(observed.foreign_marks.clone()));
        }
        // A later run than the one that the state is of has left them.
        let strays = self.allocator.retire_strays(&self.ours);
        unknown.extend(strays.into_iter().filter(|mark| self.settings.node.mask.covers(*mark)));
        if !std::mem::replace(&mut self.looked, true) {
            self.bare = matches!(observed.program, ProgramState::Absent);
            self.note_nameless(unknown, state_is_lost, &observed.elements);
            self.complete_left_alone(observed)?;
            self.note_spared(observed);
            if !self.unread.is_empty() {
                self.keep_unread(observed);
            }
        } else {
            self.complete_left_alone(observed)?;
        }
        for (key, server) in &observed.virtual_servers {
            let Some(owner) = self.merged.owner(key.mark) else { continue };
            let want = self.merged.state().virtual_servers.get(key);
            if server.reals.keys().any(|real| want.is_none_or(|w| !w.reals.contains_key(real))) {
                self.dirty.insert(owner.clone());
            }
        }
        Ok(())
    }

    /// One turn: prepares, applies and remembers.
    ///
    /// # Errors
    /// When the kernel can't be read. Changes that fail are in the result.
    pub fn turn(&mut self, full: bool, now: Timestamp) -> Result<Turn, Error> {
        let start = Instant::now();
        let full = full || !self.trusted;
        let ops = self.prepare(full, now)?;
        let failures = self.apply(&ops);
        Ok(Turn { full, services: self.take_settled(), ops, failures, took: start.elapsed() })
    }

    /// Applies prepared operations.
    pub fn apply(&mut self, ops: &[Op]) -> Vec<Failure> {
        let installs = ops.iter().any(|op| matches!(op, Op::Install { .. }));
        let installed = match installs.then(|| self.with_left_alone()) {
            Some(Cow::Owned(state)) => Some(state),
            _ => None,
        };
        let (known, desired) = (&self.known.elements, installed.as_ref().unwrap_or(self.merged.state()));
        let failures = self.dataplane.apply(ops, desired, &|element| known.get(element).copied().flatten());
        let failed: HashSet<String> = failures.iter().map(|failure| failure.op.to_string()).collect();
        let done = |op: &Op| failed.is_empty() || !failed.contains(&op.to_string());
        for op in ops {
            if done(op) {
                self.remember(op, installed.as_ref());
            } else if let Op::CutFlows(flows) = op {
                // It has its own tries.
                self.overdue.remove(flows);
            }
        }
        // New rules have come without these.
        for failure in failures.iter().filter(|failure| installs && failure.follows) {
            if let Op::Element(ElementChange::Put(element, _)) = &failure.op {
                withhold(&mut self.known.elements, *element);
            }
        }
        self.keep_flows(&failures);
        self.trusted = self.note_failures(ops, &failures);
        self.known_good = self.trusted;
        if ops.len() > SHARE_AFTER {
            self.share();
        }
        if self.allocator.has_retired_marks() {
            let deleted = |op: &Op| match op {
                Op::Ipvs(IpvsChange::DelService(key)) if done(op) => Some(*key),
                _ => None,
            };
            self.give_marks_back(&ops.iter().filter_map(deleted).collect());
        }
        failures
    }
}
