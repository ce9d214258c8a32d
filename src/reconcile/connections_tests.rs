//! Connections by published ports, which conntrack goes on with: none is cut that has a right to go on, and none goes on for ever.

use std::collections::BTreeSet;

use jiff::SignedDuration;

use super::{
    Engine,
    tests::{
        after_a_restart, endpoints, engine, engine_with, foreign_server, look, now, service_with, turn, vote,
    },
};
use crate::{
    allocate::Allocations,
    dataplane::{Listener, fake::FakeKernel},
    model::{
        fixtures::{endpoint, port, published, service, slice},
        ids::{Family, Protocol, ServiceKey},
        kernel::{Element, PublishedFlows, RealServerKey},
        service::{Publish, PublishMode, Service, ServicePort, TrafficPolicy},
        snapshot::Event,
        unread::Unread,
    },
    plan::Op,
};

fn real(addr: &str) -> RealServerKey {
    RealServerKey { addr: addr.parse().unwrap(), port: 8080 }
}

fn flows_cut(ops: &[Op]) -> impl Iterator<Item = &PublishedFlows> {
    ops.iter().filter_map(|op| if let Op::CutFlows(flows) = op { Some(flows) } else { None })
}

/// The destinations whose connections are cut.
fn cut(ops: &[Op]) -> BTreeSet<String> {
    flows_cut(ops).map(|flows| flows.real.to_string()).collect()
}

/// The published numbers by which connections are cut.
fn numbers_cut(ops: &[Op]) -> BTreeSet<u16> {
    flows_cut(ops).flat_map(|flows| flows.to.iter().map(|(_, number)| *number)).collect()
}

/// What clients connect to for this service now.
fn connected_to(engine: &Engine) -> BTreeSet<(std::net::IpAddr, u16)> {
    let elements = engine.merged().state().elements.keys();
    let of = |element: &Element| match element {
        Element::Published(t) if Family::of(&t.addr) == Family::V4 => Some((t.addr, t.port)),
        Element::Loopback(Family::V4, _, port) => Some(("127.0.0.1".parse().unwrap(), *port)),
        _ => None,
    };
    elements.filter_map(of).collect()
}

#[test]
fn a_drain_waits_for_connections_that_came_before_a_policy_was_edited() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let with = |policy| Service {
        ports: vec![published(80, 8080, Some(30080))],
        external_policy: policy,
        ..service("vote")
    };
    let near = endpoint("10.244.1.11", "n1");
    let far = endpoint("10.244.2.12", "n2");
    engine.feed([
        Event::Service(with(TrafficPolicy::Cluster).into()),
        Event::Slice(slice("vote", vec![near.clone(), far])),
    ]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let flows =
        PublishedFlows { protocol: Protocol::Tcp, real: real("10.244.2.12"), to: connected_to(&engine) };
    kernel.lock().flows.insert(flows);
    engine.feed([Event::Service(with(TrafficPolicy::Local).into())]);
    assert_eq!(cut(&engine.turn(false, now()).unwrap().ops), BTreeSet::new());
    engine.feed([Event::Slice(slice("vote", vec![near]))]);
    assert_eq!(cut(&engine.turn(false, now()).unwrap().ops), BTreeSet::new());
    let drains = |engine: &Engine| engine.drains().keys().any(|(_, drained)| *drained == real("10.244.2.12"));
    let soon = now() + SignedDuration::from_secs(2);
    engine.expire_drains(soon).unwrap();
    assert_eq!(cut(&engine.turn(false, soon).unwrap().ops), BTreeSet::new());
    assert!(drains(&engine), "a connection is open");
    let deadline = now() + SignedDuration::from_secs(31);
    engine.expire_drains(deadline).unwrap();
    assert_eq!(cut(&engine.turn(false, deadline).unwrap().ops), ["10.244.2.12:8080".to_owned()].into());
    assert!(!drains(&engine));
}

