//! The node that state is compiled for.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::Arc,
};

use ipnet::IpNet;

use super::ids::{Family, Mark, PerFamily, Protocol};

/// What the operator configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeConfig {
    /// This node's name: endpoints with this `nodeName` are local.
    pub name: Arc<str>,
    /// VIP range of each family.
    pub ranges: PerFamily<IpNet>,
    /// Published ports without an explicit number come from here.
    pub publish_range: RangeInclusive<u16>,
    /// Ports that can't be published.
    pub reserved: Vec<ReservedPorts>,
    /// Bits of the packet mark that are ours.
    pub mask: MarkMask,
    /// Its zone (`topology.kubernetes.io/zone`), where it is known: endpoints there are near.
    pub zone: Option<Arc<str>>,
}

impl NodeConfig {
    /// The ingress address of a family: first address of its range (network + 1).
    pub fn ingress(&self, family: Family) -> Option<IpAddr> {
        self.ranges.get(family).and_then(|r| nth_address(r, 1))
    }

    /// The DNS address of a family: second address of its range (network + 2).
    pub fn dns(&self, family: Family) -> Option<IpAddr> {
        self.ranges.get(family).and_then(|r| nth_address(r, 2))
    }

    /// What an address of a range is for, where it is never a virtual IP.
    pub fn reserved_address(&self, address: &IpAddr) -> Option<&'static str> {
        let family = Family::of(address);
        let range = self.ranges.get(family)?;
        if self.ingress(family) == Some(*address) {
            Some("the ingress address")
        } else if self.dns(family) == Some(*address) {
            Some("the DNS address")
        } else if *address == range.network() {
            Some("the network address")
        } else if family == Family::V4 && *address == range.broadcast() {
            Some("the broadcast address")
        } else {
            None
        }
    }
}

/// What a source knows of this node.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct NodeSays {
    /// Its own addresses, at most one per family.
    pub addresses: PerFamily<IpAddr>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// Ranges that its pods have their addresses from (`spec.podCIDRs` of the Node), as far as they are known.
    pub pods: Vec<IpNet>,
}

/// `network + n`, where the range has such an address.
pub fn nth_address(range: &IpNet, n: u128) -> Option<IpAddr> {
    let addr = match range {
        IpNet::V4(r) => {
            let n = u32::try_from(n).ok()?;
            IpAddr::V4(Ipv4Addr::from(u32::from(r.network()).checked_add(n)?))
        }
        IpNet::V6(r) => IpAddr::V6(Ipv6Addr::from(u128::from(r.network()).checked_add(n)?)),
    };
    range.contains(&addr).then_some(addr)
}

/// What the node's kernel says about itself.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct NodeFacts {
    /// Address of the node, per family: source of the VIP route and of traffic from 127.0.0.1.
    pub primary: PerFamily<IpAddr>,
    /// Addresses that published ports answer on.
    pub published_addresses: BTreeSet<IpAddr>,
    /// Every address of the node, of any kind.
    pub all_addresses: BTreeSet<IpAddr>,
    /// Links towards other machines: clients that come in by one are not behind this node.
    pub uplinks: BTreeSet<String>,
    /// Of those the ones that the node's own address is on and no pod can be: not a bridge. Nothing here is asked for by one.
    pub outside: BTreeSet<String>,
}

impl NodeFacts {
    /// Whether published ports answer at an address here.
    pub fn publishes_at(&self, addr: &IpAddr) -> bool {
        addr.is_loopback() || self.published_addresses.contains(addr)
    }

    /// Whether a port that is published at these addresses, or at all if there are none, is at one here.
    pub fn publishes_at_one_of(&self, addresses: &[IpAddr]) -> bool {
        addresses.is_empty() || addresses.iter().any(|addr| self.publishes_at(addr))
    }
}

/// Ports that can't be published: one number or a range, for one protocol or for all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReservedPorts {
    /// The ports, inclusive.
    pub ports: RangeInclusive<u16>,
    /// `None` means every protocol.
    pub protocol: Option<Protocol>,
}

impl ReservedPorts {
    /// Whether it takes this port.
    pub fn covers(&self, protocol: Protocol, port: u16) -> bool {
        self.ports.contains(&port) && self.protocol.is_none_or(|p| p == protocol)
    }
}

impl std::str::FromStr for ReservedPorts {
    type Err = String;
    /// `22`, `2379-2380`, `4789/udp`.
    fn from_str(s: &str) -> Result<Self, String> {
        let (ports, protocol) = match s.split_once('/') {
            Some((p, proto)) => (p, Some(proto.parse::<Protocol>().map_err(|e| e.to_string())?)),
            None => (s, None),
        };
        Ok(Self { ports: parse_port_range(ports)?, protocol })
    }
}

/// `80` or `30000-32767`.
pub fn parse_port_range(s: &str) -> Result<RangeInclusive<u16>, String> {
    let bad = || format!("{s:?} is not a port (1-65535) or a range of ports FIRST-LAST");
    let port = |t: &str| t.trim().parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(bad);
    let (first, last) = match s.split_once('-') {
        Some((a, b)) => (port(a)?, port(b)?),
        None => (port(s)?, port(s)?),
    };
    if first > last { Err(bad()) } else { Ok(first..=last) }
}

/// The bits of the packet mark that are ours: contiguous, at least 10 of them.
///
/// Values start at 256 steps, because small marks are what hand-written rules use, and end one step
/// below the mask itself, which is the sentinel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MarkMask(u32);

impl Default for MarkMask {
    /// Leaves out the bits of kube-proxy (0x4000, 0x8000) and Calico's high bits.
    fn default() -> Self {
        Self(0x3fff)
    }
}

impl MarkMask {
    /// Checks a mask.
    ///
    /// # Errors
    /// A text for people when the bits are not contiguous or fewer than ten.
    pub fn new(mask: u32) -> Result<Self, String> {
        let shifted = mask.checked_shr(mask.trailing_zeros()).unwrap_or(0);
        if mask.count_ones() < 10 || shifted.wrapping_add(1) & shifted != 0 {
            return Err(format!("mark mask {mask:#x} must be at least 10 neighbouring bits, as 0x3fff is"));
        }
        Ok(Self(mask))
    }

    /// The bits themselves.
    pub fn bits(self) -> u32 {
        self.0
    }

    fn step(self) -> u32 {
        1 << self.0.trailing_zeros()
    }

    /// Number of marks that services can have.
    pub fn capacity(self) -> u32 {
        (self.0 / self.step()).saturating_sub(256)
    }

    /// The `n`-th mark, counted from 0.
    pub fn nth(self, n: u32) -> Option<Mark> {
        (n < self.capacity()).then(|| Mark((n + 256) * self.step()))
    }

    /// The smallest mark.
    pub fn first(self) -> Mark {
        Mark(256 * self.step())
    }

    /// The mark of the service without destinations that keeps IPVS's hooks registered.
    pub fn sentinel(self) -> Mark {
        Mark(self.0)
    }

    /// Whether a mark is one that we could have given out (the sentinel included).
    pub fn covers(self, mark: Mark) -> bool {
        mark.0 & !self.0 == 0 && mark >= self.first()
    }
}

impl fmt::Display for MarkMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
