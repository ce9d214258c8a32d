//! Destinations: where a service's connections go.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DecodeError, DefaultNla};

use crate::address::{self, AddressFamily};
use crate::constants::*;
use crate::stats::Stats;
use crate::wire::DestinationAttribute;

/// Which destination of a service: `ipvsadm`'s real server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DestinationId {
    /// Its address.
    pub addr: IpAddr,
    /// Its port; packets keep theirs where it is 0 (under a mark or a service for all ports).
    pub port: u16,
}

impl DestinationId {
    /// A destination by its address and port.
    pub const fn new(addr: IpAddr, port: u16) -> Self {
        Self { addr, port }
    }

    /// The attributes that the kernel needs to find the destination, no more.
    pub fn to_attributes(&self) -> Vec<DestinationAttribute> {
        vec![
            // The family is spelled out: without it the kernel takes the service's.
            DestinationAttribute::Family(AddressFamily::of(self.addr).number()),
            DestinationAttribute::Address(address::to_bytes(self.addr)),
            DestinationAttribute::Port(self.port),
        ]
    }
}

impl From<SocketAddr> for DestinationId {
    fn from(addr: SocketAddr) -> Self {
        Self { addr: addr.ip(), port: addr.port() }
    }
}

impl fmt::Display for DestinationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.addr, self.port).fmt(f)
    }
}

/// How packets are put into a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TunnelKind {
    /// IP in IP.
    Ipip,
    /// Generic UDP encapsulation; needs a port.
    Gue,
    /// Generic routing encapsulation.
    Gre,
    /// Another, by its number. Make it with [`From<u8>`] so that one kind has one form.
    Other(u8),
}

impl From<u8> for TunnelKind {
    fn from(number: u8) -> Self {
        match number {
            IP_VS_CONN_F_TUNNEL_TYPE_IPIP => Self::Ipip,
            IP_VS_CONN_F_TUNNEL_TYPE_GUE => Self::Gue,
            IP_VS_CONN_F_TUNNEL_TYPE_GRE => Self::Gre,
            other => Self::Other(other),
        }
    }
}

impl From<TunnelKind> for u8 {
    fn from(kind: TunnelKind) -> u8 {
        match kind {
            TunnelKind::Ipip => IP_VS_CONN_F_TUNNEL_TYPE_IPIP,
            TunnelKind::Gue => IP_VS_CONN_F_TUNNEL_TYPE_GUE,
            TunnelKind::Gre => IP_VS_CONN_F_TUNNEL_TYPE_GRE,
            TunnelKind::Other(number) => number,
        }
    }
}

/// A tunnel to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tunnel {
    /// Encapsulation.
    pub kind: TunnelKind,
    /// UDP port of a GUE tunnel; 0 for the others.
    pub port: u16,
    /// `IP_VS_TUNNEL_ENCAP_FLAG_*`; GUE and GRE only.
    pub flags: u16,
}

impl Tunnel {
    /// IP in IP, the kernel's default.
    pub const IPIP: Self = Self { kind: TunnelKind::Ipip, port: 0, flags: 0 };
}

/// How packets reach a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Forwarding {
    /// Destination address and port are rewritten (NAT).
    Masquerade,
    /// This machine itself.
    Local,
    /// Wrapped into a packet to the destination, which may be of the other family.
    Tunnel(Tunnel),
    /// Sent on unchanged to the destination's link-layer address.
    DirectRoute,
    /// Past the cache to where the packet was going.
    Bypass,
    /// Another, by its number (the kernel masks it with [`IP_VS_CONN_F_FWD_MASK`]).
    Other(u32),
}

impl Forwarding {
    fn method(self) -> u32 {
        match self {
            Self::Masquerade => IP_VS_CONN_F_MASQ,
            Self::Local => IP_VS_CONN_F_LOCALNODE,
            Self::Tunnel(_) => IP_VS_CONN_F_TUNNEL,
            Self::DirectRoute => IP_VS_CONN_F_DROUTE,
            Self::Bypass => IP_VS_CONN_F_BYPASS,
            Self::Other(number) => number,
        }
    }

    fn new(method: u32, tunnel: Tunnel) -> Self {
        match method & IP_VS_CONN_F_FWD_MASK {
            IP_VS_CONN_F_MASQ => Self::Masquerade,
            IP_VS_CONN_F_LOCALNODE => Self::Local,
            IP_VS_CONN_F_TUNNEL => Self::Tunnel(tunnel),
            IP_VS_CONN_F_DROUTE => Self::DirectRoute,
            IP_VS_CONN_F_BYPASS => Self::Bypass,
            other => Self::Other(other),
        }
    }
}