#[test]
fn a_number_that_was_edited_while_no_agent_ran_ends_no_connection() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let mut second = after_a_restart(&kernel, &first);
    second.feed([
        service_with("vote", published(80, 8080, Some(30081))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
    ]);
    second.synced(Unread::default());
    assert_eq!(cut(&second.turn(true, now()).unwrap().ops), BTreeSet::new());
    // Nor does it when another service has got the number, or when the policy was edited with it.
    let kernel_of_both = FakeKernel::default();
    let mut both = vote(&kernel_of_both, Allocations::default());
    turn(&mut both, true);
    let mut after = after_a_restart(&kernel_of_both, &both);
    let moved = Service {
        ports: vec![published(80, 8080, Some(30081))],
        external_policy: TrafficPolicy::Local,
        ..service("vote")
    };
    after.feed([
        Event::Service(moved.into()),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
        service_with("other", published(80, 8080, Some(30080))),
        endpoints("other", &["10.244.1.15"]),
    ]);
    after.synced(Unread::default());
    assert_eq!(cut(&after.turn(true, now()).unwrap().ops), BTreeSet::new());
    // Back to one policy, with another number again: a mark is given back.
    let mut back = after_a_restart(&kernel_of_both, &after);
    back.feed([
        service_with("vote", published(80, 8080, Some(30082))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
        service_with("other", published(80, 8080, Some(30080))),
        endpoints("other", &["10.244.1.15"]),
    ]);
    back.synced(Unread::default());
    assert_eq!(cut(&back.turn(true, now()).unwrap().ops), BTreeSet::new());
    assert!(!back.allocator().has_retired_marks());
    // No longer published is another thing.
    let mut third = after_a_restart(&kernel, &second);
    third.feed([service_with("vote", port(80, 8080)), endpoints("vote", &["10.244.1.11", "10.244.1.12"])]);
    third.synced(Unread::default());
    let both = ["10.244.1.11:8080", "10.244.1.12:8080"].map(str::to_owned);
    assert_eq!(cut(&third.turn(true, now()).unwrap().ops), both.into());
}

/// One of two published ports is published no longer: nor is it by the other's number.
#[test]
fn a_port_that_was_unpublished_while_no_agent_ran_ends_its_connections_alone() {
    let kernel = FakeKernel::default();
    let mut first = engine(&kernel, Allocations::default());
    let with = |first: ServicePort| Service {
        ports: vec![first, published(443, 8443, Some(30443))],
        external_policy: TrafficPolicy::Local,
        ..service("vote")
    };
    // The fixture's slice has no port names: each port leads to its own number.
    let ends = || Event::Slice(slice("vote", vec![endpoint("10.244.1.11", "n1")]));
    first.feed([Event::Service(with(published(80, 8080, Some(30080))).into()), ends()]);
    first.synced(Unread::default());
    turn(&mut first, true);
    let mut second = after_a_restart(&kernel, &first);
    second.feed([Event::Service(with(port(80, 8080)).into()), ends()]);
    second.synced(Unread::default());
    let ops = second.turn(true, now()).unwrap().ops;
    let numbers = numbers_cut(&ops);
    assert_eq!(numbers, [30080].into());
}

/// Its number is another port's of the same service then.
#[test]
fn a_port_whose_number_went_to_another_one_while_no_agent_ran_ends_its_connections() {
    let kernel = FakeKernel::default();
    let mut first = engine(&kernel, Allocations::default());
    let with = |one: ServicePort, other: ServicePort| Service { ports: vec![one, other], ..service("vote") };
    let ends = || Event::Slice(slice("vote", vec![endpoint("10.244.1.11", "n1")]));
    let before = with(published(80, 8080, Some(30080)), published(443, 8443, Some(30443)));
    first.feed([Event::Service(before.into()), ends()]);
    first.synced(Unread::default());
    turn(&mut first, true);
    let mut second = after_a_restart(&kernel, &first);
    let after = with(port(80, 8080), published(443, 8443, Some(30080)));
    second.feed([Event::Service(after.into()), ends()]);
    second.synced(Unread::default());
    assert_eq!(cut(&second.turn(true, now()).unwrap().ops), ["10.244.1.11:8080".to_owned()].into());
}

#[test]
fn what_was_draining_when_the_agent_ended_is_cut_though_its_entries_lead_nowhere() {
    for service_is_gone in [false, true] {
        let kernel = FakeKernel::default();
        let mut first = vote(&kernel, Allocations::default());
        turn(&mut first, true);
        first.feed([endpoints("vote", &[])]);
        assert_eq!(cut(&first.turn(false, now()).unwrap().ops), BTreeSet::new());
        assert!(!first.drains().is_empty());
        // Its deadline has passed when the next one starts, or its service is gone.
        let mut second = after_a_restart(&kernel, &first);
        if !service_is_gone {
            let no_drain = Service {
                ports: vec![published(80, 8080, Some(30080))],
                drain: std::time::Duration::ZERO,
                ..service("vote")
            };
            second.feed([Event::Service(no_drain.into()), endpoints("vote", &[])]);
        }
        second.synced(Unread::default());
        let both = ["10.244.1.11:8080", "10.244.1.12:8080"].map(str::to_owned);
        assert_eq!(cut(&second.turn(true, now()).unwrap().ops), both.into(), "gone: {service_is_gone}");
    }
}

#[test]
fn a_first_look_that_fails_is_made_good_by_the_second() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let mut second = after_a_restart(&kernel, &first);
    let no_drain = Service {
        ports: vec![published(80, 8080, Some(30080))],
        drain: std::time::Duration::ZERO,
        ..service("vote")
    };
    second.feed([Event::Service(no_drain.into()), endpoints("vote", &["10.244.1.11"])]);
    second.synced(Unread::default());
    kernel.lock().faults.push("read services".into());
    assert!(second.turn(true, now()).is_err());
    assert_eq!(cut(&second.turn(true, now()).unwrap().ops), ["10.244.1.12:8080".to_owned()].into());
}

