//! The kernel, reached through small traits. Each has a real implementation and a fake that can be
//! told to fail.
//!
//! Everything here is blocking and runs on the one dataplane thread.

pub mod executor;
pub mod fake;
pub mod host;
pub mod ipset;
pub mod ipvs;
pub mod monitor;
pub mod netfilter;
mod nfnl;
pub mod preflight;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use crate::model::{
    ids::Mark,
    ids::{Family, PerFamily, Protocol},
    kernel::{
        Element, Elements, Program, PublishedFlows, RealServerConfig, RealServerKey, Timeouts, UdpFlows,
        VipRoute, VirtualServer, VirtualServerConfig, VirtualServerKey,
    },
};

/// One line for a person: what failed, on which object, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A program that we need is not installed.
    #[error("{program} is not installed; {advice}")]
    MissingProgram {
        /// The program's name.
        program: String,
        /// What to do.
        advice: String,
    },
    /// The kernel lacks something.
    #[error("the kernel has no {feature}; {advice}")]
    MissingFeature {
        /// Module or feature.
        feature: String,
        /// What to do.
        advice: String,
    },
    /// No rights.
    #[error("not permitted: {object}; run as root or with CAP_NET_ADMIN and CAP_NET_RAW")]
    Permission {
        /// What we tried to do.
        object: String,
    },
    /// A lock, buffer or table was busy or full: worth another try.
    #[error("{object}: {reason}")]
    Transient {
        /// What it concerns.
        object: String,
        /// What the kernel or program said.
        reason: String,
    },
    /// Anything else, in the kernel's or program's own words.
    #[error("{object}: {reason}")]
    Failed {
        /// What it concerns.
        object: String,
        /// What the kernel or program said.
        reason: String,
    },
}

/// One change of an IPVS table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IpvsChange {
    /// A service that is not there yet.
    AddService(VirtualServerKey, VirtualServerConfig),
    /// Scheduler or flags of a service that is there.
    SetService(VirtualServerKey, VirtualServerConfig),
    /// A service with all its destinations.
    DelService(VirtualServerKey),
    /// A destination that is not there yet.
    AddReal(VirtualServerKey, RealServerKey, RealServerConfig),
    /// Weight of a destination that is there.
    SetReal(VirtualServerKey, RealServerKey, RealServerConfig),
    /// A destination that is there.
    DelReal(VirtualServerKey, RealServerKey),
}

/// Counters of one destination (`IPVS_DEST_ATTR_STATS64`, `ACTIVE_CONNS`, `INACT_CONNS`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Connections scheduled since the destination was added.
    pub connections: u64,
    /// Packets towards the destination.
    pub in_packets: u64,
    /// Packets from it.
    pub out_packets: u64,
    /// Bytes towards the destination.
    pub in_bytes: u64,
    /// Bytes from it.
    pub out_bytes: u64,
    /// Connections in state ESTABLISHED (TCP), or in use (UDP).
    pub active: u32,
    /// Other connections that the table still holds.
    pub inactive: u32,
}

/// One fwmark service as the kernel's list for people shows it: without its family (destinations tell it, where there are some),
/// flags of its scheduler, and limits of its destinations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listed<'a> {
    /// Its mark.
    pub mark: Mark,
    /// Its scheduler.
    pub scheduler: &'a str,
    /// Neither persistent nor one-packet scheduling (`IP_VS_SVC_F_PERSISTENT`, `_ONEPACKET`), which we never set.
    pub plain: bool,
    /// Its destinations, in no order.
    pub reals: &'a [(RealServerKey, RealServerConfig)],
}

