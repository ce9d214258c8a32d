//! Links and addresses of the node, and which of them published ports answer on.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use netlink_packet_core::Parseable;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};

use super::netlink::{Conn, attrs, bytes_of, text_of, u32_at};
use crate::{
    dataplane::{AddressRules, Error},
    model::{
        ids::{Family, PerFamily},
        node::NodeFacts,
    },
};

/// `RTM_*` (linux/rtnetlink.h).
pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
pub(crate) const RTM_NEWADDR: u16 = 20;
pub(crate) const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
/// `struct ifinfomsg`: length, and where its index and flags are.
const IFINFO_LEN: usize = 16;
const IFINFO_INDEX: usize = 4;
const IFINFO_FLAGS: usize = 8;
/// `IFLA_IFNAME`, `IFLA_LINK`, `IFLA_LINKINFO`, `IFLA_INFO_KIND` (linux/if_link.h), `IFF_UP` (linux/if.h).
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFF_UP: u32 = 1;
/// Kinds of links that are made on another one.
const MADE_ON_ANOTHER: [&str; 5] = ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"];
/// kube-proxy's ipvs mode puts every ClusterIP of the cluster on this link. It is a dummy, but the name
/// counts whatever its kind is.
const KUBE_IPVS_LINK: &str = "kube-ipvs0";

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Link {
    pub(crate) name: String,
    /// `bridge`, `dummy`, `veth`, …; `None` for hardware and lo.
    pub(crate) kind: Option<String>,
    pub(crate) up: bool,
    /// The link that it is made on, as a VLAN is.
    pub(crate) lower: Option<u32>,
}

impl Link {
    /// Index and link. Decoded by hand: a link has a hundred attributes, of which two matter.
    pub(crate) fn parse(body: &[u8]) -> Option<(u32, Self)> {
        let (index, flags) = (u32_at(body, IFINFO_INDEX)?, u32_at(body, IFINFO_FLAGS)?);
        let (mut name, mut kind, mut lower) = (None, None, None);
        for (attr, value) in attrs(body.get(IFINFO_LEN..)?) {
            match attr {
                IFLA_IFNAME => name = Some(text_of(value)),
                IFLA_LINK => lower = u32_at(value, 0),
                IFLA_LINKINFO => {
                    kind = attrs(value).find(|(k, _)| *k == IFLA_INFO_KIND).map(|(_, v)| text_of(v));
                }
                _ => {}
            }
        }
        // Of the others it may be a peer in another network namespace.
        let lower = lower.filter(|_| kind.as_deref().is_some_and(|kind| MADE_ON_ANOTHER.contains(&kind)));
        Some((index, Self { name: name?, kind, up: flags & IFF_UP != 0, lower }))
    }

    /// Links that hold addresses which are not really the node's: ClusterIPs of kube-proxy's ipvs mode
    /// (kube-ipvs0), the addresses of nodelocaldns, service addresses for BGP.
    fn dummy(&self) -> bool {
        self.kind.as_deref() == Some("dummy") || self.name == KUBE_IPVS_LINK
    }

    pub(crate) fn bridge(&self) -> bool {
        self.kind.as_deref() == Some("bridge")
    }
}

/// An address of the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Address {
    pub(crate) addr: IpAddr,
    /// Prefix length.
    pub(crate) prefix: u8,
    /// The network: of the peer where there is one.
    net: IpNet,
    pub(crate) link: u32,
    flags: AddressFlags,
}

impl Address {
    pub(crate) fn parse(body: &[u8]) -> Option<Self> {
        let message = AddressMessage::parse(body).ok()?;
        let (mut local, mut peer) = (None, None);
        let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
        for attribute in &message.attributes {
            match attribute {
                // On a point-to-point link IFA_ADDRESS is the peer; IPv6 omits IFA_LOCAL elsewhere.
                AddressAttribute::Local(a) => local = Some(*a),
                AddressAttribute::Address(a) => peer = Some(*a),
                AddressAttribute::Flags(f) => flags = *f,
                _ => {}
            }
        }
        let addr = local.or(peer)?;
        let prefix = message.header.prefix_len;
        let net = IpNet::new(peer.unwrap_or(addr), prefix).ok()?.trunc();
        Some(Self { addr, prefix, net, link: message.header.index, flags })
    }

    /// What is on-link because of this address.
    pub(crate) fn subnet(&self) -> IpNet {
        self.net
    }

    pub(crate) fn link_name(&self, links: &HashMap<u32, Link>) -> String {
        links.get(&self.link).map_or_else(|| format!("link {}", self.link), |l| l.name.clone())
    }

