//! One service: its virtual servers and set elements.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;

use super::endpoints::{Candidate, Place, serving};
use crate::model::{
    endpoints::Slice,
    ids::{Family, Mark, PerFamily, PortId, Protocol, Scope, ServiceKey},
    kernel::{
        Element, Elements, RealServerConfig, RealServerKey, Target, VirtualServer, VirtualServerConfig,
        VirtualServerKey,
    },
    node::{NodeConfig, NodeFacts},
    service::{Mode, PublishMode, Reach, Service, ServicePort},
    small::{SmallMap, from_sorted},
};

/// What the allocator gave a service.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Assigned {
    /// Its virtual IPs; none in mode DNSRR.
    pub vips: PerFamily<IpAddr>,
    /// Published port of each port that is published (the first one of a range).
    pub published: BTreeMap<PortId, u16>,
    /// Marks. Both scopes of a port have the same one while they have the same endpoints.
    pub marks: BTreeMap<(PortId, Scope), Mark>,
}

/// Everything that the result depends on, besides the service itself.
pub struct Inputs<'a> {
    /// The node's configuration.
    pub config: &'a NodeConfig,
    /// The node's addresses.
    pub facts: &'a NodeFacts,
    /// What is in the kernel now: real servers that the service no longer has are drained, not cut.
    pub present: &'a HashMap<VirtualServerKey, VirtualServer>,
    /// Drains that run already.
    pub drains: &'a Drains,
    /// Real servers in the kernel that the source can't speak for, since it can't be read completely: they stay as they are.
    pub kept: &'a Kept,
    /// Published ports that a socket of the host holds (design decision 5): not published on this node.
    pub blocked: &'a dyn Fn(Protocol, u16) -> bool,
    /// Now.
    pub now: Timestamp,
}

/// Real servers that finish their connections, and until when at the latest.
pub type Drains = BTreeMap<(VirtualServerKey, RealServerKey), Timestamp>;

/// Real servers that stay as they are, with whether they are on this node.
pub type Kept = BTreeMap<(VirtualServerKey, RealServerKey), bool>;

/// State of a real server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RealState {
    /// Takes new connections.
    Ready,
    /// Finishes those it has, at the latest until then.
    Draining(Timestamp),
    /// As an earlier run left it: what the source says of it can't be read.
    Kept,
}

/// What a person wants to know about a real server besides its address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RealInfo {
    /// `targetRef.name` or `hostname`.
    pub target: Option<Arc<str>>,
    /// Its node.
    pub node: Option<Arc<str>>,
    /// Whether it takes new connections.
    pub state: RealState,
}

/// One port of a compiled service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompiledPort {
    /// The port as declared.
    pub spec: ServicePort,
    /// Its published port, where it has one.
    pub published: Option<u16>,
    /// Why a published port does not answer on this node, where that is so.
    pub not_published: Option<String>,
    /// Marks by scope.
    pub marks: BTreeMap<Scope, Mark>,
}

/// A service in the kernel's terms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompiledService {
    /// The service.
    pub key: ServiceKey,
    /// VIP or DNSRR.
    pub mode: Mode,
    /// Its virtual IPs.
    pub vips: PerFamily<IpAddr>,
    /// Its ports.
    pub ports: Vec<CompiledPort>,
    /// IPVS services with their destinations.
    pub virtual_servers: SmallMap<VirtualServerKey, VirtualServer>,
    /// About each destination.
    pub reals: SmallMap<(VirtualServerKey, RealServerKey), RealInfo>,
    /// Set elements that belong to this service alone.
    pub elements: SmallMap<Element, Option<Mark>>,
    /// Set elements that other services may have too, in order.
    pub shared: Vec<Element>,
    /// Endpoints that are ready, and all, on any node.
    pub endpoints: (usize, usize),
}

impl CompiledPort {
    /// Whether the number is one that the port is published by.
    pub fn is_published_as(&self, protocol: Protocol, number: u16) -> bool {
        let numbers = self.published.map(|first| ports_from(first, self.spec.span()));
        self.spec.protocol == protocol && numbers.is_some_and(|numbers| numbers.contains(&number))
    }

    /// Whether an entry is about this published port.
    pub fn publishes(&self, element: &Element) -> bool {
        match element {
            Element::Published(t) => self.is_published_as(t.protocol, t.port),
            Element::Loopback(_, protocol, port) => self.is_published_as(*protocol, *port),
            _ => false,
        }
    }
}

