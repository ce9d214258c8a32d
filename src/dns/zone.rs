//! The zone that is ours, and the zones of its addresses.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hickory_proto::{
    ProtoError,
    rr::{
        Name, RData, Record, RecordType,
        domain::usage::{IN_ADDR_ARPA_127, IP6_ARPA_1, LOCALHOST},
        rdata::{NS, SOA},
    },
};
use ipnet::IpNet;

use crate::model::{
    ids::{Family, PerFamily},
    node::nth_address,
};

/// Seconds that a negative answer may be kept: minimum and TTL of the SOA record (RFC 2308, 5). As low as the default of
/// positive ones, since a service may come at any time.
pub const NEGATIVE_TTL: u32 = 5;
/// What nobody reads: there are no secondaries (values of RFC 1912, 2.2).
const REFRESH: i32 = 7200;
const RETRY: i32 = 1800;
const EXPIRE: i32 = 86_400;

/// The zone and where it is served.
#[derive(Debug)]
pub struct Zone {
    /// Its name, in lower case.
    pub name: Name,
    /// Its labels, in lower case.
    labels: Vec<Box<[u8]>>,
    /// It as it is sent, in lower case.
    wire: Vec<u8>,
    /// Ranges of virtual IPs, whose reverse zones are ours.
    ranges: PerFamily<IpNet>,
    /// Addresses that it is served at, on a node that serves both families.
    pub servers: PerFamily<IpAddr>,
}

/// Characters of its name, so that three labels, each of 63 and a dot, have 255 bytes with it as it is sent (RFC 1035, 2.3.4).
const LONGEST: usize = 61;
/// Labels that stand before the zone, at most.
const DEEPEST: usize = 4;

/// A name in the zone: its labels before it. Names with more of them than any of ours has are cut.
pub type Relative<'a> = ([&'a [u8]; DEEPEST + 1], usize);

impl Zone {
    /// The zone of this name, for services with virtual IPs from these ranges.
    ///
    /// # Errors
    /// A text for people when it is not the name of a zone.
    pub fn new(name: &str, ranges: PerFamily<IpNet>) -> Result<Arc<Self>, String> {
        let bad = |e: ProtoError| format!("--zone {name:?} is not a domain name: {e}");
        let mut parsed = Name::from_ascii(name).map_err(bad)?.to_lowercase();
        parsed.set_fqdn(true);
        if parsed.is_root() {
            return Err(format!("--zone {name:?} is not a domain name, as mesh.internal is"));
        }
        // Three labels of any length, those of an endpoint, its service and its namespace, have to fit before it into 255 bytes.
        if parsed.len() > LONGEST + 1 {
            return Err(format!("--zone {name}: longer than {LONGEST} characters"));
        }
        let mut servers = PerFamily::default();
        for (family, range) in ranges.iter() {
            servers.set(family, nth_address(range, 2));
        }
        let labels: Vec<_> = parsed.iter().map(Box::from).collect();
        let wire = wire(&labels);
        Ok(Arc::new(Self { name: parsed, labels, wire, ranges, servers }))
    }

    /// The same, served at these addresses. Where the DNS address of a family is none of them, the first one is the zone's: one of
    /// loopback, which is another machine for who asks from elsewhere, only where there is no other.
    pub fn served_at(self: &Arc<Self>, listen: &[SocketAddr]) -> Arc<Self> {
        let mut servers = PerFamily::default();
        for family in Family::ALL {
            let mut of_family = listen.iter().map(SocketAddr::ip).filter(|ip| Family::of(ip) == family);
            let own = self.servers.get(family).copied().filter(|own| of_family.clone().any(|ip| ip == *own));
            let known = own.or_else(|| of_family.clone().find(|ip| !ip.is_loopback()));
            servers.set(family, known.or_else(|| of_family.next()));
        }
        let (name, labels, wire) = (self.name.clone(), self.labels.clone(), self.wire.clone());
        Arc::new(Self { name, labels, wire, ranges: self.ranges, servers })
    }

    /// It as it is sent (RFC 1035, 3.1), in lower case.
    pub(super) fn wire(&self) -> &[u8] {
        &self.wire
    }

