//! From a question to an answer, over a [`Table`]. Pure but for whose turn it is.

use std::{cell::RefCell, net::IpAddr, sync::Arc};

use hickory_proto::{
    op::{Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, HINFO, PTR, SRV},
    },
};

use super::{
    choice::{Addresses, Random, in_random_order},
    records::{Main, PortNames, ServiceNames, TASKS},
    table::{Table, name_key},
    zone::{NEGATIVE_TTL, Zone, is_localhost, is_of_top_level},
};
use crate::model::{
    ids::{Family, PerFamily},
    service::DnsAnswer,
};

/// PTR records of one answer: an address may be an endpoint of many services.
const MOST_POINTERS: usize = 16;

thread_local! {
    static RANDOM: RefCell<Random> = RefCell::default();
}

/// What is answered.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Response code.
    pub code: ResponseCode,
    /// Answer section.
    pub answers: Vec<Record>,
    /// Authority section.
    pub authorities: Vec<Record>,
    /// Additional section, without EDNS.
    pub additionals: Vec<Record>,
    /// Whether it fails for now only: what it lacks is known as soon as the kernel serves what the source says.
    pub soon: bool,
}

impl Answer {
    /// A response code alone.
    pub fn code(code: ResponseCode) -> Self {
        Self { code, ..Self::default() }
    }

    /// To a question for all types: one record that says that there is no answer to that (RFC 8482, 4.2).
    pub fn any(name: &Name) -> Self {
        let data = HINFO::new("RFC8482".into(), String::new());
        let record = Record::from_rdata(name.clone(), NEGATIVE_TTL, RData::HINFO(data));
        Self { answers: vec![record], ..Self::default() }
    }
}

impl Answer {
    /// The same with the name letter by letter as it was asked for, where another client's, or none of them, was so: one may look
    /// for its own letters (draft-vixie-dnsext-dns0x20).
    pub fn as_asked(&self, name: &Name) -> Option<Self> {
        let others = |record: &Record| record.name == *name && !record.name.eq_case(name);
        if !self.answers.iter().any(others) {
            return None;
        }
        let mut out = self.clone();
        for record in out.answers.iter_mut().filter(|record| others(record)) {
            record.name.clone_from(name);
        }
        Some(out)
    }
}

impl Table {
    /// The answer to a question of class IN; `None` where it is not ours to answer. `client` is who asks, as far as that is
    /// known.
    pub fn answer(&self, name: &Name, kind: RecordType, client: Option<IpAddr>) -> Option<Answer> {
        if let Some((labels, n)) = self.zone.relative(name) {
            return Some(self.in_zone(name, &labels[..n], kind));
        }
        if let Some(answer) = self.reverse(name, kind) {
            return Some(answer);
        }
        self.short(name, kind, client)
    }

    /// The answer to a question about a name of others whose aliases (CNAME) lead to a name of ours: theirs up to there, ours
    /// from there on, whatever they know of it. `None` where they do not lead here.
    pub fn complete(&self, query: &Query, theirs: &Answer) -> Option<Answer> {
        let kind = query.query_type();
        if matches!(kind, RecordType::CNAME | RecordType::ANY) {
            return None;
        }
        let mut at = query.name();
        let mut aliases = Vec::new();
        // No chain is longer than its records, or it goes round.
        for _ in &theirs.answers {
            let (alias, target) = theirs.answers.iter().find_map(|record| match &record.data {
                RData::CNAME(CNAME(target)) if record.name == *at => Some((record, target)),
                _ => None,
            })?;
            aliases.push(alias.clone());
            if let Some(mut ours) = self.answer(target, kind, None) {
                if ours.code != ResponseCode::ServFail {
                    ours.answers.splice(0..0, aliases);
                }
                return Some(ours);
            }
            at = target;
        }
        None
    }

