//! What `show` and `explain` tell: a stable JSON shape, filled from the desired state and the kernel.
//!
//! The shape is documented in `docs/cli.md`; fields are added, never renamed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use serde::Serialize;

use super::names::NameReport;
use super::notes::notes_of;
use crate::{
    compile::{CompiledPort, CompiledService, RealState},
    dataplane::{Counters, Error, ProgramState, netfilter},
    dns::names::Names,
    model::{
        ids::{Family, Mark, Scope},
        kernel::{
            Element, RealServerConfig, RealServerKey, Target, VirtualServer, VirtualServerConfig,
            VirtualServerKey, sysctl_fits,
        },
    },
    plan::{
        Observed,
        trace::{self, From, View},
    },
    reconcile::Engine,
};

/// All services.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Name of the node that was looked at.
    pub node: String,
    /// `iptables-nft`, `iptables-legacy` or `nftables`.
    pub renderer: String,
    /// What is wrong with the node's part: rules, routes, sysctls, timeouts. Empty when all is as it should be.
    pub node_problems: Vec<String>,
    /// What only the owner of this host's firewall can do, if that has not been done.
    pub advice: Vec<String>,
    /// What is wrong with the source, and services that are left as they are because of it.
    pub source_problems: Vec<String>,
    /// The services, by name.
    pub services: Vec<ServiceReport>,
}

/// One service.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReport {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `VIP` or `DNSRR`.
    pub mode: &'static str,
    /// Its virtual IPs.
    pub vips: Vec<IpAddr>,
    /// Endpoints that are ready, on any node.
    pub ready_endpoints: usize,
    /// All endpoints.
    pub total_endpoints: usize,
    /// Its names. `explain` asks for them.
    pub names: Vec<NameReport>,
    /// Endpoints whose names are not among them.
    pub more_names: usize,
    /// Its ports.
    pub ports: Vec<PortReport>,
    /// Conflicts and other reasons why it is not served as declared.
    pub problems: Vec<String>,
    /// What is to be known all the same of a service that is.
    pub notes: Vec<String>,
}

/// One port of a service.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct PortReport {
    /// Its name, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The port, or the first of a range.
    pub port: u16,
    /// Last port of a range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
    /// Published port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published_port: Option<u16>,
    /// Why the published port does not answer on this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_published: Option<String>,
    /// IPVS services: one per family, and per scope where the scopes have different endpoints.
    pub virtual_servers: Vec<ServerReport>,
}

/// One IPVS service.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct ServerReport {
    /// `IPv4` or `IPv6`.
    pub family: Family,
    /// Its firewall mark (`ipvsadm -Ln` shows it as FWM).
    pub mark: u32,
    /// `vip`, `ingress` or both.
    pub scopes: Vec<Scope>,
    /// Scheduler.
    pub scheduler: String,
    /// Set entries that lead to it, `vips 10.200.0.5,tcp:80`, and those about its endpoints, `local 10.244.1.11`.
    pub entries: Vec<EntryReport>,
    /// `ok`, or what is wrong.
    pub state: String,
    /// Its destinations.
    pub endpoints: Vec<EndpointReport>,
    /// What the kernel, as it is now, does with packets for it. Empty where the rules are not as they should be.
    pub packets: Vec<PacketReport>,
}

/// A packet and what becomes of it.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct PacketReport {
    /// `vip` or `ingress`.
    pub scope: Scope,
    /// `pod`: a pod of this node; `outside`: another machine.
    pub from: &'static str,
    /// Address, port and protocol.
    pub to: String,
    /// What becomes of it, in words.
    pub fate: String,
}

/// A set entry.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct EntryReport {
    /// Set and key.
    pub entry: String,
    /// `ok`, or what is wrong.
    pub state: String,
}

/// One destination.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct EndpointReport {
    /// Address.
    pub address: IpAddr,
    /// Port; 0 keeps the port that the client asked for.
    pub port: u16,
    /// Name of the pod or host behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Node it runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// IPVS weight.
    pub weight: u32,
    /// `ready`, `draining`, `missing` (in the kernel), `unexpected` (in the kernel), `wrong weight N` or
    /// `wrong forwarding method or connection limits`.
    pub state: String,
    /// Established connections.
    pub active_connections: u32,
    /// Other connections in the table.
    pub inactive_connections: u32,
    /// Connections since it was added. Where it was gone for less than two minutes, the kernel goes on counting.
    pub connections: u64,
    /// Packets to it.
    pub in_packets: u64,
    /// Packets from it.
    pub out_packets: u64,
    /// Bytes to it.
    pub in_bytes: u64,
    /// Bytes from it.
    pub out_bytes: u64,
}