    /// The labels that a name has before the zone; `None` outside it.
    pub fn relative<'a>(&self, name: &'a Name) -> Option<Relative<'a>> {
        // `num_labels` does not count a wildcard.
        let before = name.iter().count().checked_sub(self.labels.len())?;
        let mut out: Relative<'a> = ([&[][..]; DEEPEST + 1], before.min(DEEPEST + 1));
        for (i, label) in name.iter().enumerate() {
            match i.checked_sub(before) {
                None => {
                    if let Some(slot) = out.0.get_mut(i) {
                        *slot = label;
                    }
                }
                Some(k) => {
                    if !self.labels.get(k).is_some_and(|own| own.eq_ignore_ascii_case(label)) {
                        return None;
                    }
                }
            }
        }
        Some(out)
    }

    /// Its SOA record.
    pub fn soa(&self, serial: u32, ttl: u32) -> Record {
        self.soa_of(self.name.clone(), serial, ttl)
    }

    fn soa_of(&self, owner: Name, serial: u32, ttl: u32) -> Record {
        let contact = self.name.prepend_label("hostmaster").unwrap_or_else(|_| self.name.clone());
        let data = SOA::new(self.name.clone(), contact, serial, REFRESH, RETRY, EXPIRE, ttl);
        Record::from_rdata(owner, ttl, RData::SOA(data))
    }

    /// Its NS record. The server's name is the zone's own, which no service can have.
    pub fn ns(&self, owner: Name, ttl: u32) -> Record {
        Record::from_rdata(owner, ttl, RData::NS(NS(self.name.clone())))
    }

    /// Whether all names in a zone are names of addresses in the ranges, or below those.
    pub fn has_reverse(&self, name: &Name) -> bool {
        let parents = (0..=name.iter().count()).rev().map(|n| name.trim_to(n));
        let net = parents.filter_map(|parent| parent.parse_arpa_name().ok()).next();
        net.is_some_and(|net| {
            self.ranges.get(Family::of(&net.addr())).is_some_and(|range| range.contains(&net))
        })
    }

    /// Where an address that is asked for by name (`4.3.2.1.in-addr.arpa`), or all of those that a name stands for
    /// (`3.2.1.in-addr.arpa`), are in a reverse zone of ours, that zone's SOA record.
    pub fn reverse_soa(&self, net: IpNet, serial: u32) -> Option<Record> {
        let addr = net.addr();
        let range = self.ranges.get(Family::of(&addr)).filter(|range| range.contains(&net))?;
        // Zones are cut at octets (IPv6: at nibbles); the range may be larger than one of them. It may be smaller, too: addresses
        // are no zones, so it is the one that they are in, where the rest of it is someone else's, as is the zone itself.
        let (unit, labels) = if addr.is_ipv4() { (8, 4) } else { (4, 32) };
        let depth = usize::from(range.prefix_len().div_ceil(unit));
        let owner = Name::from(addr).trim_to(depth.min(labels - 1) + 2);
        Some(self.soa_of(owner, serial, NEGATIVE_TTL))
    }
}

fn wire(labels: &[Box<[u8]>]) -> Vec<u8> {
    // No label is longer than 63 bytes, and the last one is the root's.
    let each =
        labels.iter().flat_map(|label| std::iter::once(label.len() as u8).chain(label.iter().copied()));
    each.chain([0]).collect()
}

/// Whether it is a name of whichever machine asks (RFC 6761, 6.3), never a service's.
pub fn is_localhost(name: &Name) -> bool {
    LOCALHOST.zone_of(name)
}

/// Whether it is the name of an address of whichever machine asks: 127.0.0.0/8 and `::1`.
pub fn is_loopback(name: &Name) -> bool {
    IN_ADDR_ARPA_127.zone_of(name) || IP6_ARPA_1.zone_of(name)
}

