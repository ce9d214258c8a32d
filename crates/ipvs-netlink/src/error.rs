//! Errors, each naming what it is about.

use std::io;
use std::time::Duration;

use nix::libc::{EAFNOSUPPORT, EEXIST, EINVAL, ENOENT, EPERM, ERANGE, ESRCH};

use crate::address::AddressFamily;
use crate::command::{Command, Object};
use crate::destination::{DestinationId, Forwarding};
use crate::service::ServiceId;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `EEXIST`: it was there before.
    #[error("{object} already exists")]
    AlreadyExists {
        /// What was to be added.
        object: Object,
    },
    /// `ESRCH` for a service, `ENOENT` for a destination. A command on a destination whose service is
    /// missing names the service.
    #[error("{object} does not exist")]
    NotFound {
        /// What is missing.
        object: Object,
    },
    /// `ENOENT` while adding or setting a service: no such scheduler, and no module with it could be loaded.
    /// The kernel says the same of a persistence engine, if one was asked for.
    #[error(
        "IPVS service {service}: the kernel has no scheduler {scheduler:?}{}",
        pe_name.as_ref().map(|name| format!(" or no persistence engine {name:?}")).unwrap_or_default()
    )]
    UnknownScheduler {
        /// Service that was to be added or set.
        service: ServiceId,
        /// Scheduler it asked for.
        scheduler: String,
        /// Persistence engine it asked for.
        pe_name: Option<String>,
    },
    /// `EINVAL` for a destination of the other address family; only tunnels may cross.
    #[error(
        "destination {destination} cannot serve IPVS service {service}: they are of different address families"
    )]
    FamilyMismatch {
        /// The service.
        service: ServiceId,
        /// The destination that does not fit it.
        destination: DestinationId,
    },
    /// `EPERM`: IPVS wants `CAP_NET_ADMIN` in the initial user namespace, for reading too.
    #[error("no permission for {object}: CAP_NET_ADMIN is needed, in the initial user namespace")]
    PermissionDenied {
        /// What was asked for.
        object: Object,
    },
    /// The kernel has no IPVS: the module `ip_vs` is not loaded and could not be.
    #[error("the kernel has no IPVS: module ip_vs is not loaded and could not be loaded")]
    NoIpvs,
    /// Any other refusal by the kernel.
    #[error(
        "cannot {action} {object}: {}{}{}",
        io::Error::from_raw_os_error(*errno),
        hint(object, *errno),
        message.as_ref().map(|text| format!(": {text}")).unwrap_or_default()
    )]
    Kernel {
        /// Verb: what was being done.
        action: &'static str,
        /// What to.
        object: Object,
        /// The kernel's error number, positive.
        errno: i32,
        /// The kernel's own words (extended acknowledgement), where it has any.
        message: Option<String>,
    },
    /// Not sent: the kernel would refuse or misread it.
    #[error("{object}: {reason}")]
    Invalid {
        /// What the command was about.
        object: Object,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Not sent: an earlier part of the batch found the socket broken.
    #[error("{object}: not sent, because the netlink socket failed before")]
    NotSent {
        /// What the command was about.
        object: Object,
    },
    /// The kernel ran the command, but there was no room for its answer (`ENOBUFS`). Read back what is there.
    #[error("{object}: the kernel's answer was lost")]
    AnswerLost {
        /// What the command was about.
        object: Object,
    },
    /// The table changed under a dump (`NLM_F_DUMP_INTR`), as often as it was tried.
    #[error("{object}: changed while it was being read")]
    DumpInterrupted {
        /// What was being read.
        object: Object,
    },
    /// No answer in time.
    #[error("{object}: no answer from the kernel within {after:?}")]
    TimedOut {
        /// What the command was about.
        object: Object,
        /// How long was waited.
        after: Duration,
    },
    /// A system call failed.
    #[error("{object}: netlink: {source}")]
    Io {
        /// What it was for.
        object: Object,
        /// The system's error.
        source: io::Error,
    },
    /// The kernel's answer could not be read.
    #[error("{object}: unreadable answer from the kernel: {reason}")]
    Malformed {
        /// What was asked for.
        object: Object,
        /// What is wrong with the answer.
        reason: String,
    },
}

impl Error {
    /// What the error is about; nothing for [`Error::NoIpvs`].
    pub fn object(&self) -> Option<Object> {
        match self {
            Self::AlreadyExists { object }
            | Self::NotFound { object }
            | Self::PermissionDenied { object }
            | Self::Kernel { object, .. }
            | Self::Invalid { object, .. }
            | Self::NotSent { object }
            | Self::AnswerLost { object }
            | Self::DumpInterrupted { object }
            | Self::TimedOut { object, .. }
            | Self::Io { object, .. }
            | Self::Malformed { object, .. } => Some(*object),
            Self::UnknownScheduler { service, .. } => Some(Object::Service(*service)),
            Self::FamilyMismatch { service, destination } => {
                Some(Object::Destination(*service, *destination))
            }
            Self::NoIpvs => None,
        }
    }

    /// Whether the kernel may have done what was asked in spite of the error.
    pub fn is_outcome_unknown(&self) -> bool {
        matches!(
            self,
            Self::AnswerLost { .. } | Self::TimedOut { .. } | Self::Io { .. } | Self::Malformed { .. }
        )
    }

    /// What the kernel's refusal of a command means.
    pub(crate) fn of_command(command: &Command, errno: i32, message: Option<String>) -> Self {
        match (command, errno) {
            (Command::AddService(service, config) | Command::SetService(service, config), ENOENT) => {
                Self::UnknownScheduler {
                    service: *service,
                    scheduler: config.scheduler.clone(),
                    pe_name: config.pe_name.clone(),
                }
            }
            (
                Command::AddDestination(service, ..)
                | Command::SetDestination(service, ..)
                | Command::DelDestination(service, _),
                ESRCH,
            ) => Self::NotFound { object: Object::Service(*service) },
            (
                Command::AddDestination(service, destination, config)
                | Command::SetDestination(service, destination, config),
                EINVAL | EAFNOSUPPORT,
            ) if service.family() != AddressFamily::of(destination.addr)
                && !matches!(config.forwarding, Forwarding::Tunnel(_)) =>
            {
                Self::FamilyMismatch { service: *service, destination: *destination }
            }
            _ => Self::of_kernel(command.verb(), command.object(), errno, message),
        }
    }

    /// What the kernel's refusal means where the command adds nothing to it.
    pub(crate) fn of_kernel(
        action: &'static str,
        object: Object,
        errno: i32,
        message: Option<String>,
    ) -> Self {
        match errno {
            EEXIST => Self::AlreadyExists { object },
            ESRCH | ENOENT => Self::NotFound { object },
            EPERM => Self::PermissionDenied { object },
            _ => Self::Kernel { action, object, errno, message },
        }
    }
}

/// What the kernel means by errors for which it has no words.
fn hint(object: &Object, errno: i32) -> &'static str {
    match (object, errno) {
        (Object::Destination(..), ERANGE) => {
            " (a weight below 0, or the lower threshold is above the upper one)"
        }
        (Object::Destination(..), EINVAL) => {
            " (not a unicast address, or loopback was never up, or a GUE tunnel without a port)"
        }
        _ => "",
    }
}
