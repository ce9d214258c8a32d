use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, NLA_F_NESTED, Nla, NlaBuffer, Parseable, parse_i32,
    parse_u8, parse_u16, parse_u16_be, parse_u32,
};

use super::{StatsAttribute, parse_bytes, parse_nested};
use crate::constants::*;

/// An attribute inside `IPVS_CMD_ATTR_DEST`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationAttribute {
    /// 16 bytes, a v4 address in the first four.
    Address([u8; 16]),
    /// Port.
    Port(u16),
    /// How to forward: `IP_VS_CONN_F_*` under `IP_VS_CONN_F_FWD_MASK`.
    ForwardingMethod(u32),
    /// Share of the connections; 0 takes no new ones.
    Weight(i32),
    /// Above this many connections no new ones are given; 0 means no limit.
    UpperThreshold(u32),
    /// Below this many connections new ones are given again.
    LowerThreshold(u32),
    /// Connections that carry data.
    ActiveConnections(u32),
    /// Connections about to end, and those of UDP.
    InactiveConnections(u32),
    /// Clients tied to this destination.
    PersistentConnections(u32),
    /// Counters of 32 bits.
    Stats(Vec<StatsAttribute>),
    /// `AF_INET` or `AF_INET6`; where it is absent, the service's family holds.
    Family(u16),
    /// Counters of 64 bits.
    Stats64(Vec<StatsAttribute>),
    /// `IP_VS_CONN_F_TUNNEL_TYPE_*`.
    TunnelType(u8),
    /// UDP port of a GUE tunnel.
    TunnelPort(u16),
    /// `IP_VS_TUNNEL_ENCAP_FLAG_*`.
    TunnelFlags(u16),
    /// What this crate does not know.
    Other(DefaultNla),
}

impl Nla for DestinationAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::TunnelType(_) => 1,
            Self::Port(_) | Self::Family(_) | Self::TunnelPort(_) | Self::TunnelFlags(_) => 2,
            Self::ForwardingMethod(_)
            | Self::Weight(_)
            | Self::UpperThreshold(_)
            | Self::LowerThreshold(_)
            | Self::ActiveConnections(_)
            | Self::InactiveConnections(_)
            | Self::PersistentConnections(_) => 4,
            Self::Address(_) => 16,
            Self::Stats(stats) | Self::Stats64(stats) => stats.as_slice().buffer_len(),
            Self::Other(nla) => nla.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Address(_) => IPVS_DEST_ATTR_ADDR,
            Self::Port(_) => IPVS_DEST_ATTR_PORT,
            Self::ForwardingMethod(_) => IPVS_DEST_ATTR_FWD_METHOD,
            Self::Weight(_) => IPVS_DEST_ATTR_WEIGHT,
            Self::UpperThreshold(_) => IPVS_DEST_ATTR_U_THRESH,
            Self::LowerThreshold(_) => IPVS_DEST_ATTR_L_THRESH,
            Self::ActiveConnections(_) => IPVS_DEST_ATTR_ACTIVE_CONNS,
            Self::InactiveConnections(_) => IPVS_DEST_ATTR_INACT_CONNS,
            Self::PersistentConnections(_) => IPVS_DEST_ATTR_PERSIST_CONNS,
            Self::Stats(_) => IPVS_DEST_ATTR_STATS | NLA_F_NESTED,
            Self::Family(_) => IPVS_DEST_ATTR_ADDR_FAMILY,
            Self::Stats64(_) => IPVS_DEST_ATTR_STATS64 | NLA_F_NESTED,
            Self::TunnelType(_) => IPVS_DEST_ATTR_TUN_TYPE,
            Self::TunnelPort(_) => IPVS_DEST_ATTR_TUN_PORT,
            Self::TunnelFlags(_) => IPVS_DEST_ATTR_TUN_FLAGS,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::TunnelType(n) => buffer.copy_from_slice(&[*n]),
            Self::Port(n) | Self::TunnelPort(n) => buffer.copy_from_slice(&n.to_be_bytes()),
            Self::Family(n) | Self::TunnelFlags(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::Weight(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::ForwardingMethod(n)
            | Self::UpperThreshold(n)
            | Self::LowerThreshold(n)
            | Self::ActiveConnections(n)
            | Self::InactiveConnections(n)
            | Self::PersistentConnections(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::Address(bytes) => buffer.copy_from_slice(bytes),
            Self::Stats(stats) | Self::Stats64(stats) => stats.as_slice().emit(buffer),
            Self::Other(nla) => nla.emit_value(buffer),
        }
    }
}

impl Parseable<NlaBuffer<&[u8]>> for DestinationAttribute {
    fn parse(nla: &NlaBuffer<&[u8]>) -> Result<Self, DecodeError> {
        let value = nla.value();
        let number = |name: &'static str| parse_u32(value).context(name);
        Ok(match nla.kind() {
            IPVS_DEST_ATTR_ADDR => Self::Address(parse_bytes(value).context("IPVS_DEST_ATTR_ADDR")?),
            IPVS_DEST_ATTR_PORT => Self::Port(parse_u16_be(value).context("IPVS_DEST_ATTR_PORT")?),
            IPVS_DEST_ATTR_FWD_METHOD => Self::ForwardingMethod(number("IPVS_DEST_ATTR_FWD_METHOD")?),
            IPVS_DEST_ATTR_WEIGHT => Self::Weight(parse_i32(value).context("IPVS_DEST_ATTR_WEIGHT")?),
            IPVS_DEST_ATTR_U_THRESH => Self::UpperThreshold(number("IPVS_DEST_ATTR_U_THRESH")?),
            IPVS_DEST_ATTR_L_THRESH => Self::LowerThreshold(number("IPVS_DEST_ATTR_L_THRESH")?),
            IPVS_DEST_ATTR_ACTIVE_CONNS => Self::ActiveConnections(number("IPVS_DEST_ATTR_ACTIVE_CONNS")?),
            IPVS_DEST_ATTR_INACT_CONNS => Self::InactiveConnections(number("IPVS_DEST_ATTR_INACT_CONNS")?),
            IPVS_DEST_ATTR_PERSIST_CONNS => {
                Self::PersistentConnections(number("IPVS_DEST_ATTR_PERSIST_CONNS")?)
            }
            IPVS_DEST_ATTR_STATS => Self::Stats(parse_nested(value, "IPVS_DEST_ATTR_STATS")?),
            IPVS_DEST_ATTR_ADDR_FAMILY => {
                Self::Family(parse_u16(value).context("IPVS_DEST_ATTR_ADDR_FAMILY")?)
            }
            IPVS_DEST_ATTR_STATS64 => Self::Stats64(parse_nested(value, "IPVS_DEST_ATTR_STATS64")?),
            IPVS_DEST_ATTR_TUN_TYPE => Self::TunnelType(parse_u8(value).context("IPVS_DEST_ATTR_TUN_TYPE")?),
            IPVS_DEST_ATTR_TUN_PORT => {
                Self::TunnelPort(parse_u16_be(value).context("IPVS_DEST_ATTR_TUN_PORT")?)
            }
            IPVS_DEST_ATTR_TUN_FLAGS => {
                Self::TunnelFlags(parse_u16(value).context("IPVS_DEST_ATTR_TUN_FLAGS")?)
            }
            _ => Self::Other(DefaultNla::parse(nla)?),
        })
    }
}
