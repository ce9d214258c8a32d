//! A kernel in memory, for tests: applies changes to a [`KernelState`], counts writes, and fails when
//! told to.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ipvs_netlink::ServiceFlags;

use super::{
    AddressRules, Counters, ElementChange, Error, Host, Ipvs, IpvsChange, Listed, Listener, Netfilter,
    NetfilterState, Probe, ProgramState,
};
use crate::model::{
    ids::{Family, Mark, PerFamily},
    kernel::{
        BridgeSubnet, Elements, KernelState, Program, PublishedFlows, RealServerConfig, RealServerKey,
        Timeouts, UdpFlows, VipRoute, VirtualServer, VirtualServerConfig, VirtualServerKey,
    },
    node::NodeFacts,
};

/// What is in the fake kernel.
#[derive(Default, Debug)]
pub struct Inner {
    /// Its state.
    pub state: KernelState,
    /// Routes of ours for ranges that are not in `state`.
    pub other_routes: Vec<VipRoute>,
    /// Services that are there and that dumps don't tell of.
    pub missed: BTreeSet<VirtualServerKey>,
    /// It has no list of IPVS services for people, but the beginning of one.
    pub no_list: bool,
    /// Services that this list leaves out.
    pub left_out: BTreeSet<VirtualServerKey>,
    /// Marks that entries of another renderer lead to.
    pub led_to: BTreeSet<Mark>,
    /// Sysctls that can be read and not written.
    pub read_only: BTreeSet<String>,
    /// Its addresses.
    pub facts: NodeFacts,
    /// Active connections by real server.
    pub active: HashMap<RealServerKey, u32>,
    /// Sockets that listen.
    pub listeners: Vec<Listener>,
    /// Subnets behind bridges.
    pub bridges: Vec<BridgeSubnet>,
    /// How often somebody asked for them.
    pub bridge_looks: u64,
    /// How often rules and sets were read.
    pub observations: u64,
    /// IPVS timeouts.
    pub timeouts: Timeouts,
    /// Writing commands so far.
    pub writes: u64,
    /// Reals whose UDP flows were forgotten, in order.
    pub forgotten: Vec<RealServerKey>,
    /// Open connections by published ports.
    pub flows: BTreeSet<PublishedFlows>,
    /// What the netfilter probe finds changed, once.
    pub changed: Option<String>,
    /// The next changes whose text contains one of these fail once. Reads are called `read services`, `read destinations`,
    /// `read timeouts`, `read rules`, `probe`, `read routes`, `read sysctl PATH`, `read addresses`, `read bridges`,
    /// `read flows` and `listeners`.
    pub faults: Vec<String>,
    /// The same for changes that fail each time.
    pub impossible: Vec<String>,
}

/// Handle to a fake kernel; implements every trait of the dataplane.
#[derive(Clone, Default, Debug)]
pub struct FakeKernel(Arc<Mutex<Inner>>);

impl FakeKernel {
    /// Locks it for a look or a disturbance.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, what: &str) -> Result<MutexGuard<'_, Inner>, Error> {
        self.lock().writes += 1;
        self.may_fail(what)
    }

    /// Fails if it was told to.
    fn may_fail(&self, what: &str) -> Result<MutexGuard<'_, Inner>, Error> {
        let mut inner = self.lock();
        if let Some(fault) = inner.impossible.iter().find(|fault| what.contains(fault.as_str())) {
            return Err(Error::Failed { object: what.to_owned(), reason: format!("impossible: {fault}") });
        }
        if let Some(i) = inner.faults.iter().position(|fault| what.contains(fault.as_str())) {
            let fault = inner.faults.remove(i);
            return Err(Error::Failed { object: what.to_owned(), reason: format!("injected: {fault}") });
        }
        Ok(inner)
    }
}

fn missing(object: impl ToString) -> Error {
    Error::Failed { object: object.to_string(), reason: "no such object".into() }
}

impl Ipvs for FakeKernel {
    fn dump(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
    ) -> Result<HashMap<VirtualServerKey, VirtualServer>, Error> {
        let inner = self.may_fail("read services")?;
        let told =
            inner.state.virtual_servers.iter().filter(|(k, _)| keep(k.mark) && !inner.missed.contains(k));
        Ok(told.map(|(k, v)| (*k, v.clone())).collect())
    }

    fn dump_services(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
    ) -> Result<HashMap<VirtualServerKey, VirtualServerConfig>, Error> {
        Ok(self.dump(keep)?.into_iter().map(|(k, v)| (k, v.config)).collect())
    }

    fn count(&mut self) -> Option<u32> {
        let inner = self.lock();
        u32::try_from(inner.state.virtual_servers.keys().filter(|key| key.family == Family::V4).count()).ok()
    }

