//! What every command that looks at or changes a kernel needs: an engine over the real dataplane, fed
//! from a folder, with the state that earlier runs left.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use tracing::warn;

use super::options::{Options, RendererChoice};
use crate::{
    compile::CompiledService,
    dataplane::{
        Netfilter,
        executor::Dataplane,
        host::LinuxHost,
        ipvs::KernelIpvs,
        netfilter::{self, Renderer},
    },
    plan::{Observed, Op},
    reconcile::{Engine, Settings},
    source::{self, Problem, problem::Severity},
    state::{State, StateDir},
};

/// An engine with where its state is kept.
pub struct Session {
    /// The engine, fed with the folder.
    pub engine: Engine,
    /// What is wrong in the folder.
    pub problems: Vec<Problem>,
    /// Where state is kept.
    pub state_dir: StateDir,
    /// What was in it.
    pub state: State,
    /// The folder.
    pub source: PathBuf,
}

impl Session {
    /// Opens the kernel, reads the state and, unless it is watched later, the folder. Without a `dir`
    /// the folder is the one that the state remembers.
    ///
    /// # Errors
    /// One line that says what is missing and what to do about it.
    pub fn open(options: &Options, dir: Option<&Path>, read: bool) -> Result<Self> {
        let settings = options.settings()?;
        let state_dir = StateDir::new(&options.state_dir);
        let (state, warnings) = state_dir.load();
        for warning in warnings {
            warn!("{warning}");
        }
        let source = match (dir, &state.source) {
            (Some(dir), _) => std::path::absolute(dir)?,
            (None, Some(source)) => source.clone(),
            (None, None) => bail!(
                "no folder: nothing was applied here yet (state in {}); name one",
                options.state_dir.display()
            ),
        };
        let dataplane = dataplane(options, &state)?;
        let lock = crate::allocate::Lock::read(&source)?;
        let mut engine = Engine::new(settings, dataplane, state.allocations.clone(), lock, state_dir.load_drains());
        engine.refresh_node().context("addresses of this node")?;
        let mut problems = Vec::new();
        if read {
            let loaded = source::load(&source, Some(&engine.settings().node))
                .map_err(|problem| anyhow::anyhow!("{problem}"))?;
            engine.feed(loaded.events());
            engine.synced(loaded.is_complete());
            problems = loaded.problems;
        }
        Ok(Self { engine, problems, state_dir, state, source })
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
        save(&self.engine, &self.source, &mut self.state, &self.state_dir)
    }

    /// What keeps a service from being served as declared.
    pub fn problems_of(&self, service: &CompiledService) -> Vec<String> {
        problems_of(&self.engine, service)
    }

    /// Prints the folder's problems to stderr; true when one of them keeps an object from being used.
    pub fn report_problems(&self) -> bool {
        for problem in &self.problems {
            if problem.severity >= Severity::Warning {
                eprintln!("meshlb: {problem}");
            }
        }
        self.problems.iter().any(|p| p.severity >= Severity::Error)
    }
}

/// What keeps a service from being served as declared: allocation conflicts and blocked ports.
pub fn problems_of(engine: &Engine, service: &CompiledService) -> Vec<String> {
    let mut out: Vec<String> = engine.allocator().conflicts_of(&service.key).map(|c| c.to_string()).collect();
    for port in &service.ports {
        if let Some(why) = &port.not_published {
            out.push(format!("port {}: not published on this node: {why}", port.spec.label()));
        }
    }
    out
}

/// Writes the engine's allocations, drains and fingerprints down.
///
/// # Errors
/// The file that could not be written.
pub fn save(engine: &Engine, source: &Path, state: &mut State, dir: &StateDir) -> Result<()> {
    let mut new = state.clone();
    new.source = Some(source.to_owned());
    new.node = engine.settings().node.name.to_string();
    new.allocations = engine.allocator().allocations().clone();
    new.renderer = Some(engine.dataplane.netfilter.name().to_owned());
    new.fingerprint = engine.dataplane.netfilter.fingerprint();
    new.sysctls = engine.sysctl_originals(&state.sysctls);
    if new != *state {
        dir.save(&new)?;
        *state = new;
    }
    dir.save_drains(engine.drains())?;
    Ok(())
}

/// Opens the kernel side as the options say.
///
/// # Errors
/// One line that says what is missing and what to do about it.
pub fn dataplane(options: &Options, state: &State) -> Result<Dataplane> {
    let ipvs = KernelIpvs::open()?;
    Ok(Dataplane {
        ipvs: Box::new(ipvs),
        netfilter: renderer(options, state)?,
        host: Box::new(LinuxHost::new(options.proc_sys.clone())),
    })
}
