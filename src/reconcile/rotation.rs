//! Which destinations the cheap look takes next.

use std::time::Duration;

use crate::model::kernel::{KernelState, VirtualServerKey};

/// Services whose destinations are looked at one after another, some with each probe.
#[derive(Debug)]
pub struct Rotation {
    /// Those that are left of this round.
    left: Vec<VirtualServerKey>,
    /// So many with each probe at most.
    pub most: usize,
    /// And at least, however long it takes.
    pub least: usize,
    /// Not begun after this time.
    pub budget: Duration,
}

impl Rotation {
    /// With each probe `least` to `most` services, in `budget` where that is enough.
    pub fn new(least: usize, most: usize, budget: Duration) -> Self {
        Self { left: Vec::new(), most, least, budget }
    }

    /// The next one; it may be gone by now.
    pub fn next(&mut self, known: &KernelState) -> Option<VirtualServerKey> {
        if self.left.is_empty() {
            self.left.extend(known.virtual_servers.keys());
        }
        self.left.pop()
    }
}
