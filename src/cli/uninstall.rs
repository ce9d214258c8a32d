//! `meshlb uninstall`: the end of meshlb in a cluster, and what an agent does about it.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, ListParams, ObjectMeta, PostParams},
    core::DynamicObject,
};
use tracing::{info, warn};

use super::{
    cleanup::{self, Cleaned},
    options::Options,
    print,
};
use crate::{
    admin::Health,
    api::{
        MeshNode, MeshNodeStatus,
        mesh_node::{CLEANED_UP, SERVING},
    },
    meshnode::{
        Report, State, UNINSTALL,
        writer::{Handle, Request},
    },
    metrics::Metrics,
    reconcile::agent::Input,
    source::{self, kube::timed},
};

/// An agent that could not remove everything tries again after this long.
const CLEAN_AGAIN: Duration = Duration::from_secs(10);
/// An agent goes on serving this long after the request was withdrawn: the request goes with the DaemonSet too, a moment
/// before the agents themselves do.
const GRACE: Duration = Duration::from_secs(30);
/// Agents write their reports at most every ten seconds.
const FIRST_REPORTS: Duration = Duration::from_secs(15);
/// How often the agents' reports are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// A request that has no answer by then has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// A request that is there already is replaced by ours so often: somebody else may do the same.
const TRIES: usize = 3;

/// Flags of `meshlb uninstall`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Where the agents run [default: the pod's own]
    #[arg(long, env = "MESHLB_NAMESPACE")]
    namespace: Option<String>,
    /// The agents' DaemonSet: its pods' nodes are waited for, and the request goes when it goes
    #[arg(long, value_name = "NAME")]
    daemonset: Option<String>,
    /// How long the agents are waited for, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    timeout: u64,
    /// Withdraw the request: the agents serve again
    #[arg(long)]
    cancel: bool,
}

/// Asks the agents to clean up, waits for them, and names those that have not.
///
/// # Errors
/// The API server can't be asked, or does not allow it.
pub fn run(options: &Options, arguments: Arguments) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let access = source::kube::config(options.kubeconfig.as_deref())?;
    let namespace = super::controller::namespace(arguments.namespace.clone())
        .context("in which namespace are the agents? Give --namespace")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster {
            client: Client::try_from(access).context("the API server")?,
            namespace,
            daemonset: arguments.daemonset,
        };
        if arguments.cancel { cluster.cancel().await } else { cluster.uninstall(arguments.timeout).await }
    })
}

struct Cluster {
    client: Client,
    namespace: String,
    daemonset: Option<String>,
}