/// The IPVS table of this network namespace.
pub trait Ipvs {
    /// All fwmark services whose mark `keep` accepts, with destinations.
    fn dump(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
    ) -> Result<HashMap<VirtualServerKey, VirtualServer>, Error>;
    /// Only the services, without destinations: the cheap look.
    fn dump_services(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
    ) -> Result<HashMap<VirtualServerKey, VirtualServerConfig>, Error>;
    /// How many services of IPv4 there are, anybody's, at next to no cost; `None` where the kernel does not tell.
    fn count(&mut self) -> Option<u32>;
    /// Shows each fwmark service whose mark `keep` accepts, with its destinations: a sixth of what a dump costs, and less than
    /// a dump tells. Some may be left out, as many as other network namespaces have. `false` where the kernel has no such list; some were shown by then, maybe.
    fn list(&mut self, keep: &dyn Fn(Mark) -> bool, each: &mut dyn FnMut(&Listed<'_>))
    -> Result<bool, Error>;
    /// The service with this key, anybody's. A dump may lack one that is there: the kernel goes by position in its table, and
    /// another program may take services out meanwhile.
    fn service(&mut self, key: VirtualServerKey) -> Result<Option<VirtualServerConfig>, Error>;
    /// Destinations of one service with weights and counters; empty when the service is missing.
    fn reals(
        &mut self,
        key: VirtualServerKey,
    ) -> Result<BTreeMap<RealServerKey, (RealServerConfig, Counters)>, Error>;
    /// Applies changes in order. The results line up with the changes. Adding what is there already
    /// with the same values, and deleting what is gone, are successes.
    fn apply(&mut self, changes: &[IpvsChange]) -> Vec<Result<(), Error>>;
    /// Timeouts in force.
    fn timeouts(&mut self) -> Result<Timeouts, Error>;
    /// Sets them.
    fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error>;
    /// Services that `keep` does not accept, as one line each for people (somebody else's).
    fn foreign(&mut self, keep: &dyn Fn(Mark) -> bool) -> Result<Vec<String>, Error>;
    /// Writing commands sent since the start.
    fn writes(&self) -> u64;
}

/// One change of a set element.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ElementChange {
    /// Adds the element, or replaces its mark.
    Put(Element, Option<Mark>),
    /// Removes it.
    Del(Element),
}

/// How the fixed rules are in the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProgramState {
    /// Nothing of it is there.
    Absent,
    /// All of it is there, unchanged.
    Installed,
    /// Part of it is missing or different; the texts say what, for people.
    Drifted(Vec<String>),
}

/// What a netfilter renderer found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetfilterState {
    /// The fixed rules, compared with the program that should be there.
    pub program: ProgramState,
    /// Elements of our sets and maps, as far as they exist.
    pub elements: Elements,
    /// Chains, sets or tables that the *other* renderer left.
    pub leftovers: Vec<String>,
    /// Marks that sets and maps of the other renderer lead to. Those entries are not as if they stood, but the services are ours.
    pub led_to: BTreeSet<Mark>,
}

/// One of the two renderers of the netfilter program.
pub trait Netfilter {
    /// `iptables-nft`, `iptables-legacy` or `nftables`.
    fn name(&self) -> &'static str;
    /// Reads what is there and compares it with `want`.
    fn observe(&mut self, want: &Program) -> Result<NetfilterState, Error>;
    /// Makes the whole program, and exactly these elements, be there. Atomic per table: at no moment
    /// does a packet meet half of it. Also when other state of ours is present in any condition.
    fn install(&mut self, program: &Program, elements: &Elements) -> Result<(), Error>;
    /// Whether all rules of a family are there, although the last [`Netfilter::install`] has failed.
    fn stands(&self, _family: Family) -> bool {
        false
    }
    /// Changes elements of an installed program, in order where order matters to packets. The results
    /// line up with the changes.
    fn apply(&mut self, program: &Program, changes: &[ElementChange]) -> Vec<Result<(), Error>>;
    /// What [`Netfilter::install`] brings besides elements: sets, chains with their number of rules, and jumps.
    fn outline(&self, _program: &Program) -> Vec<String> {
        Vec::new()
    }
    /// Removes what the other renderer left (see [`NetfilterState::leftovers`]).
    fn remove_leftovers(&mut self) -> Result<(), Error>;
    /// Removes everything of ours, whichever renderer made it. Missing things are no error.
    fn remove(&mut self) -> Result<(), Error>;
    /// A cheap look: equal values mean that nothing of ours has changed since the last
    /// [`Netfilter::install`], [`Netfilter::apply`] or [`Netfilter::observe`].
    fn probe(&mut self) -> Result<Probe, Error>;
    /// What this renderer can't do on this host, one line each for people.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
    /// What tells an unchanged program from a changed one across restarts; kept in the state file.
    fn fingerprint(&self) -> Option<serde_json::Value>;
    /// Gives back what an earlier run's [`Netfilter::fingerprint`] said.
    fn set_fingerprint(&mut self, fingerprint: serde_json::Value);
    /// Writing commands and program runs since the start.
    fn writes(&self) -> u64;
}