    fn list(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
        each: &mut dyn FnMut(&Listed<'_>),
    ) -> Result<bool, Error> {
        let no_list = self.may_fail("list")?.no_list;
        let left_out = self.lock().left_out.clone();
        for (key, server) in self.dump(keep)? {
            if left_out.contains(&key) {
                continue;
            }
            let reals: Vec<_> = server.reals.iter().map(|(real, config)| (*real, *config)).collect();
            let odd = ServiceFlags::PERSISTENT | ServiceFlags::ONE_PACKET;
            let plain = server.config.flags & odd.bits() == 0;
            each(&Listed { mark: key.mark, scheduler: &server.config.scheduler, plain, reals: &reals });
            if no_list {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn service(&mut self, key: VirtualServerKey) -> Result<Option<VirtualServerConfig>, Error> {
        Ok(self.may_fail("read services")?.state.virtual_servers.get(&key).map(|s| s.config.clone()))
    }

    fn reals(
        &mut self,
        key: VirtualServerKey,
    ) -> Result<BTreeMap<RealServerKey, (RealServerConfig, Counters)>, Error> {
        let inner = self.may_fail("read destinations")?;
        let Some(server) = inner.state.virtual_servers.get(&key) else { return Ok(BTreeMap::new()) };
        let counters =
            |real| Counters { active: inner.active.get(real).copied().unwrap_or(0), ..Counters::default() };
        Ok(server.reals.iter().map(|(real, config)| (*real, (*config, counters(real)))).collect())
    }

    fn apply(&mut self, changes: &[IpvsChange]) -> Vec<Result<(), Error>> {
        let one = |change: &IpvsChange| -> Result<(), Error> {
            let what = crate::plan::Op::Ipvs(change.clone()).to_string();
            let mut inner = self.write(&what)?;
            let servers = &mut inner.state.virtual_servers;
            match change {
                IpvsChange::AddService(key, config) => {
                    servers.entry(*key).or_insert_with(|| VirtualServer {
                        config: config.clone(),
                        protocol: None,
                        reals: Arc::default(),
                    });
                }
                IpvsChange::SetService(key, config) => {
                    servers.get_mut(key).ok_or_else(|| missing(key))?.config = config.clone();
                }
                IpvsChange::DelService(key) => {
                    servers.remove(key);
                }
                IpvsChange::AddReal(key, real, config) | IpvsChange::SetReal(key, real, config) => {
                    let server = servers.get_mut(key).ok_or_else(|| missing(key))?;
                    Arc::make_mut(&mut server.reals).insert(*real, *config);
                }
                IpvsChange::DelReal(key, real) => {
                    if let Some(server) = servers.get_mut(key) {
                        Arc::make_mut(&mut server.reals).remove(real);
                    }
                }
            }
            Ok(())
        };
        changes.iter().map(one).collect()
    }

    fn timeouts(&mut self) -> Result<Timeouts, Error> {
        Ok(self.may_fail("read timeouts")?.timeouts)
    }

    fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error> {
        self.write("timeouts")?.timeouts = timeouts;
        Ok(())
    }

    fn foreign(&mut self, keep: &dyn Fn(Mark) -> bool) -> Result<Vec<String>, Error> {
        let inner = self.lock();
        Ok(inner.state.virtual_servers.keys().filter(|k| !keep(k.mark)).map(ToString::to_string).collect())
    }

    fn writes(&self) -> u64 {
        self.lock().writes
    }
}

impl Netfilter for FakeKernel {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn observe(&mut self, want: &Program) -> Result<NetfilterState, Error> {
        let mut inner = self.may_fail("read rules")?;
        inner.observations += 1;
        let program = match &inner.state.program {
            None => ProgramState::Absent,
            Some(have) if have == want => ProgramState::Installed,
            Some(_) => ProgramState::Drifted(vec!["different".into()]),
        };
        let elements = inner.state.elements.clone();
        Ok(NetfilterState { program, elements, leftovers: vec![], led_to: inner.led_to.clone() })
    }

    fn install(&mut self, program: &Program, elements: &Elements) -> Result<(), Error> {
        let mut inner = self.write("install")?;
        inner.state.program = Some(program.clone());
        let served = elements.iter().filter(|(e, _)| program.families.get(e.family()).is_some());
        inner.state.elements = served.map(|(e, mark)| (*e, *mark)).collect();
        Ok(())
    }

    fn apply(&mut self, _: &Program, changes: &[ElementChange]) -> Vec<Result<(), Error>> {
        let one = |change: &ElementChange| -> Result<(), Error> {
            let what = crate::plan::Op::Element(change.clone()).to_string();
            let mut inner = self.write(&what)?;
            let Some(program) = &inner.state.program else { return Err(missing(what)) };
            let (ElementChange::Put(element, _) | ElementChange::Del(element)) = change;
            // Of a family that is not served there are no sets.
            if program.families.get(element.family()).is_none() {
                return Err(missing(what));
            }
            match change {
                ElementChange::Put(element, mark) => inner.state.elements.insert(*element, *mark),
                ElementChange::Del(element) => inner.state.elements.remove(element),
            };
            Ok(())
        };
        changes.iter().map(one).collect()
    }

    fn remove_leftovers(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Error> {
        let mut inner = self.write("remove")?;
        inner.state.program = None;
        inner.state.elements.clear();
        Ok(())
    }

    fn probe(&mut self) -> Result<Probe, Error> {
        let changed = self.may_fail("probe")?.changed.take();
        Ok(changed.map_or(Probe::Unchanged, Probe::Changed))
    }

    fn fingerprint(&self) -> Option<serde_json::Value> {
        None
    }

    fn set_fingerprint(&mut self, _: serde_json::Value) {}

    fn writes(&self) -> u64 {
        self.lock().writes
    }
}

impl Host for FakeKernel {
    fn vip_routes(&mut self, ranges: &PerFamily<ipnet::IpNet>) -> Result<PerFamily<VipRoute>, Error> {
        let inner = self.may_fail("read routes")?;
        let mut found = PerFamily::default();
        for route in inner.state.routes.iter().map(|(_, route)| route).chain(&inner.other_routes) {
            let family = Family::of(&route.source);
            if ranges.get(family) == Some(&route.range) {
                found.set(family, Some(*route));
            }
        }
        Ok(found)
    }

    fn our_ranges(&mut self) -> Result<BTreeSet<ipnet::IpNet>, Error> {
        let inner = self.may_fail("read routes")?;
        let routes = inner.state.routes.iter().map(|(_, route)| route).chain(&inner.other_routes);
        Ok(routes.map(|route| route.range).collect())
    }

    fn put_vip_route(&mut self, route: &VipRoute) -> Result<(), Error> {
        let family = Family::of(&route.source);
        self.write("route")?.state.routes.set(family, Some(*route));
        Ok(())
    }

    fn del_vip_route(&mut self, family: Family, range: &ipnet::IpNet) -> Result<(), Error> {
        let mut inner = self.write("route")?;
        let before = inner.other_routes.len();
        inner.other_routes.retain(|route| route.range != *range);
        if inner.other_routes.len() == before {
            inner.state.routes.set(family, None);
        }
        Ok(())
    }

    fn overlaps(&mut self, _: &ipnet::IpNet) -> Result<Vec<String>, Error> {
        Ok(vec![])
    }

    fn sysctl(&mut self, path: &str) -> Result<Option<String>, Error> {
        Ok(self.may_fail(&format!("read sysctl {path}"))?.state.sysctls.get(path).cloned())
    }

    fn can_have(&mut self, path: &str, value: &str) -> Result<bool, Error> {
        let found = self.sysctl(path)?;
        let read_only = self.lock().read_only.contains(path);
        Ok(found.is_some_and(|found| found == value || !read_only))
    }

    fn set_sysctl(&mut self, path: &str, value: &str) -> Result<(), Error> {
        self.write(path)?.state.sysctls.insert(path.to_owned(), value.to_owned());
        Ok(())
    }

    fn facts(&mut self, _: &AddressRules) -> Result<NodeFacts, Error> {
        Ok(self.may_fail("read addresses")?.facts.clone())
    }

    fn bridges_of(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<Vec<BridgeSubnet>, Error> {
        let mut inner = self.may_fail("read bridges")?;
        inner.bridge_looks += 1;
        let behind = |b: &&BridgeSubnet| addresses.iter().any(|a| b.subnet.contains(a));
        Ok(inner.bridges.iter().filter(behind).cloned().collect())
    }

    fn listeners(&mut self) -> Result<Vec<Listener>, Error> {
        Ok(self.may_fail("listeners")?.listeners.clone())
    }

    fn forget_udp(&mut self, flows: &UdpFlows) -> Result<usize, Error> {
        self.write("conntrack entries")?.forgotten.extend(flows.keys().copied());
        Ok(0)
    }

    fn open_flows(&mut self, flows: &[PublishedFlows]) -> Result<Vec<bool>, Error> {
        let inner = self.may_fail("read flows")?;
        let is_open = |flows: &PublishedFlows| {
            let same = |open: &&PublishedFlows| (open.protocol, open.real) == (flows.protocol, flows.real);
            inner.flows.iter().filter(same).any(|open| !open.to.is_disjoint(&flows.to))
        };
        Ok(flows.iter().map(is_open).collect())
    }

    fn cut_flows(&mut self, flows: &[PublishedFlows]) -> Result<usize, Error> {
        let mut inner = self.write("conntrack entries")?;
        Ok(flows.iter().filter(|flows| inner.flows.remove(flows)).count())
    }

    fn writes(&self) -> u64 {
        self.lock().writes
    }
}
