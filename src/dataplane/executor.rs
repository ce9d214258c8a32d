//! Carries operations out, in their order, neighbours of one kind together.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{ElementChange, Error, Host, Ipvs, IpvsChange, Netfilter};
use crate::{
    model::{
        ids::{Family, Mark, PerFamily},
        kernel::{Element, Elements, KernelState, VirtualServer, VirtualServerKey},
    },
    plan::{Observed, Op},
};

/// The whole kernel side.
pub struct Dataplane {
    /// IPVS.
    pub ipvs: Box<dyn Ipvs + Send>,
    /// The chosen renderer.
    pub netfilter: Box<dyn Netfilter + Send>,
    /// Routes, sysctls, sockets.
    pub host: Box<dyn Host + Send>,
}

/// An operation that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The operation.
    pub op: Op,
    /// Why.
    pub error: Error,
    /// It only follows from another failure, which says what to do.
    pub follows: bool,
}

impl Dataplane {
    /// Reads everything of ours. `ours` tells which IPVS services are ours by their mark; marks that our
    /// own sets lead to are ours besides.
    ///
    /// # Errors
    /// The first thing that could not be read.
    pub fn observe(
        &mut self,
        desired: &KernelState,
        ranges: &PerFamily<ipnet::IpNet>,
        ours: &dyn Fn(Mark) -> bool,
    ) -> Result<Observed, Error> {
        let netfilter = match &desired.program {
            Some(program) => self.netfilter.observe(program)?,
            None => super::NetfilterState {
                program: super::ProgramState::Absent,
                elements: BTreeMap::new(),
                leftovers: vec![],
                led_to: BTreeSet::new(),
            },
        };
        let mut led_to: BTreeSet<Mark> = netfilter.elements.values().flatten().copied().collect();
        led_to.extend(netfilter.led_to);
        let is_ours = |mark: Mark| ours(mark) || led_to.contains(&mark);
        let foreign = std::cell::RefCell::new(BTreeSet::new());
        let mut virtual_servers = self.ipvs.dump(&|mark| {
            let keep = is_ours(mark);
            if !keep {
                foreign.borrow_mut().insert(mark);
            }
            keep
        })?;
        self.add_missed(desired, &mut virtual_servers)?;
        let mut sysctls = BTreeMap::new();
        for path in desired.sysctls.keys() {
            if let Some(value) = self.host.sysctl(path)? {
                sysctls.insert(path.clone(), value);
            }
        }
        Ok(Observed {
            virtual_servers,
            foreign_marks: foreign.into_inner(),
            led_to,
            elements: netfilter.elements,
            program: netfilter.program,
            leftovers: netfilter.leftovers,
            routes: self.host.vip_routes(ranges)?,
            sysctls,
            timeouts: self.ipvs.timeouts()?,
        })
    }

    /// Services that are there although the dump did not tell of them. Where a great many are missing, it is the kernel that
    /// lacks them.
    fn add_missed(
        &mut self,
        desired: &KernelState,
        found: &mut HashMap<VirtualServerKey, VirtualServer>,
    ) -> Result<(), Error> {
        const MOST: usize = 1000;
        let missing = desired.virtual_servers.keys().filter(|key| !found.contains_key(key));
        let missing: Vec<_> = missing.take(MOST + 1).copied().collect();
        if missing.len() > MOST {
            return Ok(());
        }
        for key in missing {
            if let Some(config) = self.ipvs.service(key)? {
                let reals = self.ipvs.reals(key)?.into_iter().map(|(real, (config, _))| (real, config));
                let reals = Arc::new(reals.collect());
                found.insert(key, VirtualServer { config, protocol: None, reals });
            }
        }
        Ok(())
    }