    fn in_zone(&self, name: &Name, labels: &[&[u8]], kind: RecordType) -> Answer {
        if !self.synced {
            return failure();
        }
        match labels {
            [] => self.apex(name, kind),
            [namespace] => match self.namespaces.get(namespace.to_ascii_lowercase().as_slice()) {
                Some(_) => self.no_data(NEGATIVE_TTL),
                None if self.unknown.is_coming_in(namespace) => Answer { soon: true, ..failure() },
                None if self.unknown.may_be_in(namespace) => failure(),
                None => self.no_name(),
            },
            [before @ .., service, namespace] if before.len() <= 2 => {
                let key = name_key(service, namespace);
                match self.service(&key) {
                    Some(service) => {
                        self.of_service(name, before, kind, service).unwrap_or_else(|| self.no_name())
                    }
                    None if may_stand_before_a_service(before)
                        && (self.unknown.has(&key) || self.unknown.may_be_in(namespace)) =>
                    {
                        self.unnamed(Some(&key))
                    }
                    None => self.no_name(),
                }
            }
            _ => self.no_name(),
        }
    }

    /// The service that has a name. What is known of another's alias is nothing where a service of that name is unread.
    pub(super) fn service(&self, key: &[u8]) -> Option<&ServiceNames> {
        let entry = self.names.get(key)?;
        (!entry.alias || !self.unknown.has(key)).then_some(&*entry.service)
    }

    /// `before` are the labels before the service's; `None` where there is no such name.
    fn of_service(
        &self,
        name: &Name,
        before: &[&[u8]],
        kind: RecordType,
        service: &ServiceNames,
    ) -> Option<Answer> {
        // That there are none can be told only where all of them have been read; where there are some, those are told.
        let unread = self.unknown.may_have_endpoints(&service.group);
        let lacks = |of: &PerFamily<Addresses>| {
            unread && family(kind).and_then(|family| of.get(family)).is_some_and(Addresses::is_empty)
        };
        match before {
            [] => {
                if matches!(&service.main, Main::Endpoints(_, of) if lacks(of)) {
                    return Some(failure());
                }
                Some(
                    self.addresses(name, kind, service.ttl, &|family| {
                        main_addresses(service, family).to_vec()
                    }),
                )
            }
            [label] if label.eq_ignore_ascii_case(TASKS.as_bytes()) => {
                if lacks(&service.tasks) {
                    return Some(failure());
                }
                Some(self.addresses(name, kind, service.ttl, &|f| shuffled(service.tasks.get(f))))
            }
            [label] if label.starts_with(b"_") => {
                let any = service.ports.iter().any(|port| is_protocol(port, label));
                any.then(|| self.no_data(service.ttl))
            }
            [label] => {
                let label = std::str::from_utf8(label).ok()?.to_ascii_lowercase();
                let of = |family| -> Vec<_> {
                    service.labelled(&label).filter(|ip| Family::of(ip) == family).collect()
                };
                let wanted = family(kind).filter(|family| service.tasks.get(*family).is_some());
                let known = service.labelled(&label).next().is_some();
                if unread && (!known || wanted.is_some_and(|family| of(family).is_empty())) {
                    return Some(failure());
                }
                known.then(|| self.addresses(name, kind, service.ttl, &of))
            }
            [port, protocol] => {
                let port = service.ports.iter().find(|p| is_protocol(p, protocol) && is_port(p, port))?;
                Some(self.port(name, kind, service, port))
            }
            _ => None,
        }
    }

    fn addresses(
        &self,
        name: &Name,
        kind: RecordType,
        ttl: u32,
        of: &dyn Fn(Family) -> Vec<IpAddr>,
    ) -> Answer {
        let Some(family) = family(kind) else { return self.other(name, kind, ttl) };
        let answers: Vec<_> = of(family).into_iter().map(|ip| address(name.clone(), ttl, ip)).collect();
        if answers.is_empty() { self.no_data(ttl) } else { Answer { answers, ..Answer::default() } }
    }

