//! One thing that is wrong, or can't be done, leaves all others as they should be.

use std::{collections::BTreeSet, time::Duration};

use jiff::SignedDuration;

use super::{
    Engine,
    tests::{after_a_restart, endpoints, engine, look, now, service_with, turn, vote},
};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    model::{
        fixtures::{endpoint, facts, port, published, service, slice},
        ids::{Family, PerFamily, Protocol, ServiceKey},
        kernel::{Element, Elements, PublishedFlows, RealServerKey},
        service::{FamilyPolicy, Publish, PublishMode, Service, ServicePort},
        snapshot::Event,
        unread::Unread,
    },
    plan::Op,
};

pub(super) fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn addresses(kernel: &FakeKernel) -> BTreeSet<String> {
    let inner = kernel.lock();
    let reals = inner.state.virtual_servers.values().flat_map(|server| server.reals.keys());
    reals.map(|real| real.addr.to_string()).collect()
}

/// A service that stays readable, and two that don't.
pub(super) fn three(kernel: &FakeKernel) -> Engine {
    let mut engine = vote(kernel, Allocations::default());
    engine.feed([service_with("bad", published(81, 8080, Some(30081))), endpoints("bad", &["10.244.1.13"])]);
    engine.feed([service_with("gone", port(82, 8080)), endpoints("gone", &["10.244.1.14"])]);
    turn(&mut engine, true);
    engine
}

#[test]
fn a_service_that_cannot_be_used_keeps_nothing_of_others() {
    let kernel = FakeKernel::default();
    let mut second = after_a_restart(&kernel, &three(&kernel));
    second.feed([
        service_with("vote", ServicePort { publish: None, ..port(80, 8080) }),
        endpoints("vote", &["10.244.1.12"]),
    ]);
    second.synced(Unread { services: [key("bad")].into(), ..Unread::default() });
    turn(&mut second, true);
    assert_eq!(second.held().iter().collect::<Vec<_>>(), [&key("bad")]);
    assert!(second.kept().is_empty());
    second.expire_drains(now() + SignedDuration::from_secs(31)).unwrap();
    second.turn(false, now() + SignedDuration::from_secs(31)).unwrap();
    assert_eq!(addresses(&kernel), ["10.244.1.12", "10.244.1.13"].map(String::from).into());
    // It is told of at last, and the rest is as it was.
    second.feed([service_with("bad", published(81, 8080, Some(30081))), endpoints("bad", &["10.244.1.13"])]);
    second.synced(Unread::default());
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    assert!(second.held().is_empty());
}

#[test]
fn endpoints_that_cannot_be_read_keep_nothing_of_other_services() {
    let kernel = FakeKernel::default();
    let mut second = after_a_restart(&kernel, &three(&kernel));
    second.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        endpoints("vote", &["10.244.1.12"]),
        service_with("bad", published(81, 8080, Some(30081))),
        service_with("gone", port(82, 8080)),
    ]);
    let unread = Unread { endpoints_of: [key("bad")].into(), ..Unread::default() };
    second.synced(unread.clone());
    turn(&mut second, true);
    let later = now() + SignedDuration::from_secs(31);
    second.expire_drains(later).unwrap();
    second.turn(false, later).unwrap();
    assert_eq!(addresses(&kernel), ["10.244.1.12", "10.244.1.13"].map(String::from).into());
    // Said again, it is the same; no longer said, it goes.
    second.synced(unread);
    assert!(!second.is_dirty());
    second.synced(Unread::default());
    second.turn(false, later).unwrap();
    second.expire_drains(later + SignedDuration::from_secs(31)).unwrap();
    second.turn(false, later + SignedDuration::from_secs(31)).unwrap();
    assert_eq!(addresses(&kernel), ["10.244.1.12"].map(String::from).into());
}