impl Cluster {
    async fn cancel(&self) -> Result<ExitCode> {
        if self.withdraw().await? {
            print::out(format_args!(
                "withdrawn: the agents serve again within {} s\n",
                GRACE.as_secs() + 10
            ))?;
        } else {
            print::out(format_args!("nothing to withdraw: there is no {}\n", self.about()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Deletes the request; whether there was one.
    async fn withdraw(&self) -> Result<bool> {
        match timed(PATIENCE, self.requests().delete(UNINSTALL, &DeleteParams::default())).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(e) => Err(e).context(self.about()),
        }
    }

    fn requests(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn about(&self) -> String {
        format!("ConfigMap {}/{UNINSTALL}", self.namespace)
    }

    async fn uninstall(&self, timeout: u64) -> Result<ExitCode> {
        let daemonset = self.daemonset().await?;
        if let (Some(name), None) = (&self.daemonset, &daemonset) {
            return self.without_agents(name).await;
        }
        let asked = self.ask(daemonset.as_ref()).await?;
        print::out(format_args!("asked by {}: agents clean up and hold off\n", self.about()))?;
        let begun = Instant::now();
        let end = begun + Duration::from_secs(timeout);
        let mut told = BTreeSet::new();
        let left = loop {
            let nodes = self.nodes(daemonset.as_ref(), &asked).await;
            // An API server that is away for a moment is asked again.
            let left = match nodes {
                Ok(nodes) => {
                    for name in nodes.iter().filter(|(_, left)| left.is_none()).map(|(name, _)| name) {
                        if told.insert(name.clone()) {
                            print::out(format_args!("{name}: cleaned up\n"))?;
                        }
                    }
                    let open = nodes.into_iter().filter_map(|(name, left)| Some((name, left?)));
                    open.collect::<BTreeMap<String, String>>()
                }
                Err(e) if Instant::now() >= end => return Err(e),
                Err(e) => [("the API server".to_owned(), format!("{e:#}"))].into(),
            };
            // Without a DaemonSet only reports say which nodes there are, and after an earlier uninstallation there are none yet.
            let nobody = told.is_empty() && daemonset.is_none() && begun.elapsed() < FIRST_REPORTS;
            if (left.is_empty() && !nobody) || Instant::now() >= end {
                break left;
            }
            tokio::time::sleep(LOOK).await;
        };
        if left.is_empty() {
            self.forget().await?;
            print::out(format_args!("{} nodes are clean; MeshServices and the CRDs stay\n", told.len()))?;
            return Ok(ExitCode::SUCCESS);
        }
        for (name, why) in &left {
            print::err(format_args!("node {name} is not cleaned up after {timeout} s: {why}"));
        }
        print::err(format_args!(
            "{} of {} nodes are not cleaned up. The request stays, and a node whose agent comes back cleans up; \
             `meshlb uninstall --cancel` withdraws it",
            left.len(),
            left.len() + told.len()
        ));
        Ok(ExitCode::FAILURE)
    }

    async fn daemonset(&self) -> Result<Option<DaemonSet>> {
        let Some(name) = &self.daemonset else { return Ok(None) };
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), &self.namespace);
        let found = timed(PATIENCE, api.get_opt(name)).await;
        found.with_context(|| format!("DaemonSet {}/{name}", self.namespace))
    }

    /// The agents are gone, as after an uninstallation that was interrupted when they had cleaned up: then no MeshNode says otherwise.
    async fn without_agents(&self, name: &str) -> Result<ExitCode> {
        let about = format!("there is no DaemonSet {}/{name}", self.namespace);
        // To whatever request they had answered, by now nobody serves again.
        let nodes = self.nodes(None, "").await?.into_iter();
        let left: Vec<String> = nodes.filter(|(_, left)| left.is_some()).map(|(name, _)| name).collect();
        if !left.is_empty() {
            bail!(
                "{about}: no agent would clean up, and by their MeshNodes these nodes are not clean: {}. Run `meshlb cleanup` \
                 there and delete the MeshNodes",
                left.join(", ")
            );
        }
        self.forget().await?;
        // The next installation must not find it.
        self.withdraw().await?;
        print::out(format_args!("{about}, and no node that is not clean: there is nothing to do\n"))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Makes the ConfigMap that the agents watch, and returns its uid. One that is there is of an earlier try, which all may have answered
    /// before their reports were deleted, and may belong to nobody: another takes its place.
    async fn ask(&self, daemonset: Option<&DaemonSet>) -> Result<String> {
        let owner = daemonset.and_then(|d| kube::Resource::owner_ref(d, &()));
        let mut map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(UNINSTALL.to_owned()),
                labels: Some([("app.kubernetes.io/part-of".to_owned(), "meshlb".to_owned())].into()),
                owner_references: owner.map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        };
        for _ in 0..TRIES {
            match timed(PATIENCE, self.requests().create(&PostParams::default(), &map)).await {
                Ok(made) => return Ok(made.metadata.uid.unwrap_or_default()),
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    // Whose it was it is still, or it would outlive that.
                    if daemonset.is_none()
                        && let Ok(Some(old)) = timed(PATIENCE, self.requests().get_opt(UNINSTALL)).await
                    {
                        map.metadata.owner_references = old.metadata.owner_references;
                    }
                    self.withdraw().await?;
                }
                Err(e) => return Err(e).with_context(|| self.about()),
            }
        }
        bail!("{} is made again and again: does another uninstallation run?", self.about())
    }

    fn mesh_nodes(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &ApiResource::erase::<MeshNode>(&()))
    }

    /// Every node that has an agent or had one, and what there is left to do.
    async fn nodes(
        &self,
        daemonset: Option<&DaemonSet>,
        asked: &str,
    ) -> Result<BTreeMap<String, Option<String>>> {
        let mut nodes = BTreeMap::new();
        if let Some(selector) = daemonset.and_then(|d| d.spec.as_ref()).map(|spec| &spec.selector) {
            let labels = selector.match_labels.iter().flatten();
            let labels: Vec<String> = labels.map(|(key, value)| format!("{key}={value}")).collect();
            let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
            let pods = timed(PATIENCE, api.list(&ListParams::default().labels(&labels.join(",")))).await;
            for pod in pods.context("the agents' pods")?.items {
                if let Some(node) = pod.spec.and_then(|spec| spec.node_name) {
                    nodes.insert(node, Some("its agent has never reported (it has no MeshNode)".to_owned()));
                }
            }
        }
        let found = timed(PATIENCE, self.mesh_nodes().list(&ListParams::default())).await;
        for object in found.context("MeshNodes")?.items {
            let status = object.data.get("status").cloned().unwrap_or_default();
            let status: MeshNodeStatus = serde_json::from_value(status).unwrap_or_default();
            nodes.insert(object.metadata.name.unwrap_or_default(), left(&status, asked));
        }
        Ok(nodes)
    }