#[test]
fn drains_of_a_service_that_is_gone_at_a_restart_are_over() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    first.feed([endpoints("vote", &["10.244.1.11"])]);
    turn(&mut first, false);
    let (kept, drains) = (first.allocator().allocations(), first.drains().clone());
    assert!(!drains.is_empty());
    let mut second = engine_with(&kernel, kept, drains);
    second.synced(Unread::default());
    second.turn(true, now()).unwrap();
    second.expire_drains(now()).unwrap();
    assert!(second.drains().is_empty());
}

/// Published on nodes that have an endpoint: elsewhere the number is anybody's.
#[test]
fn a_number_that_only_nodes_with_an_endpoint_publish_is_free_on_the_others() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let publish = Publish { mode: PublishMode::Host, port: Some(8080), addresses: Vec::new() };
    let host = ServicePort { publish: Some(publish), ..port(80, 8080) };
    let at = |node: &str, addr: &str| Event::Slice(slice("vote", vec![endpoint(addr, node)]));
    engine.feed([service_with("vote", host), at("n2", "10.244.2.11")]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let led = |engine: &Engine| !connected_to(engine).is_empty();
    assert!(engine.served().is_empty() && !led(&engine));
    // A socket of the host takes it, rightly.
    let socket = Listener { addr: "0.0.0.0".parse().unwrap(), port: 8080, protocol: Protocol::Tcp };
    kernel.lock().listeners = vec![socket];
    engine.recheck_listeners().unwrap();
    assert!(engine.late_listeners().is_empty() && engine.blocked().is_empty());
    // An endpoint comes: it has to wait.
    engine.feed([at("n1", "10.244.1.11")]);
    turn(&mut engine, false);
    assert_eq!(engine.blocked().len(), 1);
    assert!(!led(&engine));
    kernel.lock().listeners.clear();
    engine.recheck_listeners().unwrap();
    turn(&mut engine, false);
    assert!(led(&engine) && engine.blocked().is_empty());
    // It goes, and with it the claim.
    engine.feed([at("n2", "10.244.2.11")]);
    turn(&mut engine, false);
    assert!(engine.served().is_empty());
}