/// What can be set of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DestinationConfig {
    /// Share of the connections, not negative; 0 keeps those it has and takes no new ones.
    pub weight: i32,
    /// How packets reach it.
    pub forwarding: Forwarding,
    /// With so many connections no new ones are given; 0 means no limit.
    pub upper_threshold: u32,
    /// Below so many connections new ones are given again; not above the upper one.
    pub lower_threshold: u32,
}

impl DestinationConfig {
    /// Reached in the given way, without thresholds.
    pub const fn new(forwarding: Forwarding, weight: i32) -> Self {
        Self { weight, forwarding, upper_threshold: 0, lower_threshold: 0 }
    }

    /// Reached by NAT, without thresholds.
    pub const fn masquerade(weight: i32) -> Self {
        Self::new(Forwarding::Masquerade, weight)
    }

    /// The attributes beside those of the [`DestinationId`].
    pub fn to_attributes(&self) -> Vec<DestinationAttribute> {
        let mut attributes = vec![
            DestinationAttribute::ForwardingMethod(self.forwarding.method()),
            DestinationAttribute::Weight(self.weight),
        ];
        if let Forwarding::Tunnel(tunnel) = self.forwarding {
            attributes.extend([
                DestinationAttribute::TunnelType(tunnel.kind.into()),
                DestinationAttribute::TunnelPort(tunnel.port),
                DestinationAttribute::TunnelFlags(tunnel.flags),
            ]);
        }
        attributes.extend([
            DestinationAttribute::UpperThreshold(self.upper_threshold),
            DestinationAttribute::LowerThreshold(self.lower_threshold),
        ]);
        attributes
    }
}

/// A destination as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Which.
    pub id: DestinationId,
    /// What was set; fit to be compared with what was asked for.
    pub config: DestinationConfig,
    /// Connections that carry data.
    pub active: u32,
    /// Connections about to end, and those of UDP.
    pub inactive: u32,
    /// Clients tied to this destination.
    pub persistent: u32,
    /// Counters.
    pub stats: Stats,
    /// Attributes that this crate does not know.
    pub other: Vec<DefaultNla>,
}

impl Destination {
    /// Reads the content of an `IPVS_CMD_ATTR_DEST`. Kernels before 3.18 do not say the family, it is the
    /// service's then.
    pub fn from_attributes(
        attributes: &[DestinationAttribute],
        service: AddressFamily,
    ) -> Result<Self, DecodeError> {
        let (mut family, mut addr, mut port) = (service, None, None);
        let (mut stats, mut stats64) = (None, None);
        let (mut method, mut tunnel) = (IP_VS_CONN_F_MASQ, Tunnel::IPIP);
        let mut config = DestinationConfig::masquerade(0);
        let (mut active, mut inactive, mut persistent) = (0, 0, 0);
        let mut other = Vec::new();
        for attribute in attributes {
            match attribute {
                DestinationAttribute::Address(bytes) => addr = Some(*bytes),
                DestinationAttribute::Port(n) => port = Some(*n),
                DestinationAttribute::ForwardingMethod(n) => method = *n,
                DestinationAttribute::Weight(n) => config.weight = *n,
                DestinationAttribute::UpperThreshold(n) => config.upper_threshold = *n,
                DestinationAttribute::LowerThreshold(n) => config.lower_threshold = *n,
                DestinationAttribute::ActiveConnections(n) => active = *n,
                DestinationAttribute::InactiveConnections(n) => inactive = *n,
                DestinationAttribute::PersistentConnections(n) => persistent = *n,
                DestinationAttribute::Stats(list) => stats = Some(list.as_slice()),
                DestinationAttribute::Family(n) => family = AddressFamily::from_number(*n)?,
                DestinationAttribute::Stats64(list) => stats64 = Some(list.as_slice()),
                DestinationAttribute::TunnelType(n) => tunnel.kind = (*n).into(),
                DestinationAttribute::TunnelPort(n) => tunnel.port = *n,
                DestinationAttribute::TunnelFlags(n) => tunnel.flags = *n,
                DestinationAttribute::Other(nla) => other.push(nla.clone()),
            }
        }
        let addr = addr.ok_or("a destination without IPVS_DEST_ATTR_ADDR")?;
        let port = port.ok_or("a destination without IPVS_DEST_ATTR_PORT")?;
        config.forwarding = Forwarding::new(method, tunnel);
        Ok(Self {
            id: DestinationId { addr: address::from_bytes(family, addr), port },
            config,
            active,
            inactive,
            persistent,
            stats: Stats::from_attributes(stats, stats64),
            other,
        })
    }
}
