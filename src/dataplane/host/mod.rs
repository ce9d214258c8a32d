//! Routes, addresses, sysctls, sockets and conntrack of this network namespace, by netlink and /proc;
//! no programs are run.
//!
//! Everything happens in the network namespace of the *calling thread*: netlink sockets are opened at
//! first use, and /proc/sys/net shows the settings of whoever opens it.

pub(super) mod address;
mod conntrack;
pub(super) mod netlink;
pub(super) mod route;
mod sockets;
mod sysctl;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    path::PathBuf,
};

use ipnet::IpNet;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_SOCK_DIAG};

pub(crate) use address::plain as plain_link_name;
pub use route::ROUTE_PROTOCOL;
pub use sysctl::{REQUIRED, Required, When};

use self::{address::Link, netlink::Conn, sysctl::Sysctls};
use super::{AddressRules, Error, Host, Listener};
use crate::model::{
    ids::{Family, PerFamily},
    kernel::{BridgeSubnet, PublishedFlows, UdpFlows, VipRoute},
    node::NodeFacts,
};

/// The kernel of this node.
pub struct LinuxHost {
    sysctls: Sysctls,
    route: Conn,
    diag: Conn,
    netfilter: Conn,
    writes: u64,
    /// `--node-ip` values that were not among the addresses when we last looked: told once.
    strangers: BTreeSet<IpAddr>,
}

impl Default for LinuxHost {
    /// With settings at /proc/sys.
    fn default() -> Self {
        Self::new(PathBuf::from("/proc/sys"))
    }
}

impl LinuxHost {
    /// `sysctl_root` is /proc/sys, or where the host's is mounted in a container whose own is read-only
    /// (/host/proc/sys). Opens nothing yet.
    pub fn new(sysctl_root: PathBuf) -> Self {
        Self {
            sysctls: Sysctls::new(sysctl_root),
            route: Conn::new(NETLINK_ROUTE),
            diag: Conn::new(NETLINK_SOCK_DIAG),
            netfilter: Conn::new(NETLINK_NETFILTER),
            writes: 0,
            strangers: BTreeSet::new(),
        }
    }

    /// Links whose IPv6 default route comes from router advertisements that the kernel would stop
    /// accepting with forwarding on (accept_ra is 1, not 2). Empty when forwarding is on already.
    ///
    /// Where user space handles them (systemd-networkd, NetworkManager), accept_ra is 0 and nothing
    /// would be lost.
    ///
    /// # Errors
    /// When links, routes or settings can't be read.
    pub fn ra_dependent_links(&mut self) -> Result<Vec<String>, Error> {
        if self.sysctls.read(sysctl::V6_FORWARDING)?.is_none_or(|v| v != "0") {
            return Ok(Vec::new());
        }
        let indexes = route::ra_default_links(&mut self.route)?;
        if indexes.is_empty() {
            return Ok(Vec::new());
        }
        let links = address::links(&mut self.route)?;
        let mut names = Vec::new();
        for name in indexes.iter().filter_map(|i| links.get(i)).map(|l| &l.name) {
            // A link's name can't hold a slash.
            if self.sysctls.read(&format!("net/ipv6/conf/{name}/accept_ra"))?.as_deref() == Some("1") {
                names.push(name.clone());
            }
        }
        Ok(names)
    }

    /// Names of all links.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn link_names(&mut self) -> Result<BTreeSet<String>, Error> {
        Ok(address::links(&mut self.route)?.into_values().map(|link| link.name).collect())
    }

    fn warn_of_strangers(&mut self, rules: &AddressRules, all: &BTreeSet<IpAddr>) {
        let now: BTreeSet<_> = rules.node_ips.iter().map(|(_, a)| *a).filter(|a| !all.contains(a)).collect();
        for addr in now.difference(&self.strangers) {
            tracing::warn!("--node-ip {addr} is not an address of this node; using it all the same");
        }
        self.strangers = now;
    }
}

impl Host for LinuxHost {
    fn vip_routes(&mut self, ranges: &PerFamily<IpNet>) -> Result<PerFamily<VipRoute>, Error> {
        let mut found = PerFamily::default();
        for (family, range) in ranges.iter() {
            found.set(family, route::find_ours(&mut self.route, range)?);
        }
        Ok(found)
    }