/// The last readable service with the same endpoints goes.
#[test]
fn endpoints_of_what_is_left_alone_stay_when_another_service_lets_go_of_them() {
    let kernel = FakeKernel::default();
    let first = three(&kernel);
    let mut second = after_a_restart(&kernel, &first);
    second.feed([service_with("vote", port(80, 8080)), endpoints("vote", &["10.244.1.11", "10.244.1.12"])]);
    second.feed([service_with("same", port(85, 8080)), endpoints("same", &["10.244.1.13"])]);
    second.synced(Unread { services: [key("bad"), key("gone")].into(), ..Unread::default() });
    turn(&mut second, true);
    let of = |kernel: &FakeKernel| -> BTreeSet<Element> {
        let addr: std::net::IpAddr = "10.244.1.13".parse().unwrap();
        let all = kernel.lock().state.elements.clone();
        all.keys()
            .copied()
            .filter(|e| matches!(e, Element::Endpoint(a) | Element::Local(a) if *a == addr))
            .collect()
    };
    let before = of(&kernel);
    assert!(!before.is_empty());
    second.feed([Event::ServiceGone(key("same"))]);
    turn(&mut second, false);
    assert_eq!(of(&kernel), before);
    // Nobody has them any more when it can be read, and is gone.
    second.synced(Unread::default());
    turn(&mut second, true);
    assert_eq!(of(&kernel), BTreeSet::new());
}

/// Both a service and its endpoints could not be read; the service is mended first.
#[test]
fn destinations_stay_while_only_the_service_can_be_read_again() {
    let kernel = FakeKernel::default();
    let first = three(&kernel);
    let mut second = after_a_restart(&kernel, &first);
    second
        .feed([service_with("vote", published(80, 8080, Some(30080))), endpoints("vote", &["10.244.1.11"])]);
    let both =
        Unread { services: [key("bad")].into(), endpoints_of: [key("bad")].into(), ..Unread::default() };
    second.synced(both);
    turn(&mut second, true);
    second.feed([service_with("bad", published(81, 8080, Some(30081)))]);
    // What can't be read is told after what can: there may be a turn in between.
    turn(&mut second, false);
    second.synced(Unread { endpoints_of: [key("bad")].into(), ..Unread::default() });
    turn(&mut second, false);
    let weights = |kernel: &FakeKernel| -> Vec<u32> {
        let inner = kernel.lock();
        let reals = inner.state.virtual_servers.values().flat_map(|server| server.reals.iter());
        reals.filter(|(real, _)| real.addr.to_string() == "10.244.1.13").map(|(_, c)| c.weight).collect()
    };
    assert_eq!(weights(&kernel), [1]);
    // Said to be gone, it goes.
    second.synced(Unread::default());
    turn(&mut second, false);
    assert_eq!(weights(&kernel), [0]);
}

#[test]
fn rules_that_are_installed_anew_bring_the_entries_of_what_is_left_alone() {
    for unread in
        [Unread::anything(), Unread { services: [key("bad"), key("gone")].into(), ..Unread::default() }]
    {
        let kernel = FakeKernel::default();
        let first = three(&kernel);
        let before = kernel.lock().state.elements.clone();
        let mut second = after_a_restart(&kernel, &first);
        second.feed([
            service_with("vote", published(80, 8080, Some(30080))),
            endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
        ]);
        second.synced(unread);
        // As after `iptables -F`.
        if let Some(program) = &mut kernel.lock().state.program {
            program.mask = 0xff;
        }
        let ops = turn(&mut second, true);
        assert!(ops.iter().any(|op| op.starts_with("~ rules")), "{ops:?}");
        assert_eq!(kernel.lock().state.elements, before);
        assert_eq!(turn(&mut second, true), Vec::<String>::new());
    }
}

