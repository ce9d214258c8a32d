//! Conntrack entries of flows whose server is gone or has to go.
//!
//! A UDP flow has no end that conntrack could see: a client that keeps its source port keeps its entry,
//! and with it the translation to the old server. Entries are deleted when the server is.
//!
//! A connection by a published port is translated by conntrack alone after its first packet, since its destination
//! was changed before IPVS. Whether such connections are open, and ending them at the end of a drain, is asked here.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, ProtoTuple, Protocol, Tuple},
};
use nix::errno::Errno;

use super::netlink::{Conn, Failure, attrs, bytes_of, put_attr};
use crate::{
    dataplane::Error,
    model::{
        ids::Family,
        kernel::{PublishedFlows, RealServerKey, UdpFlows},
    },
};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*` (linux/netfilter/nfnetlink_conntrack.h).
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CT_DELETE: u16 = 0x102;
/// Attributes of an entry.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_PROTOINFO: u16 = 4;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
/// Filter of a dump (Linux 5.8; older kernels skip it): which parts of the given original tuple count.
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// `CTA_FILTER_F_CTA_IP_SRC`, `…_PROTO_NUM` and `…_PROTO_SRC_PORT` (net/netfilter/nf_conntrack_netlink.c).
const FILTER_IP_SRC: u32 = 1;
const FILTER_PROTO_NUM: u32 = 1 << 3;
const FILTER_SRC_PORT: u32 = 1 << 4;
/// `TCP_CONNTRACK_TIME_WAIT` and `TCP_CONNTRACK_CLOSE` (linux/netfilter/nf_conntrack_tcp.h): closed on both sides.
const TCP_ENDED: [u8; 2] = [7, 8];
/// `SCTP_CONNTRACK_CLOSED` and `SCTP_CONNTRACK_SHUTDOWN_ACK_SENT` (linux/netfilter/nf_conntrack_sctp.h).
const SCTP_ENDED: [u8; 2] = [1, 7];
/// Attributes of a tuple.
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
/// `CTA_IP_V4_SRC`, `CTA_IP_V6_SRC` and `CTA_PROTO_SRC_PORT`; then the same with `_DST`.
const SOURCE: [u16; 3] = [1, 3, 2];
const DESTINATION: [u16; 3] = [2, 4, 3];
/// `struct nfgenmsg`.
const HEADER_LEN: usize = 4;

/// Deletes the UDP entries that lead from one of the given addresses to the server; its port 0 stands for any. Counts the entries deleted. `writes` counts commands.
///
/// The dump is read as a stream of raw bytes: an entry that doesn't match costs no allocation.
pub(crate) fn forget_udp(conn: &mut Conn, flows: &UdpFlows, writes: &mut u64) -> Result<usize, Error> {
    let mut deleted = 0;
    for family in Family::ALL.into_iter().filter(|f| flows.keys().any(|r| Family::of(&r.addr) == *f)) {
        let mut requests = Vec::new();
        dump(conn, &dump_request(family, true), family, &mut |kind, body| {
            requests.extend(delete_request(kind, body, flows));
        })?;
        deleted += delete(conn, &requests, writes)?;
    }
    Ok(deleted)
}

/// Reads the entries that a kernel gives for a filtered request, or all of the family where it can't filter.
fn dump(
    conn: &mut Conn,
    filtered: &[u8],
    family: Family,
    each: &mut dyn FnMut(u16, &[u8]),
) -> Result<(), Error> {
    let result = match conn.ask(CT_GET, NLM_F_DUMP, filtered, each) {
        // A kernel that knows the attribute, but not this filter. Nothing was told before the error.
        Err(f) if matches!(f.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP)) => {
            conn.ask(CT_GET, NLM_F_DUMP, &dump_request(family, false), each)
        }
        other => other,
    };
    match result {
        // What was missed in a table that changes this fast is new, and new flows know the new servers.
        Ok(()) | Err(Failure::Interrupted) => Ok(()),
        Err(f) => Err(explain(f, "read conntrack entries")),
    }
}

/// Sends delete requests and counts the entries that were there.
fn delete(conn: &mut Conn, requests: &[Vec<u8>], writes: &mut u64) -> Result<usize, Error> {
    let mut deleted = 0;
    for request in requests {
        *writes += 1;
        match conn.tell(CT_DELETE, 0, request) {
            Ok(()) => deleted += 1,
            // Timed out since, or the id is another flow's by now.
            Err(f) if f.errno() == Some(Errno::ENOENT) => {}
            Err(f) => return Err(explain(f, "delete conntrack entries")),
        }
    }
    Ok(deleted)
}

fn header(family: Family) -> NetfilterHeader {
    let family = match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    NetfilterHeader::new(family, 0, 0)
}

/// A dump of a family's entries, of UDP alone where the kernel can filter.
pub(super) fn dump_request(family: Family, filter: bool) -> Vec<u8> {
    let mut request = bytes_of(&header(family));
    if filter {
        let udp = Tuple::Proto(vec![ProtoTuple::Protocol(Protocol::Udp)]);
        request.extend(bytes_of(&ConntrackMessage::Get(vec![ConntrackAttribute::CtaTupleOrig(vec![udp])])));
        let mut flags = Vec::new();
        put_attr(&mut flags, CTA_FILTER_ORIG_FLAGS, &FILTER_PROTO_NUM.to_ne_bytes());
        put_attr(&mut request, CTA_FILTER | netlink_packet_core::NLA_F_NESTED, &flags);
    }
    request
}

/// The request that deletes this entry, if it is one of these flows. One straight to the server, or by another program's
/// address for it, is not ours.
fn delete_request(kind: u16, body: &[u8], flows: &UdpFlows) -> Option<Vec<u8>> {
    if kind != CT_NEW {
        return None;
    }
    let (head, entry) = body.split_at_checked(HEADER_LEN)?;
    let tuple = |which| attrs(entry).find(|(kind, _)| *kind == which).map(|(_, value)| value);
    let (protocol, addr, port) = end_of(tuple(CTA_TUPLE_REPLY)?, SOURCE)?;
    let by = |port| flows.get(&RealServerKey { addr, port });
    if protocol != u8::from(Protocol::Udp) || (by(port).is_none() && by(0).is_none()) {
        return None;
    }
    let (_, to, to_port) = end_of(tuple(CTA_TUPLE_ORIG)?, DESTINATION)?;
    let ours = [by(port), by(0)].into_iter().flatten().any(|by| by.contains(&(to, to_port)));
    ours.then(|| deletion(head, entry))
}

/// The request that deletes an entry: its original tuple, id and zone, verbatim. The id makes sure that no newer
/// flow with the same tuple is hit.
fn deletion(head: &[u8], entry: &[u8]) -> Vec<u8> {
    let mut request = head.to_vec();
    for (kind, value) in attrs(entry) {
        match kind {
            CTA_TUPLE_ORIG => put_attr(&mut request, kind | netlink_packet_core::NLA_F_NESTED, value),
            CTA_ID | CTA_ZONE => put_attr(&mut request, kind, value),
            _ => {}
        }
    }
    request
}

/// Which of these have a connection that is open.
pub(crate) fn open_flows(conn: &mut Conn, all: &[PublishedFlows]) -> Result<Vec<bool>, Error> {
    let mut open = vec![false; all.len()];
    each_flow(conn, all, &mut |at, entry, _| open[at] |= !has_ended(entry))?;
    Ok(open)
}

/// So many servers' connections are asked for one by one; of more, the whole table is read once.
const ASKED_SINGLY: usize = 8;

/// Deletes the entries of these connections and counts them. Their next packet is one of an unknown connection.
pub(crate) fn cut_flows(conn: &mut Conn, all: &[PublishedFlows], writes: &mut u64) -> Result<usize, Error> {
    // An entry that is one of several flows is deleted once.
    let mut requests = BTreeSet::new();
    each_flow(conn, all, &mut |_, entry, head| {
        requests.insert(deletion(head, entry));
    })?;
    delete(conn, &requests.into_iter().collect::<Vec<_>>(), writes)
}

/// Takes an entry: which of the connections it is one of, its attributes, and its message's header.
type Taker<'a> = &'a mut dyn FnMut(usize, &[u8], &[u8]);

/// Gives each entry of these connections.
fn each_flow(conn: &mut Conn, all: &[PublishedFlows], f: Taker<'_>) -> Result<(), Error> {
    if all.len() <= ASKED_SINGLY {
        for (at, flows) in all.iter().enumerate() {
            dump_flows(conn, flows, &mut |entry, head| f(at, entry, head))?;
        }
        return Ok(());
    }
    let mut by_server: HashMap<IpAddr, Vec<usize>> = HashMap::new();
    for (at, flows) in all.iter().enumerate() {
        by_server.entry(flows.real.addr).or_default().push(at);
    }
    for family in Family::ALL.into_iter().filter(|f| by_server.keys().any(|addr| Family::of(addr) == *f)) {
        let request = dump_request(family, false);
        dump(conn, &request, family, &mut |kind, body| {
            let Some((head, entry)) = body.split_at_checked(HEADER_LEN).filter(|_| kind == CT_NEW) else {
                return;
            };
            let reply = attrs(entry).find(|(kind, _)| *kind == CTA_TUPLE_REPLY).map(|(_, value)| value);
            let server = reply.and_then(|reply| end_of(reply, SOURCE)).map(|(_, addr, _)| addr);
            for &at in server.and_then(|server| by_server.get(&server)).into_iter().flatten() {
                if is_flow(entry, &all[at]) {
                    f(at, entry, head);
                }
            }
        })?;
    }
    Ok(())
}

/// Goes through the entries of these connections: attributes, and the message's header.
fn dump_flows(conn: &mut Conn, flows: &PublishedFlows, f: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Error> {
    let mut each = |kind: u16, body: &[u8]| {
        if kind == CT_NEW
            && let Some((head, entry)) = body.split_at_checked(HEADER_LEN)
            && is_flow(entry, flows)
        {
            f(entry, head);
        }
    };
    dump(conn, &flows_request(flows), Family::of(&flows.real.addr), &mut each)
}

/// A dump of the entries that this server answers, where the kernel can filter.
fn flows_request(flows: &PublishedFlows) -> Vec<u8> {
    let real = flows.real;
    let (mut ip, mut proto, mut tuple) = (Vec::new(), Vec::new(), Vec::new());
    match real.addr {
        IpAddr::V4(addr) => put_attr(&mut ip, SOURCE[0], &addr.octets()),
        IpAddr::V6(addr) => put_attr(&mut ip, SOURCE[1], &addr.octets()),
    }
    put_attr(&mut proto, CTA_PROTO_NUM, &[flows.protocol.number()]);
    let mut parts = FILTER_PROTO_NUM;
    // `ctnetlink_filter_match_tuple` of Linux 6.1 leaves out the IPv6 addresses that match, and gives the others.
    if real.addr.is_ipv4() {
        parts |= FILTER_IP_SRC;
    }
    if real.port != 0 {
        put_attr(&mut proto, SOURCE[2], &real.port.to_be_bytes());
        parts |= FILTER_SRC_PORT;
    }
    let nested = netlink_packet_core::NLA_F_NESTED;
    put_attr(&mut tuple, CTA_TUPLE_IP | nested, &ip);
    put_attr(&mut tuple, CTA_TUPLE_PROTO | nested, &proto);
    let mut request = bytes_of(&header(Family::of(&real.addr)));
    put_attr(&mut request, CTA_TUPLE_REPLY | nested, &tuple);
    let mut flags = Vec::new();
    put_attr(&mut flags, CTA_FILTER_REPLY_FLAGS, &parts.to_ne_bytes());
    put_attr(&mut request, CTA_FILTER | nested, &flags);
    request
}

fn is_flow(entry: &[u8], flows: &PublishedFlows) -> bool {
    let tuple = |which| attrs(entry).find(|(kind, _)| *kind == which).map(|(_, value)| value);
    let end = |which, end| end_of(tuple(which)?, end);
    let (Some((protocol, addr, port)), Some((_, to, to_port))) =
        (end(CTA_TUPLE_REPLY, SOURCE), end(CTA_TUPLE_ORIG, DESTINATION))
    else {
        return false;
    };
    protocol == flows.protocol.number()
        && addr == flows.real.addr
        && (port == flows.real.port || flows.real.port == 0)
        && flows.to.contains(&(to, to_port))
}

/// Whether a TCP or SCTP connection is over, as far as conntrack knows: its entry stays for a while.
fn has_ended(entry: &[u8]) -> bool {
    let info = attrs(entry).find(|(kind, _)| *kind == CTA_PROTOINFO).map(|(_, value)| value);
    // `CTA_PROTOINFO_TCP` and `CTA_PROTOINFO_SCTP`; the state is the first attribute of either.
    let state = |of: u16| {
        let (_, value) = attrs(info?).find(|(kind, _)| *kind == of)?;
        attrs(value).find(|(kind, _)| *kind == 1)?.1.first().copied()
    };
    state(1).is_some_and(|s| TCP_ENDED.contains(&s)) || state(3).is_some_and(|s| SCTP_ENDED.contains(&s))
}

/// Protocol, address and port of one end of a tuple.
fn end_of(tuple: &[u8], [v4, v6, port_kind]: [u16; 3]) -> Option<(u8, IpAddr, u16)> {
    let (mut protocol, mut addr, mut port) = (None, None, None);
    for (kind, value) in attrs(tuple) {
        match kind {
            CTA_TUPLE_IP => {
                for (kind, value) in attrs(value) {
                    match kind {
                        k if k == v4 => addr = value.first_chunk::<4>().map(|a| IpAddr::from(*a)),
                        k if k == v6 => addr = value.first_chunk::<16>().map(|a| IpAddr::from(*a)),
                        _ => {}
                    }
                }
            }
            CTA_TUPLE_PROTO => {
                for (kind, value) in attrs(value) {
                    match kind {
                        CTA_PROTO_NUM => protocol = value.first().copied(),
                        k if k == port_kind => port = value.first_chunk().map(|p| u16::from_be_bytes(*p)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some((protocol?, addr?, port?))
}

/// nfnetlink answers EINVAL or EOPNOTSUPP where the conntrack subsystem is missing.
fn explain(failure: Failure, object: &str) -> Error {
    match failure.errno() {
        Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT) => Error::MissingFeature {
            feature: "conntrack netlink".into(),
            advice: "load the module nf_conntrack_netlink".into(),
        },
        _ => failure.about(object),
    }
}

/// Body of a conntrack message with one UDP entry, for tests: client → `to`, answered by `real`.
#[cfg(test)]
pub(crate) fn udp_entry(
    client: std::net::SocketAddr,
    to: std::net::SocketAddr,
    real: std::net::SocketAddr,
) -> Vec<u8> {
    use netlink_packet_netfilter::conntrack::IPTuple;
    let tuple = |src: std::net::SocketAddr, dst: std::net::SocketAddr| {
        vec![
            Tuple::Ip(vec![IPTuple::SourceAddress(src.ip()), IPTuple::DestinationAddress(dst.ip())]),
            Tuple::Proto(vec![
                ProtoTuple::Protocol(Protocol::Udp),
                ProtoTuple::SourcePort(src.port()),
                ProtoTuple::DestinationPort(dst.port()),
            ]),
        ]
    };
    let mut body = bytes_of(&header(Family::of(&client.ip())));
    body.extend(bytes_of(&ConntrackMessage::New(vec![
        ConntrackAttribute::CtaTupleOrig(tuple(client, to)),
        ConntrackAttribute::CtaTupleReply(tuple(real, client)),
        ConntrackAttribute::CtaTimeout(600),
    ])));
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flows to these servers by one address.
    fn flows(list: &[&str], to: &str) -> UdpFlows {
        let at = |text: &str| text.parse::<std::net::SocketAddr>().unwrap();
        let by = [(at(to).ip(), at(to).port())];
        list.iter().map(|s| (RealServerKey { addr: at(s).ip(), port: at(s).port() }, by.into())).collect()
    }

    #[test]
    fn only_entries_answered_by_a_real_server_match() {
        let entry = udp_entry(
            "10.244.1.11:40000".parse().unwrap(),
            "10.200.0.5:53".parse().unwrap(),
            "10.244.2.12:5353".parse().unwrap(),
        );
        let by = "10.200.0.5:53";
        let request = |list: &[&str]| delete_request(CT_NEW, &entry, &flows(list, by));
        assert!(request(&["10.244.2.12:5353"]).is_some());
        assert!(request(&["10.244.2.12:0"]).is_some());
        assert!(request(&["10.244.2.12:53"]).is_none());
        assert!(request(&["10.200.0.5:53"]).is_none());
        assert!(request(&["10.244.1.11:40000"]).is_none());
        // Another program, or another service of ours, leads to the same server.
        assert!(delete_request(CT_NEW, &entry, &flows(&["10.244.2.12:5353"], "10.96.0.10:53")).is_none());
        let direct = udp_entry(
            "10.244.1.11:40000".parse().unwrap(),
            "10.244.2.12:5353".parse().unwrap(),
            "10.244.2.12:5353".parse().unwrap(),
        );
        assert!(delete_request(CT_NEW, &direct, &flows(&["10.244.2.12:0"], by)).is_none());
        // The request holds the original tuple and nothing else that could be wrong.
        let wanted = request(&["10.244.2.12:5353"]).unwrap();
        let kinds: Vec<_> = attrs(&wanted[HEADER_LEN..]).map(|(k, _)| k).collect();
        assert_eq!(kinds, [CTA_TUPLE_ORIG]);
        // Neither other messages nor cut ones.
        assert!(delete_request(CT_DELETE, &entry, &flows(&["10.244.2.12:0"], by)).is_none());
        assert!(delete_request(CT_NEW, &entry[..20], &flows(&["10.244.2.12:0"], by)).is_none());
    }
}
