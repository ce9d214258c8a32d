//! What the leader does: follows the API server, gives out numbers, writes statuses.

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
    core::v1::{Node, ObjectReference, Service as CoreService},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::ApiResource,
    core::{DynamicObject, ObjectMeta, PartialObjectMeta},
    runtime::{WatchStreamExt, events::Reporter, watcher},
};
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::{
    Settings, Told,
    headless::{self, Todo},
    mesh::{Core, Mesh, Meta},
    nodes::Said as NodeSaid,
    pace::Bucket,
    pools::Pools,
    requests,
    status::{self, News},
};
use crate::{
    api::{self, MeshNode, MeshNodeStatus, MeshService, SERVICE_NAME_LABEL, status::MeshServiceStatus},
    model::ids::{Protocol, ServiceKey},
    source::{
        judge::judge,
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
/// What could not be written is tried again after this long.
const AGAIN: Duration = Duration::from_secs(1);
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
const WATCHED: [&str; 5] = [
    "meshservices.meshlb.dev",
    "endpointslices.discovery.k8s.io",
    "services",
    "meshnodes.meshlb.dev",
    "nodes",
];

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
        absent: [false; 5],
        counts: Bucket::new(COUNTS_A_SECOND, COUNTS_A_SECOND, Instant::now()),
        first: Bucket::new(FIRST_EVENTS, 1, Instant::now()),
        report: told.clone(),
        broken: HashMap::new(),
        synced: false,
        written: HashMap::new(),
        failed: HashMap::new(),
        headless_failed: HashMap::new(),
        told: None,
    };
    leader.run().await
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
    listings: [Listing; 5],
    /// Of [`WATCHED`], what the API server does not have or does not let us read.
    absent: [bool; 5],
    /// So many statuses whose counts alone differ may still be written.
    counts: Bucket,
    /// So many new services may still be told of in an Event.
    first: Bucket,
    report: Told,
    broken: HashMap<&'static str, String>,
    synced: bool,
    /// When a service's status was last written.
    written: HashMap<ServiceKey, Instant>,
    /// Services whose status could not be written, with the version that this was tried for, and when.
    failed: HashMap<ServiceKey, (String, Instant)>,
    /// Services whose headless Service could not be kept, and when that was.
    headless_failed: HashMap<ServiceKey, Instant>,
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
        let streams: Vec<stream::BoxStream<'static, Said>> = vec![
            follow(watcher(all(&services), plain.clone()), WATCHED[0], Said::Service),
            follow(watcher(all(&slices), labelled), WATCHED[1], Said::Slice),
            follow(watcher(Api::<CoreService>::all(self.client.clone()), plain.clone()), WATCHED[2], |e| {
                Said::Core(Box::new(e))
            }),
            follow(watcher(all(&reports), plain), WATCHED[3], Said::Report),
            follow(nodes, WATCHED[4], |e| Said::Node(Box::new(e))),
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
        }
    }

    fn take_slice(&mut self, event: watcher::Event<DynamicObject>) {
        let change = self.listings[1].take(event, self.mesh.slice_keys());
        if let Some((key, object)) = change.put {
            let label =
                object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL)).cloned();
            let value = without_bulk(Kind::Slice, object);
            let judged = judge(Kind::Slice, value, Some(self.mesh.config()), true);
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

    /// Brings everything that is not as it should be closer to that.
    async fn turn(&mut self) -> Result<()> {
        self.mesh.allocate();
        // Before the statuses, which say what comes of it.
        let again = self.headless_failed.iter().filter(|(_, at)| at.elapsed() > HEADLESS_AGAIN);
        let looked_at: BTreeSet<ServiceKey> =
            self.mesh.dirty().chain(again.map(|(key, _)| key)).cloned().collect();
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
            let just_written = || self.written.get(key).is_some_and(|at| soon(at, COUNTS_EVERY));
            let just_failed = || {
                let failed = self.failed.get(key);
                failed.is_some_and(|(version, at)| *version == entry.meta.resource_version && soon(at, AGAIN))
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
        clean.iter().for_each(|key| self.mesh.clean(key));
        if !writes.is_empty() {
            // First the pools: a number that is in a status was entered before.
            let gives = writes.iter().any(|w| status::differ(&w.2, &w.3));
            if gives && !self.write_pools().await? {
                return Ok(());
            }
            // What one service gives up another one gets only then.
            let (giving, taking): (Vec<_>, Vec<_>) =
                writes.into_iter().partition(|w| status::gives_up(&w.2, &w.3));
            self.write_statuses(giving).await?;
            let new: Vec<_> = taking
                .iter()
                .filter(|w| status::differ(&w.2, &w.3))
                .map(|w| (w.0.clone(), w.3.clone()))
                .collect();
            let early = if new.is_empty() { BTreeSet::new() } else { self.mesh.too_early(&new) };
            later |= !early.is_empty();
            self.write_statuses(taking.into_iter().filter(|w| !early.contains(&w.0)).collect()).await?;
        }
        if self.mesh.dirty().next().is_none() && !later {
            self.told = None;
            if self.mesh.has_orphans() && self.since.elapsed() > HOLD_BACK {
                self.mesh.free_orphans();
                self.mesh.allocate();
            }
            if self.mesh.dirty().next().is_none() && self.mesh.is_freed() && self.write_pools().await? {
                self.mesh.all_is_entered();
            }
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

    /// Enters all that is in use. Whether that went well; what did not is tried again.
    async fn write_pools(&mut self) -> Result<bool> {
        let result = self.pools.write(&self.mesh.used()).await;
        if !matches!(result, Ok(0)) {
            self.report.metrics.wrote("pool", requests::outcome(&result));
        }
        match result {
            Ok(_) => Ok(true),
            // Another one has written it, or it was deleted: it has to be taken over anew.
            Err(e) if requests::has_changed(&e) => bail!("the pool objects have changed: {e}"),
            Err(e) => {
                self.tell(format!("the pool objects can't be written: {e}"));
                Ok(false)
            }
        }
    }

    fn tell(&mut self, problem: String) {
        if self.told.as_ref() != Some(&problem) {
            warn!("{problem}; it is tried again");
            self.told = Some(problem);
        }
    }

    async fn write_statuses(
        &mut self,
        writes: Vec<(ServiceKey, Meta, MeshServiceStatus, MeshServiceStatus)>,
    ) -> Result<()> {
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
                }
                Some(Err(e)) => {
                    if requests::has_changed(&e) {
                        debug!("{key}: {e}");
                    } else {
                        problem = Some(format!("the status of {key} can't be written: {e}"));
                    }
                    self.failed.insert(key, (meta.resource_version, Instant::now()));
                }
            }
        }
        drop(done);
        if let Some(problem) = problem {
            self.tell(problem);
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
    async fn keep_headless(&mut self, keys: &BTreeSet<ServiceKey>) -> Result<()> {
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

/// Whether the API server does not have it, or does not let us read it.
fn is_absent(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if matches!(status.code, 403 | 404))
}

/// Cluster-wide objects, as listings name them; they are asked for at the end of a list only.
fn of_nodes<'a, T>(event: &watcher::Event<T>, names: impl Iterator<Item = &'a String>) -> Vec<ServiceKey> {
    match event {
        watcher::Event::InitDone => names.map(|name| ServiceKey::new("", name.as_str())).collect(),
        _ => Vec::new(),
    }
}

fn meta_of(meta: &ObjectMeta) -> Meta {
    let created = meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second());
    Meta {
        uid: meta.uid.clone().unwrap_or_default(),
        resource_version: meta.resource_version.clone().unwrap_or_default(),
        generation: meta.generation,
        created: u64::try_from(created).unwrap_or(0),
    }
}

fn core_of(service: &CoreService) -> Core {
    let owner = service
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true) && o.kind == api::KIND && o.api_version == api::API_VERSION);
    let (spec, ours) = (service.spec.as_ref(), owner.is_some());
    let number = |n: i32| u16::try_from(n).ok().filter(|n| *n > 0);
    let ports = spec.iter().flat_map(|s| s.ports.iter().flatten()).filter_map(|port| {
        let protocol: Protocol = port.protocol.as_deref().unwrap_or("TCP").parse().ok()?;
        Some((protocol, number(port.node_port?)?))
    });
    let health = spec.and_then(|s| s.health_check_node_port).and_then(number).map(|n| (Protocol::Tcp, n));
    Core {
        uid: service.metadata.uid.clone().unwrap_or_default(),
        owner: owner.map(|o| o.uid.clone()),
        node_ports: ports.chain(health).collect(),
        external_name: spec.is_some_and(|s| s.type_.as_deref() == Some("ExternalName")),
        spec: if ours {
            headless::part_of(&serde_json::to_value(spec).unwrap_or_default())
        } else {
            Value::Null
        },
    }
}
