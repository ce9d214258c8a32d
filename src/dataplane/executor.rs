//! Carries operations out, in their order, neighbours of one kind together.

use std::collections::{BTreeMap, BTreeSet};

use super::{ElementChange, Error, Host, Ipvs, IpvsChange, Netfilter};
use crate::{
    model::{
        ids::{Mark, PerFamily},
        kernel::KernelState,
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
            },
        };
        let led_to: BTreeSet<Mark> = netfilter.elements.values().flatten().copied().collect();
        let is_ours = |mark: Mark| ours(mark) || led_to.contains(&mark);
        let foreign = std::cell::RefCell::new(BTreeSet::new());
        let virtual_servers = self.ipvs.dump(&|mark| {
            let keep = is_ours(mark);
            if !keep {
                foreign.borrow_mut().insert(mark);
            }
            keep
        })?;
        let mut sysctls = BTreeMap::new();
        for path in desired.sysctls.keys() {
            if let Some(value) = self.host.sysctl(path)? {
                sysctls.insert(path.clone(), value);
            }
        }
        Ok(Observed {
            virtual_servers,
            foreign_marks: foreign.into_inner(),
            elements: netfilter.elements,
            program: netfilter.program,
            leftovers: netfilter.leftovers,
            routes: self.host.vip_routes(ranges)?,
            sysctls,
            timeouts: self.ipvs.timeouts()?,
        })
    }

    /// Applies operations in order and goes on after a failure, except that no VIP route is added when
    /// the rules that guard it could not be installed.
    pub fn apply(&mut self, ops: &[Op], desired: &KernelState) -> Vec<Failure> {
        let mut failures = Vec::new();
        let mut unguarded = None;
        let mut rest = ops;
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|op| kind(op) == kind(first)).count();
            let (run, tail) = rest.split_at(same);
            rest = tail;
            for (op, result) in run.iter().zip(self.apply_run(run, desired, &mut unguarded)) {
                if let Err(error) = result {
                    let follows = matches!(op, Op::PutRoute(_)) && unguarded.is_some();
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
                Some(error) => Err(Error::Failed {
                    object: format!("route local {}", route.range),
                    reason: format!("not added, as its rules could not be installed ({error})"),
                }),
                None => self.host.put_vip_route(route),
            },
            Op::DelRoute(family, range) => self.host.del_vip_route(*family, range),
            Op::ForgetUdp(reals) => self.host.forget_udp(reals).map(drop),
            Op::CutFlows(flows) => self.host.cut_flows(flows).map(drop),
            Op::RemoveLeftovers(_) => self.netfilter.remove_leftovers(),
            Op::Ipvs(_) | Op::Element(_) => Ok(()),
        }
    }
}

fn kind(op: &Op) -> std::mem::Discriminant<Op> {
    std::mem::discriminant(op)
}
