//! What an API server refuses in an EndpointSlice beyond its schema (Kubernetes 1.37,
//! `pkg/apis/discovery/validation`, with the feature StrictIPCIDRValidation).

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::{
    error::{FieldError, Reason},
    validate::{is_dns_label, is_dns_subdomain},
};

/// What is wrong in a slice that its schema accepts.
pub fn broken_slice_rules(object: &EndpointSlice) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut wrong = |field: String, reason: Reason, message: String| {
        errors.push(FieldError::new(field, reason, message));
    };
    for (i, endpoint) in object.endpoints.iter().enumerate() {
        for (j, text) in endpoint.addresses.iter().enumerate() {
            if let Some(why) = refused(&object.address_type, text) {
                wrong(format!("endpoints[{i}].addresses[{j}]"), Reason::Invalid, format!("{text:?} {why}"));
            }
        }
        if let Some(name) = endpoint.node_name.as_deref().filter(|name| !is_dns_subdomain(name)) {
            let message = format!("{name:?} is no name of a node: lower-case letters, digits, '-' and '.'");
            wrong(format!("endpoints[{i}].nodeName"), Reason::Invalid, message);
        }
        if let Some(name) = endpoint.hostname.as_deref().filter(|name| !is_dns_label(name)) {
            let message = format!("{name:?} is no DNS label: lower-case letters, digits and '-'");
            wrong(format!("endpoints[{i}].hostname"), Reason::Invalid, message);
        }
    }
    let mut names = BTreeSet::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        let name = port.name.as_deref().unwrap_or_default();
        if !name.is_empty() && !is_dns_label(name) {
            let message = format!(
                "{name:?} is no DNS label of at most 63 characters: lower-case letters, digits and '-'"
            );
            wrong(format!("ports[{i}].name"), Reason::Invalid, message);
        }
        if !names.insert(name) {
            let message = match name {
                "" => "only one port of a slice can be without a name".into(),
                name => format!("two ports of the slice are called {name:?}"),
            };
            wrong(format!("ports[{i}].name"), Reason::Duplicate, message);
        }
    }
    errors
}

/// Why an address can't be in a slice of this type.
fn refused(address_type: &str, text: &str) -> Option<String> {
    if address_type == "FQDN" {
        let name = text.strip_suffix('.').unwrap_or(text);
        let full = is_dns_subdomain(name) && name.contains('.');
        return (!full).then(|| "is no fully qualified domain name".into());
    }
    let Ok(address) = text.parse::<IpAddr>() else {
        let zeros = text.split('.').count() == 4
            && text.split('.').all(|part| part.parse::<u8>().is_ok() && !part.starts_with('+'));
        return Some(if zeros {
            "is ambiguous: an IPv4 address has no leading zeros".into()
        } else if text.contains('%') {
            "is not an IP address: a zone can't be given".into()
        } else {
            "is not an IP address".into()
        });
    };
    let mapped = matches!(address, IpAddr::V6(a) if a.to_ipv4_mapped().is_some());
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    // 224.0.0.0/24 and ff02::/16 with any flags, as Go's IsLinkLocalMulticast; others are left to us.
    let multicast = match address {
        IpAddr::V4(a) => a.octets()[..3] == [224, 0, 0],
        IpAddr::V6(a) => a.segments()[0] & 0xff0f == 0xff02,
    };
    if mapped {
        Some("is an IPv4 address in IPv6 notation".into())
    } else if address.is_ipv4() != (address_type == "IPv4") {
        Some(format!("is not {address_type}, which addressType says"))
    } else if address.is_unspecified() {
        Some("is unspecified: it is nobody's address".into())
    } else if address.is_loopback() {
        Some("is a loopback address".into())
    } else if link_local {
        Some("is a link-local address".into())
    } else if multicast {
        Some("is a multicast address".into())
    } else if address.is_ipv6() && address.to_string() != text {
        Some(format!("must be written as {address}"))
    } else {
        None
    }
}
