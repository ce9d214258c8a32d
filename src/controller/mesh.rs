//! All MeshServices of a cluster, and what each is to have. Pure: no clock, no network.

mod endpoints;
mod held;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use serde_json::Value;

use endpoints::Counted;
use held::pinned;

use super::{
    headless::{self, Wanted},
    nodes::{Nodes, Said, Touched},
    pools::{PoolId, Used},
    status::{self, Known, Last},
};
use crate::{
    allocate::{
        Allocations, Allocator, Kept,
        aliases::{Asked, Claims},
    },
    api::{self, FieldError, status::MeshServiceStatus},
    model::{
        ids::{PortId, Protocol, ServiceKey},
        node::{NodeConfig, nth_address},
        service::Service,
    },
    source::{
        judge::{At, judge},
        object::{Kind, Object, Verdict},
    },
};

/// What the API server says about an object besides its content.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Meta {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// `metadata.creationTimestamp`, in seconds since 1970.
    pub created: u64,
}

/// A MeshService.
#[derive(Debug)]
pub struct Entry {
    /// Its metadata.
    pub meta: Meta,
    /// The status that it has, as far as known.
    pub status: MeshServiceStatus,
    /// The core Service that it is to have: while its spec is wrong, that of the last valid one.
    pub headless: Wanted,
    /// Why it does not have that Service.
    headless_problem: Option<String>,
    service: Option<Arc<Service>>,
    /// `service` is what a status says of a version that was never seen.
    unseen: bool,
    errors: Vec<FieldError>,
    withheld: bool,
}

/// A core Service, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Core {
    /// `metadata.uid`.
    pub uid: String,
    /// The uid of the MeshService that owns it.
    pub owner: Option<String>,
    /// Ports that it has on every node.
    pub node_ports: Vec<(Protocol, u16)>,
    /// It is of type `ExternalName`, another name for a host, and never has endpoints.
    pub external_name: bool,
    /// What of it a headless Service of ours has to have.
    pub spec: Value,
}

/// The whole of it.
#[derive(Debug)]
pub struct Mesh {
    config: NodeConfig,
    entries: HashMap<ServiceKey, Entry>,
    /// Those that are served.
    services: BTreeMap<ServiceKey, Arc<Service>>,
    /// By the name that slices give.
    users: HashMap<ServiceKey, BTreeSet<ServiceKey>>,
    slices: HashMap<ServiceKey, Counted>,
    by_service: HashMap<ServiceKey, BTreeSet<ServiceKey>>,
    /// Who asks for which names in DNS.
    aliases: Claims,
    /// What can't be used of slices, with the name that they give.
    unusable: BTreeMap<ServiceKey, (ServiceKey, String)>,
    cores: HashMap<ServiceKey, Core>,
    cores_changed: bool,
    nodes: Nodes,
    /// Nothing is given out before everything is known.
    allocator: Option<Allocator>,
    orphans: BTreeSet<ServiceKey>,
    /// Something that is entered may be in use no longer.
    freed: bool,
    changed: BTreeSet<ServiceKey>,
    dirty: BTreeSet<ServiceKey>,
}

impl Mesh {
    /// Of which nothing is known yet.
    pub fn new(config: NodeConfig) -> Self {
        Self {
            config,
            entries: HashMap::new(),
            services: BTreeMap::new(),
            users: HashMap::new(),
            slices: HashMap::new(),
            by_service: HashMap::new(),
            aliases: Claims::default(),
            unusable: BTreeMap::new(),
            cores: HashMap::new(),
            cores_changed: false,
            nodes: Nodes::default(),
            allocator: None,
            orphans: BTreeSet::new(),
            freed: true,
            changed: BTreeSet::new(),
            dirty: BTreeSet::new(),
        }
    }

