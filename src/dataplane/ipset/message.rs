//! What ipset's netlink messages look like (`linux/netfilter/ipset/ip_set.h`), without a socket.

use std::{fmt, net::IpAddr};

use crate::{
    dataplane::nfnl::{Attributes, NFPROTO_IPV4, NFPROTO_IPV6, Request, attribute, attributes, be32, text},
    model::{
        ids::{Family, Protocol},
        kernel::Target,
    },
};

const NFNL_SUBSYS_IPSET: u8 = 6;
/// Every kernel since 2.6.39 takes 6; 7 only added commands that we don't use.
const PROTOCOL: u8 = 6;

const CMD_CREATE: u8 = 2;
const CMD_DESTROY: u8 = 3;
const CMD_SWAP: u8 = 6;
const CMD_LIST: u8 = 7;
const CMD_ADD: u8 = 9;
const CMD_DEL: u8 = 10;
const CMD_TYPE: u8 = 13;

const ATTR_PROTOCOL: u16 = 1;
const ATTR_SETNAME: u16 = 2;
const ATTR_TYPENAME: u16 = 3;
const ATTR_SETNAME2: u16 = 3;
const ATTR_REVISION: u16 = 4;
const ATTR_FAMILY: u16 = 5;
const ATTR_FLAGS: u16 = 6;
const ATTR_DATA: u16 = 7;
const ATTR_ADT: u16 = 8;
const ATTR_LINENO: u16 = 9;

const ATTR_IP: u16 = 1;
const ATTR_CIDR: u16 = 3;
const ATTR_PORT: u16 = 4;
const ATTR_PROTO: u16 = 7;
const ATTR_CADT_FLAGS: u16 = 8;
const ATTR_MAXELEM: u16 = 19;
const ATTR_IP2: u16 = 20;
const ATTR_CIDR2: u16 = 21;
const ATTR_SKBMARK: u16 = 27;
const ATTR_ELEMENTS: u16 = 24;
const ATTR_REFERENCES: u16 = 25;

const ATTR_IPADDR_IPV4: u16 = 1;
const ATTR_IPADDR_IPV6: u16 = 2;

const FLAG_LIST_HEADER: u32 = 1 << 2;
const FLAG_WITH_SKBINFO: u32 = 1 << 6;

/// How many entries a set may hold: the most that the kernel's number can say. What a set takes of memory goes by what is in it.
pub const MAX_ELEMENTS: u32 = u32::MAX;

/// The set types that we use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetType {
    /// `hash:ip,port`: address, protocol and port; with a mark where `marks` says so.
    IpPort,
    /// `hash:ip`: an address.
    Ip,
    /// `hash:net,net`: a pair of addresses.
    Pair,
}

impl SetType {
    /// Its name in the kernel.
    pub fn name(self) -> &'static str {
        match self {
            Self::IpPort => "hash:ip,port",
            Self::Ip => "hash:ip",
            Self::Pair => "hash:net,net",
        }
    }

    /// The first revision with `skbinfo` (Linux 3.18), which every later kernel still takes.
    fn revision(self) -> u8 {
        match self {
            Self::IpPort => 5,
            Self::Ip => 4,
            Self::Pair => 2,
        }
    }
}

/// A set as we create it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetSpec {
    /// Its name, at most 31 bytes.
    pub name: String,
    /// Its type.
    pub kind: SetType,
    /// Its address family.
    pub family: Family,
    /// Whether entries carry a mark (`skbinfo`).
    pub marks: bool,
    /// How many entries it may have: [`MAX_ELEMENTS`].
    pub max_elements: u32,
}

/// What an entry matches.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Key {
    /// An entry of a `hash:ip,port`.
    IpPort(Target),
    /// An entry of a `hash:ip`.
    Ip(IpAddr),
    /// An entry of a `hash:net,net` that holds two single addresses.
    Pair(IpAddr, IpAddr),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IpPort(target) => target.fmt(f),
            Self::Ip(addr) => addr.fmt(f),
            Self::Pair(a, b) => write!(f, "{a},{b}"),
        }
    }
}

