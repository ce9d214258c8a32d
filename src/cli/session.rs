//! What every command that looks at or changes a kernel needs: an engine over the real dataplane, fed
//! from a source, with the state that earlier runs left.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use tracing::{debug, error, info, warn};

use super::{
    keeper::{Keeper, Left, Purpose, boot_id, open_state, running},
    notes::problems_of,
    options::{Options, RendererChoice},
    print,
    record::Record,
};
use crate::{
    allocate::{Lock, lock::LockError},
    compile::CompiledService,
    dataplane::{
        Netfilter,
        executor::Dataplane,
        host::LinuxHost,
        ipvs::KernelIpvs,
        netfilter::{self, Iptables, Nftables, RendererChoice as Choice, Variant},
        preflight,
    },
    dns::{names::Names, zone::Zone},
    model::node::{MarkMask, NodeConfig},
    plan::{Observed, Op},
    reconcile::Engine,
    source::{
        self, Loaded, Origin, Problem,
        problem::{Severity, unread},
    },
    state::{PublishedPorts, State},
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
