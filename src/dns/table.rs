//! All names, as answers read them: immutable, replaced as a whole. Parts that did not change are shared with the one before,
//! so that one change among thousands of services costs what one service costs.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash},
    net::IpAddr,
    sync::Arc,
};

use super::{records::ServiceNames, unknown::Unknown, zone::Zone};
use crate::model::{
    ids::{PerFamily, ServiceKey},
    small::SmallSet,
};

/// Parts of each index. A change copies one of them.
pub(super) const PARTS: usize = 256;

/// A name of a service: its own or an alias.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The service.
    pub service: Arc<ServiceNames>,
    /// Whether the name is an alias.
    pub alias: bool,
}

/// A map in parts that copies share.
#[derive(Clone, Debug)]
pub(super) struct Parts<K, V> {
    parts: Vec<Arc<HashMap<K, V>>>,
    hasher: std::hash::RandomState,
}

impl<K: Eq + Hash + Clone, V: Clone> Parts<K, V> {
    fn new() -> Self {
        Self { parts: vec![Arc::default(); PARTS], hasher: std::hash::RandomState::new() }
    }

    fn part<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        self.hasher.hash_one(key) as usize % PARTS
    }

    pub(super) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.parts[self.part(key)].get(key)
    }

    /// Changes one value; `None` before and after stands for its absence.
    pub(super) fn change(&mut self, key: K, act: impl FnOnce(Option<V>) -> Option<V>) {
        let part = self.part(&key);
        let map = Arc::make_mut(&mut self.parts[part]);
        let old = map.remove(&key);
        if let Some(new) = act(old) {
            map.insert(key, new);
        }
    }

    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }

    /// How many parts two copies do not share.
    #[cfg(test)]
    pub(super) fn unshared(&self, other: &Self) -> usize {
        self.parts.iter().zip(&other.parts).filter(|(a, b)| !Arc::ptr_eq(a, b)).count()
    }
}

/// Key of a name in its index: `label.namespace`, in lower case.
pub(super) fn name_key(label: &[u8], namespace: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(label.len() + namespace.len() + 1);
    key.extend(label.iter().map(u8::to_ascii_lowercase));
    key.push(b'.');
    key.extend(namespace.iter().map(u8::to_ascii_lowercase));
    key
}

/// All names.
#[derive(Clone, Debug)]
pub struct Table {
    /// The zone they are in.
    pub(super) zone: Arc<Zone>,
    /// Where it is served, of its addresses.
    pub(super) servers: PerFamily<IpAddr>,
    pub(super) names: Parts<Vec<u8>, Entry>,
    /// Services that have an address, as a virtual IP or an endpoint's.
    pub(super) addresses: Parts<IpAddr, SmallSet<ServiceKey>>,
    /// Namespaces with how many names each has.
    pub(super) namespaces: Parts<Vec<u8>, u32>,
    /// What may be there besides.
    pub(super) unknown: Arc<Unknown>,
    /// Whether the source has told everything.
    pub(super) synced: bool,
    /// Of the SOA record: grows with every change.
    pub(super) serial: u32,
}

impl Table {
    /// Without names; it answers SERVFAIL until the source has told everything.
    pub fn new(zone: Arc<Zone>) -> Self {
        Self {
            servers: zone.servers,
            zone,
            names: Parts::new(),
            addresses: Parts::new(),
            namespaces: Parts::new(),
            unknown: Arc::default(),
            synced: false,
            serial: 0,
        }
    }

    /// How many names of services and aliases there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the source has told everything.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// The zone.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// The namespace of the pod with this address, where its endpoints tell.
    pub fn namespace_of(&self, client: IpAddr) -> Option<&Arc<str>> {
        let mut of = self.having(client).filter(|names| names.endpoint(client).is_some());
        let first = &of.next()?.key.namespace;
        of.all(|names| names.key.namespace == *first).then_some(first)
    }

    /// What the services that have an address answer.
    pub(super) fn having(&self, address: IpAddr) -> impl Iterator<Item = &ServiceNames> {
        self.addresses.get(&address).into_iter().flatten().filter_map(|key| {
            // Its own name is a service's before it is another's alias.
            let entry = self.names.get(name_key(key.name.as_bytes(), key.namespace.as_bytes()).as_slice())?;
            Some(&*entry.service)
        })
    }
}