/// Marks that were given back are anybody's.
#[test]
fn another_programs_service_with_a_mark_that_was_ours_is_left_alone() {
    use crate::model::kernel::VirtualServerKey;
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    engine.feed([service_with("gone", port(82, 8080)), endpoints("gone", &["10.244.1.14"])]);
    turn(&mut engine, true);
    let key = ServiceKey::new("default", "gone");
    let mark = *engine.allocator().get(&key).unwrap().marks.values().next().unwrap();
    engine.feed([Event::ServiceGone(key)]);
    turn(&mut engine, false);
    let foreign = VirtualServerKey { family: Family::V4, mark };
    let theirs = foreign_server();
    assert!(!kernel.lock().state.virtual_servers.contains_key(&foreign));
    assert!(!engine.allocator().has_retired_marks());
    kernel.lock().state.virtual_servers.insert(foreign, theirs.clone());
    assert_eq!(look(&mut engine), None);
    for (name, full) in [("more", false), ("most", true)] {
        engine.feed([service_with(name, port(83, 8080)), endpoints(name, &["10.244.1.15"])]);
        turn(&mut engine, full);
        assert_eq!(kernel.lock().state.virtual_servers[&foreign], theirs, "{name}");
    }
}

/// A dump may leave a service out while others change theirs: that one is still ours, and goes.
#[test]
fn a_mark_is_given_back_when_the_kernel_has_it_no_more_and_not_before() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let servers: Vec<_> = kernel.lock().state.virtual_servers.keys().copied().collect();
    let ours: Vec<_> = servers
        .into_iter()
        .filter(|key| key.mark != crate::model::fixtures::config().mask.sentinel())
        .collect();
    assert!(!ours.is_empty());
    // It is deleted while no agent runs.
    let mut second = after_a_restart(&kernel, &first);
    second.synced(Unread::default());
    kernel.lock().missed.extend(ours.iter().copied());
    turn(&mut second, true);
    assert!(second.needs_full() && second.allocator().has_retired_marks());
    kernel.lock().missed.clear();
    turn(&mut second, false);
    assert!(!second.allocator().has_retired_marks());
    assert!(ours.iter().all(|key| !kernel.lock().state.virtual_servers.contains_key(key)));
}

/// Who starts does not know yet whose they are, and what connections they have.
#[test]
fn drains_of_an_earlier_run_wait_for_their_services() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    first.feed([endpoints("vote", &["10.244.1.11"])]);
    turn(&mut first, false);
    let (kept, drains) = (first.allocator().allocations(), first.drains().clone());
    let mut second = engine_with(&kernel, kept, drains.clone());
    second
        .feed([service_with("vote", published(80, 8080, Some(30080))), endpoints("vote", &["10.244.1.11"])]);
    second.synced(Unread::default());
    kernel.lock().faults.push("read services".into());
    assert!(second.turn(true, now()).is_err());
    second.expire_drains(now() + SignedDuration::from_secs(1)).unwrap();
    assert_eq!(*second.drains(), drains);
    // Its time is up all the same.
    let deadline = now() + SignedDuration::from_secs(31);
    second.expire_drains(deadline).unwrap();
    second.turn(true, deadline).unwrap();
    assert!(second.drains().is_empty());
}

