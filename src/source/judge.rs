//! The verdict on one object, the same wherever it comes from.

use std::sync::Arc;

use serde_json::Value;

use super::{
    object::{Kind, Object, Verdict},
    problem::Severity,
};
use crate::{
    api::{self, FieldError, Reason},
    model::node::NodeConfig,
};

/// What an object comes to, and why.
#[derive(Debug)]
pub struct Judgement {
    /// What it comes to.
    pub verdict: Verdict,
    /// What is wrong with it.
    pub findings: Vec<FieldError>,
    /// How bad that is.
    pub severity: Severity,
}

/// Where an object is met, and the node that serves it.
#[derive(Clone, Copy, Debug)]
pub enum At<'a> {
    /// In `check`, for no node: the verdict is that of an API server.
    Manifest,
    /// In a folder. What an API server would refuse is refused, since none has looked at it.
    Folder(&'a NodeConfig),
    /// On an API server, with a controller that does what a folder can't.
    ApiServer(&'a NodeConfig),
}

impl<'a> At<'a> {
    fn config(self) -> Option<&'a NodeConfig> {
        match self {
            Self::Manifest => None,
            Self::Folder(config) | Self::ApiServer(config) => Some(config),
        }
    }
}

/// Judges an object. For a node, the rules that depend on it (VIP ranges, reserved ports) are applied too.
pub fn judge(kind: Kind, value: Value, at: At<'_>) -> Judgement {
    match kind {
        Kind::Service => service(value, at),
        Kind::Slice => slice(value, at),
    }
}

/// A field of the spec that this program does not know is refused wherever it comes from: it may be a restriction, and serving on
/// without it would not fail closed. (So a later field must not have a default in the CRD: `defaults_are_those_of_the_first_version`.)
fn service(mut value: Value, at: At<'_>) -> Judgement {
    // The status is the controller's, which may be newer, and asks for nothing.
    if let (At::ApiServer(_), Some(object)) = (at, value.as_object_mut()) {
        object.remove("status");
    }
    let in_kubernetes = !matches!(at, At::Folder(_));
    let service = api::parse_mesh_service(value).and_then(|object| api::to_service(&object, in_kubernetes));
    let service = service.and_then(|service| {
        let forbidden = at.config().map_or_else(Vec::new, |c| api::check_against_node(&service, c));
        if forbidden.is_empty() { Ok(service) } else { Err(forbidden) }
    });
    match service {
        Ok(service) => Judgement {
            verdict: Verdict::Good(Object::Service(Arc::new(service))),
            findings: Vec::new(),
            severity: Severity::Note,
        },
        // Serving on without the restriction that was just asked for would not fail closed.
        Err(findings) if findings.iter().all(|e| e.reason == Reason::NotSupportedYet) => {
            Judgement { verdict: Verdict::Withheld, findings, severity: Severity::Refused }
        }
        Err(findings) => Judgement { verdict: Verdict::Wrong, findings, severity: Severity::Error },
    }
}

