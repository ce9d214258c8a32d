//! What belongs to IPVS as a whole: version, timeouts, synchronisation daemons.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{DecodeError, DefaultNla};

use crate::constants::*;
use crate::wire::{DaemonAttribute, IpvsAttribute};

/// How long connections are kept, in seconds, for the network namespace.
///
/// In a [`SetTimeouts`](crate::Command::SetTimeouts), 0 leaves a value as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Timeouts {
    /// An idle TCP connection; 900 unless set.
    pub tcp: u32,
    /// A TCP connection after a FIN; 120 unless set.
    pub tcp_fin: u32,
    /// A UDP flow; 300 unless set.
    pub udp: u32,
}

impl Timeouts {
    /// The attributes of an `IPVS_CMD_SET_CONFIG`.
    pub fn to_attributes(&self) -> Vec<IpvsAttribute> {
        vec![
            IpvsAttribute::TimeoutTcp(self.tcp),
            IpvsAttribute::TimeoutTcpFin(self.tcp_fin),
            IpvsAttribute::TimeoutUdp(self.udp),
        ]
    }

    /// Reads the answer to an `IPVS_CMD_GET_CONFIG`. A protocol that the kernel was built without stays 0.
    pub fn from_attributes(attributes: &[IpvsAttribute]) -> Self {
        let mut out = Self::default();
        for attribute in attributes {
            match attribute {
                IpvsAttribute::TimeoutTcp(n) => out.tcp = *n,
                IpvsAttribute::TimeoutTcpFin(n) => out.tcp_fin = *n,
                IpvsAttribute::TimeoutUdp(n) => out.udp = *n,
                _ => {}
            }
        }
        out
    }
}

/// Version of IPVS: 1.2.1 since 2007.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u8,
    /// Second number.
    pub minor: u8,
    /// Third number.
    pub patch: u8,
}

impl From<u32> for Version {
    /// `NVERSION` of the kernel's header: a byte each, from bit 16 down.
    fn from(code: u32) -> Self {
        let [_, major, minor, patch] = code.to_be_bytes();
        Self { major, minor, patch }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What IPVS says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Info {
    /// Its version.
    pub version: Version,
    /// Buckets of the connection table (module parameter `conn_tab_bits`).
    pub connection_table_size: u32,
}

impl Info {
    /// Reads the answer to an `IPVS_CMD_GET_INFO`.
    pub fn from_attributes(attributes: &[IpvsAttribute]) -> Result<Self, DecodeError> {
        let (mut version, mut size) = (None, None);
        for attribute in attributes {
            match attribute {
                IpvsAttribute::Version(n) => version = Some(Version::from(*n)),
                IpvsAttribute::ConnectionTableSize(n) => size = Some(*n),
                _ => {}
            }
        }
        Ok(Self {
            version: version.ok_or("an answer without IPVS_INFO_ATTR_VERSION")?,
            connection_table_size: size.ok_or("an answer without IPVS_INFO_ATTR_CONN_TAB_SIZE")?,
        })
    }
}

/// Which half of the synchronisation a daemon does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DaemonState {
    /// Sends its connections.
    Master,
    /// Receives those of others.
    Backup,
    /// Another, by its number.
    Other(u32),
}

/// A synchronisation daemon that runs. This crate reads them and does not start or stop any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Which half it does.
    pub state: DaemonState,
    /// Interface it sends or listens on.
    pub interface: String,
    /// Number that sender and receiver share.
    pub sync_id: u32,
    /// Longest UDP payload in bytes; 0 where the kernel does not say.
    pub max_length: u16,
    /// Multicast group.
    pub group: Option<IpAddr>,
    /// UDP port of the group; 0 where the kernel does not say.
    pub port: u16,
    /// Time to live of what is sent; 0 where the kernel does not say.
    pub ttl: u8,
    /// Attributes that this crate does not know.
    pub other: Vec<DefaultNla>,
}

impl Daemon {
    /// Reads the content of an `IPVS_CMD_ATTR_DAEMON`.
    pub fn from_attributes(attributes: &[DaemonAttribute]) -> Result<Self, DecodeError> {
        let mut state = None;
        let mut out = Self {
            state: DaemonState::Other(0),
            interface: String::new(),
            sync_id: 0,
            max_length: 0,
            group: None,
            port: 0,
            ttl: 0,
            other: Vec::new(),
        };
        for attribute in attributes {
            match attribute {
                DaemonAttribute::State(n) => state = Some(*n),
                DaemonAttribute::Interface(name) => out.interface.clone_from(name),
                DaemonAttribute::SyncId(n) => out.sync_id = *n,
                DaemonAttribute::MaxLength(n) => out.max_length = *n,
                DaemonAttribute::Group(bytes) => out.group = Some(Ipv4Addr::from(*bytes).into()),
                DaemonAttribute::Group6(bytes) => out.group = Some(Ipv6Addr::from(*bytes).into()),
                DaemonAttribute::Port(n) => out.port = *n,
                DaemonAttribute::Ttl(n) => out.ttl = *n,
                DaemonAttribute::Other(nla) => out.other.push(nla.clone()),
            }
        }
        out.state = match state.ok_or("a daemon without IPVS_DAEMON_ATTR_STATE")? {
            IP_VS_STATE_MASTER => DaemonState::Master,
            IP_VS_STATE_BACKUP => DaemonState::Backup,
            other => DaemonState::Other(other),
        };
        Ok(out)
    }
}
