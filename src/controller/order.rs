//! In which order statuses are written where one service gets what another one gives up.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::ids::ServiceKey;

/// Services that wait, each with those whose statuses still say what it is to have.
pub type Waits = BTreeMap<ServiceKey, BTreeSet<ServiceKey>>;

/// Which of these statuses come next: those that wait for nothing. Where all wait for one another in a circle, one of it has to be the
/// first: two statuses say the same then, until the next one is written. None if all wait for others than these.
pub fn next(all: &BTreeSet<ServiceKey>, waits: &Waits) -> BTreeSet<ServiceKey> {
    let free: BTreeSet<ServiceKey> = all.iter().filter(|key| !waits.contains_key(*key)).cloned().collect();
    if !free.is_empty() {
        return free;
    }
    // Those that don't wait for anybody else, whom nothing here could hurry.
    let mut among = all.clone();
    loop {
        let before = among.len();
        let left = among.clone();
        among.retain(|key| waits.get(key).is_some_and(|of| of.is_subset(&left)));
        if among.len() == before {
            break;
        }
    }
    let mut seen = BTreeSet::new();
    let mut key = among.first();
    while let Some(at) = key {
        if !seen.insert(at) {
            return [at.clone()].into();
        }
        key = waits.get(at).and_then(BTreeSet::first);
    }
    BTreeSet::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey::new("default", name)
    }

    /// The order of these, of which each waits for those behind its name; what is never written is left out.
    fn order(of: &[(&str, &[&str])]) -> Vec<String> {
        let mut all: BTreeSet<_> = of.iter().map(|(name, _)| key(name)).collect();
        let waiting = of.iter().filter(|(_, others)| !others.is_empty());
        let mut waits: Waits =
            waiting.map(|(name, others)| (key(name), others.iter().map(|o| key(o)).collect())).collect();
        let mut out = Vec::new();
        loop {
            let next = next(&all, &waits);
            if next.is_empty() {
                return out;
            }
            out.push(next.iter().map(|key| &*key.name).collect::<Vec<_>>().join(" "));
            all.retain(|key| !next.contains(key));
            waits.retain(|key, others| {
                others.retain(|other| !next.contains(other));
                !next.contains(key) && !others.is_empty()
            });
        }
    }

    #[test]
    fn who_gives_is_written_before_who_takes() {
        assert_eq!(order(&[("a", &["b"]), ("b", &["c"]), ("c", &[]), ("d", &[])]), ["c d", "b", "a"]);
        assert_eq!(order(&[("a", &["elsewhere"]), ("b", &["a"]), ("c", &[])]), ["c"]);
    }

    #[test]
    fn of_a_circle_one_is_the_first() {
        assert_eq!(order(&[("a", &["b"]), ("b", &["a"])]), ["a", "b"]);
        // Who waits for one of the circle is not in it, and who waits for somebody else is left.
        let all: [(&str, &[&str]); 4] =
            [("a", &["c"]), ("b", &["c"]), ("c", &["b"]), ("d", &["b", "elsewhere"])];
        assert_eq!(order(&all), ["c", "a b"]);
    }
}
