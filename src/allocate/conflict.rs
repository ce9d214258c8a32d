//! What could not be given as asked, in words.

use std::{fmt, net::IpAddr};

use crate::model::ids::{Family, PortId, Protocol, Scope, ServiceKey};

/// Something that a service did not get, or did not get as it would have liked. Each heals by itself when its
/// cause goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Conflict {
    /// An explicit VIP that another service has.
    VipTaken {
        /// The address.
        vip: IpAddr,
        /// Who has it.
        by: ServiceKey,
    },
    /// An explicit VIP that can't be given: outside the range or reserved.
    VipUnusable {
        /// The address.
        vip: IpAddr,
    },
    /// The VIP moved because another service asks for it explicitly.
    VipMoved {
        /// The old address.
        from: IpAddr,
        /// The new one.
        to: IpAddr,
        /// Who has the old one.
        by: ServiceKey,
    },
    /// The lock file says something that this node can't follow: outside its ranges, reserved, or another's who asks for it.
    LockNotFollowed {
        /// What the lock file says.
        locked: String,
        /// What the service has instead.
        given: String,
    },
    /// The range has no free address.
    VipsExhausted {
        /// Which range.
        family: Family,
    },
    /// The node has no range for a family that the service needs.
    RangeMissing {
        /// Which range.
        family: Family,
    },
    /// An explicit published port that another port has.
    PortTaken {
        /// The port of this service.
        port: PortId,
        /// The number in question.
        number: u16,
        /// Who has it.
        by: ServiceKey,
        /// Its port.
        by_port: PortId,
    },
    /// The automatic published port moved because another service asks for it explicitly.
    PortMoved {
        /// The port of this service.
        port: PortId,
        /// The old number.
        from: u16,
        /// The new one.
        to: u16,
        /// Who has the old one.
        by: ServiceKey,
    },
    /// The publish range has no free port of the protocol.
    PortsExhausted {
        /// The port of this service.
        port: PortId,
    },
    /// No mark is left.
    MarksExhausted {
        /// The port of this service.
        port: PortId,
        /// For which scope.
        scope: Scope,
    },
}

impl Conflict {
    /// Whether something is missing because of it. The others are for information.
    pub fn is_blocking(&self) -> bool {
        !matches!(self, Self::VipMoved { .. } | Self::PortMoved { .. } | Self::LockNotFollowed { .. })
    }

    /// A reason as conditions write it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::VipTaken { .. } => "VIPTaken",
            Self::VipUnusable { .. } => "VIPUnusable",
            Self::VipMoved { .. } => "VIPMoved",
            Self::LockNotFollowed { .. } => "LockNotFollowed",
            Self::VipsExhausted { .. } => "VIPsExhausted",
            Self::RangeMissing { .. } => "VIPRangeMissing",
            Self::PortTaken { .. } => "PublishedPortTaken",
            Self::PortMoved { .. } => "PublishedPortMoved",
            Self::PortsExhausted { .. } => "PublishedPortsExhausted",
            Self::MarksExhausted { .. } => "MarksExhausted",
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proto = |p: &PortId| -> Protocol { p.protocol };
        match self {
            Self::VipTaken { vip, by } => write!(f, "virtual IP {vip} belongs to {by}"),
            Self::VipUnusable { vip } => write!(f, "virtual IP {vip} is outside the VIP range or reserved"),
            Self::VipMoved { from, to, by } => {
                write!(f, "virtual IP moved from {from} to {to}, because {by} asks for {from} explicitly")
            }
            Self::LockNotFollowed { locked, given } => {
                write!(f, "it has {given}, and not {locked} as meshlb.lock says: that is not free here")
            }
            Self::VipsExhausted { family } => {
                write!(f, "no {family} virtual IP is free: delete services or widen the range (--vip-cidr)")
            }
            Self::RangeMissing { family } => {
                write!(f, "no {family} VIP range is configured (--vip-cidr), and the service needs one")
            }
            Self::PortTaken { port, number, by, by_port } => write!(
                f,
                "port {port} can't be published on {number}/{}: it belongs to port {by_port} of {by}",
                proto(port)
            ),
            Self::PortMoved { port, from, to, by } => write!(
                f,
                "published port of {port} moved from {from} to {to}, because {by} asks for {from} explicitly"
            ),
            Self::PortsExhausted { port } => write!(
                f,
                "no published port is free for {port}: give publish.port or widen the range (--publish-range)"
            ),
            Self::MarksExhausted { port, scope: _ } => {
                write!(f, "no firewall mark is left for port {port}: delete services or widen --mark-mask")
            }
        }
    }
}
