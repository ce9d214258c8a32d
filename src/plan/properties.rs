//! Properties of plans: they lead to the desired state, a second one is empty, and no prefix of one
//! sends a packet where neither the old nor the new state does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use proptest::prelude::*;

use super::{
    Observed, Op, plan, plan_all,
    trace::{Fate, Packet, View, choices, packets},
};
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
    let family6 = FamilyProgram {
        range: "fd00:200::/112".parse().unwrap(),
        ingress: "fd00:200::1".parse().unwrap(),
        node: "fd00:50::1".parse().unwrap(),
    };
    Program {
        mask: 0x3fff,
        families: PerFamily { v4: Some(family), v6: Some(family6) },
        masquerade_bridges: vec![],
        uplinks: vec![],
        outside: vec![],
    }
}

fn real(family: Family, n: u8) -> RealServerKey {
    let addr = match family {
        Family::V4 => IpAddr::from([10, 244, 1, n]),
        Family::V6 => IpAddr::from([0xfd00, 0x244, 0, 0, 0, 0, 0, u16::from(n)]),
    };
    RealServerKey { addr, port: 8080 }
}

fn target(family: Family, protocol: Protocol, n: u8) -> Target {
    let addr = match family {
        Family::V4 => IpAddr::from([10, 200, 0, n]),
        Family::V6 => IpAddr::from([0xfd00, 0x200, 0, 0, 0, 0, 0, u16::from(n)]),
    };
    Target { addr, protocol, port: 80 }
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(&Family::ALL[..])
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(&Protocol::ALL[..])
}

prop_compose! {
    fn server()(
        family in family(), mark in 0u32..4,
        reals in prop::collection::btree_map(0u8..6, 0u32..3, 0..4),
        scheduler in prop::sample::select(vec!["rr", "wrr"]),
        protocol in protocol(),
    ) -> (VirtualServerKey, VirtualServer) {
        let reals = reals.into_iter().map(|(n, weight)| (real(family, n), RealServerConfig { weight }));
        let server = VirtualServer {
            config: VirtualServerConfig { scheduler: scheduler.into(), flags: 0 },
            protocol: Some(protocol),
            reals: Arc::new(reals.collect()),
        };
        (VirtualServerKey { family, mark: Mark(256 + mark) }, server)
    }
}

prop_compose! {
    /// Of every kind, with a mark where the kind leads somewhere.
    fn entry()(family in family(), protocol in protocol(), n in 0u8..5, kind in 0..6, mark in 0u32..5) -> (Element, Option<Mark>) {
        let element = match kind {
            0 => Element::Vip(target(family, protocol, n)),
            1 => Element::Published(target(family, protocol, n)),
            2 => Element::Loopback(family, protocol, u16::from(n)),
            3 => Element::Endpoint(real(family, n).addr),
            4 => Element::Local(real(family, n).addr),
            _ => Element::Own(target(family, protocol, n)),
        };
        // What is published stays so without an endpoint.
        let nowhere = mark == 4 && !matches!(element, Element::Vip(_));
        let mark = if nowhere { Mark::NOWHERE } else { Mark(256 + mark % 4) };
        (element, element.is_mark().then_some(mark))
    }
}

prop_compose! {
    fn state()(
        servers in prop::collection::vec(server(), 0..6),
        entries in prop::collection::vec(entry(), 0..12),
        installed in prop::bool::weighted(0.8),
        (route, route6) in any::<(bool, bool)>(),
        sysctl in prop::sample::select(vec!["0", "1"]),
        tcp in prop::sample::select(vec![900, 10800]),
    ) -> KernelState {
        let mut state = KernelState {
            virtual_servers: servers.into_iter().collect(),
            timeouts: Some(Timeouts { tcp, ..Timeouts::default() }),
            ..KernelState::default()
        };
        state.sysctls.insert("net/ipv4/vs/conntrack".into(), sysctl.into());
        if installed {
            state.program = Some(program());
            state.elements = entries.into_iter().collect();
        }
        if route {
            let route = VipRoute { range: "10.200.0.0/16".parse().unwrap(), source: "192.168.50.1".parse().unwrap() };
            state.routes.set(Family::V4, Some(route));
        }
        if route6 {
            let route = VipRoute { range: "fd00:200::/112".parse().unwrap(), source: "fd00:50::1".parse().unwrap() };
            state.routes.set(Family::V6, Some(route));
        }
        state
    }
}

/// Another program's service, in our field of the mark: it is in the kernel, and in what was observed only as a mark.
const FOREIGN: VirtualServerKey = VirtualServerKey { family: Family::V4, mark: Mark(999) };

fn observed(state: &KernelState) -> Observed {
    Observed {
        virtual_servers: state.virtual_servers.clone(),
        foreign_marks: [FOREIGN.mark].into(),
        elements: state.elements.clone(),
        led_to: state.elements.values().flatten().copied().collect(),
        program: if state.program.is_some() { ProgramState::Installed } else { ProgramState::Absent },
        leftovers: vec![],
        routes: state.routes,
        sysctls: state.sysctls.clone(),
        timeouts: state.timeouts.unwrap_or_default(),
    }
}

