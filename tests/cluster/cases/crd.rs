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

/// Fields that are not named as `check` names them, with what is said instead.
const NAMED_OTHERWISE: [(&str, &str); 8] = [
    // kubectl itself, which has typed metadata: without the key.
    ("labels.yaml", "metadata.labels of type string"),
    ("name-missing.yaml", "resource name may not be empty"),
    ("name-number.yaml", "ObjectMeta.metadata.name of type string"),
    ("version.yaml", "no matches for kind"),
    // Before anything else, the namespace is looked for.
    ("namespace.yaml", "namespaces \"a.b\" not found"),
    // A mapping where a list is to be: what is in it is unknown before it is no list.
    ("ports-mapping.yaml", "unknown field \"spec.ports.port\""),
    // The list, and the address itself (1.31 names the item).
    ("slice-family.yaml", "endpoints[0].addresses: Invalid value: \"10.0.0.1\""),
    ("slice-family-v4.yaml", "endpoints[0].addresses: Invalid value: \"fd00::1\""),
];

/// The field that a line `# error: LINE: KIND NAMESPACE/NAME: FIELD: MESSAGE` is about; some are about no field.
fn field(line: &str) -> Option<&str> {
    let mut parts = line.splitn(4, ": ").skip(1);
    let kind =
        parts.next().filter(|kind| kind.starts_with("MeshService") || kind.starts_with("EndpointSlice"));
    kind.and(parts.next())
}

/// Whether a text names this very field, and not one in or above it.
fn names(text: &str, path: &str) -> bool {
    let of_a_path = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '[';
    text.match_indices(path).any(|(at, _)| {
        let rest = &text[at + path.len()..];
        // A full stop may end a sentence.
        let more = rest.starts_with(of_a_path) && !rest.starts_with(". ");
        !more && !text[..at].ends_with(of_a_path)
    })
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
    let mut fields = 0;
    for (name, text) in corpus("bad")? {
        let out = cluster.kubectl(&apply, &text)?;
        if out.ok {
            let strict = if old { &OF_STRICT_SERVERS[..] } else { &[] };
            if !OF_FILES.iter().chain(strict).any(|fine| *fine == name) {
                wrong.push(format!("bad/{name} is accepted by the API server: {}", out.stdout));
            }
            continue;
        }
        let otherwise = NAMED_OTHERWISE.iter().find(|(file, _)| *file == name).map(|(_, said)| *said);
        for path in text.lines().map_while(|l| l.strip_prefix("# error: ")).filter_map(field) {
            let good = names(&out.stderr, path) || otherwise.is_some_and(|said| out.stderr.contains(said));
            if !good {
                wrong.push(format!("bad/{name}: the API server does not name {path}: {}", out.stderr));
            }
            fields += 1;
        }
    }
    println!("  {fields} fields that are wrong are named");
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// `kubectl explain` describes every field of every object that can be written or read, however deep.
fn explained(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut described = 0;
    for (plural, kind) in [("meshservices", "meshservice"), ("meshnodes", "meshnode")] {
        let crd =
            cluster.kubectl(&["get", "crd", &format!("{plural}.meshlb.dev"), "-o", "json"], "")?.good()?;
        let crd: Value = serde_json::from_str(&crd)?;
        let top = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        let mut left: Vec<_> =
            ["spec", "status"].map(|part| (format!("{kind}.{part}"), top[part].clone())).into();
        while let Some((path, schema)) = left.pop() {
            // What a list or a map holds is explained in its place.
            let within = [&schema, &schema["items"], &schema["additionalProperties"]];
            let Some(fields) = within.iter().find_map(|s| s["properties"].as_object()) else { continue };
            let text = words(&cluster.kubectl(&["explain", &path], "")?.good()?);
            for (name, field) in fields {
                let description = words(field["description"].as_str().unwrap_or_default());
                ensure!(description.len() > 20, "{path}.{name} is not described: {field}");
                let begins: String = description.chars().take(60).collect();
                ensure!(
                    text.contains(&format!("{name} <")) && text.contains(&begins),
                    "no {name} in {path}:\n{text}"
                );
                left.push((format!("{path}.{name}"), field.clone()));
                described += 1;
            }
        }
    }
    println!("  {described} fields are explained");
    ensure!(described > 80, "too few fields: {described}");
    Ok(())
}

fn columns(cluster: &Cluster) -> Result<()> {
    cluster.install_crds()?;
    let service = r#"{"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService", "metadata": {"name": "columns"},
        "spec": {"ports": [{"port": 80}]}}"#;
    cluster.kubectl(&["apply", "-f", "-"], service)?.good()?;
    let status = r#"{"status": {"vips": ["10.200.0.7"], "summary": {"ports": "80/TCP", "published": "30080/TCP", "endpoints": "1/2"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "AliasTaken", "message": "as one reads it", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}"#;
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
        "REASON",
        "AliasTaken",
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
    for text in ["SCHEDULER", "MESSAGE", "as one reads it", "columns"] {
        ensure!(
            wide.contains(text) && (text == "columns" || !table.contains(text)),
            "{text}:\n{table}\n{wide}"
        );
    }
    Ok(())
}
