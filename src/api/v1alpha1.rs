//! The `MeshService` object, `meshlb.dev/v1alpha1`.
//!
//! The doc comments below are what `kubectl explain meshservice` prints, and the attributes are what
//! the API server enforces: `meshlb crd` writes both from these types, and [`super::validate`] holds a
//! manifest against the very same schema.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use super::values::*;
use super::{status::MeshServiceStatus, values::label_keys};

/// What a service is and how it is balanced.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[kube(
    group = "meshlb.dev",
    version = "v1alpha1",
    kind = "MeshService",
    plural = "meshservices",
    shortname = "msvc",
    category = "all",
    category = "meshlb",
    namespaced,
    status = "MeshServiceStatus",
    derive = "PartialEq",
    doc = "A MeshService gives a set of endpoints one virtual IP, a DNS name and, where asked for, ports on every node. The kernel of each node does the balancing.",
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63")
        .message("metadata.name must be a DNS label of at most 63 characters: lower-case letters, digits and '-', starting with a letter and ending with a letter or digit"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode", description = "VIP or DNSRR."),
    printcolumn(name = "VIPs", type_ = "string", json_path = ".status.vips", description = "Virtual IPs in force."),
    printcolumn(name = "Ports", type_ = "string", json_path = ".status.summary.ports", description = "Ports as PORT/PROTOCOL."),
    printcolumn(name = "Published", type_ = "string", json_path = ".status.summary.published", description = "Ports that nodes answer on."),
    printcolumn(name = "Endpoints", type_ = "string", json_path = ".status.summary.endpoints", description = "Ready and total endpoints."),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether the service is served."),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", description = "Why, in one word."),
    printcolumn(name = "Scheduler", type_ = "string", json_path = ".spec.scheduler", description = "IPVS scheduler.", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", description = "Why, in a sentence.", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.serviceName) || size(self.selector) == 0")
    .message("give either selector or serviceName, not both").field_path(".serviceName"))]
#[x_kube(validation = Rule::new("self.mode != 'DNSRR' || size(self.vips) == 0")
    .message("a service of mode DNSRR has no virtual IP: remove vips, or set mode: VIP").field_path(".vips"))]
#[x_kube(validation = Rule::new("self.ipFamilyPolicy != 'SingleStack' || size(self.ipFamilies) == 1")
    .message("may hold only one family while ipFamilyPolicy is SingleStack; set PreferDualStack or RequireDualStack for two")
    .field_path(".ipFamilies"))]
#[x_kube(validation = Rule::new("self.ipFamilyPolicy != 'SingleStack' || self.vips.all(v, !isIP(v) || (ip(v).family() == 4 ? 'IPv4' in self.ipFamilies : 'IPv6' in self.ipFamilies))")
    .message("holds an address of a family that ipFamilies does not list").field_path(".vips"))]
#[x_kube(validation = Rule::new("self.sessionAffinity != 'ClientIP' || !has(self.scheduler) || self.scheduler == 'mh'")
    .message("must be mh or absent while sessionAffinity is ClientIP: affinity is Maglev hashing by the client's address")
    .field_path(".scheduler"))]
#[x_kube(validation = Rule::new("self.schedulerFlags.all(f, f.startsWith((has(self.scheduler) ? self.scheduler : (self.sessionAffinity == 'ClientIP' ? 'mh' : 'rr')) + '-'))")
    .message("holds a flag of another scheduler: sh-* flags need scheduler sh, mh-* flags need mh").field_path(".schedulerFlags"))]
#[x_kube(validation = Rule::new("self.sessionAffinity != 'ClientIP' || !('mh-port' in self.schedulerFlags)")
    .message("mh-port hashes the client's port too and so undoes sessionAffinity ClientIP").field_path(".schedulerFlags"))]
#[x_kube(validation = Rule::new("self.forwarding == 'Masquerade' || self.ports.all(p, !has(p.targetPort) || p.targetPort == p.port)")
    .message("only Masquerade can translate ports: with Tunnel or DirectRoute every targetPort must equal its port or be absent")
    .field_path(".forwarding"))]