/// `skbmark VALUE/MASK`: a packet that meets the entry gets `(mark & !MASK) ^ VALUE`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SkbMark {
    /// The bits it gets.
    pub value: u32,
    /// The bits that it loses.
    pub mask: u32,
}

/// A set's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What it matches.
    pub key: Key,
    /// The mark that it gives.
    pub mark: Option<SkbMark>,
}

/// A set as the kernel lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Its name.
    pub name: String,
    /// Its type.
    pub type_name: String,
    /// `NFPROTO_*`.
    pub family: u8,
    /// Its type's revision.
    pub revision: u8,
    /// How many entries it has.
    pub elements: u32,
    /// How many rules and sets refer to it.
    pub references: u32,
    /// How many entries it may have.
    pub max_elements: u32,
    /// Whether entries may carry a mark.
    pub marks: bool,
}

impl Header {
    /// Whether it is what `spec` would create, or as good.
    pub fn fits(&self, spec: &SetSpec) -> bool {
        self.swaps_with(spec) && self.marks == spec.marks && self.max_elements >= spec.max_elements
    }

    /// Whether it can be swapped with what `spec` would create (`ip_set_swap`: type features and family are the same).
    pub fn swaps_with(&self, spec: &SetSpec) -> bool {
        self.type_name == spec.kind.name() && self.family == family_number(spec.family)
    }
}

/// Adding or deleting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Adds, or replaces the mark.
    Add,
    /// Deletes; a missing entry is no error.
    Del,
}

fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

fn request(command: u8, family: u8, fill: impl FnOnce(&mut Attributes)) -> Request {
    let mut attributes = Attributes::default();
    attributes.put(ATTR_PROTOCOL, &[PROTOCOL]);
    fill(&mut attributes);
    Request { subsystem: NFNL_SUBSYS_IPSET, command, flags: 0, family, attributes: attributes.0 }
}

/// Creates a set; the same one already there is no error.
pub(crate) fn create(spec: &SetSpec) -> Request {
    request(CMD_CREATE, family_number(spec.family), |a| {
        a.text(ATTR_SETNAME, &spec.name);
        a.text(ATTR_TYPENAME, spec.kind.name());
        a.put(ATTR_REVISION, &[spec.kind.revision()]);
        a.put(ATTR_FAMILY, &[family_number(spec.family)]);
        a.nest(ATTR_DATA, |a| {
            a.big_endian(ATTR_MAXELEM, &spec.max_elements.to_be_bytes());
            if spec.marks {
                a.big_endian(ATTR_CADT_FLAGS, &FLAG_WITH_SKBINFO.to_be_bytes());
            }
        });
    })
}

/// Destroys a set that nothing refers to.
pub(crate) fn destroy(name: &str) -> Request {
    request(CMD_DESTROY, NFPROTO_IPV4, |a| a.text(ATTR_SETNAME, name))
}

/// Exchanges the contents of two sets, in one step for the packets that look them up.
pub(crate) fn swap(one: &str, other: &str) -> Request {
    request(CMD_SWAP, NFPROTO_IPV4, |a| {
        a.text(ATTR_SETNAME, one);
        a.text(ATTR_SETNAME2, other);
    })
}

/// Asks whether the kernel has a type; it loads the module for that.
pub(crate) fn has_type(kind: SetType, family: Family) -> Request {
    request(CMD_TYPE, family_number(family), |a| {
        a.text(ATTR_TYPENAME, kind.name());
        a.put(ATTR_FAMILY, &[family_number(family)]);
    })
}

/// Lists the headers of all sets.
pub(crate) fn list_headers() -> Request {
    request(CMD_LIST, NFPROTO_IPV4, |a| a.big_endian(ATTR_FLAGS, &FLAG_LIST_HEADER.to_be_bytes()))
}

/// Lists one set with its entries.
pub(crate) fn list(name: &str) -> Request {
    request(CMD_LIST, NFPROTO_IPV4, |a| a.text(ATTR_SETNAME, name))
}

