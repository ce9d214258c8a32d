//! `meshlb lock`: writes a folder's allocations to its `meshlb.lock`.

use std::{collections::BTreeSet, path::Path, process::ExitCode};

use anyhow::{Result, bail};

use super::options::Options;
use crate::{
    allocate::{Allocations, Lock, allocate, lock},
    model::{ids::ServiceKey, node::NodeConfig},
    source::{self, Origin, problem::Severity},
    state::State,
};

/// Writes the lock file of a folder. Where this node serves the folder, its values are the ones written down.
///
/// # Errors
/// What kept it from writing the file.
pub fn run(options: &Options, dir: &Path) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let config = options.settings()?.node;
    let state = State::peek(&options.state_dir).unwrap_or_else(|e| {
        tracing::warn!("{e}: what is in force here is not looked at");
        State::default()
    });
    let same = state.source.is_some() && state.source == Origin::folder(dir).ok();
    let previous = if same { state.allocations } else { Allocations::default() };
    let outcome = write(dir, &config, previous)?;
    for conflict in &outcome.conflicts {
        eprintln!("meshlb: {conflict}");
    }
    let what = if outcome.changed { "written" } else { "up to date" };
    println!("{}: {what}, {} services", dir.join(lock::FILE_NAME).display(), outcome.services);
    Ok(if outcome.conflicts.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What [`write`] did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Services in the file.
    pub services: usize,
    /// Whether the file has changed.
    pub changed: bool,
    /// What could not be given as asked, one line each: these services are not, or not wholly, in the file.
    pub conflicts: Vec<String>,
}

/// Writes the lock file: what it had stays, then what `previous` says was in force here, then what the names'
/// hashes give. A folder with errors is left alone, or its services would lose what the file keeps for them.
///
/// # Errors
/// The folder has errors, or the file can't be read or written.
pub fn write(dir: &Path, config: &NodeConfig, previous: Allocations) -> Result<Outcome> {
    let loaded = source::load(dir, Some(config)).map_err(|problem| anyhow::anyhow!("{problem}"))?;
    if !loaded.is_complete() {
        let errors: Vec<String> = loaded
            .problems
            .iter()
            .filter(|p| p.severity >= Severity::Error)
            .map(ToString::to_string)
            .collect();
        bail!("{}\n{} was not written: mend the folder first", errors.join("\n"), lock::FILE_NAME);
    }
    let old = Lock::read(dir)?.unwrap_or_default();
    let allocator = allocate(&loaded.services, config, previous, old.clone(), BTreeSet::new());
    let mut new = Lock::of(&loaded.services, &allocator);
    // What is not served as it stands keeps its place for when it is.
    let refused = loaded.problems.iter().filter(|p| p.severity == Severity::Refused);
    for problem in refused.clone() {
        let key = problem.object.as_deref().and_then(|o| o.rsplit(' ').next()?.parse::<ServiceKey>().ok());
        if let Some((key, kept)) = key.and_then(|key| old.services.get_key_value(&key))
            && !new.services.contains_key(key)
        {
            new.services.insert(key.clone(), kept.clone());
        }
    }
    let changed = new.write(dir)?;
    let mut conflicts: Vec<String> = allocator
        .iter()
        .flat_map(|(key, a)| {
            a.conflicts.iter().filter(|c| c.is_blocking()).map(move |c| format!("{key}: {c}"))
        })
        .collect();
    conflicts.sort();
    conflicts.extend(refused.map(ToString::to_string));
    Ok(Outcome { services: new.services.len(), changed, conflicts })
}

/// What to tell people about values that follow from history; `None` when all follow from names and manifests.
pub fn advice(allocator: &crate::allocate::Allocator, dir: &Path) -> Option<String> {
    let unsettled = allocator.unsettled();
    let (first, by) = unsettled.first_key_value()?;
    let why = by.as_ref().map_or_else(String::new, |by| format!(", whose place {by} has"));
    let others = match unsettled.len() - 1 {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Some(format!(
        "{first}{why}{others} got a virtual IP or published port that another node may give out differently; \
         `meshlb lock {}` settles it for all nodes that are given the folder",
        dir.display()
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model::{ids::PerFamily, node::MarkMask};

    #[test]
    fn writes_what_manifests_leave_open_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = NodeConfig {
            name: "n1".into(),
            ranges: PerFamily { v4: Some("10.200.0.0/16".parse().unwrap()), v6: None },
            publish_range: 30000..=32767,
            reserved: vec![],
            mask: MarkMask::default(),
        };
        let service = |name: &str, more: &str| {
            let text = format!(
                "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: {name}}}\nspec:\n  ports: [{{port: 80, publish: {{}}}}]\n{more}"
            );
            fs::write(dir.path().join(format!("{name}.yaml")), text).unwrap();
        };
        service("vote", "");
        service("fixed", "  vips: [10.200.3.3]\n");
        let write = |config: &NodeConfig| super::write(dir.path(), config, Allocations::default());
        assert_eq!(write(&config).unwrap(), Outcome { services: 2, changed: true, conflicts: vec![] });
        let text = fs::read_to_string(dir.path().join("meshlb.lock")).unwrap();
        insta::assert_snapshot!(text, @r#"
        # Written by `meshlb lock`, as Cargo.lock is by Cargo: keep it beside the manifests, do not edit it.
        # Every node that is given this folder uses these virtual IPs and published ports.
        version: 1
        services:
          default/fixed:
            published:
              80/TCP: 32433
          default/vote:
            vips:
              v4: "10.200.245.146"
            published:
              80/TCP: 32052
        "#);
        assert!(!write(&config).unwrap().changed);
        // Another configuration does not move what is written down.
        config.publish_range = 30000..=32766;
        assert!(!write(&config).unwrap().changed);
        // A wrong manifest does not cost its service what it has.
        service("vote", "  nope: 1\n");
        let error = write(&config).unwrap_err().to_string();
        assert!(
            error.contains("vote.yaml:6: MeshService default/vote: spec.nope: is not a field here"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(dir.path().join("meshlb.lock")).unwrap(), text);
        service("vote", "  vips: [10.200.3.3]\n");
        assert_eq!(
            write(&config).unwrap().conflicts,
            ["default/vote: virtual IP 10.200.3.3 belongs to default/fixed"]
        );
        fs::write(dir.path().join("meshlb.lock"), "version: 7\n").unwrap();
        assert_eq!(
            write(&config).unwrap_err().to_string(),
            "meshlb.lock is of version 7, which this meshlb does not know; use a newer one"
        );
    }
}
