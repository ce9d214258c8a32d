//! What the names of one service answer, worked out when the service changes and not per query.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use super::choice::{Addresses, Turn};
use crate::{
    compile::endpoints::{Place, choose, serving},
    model::{
        endpoints::{Endpoint, Slice},
        ids::{Family, PerFamily, Protocol, ServiceKey},
        service::{DnsAnswer, Mode, Reach, Service},
    },
};

/// The label below a service's name that all of its endpoints have together.
pub const TASKS: &str = "tasks";

/// Everything that the names of one service answer.
#[derive(Debug)]
pub struct ServiceNames {
    /// The service.
    pub key: ServiceKey,
    /// The name that it takes its endpoints by.
    pub group: ServiceKey,
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
    /// All endpoints by their addresses, also those that do not serve: who asks is known by them.
    known: Box<[Known]>,
    /// Places in `known` of those that serve, by their labels.
    by_label: Box<[u32]>,
    /// Ports that have names.
    pub ports: Vec<PortNames>,
    /// Whose turn it is. Outlives changes of the service.
    pub turns: Arc<Turns>,
}

/// An endpoint.
#[derive(Debug)]
pub struct Known {
    /// Its address.
    pub address: IpAddr,
    /// Its label below the service's name.
    pub label: Arc<str>,
    /// Whether the label is answered with the address: where it serves, or a port of the service is found there.
    pub serves: bool,
}

/// What a service's own name answers.
#[derive(Debug)]
pub enum Main {
    /// Its virtual IPs, whether or not it has endpoints.
    Vips(PerFamily<IpAddr>),
    /// Its endpoints.
    Endpoints(DnsAnswer, PerFamily<Addresses>),
}

/// Whose turn it is with answers of one address.
#[derive(Default, Debug)]
pub struct Turns {
    v4: Turn,
    v6: Turn,
}

impl Turns {
    /// That of a family: a client asks for both at once.
    pub fn of(&self, family: Family) -> &Turn {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

/// A named port: `_name._protocol` below the service's name.
#[derive(PartialEq, Eq, Debug)]
pub struct PortNames {
    /// The port's name.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it is found.
    pub targets: Vec<PortTarget>,
}

/// A place where a port is found.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
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
        let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
        let mut known: Vec<_> =
            endpoints.map(|e| Known { address: e.address, label: label(e), serves: false }).collect();
        known.sort_by_key(|known| known.address);
        known.dedup_by_key(|known| known.address);
        let mut known = known.into_boxed_slice();
        let tasks = taking(service, slices, context.place, Reach::ALL, 1);
        for (address, _) in tasks.iter().flat_map(|(_, addresses)| addresses.entries()) {
            if let Some(place) = place(&known, *address) {
                known[place].serves = true;
            }
        }
        let (ports, targets) = ports(service, slices, context.place, &known);
        // A port may be served where the service as a whole is not (by an endpoint that ends, of the only slice that has the
        // port): its name is answered, so its host's is.
        for place in targets {
            known[place].serves = true;
        }
        let mut by_label: Box<[u32]> =
            (0..).zip(&known).filter(|(_, k)| k.serves).map(|(place, _)| place).collect();
        by_label.sort_by_key(|place| &known[*place as usize].label);
        let main = match service.mode {
            Mode::Vip => Main::Vips(context.vips),
            Mode::Dnsrr => Main::Endpoints(
                service.dns.answer,
                taking(service, slices, context.place, service.internal(), 0),
            ),
        };
        Self {
            key: service.key.clone(),
            group: service.group(),
            ttl: service.dns.ttl,
            created: service.created,
            aliases: service.dns.aliases.clone(),
            main,
            tasks,
            ports,
            known,
            by_label,
            turns: before.map(|names| names.turns.clone()).unwrap_or_default(),
        }
    }

    /// Whether all that it answers holds whatever the kernel has for it by now: it has no virtual IP, or none but those that
    /// it was programmed with, as far as `before` tells, and no port besides.
    pub fn is_free_of_kernel(&self, before: Option<&Self>) -> bool {
        match (&self.main, before.map(|before| (&before.main, &before.ports))) {
            (Main::Endpoints(..), _) => true,
            (Main::Vips(vips), Some((Main::Vips(had), ports))) => vips == had && self.ports == *ports,
            (Main::Vips(_), _) => false,
        }
    }

