//! What a service asks the pools for.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    hash,
    lock::Locked,
    marks::MarkOwner,
    pool::{Bands, Pool, Want},
};
use crate::model::{
    ids::{Family, PerFamily, PortId, Protocol, Scope},
    node::NodeConfig,
    service::{FamilyPolicy, Mode, PublishMode, Service, ServicePort},
};

/// At most this many addresses of a range are given out automatically.
const MAX_AUTOMATIC: u128 = 1 << 32;

/// One pool per VIP range: numbers are offsets in the range. The network address, the ingress address, the DNS
/// address and IPv4's broadcast address are never given out.
pub fn vip_pools(config: &NodeConfig) -> PerFamily<Pool> {
    let mut pools = PerFamily::default();
    for (family, range) in config.ranges.iter() {
        let host_bits = u32::from(range.max_prefix_len() - range.prefix_len());
        let size = 1_u128.checked_shl(host_bits).unwrap_or(u128::MAX);
        let end = if family == Family::V4 { size - 1 } else { size.min(MAX_AUTOMATIC) };
        // KEP-3070: min(max(16, size/16), 256).
        let split = if size <= 16 { 0 } else { (size / 16).clamp(16, 256) };
        let low = 3.min(end);
        pools.set(family, Some(Pool::new(Bands { low, split: split.clamp(low, end), end }, HashSet::new())));
    }
    pools
}

/// One pool per protocol: numbers are ports.
pub fn port_pools(config: &NodeConfig) -> BTreeMap<Protocol, Pool> {
    let (low, last) = (u128::from(*config.publish_range.start()), u128::from(*config.publish_range.end()));
    let size = last + 1 - low;
    // KEP-3668: min(max(16, size/32), 128).
    let split = if size <= 16 { low } else { low + (size / 32).clamp(16, 128) };
    let pool = |protocol: Protocol| {
        let reserved =
            config.publish_range.clone().filter(|p| config.reserved.iter().any(|r| r.covers(protocol, *p)));
        Pool::new(Bands { low, split, end: last + 1 }, reserved.map(u128::from).collect())
    };
    Protocol::ALL.into_iter().map(|protocol| (protocol, pool(protocol))).collect()
}

/// How far into its range an address is; `None` outside.
pub fn offset(range: &IpNet, address: &IpAddr) -> Option<u128> {
    match (range, address) {
        (IpNet::V4(r), IpAddr::V4(a)) if r.contains(a) => {
            Some(u128::from(u32::from(*a)) - u128::from(u32::from(r.network())))
        }
        (IpNet::V6(r), IpAddr::V6(a)) if r.contains(a) => Some(u128::from(*a) - u128::from(r.network())),
        _ => None,
    }
}

/// The family that keeps the service from being served, if one does.
pub fn missing_range(service: &Service, config: &NodeConfig) -> Option<Family> {
    if service.mode == Mode::Dnsrr {
        return None;
    }
    let has = |family: &&Family| config.ranges.get(**family).is_some();
    match service.family_policy {
        FamilyPolicy::SingleStack => service.families.first().filter(|f| !has(f)),
        FamilyPolicy::PreferDualStack => {
            if service.families.iter().any(|f| has(&f)) {
                None
            } else {
                service.families.first()
            }
        }
        FamilyPolicy::RequireDualStack => Family::ALL.iter().find(|f| !has(f)),
    }
    .copied()
}

/// The families that the service has VIPs of.
pub fn families(service: &Service, config: &NodeConfig) -> Vec<Family> {
    if service.mode == Mode::Dnsrr || missing_range(service, config).is_some() {
        return Vec::new();
    }
    match service.family_policy {
        FamilyPolicy::SingleStack => service.families.first().copied().into_iter().collect(),
        FamilyPolicy::PreferDualStack | FamilyPolicy::RequireDualStack => {
            Family::ALL.into_iter().filter(|f| config.ranges.get(*f).is_some()).collect()
        }
    }
}

