//! Allocates and compiles what is dirty; the first time while the kernel is read.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    thread,
    time::Instant,
};

use jiff::Timestamp;
use tracing::debug;

use super::{
    Engine, Served, Settings,
    marks::Others,
    published::{Published, given_up, let_go, published},
};
use crate::{
    allocate::Allocator,
    compile::{
        Assigned, CompiledService, Inputs, Merged, RealState, compile_service,
        merge::Touched,
        service::{Drains, Kept},
    },
    dataplane::{Error, executor::Dataplane},
    model::{
        ids::{Mark, Protocol, ServiceKey},
        kernel::{KernelState, PublishedFlows},
        node::NodeFacts,
        snapshot::Snapshot,
    },
    plan::Observed,
};

/// All that allocating and compiling need of an engine: nothing of the kernel.
pub(super) struct Compiling<'a> {
    pub(super) settings: &'a Settings,
    pub(super) facts: &'a NodeFacts,
    pub(super) snapshot: &'a Snapshot,
    pub(super) known: &'a KernelState,
    pub(super) allocator: &'a mut Allocator,
    pub(super) generation: &'a mut u64,
    pub(super) ours: &'a mut BTreeSet<Mark>,
    pub(super) served: &'a mut Served,
    pub(super) blocked: &'a mut BTreeMap<(Protocol, u16), ServiceKey>,
    settled: &'a mut BTreeSet<ServiceKey>,
    drains: &'a mut Drains,
    kept: &'a mut Kept,
    overdue: &'a mut BTreeSet<PublishedFlows>,
    merged: &'a mut Merged,
}

impl Compiling<'_> {
    /// Allocates for services that are dirty, and adds those that have to be compiled for it. False where that is not over
    /// because the `kernel` has to be asked and can't be now: then it is to be done again.
    fn allocate(
        &mut self,
        dirty: &mut BTreeSet<ServiceKey>,
        others: Others,
        mut kernel: Option<&mut Dataplane>,
    ) -> Result<bool, Error> {
        let changed = self.allocator.update(dirty, self.snapshot.services());
        *self.generation += u64::from(!changed.is_empty());
        dirty.extend(changed);
        let done =
            self.take_marks(dirty, others, kernel.as_deref_mut())? && self.find_blocked(dirty, kernel)?;
        if done {
            self.settled.extend(dirty.iter().cloned());
        }
        Ok(done)
    }

    fn run(mut self, dirty: BTreeSet<ServiceKey>, now: Timestamp) -> Touched {
        let mut touched = Touched::default();
        for key in &dirty {
            let compiled = self.compile(key, now);
            self.remember_drains(key, compiled.as_deref());
            self.cut(key, compiled.as_deref());
            self.let_go(compiled.as_deref());
            self.merged.replace(key, compiled, &mut touched);
        }
        self.spare(&dirty);
        touched
    }

    fn compile(&self, key: &ServiceKey, now: Timestamp) -> Option<Arc<CompiledService>> {
        let service = self.snapshot.services().get(key)?;
        let allocation = self.allocator.get(key)?;
        let assigned = Assigned {
            vips: allocation.vips,
            published: allocation.published.clone(),
            marks: allocation.marks.clone(),
        };
        let inputs = Inputs {
            config: &self.settings.node,
            facts: self.facts,
            present: &self.known.virtual_servers,
            drains: self.drains,
            kept: self.kept,
            blocked: &|protocol, port| self.blocked.contains_key(&(protocol, port)),
            now,
        };
        Some(Arc::new(compile_service(service, &self.snapshot.slices_for(service), &assigned, &inputs)))
    }

    /// What the source speaks for is not kept for anything else any more.
    fn let_go(&mut self, new: Option<&CompiledService>) {
        if self.kept.is_empty() {
            return;
        }
        for (key, info) in new.iter().flat_map(|service| service.reals.iter()) {
            if info.state != RealState::Kept {
                self.kept.remove(key);
            }
        }
    }

    /// Connections by published ports to a destination that the service let go of, or by a port that is no longer published, are
    /// cut with the next changes.
    fn cut(&mut self, key: &ServiceKey, new: Option<&CompiledService>) {
        let Some(old) = self.merged.services().get(key) else { return };
        // Of an address that the node has lost they go on if it comes back.
        let here = |to: &(IpAddr, u16)| self.facts.publishes_at(&to.0);
        let flows = let_go(old, new).into_iter().filter_map(|flows| {
            let to: BTreeSet<_> = flows.to.into_iter().filter(here).collect();
            (!to.is_empty()).then_some(PublishedFlows { to, ..flows })
        });
        let flows: Vec<_> = flows.collect();
        self.overdue.extend(flows);
    }

    /// What these services go on with is not cut, though another one has let go of it.
    fn spare(&mut self, compiled: &BTreeSet<ServiceKey>) {
        if self.overdue.is_empty() {
            return;
        }
        let services = compiled.iter().filter_map(|key| self.merged.services().get(key));
        let published: Vec<Published> = services.flat_map(|service| published(service)).collect();
        let all = std::mem::take(self.overdue);
        self.overdue.extend(all.iter().filter_map(|flows| given_up(flows, &published)));
    }

    fn remember_drains(&mut self, key: &ServiceKey, new: Option<&CompiledService>) {
        if let Some(old) = self.merged.services().get(key) {
            for (drain, _) in old.drains() {
                self.drains.remove(&drain);
            }
        }
        let Some(new) = new else { return };
        // Drains from the state file have no compiled service yet: those of this service's marks that
        // the new result does not have are over.
        let marks: BTreeSet<Mark> = new.marks().collect();
        self.drains.retain(|(vs, _), _| !marks.contains(&vs.mark));
        self.drains.extend(new.drains());
    }
}

