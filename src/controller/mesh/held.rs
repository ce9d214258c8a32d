//! What services hold: the numbers that are in use, and what one whose spec is wrong keeps.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use super::{Entry, Mesh};
use crate::{
    allocate::offset,
    api::{
        self,
        status::{MeshServiceStatus, PortStatus},
    },
    controller::{
        numbers::Numbers,
        order::Waits,
        pools::{PoolId, Used},
    },
    model::{
        ids::{PerFamily, PortId, ServiceKey},
        service::{
            FamilyPolicy, Granted, Mode, Publish, PublishMode, Scheduler, Service, ServicePort, TargetPort,
            TrafficDistribution, TrafficPolicy,
        },
    },
};

impl Mesh {
    /// Every number that must not be given to anybody else: what services have, what statuses still say, orphans.
    pub fn used(&self) -> Used {
        let mut used = self.in_statuses();
        let Some(allocator) = &self.allocator else { return used };
        for (key, allocation) in allocator.iter() {
            let entry = self.entries.get(key);
            let span = |id: &PortId| entry.map_or(1, |e| span_of(e.service.as_deref(), &e.status, id));
            self.each_number(&allocation.vips, &allocation.published, span, add_to(&mut used));
        }
        used
    }

    pub(super) fn in_statuses(&self) -> Used {
        let mut used: Used =
            PoolId::all(&self.config).into_iter().map(|id| (id, Numbers::default())).collect();
        for entry in self.entries.values() {
            self.each_in_status(entry, add_to(&mut used));
        }
        used
    }

    /// Every number that the status of a service says.
    fn each_in_status(&self, entry: &Entry, tell: impl FnMut(PoolId, u128)) {
        let granted = api::granted_of(&entry.status);
        // One that was written before statuses told the ends of ranges leaves that to the spec.
        let span = |id: &PortId| match span_in(&entry.status, id) {
            1 => span_of(entry.service.as_deref(), &entry.status, id),
            span => span,
        };
        self.each_number(&granted.vips, &granted.published, span, tell);
    }

    /// Of these new statuses those that hold something which the status of another service still says, with all such others: they have
    /// to wait until those are written.
    pub fn too_early<'a>(
        &self,
        new: impl IntoIterator<Item = (&'a ServiceKey, &'a MeshServiceStatus)>,
    ) -> Waits {
        let mut wanted: HashMap<(PoolId, u128), &ServiceKey> = HashMap::new();
        for (key, status) in new {
            let granted = api::granted_of(status);
            let span = |id: &PortId| span_in(status, id);
            self.each_number(&granted.vips, &granted.published, span, |pool, number| {
                wanted.insert((pool, number), key);
            });
        }
        let mut out = Waits::new();
        if wanted.is_empty() {
            return out;
        }
        for (key, entry) in &self.entries {
            self.each_in_status(entry, |pool, number| {
                if let Some(other) = wanted.get(&(pool, number)).filter(|other| **other != key) {
                    out.entry((*other).clone()).or_default().insert(key.clone());
                }
            });
        }
        out
    }

    /// Tells every number of these: of a range all, as `span` says how many.
    fn each_number(
        &self,
        vips: &PerFamily<IpAddr>,
        ports: &BTreeMap<PortId, u16>,
        span: impl Fn(&PortId) -> u16,
        mut tell: impl FnMut(PoolId, u128),
    ) {
        for (family, vip) in vips.iter() {
            if let Some(number) = self.config.ranges.get(family).and_then(|range| offset(range, vip)) {
                tell(PoolId::Vips(family), number);
            }
        }
        for (id, first) in ports {
            for number in *first..=first.saturating_add(span(id).max(1) - 1) {
                tell(PoolId::Ports(id.protocol), number.into());
            }
        }
    }
}

/// How many ports one spans: as the spec says or, where that can't be read, as the status does.
fn span_of(service: Option<&Service>, status: &MeshServiceStatus, id: &PortId) -> u16 {
    match service {
        Some(service) => service.ports.iter().find(|p| p.id() == *id).map_or(1, ServicePort::span),
        None => span_in(status, id),
    }
}

/// How many ports a status says that one of them spans.
fn span_in(status: &MeshServiceStatus, id: &PortId) -> u16 {
    let port = status
        .ports
        .iter()
        .find(|p| i32::from(id.port) == p.port && api::protocol(p.protocol) == id.protocol);
    port.map_or(1, PortStatus::span)
}

fn add_to(used: &mut Used) -> impl FnMut(PoolId, u128) {
    |pool, number| {
        if let Some(numbers) = used.get_mut(&pool) {
            numbers.0.insert(number);
        }
    }
}

/// A service that is wrong as it is now: its last good version, or what is known of that, with a claim on what its status says.
pub(super) fn pinned(
    key: &ServiceKey,
    last: Option<&Service>,
    status: &MeshServiceStatus,
) -> Option<Service> {
    let granted = api::granted_of(status);
    if let Some(last) = last {
        return Some(Service { created: 0, granted: Some(granted), ..last.clone() });
    }
    if granted == Granted::default() {
        return None;
    }
    let port = |(id, first): (&PortId, &u16)| {
        let span = span_in(status, id);
        let is_range = span > 1;
        ServicePort {
            name: None,
            protocol: id.protocol,
            port: id.port,
            end_port: is_range.then(|| id.port.saturating_add(span - 1)),
            target: TargetPort::Inferred,
            // A range is never published on what somebody else chooses.
            publish: Some(Publish {
                mode: PublishMode::Ingress,
                port: is_range.then_some(*first),
                addresses: Vec::new(),
            }),
        }
    };
    Some(Service {
        key: key.clone(),
        mode: if granted.vips.is_empty() { Mode::Dnsrr } else { Mode::Vip },
        service_name: key.name.clone(),
        vips: Vec::new(),
        families: granted.vips.iter().map(|(family, _)| family).collect(),
        family_policy: if granted.vips.v4.is_some() && granted.vips.v6.is_some() {
            FamilyPolicy::PreferDualStack
        } else {
            FamilyPolicy::SingleStack
        },
        weights: BTreeMap::new(),
        ports: granted.published.iter().map(port).collect(),
        scheduler: Scheduler::default(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        distribution: TrafficDistribution::Any,
        drain: std::time::Duration::ZERO,
        publish_not_ready: false,
        dns: crate::model::service::Dns::default(),
        created: 0,
        granted: Some(granted),
    })
}