impl CompiledService {
    /// Families in which a mark of it may have an IPVS service: those of its VIPs and of its entries.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(|family| {
            self.vips.get(*family).is_some() || self.elements.keys().any(|e| e.family() == *family)
        })
    }

    /// Its marks, whether IPVS has a service for them or not.
    pub fn marks(&self) -> impl Iterator<Item = Mark> {
        self.ports.iter().flat_map(|port| port.marks.values()).copied()
    }

    /// The drains that this result contains.
    pub fn drains(&self) -> impl Iterator<Item = ((VirtualServerKey, RealServerKey), Timestamp)> {
        self.reals.iter().filter_map(|(key, info)| match info.state {
            RealState::Draining(until) => Some((*key, until)),
            RealState::Ready | RealState::Kept => None,
        })
    }
}

/// What is being compiled.
#[derive(Default)]
struct Draft {
    virtual_servers: BTreeMap<VirtualServerKey, VirtualServer>,
    reals: BTreeMap<(VirtualServerKey, RealServerKey), RealInfo>,
    elements: Elements,
    shared: BTreeSet<Element>,
}

/// Compiles one service.
pub fn compile_service(
    service: &Service,
    slices: &[Arc<Slice>],
    assigned: &Assigned,
    inputs: &Inputs<'_>,
) -> CompiledService {
    let mut out = Draft::default();
    let mut ports = Vec::with_capacity(service.ports.len());
    let families = served_families(service, &assigned.vips, inputs.config, inputs.facts);
    for port in &service.ports {
        let mut compiled =
            CompiledPort { spec: port.clone(), published: None, not_published: None, marks: BTreeMap::new() };
        if service.mode == Mode::Vip
            && let Some(&mark) = assigned.marks.get(&(port.id(), Scope::Vip))
        {
            compiled.marks.insert(Scope::Vip, mark);
            for (family, vip) in assigned.vips.iter().filter(|(family, _)| families.contains(family)) {
                add_virtual_server(
                    &mut out,
                    service,
                    port,
                    slices,
                    (family, mark),
                    service.internal(),
                    inputs,
                );
                for p in ports_from(port.port, port.span()) {
                    let target = Target { addr: *vip, protocol: port.protocol, port: p };
                    lead_to(&mut out, target, mark);
                }
            }
        }
        publish(&mut out, &mut compiled, service, slices, assigned, &families, inputs);
        ports.push(compiled);
    }
    // IPVS would refuse what comes to one without destinations by an error that clients by 127.0.0.1 never see.
    out.virtual_servers.retain(|_, server| !server.reals.is_empty());
    CompiledService {
        key: service.key.clone(),
        mode: service.mode,
        vips: assigned.vips,
        ports,
        virtual_servers: from_sorted(out.virtual_servers.into_iter()),
        reals: from_sorted(out.reals.into_iter()),
        elements: from_sorted(out.elements.into_iter()),
        shared: out.shared.into_iter().collect(),
        endpoints: count_endpoints(slices),
    }
}

/// The numbers of a port, or of a range of them.
pub fn ports_from(first: u16, span: u16) -> RangeInclusive<u16> {
    first..=first.saturating_add(span.saturating_sub(1))
}

/// Whether the node serves a family: it has a range for it and an address of its own, without which there are no rules
/// (`compile_base`).
pub fn is_served(family: Family, config: &NodeConfig, facts: &NodeFacts) -> bool {
    config.ranges.get(family).is_some() && facts.primary.get(family).is_some()
}

/// Families that a service is to be served in: those of its VIPs, or for DNSRR those that it asks for.
pub fn wanted_families(service: &Service, vips: &PerFamily<IpAddr>) -> Vec<Family> {
    match service.mode {
        Mode::Vip => vips.iter().map(|(f, _)| f).collect(),
        Mode::Dnsrr => service.families.clone(),
    }
}

/// Those of them that it is served in on this node.
pub fn served_families(
    service: &Service,
    vips: &PerFamily<IpAddr>,
    config: &NodeConfig,
    facts: &NodeFacts,
) -> Vec<Family> {
    let mut families = wanted_families(service, vips);
    families.retain(|f| is_served(*f, config, facts));
    families
}

