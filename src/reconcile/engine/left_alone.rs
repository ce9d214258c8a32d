//! What the kernel has for services that are left alone stays as it was found, and comes back when others take it away.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::Engine;
use crate::{
    dataplane::{ElementChange, Error},
    model::{
        ids::{Mark, Protocol, ServiceKey},
        kernel::{Element, Elements, KernelState, VirtualServer, VirtualServerKey},
        unread::Nameless,
    },
    plan::{Observed, Op},
};

/// What was found at the first look for services that the source does not have but may be meant to have.
#[derive(Default)]
pub(super) struct Spared {
    servers: HashMap<VirtualServerKey, VirtualServer>,
    elements: Elements,
    /// What is theirs though their names were lost with the state.
    nameless: Nameless,
}

impl Engine {
    /// What earlier runs have left alone without knowing whose it is.
    pub fn set_nameless(&mut self, nameless: Nameless) {
        self.spared.nameless = nameless;
    }

    /// What is left alone though nobody knows whose it is.
    pub fn nameless(&self) -> &Nameless {
        &self.spared.nameless
    }

    /// At the first look: marks of which the state tells nothing may be of services that can't be read.
    pub(super) fn note_nameless(
        &mut self,
        unknown: BTreeSet<Mark>,
        state_is_lost: bool,
        elements: &Elements,
    ) {
        if !self.may_miss_services() {
            return;
        }
        if state_is_lost || !unknown.is_empty() {
            let nowhere = elements.iter().filter(|(_, mark)| **mark == Some(Mark::NOWHERE));
            self.spared
                .nameless
                .published
                .extend(nowhere.filter_map(|(element, _)| element.published_number()));
        }
        self.spared.nameless.marks.extend(unknown);
    }

    /// A dump may leave a service out while others change theirs: of what is left alone, those that entries lead to are asked
    /// for. Whatever is found is left alone too.
    pub(super) fn complete_left_alone(&mut self, observed: &mut Observed) -> Result<(), Error> {
        if self.leaves_none_alone() {
            return Ok(());
        }
        let marks = self.marks_left_alone();
        let led_to: BTreeSet<VirtualServerKey> = observed
            .elements
            .iter()
            .filter_map(|(element, mark)| Some(VirtualServerKey { family: element.family(), mark: (*mark)? }))
            .filter(|key| marks.contains(&key.mark) && !observed.virtual_servers.contains_key(key))
            .collect();
        for key in led_to {
            if let Some(config) = self.dataplane.ipvs.service(key)? {
                let reals = self.dataplane.ipvs.reals(key)?.into_iter();
                let reals = Arc::new(reals.map(|(real, (config, _))| (real, config)).collect());
                let server = VirtualServer { config, protocol: None, reals };
                self.known.virtual_servers.insert(key, server.clone());
                observed.virtual_servers.insert(key, server);
            }
        }
        for (key, server) in observed.virtual_servers.iter().filter(|(key, _)| marks.contains(&key.mark)) {
            self.spared.servers.entry(*key).or_insert_with(|| server.clone());
        }
        Ok(())
    }

    /// At the first look: the entries of what is left alone.
    pub(super) fn note_spared(&mut self, observed: &Observed) {
        if self.leaves_none_alone() {
            return;
        }
        let left = self.left_alone();
        let theirs = |element: &Element, mark: Option<Mark>| {
            left.has(element, mark) || element.is_published() && left.has(element, Some(Mark::NOWHERE))
        };
        let elements = observed.elements.iter().filter(|(element, mark)| theirs(element, **mark));
        self.spared.elements = elements.map(|(element, mark)| (*element, *mark)).collect();
    }

    fn may_miss_services(&self) -> bool {
        self.unread.anything || !self.unread.services.is_empty()
    }

    /// Numbers that a readable service publishes are its own.
    pub(super) fn name_numbers(&mut self) {
        if self.spared.nameless.published.is_empty() {
            return;
        }
        let entries = self.merged.state().elements.keys();
        let named: BTreeSet<_> = entries.filter_map(Element::published_number).collect();
        let before = self.spared.nameless.published.len();
        self.spared.nameless.published.retain(|number| !named.contains(number));
        self.generation += u64::from(self.spared.nameless.published.len() != before);
    }

    /// Once all services can be read, whoever has not turned up is gone.
    pub(super) fn let_go_of_nameless(&mut self) {
        if !self.spared.nameless.is_empty() && !self.may_miss_services() {
            self.spared.nameless = Nameless::default();
            self.generation += 1;
            self.compare_held();
        }
    }

