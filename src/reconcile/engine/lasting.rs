//! Changes that fail again and again: nothing else waits for them.

use std::collections::HashSet;

use super::Engine;
use crate::{
    dataplane::{ElementChange, IpvsChange, executor::Failure},
    model::kernel::{KernelState, RealServerKey, VirtualServerKey},
    plan::Op,
};

impl Engine {
    /// What failed when it was last tried, and is still to be done.
    pub fn failing(&self) -> &[Failure] {
        &self.failing
    }

    /// Whether something failed in the last turn that had not failed in the one before.
    pub fn failed_anew(&self) -> bool {
        self.failed_anew
    }

    /// Takes in how changes ended. Whether the kernel is known all the same: what fails a second time, after the kernel was read,
    /// has changed nothing, and each look and each change of anything else may go by that.
    pub(super) fn note_failures(&mut self, ops: &[Op], failures: &[Failure]) -> bool {
        if !self.full {
            self.forget_mended(ops);
        }
        if failures.is_empty() && (self.failing.is_empty() || self.full) {
            self.failing.clear();
            self.failed_anew = false;
            return true;
        }
        let before: HashSet<String> = self.failing.iter().map(|failure| failure.op.to_string()).collect();
        let unmade: HashSet<VirtualServerKey> = self.failing.iter().filter_map(|f| made_by(&f.op)).collect();
        // Each destination more of an IPVS service that can't be made fails with it.
        let failed_before = |f: &Failure| match &f.op {
            Op::Ipvs(IpvsChange::AddReal(key, ..)) if unmade.contains(key) => true,
            op => before.contains(&op.to_string()),
        };
        let lasting = failures.iter().all(|f| is_apart(&f.op) && failed_before(f));
        self.failed_anew = !failures.iter().all(failed_before);
        if self.full {
            self.failing.clear();
        } else {
            let tried: HashSet<String> = failures.iter().map(|failure| failure.op.to_string()).collect();
            self.failing.retain(|failure| !tried.contains(&failure.op.to_string()));
        }
        self.failing.extend(failures.iter().cloned());
        lasting
    }

    /// What failed earlier and was done now, or is to be done no more since its service was edited or is gone.
    fn forget_mended(&mut self, ops: &[Op]) {
        if self.failing.is_empty() {
            return;
        }
        let tried: HashSet<String> = ops.iter().map(ToString::to_string).collect();
        let failing = std::mem::take(&mut self.failing);
        let want = self.with_left_alone();
        let is_due = |failure: &Failure| {
            self.is_due(&failure.op, &want).unwrap_or(!tried.contains(&failure.op.to_string()))
        };
        self.failing = failing.into_iter().filter(is_due).collect();
    }

    /// Whether a change is still to be done: wanted, and not in the kernel. `None` for those that no comparison of what is known
    /// tells.
    fn is_due(&self, op: &Op, want: &KernelState) -> Option<bool> {
        let have = &self.known;
        let config =
            |state: &KernelState, key| state.virtual_servers.get(key).map(|server| server.config.clone());
        let real = |state: &KernelState, key, real: &RealServerKey| {
            state.virtual_servers.get(key).and_then(|server| server.reals.get(real).copied())
        };
        Some(match op {
            Op::Ipvs(IpvsChange::AddService(key, new) | IpvsChange::SetService(key, new)) => {
                config(want, key).as_ref() == Some(new) && config(have, key).as_ref() != Some(new)
            }
            Op::Ipvs(IpvsChange::AddReal(key, to, new) | IpvsChange::SetReal(key, to, new)) => {
                real(want, key, to) == Some(*new) && real(have, key, to) != Some(*new)
            }
            Op::Ipvs(IpvsChange::DelService(key)) => {
                config(want, key).is_none() && config(have, key).is_some()
            }
            Op::Ipvs(IpvsChange::DelReal(key, to)) => {
                real(want, key, to).is_none() && real(have, key, to).is_some()
            }
            Op::Element(ElementChange::Put(element, mark)) => {
                want.elements.get(element) == Some(mark) && have.elements.get(element) != Some(mark)
            }
            Op::Element(ElementChange::Del(element)) => {
                !want.elements.contains_key(element) && have.elements.contains_key(element)
            }
            _ => return None,
        })
    }
}

/// The IPVS service that this would make.
fn made_by(op: &Op) -> Option<VirtualServerKey> {
    match op {
        Op::Ipvs(IpvsChange::AddService(key, _)) => Some(*key),
        _ => None,
    }
}

/// Whether a change that fails leaves things as they are. Rules are many at once.
fn is_apart(op: &Op) -> bool {
    match op {
        Op::Sysctl { .. }
        | Op::Timeouts { .. }
        | Op::PutRoute(_)
        | Op::DelRoute(..)
        | Op::Ipvs(_)
        | Op::Element(_)
        // Nothing of it is in what is looked at.
        | Op::RemoveLeftovers(_) => true,
        Op::Install { .. } | Op::ForgetUdp(_) | Op::CutFlows(_) => false,
    }
}
