//! What agents and the controller ask of the API server, by its own audit log: nothing is written that has not changed.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bed::{Bed, endpoints, granted, says, service};
use crate::runner::Cx;

/// The log, where the environment names it.
fn log() -> Result<PathBuf> {
    Ok(PathBuf::from(
        std::env::var_os("MESHLB_AUDIT_LOG").context("tests/cluster/packets.sh says where it is")?,
    ))
}

/// Writes since that place in the log, counted: `ACCOUNT VERB RESOURCE[/SUB]`.
fn writes(from: usize) -> Result<BTreeMap<String, usize>> {
    forget()?;
    let text = fs::read(log()?)?;
    let text = String::from_utf8_lossy(text.get(from..).unwrap_or_default()).into_owned();
    let mut out = BTreeMap::new();
    for event in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let text = |at: &str| event.pointer(at).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (verb, user) = (text("/verb"), text("/user/username"));
        if matches!(verb.as_str(), "get" | "list" | "watch") {
            continue;
        }
        let account = user.rsplit(':').next().unwrap_or_default().to_owned();
        let sub = text("/objectRef/subresource");
        let slash = if sub.is_empty() { "" } else { "/" };
        *out.entry(format!("{account} {verb} {}{slash}{sub}", text("/objectRef/resource"))).or_default() += 1;
    }
    Ok(out)
}

/// Has a VM forget what it knows of the host's files: they grow without its knowing.
fn forget() -> Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

fn length() -> Result<usize> {
    forget()?;
    Ok(usize::try_from(fs::metadata(log()?)?.len())?)
}

pub fn quiet(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::start(cx)?;
    let t = bed.t.clone();
    bed.kube.apply(&service())?;
    endpoints(&bed.kube, &t, &["p11", "p21"])?;
    let given = granted(&bed.kube, &service())?;
    bed.until_served(&given, &["p11", "p21"])?;
    says(&bed.kube, &service(), "Ready", "True")?;
    std::thread::sleep(Duration::from_secs(10));
    // A minute in which nothing happens.
    let from = length()?;
    std::thread::sleep(Duration::from_secs(60));
    let mut all = writes(from)?;
    cx.note(format!("a quiet minute: {all:?}"));
    let leases = all
        .remove("meshlb-controller update leases")
        .or_else(|| all.remove("meshlb-controller patch leases"));
    ensure!(
        leases.is_some_and(|n| n >= 10),
        "the log has no lease being renewed: is it the right one? {all:?}"
    );
    ensure!(all.is_empty(), "written in a quiet minute: {all:?}");
    // One endpoint more: one status.
    let from = length()?;
    endpoints(&bed.kube, &t, &["p11", "p21", "p31"])?;
    bed.until_served(&given, &["p11", "p21", "p31"])?;
    says(&bed.kube, &service(), "Ready", "True")?;
    std::thread::sleep(Duration::from_secs(12));
    let mut all = writes(from)?;
    cx.note(format!("one endpoint more: {all:?}"));
    all.retain(|what, _| !what.ends_with(" leases"));
    let statuses = all.remove("meshlb-controller patch meshservices/status").unwrap_or_default();
    ensure!(statuses == 1 && all.is_empty(), "{statuses} statuses, and besides {all:?}");
    bed.alive()?;
    bed.end()
}
