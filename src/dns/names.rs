//! Keeps the [`Table`] as the services are, change by change.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{
    records::ServiceNames,
    table::{Entry, Table, name_key},
    zone::Zone,
};
use crate::model::ids::ServiceKey;

/// Namespace and name.
type Place = (Arc<str>, Arc<str>);

/// All names and who claims them.
#[derive(Debug)]
pub struct Names {
    table: Table,
    services: HashMap<ServiceKey, Arc<ServiceNames>>,
    /// Who claims an alias: the first has it, unless a service has that name.
    claims: HashMap<Place, BTreeSet<(u64, ServiceKey)>>,
}

impl Names {
    /// None yet.
    pub fn new(zone: Arc<Zone>) -> Self {
        Self { table: Table::new(zone), services: HashMap::new(), claims: HashMap::new() }
    }

    /// What a service answers so far.
    pub fn get(&self, key: &ServiceKey) -> Option<&Arc<ServiceNames>> {
        self.services.get(key)
    }

    /// Replaces what a service answers; `None` takes its names away. Gives the other services whose aliases may have been
    /// won or lost by it.
    pub fn set(&mut self, key: &ServiceKey, new: Option<ServiceNames>) -> BTreeSet<ServiceKey> {
        let new = new.map(Arc::new);
        let old = match &new {
            Some(new) => self.services.insert(key.clone(), new.clone()),
            None => self.services.remove(key),
        };
        for names in old.iter() {
            for alias in &names.aliases {
                let place = (key.namespace.clone(), alias.clone());
                if let Some(claims) = self.claims.get_mut(&place) {
                    claims.remove(&(names.created, key.clone()));
                    if claims.is_empty() {
                        self.claims.remove(&place);
                    }
                }
            }
        }
        for names in new.iter() {
            for alias in &names.aliases {
                let place = (key.namespace.clone(), alias.clone());
                self.claims.entry(place).or_default().insert((names.created, key.clone()));
            }
        }
        let mut labels = BTreeSet::from([key.name.clone()]);
        labels.extend(old.iter().chain(&new).flat_map(|names| names.aliases.iter().cloned()));
        let mut others = BTreeSet::new();
        for label in labels {
            let place = (key.namespace.clone(), label);
            others
                .extend(self.claims.get(&place).into_iter().flatten().map(|(_, claimant)| claimant.clone()));
            self.resolve(&place);
        }
        others.remove(key);
        self.set_addresses(key, old.as_deref(), new.as_deref());
        others
    }

    /// Puts the holder of a name into the table.
    fn resolve(&mut self, (namespace, label): &Place) {
        let own = self.services.get(&ServiceKey::new(namespace.clone(), label.clone()));
        let entry = own.map(|service| Entry { service: service.clone(), alias: false }).or_else(|| {
            let claims = self.claims.get(&(namespace.clone(), label.clone()))?;
            let (_, winner) = claims.first()?;
            Some(Entry { service: self.services.get(winner)?.clone(), alias: true })
        });
        let new = entry.is_some();
        let mut had = false;
        self.table.names.change(name_key(label.as_bytes(), namespace.as_bytes()), |old| {
            had = old.is_some();
            entry
        });
        if new != had {
            let key = namespace.to_ascii_lowercase().into_bytes();
            self.table.namespaces.change(key, |n| {
                let n = n.unwrap_or(0);
                let n = if new { n.saturating_add(1) } else { n.saturating_sub(1) };
                (n > 0).then_some(n)
            });
        }
    }

    /// Puts into the table who has which addresses.
    fn set_addresses(&mut self, key: &ServiceKey, old: Option<&ServiceNames>, new: Option<&ServiceNames>) {
        let has = |names: Option<&ServiceNames>, ip| names.is_some_and(|names| names.has(ip));
        let of = |names: Option<&ServiceNames>| names.map(ServiceNames::all_addresses).unwrap_or_default();
        for ip in of(old).into_iter().filter(|ip| !has(new, *ip)) {
            self.table.addresses.change(ip, |owners| {
                let mut owners = owners.unwrap_or_default();
                owners.remove(key);
                (!owners.is_empty()).then_some(owners)
            });
        }
        for ip in of(new).into_iter().filter(|ip| !has(old, *ip)) {
            self.table.addresses.change(ip, |owners| {
                let mut owners = owners.unwrap_or_default();
                owners.insert(key.clone());
                Some(owners)
            });
        }
    }

    /// The zone.
    pub fn zone(&self) -> &Zone {
        self.table.zone()
    }

    /// Aliases that a service has.
    pub fn aliases(&self, key: &ServiceKey) -> Vec<Arc<str>> {
        let Some(names) = self.services.get(key) else { return Vec::new() };
        let has = |alias: &&Arc<str>| {
            let entry = self.table.names.get(name_key(alias.as_bytes(), key.namespace.as_bytes()).as_slice());
            entry.is_some_and(|entry| entry.alias && entry.service.key == *key)
        };
        names.aliases.iter().filter(has).cloned().collect()
    }

    /// Aliases that a service asks for and does not have, in words.
    pub fn conflicts(&self, key: &ServiceKey) -> Vec<String> {
        let Some(names) = self.services.get(key) else { return Vec::new() };
        let mut out = Vec::new();
        for (i, alias) in names.aliases.iter().enumerate() {
            let owner = ServiceKey::new(key.namespace.clone(), alias.clone());
            if self.services.contains_key(&owner) && owner != *key {
                out.push(format!("spec.dns.aliases[{i}]: {alias} is the name of the service {owner}"));
                continue;
            }
            let claims = self.claims.get(&(key.namespace.clone(), alias.clone()));
            let winner = claims.and_then(BTreeSet::first).map(|(_, winner)| winner);
            if let Some(winner) = winner.filter(|winner| *winner != key) {
                out.push(format!(
                    "spec.dns.aliases[{i}]: {alias} is an alias of {winner}, which asked for it first"
                ));
            }
        }
        out
    }

    /// The table as of now. `unknown`: services of which the source says nothing that can be read.
    pub fn publish(&mut self, synced: bool, unknown: &BTreeSet<ServiceKey>) -> Arc<Table> {
        // Seconds since 1970, so that it grows over restarts too (RFC 1912, 2.2 allows any that grows).
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.table.serial = self.table.serial.wrapping_add(1).max(now.as_secs() as u32);
        self.table.synced = synced;
        if self.table.unknown.len() != unknown.len() || !unknown.is_empty() {
            let keys = unknown.iter().map(|key| name_key(key.name.as_bytes(), key.namespace.as_bytes()));
            self.table.unknown = Arc::new(keys.collect::<HashSet<_>>());
        }
        Arc::new(self.table.clone())
    }
}
