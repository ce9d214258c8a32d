//! The API server as a source: what an agent is told, and what it is not told when things break.

use std::{
    path::Path,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use meshlb::{
    model::{
        ids::{Family, PerFamily},
        node::{MarkMask, NodeConfig, NodeSays},
        snapshot::Event,
    },
    source::{SourceMessage, kube},
};

use crate::{Case, kubectl::Cluster, relay::Relay};

pub const CASES: [Case; 7] = [
    ("source::tells_what_is_there_and_what_changes", changes),
    ("source::api_server_that_goes_and_comes_back", goes_and_comes_back),
    ("source::api_server_that_falls_silent", falls_silent),
    ("source::etcd_that_goes_and_comes_back", etcd_goes),
    ("source::without_the_crd", without_crd),
    ("source::without_rights", without_rights),
    ("source::what_the_node_says", node_says),
];

/// What a source has told so far.
struct Told {
    messages: Receiver<SourceMessage>,
    events: Vec<String>,
    problems: Vec<String>,
    node: Option<NodeSays>,
    refused: Vec<String>,
    synced: bool,
}

fn config(node: &str) -> Result<NodeConfig> {
    Ok(NodeConfig {
        name: node.into(),
        ranges: PerFamily { v4: Some("10.200.0.0/16".parse()?), v6: None },
        publish_range: 30000..=32767,
        reserved: vec![],
        mask: MarkMask::default(),
        zone: None,
    })
}

impl Told {
    fn begin(kubeconfig: &Path, node: Option<&str>) -> Result<Told> {
        Self::begin_with(kubeconfig, config(node.unwrap_or("n1"))?, node.is_some())
    }

    fn begin_with(kubeconfig: &Path, config: NodeConfig, node_required: bool) -> Result<Told> {
        let access = kube::config(Some(kubeconfig))?;
        let (sender, messages) = channel();
        kube::watch(access, config, node_required, sender)?;
        let (events, problems, refused) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Told { messages, events, problems, node: None, refused, synced: false })
    }

    fn take(&mut self, message: SourceMessage) {
        match message {
            SourceMessage::Events(events, _) => self.events.extend(events.iter().map(text)),
            SourceMessage::Problems(problems) => {
                self.problems = problems.iter().map(ToString::to_string).collect()
            }
            SourceMessage::Node(says) => self.node = Some(says),
            SourceMessage::Synced => self.synced = true,
            SourceMessage::Refused(services) => {
                self.refused =
                    services.iter().map(|(key, refusal)| format!("{key}: {}", refusal.why)).collect();
            }
            SourceMessage::Lock(_) => {}
        }
    }

    /// Listens until it is true.
    fn until(&mut self, what: &str, within: Duration, done: impl Fn(&Told) -> bool) -> Result<Duration> {
        let start = Instant::now();
        while !done(self) {
            let left = within.checked_sub(start.elapsed());
            let Some(left) = left else {
                bail!("not within {within:?}: {what}; told: {:?}, problems: {:?}", self.events, self.problems)
            };
            match self.messages.recv_timeout(left) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the source has ended: {what}"),
            }
        }
        Ok(start.elapsed())
    }

    /// Listens for so long.
    fn listen(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if let Ok(message) = self.messages.recv_timeout(left) {
                self.take(message);
            }
        }
    }

    fn says(&self, text: &str) -> bool {
        self.problems.iter().any(|problem| problem.contains(text))
    }
}

fn text(event: &Event) -> String {
    match event {
        Event::Service(s) => {
            let vip = s.granted.as_ref().and_then(|granted| granted.vips.get(Family::V4));
            let vip = vip.map_or_else(|| "no VIP".to_owned(), ToString::to_string);
            format!("{}:{} {vip}", s.key, s.ports[0].port)
        }
        Event::Granted(key, granted) => {
            let vip = granted.vips.get(Family::V4);
            format!("{key} has {}", vip.map_or_else(|| "no VIP".to_owned(), ToString::to_string))
        }
        Event::ServiceGone(key) => format!("-{key}"),
        Event::Slice(s) => format!("slice {} {}", s.key, s.endpoints.len()),
        Event::SliceGone(key) => format!("-slice {key}"),
    }
}

/// How long the API server is away: longer than any wait between two tries.
const OUTAGE: Duration = Duration::from_secs(150);
const PATIENCE: Duration = Duration::from_secs(15);