    fn port(&self, name: &Name, kind: RecordType, service: &ServiceNames, port: &PortNames) -> Answer {
        if kind != RecordType::SRV {
            return self.other(name, kind, service.ttl);
        }
        let mut out = Answer::default();
        let Some(own) = self.name_of(service) else { return failure() };
        // Some clients take the first, and of a long answer by UDP they see no more than its beginning.
        let targets = port.targets.iter().map(|target| (target, target.weight));
        let targets = RANDOM.with_borrow_mut(|random| in_random_order(targets, random));
        for target in targets {
            let (host, addrs) = match &target.label {
                None => (own.clone(), service.addresses()),
                Some(label) => {
                    let Ok(host) = own.prepend_label(label.as_bytes()) else { continue };
                    (host, service.labelled(label).collect())
                }
            };
            for ip in addrs {
                out.additionals.push(address(host.clone(), service.ttl, ip));
            }
            let data = SRV::new(0, target.weight, target.port, host);
            out.answers.push(Record::from_rdata(name.clone(), service.ttl, RData::SRV(data)));
        }
        match out.answers.is_empty() {
            true if self.unknown.may_have_endpoints(&service.group) => failure(),
            true => self.no_data(service.ttl),
            false => out,
        }
    }

    fn apex(&self, name: &Name, kind: RecordType) -> Answer {
        let zone = &self.zone;
        let answer = |record| Answer { answers: vec![record], ..Answer::default() };
        match kind {
            RecordType::SOA => answer(zone.soa(self.serial, NEGATIVE_TTL)),
            RecordType::NS => {
                let additionals = self.servers.iter();
                let additionals =
                    additionals.map(|(_, ip)| address(zone.name.clone(), NEGATIVE_TTL, *ip)).collect();
                Answer { additionals, ..answer(zone.ns(name.clone(), NEGATIVE_TTL)) }
            }
            _ => self.addresses(name, kind, NEGATIVE_TTL, &|family| {
                self.servers.get(family).copied().into_iter().collect()
            }),
        }
    }

    /// Names of addresses.
    fn reverse(&self, name: &Name, kind: RecordType) -> Option<Answer> {
        let Ok(net) = name.parse_arpa_name() else { return self.below_reverse(name) };
        // `005.0.200.10.in-addr.arpa` is read as an address, too, and is none's.
        if Name::from(net.addr()).trim_to(name.iter().count()) != *name {
            let authorities = vec![self.zone.reverse_soa(net, self.serial)?];
            return Some(match self.synced {
                true => Answer { code: ResponseCode::NXDomain, authorities, ..Answer::default() },
                false => failure(),
            });
        }
        let (addr, whole) = (net.addr(), net.prefix_len() == net.max_prefix_len());
        let soa = self.zone.reverse_soa(net, self.serial);
        if !self.synced {
            return soa.map(|_| failure());
        }
        let pointers: Vec<_> = if whole { self.pointers(addr) } else { Vec::new() };
        if pointers.is_empty() {
            let soa = soa?;
            return Some(match kind {
                RecordType::SOA if soa.name == *name => Answer { answers: vec![soa], ..Answer::default() },
                RecordType::NS if soa.name == *name => {
                    let ns = self.zone.ns(name.clone(), NEGATIVE_TTL);
                    Answer { answers: vec![ns], ..Answer::default() }
                }
                // A virtual IP of a service that can't be read.
                _ if whole && self.unknown.may_have_services() => self.unnamed(None),
                _ => {
                    let code = if whole { ResponseCode::NXDomain } else { ResponseCode::NoError };
                    Answer { code, authorities: vec![soa], ..Answer::default() }
                }
            });
        }
        match (kind, soa) {
            (RecordType::PTR, soa) => {
                let records = pointers.into_iter().filter_map(|(service, label)| {
                    let mut target = self.name_of(service)?;
                    if let Some(label) = label {
                        target = target.prepend_label(label.as_bytes()).ok()?;
                    }
                    Some(Record::from_rdata(name.clone(), service.ttl, RData::PTR(PTR(target))))
                });
                let answers: Vec<_> = records.collect();
                // None of the names can be written.
                let authorities = if answers.is_empty() { vec![soa?] } else { Vec::new() };
                Some(Answer { answers, authorities, ..Answer::default() })
            }
            (RecordType::ANY, _) => Some(self.other(name, kind, NEGATIVE_TTL)),
            (_, Some(soa)) => Some(Answer { authorities: vec![soa], ..Answer::default() }),
            // Someone else's zone has more to say.
            (_, None) => None,
        }
    }

