//! What the leader does: follows the API server, gives out numbers, writes statuses.

mod agents;
mod awaiting;
mod objects;
mod writes;

use std::{
    cell::Cell,
    collections::{BTreeSet, HashMap},
    convert::Infallible,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{Stream, StreamExt, stream};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Node, ObjectReference, Service as CoreService},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::ApiResource,
    core::{DynamicObject, PartialObjectMeta},
    runtime::{WatchStreamExt, events::Reporter, watcher},
};
use tokio::sync::mpsc;
use tracing::{info, warn};

use agents::Agents;
use awaiting::Awaiting;
use objects::{core_of, is_absent, meta_of, of_nodes};

use super::{
    Settings, Told,
    mesh::Mesh,
    nodes::Said as NodeSaid,
    pace::Bucket,
    pools::Pools,
    requests,
    status::{self, News},
};
use crate::{
    api::{MeshNode, MeshNodeStatus, MeshService, SERVICE_NAME_LABEL},
    model::ids::ServiceKey,
    source::{
        judge::{At, judge},
        kube::{listing::Listing, pause, why, without_bulk},
        object::{Kind, Object, Verdict},
        problem::Severity,
    },
};

/// A status of which nothing has changed but what its endpoints and nodes do is written at most this often.
const COUNTS_EVERY: Duration = Duration::from_secs(5);
/// So many statuses of that kind are written a second, over all services: a node that fails as a whole is told in each.
const COUNTS_A_SECOND: u32 = 100;
/// What a new service is given is in its status: of many at once, an Event tells so many, and one more each second.
const FIRST_EVENTS: u32 = 20;
/// What could not be written is tried again after this long; what can't be again and again, after twice as long each time.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MOST: Duration = Duration::from_secs(60);
const AGAIN_SOON: Duration = Duration::from_secs(8);
/// Changes that come within this time of one another are one turn.
const TOGETHER: Duration = Duration::from_millis(100);
/// A headless Service that could not be kept is tried again after this long.
const HEADLESS_AGAIN: Duration = Duration::from_secs(10);
/// Numbers that an earlier leader had entered are held back for this long at least: longer than a request may take.
const HOLD_BACK: Duration = Duration::from_secs(30);
/// So many Events wait to be written, at most; more are lost.
const EVENTS: usize = 1000;
/// So many changes are taken in together, at most.
const CHUNK: usize = 1000;
/// So many requests are under way at once.
const AT_ONCE: usize = 16;

/// The resources that are watched, as RBAC rules call them, in the order of [`Leader::listings`].
const WATCHED: [&str; 6] = [
    "meshservices.meshlb.dev",
    "endpointslices.discovery.k8s.io",
    "services",
    "meshnodes.meshlb.dev",
    "nodes",
    "daemonsets.apps",
];
/// The agents' DaemonSet has these labels.
const AGENTS: &str = "app.kubernetes.io/part-of=meshlb,app.kubernetes.io/component=agent";

/// Until when this controller may act as the leader.
#[derive(Clone)]
pub struct Fence(Rc<Cell<Instant>>);

impl Fence {
    /// Until then.
    pub fn new(until: Instant) -> Self {
        Self(Rc::new(Cell::new(until)))
    }

    /// The lease has been renewed.
    pub fn extend(&self, until: Instant) {
        self.0.set(until);
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.0.get()
    }

    /// Makes a request unless it is over, with the last look just before it.
    async fn within<T>(&self, request: impl Future<Output = T>) -> Option<T> {
        if self.is_over() { None } else { Some(request.await) }
    }
}

