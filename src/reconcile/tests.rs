//! The engine on a kernel in memory.

use std::{collections::BTreeSet, sync::Arc};

use jiff::{SignedDuration, Timestamp};

use super::{Engine, Settings, rotation::Rotation};
use crate::{
    allocate::{Allocations, Lock},
    compile::service::Drains,
    dataplane::{AddressRules, Listener, executor::Dataplane, fake::FakeKernel},
    model::{
        fixtures::{config, endpoint, facts, port, published, service, slice},
        ids::{Family, Mark, Protocol},
        kernel::{
            BridgeSubnet, Element, PublishedFlows, RealServerConfig, RealServerKey, VipRoute, VirtualServer,
            VirtualServerConfig, VirtualServerKey,
        },
        node::{NodeConfig, NodeSays},
        service::{Service, ServicePort, TrafficDistribution},
        snapshot::Event,
        unread::Unread,
    },
    plan::Op,
};

pub(crate) fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

pub(crate) fn engine(kernel: &FakeKernel, previous: Allocations) -> Engine {
    engine_with(kernel, previous, Drains::new())
}

/// The engine of an agent that starts after another one.
pub(crate) fn after_a_restart(kernel: &FakeKernel, first: &Engine) -> Engine {
    let mut second = engine(kernel, first.allocator().allocations());
    second.set_served(first.served().clone());
    second
}

pub(crate) fn engine_with(kernel: &FakeKernel, previous: Allocations, drains: Drains) -> Engine {
    engine_of(config(), kernel, previous, drains)
}

/// The engine of a node with this configuration.
pub(crate) fn engine_of(
    node: NodeConfig,
    kernel: &FakeKernel,
    previous: Allocations,
    drains: Drains,
) -> Engine {
    kernel.lock().facts = facts();
    let settings = Settings { node, addresses: AddressRules::default(), timeouts: None };
    let dataplane = Dataplane {
        ipvs: Box::new(kernel.clone()),
        netfilter: Box::new(kernel.clone()),
        host: Box::new(kernel.clone()),
    };
    let mut engine = Engine::new(settings, dataplane, previous, Lock::default(), drains);
    engine.refresh_node().unwrap();
    engine
}

pub(crate) fn service_with(name: &str, port: ServicePort) -> Event {
    Event::Service(Arc::new(Service { ports: vec![port], ..service(name) }))
}

pub(crate) fn endpoints(name: &str, addresses: &[&str]) -> Event {
    Event::Slice(slice(name, addresses.iter().map(|a| endpoint(a, "n1")).collect()))
}

pub(crate) fn vote(kernel: &FakeKernel, previous: Allocations) -> Engine {
    let mut engine = engine(kernel, previous);
    engine.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
    ]);
    engine.synced(Unread::default());
    engine
}

#[test]
fn the_zone_of_the_node_makes_endpoints_near() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let mut ends = ["10.244.1.11", "10.244.1.12"].map(|addr| endpoint(addr, "n2"));
    (ends[0].zone, ends[1].zone) = (Some("z1".into()), Some("z2".into()));
    let web = Service {
        ports: vec![port(80, 8080)],
        distribution: TrafficDistribution::SameZone,
        ..service("web")
    };
    engine.feed([Event::Service(Arc::new(web)), Event::Slice(slice("web", ends.into()))]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let taking = || {
        let state = &kernel.lock().state;
        let reals = state.virtual_servers.values().flat_map(|server| server.reals.iter());
        let mut taking: Vec<_> =
            reals.filter(|(_, config)| config.weight > 0).map(|(key, _)| key.addr.to_string()).collect();
        taking.sort();
        taking.join(" ")
    };
    assert_eq!(taking(), "10.244.1.11 10.244.1.12");
    let says = |zone: Option<&str>| NodeSays { zone: zone.map(Into::into), ..NodeSays::default() };
    for (zone, want) in
        [(Some("z1"), "10.244.1.11"), (Some("z2"), "10.244.1.12"), (None, "10.244.1.11 10.244.1.12")]
    {
        engine.set_node(says(zone));
        assert!(engine.is_dirty());
        turn(&mut engine, false);
        assert_eq!(taking(), want, "{zone:?}");
        engine.set_node(says(zone));
        assert!(!engine.is_dirty(), "the same again");
    }
}

#[test]
fn a_new_lock_file_moves_only_what_it_names_and_what_is_there() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    engine.feed([service_with("vote", published(80, 8080, None)), service_with("other", port(80, 8080))]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let vip = |engine: &Engine, name: &str| {
        let key = crate::model::ids::ServiceKey::new("default", name);
        engine.allocator().get(&key).and_then(|a| a.vips.v4)
    };
    let other = vip(&engine, "other");
    let lock = |name: &str| {
        let text = format!("version: 1\nservices:\n  default/{name}:\n    vips: {{v4: 10.200.7.7}}\n");
        Lock::parse(&text).unwrap()
    };
    // Not one of ours, as far as we know.
    assert!(!engine.set_lock(lock("unknown")));
    assert!(!engine.is_dirty());
    assert!(engine.set_lock(lock("vote")));
    turn(&mut engine, false);
    assert_eq!(vip(&engine, "vote"), "10.200.7.7".parse().ok());
    assert_eq!(vip(&engine, "other"), other);
    assert!(!engine.set_lock(lock("vote")));
    // Without the file the address stays.
    engine.set_lock(Lock::default());
    turn(&mut engine, false);
    assert_eq!(vip(&engine, "vote"), "10.200.7.7".parse().ok());
}

