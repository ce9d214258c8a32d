//! Core Services: the headless one that a selector asks for, and those that a MeshService names.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::controller::{
    Controller, PATIENCE, condition, get, msvc, prepare, service, until, until_condition,
};
use crate::{Case, kubectl::Cluster};

pub const CASES: [Case; 3] = [
    ("controller::selector_keeps_a_headless_service", selector),
    ("controller::selector_is_applied_while_the_first_status_waits", waiting),
    ("controller::counts_what_a_named_service_has", named),
];

const HTTP: &str = "ports: [{name: http, port: 80, targetPort: 8080}]";

fn selector(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "selector")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    service(cluster, "selector", "vote", &format!("{{selector: {{app: vote}}, {HTTP}}}"))?;
    until_condition(cluster, "selector", "vote", "Allocated", "True")?;
    let find = || get(cluster, &["service", "vote", "-n", "selector"]);
    until("the headless Service", PATIENCE, || Ok(find().is_ok()))?;
    let made = find()?;
    ensure!(made["spec"]["clusterIP"] == "None" && made["spec"]["selector"]["app"] == "vote", "{made:#}");
    cluster.apply("{apiVersion: v1, kind: Node, metadata: {name: n1}}")?;
    // A pod, without a kubelet: the controllers of Kubernetes make it an endpoint.
    cluster.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: vote-1, namespace: selector, labels: {app: vote}}, \
         spec: {nodeName: n1, containers: [{name: c, image: c}]}}",
    )?;
    let status = r#"{"status": {"phase": "Running", "podIP": "10.244.1.1", "podIPs": [{"ip": "10.244.1.1"}],
        "conditions": [{"type": "Ready", "status": "True"}]}}"#;
    cluster
        .kubectl(&["patch", "pod", "vote-1", "-n", "selector", "--subresource=status", "-p", status], "")?
        .good()?;
    let vote = until_condition(cluster, "selector", "vote", "Ready", "True Serving")?;
    ensure!(vote["status"]["summary"]["endpoints"] == "1/1", "{:#}", vote["status"]);
    // What is wrong changes nothing: the last valid version stays in force, with its selector.
    for wrong in ["selector: {app: other}", "serviceName: other"] {
        service(cluster, "selector", "vote", &format!("{{{wrong}, vips: [10.9.9.9], {HTTP}}}"))?;
        until_condition(cluster, "selector", "vote", "Accepted", "False Invalid: spec.vips")?;
        let vote = until_condition(cluster, "selector", "vote", "Ready", "True Serving")?;
        ensure!(vote["status"]["summary"]["endpoints"] == "1/1", "{:#}", vote["status"]);
        std::thread::sleep(Duration::from_secs(2));
        let same = find()?;
        ensure!(
            same["spec"] == made["spec"] && same["metadata"]["uid"] == made["metadata"]["uid"],
            "{same:#}"
        );
    }
    // Nor does it for the next controller, which has not seen that version.
    controller.signal("-TERM")?;
    let controller = Controller::start(cluster, "two")?;
    controller.until_it_says("everything has been read")?;
    until_condition(cluster, "selector", "vote", "Ready", "Unknown Invalid")?;
    std::thread::sleep(Duration::from_secs(2));
    let same = find()?;
    ensure!(same["spec"] == made["spec"] && same["metadata"]["uid"] == made["metadata"]["uid"], "{same:#}");
    service(cluster, "selector", "vote", &format!("{{selector: {{app: vote}}, {HTTP}}}"))?;
    until_condition(cluster, "selector", "vote", "Ready", "True Serving")?;
    // What somebody changes is put right.
    let patch = r#"{"spec": {"selector": {"app": "wrong"}}}"#;
    cluster.kubectl(&["patch", "service", "vote", "-n", "selector", "-p", patch], "")?.good()?;
    let selects = |what: &str, labels: Value| {
        until(what, PATIENCE, || Ok(find()?["spec"]["selector"] == labels))
            .with_context(|| find().map_or_else(|e| e.to_string(), |found| found["spec"].to_string()))
    };
    selects("its own selector again", json!({"app": "vote"}))?;
    let patch = r#"{"spec": {"selector": {"app": "wrong", "stranger": "x"}}}"#;
    cluster.kubectl(&["patch", "service", "vote", "-n", "selector", "-p", patch], "")?.good()?;
    selects("the stranger's label is gone", json!({"app": "vote"}))?;
    // A label less, and one that is called otherwise: with one of before the Service would find no pod.
    let labels =
        |labels: &str| service(cluster, "selector", "vote", &format!("{{selector: {labels}, {HTTP}}}"));
    labels("{app: vote, tier: back, zone: a}")?;
    selects("three labels", json!({"app": "vote", "tier": "back", "zone": "a"}))?;
    labels("{app: vote, tier: back}")?;
    selects("a label less", json!({"app": "vote", "tier": "back"}))?;
    labels("{app: vote, level: back}")?;
    selects("a label of another name", json!({"app": "vote", "level": "back"}))?;
    labels("{app: vote}")?;
    selects("one label", json!({"app": "vote"}))?;
    until_condition(cluster, "selector", "vote", "Ready", "True Serving")?;
    // It is made again, changed, and goes with the selector.
    cluster.kubectl(&["delete", "service", "vote", "-n", "selector"], "")?.good()?;
    until("the headless Service again", PATIENCE, || Ok(find().is_ok()))?;
    labels("{app: other}")?;
    selects("another selector", json!({"app": "other"}))?;
    service(cluster, "selector", "vote", &format!("{{{HTTP}}}"))?;
    until("no Service", PATIENCE, || Ok(find().is_err()))?;
    // Somebody else's is not touched.
    cluster.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: mine, namespace: selector}, spec: {ports: [{port: 1}]}}",
    )?;
    service(cluster, "selector", "mine", "{selector: {app: mine}, ports: [{port: 80}]}")?;
    until_condition(cluster, "selector", "mine", "Accepted", "False ServiceNameTaken")?;
    let mine = get(cluster, &["service", "mine", "-n", "selector"])?;
    ensure!(
        mine["spec"]["ports"][0]["port"] == 1 && mine["metadata"]["ownerReferences"].is_null(),
        "{mine:#}"
    );
    cluster.kubectl(&["delete", "pod", "vote-1", "-n", "selector", "--force", "--grace-period=0"], "")?;
    cluster.kubectl(&["delete", "node", "n1"], "")?.good()?;
    Ok(())
}