impl Engine {
    /// Allocates and compiles whatever is dirty.
    pub(super) fn settle(&mut self, now: Timestamp, others: Others) -> Result<Touched, Error> {
        if self.dirty.is_empty() {
            return Ok(Touched::default());
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        let (mut compiling, dataplane) = self.divide();
        if let Err(e) = compiling.allocate(&mut dirty, others, Some(dataplane)) {
            self.dirty = dirty;
            return Err(e);
        }
        Ok(compiling.run(dirty, now))
    }

    /// Reads the kernel, and allocates and compiles in another thread meanwhile: with thousands of services, all of it takes
    /// long.
    pub(super) fn observe_while_compiling(&mut self, now: Timestamp) -> Result<Observed, Error> {
        if self.merged.state().program.is_none() {
            self.set_base();
        }
        let base = self.merged.state();
        let wanted = KernelState {
            program: base.program.clone(),
            sysctls: base.sysctls.clone(),
            ..Default::default()
        };
        let (ours, all) = (self.ours.clone(), self.dirty.clone());
        let mut dirty = std::mem::take(&mut self.dirty);
        let (mut compiling, dataplane) = self.divide();
        let settings = compiling.settings;
        let (observed, done) = thread::scope(|scope| {
            let begun = thread::Builder::new().name("compile".into()).spawn_scoped(scope, move || {
                let start = Instant::now();
                let done = compiling.allocate(&mut dirty, Others::Ask, None)?;
                let allocated = start.elapsed();
                if done {
                    compiling.run(dirty, now);
                }
                debug!(
                    allocated_ms = allocated.as_millis() as u64,
                    compiled_ms = start.elapsed().as_millis() as u64,
                    "compiled meanwhile"
                );
                Ok(done)
            });
            let start = Instant::now();
            let observed = dataplane
                .observe(&wanted, &settings.node.ranges, &|mark| Self::is_ours(&ours, settings, mark));
            debug!(read_ms = start.elapsed().as_millis() as u64, "the kernel was read");
            let done = match begun.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(done)) => done,
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                Err(e) => {
                    Err(Error::Failed { object: "a thread to compile in".into(), reason: e.to_string() })
                }
            };
            (observed, done)
        });
        if !matches!(done, Ok(true)) {
            self.dirty.extend(all);
        }
        done?;
        observed
    }

    /// Everything but the kernel, and the kernel: the one can work without the other.
    pub(super) fn divide(&mut self) -> (Compiling<'_>, &mut Dataplane) {
        let compiling = Compiling {
            settings: &self.settings,
            facts: &self.facts,
            snapshot: &self.snapshot,
            known: &self.known,
            allocator: &mut self.allocator,
            generation: &mut self.generation,
            ours: &mut self.ours,
            served: &mut self.served,
            blocked: &mut self.blocked,
            settled: &mut self.settled,
            drains: &mut self.drains,
            kept: &mut self.kept,
            overdue: &mut self.overdue,
            merged: &mut self.merged,
        };
        (compiling, &mut self.dataplane)
    }
}
