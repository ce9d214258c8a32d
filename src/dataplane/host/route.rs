//! The AnyIP route of each VIP range, and routes of others that overlap it.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Parseable};
use netlink_packet_route::{
    AddressFamily,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol, RouteScope,
        RouteType, RouteVia,
    },
};
use nix::errno::Errno;

use super::{
    address::{Address, Link},
    netlink::{Conn, Failure, bytes_of},
};
use crate::{
    dataplane::Error,
    model::{ids::Family, kernel::VipRoute},
};

/// The routing protocol number in our routes (`proto 177` in `ip route`): the mark of ownership.
///
/// Numbers are not registered anywhere. 177 is named neither in linux/rtnetlink.h nor in iproute2's
/// rt_protos (highest of the latter: 192; FRR uses 186-198, Calico 80, openr 99).
pub const ROUTE_PROTOCOL: u8 = 177;

/// `RTM_*` (linux/rtnetlink.h).
pub(crate) const RTM_NEWROUTE: u16 = 24;
pub(crate) const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
/// `RT_TABLE_LOCAL`.
const TABLE_LOCAL: u8 = 255;
/// The index of `lo`, the same in every network namespace since Linux 2.6.35 or so
/// (`LOOPBACK_IFINDEX` in the kernel).
const LOOPBACK_INDEX: u32 = 1;
/// `IP6_RT_PRIO_USER`: the metric that the kernel gives an IPv6 route without one. Written out, because
/// replacing and deleting go by metric.
const V6_METRIC: u32 = 1024;

/// A route as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Route {
    pub(crate) dst: IpNet,
    pub(crate) table: u32,
    pub(crate) protocol: u8,
    pub(crate) kind: RouteType,
    pub(crate) source: Option<IpAddr>,
    pub(crate) link: Option<u32>,
    hops: Vec<(Option<IpAddr>, Option<u32>)>,
}

