//! The controller: what it gives, and that it never gives anything twice.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use meshlb::{
    controller::{
        numbers::Numbers,
        pools::{PoolId, Pools},
    },
    model::{
        ids::{Family, PerFamily},
        node::{MarkMask, NodeConfig},
    },
};
use serde_json::Value;

use crate::{Case, kubectl::Cluster};

pub const CASES: [Case; 7] = [
    ("controller::gives_and_tells", gives_and_tells),
    ("controller::conflicts_name_the_other", conflicts),
    ("controller::earlier_leader_is_refused", refused),
    ("controller::gives_the_lease_up", gives_up),
    ("controller::dies_while_it_gives_out_500", dies),
    ("controller::stopped_past_its_lease", stopped),
    ("controller::clock_that_jumps", clock),
];

pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const NAMESPACE: &str = "meshlb-system";

/// A controller that is ended with the case.
pub(super) struct Controller {
    child: Child,
    log: PathBuf,
}

impl Controller {
    pub(super) fn start(cluster: &Cluster, name: &str) -> Result<Controller> {
        Self::start_as(cluster, &cluster.kubeconfig(), name, "off")
    }

    /// With another account, and listening there.
    pub(super) fn start_as(
        cluster: &Cluster,
        kubeconfig: &Path,
        name: &str,
        listen: &str,
    ) -> Result<Controller> {
        Self::start_with(Command::new(cluster.program()), kubeconfig, name, listen)
    }