pub(crate) fn turn(engine: &mut Engine, full: bool) -> Vec<String> {
    let turn = engine.turn(full, now()).unwrap();
    assert_eq!(turn.failures, vec![]);
    turn.ops.iter().map(ToString::to_string).collect()
}

/// Everything that the cheap looks see, of everything.
pub(crate) fn look(engine: &mut Engine) -> Option<String> {
    let mut rotation = Rotation::new(1000, 1000, std::time::Duration::ZERO);
    engine.look_at_all().unwrap().or_else(|| engine.look_at_some(&mut rotation).unwrap())
}

fn server_of(engine: &Engine, name: &str) -> VirtualServerKey {
    let services = engine.merged().services();
    let service = services.values().find(|s| &*s.key.name == name).unwrap();
    *service.virtual_servers.keys().next().unwrap()
}

#[test]
fn a_second_look_at_the_same_kernel_writes_nothing() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    assert!(!turn(&mut engine, true).is_empty());
    let writes = kernel.lock().writes;
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
    assert_eq!(kernel.lock().writes, writes);
}

#[test]
fn a_restart_on_a_matching_kernel_writes_nothing_with_or_without_the_state_file() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let writes = kernel.lock().writes;
    for previous in [first.allocator().allocations(), Allocations::default()] {
        let mut second = vote(&kernel, previous);
        assert_eq!(turn(&mut second, true), Vec::<String>::new());
        assert_eq!(kernel.lock().writes, writes);
    }
}

#[test]
fn one_endpoint_more_is_one_destination_and_its_addresses() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    engine.feed([endpoints("vote", &["10.244.1.11", "10.244.1.12", "10.244.1.13"])]);
    let ops = turn(&mut engine, false);
    assert_eq!(
        ops,
        [
            "+ set local 10.244.1.13",
            "+ set endpoints 10.244.1.13",
            "+ ipvs FWM 256 IPv4 -> 10.244.1.13:8080 weight 1"
        ]
    );
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
}

#[test]
fn a_removed_endpoint_drains_until_its_connections_are_gone() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    let real = RealServerKey { addr: "10.244.1.12".parse().unwrap(), port: 8080 };
    kernel.lock().active.insert(real, 1);
    engine.feed([endpoints("vote", &["10.244.1.11"])]);
    let ops = turn(&mut engine, false);
    assert!(ops.contains(&"~ ipvs FWM 256 IPv4 -> 10.244.1.12:8080 weight 0".to_owned()), "{ops:?}");

    engine.expire_drains(now() + SignedDuration::from_secs(1)).unwrap();
    assert!(!engine.is_dirty(), "a connection is left");
    kernel.lock().active.clear();
    // IPVS counts a connection that one side has closed among the inactive ones.
    let vips = engine.merged().state().elements.keys().filter_map(|e| match e {
        Element::Vip(t) => Some((t.addr, t.port)),
        _ => None,
    });
    let half_closed = PublishedFlows { protocol: Protocol::Tcp, real, to: vips.take(1).collect() };
    kernel.lock().flows.insert(half_closed);
    engine.expire_drains(now() + SignedDuration::from_secs(1)).unwrap();
    assert!(!engine.is_dirty(), "a connection is half closed");
    kernel.lock().flows.clear();
    let later = now() + SignedDuration::from_secs(2);
    engine.expire_drains(later).unwrap();
    let done = engine.turn(false, later).unwrap();
    let ops: Vec<String> = done.ops.iter().map(ToString::to_string).collect();
    assert!(ops.contains(&"- ipvs FWM 256 IPv4 -> 10.244.1.12:8080".to_owned()), "{ops:?}");
    assert!(engine.drains().is_empty());
}

#[test]
fn a_half_closed_connection_to_the_last_endpoint_drains_too() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    let real = RealServerKey { addr: "10.244.1.12".parse().unwrap(), port: 8080 };
    let vip = engine.merged().services().values().next().unwrap().vips.v4.unwrap();
    let half_closed = PublishedFlows { protocol: Protocol::Tcp, real, to: [(vip, 80)].into() };
    kernel.lock().flows.insert(half_closed);
    // Nothing leads to the address any more, and conntrack is asked about it all the same.
    engine.feed([endpoints("vote", &[])]);
    turn(&mut engine, false);
    engine.expire_drains(now() + SignedDuration::from_secs(1)).unwrap();
    assert!(engine.drains().keys().any(|(_, drained)| *drained == real));
    turn(&mut engine, false);
    assert!(engine.drains().keys().any(|(_, drained)| *drained == real), "a connection is half closed");
    kernel.lock().flows.clear();
    let later = now() + SignedDuration::from_secs(2);
    engine.expire_drains(later).unwrap();
    engine.turn(false, later).unwrap();
    assert!(engine.drains().is_empty());
}

#[test]
fn connections_by_a_published_port_drain_too_and_are_cut_at_the_deadline() {
    published_connections_drain(&["10.244.1.11"]);
    // Nothing leads there any more then.
    published_connections_drain(&[]);
}