impl Route {
    /// `None` for what isn't an IP route, and for cached ones.
    pub(crate) fn parse(body: &[u8]) -> Option<Self> {
        let message = RouteMessage::parse(body).ok()?;
        let header = &message.header;
        let any: IpAddr = match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let (mut dst, mut table, mut source) = (any, u32::from(header.table), None);
        let (mut link, mut via, mut hops) = (None, None, Vec::new());
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(a) => dst = ip(a)?,
                RouteAttribute::PrefSource(a) => source = ip(a),
                RouteAttribute::Gateway(a) => via = ip(a),
                RouteAttribute::Via(v) => via = ip_via(v),
                RouteAttribute::Oif(index) => link = Some(*index),
                RouteAttribute::Table(t) => table = *t,
                RouteAttribute::MultiPath(list) => hops = list.iter().map(hop).collect(),
                _ => {}
            }
        }
        if hops.is_empty() {
            hops.push((via, link));
        }
        let dst = IpNet::new(dst, header.destination_prefix_length).ok()?;
        Some(Self { dst, table, protocol: header.protocol.into(), kind: header.kind, source, link, hops })
    }

    /// Whether it is the AnyIP route of this range, made by us.
    pub(crate) fn is_ours(&self, range: &IpNet) -> bool {
        self.protocol == ROUTE_PROTOCOL && self.takes_place_of(range)
    }

    /// Whether it stands where our route of this range belongs.
    fn takes_place_of(&self, range: &IpNet) -> bool {
        self.table == u32::from(TABLE_LOCAL) && self.dst == range.trunc()
    }

    /// As `ip route` would print it, shortened.
    pub(crate) fn describe(&self, links: &HashMap<u32, Link>) -> String {
        let mut text = match self.kind {
            RouteType::Unicast => format!("route {}", self.dst),
            kind => format!("route {} {}", kind_name(kind), self.dst),
        };
        for (via, link) in &self.hops {
            if let Some(via) = via {
                text.push_str(&format!(" via {via}"));
            }
            if let Some(index) = link {
                let name = links.get(index).map_or_else(|| index.to_string(), |l| l.name.clone());
                text.push_str(&format!(" dev {name}"));
            }
        }
        match self.table {
            254 => text.push_str(" table main"),
            255 => text.push_str(" table local"),
            253 => text.push_str(" table default"),
            n => text.push_str(&format!(" table {n}")),
        }
        text
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn ip_via(via: &RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(a) => Some((*a).into()),
        RouteVia::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn hop(hop: &RouteNextHop) -> (Option<IpAddr>, Option<u32>) {
    let via = hop.attributes.iter().find_map(|a| match a {
        RouteAttribute::Gateway(g) => ip(g),
        RouteAttribute::Via(v) => ip_via(v),
        _ => None,
    });
    (via, Some(hop.interface_index))
}

fn kind_name(kind: RouteType) -> String {
    match kind {
        RouteType::Local => "local".into(),
        RouteType::Broadcast => "broadcast".into(),
        RouteType::Anycast => "anycast".into(),
        RouteType::Multicast => "multicast".into(),
        RouteType::BlackHole => "blackhole".into(),
        RouteType::Unreachable => "unreachable".into(),
        RouteType::Prohibit => "prohibit".into(),
        RouteType::Throw => "throw".into(),
        other => format!("type {}", u8::from(other)),
    }
}

/// All routes of a family: of one table, or of every one (0).
fn dump(conn: &mut Conn, family: Family, table: u8) -> Result<Vec<Route>, Error> {
    let mut request = RouteMessage::default();
    request.header.address_family = address_family(family);
    request.header.table = table;
    let routes = conn
        .dump(RTM_GETROUTE, &bytes_of(&request), |kind, body| {
            (kind == RTM_NEWROUTE).then(|| Route::parse(body)).flatten()
        })
        .or_else(|f| match f.errno() {
            // With strict checking: a table that nobody made yet.
            Some(Errno::ENOENT) => Ok(Vec::new()),
            _ => Err(f.about(format!("read {family} routes"))),
        })?;
    // Kernels before 4.20 don't filter.
    Ok(routes.into_iter().filter(|r| table == 0 || r.table == u32::from(table)).collect())
}

pub(crate) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Ranges of all routes in table local that are ours by their protocol.
pub(crate) fn our_ranges(conn: &mut Conn) -> Result<BTreeSet<IpNet>, Error> {
    let mut out = BTreeSet::new();
    for family in Family::ALL {
        let ours = |route: &Route| route.protocol == ROUTE_PROTOCOL && route.kind == RouteType::Local;
        out.extend(dump(conn, family, TABLE_LOCAL)?.into_iter().filter(ours).map(|route| route.dst));
    }
    Ok(out)
}

/// Our route of this range. Without a source (IPv6 loses it with the address), the source is `::`.
pub(crate) fn find_ours(conn: &mut Conn, range: &IpNet) -> Result<Option<VipRoute>, Error> {
    let family = Family::of(&range.addr());
    let ours = dump(conn, family, TABLE_LOCAL)?.into_iter().find(|r| r.is_ours(range));
    Ok(ours.map(|r| VipRoute { range: range.trunc(), source: r.source.unwrap_or(unspecified(family)) }))
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Makes the route be there with this source. Returns whether anything was written.
pub(crate) fn put(conn: &mut Conn, route: &VipRoute) -> Result<bool, Error> {
    let family = Family::of(&route.range.addr());
    let object = format!("route local {} dev lo src {}", route.range.trunc(), route.source);
    let there: Vec<_> =
        dump(conn, family, TABLE_LOCAL)?.into_iter().filter(|r| r.takes_place_of(&route.range)).collect();
    if let Some(foreign) = there.iter().find(|r| r.protocol != ROUTE_PROTOCOL) {
        return Err(Error::Failed {
            object,
            reason: format!(
                "another program has this route in table local already (proto {}, not {ROUTE_PROTOCOL}); \
                 remove it or choose another --vip-cidr",
                foreign.protocol
            ),
        });
    }
    let flags = match there.first() {
        Some(ours) if ours.source == Some(route.source) => return Ok(false),
        Some(_) => NLM_F_CREATE | NLM_F_REPLACE,
        None => NLM_F_CREATE | NLM_F_EXCL,
    };
    match conn.tell(RTM_NEWROUTE, flags, &bytes_of(&message(&route.range, Some(route.source)))) {
        Ok(()) => Ok(true),
        Err(f) => Err(explain(f, object, route)),
    }
}

/// Removes our route of this range. Returns whether anything was written.
pub(crate) fn del(conn: &mut Conn, range: &IpNet) -> Result<bool, Error> {
    if find_ours(conn, range)?.is_none() {
        return Ok(false);
    }
    match conn.tell(RTM_DELROUTE, 0, &bytes_of(&message(range, None))) {
        Ok(()) => Ok(true),
        Err(f) if f.errno() == Some(Errno::ESRCH) => Ok(false),
        Err(f) => Err(f.about(format!("delete route local {range} dev lo"))),
    }
}

fn message(range: &IpNet, source: Option<IpAddr>) -> RouteMessage {
    let range = range.trunc();
    let family = Family::of(&range.addr());
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: address_family(family),
        destination_prefix_length: range.prefix_len(),
        table: TABLE_LOCAL,
        protocol: RouteProtocol::Other(ROUTE_PROTOCOL),
        // IPv6 has no scopes of routes and ignores it.
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes =
        vec![RouteAttribute::Destination(range.addr().into()), RouteAttribute::Oif(LOOPBACK_INDEX)];
    if family == Family::V6 {
        message.attributes.push(RouteAttribute::Priority(V6_METRIC));
    }
    message.attributes.extend(source.map(|s| RouteAttribute::PrefSource(s.into())));
    message
}

fn explain(failure: Failure, object: String, route: &VipRoute) -> Error {
    let because = match failure.errno() {
        Some(Errno::ENETDOWN) => "the link lo is down; set it up: ip link set lo up".to_owned(),
        Some(Errno::EINVAL) => {
            format!("the kernel refused it; is {} an address of this node?", route.source)
        }
        // Missing rights are EPERM (`rtnetlink_rcv_msg`).
        Some(Errno::EACCES) if route.range.addr().is_ipv6() => {
            "IPv6 is switched off here; switch it on (sysctl -w \
            net.ipv6.conf.lo.disable_ipv6=0, and for the node's links), or give no --vip-cidr of IPv6"
                .to_owned()
        }
        Some(Errno::EEXIST) => "another program has added this route meanwhile".to_owned(),
        _ => return failure.about(object),
    };
    Error::Failed { object, reason: because }
}

/// The source address of the kernel's own choice for traffic that takes the default route; `None`
/// where there is none.
pub(crate) fn default_source(conn: &mut Conn, family: Family) -> Option<IpAddr> {
    // Documentation addresses (RFC 5737, RFC 3849): routed nowhere in particular, so by the default
    // route. Nothing is sent to them.
    let probe: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, 1).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    let mut request = RouteMessage::default();
    request.header.address_family = address_family(family);
    request.header.destination_prefix_length = if probe.is_ipv4() { 32 } else { 128 };
    request.attributes = vec![RouteAttribute::Destination(probe.into())];
    let mut source = None;
    let _unreachable = conn.ask(RTM_GETROUTE, 0, &bytes_of(&request), &mut |kind, body| {
        if kind == RTM_NEWROUTE {
            source = Route::parse(body).filter(|r| r.kind == RouteType::Unicast).and_then(|r| r.source);
        }
    });
    source
}

/// Links (indexes) of IPv6 default routes that came by router advertisement.
pub(crate) fn ra_default_links(conn: &mut Conn) -> Result<Vec<u32>, Error> {
    // Table main is where the kernel puts them.
    let routes = dump(conn, Family::V6, RouteHeader::RT_TABLE_MAIN)?;
    let mut links: Vec<u32> = routes
        .iter()
        .filter(|r| r.dst.prefix_len() == 0 && r.protocol == u8::from(RouteProtocol::Ra))
        .flat_map(|r| r.hops.iter().filter_map(|(_, link)| *link))
        .collect();
    links.sort_unstable();
    links.dedup();
    Ok(links)
}

/// Subnets that are on-link on this device in table main.
pub(crate) fn on_link(conn: &mut Conn, family: Family) -> Result<Vec<(u32, IpNet)>, Error> {
    let routes = dump(conn, family, RouteHeader::RT_TABLE_MAIN)?;
    let direct = routes.iter().filter(|r| r.kind == RouteType::Unicast && r.dst.prefix_len() > 0);
    Ok(direct
        .flat_map(|r| r.hops.iter().map(move |hop| (hop, r.dst)))
        .filter_map(|((via, link), dst)| via.is_none().then_some(((*link)?, dst)))
        .collect())
}

/// Whether two networks of one family share an address.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// What others have in this range, as lines for people: addresses first, then routes.
pub(crate) fn overlaps(
    conn: &mut Conn,
    range: &IpNet,
    links: &HashMap<u32, Link>,
    addresses: &[Address],
) -> Result<Vec<String>, Error> {
    let inside: Vec<_> = addresses.iter().filter(|a| overlap(&a.subnet(), range)).collect();
    let mut lines: Vec<String> =
        inside.iter().map(|a| format!("address {}/{} on {}", a.addr, a.prefix, a.link_name(links))).collect();
    let family = Family::of(&range.addr());
    for route in dump(conn, family, 0)? {
        let default = route.dst.prefix_len() == 0;
        if default || route.is_ours(range) || !overlap(&route.dst, range) {
            continue;
        }
        // The kernel makes these of an address, which has its line already.
        let of_address = route.protocol == u8::from(RouteProtocol::Kernel)
            && inside.iter().any(|a| overlap(&a.subnet(), &route.dst));
        if !of_address {
            lines.push(route.describe(links));
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(s: &str) -> IpNet {
        s.parse().unwrap()
    }

    #[test]
    fn our_message_reads_back_as_our_route() {
        for (range, source) in [("10.200.0.0/16", "192.168.50.1"), ("fd00:200::/112", "fd00:50::1")] {
            let source: IpAddr = source.parse().unwrap();
            let route = Route::parse(&bytes_of(&message(&net(range), Some(source)))).unwrap();
            assert!(route.is_ours(&net(range)));
            assert!(!route.is_ours(&net("10.201.0.0/16")));
            assert_eq!(route.source, Some(source));
            assert_eq!(route.link, Some(LOOPBACK_INDEX));
            assert!(!Route { protocol: 3, ..route.clone() }.is_ours(&net(range)));
            assert!(!Route { table: 254, ..route }.is_ours(&net(range)));
        }
    }

    #[test]
    fn routes_read_like_ip_route() {
        let links = HashMap::from([(4, Link { name: "eth0".into(), kind: None, up: true, lower: None })]);
        let mut route = Route {
            dst: net("10.200.0.0/24"),
            table: 254,
            protocol: 3,
            kind: RouteType::Unicast,
            source: None,
            link: Some(4),
            hops: vec![(Some("192.168.50.9".parse().unwrap()), Some(4))],
        };
        assert_eq!(route.describe(&links), "route 10.200.0.0/24 via 192.168.50.9 dev eth0 table main");
        route.kind = RouteType::BlackHole;
        route.hops = vec![(None, None)];
        route.table = 77;
        assert_eq!(route.describe(&links), "route blackhole 10.200.0.0/24 table 77");
    }

    #[test]
    fn networks_overlap_when_one_holds_the_other() {
        assert!(overlap(&net("10.0.0.0/8"), &net("10.200.0.0/16")));
        assert!(overlap(&net("10.200.3.4/32"), &net("10.200.0.0/16")));
        assert!(!overlap(&net("10.201.0.0/16"), &net("10.200.0.0/16")));
        assert!(!overlap(&net("::/8"), &net("10.200.0.0/16")));
    }
}
