//! Marks of new services and marks of other programs.

use std::collections::BTreeSet;

use super::{Engine, compiling::Compiling};
use crate::{
    dataplane::{Error, executor::Dataplane},
    model::{
        ids::{Family, Mark, ServiceKey},
        kernel::VirtualServerKey,
    },
};

/// How the marks of other programs' services are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Others {
    /// The kernel has been read in this turn, all but surely.
    Seen,
    /// Not for sure: it is asked about each mark that is new.
    Ask,
}

/// So many new marks are asked about one by one.
const FEW: usize = 64;

impl Engine {
    /// Whether every service has the marks that it had in an earlier run.
    pub(super) fn remembers_all(&self) -> bool {
        self.recover.is_none()
            && self.snapshot.services().values().all(|service| self.allocator.remembers(service))
    }

    /// The kernel has none of the retired marks any more: from now on they are anybody's, and who is given one again asks the
    /// kernel first. But a dump may have left one out while others changed their services: that is ours, and still to go.
    pub(super) fn give_marks_back(&mut self) {
        let retired = self.allocator.retired_marks().clone();
        let still = if retired.len() > FEW {
            self.dataplane.ipvs.dump_services(&|mark| retired.contains(&mark)).map(|found| !found.is_empty())
        } else {
            let of = |mark: &Mark| Family::ALL.map(|family| VirtualServerKey { family, mark: *mark });
            let keys: Vec<_> = retired.iter().flat_map(of).collect();
            let found: Result<Vec<_>, Error> =
                keys.into_iter().map(|key| self.dataplane.ipvs.service(key)).collect();
            found.map(|found| found.iter().any(Option::is_some))
        };
        match still {
            Ok(false) => {}
            Ok(true) => {
                self.trusted = false;
                return;
            }
            // It is asked again after the next changes.
            Err(_) => return,
        }
        self.ours.retain(|mark| !retired.contains(mark));
        self.drains.retain(|(server, _), _| !retired.contains(&server.mark));
        self.dirty.extend(self.allocator.commit());
        self.generation += 1;
    }
}

impl Compiling<'_> {
    /// Marks that these services are given for the first time become ours, unless another program has an IPVS service
    /// with one of them since the kernel was read last: then they are given another. Adds to `services` whatever has
    /// to be compiled for it. False where the kernel would have to be asked and can't be now.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub(super) fn take_marks(
        &mut self,
        services: &mut BTreeSet<ServiceKey>,
        others: Others,
        mut kernel: Option<&mut Dataplane>,
    ) -> Result<bool, Error> {
        loop {
            let allocations = services.iter().filter_map(|key| self.allocator.get(key));
            let new: BTreeSet<Mark> = allocations
                .flat_map(|a| a.marks.values())
                .filter(|m| !self.ours.contains(m))
                .copied()
                .collect();
            let mut taken = BTreeSet::new();
            // A dump may lack a service while others change theirs: where asking is cheap, it is asked all the same.
            let ask = match others {
                Others::Ask => !new.is_empty(),
                Others::Seen => kernel.is_some() && (1..=FEW).contains(&new.len()),
            };
            if ask {
                let Some(kernel) = kernel.as_deref_mut() else { return Ok(false) };
                for mark in &new {
                    for family in Family::ALL {
                        if kernel.ipvs.service(VirtualServerKey { family, mark: *mark })?.is_some() {
                            taken.insert(*mark);
                        }
                    }
                }
            }
            if taken.is_empty() {
                self.ours.extend(new);
                return Ok(true);
            }
            taken.extend(self.allocator.foreign_marks());
            let evicted = self.allocator.set_foreign_marks(taken);
            services.extend(self.allocator.update(&evicted, self.snapshot.services()));
            *self.generation += 1;
        }
    }
}