fn published_connections_drain(left: &[&str]) {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    let both: Vec<_> = left.iter().copied().chain(["10.244.1.12"]).collect();
    engine.feed([endpoints("vote", &both)]);
    turn(&mut engine, false);
    engine.expire_drains(now()).unwrap();
    turn(&mut engine, false);
    let real = RealServerKey { addr: "10.244.1.12".parse().unwrap(), port: 8080 };
    let mut to = BTreeSet::new();
    for element in engine.merged().state().elements.keys() {
        match element {
            Element::Published(t) => to.insert((t.addr, t.port)),
            Element::Loopback(Family::V4, _, port) => to.insert(("127.0.0.1".parse().unwrap(), *port)),
            _ => false,
        };
    }
    assert!(!to.is_empty(), "the service is published");
    let flows = PublishedFlows { protocol: Protocol::Tcp, real, to };
    kernel.lock().flows.insert(flows.clone());
    engine.feed([endpoints("vote", left)]);
    turn(&mut engine, false);
    // IPVS knows of no connection, conntrack does.
    engine.expire_drains(now() + SignedDuration::from_secs(1)).unwrap();
    turn(&mut engine, false);
    assert!(engine.drains().keys().any(|(_, drained)| *drained == real), "a connection is left");
    let deadline = now() + SignedDuration::from_secs(31);
    engine.expire_drains(deadline).unwrap();
    // What fails once is done with the next turn, though no comparison finds it.
    kernel.lock().faults.push("conntrack entries".into());
    let done = engine.turn(false, deadline).unwrap();
    assert_eq!(done.failures.len(), 1, "{:?}", done.failures);
    assert!(!kernel.lock().flows.is_empty());
    let again = engine.turn(true, deadline).unwrap();
    assert_eq!((again.ops, again.failures), (vec![Op::CutFlows(flows.clone())], vec![]));
    let whole = "- ipvs FWM 256 IPv4";
    let gone = [whole.to_owned(), format!("{whole} -> {real}")];
    let gone = done.ops.iter().position(|op| gone.contains(&op.to_string()));
    let cut = done.ops.iter().position(|op| *op == Op::CutFlows(flows.clone()));
    assert!(gone.is_some() && gone < cut, "{:?}", done.ops);
    assert!(kernel.lock().flows.is_empty());
    assert_eq!(turn(&mut engine, false), Vec::<String>::new());
}

#[test]
fn udp_clients_of_a_removed_endpoint_are_let_go_at_the_second_try_too() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let mut port = published(80, 8080, Some(30080));
    port.protocol = Protocol::Udp;
    let ends = |addresses: &[&str]| {
        let endpoints = addresses.iter().map(|a| endpoint(a, "n1")).collect();
        let mut slice = crate::model::endpoints::Slice::clone(&slice("vote", endpoints));
        slice.ports.iter_mut().for_each(|port| port.protocol = Protocol::Udp);
        Event::Slice(Arc::new(slice))
    };
    engine.feed([service_with("vote", port), ends(&["10.244.1.11", "10.244.1.12"])]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    engine.feed([ends(&["10.244.1.11"])]);
    kernel.lock().faults.extend(vec!["conntrack entries".to_owned(); 2]);
    let mut failed = 0;
    for _ in 0..4 {
        failed += engine.turn(false, now()).unwrap().failures.len();
    }
    assert_eq!(failed, 2);
    let real = RealServerKey { addr: "10.244.1.12".parse().unwrap(), port: 8080 };
    assert!(kernel.lock().forgotten.contains(&real));
    // Where it never works it is given up: the node is as it should be but for that.
    engine.feed([ends(&[])]);
    kernel.lock().faults.extend(vec!["conntrack entries".to_owned(); 50]);
    let failed = (0..20).map(|_| engine.turn(false, now()).unwrap().failures.len()).sum::<usize>();
    assert_eq!(failed, 8);
}

#[test]
fn an_endpoint_that_went_while_no_agent_ran_drains_too() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let mut second = engine(&kernel, first.allocator().allocations());
    second
        .feed([service_with("vote", published(80, 8080, Some(30080))), endpoints("vote", &["10.244.1.11"])]);
    second.synced(Unread::default());
    let ops = turn(&mut second, true);
    assert!(ops.contains(&"~ ipvs FWM 256 IPv4 -> 10.244.1.12:8080 weight 0".to_owned()), "{ops:?}");
}

#[test]
fn another_programs_service_is_neither_touched_nor_is_its_mark_given_out() {
    let kernel = FakeKernel::default();
    let foreign = VirtualServerKey { family: Family::V4, mark: Mark(0x100) };
    let server = foreign_server();
    kernel.lock().state.virtual_servers.insert(foreign, server.clone());
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    assert_ne!(server_of(&engine, "vote").mark, Mark(0x100));
    engine.feed([Event::ServiceGone(crate::model::ids::ServiceKey::new("default", "vote"))]);
    turn(&mut engine, true);
    assert_eq!(kernel.lock().state.virtual_servers[&foreign], server);
}

#[test]
fn a_foreign_service_that_a_dump_lacks_is_not_taken_over_either() {
    let kernel = FakeKernel::default();
    let foreign = VirtualServerKey { family: Family::V4, mark: Mark(0x100) };
    let server = foreign_server();
    kernel.lock().state.virtual_servers.insert(foreign, server.clone());
    kernel.lock().missed.insert(foreign);
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    assert_ne!(server_of(&engine, "vote").mark, Mark(0x100));
    assert_eq!(kernel.lock().state.virtual_servers[&foreign], server);
}

