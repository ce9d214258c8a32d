//! Our sets and maps: which of them an [`Element`] lives in, as ipset entries and as nft elements.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use crate::{
    dataplane::ipset::{Entry, Key, SetSpec, SetType, SkbMark},
    model::{
        ids::{Family, Mark, Protocol},
        kernel::{Element, Elements, Target},
    },
};

/// A set or map of ours; each family has its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    /// (VIP or ingress address, protocol, port) → mark.
    Vips,
    /// (node address, protocol, published port); in ipset with its mark.
    Published,
    /// The same keys → mark, in nft, where a map can't be matched as a set.
    PublishedMarks,
    /// Addresses of `Published`, in nft: conntrack's original port can't be part of a key there.
    Addresses,
    /// What the guard lets through.
    Own,
    /// (protocol, port) → mark, from and to the loopback address.
    Loopback,
    /// Endpoints on this node.
    Local,
    /// All endpoints.
    Endpoints,
    /// (endpoint, the same endpoint).
    Hairpin,
}

impl Kind {
    /// All kinds.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 9] = [
        Self::Vips,
        Self::Published,
        Self::PublishedMarks,
        Self::Addresses,
        Self::Own,
        Self::Loopback,
        Self::Local,
        Self::Endpoints,
        Self::Hairpin,
    ];

    fn text(self) -> &'static str {
        match self {
            Self::Vips => "vips",
            Self::Published => "published",
            Self::PublishedMarks => "published-marks",
            Self::Addresses => "addresses",
            Self::Own => "own",
            Self::Loopback => "loopback",
            Self::Local => "local",
            Self::Endpoints => "endpoints",
            Self::Hairpin => "hairpin",
        }
    }
}

/// All our ipsets begin so.
pub(crate) const PREFIX: &str = "meshlb-";
/// Set contents are built here and then swapped in.
pub(crate) const SCRATCH: &str = "meshlb-scratch";

/// Name of the ipset.
pub(crate) fn set_name(kind: Kind, family: Family) -> String {
    format!("{PREFIX}{}", nft_name(kind, family))
}

/// Name of the set or map in our nft table.
pub(crate) fn nft_name(kind: Kind, family: Family) -> String {
    format!("{}-{}", kind.text(), family.digit())
}

/// The loopback address of a family.
pub(crate) fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

/// Where the iptables renderer keeps what: it depends on what the kernel has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stores {
    /// Whether there is an nft table. Without it the marks of 127.0.0.1 are kept in an ipset that no rule
    /// reads, so that what should be there and what is there can still be compared.
    pub nft: bool,
    /// Whether there is `hash:net,net`. Without it the hairpin set and its rule are in the nft table.
    pub pairs: bool,
}

impl Stores {
    /// The ipsets: those that only ever narrow things down first, the ones that lead to IPVS last.
    pub(crate) fn ipsets(self) -> impl Iterator<Item = Kind> {
        [Kind::Own, Kind::Local, Kind::Endpoints, Kind::Hairpin, Kind::Published, Kind::Vips, Kind::Loopback]
            .into_iter()
            .filter(move |kind| match kind {
                Kind::Hairpin => self.pairs,
                Kind::Loopback => !self.nft,
                _ => true,
            })
    }

    /// The nft table beside them.
    pub(crate) fn layout(self) -> Layout {
        Layout::Small { hairpin: !self.pairs }
    }
}

/// How an ipset is created that may have so many entries.
pub(crate) fn ipset_spec(kind: Kind, family: Family, max_elements: u32) -> SetSpec {
    let (set_type, marks) = match kind {
        Kind::Vips | Kind::Published | Kind::PublishedMarks | Kind::Loopback => (SetType::IpPort, true),
        Kind::Own => (SetType::IpPort, false),
        Kind::Local | Kind::Endpoints | Kind::Addresses => (SetType::Ip, false),
        Kind::Hairpin => (SetType::Pair, false),
    };
    SetSpec { name: set_name(kind, family), kind: set_type, family, marks, max_elements }
}

/// The ipset entries of an element.
pub(crate) fn ipset_entries(
    element: &Element,
    mark: Option<Mark>,
    mask: u32,
    stores: Stores,
) -> impl Iterator<Item = (Kind, Entry)> + use<> {
    let mark = mark.map(|m| SkbMark { value: m.0, mask });
    let entry = |kind, key, mark| Some((kind, Entry { key, mark }));
    let both = match *element {
        Element::Vip(t) => [entry(Kind::Vips, Key::IpPort(t), mark), None],
        Element::Published(t) => [entry(Kind::Published, Key::IpPort(t), mark), None],
        Element::Own(t) => [entry(Kind::Own, Key::IpPort(t), None), None],
        Element::Local(a) => [entry(Kind::Local, Key::Ip(a), None), None],
        Element::Endpoint(a) => {
            let pair = entry(Kind::Hairpin, Key::Pair(a, a), None);
            [entry(Kind::Endpoints, Key::Ip(a), None), pair.filter(|_| stores.pairs)]
        }
        Element::Loopback(..) if stores.nft => [None, None],
        Element::Loopback(family, protocol, port) => {
            let target = Target { addr: loopback(family), protocol, port };
            [entry(Kind::Loopback, Key::IpPort(target), mark), None]
        }
    };
    both.into_iter().flatten()
}

