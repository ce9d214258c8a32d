//! What nobody can say anything about, since what the source says of it can't be read: that it is not there would be taken for
//! the truth.

use std::collections::{BTreeSet, HashSet};

use super::table::name_key;
use crate::model::{ids::ServiceKey, unread::Unread};

/// What may be there besides what is known.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Unknown {
    /// It can't be told what.
    anything: bool,
    /// Names of services that are meant to be there.
    services: HashSet<Vec<u8>>,
    /// Namespaces of those: any further name there may be an alias of theirs.
    namespaces: HashSet<Vec<u8>>,
    /// Names of services that are there and that the kernel does not serve yet.
    coming: HashSet<Vec<u8>>,
    /// Their namespaces.
    coming_in: HashSet<Vec<u8>>,
    /// Services some of whose endpoints may be missing, by the names that they take them by.
    endpoints_of: BTreeSet<ServiceKey>,
}

impl Unknown {
    /// What of the source can't be read, the services that are meant to be there all the same, and the names (aliases too) of
    /// those of which more is said in a moment.
    pub fn new(unread: &Unread, meant: &BTreeSet<ServiceKey>, coming: &BTreeSet<ServiceKey>) -> Self {
        let name = |key: &ServiceKey| name_key(key.name.as_bytes(), key.namespace.as_bytes());
        let namespace = |key: &ServiceKey| key.namespace.to_ascii_lowercase().into_bytes();
        Self {
            anything: unread.anything,
            services: meant.iter().chain(coming).map(name).collect(),
            namespaces: meant.iter().map(namespace).collect(),
            coming: coming.iter().map(name).collect(),
            coming_in: coming.iter().map(namespace).collect(),
            endpoints_of: unread.endpoints_of.clone(),
        }
    }

    /// Whether there may be services besides those that are known.
    pub(super) fn may_have_services(&self) -> bool {
        self.anything || !self.services.is_empty()
    }

    /// Whether a service of this name is meant to be there, by its key in the table.
    pub(super) fn has(&self, name: &[u8]) -> bool {
        self.services.contains(name)
    }

    /// Whether a namespace may have names besides those that are known.
    pub(super) fn may_be_in(&self, namespace: &[u8]) -> bool {
        self.anything || self.namespaces.contains(namespace.to_ascii_lowercase().as_slice())
    }

    /// Whether more is known soon of a service's name, by its key in the table; `None` is any of them.
    pub(super) fn is_coming(&self, name: Option<&[u8]>) -> bool {
        name.map_or(!self.coming.is_empty(), |name| self.coming.contains(name))
    }

    /// Whether more is known soon of a namespace.
    pub(super) fn is_coming_in(&self, namespace: &[u8]) -> bool {
        !self.coming_in.is_empty() && self.coming_in.contains(namespace.to_ascii_lowercase().as_slice())
    }

    /// Whether a service may have more endpoints; `group` is the name that it takes them by.
    pub(super) fn may_have_endpoints(&self, group: &ServiceKey) -> bool {
        self.anything || self.endpoints_of.contains(group)
    }

    /// Whether a pod that nobody knows may be of a namespace in which `has` something; where it can't be told of which one,
    /// `any` decides.
    pub(super) fn may_have_pod(&self, has: impl Fn(&str) -> bool, any: bool) -> bool {
        self.anything && any || self.endpoints_of.iter().any(|group| has(&group.namespace))
    }
}