pub struct MeshServiceSpec {
    /// How clients find the endpoints. VIP (the default): one virtual IP per family, balanced by IPVS in the
    /// kernel of the client's node. DNSRR: no virtual IP; the name answers the endpoints' addresses.
    /// Published ports work in both modes.
    #[serde(default = "defaults::mode")]
    pub mode: Mode,

    /// EndpointSlices in this namespace with the label kubernetes.io/service-name=<serviceName> carry the
    /// endpoints. Default: metadata.name. Give this or selector, not both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63), pattern(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub service_name: Option<String>,

    /// Labels of the pods that serve. The controller then keeps a headless Service of the same name, whose
    /// EndpointSlices are used. Kubernetes only. Give this or serviceName, not both.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 64, "x-kubernetes-map-type" = "atomic"))]
    #[x_kube(validation = label_keys())]
    pub selector: BTreeMap<String, LabelValue>,

    /// Virtual IPs to use, at most one per family, out of the configured VIP ranges. Empty (the default):
    /// one is allocated per family and kept.
    #[serde(default)]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = Rule::new("self.all(v, isIP(v))").message("holds something that is not an IP address"))]
    #[x_kube(validation = Rule::new("size(self) < 2 || !self.all(v, isIP(v)) || ip(self[0]).family() != ip(self[1]).family()")
        .message("may hold at most one address per family"))]
    pub vips: Vec<IpText>,

    /// Address families of the service, the primary one first: IPv4, IPv6, or both in either order.
    #[serde(default = "defaults::ip_families")]
    #[schemars(length(min = 1, max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = Rule::new("size(self) < 2 || self[0] != self[1]").message("holds the same family twice"))]
    pub ip_families: Vec<IpFamily>,

    /// SingleStack (the default): the one family of ipFamilies. PreferDualStack: both families where the mesh
    /// has VIP ranges for both. RequireDualStack: both, or the service is not served.
    #[serde(default = "defaults::ip_family_policy")]
    pub ip_family_policy: IpFamilyPolicy,

    /// Whether endpoints that are not ready get connections, and are in DNS answers, as if they were. Default: false.
    #[serde(default)]
    pub publish_not_ready_addresses: bool,

    /// IPVS weight (0 to 65535) by endpoint name: the targetRef.name of the endpoint, else its hostname.
    /// Endpoints that are not named here have weight 1; weight 0 gets no new connections. Only the weighted
    /// schedulers (wrr, wlc, sed, nq, sh, mh, fo, ovf, lblc, lblcr) look at it.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 1000))]
    #[x_kube(validation = Rule::new("self.all(k, size(k) <= 253)").message("holds a name longer than 253 characters"))]
    pub weights: BTreeMap<String, Weight>,

    /// The ports of the service: at least one, at most 128.
    #[schemars(length(min = 1, max = 128), extend(
        "x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["port", "protocol"]))]
    #[x_kube(validation = Rule::new("size(self) == 1 || self.all(p, has(p.name))")
        .message("every port needs a name when there are several"))]
    #[x_kube(validation = Rule::new("self.all(p, !has(p.name) || self.exists_one(q, has(q.name) && q.name == p.name))")
        .message("two ports have the same name"))]
    #[x_kube(validation = Rule::new("self.all(p, self.exists_one(q, q.protocol == p.protocol && q.port <= (has(p.endPort) ? p.endPort : p.port) && p.port <= (has(q.endPort) ? q.endPort : q.port)))")
        .message("two ports of one protocol overlap").reason(Reason::FieldValueDuplicate))]
    #[x_kube(validation = Rule::new("self.all(p, !has(p.publish) || !has(p.publish.port) || self.exists_one(q, has(q.publish) && has(q.publish.port) && q.protocol == p.protocol && q.publish.port <= p.publish.port + (has(p.endPort) ? p.endPort - p.port : 0) && p.publish.port <= q.publish.port + (has(q.endPort) ? q.endPort - q.port : 0)))")
        .message("two ports of one protocol are published on the same port").reason(Reason::FieldValueDuplicate))]
    pub ports: Vec<Port>,

    /// See [`Scheduler`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<Scheduler>,

    /// Flags of the scheduler, named as ipvsadm names them: sh-fallback and mh-fallback (skip endpoints of
    /// weight 0), sh-port and mh-port (hash the client's port as well).
    #[serde(default)]
    #[schemars(length(max = 4), extend("x-kubernetes-list-type" = "set"))]
    pub scheduler_flags: Vec<SchedulerFlag>,

    /// How packets reach an endpoint. Masquerade (the default): by network address translation. Tunnel: by
    /// IP in IP. DirectRoute: by rewriting the link-layer address.
    #[serde(default = "defaults::forwarding")]
    pub forwarding: Forwarding,

    /// None (the default): every connection is balanced on its own. ClientIP: the connections of one client
    /// address go to the same endpoint, on every node.
    #[serde(default = "defaults::session_affinity")]
    pub session_affinity: SessionAffinity,

    /// Which endpoints serve the virtual IP. Cluster (the default): all. Local: only those on the client's
    /// node; where it has none, connections are refused.
    #[serde(default = "defaults::traffic_policy")]
    pub internal_traffic_policy: TrafficPolicy,

    /// Which endpoints serve published ports. Cluster (the default): all. Local: only those on the node that
    /// received the packet, with the client's address kept; where it has none, connections are refused.
    #[serde(default = "defaults::traffic_policy")]
    pub external_traffic_policy: TrafficPolicy,

    /// Preference for near endpoints, of what the traffic policies allow: empty (the default, none); PreferSameZone, those in
    /// the zone of the client's node; PreferSameNode, those on the client's node, else those in its zone. While none of them
    /// is ready, all serve. An EndpointSlice's hints outweigh its nodeName and zone.
    #[serde(default)]
    pub traffic_distribution: TrafficDistribution,

    /// Networks, in CIDR notation, that may connect to the published ports. Empty (the default): all.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = Rule::new("self.all(c, isCIDR(c))").message("holds something that is not a network in CIDR notation, as 192.0.2.0/24"))]
    pub source_ranges: Vec<CidrText>,

    /// What happens to established connections of an endpoint that goes away.
    #[serde(default)]
    pub drain: Drain,

    /// Active checks of the endpoints. Off unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,

    /// How the mesh's DNS answers for the service's name: TTL, order of the addresses, further names.
    #[serde(default)]
    pub dns: Dns,
}