/// What a cheap look at the netfilter state found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Probe {
    /// As we left it.
    Unchanged,
    /// Something of ours differs: time for a full observation.
    Changed(String),
}

/// A socket that listens on this node.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Listener {
    /// Protocol.
    pub protocol: Protocol,
    /// Local address; unspecified means all.
    pub addr: IpAddr,
    /// Local port.
    pub port: u16,
}

/// Routes, addresses, sysctls, sockets and conntrack of this network namespace.
pub trait Host {
    /// The local route of exactly each of our ranges, if it is there.
    fn vip_routes(&mut self, ranges: &PerFamily<ipnet::IpNet>) -> Result<PerFamily<VipRoute>, Error>;
    /// Ranges of all routes that are ours by their protocol, of whichever run.
    fn our_ranges(&mut self) -> Result<BTreeSet<ipnet::IpNet>, Error>;
    /// Adds the route or replaces its source.
    fn put_vip_route(&mut self, route: &VipRoute) -> Result<(), Error>;
    /// Removes it; a missing one is no error.
    fn del_vip_route(&mut self, family: Family, range: &ipnet::IpNet) -> Result<(), Error>;
    /// Routes and addresses of others that overlap a range, each as one line for people.
    fn overlaps(&mut self, range: &ipnet::IpNet) -> Result<Vec<String>, Error>;
    /// Reads a sysctl by its path below /proc/sys; `None` where the file is missing.
    fn sysctl(&mut self, path: &str) -> Result<Option<String>, Error>;
    /// Whether a sysctl has a value or could be given it.
    fn can_have(&mut self, path: &str, value: &str) -> Result<bool, Error>;
    /// Writes one.
    fn set_sysctl(&mut self, path: &str, value: &str) -> Result<(), Error>;
    /// Addresses of the node, those that published ports answer on (design decision 5), and the
    /// primary one of each family (source of the default route where not configured).
    fn facts(&mut self, rules: &AddressRules) -> Result<crate::model::node::NodeFacts, Error>;
    /// Bridges of this node whose subnets hold one of these addresses.
    fn bridges_of(
        &mut self,
        addresses: &BTreeSet<IpAddr>,
    ) -> Result<Vec<crate::model::kernel::BridgeSubnet>, Error>;
    /// Sockets that listen (TCP, SCTP) or are bound without a peer (UDP).
    fn listeners(&mut self) -> Result<Vec<Listener>, Error>;
    /// Deletes conntrack entries of UDP flows to these real servers that came by the given addresses. Returns how many.
    fn forget_udp(&mut self, flows: &UdpFlows) -> Result<usize, Error>;
    /// Which of these have a connection that is open.
    fn open_flows(&mut self, flows: &[PublishedFlows]) -> Result<Vec<bool>, Error>;
    /// Ends these connections: their next packet is refused. Says how many there were.
    fn cut_flows(&mut self, flows: &[PublishedFlows]) -> Result<usize, Error>;
    /// Writing commands since the start.
    fn writes(&self) -> u64;
}

/// How the node's addresses are chosen.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct AddressRules {
    /// `--node-ip`.
    pub node_ips: PerFamily<IpAddr>,
    /// `--publish-addresses`: CIDRs; empty means the default rule.
    pub publish_addresses: Vec<ipnet::IpNet>,
    /// VIP ranges: never published on.
    pub ranges: PerFamily<ipnet::IpNet>,
}
