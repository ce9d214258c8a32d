//! Marks of new services and marks of other programs.

use std::collections::{BTreeSet, HashSet};

use super::{Engine, compiling::Compiling};
use crate::{
    dataplane::{Error, executor::Dataplane},
    model::{
        ids::{Family, Mark, ServiceKey},
        kernel::VirtualServerKey,
    },
    plan::Op,
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

    /// What the kernel has of the retired marks no more is anybody's from now on: who is given one again asks the kernel first.
    /// These IPVS services were just `deleted`: one that is there now is somebody else's. But another may have been left out by a
    /// dump while others changed their services: that is ours, and still to go.
    pub(super) fn give_marks_back(&mut self, deleted: &HashSet<VirtualServerKey>) {
        let mut retired = self.allocator.retired_marks() - &self.marks_left_alone();
        if !self.failing.is_empty() {
            // Entries of another renderer, about which nothing is known.
            if self.failing.iter().any(|failure| matches!(failure.op, Op::RemoveLeftovers(_))) {
                return;
            }
            // What could not be changed may lead there.
            for mark in self.known.elements.values().flatten() {
                retired.remove(mark);
            }
            // Nor is it news that what could not be deleted is there.
            for key in self.known.virtual_servers.keys() {
                retired.remove(&key.mark);
            }
        }
        // What was never ours, since it was another program's before, is not asked about either.
        let asked: Vec<_> =
            retired.intersection(&self.ours).flat_map(keys).filter(|key| !deleted.contains(key)).collect();
        // Where it can't be asked it is asked again with the next changes, or the next full comparison.
        let Ok(there) = self.which_are_there(&asked) else { return };
        self.trusted &= there.is_empty();
        let free: BTreeSet<Mark> = retired.difference(&there).copied().collect();
        if free.is_empty() {
            return;
        }
        self.ours.retain(|mark| !free.contains(mark));
        self.drains.retain(|(server, _), _| !free.contains(&server.mark));
        self.dirty.extend(self.allocator.commit(&free));
        self.generation += 1;
    }

    /// Marks of those of these IPVS services that the kernel has.
    fn which_are_there(&mut self, asked: &[VirtualServerKey]) -> Result<BTreeSet<Mark>, Error> {
        let mut there = BTreeSet::new();
        if asked.len() > FEW {
            let keys: HashSet<_> = asked.iter().collect();
            let marks: HashSet<Mark> = asked.iter().map(|key| key.mark).collect();
            let found = self.dataplane.ipvs.dump_services(&|mark| marks.contains(&mark))?;
            there.extend(found.keys().filter(|key| keys.contains(key)).map(|key| key.mark));
            return Ok(there);
        }
        ask_singly(&mut self.dataplane, asked, &mut there)?;
        Ok(there)
    }
}

/// Asks about one IPVS service after another, and adds the marks of those that are there.
fn ask_singly(
    kernel: &mut Dataplane,
    asked: &[VirtualServerKey],
    there: &mut BTreeSet<Mark>,
) -> Result<(), Error> {
    for key in asked {
        if kernel.ipvs.service(*key)?.is_some() {
            there.insert(key.mark);
        }
    }
    Ok(())
}

/// A mark's IPVS services.
fn keys(mark: &Mark) -> [VirtualServerKey; 2] {
    Family::ALL.map(|family| VirtualServerKey { family, mark: *mark })
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
                ask_singly(kernel, &new.iter().flat_map(keys).collect::<Vec<_>>(), &mut taken)?;
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