/// Adds or deletes entries. An error names the entry by its place: see [`failed_entry`].
pub(crate) fn change(verb: Verb, name: &str, entries: &[Entry]) -> Request {
    let command = match verb {
        Verb::Add => CMD_ADD,
        Verb::Del => CMD_DEL,
    };
    request(command, NFPROTO_IPV4, |a| {
        a.text(ATTR_SETNAME, name);
        a.put(ATTR_LINENO, &0u32.to_ne_bytes());
        a.nest(ATTR_ADT, |a| {
            for (place, entry) in entries.iter().enumerate() {
                a.nest(ATTR_DATA, |a| {
                    emit_entry(a, entry, verb);
                    a.put(ATTR_LINENO, &u32::try_from(place).unwrap_or(u32::MAX).to_ne_bytes());
                });
            }
        });
    })
}

fn emit_entry(a: &mut Attributes, entry: &Entry, verb: Verb) {
    match entry.key {
        Key::IpPort(target) => {
            emit_address(a, ATTR_IP, target.addr);
            a.big_endian(ATTR_PORT, &target.port.to_be_bytes());
            a.put(ATTR_PROTO, &[target.protocol.number()]);
        }
        Key::Ip(addr) => emit_address(a, ATTR_IP, addr),
        Key::Pair(one, other) => {
            emit_address(a, ATTR_IP, one);
            a.put(ATTR_CIDR, &[host_prefix(one)]);
            emit_address(a, ATTR_IP2, other);
            a.put(ATTR_CIDR2, &[host_prefix(other)]);
        }
    }
    if let (Some(mark), Verb::Add) = (entry.mark, verb) {
        let both = (u64::from(mark.value) << 32) | u64::from(mark.mask);
        a.big_endian(ATTR_SKBMARK, &both.to_be_bytes());
    }
}

fn emit_address(a: &mut Attributes, kind: u16, addr: IpAddr) {
    a.nest(kind, |a| match addr {
        IpAddr::V4(v4) => a.big_endian(ATTR_IPADDR_IPV4, &v4.octets()),
        IpAddr::V6(v6) => a.big_endian(ATTR_IPADDR_IPV6, &v6.octets()),
    });
}