#[test]
fn what_fails_each_time_keeps_nothing_else_from_being_done_or_looked_at() {
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    kernel.lock().impossible.push("scheduler lc".into());
    let odd = Service {
        ports: vec![port(90, 8080)],
        scheduler: crate::model::service::Scheduler { name: "lc".into(), flags: 0 },
        ..service("odd")
    };
    engine.feed([Event::Service(odd.into()), endpoints("odd", &["10.244.1.15"])]);
    let first = engine.turn(true, now()).unwrap();
    assert!(!first.failures.is_empty());
    assert!(engine.needs_full(), "the first time nobody knows what came of it");
    let again = engine.turn(true, now()).unwrap();
    assert!(!again.failures.is_empty());
    assert!(!engine.needs_full() && !engine.failing().is_empty());
    // Another service's change is that change alone.
    engine.feed([endpoints("vote", &["10.244.1.11", "10.244.1.12", "10.244.1.16"])]);
    let reads = kernel.lock().observations;
    let change = engine.turn(false, now()).unwrap();
    assert_eq!((change.full, change.failures), (false, vec![]));
    assert_eq!(kernel.lock().observations, reads);
    // One endpoint more of the one that fails is nothing new.
    engine.feed([endpoints("odd", &["10.244.1.15", "10.244.1.17"])]);
    let more = engine.turn(false, now()).unwrap();
    assert!(!more.full && !more.failures.is_empty());
    assert!(!engine.failed_anew() && !engine.needs_full());
    assert!(addresses(&kernel).contains("10.244.1.16"));
    assert!(!engine.failing().is_empty() && !engine.needs_full());
    // A mark that nobody needs any more is free again.
    engine.feed([Event::ServiceGone(key("vote"))]);
    assert_eq!(engine.turn(false, now()).unwrap().failures, vec![]);
    assert!(!engine.allocator().has_retired_marks());
    // What is looked at is as it was left.
    assert_eq!(look(&mut engine), None);
    kernel.lock().impossible.clear();
    turn(&mut engine, true);
    assert!(engine.failing().is_empty());
    assert!(addresses(&kernel).contains("10.244.1.15"));
}

