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

/// Judges an object. With a `config`, the rules that depend on it (VIP ranges, reserved ports) are applied too.
/// `in_kubernetes` a controller does what a folder can't.
pub fn judge(kind: Kind, value: Value, config: Option<&NodeConfig>, in_kubernetes: bool) -> Judgement {
    match kind {
        Kind::Service => service(value, config, in_kubernetes),
        Kind::Slice => slice(value),
    }
}

fn service(value: Value, config: Option<&NodeConfig>, in_kubernetes: bool) -> Judgement {
    let service = api::parse_mesh_service(value).and_then(|object| api::to_service(&object, in_kubernetes));
    let service = service.and_then(|service| {
        let forbidden = config.map_or_else(Vec::new, |c| api::check_against_node(&service, c));
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

fn slice(value: Value) -> Judgement {
    match api::parse_endpoint_slice(value) {
        Ok(object) => {
            let (slice, findings) = api::to_slice(&object);
            let verdict =
                slice.map_or(Verdict::Withheld, |slice| Verdict::Good(Object::Slice(Arc::new(slice))));
            Judgement { verdict, findings, severity: Severity::Warning }
        }
        Err(findings) => Judgement { verdict: Verdict::Wrong, findings, severity: Severity::Error },
    }
}
