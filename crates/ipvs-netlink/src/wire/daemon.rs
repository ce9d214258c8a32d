use netlink_packet_core::{
    DecodeError, DefaultNla, ErrorContext, Nla, NlaBuffer, Parseable, parse_string, parse_u8, parse_u16,
    parse_u32,
};

use super::{emit_string, parse_bytes, string_len};
use crate::constants::*;

/// An attribute inside `IPVS_CMD_ATTR_DAEMON`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DaemonAttribute {
    /// `IP_VS_STATE_MASTER` or `IP_VS_STATE_BACKUP`.
    State(u32),
    /// Interface for multicast.
    Interface(String),
    /// Number that sender and receiver share.
    SyncId(u32),
    /// Longest UDP payload in bytes.
    MaxLength(u16),
    /// IPv4 multicast group.
    Group([u8; 4]),
    /// IPv6 multicast group.
    Group6([u8; 16]),
    /// UDP port (native-endian here, unlike every other port).
    Port(u16),
    /// Time to live of what is sent.
    Ttl(u8),
    /// What this crate does not know.
    Other(DefaultNla),
}

impl Nla for DaemonAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Ttl(_) => 1,
            Self::MaxLength(_) | Self::Port(_) => 2,
            Self::State(_) | Self::SyncId(_) | Self::Group(_) => 4,
            Self::Group6(_) => 16,
            Self::Interface(name) => string_len(name),
            Self::Other(nla) => nla.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::State(_) => IPVS_DAEMON_ATTR_STATE,
            Self::Interface(_) => IPVS_DAEMON_ATTR_MCAST_IFN,
            Self::SyncId(_) => IPVS_DAEMON_ATTR_SYNC_ID,
            Self::MaxLength(_) => IPVS_DAEMON_ATTR_SYNC_MAXLEN,
            Self::Group(_) => IPVS_DAEMON_ATTR_MCAST_GROUP,
            Self::Group6(_) => IPVS_DAEMON_ATTR_MCAST_GROUP6,
            Self::Port(_) => IPVS_DAEMON_ATTR_MCAST_PORT,
            Self::Ttl(_) => IPVS_DAEMON_ATTR_MCAST_TTL,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Ttl(n) => buffer.copy_from_slice(&[*n]),
            Self::MaxLength(n) | Self::Port(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::State(n) | Self::SyncId(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::Group(bytes) => buffer.copy_from_slice(bytes),
            Self::Group6(bytes) => buffer.copy_from_slice(bytes),
            Self::Interface(name) => emit_string(buffer, name),
            Self::Other(nla) => nla.emit_value(buffer),
        }
    }
}

impl Parseable<NlaBuffer<&[u8]>> for DaemonAttribute {
    fn parse(nla: &NlaBuffer<&[u8]>) -> Result<Self, DecodeError> {
        let value = nla.value();
        Ok(match nla.kind() {
            IPVS_DAEMON_ATTR_STATE => Self::State(parse_u32(value).context("IPVS_DAEMON_ATTR_STATE")?),
            IPVS_DAEMON_ATTR_MCAST_IFN => {
                Self::Interface(parse_string(value).context("IPVS_DAEMON_ATTR_MCAST_IFN")?)
            }
            IPVS_DAEMON_ATTR_SYNC_ID => Self::SyncId(parse_u32(value).context("IPVS_DAEMON_ATTR_SYNC_ID")?),
            IPVS_DAEMON_ATTR_SYNC_MAXLEN => {
                Self::MaxLength(parse_u16(value).context("IPVS_DAEMON_ATTR_SYNC_MAXLEN")?)
            }
            IPVS_DAEMON_ATTR_MCAST_GROUP => {
                Self::Group(parse_bytes(value).context("IPVS_DAEMON_ATTR_MCAST_GROUP")?)
            }
            IPVS_DAEMON_ATTR_MCAST_GROUP6 => {
                Self::Group6(parse_bytes(value).context("IPVS_DAEMON_ATTR_MCAST_GROUP6")?)
            }
            IPVS_DAEMON_ATTR_MCAST_PORT => {
                Self::Port(parse_u16(value).context("IPVS_DAEMON_ATTR_MCAST_PORT")?)
            }
            IPVS_DAEMON_ATTR_MCAST_TTL => Self::Ttl(parse_u8(value).context("IPVS_DAEMON_ATTR_MCAST_TTL")?),
            _ => Self::Other(DefaultNla::parse(nla)?),
        })
    }
}
