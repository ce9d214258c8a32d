//! What every command that looks at or changes a kernel needs: an engine over the real dataplane, fed
//! from a source, with the state that earlier runs left.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use tracing::{debug, error, info, warn};

use super::{
    options::{Options, RendererChoice},
    print,
    record::Record,
};
use crate::{
    allocate::{Lock, lock::LockError},
    compile::{
        CompiledService,
        service::{is_served, wanted_families},
    },
    dataplane::{
        Netfilter,
        executor::Dataplane,
        host::LinuxHost,
        ipvs::KernelIpvs,
        netfilter::{self, Iptables, Nftables, RendererChoice as Choice, Variant},
        preflight,
    },
    dns::{names::Names, zone::Zone},
    model::{
        kernel::{RealServerKey, VirtualServerKey},
        node::{MarkMask, NodeConfig},
        service::{Mode, TrafficDistribution},
    },
    plan::{Observed, Op},
    reconcile::Engine,
    source::{
        self, Loaded, Origin, Problem,
        problem::{Severity, unread},
        watch::emptied,
    },
    state::{Drain, PublishedPorts, State, StateDir},
};

/// An engine with where its state is kept.
pub struct Session {
    /// The engine, fed with the source.
    pub engine: Engine,
    /// What is wrong in the source.
    pub problems: Vec<Problem>,
    /// Where state is kept.
    pub keeper: Keeper,
    zone: Arc<Zone>,
    /// Names of all services, once they are asked for.
    pub names: std::cell::OnceCell<Names>,
}

