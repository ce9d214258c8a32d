use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, NLA_F_NESTED, Nla, NlaBuffer, NlasIterator, Parseable,
    ParseableParametrized, parse_u32,
};
use netlink_packet_generic::{GenlFamily, GenlHeader};

use super::{DaemonAttribute, DestinationAttribute, ServiceAttribute, parse_nested};
use crate::constants::*;

/// What a message asks for, or what an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IpvsCommand {
    /// Add a service; or: this is a service.
    NewService,
    /// Change a service.
    SetService,
    /// Delete a service.
    DelService,
    /// Read one service, or dump all.
    GetService,
    /// Add a destination; or: this is a destination.
    NewDestination,
    /// Change a destination.
    SetDestination,
    /// Delete a destination.
    DelDestination,
    /// Dump the destinations of a service.
    GetDestination,
    /// Start a synchronisation daemon; or: this is one.
    NewDaemon,
    /// Stop a synchronisation daemon.
    DelDaemon,
    /// Dump the synchronisation daemons.
    GetDaemon,
    /// Set the timeouts; or: these are the timeouts.
    SetConfig,
    /// Read the timeouts.
    GetConfig,
    /// Answer only: version and table size.
    SetInfo,
    /// Read version and table size.
    GetInfo,
    /// Zero the counters.
    Zero,
    /// Delete all services.
    Flush,
    /// What this crate does not know.
    Other(u8),
}

/// Every command that the kernel's header names, with its number.
const COMMANDS: [(IpvsCommand, u8); 17] = [
    (IpvsCommand::NewService, IPVS_CMD_NEW_SERVICE),
    (IpvsCommand::SetService, IPVS_CMD_SET_SERVICE),
    (IpvsCommand::DelService, IPVS_CMD_DEL_SERVICE),
    (IpvsCommand::GetService, IPVS_CMD_GET_SERVICE),
    (IpvsCommand::NewDestination, IPVS_CMD_NEW_DEST),
    (IpvsCommand::SetDestination, IPVS_CMD_SET_DEST),
    (IpvsCommand::DelDestination, IPVS_CMD_DEL_DEST),
    (IpvsCommand::GetDestination, IPVS_CMD_GET_DEST),
    (IpvsCommand::NewDaemon, IPVS_CMD_NEW_DAEMON),
    (IpvsCommand::DelDaemon, IPVS_CMD_DEL_DAEMON),
    (IpvsCommand::GetDaemon, IPVS_CMD_GET_DAEMON),
    (IpvsCommand::SetConfig, IPVS_CMD_SET_CONFIG),
    (IpvsCommand::GetConfig, IPVS_CMD_GET_CONFIG),
    (IpvsCommand::SetInfo, IPVS_CMD_SET_INFO),
    (IpvsCommand::GetInfo, IPVS_CMD_GET_INFO),
    (IpvsCommand::Zero, IPVS_CMD_ZERO),
    (IpvsCommand::Flush, IPVS_CMD_FLUSH),
];

impl From<IpvsCommand> for u8 {
    fn from(command: IpvsCommand) -> u8 {
        match command {
            IpvsCommand::Other(number) => number,
            known => COMMANDS.iter().find(|(c, _)| *c == known).map_or(0, |(_, number)| *number),
        }
    }
}

impl From<u8> for IpvsCommand {
    fn from(number: u8) -> Self {
        COMMANDS.iter().find(|(_, n)| *n == number).map_or(Self::Other(number), |(command, _)| *command)
    }
}

/// A first-level attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IpvsAttribute {
    /// A service.
    Service(Vec<ServiceAttribute>),
    /// A destination.
    Destination(Vec<DestinationAttribute>),
    /// A synchronisation daemon.
    Daemon(Vec<DaemonAttribute>),
    /// Seconds an idle TCP connection is kept.
    TimeoutTcp(u32),
    /// Seconds a TCP connection is kept after a FIN.
    TimeoutTcpFin(u32),
    /// Seconds a UDP flow is kept.
    TimeoutUdp(u32),
    /// Version of IPVS; only in [`IpvsCommand::SetInfo`].
    Version(u32),
    /// Buckets of the connection table; only in [`IpvsCommand::SetInfo`].
    ConnectionTableSize(u32),
    /// What this crate does not know.
    Other(DefaultNla),
}