pub(crate) fn foreign_server() -> VirtualServer {
    VirtualServer {
        config: VirtualServerConfig { scheduler: "lc".into(), flags: 0 },
        protocol: None,
        reals: Arc::default(),
    }
}

#[test]
fn a_new_service_after_a_restart_does_not_get_the_mark_of_another_program() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let foreign = VirtualServerKey { family: Family::V4, mark: Mark(0x101) };
    assert_ne!(server_of(&first, "vote").mark, foreign.mark);
    kernel.lock().state.virtual_servers.insert(foreign, foreign_server());
    let mut second = engine(&kernel, first.allocator().allocations());
    second.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
        service_with("more", port(81, 8080)),
        endpoints("more", &["10.244.1.12"]),
    ]);
    second.synced(Unread::default());
    turn(&mut second, true);
    assert_ne!(server_of(&second, "more").mark, foreign.mark);
    assert_eq!(kernel.lock().state.virtual_servers[&foreign], foreign_server());
}

#[test]
fn a_mark_of_an_earlier_start_of_the_machine_is_its_new_owners() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let taken = VirtualServerKey { family: Family::V4, mark: server_of(&first, "vote").mark };
    let anew = FakeKernel::default();
    anew.lock().state.virtual_servers.insert(taken, foreign_server());
    let mut second = vote(&anew, first.allocator().allocations());
    second.forget_marks();
    turn(&mut second, true);
    assert!(!second.needs_full());
    assert_ne!(server_of(&second, "vote").mark, taken.mark);
    assert_eq!(anew.lock().state.virtual_servers[&taken], foreign_server());
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    // Nor is it written down as ours, not even while the turn that gives it up has not gone well.
    let mut third = vote(&anew, first.allocator().allocations());
    third.forget_marks();
    anew.lock().state.elements.clear();
    let _ = third.prepare(true, now()).unwrap();
    assert!(!third.allocator().allocations().known_marks().contains(&taken.mark));
}

#[test]
fn the_mark_of_the_sentinel_is_not_taken_from_another_program() {
    let kernel = FakeKernel::default();
    let sentinel = VirtualServerKey { family: Family::V4, mark: config().mask.sentinel() };
    let real = RealServerKey { addr: "10.99.0.1".parse().unwrap(), port: 81 };
    let reals = Arc::new([(real, RealServerConfig { weight: 1 })].into_iter().collect());
    let theirs = VirtualServer { reals, ..foreign_server() };
    kernel.lock().state.virtual_servers.insert(sentinel, theirs.clone());
    let mut engine = vote(&kernel, Allocations::default());
    let refused = engine.turn(true, now()).unwrap_err().to_string();
    assert!(refused.contains("FWM 16383") && refused.contains("--mark-mask"), "{refused}");
    assert_eq!(kernel.lock().state.virtual_servers[&sentinel], theirs);
    assert_eq!(kernel.lock().writes, 0);
    // It is seen when it has gone.
    kernel.lock().state.virtual_servers.clear();
    turn(&mut engine, true);
}

#[test]
fn the_sentinel_of_another_mask_goes() {
    let kernel = FakeKernel::default();
    let earlier = crate::model::node::MarkMask::new(0xffc000).unwrap();
    let old = VirtualServerKey { family: Family::V4, mark: earlier.sentinel() };
    kernel.lock().state.virtual_servers.insert(old, foreign_server());
    let mut engine = vote(&kernel, Allocations::default());
    engine.set_earlier_mask(earlier);
    turn(&mut engine, true);
    assert!(!kernel.lock().state.virtual_servers.contains_key(&old));
}

#[test]
fn a_new_service_does_not_get_a_mark_that_another_program_took_since_the_last_look() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    let foreign = [(Family::V4, 0x101), (Family::V6, 0x102)]
        .map(|(family, mark)| VirtualServerKey { family, mark: Mark(mark) });
    for key in foreign {
        kernel.lock().state.virtual_servers.insert(key, foreign_server());
    }
    engine.feed([service_with("more", port(81, 8080)), endpoints("more", &["10.244.1.12"])]);
    turn(&mut engine, false);
    assert_eq!(server_of(&engine, "more").mark, Mark(0x103));
    assert!(!engine.needs_full() && !engine.allocator().has_retired_marks(), "they were never ours");
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
    for key in foreign {
        assert_eq!(kernel.lock().state.virtual_servers[&key], foreign_server());
    }
}

#[test]
fn bridges_are_looked_for_once_and_when_endpoints_come_or_go() {
    let kernel = FakeKernel::default();
    let subnet = "10.244.1.0/24".parse().unwrap();
    kernel.lock().bridges.push(BridgeSubnet { bridge: "cni0".into(), subnet });
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    let masqueraded = |kernel: &FakeKernel| {
        let inner = kernel.lock();
        inner.state.program.as_ref().map(|program| program.masquerade_bridges.len())
    };
    assert_eq!(masqueraded(&kernel), Some(1));
    // The rules that this needs were known when the kernel was read.
    assert_eq!(kernel.lock().observations, 1);
    let looks = |kernel: &FakeKernel| kernel.lock().bridge_looks;
    let before = looks(&kernel);
    engine.feed([service_with("vote", published(81, 8080, Some(30080)))]);
    assert!(!turn(&mut engine, false).is_empty());
    assert_eq!(looks(&kernel), before);
    engine.feed([endpoints("vote", &["10.244.1.11"])]);
    turn(&mut engine, false);
    assert_eq!(looks(&kernel), before + 1);
    engine.feed([Event::ServiceGone(crate::model::ids::ServiceKey::new("default", "vote"))]);
    turn(&mut engine, false);
    assert_eq!(masqueraded(&kernel), Some(0));
}