/// The element that an ipset entry stands for; `None` for the second entry of one, or an odd one.
pub(crate) fn ipset_element(kind: Kind, family: Family, entry: &Entry) -> Option<(Element, Option<Mark>)> {
    let mark = Some(Mark(entry.mark.map_or(0, |m| m.value)));
    match (kind, entry.key) {
        (Kind::Vips, Key::IpPort(t)) => Some((Element::Vip(t), mark)),
        (Kind::Published, Key::IpPort(t)) => Some((Element::Published(t), mark)),
        (Kind::Own, Key::IpPort(t)) => Some((Element::Own(t), None)),
        (Kind::Local, Key::Ip(a)) => Some((Element::Local(a), None)),
        (Kind::Endpoints, Key::Ip(a)) => Some((Element::Endpoint(a), None)),
        (Kind::Loopback, Key::IpPort(t)) => Some((Element::Loopback(family, t.protocol, t.port), mark)),
        _ => None,
    }
}

/// Key of an element of an nft set or map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum NftKey {
    Target(Target),
    Port(Protocol, u16),
    Addr(IpAddr),
    Pair(IpAddr, IpAddr),
}

impl fmt::Display for NftKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Target(t) => write!(f, "{} . {} . {}", t.addr, t.protocol.lower(), t.port),
            Self::Port(protocol, port) => write!(f, "{} . {port}", protocol.lower()),
            Self::Addr(a) => a.fmt(f),
            Self::Pair(a, b) => write!(f, "{a} . {b}"),
        }
    }
}

fn push_addr(out: &mut Vec<u8>, addr: IpAddr) {
    match addr {
        IpAddr::V4(a) => out.extend(a.octets()),
        IpAddr::V6(a) => out.extend(a.octets()),
    }
}

fn push_port(out: &mut Vec<u8>, protocol: Protocol, port: u16) {
    let [high, low] = port.to_be_bytes();
    out.extend([protocol.number(), 0, 0, 0, high, low, 0, 0]);
}

fn read_addr(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

fn read_port(bytes: &[u8]) -> Option<(Protocol, u16)> {
    match bytes {
        [protocol, _, _, _, high, low, _, _] => {
            Some((Protocol::from_number(*protocol)?, u16::from_be_bytes([*high, *low])))
        }
        _ => None,
    }
}

impl NftKey {
    /// As the kernel holds it: each part of a concatenation begins at a multiple of four.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match *self {
            Self::Target(t) => {
                push_addr(&mut out, t.addr);
                push_port(&mut out, t.protocol, t.port);
            }
            Self::Port(protocol, port) => push_port(&mut out, protocol, port),
            Self::Addr(a) => push_addr(&mut out, a),
            Self::Pair(a, b) => {
                push_addr(&mut out, a);
                push_addr(&mut out, b);
            }
        }
        out
    }

    /// Reads the key of an element of this set.
    pub(crate) fn parse(kind: Kind, family: Family, bytes: &[u8]) -> Option<Self> {
        let width = if family == Family::V4 { 4 } else { 16 };
        match kind {
            Kind::Vips | Kind::Published | Kind::PublishedMarks | Kind::Own => {
                let (addr, rest) = bytes.split_at_checked(width)?;
                let (protocol, port) = read_port(rest)?;
                Some(Self::Target(Target { addr: read_addr(addr)?, protocol, port }))
            }
            Kind::Loopback => read_port(bytes).map(|(protocol, port)| Self::Port(protocol, port)),
            Kind::Local | Kind::Endpoints | Kind::Addresses => read_addr(bytes).map(Self::Addr),
            Kind::Hairpin => {
                let (a, b) = bytes.split_at_checked(width)?;
                Some(Self::Pair(read_addr(a)?, read_addr(b)?))
            }
        }
    }
}

/// Which of the two nft tables: the small one beside iptables, or the whole program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Layout {
    Small {
        /// With the hairpin set and its rule.
        hairpin: bool,
    },
    Whole,
}

impl Layout {
    /// The sets and maps of the table.
    pub(crate) fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Small { hairpin: false } => &[Kind::Published, Kind::Own, Kind::Loopback],
            Self::Small { hairpin: true } => &[Kind::Published, Kind::Own, Kind::Loopback, Kind::Hairpin],
            Self::Whole => &[
                Kind::Vips,
                Kind::Published,
                Kind::PublishedMarks,
                Kind::Addresses,
                Kind::Own,
                Kind::Loopback,
                Kind::Local,
                Kind::Hairpin,
            ],
        }
    }
}

