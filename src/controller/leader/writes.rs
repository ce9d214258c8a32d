//! What the leader writes, while the lease is its own.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Result, bail};
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::ObjectReference;
use tracing::{debug, info, warn};

use super::{AGAIN_MOST, AGAIN_SOON, AT_ONCE, Failed, HEADLESS_AGAIN, Leader};
use crate::{
    api::{self, status::MeshServiceStatus},
    controller::{
        headless::{self, Todo},
        mesh::Meta,
        order, requests,
        status::{self, News},
    },
    model::ids::ServiceKey,
};

/// A service's status: of that version of it, the one that it has, and the one that it is to have.
pub(super) type Write = (ServiceKey, Meta, MeshServiceStatus, MeshServiceStatus);

impl Leader {
    /// Enters all that is in use. Whether that went well; what did not is tried again.
    pub(super) async fn write_pools(&mut self) -> Result<bool> {
        let result = self.pools.write(&self.mesh.used()).await;
        if !matches!(result, Ok(0)) {
            self.report.metrics.wrote("pool", requests::outcome(&result));
        }
        match result {
            Ok(_) => Ok(true),
            // Another one has written it, or it was deleted: it has to be taken over anew.
            Err(e) if requests::has_changed(&e) => bail!("the pool objects have changed: {e}"),
            Err(e) => {
                self.tell(cause("pool", &e), &format!("the pool objects can't be written: {e}"));
                Ok(false)
            }
        }
    }

    /// Once for one cause, whichever of many services it is told of.
    fn tell(&mut self, cause: String, problem: &str) {
        if self.told.as_ref() != Some(&cause) {
            warn!("{problem}; it is tried again");
            self.told = Some(cause);
        }
    }

    /// Writes statuses of services that give something up, some of which may get what another one of them gives up. Whether any has to wait
    /// for others than these.
    pub(super) async fn write_in_order(&mut self, mut writes: Vec<Write>) -> Result<bool> {
        let mut waits = self.mesh.too_early(writes.iter().map(|w| (&w.0, &w.3)));
        while !writes.is_empty() {
            let next = order::next(&writes.iter().map(|w| w.0.clone()).collect(), &waits);
            if next.is_empty() {
                return Ok(true);
            }
            let (now, left) = writes.into_iter().partition(|w| next.contains(&w.0));
            writes = left;
            self.write_statuses(now).await?;
            waits.retain(|_, others| {
                others.retain(|other| !next.contains(other) || self.failed.contains_key(other));
                !others.is_empty()
            });
        }
        Ok(false)
    }

    pub(super) async fn write_statuses(&mut self, writes: Vec<Write>) -> Result<()> {
        let (client, fence) = (&self.client, &self.fence);
        let mut done = stream::iter(writes)
            .map(|(key, meta, old, new)| async move {
                let result = fence.within(requests::write(client, &key, &meta, &new)).await;
                (key, meta, old, new, result)
            })
            .buffer_unordered(AT_ONCE);
        let mut problem = None;
        let mut events = Vec::new();
        while let Some((key, meta, old, new, result)) = done.next().await {
            if let Some(result) = &result {
                self.report.metrics.wrote("status", requests::outcome(result));
            }
            match result {
                None => bail!("the lease could not be renewed in time"),
                Some(Ok(version)) => {
                    let first = status::held(&old).is_empty() && status::differ(&old, &new);
                    events.push((key.clone(), meta, status::news(&old, &new), first));
                    self.written.insert(key.clone(), Instant::now());
                    self.failed.remove(&key);
                    self.mesh.written(&key, new, version);
                    if self.awaiting.ends(&key) {
                        self.mesh.look_again(&key);
                    }
                }
                Some(Err(e)) => {
                    if requests::has_changed(&e) {
                        debug!("{key}: {e}");
                    } else {
                        problem =
                            Some((cause("status", &e), format!("the status of {key} can't be written: {e}")));
                    }
                    // What is wrong with the request stays so; a server or a webhook comes back.
                    let stays = matches!(&e, kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 429);
                    let most = if stays { AGAIN_MOST } else { AGAIN_SOON };
                    let failed = Failed::now(meta.resource_version, self.failed.get(&key), most);
                    self.failed.insert(key, failed);
                }
            }
        }
        drop(done);
        if let Some((cause, text)) = problem {
            self.tell(cause, &text);
        }
        for (key, meta, mut news, first) in events {
            if first && !news.is_empty() && !self.first.take(1, Instant::now()) {
                news.retain(|news| !news.good);
            }
            self.announce(&key, &meta, news);
        }
        Ok(())
    }

