//! The state a kernel should have, in the kernel's own terms but without any wire format.
//!
//! It is flat on purpose: a virtual server is found by (family, mark), a real server by its address,
//! a set element by itself. `plan` compares two such states key by key.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    ids::{Family, Mark, PerFamily, Protocol},
    node::nth_address,
    small::SmallMap,
};

/// How the kernel finds one of our IPVS services.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VirtualServerKey {
    /// Address family of its packets.
    pub family: Family,
    /// The mark its packets carry.
    pub mark: Mark,
}

impl fmt::Display for VirtualServerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FWM {} {}", self.mark.0, self.family)
    }
}

/// An IPVS service without its destinations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtualServerConfig {
    /// Scheduler name.
    pub scheduler: Arc<str>,
    /// `IP_VS_SVC_F_*` bits that we set (never `HASHED`).
    pub flags: u32,
}

/// A destination's address and port. Port 0 keeps the port that the client asked for (port ranges).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RealServerKey {
    /// Address of the endpoint.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
}

impl fmt::Display for RealServerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.addr, self.port).fmt(f)
    }
}

/// Connections by published ports to one real server. Once established, conntrack translates them by itself:
/// IPVS neither sees them nor can it end them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PublishedFlows {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Who answers them.
    pub real: RealServerKey,
    /// The addresses and published ports that clients connected to.
    pub to: BTreeSet<(IpAddr, u16)>,
}

/// UDP flows: by the real server that they were led to, the addresses and ports that clients sent to. To the same server others
/// may lead, too.
pub type UdpFlows = BTreeMap<RealServerKey, BTreeSet<(IpAddr, u16)>>;

/// What we set on a destination. Forwarding is masquerading.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RealServerConfig {
    /// 0 takes no new connections.
    pub weight: u32,
}

/// Destinations of an IPVS service.
pub type Reals = SmallMap<RealServerKey, RealServerConfig>;

/// An IPVS service with its destinations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtualServer {
    /// The service itself.
    pub config: VirtualServerConfig,
    /// Protocol of its packets, where it is known: the kernel keeps none for a mark.
    pub protocol: Option<Protocol>,
    /// Its destinations. Copies of the state share them: they hardly ever differ.
    pub reals: Arc<Reals>,
}

/// Destination address, protocol and port of a packet: the key of our maps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Target {
    /// Destination address.
    pub addr: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}:{}", self.addr, self.protocol.lower(), self.port)
    }
}

/// One element of one of our sets and maps. The family follows from the address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Element {
    /// `vips`: (VIP or ingress address, protocol, port) → mark.
    Vip(Target),
    /// `published`: (node address, protocol, published port) → mark.
    Published(Target),
    /// `loopback`: (protocol, published port) → mark, for packets from and to 127.0.0.1 or ::1.
    Loopback(Family, Protocol, u16),
    /// `local`: address of an endpoint on this node.
    Local(IpAddr),
    /// `endpoints`: address of any endpoint (hairpin, replies through a FORWARD policy of DROP).
    Endpoint(IpAddr),
    /// `own`: (node address, protocol, port) of a host-network endpoint of ours on this node, which
    /// the guard lets through.
    Own(Target),
}

impl Element {
    /// The family of the set that holds it.
    pub fn family(&self) -> Family {
        match self {
            Self::Vip(t) | Self::Published(t) | Self::Own(t) => Family::of(&t.addr),
            Self::Loopback(family, ..) => *family,
            Self::Local(addr) | Self::Endpoint(addr) => Family::of(addr),
        }
    }

    /// Whether the element leads packets into IPVS (its value is a mark).
    pub fn is_mark(&self) -> bool {
        matches!(self, Self::Vip(_)) || self.is_published()
    }

    /// Whether it is of a published port.
    pub fn is_published(&self) -> bool {
        self.published_number().is_some()
    }

    /// The protocol and the number of the published port that it is of.
    pub fn published_number(&self) -> Option<(Protocol, u16)> {
        match self {
            Self::Published(to) => Some((to.protocol, to.port)),
            Self::Loopback(_, protocol, port) => Some((*protocol, *port)),
            _ => None,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vip(t) => write!(f, "vips {t}"),
            Self::Published(t) => write!(f, "published {t}"),
            Self::Loopback(family, protocol, port) => {
                write!(f, "loopback {family},{}:{port}", protocol.lower())
            }
            Self::Local(a) => write!(f, "local {a}"),
            Self::Endpoint(a) => write!(f, "endpoints {a}"),
            Self::Own(t) => write!(f, "own {t}"),
        }
    }
}

