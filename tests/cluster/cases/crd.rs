//! The CustomResourceDefinition: what the API server takes and refuses, and what people see.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{Case, kubectl::Cluster};

pub const CASES: [Case; 3] = [
    ("crd::verdicts_are_those_of_check", same_verdicts),
    ("crd::is_explained", explained),
    ("crd::columns_and_names", columns),
];

/// Wrong for a program that reads files, and never seen by an API server: kubectl says so itself, or repairs it.
const OF_FILES: [&str; 1] = ["yaml-duplicate-key.yaml"];

/// What an API server takes as long as it is not strict about addresses (KEP-4858, which 1.31 does not have).
const OF_STRICT_SERVERS: [&str; 2] = ["slice-leading-zeros.yaml", "slice-not-canonical.yaml"];

/// The server's minor version.
fn minor(cluster: &Cluster) -> Result<u32> {
    let version: Value = serde_json::from_str(&cluster.kubectl(&["version", "-o", "json"], "")?.good()?)?;
    let text = version["serverVersion"]["minor"].as_str().unwrap_or_default().trim_end_matches('+');
    Ok(text.parse()?)
}

fn corpus(kind: &str) -> Result<Vec<(String, String)>> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push((name, fs::read_to_string(&path)?));
    }
    files.sort();
    ensure!(files.len() > 10, "no corpus");
    Ok(files)
}

/// Paths of the fields that a message of `check` or of the API server is about, without what is in brackets.
fn field(text: &str) -> String {
    let mut out = String::new();
    let mut depth = 0;
    for c in text.chars() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            c if depth == 0 => out.push(c),
            _ => {}
        }
    }
    out
}

fn same_verdicts(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let apply = ["apply", "--dry-run=server", "--validate=strict", "-f", "-"];
    let mut wrong = Vec::new();
    // Of the corpus: manifests name it, and a dry run makes nothing.
    cluster
        .kubectl(
            &["apply", "-f", "-"],
            r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "voting"}}"#,
        )?
        .good()?;
    for (name, text) in corpus("good")? {
        let out = cluster.kubectl(&apply, &text)?;
        if !out.ok {
            wrong.push(format!("good/{name} is refused by the API server: {}", out.stderr));
        }
    }
    let old = minor(cluster)? < 36;
    for (name, text) in corpus("bad")? {
        let out = cluster.kubectl(&apply, &text)?;
        if out.ok {
            let strict = if old { &OF_STRICT_SERVERS[..] } else { &[] };
            if !OF_FILES.iter().chain(strict).any(|fine| *fine == name) {
                wrong.push(format!("bad/{name} is accepted by the API server: {}", out.stdout));
            }
            continue;
        }
        // `# error: LINE: KIND NAMESPACE/NAME: FIELD: MESSAGE`, where there is a field.
        let said = field(&out.stderr);
        for line in text.lines().map_while(|l| l.strip_prefix("# error: ")) {
            let Some(path) = line.split(": ").nth(2).filter(|p| p.starts_with("spec") && !p.contains(' '))
            else {
                continue;
            };
            let path = field(path);
            let last = path.rsplit('.').next().unwrap_or_default();
            if !said.contains(&path) && !said.contains(last) {
                wrong.push(format!("bad/{name}: the API server does not name {path}: {}", out.stderr));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn explained(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let text = cluster.kubectl(&["explain", "meshservice.spec"], "")?.good()?;
    let schema: Value = serde_json::from_str(
        &cluster.kubectl(&["get", "crd", "meshservices.meshlb.dev", "-o", "json"], "")?.good()?,
    )?;
    let fields =
        schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
            .as_object()
            .cloned()
            .unwrap_or_default();
    ensure!(fields.len() > 15, "too few fields: {schema:#}");
    for (name, schema) in fields {
        ensure!(text.contains(&name), "kubectl explain does not know {name}:\n{text}");
        ensure!(
            schema["description"].as_str().is_some_and(|d| d.len() > 20),
            "spec.{name} is not described: {schema}"
        );
    }
    Ok(())
}

fn columns(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let service = r#"{"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService", "metadata": {"name": "columns"},
        "spec": {"ports": [{"port": 80}]}}"#;
    cluster.kubectl(&["apply", "-f", "-"], service)?.good()?;
    let status = r#"{"status": {"vips": ["10.200.0.7"], "summary": {"ports": "80/TCP", "published": "30080/TCP", "endpoints": "1/2"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "Serving", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}"#;
    cluster
        .kubectl(&["patch", "msvc", "columns", "--subresource=status", "--type=merge", "-p", status], "")?
        .good()?;
    let table = cluster.kubectl(&["get", "msvc", "columns"], "")?.good()?;
    let wide = cluster.kubectl(&["get", "meshlb", "-o", "wide"], "")?.good()?;
    cluster.kubectl(&["delete", "meshservice", "columns"], "")?.good()?;
    for text in [
        "NAME",
        "MODE",
        "VIPS",
        "PUBLISHED",
        "ENDPOINTS",
        "READY",
        "AGE",
        "VIP",
        "10.200.0.7",
        "80/TCP",
        "30080/TCP",
        "1/2",
        "True",
    ] {
        ensure!(table.contains(text), "{text} is missing:\n{table}");
    }
    ensure!(wide.contains("SCHEDULER") && wide.contains("columns"), "{wide}");
    Ok(())
}