#[test]
fn a_number_that_goes_from_one_service_without_endpoints_to_another_stays_guarded() {
    // In the order of their names the one that gets it comes first.
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let with = |number: Option<u16>| {
        let publish = Publish { mode: PublishMode::Ingress, port: number, addresses: Vec::new() };
        ServicePort { publish: number.map(|_| publish), ..port(80, 8080) }
    };
    engine.feed([service_with("zzz", with(Some(30080))), service_with("aaa", with(None))]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let entries = |kernel: &FakeKernel| -> Elements {
        let all = kernel.lock().state.elements.clone();
        let published = |e: &Element| matches!(e, Element::Published(_) | Element::Loopback(..));
        all.iter().filter(|(e, _)| published(e)).map(|(e, mark)| (*e, *mark)).collect()
    };
    let before = entries(&kernel);
    assert!(!before.is_empty());
    engine.feed([service_with("zzz", with(None)), service_with("aaa", with(Some(30080)))]);
    turn(&mut engine, false);
    assert_eq!(entries(&kernel), before);
    engine.feed([Event::ServiceGone(key("aaa"))]);
    turn(&mut engine, false);
    assert!(entries(&kernel).is_empty());
}

#[test]
fn a_family_without_an_address_of_the_node_is_not_served_and_fails_nothing() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let v4 = facts().primary.v4;
    let lose = |kernel: &FakeKernel| {
        let mut inner = kernel.lock();
        inner.facts.primary = PerFamily { v4, v6: None };
        inner.facts.published_addresses = v4.into_iter().collect();
        inner.facts.all_addresses.retain(std::net::IpAddr::is_ipv4);
    };
    lose(&kernel);
    engine.family_grace = Duration::ZERO;
    engine.refresh_node().unwrap();
    let both = Service {
        ports: vec![published(80, 8080, Some(30080))],
        families: Family::ALL.into(),
        family_policy: FamilyPolicy::PreferDualStack,
        ..service("vote")
    };
    engine.feed([Event::Service(both.into()), endpoints("vote", &["10.244.1.11"])]);
    let mut six = slice("vote", vec![endpoint("fd00:244:1::11", "n1")]);
    let six_mut = std::sync::Arc::make_mut(&mut six);
    (six_mut.family, six_mut.key) = (Family::V6, key("vote-6"));
    engine.feed([Event::Slice(six)]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    assert_eq!(addresses(&kernel), ["10.244.1.11"].map(String::from).into());
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
    // It comes.
    kernel.lock().facts = facts();
    engine.refresh_node().unwrap();
    turn(&mut engine, true);
    assert!(addresses(&kernel).contains("fd00:244:1::11"));
    // And is away for a moment.
    engine.family_grace = Duration::from_secs(60);
    lose(&kernel);
    assert!(!engine.refresh_node().unwrap() && engine.misses_family());
    assert_eq!(turn(&mut engine, true), Vec::<String>::new());
    kernel.lock().facts = facts();
    assert!(!engine.refresh_node().unwrap() && !engine.misses_family());
}

/// Connections by published ports end with the destination where nothing is to drain, and with the port.
#[test]
fn published_connections_end_with_what_they_came_by() {
    type Edit = fn(&mut Engine);
    let local = |e: &mut Engine| {
        let vote = Service {
            ports: vec![published(80, 8080, Some(30080))],
            external_policy: crate::model::service::TrafficPolicy::Local,
            ..service("vote")
        };
        e.feed([Event::Service(vote.into())]);
    };
    let renamed = |e: &mut Engine| {
        e.feed([
            Event::ServiceGone(key("vote")),
            service_with("aaa", published(80, 8080, Some(30080))),
            endpoints("aaa", &["10.244.1.11", "10.244.1.12"]),
        ]);
    };
    let edits: [(&str, u64, Edit, bool); 7] = [
        ("the external policy", 30, local, false),
        ("the name", 30, renamed, false),
        ("the number", 30, |e| e.feed([service_with("vote", published(80, 8080, Some(30081)))]), false),
        ("an endpoint without a drain", 0, |e| e.feed([endpoints("vote", &["10.244.1.11"])]), true),
        ("the service", 30, |e| e.feed([Event::ServiceGone(key("vote"))]), true),
        ("another endpoint", 0, |e| e.feed([endpoints("vote", &["10.244.1.12"])]), false),
        (
            "the publishing alone",
            30,
            |e| e.feed([Event::Service(Service { ports: vec![port(80, 8080)], ..service("vote") }.into())]),
            true,
        ),
    ];
    for (what, drain, edit, cut) in edits {
        let kernel = FakeKernel::default();
        let mut engine = engine(&kernel, Allocations::default());
        let vote = Service {
            ports: vec![published(80, 8080, Some(30080))],
            drain: Duration::from_secs(drain),
            ..service("vote")
        };
        engine.feed([Event::Service(vote.into()), endpoints("vote", &["10.244.1.11", "10.244.1.12"])]);
        engine.synced(Unread::default());
        turn(&mut engine, true);
        let real = RealServerKey { addr: "10.244.1.12".parse().unwrap(), port: 8080 };
        let mut to = BTreeSet::new();
        for element in engine.merged().state().elements.keys() {
            match element {
                Element::Published(t) if Family::of(&t.addr) == Family::V4 => to.insert((t.addr, t.port)),
                Element::Loopback(Family::V4, _, port) => to.insert(("127.0.0.1".parse().unwrap(), *port)),
                _ => false,
            };
        }
        let flows = PublishedFlows { protocol: Protocol::Tcp, real, to };
        edit(&mut engine);
        let done = engine.turn(false, now()).unwrap();
        assert_eq!(done.failures, vec![], "{what}");
        assert_eq!(done.ops.contains(&Op::CutFlows(flows)), cut, "{what}: {:?}", done.ops);
        // Once.
        assert!(!engine.turn(true, now()).unwrap().ops.iter().any(|op| matches!(op, Op::CutFlows(_))));
    }
}

/// The same where it went while no agent ran.
#[test]
fn published_connections_end_that_an_earlier_run_left() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    turn(&mut first, true);
    let cut = |ops: &[Op]| -> Vec<String> {
        let flows = ops.iter().filter_map(|op| if let Op::CutFlows(flows) = op { Some(flows) } else { None });
        flows.map(|flows| flows.real.to_string()).collect()
    };
    let mut second = after_a_restart(&kernel, &first);
    second.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
    ]);
    second.synced(Unread::default());
    assert_eq!(cut(&second.turn(true, now()).unwrap().ops), Vec::<String>::new());
    let mut third = after_a_restart(&kernel, &second);
    let no_drain =
        Service { ports: vec![published(80, 8080, Some(30080))], drain: Duration::ZERO, ..service("vote") };
    third.feed([Event::Service(no_drain.into()), endpoints("vote", &["10.244.1.11"])]);
    third.synced(Unread::default());
    assert_eq!(cut(&third.turn(true, now()).unwrap().ops), ["10.244.1.12:8080"]);
    let mut last = after_a_restart(&kernel, &third);
    last.synced(Unread::default());
    assert_eq!(cut(&last.turn(true, now()).unwrap().ops), ["10.244.1.11:8080"]);
}