/// One port, or a range of ports, of a service.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.endPort) || self.endPort >= self.port")
    .message("must not be below port").field_path(".endPort"))]
#[x_kube(validation = Rule::new("!has(self.endPort) || !has(self.targetPort)")
    .message("must be absent with endPort: a range is never translated").field_path(".targetPort"))]
#[x_kube(validation = Rule::new("!has(self.endPort) || !has(self.publish) || (has(self.publish.port) && self.publish.port == self.port)")
    .message("a range is published on its own numbers: publish.port must be given and equal port").field_path(".publish"))]
pub struct Port {
    /// Name of the port, an IANA service name of at most 15 characters, unique in the service. Required when
    /// there are several ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15), pattern(r"^([0-9]+-)*[0-9]*[a-z][a-z0-9]*(-[a-z0-9]+)*$"))]
    pub name: Option<String>,

    /// Transport protocol: TCP (the default), UDP or SCTP.
    #[serde(default = "defaults::protocol")]
    pub protocol: Protocol,

    /// Port that clients connect to, 1 to 65535; the first one of a range.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,

    /// Last port of a range, inclusive. Makes this port a range, at the cost of a single one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub end_port: Option<i32>,

    /// Port that the endpoints listen on: a number from 1 to 65535, or the name of a port in their
    /// EndpointSlices. Default: the slice port of this port's name and protocol, else the slice's only port of
    /// this protocol, else port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1, "maximum" = 65535, "maxLength" = 15,
        "pattern" = r"^([0-9]+-)*[0-9]*[a-z][a-z0-9]*(-[a-z0-9]+)*$"))]
    pub target_port: Option<IntOrString>,

    /// Makes the port answer on the nodes' own addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<Publish>,
}

