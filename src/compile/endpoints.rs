//! Which endpoints serve a port, and where they listen.

use std::collections::BTreeMap;

use crate::model::{
    endpoints::{Endpoint, Slice, SlicePort},
    ids::Family,
    kernel::RealServerKey,
    service::{ServicePort, TargetPort, TrafficPolicy},
};

/// An endpoint that may take connections for a port.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Whether it runs on this node.
    pub local: bool,
}

/// The endpoints of one port, by address and port.
pub type Candidates<'a> = BTreeMap<RealServerKey, Candidate<'a>>;

/// Where the endpoints of a slice listen for a service port, `None` when the slice has no such port.
/// A range is forwarded to the port that the client asked for, which IPVS writes as port 0.
fn target_port(port: &ServicePort, slice: &Slice) -> Option<u16> {
    if port.end_port.is_some() {
        return Some(0);
    }
    let of_protocol = || slice.ports.iter().filter(|p| p.protocol == port.protocol);
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            of_protocol().find(|p| p.name.as_deref() == Some(&**name)).and_then(|p| p.port)
        }
        TargetPort::Inferred => {
            let same_name = |p: &&SlicePort| p.name.as_deref() == port.name.as_deref();
            if let Some(found) = of_protocol().find(same_name) {
                return found.port.or(Some(port.port));
            }
            let mut all = of_protocol();
            match (all.next(), all.next()) {
                (Some(only), None) => only.port.or(Some(port.port)),
                _ => Some(port.port),
            }
        }
    }
}

/// Endpoints that take new connections for `port` under `policy`: the ready ones, or, where there are
/// none, those that terminate but still serve (KEP-1669).
pub fn serving<'a>(
    port: &ServicePort,
    slices: &'a [impl AsRef<Slice>],
    family: Family,
    node: &str,
    policy: TrafficPolicy,
) -> Candidates<'a> {
    let mut ready = Candidates::new();
    let mut terminating = Candidates::new();
    for slice in slices.iter().map(AsRef::as_ref).filter(|s| s.family == family) {
        let Some(target) = target_port(port, slice) else { continue };
        for endpoint in &slice.endpoints {
            let local = endpoint.node.as_deref() == Some(node);
            if policy == TrafficPolicy::Local && !local {
                continue;
            }
            let key = RealServerKey { addr: endpoint.address, port: target };
            // A pod that moves between slices is in two of them for a moment.
            if endpoint.ready {
                ready.insert(key, Candidate { endpoint, local });
            } else if endpoint.serving && endpoint.terminating {
                terminating.insert(key, Candidate { endpoint, local });
            }
        }
    }
    if ready.is_empty() { terminating } else { ready }
}
