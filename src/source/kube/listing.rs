//! The list that a watch begins with, and begins again with when it could not go on.

use std::collections::HashSet;

use kube::{core::ObjectMeta, runtime::watcher::Event};

use crate::model::ids::ServiceKey;

/// Names that the list which is being read has had so far, and whether one has been read to its end.
#[derive(Default, Debug)]
pub struct Listing {
    seen: Option<HashSet<ServiceKey>>,
    complete: bool,
}

/// What an event comes to: an object that is there, names of those that are gone.
pub struct Change<T> {
    /// New or changed.
    pub put: Option<(ServiceKey, T)>,
    /// Gone.
    pub gone: Vec<ServiceKey>,
}

impl Listing {
    /// Takes in what a watch says. At the end of a list those of `known` that it did not have are gone.
    pub fn take<'a, T: kube::Resource>(
        &mut self,
        event: Event<T>,
        known: impl Iterator<Item = &'a ServiceKey>,
    ) -> Change<T> {
        let mut change = Change { put: None, gone: Vec::new() };
        match event {
            Event::Init => self.seen = Some(HashSet::new()),
            Event::InitApply(object) => {
                let key = key_of(object.meta());
                if let Some(seen) = &mut self.seen {
                    seen.insert(key.clone());
                }
                change.put = Some((key, object));
            }
            Event::InitDone => {
                let seen = self.seen.take().unwrap_or_default();
                let gone: HashSet<&ServiceKey> = known.filter(|key| !seen.contains(*key)).collect();
                change.gone = gone.into_iter().cloned().collect();
                self.complete = true;
            }
            Event::Apply(object) => change.put = Some((key_of(object.meta()), object)),
            Event::Delete(object) => change.gone.push(key_of(object.meta())),
        }
        change
    }

    /// Whether a list has been read to its end once.
    pub fn is_complete(&self) -> bool {
        self.complete
    }
}

fn key_of(meta: &ObjectMeta) -> ServiceKey {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    ServiceKey::new(text(&meta.namespace), text(&meta.name))
}