    /// Nobody can use it: duplicate address detection is running, or has failed.
    fn unusable(&self) -> bool {
        let waiting =
            self.flags.contains(AddressFlags::Tentative) && !self.flags.contains(AddressFlags::Optimistic);
        waiting || self.flags.contains(AddressFlags::Dadfailed)
    }

    /// Not to be used as a source of new connections; but still to be answered on (RFC 4862, 5.5.4).
    /// keepalived and kube-vip mark the addresses that they move between nodes so.
    fn deprecated(&self) -> bool {
        self.flags.contains(AddressFlags::Deprecated)
    }
}

/// All links by index.
pub(crate) fn links(conn: &mut Conn) -> Result<HashMap<u32, Link>, Error> {
    let links = conn.dump(RTM_GETLINK, &[0; IFINFO_LEN], |kind, body| {
        (kind == RTM_NEWLINK).then(|| Link::parse(body)).flatten()
    });
    Ok(links.map_err(|f| f.about("read the links of this node"))?.into_iter().collect())
}

/// All addresses, IPv4 and IPv6, in the kernel's order.
pub(crate) fn addresses(conn: &mut Conn) -> Result<Vec<Address>, Error> {
    conn.dump(RTM_GETADDR, &bytes_of(&AddressMessage::default()), |kind, body| {
        (kind == RTM_NEWADDR).then(|| Address::parse(body)).flatten()
    })
    .map_err(|f| f.about("read the addresses of this node"))
}

/// Whether rules can name a link: both renderers write names as they are, and `+` and `*` at the end would mean others too.
pub(crate) fn plain(name: &str) -> bool {
    name.chars().all(|c| c.is_ascii_alphanumeric() || "._-@".contains(c))
}

/// Links with an address of the node, but for those that pods hang on: bridges and veth pairs, unless the node's primary
/// address is there.
fn uplinks(links: &HashMap<u32, Link>, own: &[&&Address], primary: &PerFamily<IpAddr>) -> BTreeSet<String> {
    let is_primary = |a: &Address| primary.iter().any(|(_, ip)| *ip == a.addr);
    own.iter()
        .filter_map(|a| links.get(&a.link).map(|link| (a, link)))
        .filter(|(_, link)| link.name != "lo")
        .filter(|(a, link)| is_primary(a) || !matches!(link.kind.as_deref(), Some("bridge" | "veth")))
        .map(|(_, link)| link.name.clone())
        .filter(|name| plain(name))
        .collect()
}

/// Those of them that the node's own address is on, but for bridges and switches, and VLANs on these: there may be pods as well. Other links
/// with an address may be a network plugin's own towards pods of this node (`antrea-gw0`, `ovn-k8s-mp0`).
fn outside(
    links: &HashMap<u32, Link>,
    own: &[&&Address],
    primary: &PerFamily<IpAddr>,
    uplinks: &BTreeSet<String>,
) -> BTreeSet<String> {
    own.iter()
        .filter(|a| primary.iter().any(|(_, ip)| *ip == a.addr))
        .filter_map(|a| links.get(&a.link))
        .filter(|link| !is_on_a_switch(links, link))
        .map(|link| link.name.clone())
        .filter(|name| uplinks.contains(name))
        .collect()
}

/// Whether it is a bridge or a switch, or is made on one.
fn is_on_a_switch(links: &HashMap<u32, Link>, link: &Link) -> bool {
    // Bounded: whoever reads links while they change may see a circle.
    const DEEPEST: usize = 16;
    let lower = |link: &&Link| link.lower.and_then(|index| links.get(&index));
    std::iter::successors(Some(link), lower)
        .take(DEEPEST)
        .any(|link| matches!(link.kind.as_deref(), Some("bridge" | "openvswitch")))
}

/// Design decision 5, without the kernel: `kernel_choice` is the source address that it would take for
/// the default route.
pub(crate) fn facts(
    links: &HashMap<u32, Link>,
    addresses: &[Address],
    rules: &AddressRules,
    kernel_choice: &PerFamily<IpAddr>,
) -> NodeFacts {
    let usable: Vec<_> = addresses.iter().filter(|a| !a.unusable()).collect();
    let own: Vec<_> = usable.iter().filter(|a| of_node(a, links, rules)).collect();
    let published_addresses = match rules.publish_addresses.as_slice() {
        [] => own.iter().map(|a| a.addr).collect(),
        cidrs => usable
            .iter()
            .map(|a| a.addr)
            .filter(|a| cidrs.iter().any(|c| c.contains(a)) && publishable(a, rules))
            .collect(),
    };
    let mut primary = PerFamily::default();
    for family in Family::ALL {
        let candidates: Vec<IpAddr> = own
            .iter()
            .filter(|a| !a.deprecated())
            .map(|a| a.addr)
            .filter(|a| Family::of(a) == family)
            .collect();
        let chosen = kernel_choice.get(family).filter(|a| candidates.contains(a));
        primary.set(family, rules.node_ips.get(family).or(chosen).or(candidates.first()).copied());
    }
    // Link-local ones can be no endpoint's; they come and go with each pod's link, and would have everything looked at again. So it
    // is with kube-proxy's cluster IPs.
    let can_be_endpoint = |address: &&Address| {
        let link_local = matches!(address.addr, IpAddr::V6(a) if a.is_unicast_link_local());
        !link_local && links.get(&address.link).is_none_or(|link| link.name != KUBE_IPVS_LINK)
    };
    let all_addresses: BTreeSet<IpAddr> = addresses.iter().filter(can_be_endpoint).map(|a| a.addr).collect();
    let uplinks = uplinks(links, &own, &primary);
    let outside = outside(links, &own, &primary, &uplinks);
    NodeFacts { primary, published_addresses, all_addresses, uplinks, outside }
}