/// What failed is over as soon as it is to be done no more, and not when it would have been tried again.
#[test]
fn a_change_that_failed_each_time_is_over_when_its_service_is_edited_or_goes() {
    for deleted in [false, true] {
        let kernel = FakeKernel::default();
        let mut engine = vote(&kernel, Allocations::default());
        kernel.lock().impossible.push("scheduler lc".into());
        let odd = |name: &str| Service {
            ports: vec![port(90, 8080)],
            scheduler: crate::model::service::Scheduler { name: name.into(), flags: 0 },
            ..service("odd")
        };
        engine.feed([Event::Service(odd("lc").into()), endpoints("odd", &["10.244.1.15"])]);
        engine.turn(true, now()).unwrap();
        engine.turn(true, now()).unwrap();
        assert!(!engine.failing().is_empty() && !engine.needs_full());
        engine.feed([if deleted {
            Event::ServiceGone(key("odd"))
        } else {
            Event::Service(odd("rr").into())
        }]);
        let mended = engine.turn(false, now()).unwrap();
        assert_eq!((mended.full, mended.failures), (false, vec![]), "deleted: {deleted}");
        assert_eq!(engine.failing(), [], "deleted: {deleted}");
        assert_eq!(addresses(&kernel).contains("10.244.1.15"), !deleted);
    }
}

/// Another's entry can't be written, ever: that keeps nobody's mark.
#[test]
fn an_entry_that_cannot_be_written_keeps_no_mark_of_other_services() {
    let kernel = FakeKernel::default();
    let mut engine = three(&kernel);
    kernel.lock().impossible.push("30089".into());
    engine.feed([service_with("odd", published(89, 8080, Some(30089))), endpoints("odd", &["10.244.1.19"])]);
    engine.turn(true, now()).unwrap();
    engine.turn(true, now()).unwrap();
    assert!(!engine.failing().is_empty());
    engine.feed([Event::ServiceGone(key("gone"))]);
    turn(&mut engine, false);
    assert!(!engine.failing().is_empty() && !engine.allocator().has_retired_marks());
    // One that can't be taken out keeps its own.
    kernel.lock().impossible.push("30081".into());
    engine.feed([Event::ServiceGone(key("bad"))]);
    engine.turn(false, now()).unwrap();
    engine.turn(true, now()).unwrap();
    assert!(engine.allocator().has_retired_marks());
    kernel.lock().impossible.clear();
    turn(&mut engine, true);
    assert!(!engine.allocator().has_retired_marks() && engine.failing().is_empty());
}

