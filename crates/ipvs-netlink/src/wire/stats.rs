use netlink_packet_core::{
    DecodeError, DefaultNla, ErrorContext, Nla, NlaBuffer, Parseable, parse_u32, parse_u64,
};

use crate::constants::*;

/// A counter as wide as it stands on the wire.
///
/// `IPVS_*_ATTR_STATS` holds 32 bits for all but the byte counters, `IPVS_*_ATTR_STATS64` holds 64 bits for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// 32 bits; wraps.
    U32(u32),
    /// 64 bits.
    U64(u64),
}

impl Counter {
    /// The number, whatever its width.
    pub fn value(self) -> u64 {
        match self {
            Self::U32(n) => u64::from(n),
            Self::U64(n) => n,
        }
    }

    fn len(self) -> usize {
        match self {
            Self::U32(_) => 4,
            Self::U64(_) => 8,
        }
    }

    fn emit(self, buffer: &mut [u8]) {
        match self {
            Self::U32(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::U64(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
        }
    }

    fn parse(value: &[u8]) -> Result<Self, DecodeError> {
        if value.len() == 4 { parse_u32(value).map(Self::U32) } else { parse_u64(value).map(Self::U64) }
    }
}

/// An attribute of `IPVS_SVC_ATTR_STATS`, `…_STATS64`, `IPVS_DEST_ATTR_STATS` or `…_STATS64`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StatsAttribute {
    /// Connections scheduled.
    Connections(Counter),
    /// Packets from clients.
    InPackets(Counter),
    /// Packets to clients.
    OutPackets(Counter),
    /// Bytes from clients.
    InBytes(Counter),
    /// Bytes to clients.
    OutBytes(Counter),
    /// Connections a second.
    ConnectionRate(Counter),
    /// Packets a second from clients.
    InPacketRate(Counter),
    /// Packets a second to clients.
    OutPacketRate(Counter),
    /// Bytes a second from clients.
    InByteRate(Counter),
    /// Bytes a second to clients.
    OutByteRate(Counter),
    /// What this crate does not know, padding included.
    Other(DefaultNla),
}

impl StatsAttribute {
    fn counter(&self) -> Option<Counter> {
        match self {
            Self::Connections(n)
            | Self::InPackets(n)
            | Self::OutPackets(n)
            | Self::InBytes(n)
            | Self::OutBytes(n)
            | Self::ConnectionRate(n)
            | Self::InPacketRate(n)
            | Self::OutPacketRate(n)
            | Self::InByteRate(n)
            | Self::OutByteRate(n) => Some(*n),
            Self::Other(_) => None,
        }
    }
}

impl Nla for StatsAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Other(nla) => nla.value_len(),
            known => known.counter().map_or(0, Counter::len),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Connections(_) => IPVS_STATS_ATTR_CONNS,
            Self::InPackets(_) => IPVS_STATS_ATTR_INPKTS,
            Self::OutPackets(_) => IPVS_STATS_ATTR_OUTPKTS,
            Self::InBytes(_) => IPVS_STATS_ATTR_INBYTES,
            Self::OutBytes(_) => IPVS_STATS_ATTR_OUTBYTES,
            Self::ConnectionRate(_) => IPVS_STATS_ATTR_CPS,
            Self::InPacketRate(_) => IPVS_STATS_ATTR_INPPS,
            Self::OutPacketRate(_) => IPVS_STATS_ATTR_OUTPPS,
            Self::InByteRate(_) => IPVS_STATS_ATTR_INBPS,
            Self::OutByteRate(_) => IPVS_STATS_ATTR_OUTBPS,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Other(nla) => nla.emit_value(buffer),
            known => {
                if let Some(counter) = known.counter() {
                    counter.emit(buffer);
                }
            }
        }
    }
}

impl Parseable<NlaBuffer<&[u8]>> for StatsAttribute {
    fn parse(nla: &NlaBuffer<&[u8]>) -> Result<Self, DecodeError> {
        let counter = || {
            Counter::parse(nla.value())
                .with_context(|| format!("counter of IPVS statistics, attribute {}", nla.kind()))
        };
        Ok(match nla.kind() {
            IPVS_STATS_ATTR_CONNS => Self::Connections(counter()?),
            IPVS_STATS_ATTR_INPKTS => Self::InPackets(counter()?),
            IPVS_STATS_ATTR_OUTPKTS => Self::OutPackets(counter()?),
            IPVS_STATS_ATTR_INBYTES => Self::InBytes(counter()?),
            IPVS_STATS_ATTR_OUTBYTES => Self::OutBytes(counter()?),
            IPVS_STATS_ATTR_CPS => Self::ConnectionRate(counter()?),
            IPVS_STATS_ATTR_INPPS => Self::InPacketRate(counter()?),
            IPVS_STATS_ATTR_OUTPPS => Self::OutPacketRate(counter()?),
            IPVS_STATS_ATTR_INBPS => Self::InByteRate(counter()?),
            IPVS_STATS_ATTR_OUTBPS => Self::OutByteRate(counter()?),
            _ => Self::Other(DefaultNla::parse(nla)?),
        })
    }
}
