//! Properties of plans: they lead to the desired state, a second one is empty, and no prefix of one
//! sends a packet where neither the old nor the new state does.

use std::{collections::BTreeSet, sync::Arc};

use proptest::prelude::*;

use super::{Observed, Op, plan, plan_all};
use crate::{
    compile::merge::Touched,
    dataplane::{ElementChange, IpvsChange, ProgramState},
    model::{
        ids::{Family, Mark, PerFamily, Protocol},
        kernel::{
            Element, Elements, FamilyProgram, KernelState, Program, RealServerConfig, RealServerKey, Target,
            Timeouts, VipRoute, VirtualServer, VirtualServerConfig, VirtualServerKey,
        },
    },
};

fn program() -> Program {
    let family = FamilyProgram {
        range: "10.200.0.0/16".parse().unwrap(),
        ingress: "10.200.0.1".parse().unwrap(),
        node: "192.168.50.1".parse().unwrap(),
    };
    Program {
        mask: 0x3fff,
        families: PerFamily { v4: Some(family), v6: None },
        masquerade_bridges: vec![],
        uplinks: vec![],
    }
}

fn real(n: u8) -> RealServerKey {
    RealServerKey { addr: [10, 244, 1, n].into(), port: 8080 }
}

fn target(n: u8) -> Target {
    Target { addr: [10, 200, 0, n].into(), protocol: Protocol::Tcp, port: 80 }
}

prop_compose! {
    fn server()(
        reals in prop::collection::btree_map(0u8..6, 0u32..3, 0..4),
        scheduler in prop::sample::select(vec!["rr", "wrr"]),
    ) -> VirtualServer {
        VirtualServer {
            config: VirtualServerConfig { scheduler: scheduler.into(), flags: 0 },
            protocol: None,
            reals: Arc::new(reals.into_iter().map(|(n, weight)| (real(n), RealServerConfig { weight })).collect()),
        }
    }
}

prop_compose! {
    fn state()(
        servers in prop::collection::btree_map(0u32..4, server(), 0..4),
        entries in prop::collection::btree_map(5u8..10, 0u32..4, 0..5),
        endpoints in prop::collection::btree_set(0u8..6, 0..5),
        installed in prop::bool::weighted(0.8),
        route in any::<bool>(),
    ) -> KernelState {
        let mut state = KernelState::default();
        for (n, server) in servers {
            state.virtual_servers.insert(VirtualServerKey { family: Family::V4, mark: Mark(256 + n) }, server);
        }
        if installed {
            state.program = Some(program());
            for (n, mark) in entries {
                state.elements.insert(Element::Vip(target(n)), Some(Mark(256 + mark)));
            }
            for n in endpoints {
                state.elements.insert(Element::Endpoint(real(n).addr), None);
            }
        }
        if route {
            let route = VipRoute { range: "10.200.0.0/16".parse().unwrap(), source: "192.168.50.1".parse().unwrap() };
            state.routes.set(Family::V4, Some(route));
        }
        state
    }
}

fn observed(state: &KernelState) -> Observed {
    Observed {
        virtual_servers: state.virtual_servers.clone(),
        foreign_marks: BTreeSet::new(),
        elements: state.elements.clone(),
        program: if state.program.is_some() { ProgramState::Installed } else { ProgramState::Absent },
        leftovers: vec![],
        routes: state.routes,
        sysctls: state.sysctls.clone(),
        timeouts: Timeouts::default(),
    }
}