#[test]
fn a_service_of_a_family_that_the_node_does_not_serve_says_so_and_claims_no_number() {
    use crate::cli::notes::{notes_of, problems_of};
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let v4 = facts().primary.v4;
    {
        let mut inner = kernel.lock();
        inner.facts.primary = PerFamily { v4, v6: None };
        inner.facts.published_addresses = v4.into_iter().collect();
        inner.facts.all_addresses.retain(std::net::IpAddr::is_ipv4);
    }
    engine.family_grace = Duration::ZERO;
    engine.refresh_node().unwrap();
    let with = |name: &str, families: Vec<Family>| {
        Event::Service(
            Service {
                ports: vec![published(80, 8080, Some(if name == "six" { 30080 } else { 30081 }))],
                family_policy: if families.len() == 2 {
                    FamilyPolicy::PreferDualStack
                } else {
                    FamilyPolicy::SingleStack
                },
                families,
                ..service(name)
            }
            .into(),
        )
    };
    engine.feed([with("six", vec![Family::V6]), with("both", Family::ALL.into())]);
    engine.synced(Unread::default());
    turn(&mut engine, true);
    let says = |name: &str| {
        let service = engine.merged().services()[&key(name)].clone();
        (problems_of(&engine, &service), notes_of(&engine, &service))
    };
    let (problems, notes) = says("six");
    assert!(problems.len() == 1 && problems[0].contains("serves no IPv6"), "{problems:?}");
    assert_eq!(notes, Vec::<String>::new());
    let (problems, notes) = says("both");
    assert_eq!(problems, Vec::<String>::new());
    assert!(notes.len() == 1 && notes[0].contains("serves no IPv6"), "{notes:?}");
    assert!(!engine.served().contains_key(&key("six")) && engine.served().contains_key(&key("both")));
}

/// An IPVS service that can't be deleted keeps its mark, and nothing else.
#[test]
fn a_service_that_cannot_be_deleted_makes_no_other_change_a_full_one() {
    let kernel = FakeKernel::default();
    let mut engine = three(&kernel);
    let mark = *engine.allocator().get(&key("gone")).unwrap().marks.values().next().unwrap();
    kernel.lock().impossible.push(format!("- ipvs FWM {}", mark.0));
    engine.feed([Event::ServiceGone(key("gone"))]);
    assert!(!engine.turn(false, now()).unwrap().failures.is_empty());
    assert!(!engine.turn(true, now()).unwrap().failures.is_empty());
    assert!(!engine.needs_full() && engine.allocator().has_retired_marks());
    engine.feed([endpoints("vote", &["10.244.1.11"])]);
    let change = engine.turn(false, now()).unwrap();
    assert_eq!((change.full, change.failures), (false, vec![]));
    assert!(!engine.needs_full());
    kernel.lock().impossible.clear();
    turn(&mut engine, true);
    assert!(!engine.allocator().has_retired_marks());
}

/// A node that has lost its address serves nothing, but has given nothing up: a socket that came later does not get the number.
#[test]
fn a_published_number_outlasts_the_loss_of_the_nodes_address() {
    use crate::dataplane::Listener;
    let kernel = FakeKernel::default();
    let mut engine = vote(&kernel, Allocations::default());
    turn(&mut engine, true);
    engine.family_grace = Duration::ZERO;
    let before = engine.served().clone();
    {
        let mut inner = kernel.lock();
        inner.facts.primary = PerFamily::default();
        inner.facts.published_addresses.clear();
        inner.facts.all_addresses.clear();
        inner.listeners =
            vec![Listener { addr: "0.0.0.0".parse().unwrap(), port: 30080, protocol: Protocol::Tcp }];
    }
    engine.refresh_node().unwrap();
    turn(&mut engine, true);
    assert_eq!(*engine.served(), before);
    kernel.lock().facts = facts();
    engine.refresh_node().unwrap();
    turn(&mut engine, true);
    assert!(engine.blocked().is_empty());
    assert_eq!(*engine.served(), before);
}
