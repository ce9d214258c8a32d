//! Rules that need the node's configuration: which VIPs and ports may be asked for.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use super::error::{FieldError, Reason};
use crate::model::{
    endpoints::Slice,
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
        if !range.contains(vip) {
            forbid(field, format!("{vip} is outside the VIP range {range}"));
        } else if let Some(what) = config.reserved_address(vip) {
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

/// Leaves endpoints out whose address is in this configuration's VIP range, and says so: packets to them would never
/// leave a node.
pub fn leave_out_vips(slice: &mut Slice, object: &EndpointSlice, config: &NodeConfig) -> Vec<FieldError> {
    let Some(range) = config.ranges.get(slice.family) else { return Vec::new() };
    let mut vips = Vec::new();
    slice.endpoints.retain(|endpoint| {
        let is_vip = range.contains(&endpoint.address);
        if is_vip {
            vips.push(endpoint.address);
        }
        !is_vip
    });
    let finding = |vip: IpAddr| {
        let message = format!(
            "{vip} is in the VIP range {range} (--vip-cidr), where no endpoint can be; it is left out"
        );
        let of = |e: &Endpoint| e.addresses.first().and_then(|text| text.parse().ok()) == Some(vip);
        let at = object.endpoints.iter().position(of).unwrap_or(0);
        FieldError::new(format!("endpoints[{at}].addresses[0]"), Reason::Forbidden, message)
    };
    vips.into_iter().map(finding).collect()
}
