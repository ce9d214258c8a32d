//! Endpoints as the status counts them, and what is wrong with EndpointSlices.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Entry, Mesh};
use crate::{
    api::{
        SERVICE_NAME_LABEL,
        status::{EndpointCounts, MeshServiceStatus},
    },
    compile::endpoints::target_port,
    controller::headless::Wanted,
    model::{
        endpoints::{Slice, SlicePort},
        ids::{Family, PortId, ServiceKey},
        service::ServicePort,
    },
};

/// What is kept of an EndpointSlice.
#[derive(Debug)]
pub(super) struct Counted {
    /// The service that it names.
    service: ServiceKey,
    family: Family,
    ports: Vec<SlicePort>,
    /// Its endpoints, and whether each is ready.
    endpoints: Vec<(Arc<str>, bool)>,
}

impl Mesh {
    /// Takes in an EndpointSlice, or that it is gone.
    pub fn put_slice(&mut self, key: &ServiceKey, slice: Option<&Slice>) {
        if let Some(old) = self.slices.remove(key) {
            if let Some(keys) = self.by_service.get_mut(&old.service) {
                keys.remove(key);
            }
            self.dirty.extend(self.users.get(&old.service).into_iter().flatten().cloned());
        }
        let Some(slice) = slice else { return };
        let name = ServiceKey::new(key.namespace.clone(), slice.service_name.clone());
        let endpoint = |e: &crate::model::endpoints::Endpoint| {
            let id = e.target.clone().unwrap_or_else(|| e.address.to_string().into());
            (id, e.ready && !e.terminating)
        };
        self.dirty.extend(self.users.get(&name).into_iter().flatten().cloned());
        self.by_service.entry(name.clone()).or_default().insert(key.clone());
        let endpoints = slice.endpoints.iter().map(endpoint).collect();
        self.slices.insert(
            key.clone(),
            Counted { service: name, family: slice.family, ports: slice.ports.clone(), endpoints },
        );
    }

    /// What can't be used of an EndpointSlice of the service of this name; `None` if nothing.
    pub fn set_unusable(&mut self, key: &ServiceKey, found: Option<(ServiceKey, String)>) {
        let old = match &found {
            Some(found) => self.unusable.insert(key.clone(), found.clone()),
            None => self.unusable.remove(key),
        };
        if old != found {
            let of = |found: &Option<(ServiceKey, String)>| {
                found.iter().flat_map(|(name, _)| self.users.get(name)).flatten().cloned().collect::<Vec<_>>()
            };
            let users = [of(&old), of(&found)].concat();
            self.dirty.extend(users);
        }
    }

    /// Names of all slices.
    pub fn slice_keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.slices.keys().chain(self.unusable.keys().filter(|key| !self.slices.contains_key(*key)))
    }

    /// What can't be used of a service's EndpointSlices: one clear line.
    pub(super) fn unusable_of(&self, entry: &Entry) -> Option<String> {
        let named = entry.service.as_ref()?.group();
        let mut of = self.unusable.iter().filter(|(_, (name, _))| *name == named);
        let (slice, (_, problem)) = of.next()?;
        let more = of.count();
        let more = if more > 0 { format!("; {more} more can't be used either") } else { String::new() };
        Some(format!("EndpointSlice {slice}: {problem}{more}"))
    }

    /// Whether a service has no status yet, and will have EndpointSlices soon: its headless Service is made, or about to be.
    pub fn awaits_slices(&self, key: &ServiceKey) -> bool {
        self.entries.get(key).is_some_and(|entry| {
            let service = entry.service.as_ref().filter(|_| self.services.contains_key(key));
            entry.status == MeshServiceStatus::default()
                && matches!(entry.headless, Wanted::This(_))
                && entry.headless_problem.is_none()
                && service.is_some_and(|s| self.by_service.get(&s.group()).is_none_or(BTreeSet::is_empty))
        })
    }

    /// Why a service can't have endpoints, where the core Service that it names says so.
    pub(super) fn why_no_endpoints(&self, entry: &Entry) -> Option<String> {
        let service = entry.service.as_ref()?;
        let named = service.group();
        match self.cores.get(&named) {
            Some(core) if core.external_name => Some(format!(
                "the Service {named} is of type ExternalName and never has endpoints: clients resolve its name instead"
            )),
            // With a selector the controller makes it, and says so if it can't.
            None if entry.headless == Wanted::Nothing
                && self.by_service.get(&named).is_none_or(BTreeSet::is_empty) =>
            {
                Some(format!(
                    "there is no Service {named}, and no EndpointSlice with the label {SERVICE_NAME_LABEL}: {}",
                    named.name
                ))
            }
            _ => None,
        }
    }

    /// Endpoints as nodes see them, and ports of the service that none of the ready ones has.
    pub(super) fn count(&self, entry: &Entry) -> (EndpointCounts, Vec<PortId>) {
        // An endpoint with an address of each family is in two slices.
        let mut ready: BTreeMap<&str, bool> = BTreeMap::new();
        let Some(service) = &entry.service else { return (EndpointCounts::default(), Vec::new()) };
        let mut unmatched: Vec<&ServicePort> = service.ports.iter().collect();
        let mut some_ready = false;
        let keys = self.by_service.get(&service.group());
        let slices = keys.into_iter().flatten().filter_map(|key| self.slices.get(key));
        for slice in slices.filter(|slice| service.families.contains(&slice.family)) {
            let has = |port: &ServicePort| target_port(port, &slice.ports).is_some();
            let serves = service.ports.iter().any(has);
            let mut any = false;
            for (id, is_ready) in &slice.endpoints {
                let is_ready = *is_ready || service.publish_not_ready;
                any |= is_ready;
                *ready.entry(id).or_default() |= is_ready && serves;
            }
            unmatched.retain(|port| !(any && has(port)));
            some_ready |= any;
        }
        if !some_ready {
            unmatched.clear();
        }
        let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let counts = EndpointCounts {
            ready: count(ready.values().filter(|r| **r).count()),
            total: count(ready.len()),
        };
        (counts, unmatched.iter().map(|port| port.id()).collect())
    }
}