/// A namespace of the case's own.
fn namespace(cluster: &Cluster, name: &str) -> Result<()> {
    let text = format!(r#"{{"apiVersion": "v1", "kind": "Namespace", "metadata": {{"name": "{name}"}}}}"#);
    cluster.kubectl(&["apply", "-f", "-"], &text)?.good().map(|_| ())
}

fn web(namespace: &str, port: u16) -> String {
    format!(
        "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: web, namespace: {namespace}}}\n\
         spec: {{ports: [{{port: {port}}}]}}\n"
    )
}

fn slice(namespace: &str, addresses: &[&str]) -> String {
    let endpoints: Vec<String> = addresses.iter().map(|a| format!("{{addresses: [{a}]}}")).collect();
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: [{{port: 8080}}]\n\
         metadata: {{name: web-1, namespace: {namespace}, labels: {{kubernetes.io/service-name: web}}}}\n\
         endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

/// `web` with one endpoint in a namespace of the case's own, and a source that has told of it.
fn web_is_known(cluster: &Cluster, namespace_name: &str) -> Result<Told> {
    cluster.install_crds()?;
    namespace(cluster, namespace_name)?;
    cluster.apply(&(web(namespace_name, 80) + &slice(namespace_name, &["10.244.1.1"])))?;
    let mut told = Told::begin(&cluster.kubeconfig(), None)?;
    told.until("synced", PATIENCE, |t| t.synced)?;
    Ok(told)
}

fn changes(cluster: &Cluster) -> Result<()> {
    let mut told = web_is_known(cluster, "changes")?;
    for event in ["changes/web:80 no VIP", "slice changes/web-1 1"] {
        ensure!(told.events.iter().any(|e| e == event), "no {event}: {:?}", told.events);
    }
    told.events.clear();
    cluster.apply(&slice("changes", &["10.244.1.1", "10.244.1.2"]))?;
    told.until("one endpoint more", PATIENCE, |t| t.events == ["slice changes/web-1 2"])?;
    told.events.clear();
    let status = r#"{"status": {"vips": ["10.200.7.7"]}}"#;
    let patch =
        ["patch", "msvc", "web", "-n", "changes", "--subresource=status", "--type=merge", "-p", status];
    cluster.kubectl(&patch, "")?.good()?;
    told.until("a VIP is granted", PATIENCE, |t| t.events == ["changes/web:80 10.200.7.7"])?;
    told.events.clear();
    cluster.kubectl(&["delete", "msvc,endpointslice", "--all", "-n", "changes"], "")?.good()?;
    told.until("gone", PATIENCE, |t| t.events == ["-changes/web", "-slice changes/web-1"])?;
    ensure!(told.problems.is_empty(), "{:?}", told.problems);
    Ok(())
}

fn goes_and_comes_back(cluster: &Cluster) -> Result<()> {
    let mut told = web_is_known(cluster, "outage")?;
    told.events.clear();
    cluster.hold("kube-apiserver", true)?;
    let noticed = told.until("told that it can't be reached", PATIENCE, |t| t.says("can't be reached"));
    told.listen(OUTAGE);
    cluster.hold("kube-apiserver", false)?;
    noticed?;
    ensure!(told.events.is_empty(), "told while it was away: {:?}", told.events);
    cluster.wait_ready()?;
    cluster.apply(&web("outage", 81))?;
    told.until("a change afterwards", Duration::from_secs(30), |t| {
        t.events.contains(&"outage/web:81 no VIP".to_owned())
    })?;
    ensure!(told.events.iter().all(|e| !e.starts_with('-')), "something was taken away: {:?}", told.events);
    told.until("no longer a problem", Duration::from_secs(60), |t| t.problems.is_empty())?;
    cluster.kubectl(&["delete", "namespace", "outage", "--wait=false"], "")?.good()?;
    Ok(())
}

/// A connection that is not closed and says nothing any more is given up, and another one tells what was missed.
fn falls_silent(cluster: &Cluster) -> Result<()> {
    web_is_known(cluster, "silence")?;
    let relay = Relay::start(cluster.port()?)?;
    let admin = std::fs::read_to_string(cluster.kubeconfig())?;
    let file = tempfile::NamedTempFile::new()?;
    let through = admin.replace(&format!(":{}", cluster.port()?), &format!(":{}", relay.port()));
    ensure!(through != admin, "no port in the kubeconfig");
    std::fs::write(file.path(), through)?;
    let mut told = Told::begin(file.path(), None)?;
    told.until("synced", PATIENCE, |t| t.synced)?;
    // Quiet for longer than a connection may be: a kind of which nothing happens has nothing to tell, and that is no problem.
    told.listen(Duration::from_secs(130));
    ensure!(told.problems.is_empty(), "a quiet watch is taken for a broken one: {:?}", told.problems);
    told.events.clear();
    relay.fall_silent();
    cluster.apply(&web("silence", 81))?;
    let missed = told.until("what changed meanwhile", Duration::from_secs(125), |t| {
        t.events.contains(&"silence/web:81 no VIP".to_owned())
    })?;
    println!("        the change was told after {missed:.1?}");
    ensure!(told.events.iter().all(|e| !e.starts_with('-')), "something was taken away: {:?}", told.events);
    cluster.kubectl(&["delete", "namespace", "silence", "--wait=false"], "")?.good()?;
    Ok(())
}

/// Without its store the API server answers errors, and lists nothing. Nothing is taken away for that.
fn etcd_goes(cluster: &Cluster) -> Result<()> {
    let mut told = web_is_known(cluster, "store")?;
    told.events.clear();
    cluster.hold("etcd", true)?;
    told.listen(Duration::from_secs(20));
    let refused = cluster.apply(&web("store", 81)).is_err();
    cluster.hold("etcd", false)?;
    ensure!(refused, "a change was taken without a store");
    ensure!(told.events.is_empty(), "told while it was away: {:?}", told.events);
    cluster.wait_ready()?;
    cluster.apply(&web("store", 82))?;
    told.until("a change afterwards", Duration::from_secs(60), |t| {
        t.events.contains(&"store/web:82 no VIP".to_owned())
    })?;
    ensure!(told.events.iter().all(|e| !e.starts_with('-')), "something was taken away: {:?}", told.events);
    cluster.kubectl(&["delete", "namespace", "store", "--wait=false"], "")?.good()?;
    Ok(())
}

fn without_crd(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["delete", "crd", "meshservices.meshlb.dev", "--ignore-not-found"], "")?.good()?;
    let mut told = Told::begin(&cluster.kubeconfig(), None)?;
    told.until("told to install it", PATIENCE, |t| t.says("install the CRD"))?;
    ensure!(!told.synced, "synced without MeshServices");
    cluster.install_crds()?;
    told.until("synced", Duration::from_secs(30), |t| t.synced)?;
    Ok(())
}

fn without_rights(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let token = cluster.kubectl(&["create", "token", "default", "--duration=10m"], "")?.good()?;
    let admin = std::fs::read_to_string(cluster.kubeconfig())?;
    let own = admin.lines().find_map(|l| l.split_once("token: ")).context("no token in the kubeconfig")?.1;
    let own = own.trim_end_matches(['}', ']']);
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), admin.replace(own, token.trim()))?;
    let mut told = Told::begin(file.path(), None)?;
    told.until("told what it may not do", PATIENCE, |t| {
        t.says("may not list and watch meshservices.meshlb.dev")
            && t.says("may not list and watch endpointslices")
    })?;
    ensure!(!told.synced && told.events.is_empty(), "told something: {:?}", told.events);
    std::fs::write(file.path(), admin.replace(own, "nobody"))?;
    let mut told = Told::begin(file.path(), None)?;
    told.until("told that nobody knows it", PATIENCE, |t| t.says("does not accept our credentials"))?;
    Ok(())
}

