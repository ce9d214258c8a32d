//! Compiles what is dirty; the first time while the kernel is read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    thread,
};

use jiff::Timestamp;

use super::{Engine, Settings, marks::Others};
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
        kernel::{KernelState, VirtualServer, VirtualServerKey},
        node::NodeFacts,
        snapshot::Snapshot,
    },
    plan::Observed,
};

/// All that compiling needs of an engine: nothing of the kernel.
struct Compiling<'a> {
    settings: &'a Settings,
    facts: &'a NodeFacts,
    snapshot: &'a Snapshot,
    allocator: &'a Allocator,
    blocked: &'a BTreeMap<(Protocol, u16), ServiceKey>,
    present: &'a HashMap<VirtualServerKey, VirtualServer>,
    drains: &'a mut Drains,
    kept: &'a mut Kept,
    merged: &'a mut Merged,
}

impl Compiling<'_> {
    fn run(mut self, dirty: BTreeSet<ServiceKey>, now: Timestamp) -> Touched {
        let mut touched = Touched::default();
        for key in dirty {
            let compiled = self.compile(&key, now);
            self.remember_drains(&key, compiled.as_deref());
            self.let_go(compiled.as_deref());
            self.merged.replace(&key, compiled, &mut touched);
        }
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
            present: self.present,
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

    fn remember_drains(&mut self, key: &ServiceKey, new: Option<&CompiledService>) {
        if let Some(old) = self.merged.services().get(key) {
            for (drain, _) in old.drains() {
                self.drains.remove(&drain);
            }
        }
        let Some(new) = new else { return };
        // Drains from the state file have no compiled service yet: those of this service's marks that
        // the new result does not have are over.
        let marks: BTreeSet<Mark> = new.virtual_servers.keys().map(|k| k.mark).collect();
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
        let dirty = self.allocate(now, others)?;
        Ok(self.divide().0.run(dirty, now))
    }

    /// Reads the kernel, and compiles in another thread meanwhile: with thousands of services, both take long.
    pub(super) fn observe_while_compiling(&mut self, now: Timestamp) -> Result<Observed, Error> {
        if self.merged.state().program.is_none() {
            self.set_base();
        }
        let dirty = self.allocate(now, Others::Ask)?;
        let keys = dirty.clone();
        let base = self.merged.state();
        let wanted = KernelState {
            program: base.program.clone(),
            sysctls: base.sysctls.clone(),
            ..Default::default()
        };
        let (compiling, dataplane, ours) = self.divide();
        let settings = compiling.settings;
        let observed = thread::scope(|scope| {
            let thread = thread::Builder::new().name("compile".into());
            let begun = thread.spawn_scoped(scope, || compiling.run(dirty, now));
            if let Err(e) = begun {
                return Err(Error::Failed { object: "a thread to compile in".into(), reason: e.to_string() });
            }
            dataplane.observe(&wanted, &settings.node.ranges, &|mark| Self::is_ours(ours, settings, mark))
        });
        if self.merged.services().is_empty() {
            // The thread has not begun.
            self.dirty.extend(keys);
        }
        observed
    }

    /// What compiles, and what reads the kernel: the one does not need the other.
    fn divide(&mut self) -> (Compiling<'_>, &mut Dataplane, &BTreeSet<Mark>) {
        let compiling = Compiling {
            settings: &self.settings,
            facts: &self.facts,
            snapshot: &self.snapshot,
            allocator: &self.allocator,
            blocked: &self.blocked,
            present: &self.known.virtual_servers,
            drains: &mut self.drains,
            kept: &mut self.kept,
            merged: &mut self.merged,
        };
        (compiling, &mut self.dataplane, &self.ours)
    }

    /// Allocates for whatever is dirty; gives the services to compile.
    fn allocate(&mut self, now: Timestamp, others: Others) -> Result<BTreeSet<ServiceKey>, Error> {
        let due: Vec<_> =
            self.drains.iter().filter(|(_, until)| **until <= now).map(|(key, _)| *key).collect();
        let flows = due.into_iter().filter_map(|(vs, real)| self.published_flows(vs, real));
        let flows: Vec<_> = flows.collect();
        self.overdue.extend(flows);
        let mut dirty = std::mem::take(&mut self.dirty);
        let changed = self.allocator.update(&dirty, self.snapshot.services());
        self.generation += u64::from(!changed.is_empty());
        dirty.extend(changed);
        let settled = self.take_marks(&mut dirty, others).and_then(|()| self.find_blocked(&dirty));
        if let Err(e) = settled {
            self.dirty = dirty;
            return Err(e);
        }
        self.settled.extend(dirty.iter().cloned());
        Ok(dirty)
    }
}