/// Writes down what has to outlive the process.
pub struct Keeper {
    dir: StateDir,
    record: Record,
    state: State,
    /// Where services come from.
    pub source: Origin,
    /// The engine's generation that is in the state.
    generation: Option<u64>,
    /// Whether the state has something that its file has not.
    stale: bool,
    /// Whether it has something of the kernel that the record has not.
    unrecorded: bool,
    /// Whether there is a file, if not the newest: what was in the kernel before us is in it.
    on_disk: bool,
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

fn running(drain: &Drain) -> ((VirtualServerKey, RealServerKey), Timestamp) {
    let server = VirtualServerKey { family: drain.family, mark: drain.mark };
    let real = RealServerKey { addr: drain.address, port: drain.port };
    let until =
        i64::try_from(drain.deadline_unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    ((server, real), until.unwrap_or(Timestamp::UNIX_EPOCH))
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

/// Without CAP_NET_ADMIN nothing can be written: that is said first, and once.
///
/// # Errors
/// One line that says what to do about it.
pub fn need_rights() -> Result<()> {
    match preflight::no_net_admin(&preflight::own_status()) {
        Some(message) => bail!(message),
        None => Ok(()),
    }
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

/// Tells what stands in the way of what is about to be programmed. Whatever can work is tried all the same.
fn look_first(options: &Options, engine: &Engine) {
    let mut host = LinuxHost::new(options.proc_sys.clone());
    let ra_links = host.ra_dependent_links().unwrap_or_default();
    let subject = preflight::Subject {
        rules: &engine.settings().addresses,
        ipvs: Ok(()),
        status: &preflight::own_status(),
        ra_links: &ra_links,
        writes: true,
    };
    for finding in preflight::check(&mut host, &subject) {
        match finding.severity {
            preflight::Severity::Error => error!("{}", finding.message),
            preflight::Severity::Warning => warn!("{}", finding.message),
            preflight::Severity::Info => debug!("{}", finding.message),
        }
    }
}

/// Which start of the machine this is; empty where the kernel does not say. It is the kernel's own, so not below `--proc-sys`,
/// where a container has no more than the host's network settings.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Tells what stands in the way of the renderer.
fn advise(engine: &Engine) {
    for warning in engine.dataplane.netfilter.warnings() {
        warn!("{warning}");
    }
}

impl Session {
    /// Opens the kernel, reads the state and, unless it is watched later, the source; the one that the state remembers
    /// where none is given.
    ///
    /// # Errors
    /// One line that says what is missing and what to do about it.
    pub fn open(options: &Options, source: Option<Origin>, purpose: Purpose) -> Result<Self> {
        let settings = options.settings()?;
        if purpose != Purpose::Look {
            need_rights()?;
        }
        let Left { dir: state_dir, state, drains, stale } = open_state(options, purpose)?;
        let Some(source) = source.or_else(|| state.source.clone()) else {
            bail!(
                "no folder: nothing was applied here yet (state in {}); name one",
                options.state_dir.display()
            )
        };
        let dataplane = dataplane(options, &state)?;
        let known = state.source.as_ref() == Some(&source) && !state.allocations.services.is_empty();
        let strict = purpose == Purpose::Apply || (purpose == Purpose::Agent && !known);
        let lock = source.dir().map_or_else(|| Ok(Lock::default()), |dir| lock_of(dir, strict))?;
        let mut engine = Engine::new(
            settings,
            dataplane,
            state.allocations.clone(),
            lock,
            drains.iter().map(running).collect(),
        );
        let boot_id = boot_id();
        if !state.is_of_boot(&boot_id) {
            engine.forget_marks();
        } else if let Ok(mask) = MarkMask::new(state.mark_mask) {
            engine.set_earlier_mask(mask);
        }
        if purpose != Purpose::Look {
            if let Some(reason) = preflight::refused(&LinuxHost::new(options.proc_sys.clone()).link_names()?)
            {
                bail!(reason);
            }
            look_first(options, &engine);
        }
        engine.refresh_node().context("addresses of this node")?;
        for (family, own) in engine.facts().primary.iter() {
            if let Some(range) = engine.settings().node.ranges.get(family).filter(|range| range.contains(own))
            {
                bail!(
                    "--vip-cidr {range} holds this node's own address {own}: it would not be reachable any more; \
                     choose another range"
                );
            }
        }
        if purpose != Purpose::Look {
            advise(&engine);
        }
        // Of runs whose state was lost, too.
        let mut earlier_ranges = engine.dataplane.host.our_ranges().context("routes of this node")?;
        if !state.ranges.is_empty() {
            let ranges = state.ranges.iter().map(|(_, range)| *range);
            earlier_ranges.extend(ranges.chain(state.earlier_ranges.iter().copied()));
            let ports = |runs: &Vec<PublishedPorts>| runs.iter().flat_map(|run| run.ports()).collect();
            engine.set_served(state.served.iter().map(|(key, runs)| (key.clone(), ports(runs))).collect());
        }
        engine.set_earlier_ranges(earlier_ranges);
        engine.set_nameless(state.nameless.clone());
        let zone = options.dns.zone(engine.settings().node.ranges)?;
        let dns_listen = match purpose {
            Purpose::Agent if options.dns.config(engine.settings().node.ranges)?.is_some() => {
                options.dns.dns_listen.clone()
            }
            Purpose::Agent | Purpose::Apply => Vec::new(),
            Purpose::Look => state.dns_listen.clone(),
        };
        let mut problems = Vec::new();
        if purpose != Purpose::Agent {
            let loaded = load(options, &source, &engine.settings().node)?;
            engine.feed(loaded.events());
            if let Some(says) = loaded.node.clone() {
                engine.set_node(says);
                engine.refresh_node().context("addresses of this node")?;
            }
            engine.synced(unread(&loaded.problems));
            problems = loaded.problems;
        }
        Ok(Self {
            engine,
            problems,
            keeper: Keeper {
                dir: state_dir,
                on_disk: !state.node.is_empty(),
                stale: stale
                    || state.boot_id != boot_id
                    || state.kubeconfig != options.kubeconfig
                    || state.flags != options.remembered
                    || state.dns_listen != dns_listen,
                unrecorded: true,
                record: Record::new(&options.run_dir),
                state: State {
                    kubeconfig: options.kubeconfig.clone(),
                    flags: options.remembered.clone(),
                    dns_listen,
                    boot_id,
                    ..state
                },
                source,
                generation: None,
            },
            zone,
            names: std::cell::OnceCell::new(),
        })
    }

    /// Reads the kernel and compares.
    ///
    /// # Errors
    /// What could not be read.
    pub fn prepare(&mut self) -> Result<(Vec<Op>, Observed)> {
        Ok(self.engine.prepare_full(Timestamp::now())?)
    }

    /// Writes allocations and drains down, if they changed.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn save(&mut self) -> Result<()> {
        self.keeper.save(&self.engine)
    }

    /// What keeps a service from being served as declared.
    pub fn problems_of(&self, service: &CompiledService) -> Vec<String> {
        let mut out = problems_of(&self.engine, service);
        out.extend(self.names().conflicts(&service.key));
        out
    }

    /// Names of all services as compiled when this is called first.
    pub fn names(&self) -> &Names {
        self.names.get_or_init(|| super::dns::all_names(self.zone.clone(), &self.engine))
    }

    /// What is wrong in the folder, and what is left as it is because of it.
    pub fn source_problems(&self) -> Vec<String> {
        let wrong = self.problems.iter().filter(|p| p.severity >= Severity::Warning).map(ToString::to_string);
        let held = self.engine.held().iter().map(|key| {
            format!("{key}: not in what can be read of the source; what the kernel has for it stays as it is")
        });
        wrong.chain(held).collect()
    }

    /// Prints the folder's problems to stderr; true when one of them keeps an object from being used.
    pub fn report_problems(&self) -> bool {
        for problem in &self.problems {
            if problem.severity >= Severity::Warning {
                print::err(problem);
            }
        }
        self.problems.iter().any(|p| p.severity >= Severity::Refused)
    }
}

/// What the lock file of a folder says. Where what it is about is in the state, too (not `strict`), a damaged one is no reason not to
/// look, nor for an agent not to start.
fn lock_of(dir: &Path, strict: bool) -> Result<Lock> {
    match Lock::read(dir) {
        Ok(lock) => Ok(lock.unwrap_or_default()),
        // What is wrong with the folder itself is told by who reads it.
        Err(LockError::Io(_)) if !dir.is_dir() => Ok(Lock::default()),
        Err(e) if strict => bail!("{}: {e}", dir.display()),
        Err(e) => {
            warn!("{}: {e}; what is known of earlier allocations stays in force", dir.display());
            Ok(Lock::default())
        }
    }
}

/// Everything that a source has, once.
///
/// # Errors
/// It can't be read.
fn load(options: &Options, source: &Origin, config: &NodeConfig) -> Result<Loaded> {
    match source {
        Origin::Folder(dir) => {
            source::load(dir, Some(config)).map_err(|problem| anyhow::anyhow!("{problem}"))
        }
        Origin::Kube => {
            let access = source::kube::config(options.kubeconfig.as_deref())?;
            source::kube::load(access, config.clone())
        }
    }
}

/// What keeps a service from being served as declared: allocation conflicts and blocked ports.
pub fn problems_of(engine: &Engine, service: &CompiledService) -> Vec<String> {
    let mut out = told_of(engine, service, true);
    let unserved = unserved_families(engine, service);
    if let Some((false, families)) = &unserved {
        out.push(format!(
            "not served here: this node serves no {families} (it has no such address, or no such --vip-cidr)"
        ));
    }
    for ((protocol, port), _) in engine.late_listeners().iter().filter(|(_, key)| **key == service.key) {
        out.push(format!(
            "published port {protocol} {port}: a socket of this host that came later listens on it too; \
             what is sent to this node's published addresses goes to the service"
        ));
    }
    out
}

/// What is to be known of a service that is served as declared: a value of it that has moved, a port that answers on other
/// nodes only because it is to.
pub fn notes_of(engine: &Engine, service: &CompiledService) -> Vec<String> {
    let declared = engine.snapshot().services().get(&service.key);
    let in_vain = declared.is_some_and(|s| s.distribution == TrafficDistribution::SameZone)
        && engine.settings().node.zone.is_none();
    let zone = in_vain.then(|| {
        "trafficDistribution: PreferSameZone has no effect here, since this node's zone is not known: label its Node \
         topology.kubernetes.io/zone, or give --topology-zone"
            .to_owned()
    });
    let family = unserved_families(engine, service).filter(|(others, _)| *others).map(|(_, families)| {
        format!("served by its other address only: this node serves no {families} (it has no such address)")
    });
    told_of(engine, service, false).into_iter().chain(zone).chain(family).collect()
}

/// Families of a service that this node does not serve, and whether it serves others of it. `None` where it serves all.
fn unserved_families(engine: &Engine, service: &CompiledService) -> Option<(bool, String)> {
    let declared = engine.snapshot().services().get(&service.key)?;
    // Its names are answered whatever is programmed.
    if declared.mode == Mode::Dnsrr && declared.ports.iter().all(|port| port.publish.is_none()) {
        return None;
    }
    let node = &engine.settings().node;
    let (served, unserved): (Vec<_>, Vec<_>) = wanted_families(declared, &service.vips)
        .into_iter()
        .partition(|family| is_served(*family, node, engine.facts()));
    let names: Vec<String> = unserved.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| (!served.is_empty(), names.join(" and no ")))
}

/// What compile says of a port with `publish.mode: Host` on a node that has none of its endpoints.
const ELSEWHERE: &str = "no endpoint on this node (mode Host)";

/// Whether a port is not published here for no reason but that it is published on other nodes.
pub fn is_elsewhere(why_not_published: &str) -> bool {
    why_not_published == ELSEWHERE
}

fn told_of(engine: &Engine, service: &CompiledService, wrong: bool) -> Vec<String> {
    let conflicts = engine.allocator().get(&service.key).map(|a| a.conflicts.as_slice()).unwrap_or_default();
    let conflicts = conflicts.iter().filter(|c| c.is_blocking() == wrong).map(ToString::to_string);
    let ports = service.ports.iter().filter_map(|port| {
        let why = port.not_published.as_ref().filter(|why| is_elsewhere(why) != wrong)?;
        Some(format!("port {}: not published on this node: {why}", port.spec.label()))
    });
    conflicts.chain(ports).collect()
}

/// Opens the kernel side as the options say.
///
/// # Errors
/// One line that says what is missing and what to do about it.
fn dataplane(options: &Options, state: &State) -> Result<Dataplane> {
    Ok(Dataplane {
        ipvs: Box::new(KernelIpvs::open()?),
        netfilter: renderer(options, state)?,
        host: Box::new(LinuxHost::new(options.proc_sys.clone())),
    })
}

/// The renderer that the options or the host ask for.
///
/// # Errors
/// Its programs are not there.
pub fn renderer(options: &Options, state: &State) -> Result<Box<dyn Netfilter + Send>> {
    let choice = match options.renderer {
        RendererChoice::IptablesNft => Choice::Iptables(Variant::Nft),
        RendererChoice::IptablesLegacy => Choice::Iptables(Variant::Legacy),
        RendererChoice::Nftables => Choice::Nftables,
        RendererChoice::Auto | RendererChoice::Iptables => {
            let found = netfilter::detect();
            for reason in &found.reasons {
                info!("renderer {}: {reason}", found.choice.name());
            }
            for warning in &found.warnings {
                warn!("{warning}");
            }
            match (options.renderer, found.choice) {
                (RendererChoice::Iptables, Choice::Nftables) => Choice::Iptables(Variant::Nft),
                (_, choice) => choice,
            }
        }
    };
    let mut renderer: Box<dyn Netfilter + Send> = match choice {
        Choice::Iptables(variant) => Box::new(Iptables::new(variant)?),
        Choice::Nftables => Box::new(Nftables::new()?),
    };
    if state.renderer == renderer.name() && !state.netfilter.is_null() {
        renderer.set_fingerprint(state.netfilter.clone());
    }
    Ok(renderer)
}
