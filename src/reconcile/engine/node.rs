//! The node itself: its addresses, its families, its zone, the ranges of its pods.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use super::Engine;
use crate::{
    compile::base::compile_base,
    dataplane::{
        Error,
        host::{REQUIRED, Required, When},
    },
    model::{
        ids::Family,
        node::{NodeFacts, NodeSays},
    },
};

/// Addresses of IPv6 are gone while their link is down, and for a moment after it: their family is served on for so long.
pub(super) const FAMILY_GRACE: Duration = Duration::from_secs(5);

impl Engine {
    /// The node as it was last seen.
    pub fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    /// Takes in what the source knows of this node, as far as it was not given. The next [`Self::refresh_node`] goes by its
    /// addresses; another zone makes other endpoints near.
    pub fn set_node(&mut self, says: NodeSays) {
        if self.given.addresses.is_empty() {
            self.settings.addresses.node_ips = says.addresses;
        }
        self.pods = Some(says.pods);
        if self.given.zone.is_none() && self.settings.node.zone != says.zone {
            self.settings.node.zone = says.zone;
            self.dirty.extend(self.snapshot.services().keys().cloned());
        }
    }

    /// Ranges of this node's pods, once the source has said what it knows of them.
    pub fn pods(&self) -> Option<&[IpNet]> {
        self.pods.as_deref()
    }

    /// Reads the node's addresses; when they changed, everything is compiled again.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn refresh_node(&mut self) -> Result<bool, Error> {
        let mut facts = self.dataplane.host.facts(&self.settings.addresses)?;
        self.keep_families(&mut facts);
        if facts == self.facts {
            return Ok(false);
        }
        self.facts = facts;
        self.dirty.extend(self.snapshot.services().keys().cloned());
        self.set_base();
        self.trusted = false;
        Ok(true)
    }

    /// A family that is lost is lost at once.
    #[cfg(test)]
    pub(crate) fn end_family_grace(&mut self) {
        self.family_grace = Duration::ZERO;
    }

    /// Whether a family that was lost may yet come back: it is to be asked for again.
    pub fn misses_family(&self) -> bool {
        !self.lost.is_empty()
    }

    fn keep_families(&mut self, facts: &mut NodeFacts) {
        for family in Family::ALL {
            let (Some(had), None) = (self.facts.primary.get(family), facts.primary.get(family)) else {
                self.lost.set(family, None);
                continue;
            };
            let since = self.lost.get(family).copied().unwrap_or_else(Instant::now);
            if since.elapsed() >= self.family_grace {
                self.lost.set(family, None);
                continue;
            }
            self.lost.set(family, Some(since));
            let of_family = |addr: &&IpAddr| Family::of(addr) == family;
            facts.primary.set(family, Some(*had));
            facts.published_addresses.extend(self.facts.published_addresses.iter().filter(of_family));
            facts.all_addresses.extend(self.facts.all_addresses.iter().filter(of_family));
        }
    }

    pub(super) fn set_base(&mut self) {
        let needed = |required: &Required| match required.when {
            When::Always => true,
            When::V6Range => self.settings.node.ranges.v6.is_some() && self.facts.primary.v6.is_some(),
            When::V4EndpointOnBridge | When::V6EndpointOnBridge => {
                self.bridges.sysctls.contains(required.path)
            }
        };
        let sysctls = REQUIRED
            .iter()
            .filter(|required| needed(required))
            .map(|required| (required.path.to_owned(), required.value.to_owned()))
            .collect();
        let base = compile_base(
            &self.settings.node,
            &self.facts,
            sysctls,
            self.bridges.masquerade.clone(),
            self.settings.timeouts,
        );
        self.merged.set_base(base);
    }
}