/// The service's claim on a VIP of a family.
pub fn vip(service: &Service, family: Family, config: &NodeConfig, locked: Option<&Locked>) -> Option<Want> {
    if !families(service, config).contains(&family) {
        return None;
    }
    let range = config.ranges.get(family)?;
    if let Some(granted) = &service.granted {
        return usable(granted.vips.get(family)?, range, service.created);
    }
    if let Some(explicit) = service.vips.iter().find(|vip| Family::of(vip) == family) {
        return usable(explicit, range, service.created);
    }
    let locked = locked.and_then(|l| offset(range, l.vips.get(family)?));
    Some(Want::Automatic { hash: hash::stable(&service.key.to_string()), locked })
}

/// A claim on a certain VIP, if it is one that may be given out.
fn usable(vip: &IpAddr, range: &IpNet, created: u64) -> Option<Want> {
    let first = offset(range, vip)?;
    let broadcast = vip.is_ipv4() && *vip == range.broadcast();
    (first > 2 && !broadcast).then_some(Want::Explicit { first, count: 1, created })
}

/// What a port takes over from one that is no longer there: a port is known by its number and protocol, so one whose number
/// was edited is another one, and keeps its published port all the same. That is the one that it names, or, where one port
/// went and one came, that port's.
pub fn carried(had: &BTreeMap<PortId, u16>, service: &Service, port: &ServicePort) -> Option<u16> {
    let publish = port.publish.as_ref()?;
    let is_there = |id: &PortId| service.ports.iter().any(|p| p.id() == *id);
    let mut went: Vec<u16> = had
        .iter()
        .filter(|(id, _)| id.protocol == port.protocol && !is_there(id))
        .map(|(_, number)| *number)
        .collect();
    if let Some(number) = publish.port {
        return went.contains(&number).then_some(number);
    }
    let alike = || service.ports.iter().filter(|p| p.protocol == port.protocol);
    let named = |number| alike().any(|p| p.publish.as_ref().is_some_and(|p| p.port == Some(number)));
    went.retain(|number| !named(*number));
    let automatic = |p: &&ServicePort| p.publish.as_ref().is_some_and(|p| p.port.is_none());
    let new = alike().filter(automatic).filter(|p| !had.contains_key(&p.id()));
    match (went.as_slice(), new.count()) {
        ([number], 1) => Some(*number),
        _ => None,
    }
}

/// A port's claim on a published port.
pub fn published(
    service: &Service,
    port: &ServicePort,
    config: &NodeConfig,
    locked: Option<&Locked>,
) -> Option<Want> {
    let publish = port.publish.as_ref()?;
    if missing_range(service, config).is_some() {
        return None;
    }
    let firm = match &service.granted {
        // What is granted is known by the port that it was granted for, whose number may just have been edited.
        Some(granted) => Some(
            granted
                .published
                .get(&port.id())
                .copied()
                .or_else(|| carried(&granted.published, service, port))?,
        ),
        None => publish.port,
    };
    if let Some(first) = firm {
        let count = port.span().max(1).into();
        return Some(Want::Explicit { first: first.into(), count, created: service.created });
    }
    let id = port.id();
    let locked = locked.and_then(|l| l.published.get(&id)).map(|n| u128::from(*n));
    Some(Want::Automatic { hash: hash::stable(&format!("{}/{id}", service.key)), locked })
}

/// The marks that a service needs: which scopes each serves, and under which name it is kept.
pub fn marks(service: &Service, config: &NodeConfig) -> Vec<(Vec<Scope>, MarkOwner)> {
    if missing_range(service, config).is_some() {
        return Vec::new();
    }
    let mut needed = Vec::new();
    for port in &service.ports {
        let owner = |scope| MarkOwner { service: service.key.clone(), port: port.id(), scope };
        let same_endpoints = service.internal_policy == service.external_policy
            && port.publish.as_ref().is_none_or(|p| p.mode != PublishMode::Host);
        match (service.mode == Mode::Vip, port.publish.is_some()) {
            (true, true) if same_endpoints => {
                needed.push((vec![Scope::Vip, Scope::Ingress], owner(Scope::Vip)));
            }
            (vip, ingress) => {
                needed.extend(vip.then(|| (vec![Scope::Vip], owner(Scope::Vip))));
                needed.extend(ingress.then(|| (vec![Scope::Ingress], owner(Scope::Ingress))));
            }
        }
    }
    needed
}