/// Nobody makes EndpointSlices: the first status waits for them.
fn waiting(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "waiting")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    cluster.hold("kube-controller-manager", true)?;
    std::thread::sleep(Duration::from_secs(1));
    let done = edits(cluster);
    cluster.hold("kube-controller-manager", false)?;
    done
}

fn edits(cluster: &Cluster) -> Result<()> {
    let find = |name: &str| get(cluster, &["service", name, "-n", "waiting"]);
    let selects = |name: &str, app: &str| {
        until(&format!("{name} selects {app}"), Duration::from_secs(4), || {
            Ok(find(name).is_ok_and(|found| found["spec"]["selector"]["app"] == app))
        })
    };
    let apply = |name: &str, app: &str| {
        service(cluster, "waiting", name, &format!("{{selector: {{app: {app}}}, {HTTP}}}"))
    };
    let told = |name: &str| Ok::<_, anyhow::Error>(!msvc(cluster, "waiting", name)?["status"].is_null());
    apply("vote", "typo")?;
    selects("vote", "typo")?;
    apply("vote", "vote")?;
    selects("vote", "vote")?;
    ensure!(!told("vote")?, "it has not waited: this says nothing");
    for name in ["freed", "deleted"] {
        apply(name, "typo")?;
        selects(name, "typo")?;
    }
    service(cluster, "waiting", "freed", &format!("{{serviceName: other, {HTTP}}}"))?;
    cluster.kubectl(&["delete", "service", "deleted", "-n", "waiting"], "")?.good()?;
    until("freed has no Service", Duration::from_secs(4), || Ok(find("freed").is_err()))?;
    until("a status", PATIENCE, || told("deleted"))?;
    selects("deleted", "typo")?;
    Ok(())
}

/// A Service of type ExternalName, and one without a selector whose EndpointSlice somebody writes by hand.
fn named(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "named")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    cluster.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: elsewhere, namespace: named}, \
         spec: {type: ExternalName, externalName: db.example.com}}",
    )?;
    service(cluster, "named", "db", "{serviceName: elsewhere, ports: [{port: 5432}]}")?;
    let until_ready = |start: &str| until_condition(cluster, "named", "db", "Ready", start);
    let db = until_ready("False NoEndpoints: the Service named/elsewhere is of type ExternalName")?;
    let said = "False NoEndpoints: the Service named/elsewhere is of type ExternalName and never has endpoints: \
                clients resolve its name instead";
    ensure!(condition(&db, "Ready") == said, "{}", condition(&db, "Ready"));
    let counts = |db: &Value, ready: usize, total: usize| -> Result<()> {
        let status = &db["status"];
        ensure!(status["endpoints"] == json!({"ready": ready, "total": total}), "{status:#}");
        ensure!(status["summary"]["endpoints"] == format!("{ready}/{total}"), "{status:#}");
        Ok(())
    };
    counts(&db, 0, 0)?;
    ensure!(db["status"]["vips"][0].is_string(), "it has no VIP: {:#}", db["status"]);
    // One without a selector: nobody makes endpoints for it.
    let plain = r#"{"spec": {"type": "ClusterIP", "externalName": null, "ports": [{"port": 5432}]}}"#;
    cluster.kubectl(&["patch", "service", "elsewhere", "-n", "named", "-p", plain], "")?.good()?;
    counts(&until_ready("False NoEndpoints: there are no endpoints")?, 0, 0)?;
    cluster.apply(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: [{port: 5432}]\n\
         metadata: {name: by-hand, namespace: named, labels: {kubernetes.io/service-name: elsewhere}}\n\
         endpoints: [{addresses: [192.0.2.1]}, {addresses: [192.0.2.2], conditions: {ready: true}}, \
         {addresses: [192.0.2.3], conditions: {ready: false}}]\n",
    )?;
    let db = until_ready("True Serving")?;
    counts(&db, 2, 3)?;
    // It stays as somebody wrote it.
    let slices = get(cluster, &["endpointslices", "-n", "named"])?;
    ensure!(slices["items"].as_array().is_some_and(|items| items.len() == 1), "{slices:#}");
    cluster.kubectl(&["delete", "endpointslice", "by-hand", "-n", "named"], "")?.good()?;
    counts(&until_ready("False NoEndpoints: there are no endpoints")?, 0, 0)?;
    cluster.kubectl(&["delete", "service", "elsewhere", "-n", "named"], "")?.good()?;
    until_ready("False NoEndpoints: there is no Service named/elsewhere")?;
    Ok(())
}