    /// Applies operations in order and goes on after a failure, except with what would send packets to a wrong place then:
    /// no VIP route is added when the rules that guard it could not be installed; a server gets no destinations while an entry
    /// that had to go leads to it, and no entry while it has some that had to go. `leads_to` knows the entries of before.
    pub fn apply(
        &mut self,
        ops: &[Op],
        desired: &KernelState,
        leads_to: &dyn Fn(&Element) -> Option<Mark>,
    ) -> Vec<Failure> {
        let mut failures = Vec::new();
        let mut unguarded = None;
        let mut stuck = Stuck::default();
        let mut rest = ops;
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|op| kind(op) == kind(first)).count();
            let (run, tail) = rest.split_at(same);
            rest = tail;
            let mut kept = Vec::new();
            let run = if stuck.is_empty() {
                run
            } else {
                for op in run {
                    match stuck.put_off(op) {
                        Some(error) => failures.push(Failure { op: op.clone(), error, follows: true }),
                        None => kept.push(op.clone()),
                    }
                }
                &kept
            };
            if run.is_empty() {
                continue;
            }
            // New rules bring all entries with them: not those that would have to wait as changes of their own.
            let without;
            let mut with = desired;
            if matches!(first, Op::Install { .. })
                && let Some((rest, waiting)) = stuck.put_off_entries(desired)
            {
                failures.extend(waiting);
                without = rest;
                with = &without;
            }
            for (op, result) in run.iter().zip(self.apply_run(run, with, &mut unguarded)) {
                if let Err(error) = result {
                    let follows = matches!(op, Op::PutRoute(_)) && unguarded.is_some();
                    stuck.failed(op, leads_to);
                    failures.push(Failure { op: op.clone(), error, follows });
                }
            }
        }
        failures
    }

    fn apply_run(
        &mut self,
        run: &[Op],
        desired: &KernelState,
        unguarded: &mut Option<Error>,
    ) -> Vec<Result<(), Error>> {
        match &run[0] {
            Op::Ipvs(_) => {
                let changes: Vec<IpvsChange> = run
                    .iter()
                    .filter_map(|op| if let Op::Ipvs(change) = op { Some(change.clone()) } else { None })
                    .collect();
                self.ipvs.apply(&changes)
            }
            Op::Element(_) => {
                let changes: Vec<ElementChange> = run
                    .iter()
                    .filter_map(|op| if let Op::Element(change) = op { Some(change.clone()) } else { None })
                    .collect();
                match &desired.program {
                    Some(program) => self.netfilter.apply(program, &changes),
                    None => vec![Ok(()); changes.len()],
                }
            }
            Op::CutFlows(_) => {
                let all: Vec<_> = run
                    .iter()
                    .filter_map(|op| if let Op::CutFlows(flows) = op { Some(flows.clone()) } else { None })
                    .collect();
                vec![self.host.cut_flows(&all).map(drop); run.len()]
            }
            _ => run.iter().map(|op| self.apply_one(op, desired, unguarded)).collect(),
        }
    }

    fn apply_one(
        &mut self,
        op: &Op,
        desired: &KernelState,
        unguarded: &mut Option<Error>,
    ) -> Result<(), Error> {
        match op {
            Op::Sysctl { path, value, .. } => self.host.set_sysctl(path, value),
            Op::Timeouts { timeouts, .. } => self.ipvs.set_timeouts(*timeouts),
            Op::Install { program, .. } => {
                let result = self.netfilter.install(program, &desired.elements);
                *unguarded = result.as_ref().err().cloned();
                result
            }
            Op::PutRoute(route) => match unguarded {
                Some(error) if !self.netfilter.stands(Family::of(&route.source)) => Err(Error::Failed {
                    object: format!("route local {}", route.range),
                    reason: format!("not added, as its rules could not be installed ({error})"),
                }),
                _ => self.host.put_vip_route(route),
            },
            Op::DelRoute(family, range) => self.host.del_vip_route(*family, range),
            Op::ForgetUdp(flows) => self.host.forget_udp(flows).map(drop),
            Op::RemoveLeftovers(_) => self.netfilter.remove_leftovers(),
            Op::Ipvs(_) | Op::Element(_) | Op::CutFlows(_) => Ok(()),
        }
    }
}