fn node_says(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let mut told = Told::begin(&cluster.kubeconfig(), Some("n7"))?;
    told.until("told that there is no such Node", PATIENCE, |t| t.says("there is no Node n7"))?;
    ensure!(!told.synced, "synced without its own Node");
    cluster.apply(
        "{apiVersion: v1, kind: Node, metadata: {name: n7}, spec: {podCIDR: 10.244.7.0/24, podCIDRs: [10.244.7.0/24, '2001:db8:7::/64']}}",
    )?;
    let status = r#"{"status": {"addresses": [{"type": "Hostname", "address": "n7"}, {"type": "InternalIP", "address": "192.168.50.7"},
        {"type": "InternalIP", "address": "fd00:50::7"}, {"type": "InternalIP", "address": "192.168.51.7"}]}}"#;
    cluster
        .kubectl(&["patch", "node", "n7", "--subresource=status", "--type=merge", "-p", status], "")?
        .good()?;
    let want = PerFamily { v4: Some("192.168.50.7".parse()?), v6: Some("fd00:50::7".parse()?) };
    let pods: Vec<ipnet::IpNet> = vec!["10.244.7.0/24".parse()?, "2001:db8:7::/64".parse()?];
    let says = |t: &Told, zone: Option<&str>| {
        t.node == Some(NodeSays { addresses: want, zone: zone.map(Into::into), pods: pods.clone() })
    };
    told.until("its addresses", PATIENCE, |t| says(t, None) && t.synced)?;
    ensure!(told.problems.is_empty(), "{:?}", told.problems);
    let label = |text: &str| cluster.kubectl(&["label", "--overwrite", "node", "n7", text], "")?.good();
    label("topology.kubernetes.io/zone=eu-1a")?;
    told.until("its zone", PATIENCE, |t| says(t, Some("eu-1a")))?;
    // As commands that look once.
    let loaded = kube::load(kube::config(Some(&cluster.kubeconfig()))?, config("n7")?)?;
    ensure!(loaded.node == told.node, "{:?}", loaded.node);
    label("topology.kubernetes.io/zone-")?;
    told.until("no zone", PATIENCE, |t| says(t, None))?;
    cluster.kubectl(&["delete", "node", "n7"], "")?.good()?;
    Ok(())
}
