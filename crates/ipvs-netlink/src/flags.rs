//! Flags of a service.

use std::fmt;
use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, Not};

use crate::constants::*;

/// `IP_VS_SVC_F_*`: a set of flags of a service.
///
/// ```
/// use ipvs_netlink::ServiceFlags;
///
/// let flags = ServiceFlags::PERSISTENT | ServiceFlags::MH_FALLBACK;
/// assert!(flags.contains(ServiceFlags::SCHED1));
/// assert_eq!(flags.to_string(), "persistent,flag-1");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceFlags(u32);

impl ServiceFlags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// A client stays with its destination for the service's timeout.
    pub const PERSISTENT: Self = Self(IP_VS_SVC_F_PERSISTENT);
    /// The kernel has the service in its table. Set in every dump, never by a request.
    pub const HASHED: Self = Self(IP_VS_SVC_F_HASHED);
    /// Each UDP packet is scheduled on its own (`ipvsadm --ops`).
    pub const ONE_PACKET: Self = Self(IP_VS_SVC_F_ONEPACKET);
    /// The scheduler's first flag.
    pub const SCHED1: Self = Self(IP_VS_SVC_F_SCHED1);
    /// The scheduler's second flag.
    pub const SCHED2: Self = Self(IP_VS_SVC_F_SCHED2);
    /// The scheduler's third flag.
    pub const SCHED3: Self = Self(IP_VS_SVC_F_SCHED3);
    /// Scheduler `sh`: take another destination when the hashed one is not available.
    pub const SH_FALLBACK: Self = Self::SCHED1;
    /// Scheduler `sh`: hash the client's port too.
    pub const SH_PORT: Self = Self::SCHED2;
    /// Scheduler `mh`: take another destination when the hashed one is not available.
    pub const MH_FALLBACK: Self = Self::SCHED1;
    /// Scheduler `mh`: hash the client's port too.
    pub const MH_PORT: Self = Self::SCHED2;

    /// Flags from their bits, unknown ones included.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether every flag of `other` is set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether no flag is set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Without the flags of `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for ServiceFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for ServiceFlags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for ServiceFlags {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitAndAssign for ServiceFlags {
    fn bitand_assign(&mut self, other: Self) {
        self.0 &= other.0;
    }
}

impl Not for ServiceFlags {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0)
    }
}

/// Names of the flags, as `ipvsadm` has them where it has one.
const NAMES: [(ServiceFlags, &str); 6] = [
    (ServiceFlags::PERSISTENT, "persistent"),
    (ServiceFlags::HASHED, "hashed"),
    (ServiceFlags::ONE_PACKET, "ops"),
    (ServiceFlags::SCHED1, "flag-1"),
    (ServiceFlags::SCHED2, "flag-2"),
    (ServiceFlags::SCHED3, "flag-3"),
];

impl fmt::Display for ServiceFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut rest = *self;
        let mut comma = "";
        for (flag, name) in NAMES {
            if rest.contains(flag) {
                write!(f, "{comma}{name}")?;
                rest = rest.without(flag);
                comma = ",";
            }
        }
        if rest.is_empty() { Ok(()) } else { write!(f, "{comma}{:#x}", rest.0) }
    }
}

impl fmt::Debug for ServiceFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceFlags({self})")
    }
}