fn host_prefix(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

/// Which entry of a [`change`] failed; the ones before it are done. From the repeated request of an error.
pub(crate) fn failed_entry(payload: &[u8]) -> Option<usize> {
    let line = attribute(payload, ATTR_LINENO)?;
    usize::try_from(u32::from_ne_bytes(line.get(..4)?.try_into().ok()?)).ok()
}

/// The header in a message of a listing; only a set's first message has one.
pub(crate) fn parse_header(payload: &[u8]) -> Option<Header> {
    let byte = |kind| attribute(payload, kind)?.first().copied();
    let data = attribute(payload, ATTR_DATA)?;
    let number = |kind| attribute(data, kind).and_then(be32);
    Some(Header {
        name: text(attribute(payload, ATTR_SETNAME)?),
        type_name: text(attribute(payload, ATTR_TYPENAME)?),
        family: byte(ATTR_FAMILY)?,
        revision: byte(ATTR_REVISION)?,
        elements: number(ATTR_ELEMENTS).unwrap_or_default(),
        references: number(ATTR_REFERENCES).unwrap_or_default(),
        max_elements: number(ATTR_MAXELEM).unwrap_or_default(),
        marks: number(ATTR_CADT_FLAGS).unwrap_or_default() & FLAG_WITH_SKBINFO != 0,
    })
}

/// The entries in a message of a listing; `None` for one of a shape that we never write.
pub(crate) fn parse_entries(payload: &[u8]) -> impl Iterator<Item = Option<Entry>> {
    let all = attribute(payload, ATTR_ADT).unwrap_or_default();
    attributes(all).filter(|(kind, _)| *kind == ATTR_DATA).map(|(_, data)| parse_entry(data))
}

fn parse_entry(data: &[u8]) -> Option<Entry> {
    let byte = |kind| attribute(data, kind)?.first().copied();
    let ip = parse_address(attribute(data, ATTR_IP)?)?;
    let key = if let Some(second) = attribute(data, ATTR_IP2) {
        let second = parse_address(second)?;
        let whole = |kind, addr| byte(kind).is_none_or(|cidr| cidr == host_prefix(addr));
        if !whole(ATTR_CIDR, ip) || !whole(ATTR_CIDR2, second) {
            return None;
        }
        Key::Pair(ip, second)
    } else if let Some(port) = attribute(data, ATTR_PORT) {
        let port = u16::from_be_bytes(port.get(..2)?.try_into().ok()?);
        Key::IpPort(Target { addr: ip, protocol: Protocol::from_number(byte(ATTR_PROTO)?)?, port })
    } else {
        Key::Ip(ip)
    };
    let mark = attribute(data, ATTR_SKBMARK)
        .and_then(|v| Some(SkbMark { value: be32(v.get(..4)?)?, mask: be32(v.get(4..8)?)? }));
    Some(Entry { key, mark })
}

fn parse_address(nested: &[u8]) -> Option<IpAddr> {
    attributes(nested).find_map(|(kind, value)| match kind {
        ATTR_IPADDR_IPV4 => Some(IpAddr::from(<[u8; 4]>::try_from(value).ok()?)),
        ATTR_IPADDR_IPV6 => Some(IpAddr::from(<[u8; 16]>::try_from(value).ok()?)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        let target = Target { addr: [10, 200, 0, 5].into(), protocol: Protocol::Sctp, port: 80 };
        Entry { key: Key::IpPort(target), mark: Some(SkbMark { value: 0x100, mask: 0x3fff }) }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn golden_bytes_of_an_addition() {
        let wire = change(Verb::Add, "s", &[entry()]).encode(0, 7);
        #[rustfmt::skip]
        let golden: &[u8] = &[
            100, 0, 0, 0, 9, 6, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            2, 0, 0, 0, // nfgenmsg
            5, 0, 1, 0, 6, 0, 0, 0, // PROTOCOL 6
            6, 0, 2, 0, b's', 0, 0, 0, // SETNAME
            8, 0, 9, 0, 0, 0, 0, 0, // LINENO
            56, 0, 8, 0x80, // ADT
            52, 0, 7, 0x80, // DATA
            12, 0, 1, 0x80, 8, 0, 1, 0x40, 10, 200, 0, 5, // IP
            6, 0, 4, 0x40, 0, 80, 0, 0, // PORT
            5, 0, 7, 0, 132, 0, 0, 0, // PROTO
            12, 0, 27, 0x40, 0, 0, 1, 0, 0, 0, 0x3f, 0xff, // SKBMARK
            8, 0, 9, 0, 0, 0, 0, 0, // LINENO
        ];
        assert_eq!(wire, golden);
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        let addr =
            prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)];
        let mark = proptest::option::of((any::<u32>(), any::<u32>()));
        (addr.clone(), addr, any::<u16>(), 0..3usize, 0..3u8, mark).prop_map(|(a, b, port, p, shape, m)| {
            let key = match shape {
                0 => Key::IpPort(Target { addr: a, protocol: Protocol::ALL[p], port }),
                1 => Key::Ip(a),
                _ => Key::Pair(a, b),
            };
            Entry { key, mark: m.map(|(value, mask)| SkbMark { value, mask }) }
        })
    }

    proptest! {
        #[test]
        fn entries_come_back(entries in proptest::collection::vec(any_entry(), 0..20)) {
            let request = change(Verb::Add, "meshlb-vips-4", &entries);
            let back: Option<Vec<_>> = parse_entries(&request.attributes).collect();
            prop_assert_eq!(back, Some(entries));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_header(&bytes);
            let _ = parse_entries(&bytes).count();
            let _ = failed_entry(&bytes);
        }

        #[test]
        fn any_damage_to_a_listing_is_read_without_panic(at in 0..200usize, with in any::<u8>()) {
            let mut bytes = change(Verb::Add, "x", &[entry(), entry(), entry()]).attributes;
            if let Some(byte) = bytes.get_mut(at) {
                *byte = with;
            }
            let _ = parse_header(&bytes);
            let _ = parse_entries(&bytes).count();
        }
    }
}
