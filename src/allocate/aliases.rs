//! Who has an alias: a service of that name before everybody, else the oldest of those that ask for it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use crate::model::ids::ServiceKey;

/// The aliases that one service asks for, and when it was created (seconds since 1970).
pub type Asked<'a> = (&'a [Arc<str>], u64);

/// Who asks for which alias.
#[derive(Default, Debug)]
pub struct Claims(HashMap<ServiceKey, BTreeSet<(u64, ServiceKey)>>);

impl Claims {
    /// Replaces what a service asks for; `None` where it is not there. Gives the names that others may have won or lost by it:
    /// its own, and its aliases of before and of now.
    pub fn set(
        &mut self,
        key: &ServiceKey,
        old: Option<Asked<'_>>,
        new: Option<Asked<'_>>,
    ) -> BTreeSet<ServiceKey> {
        let names = |asked: Option<Asked<'_>>| -> Vec<ServiceKey> {
            let aliases = asked.map(|(aliases, _)| aliases).unwrap_or_default();
            aliases.iter().map(|alias| ServiceKey::new(key.namespace.clone(), alias.clone())).collect()
        };
        let mut touched = BTreeSet::from([key.clone()]);
        for name in names(old) {
            if let Some(claims) = self.0.get_mut(&name) {
                claims.retain(|(_, claimant)| claimant != key);
                if claims.is_empty() {
                    self.0.remove(&name);
                }
            }
            touched.insert(name);
        }
        let created = new.map_or(0, |(_, created)| created);
        for name in names(new) {
            self.0.entry(name.clone()).or_default().insert((created, key.clone()));
            touched.insert(name);
        }
        touched
    }

    /// All that ask for a name.
    pub fn claimants(&self, name: &ServiceKey) -> impl Iterator<Item = &ServiceKey> {
        self.0.get(name).into_iter().flatten().map(|(_, claimant)| claimant)
    }

    /// Who has a name as its alias, unless a service is called so.
    pub fn winner(&self, name: &ServiceKey) -> Option<&ServiceKey> {
        self.claimants(name).next()
    }

    /// Aliases that a service asks for and does not have, in words.
    pub fn conflicts(
        &self,
        key: &ServiceKey,
        aliases: &[Arc<str>],
        is_service: &dyn Fn(&ServiceKey) -> bool,
    ) -> Vec<String> {
        let mut out = Vec::new();
        for (i, alias) in aliases.iter().enumerate() {
            let name = ServiceKey::new(key.namespace.clone(), alias.clone());
            if name != *key && is_service(&name) {
                out.push(format!("spec.dns.aliases[{i}]: {alias} is the name of the service {name}"));
            } else if let Some(winner) = self.winner(&name).filter(|winner| *winner != key) {
                out.push(format!(
                    "spec.dns.aliases[{i}]: {alias} is an alias of {winner}, which asked for it first"
                ));
            }
        }
        out
    }
}