/// Builds the report of the services that `wanted` accepts. The engine must have been prepared; `observed`
/// is what it was prepared against.
///
/// # Errors
/// When counters can't be read.
pub fn report(
    engine: &mut Engine,
    observed: &Observed,
    source_problems: Vec<String>,
    names: &Names,
    problems: &dyn Fn(&CompiledService) -> Vec<String>,
    wanted: &dyn Fn(&CompiledService) -> bool,
) -> Result<Report, Error> {
    let compiled: Vec<_> = engine.merged().services().values().filter(|s| wanted(s)).cloned().collect();
    let mut services = Vec::with_capacity(compiled.len());
    for service in &compiled {
        let names = (super::names::of(names, &service.key), super::names::left_out(names, &service.key));
        services.push(service_report(engine, observed, service, names, problems(service))?);
    }
    Ok(Report {
        node: engine.settings().node.name.to_string(),
        renderer: engine.dataplane.netfilter.name().to_owned(),
        node_problems: node_problems(engine, observed),
        advice: firewall_advice(engine),
        source_problems,
        services,
    })
}

/// What only the owner of this host's firewall can do about it.
pub fn firewall_advice(engine: &Engine) -> Vec<String> {
    let Some(program) = &engine.merged().state().program else { return Vec::new() };
    netfilter::advice(program, engine.dataplane.netfilter.name()).unwrap_or_else(|e| {
        tracing::debug!("other nft tables can't be looked at: {e}");
        Vec::new()
    })
}

fn node_problems(engine: &Engine, observed: &Observed) -> Vec<String> {
    let want = engine.merged().state();
    let mut out = engine.dataplane.netfilter.warnings();
    match &observed.program {
        ProgramState::Installed => {}
        ProgramState::Absent => out.push("rules: not installed".into()),
        ProgramState::Drifted(what) => out.extend(what.iter().map(|w| format!("rules: {w}"))),
    }
    for (family, route) in want.routes.iter() {
        if observed.routes.get(family) != Some(route) {
            out.push(format!("route: local {} dev lo src {} is missing", route.range, route.source));
        }
    }
    for (path, value) in &want.sysctls {
        let name = path.replace('/', ".");
        match observed.sysctls.get(path) {
            Some(have) if sysctl_fits(path, value, have) => {}
            Some(have) => out.push(format!("sysctl: {name} is {have}, should be {value}")),
            None => out.push(format!("sysctl: {name} can't be read")),
        }
    }
    if let Some(want) = want.timeouts.filter(|want| *want != observed.timeouts) {
        out.push(format!("ipvs timeouts: {}, should be {want}", observed.timeouts));
    }
    let sentinel = engine.settings().node.mask.sentinel();
    for key in want.virtual_servers.keys().filter(|k| k.mark == sentinel) {
        if !observed.virtual_servers.contains_key(key) {
            out.push(format!("ipvs: the sentinel {key} is missing"));
        }
    }
    out
}

fn service_report(
    engine: &mut Engine,
    observed: &Observed,
    service: &CompiledService,
    (names, more_names): (Vec<NameReport>, usize),
    problems: Vec<String>,
) -> Result<ServiceReport, Error> {
    let mut ports = Vec::new();
    for port in &service.ports {
        ports.push(port_report(engine, observed, service, port)?);
    }
    Ok(ServiceReport {
        namespace: service.key.namespace.to_string(),
        name: service.key.name.to_string(),
        mode: match service.mode {
            crate::model::service::Mode::Vip => "VIP",
            crate::model::service::Mode::Dnsrr => "DNSRR",
        },
        vips: service.vips.iter().map(|(_, ip)| *ip).collect(),
        ready_endpoints: service.endpoints.0,
        total_endpoints: service.endpoints.1,
        names,
        more_names,
        ports,
        problems,
        notes: notes_of(engine, service),
    })
}