enum Said {
    Service(watcher::Event<DynamicObject>),
    Slice(watcher::Event<DynamicObject>),
    Core(Box<watcher::Event<CoreService>>),
    Report(watcher::Event<DynamicObject>),
    Node(Box<watcher::Event<PartialObjectMeta<Node>>>),
    Agents(Box<watcher::Event<DaemonSet>>),
    Failed(&'static str, watcher::Error),
}

/// Leads until the lease is over, or somebody else turns out to lead.
///
/// # Errors
/// Why it can't go on; to be tried again by election.
pub async fn lead(client: Client, settings: &Settings, told: &Told, fence: Fence) -> Result<Infallible> {
    let pools = Pools::take(client.clone(), &settings.namespace, settings.node.clone(), &settings.identity)
        .await
        .context("the pool objects can't be taken over")?;
    let reporter = Reporter { controller: "meshlb".into(), instance: Some(settings.identity.clone()) };
    let (events, queue) = mpsc::channel(EVENTS);
    // It ends with the leader, which has the other end.
    tokio::spawn(requests::publish(client.clone(), reporter, queue, told.metrics.clone()));
    let leader = Leader {
        url: settings.url.clone(),
        mesh: Mesh::new(settings.node.clone()),
        events,
        since: Instant::now(),
        client: client.clone(),
        pools,
        fence,
        listings: Default::default(),
        absent: [false; 6],
        agents: Agents::default(),
        namespace: settings.namespace.clone(),
        counts: Bucket::new(COUNTS_A_SECOND, COUNTS_A_SECOND, Instant::now()),
        first: Bucket::new(FIRST_EVENTS, 1, Instant::now()),
        report: told.clone(),
        broken: HashMap::new(),
        synced: false,
        written: HashMap::new(),
        failed: HashMap::new(),
        headless_failed: HashMap::new(),
        awaiting: Awaiting::default(),
        told: None,
    };
    leader.run().await
}

/// A status that could not be written.
struct Failed {
    /// The version of the service that this was tried for.
    version: String,
    at: Instant,
    /// How long it is not tried again for that version.
    pause: Duration,
}

impl Failed {
    /// Now, after it may have failed before.
    fn now(version: String, before: Option<&Self>, most: Duration) -> Self {
        let pause = before.filter(|before| before.version == version).map(|before| before.pause * 2);
        Self { version, at: Instant::now(), pause: pause.unwrap_or(AGAIN).min(most) }
    }
}

struct Leader {
    url: String,
    client: Client,
    mesh: Mesh,
    pools: Pools,
    fence: Fence,
    events: mpsc::Sender<(News, ObjectReference)>,
    since: Instant,
    /// Of [`WATCHED`].
    listings: [Listing; 6],
    /// Of [`WATCHED`], what the API server does not have or does not let us read.
    absent: [bool; 6],
    agents: Agents,
    /// Where they are.
    namespace: String,
    /// So many statuses whose counts alone differ may still be written.
    counts: Bucket,
    /// So many new services may still be told of in an Event.
    first: Bucket,
    report: Told,
    broken: HashMap<&'static str, String>,
    synced: bool,
    /// When a service's status was last written.
    written: HashMap<ServiceKey, Instant>,
    /// Services whose status could not be written.
    failed: HashMap<ServiceKey, Failed>,
    /// Services whose headless Service could not be kept, and when that was.
    headless_failed: HashMap<ServiceKey, Instant>,
    /// Services whose first status waits for EndpointSlices.
    awaiting: Awaiting,
    told: Option<String>,
}

impl Leader {
    async fn run(mut self) -> Result<Infallible> {
        let services = ApiResource::erase::<MeshService>(&());
        let slices = ApiResource::erase::<EndpointSlice>(&());
        let plain = watcher::Config::default().page_size(500);
        let labelled = plain.clone().labels(SERVICE_NAME_LABEL);
        let reports = ApiResource::erase::<MeshNode>(&());
        let all = |resource| Api::all_with(self.client.clone(), resource);
        let nodes = watcher(Api::<PartialObjectMeta<Node>>::all(self.client.clone()), plain.clone());
        let agents = Api::<DaemonSet>::namespaced(self.client.clone(), &self.namespace);
        let streams: Vec<stream::BoxStream<'static, Said>> = vec![
            follow(watcher(all(&services), plain.clone()), WATCHED[0], Said::Service),
            follow(watcher(all(&slices), labelled), WATCHED[1], Said::Slice),
            follow(watcher(Api::<CoreService>::all(self.client.clone()), plain.clone()), WATCHED[2], |e| {
                Said::Core(Box::new(e))
            }),
            follow(watcher(all(&reports), plain), WATCHED[3], Said::Report),
            follow(nodes, WATCHED[4], |e| Said::Node(Box::new(e))),
            follow(watcher(agents, watcher::Config::default().labels(AGENTS)), WATCHED[5], |e| {
                Said::Agents(Box::new(e))
            }),
        ];
        let mut said = stream::select_all(streams).ready_chunks(CHUNK);
        let mut tick = tokio::time::interval(AGAIN);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let chunk = tokio::select! {
                chunk = said.next() => chunk.context("the watches have ended")?,
                _ = tick.tick() => Vec::new(),
            };
            if !chunk.is_empty() {
                chunk.into_iter().for_each(|said| self.take(said));
                // What comes with it is one turn with it.
                let end = tokio::time::Instant::now() + TOGETHER;
                while let Ok(chunk) = tokio::time::timeout_at(end, said.next()).await {
                    chunk.context("the watches have ended")?.into_iter().for_each(|said| self.take(said));
                }
            }
            if self.fence.is_over() {
                bail!("the lease could not be renewed in time");
            }
            if self.synced {
                self.turn().await?;
            }
        }
    }

    fn take(&mut self, said: Said) {
        match said {
            Said::Service(event) => {
                self.goes_on(0, &event);
                self.take_service(event);
            }
            Said::Slice(event) => {
                self.goes_on(1, &event);
                self.take_slice(event);
            }
            Said::Core(event) => {
                self.goes_on(2, &event);
                self.take_core(*event);
            }
            Said::Report(event) => {
                self.goes_on(3, &event);
                self.take_report(event);
            }
            Said::Node(event) => {
                self.goes_on(4, &event);
                self.take_node(*event);
            }
            Said::Agents(event) => {
                self.goes_on(5, &event);
                self.take_agents(*event);
            }
            Said::Failed(what, error) => {
                if let Some(i) = WATCHED.iter().position(|w| *w == what) {
                    self.absent[i] = is_absent(&error);
                }
                if let Some(message) = why(&self.url, what, &error)
                    && self.broken.insert(what, message.clone()).as_ref() != Some(&message)
                {
                    warn!("{message}");
                }
            }
        }
        // What nodes say is for the statuses only: without it services get all that they need.
        let read = |i: usize| self.listings[i].is_complete() || (i > 2 && self.absent[i]);
        if !self.synced && (0..WATCHED.len()).all(read) {
            self.synced = true;
            self.report.health.set_synced(true);
            self.mesh.begin(&self.pools.used());
            info!(services = self.mesh.keys().count(), "everything has been read");
        }
    }

    fn goes_on<T>(&mut self, what: usize, event: &watcher::Event<T>) {
        // It says that it begins before it has asked.
        if !matches!(event, watcher::Event::Init) {
            self.absent[what] = false;
            self.broken.remove(WATCHED[what]);
        }
    }

    fn take_service(&mut self, event: watcher::Event<DynamicObject>) {
        let change = self.listings[0].take(event, self.mesh.keys());
        if let Some((key, object)) = change.put {
            let meta = meta_of(&object.metadata);
            self.mesh.put_service(&key, meta, without_bulk(Kind::Service, object));
        }
        for key in change.gone {
            self.mesh.remove_service(&key);
            self.written.remove(&key);
            self.failed.remove(&key);
            self.headless_failed.remove(&key);
            self.awaiting.ends(&key);
        }
    }

    fn take_slice(&mut self, event: watcher::Event<DynamicObject>) {
        let change = self.listings[1].take(event, self.mesh.slice_keys());
        if let Some((key, object)) = change.put {
            let label =
                object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL)).cloned();
            let value = without_bulk(Kind::Slice, object);
            let judged = judge(Kind::Slice, value, At::ApiServer(self.mesh.config()));
            match &judged.verdict {
                Verdict::Good(Object::Slice(slice)) => self.mesh.put_slice(&key, Some(slice)),
                // Its last good version counts, as it serves on the nodes.
                Verdict::Wrong => {}
                _ => self.mesh.put_slice(&key, None),
            }
            let first = judged.findings.first().filter(|_| judged.severity >= Severity::Warning);
            let name = label.map(|label| ServiceKey::new(key.namespace.clone(), label));
            let found = name.zip(first.map(|first| format!("{}: {}", first.field, first.message)));
            self.mesh.set_unusable(&key, found);
        }
        for key in &change.gone {
            self.mesh.put_slice(key, None);
            self.mesh.set_unusable(key, None);
        }
    }

    fn take_core(&mut self, event: watcher::Event<CoreService>) {
        let change = self.listings[2].take(event, self.mesh.core_keys());
        if let Some((key, service)) = change.put {
            self.mesh.put_core(&key, Some(core_of(&service)));
        }
        change.gone.iter().for_each(|key| self.mesh.put_core(key, None));
    }

    fn take_report(&mut self, event: watcher::Event<DynamicObject>) {
        let known = of_nodes(&event, self.mesh.nodes().said_names());
        let change = self.listings[3].take(event, known.iter());
        if let Some((key, object)) = change.put {
            let owners = object.metadata.owner_references.iter().flatten();
            let owner = owners.filter(|o| o.kind == "Node").map(|o| o.uid.clone()).next();
            let status = object.data.get("status").cloned().unwrap_or_default();
            let status: MeshNodeStatus = serde_json::from_value(status).unwrap_or_default();
            self.mesh.put_said(&key.name, Some(NodeSaid::new(owner, &status)));
        }
        change.gone.iter().for_each(|key| self.mesh.put_said(&key.name, None));
    }

    fn take_node(&mut self, event: watcher::Event<PartialObjectMeta<Node>>) {
        let known = of_nodes(&event, self.mesh.nodes().node_names());
        let change = self.listings[4].take(event, known.iter());
        if let Some((key, node)) = change.put {
            self.mesh.put_node(&key.name, node.metadata.uid);
        }
        change.gone.iter().for_each(|key| self.mesh.put_node(&key.name, None));
    }

    fn take_agents(&mut self, event: watcher::Event<DaemonSet>) {
        let known: Vec<ServiceKey> = self.agents.names().cloned().collect();
        let change = self.listings[5].take(event, known.iter());
        if let Some((key, object)) = change.put {
            let ready = object.status.map_or(0, |status| status.number_ready);
            self.agents.put(key, Some(ready));
        }
        change.gone.into_iter().for_each(|key| self.agents.put(key, None));
    }

    /// Brings everything that is not as it should be closer to that.
    async fn turn(&mut self) -> Result<()> {
        self.mesh.set_deserted(self.agents.are_gone(Instant::now()));
        self.mesh.allocate();
        // Before the statuses, which say what comes of it.
        let again = self.headless_failed.iter().filter(|(_, at)| at.elapsed() > HEADLESS_AGAIN);
        let seen = |key: &ServiceKey| {
            let entry = self.mesh.entry(key);
            entry.is_some_and(|entry| self.awaiting.has_seen(key, &entry.meta))
        };
        let dirty = self.mesh.dirty().filter(|key| !seen(key));
        let looked_at: BTreeSet<ServiceKey> = dirty.chain(again.map(|(key, _)| key)).cloned().collect();
        self.keep_headless(&looked_at).await?;
        let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default();
        let mut writes = Vec::new();
        let mut clean = Vec::new();
        let mut later = false;
        let now_at = Instant::now();
        let may = self.counts.left(now_at);
        let mut counts = may;
        for key in self.mesh.dirty() {
            let (Some(entry), Some(new)) = (self.mesh.entry(key), self.mesh.desired(key, now)) else {
                continue;
            };
            let soon = |at: &Instant, pause: Duration| at.elapsed() < pause;
            if self.mesh.awaits_slices(key) && self.awaiting.waits(key, &entry.meta, now_at) {
                later = true;
                continue;
            }
            let just_written = || self.written.get(key).is_some_and(|at| soon(at, COUNTS_EVERY));
            let just_failed = || {
                let failed = self.failed.get(key);
                failed.is_some_and(|f| f.version == entry.meta.resource_version && soon(&f.at, f.pause))
            };
            if new == entry.status {
                clean.push(key.clone());
                continue;
            }
            let of_counts = status::only_counts(&entry.status, &new);
            if just_failed() || (of_counts && (just_written() || counts == 0)) {
                later = true;
            } else {
                counts -= u32::from(of_counts);
                writes.push((key.clone(), entry.meta.clone(), entry.status.clone(), new));
            }
        }
        self.counts.take(may - counts, now_at);
        for key in &clean {
            if !self.awaiting.ends(key) {
                self.mesh.clean(key);
            }
        }
        if !writes.is_empty() {
            // First the pools: a number that is in a status was entered before.
            let gives = writes.iter().any(|w| status::differ(&w.2, &w.3));
            if gives && !self.write_pools().await? {
                return Ok(());
            }
            // What one service gives up another one gets only then.
            let (giving, taking): (Vec<_>, Vec<_>) =
                writes.into_iter().partition(|w| status::gives_up(&w.2, &w.3));
            later |= self.write_in_order(giving).await?;
            let new = taking.iter().filter(|w| status::differ(&w.2, &w.3));
            let early = self.mesh.too_early(new.map(|w| (&w.0, &w.3)));
            later |= !early.is_empty();
            self.write_statuses(taking.into_iter().filter(|w| !early.contains_key(&w.0)).collect()).await?;
        }
        if self.mesh.dirty().next().is_none() && !later {
            self.told = None;
        }
        // Endpoints and nodes are never at rest in a large cluster: numbers of theirs that are still to be written are waited for by nobody.
        let orphans = self.mesh.has_orphans() && self.since.elapsed() > HOLD_BACK;
        if orphans && self.mesh.only_counts_are_due(now) {
            self.mesh.free_orphans();
            self.mesh.allocate();
        }
        if self.mesh.is_freed() && self.mesh.only_counts_are_due(now) && self.write_pools().await? {
            self.mesh.all_is_entered();
        }
        self.measure();
        Ok(())
    }

    fn measure(&self) {
        let metrics = &self.report.metrics;
        metrics.services(self.mesh.served());
        for (state, n) in self.mesh.nodes().states() {
            metrics.nodes(state, n);
        }
        for (pool, used, free) in self.pools.levels() {
            metrics.pool(pool, used, free);
        }
    }
}

fn follow<T: Send + 'static>(
    events: impl Stream<Item = watcher::Result<watcher::Event<T>>> + Send + 'static,
    what: &'static str,
    say: impl Fn(watcher::Event<T>) -> Said + Send + 'static,
) -> stream::BoxStream<'static, Said> {
    events
        .backoff(pause())
        .map(move |said| match said {
            Ok(event) => say(event),
            Err(e) => Said::Failed(what, e),
        })
        .boxed()
}
