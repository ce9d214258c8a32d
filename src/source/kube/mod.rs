//! The API server as a source: MeshServices, EndpointSlices, and this node's own Node for its addresses and zone.
//!
//! Each kind has a watch that lists first and resumes or lists again by itself. Nothing that the data path depends on
//! changes while the API server can't be reached; the first complete lists are what [`SourceMessage::Synced`] waits for.
//! Changes are passed on as they arrive, those that are there together as one message: no change waits for another.

mod feed;
pub mod listing;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::Path,
    sync::mpsc::Sender,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{Stream, StreamExt, stream};
use ipnet::IpNet;
use k8s_openapi::api::{core::v1::Node, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, Config,
    api::{ApiResource, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::DynamicObject,
    runtime::{WatchStreamExt, utils::ResetTimerBackoff, watcher},
};

use super::{
    Loaded, SourceMessage,
    object::Kind,
    problem::{Problem, Severity, unread},
};
use crate::{
    api::{MeshService, SERVICE_NAME_LABEL},
    model::{
        ids::{Family, PerFamily, ServiceKey},
        node::{NodeConfig, NodeSays},
        refusal::Refusal,
        unread::Hides,
    },
};
pub use feed::without_bulk;
use feed::{Feed, KINDS};

/// First and longest pause after a watch has failed. An API server that is back is noticed within the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// A watch that went well for this long begins with the first pause again.
const RECOVERED: Duration = Duration::from_secs(30);
/// A watch that has not failed again for this long goes on: longer than the longest pause and a connection that times out.
const STILL_BROKEN: Duration = Duration::from_secs(45);
/// As many changes go on as one message, at most.
const CHUNK: usize = 1000;
/// Objects are listed so many at a time.
const PAGE: u32 = 500;

/// How the API server is found and who we are to it: a kubeconfig file, or what `KUBECONFIG`, `~/.kube/config` or the pod's
/// service account say.
///
/// # Errors
/// What is missing or wrong, in one line.
pub fn config(kubeconfig: Option<&Path>) -> Result<Config> {
    runtime()?.block_on(find_config(kubeconfig))
}

/// A connection that says nothing for so long is given up. Watches with bookmarks, as ours are, mostly hear something each minute
/// (defaultBookmarkFrequency of the API server's watch cache).
const SILENCE: Duration = Duration::from_secs(100);

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn find_config(kubeconfig: Option<&Path>) -> Result<Config> {
    let mut config = match kubeconfig {
        Some(file) => {
            let about = || format!("--kubeconfig {}", file.display());
            let kubeconfig = Kubeconfig::read_from(file).with_context(about)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(about)?
        }
        None => match Config::infer().await {
            Ok(config) => config,
            Err(e) => bail!(
                "no API server: there is neither a kubeconfig nor a service account here ({e}); give --kubeconfig FILE, or \
                 --source DIR for a folder"
            ),
        },
    };
    // A connection that hangs must be noticed: an API server that is gone without a word would otherwise be listened to for
    // the five minutes of a watch, and for ever when it was asked for a list.
    config.connect_timeout = Some(Duration::from_secs(10));
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    // Whoever asks tries again at a pace of its own; the client's own way may wait for minutes.
    config.default_retry = false;
    Ok(config)
}

/// Follows the API server in a thread of its own, until the receiver of the messages is gone. Where `node_required`, this
/// node's Node has to be there before it is synced.
///
/// # Errors
/// The thread can't be started.
pub fn watch(
    access: Config,
    config: NodeConfig,
    node_required: bool,
    sender: Sender<SourceMessage>,
) -> io::Result<JoinHandle<()>> {
    let runtime = runtime()?;
    std::thread::Builder::new().name("kube".into()).spawn(move || {
        runtime.block_on(async {
            let url = access.cluster_url.to_string();
            let client = match Client::try_from(access) {
                Ok(client) => client,
                // A proxy or a TLS setting that this build does not have.
                Err(e) => return tracing::error!("API server {url}: {e}"),
            };
            let node = config.name.to_string();
            let follower = Follower {
                url,
                feed: Feed::new(config),
                node,
                node_required,
                node_seen: false,
                no_node: false,
                broken: BTreeMap::new(),
                told: Vec::new(),
                refused: BTreeMap::new(),
                synced: false,
                sender,
            };
            follower.run(client).await;
        });
    })
}

/// The kinds that are watched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Watch {
    Objects(Kind),
    Node,
}

