//! `meshlb lock`: writes a folder's allocations to its `meshlb.lock`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Result, bail};

use super::{options::Options, print};
use crate::{
    allocate::{
        Allocations, Allocator, Conflict, Lock, allocate,
        lock::{self, Locked},
    },
    model::{
        ids::{Family, PortId, ServiceKey},
        node::NodeConfig,
        service::{FamilyPolicy, Mode, Service, ServicePort},
    },
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
        print::err(conflict);
    }
    let what = if outcome.changed { "written" } else { "up to date" };
    let n = outcome.services;
    let services = if n == 1 { "service" } else { "services" };
    print::out(format_args!("{}: {what}, {n} {services}\n", dir.join(lock::FILE_NAME).display()))?;
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
/// hashes give. A folder with errors is left alone, or its services would lose what the file keeps for them; and so is a
/// file of which a value would get lost that its service still needs.
///
/// # Errors
/// The folder has errors, a recorded value can't be kept, or the file can't be read or written.
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
    let lost = losses(&old, &new, &loaded.services, &allocator, config);
    if !lost.is_empty() {
        bail!(
            "{}\n{file} was not written: make room for these values, or take them out of {file} to let them go",
            lost.join("\n"),
            file = lock::FILE_NAME
        );
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

/// Values of the old file that are not in the new one although their services still leave them open, and why; one line each.
fn losses(
    old: &Lock,
    new: &Lock,
    services: &BTreeMap<ServiceKey, Arc<Service>>,
    allocator: &Allocator,
    config: &NodeConfig,
) -> Vec<String> {
    let mut lost = Vec::new();
    for (key, recorded) in &old.services {
        let Some(service) = services.get(key) else { continue };
        let kept = new.services.get(key).cloned().unwrap_or_default();
        let given = allocator.get(key).cloned().unwrap_or_default();
        for (family, vip) in recorded.vips.iter() {
            let asked = service.vips.iter().find(|vip| Family::of(vip) == family);
            let has = given.vips.get(family);
            // What the manifest itself names instead, or wants no more, is let go of: once that works.
            let let_go = !needs_vip(service, family) || (asked.is_some() && has == asked);
            if kept.vips.get(family) != Some(vip) && !let_go {
                let why = why_no_vip(*vip, asked, key, &given.conflicts, old, services, config);
                lost.push(format!("{key}: virtual IP {vip} would be lost: {why}"));
            }
        }
        for (id, number) in &recorded.published {
            let publish = service.ports.iter().find(|p| p.id() == *id).and_then(|p| p.publish.as_ref());
            let Some(publish) = publish else { continue };
            let let_go = publish.port.is_some() && given.published.get(id).copied() == publish.port;
            if kept.published.get(id) != Some(number) && !let_go {
                let why =
                    why_no_port((*id, *number), publish.port, key, &given.conflicts, old, services, config);
                lost.push(format!("{key}: published port {number} of {id} would be lost: {why}"));
            }
        }
    }
    lost
}

/// Whether a service has a virtual IP of a family, where there is a range for it.
fn needs_vip(service: &Service, family: Family) -> bool {
    let asks = match service.family_policy {
        FamilyPolicy::SingleStack => service.families.first() == Some(&family),
        FamilyPolicy::PreferDualStack | FamilyPolicy::RequireDualStack => true,
    };
    service.mode == Mode::Vip && asks
}

/// A value that the manifest itself names, and that the service does not get.
fn asked_in_vain(asked: impl std::fmt::Display, by: Option<&ServiceKey>) -> String {
    let why = by.map_or_else(|| "can't be had".into(), |by| format!("belongs to {by}"));
    format!("{asked}, which the manifest asks for, {why}")
}

fn why_no_vip(
    vip: IpAddr,
    asked: Option<&IpAddr>,
    key: &ServiceKey,
    conflicts: &[Conflict],
    old: &Lock,
    services: &BTreeMap<ServiceKey, Arc<Service>>,
    config: &NodeConfig,
) -> String {
    let family = Family::of(&vip);
    if let Some(asked) = asked {
        let by = conflicts.iter().find_map(|c| match c {
            Conflict::VipTaken { vip, by } if vip == asked => Some(by),
            _ => None,
        });
        return asked_in_vain(asked, by);
    }
    let Some(range) = config.ranges.get(family) else {
        return format!("no {family} VIP range is configured (--vip-cidr)");
    };
    if !range.contains(&vip) {
        return format!("it is outside the VIP range {range} (--vip-cidr)");
    }
    if let Some(what) = config.reserved_address(&vip) {
        return format!("it is {what} of the VIP range {range}");
    }
    let asks = services.values().find(|s| s.key != *key && s.vips.contains(&vip));
    let records =
        |(other, locked): &(&ServiceKey, &Locked)| *other != key && locked.vips.get(family) == Some(&vip);
    whose(asks, old.services.iter().find(records), conflicts)
}

fn why_no_port(
    (id, number): (PortId, u16),
    asked: Option<u16>,
    key: &ServiceKey,
    conflicts: &[Conflict],
    old: &Lock,
    services: &BTreeMap<ServiceKey, Arc<Service>>,
    config: &NodeConfig,
) -> String {
    if let Some(asked) = asked {
        let by = conflicts.iter().find_map(|c| match c {
            Conflict::PortTaken { port, by, .. } if *port == id => Some(by),
            _ => None,
        });
        return asked_in_vain(asked, by);
    }
    if config.reserved.iter().any(|reserved| reserved.covers(id.protocol, number)) {
        return "it is reserved (--publish-reserved)".into();
    }
    let range = &config.publish_range;
    if !range.contains(&number) {
        return format!("it is outside --publish-range {}-{}", range.start(), range.end());
    }
    let asks = services.values().find(|s| {
        let covers = |p: &ServicePort| {
            let first = p.publish.as_ref().and_then(|p| p.port);
            p.protocol == id.protocol
                && first.is_some_and(|first| (first..=first.saturating_add(p.span() - 1)).contains(&number))
        };
        s.ports.iter().any(|p| (s.key != *key || p.id() != id) && covers(p))
    });
    let records = |(other, locked): &(&ServiceKey, &Locked)| {
        locked
            .published
            .iter()
            .any(|(port, n)| (*other != key || *port != id) && port.protocol == id.protocol && *n == number)
    };
    whose(asks, old.services.iter().find(records), conflicts)
}

/// Who has a value that could be had otherwise.
fn whose(
    asks: Option<&Arc<Service>>,
    records: Option<(&ServiceKey, &Locked)>,
    conflicts: &[Conflict],
) -> String {
    match (asks, records, conflicts.iter().find(|c| c.is_blocking())) {
        (Some(service), ..) => format!("the manifest of {} asks for it", service.key),
        (_, Some((other, _)), _) => format!("it is recorded for {other} too"),
        (_, _, Some(conflict)) => conflict.to_string(),
        _ => "it can't be given".into(),
    }
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
            zone: None,
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
        // What the manifest asks for can't be had: until then it keeps what it has.
        service("vote", "  vips: [10.200.3.3]\n");
        assert_eq!(
            write(&config).unwrap_err().to_string(),
            "default/vote: virtual IP 10.200.245.146 would be lost: 10.200.3.3, which the manifest asks for, belongs to default/fixed\n\
             meshlb.lock was not written: make room for these values, or take them out of meshlb.lock to let them go"
        );
        assert_eq!(fs::read_to_string(dir.path().join("meshlb.lock")).unwrap(), text);
        fs::write(dir.path().join("meshlb.lock"), "version: 7\n").unwrap();
        assert_eq!(
            write(&config).unwrap_err().to_string(),
            "meshlb.lock is of version 7, which this meshlb does not know; use a newer one"
        );
        fs::write(dir.path().join("meshlb.lock"), "version: [\n").unwrap();
        let error = write(&config).unwrap_err().to_string();
        assert!(error.starts_with("meshlb.lock is damaged: ") && error.contains("move it away"), "{error}");
    }

    /// A folder with `default/a` and `default/b`, each with a port that is published, and what `write` says of it.
    fn refused(lock: &str, b: &str, change: impl Fn(&mut NodeConfig)) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let mut config = NodeConfig {
            name: "n1".into(),
            ranges: PerFamily { v4: Some("10.200.0.0/16".parse().unwrap()), v6: None },
            publish_range: 30000..=32767,
            reserved: vec!["22".parse().unwrap()],
            mask: MarkMask::default(),
            zone: None,
        };
        change(&mut config);
        let head = |name: &str| {
            format!("apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: {name}}}\nspec:\n")
        };
        fs::write(
            dir.path().join("a.yaml"),
            format!("{}  ports: [{{port: 80, publish: {{}}}}]\n", head("a")),
        )
        .unwrap();
        fs::write(dir.path().join("b.yaml"), format!("{}{b}", head("b"))).unwrap();
        let file = dir.path().join("meshlb.lock");
        fs::write(&file, lock).unwrap();
        match super::write(dir.path(), &config, Allocations::default()) {
            Ok(outcome) => {
                assert_ne!(fs::read_to_string(&file).unwrap(), lock);
                outcome.conflicts
            }
            Err(e) => {
                assert_eq!(fs::read_to_string(&file).unwrap(), lock, "{e}");
                let lines: Vec<String> = e.to_string().lines().map(Into::into).collect();
                assert!(lines.last().unwrap().contains("meshlb.lock was not written"), "{lines:?}");
                lines[..lines.len() - 1].to_vec()
            }
        }
    }

    #[test]
    fn what_is_recorded_is_never_lost() {
        let b = "  ports: [{port: 80, publish: {}}]\n";
        let lock = |vip: &str, port: u16| {
            format!(
                "version: 1\nservices:\n  default/a:\n    vips: {{v4: {vip}}}\n    published: {{80/TCP: {port}}}\n"
            )
        };
        let good = lock("10.200.7.33", 30292);
        let same = |_: &mut NodeConfig| {};
        assert_eq!(refused(&good, b, same), Vec::<String>::new());
        // Flags.
        assert_eq!(
            refused(&good, b, |c| c.ranges = PerFamily { v4: None, v6: Some("fd00::/64".parse().unwrap()) }),
            [
                "default/a: virtual IP 10.200.7.33 would be lost: no IPv4 VIP range is configured (--vip-cidr)",
                "default/a: published port 30292 of 80/TCP would be lost: no IPv4 VIP range is configured (--vip-cidr), and the service needs one"
            ]
        );
        assert_eq!(
            refused(&good, b, |c| c.ranges.v4 = Some("10.9.0.0/16".parse().unwrap())),
            [
                "default/a: virtual IP 10.200.7.33 would be lost: it is outside the VIP range 10.9.0.0/16 (--vip-cidr)"
            ]
        );
        assert_eq!(
            refused(&good, b, |c| c.publish_range = 30000..=30000),
            [
                "default/a: published port 30292 of 80/TCP would be lost: it is outside --publish-range 30000-30000"
            ]
        );
        assert_eq!(
            refused(&good, b, |c| c.reserved = vec!["30000-31000".parse().unwrap()]),
            ["default/a: published port 30292 of 80/TCP would be lost: it is reserved (--publish-reserved)"]
        );
        // Another manifest that names the value.
        assert_eq!(
            refused(&good, "  vips: [10.200.7.33]\n  ports: [{port: 80, publish: {port: 30292}}]\n", same),
            [
                "default/a: virtual IP 10.200.7.33 would be lost: the manifest of default/b asks for it",
                "default/a: published port 30292 of 80/TCP would be lost: the manifest of default/b asks for it"
            ]
        );
        // Values that can't be.
        for (vip, what) in [
            ("10.200.0.0", "the network address"),
            ("10.200.0.1", "the ingress address"),
            ("10.200.0.2", "the DNS address"),
            ("10.200.255.255", "the broadcast address"),
        ] {
            assert_eq!(
                refused(&lock(vip, 30292), b, same),
                [format!(
                    "default/a: virtual IP {vip} would be lost: it is {what} of the VIP range 10.200.0.0/16"
                )]
            );
        }
        assert_eq!(
            refused(&lock("10.200.7.33", 22), b, same),
            ["default/a: published port 22 of 80/TCP would be lost: it is reserved (--publish-reserved)"]
        );
        let twice =
            format!("{good}  default/b:\n    vips: {{v4: 10.200.7.33}}\n    published: {{80/TCP: 30292}}\n");
        let said = refused(&twice, b, same);
        assert!(
            matches!(said.as_slice(), [vip, port] if vip.contains("virtual IP 10.200.7.33 would be lost: it is recorded for default/")
                && port.contains("published port 30292 of 80/TCP would be lost: it is recorded for default/")),
            "{said:?}"
        );
        // Its own manifest lets go of it.
        let of_b = good.replace("default/a", "default/b");
        for b in [
            "  vips: [10.200.9.9]\n  ports: [{port: 80, publish: {port: 30999}}]\n",
            "  mode: DNSRR\n  ports: [{port: 80}]\n",
            "  mode: DNSRR\n  ports: [{port: 81, publish: {}}]\n",
        ] {
            assert_eq!(refused(&of_b, b, same), Vec::<String>::new(), "{b}");
        }
        // A service that is gone.
        assert_eq!(refused(&good.replace("default/a", "default/gone"), b, same), Vec::<String>::new());
    }
}