    /// Services that have a name for an address, with the label below their own where it is an endpoint's.
    fn pointers(&self, addr: IpAddr) -> Vec<(&ServiceNames, Option<&str>)> {
        let named = self.having(addr).filter_map(|service| Some((service, service.name_of_address(addr)?)));
        named.take(MOST_POINTERS).collect()
    }

    /// Names in a reverse zone that are no address's, as `_dns-sd._udp.0.0.200.10.in-addr.arpa` (RFC 6763, 11): there is none.
    fn below_reverse(&self, name: &Name) -> Option<Answer> {
        let labels = name.iter().count();
        if labels < 3 || !name.iter().next_back().is_some_and(|top| top.eq_ignore_ascii_case(b"arpa")) {
            return None;
        }
        let parents = (3..labels).rev().map(|n| name.trim_to(n));
        let net = parents.filter_map(|parent| parent.parse_arpa_name().ok()).next()?;
        let soa = self.zone.reverse_soa(net, self.serial)?;
        if !self.synced {
            return Some(failure());
        }
        Some(Answer { code: ResponseCode::NXDomain, authorities: vec![soa], ..Answer::default() })
    }

    /// Names without the zone, as a pod of a namespace may use them for services of that namespace: only those that are
    /// there, since every other one belongs to the rest of the world, as some do whatever is there.
    fn short(&self, name: &Name, kind: RecordType, client: Option<IpAddr>) -> Option<Answer> {
        let labels: Vec<&[u8]> = name.iter().take(4).collect();
        let (service, before) = labels.split_last()?;
        let fits = before.len() <= 2 && may_stand_before_a_service(before);
        if !fits || !self.synced || is_localhost(name) || is_of_top_level(name, kind) {
            return None;
        }
        let client = client?;
        let may_be_here = |namespace: &str| {
            let key = name_key(service, namespace.as_bytes());
            // Of an alias nothing is known: that may be any name without dots.
            let alias = || is_short(&labels) && self.unknown.may_be_in(namespace.as_bytes());
            self.unknown.has(&key) || alias()
        };
        let Some(namespace) = self.namespace_of(client) else {
            let has = |namespace: &str| {
                self.service(&name_key(service, namespace.as_bytes())).is_some() || may_be_here(namespace)
            };
            let stranger = self.addresses.get(&client).is_none();
            return (stranger && self.unknown.may_have_pod(has, is_short(&labels))).then(failure);
        };
        match self.service(&name_key(service, namespace.as_bytes())) {
            Some(service) => {
                let mut answer = self.of_service(name, before, kind, service)?;
                // Who may keep that there is nothing does not believe a zone that the name is not in.
                for soa in &mut answer.authorities {
                    soa.name.clone_from(name);
                }
                Some(answer)
            }
            None => {
                may_be_here(namespace).then(|| self.unnamed(Some(&name_key(service, namespace.as_bytes()))))
            }
        }
    }

    fn name_of(&self, service: &ServiceNames) -> Option<Name> {
        service_name(&self.zone, &service.key.name, &service.key.namespace)
    }

    /// A type that a name does not have, or all types.
    fn other(&self, name: &Name, kind: RecordType, ttl: u32) -> Answer {
        if kind != RecordType::ANY {
            return self.no_data(ttl);
        }
        Answer::any(name)
    }

