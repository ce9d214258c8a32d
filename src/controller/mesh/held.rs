//! What services hold: the numbers that are in use, and what one whose spec is wrong keeps.

use std::collections::BTreeMap;

use super::Mesh;
use crate::{
    allocate::offset,
    api::{self, status::MeshServiceStatus},
    controller::{
        numbers::Numbers,
        pools::{PoolId, Used},
    },
    model::{
        ids::{Family, PortId, ServiceKey},
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
            let ports = allocation.published.iter().map(|(id, first)| (*id, *first));
            self.add(key, allocation.vips.iter().map(|(f, v)| (f, *v)), ports, &mut used);
        }
        used
    }

    pub(super) fn in_statuses(&self) -> Used {
        let mut used: Used =
            PoolId::all(&self.config).into_iter().map(|id| (id, Numbers::default())).collect();
        for (key, entry) in &self.entries {
            let granted = api::granted_of(&entry.status);
            self.add(
                key,
                granted.vips.iter().map(|(f, v)| (f, *v)),
                granted.published.into_iter(),
                &mut used,
            );
        }
        used
    }

    fn add(
        &self,
        key: &ServiceKey,
        vips: impl Iterator<Item = (Family, std::net::IpAddr)>,
        ports: impl Iterator<Item = (PortId, u16)>,
        used: &mut Used,
    ) {
        for (family, vip) in vips {
            let number = self.config.ranges.get(family).and_then(|range| offset(range, &vip));
            if let (Some(number), Some(numbers)) = (number, used.get_mut(&PoolId::Vips(family))) {
                numbers.0.insert(number);
            }
        }
        let service = self.entries.get(key).and_then(|e| e.service.as_ref());
        for (id, first) in ports {
            let span = service.and_then(|s| s.ports.iter().find(|p| p.id() == id)).map_or(1, |p| p.span());
            if let Some(numbers) = used.get_mut(&PoolId::Ports(id.protocol)) {
                numbers.0.extend((first..=first.saturating_add(span.max(1) - 1)).map(u128::from));
            }
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
    let port = |id: &PortId| ServicePort {
        name: None,
        protocol: id.protocol,
        port: id.port,
        end_port: None,
        target: TargetPort::Inferred,
        publish: Some(Publish { mode: PublishMode::Ingress, port: None, addresses: Vec::new() }),
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
        ports: granted.published.keys().map(port).collect(),
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
