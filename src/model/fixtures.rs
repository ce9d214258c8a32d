//! Builders of domain objects for tests.

use std::{net::IpAddr, sync::Arc, time::Duration};

use super::{
    endpoints::{Endpoint, Slice, SlicePort},
    ids::{Family, PerFamily, Protocol, ServiceKey},
    node::{MarkMask, NodeConfig, NodeFacts},
    service::{
        FamilyPolicy, Mode, Publish, PublishMode, Scheduler, Service, ServicePort, TargetPort,
        TrafficDistribution, TrafficPolicy,
    },
    snapshot::Event,
};

/// Service `default/NAME`, mode VIP, IPv4, without ports.
pub fn service(name: &str) -> Service {
    Service {
        key: ServiceKey::new("default", name),
        mode: Mode::Vip,
        service_name: name.into(),
        vips: vec![],
        families: vec![Family::V4],
        family_policy: FamilyPolicy::SingleStack,
        weights: [].into(),
        ports: vec![],
        scheduler: Scheduler::default(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        distribution: TrafficDistribution::Any,
        drain: Duration::from_secs(30),
        publish_not_ready: false,
        dns: super::service::Dns::default(),
        created: 0,
        granted: None,
    }
}

/// A TCP port without a name.
pub fn port(port: u16, target: u16) -> ServicePort {
    ServicePort {
        name: None,
        protocol: Protocol::Tcp,
        port,
        end_port: None,
        target: TargetPort::Number(target),
        publish: None,
    }
}

/// The same, published.
pub fn published(number: u16, target: u16, publish: Option<u16>) -> ServicePort {
    let publish = Publish { mode: PublishMode::Ingress, port: publish, addresses: vec![] };
    ServicePort { publish: Some(publish), ..port(number, target) }
}

/// A ready endpoint.
pub fn endpoint(address: &str, node: &str) -> Endpoint {
    Endpoint {
        address: address.parse().expect("an address"),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.into()),
        zone: None,
        hints: None,
        target: None,
        hostname: None,
    }
}

/// Slice `default/NAME-1` of service NAME with unnamed TCP port 8080.
pub fn slice(name: &str, endpoints: Vec<Endpoint>) -> Arc<Slice> {
    let family = endpoints.first().map_or(Family::V4, |e| Family::of(&e.address));
    Arc::new(Slice {
        key: ServiceKey::new("default", format!("{name}-{}", family.digit())),
        service_name: name.into(),
        family,
        ports: vec![SlicePort { name: None, protocol: Protocol::Tcp, port: Some(8080) }],
        endpoints,
    })
}

/// Node n1 with both default ranges.
pub fn config() -> NodeConfig {
    NodeConfig {
        name: "n1".into(),
        ranges: PerFamily {
            v4: Some("10.200.0.0/16".parse().expect("a range")),
            v6: Some("fd00:200::/112".parse().expect("a range")),
        },
        publish_range: 30000..=32767,
        reserved: vec![],
        mask: MarkMask::default(),
        zone: None,
    }
}

/// Its addresses 192.168.50.1 and fd00:50::1.
pub fn facts() -> NodeFacts {
    let v4: IpAddr = "192.168.50.1".parse().expect("an address");
    let v6: IpAddr = "fd00:50::1".parse().expect("an address");
    NodeFacts {
        primary: PerFamily { v4: Some(v4), v6: Some(v6) },
        published_addresses: [v4, v6].into(),
        all_addresses: [v4, v6, "127.0.0.1".parse().expect("an address")].into(),
        uplinks: ["eth0".to_owned()].into(),
        outside: ["eth0".to_owned()].into(),
    }
}

/// An event in a word, for comparisons.
pub fn brief(event: &Event) -> String {
    match event {
        Event::Service(s) => format!("{}:{}", s.key.name, s.ports[0].port),
        Event::Granted(key, granted) => {
            let vips = granted.vips.iter().map(|(_, vip)| vip.to_string());
            let all: Vec<String> = vips.chain(granted.published.values().map(ToString::to_string)).collect();
            format!("{} has {}", key.name, all.join(" "))
        }
        Event::ServiceGone(key) => format!("-{}", key.name),
        Event::Slice(s) => format!("slice {}", s.key.name),
        Event::SliceGone(key) => format!("-slice {}", key.name),
    }
}
