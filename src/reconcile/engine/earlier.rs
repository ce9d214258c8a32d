//! What earlier runs have left: their marks, their mask, their ranges.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Engine;
use crate::{
    dataplane::Error,
    model::{
        ids::{Family, PerFamily},
        node::MarkMask,
    },
    plan::Op,
};

impl Engine {
    /// Marks of an earlier run that the kernel can't have from it, since the machine was started anew: whoever has an IPVS
    /// service with one of them is somebody else. Nor does anything drain.
    pub fn forget_marks(&mut self) {
        self.ours.clear();
        self.drains.clear();
    }

    /// The mark mask of an earlier run: what it has left with another mask is ours too, and goes.
    pub fn set_earlier_mask(&mut self, mask: MarkMask) {
        if mask != self.settings.node.mask {
            self.ours.insert(mask.sentinel());
        }
    }

    /// VIP ranges of earlier runs: where they are not in use any more, their routes go.
    pub fn set_earlier_ranges(&mut self, ranges: impl IntoIterator<Item = IpNet>) {
        let used = self.settings.node.ranges;
        let is_used = |range: &IpNet| used.iter().any(|(_, used)| used == range);
        self.earlier_ranges = ranges.into_iter().filter(|range| !is_used(range)).collect();
    }

    /// Those of them whose routes may still be there.
    pub fn earlier_ranges(&self) -> &BTreeSet<IpNet> {
        &self.earlier_ranges
    }

    /// Routes of earlier ranges that are still there.
    pub(super) fn earlier_routes(&mut self) -> Result<Vec<Op>, Error> {
        let mut ops = Vec::new();
        for range in self.earlier_ranges.clone() {
            let family = Family::of(&range.addr());
            let mut asked = PerFamily::default();
            asked.set(family, Some(range));
            if self.dataplane.host.vip_routes(&asked)?.is_empty() {
                self.earlier_ranges.remove(&range);
            } else {
                ops.push(Op::DelRoute(family, range));
            }
        }
        Ok(ops)
    }
}