#[test]
fn replies_on_a_bridge_are_brought_back_by_masquerading_where_the_sysctl_cannot_be_set() {
    let path = "net/bridge/bridge-nf-call-iptables";
    for (value, read_only, masqueraded) in [("0", false, 0), ("0", true, 1), ("1", true, 0)] {
        let kernel = FakeKernel::default();
        {
            let mut inner = kernel.lock();
            let subnet = "10.244.1.0/24".parse().unwrap();
            inner.bridges.push(BridgeSubnet { bridge: "cni0".into(), subnet });
            inner.state.sysctls.insert(path.into(), value.into());
            inner.read_only.extend(read_only.then(|| path.to_owned()));
        }
        let mut engine = vote(&kernel, Allocations::default());
        turn(&mut engine, true);
        let inner = kernel.lock();
        let program = inner.state.program.as_ref().unwrap();
        assert_eq!(program.masquerade_bridges.len(), masqueraded, "{value}, read-only: {read_only}");
        let set = if masqueraded == 0 { "1" } else { "0" };
        assert_eq!(inner.state.sysctls[path], set, "{value}, read-only: {read_only}");
    }
}

#[test]
fn a_bridge_that_no_rule_can_name_is_left_out() {
    for name in ["br+", "br*", "a\"b", "br 0", "br;0"] {
        let kernel = FakeKernel::default();
        let subnet: ipnet::IpNet = "10.244.1.0/24".parse().unwrap();
        for bridge in [name, "cni0"] {
            kernel.lock().bridges.push(BridgeSubnet { bridge: bridge.into(), subnet });
        }
        let mut engine = vote(&kernel, Allocations::default());
        turn(&mut engine, true);
        let inner = kernel.lock();
        let bridges = &inner.state.program.as_ref().unwrap().masquerade_bridges;
        let names: Vec<_> = bridges.iter().map(|b| b.bridge.as_str()).collect();
        assert_eq!(names, ["cni0"], "{name}");
    }
}

#[test]
fn a_service_that_a_dump_leaves_out_is_not_missing() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    let key = server_of(&engine, "vote");
    kernel.lock().missed.insert(key);
    assert_eq!(look(&mut engine), None);
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
    assert!(engine.take_drift().is_empty());
    // Nor is one that is gone there.
    kernel.lock().state.virtual_servers.remove(&key);
    assert!(look(&mut engine).is_some());
    assert!(!turn(&mut engine, true).is_empty());
    assert_eq!(engine.take_drift(), [("ipvs_service", 1)].into());
}

#[test]
fn a_deleted_service_leaves_nothing() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    engine.feed([Event::ServiceGone(crate::model::ids::ServiceKey::new("default", "vote"))]);
    turn(&mut engine, false);
    let inner = kernel.lock();
    assert!(inner.state.elements.is_empty());
    assert!(inner.state.virtual_servers.keys().all(|k| k.mark == config().mask.sentinel()));
}

#[test]
fn a_change_that_fails_is_made_good() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    kernel.lock().faults.push("-> 10.244.1.12:8080".into());
    let failed = engine.turn(true, now()).unwrap();
    assert_eq!(failed.failures.len(), 1);
    assert!(engine.needs_full());
    let ops = turn(&mut engine, false);
    assert_eq!(ops, ["+ ipvs FWM 256 IPv4 -> 10.244.1.12:8080 weight 1"]);
}

#[test]
fn services_are_not_forgotten_when_the_sockets_of_the_host_cannot_be_listed() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    kernel.lock().faults.push("listeners".into());
    assert!(engine.turn(true, now()).is_err());
    turn(&mut engine, true);
    // The same on the way of a restart, and for a later change.
    let served = |kernel: &FakeKernel| {
        kernel.lock().state.elements.keys().any(|e| e.to_string().contains("published"))
    };
    assert!(served(&kernel));
    let mut again = vote(&kernel, engine.allocator().allocations());
    again.set_served(engine.served().clone());
    again.feed([service_with("vote", published(80, 8080, Some(30082)))]);
    kernel.lock().faults.push("listeners".into());
    assert!(again.turn(true, now()).is_err());
    assert!(turn(&mut again, true).iter().any(|op| op.contains(":30082")));
    again.feed([
        service_with("other", published(81, 8080, Some(30081))),
        endpoints("other", &["10.244.1.13"]),
    ]);
    kernel.lock().faults.push("listeners".into());
    assert!(again.turn(false, now()).is_err());
    assert!(turn(&mut again, false).iter().any(|op| op.contains(":30081")));
}

