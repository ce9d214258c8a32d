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
    /// Whether every service has what it had in an earlier run: marks, and published ports that were served.
    pub(super) fn remembers_all(&self) -> bool {
        let none = BTreeSet::new();
        self.recover.is_none()
            && self.snapshot.services().values().all(|service| {
                let served = self.served.get(&service.key).unwrap_or(&none);
                self.allocator.remembers(service)
                    && self.allocator.remembered_ports(&service.key).all(|port| served.contains(&port))
            })
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