    fn start_with(mut program: Command, kubeconfig: &Path, name: &str, listen: &str) -> Result<Controller> {
        let log = std::env::temp_dir().join(format!("meshlb-controller-{}-{name}.log", std::process::id()));
        let child = program
            .args(["controller", "--namespace", NAMESPACE, "--identity", name, "--metrics-listen", listen])
            .args(["--kubeconfig", &kubeconfig.to_string_lossy()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        Ok(Controller { child, log })
    }

    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(super) fn signal(&self, name: &str) -> Result<()> {
        let done = Command::new("kill").args([name, &self.child.id().to_string()]).status()?;
        ensure!(done.success(), "kill {name}");
        Ok(())
    }

    pub(super) fn until_it_says(&self, text: &str) -> Result<Duration> {
        until(text, PATIENCE, || Ok(self.log().contains(text))).with_context(|| self.log())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

pub(super) fn until(
    what: &str,
    within: Duration,
    mut done: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > within {
            bail!("not within {within:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(start.elapsed())
}

/// The CRD, the controller's namespace, and one of the case's own; no Lease of an earlier case, and no services.
pub(super) fn prepare(cluster: &Cluster, own: &str) -> Result<()> {
    cluster.install_crds()?;
    for name in [NAMESPACE, own] {
        cluster.apply(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}"))?;
    }
    cluster.kubectl(&["delete", "lease", "--all", "-n", NAMESPACE], "")?.good()?;
    cluster.kubectl(&["delete", "msvc", "--all", "-A"], "")?.good()?;
    // A node whose agent has nothing to complain of.
    cluster.apply("{apiVersion: v1, kind: Node, metadata: {name: serves}}")?;
    cluster.apply("{apiVersion: meshlb.dev/v1alpha1, kind: MeshNode, metadata: {name: serves}}")?;
    let serves = r#"{"status": {"conditions": [{"type": "Serving", "status": "True", "reason": "Serving", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}"#;
    let patch = ["patch", "meshnode", "serves", "--subresource=status", "--type=merge", "-p", serves];
    cluster.kubectl(&patch, "")?.good()?;
    Ok(())
}

pub(super) fn service(cluster: &Cluster, namespace: &str, name: &str, spec: &str) -> Result<()> {
    cluster.apply(&manifest(namespace, name, spec))
}

pub(super) fn manifest(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {spec}\n"
    )
}

pub(super) fn get(cluster: &Cluster, args: &[&str]) -> Result<Value> {
    let text = cluster.kubectl(&[&["get", "-o", "json"], args].concat(), "")?.good()?;
    Ok(serde_json::from_str(&text)?)
}

pub(super) fn msvc(cluster: &Cluster, namespace: &str, name: &str) -> Result<Value> {
    get(cluster, &["msvc", name, "-n", namespace])
}

/// A condition as `STATUS REASON: MESSAGE`.
pub(super) fn condition(object: &Value, type_: &str) -> String {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().find(|c| c["type"] == type_).map_or_else(String::new, |c| {
        let text = |field: &str| c[field].as_str().unwrap_or_default();
        format!("{} {}: {}", text("status"), text("reason"), text("message"))
    })
}

pub(super) fn until_condition(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    type_: &str,
    start: &str,
) -> Result<Value> {
    let mut last = Value::Null;
    until(&format!("{name}: {type_} {start}"), PATIENCE, || {
        last = msvc(cluster, namespace, name)?;
        Ok(condition(&last, type_).starts_with(start))
    })
    .with_context(|| format!("{:#}", last["status"]))?;
    Ok(last)
}

fn pool(cluster: &Cluster, name: &str) -> Result<String> {
    let object = get(cluster, &["configmap", &format!("meshlb-pool-{name}"), "-n", NAMESPACE])?;
    Ok(object["data"]["numbers"].as_str().unwrap_or_default().to_owned())
}

fn gives_and_tells(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "gives")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    service(cluster, "gives", "vote", "{ports: [{name: http, port: 80, publish: {port: 30099}}]}")?;
    let vote = until_condition(cluster, "gives", "vote", "Allocated", "True Allocated")?;
    let vip = vote["status"]["vips"][0].as_str().context("no VIP")?.to_owned();
    ensure!(vip.starts_with("10.200."), "{vip}");
    ensure!(vote["status"]["ports"][0]["publishedPort"] == 30099, "{:#}", vote["status"]);
    ensure!(vote["status"]["observedGeneration"] == 1, "{:#}", vote["status"]);
    ensure!(condition(&vote, "Ready").starts_with("False NoEndpoints"), "{}", condition(&vote, "Ready"));
    ensure!(
        condition(&vote, "Programmed").starts_with("True Programmed"),
        "{}",
        condition(&vote, "Programmed")
    );
    ensure!(
        pool(cluster, "tcp")? == "30099" && !pool(cluster, "ipv4")?.is_empty(),
        "the pools do not say so"
    );
    let table = cluster.kubectl(&["get", "msvc", "-n", "gives"], "")?.good()?;
    ensure!(table.contains(&vip) && table.contains("30099/TCP") && table.contains("0/0"), "{table}");
    let events = cluster.kubectl(&["get", "events", "-n", "gives"], "")?.good()?;
    ensure!(events.contains("Allocated") && events.contains(&vip), "{events}");
    // What is as it should be is not written again.
    let version = vote["metadata"]["resourceVersion"].clone();
    std::thread::sleep(Duration::from_secs(6));
    ensure!(
        msvc(cluster, "gives", "vote")?["metadata"]["resourceVersion"] == version,
        "written without a change"
    );
    // Endpoints are counted.
    cluster.apply(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: [{port: 8080}]\n\
         metadata: {name: vote-1, namespace: gives, labels: {kubernetes.io/service-name: vote}}\n\
         endpoints: [{addresses: [10.244.1.1]}, {addresses: [10.244.1.2], conditions: {ready: false}}]\n",
    )?;
    let vote = until_condition(cluster, "gives", "vote", "Ready", "True Serving")?;
    ensure!(vote["status"]["summary"]["endpoints"] == "1/2", "{:#}", vote["status"]);
    ensure!(vote["status"]["vips"][0] == *vip, "another VIP");
    // Another controller takes over, and changes nothing.
    let version = vote["metadata"]["resourceVersion"].clone();
    drop(controller);
    let next = Controller::start(cluster, "two")?;
    next.until_it_says("everything has been read")?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(
        msvc(cluster, "gives", "vote")?["metadata"]["resourceVersion"] == version,
        "written without a change"
    );
    // What is gone is given back.
    cluster.kubectl(&["delete", "msvc", "vote", "-n", "gives"], "")?.good()?;
    until("the pools are empty", PATIENCE, || {
        Ok(pool(cluster, "tcp")?.is_empty() && pool(cluster, "ipv4")?.is_empty())
    })?;
    Ok(())
}

fn conflicts(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "conflicts")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    service(cluster, "conflicts", "b", "{vips: [10.200.7.7], ports: [{port: 80, publish: {port: 30077}}]}")?;
    // Ages count whole seconds.
    std::thread::sleep(Duration::from_millis(1100));
    service(cluster, "conflicts", "a", "{vips: [10.200.7.7], ports: [{port: 80, publish: {port: 30077}}]}")?;
    until_condition(cluster, "conflicts", "b", "Allocated", "True")?;
    let a = until_condition(cluster, "conflicts", "a", "Allocated", "False")?;
    let message = condition(&a, "Allocated");
    for part in ["VIPTaken", "10.200.7.7 belongs to conflicts/b", "30077/TCP", "port 80/TCP of conflicts/b"] {
        ensure!(message.contains(part), "no {part:?} in {message}");
    }
    cluster.kubectl(&["delete", "msvc", "b", "-n", "conflicts"], "")?.good()?;
    let a = until_condition(cluster, "conflicts", "a", "Allocated", "True")?;
    ensure!(a["status"]["vips"][0] == "10.200.7.7", "{:#}", a["status"]);
    // A node port of a core Service.
    cluster.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: core, namespace: conflicts}, spec: {type: NodePort, \
         selector: {a: b}, ports: [{port: 80, nodePort: 30078}]}}",
    )?;
    service(cluster, "conflicts", "c", "{ports: [{port: 80, publish: {port: 30078}}]}")?;
    let c = until_condition(cluster, "conflicts", "c", "Allocated", "False PublishedPortTaken")?;
    ensure!(condition(&c, "Allocated").contains("Service conflicts/core"), "{}", condition(&c, "Allocated"));
    ensure!(c["status"]["vips"][0].is_string(), "what can be given is given: {:#}", c["status"]);
    cluster.kubectl(&["delete", "service", "core", "-n", "conflicts"], "")?.good()?;
    until_condition(cluster, "conflicts", "c", "Allocated", "True")?;
    // A field that nothing acts on yet.
    service(cluster, "conflicts", "d", "{sourceRanges: [10.0.0.0/8], ports: [{port: 80}]}")?;
    let d = until_condition(cluster, "conflicts", "d", "Accepted", "False NotSupportedYet")?;
    ensure!(condition(&d, "Accepted").contains("spec.sourceRanges"), "{}", condition(&d, "Accepted"));
    ensure!(d["status"]["vips"].is_null(), "{:#}", d["status"]);
    Ok(())
}

