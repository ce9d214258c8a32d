//! What the sources know now, kept up to date event by event.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    endpoints::Slice,
    ids::ServiceKey,
    service::{Granted, Service},
    small::SmallSet,
};

/// One change that a source saw.
#[derive(Clone, Debug)]
pub enum Event {
    /// A service appeared or changed.
    Service(Arc<Service>),
    /// A service that goes on as it was has been given this, and nothing else.
    Granted(ServiceKey, Granted),
    /// A service is gone.
    ServiceGone(ServiceKey),
    /// A slice appeared or changed.
    Slice(Arc<Slice>),
    /// A slice is gone.
    SliceGone(ServiceKey),
}

/// Services and slices, indexed both ways.
#[derive(Default, Debug)]
pub struct Snapshot {
    services: BTreeMap<ServiceKey, Arc<Service>>,
    slices: HashMap<ServiceKey, Arc<Slice>>,
    /// (namespace, service name) as a key → slices that carry its endpoints.
    slices_of: HashMap<ServiceKey, SmallSet<ServiceKey>>,
    /// (namespace, service name) as a key → services that use those endpoints.
    users_of: HashMap<ServiceKey, SmallSet<ServiceKey>>,
}

impl Snapshot {
    /// Takes one event in. Services whose result may differ afterwards are added to `dirty`; an event
    /// that changes nothing adds none.
    pub fn apply(&mut self, event: Event, dirty: &mut BTreeSet<ServiceKey>) {
        match event {
            Event::Service(service) => {
                let key = service.key.clone();
                if self.services.get(&key).is_some_and(|old| *old == service) {
                    return;
                }
                self.unlink_service(&key);
                let group = service.group();
                self.users_of.entry(group).or_default().insert(key.clone());
                self.services.insert(key.clone(), service);
                dirty.insert(key);
            }
            Event::Granted(key, mut granted) => {
                let Some(service) = self.services.get_mut(&key) else { return };
                // It was given for another spec: what a port that this one does not have got is none of its ports'.
                granted.published.retain(|id, _| service.ports.iter().any(|port| port.id() == *id));
                if service.granted.as_ref() != Some(&granted) {
                    Arc::make_mut(service).granted = Some(granted);
                    dirty.insert(key);
                }
            }
            Event::ServiceGone(key) => {
                self.unlink_service(&key);
                if self.services.remove(&key).is_some() {
                    dirty.insert(key);
                }
            }
            Event::Slice(slice) => {
                let key = slice.key.clone();
                if self.slices.get(&key).is_some_and(|old| *old == slice) {
                    return;
                }
                self.unlink_slice(&key, dirty);
                let group = ServiceKey::new(key.namespace.clone(), slice.service_name.clone());
                if let Some(users) = self.users_of.get(&group) {
                    dirty.extend(users.iter().cloned());
                }
                self.slices_of.entry(group).or_default().insert(key.clone());
                self.slices.insert(key, slice);
            }
            Event::SliceGone(key) => {
                self.unlink_slice(&key, dirty);
                self.slices.remove(&key);
            }
        }
    }

    fn unlink_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.services.get(key) else { return };
        let group = old.group();
        if let Some(users) = self.users_of.get_mut(&group) {
            users.remove(key);
            if users.is_empty() {
                self.users_of.remove(&group);
            }
        }
    }

    fn unlink_slice(&mut self, key: &ServiceKey, dirty: &mut BTreeSet<ServiceKey>) {
        let Some(old) = self.slices.get(key) else { return };
        let group = ServiceKey::new(key.namespace.clone(), old.service_name.clone());
        if let Some(slices) = self.slices_of.get_mut(&group) {
            slices.remove(key);
            if slices.is_empty() {
                self.slices_of.remove(&group);
            }
        }
        if let Some(users) = self.users_of.get(&group) {
            dirty.extend(users.iter().cloned());
        }
    }

    /// All services, in order of their keys.
    pub fn services(&self) -> &BTreeMap<ServiceKey, Arc<Service>> {
        &self.services
    }

    /// The slices with a service's endpoints, in order of their keys; with every endpoint ready where the service asks for that.
    pub fn slices_for(&self, service: &Service) -> Vec<Arc<Slice>> {
        let all_ready = |slice: Arc<Slice>| {
            if !service.publish_not_ready || slice.endpoints.iter().all(|e| e.ready) {
                return slice;
            }
            let mut slice = Slice::clone(&slice);
            slice.endpoints.iter_mut().for_each(|e| e.ready = true);
            Arc::new(slice)
        };
        let group = service.group();
        self.slices_of
            .get(&group)
            .into_iter()
            .flatten()
            .filter_map(|key| self.slices.get(key).cloned())
            .map(all_ready)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{fixtures::service, ids::PerFamily};

    #[test]
    fn what_is_granted_changes_nothing_else() {
        let key = ServiceKey::new("default", "a");
        let granted = |vip: &str| Granted {
            vips: PerFamily { v4: vip.parse().ok(), v6: None },
            published: BTreeMap::new(),
        };
        let mut snapshot = Snapshot::default();
        let mut apply = |event: Event| {
            let mut dirty = BTreeSet::new();
            snapshot.apply(event, &mut dirty);
            (dirty.contains(&key), snapshot.services().get(&key).cloned())
        };
        assert_eq!(apply(Event::Granted(key.clone(), granted("10.200.7.7"))), (false, None));
        apply(Event::Service(service("a").into()));
        let has = |vip: &str| Some(Arc::new(Service { granted: Some(granted(vip)), ..service("a") }));
        for (vip, changes) in [("10.200.7.7", true), ("10.200.7.7", false), ("10.200.8.8", true)] {
            assert_eq!(apply(Event::Granted(key.clone(), granted(vip))), (changes, has(vip)));
        }
    }
}