/// A port on the nodes' own addresses.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Publish {
    /// Ingress (the default): every node answers and reaches an endpoint on any node. Host: only nodes with an
    /// endpoint answer, each with its own endpoints.
    #[serde(default = "defaults::publish_mode")]
    pub mode: PublishMode,

    /// Port on the nodes, 1 to 65535. Default: one is allocated from the publish range, 30000 to 32767 unless
    /// configured otherwise, and kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<i32>,

    /// Answer only on these addresses of the nodes. Empty (the default): on every address that the node
    /// publishes on.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = Rule::new("self.all(v, isIP(v))").message("holds something that is not an IP address"))]
    pub addresses: Vec<IpText>,

    /// Answer only on nodes with these labels. Empty (the default): on all nodes.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 16, "x-kubernetes-map-type" = "atomic"))]
    #[x_kube(validation = label_keys())]
    pub node_selector: BTreeMap<String, LabelValue>,
}

/// What happens to established connections of an endpoint that goes away.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// Seconds, 0 to 86400, that established TCP connections of a removed endpoint may go on. Default: 30.
    #[serde(default = "defaults::drain_seconds")]
    #[schemars(range(min = 0, max = 86400))]
    pub timeout_seconds: i32,
}

impl Default for Drain {
    fn default() -> Self {
        Self { timeout_seconds: defaults::drain_seconds() }
    }
}

/// Active checks of the endpoints.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.tcp)").message("names no probe: give tcp: {}"))]
#[x_kube(validation = Rule::new("self.timeoutSeconds <= self.intervalSeconds")
    .message("must not be above intervalSeconds").field_path(".timeoutSeconds"))]
pub struct HealthCheck {
    /// An endpoint is healthy when it accepts a TCP connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpProbe>,

    /// Seconds between two checks, 1 to 3600. Default: 5.
    #[serde(default = "defaults::interval_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub interval_seconds: i32,

    /// Seconds after which a check has failed, 1 to 3600, at most intervalSeconds. Default: 1.
    #[serde(default = "defaults::timeout_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: i32,

    /// Successful checks in a row, 1 to 100, that make an endpoint healthy. Default: 2.
    #[serde(default = "defaults::rise")]
    #[schemars(range(min = 1, max = 100))]
    pub rise: i32,

    /// Failed checks in a row, 1 to 100, that make an endpoint unhealthy. Default: 3.
    #[serde(default = "defaults::fall")]
    #[schemars(range(min = 1, max = 100))]
    pub fall: i32,
}

/// A TCP connection to the endpoint's port.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Default, Debug)]
pub struct TcpProbe {}

/// How the mesh's DNS answers for the service's name: TTL, order of the addresses, further names.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Dns {
    /// Seconds, 0 to 86400, that an answer may be cached. Default: 5.
    #[serde(default = "defaults::ttl_seconds")]
    #[schemars(range(min = 0, max = 86400))]
    pub ttl_seconds: i32,

    /// Shuffle (the default): all addresses, in random order. Single: one of them, in turn; for clients that
    /// sort answers.
    #[serde(default = "defaults::dns_answer")]
    pub answer: DnsAnswer,

    /// Further names of the service in its own namespace: single labels of at most 63 characters.
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub aliases: Vec<DnsLabel>,
}

impl Default for Dns {
    fn default() -> Self {
        Self { ttl_seconds: defaults::ttl_seconds(), answer: defaults::dns_answer(), aliases: Vec::new() }
    }
}

/// Default values: one place for the schema and for Rust.
mod defaults {
    use super::*;

    macro_rules! defaults {
        ($($name:ident: $t:ty = $value:expr;)*) => {$(pub(super) fn $name() -> $t { $value })*};
    }

    defaults! {
        mode: Mode = Mode::Vip;
        ip_families: Vec<IpFamily> = vec![IpFamily::V4];
        ip_family_policy: IpFamilyPolicy = IpFamilyPolicy::SingleStack;
        forwarding: Forwarding = Forwarding::Masquerade;
        session_affinity: SessionAffinity = SessionAffinity::None;
        traffic_policy: TrafficPolicy = TrafficPolicy::Cluster;
        protocol: Protocol = Protocol::Tcp;
        publish_mode: PublishMode = PublishMode::Ingress;
        drain_seconds: i32 = 30;
        interval_seconds: i32 = 5;
        timeout_seconds: i32 = 1;
        rise: i32 = 2;
        fall: i32 = 3;
        ttl_seconds: i32 = 5;
        dns_answer: DnsAnswer = DnsAnswer::Shuffle;
    }
}
