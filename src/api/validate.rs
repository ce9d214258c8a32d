//! From a JSON value to a typed object, with the verdict that the API server would give.

use std::sync::OnceLock;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::cel::{CompiledSchema, compile_schema, validate_compiled};
use serde_json::{Value, json};

use super::{
    API_VERSION, KIND, SLICE_API_VERSION,
    error::{FieldError, Reason},
    quick, schemas, structural,
    v1alpha1::MeshService,
};

/// Checks a MeshService and fills in its defaults. Without a namespace it is in `default`.
///
/// # Errors
/// Everything that is wrong with it. As in the API server, the rules that look at several fields (CEL) are
/// only tried on an object whose fields are right one by one.
pub fn parse_mesh_service(mut value: Value) -> Result<MeshService, Vec<FieldError>> {
    let mut errors = expect_type(&value, API_VERSION, KIND);
    errors.extend(structural::validate(schemas::mesh_service(), &mut value));
    errors.extend(check_metadata(&value, true));
    if errors.is_empty() && !quick::plainly_valid(&value) {
        errors = broken_rules(&value);
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let mut object: MeshService = from_value(value)?;
    object.metadata.namespace.get_or_insert_with(|| "default".into());
    Ok(object)
}

/// What the CEL rules of the CRD say to an object that the schema accepts.
fn broken_rules(value: &Value) -> Vec<FieldError> {
    static RULES: OnceLock<CompiledSchema> = OnceLock::new();
    let rules = RULES.get_or_init(|| compile_schema(schemas::mesh_service()));
    match validate_compiled(rules, value, None) {
        Ok(()) => Vec::new(),
        Err(broken) => broken.into_vec().into_iter().map(from_cel).collect(),
    }
}

/// Checks an EndpointSlice. Without a namespace it is in `default`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse_endpoint_slice(value: Value) -> Result<EndpointSlice, Vec<FieldError>> {
    parse_slice(value, schemas::endpoint_slice())
}

/// The same of one that an API server has let through: a newer one may have types of addresses and protocols that are not known
/// here, which [`super::to_slice`] leaves out.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse_served_endpoint_slice(value: Value) -> Result<EndpointSlice, Vec<FieldError>> {
    parse_slice(value, schemas::served_endpoint_slice())
}

fn parse_slice(mut value: Value, schema: &Value) -> Result<EndpointSlice, Vec<FieldError>> {
    let mut errors = expect_type(&value, SLICE_API_VERSION, "EndpointSlice");
    // A list that is null or absent is an empty one in Go.
    if let Some(map) = value.as_object_mut() {
        let endpoints = map.entry("endpoints").or_insert_with(|| json!([]));
        if endpoints.is_null() {
            *endpoints = json!([]);
        }
    }
    errors.extend(structural::validate(schema, &mut value));
    errors.extend(check_metadata(&value, false));
    if !errors.is_empty() {
        return Err(errors);
    }
    let mut object: EndpointSlice = from_value(value)?;
    object.metadata.namespace.get_or_insert_with(|| "default".into());
    Ok(object)
}

/// Leaves of an EndpointSlice what this program knows: a newer Kubernetes may have more.
pub fn prune_endpoint_slice(value: &mut Value) {
    structural::prune(schemas::endpoint_slice(), value);
}

fn from_value<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Vec<FieldError>> {
    serde_json::from_value(value).map_err(|e| vec![FieldError::new("", Reason::Invalid, e.to_string())])
}

fn expect_type(value: &Value, api_version: &str, kind: &str) -> Vec<FieldError> {
    [("apiVersion", api_version), ("kind", kind)]
        .into_iter()
        .filter(|(field, want)| value[*field] != *want)
        .map(|(field, want)| FieldError::new(field, Reason::NotSupported, format!("must be {want}")))
        .collect()
}

/// The rules of every Kubernetes object that no schema states. `ours`: a rule of the CRD speaks of the name.
fn check_metadata(value: &Value, ours: bool) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let metadata = &value["metadata"];
    match metadata["name"].as_str() {
        None if !metadata["name"].is_null() => {}
        None | Some("") => errors.push(FieldError::new("metadata.name", Reason::Required, "is required")),
        Some(name) if !ours && !is_dns_subdomain(name) => errors.push(FieldError::new(
            "metadata.name",
            Reason::Invalid,
            "must be a DNS name: lower-case letters, digits, '-' and '.'",
        )),
        Some(_) => {}
    }
    if let Some(namespace) = metadata["namespace"].as_str()
        && !is_dns_label(namespace)
    {
        let message = "must be a DNS label of at most 63 characters: lower-case letters, digits and '-'";
        errors.push(FieldError::new("metadata.namespace", Reason::Invalid, message));
    }
    errors
}

