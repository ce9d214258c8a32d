//! A real Prometheus finds the agents as the chart's PodMonitor has it look for them.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bed::{Bed, endpoints, granted, service};
use crate::cases::scrape::{Prometheus, becomes_within, query};
use crate::runner::Cx;

/// The rendered chart's PodMonitors, one document each.
const PODMONITORS: &str = "MESHLB_PODMONITORS";
/// A Prometheus that knows Kubernetes.
const PROGRAM: &str = "MESHLB_PROMETHEUS";

/// What the Prometheus operator makes of a PodMonitor: the pods of its namespace with these labels and a port of this name.
fn scrape_config(monitor: &Value, kubeconfig: &str) -> Result<String> {
    let spec = &monitor["spec"];
    let namespace = spec["namespaceSelector"]["matchNames"][0].as_str().context("no namespace")?;
    let endpoint = &spec["podMetricsEndpoints"][0];
    let port = endpoint["port"].as_str().context("no port")?;
    let path = endpoint["path"].as_str().context("no path")?;
    let honor = endpoint["honorLabels"].as_bool().unwrap_or(false);
    let mut out = format!(
        "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n- job_name: podmonitor\n  \
         metrics_path: {path}\n  honor_labels: {honor}\n  kubernetes_sd_configs:\n  - role: pod\n    \
         kubeconfig_file: {kubeconfig}\n    namespaces: {{names: [{namespace}]}}\n  relabel_configs:\n"
    );
    for (label, value) in spec["selector"]["matchLabels"].as_object().context("no labels")? {
        let source: String = label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let value = value.as_str().context("a label that is no text")?;
        out += &format!(
            "  - {{action: keep, source_labels: [__meta_kubernetes_pod_label_{source}], regex: '{value}'}}\n"
        );
    }
    out += &format!(
        "  - {{action: keep, source_labels: [__meta_kubernetes_pod_container_port_name], regex: '{port}'}}\n"
    );
    for relabel in endpoint["relabelings"].as_array().into_iter().flatten() {
        let source = relabel["sourceLabels"][0].as_str().context("no source label")?;
        let target = relabel["targetLabel"].as_str().context("no target label")?;
        out += &format!("  - {{source_labels: [{source}], target_label: {target}}}\n");
    }
    Ok(out)
}

pub fn scraped(cx: &mut Cx) -> Result<()> {
    let file = std::env::var(PODMONITORS).context("tests/cluster/packets.sh says where they are")?;
    let text = fs::read_to_string(&file).with_context(|| file.clone())?;
    let monitors: Vec<Value> = text
        .split("\n---\n")
        .filter(|d| d.contains("kind: PodMonitor"))
        .map(|d| serde_saphyr::from_str(d).context("a PodMonitor"))
        .collect::<Result<_>>()?;
    let agents = |m: &&Value| m["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "agent";
    let monitor = monitors.iter().find(agents).context("no PodMonitor of the agents")?;
    let bed = Bed::start(cx)?;
    let all = ["p11", "p21", "p31"];
    bed.kube.apply(&service())?;
    endpoints(&bed.kube, &bed.t, &all)?;
    let given = granted(&bed.kube, &service())?;
    bed.until_served(&given, &all)?;
    let kubeconfig = bed.kube.kubeconfig_of_nodes(&cx.dir)?;
    let node = bed.t.node(1);
    let config = scrape_config(monitor, &kubeconfig.to_string_lossy())?;
    cx.note(&config);
    let program = std::env::var(PROGRAM).context("tests/cluster/packets.sh says where it is")?;
    let prometheus = Prometheus::with(&program, node, &cx.dir, &config)?;
    // Every node's agent is up, and says of itself that its kernel is as desired.
    becomes_within(node, "count(up == 1)", 3.0, Duration::from_secs(60))
        .with_context(|| fs::read_to_string(cx.dir.join("prometheus.log")).unwrap_or_default())?;
    becomes_within(node, "count(meshlb_in_sync == 1)", 3.0, Duration::from_secs(30))?;
    let nodes = query(node, "meshlb_in_sync", "node")?;
    ensure!(nodes.keys().map(String::as_str).eq(["n1", "n2", "n3"]), "{nodes:?}");
    // `namespace` and `service` are the MeshService's.
    becomes_within(
        node,
        "count(meshlb_service_connections_total{namespace=\"default\",service=\"vote\"} > 0) > bool 0",
        1.0,
        Duration::from_secs(30),
    )?;
    drop(prometheus);
    bed.end()
}
