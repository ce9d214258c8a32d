//! Whether any agent is ready. Where none is, what the MeshNodes say is of another time.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::model::ids::ServiceKey;

/// None may be ready for so long, as while all are started anew.
const PATIENCE: Duration = Duration::from_secs(60);

/// The agents' DaemonSets, as their statuses count them.
#[derive(Default, Debug)]
pub(super) struct Agents {
    ready: BTreeMap<ServiceKey, i32>,
    /// Whether there has been a DaemonSet: without one agents are run in some other way.
    known: bool,
    none_since: Option<Instant>,
}

impl Agents {
    /// Takes in how many are ready of a DaemonSet, or that it is gone.
    pub(super) fn put(&mut self, key: ServiceKey, ready: Option<i32>) {
        match ready {
            Some(ready) => {
                self.known = true;
                self.ready.insert(key, ready);
            }
            None => drop(self.ready.remove(&key)),
        }
    }

    /// Names of the DaemonSets.
    pub(super) fn names(&self) -> impl Iterator<Item = &ServiceKey> {
        self.ready.keys()
    }

    /// Whether none has been ready for a while.
    pub(super) fn are_gone(&mut self, now: Instant) -> bool {
        if !self.known || self.ready.values().any(|ready| *ready > 0) {
            self.none_since = None;
            return false;
        }
        now.duration_since(*self.none_since.get_or_insert(now)) >= PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_of_some_for_a_while_and_not_none_of_none() {
        let key = || ServiceKey::new("meshlb-system", "meshlb-agent");
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut agents = Agents::default();
        assert!(!agents.are_gone(at(0)) && !agents.are_gone(at(1000)), "there is no DaemonSet");
        agents.put(key(), Some(3));
        assert!(!agents.are_gone(at(1001)));
        agents.put(key(), Some(0));
        assert!(!agents.are_gone(at(1002)) && !agents.are_gone(at(1061)) && agents.are_gone(at(1062)));
        agents.put(key(), Some(1));
        assert!(!agents.are_gone(at(1063)));
        agents.put(key(), None);
        assert!(!agents.are_gone(at(1064)) && agents.are_gone(at(1124)), "it was deleted");
    }
}
