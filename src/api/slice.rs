//! From a `discovery.k8s.io/v1` EndpointSlice to [`crate::model::endpoints::Slice`].

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use k8s_openapi::api::discovery::v1::{Endpoint as ApiEndpoint, EndpointHints, EndpointSlice};

use super::{
    SERVICE_NAME_LABEL,
    error::{FieldError, Reason},
};
use crate::model::{
    endpoints::{Endpoint, Hints, Slice, SlicePort},
    ids::{Family, Protocol, ServiceKey},
};

/// The slice in domain types, and what in it can't be used; that does not stop the rest.
///
/// `None` when nothing in it can be used: it belongs to no service, or its addresses are names.
pub fn to_slice(object: &EndpointSlice) -> (Option<Slice>, Vec<FieldError>) {
    let mut notes = Vec::new();
    let name = object.metadata.name.clone().unwrap_or_default();
    let namespace = object.metadata.namespace.clone().unwrap_or_else(|| "default".into());
    let service_name = object.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME_LABEL));
    let Some(service_name) = service_name.filter(|n| !n.is_empty()) else {
        let message = format!("the label {SERVICE_NAME_LABEL} is missing: the slice belongs to no service");
        return (None, vec![FieldError::new("metadata.labels", Reason::Required, message)]);
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        other => {
            let message = format!("{other} can't be balanced; only IPv4 and IPv6 slices are used");
            return (None, vec![FieldError::new("addressType", Reason::NotSupported, message)]);
        }
    };
    let mut ports = Vec::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        let field = |f: &str| format!("ports[{i}].{f}");
        let protocol = match port.protocol.as_deref().unwrap_or("TCP").parse::<Protocol>() {
            Ok(protocol) => protocol,
            Err(e) => {
                notes.push(FieldError::new(field("protocol"), Reason::NotSupported, e.to_string()));
                continue;
            }
        };
        let number = match port.port.map(u16::try_from) {
            None => None,
            Some(Ok(n)) if n > 0 => Some(n),
            Some(_) => {
                let message = "must be 1 to 65535; the port is left out";
                notes.push(FieldError::new(field("port"), Reason::Invalid, message));
                continue;
            }
        };
        let name = port.name.as_deref().filter(|n| !n.is_empty()).map(Arc::from);
        ports.push(SlicePort { name, protocol, port: number });
    }
    let mut endpoints = Vec::with_capacity(object.endpoints.len());
    for (i, endpoint) in object.endpoints.iter().enumerate() {
        match address(endpoint, family) {
            Ok(address) => endpoints.push(convert(endpoint, address)),
            Err(message) => {
                let field = format!("endpoints[{i}].addresses[0]");
                notes.push(FieldError::new(field, Reason::Invalid, message));
            }
        }
    }
    let key = ServiceKey::new(namespace, name);
    (Some(Slice { key, service_name: service_name.as_str().into(), family, ports, endpoints }), notes)
}

fn address(endpoint: &ApiEndpoint, family: Family) -> Result<IpAddr, String> {
    let text = endpoint.addresses.first().map_or("", String::as_str);
    let address: IpAddr =
        text.parse().map_err(|_| format!("{text:?} is not an IP address; the endpoint is left out"))?;
    let refused = if Family::of(&address) != family {
        Some(format!("is not {family}"))
    } else if is_mapped(&address) {
        Some("is an IPv4 address in IPv6 notation".into())
    } else if address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || is_link_local(&address)
        || address == IpAddr::V4(Ipv4Addr::BROADCAST)
    {
        Some("can't be an endpoint (unspecified, loopback, link-local, multicast or broadcast)".into())
    } else {
        None
    };
    match refused {
        Some(why) => Err(format!("{address} {why}; the endpoint is left out")),
        None => Ok(address),
    }
}

fn is_mapped(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if a.to_ipv4_mapped().is_some())
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

fn hints(hints: &EndpointHints) -> Option<Arc<Hints>> {
    let zones: Vec<_> = hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect();
    let nodes: Vec<_> = hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect();
    (!zones.is_empty() || !nodes.is_empty()).then(|| Arc::new(Hints { zones, nodes }))
}

fn convert(endpoint: &ApiEndpoint, address: IpAddr) -> Endpoint {
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let text = |t: &Option<String>| t.as_deref().filter(|t| !t.is_empty()).map(Arc::from);
    let target = endpoint.target_ref.as_ref().and_then(|r| text(&r.name));
    Endpoint {
        address,
        ready,
        serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        node: text(&endpoint.node_name),
        zone: text(&endpoint.zone),
        hints: endpoint.hints.as_ref().and_then(hints),
        target: target.or_else(|| text(&endpoint.hostname)),
        hostname: text(&endpoint.hostname),
    }
}