fn apply(state: &mut KernelState, op: &Op, desired: &KernelState) {
    match op {
        Op::Ipvs(change) => match change {
            IpvsChange::AddService(key, config) => {
                // The kernel knows no protocol of a service by mark.
                let protocol = desired.virtual_servers.get(key).and_then(|s| s.protocol);
                let new = VirtualServer { config: config.clone(), protocol, reals: Arc::default() };
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
        Op::PutRoute(route) => state.routes.set(Family::of(&route.source), Some(*route)),
        Op::DelRoute(family, _) => state.routes.set(*family, None),
        Op::Sysctl { path, value, .. } => {
            state.sysctls.insert(path.clone(), value.clone());
        }
        Op::Timeouts { timeouts, .. } => state.timeouts = Some(*timeouts),
        Op::ForgetUdp(_) | Op::CutFlows(_) | Op::RemoveLeftovers(_) => {}
    }
}

/// What of a packet's fate no step may change but to what the old or the new state does with it.
fn reachable(state: &KernelState, packet: Packet) -> (BTreeSet<RealServerKey>, bool) {
    let fate = View::of(state).trace(packet);
    (choices(&fate).into_keys().collect(), fate == Fate::HostSocket)
}

fn entries(states: [&KernelState; 2]) -> BTreeSet<Element> {
    states.iter().flat_map(|s| s.elements.keys()).copied().collect()
}

fn check(desired: &KernelState, old: &KernelState, ops: &[Op]) {
    let mut now = old.clone();
    let real = RealServerKey { addr: "10.99.0.1".parse().unwrap(), port: 81 };
    let foreign = VirtualServer {
        config: VirtualServerConfig { scheduler: "rr".into(), flags: 0 },
        protocol: None,
        reals: Arc::new([(real, RealServerConfig { weight: 1 })].into_iter().collect()),
    };
    now.virtual_servers.insert(FOREIGN, foreign.clone());
    now.sysctls.insert("net/ipv4/somebody".into(), "7".into());
    // A random state may lack the route that its entries need; where one of the two has it, the way there is the same.
    let routed = |state: &KernelState| {
        let routes =
            PerFamily { v4: old.routes.v4.or(desired.routes.v4), v6: old.routes.v6.or(desired.routes.v6) };
        KernelState { routes, ..state.clone() }
    };
    let (new_routed, old_routed) = (routed(desired), routed(old));
    for op in ops {
        let guarded_before = now.program.is_some();
        apply(&mut now, op, desired);
        if matches!(op, Op::PutRoute(_)) {
            assert!(guarded_before, "VIPs are local before their rules are there");
        }
        for packet in entries([desired, old]).iter().flat_map(packets) {
            let (mut allowed, _) = reachable(&new_routed, packet);
            let (old_reals, _) = reachable(&old_routed, packet);
            let (_, unguarded) = reachable(old, packet);
            allowed.extend(old_reals);
            let (got, now_unguarded) = reachable(&now, packet);
            assert!(got.is_subset(&allowed), "after {op}: {packet:?} reaches {got:?}, not in {allowed:?}");
            let ours = |state: &KernelState| View::of(state).trace(packet) != Fate::NotOurs;
            // A range that goes takes what it had with it, first of all.
            let family = Family::of(&packet.to.addr);
            let goes = old.routes.get(family).is_some() && desired.routes.get(family).is_none();
            assert!(
                goes || !ours(old) || !ours(desired) || ours(&now),
                "after {op}: {packet:?} is nobody's for a moment"
            );
            assert!(unguarded || !now_unguarded, "after {op}: {packet:?} reaches a socket of the host");
        }
    }
    assert_eq!(now.virtual_servers.remove(&FOREIGN), Some(foreign), "another program's service was touched");
    assert_eq!(
        now.sysctls.remove("net/ipv4/somebody").as_deref(),
        Some("7"),
        "another program's sysctl was touched"
    );
    let elements: &Elements = &desired.elements;
    assert_eq!(&now.elements, elements);
    let configured = |state: &KernelState| -> BTreeMap<VirtualServerKey, (VirtualServerConfig, Vec<_>)> {
        let reals = |s: &VirtualServer| s.reals.iter().map(|(real, config)| (*real, *config)).collect();
        state.virtual_servers.iter().map(|(key, s)| (*key, (s.config.clone(), reals(s)))).collect()
    };
    assert_eq!(configured(&now), configured(desired));
    assert_eq!(now.sysctls, desired.sysctls);
    assert_eq!(now.timeouts, desired.timeouts);
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
        (desired.routes, desired.sysctls, desired.timeouts) = (old.routes, old.sysctls.clone(), old.timeouts);
        let touched = Touched {
            virtual_servers: desired.virtual_servers.keys().chain(old.virtual_servers.keys()).copied().collect(),
            elements: entries([&desired, &old]),
        };
        check(&desired, &old, &plan(&desired, &old, &touched));
    }
}
