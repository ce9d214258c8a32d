//! The controller: gives every MeshService of a cluster its virtual IPs and published ports and says so in its status.
//!
//! ```text
//! Lease ─► leader ─► watches ─► Mesh (pure) ─► pool objects ─► statuses, headless Services, Events
//! ```
//! The agents take what a status grants, and nothing else: a cluster whose controller is away serves on as it is.

pub mod headless;
pub mod leader;
pub mod lease;
pub mod mesh;
pub mod nodes;
pub mod numbers;
mod order;
pub mod pace;
pub mod pools;
pub mod requests;
pub mod status;
#[cfg(test)]
mod tests;

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use kube::{Client, Config};
use tracing::{error, info, warn};

pub use crate::source::kube::timed;
use crate::{admin::Health, metrics::controller::ControllerMetrics, model::node::NodeConfig};
use leader::Fence;
use lease::{Elector, Held, RETRY};

/// A request that has no answer by then has failed; less than the lease is respected beyond its deadline.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a controller needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// VIP ranges, publish range and reserved ports of the mesh.
    pub node: NodeConfig,
    /// Where its Lease and the pool objects are.
    pub namespace: String,
    /// Its own name among controllers.
    pub identity: String,
    /// The API server, for messages.
    pub url: String,
}

/// Where a controller says how it is.
#[derive(Clone)]
pub struct Told {
    /// `/livez` and `/readyz`.
    pub health: Health,
    /// `/metrics`.
    pub metrics: ControllerMetrics,
}

/// Runs until `stop` is there: waits for the Lease, leads, and gives the Lease up at the end.
///
/// # Errors
/// What kept it from starting.
pub async fn run(
    access: Config,
    settings: Settings,
    stop: impl Future<Output = ()>,
    report: Told,
) -> Result<()> {
    let client = Client::try_from(access).with_context(|| format!("API server {}", settings.url))?;
    let mut elector = Elector::new(client.clone(), &settings.namespace, &settings.identity);
    let mut stop = std::pin::pin!(stop);
    let mut other = String::new();
    let mut told = String::new();
    loop {
        let held = tokio::select! {
            () = &mut stop => return Ok(()),
            held = elector.hold() => held,
        };
        match held {
            Ok(Held::Ours(until)) => {
                other.clear();
                // One that fails at once tries again and again, and says so once.
                if told.is_empty() {
                    info!(identity = settings.identity, "this controller leads");
                }
                report.health.set_synced(false);
                report.health.set_good("this controller leads");
                report.metrics.leads(true);
                let ended = tokio::select! {
                    () = &mut stop => None,
                    why = reign(&client, &settings, &mut elector, until, &report) => Some(why),
                };
                report.metrics.leads(false);
                let Some(why) = ended else { break };
                let message = format!("this controller leads no longer: {why:#}");
                report.health.set_in_sync(false, message.as_str());
                if message != told {
                    error!("{message}");
                    told = message;
                }
            }
            Ok(Held::Others(holder)) => {
                told.clear();
                report.health.set_idle(format!("{holder} leads"));
                if holder != other {
                    info!(leader = holder, "another controller leads");
                    other = holder;
                }
            }
            Err(e) => {
                let message =
                    format!("the Lease {}/{} can't be asked for: {e}", settings.namespace, lease::NAME);
                report.health.set_in_sync(false, message.as_str());
                if message != told {
                    warn!("{message}");
                    told = message;
                }
            }
        }
        report.health.beat();
        tokio::select! {
            () = &mut stop => return Ok(()),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
    if let Err(e) = elector.release().await {
        warn!("the Lease can't be given up, it runs out by itself: {e}");
    }
    Ok(())
}

/// Leads for as long as the lease can be renewed. Returns why it ended.
async fn reign(
    client: &Client,
    settings: &Settings,
    elector: &mut Elector,
    until: Instant,
    report: &Told,
) -> anyhow::Error {
    let fence = Fence::new(until);
    let renew = async {
        loop {
            tokio::time::sleep(RETRY).await;
            match elector.hold().await {
                Ok(Held::Ours(until)) => {
                    fence.extend(until);
                    report.health.beat();
                }
                Ok(Held::Others(holder)) => return anyhow::anyhow!("{holder} has the Lease"),
                Err(e) if fence.is_over() => return anyhow::anyhow!("the Lease can't be renewed: {e}"),
                Err(e) => warn!("the Lease can't be renewed: {e}"),
            }
        }
    };
    tokio::select! {
        why = renew => why,
        result = leader::lead(client.clone(), settings, report, fence.clone()) => match result {
            Ok(never) => match never {},
            Err(e) => e,
        },
    }
}