    /// The name is there and has nothing of that type. May be kept as long as an answer may.
    fn no_data(&self, ttl: u32) -> Answer {
        let soa = self.zone.soa(self.serial, ttl.min(NEGATIVE_TTL));
        Answer { authorities: vec![soa], ..Answer::default() }
    }

    /// What may be there besides what is known: a service's name, by its key, or any.
    fn unnamed(&self, name: Option<&[u8]>) -> Answer {
        Answer { soon: self.unknown.is_coming(name), ..failure() }
    }

    fn no_name(&self) -> Answer {
        Answer { code: ResponseCode::NXDomain, ..self.no_data(NEGATIVE_TTL) }
    }
}

/// What a service's own name answers of a family. It may be that there are some and nobody knows of them, where it is empty.
pub(super) fn main_addresses(service: &ServiceNames, family: Family) -> Few {
    let one = |ip: Option<IpAddr>| ip.map_or_else(Few::default, Few::One);
    match &service.main {
        Main::Vips(vips) => one(vips.get(family).copied()),
        Main::Endpoints(DnsAnswer::Shuffle, of) => Few::Many(shuffled(of.get(family))),
        Main::Endpoints(DnsAnswer::Single, of) => {
            one(of.get(family).and_then(|of| of.next(service.turns.of(family))))
        }
    }
}

/// Addresses, of which there is mostly one.
#[derive(Debug)]
pub(super) enum Few {
    /// It.
    One(IpAddr),
    /// None or more.
    Many(Vec<IpAddr>),
}

impl Default for Few {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl std::ops::Deref for Few {
    type Target = [IpAddr];
    fn deref(&self) -> &[IpAddr] {
        match self {
            Self::One(ip) => std::slice::from_ref(ip),
            Self::Many(all) => all,
        }
    }
}

/// What nobody can answer now.
fn failure() -> Answer {
    Answer::code(ResponseCode::ServFail)
}

/// The family of addresses that a type asks for.
fn family(kind: RecordType) -> Option<Family> {
    match kind {
        RecordType::A => Some(Family::V4),
        RecordType::AAAA => Some(Family::V6),
        _ => None,
    }
}

/// Whether a service may have a name of these labels below its own: one of an endpoint, `tasks`, or of a port. What searches
/// append the zone to, `www.example.com`, is none.
fn may_stand_before_a_service(labels: &[&[u8]]) -> bool {
    labels.len() < 2 || labels.iter().all(|label| label.starts_with(b"_"))
}

/// Whether a name outside the zone is most likely one without it: the world has few of that kind.
pub(super) fn is_short(labels: &[&[u8]]) -> bool {
    match labels {
        [_] => true,
        [first, _] => first.eq_ignore_ascii_case(TASKS.as_bytes()),
        [port, protocol, _] => port.starts_with(b"_") && protocol.starts_with(b"_"),
        _ => false,
    }
}

fn shuffled(of: Option<&Addresses>) -> Vec<IpAddr> {
    of.map(|of| RANDOM.with_borrow_mut(|random| of.shuffled(random))).unwrap_or_default()
}

fn is_protocol(port: &PortNames, label: &[u8]) -> bool {
    label.strip_prefix(b"_").is_some_and(|l| l.eq_ignore_ascii_case(port.protocol.lower().as_bytes()))
}

fn is_port(port: &PortNames, label: &[u8]) -> bool {
    label.strip_prefix(b"_").is_some_and(|l| l.eq_ignore_ascii_case(port.name.as_bytes()))
}

fn address(owner: Name, ttl: u32, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(owner, ttl, data)
}

/// `service.namespace.zone.`
pub fn service_name(zone: &Zone, service: &Arc<str>, namespace: &Arc<str>) -> Option<Name> {
    zone.name.prepend_label(namespace.as_bytes()).and_then(|n| n.prepend_label(service.as_bytes())).ok()
}
