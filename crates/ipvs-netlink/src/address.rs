//! Address families, protocols, and addresses as IPVS writes them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::DecodeError;

use crate::constants::*;

/// IPv4 or IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum AddressFamily {
    /// IPv4, `AF_INET`.
    Inet,
    /// IPv6, `AF_INET6`.
    Inet6,
}

impl AddressFamily {
    /// The family of an address.
    pub fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::Inet,
            IpAddr::V6(_) => Self::Inet6,
        }
    }

    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Inet => AF_INET,
            Self::Inet6 => AF_INET6,
        }
    }

    pub(crate) fn from_number(number: u16) -> Result<Self, DecodeError> {
        match number {
            AF_INET => Ok(Self::Inet),
            AF_INET6 => Ok(Self::Inet6),
            other => Err(format!("address family {other} is neither IPv4 nor IPv6").into()),
        }
    }
}

impl fmt::Display for AddressFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "IPv4",
            Self::Inet6 => "IPv6",
        })
    }
}

/// Transport protocol of a service found by address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Protocol {
    /// TCP, 6.
    Tcp,
    /// UDP, 17.
    Udp,
    /// SCTP, 132.
    Sctp,
    /// Any other by its number. Make it with [`From<u8>`] so that one protocol has one form.
    Other(u8),
}

impl From<u8> for Protocol {
    fn from(number: u8) -> Self {
        match number {
            IPPROTO_TCP => Self::Tcp,
            IPPROTO_UDP => Self::Udp,
            IPPROTO_SCTP => Self::Sctp,
            other => Self::Other(other),
        }
    }
}

impl From<Protocol> for u8 {
    fn from(protocol: Protocol) -> u8 {
        match protocol {
            Protocol::Tcp => IPPROTO_TCP,
            Protocol::Udp => IPPROTO_UDP,
            Protocol::Sctp => IPPROTO_SCTP,
            Protocol::Other(number) => number,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("TCP"),
            Self::Udp => f.write_str("UDP"),
            Self::Sctp => f.write_str("SCTP"),
            Self::Other(number) => write!(f, "protocol {number}"),
        }
    }
}

/// The kernel's `union nf_inet_addr`: 16 bytes, IPv4 in the first four, the rest zero.
pub(crate) fn to_bytes(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V6(v6) => v6.octets(),
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
    }
}

pub(crate) fn from_bytes(family: AddressFamily, bytes: [u8; 16]) -> IpAddr {
    match family {
        AddressFamily::Inet6 => Ipv6Addr::from(bytes).into(),
        AddressFamily::Inet => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
    }
}
