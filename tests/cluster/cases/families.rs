//! The headless Service of a selector that asks for two IP families, on a cluster with two and with one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::controller::{
    Controller, PATIENCE, condition, get, msvc, prepare, service, until, until_condition,
};
use crate::{Case, kubectl::Cluster};

pub const CASES: [Case; 2] = [
    ("controller::selector_with_two_families", two),
    ("controller::selector_on_a_single_stack_cluster", one),
];

/// A selector, and which families of how many.
fn asked(app: &str, policy: &str, families: &str) -> String {
    format!(
        "{{selector: {{app: {app}}}, ipFamilyPolicy: {policy}, ipFamilies: {families}, ports: [{{port: 80}}]}}"
    )
}

/// The Service of that name selects `app`, has that policy and those families, and nobody complains.
fn until_it_is(cluster: &Cluster, name: &str, app: &str, policy: &str, families: &[&str]) -> Result<()> {
    let find = || get(cluster, &["service", name, "-n", "families"]);
    until(&format!("{name}: {app} {policy} {families:?}"), PATIENCE, || {
        let Ok(found) = find() else { return Ok(false) };
        let spec = &found["spec"];
        Ok(spec["selector"] == json!({"app": app})
            && spec["ipFamilyPolicy"] == policy
            && spec["ipFamilies"] == json!(families))
    })
    .with_context(|| {
        let found = find().map_or_else(|e| e.to_string(), |found| found["spec"].to_string());
        let ready = msvc(cluster, "families", name).map(|object| condition(&object, "Ready"));
        format!("{found}\n{}", ready.unwrap_or_default())
    })?;
    until_condition(cluster, "families", name, "Ready", "False NoEndpoints").map(drop)
}

fn two(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "families")?;
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    let both = ["IPv4", "IPv6"];
    let apply = |name: &str, app: &str, policy: &str, families: &str| {
        service(cluster, "families", name, &asked(app, policy, families))
    };
    for (name, policy) in [("prefer", "PreferDualStack"), ("require", "RequireDualStack")] {
        // The second family is the API server's to add, and stays when something else is edited.
        apply(name, "one", policy, "[IPv4]")?;
        until_it_is(cluster, name, "one", policy, &both)?;
        apply(name, "two", policy, "[IPv4]")?;
        until_it_is(cluster, name, "two", policy, &both)?;
        apply(name, "three", policy, "[IPv4, IPv6]")?;
        until_it_is(cluster, name, "three", policy, &both)?;
    }
    apply("require", "four", "PreferDualStack", "[IPv4]")?;
    until_it_is(cluster, "require", "four", "PreferDualStack", &both)?;
    apply("require", "four", "SingleStack", "[IPv4]")?;
    until_it_is(cluster, "require", "four", "SingleStack", &["IPv4"])?;
    apply("require", "four", "PreferDualStack", "[IPv4, IPv6]")?;
    until_it_is(cluster, "require", "four", "PreferDualStack", &both)?;
    // Another primary family is another Service.
    apply("require", "four", "PreferDualStack", "[IPv6, IPv4]")?;
    until_it_is(cluster, "require", "four", "PreferDualStack", &["IPv6", "IPv4"])?;
    ensure!(!controller.log().contains("can't be kept"), "{}", controller.log());
    Ok(())
}

fn one(cluster: &Cluster) -> Result<()> {
    prepare(cluster, "families")?;
    let dual = cluster.cluster_ips("10.96.0.0/16")?;
    let result = preferred_on_one(cluster);
    cluster.cluster_ips(&dual)?;
    result
}

fn preferred_on_one(cluster: &Cluster) -> Result<()> {
    let controller = Controller::start(cluster, "one")?;
    controller.until_it_says("everything has been read")?;
    for (name, families) in [("only", "[IPv4]"), ("both", "[IPv4, IPv6]")] {
        for app in ["one", "two"] {
            service(cluster, "families", name, &asked(app, "PreferDualStack", families))?;
            until_it_is(cluster, name, app, "PreferDualStack", &["IPv4"])?;
        }
    }
    // What can't be is said.
    service(cluster, "families", "required", &asked("one", "RequireDualStack", "[IPv4, IPv6]"))?;
    until_condition(cluster, "families", "required", "Ready", "False HeadlessServiceFailed")?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(get(cluster, &["service", "required", "-n", "families"]).is_err(), "it is there");
    Ok(())
}