fn publish(
    out: &mut Draft,
    compiled: &mut CompiledPort,
    service: &Service,
    slices: &[Arc<Slice>],
    assigned: &Assigned,
    families: &[Family],
    inputs: &Inputs<'_>,
) {
    let port = &compiled.spec.clone();
    let Some(publish) = &port.publish else { return };
    let (Some(&number), Some(&mark)) =
        (assigned.published.get(&port.id()), assigned.marks.get(&(port.id(), Scope::Ingress)))
    else {
        return;
    };
    compiled.published = Some(number);
    compiled.marks.insert(Scope::Ingress, mark);
    if !inputs.facts.publishes_at_one_of(&publish.addresses) {
        compiled.not_published =
            Some("none of publish.addresses is an address that this node publishes on".into());
    }
    let numbers: Vec<u16> = ports_from(number, port.span()).collect();
    if let Some(held) = numbers.iter().find(|n| (inputs.blocked)(port.protocol, **n)) {
        compiled.not_published = Some(format!("{} {held} is held by a socket of this host", port.protocol));
        return;
    }
    let (mut elsewhere, mut here) = (false, false);
    for &family in families {
        let Some(ingress) = inputs.config.ingress(family) else { continue };
        add_virtual_server(
            out,
            service,
            port,
            slices,
            (family, mark),
            service.external(publish.mode),
            inputs,
        );
        let key = VirtualServerKey { family, mark };
        let empty = out.virtual_servers.get(&key).is_none_or(|vs| vs.reals.is_empty());
        if publish.mode == PublishMode::Host && empty {
            out.virtual_servers.remove(&key);
            elsewhere = true;
            continue;
        }
        here = true;
        let wanted = |addr: &IpAddr| publish.addresses.is_empty() || publish.addresses.contains(addr);
        let loopback: IpAddr = match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        // The entry stays without an endpoint, too: no socket of the host is to answer in its place. It leads past IPVS, whose
        // error a TCP socket of the node would not see (`lead_to`). UDP is told by EPERM, and keeps the mark, by which flows
        // of destinations that go are found.
        let is_led = port.protocol == Protocol::Udp || takes_connections(out, key);
        let leads_to = if is_led { mark } else { Mark::NOWHERE };
        for &n in &numbers {
            let target = |addr| Target { addr, protocol: port.protocol, port: n };
            lead_to(out, target(ingress), mark);
            for addr in &inputs.facts.published_addresses {
                if Family::of(addr) == family && wanted(addr) {
                    out.elements.insert(Element::Published(target(*addr)), Some(leads_to));
                }
            }
            if wanted(&loopback) {
                out.elements.insert(Element::Loopback(family, port.protocol, n), Some(leads_to));
            }
        }
    }
    if elsewhere && !here {
        compiled.not_published.get_or_insert_with(|| "no endpoint on this node (mode Host)".into());
    }
}

/// Leads packets to IPVS, where something takes new connections. IPVS refuses the others with an ICMP error,
/// which a TCP socket that is just sending its SYN drops (`tcp_v6_err`: the socket is locked), so that the
/// client tries for a second; the guard refuses with a reset, at once.
fn lead_to(out: &mut Draft, target: Target, mark: Mark) {
    if takes_connections(out, VirtualServerKey { family: Family::of(&target.addr), mark }) {
        out.elements.insert(Element::Vip(target), Some(mark));
    }
}

fn takes_connections(out: &Draft, key: VirtualServerKey) -> bool {
    out.virtual_servers.get(&key).is_some_and(|s| s.reals.values().any(|real| real.weight > 0))
}

/// Adds the IPVS service of (family, mark) with its destinations, unless the other scope has added it.
fn add_virtual_server(
    out: &mut Draft,
    service: &Service,
    port: &ServicePort,
    slices: &[Arc<Slice>],
    (family, mark): (Family, Mark),
    reach: Reach,
    inputs: &Inputs<'_>,
) {
    let key = VirtualServerKey { family, mark };
    if out.virtual_servers.contains_key(&key) {
        return;
    }
    let candidates = serving(service, port, slices, family, Place::of(inputs.config), reach);
    let mut reals = BTreeMap::new();
    for (real, Candidate { endpoint, local }) in &candidates {
        reals.insert(*real, RealServerConfig { weight: u32::from(service.weight(endpoint)) });
        out.reals.insert(
            (key, *real),
            RealInfo {
                target: endpoint.target.clone(),
                node: endpoint.node.clone(),
                state: RealState::Ready,
            },
        );
        let_in(out, port, *real, *local, inputs);
    }
    keep_unread(out, port, slices, key, &mut reals, inputs);
    drain_removed(out, service, port, key, &mut reals, inputs);
    let config =
        VirtualServerConfig { scheduler: service.scheduler.name.clone(), flags: service.scheduler.flags };
    let reals = Arc::new(from_sorted(reals.into_iter()));
    out.virtual_servers.insert(key, VirtualServer { config, protocol: Some(port.protocol), reals });
}