    /// What the cluster's nodes have in common.
    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// Takes in a MeshService: new, changed, or only with another status.
    pub fn put_service(&mut self, key: &ServiceKey, meta: Meta, value: Value) {
        let status = api::readable_status(&value["status"]);
        if let Some(entry) = self.entries.get_mut(key)
            && entry.meta.uid == meta.uid
        {
            if older(&meta.resource_version, &entry.meta.resource_version) {
                return;
            }
            if entry.meta.generation == meta.generation && meta.generation.is_some() {
                if entry.status != status {
                    entry.status = status;
                    self.dirty.insert(key.clone());
                }
                entry.meta = meta;
                return;
            }
        }
        self.dirty.insert(key.clone());
        let asked = headless::desired(key, &meta.uid, &value).map_or(Wanted::Nothing, Wanted::This);
        let judgement = judge(Kind::Service, value, At::ApiServer(&self.config));
        let old = self.take_out(key);
        let same_object = old.filter(|old| old.meta.uid == meta.uid);
        let mut unseen = false;
        let (service, withheld, headless) = match judgement.verdict {
            Verdict::Good(Object::Service(mut service)) => {
                Arc::make_mut(&mut service).created = meta.created;
                (Some(service), false, asked)
            }
            Verdict::Withheld => (None, true, asked),
            // The last good version goes on, with what it has: as the oldest, nobody takes that away.
            Verdict::Wrong | Verdict::Good(_) => {
                unseen = same_object.as_ref().is_none_or(|old| old.unseen || old.service.is_none());
                let (last, headless) =
                    same_object.map_or((None, Wanted::Unknown), |old| (old.service, old.headless));
                (pinned(key, last.as_deref(), &status).map(Arc::new), false, headless)
            }
        };
        if let Some(service) = &service {
            self.users.entry(service.group()).or_default().insert(key.clone());
        }
        self.changed.insert(key.clone());
        let entry = Entry {
            meta,
            status,
            headless,
            headless_problem: None,
            service,
            unseen,
            errors: judgement.findings,
            withheld,
        };
        self.entries.insert(key.clone(), entry);
        self.sort(key);
    }