    fn announce(&self, key: &ServiceKey, meta: &Meta, news: Vec<News>) {
        let about = ObjectReference {
            api_version: Some(api::API_VERSION.to_owned()),
            kind: Some(api::KIND.to_owned()),
            namespace: Some(key.namespace.to_string()),
            name: Some(key.name.to_string()),
            uid: Some(meta.uid.clone()),
            ..ObjectReference::default()
        };
        for news in news {
            info!("{key}: {}: {}", news.reason, news.message);
            if self.events.try_send((news, about.clone())).is_err() {
                debug!("{key}: there are too many Events");
            }
        }
    }

    /// Makes, changes and deletes the headless Services of these MeshServices.
    pub(super) async fn keep_headless(&mut self, keys: &BTreeSet<ServiceKey>) -> Result<()> {
        let mut work: Vec<(ServiceKey, Todo)> = Vec::new();
        for key in keys {
            if self.headless_failed.get(key).is_some_and(|at| at.elapsed() < HEADLESS_AGAIN) {
                continue;
            }
            match self.todo(key) {
                Some(todo) => work.push((key.clone(), todo)),
                None => self.headless_is_kept(key),
            }
        }
        let (client, fence) = (&self.client, &self.fence);
        let mut done = stream::iter(work)
            .map(|(key, todo)| async move {
                let result = fence.within(requests::keep_headless(client, &key, todo)).await;
                (key, result)
            })
            .buffer_unordered(AT_ONCE);
        let mut results = Vec::new();
        while let Some(result) = done.next().await {
            results.push(result);
        }
        drop(done);
        for (key, result) in results {
            if let Some(result) = &result {
                self.report.metrics.wrote("headless", requests::outcome(result));
            }
            match result {
                None => bail!("the lease could not be renewed in time"),
                Some(Ok(())) => self.headless_is_kept(&key),
                Some(Err(e)) => {
                    // There is one, or another one: the watch says which.
                    if !requests::has_changed(&e) {
                        let problem = format!("the headless Service can't be kept: {e}");
                        self.mesh.headless_problem(&key, Some(problem));
                    }
                    self.headless_failed.insert(key, Instant::now());
                }
            }
        }
        Ok(())
    }

    fn headless_is_kept(&mut self, key: &ServiceKey) {
        self.headless_failed.remove(key);
        self.mesh.headless_problem(key, None);
    }

    /// What a MeshService's headless Service is in need of.
    fn todo(&self, key: &ServiceKey) -> Option<Todo> {
        let entry = self.mesh.entry(key)?;
        headless::todo(&entry.meta.uid, &entry.headless, self.mesh.core(key))
    }
}

/// What many failures have in common: the text of one names its object, between quotation marks.
fn cause(what: &str, error: &kube::Error) -> String {
    let text = match error {
        kube::Error::Api(status) => status.message.split('"').step_by(2).collect(),
        other => other.to_string(),
    };
    format!("{what}: {text}")
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn failures_with_one_cause_are_told_once() {
        let denied = |name: &str, why: &str| {
            let message = format!("admission webhook \"a.b\" denied \"{name}\": {why}");
            kube::Error::Api(Box::new(Status::failure(&message, "Forbidden").with_code(403)))
        };
        assert_eq!(cause("status", &denied("one", "no")), cause("status", &denied("two", "no")));
        assert_ne!(cause("status", &denied("one", "no")), cause("status", &denied("one", "not so")));
        assert_ne!(cause("status", &denied("one", "no")), cause("pool", &denied("one", "no")));
    }
}
