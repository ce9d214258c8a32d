//! From a valid `MeshService` to [`crate::model::service::Service`].

use std::{net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize;

use super::{
    error::{FieldError, Reason},
    status::MeshServiceStatus,
    v1alpha1::{self as api, MeshService},
};
use crate::model::{
    ids::{Family, PortId, Protocol, ServiceKey},
    service::{
        Dns, DnsAnswer, FamilyPolicy, Granted, Mode, Publish, PublishMode, Scheduler, Service, ServicePort,
        TargetPort, TrafficDistribution, TrafficPolicy,
    },
};

/// `IP_VS_SVC_F_SCHED1` and `2` (`include/uapi/linux/ip_vs.h`): fallback and port, for sh and for mh.
const FLAG_FALLBACK: u32 = 0x8;
const FLAG_PORT: u32 = 0x10;

/// The domain's view of an object that [`super::parse_mesh_service`] accepted.
///
/// # Errors
/// The fields that this program does not act on yet ([`Reason::NotSupportedYet`]): such a service is not
/// served at all, since nothing is silently ignored. Values out of range are errors too, but the schema has
/// refused those before.
///
/// `in_kubernetes` there is a controller that keeps a Service for `spec.selector`.
pub fn to_service(object: &MeshService, in_kubernetes: bool) -> Result<Service, Vec<FieldError>> {
    let mut errors = Vec::new();
    not_supported_yet(&object.spec, in_kubernetes, &mut errors);
    let service = convert(object, &mut errors);
    if errors.is_empty() { Ok(service) } else { Err(errors) }
}

/// What the controller has written into a MeshService's `status`. What can't be read is not granted.
pub fn granted(status: &serde_json::Value) -> Granted {
    granted_of(&readable_status(status))
}

/// A status, or of one that can't be read as a whole what can: virtual IPs and ports.
pub fn readable_status(status: &serde_json::Value) -> MeshServiceStatus {
    fn readable<T: serde::de::DeserializeOwned>(list: &serde_json::Value) -> Vec<T> {
        let items = list.as_array().into_iter().flatten();
        items.filter_map(|item| T::deserialize(item).ok()).collect()
    }
    MeshServiceStatus::deserialize(status).unwrap_or_else(|_| MeshServiceStatus {
        vips: readable(&status["vips"]),
        ports: readable(&status["ports"]),
        ..MeshServiceStatus::default()
    })
}

/// The same of a status that was read as a whole.
pub fn granted_of(status: &MeshServiceStatus) -> Granted {
    let mut out = Granted::default();
    for vip in status.vips.iter().filter_map(|vip| vip.0.parse::<IpAddr>().ok()) {
        out.vips.set(Family::of(&vip), Some(vip));
    }
    for port in &status.ports {
        let number = |n: i32| u16::try_from(n).ok();
        if let (Some(number), Some(published)) = (number(port.port), port.published_port.and_then(number)) {
            out.published.insert(PortId { port: number, protocol: protocol(port.protocol) }, published);
        }
    }
    out
}

fn not_supported_yet(spec: &api::MeshServiceSpec, in_kubernetes: bool, errors: &mut Vec<FieldError>) {
    let asked = [
        ("forwarding", spec.forwarding != api::Forwarding::Masquerade),
        ("sessionAffinity", spec.session_affinity != api::SessionAffinity::None),
        ("sourceRanges", !spec.source_ranges.is_empty()),
        ("healthCheck", spec.health_check.is_some()),
    ];
    let asked = asked.into_iter().filter(|(_, asked)| *asked).map(|(field, _)| format!("spec.{field}"));
    let selectors = spec.ports.iter().enumerate().filter_map(|(i, port)| {
        let publish = port.publish.as_ref()?;
        (!publish.node_selector.is_empty()).then(|| format!("spec.ports[{i}].publish.nodeSelector"))
    });
    if !in_kubernetes && !spec.selector.is_empty() {
        let message = "needs Kubernetes, where the controller keeps a Service for it: give serviceName here";
        errors.push(FieldError::new("spec.selector", Reason::NotSupportedYet, message));
    }
    for field in asked.chain(selectors) {
        let message = "is not supported yet; the service is not served while it is set";
        errors.push(FieldError::new(field, Reason::NotSupportedYet, message));
    }
}

fn convert(object: &MeshService, errors: &mut Vec<FieldError>) -> Service {
    let spec = &object.spec;
    let name = object.metadata.name.clone().unwrap_or_default();
    let namespace = object.metadata.namespace.clone().unwrap_or_else(|| "default".into());
    let mut families: Vec<Family> = spec.ip_families.iter().map(|f| family(*f)).collect();
    if spec.ip_family_policy != api::IpFamilyPolicy::SingleStack {
        // As in a core Service (KEP-563): the second family need not be named.
        families.extend(Family::ALL.into_iter().filter(|f| !families.contains(f)).collect::<Vec<_>>());
    }
    let mut weights = std::collections::BTreeMap::new();
    for (target, weight) in &spec.weights {
        let mut field = "spec.weights".to_owned();
        super::structural::push(&mut field, target);
        weights.insert(target.clone(), number(&field, weight.0, errors));
    }
    Service {
        service_name: spec.service_name.as_deref().unwrap_or(&name).into(),
        key: ServiceKey::new(namespace, name),
        mode: match spec.mode {
            api::Mode::Vip => Mode::Vip,
            api::Mode::Dnsrr => Mode::Dnsrr,
        },
        vips: addresses("spec.vips", &spec.vips, errors),
        families,
        family_policy: match spec.ip_family_policy {
            api::IpFamilyPolicy::SingleStack => FamilyPolicy::SingleStack,
            api::IpFamilyPolicy::PreferDualStack => FamilyPolicy::PreferDualStack,
            api::IpFamilyPolicy::RequireDualStack => FamilyPolicy::RequireDualStack,
        },
        weights,
        ports: spec.ports.iter().enumerate().map(|(i, p)| port(i, p, errors)).collect(),
        scheduler: scheduler(spec),
        internal_policy: policy(spec.internal_traffic_policy),
        external_policy: policy(spec.external_traffic_policy),
        distribution: match spec.traffic_distribution {
            api::TrafficDistribution::None => TrafficDistribution::Any,
            api::TrafficDistribution::PreferSameZone => TrafficDistribution::SameZone,
            api::TrafficDistribution::PreferSameNode => TrafficDistribution::SameNode,
        },
        drain: Duration::from_secs(u64::try_from(spec.drain.timeout_seconds).unwrap_or(0)),
        publish_not_ready: spec.publish_not_ready_addresses,
        dns: Dns {
            ttl: u32::try_from(spec.dns.ttl_seconds).unwrap_or(0),
            answer: match spec.dns.answer {
                api::DnsAnswer::Shuffle => DnsAnswer::Shuffle,
                api::DnsAnswer::Single => DnsAnswer::Single,
            },
            aliases: spec.dns.aliases.iter().map(|alias| alias.0.as_str().into()).collect(),
        },
        created: 0,
        granted: None,
    }
}

fn port(i: usize, port: &api::Port, errors: &mut Vec<FieldError>) -> ServicePort {
    let at = |field: &str| format!("spec.ports[{i}].{field}");
    ServicePort {
        name: port.name.as_deref().map(Arc::from),
        protocol: protocol(port.protocol),
        port: number(&at("port"), port.port, errors),
        end_port: port.end_port.map(|end| number(&at("endPort"), end, errors)),
        target: match &port.target_port {
            None => TargetPort::Inferred,
            Some(IntOrString::Int(n)) => TargetPort::Number(number(&at("targetPort"), *n, errors)),
            Some(IntOrString::String(name)) => TargetPort::Name(name.as_str().into()),
        },
        publish: port.publish.as_ref().map(|publish| Publish {
            mode: match publish.mode {
                api::PublishMode::Ingress => PublishMode::Ingress,
                api::PublishMode::Host => PublishMode::Host,
            },
            port: publish.port.map(|p| number(&at("publish.port"), p, errors)),
            addresses: addresses(&at("publish.addresses"), &publish.addresses, errors),
        }),
    }
}

fn scheduler(spec: &api::MeshServiceSpec) -> Scheduler {
    let name = match (spec.scheduler, spec.session_affinity) {
        (Some(scheduler), _) => scheduler.as_str(),
        (None, api::SessionAffinity::ClientIp) => "mh",
        (None, api::SessionAffinity::None) => "rr",
    };
    let flags = spec.scheduler_flags.iter().fold(0, |bits, flag| {
        bits | match flag {
            api::SchedulerFlag::ShFallback | api::SchedulerFlag::MhFallback => FLAG_FALLBACK,
            api::SchedulerFlag::ShPort | api::SchedulerFlag::MhPort => FLAG_PORT,
        }
    });
    // A destination that drains has weight 0. Both of these go on choosing it then, and refuse the client, unless they may fall
    // back on others (`ip_vs_sh_schedule`, `ip_vs_mh_schedule` of the kernel).
    let falls_back = if matches!(name, "sh" | "mh") { FLAG_FALLBACK } else { 0 };
    Scheduler { name: name.into(), flags: flags | falls_back }
}

fn addresses(field: &str, texts: &[api::IpText], errors: &mut Vec<FieldError>) -> Vec<IpAddr> {
    let mut parsed = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate() {
        match text.0.parse::<IpAddr>() {
            Ok(address) => parsed.push(address),
            Err(_) => errors.push(FieldError::new(
                format!("{field}[{i}]"),
                Reason::Invalid,
                format!("{:?} is not an IP address", text.0),
            )),
        }
    }
    parsed
}

fn number(field: &str, value: i32, errors: &mut Vec<FieldError>) -> u16 {
    u16::try_from(value).unwrap_or_else(|_| {
        errors.push(FieldError::new(field, Reason::Invalid, format!("must be 0 to 65535, not {value}")));
        0
    })
}

fn family(family: api::IpFamily) -> Family {
    match family {
        api::IpFamily::V4 => Family::V4,
        api::IpFamily::V6 => Family::V6,
    }
}

/// The model's word for it.
pub fn protocol(protocol: api::Protocol) -> Protocol {
    match protocol {
        api::Protocol::Tcp => Protocol::Tcp,
        api::Protocol::Udp => Protocol::Udp,
        api::Protocol::Sctp => Protocol::Sctp,
    }
}

fn policy(policy: api::TrafficPolicy) -> TrafficPolicy {
    match policy {
        api::TrafficPolicy::Cluster => TrafficPolicy::Cluster,
        api::TrafficPolicy::Local => TrafficPolicy::Local,
    }
}
