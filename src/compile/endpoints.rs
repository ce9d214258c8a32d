//! Which endpoints serve a port, and where they listen.

use std::collections::BTreeMap;

use crate::model::{
    endpoints::{Endpoint, Slice, SlicePort},
    ids::Family,
    kernel::RealServerKey,
    node::NodeConfig,
    service::{Reach, Service, ServicePort, TargetPort, TrafficDistribution, TrafficPolicy},
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

/// Where the endpoints of a slice with these ports listen for a service port, `None` when the slice has no such port.
/// A range is forwarded to the port that the client asked for, which IPVS writes as port 0.
pub fn target_port(port: &ServicePort, of_slice: &[SlicePort]) -> Option<u16> {
    if port.end_port.is_some() {
        return Some(0);
    }
    let of_protocol = || of_slice.iter().filter(|p| p.protocol == port.protocol);
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

/// Where a client is that asks on this node.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The node's name.
    pub node: &'a str,
    /// Its zone, where it is known.
    pub zone: Option<&'a str>,
}

impl<'a> Place<'a> {
    /// This node.
    pub fn of(config: &'a NodeConfig) -> Self {
        Self { node: &config.name, zone: config.zone.as_deref() }
    }
}

/// Endpoints that take new connections for `port`.
pub fn serving<'a>(
    service: &Service,
    port: &ServicePort,
    slices: &'a [impl AsRef<Slice>],
    family: Family,
    place: Place<'_>,
    reach: Reach,
) -> Candidates<'a> {
    let slices = slices.iter().map(AsRef::as_ref).filter(|s| s.family == family);
    let found = slices.filter_map(|slice| Some((target_port(port, &slice.ports)?, slice))).flat_map(
        |(port, slice)| slice.endpoints.iter().map(move |e| (RealServerKey { addr: e.address, port }, e)),
    );
    choose(service, found, place, reach)
}

