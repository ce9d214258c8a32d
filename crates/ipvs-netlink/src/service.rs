//! Services: what clients connect to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use netlink_packet_core::{DecodeError, DefaultNla};

use crate::address::{self, AddressFamily, Protocol};
use crate::constants::*;
use crate::flags::ServiceFlags;
use crate::stats::Stats;
use crate::wire::ServiceAttribute;

/// How the kernel finds a service: by the packet's firewall mark or by its destination.
///
/// [`Display`](fmt::Display) writes it as `ipvsadm` does:
///
/// ```
/// use ipvs_netlink::{AddressFamily, Protocol, ServiceId};
///
/// assert_eq!(ServiceId::fwmark(AddressFamily::Inet6, 256).to_string(), "FWM 256 IPv6");
/// let id = ServiceId::Address { protocol: Protocol::Tcp, addr: "10.0.0.1:80".parse().unwrap() };
/// assert_eq!(id.to_string(), "TCP 10.0.0.1:80");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ServiceId {
    /// Packets of one family that carry a mark. IPVS compares all 32 bits. (`ipvsadm` prints marks above
    /// 2³¹ − 1 as negative numbers.)
    Fwmark {
        /// IPv4 and IPv6 are two services, though the mark be the same.
        family: AddressFamily,
        /// Not 0.
        mark: u32,
    },
    /// Packets to an address and port.
    Address {
        /// Transport protocol.
        protocol: Protocol,
        /// Address and port. Port 0 is for all ports, and needs [`ServiceFlags::PERSISTENT`].
        addr: SocketAddr,
    },
}

impl ServiceId {
    /// A service found by firewall mark.
    pub const fn fwmark(family: AddressFamily, mark: u32) -> Self {
        Self::Fwmark { family, mark }
    }

    /// A service found by address.
    pub fn address(protocol: Protocol, addr: IpAddr, port: u16) -> Self {
        Self::Address { protocol, addr: SocketAddr::new(addr, port) }
    }

    /// IPv4 or IPv6.
    pub fn family(&self) -> AddressFamily {
        match self {
            Self::Fwmark { family, .. } => *family,
            Self::Address { addr, .. } => AddressFamily::of(addr.ip()),
        }
    }

    /// The attributes that the kernel needs to find the service, no more.
    pub fn to_attributes(&self) -> Vec<ServiceAttribute> {
        let family = ServiceAttribute::Family(self.family().number());
        match self {
            Self::Fwmark { mark, .. } => vec![family, ServiceAttribute::Fwmark(*mark)],
            Self::Address { protocol, addr } => vec![
                family,
                ServiceAttribute::Protocol(u8::from(*protocol).into()),
                ServiceAttribute::Address(address::to_bytes(addr.ip())),
                ServiceAttribute::Port(addr.port()),
            ],
        }
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fwmark { family: AddressFamily::Inet, mark } => write!(f, "FWM {mark}"),
            Self::Fwmark { family: AddressFamily::Inet6, mark } => write!(f, "FWM {mark} IPv6"),
            Self::Address { protocol, addr } => write!(f, "{protocol} {addr}"),
        }
    }
}

/// Which clients count as one for persistence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Netmask {
    /// Each address for itself: /32 or /128.
    #[default]
    Full,
    /// All addresses that share so many leading bits.
    Prefix(u8),
    /// An IPv4 mask that is no prefix. The kernel takes them.
    Ipv4(Ipv4Addr),
}

impl Netmask {
    /// v4: the mask in network order; v6: the length as a native-endian u32 in the same field.
    fn to_bytes(self, family: AddressFamily) -> [u8; 4] {
        match (self, family) {
            (Self::Full, AddressFamily::Inet) => [0xff; 4],
            (Self::Full, AddressFamily::Inet6) => 128u32.to_ne_bytes(),
            (Self::Prefix(length), AddressFamily::Inet) => v4_mask(length).to_be_bytes(),
            (Self::Prefix(length), AddressFamily::Inet6) => u32::from(length).to_ne_bytes(),
            (Self::Ipv4(mask), _) => mask.octets(),
        }
    }

    fn from_bytes(bytes: [u8; 4], family: AddressFamily) -> Result<Self, DecodeError> {
        let length = match family {
            AddressFamily::Inet => {
                let mask = u32::from_be_bytes(bytes);
                let length = u8::try_from(mask.leading_ones()).unwrap_or(u8::MAX);
                if v4_mask(length) != mask {
                    return Ok(Self::Ipv4(bytes.into()));
                }
                length
            }
            AddressFamily::Inet6 => {
                let length = u32::from_ne_bytes(bytes);
                u8::try_from(length).map_err(|_| format!("IPv6 prefix length {length} of a service"))?
            }
        };
        let full = if family == AddressFamily::Inet { 32 } else { 128 };
        Ok(if length == full { Self::Full } else { Self::Prefix(length) })
    }
}

/// The mask of an IPv4 prefix; more than 32 bits are all bits.
fn v4_mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0)
}

