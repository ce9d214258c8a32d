//! Rules that need the node's configuration: which VIPs and ports may be asked for.

use super::error::{FieldError, Reason};
use crate::model::{
    ids::Family,
    node::NodeConfig,
    service::{Mode, Service},
};

/// What this configuration forbids in a service. The allocator never gives out such values itself.
pub fn check_against_node(service: &Service, config: &NodeConfig) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut forbid = |field: String, message: String| {
        errors.push(FieldError::new(field, Reason::Forbidden, message));
    };
    let vips = if service.mode == Mode::Vip { service.vips.as_slice() } else { &[] };
    for (i, vip) in vips.iter().enumerate() {
        let field = format!("spec.vips[{i}]");
        let family = Family::of(vip);
        let Some(range) = config.ranges.get(family) else {
            forbid(field, format!("{vip} can't be used: no {family} VIP range is configured (--vip-cidr)"));
            continue;
        };
        let taken_for = if config.ingress(family) == Some(*vip) {
            Some("the ingress address")
        } else if config.dns(family) == Some(*vip) {
            Some("the DNS address")
        } else if *vip == range.network() {
            Some("the network address")
        } else if family == Family::V4 && *vip == range.broadcast() {
            Some("the broadcast address")
        } else {
            None
        };
        if !range.contains(vip) {
            forbid(field, format!("{vip} is outside the VIP range {range}"));
        } else if let Some(what) = taken_for {
            forbid(field, format!("{vip} is {what} of the VIP range {range}"));
        }
    }
    for (i, port) in service.ports.iter().enumerate() {
        let Some(first) = port.publish.as_ref().and_then(|p| p.port) else { continue };
        let last = first.saturating_add(port.span() - 1);
        let field = format!("spec.ports[{i}].publish.port");
        let protocol = port.protocol;
        for reserved in &config.reserved {
            let applies = reserved.protocol.is_none_or(|p| p == protocol);
            let (from, to) = (first.max(*reserved.ports.start()), last.min(*reserved.ports.end()));
            if applies && from <= to {
                forbid(
                    field.clone(),
                    format!("{from}/{protocol} is reserved on every node (--publish-reserved)"),
                );
                break;
            }
        }
    }
    errors
}
