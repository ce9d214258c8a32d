//! A shortcut past the CEL rules for objects that plainly keep all of them.
//!
//! Evaluating the rules takes longer than everything else that is done with a manifest, and nearly every one of
//! ten thousand services is too simple to break any. This is no second set of rules: it only ever says "no rule
//! can fail here", and a property test holds it against the rules themselves.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use super::validate::is_dns_subdomain;

/// Whether no CEL rule can fail. `value` has been held against the schema and has its defaults.
pub fn plainly_valid(value: &Value) -> bool {
    let spec = &value["spec"];
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    value["metadata"]["name"].as_str().is_some_and(is_label)
        && ["schedulerFlags", "sourceRanges", "weights"].iter().all(|f| empty(&spec[*f]))
        && (empty(&spec["selector"]) || spec["serviceName"].is_null() && plain_keys(&spec["selector"]))
        && plain_addresses(spec)
        && (spec["sessionAffinity"] == "None" || spec["scheduler"].is_null())
        && spec["forwarding"] == "Masquerade"
        && spec["healthCheck"].is_null()
        && spec["ports"].as_array().is_some_and(|ports| plain_ports(ports, &empty))
}

/// The rule on keys of labels: [`super::values::label_keys`].
fn plain_keys(map: &Value) -> bool {
    let plain = |key: &String| {
        let (prefix, name) =
            key.split_once('/').map_or((None, &**key), |(prefix, name)| (Some(prefix), name));
        let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
        prefix.is_none_or(is_dns_subdomain)
            && name.len() <= 63
            && edge(name.bytes().next())
            && edge(name.bytes().last())
            && name.bytes().all(inner)
    };
    map.as_object().is_some_and(|map| map.keys().all(plain))
}

/// One family without addresses or with one of that family; or both families, each at most once.
fn plain_addresses(spec: &Value) -> bool {
    let list =
        |field: &str| spec[field].as_array().map(|v| v.iter().filter_map(Value::as_str).collect::<Vec<_>>());
    let (Some(families), Some(vips)) = (list("ipFamilies"), list("vips")) else { return false };
    let Ok(vips) = vips.iter().map(|vip| vip.parse::<IpAddr>()).collect::<Result<Vec<_>, _>>() else {
        return false;
    };
    let families_of_vips = vips.iter().map(|vip| if vip.is_ipv4() { "IPv4" } else { "IPv6" });
    let single = spec["ipFamilyPolicy"] == "SingleStack";
    let mapped = |vip: &IpAddr| matches!(vip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    (if single {
        families.len() == 1
    } else {
        families.iter().collect::<BTreeSet<_>>().len() == families.len()
    }) && families_of_vips.clone().collect::<BTreeSet<_>>().len() == vips.len()
        && (!single || families_of_vips.clone().all(|family| families.contains(&family)))
        && (vips.is_empty() || spec["mode"] != "DNSRR")
        && !vips.iter().any(mapped)
}

fn plain_ports(ports: &[Value], empty: &dyn Fn(&Value) -> bool) -> bool {
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut published = BTreeSet::new();
    ports.iter().all(|port| {
        let publish = &port["publish"];
        let protocol = port["protocol"].as_str();
        let number = publish["port"].as_i64();
        let name = port["name"].as_str();
        port["endPort"].is_null()
            && (ports.len() == 1 || name.is_some_and(|name| names.insert(name)))
            && numbers.insert((port["port"].as_i64(), protocol))
            && number.is_none_or(|number| published.insert((number, protocol)))
            && empty(&publish["addresses"])
            && empty(&publish["nodeSelector"])
    })
}

/// The rule on `metadata.name`: a DNS-1035 label.
fn is_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    name.len() <= 63
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(inner)
}