fn port_report(
    engine: &mut Engine,
    observed: &Observed,
    service: &CompiledService,
    port: &CompiledPort,
) -> Result<PortReport, Error> {
    let mut scopes: BTreeMap<Mark, Vec<Scope>> = BTreeMap::new();
    for (scope, mark) in &port.marks {
        scopes.entry(*mark).or_default().push(*scope);
    }
    let mut virtual_servers = Vec::new();
    for (mark, scopes) in scopes {
        for family in Family::ALL {
            let key = VirtualServerKey { family, mark };
            // A published port is something to look at without an endpoint, too.
            let published = |e: &Element| e.family() == family && port.publishes(e);
            let listed = scopes.contains(&Scope::Ingress) && service.elements.keys().any(published);
            if service.virtual_servers.contains_key(&key) || listed {
                virtual_servers.push(server_report(engine, observed, service, port, key, &scopes)?);
            }
        }
    }
    Ok(PortReport {
        name: port.spec.name.as_ref().map(ToString::to_string),
        protocol: port.spec.protocol.to_string(),
        port: port.spec.port,
        end_port: port.spec.end_port,
        published_port: port.published,
        not_published: port.not_published.clone(),
        virtual_servers,
    })
}

fn server_report(
    engine: &mut Engine,
    observed: &Observed,
    service: &CompiledService,
    port: &CompiledPort,
    key: VirtualServerKey,
    scopes: &[Scope],
) -> Result<ServerReport, Error> {
    let declared =
        engine.snapshot().services().get(&service.key).map(|s| s.scheduler.clone()).unwrap_or_default();
    let none = VirtualServer {
        config: VirtualServerConfig { scheduler: declared.name, flags: declared.flags },
        protocol: None,
        reals: Arc::default(),
    };
    // Without an endpoint there is none.
    let is_wanted = service.virtual_servers.contains_key(&key);
    let want = service.virtual_servers.get(&key).unwrap_or(&none);
    let found = if is_wanted { engine.dataplane.ipvs.reals(key)? } else { BTreeMap::new() };
    let state = match observed.virtual_servers.get(&key) {
        None if is_wanted => "missing".to_owned(),
        None => "ok".to_owned(),
        Some(_) if !is_wanted => "unexpected".to_owned(),
        Some(have) if have.config == want.config => "ok".to_owned(),
        Some(have) if have.config.scheduler == want.config.scheduler => {
            format!("flags {:#x}, should be {:#x}", have.config.flags, want.config.flags)
        }
        Some(have) => format!("scheduler {}, should be {}", have.config.scheduler, want.config.scheduler),
    };
    let leading = service
        .elements
        .iter()
        .filter(|(element, mark)| {
            let by_number = scopes.contains(&Scope::Ingress) && port.publishes(element);
            element.family() == key.family && (**mark == Some(key.mark) || by_number)
        })
        .map(|(element, mark)| (element, *mark));
    let shared = service.shared.iter().filter(|element| want.reals.keys().any(|real| is_of(element, real)));
    let entries = leading
        .chain(shared.map(|element| (element, None)))
        .map(|(element, mark)| EntryReport {
            entry: element.to_string(),
            state: match observed.elements.get(element) {
                Some(have) if *have == mark => "ok".into(),
                Some(Some(other)) => format!("leads to mark {other}"),
                Some(None) => "has no mark".into(),
                None => "missing".into(),
            },
        })
        .collect();
    let reals: BTreeSet<RealServerKey> = want.reals.keys().chain(found.keys()).copied().collect();
    let endpoints = reals.iter().map(|real| endpoint_report(service, key, *real, &found)).collect();
    Ok(ServerReport {
        family: key.family,
        mark: key.mark.0,
        scopes: scopes.to_vec(),
        scheduler: want.config.scheduler.to_string(),
        entries,
        state,
        endpoints,
        packets: packets(engine, observed, service, key, scopes),
    })
}

