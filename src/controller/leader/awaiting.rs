//! Services whose first status waits for their EndpointSlices.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{controller::mesh::Meta, model::ids::ServiceKey};

/// They wait at most this long: Kubernetes makes some twenty slices a second of many services at once, and without any there is
/// nothing to serve.
const FOR_SLICES: Duration = Duration::from_secs(10);

/// Which they are, and since when.
#[derive(Default, Debug)]
pub(super) struct Awaiting(HashMap<ServiceKey, Waits>);

#[derive(Debug)]
struct Waits {
    since: Instant,
    /// Uid and generation of what its headless Service was made for.
    seen: (String, Option<i64>),
}

fn version(meta: &Meta) -> (String, Option<i64>) {
    (meta.uid.clone(), meta.generation)
}

impl Awaiting {
    /// Whether one that has no slices yet still waits for them.
    pub(super) fn waits(&mut self, key: &ServiceKey, meta: &Meta, now: Instant) -> bool {
        let seen = version(meta);
        let waits =
            self.0.entry(key.clone()).or_insert_with(|| Waits { since: now, seen: (String::new(), None) });
        waits.seen = seen;
        now.duration_since(waits.since) < FOR_SLICES
    }

    /// Whether the headless Service of this very version has been looked after: what came of it the watch has yet to say. An edited
    /// selector is applied at once.
    pub(super) fn has_seen(&self, key: &ServiceKey, meta: &Meta) -> bool {
        self.0.get(key).is_some_and(|waits| waits.seen == version(meta))
    }

    /// It waits no longer. Whether it did: what happened to its headless Service meanwhile has to be looked at then.
    pub(super) fn ends(&mut self, key: &ServiceKey) -> bool {
        self.0.remove(key).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_seen_once_and_all_of_them_wait_ten_seconds() {
        let key = ServiceKey::new("default", "vote");
        let meta =
            |uid: &str, generation| Meta { uid: uid.into(), generation: Some(generation), ..Meta::default() };
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut awaiting = Awaiting::default();
        assert!(!awaiting.has_seen(&key, &meta("u1", 1)) && !awaiting.ends(&key));
        assert!(awaiting.waits(&key, &meta("u1", 1), at(0)));
        assert!(awaiting.has_seen(&key, &meta("u1", 1)));
        assert!(!awaiting.has_seen(&key, &meta("u1", 2)), "its selector may have been edited");
        assert!(!awaiting.has_seen(&key, &meta("u2", 1)), "it is another object");
        assert!(awaiting.waits(&key, &meta("u1", 2), at(9)) && awaiting.has_seen(&key, &meta("u1", 2)));
        assert!(!awaiting.waits(&key, &meta("u1", 3), at(10)), "edits don't put its status off");
        assert!(awaiting.ends(&key) && !awaiting.ends(&key));
    }
}
