//! How many services of IPv4 IPVS has, whatever they are: by a socket option of the older interface (`IP_VS_SO_GET_INFO`), which
//! costs next to nothing with ten thousand of them. Netlink has nothing like it, and that interface knows nothing of IPv6
//! (`ip_vs_add_service`: "Count only IPv4 services").

use std::os::fd::OwnedFd;

use nix::{
    getsockopt_impl, libc, sockopt_impl,
    sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket},
};

/// `IP_VS_SO_GET_INFO` of `linux/ip_vs.h`: `IP_VS_BASE_CTL + 1`.
const IP_VS_SO_GET_INFO: libc::c_int = 64 + 1024 + 64 + 1;

sockopt_impl!(
    /// `struct ip_vs_getinfo`: version, size of the connection table, number of services.
    GetInfo,
    GetOnly,
    libc::IPPROTO_IP,
    IP_VS_SO_GET_INFO,
    [u32; 3]
);

/// Asks the network namespace in which it was opened.
pub(super) struct Counter(OwnedFd);

impl Counter {
    /// `None` without sockets of IPv4.
    pub(super) fn open() -> Option<Self> {
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok().map(Self)
    }

    /// Services of IPv4, of all kinds and owners. `None` where it is not told.
    pub(super) fn services(&self) -> Option<u32> {
        getsockopt(&self.0, GetInfo).ok().map(|[_, _, services]| services)
    }
}