impl Watch {
    /// As RBAC rules call it.
    fn resource(self) -> &'static str {
        match self {
            Self::Objects(Kind::Service) => "meshservices.meshlb.dev",
            Self::Objects(Kind::Slice) => "endpointslices.discovery.k8s.io",
            Self::Node => "nodes",
        }
    }
}

/// What a watch says.
enum Said {
    Object(Kind, Box<watcher::Event<DynamicObject>>),
    Node(Box<watcher::Event<Node>>),
    Failed(Watch, watcher::Error),
}

/// The receiver is gone.
struct Gone;

struct Follower {
    url: String,
    feed: Feed,
    /// The node that is told about.
    node: String,
    /// Without it nothing is synced.
    node_required: bool,
    node_seen: bool,
    /// There is none of that name.
    no_node: bool,
    /// Watches that have failed since they last said anything, why, and when.
    broken: BTreeMap<Watch, (String, Instant)>,
    told: Vec<Problem>,
    /// What was told of [`Feed::refused`].
    refused: BTreeMap<ServiceKey, Refusal>,
    synced: bool,
    sender: Sender<SourceMessage>,
}

impl Follower {
    async fn run(mut self, client: Client) {
        let mut streams: Vec<stream::BoxStream<'static, Said>> =
            KINDS.iter().map(|kind| objects(client.clone(), *kind).boxed()).collect();
        streams.push(own_node(client, &self.node).boxed());
        let mut said = stream::select_all(streams).ready_chunks(CHUNK);
        let mut tick = tokio::time::interval(PAUSE.1 / 2);
        loop {
            let chunk = tokio::select! {
                chunk = said.next() => chunk.unwrap_or_default(),
                _ = tick.tick() => Vec::new(),
            };
            if self.take(chunk, Instant::now()).is_err() {
                return;
            }
        }
    }

    fn take(&mut self, chunk: Vec<Said>, seen: Instant) -> Result<(), Gone> {
        let mut events = Vec::new();
        for said in chunk {
            match said {
                Said::Object(kind, event) => {
                    // It says that it begins before it has asked.
                    if !matches!(*event, watcher::Event::Init) {
                        self.broken.remove(&Watch::Objects(kind));
                    }
                    self.feed.take(kind, *event, &mut events);
                }
                Said::Node(event) => self.take_node(*event)?,
                Said::Failed(watch, error) => {
                    if let Some(message) = why(&self.url, watch.resource(), &error) {
                        self.broken.insert(watch, (message, seen));
                    }
                }
            }
        }
        // A watch that goes on has nothing to say while nothing changes; one that does not fails again.
        self.broken.retain(|_, (_, at)| seen.duration_since(*at) < STILL_BROKEN);
        let problems: Vec<Problem> = self.problems();
        // That something can be read again is told after what was read.
        let mended = !unread(&self.told).is_within(&unread(&problems));
        if !mended {
            self.tell_problems(&problems)?;
        }
        if !events.is_empty() {
            self.send(SourceMessage::Events(events, seen))?;
        }
        self.tell_problems(&problems)?;
        if self.refused != *self.feed.refused() {
            self.refused.clone_from(self.feed.refused());
            self.send(SourceMessage::Refused(self.refused.clone()))?;
        }
        if !self.synced && self.feed.is_synced() && self.node_seen {
            self.synced = true;
            self.send(SourceMessage::Synced)?;
        }
        Ok(())
    }

    fn tell_problems(&mut self, problems: &[Problem]) -> Result<(), Gone> {
        if problems == self.told {
            return Ok(());
        }
        self.told = problems.to_vec();
        self.send(SourceMessage::Problems(problems.to_vec()))
    }

