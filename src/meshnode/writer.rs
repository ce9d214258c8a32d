//! Keeps the node's MeshNode as the last [`Report`] says, and looks whether an uninstallation is asked for, in a thread of its
//! own: whatever goes wrong here, services go on.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{
    Api, Client, Config,
    api::{ApiResource, ListParams, Patch, PatchParams},
    core::DynamicObject,
    runtime::{WatchStreamExt, watcher},
};
use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{Report, State, UNINSTALL};
use crate::{
    api::{API_VERSION, MeshNode, MeshNodeStatus, mesh_node::NODE_KIND},
    source::kube::{pause, timed, why},
};

/// Field manager of all that an agent writes.
const MANAGER: &str = "meshlb-agent";
/// Between two writes, at least.
const EVERY: Duration = Duration::from_secs(10);
/// What has been so for this long is written: much of what fails is done at the second try.
const SETTLED: Duration = Duration::from_secs(1);
/// Added to that, by the node's name: what all nodes notice at once they don't write at once.
const SPREAD: Duration = Duration::from_secs(2);
/// First and longest pause after a write has failed.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A request that has no answer by then has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where to look and what to write.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// The agents' own namespace, for the request to uninstall; without it none is looked for.
    pub namespace: Option<String>,
}

/// Whether an uninstallation is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Not known yet.
    Unknown,
    /// No, since then.
    None(Instant),
    /// Yes, by the ConfigMap of this uid.
    Uninstall(Arc<str>),
}

struct Shared {
    request: Request,
    /// Whether the last report is written.
    written: bool,
}

/// A handle to the writer; it ends with the last one.
#[derive(Clone)]
pub struct Handle {
    reports: watch::Sender<Option<Report>>,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

impl Handle {
    /// What is to be said from now on.
    pub fn report(&self, report: Report) {
        self.reports.send_if_modified(|last| {
            if last.as_ref() == Some(&report) {
                return false;
            }
            with(&self.shared, |shared| shared.written = false);
            *last = Some(report);
            true
        });
    }

    /// Whether an uninstallation is asked for, as far as known.
    pub fn request(&self) -> Request {
        with(&self.shared, |shared| shared.request.clone())
    }

    /// Waits until it is known whether an uninstallation is asked for, and not longer than that.
    pub fn wait_for_request(&self, within: Duration) -> Request {
        self.wait(within, |shared| shared.request != Request::Unknown);
        self.request()
    }

    /// Waits until the last report is written, and not longer than that.
    pub fn flush(&self, within: Duration) -> bool {
        self.wait(within, |shared| shared.written)
    }

    fn wait(&self, within: Duration, done: impl Fn(&Shared) -> bool) -> bool {
        let (lock, changed) = &*self.shared;
        let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let guard = changed.wait_timeout_while(guard, within, |shared| !done(shared));
        done(&guard.unwrap_or_else(PoisonError::into_inner).0)
    }
}

fn with<T>(shared: &(Mutex<Shared>, Condvar), change: impl FnOnce(&mut Shared) -> T) -> T {
    let out = change(&mut shared.0.lock().unwrap_or_else(PoisonError::into_inner));
    shared.1.notify_all();
    out
}

/// Starts it. `uninstall` is called when an uninstallation is asked for.
///
/// # Errors
/// The thread can't be started.
pub fn start(
    access: Config,
    settings: Settings,
    uninstall: impl Fn() + Send + 'static,
) -> io::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (reports, receiver) = watch::channel(None);
    let shared = Arc::new((Mutex::new(Shared { request: Request::Unknown, written: true }), Condvar::new()));
    let handle = Handle { reports, shared: shared.clone() };
    std::thread::Builder::new().name("meshnode".into()).spawn(move || {
        let url = access.cluster_url.to_string();
        runtime.block_on(async move {
            match Client::try_from(access) {
                Ok(client) => Writer::new(client, url, settings, receiver, shared, uninstall).run().await,
                // The source says why.
                Err(e) => {
                    debug!("API server {url}: {e}");
                    with(&shared, |shared| shared.request = Request::None(Instant::now()));
                }
            }
        });
    })?;
    Ok(handle)
}