/// What could not be taken out.
#[derive(Default)]
struct Stuck {
    /// Marks that entries still lead to.
    entered: BTreeSet<Mark>,
    /// Marks of servers with destinations that had to go.
    untrimmed: BTreeSet<Mark>,
}

impl Stuck {
    fn is_empty(&self) -> bool {
        self.entered.is_empty() && self.untrimmed.is_empty()
    }

    fn failed(&mut self, op: &Op, leads_to: &dyn Fn(&Element) -> Option<Mark>) {
        match op {
            Op::Element(ElementChange::Del(element) | ElementChange::Put(element, Some(Mark::NOWHERE))) => {
                self.entered.extend(leads_to(element));
            }
            Op::Ipvs(
                IpvsChange::DelService(key) | IpvsChange::DelReal(key, _) | IpvsChange::SetReal(key, ..),
            ) => {
                self.untrimmed.insert(key.mark);
            }
            _ => {}
        }
    }

    /// What is desired without the entries that have to wait, and these; `None` where none has to. What is published is refused
    /// meanwhile.
    fn put_off_entries(&self, desired: &KernelState) -> Option<(KernelState, Vec<Failure>)> {
        let puts = desired.elements.iter().map(|(e, mark)| Op::Element(ElementChange::Put(*e, *mark)));
        let waiting: Vec<_> = puts
            .filter_map(|op| self.put_off(&op).map(|error| Failure { op, error, follows: true }))
            .collect();
        if waiting.is_empty() {
            return None;
        }
        let mut rest = desired.clone();
        for failure in &waiting {
            if let Op::Element(ElementChange::Put(element, _)) = &failure.op {
                withhold(&mut rest.elements, *element);
            }
        }
        Some((rest, waiting))
    }

    /// Why this has to wait, if it has to.
    fn put_off(&self, op: &Op) -> Option<Error> {
        let reason = match op {
            Op::Ipvs(IpvsChange::AddReal(key, ..) | IpvsChange::SetReal(key, ..))
                if self.entered.contains(&key.mark) =>
            {
                "put off: an entry that had to go still leads there"
            }
            Op::Element(ElementChange::Put(_, Some(mark))) if self.untrimmed.contains(mark) => {
                "put off: it would lead to destinations that had to go"
            }
            _ => return None,
        };
        Some(Error::Failed { object: op.to_string(), reason: reason.into() })
    }
}

/// Takes an entry out that has to wait. What is published is refused meanwhile.
pub fn withhold(elements: &mut Elements, element: Element) {
    if element.is_published() {
        elements.insert(element, Some(Mark::NOWHERE));
    } else {
        elements.remove(&element);
    }
}