    /// The endpoint with this address.
    pub fn endpoint(&self, address: IpAddr) -> Option<&Known> {
        place(&self.known, address).and_then(|place| self.known.get(place))
    }

    /// The addresses that a label below the service's name is answered with; none where there is no such name.
    pub fn labelled(&self, label: &str) -> impl Iterator<Item = IpAddr> {
        let known = |place: &u32| &self.known[*place as usize];
        let first = self.by_label.partition_point(|place| *known(place).label < *label);
        let rest = self.by_label[first..].iter().map(known);
        rest.take_while(move |known| *known.label == *label).map(|known| known.address)
    }

    /// The labels below the service's name that are answered with addresses of endpoints, each once.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        let mut before = None;
        let labels = self.by_label.iter().map(|place| &*self.known[*place as usize].label);
        labels.filter(move |label| before.replace(*label) != Some(*label))
    }

    /// The label below the service's name that is answered with an address, none for its own name; `None` where no name is.
    pub fn name_of_address(&self, address: IpAddr) -> Option<Option<&str>> {
        if self.has_vip(address) {
            return Some(None);
        }
        self.endpoint(address).filter(|known| known.serves).map(|known| Some(&*known.label))
    }

    /// Whether an address is one of its virtual IPs.
    fn has_vip(&self, address: IpAddr) -> bool {
        matches!(&self.main, Main::Vips(vips) if vips.iter().any(|(_, vip)| *vip == address))
    }

    /// Whether an address is a virtual IP or an endpoint's.
    pub fn has(&self, address: IpAddr) -> bool {
        self.has_vip(address) || self.endpoint(address).is_some()
    }

    /// Its virtual IPs, and the addresses of its endpoints.
    pub fn all_addresses(&self) -> Vec<IpAddr> {
        let vips = match &self.main {
            Main::Vips(vips) => *vips,
            Main::Endpoints(..) => PerFamily::default(),
        };
        vips.iter().map(|(_, vip)| *vip).chain(self.known.iter().map(|known| known.address)).collect()
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

fn place(known: &[Known], address: IpAddr) -> Option<usize> {
    known.binary_search_by_key(&address, |known| known.address).ok()
}

/// Its hostname, else the name of its pod, else its address with dashes: what is a label, and not `tasks`, which is the name of all
/// of them.
fn label(endpoint: &Endpoint) -> Arc<str> {
    let names = [&endpoint.hostname, &endpoint.target];
    let usable = names.into_iter().flatten().find(|name| is_label(name) && !name.eq_ignore_ascii_case(TASKS));
    match usable {
        Some(name) if name.bytes().any(|b| b.is_ascii_uppercase()) => name.to_ascii_lowercase().into(),
        Some(name) => name.clone(),
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

/// The named ports, and the places in `known` of where they are found.
fn ports(
    service: &Service,
    slices: &[Arc<Slice>],
    node: Place<'_>,
    known: &[Known],
) -> (Vec<PortNames>, Vec<usize>) {
    let mut places = Vec::new();
    let named = service.ports.iter().filter_map(|port| Some((port, port.name.clone()?)));
    let names = named.map(|(port, name)| {
        let targets = match service.mode {
            Mode::Vip => vec![PortTarget { label: None, port: port.port, weight: 1 }],
            Mode::Dnsrr => {
                let (mut targets, mut seen) = (Vec::new(), HashSet::new());
                for &family in &service.families {
                    for (real, candidate) in serving(service, port, slices, family, node, service.internal())
                    {
                        let weight = service.weight(candidate.endpoint);
                        let Some(place) = place(known, real.addr).filter(|_| weight > 0) else { continue };
                        places.push(place);
                        // A range keeps the port that was asked for.
                        let port = if real.port == 0 { port.port } else { real.port };
                        let target = PortTarget { label: Some(known[place].label.clone()), port, weight };
                        // Both families of one endpoint are one target.
                        if seen.insert(target.clone()) {
                            targets.push(target);
                        }
                    }
                }
                targets
            }
        };
        PortNames { name, protocol: port.protocol, targets }
    });
    let names = names.collect();
    (names, places)
}