    /// Deletes the reports; an agent that has cleaned up makes none anew.
    async fn forget(&self) -> Result<()> {
        let all = self.mesh_nodes();
        let (how, which) = (DeleteParams::default(), ListParams::default());
        timed(PATIENCE, all.delete_collection(&how, &which))
            .await
            .map(drop)
            .context("MeshNodes can't be deleted")
    }
}

/// What keeps a node from being clean, by its answer to the request of this uid: an earlier one may have been withdrawn since, and its
/// agent may serve again.
fn left(status: &MeshNodeStatus, asked: &str) -> Option<String> {
    let condition = |type_: &str| status.conditions.iter().find(|c| c.type_ == type_);
    match (condition(CLEANED_UP), condition(SERVING)) {
        (Some(cleaned), _) if cleaned.status == "True" && cleaned.message.contains(asked) => None,
        (Some(cleaned), _) if cleaned.status == "True" => {
            Some("its agent has answered another request only, and not this one".to_owned())
        }
        (Some(cleaned), _) => Some(cleaned.message.clone()),
        (None, Some(serving)) => {
            Some(format!("its agent has not answered; it last said {} ({})", serving.reason, serving.message))
        }
        (None, None) => Some("its agent has not answered".to_owned()),
    }
}

/// What an agent does while an uninstallation is asked for: removes everything, says so, and waits for its end.
///
/// # Errors
/// Nothing keeps it from holding off.
pub fn hold_off(
    options: &Options,
    node: &Handle,
    (metrics, health): (&Metrics, &Health),
    inputs: &Receiver<Input>,
) -> Result<ExitCode> {
    info!(
        "an uninstallation is asked for (ConfigMap {UNINSTALL}): everything is removed, and nothing programmed"
    );
    health.set_in_sync(false, "held off for an uninstallation");
    metrics.in_sync(false);
    metrics.services(0);
    let mut clean = false;
    let mut asked: Arc<str> = Arc::default();
    let mut next = Instant::now();
    let mut told = String::new();
    loop {
        health.beat();
        let request = node.request();
        if let Request::Uninstall(by) = &request
            && asked != *by
        {
            // Whoever asks anew is answered anew.
            asked = by.clone();
            (clean, next) = (false, Instant::now());
        }
        if !clean && Instant::now() >= next {
            next = Instant::now() + CLEAN_AGAIN;
            let done = match cleanup::clean(options) {
                Ok(Cleaned { errors, kept }) if errors.is_empty() => {
                    if let Some(kept) = kept {
                        warn!("{kept}");
                    }
                    Ok(())
                }
                Ok(Cleaned { errors, .. }) => Err(errors.join("; ")),
                Err(e) => Err(format!("{e:#}")),
            };
            match &done {
                Ok(()) => info!("nothing of meshlb is left in this network namespace"),
                Err(why) if told != *why => {
                    warn!("not all could be removed, it is tried again: {why}");
                    told.clone_from(why);
                }
                Err(_) => {}
            }
            clean = done.is_ok();
            node.report(Report::of(State::HeldOff { asked: asked.clone(), cleaned: done }));
        }
        match inputs.recv_timeout(Duration::from_secs(1)) {
            Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => {
                info!("stopping; this node's kernel is as it was left");
                return Ok(ExitCode::SUCCESS);
            }
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
        }
        if let Request::None(since) = node.request()
            && since.elapsed() >= GRACE
        {
            info!("the uninstallation was withdrawn: the agent ends, to be started again");
            return Ok(ExitCode::SUCCESS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_not_cleaned_up_is_told_apart() {
        let left = |state: State| left(&Report::of(state).status(None, jiff::Timestamp::UNIX_EPOCH), "u2");
        let held_off = |asked: &str, cleaned| State::HeldOff { asked: asked.into(), cleaned };
        assert_eq!(left(held_off("u2", Ok(()))), None);
        assert_eq!(left(held_off("u2", Err("rules: busy".into()))), Some("rules: busy".into()));
        let stale = left(held_off("u1", Ok(()))).unwrap();
        assert!(stale.contains("another request"), "{stale}");
        let serving = left(State::Serving).unwrap();
        assert!(serving.contains("has not answered") && serving.contains("Serving"), "{serving}");
        assert!(super::left(&MeshNodeStatus::default(), "u2").unwrap().contains("has not answered"));
    }
}