fn kind(op: &Op) -> std::mem::Discriminant<Op> {
    std::mem::discriminant(op)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use super::*;
    use crate::{
        dataplane::fake::FakeKernel,
        model::{
            ids::{Family, Protocol},
            kernel::{
                FamilyProgram, Program, RealServerConfig, RealServerKey, Target, VirtualServer,
                VirtualServerConfig, VirtualServerKey,
            },
        },
    };

    fn program() -> Program {
        let family = FamilyProgram {
            range: "10.200.0.0/16".parse().unwrap(),
            ingress: [10, 200, 0, 1].into(),
            node: [192, 168, 50, 1].into(),
        };
        Program {
            mask: 0x3fff,
            families: PerFamily { v4: Some(family), v6: None },
            masquerade_bridges: vec![],
            uplinks: [].into(),
            outside: [].into(),
        }
    }

    fn key(mark: u32) -> VirtualServerKey {
        VirtualServerKey { family: Family::V4, mark: Mark(mark) }
    }

    fn target(last: u8) -> Target {
        Target { addr: [192, 168, 50, last].into(), protocol: Protocol::Tcp, port: 30080 }
    }

    fn real(last: u8) -> RealServerKey {
        RealServerKey { addr: [10, 244, 1, last].into(), port: 8080 }
    }

    /// Two servers, each with a destination, and an entry that leads to the first.
    fn kernel() -> (FakeKernel, Element) {
        let entry = Element::Vip(Target { addr: [10, 200, 0, 5].into(), protocol: Protocol::Tcp, port: 80 });
        let server = VirtualServer {
            config: VirtualServerConfig { scheduler: "rr".into(), flags: 0 },
            protocol: None,
            reals: Arc::new([(real(1), RealServerConfig { weight: 1 })].into_iter().collect()),
        };
        let kernel = FakeKernel::default();
        let state = &mut kernel.lock().state;
        state.program = Some(program());
        state.elements.insert(entry, Some(Mark(256)));
        state.virtual_servers = HashMap::from([(key(256), server.clone()), (key(257), server)]);
        (kernel.clone(), entry)
    }

    fn apply(kernel: &FakeKernel, entry: Element, ops: &[Op]) -> Vec<(bool, String)> {
        let mut dataplane = Dataplane {
            ipvs: Box::new(kernel.clone()),
            netfilter: Box::new(kernel.clone()),
            host: Box::new(kernel.clone()),
        };
        let published = Element::Published(target(1));
        let elements = [(entry, Some(Mark(257))), (published, Some(Mark(257)))].into_iter().collect();
        let desired = KernelState { program: Some(program()), elements, ..KernelState::default() };
        let leads_to = |element: &Element| (*element == entry).then_some(Mark(256));
        let failures = dataplane.apply(ops, &desired, &leads_to);
        failures.iter().map(|f| (f.follows, f.op.to_string())).collect()
    }

    #[test]
    fn a_server_that_an_old_entry_leads_to_gets_no_destinations() {
        let (kernel, entry) = kernel();
        kernel.lock().faults.push("10.200.0.5".into());
        let add = |mark| Op::Ipvs(IpvsChange::AddReal(key(mark), real(2), RealServerConfig { weight: 1 }));
        let ops = [Op::Element(ElementChange::Del(entry)), add(256), add(257)];
        let failures = apply(&kernel, entry, &ops);
        assert_eq!(failures, [(false, ops[0].to_string()), (true, ops[1].to_string())]);
        let reals = |mark| kernel.lock().state.virtual_servers[&key(mark)].reals.len();
        assert_eq!((reals(256), reals(257)), (1, 2));
        assert_eq!(apply(&kernel, entry, &ops), []);
        assert_eq!((reals(256), reals(257)), (2, 2));
    }

    #[test]
    fn new_rules_bring_no_entry_to_destinations_that_had_to_go() {
        let (kernel, entry) = kernel();
        kernel.lock().faults.push("10.244.1.1".into());
        let install = Op::Install { program: Box::new(program()), reasons: vec![] };
        let ops = [Op::Ipvs(IpvsChange::DelReal(key(257), real(1))), install];
        let failures = apply(&kernel, entry, &ops);
        assert_eq!(failures.len(), 3, "{failures:?}");
        assert!(failures[1..].iter().all(|(follows, op)| *follows && op.contains("0x101")), "{failures:?}");
        let elements = kernel.lock().state.elements.clone();
        assert_eq!(elements.get(&entry), None);
        assert_eq!(elements.get(&Element::Published(target(1))), Some(&Some(Mark::NOWHERE)));
        assert_eq!(apply(&kernel, entry, &ops), []);
        assert_eq!(kernel.lock().state.elements[&entry], Some(Mark(257)));
    }

    #[test]
    fn no_entry_leads_to_destinations_that_had_to_go() {
        let (kernel, entry) = kernel();
        kernel.lock().faults.push("10.244.1.1".into());
        let put = |mark| Op::Element(ElementChange::Put(entry, Some(Mark(mark))));
        let ops = [Op::Ipvs(IpvsChange::DelReal(key(257), real(1))), put(257)];
        let failures = apply(&kernel, entry, &ops);
        assert_eq!(failures, [(false, ops[0].to_string()), (true, ops[1].to_string())]);
        assert_eq!(kernel.lock().state.elements[&entry], Some(Mark(256)));
        assert_eq!(apply(&kernel, entry, &ops), []);
        assert_eq!(kernel.lock().state.elements[&entry], Some(Mark(257)));
    }
}