    /// Others may win or lose an alias by it.
    fn claim_aliases(&mut self, key: &ServiceKey, old: Option<&Service>, new: Option<&Service>) {
        fn asked(service: &Service) -> Asked<'_> {
            (&service.dns.aliases, service.created)
        }
        let touched = self.aliases.set(key, old.map(asked), new.map(asked));
        self.dirty.extend(touched.iter().flat_map(|name| self.aliases.claimants(name)).cloned());
    }

    /// Whether a service is one of those that are served.
    fn sort(&mut self, key: &ServiceKey) {
        let entry = self.entries.get(key);
        let service =
            entry.filter(|e| !e.withheld && !self.name_taken(key, e)).and_then(|e| e.service.clone());
        let old = match service.clone() {
            Some(service) => self.services.insert(key.clone(), service),
            None => self.services.remove(key),
        };
        self.claim_aliases(key, old.as_deref(), service.as_deref());
    }

    fn name_taken(&self, key: &ServiceKey, entry: &Entry) -> bool {
        matches!(entry.headless, Wanted::This(_))
            // One of an earlier object of this name goes away by itself.
            && self.cores.get(key).is_some_and(|core| core.owner.is_none())
    }

    fn take_out(&mut self, key: &ServiceKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        let name = entry.service.as_deref().map(Service::group);
        if let Some(users) = name.and_then(|name| self.users.get_mut(&name)) {
            users.remove(key);
        }
        Some(entry)
    }

    /// A MeshService is gone.
    pub fn remove_service(&mut self, key: &ServiceKey) {
        if self.take_out(key).is_none() {
            return;
        }
        let old = self.services.remove(key);
        self.claim_aliases(key, old.as_deref(), None);
        self.dirty.remove(key);
        self.freed = true;
        self.changed.insert(key.clone());
    }

    /// Takes in a core Service, or that it is gone.
    pub fn put_core(&mut self, key: &ServiceKey, core: Option<Core>) {
        let (old, new) = (self.cores.get(key), core.as_ref());
        let ports = |core: Option<&Core>| core.map(|c| c.node_ports.clone()).unwrap_or_default();
        self.cores_changed |= ports(old) != ports(new);
        let ours = old.map(|c| (&c.owner, &c.spec)) != new.map(|c| (&c.owner, &c.spec));
        if old.map(|c| c.external_name) != new.map(|c| c.external_name) {
            // Those that have none are told why.
            self.dirty.extend(self.users.get(key).into_iter().flatten().cloned());
        }
        match core {
            Some(core) => drop(self.cores.insert(key.clone(), core)),
            None => drop(self.cores.remove(key)),
        }
        if ours && self.entries.contains_key(key) {
            self.sort(key);
            self.changed.insert(key.clone());
            self.dirty.insert(key.clone());
        }
    }

    /// Takes in what a node's MeshNode says, or that it is gone.
    pub fn put_said(&mut self, name: &str, said: Option<Said>) {
        let touched = self.nodes.put_said(name, said);
        self.touch(touched);
    }

    /// Takes in a Node's uid, or that it is gone.
    pub fn put_node(&mut self, name: &str, uid: Option<String>) {
        let touched = self.nodes.put_node(name, uid);
        self.touch(touched);
    }

    /// Whether no agent is there any more.
    pub fn set_deserted(&mut self, deserted: bool) {
        let touched = self.nodes.set_deserted(deserted);
        self.touch(touched);
    }

    fn touch(&mut self, touched: Touched) {
        match touched {
            Touched::All => self.dirty.extend(self.entries.keys().cloned()),
            Touched::Some(keys) => {
                self.dirty.extend(keys.into_iter().filter(|key| self.entries.contains_key(key)));
            }
        }
    }

    /// What is known of the nodes.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// How many services are served.
    pub fn served(&self) -> usize {
        self.services.len()
    }

    /// Everything is known. `entered` numbers are in the pool objects: those that no status has may still be on their way
    /// into one, and are given to nobody until [`Self::free_orphans`].
    pub fn begin(&mut self, entered: &Used) {
        let mut previous = Allocations::default();
        for (key, entry) in &self.entries {
            let granted = api::granted_of(&entry.status);
            let kept = Kept { vips: granted.vips, published: granted.published, ..Kept::default() };
            if kept != Kept::default() {
                previous.services.insert(key.clone(), kept);
            }
        }
        let in_status = self.in_statuses();
        for (pool, numbers) in entered {
            let known = in_status.get(pool).cloned().unwrap_or_default();
            for number in numbers.0.difference(&known.0) {
                // No namespace has a space in its name.
                let key = ServiceKey::new("no service", format!("{}/{number}", pool.object()));
                let mut kept = Kept::default();
                match pool {
                    PoolId::Vips(family) => {
                        let address = self.config.ranges.get(*family).and_then(|r| nth_address(r, *number));
                        kept.vips.set(*family, address);
                    }
                    PoolId::Ports(protocol) => {
                        let Ok(port) = u16::try_from(*number) else { continue };
                        kept.published.insert(PortId { port, protocol: *protocol }, port);
                    }
                }
                previous.services.insert(key.clone(), kept);
                self.orphans.insert(key);
            }
        }
        self.allocator = Some(Allocator::for_mesh(self.config.clone(), previous));
        self.cores_changed = true;
        self.changed.extend(self.entries.keys().cloned());
        self.dirty.extend(self.entries.keys().cloned());
    }

    /// Numbers that were entered, and that no status has after all, can be given out.
    pub fn free_orphans(&mut self) {
        if let Some(allocator) = &mut self.allocator {
            allocator.forget(&self.orphans);
        }
        self.orphans.clear();
        self.freed = true;
    }

    /// Whether the pool objects may hold more than is in use.
    pub fn is_freed(&self) -> bool {
        self.freed
    }

    /// They hold just that.
    pub fn all_is_entered(&mut self) {
        self.freed = false;
    }

    /// Whether [`Self::free_orphans`] has anything to do.
    pub fn has_orphans(&self) -> bool {
        !self.orphans.is_empty()
    }

    /// Works out who has what. Those whose status may differ are [`Self::dirty`] then.
    pub fn allocate(&mut self) {
        let Some(allocator) = &mut self.allocator else { return };
        if std::mem::take(&mut self.cores_changed) {
            let mut outside = BTreeMap::new();
            for (key, core) in &self.cores {
                let who = ServiceKey::new(format!("Service {}", key.namespace), key.name.clone());
                outside.extend(core.node_ports.iter().map(|port| (*port, who.clone())));
            }
            allocator.set_outside(outside);
        }
        let changed = std::mem::take(&mut self.changed);
        let different = allocator.update(&changed, &self.services);
        self.dirty.extend(different.into_iter().filter(|key| self.entries.contains_key(key)));
    }

    /// Services whose status may not be as it should.
    pub fn dirty(&self) -> impl Iterator<Item = &ServiceKey> {
        self.dirty.iter()
    }

    /// Its status is as it should be.
    pub fn clean(&mut self, key: &ServiceKey) {
        self.dirty.remove(key);
    }

    /// Something of it has to be looked at, at the next turn.
    pub fn look_again(&mut self, key: &ServiceKey) {
        if self.entries.contains_key(key) {
            self.dirty.insert(key.clone());
        }
    }

    /// A service.
    pub fn entry(&self, key: &ServiceKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// Names of all services.
    pub fn keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.entries.keys()
    }

    /// The core Service of a name.
    pub fn core(&self, key: &ServiceKey) -> Option<&Core> {
        self.cores.get(key)
    }

    /// Names of all core Services.
    pub fn core_keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.cores.keys()
    }

    /// A service's status has been written.
    pub fn written(&mut self, key: &ServiceKey, new: MeshServiceStatus, resource_version: Option<String>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.freed |= status::differ(&entry.status, &new);
        entry.status = new;
        if let Some(version) = resource_version {
            entry.meta.resource_version = version;
        }
        self.dirty.remove(key);
    }

    /// Its headless Service could not be kept, or could again.
    pub fn headless_problem(&mut self, key: &ServiceKey, problem: Option<String>) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.headless_problem != problem
        {
            entry.headless_problem = problem;
            self.dirty.insert(key.clone());
        }
    }

    /// Whether nothing is to be written any more but what endpoints and nodes do.
    pub fn only_counts_are_due(&self, now: jiff::Timestamp) -> bool {
        self.dirty.iter().all(|key| match (self.entries.get(key), self.desired(key, now)) {
            (Some(entry), Some(new)) => status::only_counts(&entry.status, &new),
            _ => true,
        })
    }

    /// The status that a service is to have.
    pub fn desired(&self, key: &ServiceKey, now: jiff::Timestamp) -> Option<MeshServiceStatus> {
        let entry = self.entries.get(key)?;
        let verdict = match &entry.service {
            _ if entry.withheld => status::Verdict::Withheld(&entry.errors),
            _ if self.name_taken(key, entry) => status::Verdict::NameTaken,
            Some(service) if entry.errors.is_empty() => {
                let allocation = self.allocator.as_ref().and_then(|a| a.get(key));
                status::Verdict::Served(service, allocation, entry.headless_problem.as_deref())
            }
            None => status::Verdict::Wrong(&entry.errors, Last::None),
            Some(_) if entry.unseen => status::Verdict::Wrong(&entry.errors, Last::Unseen),
            Some(_) => status::Verdict::Wrong(&entry.errors, Last::Known(entry.headless_problem.as_deref())),
        };
        let (endpoints, unmatched) = self.count(entry);
        let why_none = if endpoints.total == 0 { self.why_no_endpoints(entry) } else { None };
        Some(status::status(
            &Known {
                generation: entry.meta.generation,
                verdict,
                endpoints,
                why_none,
                unusable: self.unusable_of(entry),
                aliases: self.aliases.conflicts(
                    key,
                    entry.service.as_ref().map(|service| &*service.dns.aliases).unwrap_or_default(),
                    &|name| self.services.contains_key(name),
                ),
                unmatched,
                programmed: self.nodes.programmed(key, entry.meta.generation),
                now,
            },
            &entry.status,
        ))
    }
}

/// Whether a version is surely older: they are decimal numbers that grow (KEP-5504).
fn older(version: &str, than: &str) -> bool {
    match (version.parse::<u64>(), than.parse::<u64>()) {
        (Ok(version), Ok(than)) => version < than,
        _ => false,
    }
}