    fn take_node(&mut self, event: watcher::Event<Node>) -> Result<(), Gone> {
        match event {
            watcher::Event::Apply(node) | watcher::Event::InitApply(node) => {
                self.broken.remove(&Watch::Node);
                (self.node_seen, self.no_node) = (true, false);
                self.send(SourceMessage::Node(what_it_says(&node)))
            }
            watcher::Event::InitDone => {
                self.no_node = !self.node_seen && self.node_required;
                self.node_seen |= !self.node_required;
                Ok(())
            }
            watcher::Event::Init | watcher::Event::Delete(_) => Ok(()),
        }
    }

    fn problems(&self) -> Vec<Problem> {
        let no_node = self.no_node.then(|| {
            let name = &self.node;
            format!(
                "there is no Node {name}: give --node the name that `kubectl get nodes` shows, or --node-ip"
            )
        });
        // Who can't be reached can't be for any of the watches: that is one problem.
        let broken: BTreeSet<&String> = self.broken.values().map(|(message, _)| message).collect();
        let messages = no_node.into_iter().chain(broken.into_iter().cloned());
        // A warning: what is known stays known.
        let general = |message| Problem {
            file: None,
            line: None,
            object: None,
            field: None,
            message,
            severity: Severity::Warning,
            hides: Hides::Nothing,
        };
        messages.map(general).chain(self.feed.problems().cloned()).collect()
    }

    fn send(&self, message: SourceMessage) -> Result<(), Gone> {
        self.sender.send(message).map_err(|_| Gone)
    }
}

fn resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::Service => ApiResource::erase::<MeshService>(&()),
        Kind::Slice => ApiResource::erase::<EndpointSlice>(&()),
    }
}

/// Slices without this label belong to no service.
fn selector(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Service => None,
        Kind::Slice => Some(SERVICE_NAME_LABEL),
    }
}

fn objects(client: Client, kind: Kind) -> impl Stream<Item = Said> {
    let api: Api<DynamicObject> = Api::all_with(client, &resource(kind));
    let mut config = watcher::Config::default().page_size(PAGE);
    config.label_selector = selector(kind).map(Into::into);
    watcher(api, config).backoff(pause()).map(move |said| match said {
        Ok(event) => Said::Object(kind, Box::new(event)),
        Err(e) => Said::Failed(Watch::Objects(kind), e),
    })
}

/// The field selector of one object.
fn named(name: &str) -> String {
    format!("metadata.name={name}")
}

fn own_node(client: Client, name: &str) -> impl Stream<Item = Said> + use<> {
    let config = watcher::Config::default().fields(&named(name));
    watcher(Api::<Node>::all(client), config).backoff(pause()).map(|said| match said {
        Ok(event) => Said::Node(Box::new(event)),
        Err(e) => Said::Failed(Watch::Node, e),
    })
}