#[test]
fn a_read_that_fails_changes_nothing_and_the_next_turn_makes_it_good() {
    const READS: [&str; 6] =
        ["read services", "read timeouts", "read rules", "read routes", "read bridges", "read sysctl"];
    for fault in READS {
        let kernel = FakeKernel::default();
        for path in ["net/ipv4/vs/conntrack", "net/bridge/bridge-nf-call-iptables"] {
            kernel.lock().state.sysctls.insert(path.into(), "0".into());
        }
        kernel.lock().bridges =
            vec![BridgeSubnet { bridge: "cni0".into(), subnet: "10.244.1.0/24".parse().unwrap() }];
        let mut first = vote(&kernel, Allocations::default());
        turn(&mut first, true);
        let writes = kernel.lock().writes;
        let before = kernel.lock().state.clone();
        for previous in [first.allocator().allocations(), Allocations::default()] {
            let mut second = vote(&kernel, previous);
            second.set_served(first.served().clone());
            kernel.lock().faults.push(fault.into());
            assert!(second.turn(true, now()).is_err(), "{fault}");
            assert_eq!(kernel.lock().faults, Vec::<String>::new(), "{fault} was not read");
            assert_eq!(kernel.lock().writes, writes, "{fault}");
            assert_eq!(turn(&mut second, false), Vec::<String>::new(), "{fault}");
            assert_eq!(kernel.lock().state, before, "{fault}");
            // A change meanwhile is not lost either.
            second.feed([endpoints("vote", &["10.244.1.11", "10.244.1.12", "10.244.1.13"])]);
            kernel.lock().faults.push(fault.into());
            assert!(second.turn(true, now()).is_err(), "{fault}");
            let ops = turn(&mut second, false);
            assert!(ops.iter().any(|op| op.contains("10.244.1.13:8080 weight 1")), "{fault}: {ops:?}");
            second.feed([endpoints("vote", &["10.244.1.11", "10.244.1.12"])]);
            turn(&mut second, false);
            let later = now() + SignedDuration::from_secs(60);
            second.expire_drains(later).unwrap();
            assert_eq!(second.turn(true, later).unwrap().failures, vec![]);
            assert_eq!(kernel.lock().state, before, "{fault}");
            kernel.lock().writes = writes;
        }
    }
}

#[test]
fn the_route_of_an_earlier_range_goes() {
    let kernel = FakeKernel::default();
    let earlier =
        VipRoute { range: "10.99.0.0/16".parse().unwrap(), source: "192.168.50.1".parse().unwrap() };
    kernel.lock().other_routes.push(earlier);
    let mut engine = vote(&kernel, Allocations::default());
    engine.set_earlier_ranges([Some(earlier.range), config().ranges.v6].into_iter().flatten());
    let ops = turn(&mut engine, true);
    // Before the rules that guard it are replaced.
    assert_eq!(ops.first().map(String::as_str), Some("- route local 10.99.0.0/16 dev lo"));
    assert_eq!(engine.earlier_ranges().len(), 1);
    assert_eq!(kernel.lock().other_routes, vec![]);
    // The range in use keeps its route, and the next turn has nothing to do.
    assert!(kernel.lock().state.routes.v4.is_some());
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
    assert!(engine.earlier_ranges().is_empty());
}

#[test]
fn no_vip_route_without_the_rules_that_guard_it() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    kernel.lock().faults.push("install".into());
    let failed = engine.turn(true, now()).unwrap();
    assert_eq!(failed.failures.len(), 3, "{:?}", failed.failures);
    assert!(kernel.lock().state.routes.is_empty());
    turn(&mut engine, true);
    assert!(!kernel.lock().state.routes.is_empty());
}

#[test]
fn a_source_that_cannot_be_read_completely_takes_nothing_away() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    first.feed([service_with("other", port(81, 8080)), endpoints("other", &["10.244.1.13"])]);
    turn(&mut first, true);
    let before = kernel.lock().state.clone();

    let mut second = engine(&kernel, first.allocator().allocations());
    second.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
    ]);
    second.synced(Unread::anything());
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    assert_eq!(kernel.lock().state, before);
    assert_eq!(second.held().len(), 1);
    // It stays ours to remove once the source is whole again.
    second.synced(Unread::default());
    turn(&mut second, true);
    assert!(!kernel.lock().state.elements.contains_key(&Element::Local("10.244.1.13".parse().unwrap())));
}

#[test]
fn published_ports_without_an_endpoint_stay_guarded_while_nobody_can_say_whose_they_are() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    // Now with what drains, now without anything.
    for drained in [false, true] {
        first.feed([endpoints("vote", &[])]);
        turn(&mut first, false);
        if drained {
            let later = now() + SignedDuration::from_secs(31);
            first.expire_drains(later).unwrap();
            first.turn(false, later).unwrap();
        }
        let before = kernel.lock().state.elements.clone();
        let published = |e: &Element| matches!(e, Element::Published(_));
        assert!(before.keys().any(published));
        let mut second = engine(&kernel, first.allocator().allocations());
        second.set_served(first.served().clone());
        second.synced(Unread::anything());
        turn(&mut second, true);
        assert_eq!(second.held().len(), 1);
        assert_eq!(kernel.lock().state.elements, before);
    }
}