/// Of these endpoints the ready ones, or, where there are none, those that terminate but still serve (KEP-1669); of the ready
/// ones the near ones, where the service prefers them and some of them take connections.
pub fn choose<'a, K: Ord>(
    service: &Service,
    endpoints: impl Iterator<Item = (K, &'a Endpoint)>,
    place: Place<'_>,
    reach: Reach,
) -> BTreeMap<K, Candidate<'a>> {
    let mut ready = BTreeMap::new();
    let mut terminating = BTreeMap::new();
    for (key, endpoint) in endpoints {
        let local = endpoint.node.as_deref() == Some(place.node);
        if reach.policy == TrafficPolicy::Local && !local {
            continue;
        }
        // A pod that moves between slices is in two of them for a moment.
        if endpoint.ready {
            ready.insert(key, Candidate { endpoint, local });
        } else if endpoint.serving && endpoint.terminating {
            terminating.insert(key, Candidate { endpoint, local });
        }
    }
    if ready.is_empty() {
        return terminating;
    }
    let by_node = |e: &Endpoint| e.is_for_node(place.node);
    let by_zone = |e: &Endpoint| place.zone.is_some_and(|zone| e.is_for_zone(zone));
    let near: &[&dyn Fn(&Endpoint) -> bool] = match reach.distribution {
        TrafficDistribution::Any => &[],
        TrafficDistribution::SameZone => &[&by_zone],
        TrafficDistribution::SameNode => &[&by_node, &by_zone],
    };
    for is_near in near {
        if ready.values().any(|c| is_near(c.endpoint) && service.weight(c.endpoint) > 0) {
            ready.retain(|_, c| is_near(c.endpoint));
            break;
        }
    }
    ready
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{
        endpoints::Hints,
        fixtures::{endpoint, service},
    };

    /// Three endpoints on three nodes: the first two in zone z1, the third in z2.
    fn three() -> Vec<Endpoint> {
        let zones = [("10.244.1.1", "n1", "z1"), ("10.244.2.2", "n2", "z1"), ("10.244.3.3", "n3", "z2")];
        let in_zone = |(addr, node, zone): (&str, &str, &str)| Endpoint {
            zone: Some(zone.into()),
            target: Some(node.into()),
            ..endpoint(addr, node)
        };
        zones.map(in_zone).into()
    }

    /// The nodes of the endpoints that a client on `node` in `zone` is led to.
    fn chosen(service: &Service, ends: &[Endpoint], node: &str, zone: Option<&str>) -> String {
        let found =
            choose(service, ends.iter().map(|e| (e.address, e)), Place { node, zone }, service.internal());
        found.values().filter_map(|c| c.endpoint.node.as_deref()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn near_ones_are_preferred_while_there_are_any() {
        let any = service("web");
        let zone = Service { distribution: TrafficDistribution::SameZone, ..any.clone() };
        let node = Service { distribution: TrafficDistribution::SameNode, ..any.clone() };
        let all = "n1 n2 n3";
        for (service, at, zone, want) in [
            (&any, "n1", Some("z1"), all),
            (&zone, "n1", Some("z1"), "n1 n2"),
            (&zone, "n9", Some("z2"), "n3"),
            (&zone, "n1", Some("z3"), all),
            (&zone, "n1", None, all),
            (&node, "n1", Some("z1"), "n1"),
            (&node, "n1", None, "n1"),
            (&node, "n9", Some("z1"), "n1 n2"),
            (&node, "n9", Some("z3"), all),
            (&node, "n9", None, all),
        ] {
            assert_eq!(chosen(service, &three(), at, zone), want, "{:?} {at} {zone:?}", service.distribution);
        }
    }

    #[test]
    fn one_that_takes_nothing_is_no_reason_to_refuse_the_others() {
        let mut node = Service { distribution: TrafficDistribution::SameNode, ..service("web") };
        let mut ends = three();
        ends[0].ready = false;
        assert_eq!(chosen(&node, &ends, "n1", Some("z1")), "n2");
        ends[0].ready = true;
        node.weights = [("n1".to_owned(), 0)].into();
        assert_eq!(chosen(&node, &ends, "n1", Some("z1")), "n1 n2", "with its weight of 0");
        node.weights.insert("n2".into(), 0);
        assert_eq!(chosen(&node, &ends, "n1", Some("z1")), "n1 n2 n3");
        // Those that end serve wherever they are.
        for end in &mut ends {
            (end.ready, end.serving, end.terminating) = (false, true, true);
        }
        assert_eq!(chosen(&node, &ends, "n1", Some("z1")), "n1 n2 n3");
        // A policy is one, though.
        let local = Service { internal_policy: TrafficPolicy::Local, ..node };
        assert_eq!(chosen(&local, &three(), "n3", Some("z1")), "n3");
        assert_eq!(chosen(&local, &three(), "n9", Some("z1")), "");
    }

    #[test]
    fn hints_outweigh_where_an_endpoint_is() {
        let zone = Service { distribution: TrafficDistribution::SameZone, ..service("web") };
        let node = Service { distribution: TrafficDistribution::SameNode, ..service("web") };
        let mut ends = three();
        ends[0].hints = Some(Arc::new(Hints { zones: vec!["z2".into(), "z3".into()], nodes: vec![] }));
        ends[2].hints = Some(Arc::new(Hints { zones: vec![], nodes: vec!["n1".into()] }));
        assert_eq!(chosen(&zone, &ends, "n9", Some("z1")), "n2");
        assert_eq!(chosen(&zone, &ends, "n9", Some("z2")), "n1 n3");
        assert_eq!(chosen(&zone, &ends, "n9", Some("z3")), "n1");
        assert_eq!(chosen(&node, &ends, "n1", Some("z1")), "n1 n3");
        assert_eq!(chosen(&node, &ends, "n3", Some("z3")), "n1");
    }
}