enum Said {
    Node(watcher::Event<DynamicObject>),
    Request(watcher::Event<ConfigMap>),
    Failed(&'static str, watcher::Error),
}

/// What is in the API server, as far as known.
#[derive(Clone, PartialEq, Debug)]
enum Seen {
    Unknown,
    Nothing,
    There(Option<MeshNodeStatus>),
}

struct Writer<F> {
    client: Client,
    url: String,
    settings: Settings,
    reports: watch::Receiver<Option<Report>>,
    shared: Arc<(Mutex<Shared>, Condvar)>,
    uninstall: F,
    seen: Seen,
    /// Whether the list that is being read has had the object.
    listed: (bool, bool),
    /// Since when there is something else to say than what is there.
    different: Option<Instant>,
    last_write: Option<Instant>,
    retry: Option<(Instant, Duration)>,
    told: String,
    /// What was written last: that everything is removed is not said again once somebody has deleted it.
    said_last: Option<Report>,
}

impl<F: Fn()> Writer<F> {
    fn new(
        client: Client,
        url: String,
        settings: Settings,
        reports: watch::Receiver<Option<Report>>,
        shared: Arc<(Mutex<Shared>, Condvar)>,
        uninstall: F,
    ) -> Self {
        Self {
            client,
            url,
            settings,
            reports,
            shared,
            uninstall,
            seen: Seen::Unknown,
            listed: (false, false),
            different: None,
            last_write: None,
            retry: None,
            told: String::new(),
            said_last: None,
        }
    }

    async fn run(mut self) {
        let mut streams = vec![own_object(self.client.clone(), &self.settings.node)];
        match &self.settings.namespace {
            Some(namespace) => streams.push(request(self.client.clone(), namespace)),
            None => self.asked(None),
        }
        let mut said = stream::select_all(streams);
        loop {
            let due = self.due(Instant::now());
            let at = due.map_or_else(tokio::time::Instant::now, Into::into);
            tokio::select! {
                said = said.next() => match said {
                    Some(said) => self.take(said),
                    None => return,
                },
                changed = self.reports.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(at), if due.is_some() => self.write().await,
            }
        }
    }

    fn take(&mut self, said: Said) {
        use watcher::Event;
        match said {
            Said::Node(Event::Init) => self.listed.0 = false,
            Said::Node(Event::InitApply(object) | Event::Apply(object)) => {
                self.listed.0 = true;
                self.seen = Seen::There(status_of(&object));
            }
            Said::Node(Event::InitDone) if self.listed.0 => {}
            Said::Node(Event::InitDone | Event::Delete(_)) => self.seen = Seen::Nothing,
            Said::Request(Event::Init) => self.listed.1 = false,
            Said::Request(Event::InitApply(map) | Event::Apply(map)) => {
                self.listed.1 = true;
                self.asked(Some(map.metadata.uid.unwrap_or_default().into()));
            }
            Said::Request(Event::InitDone) if self.listed.1 => {}
            Said::Request(Event::InitDone | Event::Delete(_)) => self.asked(None),
            Said::Failed(what, error) => {
                // An agent must not wait for what it may not read. One that knew that it is asked still does.
                if what == "configmaps" && with(&self.shared, |s| s.request == Request::Unknown) {
                    self.asked(None);
                }
                if let Some(message) = why(&self.url, what, &error) {
                    self.tell(format!("this node's MeshNode can't be kept: {message}"));
                }
            }
        }
    }

    fn asked(&self, by: Option<Arc<str>>) {
        let before = with(&self.shared, |shared| shared.request.clone());
        let now = match by {
            Some(by) => Request::Uninstall(by),
            None if matches!(before, Request::None(_)) => return,
            None => Request::None(Instant::now()),
        };
        if now == before {
            return;
        }
        if matches!(now, Request::Uninstall(_)) {
            // Before anybody who waits for it goes on.
            (self.uninstall)();
        }
        with(&self.shared, |shared| shared.request = now);
    }

