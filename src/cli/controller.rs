//! `meshlb controller`: gives services their virtual IPs and published ports, in Kubernetes.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tracing::info;

use super::{agent::serve_admin, options::Options};
use crate::{
    admin::Health,
    controller::{self, Settings, Told},
    metrics::controller::ControllerMetrics,
    source,
};

/// `/livez` fails when the election has not come round for this long: a request to an API server that hangs may take a while.
const STALLED_AFTER: Duration = Duration::from_secs(120);
/// Where a pod finds its namespace.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// The namespace of what belongs to the installation: the one that is given, else the pod's own.
pub fn namespace(given: Option<String>) -> Option<String> {
    given
        .or_else(|| std::fs::read_to_string(NAMESPACE_FILE).ok().map(|text| text.trim().to_owned()))
        .filter(|text| !text.is_empty())
}

/// Runs until [`super::signals::stop`], then gives the Lease up.
///
/// # Errors
/// What kept it from starting.
pub fn run(options: &Options, given: Option<String>, identity: Option<String>) -> Result<ExitCode> {
    super::log(options)?;
    let access = source::kube::config(options.kubeconfig.as_deref())?;
    let node = options.settings()?.node;
    let namespace = namespace(given)
        .context("in which namespace are the Lease and the pool objects? Give --namespace")?;
    // No two may have the same, and in containers names and process ids can be.
    let identity = identity.unwrap_or_else(|| {
        let chance = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
        format!("{}_{:08x}", node.name, chance >> 32)
    });
    let url = access.cluster_url.to_string();
    let ranges: Vec<String> = node.ranges.iter().map(|(_, range)| range.to_string()).collect();
    info!(%identity, namespace, ranges = ranges.join(" "), "controller starts");
    let health = Health::of("election", STALLED_AFTER);
    health.set_in_sync(false, "nobody has been asked who leads");
    let metrics = ControllerMetrics::new();
    if let Some(addr) = options.metrics_listen.0 {
        serve_admin(addr, Arc::new(metrics.clone()), health.clone())?;
    }
    let settings = Settings { node, namespace, identity, url };
    let told = Told { health, metrics };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = super::signals::stop()?;
        controller::run(access, settings, stop, told).await
    })?;
    Ok(ExitCode::SUCCESS)
}