/// The default rule. A bridge of a CNI or of Docker is an interface like any other here: a pod that
/// asks its gateway (10.244.1.1 on cni0) for a published port gets it, as from Swarm; the address is
/// the node's in every respect, and a rule that left it out would have to guess which bridges are
/// "internal". Who doesn't want it lists the addresses.
fn of_node(address: &Address, links: &HashMap<u32, Link>, rules: &AddressRules) -> bool {
    let link_local = match address.addr {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(_) => false, // below: never publishable
    };
    let dummy = links.get(&address.link).is_some_and(Link::dummy);
    !link_local && !dummy && publishable(&address.addr, rules)
}

/// What no configuration can publish on: loopback has its own way through the program, a VIP is not the
/// node's, and IPVS can't answer from an IPv6 link-local address (EHOSTUNREACH).
fn publishable(addr: &IpAddr, rules: &AddressRules) -> bool {
    let link_local = match addr {
        IpAddr::V4(_) => false,
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    let vip = rules.ranges.iter().any(|(_, r)| r.contains(addr));
    !addr.is_loopback() && !addr.is_unspecified() && !link_local && !vip
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: Option<&str>) -> Link {
        Link { name: name.into(), kind: kind.map(str::to_owned), up: true, lower: None }
    }

    fn address(text: &str, link: u32, flags: AddressFlags) -> Address {
        let net: IpNet = text.parse().unwrap();
        Address { addr: net.addr(), prefix: net.prefix_len(), net: net.trunc(), link, flags }
    }

    fn node() -> (HashMap<u32, Link>, Vec<Address>) {
        let links = HashMap::from([
            (1, link("lo", None)),
            (2, link("eth0", None)),
            (3, link("cni0", Some("bridge"))),
            (4, link("nodelocaldns", Some("dummy"))),
            (5, link("kube-ipvs0", Some("veth"))),
        ]);
        let none = AddressFlags::empty();
        let addresses = vec![
            address("127.0.0.1/8", 1, none),
            address("::1/128", 1, none),
            address("10.0.0.1/32", 1, none), // a router's loopback address is the node's
            address("192.168.50.1/24", 2, none),
            address("192.168.50.2/24", 2, AddressFlags::Secondary),
            address("169.254.9.9/16", 2, none),
            address("10.200.3.4/32", 2, none), // in the VIP range
            address("fd00:50::1/64", 2, none),
            address("fd00:50::2/64", 2, AddressFlags::Tentative),
            address("fd00:50::3/64", 2, AddressFlags::Tentative | AddressFlags::Optimistic),
            address("fd00:50::4/64", 2, AddressFlags::Dadfailed),
            address("fd00:50::5/64", 2, AddressFlags::Deprecated),
            address("fe80::1/64", 2, none),
            address("10.244.1.1/24", 3, none),
            address("10.96.0.10/32", 4, none),
            address("10.96.0.1/32", 5, none),
        ];
        (links, addresses)
    }

    fn rules() -> AddressRules {
        AddressRules {
            ranges: PerFamily { v4: "10.200.0.0/16".parse().ok(), v6: "fd00:200::/112".parse().ok() },
            ..AddressRules::default()
        }
    }

    fn texts(set: &BTreeSet<IpAddr>) -> Vec<String> {
        set.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn default_rule_takes_the_nodes_own_addresses() {
        let (links, addresses) = node();
        let facts = facts(&links, &addresses, &rules(), &PerFamily::default());
        assert_eq!(
            texts(&facts.published_addresses),
            [
                "10.0.0.1",
                "10.244.1.1",
                "192.168.50.1",
                "192.168.50.2",
                "fd00:50::1",
                "fd00:50::3",
                "fd00:50::5"
            ]
        );
        assert_eq!(
            facts.all_addresses.len(),
            addresses.len()
                - addresses
                    .iter()
                    .filter(|a| matches!(a.addr, IpAddr::V6(ip) if ip.is_unicast_link_local()))
                    .count()
                - 1, // kube-ipvs0's
        );
    }

    #[test]
    fn a_list_takes_what_it_says_dummies_too_but_never_loopback_vips_or_v6_link_local() {
        let (links, addresses) = node();
        let mut rules = rules();
        rules.publish_addresses =
            ["10.96.0.0/16", "127.0.0.0/8", "10.200.0.0/16", "fe80::/10", "fd00:50::1/128"]
                .map(|c| c.parse().unwrap())
                .to_vec();
        let facts = facts(&links, &addresses, &rules, &PerFamily::default());
        assert_eq!(texts(&facts.published_addresses), ["10.96.0.1", "10.96.0.10", "fd00:50::1"]);
    }

    #[test]
    fn primary_is_configured_or_the_kernels_or_the_first() {
        let (links, addresses) = node();
        let some = |s: &str| Some(s.parse::<IpAddr>().unwrap());
        let of = |rules: &AddressRules, choice: Option<IpAddr>| {
            facts(&links, &addresses, rules, &PerFamily { v4: choice, v6: None }).primary.v4
        };
        assert_eq!(of(&rules(), some("192.168.50.2")), some("192.168.50.2"));
        // The kernel's choice is no address to use: a dummy's.
        assert_eq!(of(&rules(), some("10.96.0.10")), some("10.0.0.1"));
        assert_eq!(of(&rules(), None), some("10.0.0.1"));
        let mut configured = rules();
        configured.node_ips.v4 = some("203.0.113.7");
        assert_eq!(of(&configured, some("192.168.50.2")), some("203.0.113.7"));
    }

    #[test]
    fn uplinks_are_where_other_machines_are_and_not_pods() {
        let (mut links, addresses) = node();
        let names = |links: &HashMap<u32, Link>, rules: &AddressRules| {
            facts(links, &addresses, rules, &PerFamily::default()).uplinks.into_iter().collect::<Vec<_>>()
        };
        let named = |links: &HashMap<u32, Link>, index: u32| links[&index].name.clone();
        let eth = named(&links, 2);
        assert_eq!(names(&links, &rules()), std::slice::from_ref(&eth));
        // A veth pair is one where the node's own address is on it.
        links.get_mut(&2).unwrap().kind = Some("veth".into());
        assert_eq!(names(&links, &rules()), [eth]);
        // A name that stands for others in a rule is in none.
        links.get_mut(&2).unwrap().name = "eth+".into();
        assert_eq!(names(&links, &rules()), Vec::<String>::new());
    }

    #[test]
    fn no_pod_is_behind_the_links_that_are_outside() {
        let (mut links, mut addresses) = node();
        let eth = links[&2].name.clone();
        // Another link with an address, which pods may be behind all the same.
        links.insert(
            7,
            Link { lower: None, name: "antrea-gw0".into(), kind: Some("openvswitch".into()), up: true },
        );
        addresses.push(address("10.244.9.1/24", 7, AddressFlags::empty()));
        let of = |links: &HashMap<u32, Link>| facts(links, &addresses, &rules(), &PerFamily::default());
        assert!(of(&links).uplinks.contains("antrea-gw0"));
        assert_eq!(of(&links).outside, [eth.clone()].into());
        for (kind, is) in [("vlan", true), ("veth", true), ("bridge", false), ("openvswitch", false)] {
            links.get_mut(&2).unwrap().kind = Some(kind.into());
            assert_eq!(of(&links).outside.contains(&eth), is, "{kind}");
            assert!(of(&links).uplinks.contains(&eth), "{kind}");
        }
        // A VLAN on a bridge, on which there may be guests of this node.
        for (below, is) in
            [(Some("bridge"), false), (Some("openvswitch"), false), (None, true), (Some("bond"), true)]
        {
            links.insert(8, link("below", below));
            links.insert(9, Link { lower: Some(8), ..link("between", Some("vlan")) });
            let own = links.get_mut(&2).unwrap();
            (own.kind, own.lower) = (Some("vlan".into()), Some(9));
            assert_eq!(of(&links).outside.contains(&eth), is, "{below:?}");
        }
    }

    #[test]
    fn deprecated_is_never_primary() {
        let (links, _) = node();
        let only = [address("fd00:50::5/64", 2, AddressFlags::Deprecated)];
        let facts = facts(&links, &only, &rules(), &PerFamily::default());
        assert_eq!(facts.primary.v6, None);
        assert_eq!(facts.published_addresses.len(), 1);
    }
}