    fn our_ranges(&mut self) -> Result<BTreeSet<IpNet>, Error> {
        route::our_ranges(&mut self.route)
    }

    fn put_vip_route(&mut self, route: &VipRoute) -> Result<(), Error> {
        self.writes += u64::from(route::put(&mut self.route, route)?);
        Ok(())
    }

    fn del_vip_route(&mut self, _family: Family, range: &IpNet) -> Result<(), Error> {
        self.writes += u64::from(route::del(&mut self.route, range)?);
        Ok(())
    }

    fn overlaps(&mut self, range: &IpNet) -> Result<Vec<String>, Error> {
        let links = address::links(&mut self.route)?;
        let addresses = address::addresses(&mut self.route)?;
        route::overlaps(&mut self.route, range, &links, &addresses)
    }

    fn sysctl(&mut self, path: &str) -> Result<Option<String>, Error> {
        self.sysctls.read(path)
    }

    fn can_have(&mut self, path: &str, value: &str) -> Result<bool, Error> {
        self.sysctls.can_have(path, value)
    }

    fn set_sysctl(&mut self, path: &str, value: &str) -> Result<(), Error> {
        if path == sysctl::V6_FORWARDING && value == "1" {
            let links = self.ra_dependent_links()?;
            if let Some(link) = links.first() {
                return Err(Error::Failed {
                    object: format!("set {path} to 1"),
                    reason: format!(
                        "refused, because {} would lose its IPv6 default route, which comes from router \
                         advertisements; set net.ipv6.conf.{link}.accept_ra=2 first",
                        links.join(", ")
                    ),
                });
            }
        }
        self.writes += u64::from(self.sysctls.write(path, value)?);
        Ok(())
    }

    fn facts(&mut self, rules: &AddressRules) -> Result<NodeFacts, Error> {
        let links = address::links(&mut self.route)?;
        let addresses = address::addresses(&mut self.route)?;
        let mut choice = PerFamily::default();
        for family in Family::ALL.into_iter().filter(|f| rules.node_ips.get(*f).is_none()) {
            choice.set(family, route::default_source(&mut self.route, family));
        }
        let facts = address::facts(&links, &addresses, rules, &choice);
        self.warn_of_strangers(rules, &addresses.iter().map(|a| a.addr).collect());
        Ok(facts)
    }

    fn bridges_of(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<Vec<BridgeSubnet>, Error> {
        let mut links: HashMap<u32, Link> = address::links(&mut self.route)?;
        links.retain(|_, link| link.bridge());
        if links.is_empty() || addresses.is_empty() {
            return Ok(Vec::new());
        }
        // Of addresses; and on-link routes, for bridges that have their subnet without an address in it.
        let mut subnets: Vec<(u32, IpNet)> =
            address::addresses(&mut self.route)?.iter().map(|a| (a.link, a.subnet())).collect();
        for family in Family::ALL.into_iter().filter(|f| addresses.iter().any(|a| Family::of(a) == *f)) {
            subnets.extend(route::on_link(&mut self.route, family)?);
        }
        let found: BTreeSet<BridgeSubnet> = subnets
            .into_iter()
            .filter(|(_, subnet)| addresses.iter().any(|a| subnet.contains(a)))
            .filter_map(|(index, subnet)| {
                Some(BridgeSubnet { bridge: links.get(&index)?.name.clone(), subnet })
            })
            .collect();
        Ok(found.into_iter().collect())
    }

    fn listeners(&mut self) -> Result<Vec<Listener>, Error> {
        sockets::listeners(&mut self.diag)
    }

    fn forget_udp(&mut self, flows: &UdpFlows) -> Result<usize, Error> {
        conntrack::forget_udp(&mut self.netfilter, flows, &mut self.writes)
    }

    fn open_flows(&mut self, flows: &[PublishedFlows]) -> Result<Vec<bool>, Error> {
        conntrack::open_flows(&mut self.netfilter, flows)
    }

    fn cut_flows(&mut self, flows: &[PublishedFlows]) -> Result<usize, Error> {
        conntrack::cut_flows(&mut self.netfilter, flows, &mut self.writes)
    }

    fn writes(&self) -> u64 {
        self.writes
    }
}