fn gives_up(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "gives-up")?;
    let mut first = Controller::start(cluster, "one")?;
    first.until_it_says("everything has been read")?;
    let second = Controller::start(cluster, "two")?;
    second.until_it_says("another controller leads")?;
    first.signal("-TERM")?;
    let took = second.until_it_says("this controller leads")?;
    ensure!(took < Duration::from_secs(6), "the lease was not given up: {took:?}");
    ensure!(first.child.wait()?.success(), "{}", first.log());
    Ok(())
}

/// Every service has a VIP and a published port, and no two have the same.
fn all_different(cluster: &Cluster, namespace: &str, count: usize) -> Result<bool> {
    let list = get(cluster, &["msvc", "-n", namespace])?;
    let items = list["items"].as_array().context("no list")?;
    ensure!(items.len() == count, "{} of {count} services", items.len());
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    let mut complete = true;
    for item in items {
        let name = item["metadata"]["name"].as_str().unwrap_or_default();
        let (vip, port) = (&item["status"]["vips"][0], &item["status"]["ports"][0]["publishedPort"]);
        complete &= vip.is_string() && port.is_number();
        for value in [vip, port].into_iter().filter(|v| !v.is_null()) {
            if let Some(other) = owners.insert(value.to_string(), name.to_owned()) {
                bail!("{value} is given to {other} and to {name}");
            }
        }
    }
    Ok(complete)
}

fn five_hundred(namespace: &str) -> String {
    (0..500).map(|i| manifest(namespace, &format!("s{i}"), "{ports: [{port: 80, publish: {}}]}")).collect()
}

/// Begins to create them, and returns when some of them have been given something.
fn begin_five_hundred(
    cluster: &Cluster,
    namespace: &'static str,
) -> Result<std::thread::JoinHandle<Result<String>>> {
    let (cluster_too, text) = (cluster.clone(), five_hundred(namespace));
    let create = std::thread::spawn(move || cluster_too.kubectl(&["create", "-f", "-"], &text)?.good());
    until("some are given", PATIENCE, || {
        let list = get(cluster, &["msvc", "-n", namespace])?;
        Ok(list["items"]
            .as_array()
            .is_some_and(|items| items.iter().filter(|i| i["status"]["vips"][0].is_string()).count() > 20))
    })?;
    Ok(create)
}

/// The fence itself: who took the pools before somebody else did can write them no more.
fn refused(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "refused")?;
    let config = NodeConfig {
        name: "n1".into(),
        ranges: PerFamily { v4: Some("10.200.0.0/16".parse()?), v6: None },
        publish_range: 30000..=32767,
        reserved: vec![],
        mask: MarkMask::default(),
        zone: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let access = meshlb::source::kube::config(Some(&cluster.kubeconfig()))?;
    runtime.block_on(async {
        let client = kube::Client::try_from(access)?;
        let take = |who| Pools::take(client.clone(), NAMESPACE, config.clone(), who);
        let mut first = take("one").await?;
        let mut used = first.used();
        used.insert(PoolId::Vips(Family::V4), Numbers([7].into()));
        first.write(&used).await?;
        let mut second = take("two").await?;
        ensure!(second.used() == used, "what was entered is gone");
        used.insert(PoolId::Vips(Family::V4), Numbers([7, 8].into()));
        match first.write(&used).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            other => bail!("the first one can still write: {other:?}"),
        }
        second.write(&used).await?;
        Ok(())
    })?;
    cluster.kubectl(&["delete", "configmap", "--all", "-n", NAMESPACE], "")?.good()?;
    Ok(())
}