/// Whether what is asked of a name without dots is what only a zone has: who walks down from the root asks it of `com`. No
/// service has one, whatever it is called.
pub fn is_of_top_level(name: &Name, kind: RecordType) -> bool {
    use RecordType::{DNSKEY, DS, NS, SOA};
    matches!(kind, DS | DNSKEY | NS | SOA) && name.iter().count() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone() -> Arc<Zone> {
        let ranges = PerFamily {
            v4: Some("10.200.0.0/16".parse().unwrap()),
            v6: Some("fd00:200::/112".parse().unwrap()),
        };
        Zone::new("Mesh.Internal", ranges).unwrap()
    }

    fn labels(name: &str) -> Option<Vec<String>> {
        let name = Name::from_ascii(name).unwrap();
        let zone = zone();
        let (labels, n) = zone.relative(&name)?;
        Some(labels[..n].iter().map(|l| String::from_utf8_lossy(l).into_owned()).collect())
    }

    #[test]
    fn names_in_the_zone() {
        assert_eq!(labels("vote.default.mesh.internal."), Some(vec!["vote".into(), "default".into()]));
        assert_eq!(labels("VOTE.default.MESH.internal."), Some(vec!["VOTE".into(), "default".into()]));
        assert_eq!(labels("mesh.internal."), Some(vec![]));
        assert_eq!(labels("*.mesh.internal."), Some(vec!["*".into()]));
        assert_eq!(labels("a.b.c.d.e.f.mesh.internal.").map(|l| l.len()), Some(5));
        assert_eq!(labels("mesh.internal.example."), None);
        assert_eq!(labels("xmesh.internal."), None);
        assert_eq!(labels("internal."), None);
        assert_eq!(labels("."), None);
    }

    #[test]
    fn zones_that_can_not_be() {
        let refused = |name: &str| Zone::new(name, PerFamily::default()).unwrap_err();
        assert!(refused(".").contains("--zone"));
        assert!(refused("a..b").contains("--zone"));
        assert!(refused(&"a23456789.".repeat(10)).contains("longer than 61"));
        // The longest of all, and one byte more.
        let of = |n: usize| format!("{}.{}", "a".repeat(30), "b".repeat(n - 31));
        assert!(refused(&of(62)).contains("longer"));
        let zone = Zone::new(&of(61), PerFamily::default()).unwrap();
        let label = [b'x'; 63];
        let name = (0..3).try_fold(zone.name.clone(), |name, _| name.prepend_label(&label[..]));
        assert_eq!(name.unwrap().to_ascii().len(), 254);
    }

    #[test]
    fn reverse_zones_are_cut_at_labels() {
        let net = |ip: &str| IpNet::from(ip.parse::<IpAddr>().unwrap());
        let soa = |ip: &str| zone().reverse_soa(net(ip), 1).map(|r| r.name.to_ascii());
        assert_eq!(soa("10.200.7.9").as_deref(), Some("200.10.in-addr.arpa."));
        assert_eq!(soa("10.201.7.9"), None);
        let v6 = soa("fd00:200::5").unwrap();
        assert_eq!(v6, format!("{}0.0.2.0.0.0.d.f.ip6.arpa.", "0.".repeat(20)));
        let ranges = PerFamily { v4: Some("10.200.32.0/20".parse().unwrap()), v6: None };
        let small = Zone::new("m", ranges).unwrap();
        let owner = small.reverse_soa(net("10.200.33.1"), 1).unwrap().name;
        assert_eq!(owner.to_ascii(), "33.200.10.in-addr.arpa.");
        // No address is a zone of its own.
        let ranges = PerFamily {
            v4: Some("10.200.7.16/28".parse().unwrap()),
            v6: Some("fd00:200::/126".parse().unwrap()),
        };
        let tiny = Zone::new("m", ranges).unwrap();
        let soa = |ip: &str| tiny.reverse_soa(net(ip), 1).map(|r| r.name.to_ascii());
        assert_eq!(soa("10.200.7.17").as_deref(), Some("7.200.10.in-addr.arpa."));
        assert_eq!(soa("10.200.7.1"), None);
        assert_eq!(soa("fd00:200::2"), Some(format!("{}0.0.2.0.0.0.d.f.ip6.arpa.", "0.".repeat(23))));
    }

    #[test]
    fn a_zone_is_served_where_it_is_listened_for_it() {
        let servers = |listen: &[&str]| {
            let listen: Vec<_> = listen.iter().map(|at| at.parse().unwrap()).collect();
            let servers = zone().served_at(&listen).servers;
            servers.iter().map(|(_, ip)| ip.to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(servers(&["192.0.2.1:53", "10.200.0.2:53", "[fd00:200::2]:53"]), "10.200.0.2 fd00:200::2");
        assert_eq!(servers(&["192.0.2.1:53", "192.0.2.2:5353"]), "192.0.2.1");
        assert_eq!(servers(&["[2001:db8::1]:53", "10.200.0.2:53"]), "10.200.0.2 2001:db8::1");
        assert_eq!(servers(&["127.0.0.53:53", "[::1]:53", "192.0.2.2:53", "192.0.2.1:53"]), "192.0.2.2 ::1");
    }
}