#[test]
fn endpoints_in_a_slice_that_cannot_be_read_stay() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let kernel = FakeKernel::default();
        let service = || {
            [
                service_with("vote", ServicePort { protocol, ..published(80, 8080, Some(30080)) }),
                service_with("other", ServicePort { protocol, ..port(81, 8080) }),
            ]
        };
        let slice_of = |name: &str, addresses: &[&str]| {
            let endpoints = addresses.iter().map(|a| endpoint(a, "n1")).collect();
            let mut slice = crate::model::endpoints::Slice::clone(&slice(name, endpoints));
            slice.ports.iter_mut().for_each(|p| p.protocol = protocol);
            Event::Slice(Arc::new(slice))
        };
        let both = ["10.244.1.11", "10.244.1.12"];
        let mut first = engine(&kernel, Allocations::default());
        first.feed(service());
        first.feed([slice_of("vote", &both), slice_of("other", &["10.244.1.13"])]);
        first.synced(Unread::default());
        turn(&mut first, true);
        for previous in [first.allocator().allocations(), Allocations::default()] {
            let mut second = engine(&kernel, previous);
            second.set_served(first.served().clone());
            second.feed(service());
            second.feed([slice_of("other", &["10.244.1.13"])]);
            second.synced(Unread::anything());
            assert_eq!(turn(&mut second, true), Vec::<String>::new());
            assert_eq!(turn(&mut second, true), Vec::<String>::new());
            assert!(!second.kept().is_empty());
            // What can be read is followed.
            second.feed([slice_of("other", &["10.244.1.14"])]);
            let ops = turn(&mut second, false);
            assert!(ops.iter().any(|op| op.contains("10.244.1.14:8080 weight 1")), "{ops:?}");
            assert!(ops.iter().any(|op| op.contains("10.244.1.13:8080")), "{ops:?}");
            assert!(!ops.iter().any(|op| op.contains("10.244.1.12")), "{ops:?}");
            // Once it can be read, it counts.
            second.feed([slice_of("vote", &["10.244.1.11"]), slice_of("other", &["10.244.1.13"])]);
            second.synced(Unread::default());
            assert!(second.kept().is_empty());
            let ops = turn(&mut second, false);
            assert!(ops.iter().any(|op| op.contains("10.244.1.12:8080")), "{ops:?}");
            second.feed([slice_of("vote", &both)]);
            turn(&mut second, false);
            let later = now() + SignedDuration::from_secs(60);
            second.expire_drains(later).unwrap();
            assert_eq!(second.turn(true, later).unwrap().failures, vec![]);
        }
    }
}

#[test]
fn a_service_that_was_left_alone_leaves_nothing_behind_when_it_is_back() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let mut second = engine(&kernel, first.allocator().allocations());
    second.synced(Unread::anything());
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    // Its manifest is whole again, with an endpoint less. No full look is asked for.
    second
        .feed([service_with("vote", published(80, 8080, Some(30080))), endpoints("vote", &["10.244.1.11"])]);
    second.synced(Unread::default());
    turn(&mut second, false);
    let local =
        |addr: &str| kernel.lock().state.elements.contains_key(&Element::Local(addr.parse().unwrap()));
    assert!(local("10.244.1.11") && !local("10.244.1.12"));
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
}

#[test]
fn what_others_change_is_counted_and_what_the_source_changes_is_not() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    assert!(engine.take_drift().is_empty(), "the first look finds nothing that was ours");
    engine.feed([endpoints("vote", &["10.244.1.11", "10.244.1.12", "10.244.1.13"])]);
    turn(&mut engine, true);
    assert!(engine.take_drift().is_empty());
    let key = server_of(&engine, "vote");
    {
        let mut inner = kernel.lock();
        let server = inner.state.virtual_servers.get_mut(&key).unwrap();
        Arc::make_mut(&mut server.reals).retain(|real, _| real.addr.to_string() != "10.244.1.12");
        inner.state.elements.remove(&Element::Endpoint("10.244.1.11".parse().unwrap()));
        let (_, mark) = inner.state.elements.iter_mut().find(|(e, _)| matches!(e, Element::Vip(_))).unwrap();
        *mark = Some(Mark(0x3f00));
    }
    engine.feed([endpoints("vote", &["10.244.1.11", "10.244.1.12"])]);
    turn(&mut engine, true);
    assert_eq!(engine.take_drift(), [("ipvs_destination", 1), ("set_element", 2)].into());
    assert!(engine.take_drift().is_empty());
}

#[test]
fn a_socket_that_comes_later_is_told_of_and_takes_nothing() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    engine.recheck_listeners().unwrap();
    assert!(engine.late_listeners().is_empty() && !engine.is_dirty());
    let socket = |port| Listener { addr: "0.0.0.0".parse().unwrap(), port, protocol: Protocol::Tcp };
    kernel.lock().listeners = vec![socket(30080), socket(30081)];
    engine.recheck_listeners().unwrap();
    let late: Vec<_> = engine.late_listeners().keys().copied().collect();
    assert_eq!(late, [(Protocol::Tcp, 30080)]);
    assert!(engine.is_dirty(), "the service is to be told of");
    assert_eq!(turn(&mut engine, false), Vec::<String>::new());
    assert!(engine.blocked().is_empty());
    kernel.lock().listeners.clear();
    engine.recheck_listeners().unwrap();
    assert!(engine.late_listeners().is_empty());
}

