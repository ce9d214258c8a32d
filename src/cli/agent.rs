//! `meshlb agent`: keeps the kernel as a folder or the API server says.

use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::Result;
use tracing::{error, info, warn};

use super::{
    dns::Feed,
    keeper::Purpose,
    options::Options,
    session::Session,
    watcher::{Traffic, Watcher},
};
use crate::{
    admin::{AdminServer, Health},
    dataplane::monitor::Monitor,
    instance::Instance,
    meshnode::{
        Report, State,
        writer::{self, Handle, Request},
    },
    metrics::{Metrics, Series},
    model::{node::NodeConfig, unread::Unread},
    reconcile::agent::{Agent, Input, Pace},
    source::{
        self, Origin, Problem, SourceMessage,
        problem::{Severity, unread},
        watch::FolderId,
    },
};

/// `/livez` fails when the loop has not come round for this long. A turn over 10,000 services after a
/// start takes seconds on slow machines.
const STALLED_AFTER: Duration = Duration::from_secs(120);
/// The API server is given this long to say whether an uninstallation is asked for, and to take a last report.
const TOLD_WITHIN: Duration = Duration::from_secs(10);
/// An address for metrics that is taken is tried again after this long.
const ADMIN_RETRY: Duration = Duration::from_secs(10);

/// Runs until [`super::signals::stop`]. The kernel keeps what it has when the agent goes, however it goes; unless an
/// uninstallation is asked for, in Kubernetes: then everything is removed.
///
/// # Errors
/// What kept it from starting.
pub fn run(options: &Options, source: &str, namespace: Option<String>) -> Result<ExitCode> {
    super::log(options)?;
    let source = Origin::from_flag(source)?;
    let ranges: Vec<String> = options.vip_cidr.iter().map(ToString::to_string).collect();
    let about =
        format!("`meshlb agent`, pid {}, source {source}, ranges {}", std::process::id(), ranges.join(" "));
    let _instance = Instance::take(about)?;
    let (sender, inputs) = mpsc::channel();
    stop_on_signal(sender.clone())?;
    let health = Health::new(STALLED_AFTER);
    let metrics = Metrics::new();
    let node = match &source {
        Origin::Kube => Some(report_to(options, namespace, sender.clone())?),
        Origin::Folder(_) => None,
    };
    let ran = serve(options, &source, node.as_ref(), (&metrics, &health), sender, &inputs);
    let Some(node) = node else { return ran };
    if let Err(e) = &ran {
        node.report(Report::of(State::StartFailed(format!("{e:#}"))));
        // Where neither can be had, the log has to do.
        if !matches!(node.wait_for_request(TOLD_WITHIN), Request::Uninstall(_)) {
            node.flush(TOLD_WITHIN);
        }
    }
    if matches!(node.request(), Request::Uninstall(_)) {
        return super::uninstall::hold_off(options, &node, (&metrics, &health), &inputs);
    }
    ran
}

/// Starts what keeps the node's MeshNode and looks for a request to uninstall.
fn report_to(options: &Options, namespace: Option<String>, inputs: Sender<Input>) -> Result<Handle> {
    let access = source::kube::config(options.kubeconfig.as_deref())?;
    let settings = writer::Settings {
        node: options.settings()?.node.name.to_string(),
        namespace: super::controller::namespace(namespace),
    };
    Ok(writer::start(access, settings, move || {
        // The receiver is gone only when the agent ends.
        let _ = inputs.send(Input::HoldOff);
    })?)
}

