//! What a source can't speak for: it is left as it is.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::ids::{Mark, Protocol, ServiceKey};

/// What may be in a part of a source that can't be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hides {
    /// Nothing that is served: it is known what was meant, or meant for nobody here.
    Nothing,
    /// Anything.
    Anything,
    /// This service.
    Service(ServiceKey),
    /// Endpoints of services that take them by this name.
    EndpointsOf(ServiceKey),
}

/// All of that: what a source says nothing about, though it is meant to be there.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Unread {
    /// It can't be told what is in it.
    pub anything: bool,
    /// Services.
    pub services: BTreeSet<ServiceKey>,
    /// Services some of whose endpoints are in it, by the names that they take them by.
    pub endpoints_of: BTreeSet<ServiceKey>,
}

impl Unread {
    /// It can't be told what.
    pub fn anything() -> Self {
        Self { anything: true, ..Self::default() }
    }

    /// Whether all could be read.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a service that the source does not have may be in it.
    pub fn may_have(&self, service: &ServiceKey) -> bool {
        self.anything || self.services.contains(service)
    }

    /// Whether endpoints of a service may be in it; `group` is the name that it takes them by.
    pub fn may_have_endpoints(&self, group: &ServiceKey) -> bool {
        self.anything || self.endpoints_of.contains(group)
    }

    /// What is in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        fn both<'a>(
            (one, all): (&'a BTreeSet<ServiceKey>, bool),
            (other, all_others): (&'a BTreeSet<ServiceKey>, bool),
        ) -> BTreeSet<ServiceKey> {
            let first = one.iter().filter(|key| all_others || other.contains(*key));
            first.chain(other.iter().filter(|_| all)).cloned().collect()
        }
        Self {
            anything: self.anything && other.anything,
            services: both((&self.services, self.anything), (&other.services, other.anything)),
            endpoints_of: both((&self.endpoints_of, self.anything), (&other.endpoints_of, other.anything)),
        }
    }

    /// Whether all that is in it is in another one too.
    pub fn is_within(&self, other: &Self) -> bool {
        other.anything
            || !self.anything
                && self.services.is_subset(&other.services)
                && self.endpoints_of.is_subset(&other.endpoints_of)
    }
}

/// What a kernel has for services that no state names any more: as long as some of the source can't be read, it may be meant to
/// be there.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Nameless {
    /// Marks of their ports.
    pub marks: BTreeSet<Mark>,
    /// Published numbers that lead nowhere, for want of an endpoint.
    pub published: BTreeSet<(Protocol, u16)>,
}

impl Nameless {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl<'a> FromIterator<&'a Hides> for Unread {
    fn from_iter<T: IntoIterator<Item = &'a Hides>>(all: T) -> Self {
        let mut out = Self::default();
        for hides in all {
            match hides {
                Hides::Nothing => {}
                Hides::Anything => out.anything = true,
                Hides::Service(key) => drop(out.services.insert(key.clone())),
                Hides::EndpointsOf(group) => drop(out.endpoints_of.insert(group.clone())),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_both() {
        let key = |name: &str| ServiceKey::new("default", name);
        let of =
            |names: &[&str]| Unread { services: names.iter().map(|n| key(n)).collect(), ..Unread::default() };
        let endpoints = Unread { endpoints_of: [key("a")].into(), ..Unread::default() };
        let cases = [
            (of(&["a", "b"]), of(&["b", "c"]), of(&["b"])),
            (of(&["a"]), Unread::anything(), of(&["a"])),
            (endpoints.clone(), Unread::anything(), endpoints.clone()),
            (endpoints, of(&["a"]), Unread::default()),
            (Unread::anything(), Unread::anything(), Unread::anything()),
        ];
        for (one, other, want) in cases {
            assert_eq!(one.and(&other), want);
            assert_eq!(other.and(&one), want);
        }
    }
}