/// The nft elements of an element: set, key, and a map's value.
pub(crate) fn nft_elements(
    element: &Element,
    mark: Option<Mark>,
    layout: Layout,
) -> impl Iterator<Item = (Kind, NftKey, Option<u32>)> + use<> {
    let mark = Some(mark.map_or(0, |m| m.0));
    let whole = layout == Layout::Whole;
    let all = match *element {
        Element::Vip(t) => [whole.then_some((Kind::Vips, NftKey::Target(t), mark)), None, None],
        Element::Published(t) => [
            Some((Kind::Published, NftKey::Target(t), None)),
            whole.then_some((Kind::Addresses, NftKey::Addr(t.addr), None)),
            whole.then_some((Kind::PublishedMarks, NftKey::Target(t), mark)),
        ],
        Element::Own(t) => [Some((Kind::Own, NftKey::Target(t), None)), None, None],
        Element::Loopback(family, protocol, port) => [
            Some((Kind::Loopback, NftKey::Port(protocol, port), mark)),
            // The guard's own knowledge of it, should the map be emptied.
            Some((Kind::Published, NftKey::Target(Target { addr: loopback(family), protocol, port }), None)),
            None,
        ],
        Element::Local(a) => [whole.then_some((Kind::Local, NftKey::Addr(a), None)), None, None],
        Element::Endpoint(a) => {
            let hairpin = layout.kinds().contains(&Kind::Hairpin);
            [hairpin.then_some((Kind::Hairpin, NftKey::Pair(a, a), None)), None, None]
        }
    };
    all.into_iter().flatten()
}

/// Contents of nft sets: (kind, family) → key → value of a map.
pub(crate) type NftContents = BTreeMap<(Kind, Family), BTreeMap<NftKey, Option<u32>>>;

/// What the nft sets would hold with these elements.
pub(crate) fn nft_contents(elements: &Elements, layout: Layout) -> NftContents {
    let mut out = NftContents::new();
    for (element, mark) in elements {
        for (kind, key, value) in nft_elements(element, *mark, layout) {
            out.entry((kind, element.family())).or_default().insert(key, value);
        }
    }
    out
}

/// The elements that contents of the whole program's table stand for.
pub(crate) fn nft_to_elements(contents: &NftContents) -> Elements {
    let mut out = Elements::new();
    for ((kind, family), keys) in contents {
        for (key, value) in keys {
            let mark = Some(Mark(value.unwrap_or_default()));
            let element = match (kind, *key) {
                (Kind::Vips, NftKey::Target(t)) => (Element::Vip(t), mark),
                (Kind::PublishedMarks, NftKey::Target(t)) => (Element::Published(t), mark),
                (Kind::Own, NftKey::Target(t)) => (Element::Own(t), None),
                (Kind::Loopback, NftKey::Port(p, port)) => (Element::Loopback(*family, p, port), mark),
                (Kind::Local, NftKey::Addr(a)) => (Element::Local(a), None),
                (Kind::Hairpin, NftKey::Pair(a, b)) if a == b => (Element::Endpoint(a), None),
                _ => continue,
            };
            out.insert(element.0, element.1);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn family_elements() -> impl Strategy<Value = Vec<(Element, Option<Mark>)>> {
        let addr =
            prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)];
        let one = (addr, 0..3usize, any::<u16>(), 0..6u8, 0x100..0x3fffu32).prop_map(
            |(addr, p, port, which, mark)| {
                let protocol = Protocol::ALL[p];
                let t = Target { addr, protocol, port };
                match which {
                    0 => (Element::Vip(t), Some(Mark(mark))),
                    1 => (Element::Published(t), Some(Mark(mark))),
                    2 => (Element::Own(t), None),
                    3 => (Element::Local(addr), None),
                    4 => (Element::Endpoint(addr), None),
                    _ => (Element::Loopback(Family::of(&addr), protocol, port), Some(Mark(mark))),
                }
            },
        );
        proptest::collection::vec(one, 0..30)
    }

    proptest! {
        #[test]
        fn elements_come_back_from_nft_and_ipset(list in family_elements()) {
            let elements: Elements = list.into_iter().collect();
            let contents = nft_contents(&elements, Layout::Whole);
            prop_assert_eq!(&nft_to_elements(&contents), &elements);
            for ((kind, family), keys) in &contents {
                for key in keys.keys() {
                    prop_assert_eq!(NftKey::parse(*kind, *family, &key.bytes()), Some(*key));
                }
            }
            let back: Elements = elements
                .iter()
                .flat_map(|(e, m)| ipset_entries(e, *m, 0x3fff, Stores { nft: false, pairs: true }).map(|(k, x)| (k, e.family(), x)))
                .filter_map(|(kind, family, entry)| ipset_element(kind, family, &entry))
                .collect();
            prop_assert_eq!(back, elements);
        }

        #[test]
        fn any_key_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            for kind in Kind::ALL {
                for family in Family::ALL {
                    let _ = NftKey::parse(kind, family, &bytes);
                }
            }
        }
    }
}