/// Whether an entry without a mark is about this destination: that it is here, where answers come from, and that it may be
/// reached at a node's own address.
fn is_of(element: &Element, real: &RealServerKey) -> bool {
    match element {
        Element::Local(addr) | Element::Endpoint(addr) => *addr == real.addr,
        // A range keeps the port that the client asked for.
        Element::Own(to) => to.addr == real.addr && (real.port == 0 || to.port == real.port),
        Element::Vip(_) | Element::Published(_) | Element::Loopback(..) => false,
    }
}

/// The packets that matter to people: to the VIP and to a published address.
fn packets(
    engine: &Engine,
    observed: &Observed,
    service: &CompiledService,
    key: VirtualServerKey,
    scopes: &[Scope],
) -> Vec<PacketReport> {
    let Some(view) = View::observed(observed, engine.merged().state().program.as_ref()) else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for scope in scopes {
        let leading =
            service.elements.iter().filter(|(e, mark)| **mark == Some(key.mark) && e.family() == key.family);
        let entry = leading.map(|(element, _)| *element).find(|element| match (scope, element) {
            (Scope::Vip, Element::Vip(to)) => service.vips.get(key.family) == Some(&to.addr),
            (Scope::Ingress, Element::Published(_)) => true,
            _ => false,
        });
        for packet in entry.iter().flat_map(trace::packets) {
            let from = match packet.from {
                From::Pod(_) => "pod",
                From::Outside => "outside",
                From::Node | From::Loopback => continue,
            };
            let to = format!(
                "{} {}",
                std::net::SocketAddr::new(packet.to.addr, packet.to.port),
                packet.to.protocol
            );
            out.push(PacketReport { scope: *scope, from, to, fate: view.trace(packet).to_string() });
        }
    }
    out
}

fn endpoint_report(
    service: &CompiledService,
    key: VirtualServerKey,
    real: RealServerKey,
    found: &BTreeMap<RealServerKey, (RealServerConfig, Counters)>,
) -> EndpointReport {
    let want = service.virtual_servers.get(&key).and_then(|server| server.reals.get(&real));
    let have = found.get(&real);
    let info = service.reals.get(&(key, real));
    let state = match (want, have) {
        (None, _) => "unexpected".to_owned(),
        (Some(_), None) => "missing".to_owned(),
        (Some(want), Some((have, _))) if want.weight != have.weight => match info.map(|i| i.state) {
            // It was in the kernel before us, and nobody wants it.
            Some(RealState::Draining(_)) if want.weight < have.weight => "unexpected".to_owned(),
            _ if have.weight == crate::dataplane::ipvs::ALTERED => {
                "wrong forwarding method or connection limits".to_owned()
            }
            _ => format!("wrong weight {}", have.weight),
        },
        _ => match info.map(|i| i.state) {
            Some(RealState::Draining(_)) => "draining".to_owned(),
            Some(RealState::Kept) => "kept".to_owned(),
            _ => "ready".to_owned(),
        },
    };
    let counters = have.map(|(_, c)| *c).unwrap_or_default();
    EndpointReport {
        address: real.addr,
        port: real.port,
        target: info.and_then(|i| i.target.as_ref()).map(ToString::to_string),
        node: info.and_then(|i| i.node.as_ref()).map(ToString::to_string),
        weight: want.or(have.map(|(config, _)| config)).map_or(0, |c| c.weight),
        state,
        active_connections: counters.active,
        inactive_connections: counters.inactive,
        connections: counters.connections,
        in_packets: counters.in_packets,
        out_packets: counters.out_packets,
        in_bytes: counters.in_bytes,
        out_bytes: counters.out_bytes,
    }
}

/// An element as the operator finds it: the set's name on the node and the key in the notation of
/// `ipset test` and `nft get element`.
pub fn set_name(element: &Element) -> String {
    let family = element.family().digit();
    let set = match element {
        Element::Vip(_) => "vips",
        Element::Published(_) => "published",
        Element::Loopback(..) => "loopback",
        Element::Local(_) => "local",
        Element::Endpoint(_) => "endpoints",
        Element::Own(_) => "own",
    };
    format!("meshlb-{set}-{family}")
}

/// The VIP entries of a port, for messages.
pub fn vip_target(service: &CompiledService, family: Family, port: &CompiledPort) -> Option<Target> {
    let addr = *service.vips.get(family)?;
    Some(Target { addr, protocol: port.spec.protocol, port: port.spec.port })
}