#[test]
fn a_published_port_that_a_host_socket_holds_waits_until_it_is_free() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    let addr = "0.0.0.0".parse().unwrap();
    kernel.lock().listeners = vec![Listener { protocol: Protocol::Tcp, addr, port: 30080 }];
    let ops = turn(&mut engine, true);
    assert!(!ops.iter().any(|op| op.contains("published")), "{ops:?}");
    assert_eq!(engine.blocked().len(), 1);

    kernel.lock().listeners.clear();
    engine.recheck_listeners().unwrap();
    let ops = turn(&mut engine, false);
    assert!(ops.iter().any(|op| op.starts_with("+ set published")), "{ops:?}");
    assert!(engine.blocked().is_empty());

    // One that comes later does not take the port away.
    kernel.lock().listeners = vec![Listener { protocol: Protocol::Tcp, addr, port: 30080 }];
    engine.feed([endpoints("vote", &["10.244.1.11"])]);
    let ops = turn(&mut engine, false);
    assert!(!ops.iter().any(|op| op.starts_with("- set published")), "{ops:?}");

    // Not even when somebody has emptied our sets, nor after a restart.
    kernel.lock().state.elements.clear();
    let ops = turn(&mut engine, true);
    assert!(ops.iter().any(|op| op.starts_with("+ set published")), "{ops:?}");
    kernel.lock().state.elements.clear();
    let mut again = vote(&kernel, engine.allocator().allocations());
    again.set_served(engine.served().clone());
    let ops = turn(&mut again, true);
    assert!(ops.iter().any(|op| op.starts_with("+ set published")), "{ops:?}");
    assert!(again.blocked().is_empty());
}

#[test]
fn numbers_of_a_range_that_an_endpoint_on_this_host_serves_are_not_held_by_another() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let range = ServicePort { end_port: Some(7002), ..published(7000, 7000, Some(7000)) };
    let own = endpoint(&facts().primary.v4.unwrap().to_string(), "n1");
    engine.feed([service_with("vote", range), Event::Slice(slice("vote", vec![own]))]);
    engine.synced(Unread::default());
    let socket = |port| Listener { protocol: Protocol::Tcp, addr: "0.0.0.0".parse().unwrap(), port };
    kernel.lock().listeners = vec![socket(7001), socket(7002)];
    turn(&mut engine, true);
    assert!(engine.blocked().is_empty(), "{:?}", engine.blocked());
}

#[test]
fn a_socket_on_loopback_alone_keeps_its_port_unless_only_other_addresses_are_published() {
    let kernel = FakeKernel::default();
    let socket = Listener { protocol: Protocol::Tcp, addr: "127.0.0.1".parse().unwrap(), port: 30080 };
    kernel.lock().listeners = vec![socket.clone()];
    let mut first = vote(&kernel, Allocations::default());
    let ops = turn(&mut first, true);
    assert!(!ops.iter().any(|op| op.contains("published") || op.contains("loopback")), "{ops:?}");
    assert_eq!(first.blocked().len(), 1);

    // Where the manifest leaves loopback out, nobody is in anybody's way.
    let mut port = published(80, 8080, Some(30080));
    port.publish.as_mut().unwrap().addresses = vec![facts().primary.v4.unwrap()];
    first.feed([service_with("vote", port)]);
    let ops = turn(&mut first, false);
    assert!(ops.iter().any(|op| op.starts_with("+ set published")), "{ops:?}");
    assert!(!ops.iter().any(|op| op.contains("loopback")), "{ops:?}");
    assert!(first.blocked().is_empty());

    let kernel = FakeKernel::default();
    let mut later = vote(&kernel, Allocations::default());
    turn(&mut later, true);
    kernel.lock().listeners = vec![socket];
    later.recheck_listeners().unwrap();
    assert_eq!(later.late_listeners().len(), 1);
}

#[test]
fn what_a_slice_says_is_not_ready_is_not_kept_because_something_else_cannot_be_read() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let mut second = engine(&kernel, first.allocator().allocations());
    let not_ready =
        crate::model::endpoints::Endpoint { ready: false, serving: false, ..endpoint("10.244.1.12", "n1") };
    second.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        Event::Slice(slice("vote", vec![endpoint("10.244.1.11", "n1"), not_ready])),
    ]);
    second.synced(Unread::anything());
    let ops = turn(&mut second, true);
    assert!(ops.iter().any(|op| op.contains("10.244.1.12:8080") && op.contains("weight")), "{ops:?}");
    assert!(second.kept().is_empty(), "{:?}", second.kept());
    // Nor later, when the slice can't be read either.
    second.feed([Event::SliceGone(crate::model::ids::ServiceKey::new("default", "vote-1"))]);
    turn(&mut second, false);
    let state = kernel.lock().state.clone();
    let weights: Vec<u32> = state
        .virtual_servers
        .values()
        .flat_map(|server| server.reals.iter().filter(|(real, _)| real.addr.to_string() == "10.244.1.12"))
        .map(|(_, config)| config.weight)
        .collect();
    assert!(weights.iter().all(|weight| *weight == 0), "{weights:?}");
}

#[test]
fn what_was_there_before_us_is_noted_before_it_is_changed() {
    let kernel = FakeKernel::default();
    kernel.lock().state.sysctls.insert("net/ipv4/vs/conntrack".into(), "0".into());
    let mut engine = vote(&kernel, Allocations::default());
    let ops = engine.prepare(true, now()).unwrap();
    let change =
        |op: &&Op| matches!(op, Op::Sysctl { path, was: Some(_), .. } if path == "net/ipv4/vs/conntrack");
    assert!(ops.iter().any(|op| change(&op)), "{ops:?}");
    // Killed here, the next one must know it from the state file.
    let originals = engine.sysctl_originals(&std::collections::BTreeMap::new());
    assert_eq!(originals.get("net/ipv4/vs/conntrack").map(String::as_str), Some("0"));
}
