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
    /// `targetRef.name`, else `hostname`: the name that `weights` uses.
    pub target: Option<Arc<str>>,
    /// `hostname`: its name in DNS, below the service's.
    pub hostname: Option<Arc<str>>,
}