/// Whoever sends on is not to be answered by the service that has let go of the number, nor by it in another's place.
#[test]
fn udp_flows_by_a_port_that_is_published_no_longer_end() {
    let udp = |number| ServicePort { protocol: Protocol::Udp, ..published(53, 5353, number) };
    let unpublished = ServicePort { protocol: Protocol::Udp, ..port(53, 5353) };
    let reals: BTreeSet<String> = ["10.244.1.11:5353", "10.244.1.12:5353"].map(str::to_owned).into();
    for running in [true, false] {
        for another in [true, false] {
            let kernel = FakeKernel::default();
            let mut first = engine(&kernel, Allocations::default());
            let ends = || endpoints("dns", &["10.244.1.11", "10.244.1.12"]);
            first.feed([service_with("dns", udp(Some(30053))), ends()]);
            first.synced(Unread::default());
            turn(&mut first, true);
            let mut second = if running { first } else { after_a_restart(&kernel, &first) };
            second.feed([service_with("dns", unpublished.clone()), ends()]);
            if another {
                second.feed([service_with("other", udp(Some(30053))), endpoints("other", &["10.244.1.15"])]);
            }
            second.synced(Unread::default());
            let ops = second.turn(!running, now()).unwrap().ops;
            assert_eq!(cut(&ops), reals, "running: {running}, another has it: {another}: {ops:?}");
            assert_eq!(cut(&second.turn(true, now()).unwrap().ops), BTreeSet::new());
        }
    }
    // With an endpoint that goes, the plan forgets them.
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    engine.feed([service_with("dns", udp(Some(30053))), endpoints("dns", &["10.244.1.11", "10.244.1.12"])]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    engine.feed([endpoints("dns", &["10.244.1.11"])]);
    let ops = engine.turn(false, now()).unwrap().ops;
    assert_eq!(cut(&ops), BTreeSet::new());
}

/// A flow of datagrams to a published port has no end that a policy could wait for: it goes where the policy says now, or nobody
/// would take it from an endpoint that goes later, whose removal is another mark's.
#[test]
fn udp_flows_follow_a_policy_that_was_edited() {
    for running in [true, false] {
        let kernel = FakeKernel::default();
        let with = |policy| Service {
            ports: vec![ServicePort { protocol: Protocol::Udp, ..published(53, 5353, Some(30053)) }],
            external_policy: policy,
            ..service("dns")
        };
        let ends =
            || Event::Slice(slice("dns", vec![endpoint("10.244.1.11", "n1"), endpoint("10.244.2.12", "n2")]));
        let mut first = engine(&kernel, Allocations::default());
        first.feed([Event::Service(with(TrafficPolicy::Cluster).into()), ends()]);
        first.synced(Unread::default());
        turn(&mut first, true);
        let mut second = if running { first } else { after_a_restart(&kernel, &first) };
        second.feed([Event::Service(with(TrafficPolicy::Local).into()), ends()]);
        second.synced(Unread::default());
        let ops = second.turn(!running, now()).unwrap().ops;
        assert_eq!(cut(&ops), ["10.244.2.12:5353".to_owned()].into(), "running: {running}: {ops:?}");
        assert_eq!(cut(&second.turn(true, now()).unwrap().ops), BTreeSet::new());
        // One that IPVS has led there once more ends with the destination, which the virtual IP's mark alone has.
        second.feed([Event::Slice(slice("dns", vec![endpoint("10.244.1.11", "n1")]))]);
        let ops = second.turn(false, now()).unwrap().ops;
        assert_eq!(cut(&ops), ["10.244.2.12:5353".to_owned()].into(), "running: {running}: {ops:?}");
    }
}

/// IPVS would go on with them by their addresses: they go with the mark.
#[test]
fn udp_services_whose_virtual_ips_change_hands_get_other_marks() {
    for running in [true, false] {
        let kernel = FakeKernel::default();
        let udp = || ServicePort { protocol: Protocol::Udp, ..port(53, 5353) };
        let with = |name: &str, vip: &str| Service {
            vips: vec![vip.parse().unwrap()],
            ports: vec![udp(), port(80, 8080)],
            ..service(name)
        };
        let ends = || [endpoints("a", &["10.244.1.11"]), endpoints("b", &["10.244.1.12"])];
        let set =
            |a: &str, b: &str| [Event::Service(with("a", a).into()), Event::Service(with("b", b).into())];
        let marks = |engine: &Engine| {
            let of =
                |name: &str| engine.allocator().get(&ServiceKey::new("default", name)).unwrap().marks.clone();
            ["a", "b"].map(of)
        };
        let mut first = engine(&kernel, Allocations::default());
        first.feed(set("10.200.0.5", "10.200.0.6"));
        first.feed(ends());
        first.synced(Unread::default());
        turn(&mut first, true);
        let before = marks(&first);
        let mut second = if running { first } else { after_a_restart(&kernel, &first) };
        second.feed(set("10.200.0.6", "10.200.0.5"));
        second.feed(ends());
        second.synced(Unread::default());
        let ops = second.turn(!running, now()).unwrap().ops;
        for (before, after) in before.iter().zip(marks(&second)) {
            for (id, mark) in &after {
                assert_eq!(
                    before[id] == *mark,
                    id.0.protocol == Protocol::Tcp,
                    "running: {running}: {ops:?}"
                );
            }
        }
        assert_eq!(turn(&mut second, true), Vec::<String>::new());
    }
}

/// With another number they do not go on, as those of TCP do: a flow of datagrams has no end.
#[test]
fn udp_flows_by_a_number_that_was_edited_end() {
    let udp = |number| ServicePort { protocol: Protocol::Udp, ..published(53, 5353, Some(number)) };
    for running in [true, false] {
        let kernel = FakeKernel::default();
        let mut first = engine(&kernel, Allocations::default());
        let ends = || endpoints("dns", &["10.244.1.11"]);
        first.feed([service_with("dns", udp(30053)), ends()]);
        first.synced(Unread::default());
        turn(&mut first, true);
        let mut second = if running { first } else { after_a_restart(&kernel, &first) };
        second.feed([
            service_with("dns", udp(30054)),
            ends(),
            service_with("other", udp(30053)),
            endpoints("other", &["10.244.1.15"]),
        ]);
        second.synced(Unread::default());
        let ops = second.turn(!running, now()).unwrap().ops;
        let numbers = numbers_cut(&ops);
        assert_eq!(numbers, [30053].into(), "running: {running}: {ops:?}");
    }
}

/// Its destinations go on by the virtual IP.
#[test]
fn connections_by_a_port_that_is_unpublished_are_cut_again_when_that_failed() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    kernel.lock().faults.push("conntrack entries".into());
    engine.feed([service_with("vote", port(80, 8080))]);
    let failed = engine.turn(false, now()).unwrap();
    assert!(failed.failures.iter().any(|failure| matches!(failure.op, Op::CutFlows(_))), "{failed:?}");
    let both: BTreeSet<String> = ["10.244.1.11:8080", "10.244.1.12:8080"].map(str::to_owned).into();
    assert_eq!(cut(&engine.turn(true, now()).unwrap().ops), both);
    assert_eq!(cut(&engine.turn(true, now()).unwrap().ops), BTreeSet::new());
}