    /// When there is something to write, if there is.
    fn due(&mut self, now: Instant) -> Option<Instant> {
        let report = self.reports.borrow().clone()?;
        let old = match &self.seen {
            Seen::Unknown => return None,
            Seen::There(old) => old.as_ref(),
            // An uninstallation that is done has deleted it. Who asks anew gets another answer.
            Seen::Nothing
                if self.said_last.as_ref() == Some(&report)
                    && matches!(report.state, State::HeldOff { cleaned: Ok(()), .. }) =>
            {
                return None;
            }
            Seen::Nothing => None,
        };
        if old.is_some_and(|old| report.status(Some(old), jiff::Timestamp::UNIX_EPOCH) == *old) {
            self.different = None;
            with(&self.shared, |shared| shared.written = true);
            return None;
        }
        let since = *self.different.get_or_insert(now);
        let settled = if report.is_urgent() { since } else { since + SETTLED + self.spread() };
        let paced = self.last_write.map_or(settled, |last| settled.max(last + EVERY));
        Some(self.retry.map_or(paced, |(at, _)| paced.max(at)))
    }

    fn spread(&self) -> Duration {
        let mut hasher = DefaultHasher::new();
        self.settings.node.hash(&mut hasher);
        SPREAD.mul_f64(f64::from(hasher.finish() as u32) / f64::from(u32::MAX))
    }

    async fn write(&mut self) {
        let Some(report) = self.reports.borrow().clone() else { return };
        let old = match &self.seen {
            Seen::There(old) => old.clone(),
            Seen::Nothing | Seen::Unknown => None,
        };
        let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default();
        let status = report.status(old.as_ref(), now);
        match self.apply(&status).await {
            Ok(()) => {
                self.last_write = Some(Instant::now());
                self.retry = None;
                self.different = None;
                self.said_last = Some(report);
                self.seen = Seen::There(Some(status));
                if !std::mem::take(&mut self.told).is_empty() {
                    info!("MeshNode {} is written again", self.settings.node);
                }
            }
            Err(message) => {
                let pause = self.retry.map_or(RETRY.0, |(_, last)| (last * 2).min(RETRY.1));
                self.retry = Some((Instant::now() + pause, pause));
                self.tell(format!("MeshNode {} can't be written: {message}", self.settings.node));
            }
        }
    }

    /// Once, until it has gone well again or is another problem.
    fn tell(&mut self, message: String) {
        if self.told != message {
            warn!("{message}; it is tried again, and services go on");
            self.told = message;
        }
    }

    async fn apply(&self, status: &MeshNodeStatus) -> Result<(), String> {
        let name = self.settings.node.as_str();
        let api: Api<DynamicObject> =
            Api::all_with(self.client.clone(), &ApiResource::erase::<MeshNode>(&()));
        let params = PatchParams::apply(MANAGER).force();
        let mut object = json!({"apiVersion": API_VERSION, "kind": NODE_KIND, "metadata": {"name": name}});
        if self.seen == Seen::Nothing {
            let mut object = object.clone();
            // So that it goes with its node.
            object["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": self.node_uid().await?}]);
            let made = timed(PATIENCE, api.patch(name, &params, &Patch::Apply(&object))).await;
            made.map_err(|e| self.say(&e))?;
        }
        object["status"] = serde_json::to_value(status).map_err(|e| e.to_string())?;
        let written = timed(PATIENCE, api.patch_status(name, &params, &Patch::Apply(&object))).await;
        written.map(drop).map_err(|e| self.say(&e))
    }

    fn say(&self, error: &kube::Error) -> String {
        match error {
            kube::Error::Api(status) => status.message.clone(),
            other => format!("the API server {} can't be reached: {other}", self.url),
        }
    }

    /// By a list, since that is what an agent may do with Nodes.
    async fn node_uid(&self) -> Result<String, String> {
        let name = self.settings.node.as_str();
        let params = ListParams::default().fields(&format!("metadata.name={name}"));
        let found = timed(PATIENCE, Api::<Node>::all(self.client.clone()).list_metadata(&params)).await;
        let found = found.map_err(|e| self.say(&e))?;
        found.items.into_iter().find_map(|node| node.metadata.uid).ok_or_else(|| {
            format!("there is no Node {name}: give --node the name that `kubectl get nodes` shows")
        })
    }
}

