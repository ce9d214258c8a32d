//! Changes that fail again and again: nothing else waits for them.

use std::collections::HashSet;

use super::Engine;
use crate::{
    dataplane::{IpvsChange, executor::Failure},
    model::kernel::VirtualServerKey,
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
            let tried: HashSet<String> = ops.iter().map(ToString::to_string).collect();
            self.failing.retain(|failure| !tried.contains(&failure.op.to_string()));
        }
        self.failing.extend(failures.iter().cloned());
        lasting
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

/// Whether a mark that nobody has any more may still be in the kernel since this has failed.
pub(super) fn keeps_marks(failure: &Failure) -> bool {
    use crate::dataplane::IpvsChange::{AddReal, AddService, SetReal, SetService};
    let adds = |op: &Op| matches!(op, Op::Ipvs(AddService(..) | SetService(..) | AddReal(..) | SetReal(..)));
    !matches!(failure.op, Op::Sysctl { .. } | Op::Timeouts { .. } | Op::PutRoute(_)) && !adds(&failure.op)
}
