//! How much is asked of the API server, counted by its own audit log.

use std::{
    collections::BTreeMap,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use kube::{
    Api, Client,
    api::{ApiResource, Patch, PatchParams, PostParams},
    core::DynamicObject,
};
use meshlb::{
    api::MeshNode,
    meshnode::{Fault, Report, State},
    model::ids::ServiceKey,
};
use serde_json::{Value, json};

use super::controller::{Controller, NAMESPACE, get, manifest, prepare, until, until_condition};
use crate::{Case, kubectl::Cluster};

pub const CASES: [Case; 2] =
    [("requests::counted", counted), ("requests::counted_with_selectors", with_selectors)];

const ACCOUNT: &str = "counted";
const NODES: usize = 1000;
const SERVICES: usize = 1000;
/// Those with a selector.
const SELECTED: usize = 200;

/// Writes by what they are of, and everything else as `reads`.
fn writes(cluster: &Cluster, from: usize) -> Result<BTreeMap<String, usize>> {
    let mut out = BTreeMap::new();
    for line in cluster.asked_by(ACCOUNT, from)? {
        let mut parts = line.split(' ');
        let (verb, resource) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let what = match verb {
            "get" | "list" | "watch" => "reads".to_owned(),
            _ => format!("{verb} {resource}"),
        };
        *out.entry(what).or_default() += 1;
    }
    Ok(out)
}

/// Those that matter: all but the Lease's.
fn others(writes: &BTreeMap<String, usize>) -> usize {
    let counts = |what: &&String| *what != "reads" && *what != "update leases";
    writes.iter().filter(|(what, _)| counts(what)).map(|(_, n)| n).sum()
}

fn say(failing: Option<&ServiceKey>) -> Value {
    let fault =
        |key: &ServiceKey| (key.clone(), Fault { reason: "PublishedPortHeld", message: "it is held".into() });
    let named: Vec<_> = failing.map(fault).into_iter().collect();
    let report = Report { count: named.len(), named, ..Report::of(State::Serving) };
    json!({"status": report.status(None, jiff::Timestamp::UNIX_EPOCH)})
}

/// A thousand Nodes, each with a MeshNode.
async fn make_nodes(client: &Client) -> Result<()> {
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    let mesh: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::erase::<MeshNode>(&()));
    stream::iter(0..NODES)
        .map(|i| {
            let (nodes, mesh) = (&nodes, &mesh);
            async move {
                let name = format!("c{i:04}");
                let node = serde_json::from_value(json!({"metadata": {"name": name}}))?;
                nodes.create(&PostParams::default(), &node).await?;
                let object = json!({"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshNode", "metadata": {"name": name}});
                mesh.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
                let params = PatchParams::default();
                mesh.patch_status(&name, &params, &Patch::Merge(say(None))).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(16)
        .try_collect()
        .await
}

/// All of them say so.
async fn all_say(client: &Client, failing: Option<&ServiceKey>) -> Result<()> {
    let mesh: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::erase::<MeshNode>(&()));
    let (said, params) = (say(failing), PatchParams::default());
    stream::iter(0..NODES)
        .map(|i| {
            let (mesh, said, params) = (&mesh, &said, &params);
            async move { mesh.patch_status(&format!("c{i:04}"), params, &Patch::Merge(said)).await }
        })
        .buffer_unordered(16)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(())
}

fn slices(namespace: &str, addresses: &str) -> String {
    let one = |i: usize| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: [{{port: 8080}}]\n\
             metadata: {{name: s{i}-1, namespace: {namespace}, labels: {{kubernetes.io/service-name: s{i}}}}}\n\
             endpoints: [{addresses}]\n"
        )
    };
    (0..SERVICES).map(one).collect()
}

fn answer(port: u16, path: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn start(cluster: &Cluster, kubeconfig: &Path, name: &str, port: u16) -> Result<Controller> {
    Controller::start_as(cluster, kubeconfig, name, &format!("127.0.0.1:{port}"))
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Whose requests are counted.
fn account(cluster: &Cluster) -> Result<()> {
    cluster.apply(&format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {ACCOUNT}, namespace: {NAMESPACE}}}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {{name: {ACCOUNT}}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}}\n\
         subjects: [{{kind: ServiceAccount, name: {ACCOUNT}, namespace: {NAMESPACE}}}]\n"
    ))
}

