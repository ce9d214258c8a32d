//! Which of several controllers leads: by a Lease (`coordination.k8s.io/v1`), as client-go's leader election does it.
//!
//! A lease counts from when a controller has *seen* it change, by its own clock: clocks of machines need not agree, and one
//! that jumps does no harm.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

use super::{PATIENCE, timed};

/// Name of the Lease, in the controller's own namespace.
pub const NAME: &str = "meshlb-controller";
/// How long a lease is respected after it was last renewed (client-go's default).
pub const DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long acts no more; less than [`DURATION`] (client-go's default).
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at (client-go's default).
pub const RETRY: Duration = Duration::from_secs(2);

/// A candidate.
pub struct Elector {
    api: Api<Lease>,
    identity: String,
    /// The last state that was seen, and when it was new.
    seen: Option<(Option<LeaseSpec>, Instant)>,
}

/// What came of trying.
#[derive(Debug, PartialEq, Eq)]
pub enum Held {
    /// It is ours, and may be acted on until then.
    Ours(Instant),
    /// It is this one's.
    Others(String),
}

impl Elector {
    /// A candidate of this name, which no other one may have.
    pub fn new(client: Client, namespace: &str, identity: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), identity: identity.to_owned(), seen: None }
    }

    /// Takes the lease if it is free or has run out, renews it if it is ours.
    ///
    /// # Errors
    /// The API server can't be asked or does not allow it.
    pub async fn hold(&mut self) -> Result<Held, kube::Error> {
        let mut last = false;
        let tries = async {
            loop {
                match self.try_to_hold().await? {
                    Some(held) => return Ok(held),
                    None if last => return Ok(Held::Others("another one".into())),
                    // Whoever wrote it need not have wanted it: somebody labels it, say.
                    None => last = true,
                }
            }
        };
        timed(PATIENCE, tries).await
    }

    /// `None` where it was written meanwhile.
    async fn try_to_hold(&mut self) -> Result<Option<Held>, kube::Error> {
        // Counted from before the request: what the API server notes is later.
        let asked = Instant::now();
        let ours = Some(Held::Ours(asked + DEADLINE));
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
                spec: Some(self.record(None)),
            };
            return match self.api.create(&PostParams::default(), &lease).await {
                Ok(_) => Ok(ours),
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
                Err(e) => Err(e),
            };
        };
        if self.seen.as_ref().is_none_or(|(spec, _)| *spec != lease.spec) {
            self.seen = Some((lease.spec.clone(), Instant::now()));
        }
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let since = self.seen.as_ref().map_or(asked, |(_, at)| *at);
        let duration = spec
            .lease_duration_seconds
            .and_then(|s| u64::try_from(s).ok())
            .map_or(DURATION, Duration::from_secs);
        if !holder.is_empty() && holder != self.identity && since.elapsed() < duration {
            return Ok(Some(Held::Others(holder)));
        }
        // With the resource version: whoever was faster has it.
        lease.spec = Some(self.record(Some(&spec)));
        match self.api.replace(NAME, &PostParams::default(), &lease).await {
            Ok(_) => Ok(ours),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Gives the lease up, so that the next one need not wait for its end.
    ///
    /// # Errors
    /// The API server can't be asked; the lease then runs out.
    pub async fn release(&self) -> Result<(), kube::Error> {
        timed(PATIENCE, self.give_up()).await
    }

    async fn give_up(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.api.get_opt(NAME).await? else { return Ok(()) };
        let Some(spec) = lease.spec.as_mut().filter(|s| s.holder_identity.as_deref() == Some(&self.identity))
        else {
            return Ok(());
        };
        spec.holder_identity = Some(String::new());
        self.api.replace(NAME, &PostParams::default(), &lease).await.map(drop)
    }

    fn record(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(jiff::Timestamp::now());
        let mine = old.is_some_and(|o| o.holder_identity.as_deref() == Some(&self.identity));
        let transitions = old.and_then(|o| o.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: if mine { old.and_then(|o| o.acquire_time.clone()) } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(if mine || old.is_none() {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..LeaseSpec::default()
        }
    }
}