fn dies(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "dies")?;
    let first = Controller::start(cluster, "one")?;
    first.until_it_says("everything has been read")?;
    let second = Controller::start(cluster, "two")?;
    let create = begin_five_hundred(cluster, "dies")?;
    first.signal("-KILL")?;
    let led = second.until_it_says("this controller leads");
    create.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    led?;
    until("all have all", Duration::from_secs(90), || all_different(cluster, "dies", 500))?;
    cluster.kubectl(&["delete", "msvc", "--all", "-n", "dies"], "")?.good()?;
    until("all is given back", Duration::from_secs(60), || Ok(pool(cluster, "tcp")?.is_empty()))?;
    Ok(())
}

fn stopped(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "stopped")?;
    let first = Controller::start(cluster, "one")?;
    first.until_it_says("everything has been read")?;
    let second = Controller::start(cluster, "two")?;
    // Stopped while it gives out.
    let create = begin_five_hundred(cluster, "stopped")?;
    first.signal("-STOP")?;
    let led = second.until_it_says("this controller leads");
    create.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    led?;
    until("all have all", Duration::from_secs(90), || all_different(cluster, "stopped", 500))?;
    let before = get(cluster, &["msvc", "-n", "stopped"])?;
    first.signal("-CONT")?;
    first.until_it_says("this controller leads no longer")?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(all_different(cluster, "stopped", 500)?, "something was taken away");
    let after = get(cluster, &["msvc", "-n", "stopped"])?;
    let statuses = |list: &Value| -> Vec<Value> {
        list["items"].as_array().into_iter().flatten().map(|i| i["status"].clone()).collect()
    };
    ensure!(statuses(&before) == statuses(&after), "the old leader has written");
    ensure!(!second.log().contains("leads no longer"), "{}", second.log());
    Ok(())
}

/// Hours forward and back, on the machine of the one that leads: it goes on leading and giving, and who waits goes on waiting.
fn clock(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "clock")?;
    let library =
        std::env::var("MESHLB_FAKETIME").context("MESHLB_FAKETIME: tests/cluster/run.sh sets it")?;
    ensure!(!library.is_empty(), "no libfaketime: tests/cluster/setup.sh unpacks it");
    let offset = tempfile::NamedTempFile::new()?;
    let set = |text: &str| std::fs::write(offset.path(), format!("{text}\n"));
    set("+0s")?;
    let mut program = Command::new(cluster.program());
    program
        .env("LD_PRELOAD", library)
        .env("FAKETIME_TIMESTAMP_FILE", offset.path())
        // A clock that is set, not one that runs otherwise.
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("FAKETIME_NO_CACHE", "1");
    let first = Controller::start_with(program, &cluster.kubeconfig(), "one", "off")?;
    first.until_it_says("everything has been read")?;
    let second = Controller::start(cluster, "two")?;
    let renewed = || -> Result<(String, String)> {
        let lease = get(cluster, &["lease", "meshlb-controller", "-n", NAMESPACE])?;
        let text = |name: &str| lease["spec"][name].as_str().unwrap_or_default().to_owned();
        Ok((text("holderIdentity"), text("renewTime")))
    };
    for (i, jump) in ["+3h", "-3h", "+0s"].into_iter().enumerate() {
        let (_, before) = renewed()?;
        set(jump)?;
        // It has taken the new time, and it is past what a lease lasts.
        until("the lease is renewed by the new time", PATIENCE, || {
            let (_, now) = renewed()?;
            let hours = |time: &str| time.get(..13).map(str::to_owned);
            Ok(hours(&now) != hours(&before))
        })?;
        let name = format!("s{i}");
        cluster.apply(&manifest("clock", &name, "{ports: [{port: 80, publish: {}}]}"))?;
        until("it has all", PATIENCE, || all_different(cluster, "clock", i + 1))?;
        std::thread::sleep(Duration::from_secs(17));
        let (holder, _) = renewed()?;
        ensure!(holder == "one", "{jump}: {holder:?} leads\n{}\n{}", first.log(), second.log());
    }
    ensure!(!first.log().contains("leads no longer"), "{}", first.log());
    ensure!(!second.log().contains("this controller leads"), "{}", second.log());
    // Who dies is followed as ever.
    first.signal("-KILL")?;
    second.until_it_says("this controller leads")?;
    Ok(())
}