/// The agent proper: until it is to end, or to hold off.
fn serve(
    options: &Options,
    source: &Origin,
    node: Option<&Handle>,
    (metrics, health): (&Metrics, &Health),
    sender: Sender<Input>,
    inputs: &Receiver<Input>,
) -> Result<ExitCode> {
    let session = Session::open(options, Some(source.clone()), Purpose::Agent)?;
    let addresses = sender.clone();
    let ranges = session.engine.settings().node.ranges;
    let _monitor = Monitor::spawn(ranges, move |_| {
        let _ = addresses.send(Input::NodeChanged);
    })?;
    let pace = Pace { resync: options.resync, probe: Duration::from_secs(1) };
    info!(node = %session.engine.settings().node.name, renderer = session.engine.dataplane.netfilter.name(), %source, "agent starts");
    let before = session.keeper.folder();
    let messages = watch(options, source, session.engine.settings().node.clone(), before)?;
    forward(messages, metrics.clone(), node.cloned(), sender)?;
    let traffic = Traffic::open()?;
    metrics.set_traffic_source(Box::new(traffic.clone()));
    if let Some(addr) = options.metrics_listen.0 {
        serve_admin(addr, Arc::new(metrics.clone()), health.clone())?;
    }
    let dns = Feed::start(options, source, &session.engine, session.keeper.labels(), metrics)?;
    let watcher = Watcher::new(session.keeper, metrics.clone(), health.clone(), traffic, dns, node.cloned());
    let asked = Agent::new(session.engine, watcher, pace).run(inputs);
    Ok(if asked { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Serves metrics and health, now or as soon as the address can be had: that nobody can look is no reason not to work.
pub fn serve_admin(addr: SocketAddr, metrics: Arc<dyn Series>, health: Health) -> Result<()> {
    let start = move || AdminServer::start(addr, metrics.clone(), health.clone());
    let first = start();
    if let Err(e) = &first {
        error!("{e}; it is tried again every {} s, and everything else goes on", ADMIN_RETRY.as_secs());
    }
    thread::Builder::new().name("admin".into()).spawn(move || {
        let mut server = first;
        while server.is_err() {
            thread::sleep(ADMIN_RETRY);
            server = start();
        }
        info!("metrics on {addr}");
        // It serves until it is dropped.
        loop {
            thread::park();
        }
    })?;
    Ok(())
}

/// Begins to follow the source.
fn watch(
    options: &Options,
    source: &Origin,
    config: NodeConfig,
    before: Option<FolderId>,
) -> Result<Receiver<SourceMessage>> {
    let (sender, messages) = mpsc::channel();
    match source {
        Origin::Folder(dir) => drop(source::watch::watch(dir, config, sender, before)?),
        Origin::Kube => {
            let access = source::kube::config(options.kubeconfig.as_deref())?;
            source::kube::watch(access, config, options.node_ip.is_empty(), sender)?;
        }
    }
    Ok(messages)
}

/// Tells that nothing more is heard of the source, however the thread ends that forwards it: by itself, or since the one that
/// reads it has ended.
struct Lost(Sender<Input>);

impl Drop for Lost {
    fn drop(&mut self) {
        // Where nobody receives, the agent ends anyway.
        let _ = self.0.send(Input::SourceLost);
    }
}

/// Forwards what the source says, and logs what is wrong with it.
///
/// # Errors
/// The thread can't be started.
pub fn forward(
    messages: Receiver<SourceMessage>,
    metrics: Metrics,
    node: Option<Handle>,
    inputs: Sender<Input>,
) -> Result<()> {
    thread::Builder::new().name("source".into()).spawn(move || {
        let _lost = Lost(inputs.clone());
        let mut hidden = Unread::default();
        let mut synced = false;
        let mut known: Vec<Problem> = Vec::new();
        for message in messages {
            let input = match message {
                SourceMessage::Events(events, seen) => Some(Input::Events(events, seen)),
                SourceMessage::Lock(lock) => Some(Input::Lock(lock)),
                SourceMessage::Node(says) => Some(Input::Node(says)),
                SourceMessage::Refused(services) => Some(Input::Refused(services)),
                SourceMessage::Synced => {
                    // Nothing is programmed anew in the middle of an uninstallation.
                    if let Some(node) = &node {
                        node.wait_for_request(TOLD_WITHIN);
                    }
                    synced = true;
                    Some(Input::Synced(hidden.clone()))
                }
                SourceMessage::Problems(problems) => {
                    tell(&known, &problems);
                    metrics
                        .problems("source", problems.iter().filter(|p| p.severity > Severity::Note).count());
                    let before = std::mem::replace(&mut hidden, unread(&problems));
                    known = problems;
                    (hidden != before && synced).then(|| Input::Synced(hidden.clone()))
                }
            };
            if let Some(input) = input
                && inputs.send(input).is_err()
            {
                return;
            }
        }
    })?;
    Ok(())
}

/// Logs problems that are new, and those that are over.
fn tell(known: &[Problem], now: &[Problem]) {
    for problem in now.iter().filter(|p| !known.contains(p)) {
        match problem.severity {
            Severity::Error | Severity::Refused => error!("{problem}"),
            Severity::Warning => warn!("{problem}"),
            Severity::Note => info!("{problem}"),
        }
    }
    for problem in known.iter().filter(|p| p.severity > Severity::Note && !now.contains(p)) {
        info!("no longer: {problem}");
    }
}

fn stop_on_signal(inputs: Sender<Input>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            match super::signals::stop() {
                Ok(stop) => {
                    stop.await;
                    let _ = inputs.send(Input::Stop);
                }
                Err(e) => error!("signals can't be handled, only SIGKILL will end this process: {e}"),
            }
        });
    })?;
    Ok(())
}