fn all_ready(cluster: &Cluster, namespace: &str, count: usize) -> Result<bool> {
    let list = get(cluster, &["msvc", "-n", namespace])?;
    let ready = |i: &&Value| {
        i["status"]["conditions"]
            .as_array()
            .is_some_and(|c| c.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
    };
    Ok(list["items"].as_array().is_some_and(|items| items.iter().filter(ready).count() == count))
}

/// What is written since then, when no more comes. Events come behind.
fn until_quiet(cluster: &Cluster, from: usize) -> Result<BTreeMap<String, usize>> {
    let mut all = writes(cluster, from)?;
    until("it is quiet", Duration::from_secs(120), || {
        thread::sleep(Duration::from_secs(6));
        let now = writes(cluster, from)?;
        let same = others(&now) == others(&all);
        all = now;
        Ok(same)
    })?;
    Ok(all)
}

fn counted(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "counted")?;
    account(cluster)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let access = meshlb::source::kube::config(Some(&cluster.kubeconfig()))?;
    let client = runtime.block_on(async { Client::try_from(access) })?;
    clear(cluster)?;
    runtime.block_on(make_nodes(&client))?;
    cluster.apply(&slices("counted", "{addresses: [10.244.1.1]}"))?;

    let kubeconfig = cluster.kubeconfig_of(NAMESPACE, ACCOUNT, &[])?;
    let ports = (free_port()?, free_port()?);
    let leader = start(cluster, kubeconfig.path(), "leader", ports.0)?;
    leader.until_it_says("everything has been read")?;
    let second = start(cluster, kubeconfig.path(), "second", ports.1)?;
    second.until_it_says("another controller leads")?;

    // A thousand at once.
    let from = cluster.audited();
    let begun = Instant::now();
    let all: String = (0..SERVICES)
        .map(|i| manifest("counted", &format!("s{i}"), "{ports: [{port: 80, publish: {}}]}"))
        .collect();
    cluster.kubectl(&["create", "-f", "-"], &all)?.good()?;
    until("all are served", Duration::from_secs(240), || all_ready(cluster, "counted", SERVICES))?;
    let took = begun.elapsed();
    let creates = until_quiet(cluster, from)?;
    println!("  1,000 services at once, 1,000 nodes: {creates:?}, all ready after {took:.1?}");
    ensure!(others(&creates) <= 2 * SERVICES + 20, "more than two writes a service: {creates:?}");
    ensure!(creates.get("patch meshservices/status") == Some(&SERVICES), "{creates:?}");

    // A minute in which nothing happens.
    let from = cluster.audited();
    thread::sleep(Duration::from_secs(60));
    let minute = writes(cluster, from)?;
    println!("  a steady minute: {minute:?}");
    ensure!(others(&minute) == 0, "{minute:?}");

    // One endpoint of one service.
    let from = cluster.audited();
    let one = slices("counted", "{addresses: [10.244.1.1]}, {addresses: [10.244.1.2]}");
    cluster.apply(one.split("---").nth(1).unwrap_or_default())?;
    thread::sleep(Duration::from_secs(8));
    let change = writes(cluster, from)?;
    println!("  one endpoint more: {change:?}");
    ensure!(others(&change) == 1 && change.get("patch meshservices/status") == Some(&1), "{change:?}");

    // One service in another way, with 1,000 nodes that have nothing to say about it.
    let from = cluster.audited();
    cluster.apply(&manifest("counted", "s7", "{ports: [{port: 81, publish: {}}]}"))?;
    thread::sleep(Duration::from_secs(8));
    let change = writes(cluster, from)?;
    println!("  one service changed: {change:?}");
    ensure!(change.get("patch meshservices/status") == Some(&1), "{change:?}");

    // The same service fails on all nodes.
    let from = cluster.audited();
    let key = ServiceKey::new("counted", "s7");
    let begun = Instant::now();
    runtime.block_on(all_say(&client, Some(&key)))?;
    let took = begun.elapsed();
    let failed =
        until_condition(cluster, "counted", "s7", "Programmed", "False PublishedPortHeld: 1000 nodes")?;
    ensure!(failed["status"]["conditions"].to_string().contains("and 997 more"), "{:#}", failed["status"]);
    thread::sleep(Duration::from_secs(6));
    let change = writes(cluster, from)?;
    println!("  one service fails on 1,000 nodes within {took:.1?}: {change:?}");
    let most = 2 + took.as_secs() as usize / 5;
    ensure!(
        change.get("patch meshservices/status").is_some_and(|n| *n <= most),
        "{change:?}, at most {most}"
    );

    // One node fails as a whole, which is told in every status and in no Event.
    let from = cluster.audited();
    let mesh: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::erase::<MeshNode>(&()));
    let report = Report::of(State::ProgrammingFailed("no memory".into()));
    let said = json!({"status": report.status(None, jiff::Timestamp::UNIX_EPOCH)});
    runtime.block_on(mesh.patch_status("c0000", &PatchParams::default(), &Patch::Merge(said)))?;
    until_condition(cluster, "counted", "s999", "Programmed", "False NodeFailing")?;
    let change = until_quiet(cluster, from)?;
    println!("  one node fails as a whole: {change:?}");
    let statuses = change.get("patch meshservices/status").copied().unwrap_or_default();
    ensure!(statuses.abs_diff(SERVICES) <= 2 && others(&change) == statuses, "{change:?}");
    runtime.block_on(mesh.patch_status("c0000", &PatchParams::default(), &Patch::Merge(say(Some(&key)))))?;
    until_quiet(cluster, from)?;

    // What the two say of themselves.
    let metrics = answer(ports.0, "/metrics")?;
    for line in [
        "meshlb_controller_leader 1",
        "meshlb_controller_services 1000",
        r#"meshlb_pool_numbers{pool="ipv4",state="used"} 1000"#,
        r#"meshlb_pool_numbers{pool="ipv4",state="free"} 64532"#,
        r#"meshlb_pool_numbers{pool="tcp",state="used"} 1000"#,
        r#"meshlb_pool_numbers{pool="tcp",state="free"} 1768"#,
        r#"meshlb_controller_nodes{state="failing"} 1000"#,
    ] {
        ensure!(metrics.contains(&format!("\n{line}\n")), "no {line} in:\n{metrics}");
    }
    ensure!(answer(ports.1, "/metrics")?.contains("\nmeshlb_controller_leader 0\n"), "the second leads");
    let ready = answer(ports.0, "/readyz")?;
    ensure!(ready.contains("200 OK") && ready.contains("this controller leads"), "{ready}");
    let ready = answer(ports.1, "/readyz")?;
    ensure!(ready.contains("200 OK") && ready.contains("[+] election: leader leads"), "{ready}");
    cluster.hold("kube-apiserver", true)?;
    let unready = until("the second knows no leader", Duration::from_secs(30), || {
        Ok(answer(ports.1, "/readyz")?.contains("503"))
    });
    let said = answer(ports.1, "/readyz");
    cluster.hold("kube-apiserver", false)?;
    unready?;
    ensure!(said?.contains("[-] election: the Lease"), "it does not say why");
    cluster.wait_ready()?;
    drop((leader, second));
    cluster
        .kubectl(&["delete", "--raw", "/apis/meshlb.dev/v1alpha1/namespaces/counted/meshservices"], "")?
        .good()?;
    clear(cluster)?;
    cluster.kubectl(&["delete", "clusterrolebinding", ACCOUNT], "")?.good()?;
    Ok(())
}