/// What the rules have to know of a real server.
fn let_in(out: &mut Draft, port: &ServicePort, real: RealServerKey, local: bool, inputs: &Inputs<'_>) {
    out.shared.insert(Element::Endpoint(real.addr));
    if local {
        out.shared.insert(Element::Local(real.addr));
    }
    if inputs.facts.all_addresses.contains(&real.addr) {
        for p in own_ports(port, real) {
            let target = Target { addr: real.addr, protocol: port.protocol, port: p };
            out.shared.insert(Element::Own(target));
        }
    }
}

/// Real servers of which nobody can say whether they are still wanted: no slice names them, in any condition.
fn keep_unread(
    out: &mut Draft,
    port: &ServicePort,
    slices: &[Arc<Slice>],
    key: VirtualServerKey,
    reals: &mut BTreeMap<RealServerKey, RealServerConfig>,
    inputs: &Inputs<'_>,
) {
    if inputs.kept.is_empty() {
        return;
    }
    let Some(present) = inputs.present.get(&key) else { return };
    let named: BTreeSet<IpAddr> = slices.iter().flat_map(|s| &s.endpoints).map(|e| e.address).collect();
    for (real, config) in present.reals.iter().filter(|(real, _)| !named.contains(&real.addr)) {
        let Some(local) = inputs.kept.get(&(key, *real)) else { continue };
        if reals.contains_key(real) {
            continue;
        }
        reals.insert(*real, *config);
        out.reals.insert((key, *real), RealInfo { target: None, node: None, state: RealState::Kept });
        let_in(out, port, *real, *local, inputs);
    }
}

fn own_ports(port: &ServicePort, real: RealServerKey) -> Vec<u16> {
    if real.port == 0 { ports_from(port.port, port.span()).collect() } else { vec![real.port] }
}

/// Real servers that are in the kernel but no longer wanted finish their connections at weight 0.
/// UDP has no connections that end: its flows move at once (kernel facts, Q7).
fn drain_removed(
    out: &mut Draft,
    service: &Service,
    port: &ServicePort,
    key: VirtualServerKey,
    reals: &mut BTreeMap<RealServerKey, RealServerConfig>,
    inputs: &Inputs<'_>,
) {
    // dh goes on choosing a destination of weight 0, and refuses every client of the VIP then (`ip_vs_dh_schedule` of the kernel).
    if port.protocol == Protocol::Udp || service.drain == Duration::ZERO || &*service.scheduler.name == "dh" {
        return;
    }
    let Some(present) = inputs.present.get(&key) else { return };
    for real in present.reals.keys() {
        if reals.contains_key(real) {
            continue;
        }
        let until = inputs
            .drains
            .get(&(key, *real))
            .copied()
            .unwrap_or_else(|| inputs.now.checked_add(service.drain).unwrap_or(Timestamp::MAX));
        if until <= inputs.now {
            continue;
        }
        reals.insert(*real, RealServerConfig { weight: 0 });
        out.shared.insert(Element::Endpoint(real.addr));
        out.reals
            .insert((key, *real), RealInfo { target: None, node: None, state: RealState::Draining(until) });
    }
}

/// Endpoints that are ready, and all: those of the family that has most, since a dual-stack endpoint is one.
fn count_endpoints(slices: &[Arc<Slice>]) -> (usize, usize) {
    let count = |family: Family| {
        let mut by_address: BTreeMap<IpAddr, bool> = BTreeMap::new();
        for endpoint in slices.iter().filter(|s| s.family == family).flat_map(|s| &s.endpoints) {
            *by_address.entry(endpoint.address).or_default() |= endpoint.ready;
        }
        (by_address.values().filter(|ready| **ready).count(), by_address.len())
    };
    let (v4, v6) = (count(Family::V4), count(Family::V6));
    if v6.1 > v4.1 { v6 } else { v4 }
}