fn status_of(object: &DynamicObject) -> Option<MeshNodeStatus> {
    serde_json::from_value(object.data.get("status")?.clone()).ok()
}

fn own_object(client: Client, node: &str) -> stream::BoxStream<'static, Said> {
    let config = watcher::Config::default().fields(&format!("metadata.name={node}"));
    let api: Api<DynamicObject> = Api::all_with(client, &ApiResource::erase::<MeshNode>(&()));
    let said = watcher(api, config).backoff(pause());
    said.map(|said| said.map_or_else(|e| Said::Failed("meshnodes.meshlb.dev", e), Said::Node)).boxed()
}

fn request(client: Client, namespace: &str) -> stream::BoxStream<'static, Said> {
    let config = watcher::Config::default().fields(&format!("metadata.name={UNINSTALL}"));
    let said = watcher(Api::<ConfigMap>::namespaced(client, namespace), config).backoff(pause());
    said.map(|said| said.map_or_else(|e| Said::Failed("configmaps", e), Said::Request)).boxed()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    fn request(uid: &str) -> ConfigMap {
        let metadata = ObjectMeta { uid: Some(uid.to_owned()), ..ObjectMeta::default() };
        ConfigMap { metadata, ..ConfigMap::default() }
    }

    fn cleaned(asked: &str) -> Report {
        Report::of(State::HeldOff { asked: asked.into(), cleaned: Ok(()) })
    }

    #[tokio::test]
    async fn who_has_cleaned_up_says_it_once_to_each_request() {
        use watcher::Event;
        let client = Client::try_from(Config::new("http://127.0.0.1:1/".parse().unwrap())).unwrap();
        let (reports, receiver) = watch::channel(None);
        let shared = Shared { request: Request::Unknown, written: true };
        let shared = Arc::new((Mutex::new(shared), Condvar::new()));
        let handle = Handle { reports, shared: shared.clone() };
        let settings = Settings { node: "n1".into(), namespace: None };
        let told = Arc::new(Mutex::new(0));
        let count = told.clone();
        let uninstall = move || *count.lock().unwrap() += 1;
        let mut writer = Writer::new(client, String::new(), settings, receiver, shared, uninstall);
        writer.take(Said::Node(Event::InitDone));
        writer.take(Said::Request(Event::InitApply(request("u1"))));
        writer.take(Said::Request(Event::Apply(request("u1"))));
        assert_eq!((handle.request(), *told.lock().unwrap()), (Request::Uninstall("u1".into()), 1));
        handle.report(cleaned("u1"));
        assert!(writer.due(Instant::now()).is_some());
        // It is written, and deleted when all is done.
        writer.said_last = Some(cleaned("u1"));
        assert_eq!(writer.due(Instant::now()), None);
        // The uninstallation is begun anew.
        writer.take(Said::Request(Event::Delete(request("u1"))));
        assert!(matches!(handle.request(), Request::None(_)));
        writer.take(Said::Request(Event::Apply(request("u2"))));
        assert_eq!((handle.request(), *told.lock().unwrap()), (Request::Uninstall("u2".into()), 2));
        handle.report(cleaned("u2"));
        assert!(writer.due(Instant::now()).is_some());
        // A list that was read anew may leave out the deletion.
        writer.take(Said::Request(Event::Init));
        writer.take(Said::Request(Event::InitApply(request("u3"))));
        assert_eq!(handle.request(), Request::Uninstall("u3".into()));
    }
}
