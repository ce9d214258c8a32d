//! Lookups that run. Who asks what is being looked up already waits for the same answer, and costs no upstream a question.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use hickory_proto::op::Query;

use super::answer::Answer;

/// So long others join a lookup. Who asks later asks again, mostly, and what has gone wrong with the first shall not be the answer
/// once more.
const YOUNG: Duration = Duration::from_secs(1);

/// One of them.
type Lookup = BoxFuture<'static, Arc<Answer>>;

/// All of them. Each goes on while there is someone who waits for it.
#[derive(Clone, Default)]
pub struct Running(Arc<Mutex<Lookups>>);

#[derive(Default)]
struct Lookups {
    begun: u64,
    /// By question the last one, with its number and its begin.
    all: HashMap<Query, (u64, Instant, WeakShared<Lookup>)>,
}

impl Running {
    /// The lookup of a question that runs, else the one that `begin` gives.
    pub fn join(
        &self,
        query: &Query,
        now: Instant,
        begin: impl FnOnce() -> Option<Lookup>,
    ) -> Option<Shared<Lookup>> {
        let mut lookups = self.lookups();
        let young =
            lookups.all.get(query).filter(|(_, begun, _)| now.saturating_duration_since(*begun) < YOUNG);
        if let Some(running) = young.and_then(|(.., lookup)| lookup.upgrade()) {
            return Some(running);
        }
        let lookup = begin()?;
        lookups.begun += 1;
        let n = lookups.begun;
        let entry = Entry { of: self.clone(), query: query.clone(), n };
        let lookup = async move {
            let answer = lookup.await;
            drop(entry);
            answer
        };
        let lookup = lookup.boxed().shared();
        lookups.all.extend(lookup.downgrade().map(|lookup| (query.clone(), (n, now, lookup))));
        Some(lookup)
    }

    fn lookups(&self) -> MutexGuard<'_, Lookups> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a lookup out of the list when it is over, or when nobody waits for it any more.
struct Entry {
    of: Running,
    query: Query,
    n: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut lookups = self.of.lookups();
        // The question may have been asked again since.
        if lookups.all.get(&self.query).is_some_and(|(n, ..)| *n == self.n) {
            lookups.all.remove(&self.query);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending};

    use hickory_proto::rr::{Name, RecordType};

    use super::*;

    #[test]
    fn a_question_is_looked_up_once_at_a_time() {
        let running = Running::default();
        let query = |name: &str| Query::query(Name::from_ascii(name).unwrap(), RecordType::A);
        let begun = Cell::new(0);
        let start = Instant::now();
        let join_at = |name: &str, seconds, lookup: fn() -> Lookup| {
            let begin = || {
                begun.set(begun.get() + 1);
                Some(lookup())
            };
            running.join(&query(name), start + Duration::from_secs(seconds), begin).unwrap()
        };
        let join = |name: &str, lookup: fn() -> Lookup| join_at(name, 0, lookup);
        let done = || async { Arc::default() }.boxed();
        let never = || pending().boxed();
        let (one, same) = (join("a.example.", done), join("A.example.", done));
        assert_eq!(begun.get(), 1);
        let (one, same) = (one.now_or_never().unwrap(), same.now_or_never().unwrap());
        assert!(Arc::ptr_eq(&one, &same));
        // It is over, and the next one begins anew; so does one that nobody waits for any more.
        let again = join("a.example.", never);
        assert!(begun.get() == 2 && again.clone().now_or_never().is_none());
        drop(again);
        assert!(running.lookups().all.is_empty());
        drop((join("a.example.", never), join("b.example.", never)));
        assert_eq!(begun.get(), 4);
        // Who comes late has a lookup of its own, which others join.
        let old = join("a.example.", never);
        let new = join_at("a.example.", 2, done);
        drop(old);
        assert!(join_at("a.example.", 2, never).now_or_never().is_some());
        assert_eq!(begun.get(), 6);
        assert!(new.now_or_never().is_some() && running.lookups().all.is_empty());
        // There is no place for it.
        assert!(running.join(&query("a.example."), start, || None).is_none());
    }
}