/// All of them, to be deleted at once: there is no kubelet that would end them.
const PODS: &str = "/api/v1/namespaces/selected/pods?gracePeriodSeconds=0";

/// Pods that run, one for each service.
async fn make_pods(client: &Client, namespace: &str) -> Result<()> {
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(client.clone(), namespace);
    stream::iter(0..SELECTED)
        .map(|i| {
            let pods = &pods;
            async move {
                let name = format!("s{i}");
                let pod = json!({"metadata": {"name": name, "labels": {"app": name}},
                    "spec": {"nodeName": "serves", "containers": [{"name": "c", "image": "c"}]}});
                pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
                let ip = format!("10.244.{}.{}", i / 250, i % 250 + 1);
                let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                    "conditions": [{"type": "Ready", "status": "True"}]}});
                pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(16)
        .try_collect()
        .await
}

/// Services whose headless Services the controller makes, and whose EndpointSlices Kubernetes makes for these.
fn with_selectors(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "selected")?;
    account(cluster)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let access = meshlb::source::kube::config(Some(&cluster.kubeconfig()))?;
    let client = runtime.block_on(async { Client::try_from(access) })?;
    let kubeconfig = cluster.kubeconfig_of(NAMESPACE, ACCOUNT, &[])?;
    let controller = start(cluster, kubeconfig.path(), "leader", free_port()?)?;
    controller.until_it_says("everything has been read")?;
    // Of a run that failed.
    cluster.kubectl(&["delete", "--raw", PODS], "")?.good()?;
    runtime.block_on(make_pods(&client, "selected"))?;

    let from = cluster.audited();
    let begun = Instant::now();
    let spec = |i: usize| format!("{{selector: {{app: s{i}}}, ports: [{{port: 80, publish: {{}}}}]}}");
    let all: String = (0..SELECTED).map(|i| manifest("selected", &format!("s{i}"), &spec(i))).collect();
    cluster.kubectl(&["create", "-f", "-"], &all)?.good()?;
    until("all are served", Duration::from_secs(120), || all_ready(cluster, "selected", SELECTED))?;
    let took = begun.elapsed();
    let creates = until_quiet(cluster, from)?;
    println!("  200 services with a selector at once: {creates:?}, all ready after {took:.1?}");
    ensure!(creates.get("create services") == Some(&SELECTED), "{creates:?}");
    ensure!(!creates.contains_key("patch services"), "what was made is changed again: {creates:?}");
    let statuses = creates.get("patch meshservices/status").copied().unwrap_or_default();
    ensure!(statuses >= SELECTED && 10 * statuses <= 11 * SELECTED, "{creates:?}");
    // Its Service and its status; and, of all together, the pool objects and some Events.
    ensure!(2 * others(&creates) <= 5 * SELECTED, "more than 2.5 writes a service: {creates:?}");

    // A label more, which the pods do not have: one Service, and the status that says so.
    let from = cluster.audited();
    let more = "{selector: {app: s7, tier: x}, ports: [{port: 80, publish: {}}]}";
    cluster.apply(&manifest("selected", "s7", more))?;
    until_condition(cluster, "selected", "s7", "Ready", "False NoEndpoints")?;
    let change = until_quiet(cluster, from)?;
    println!("  another selector: {change:?}");
    ensure!(change.get("patch services") == Some(&1), "{change:?}");

    // All at rest.
    let from = cluster.audited();
    thread::sleep(Duration::from_secs(20));
    let rest = writes(cluster, from)?;
    ensure!(others(&rest) == 0, "{rest:?}");
    drop(controller);
    cluster
        .kubectl(&["delete", "--raw", "/apis/meshlb.dev/v1alpha1/namespaces/selected/meshservices"], "")?
        .good()?;
    cluster.kubectl(&["delete", "--raw", PODS], "")?.good()?;
    cluster.kubectl(&["delete", "clusterrolebinding", ACCOUNT], "")?.good()?;
    Ok(())
}

/// No nodes, by a request for each kind: one for each of a thousand takes minutes.
fn clear(cluster: &Cluster) -> Result<()> {
    for all in ["/api/v1/nodes", "/apis/meshlb.dev/v1alpha1/meshnodes"] {
        cluster.kubectl(&["delete", "--raw", all], "")?.good()?;
    }
    Ok(())
}
