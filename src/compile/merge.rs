//! The sum of all compiled services, kept up to date in time proportional to what changes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{Base, CompiledService};
use crate::model::{
    ids::{Mark, ServiceKey},
    kernel::{Element, KernelState, VirtualServerKey},
};

/// Keys whose desired value may have changed.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Touched {
    /// IPVS services.
    pub virtual_servers: BTreeSet<VirtualServerKey>,
    /// Set elements.
    pub elements: BTreeSet<Element>,
}

/// Desired state of the whole kernel, with the services it came from.
#[derive(Default, Debug)]
pub struct Merged {
    services: BTreeMap<ServiceKey, Arc<CompiledService>>,
    owners: HashMap<Mark, ServiceKey>,
    /// How many services have a shared element.
    shared: HashMap<Element, u32>,
    /// How many have an entry that leads nowhere: by that it can't be told whose it is, while it goes from one to another.
    nowhere: HashMap<Element, u32>,
    state: KernelState,
}

impl Merged {
    /// Sets the part that does not depend on services.
    pub fn set_base(&mut self, base: Base) {
        let sentinels: Vec<_> = self
            .state
            .virtual_servers
            .keys()
            .filter(|key| !self.owners.contains_key(&key.mark))
            .copied()
            .collect();
        for key in sentinels {
            self.state.virtual_servers.remove(&key);
        }
        self.state.virtual_servers.extend(base.sentinels);
        self.state.program = Some(base.program);
        self.state.routes = base.routes;
        self.state.sysctls = base.sysctls;
        self.state.timeouts = base.timeouts;
    }

    /// Replaces what one service contributes; `None` removes it. Returns which keys it had or has.
    pub fn replace(&mut self, key: &ServiceKey, new: Option<Arc<CompiledService>>, touched: &mut Touched) {
        if let Some(old) = self.services.remove(key) {
            // What another service has taken over in the same turn is that one's.
            for vs in old.virtual_servers.keys() {
                if self.owners.get(&vs.mark).is_none_or(|owner| owner == key) {
                    self.state.virtual_servers.remove(vs);
                }
                touched.virtual_servers.insert(*vs);
            }
            for mark in old.marks() {
                if self.owners.get(&mark) == Some(key) {
                    self.owners.remove(&mark);
                }
            }
            for (element, mark) in &old.elements {
                let last = *mark != Some(Mark::NOWHERE) || one_less(&mut self.nowhere, element);
                if last && self.state.elements.get(element) == Some(mark) {
                    self.state.elements.remove(element);
                }
                touched.elements.insert(*element);
            }
            for element in &old.shared {
                if one_less(&mut self.shared, element) {
                    self.state.elements.remove(element);
                }
                touched.elements.insert(*element);
            }
        }
        let Some(new) = new else { return };
        for (vs, server) in &new.virtual_servers {
            self.state.virtual_servers.insert(*vs, server.clone());
            touched.virtual_servers.insert(*vs);
        }
        self.owners.extend(new.marks().map(|mark| (mark, key.clone())));
        for (element, mark) in &new.elements {
            if *mark == Some(Mark::NOWHERE) {
                *self.nowhere.entry(*element).or_default() += 1;
            }
            self.state.elements.insert(*element, *mark);
            touched.elements.insert(*element);
        }
        for element in &new.shared {
            *self.shared.entry(*element).or_default() += 1;
            self.state.elements.insert(*element, None);
            touched.elements.insert(*element);
        }
        self.services.insert(key.clone(), new);
    }

    /// The desired state.
    pub fn state(&self) -> &KernelState {
        &self.state
    }

    /// The compiled services.
    pub fn services(&self) -> &BTreeMap<ServiceKey, Arc<CompiledService>> {
        &self.services
    }

    /// The service that an entry is about, where it is one's alone.
    pub fn owner_of(&self, element: &Element) -> Option<&ServiceKey> {
        self.services.iter().find(|(_, service)| service.elements.contains_key(element)).map(|(key, _)| key)
    }

    /// The service that owns a mark.
    pub fn owner(&self, mark: Mark) -> Option<&ServiceKey> {
        self.owners.get(&mark)
    }
}

/// Counts one service less that has an element. Whether it was the last.
fn one_less(counts: &mut HashMap<Element, u32>, element: &Element) -> bool {
    let Some(count) = counts.get_mut(element) else { return true };
    *count -= 1;
    if *count > 0 {
        return false;
    }
    counts.remove(element);
    true
}