/// Elements with their marks; `None` for the sets that have no value.
pub type Elements = BTreeMap<Element, Option<Mark>>;

/// Parameters of the fixed netfilter program: everything in it that is not a set element.
/// Its size does not depend on the number of services.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Program {
    /// Bits of the packet mark that are ours.
    pub mask: u32,
    /// One for each family that has a VIP range.
    pub families: PerFamily<FamilyProgram>,
    /// Bridges with local endpoints over which replies would bypass netfilter because
    /// `bridge-nf-call-*` can't be set: traffic from these subnets back over the same bridge is masqueraded.
    pub masquerade_bridges: Vec<BridgeSubnet>,
    /// Links towards other machines, by name, sorted: who comes in by one to a VIP whose endpoint is elsewhere would get
    /// the endpoint's answers past this node, and is masqueraded.
    #[serde(default)]
    pub uplinks: Vec<String>,
    /// Links that no pod of this node is behind, by name, sorted: who comes in by one does not reach the node's DNS.
    #[serde(default)]
    pub outside: Vec<String>,
}

/// The part of a [`Program`] that differs between families.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct FamilyProgram {
    /// All VIPs are in here.
    pub range: IpNet,
    /// First address of the range: where packets for published ports are sent by DNAT.
    pub ingress: IpAddr,
    /// The node's own address: source of traffic from 127.0.0.1 and of the VIP route.
    pub node: IpAddr,
}

impl FamilyProgram {
    /// The DNS address: second of the range. A range that is too small for one is refused before this.
    pub fn dns(&self) -> IpAddr {
        nth_address(&self.range, 2).unwrap_or(self.ingress)
    }
}

/// A subnet behind a Linux bridge.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct BridgeSubnet {
    /// Name of the bridge.
    pub bridge: String,
    /// Subnet of its pods.
    pub subnet: IpNet,
}

/// The AnyIP route of one family: `local RANGE dev lo src NODE`, table local.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VipRoute {
    /// The VIP range.
    pub range: IpNet,
    /// Preferred source, so that the node's own connections don't leave from a VIP.
    pub source: IpAddr,
}

/// How long IPVS keeps idle connections, in seconds (`IPVS_CMD_SET_CONFIG`); per network namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Timeouts {
    /// Established TCP connections. The kernel's own default is 900.
    pub tcp: u32,
    /// TCP connections in FIN_WAIT. Default 120.
    pub tcp_fin: u32,
    /// UDP flows. Default 300.
    pub udp: u32,
}

impl fmt::Display for Timeouts {
    /// As `--ipvs-timeouts` takes them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.tcp, self.tcp_fin, self.udp)
    }
}

impl Default for Timeouts {
    /// The kernel's own (`net/netfilter/ipvs/ip_vs_proto_{tcp,udp}.c`).
    fn default() -> Self {
        Self { tcp: 900, tcp_fin: 120, udp: 300 }
    }
}

/// Whether a sysctl (path below /proc/sys) that should have the value `want` may stay at `have`: some are stricter with a
/// greater number and do for us as well (`arp_ignore`, Documentation/networking/ip-sysctl.rst).
pub fn sysctl_fits(path: &str, want: &str, have: &str) -> bool {
    have == want || (path == "net/ipv4/conf/all/arp_ignore" && want == "1" && have == "2")
}

/// Everything of ours in one kernel, or everything that should be.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct KernelState {
    /// IPVS services by (family, mark); the sentinel is one of them.
    pub virtual_servers: HashMap<VirtualServerKey, VirtualServer>,
    /// Elements of all sets and maps.
    pub elements: Elements,
    /// The fixed rules; `None` where they are absent or not as they should be.
    pub program: Option<Program>,
    /// The AnyIP routes.
    pub routes: PerFamily<VipRoute>,
    /// Required sysctls (path below /proc/sys → value), e.g. `net/ipv4/vs/conntrack` → `1`.
    pub sysctls: BTreeMap<String, String>,
    /// IPVS timeouts; `None` leaves the kernel's own in force.
    pub timeouts: Option<Timeouts>,
}