    /// Services that are left alone, without those that have turned up meanwhile.
    fn still_held(&self) -> impl Iterator<Item = &ServiceKey> {
        self.held.iter().filter(|key| !self.snapshot.services().contains_key(*key))
    }

    /// Not those of another mask: what leads to them would leave the node with its mark.
    pub(super) fn marks_left_alone(&self) -> BTreeSet<Mark> {
        let mask = self.settings.node.mask;
        let marks = self.still_held().flat_map(|key| self.allocator.remembered_marks(key));
        marks.chain(self.spared.nameless.marks.iter().copied()).filter(|mark| mask.covers(*mark)).collect()
    }

    /// What is in the kernel for services that are left alone.
    fn left_alone(&self) -> LeftAlone {
        let marks = self.marks_left_alone();
        let theirs = self.spared.servers.iter().filter(|(key, _)| marks.contains(&key.mark));
        let endpoints = theirs.flat_map(|(_, server)| server.reals.keys().map(|real| real.addr)).collect();
        let remembered = self.still_held().flat_map(|key| self.allocator.remembered_ports(key));
        let served = self.still_held().filter_map(|key| self.served.get(key)).flatten().copied();
        let nameless = self.spared.nameless.published.iter().copied();
        LeftAlone { marks, endpoints, ports: remembered.chain(served).chain(nameless).collect() }
    }

    fn leaves_none_alone(&self) -> bool {
        self.held.is_empty() && self.spared.nameless.is_empty()
    }

    /// The observed state without what is left alone: nothing of it is to be ended.
    pub(super) fn without_left_alone<'a>(&self, observed: &'a Observed) -> Cow<'a, Observed> {
        if self.leaves_none_alone() {
            return Cow::Borrowed(observed);
        }
        let left = self.left_alone();
        let wanted = &self.merged.state().elements;
        let mut out = observed.clone();
        out.virtual_servers.retain(|key, _| !left.marks.contains(&key.mark));
        out.elements.retain(|element, mark| wanted.contains_key(element) || !left.has(element, *mark));
        Cow::Owned(out)
    }

    /// What the kernel should have: the desired state, and what is left alone as it was found.
    pub fn with_left_alone(&self) -> Cow<'_, KernelState> {
        let desired = self.merged.state();
        if self.leaves_none_alone() {
            return Cow::Borrowed(desired);
        }
        let left = self.left_alone();
        let mut out = desired.clone();
        for (key, server) in self.spared.servers.iter().filter(|(key, _)| left.marks.contains(&key.mark)) {
            out.virtual_servers.entry(*key).or_insert_with(|| server.clone());
        }
        let mask = self.settings.node.mask;
        for (element, mark) in &self.spared.elements {
            // Without its mark a published number is nobody's all the same.
            let other = mark.is_some_and(|mark| mark != Mark::NOWHERE && !mask.covers(mark));
            let mark = if other && element.is_published() { Some(Mark::NOWHERE) } else { *mark };
            if left.has(element, mark) {
                out.elements.entry(*element).or_insert(mark);
            }
        }
        Cow::Owned(out)
    }

    /// Entries of theirs go with nobody else's: the last readable service that had the same endpoints, say.
    pub(super) fn spare_left_alone(&self, ops: &mut Vec<Op>) {
        let deleted = |op: &Op| match op {
            Op::Element(ElementChange::Del(element)) => Some(*element),
            _ => None,
        };
        if self.leaves_none_alone() || !ops.iter().any(|op| deleted(op).is_some()) {
            return;
        }
        let left = self.left_alone();
        ops.retain(|op| {
            deleted(op).is_none_or(|element| {
                !left.has(&element, self.known.elements.get(&element).copied().flatten())
            })
        });
    }
}

/// What is in the kernel for services that are left alone.
struct LeftAlone {
    marks: BTreeSet<Mark>,
    endpoints: HashSet<IpAddr>,
    ports: HashSet<(Protocol, u16)>,
}

impl LeftAlone {
    /// Whether an entry is theirs, if nobody else wants it.
    fn has(&self, element: &Element, mark: Option<Mark>) -> bool {
        match (element, mark) {
            (_, Some(mark)) if mark != Mark::NOWHERE => self.marks.contains(&mark),
            (Element::Vip(_), _) => false,
            (Element::Published(_) | Element::Loopback(..), _) => {
                element.published_number().is_some_and(|number| self.ports.contains(&number))
            }
            (Element::Endpoint(addr) | Element::Local(addr), _) => self.endpoints.contains(addr),
            (Element::Own(to), _) => self.endpoints.contains(&to.addr),
        }
    }
}
