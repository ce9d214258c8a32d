use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, NLA_F_NESTED, Nla, NlaBuffer, Parseable, parse_string,
    parse_u16, parse_u16_be, parse_u32,
};

use super::{StatsAttribute, emit_string, parse_bytes, parse_nested, string_len};
use crate::constants::*;

/// An attribute inside `IPVS_CMD_ATTR_SERVICE`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServiceAttribute {
    /// `AF_INET` or `AF_INET6`.
    Family(u16),
    /// `IPPROTO_*`; absent where there is a mark.
    Protocol(u16),
    /// 16 bytes, a v4 address in the first four; absent where there is a mark.
    Address([u8; 16]),
    /// Port; absent where there is a mark.
    Port(u16),
    /// Firewall mark; absent where there is an address.
    Fwmark(u32),
    /// Name of the scheduler.
    Scheduler(String),
    /// `IP_VS_SVC_F_*`, and which of them the sender means. The kernel sends a mask of all ones.
    Flags {
        /// The flags.
        flags: u32,
        /// Bits outside it keep their value.
        mask: u32,
    },
    /// How long a client stays with its destination, in seconds.
    Timeout(u32),
    /// v4: a mask in network order; v6: the four bytes of a native-endian prefix length.
    Netmask([u8; 4]),
    /// Counters of 32 bits.
    Stats(Vec<StatsAttribute>),
    /// Name of the persistence engine.
    PersistenceEngine(String),
    /// Counters of 64 bits.
    Stats64(Vec<StatsAttribute>),
    /// What this crate does not know.
    Other(DefaultNla),
}

impl Nla for ServiceAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Family(_) | Self::Protocol(_) | Self::Port(_) => 2,
            Self::Fwmark(_) | Self::Timeout(_) | Self::Netmask(_) => 4,
            Self::Flags { .. } => 8,
            Self::Address(_) => 16,
            Self::Scheduler(name) | Self::PersistenceEngine(name) => string_len(name),
            Self::Stats(stats) | Self::Stats64(stats) => stats.as_slice().buffer_len(),
            Self::Other(nla) => nla.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Family(_) => IPVS_SVC_ATTR_AF,
            Self::Protocol(_) => IPVS_SVC_ATTR_PROTOCOL,
            Self::Address(_) => IPVS_SVC_ATTR_ADDR,
            Self::Port(_) => IPVS_SVC_ATTR_PORT,
            Self::Fwmark(_) => IPVS_SVC_ATTR_FWMARK,
            Self::Scheduler(_) => IPVS_SVC_ATTR_SCHED_NAME,
            Self::Flags { .. } => IPVS_SVC_ATTR_FLAGS,
            Self::Timeout(_) => IPVS_SVC_ATTR_TIMEOUT,
            Self::Netmask(_) => IPVS_SVC_ATTR_NETMASK,
            Self::Stats(_) => IPVS_SVC_ATTR_STATS | NLA_F_NESTED,
            Self::PersistenceEngine(_) => IPVS_SVC_ATTR_PE_NAME,
            Self::Stats64(_) => IPVS_SVC_ATTR_STATS64 | NLA_F_NESTED,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Family(n) | Self::Protocol(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::Port(n) => buffer.copy_from_slice(&n.to_be_bytes()),
            Self::Fwmark(n) | Self::Timeout(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::Netmask(bytes) => buffer.copy_from_slice(bytes),
            Self::Address(bytes) => buffer.copy_from_slice(bytes),
            Self::Flags { flags, mask } => {
                let (first, second) = buffer.split_at_mut(4);
                first.copy_from_slice(&flags.to_ne_bytes());
                second.copy_from_slice(&mask.to_ne_bytes());
            }
            Self::Scheduler(name) | Self::PersistenceEngine(name) => emit_string(buffer, name),
            Self::Stats(stats) | Self::Stats64(stats) => stats.as_slice().emit(buffer),
            Self::Other(nla) => nla.emit_value(buffer),
        }
    }
}

impl Parseable<NlaBuffer<&[u8]>> for ServiceAttribute {
    fn parse(nla: &NlaBuffer<&[u8]>) -> Result<Self, DecodeError> {
        let value = nla.value();
        Ok(match nla.kind() {
            IPVS_SVC_ATTR_AF => Self::Family(parse_u16(value).context("IPVS_SVC_ATTR_AF")?),
            IPVS_SVC_ATTR_PROTOCOL => Self::Protocol(parse_u16(value).context("IPVS_SVC_ATTR_PROTOCOL")?),
            IPVS_SVC_ATTR_ADDR => Self::Address(parse_bytes(value).context("IPVS_SVC_ATTR_ADDR")?),
            IPVS_SVC_ATTR_PORT => Self::Port(parse_u16_be(value).context("IPVS_SVC_ATTR_PORT")?),
            IPVS_SVC_ATTR_FWMARK => Self::Fwmark(parse_u32(value).context("IPVS_SVC_ATTR_FWMARK")?),
            IPVS_SVC_ATTR_SCHED_NAME => {
                Self::Scheduler(parse_string(value).context("IPVS_SVC_ATTR_SCHED_NAME")?)
            }
            IPVS_SVC_ATTR_FLAGS => {
                let bits: [u8; 8] = parse_bytes(value).context("IPVS_SVC_ATTR_FLAGS")?;
                Self::Flags { flags: parse_u32(&bits[..4])?, mask: parse_u32(&bits[4..])? }
            }
            IPVS_SVC_ATTR_TIMEOUT => Self::Timeout(parse_u32(value).context("IPVS_SVC_ATTR_TIMEOUT")?),
            IPVS_SVC_ATTR_NETMASK => Self::Netmask(parse_bytes(value).context("IPVS_SVC_ATTR_NETMASK")?),
            IPVS_SVC_ATTR_STATS => Self::Stats(parse_nested(value, "IPVS_SVC_ATTR_STATS")?),
            IPVS_SVC_ATTR_PE_NAME => {
                Self::PersistenceEngine(parse_string(value).context("IPVS_SVC_ATTR_PE_NAME")?)
            }
            IPVS_SVC_ATTR_STATS64 => Self::Stats64(parse_nested(value, "IPVS_SVC_ATTR_STATS64")?),
            _ => Self::Other(DefaultNla::parse(nla)?),
        })
    }
}