/// It could not be read when the agent started, and has let go of something since it was read last.
#[test]
fn connections_of_a_service_that_was_left_alone_end_when_it_is_read_again() {
    for (what, edit) in [("unpublished", Some(port(80, 8080))), ("deleted", None)] {
        let kernel = FakeKernel::default();
        let mut first = vote(&kernel, Allocations::default());
        turn(&mut first, true);
        let mut second = after_a_restart(&kernel, &first);
        let key = ServiceKey::new("default", "vote");
        second.synced(Unread { services: [key].into(), ..Unread::default() });
        assert_eq!(cut(&second.turn(true, now()).unwrap().ops), BTreeSet::new());
        if let Some(port) = edit {
            second.feed([service_with("vote", port), endpoints("vote", &["10.244.1.11", "10.244.1.12"])]);
        }
        second.synced(Unread::default());
        let both = ["10.244.1.11:8080", "10.244.1.12:8080"].map(str::to_owned);
        assert_eq!(cut(&second.turn(false, now()).unwrap().ops), both.into(), "{what}");
    }
}

/// The kernel is of a later run than the state.
#[test]
fn marks_that_no_state_knows_are_given_back_too() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let older = first.allocator().allocations();
    first.feed([service_with("later", port(82, 8080)), endpoints("later", &["10.244.1.14"])]);
    turn(&mut first, false);
    let later = ServiceKey::new("default", "later");
    let mark = *first.allocator().get(&later).unwrap().marks.values().next().unwrap();
    let mut second = vote(&kernel, older);
    turn(&mut second, true);
    turn(&mut second, true);
    let foreign = crate::model::kernel::VirtualServerKey { family: Family::V4, mark };
    assert!(!kernel.lock().state.virtual_servers.contains_key(&foreign));
    let theirs = foreign_server();
    kernel.lock().state.virtual_servers.insert(foreign, theirs.clone());
    assert_eq!(look(&mut second), None);
    turn(&mut second, true);
    assert_eq!(kernel.lock().state.virtual_servers[&foreign], theirs);
}
