//! Endpoints, as EndpointSlices give them (`discovery.k8s.io/v1`).

use std::{net::IpAddr, sync::Arc};

use super::ids::{Family, Protocol, ServiceKey};

/// One EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// `namespace/name` of the slice itself.
    pub key: ServiceKey,
    /// Its label `kubernetes.io/service-name`.
    pub service_name: Arc<str>,
    /// Family of all its addresses.
    pub family: Family,
    /// Ports that its endpoints listen on.
    pub ports: Vec<SlicePort>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A port of a slice. Ports may differ between slices of one service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// Port name; `None` for the unnamed port.
    pub name: Option<Arc<str>>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port number; `None` means all ports, which we can't balance.
    pub port: Option<u16>,
}

/// `hints` of an endpoint (KEP-2433, KEP-3015): instead of its own zone and node those whose clients should use it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Hints {
    /// `forZones`.
    pub zones: Vec<Arc<str>>,
    /// `forNodes`.
    pub nodes: Vec<Arc<str>>,
}

/// One endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Its address (the API allows several that are interchangeable; the first is used, as kube-proxy does).
    pub address: IpAddr,
    /// `conditions.ready`, unset meaning true.
    pub ready: bool,
    /// `conditions.serving`, unset meaning `ready`.
    pub serving: bool,
    /// `conditions.terminating`, unset meaning false.
    pub terminating: bool,
    /// Node it runs on; without one it counts as remote everywhere.
    pub node: Option<Arc<str>>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// Clients that it is meant for, where the slice says so.
    pub hints: Option<Arc<Hints>>,
    /// `targetRef.name`, else `hostname`: the name that `weights` uses.
    pub target: Option<Arc<str>>,
    /// `hostname`: its name in DNS, below the service's.
    pub hostname: Option<Arc<str>>,
}

impl Endpoint {
    /// Whether it is for clients on this node: by its hints, else since it runs there.
    pub fn is_for_node(&self, node: &str) -> bool {
        match self.hints.as_ref().map(|hints| &*hints.nodes) {
            Some(nodes @ [_, ..]) => nodes.iter().any(|n| **n == *node),
            _ => self.node.as_deref() == Some(node),
        }
    }

    /// Whether it is for clients in this zone: by its hints, else since it is there.
    pub fn is_for_zone(&self, zone: &str) -> bool {
        match self.hints.as_ref().map(|hints| &*hints.zones) {
            Some(zones @ [_, ..]) => zones.iter().any(|z| **z == *zone),
            _ => self.zone.as_deref() == Some(zone),
        }
    }
}
