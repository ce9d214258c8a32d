//! What we know of the kernel: what was read last, and what was written since.

use std::sync::Arc;

use super::Engine;
use crate::{
    dataplane::{ElementChange, IpvsChange, ProgramState},
    model::{
        ids::Family,
        kernel::{KernelState, VirtualServer},
    },
    plan::{Observed, Op},
};

impl Engine {
    pub(super) fn know(&mut self, observed: &Observed) {
        self.known.virtual_servers.clone_from(&observed.virtual_servers);
        self.known.elements.clone_from(&observed.elements);
        self.known.routes = observed.routes;
        self.known.sysctls.clone_from(&observed.sysctls);
        self.known.timeouts = Some(observed.timeouts);
        self.known.program = match &observed.program {
            ProgramState::Installed => self.merged.state().program.clone(),
            _ => None,
        };
    }

    /// Has what we know share the destinations that are as they should be.
    pub(super) fn share(&mut self) {
        let desired = &self.merged.state().virtual_servers;
        for (key, known) in &mut self.known.virtual_servers {
            if let Some(want) = desired.get(key).filter(|want| want.reals == known.reals) {
                known.reals.clone_from(&want.reals);
            }
        }
    }

    /// Notes what sysctls and timeouts are before they are changed: it has to be on disk by then, since who is killed
    /// between the change and a note of it could never put it back.
    pub(super) fn note_originals(&mut self, ops: &[Op]) {
        for op in ops {
            match op {
                Op::Sysctl { path, was: Some(was), .. } => {
                    self.originals.entry(path.clone()).or_insert_with(|| was.clone());
                }
                Op::Timeouts { was, .. } => {
                    self.timeouts_before.get_or_insert(*was);
                }
                _ => {}
            }
        }
    }

    /// Updates what we know by one operation that went well; rules came with the entries of what was `installed`.
    pub(super) fn remember(&mut self, op: &Op, installed: Option<&KernelState>) {
        let servers = &mut self.known.virtual_servers;
        match op {
            Op::Ipvs(change) => match change {
                IpvsChange::AddService(key, config) | IpvsChange::SetService(key, config) => {
                    let protocol = self.merged.state().virtual_servers.get(key).and_then(|s| s.protocol);
                    servers.entry(*key).and_modify(|server| server.config = config.clone()).or_insert_with(
                        || VirtualServer { config: config.clone(), protocol, reals: Arc::default() },
                    );
                }
                IpvsChange::DelService(key) => {
                    servers.remove(key);
                }
                IpvsChange::AddReal(key, real, config) | IpvsChange::SetReal(key, real, config) => {
                    if let Some(server) = servers.get_mut(key) {
                        Arc::make_mut(&mut server.reals).insert(*real, *config);
                    }
                }
                IpvsChange::DelReal(key, real) => {
                    if let Some(server) = servers.get_mut(key) {
                        Arc::make_mut(&mut server.reals).remove(real);
                    }
                }
            },
            Op::Element(ElementChange::Put(element, mark)) => {
                self.known.elements.insert(*element, *mark);
            }
            Op::Element(ElementChange::Del(element)) => {
                self.known.elements.remove(element);
            }
            Op::Install { program, .. } => {
                self.known.program = Some((**program).clone());
                self.known.elements.clone_from(&installed.unwrap_or(self.merged.state()).elements);
            }
            Op::PutRoute(route) => self.known.routes.set(Family::of(&route.source), Some(*route)),
            Op::DelRoute(family, range) => {
                if self.known.routes.get(*family).is_some_and(|route| route.range == *range) {
                    self.known.routes.set(*family, None);
                }
            }
            Op::Sysctl { path, value, .. } => {
                self.known.sysctls.insert(path.clone(), value.clone());
            }
            Op::Timeouts { timeouts, .. } => self.known.timeouts = Some(*timeouts),
            Op::CutFlows(flows) => {
                self.overdue.remove(flows);
            }
            Op::ForgetUdp(_) | Op::RemoveLeftovers(_) => {}
        }
    }
}