/// What can be set of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceConfig {
    /// Name of the scheduler, such as `rr`; at most 15 bytes. The kernel loads its module if it can.
    pub scheduler: String,
    /// Flags; [`ServiceFlags::HASHED`] is left out of what is sent and of what is read.
    pub flags: ServiceFlags,
    /// Seconds for which a client stays with its destination; only with [`ServiceFlags::PERSISTENT`].
    pub timeout: u32,
    /// Which clients count as one for persistence.
    pub netmask: Netmask,
    /// Name of the persistence engine (`sip` is the kernel's only one); at most 15 bytes.
    pub pe_name: Option<String>,
}

impl ServiceConfig {
    /// A service that is not persistent.
    pub fn new(scheduler: impl Into<String>) -> Self {
        Self {
            scheduler: scheduler.into(),
            flags: ServiceFlags::NONE,
            timeout: 0,
            netmask: Netmask::Full,
            pe_name: None,
        }
    }

    /// The same with clients staying on their destination for `timeout` seconds.
    pub fn persistent(self, timeout: u32) -> Self {
        Self { flags: self.flags | ServiceFlags::PERSISTENT, timeout, ..self }
    }

    /// The attributes beside those of the [`ServiceId`].
    pub fn to_attributes(&self, family: AddressFamily) -> Vec<ServiceAttribute> {
        let mut attributes = vec![ServiceAttribute::Scheduler(self.scheduler.clone())];
        attributes.extend(self.pe_name.clone().map(ServiceAttribute::PersistenceEngine));
        attributes.extend([
            // The mask claims every bit, so that a change also clears; the kernel puts HASHED back itself.
            ServiceAttribute::Flags {
                flags: self.flags.without(ServiceFlags::HASHED).bits(),
                mask: u32::MAX,
            },
            ServiceAttribute::Timeout(self.timeout),
            ServiceAttribute::Netmask(self.netmask.to_bytes(family)),
        ]);
        attributes
    }

    /// What the kernel would refuse without saying why.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        check_name(&self.scheduler, IP_VS_SCHEDNAME_MAXLEN)
            .map_err(|()| "the scheduler's name must have 1 to 15 bytes and no NUL")?;
        if let Some(name) = &self.pe_name {
            check_name(name, IP_VS_PENAME_MAXLEN)
                .map_err(|()| "the persistence engine's name must have 1 to 15 bytes and no NUL")?;
        }
        Ok(())
    }
}

/// `max` counts the NUL.
fn check_name(name: &str, max: usize) -> Result<(), ()> {
    if name.is_empty() || name.len() >= max || name.contains('\0') { Err(()) } else { Ok(()) }
}

/// A service as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// How it is found.
    pub id: ServiceId,
    /// What was set; fit to be compared with what was asked for.
    pub config: ServiceConfig,
    /// Flags as the kernel showed them, [`ServiceFlags::HASHED`] included.
    pub flags: ServiceFlags,
    /// Counters.
    pub stats: Stats,
    /// Attributes that this crate does not know.
    pub other: Vec<DefaultNla>,
}

impl Service {
    /// Reads the content of an `IPVS_CMD_ATTR_SERVICE`.
    pub fn from_attributes(attributes: &[ServiceAttribute]) -> Result<Self, DecodeError> {
        let (mut family, mut protocol, mut addr, mut port, mut mark) = (None, None, None, None, None);
        let (mut netmask, mut stats, mut stats64) = (None, None, None);
        let mut config = ServiceConfig::new("");
        let mut flags = ServiceFlags::NONE;
        let mut other = Vec::new();
        for attribute in attributes {
            match attribute {
                ServiceAttribute::Family(n) => family = Some(AddressFamily::from_number(*n)?),
                ServiceAttribute::Protocol(n) => protocol = Some(*n),
                ServiceAttribute::Address(bytes) => addr = Some(*bytes),
                ServiceAttribute::Port(n) => port = Some(*n),
                ServiceAttribute::Fwmark(n) => mark = Some(*n),
                ServiceAttribute::Scheduler(name) => config.scheduler.clone_from(name),
                // The kernel's mask is all ones.
                ServiceAttribute::Flags { flags: bits, .. } => flags = ServiceFlags::from_bits(*bits),
                ServiceAttribute::Timeout(seconds) => config.timeout = *seconds,
                ServiceAttribute::Netmask(bytes) => netmask = Some(*bytes),
                ServiceAttribute::Stats(list) => stats = Some(list.as_slice()),
                ServiceAttribute::PersistenceEngine(name) => config.pe_name = Some(name.clone()),
                ServiceAttribute::Stats64(list) => stats64 = Some(list.as_slice()),
                ServiceAttribute::Other(nla) => other.push(nla.clone()),
            }
        }
        let family = family.ok_or("a service without IPVS_SVC_ATTR_AF")?;
        let id = match (mark, protocol, addr, port) {
            (Some(mark), ..) => ServiceId::Fwmark { family, mark },
            (None, Some(protocol), Some(addr), Some(port)) => {
                let protocol = u8::try_from(protocol).map_err(|_| format!("protocol {protocol}"))?;
                ServiceId::address(protocol.into(), address::from_bytes(family, addr), port)
            }
            _ => return Err("a service with neither a mark nor protocol, address and port".into()),
        };
        config.flags = flags.without(ServiceFlags::HASHED);
        if let Some(bytes) = netmask {
            config.netmask = Netmask::from_bytes(bytes, family)?;
        }
        Ok(Self { id, config, flags, stats: Stats::from_attributes(stats, stats64), other })
    }
}