/// What an API server would refuse is refused in a folder too, whose last good version stays in force. With what an API server
/// let through a node does what it can.
fn slice(mut value: Value, at: At<'_>) -> Judgement {
    let passed = matches!(at, At::ApiServer(_));
    if passed {
        api::prune_endpoint_slice(&mut value);
    }
    let parsed =
        if passed { api::parse_served_endpoint_slice(value) } else { api::parse_endpoint_slice(value) };
    let parsed = parsed.and_then(|object| {
        let broken = if passed { Vec::new() } else { api::broken_slice_rules(&object) };
        if broken.is_empty() { Ok(object) } else { Err(broken) }
    });
    match parsed {
        Ok(object) => {
            let (mut slice, mut findings) = api::to_slice(&object);
            if let (Some(slice), Some(config)) = (&mut slice, at.config()) {
                findings.extend(api::leave_out_vips(slice, &object, config));
            }
            let verdict =
                slice.map_or(Verdict::Withheld, |slice| Verdict::Good(Object::Slice(Arc::new(slice))));
            Judgement { verdict, findings, severity: Severity::Warning }
        }
        Err(findings) => Judgement { verdict: Verdict::Wrong, findings, severity: Severity::Error },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::fixtures::config;

    /// What a node says of a slice with this address, and how many endpoints it uses.
    fn used(address_type: &str, address: &str) -> (usize, Vec<String>) {
        let value = json!({
            "apiVersion": api::SLICE_API_VERSION, "kind": "EndpointSlice", "addressType": address_type,
            "metadata": {"name": "s", "labels": {api::SERVICE_NAME_LABEL: "vote"}},
            "endpoints": [{"addresses": [address]}],
        });
        // In a folder what an API server refuses is refused too, and the last good version stays.
        let in_folder = judge(Kind::Slice, value.clone(), At::Folder(&config())).verdict;
        let refused = !api::broken_slice_rules(&api::parse_endpoint_slice(value.clone()).unwrap()).is_empty();
        assert_eq!(matches!(in_folder, Verdict::Wrong), refused, "{address}");
        let in_manifest = judge(Kind::Slice, value.clone(), At::Manifest).verdict;
        assert_eq!(matches!(in_manifest, Verdict::Wrong), refused, "{address}");
        let judged = judge(Kind::Slice, value, At::ApiServer(&config()));
        assert_eq!(judged.severity, Severity::Warning);
        match judged.verdict {
            Verdict::Good(Object::Slice(slice)) => {
                (slice.endpoints.len(), judged.findings.iter().map(ToString::to_string).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_newer_control_plane_adds_is_no_error() {
        let slice = json!({
            "apiVersion": api::SLICE_API_VERSION, "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "s", "labels": {api::SERVICE_NAME_LABEL: "vote"}, "later": 1},
            "endpoints": [{"addresses": ["10.0.0.1"], "hints": {"later": []}, "conditions": {"ready": true, "later": true}}],
            "later": {"a": 1},
        });
        let judged = judge(Kind::Slice, slice.clone(), At::ApiServer(&config()));
        let Verdict::Good(Object::Slice(good)) = judged.verdict else { panic!("{judged:?}") };
        assert_eq!((good.endpoints.len(), judged.findings.len()), (1, 0));
        // Nobody has looked at what is in a folder.
        assert!(matches!(judge(Kind::Slice, slice, At::Folder(&config())).verdict, Verdict::Wrong));
        let service = |spec: Value| {
            json!({"apiVersion": api::API_VERSION, "kind": api::KIND, "metadata": {"name": "vote"}, "spec": spec,
                   "status": {"later": 1, "endpoints": {"later": 1}}})
        };
        let judged =
            judge(Kind::Service, service(json!({"ports": [{"port": 80}]})), At::ApiServer(&config()));
        assert!(matches!(judged.verdict, Verdict::Good(_)), "{judged:?}");
        // What is asked for and not known may be a restriction.
        let unknown = service(json!({"ports": [{"port": 80}], "later": true}));
        let judged = judge(Kind::Service, unknown, At::ApiServer(&config()));
        assert!(matches!(judged.verdict, Verdict::Wrong), "{judged:?}");
    }

    #[test]
    fn what_a_newer_control_plane_calls_otherwise_is_left_out() {
        let slice = |address_type: &str, protocol: &str| {
            json!({
                "apiVersion": api::SLICE_API_VERSION, "kind": "EndpointSlice", "addressType": address_type,
                "metadata": {"name": "s", "labels": {api::SERVICE_NAME_LABEL: "vote"}},
                "endpoints": [{"addresses": ["10.0.0.1"]}],
                "ports": [{"name": "a", "port": 80, "protocol": protocol}, {"name": "b", "port": 81, "protocol": "TCP"}],
            })
        };
        let judged = judge(Kind::Slice, slice("IPv4", "QUIC"), At::ApiServer(&config()));
        let Verdict::Good(Object::Slice(good)) = judged.verdict else { panic!("{judged:?}") };
        assert_eq!((good.endpoints.len(), good.ports.len(), good.ports[0].port), (1, 1, Some(81)));
        assert!(judged.findings[0].to_string().starts_with("ports[0].protocol: "), "{:?}", judged.findings);
        let judged = judge(Kind::Slice, slice("IPv8", "TCP"), At::ApiServer(&config()));
        assert!(matches!(judged.verdict, Verdict::Withheld), "{judged:?}");
        for wrong in [slice("IPv4", "QUIC"), slice("IPv8", "TCP")] {
            assert!(matches!(judge(Kind::Slice, wrong, At::Folder(&config())).verdict, Verdict::Wrong));
        }
    }

    #[test]
    fn a_node_leaves_out_what_can_be_no_endpoint() {
        assert_eq!(used("IPv4", "10.0.0.1"), (1, vec![]));
        let vip = "is in the VIP range";
        for (address_type, address, why) in [
            ("IPv4", "10.200.0.9", vip),
            ("IPv6", "fd00:200::9", vip),
            ("IPv6", "::ffff:10.0.0.1", "is an IPv4 address in IPv6 notation"),
            ("IPv4", "255.255.255.255", "broadcast"),
            ("IPv4", "127.0.0.1", "loopback"),
            ("IPv4", "fd00::1", "is not IPv4"),
        ] {
            let (endpoints, findings) = used(address_type, address);
            assert_eq!((endpoints, findings.len()), (0, 1), "{address}: {findings:?}");
            assert!(
                findings[0].contains(why) && findings[0].starts_with("endpoints[0].addresses[0]: "),
                "{findings:?}"
            );
        }
    }
}