/// A request that fails when there is no answer in time: a connection that is dead without anybody having said so would hang.
///
/// # Errors
/// The request's own, or that there was no answer.
pub async fn timed<T>(
    within: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, kube::Error> {
    match tokio::time::timeout(within, request).await {
        Ok(done) => done,
        Err(_) => Err(kube::Error::Service(format!("no answer within {} s", within.as_secs()).into())),
    }
}

/// The pauses between tries of a watch.
pub fn pause() -> impl kube::runtime::utils::Backoff {
    // With jitter: the agents of all nodes lose the same API server.
    let growing =
        backon::ExponentialBuilder::default().with_min_delay(PAUSE.0).with_max_delay(PAUSE.1).with_jitter();
    ResetTimerBackoff::new(watcher::ExponentialBackoff::from(growing.without_max_times()), RECOVERED)
}

/// The label that says where a node is (`topology.kubernetes.io`, well-known labels of Kubernetes).
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

fn what_it_says(node: &Node) -> NodeSays {
    let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
    NodeSays {
        addresses: internal_ips(node),
        zone: zone.filter(|z| !z.is_empty()).map(|z| z.as_str().into()),
        pods: pod_ranges(node),
    }
}

/// Those of both fields: `podCIDR` is the first of `podCIDRs`, or the only one that an old network plugin wrote.
fn pod_ranges(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.iter();
    let texts = spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let ranges: BTreeSet<IpNet> = texts.filter_map(|text| text.parse().ok()).collect();
    ranges.into_iter().collect()
}

/// A node's own addresses, the first of each family.
fn internal_ips(node: &Node) -> PerFamily<IpAddr> {
    let mut out = PerFamily::default();
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    for address in addresses.filter(|a| a.type_ == "InternalIP") {
        if let Ok(ip) = address.address.parse::<IpAddr>()
            && out.get(Family::of(&ip)).is_none()
        {
            out.set(Family::of(&ip), Some(ip));
        }
    }
    out
}

/// Why a watch of `what` does not go on, for people. None where it goes on all the same.
pub fn why(url: &str, what: &str, error: &watcher::Error) -> Option<String> {
    if fell_silent(error) {
        return None;
    }
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        _ => return Some(unreachable(url, error)),
    };
    // 410: what it wanted to resume at is gone, and it lists again at once.
    (status.code != 410).then(|| refused(url, what, status))
}

/// Whether a watch was given up for its silence, which need not mean anything: of a kind of which nothing has happened since it
/// was started, an API server tells no bookmarks either. Where it is gone, the next try says so.
fn fell_silent(error: &watcher::Error) -> bool {
    let watcher::Error::WatchFailed(error) = error else { return false };
    let first: &dyn std::error::Error = error;
    std::iter::successors(Some(first), |error| error.source()).any(|error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
    })
}

fn refused(url: &str, what: &str, status: &kube::core::Status) -> String {
    let message = &status.message;
    match status.code {
        404 if what.ends_with(".meshlb.dev") => {
            format!(
                "the API server {url} has no {what}: install the CRDs (`meshlb crd | kubectl apply -f -`)"
            )
        }
        401 => format!("the API server {url} does not accept our credentials (401)"),
        403 => format!("may not list and watch {what}: {message}"),
        code => format!("{what}: the API server {url} answers {code}: {message}"),
    }
}

fn unreachable(url: &str, error: &dyn std::error::Error) -> String {
    format!("the API server {url} can't be reached: {}", chain(error))
}

/// The last cause is the one that says something.
fn chain(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Everything once, for commands that look.
///
/// # Errors
/// The API server can't be asked, in one line.
pub fn load(access: Config, config: NodeConfig) -> Result<Loaded> {
    runtime()?.block_on(list_all(access, config))
}

async fn list_all(access: Config, config: NodeConfig) -> Result<Loaded> {
    let url = access.cluster_url.to_string();
    let client = Client::try_from(access).with_context(|| format!("API server {url}"))?;
    let name = config.name.to_string();
    let mut feed = Feed::new(config);
    let mut events = Vec::new();
    // As the agent does: who may list need not be one who may get.
    let only = ListParams::default().fields(&named(&name));
    let nodes =
        Api::<Node>::all(client.clone()).list(&only).await.map_err(|e| failed(&url, Watch::Node, &e))?;
    for kind in KINDS {
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource(kind));
        let mut params = ListParams::default().limit(PAGE);
        params.label_selector = selector(kind).map(Into::into);
        loop {
            let page = api.list(&params).await.map_err(|e| failed(&url, Watch::Objects(kind), &e))?;
            for object in page.items {
                feed.take(kind, watcher::Event::Apply(object), &mut events);
            }
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                break;
            }
        }
    }
    let problems = feed.problems().cloned().collect();
    Ok(Loaded { node: nodes.items.first().map(what_it_says), ..Loaded::new(events, problems) })
}

fn failed(url: &str, watch: Watch, error: &kube::Error) -> anyhow::Error {
    anyhow::Error::msg(match error {
        kube::Error::Api(status) => refused(url, watch.resource(), status),
        other => unreachable(url, other),
    })
}
