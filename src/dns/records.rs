//! What the names of one service answer, worked out when the service changes and not per query.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, atomic::AtomicU32},
};

use super::choice::{Addresses, Random};
use crate::{
    compile::endpoints::{Place, choose, serving},
    model::{
        endpoints::{Endpoint, Slice},
        ids::{Family, PerFamily, Protocol, ServiceKey},
        service::{DnsAnswer, Mode, Reach, Service},
    },
};

/// Everything that the names of one service answer.
#[derive(Debug)]
pub struct ServiceNames {
    /// The service.
    pub key: ServiceKey,
    /// Seconds that its answers may be kept.
    pub ttl: u32,
    /// Seconds since 1970 when it was created: of two that claim an alias the older has it.
    pub created: u64,
    /// Further names in its namespace.
    pub aliases: Vec<Arc<str>>,
    /// What its own name answers.
    pub main: Main,
    /// All endpoints that serve, on any node and of any weight, in both modes: `tasks.`.
    pub tasks: PerFamily<Addresses>,
    /// Endpoints by their label below the service's name.
    pub endpoints: BTreeMap<Arc<str>, Vec<IpAddr>>,
    /// Addresses of all endpoints, also of those that do not serve, with their labels: who asks is known by them.
    pub known: Vec<(IpAddr, Arc<str>)>,
    /// Ports that have names.
    pub ports: Vec<PortNames>,
    /// Whose turn it is. Outlives changes of the service.
    pub turns: Arc<Turns>,
}

/// What a service's own name answers.
#[derive(Debug)]
pub enum Main {
    /// Its virtual IPs, whether or not it has endpoints.
    Vips(PerFamily<IpAddr>),
    /// Its endpoints.
    Endpoints(DnsAnswer, PerFamily<Addresses>),
}

/// Counters of answers with one address.
#[derive(Debug)]
pub struct Turns {
    v4: AtomicU32,
    v6: AtomicU32,
}

impl Default for Turns {
    /// Beginning anywhere: not every node with the same endpoint.
    fn default() -> Self {
        let mut random = Random::default();
        let mut start = || AtomicU32::new((random.number() >> 33) as u32);
        Self { v4: start(), v6: start() }
    }
}

impl Turns {
    /// The counter of a family: a client asks for both at once.
    pub fn of(&self, family: Family) -> &AtomicU32 {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

/// A named port: `_name._protocol` below the service's name.
#[derive(Debug)]
pub struct PortNames {
    /// The port's name.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it is found.
    pub targets: Vec<PortTarget>,
}

/// A place where a port is found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortTarget {
    /// Label of the endpoint; the service's own name where there is none.
    pub label: Option<Arc<str>>,
    /// Port there.
    pub port: u16,
    /// Weight among its like.
    pub weight: u16,
}

/// What a service's names depend on besides the service and its slices.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// This node.
    pub place: Place<'a>,
    /// The service's virtual IPs.
    pub vips: PerFamily<IpAddr>,
}

impl ServiceNames {
    /// Works out the names of a service with these slices. `before` is what it answered so far: its turns go on.
    pub fn new(
        service: &Service,
        slices: &[Arc<Slice>],
        context: Context<'_>,
        before: Option<&ServiceNames>,
    ) -> Self {
        let mut known = BTreeMap::new();
        let mut endpoints: BTreeMap<Arc<str>, Vec<IpAddr>> = BTreeMap::new();
        for endpoint in slices.iter().flat_map(|slice| &slice.endpoints) {
            known.entry(endpoint.address).or_insert_with(|| label(endpoint));
        }
        let tasks = taking(service, slices, context.place, Reach::ALL, 1);
        for (_, addresses) in tasks.iter() {
            for (addr, _) in addresses.entries() {
                let Some(label) = known.get(addr) else { continue };
                endpoints.entry(label.clone()).or_default().push(*addr);
            }
        }
        let main = match service.mode {
            Mode::Vip => Main::Vips(context.vips),
            Mode::Dnsrr => Main::Endpoints(
                service.dns.answer,
                taking(service, slices, context.place, service.internal(), 0),
            ),
        };
        Self {
            key: service.key.clone(),
            ttl: service.dns.ttl,
            created: service.created,
            aliases: service.dns.aliases.clone(),
            main,
            tasks,
            endpoints,
            ports: ports(service, slices, context.place, &known),
            known: known.into_iter().collect(),
            turns: before.map(|names| names.turns.clone()).unwrap_or_default(),
        }
    }

    /// Weight-free addresses of the service's own name, for messages.
    pub fn addresses(&self) -> Vec<IpAddr> {
        match &self.main {
            Main::Vips(vips) => vips.iter().map(|(_, ip)| *ip).collect(),
            Main::Endpoints(_, of) => {
                of.iter().flat_map(|(_, a)| a.entries().iter().map(|(ip, _)| *ip)).collect()
            }
        }
    }
}

/// Addresses of the endpoints that take new connections, as the kernel's do. A family that the service does not have is not
/// answered. Each weighs `least` at least: what weighs 0 is not answered.
fn taking(
    service: &Service,
    slices: &[Arc<Slice>],
    place: Place<'_>,
    reach: Reach,
    least: u16,
) -> PerFamily<Addresses> {
    let mut out = PerFamily::default();
    for &family in &service.families {
        let of_family = slices.iter().filter(|s| s.family == family).flat_map(|s| &s.endpoints);
        let chosen = choose(service, of_family.map(|e| (e.address, e)), place, reach);
        let weighed =
            chosen.into_iter().map(|(addr, found)| (addr, service.weight(found.endpoint).max(least)));
        out.set(family, Some(Addresses::new(weighed)));
    }
    out
}

/// Its hostname, else the name of its pod, else its address with dashes: what is a label.
fn label(endpoint: &Endpoint) -> Arc<str> {
    let names = [endpoint.hostname.as_deref(), endpoint.target.as_deref()];
    let usable = names.into_iter().flatten().find(|name| is_label(name));
    match usable {
        Some(name) => name.to_ascii_lowercase().into(),
        None => match endpoint.address {
            IpAddr::V4(a) => a.to_string().replace('.', "-").into(),
            // Written out, so that no label begins or ends with a dash.
            IpAddr::V6(a) => a.segments().map(|s| format!("{s:x}")).join("-").into(),
        },
    }
}

/// A host name's label (RFC 1123, 2.1).
fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn ports(
    service: &Service,
    slices: &[Arc<Slice>],
    place: Place<'_>,
    known: &BTreeMap<IpAddr, Arc<str>>,
) -> Vec<PortNames> {
    let named = service.ports.iter().filter_map(|port| Some((port, port.name.clone()?)));
    let names = named.map(|(port, name)| {
        let targets = match service.mode {
            Mode::Vip => vec![PortTarget { label: None, port: port.port, weight: 1 }],
            Mode::Dnsrr => {
                let mut targets = Vec::new();
                for &family in &service.families {
                    let found = serving(service, port, slices, family, place, service.internal());
                    for (real, candidate) in found {
                        let weight = service.weight(candidate.endpoint);
                        // A range keeps the port that was asked for.
                        let port = if real.port == 0 { port.port } else { real.port };
                        let target = PortTarget { label: known.get(&real.addr).cloned(), port, weight };
                        // Both families of one endpoint are one target.
                        if weight > 0 && target.label.is_some() && !targets.contains(&target) {
                            targets.push(target);
                        }
                    }
                }
                targets
            }
        };
        PortNames { name, protocol: port.protocol, targets }
    });
    names.collect()
}