fn apply(state: &mut KernelState, op: &Op, desired: &KernelState) {
    match op {
        Op::Ipvs(change) => match change {
            IpvsChange::AddService(key, config) => {
                let new = VirtualServer { config: config.clone(), protocol: None, reals: Arc::default() };
                assert!(state.virtual_servers.insert(*key, new).is_none(), "added twice: {op}");
            }
            IpvsChange::SetService(key, config) => {
                state.virtual_servers.get_mut(key).expect("set what is there").config = config.clone();
            }
            IpvsChange::DelService(key) => {
                state.virtual_servers.remove(key).expect("delete what is there");
            }
            IpvsChange::AddReal(key, real, config) => {
                let server = state.virtual_servers.get_mut(key).expect("service first");
                let reals = Arc::make_mut(&mut server.reals);
                assert!(reals.insert(*real, *config).is_none(), "added twice: {op}");
            }
            IpvsChange::SetReal(key, real, config) => {
                let server = state.virtual_servers.get_mut(key).expect("service first");
                let reals = Arc::make_mut(&mut server.reals);
                assert!(reals.insert(*real, *config).is_some(), "set what is not there: {op}");
            }
            IpvsChange::DelReal(key, real) => {
                let server = state.virtual_servers.get_mut(key).expect("service first");
                let reals = Arc::make_mut(&mut server.reals);
                reals.remove(real).expect("delete what is there");
            }
        },
        Op::Element(change) => {
            assert!(state.program.is_some(), "no sets yet: {op}");
            match change {
                ElementChange::Put(element, mark) => {
                    state.elements.insert(*element, *mark);
                }
                ElementChange::Del(element) => {
                    state.elements.remove(element).expect("delete what is there");
                }
            }
        }
        Op::Install { program, .. } => {
            state.program = Some((**program).clone());
            state.elements = desired.elements.clone();
        }
        Op::PutRoute(route) => state.routes.set(Family::V4, Some(*route)),
        Op::DelRoute(family, _) => state.routes.set(*family, None),
        Op::Sysctl { path, value, .. } => {
            state.sysctls.insert(path.clone(), value.clone());
        }
        Op::Timeouts { .. } | Op::ForgetUdp(_) | Op::CutFlows(_) | Op::RemoveLeftovers(_) => {}
    }
}

/// Real servers that take new connections for an entry.
fn reachable(state: &KernelState, element: &Element) -> BTreeSet<RealServerKey> {
    let Some(Some(mark)) = state.elements.get(element) else { return BTreeSet::new() };
    let key = VirtualServerKey { family: Family::V4, mark: *mark };
    let reals = state.virtual_servers.get(&key).map(|s| &s.reals);
    reals.into_iter().flat_map(|reals| reals.iter()).filter(|(_, c)| c.weight > 0).map(|(r, _)| *r).collect()
}

fn entries(states: [&KernelState; 2]) -> BTreeSet<Element> {
    states.iter().flat_map(|s| s.elements.keys()).copied().collect()
}

fn check(desired: &KernelState, old: &KernelState, ops: &[Op]) {
    let mut now = old.clone();
    for op in ops {
        let guarded_before = now.program.is_some();
        apply(&mut now, op, desired);
        if matches!(op, Op::PutRoute(_)) {
            assert!(guarded_before, "VIPs are local before their rules are there");
        }
        for element in entries([desired, old]) {
            let allowed: BTreeSet<_> =
                reachable(desired, &element).union(&reachable(old, &element)).copied().collect();
            let got = reachable(&now, &element);
            assert!(got.is_subset(&allowed), "after {op}: {element} reaches {got:?}, not in {allowed:?}");
        }
    }
    let elements: &Elements = &desired.elements;
    assert_eq!(&now.elements, elements);
    assert_eq!(now.virtual_servers, desired.virtual_servers);
    assert_eq!(now.routes, desired.routes);
    assert_eq!(plan_all(desired, &observed(&now)), vec![]);
}

fn wanted() -> impl Strategy<Value = KernelState> {
    state().prop_map(|mut s| {
        s.program = Some(program());
        s
    })
}

proptest! {
    #[test]
    fn a_full_plan_leads_to_the_desired_state_by_safe_steps(desired in wanted(), old in state()) {
        check(&desired, &old, &plan_all(&desired, &observed(&old)));
    }

    #[test]
    fn a_plan_for_what_was_touched_is_as_good(desired in wanted(), old in wanted()) {
        let mut desired = desired;
        desired.routes = old.routes;
        let touched = Touched {
            virtual_servers: desired.virtual_servers.keys().chain(old.virtual_servers.keys()).copied().collect(),
            elements: entries([&desired, &old]),
        };
        check(&desired, &old, &plan(&desired, &old, &touched));
    }
}
