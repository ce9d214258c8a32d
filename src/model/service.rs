//! A service as its owner declared it, defaults filled in and validated.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

use super::{
    endpoints::Endpoint,
    ids::{Family, PerFamily, PortId, Protocol, ServiceKey},
};

/// A MeshService that passed validation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Its name.
    pub key: ServiceKey,
    /// Virtual IP, or names that answer endpoints.
    pub mode: Mode,
    /// EndpointSlices labelled `kubernetes.io/service-name=<this>` in the same namespace carry its endpoints.
    pub service_name: Arc<str>,
    /// Explicit VIPs, at most one per family.
    pub vips: Vec<IpAddr>,
    /// Families asked for, the primary one first.
    pub families: Vec<Family>,
    /// What to do when the node has no range for one of `families`.
    pub family_policy: FamilyPolicy,
    /// IPVS weight by endpoint target name (`targetRef.name` or `hostname`); others have 1.
    pub weights: BTreeMap<String, u16>,
    /// At least one; unique by [`PortId`].
    pub ports: Vec<ServicePort>,
    /// How IPVS picks a real server.
    pub scheduler: Scheduler,
    /// Which endpoints serve the VIP.
    pub internal_policy: TrafficPolicy,
    /// Which endpoints serve published ports.
    pub external_policy: TrafficPolicy,
    /// Which of those are preferred.
    pub distribution: TrafficDistribution,
    /// How long established TCP connections of a removed endpoint may go on.
    pub drain: Duration,
    /// Endpoints that are not ready are used as ready ones are.
    pub publish_not_ready: bool,
    /// How its names answer.
    pub dns: Dns,
    /// When its object was created, in seconds since 1970: of two claims on one value the older wins. 0 where age does
    /// not count, as in a folder.
    pub created: u64,
    /// What the mesh's allocator gave it; `None` where each node allocates by itself.
    pub granted: Option<Granted>,
}

/// Virtual IPs and published ports that are a service's, and no others.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Granted {
    /// Virtual IPs, at most one per family.
    pub vips: PerFamily<IpAddr>,
    /// Published port (of a range: the first) by port.
    pub published: BTreeMap<PortId, u16>,
}

/// How a service's names answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dns {
    /// Seconds that an answer may be kept.
    pub ttl: u32,
    /// What of several addresses is answered.
    pub answer: DnsAnswer,
    /// Further names in its namespace, each one label.
    pub aliases: Vec<Arc<str>>,
}

impl Default for Dns {
    /// As in the CRD.
    fn default() -> Self {
        Self { ttl: 5, answer: DnsAnswer::Shuffle, aliases: Vec::new() }
    }
}

/// What of several addresses is answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DnsAnswer {
    /// All, in random order.
    Shuffle,
    /// One, in turn: what sorts answers (RFC 6724) has nothing to sort.
    Single,
}

/// How clients find the endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// A virtual IP balanced by IPVS.
    Vip,
    /// DNS round robin; published ports are balanced by IPVS all the same.
    Dnsrr,
}

/// As `ipFamilyPolicy` of a core Service (KEP-563).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FamilyPolicy {
    /// One family.
    SingleStack,
    /// Both where the node has ranges for both.
    PreferDualStack,
    /// Both, or the service is not allocated.
    RequireDualStack,
}

/// As `internalTrafficPolicy` and `externalTrafficPolicy` of a core Service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TrafficPolicy {
    /// Endpoints on every node.
    Cluster,
    /// Only endpoints on the node that received the packet; none means refused.
    Local,
}

/// As `trafficDistribution` of a core Service (KEP-4444, KEP-3015): a preference, never a reason to refuse.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum TrafficDistribution {
    /// None.
    #[default]
    Any,
    /// Endpoints in this node's zone, while there are any.
    SameZone,
    /// Endpoints on this node, while there are any; else those in its zone.
    SameNode,
}

/// Which endpoints a client may be led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    /// On which nodes.
    pub policy: TrafficPolicy,
    /// And which of those first.
    pub distribution: TrafficDistribution,
}

impl Reach {
    /// All of them.
    pub const ALL: Self = Self { policy: TrafficPolicy::Cluster, distribution: TrafficDistribution::Any };
}

impl Service {
    /// The name that its EndpointSlices give.
    pub fn group(&self) -> ServiceKey {
        ServiceKey::new(self.key.namespace.clone(), self.service_name.clone())
    }

    /// Endpoints of the virtual IP, and of the name where there is none.
    pub fn internal(&self) -> Reach {
        Reach { policy: self.internal_policy, distribution: self.distribution }
    }

    /// Endpoints of a port that is published in this way.
    pub fn external(&self, mode: PublishMode) -> Reach {
        let policy = match mode {
            PublishMode::Ingress => self.external_policy,
            PublishMode::Host => TrafficPolicy::Local,
        };
        Reach { policy, distribution: self.distribution }
    }

    /// The IPVS weight of an endpoint.
    pub fn weight(&self, endpoint: &Endpoint) -> u16 {
        endpoint.target.as_deref().and_then(|target| self.weights.get(target)).copied().unwrap_or(1)
    }
}

/// An IPVS scheduler and its flags (kernel: `net/netfilter/ipvs/ip_vs_*.c`).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Scheduler {
    /// `rr`, `wrr`, `lc`, `wlc`, `lblc`, `lblcr`, `dh`, `sh`, `sed`, `nq`, `mh`, `fo` or `ovf`.
    pub name: Arc<str>,
    /// `IP_VS_SVC_F_SCHED*` bits (`include/uapi/linux/ip_vs.h`).
    pub flags: u32,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self { name: "rr".into(), flags: 0 }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// One port, or a range of ports, of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// IANA service name; required when there are several ports.
    pub name: Option<Arc<str>>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The port clients use, or the first of a range.
    pub port: u16,
    /// Last port of a range, inclusive.
    pub end_port: Option<u16>,
    /// Where endpoints listen.
    pub target: TargetPort,
    /// Whether and how the port answers on nodes' own addresses.
    pub publish: Option<Publish>,
}

impl ServicePort {
    /// The port's identity within its service.
    pub fn id(&self) -> PortId {
        PortId { port: self.port, protocol: self.protocol }
    }

    /// How many ports it spans; 1 unless `end_port` is set.
    pub fn span(&self) -> u16 {
        self.end_port.map_or(1, |end| end.saturating_sub(self.port).saturating_add(1))
    }

    /// Whether a number is its port, or one of its range.
    pub fn covers(&self, number: u16) -> bool {
        (self.port..=self.end_port.unwrap_or(self.port)).contains(&number)
    }

    /// `name`, or `port/protocol` where it has none: how people are told about it.
    pub fn label(&self) -> String {
        self.name.as_ref().map_or_else(|| self.id().to_string(), ToString::to_string)
    }
}

/// Where an endpoint listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetPort {
    /// That port on every endpoint.
    Number(u16),
    /// The slice port of that name.
    Name(Arc<str>),
    /// The slice port of the service port's name and protocol, else the slice's only port of that
    /// protocol, else the service port's own number.
    Inferred,
}

/// A published port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Publish {
    /// Mesh-wide or on the endpoint's node only.
    pub mode: PublishMode,
    /// Explicit port; `None` takes one from the publish range.
    pub port: Option<u16>,
    /// Only on these node addresses; empty means on all that the node publishes on.
    pub addresses: Vec<IpAddr>,
}

/// Which nodes answer a published port.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PublishMode {
    /// Every node answers and reaches an endpoint on any node.
    Ingress,
    /// Only nodes with an endpoint answer, each with its own endpoints.
    Host,
}
