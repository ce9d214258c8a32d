//! What can be asked of IPVS.

use std::fmt;

use crate::destination::{DestinationConfig, DestinationId};
use crate::service::{ServiceConfig, ServiceId};
use crate::settings::Timeouts;
use crate::wire::{IpvsAttribute, IpvsCommand, IpvsMessage};

/// A change to IPVS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Adds a service; an error if it is there.
    AddService(ServiceId, ServiceConfig),
    /// Sets everything that can be set of a service that is there; its destinations stay.
    SetService(ServiceId, ServiceConfig),
    /// Deletes a service with its destinations.
    DelService(ServiceId),
    /// Adds a destination to a service; an error if it is there.
    AddDestination(ServiceId, DestinationId, DestinationConfig),
    /// Sets everything that can be set of a destination that is there.
    SetDestination(ServiceId, DestinationId, DestinationConfig),
    /// Deletes a destination. What happens to its connections is up to `net.ipv4.vs.expire_nodest_conn`.
    DelDestination(ServiceId, DestinationId),
    /// Zeroes the counters of a service and its destinations, or all counters.
    Zero(Option<ServiceId>),
    /// Deletes every service of the network namespace, whoever made it.
    Flush,
    /// Sets the timeouts of the network namespace.
    SetTimeouts(Timeouts),
}

impl Command {
    /// The object that the command is about.
    pub fn object(&self) -> Object {
        match self {
            Self::AddService(id, _) | Self::SetService(id, _) | Self::DelService(id) => Object::Service(*id),
            Self::AddDestination(service, id, _)
            | Self::SetDestination(service, id, _)
            | Self::DelDestination(service, id) => Object::Destination(*service, *id),
            Self::Zero(Some(id)) => Object::Service(*id),
            Self::Zero(None) | Self::Flush => Object::Services,
            Self::SetTimeouts(_) => Object::Timeouts,
        }
    }

    /// What it does, as a verb.
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Self::AddService(..) | Self::AddDestination(..) => "add",
            Self::SetService(..) | Self::SetDestination(..) | Self::SetTimeouts(_) => "set",
            Self::DelService(_) | Self::DelDestination(..) => "delete",
            Self::Zero(_) => "zero the counters of",
            Self::Flush => "flush",
        }
    }

    /// The message that carries it.
    pub fn to_message(&self) -> IpvsMessage {
        let (command, attributes) = match self {
            Self::AddService(id, config) => (IpvsCommand::NewService, vec![full_service(id, config)]),
            Self::SetService(id, config) => (IpvsCommand::SetService, vec![full_service(id, config)]),
            Self::DelService(id) => (IpvsCommand::DelService, vec![service(id)]),
            Self::AddDestination(id, destination, config) => {
                (IpvsCommand::NewDestination, vec![service(id), full_destination(destination, config)])
            }
            Self::SetDestination(id, destination, config) => {
                (IpvsCommand::SetDestination, vec![service(id), full_destination(destination, config)])
            }
            Self::DelDestination(id, destination) => (
                IpvsCommand::DelDestination,
                vec![service(id), IpvsAttribute::Destination(destination.to_attributes())],
            ),
            Self::Zero(id) => (IpvsCommand::Zero, id.iter().map(service).collect()),
            Self::Flush => (IpvsCommand::Flush, Vec::new()),
            Self::SetTimeouts(timeouts) => (IpvsCommand::SetConfig, timeouts.to_attributes()),
        };
        IpvsMessage { command, attributes }
    }

    /// Why it must not be sent: what the kernel would misread or refuse without a reason.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::AddService(id, config) | Self::SetService(id, config) => {
                check_service(id)?;
                config.check()
            }
            Self::DelService(id)
            | Self::AddDestination(id, ..)
            | Self::SetDestination(id, ..)
            | Self::DelDestination(id, _)
            | Self::Zero(Some(id)) => check_service(id),
            Self::Zero(None) | Self::Flush | Self::SetTimeouts(_) => Ok(()),
        }
    }
}

/// The kernel takes mark 0 for "no mark" and would look for TCP 0.0.0.0:0.
pub(crate) fn check_service(id: &ServiceId) -> Result<(), &'static str> {
    match id {
        ServiceId::Fwmark { mark: 0, .. } => Err("mark 0 names no service"),
        _ => Ok(()),
    }
}

/// A service by its id only.
pub(crate) fn service(id: &ServiceId) -> IpvsAttribute {
    IpvsAttribute::Service(id.to_attributes())
}

fn full_service(id: &ServiceId, config: &ServiceConfig) -> IpvsAttribute {
    let mut attributes = id.to_attributes();
    attributes.extend(config.to_attributes(id.family()));
    IpvsAttribute::Service(attributes)
}

fn full_destination(id: &DestinationId, config: &DestinationConfig) -> IpvsAttribute {
    let mut attributes = id.to_attributes();
    attributes.extend(config.to_attributes());
    IpvsAttribute::Destination(attributes)
}

/// What a command or an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Object {
    /// One service.
    Service(ServiceId),
    /// One destination of a service.
    Destination(ServiceId, DestinationId),
    /// All services of the network namespace.
    Services,
    /// All destinations of a service.
    Destinations(ServiceId),
    /// The timeouts of the network namespace.
    Timeouts,
    /// Version and table size.
    Info,
    /// The synchronisation daemons of the network namespace.
    Daemons,
    /// The number of the generic netlink family.
    Family,
    /// The netlink socket.
    Socket,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(id) => write!(f, "IPVS service {id}"),
            Self::Destination(service, id) => write!(f, "destination {id} of IPVS service {service}"),
            Self::Services => f.write_str("all IPVS services"),
            Self::Destinations(id) => write!(f, "the destinations of IPVS service {id}"),
            Self::Timeouts => f.write_str("the IPVS timeouts"),
            Self::Info => f.write_str("the version of IPVS"),
            Self::Daemons => f.write_str("the IPVS synchronisation daemons"),
            Self::Family => f.write_str("the generic netlink family IPVS"),
            Self::Socket => f.write_str("the netlink socket"),
        }
    }
}