impl Nla for IpvsAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Service(list) => list.as_slice().buffer_len(),
            Self::Destination(list) => list.as_slice().buffer_len(),
            Self::Daemon(list) => list.as_slice().buffer_len(),
            Self::TimeoutTcp(_)
            | Self::TimeoutTcpFin(_)
            | Self::TimeoutUdp(_)
            | Self::Version(_)
            | Self::ConnectionTableSize(_) => 4,
            Self::Other(nla) => nla.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Service(_) => IPVS_CMD_ATTR_SERVICE | NLA_F_NESTED,
            Self::Destination(_) => IPVS_CMD_ATTR_DEST | NLA_F_NESTED,
            Self::Daemon(_) => IPVS_CMD_ATTR_DAEMON | NLA_F_NESTED,
            Self::TimeoutTcp(_) => IPVS_CMD_ATTR_TIMEOUT_TCP,
            Self::TimeoutTcpFin(_) => IPVS_CMD_ATTR_TIMEOUT_TCP_FIN,
            Self::TimeoutUdp(_) => IPVS_CMD_ATTR_TIMEOUT_UDP,
            Self::Version(_) => IPVS_INFO_ATTR_VERSION,
            Self::ConnectionTableSize(_) => IPVS_INFO_ATTR_CONN_TAB_SIZE,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Service(list) => list.as_slice().emit(buffer),
            Self::Destination(list) => list.as_slice().emit(buffer),
            Self::Daemon(list) => list.as_slice().emit(buffer),
            Self::TimeoutTcp(n)
            | Self::TimeoutTcpFin(n)
            | Self::TimeoutUdp(n)
            | Self::Version(n)
            | Self::ConnectionTableSize(n) => buffer.copy_from_slice(&n.to_ne_bytes()),
            Self::Other(nla) => nla.emit_value(buffer),
        }
    }
}

impl ParseableParametrized<NlaBuffer<&[u8]>, IpvsCommand> for IpvsAttribute {
    /// The answer to `IPVS_CMD_GET_INFO` numbers its attributes for itself, hence the parameter.
    fn parse_with_param(nla: &NlaBuffer<&[u8]>, command: IpvsCommand) -> Result<Self, DecodeError> {
        let value = nla.value();
        let number = |name: &'static str| parse_u32(value).context(name);
        if command == IpvsCommand::SetInfo {
            return Ok(match nla.kind() {
                IPVS_INFO_ATTR_VERSION => Self::Version(number("IPVS_INFO_ATTR_VERSION")?),
                IPVS_INFO_ATTR_CONN_TAB_SIZE => {
                    Self::ConnectionTableSize(number("IPVS_INFO_ATTR_CONN_TAB_SIZE")?)
                }
                _ => Self::Other(DefaultNla::parse(nla)?),
            });
        }
        Ok(match nla.kind() {
            IPVS_CMD_ATTR_SERVICE => Self::Service(parse_nested(value, "IPVS_CMD_ATTR_SERVICE")?),
            IPVS_CMD_ATTR_DEST => Self::Destination(parse_nested(value, "IPVS_CMD_ATTR_DEST")?),
            IPVS_CMD_ATTR_DAEMON => Self::Daemon(parse_nested(value, "IPVS_CMD_ATTR_DAEMON")?),
            IPVS_CMD_ATTR_TIMEOUT_TCP => Self::TimeoutTcp(number("IPVS_CMD_ATTR_TIMEOUT_TCP")?),
            IPVS_CMD_ATTR_TIMEOUT_TCP_FIN => Self::TimeoutTcpFin(number("IPVS_CMD_ATTR_TIMEOUT_TCP_FIN")?),
            IPVS_CMD_ATTR_TIMEOUT_UDP => Self::TimeoutUdp(number("IPVS_CMD_ATTR_TIMEOUT_UDP")?),
            _ => Self::Other(DefaultNla::parse(nla)?),
        })
    }
}

/// A message of the family `IPVS`: everything after the generic netlink header.
///
/// Wrap it in [`GenlMessage`](netlink_packet_generic::GenlMessage) and
/// [`NetlinkMessage`](netlink_packet_core::NetlinkMessage) to send it, with this crate's
/// [`Client`](crate::Client) or with any other rust-netlink socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpvsMessage {
    /// What is asked for.
    pub command: IpvsCommand,
    /// In the order of the wire.
    pub attributes: Vec<IpvsAttribute>,
}

impl GenlFamily for IpvsMessage {
    fn family_name() -> &'static str {
        IPVS_GENL_NAME
    }

    fn command(&self) -> u8 {
        self.command.into()
    }

    fn version(&self) -> u8 {
        IPVS_GENL_VERSION
    }
}

impl Emitable for IpvsMessage {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for IpvsMessage {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        let command = IpvsCommand::from(header.cmd);
        let attributes = NlasIterator::new(bytes)
            .map(|nla| nla.and_then(|nla| IpvsAttribute::parse_with_param(&nla, command)))
            .collect::<Result<_, _>>()?;
        Ok(Self { command, attributes })
    }
}
