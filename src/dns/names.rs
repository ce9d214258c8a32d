//! Keeps the [`Table`] as the services are, change by change.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{
    records::ServiceNames,
    table::{Entry, Table, name_key},
    unknown::Unknown,
    zone::Zone,
};
use crate::{
    allocate::aliases::{Asked, Claims},
    model::ids::{PerFamily, ServiceKey},
};

/// All names and who claims them.
#[derive(Debug)]
pub struct Names {
    table: Table,
    services: HashMap<ServiceKey, Arc<ServiceNames>>,
    claims: Claims,
}

impl Names {
    /// None yet.
    pub fn new(zone: Arc<Zone>) -> Self {
        Self { table: Table::new(zone), services: HashMap::new(), claims: Claims::default() }
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
        fn asked(names: &ServiceNames) -> Asked<'_> {
            (&names.aliases, names.created)
        }
        let touched = self.claims.set(key, old.as_deref().map(asked), new.as_deref().map(asked));
        let mut others = BTreeSet::new();
        for name in touched {
            others.extend(self.claims.claimants(&name).cloned());
            self.resolve(&name);
        }
        others.remove(key);
        self.set_addresses(key, old.as_deref(), new.as_deref());
        others
    }

    /// Puts the holder of a name into the table.
    fn resolve(&mut self, name: &ServiceKey) {
        let ServiceKey { namespace, name: label } = name;
        let own = self.services.get(name);
        let entry = own.map(|service| Entry { service: service.clone(), alias: false }).or_else(|| {
            let winner = self.claims.winner(name)?;
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
        self.claims.conflicts(key, &names.aliases, &|name| self.services.contains_key(name))
    }

    /// Replaces what may be there besides; whether it is something else now.
    pub fn set_unknown(&mut self, unknown: Unknown) -> bool {
        let changed = *self.table.unknown != unknown;
        if changed {
            self.table.unknown = Arc::new(unknown);
        }
        changed
    }

    /// Replaces the zone's own addresses; whether they are others now.
    pub fn set_servers(&mut self, servers: PerFamily<IpAddr>) -> bool {
        std::mem::replace(&mut self.table.servers, servers) != servers
    }

    /// The table as of now.
    pub fn publish(&mut self, synced: bool) -> Arc<Table> {
        // Seconds since 1970, so that it grows over restarts too (RFC 1912, 2.2 allows any that grows).
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.table.serial = self.table.serial.wrapping_add(1).max(now.as_secs() as u32);
        self.table.synced = synced;
        Arc::new(self.table.clone())
    }
}