/// A DNS label as RFC 1123 has it, in lower case.
pub fn is_dns_label(name: &str) -> bool {
    is_dns_subdomain(name) && name.len() <= 63 && !name.contains('.')
}

/// A DNS name as Kubernetes has it: of lower-case letters, digits, `-` and `.`, at most 253 characters.
pub fn is_dns_subdomain(name: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn from_cel(error: kube::core::cel::ValidationError) -> FieldError {
    let reason = match error.reason.as_deref() {
        Some("FieldValueDuplicate") => Reason::Duplicate,
        Some("FieldValueRequired") => Reason::Required,
        Some("FieldValueForbidden") => Reason::Forbidden,
        _ => Reason::Invalid,
    };
    // A rule of the whole object can't have a fieldPath into metadata, which no CRD describes.
    match error.message.strip_prefix("metadata.name ") {
        Some(message) if error.field_path.is_empty() => FieldError::new("metadata.name", reason, message),
        _ => FieldError::new(error.field_path.trim_start_matches('.'), reason, error.message),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_service() {
        let object = parse_mesh_service(json!({
            "apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "vote"},
            "spec": {"ports": [{"port": 80}]},
        }))
        .unwrap();
        assert_eq!(object.metadata.namespace.as_deref(), Some("default"));
        let spec = serde_json::to_value(&object.spec).unwrap();
        assert_eq!(
            spec,
            json!({
                "mode": "VIP", "selector": {}, "vips": [], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
                "publishNotReadyAddresses": false, "weights": {}, "ports": [{"protocol": "TCP", "port": 80}],
                "schedulerFlags": [], "forwarding": "Masquerade", "sessionAffinity": "None",
                "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster",
                "trafficDistribution": "", "sourceRanges": [], "drain": {"timeoutSeconds": 30},
                "dns": {"ttlSeconds": 5, "answer": "Shuffle", "aliases": []},
            })
        );
    }

    fn port() -> impl Strategy<Value = Value> {
        let maybe = |values: Vec<Value>| prop::option::of(prop::sample::select(values));
        let numbers = || vec![json!(80), json!(81), json!(85)];
        let publish = (maybe(numbers()), maybe(vec![json!(["192.0.2.1"]), json!(["eth0"]), json!([])]));
        (
            prop::sample::select(numbers()),
            maybe(vec![json!("a"), json!("b")]),
            maybe(vec![json!("TCP"), json!("UDP")]),
            maybe(vec![json!(80), json!(90)]),
            maybe(vec![json!(80), json!("a")]),
            prop::option::of(publish),
        )
            .prop_map(|(port, name, protocol, end, target, publish)| {
                let publish = publish.map(|(port, addresses)| json!({"port": port, "addresses": addresses}));
                json!({"port": port, "name": name, "protocol": protocol, "endPort": end, "targetPort": target, "publish": publish})
            })
    }

    /// Keys at and beyond every edge of their syntax.
    fn labels() -> impl Strategy<Value = Value> {
        let prefix = |n: usize| format!("{}.{}", "p".repeat(100), "q".repeat(n - 101));
        let long = prop::sample::select(vec![
            "k".repeat(63),
            "k".repeat(64),
            format!("{}/{}", prefix(253), "k".repeat(63)),
            format!("{}/k", prefix(254)),
            format!("{}/{}", prefix(253), "k".repeat(64)),
        ]);
        let key = prop_oneof!["[aZ0._/-]{0,4}", "[a0.-]{1,3}/[aZ0._-]{1,3}", "[é Zß]{1,2}", long];
        (key, prop::sample::select(vec!["", "b"])).prop_map(|(key, value)| json!({ key: value }))
    }

    #[test]
    fn keys_and_values_of_labels_are_those_of_kubernetes() {
        let with = |key: &str, value: &str| {
            let spec = json!({"selector": {key: value}, "ports": [{"port": 80, "publish": {"nodeSelector": {key: value}}}]});
            let object =
                json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "vote"}, "spec": spec});
            let errors = parse_mesh_service(object).err().unwrap_or_default();
            errors.into_iter().map(|e| e.field).collect::<std::collections::BTreeSet<_>>()
        };
        let prefix = |n: usize| format!("{}.{}", "p".repeat(100), "q".repeat(n - 101));
        for (key, value) in [
            ("app", "vote"),
            ("a", ""),
            ("Zone_1.x-y", "A_b.c-9"),
            ("kubernetes.io/os", "linux"),
            (&"k".repeat(63), &"v".repeat(63)),
            (&format!("{}/{}", prefix(253), "k".repeat(63)), "x"),
        ] {
            assert!(with(key, value).is_empty(), "{key} {value}");
        }
        for key in [
            "",
            "-a",
            "a-",
            "a b",
            "é",
            "a/b/c",
            "/a",
            "a/",
            "A.b/c",
            "a..b/c",
            "-a/b",
            "a_b/c",
            "a\n",
            &"k".repeat(64),
            &format!("{}/k", prefix(254)),
        ] {
            let both = ["spec.ports[0].publish.nodeSelector", "spec.selector"].map(str::to_owned);
            assert_eq!(with(key, "x"), both.into(), "{key:?}");
        }
        for value in ["-a", "a-", "a b", "é", "a/b", "a\n", &"v".repeat(64)] {
            let both = ["spec.ports[0].publish.nodeSelector.app", "spec.selector.app"].map(str::to_owned);
            assert_eq!(with("app", value), both.into(), "{value:?}");
        }
    }

    fn spec() -> impl Strategy<Value = Value> {
        // Mostly absent, so that the plain ones are not too rare.
        let rare = |values: Vec<Value>| prop::option::weighted(0.1, prop::sample::select(values));
        let fields = vec![
            ("serviceName", rare(vec![json!("x")])),
            (
                "vips",
                rare(vec![
                    json!(["10.0.0.1"]),
                    json!(["fd00::1"]),
                    json!(["x"]),
                    json!(["10.0.0.1", "10.0.0.2"]),
                ]),
            ),
            ("ipFamilies", rare(vec![json!(["IPv6"]), json!(["IPv4", "IPv4"]), json!(["IPv4", "IPv6"])])),
            ("ipFamilyPolicy", rare(vec![json!("PreferDualStack")])),
            ("mode", rare(vec![json!("DNSRR")])),
            ("scheduler", rare(vec![json!("mh"), json!("sh"), json!("wrr")])),
            ("schedulerFlags", rare(vec![json!(["mh-port"]), json!(["sh-port"]), json!([])])),
            ("sessionAffinity", rare(vec![json!("ClientIP")])),
            ("forwarding", rare(vec![json!("Tunnel")])),
            ("sourceRanges", rare(vec![json!(["10.0.0.0/8"]), json!(["x"])])),
            ("weights", rare(vec![json!({"a": 1}), json!({"k".repeat(300): 1})])),
            (
                "healthCheck",
                rare(vec![json!({}), json!({"tcp": {}}), json!({"tcp": {}, "timeoutSeconds": 9})]),
            ),
            ("externalTrafficPolicy", rare(vec![json!("Local")])),
        ];
        let (names, values): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
        let labels = prop::option::weighted(0.3, labels());
        (values, labels, proptest::collection::vec(port(), 1..4)).prop_map(move |(values, labels, ports)| {
            let mut spec: serde_json::Map<String, Value> =
                names.iter().zip(values).filter_map(|(n, v)| Some(((*n).to_owned(), v?))).collect();
            spec.extend(labels.map(|labels| ("selector".to_owned(), labels)));
            spec.insert("ports".into(), json!(ports));
            Value::Object(spec)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, max_global_rejects: 100_000, ..ProptestConfig::default() })]

        #[test]
        fn what_is_plainly_valid_keeps_every_rule(spec in spec(), name in "[a-zA-Z0-9.-]{1,3}|[a-z]{60,66}") {
            let mut value = json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec});
            prop_assume!(structural::validate(schemas::mesh_service(), &mut value).is_empty());
            prop_assume!(quick::plainly_valid(&value));
            prop_assert_eq!(broken_rules(&value), vec![]);
        }
    }

    #[test]
    fn common_services_are_plainly_valid() {
        for ports in [
            json!([{"port": 80}]),
            json!([{"port": 80, "name": "a", "publish": {}}, {"port": 80, "protocol": "UDP", "name": "b", "publish": {"port": 80}}]),
        ] {
            let mut value = json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "x"}, "spec": {"ports": ports}});
            assert_eq!(structural::validate(schemas::mesh_service(), &mut value), vec![]);
            assert!(quick::plainly_valid(&value), "{value}");
        }
    }
}
