//! Services that the source can't speak for stay in the kernel, whatever else is lost.

use std::collections::BTreeSet;

use super::{
    apart_tests::{key, three},
    tests::{after_a_restart, endpoints, engine, service_with, turn, vote},
};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    model::{
        fixtures::{port, published},
        kernel::KernelState,
        unread::Unread,
    },
    plan::Op,
    reconcile::Engine,
};

fn feed_vote(engine: &mut Engine) {
    engine.feed([
        service_with("vote", published(80, 8080, Some(30080))),
        endpoints("vote", &["10.244.1.11", "10.244.1.12"]),
    ]);
}

fn in_kernel(kernel: &FakeKernel) -> KernelState {
    kernel.lock().state.clone()
}

#[test]
fn what_others_take_away_of_a_service_that_is_left_alone_comes_back() {
    for unread in
        [Unread::anything(), Unread { services: [key("bad"), key("gone")].into(), ..Unread::default() }]
    {
        let kernel = FakeKernel::default();
        let mut second = after_a_restart(&kernel, &three(&kernel));
        let before = in_kernel(&kernel);
        feed_vote(&mut second);
        second.synced(unread);
        assert_eq!(turn(&mut second, true), Vec::<String>::new());
        // As after `ipvsadm -C`, `ipset flush`, or both.
        for (servers, entries) in [(true, false), (false, true), (true, true)] {
            {
                let mut inner = kernel.lock();
                if servers {
                    inner.state.virtual_servers.clear();
                }
                if entries {
                    inner.state.elements.clear();
                }
            }
            turn(&mut second, true);
            assert_eq!(in_kernel(&kernel), before, "servers: {servers}, entries: {entries}");
            assert_eq!(turn(&mut second, true), Vec::<String>::new());
        }
        // Once it can be read and is gone, it goes.
        second.synced(Unread::default());
        turn(&mut second, true);
        let reals: BTreeSet<String> = in_kernel(&kernel)
            .virtual_servers
            .values()
            .flat_map(|server| server.reals.keys().map(|real| real.addr.to_string()))
            .collect();
        assert_eq!(reals, ["10.244.1.11", "10.244.1.12"].map(String::from).into());
    }
}

/// The state is lost, and with it the names of what the kernel has.
#[test]
fn what_may_be_in_a_file_that_cannot_be_read_stays_though_the_state_was_lost() {
    for unread in [Unread::anything(), Unread { services: [key("bad")].into(), ..Unread::default() }] {
        let kernel = FakeKernel::default();
        three(&kernel);
        let before = in_kernel(&kernel);
        let mut second = engine(&kernel, Allocations::default());
        feed_vote(&mut second);
        second.synced(unread);
        turn(&mut second, true);
        assert_eq!(in_kernel(&kernel).virtual_servers, before.virtual_servers);
        assert_eq!(in_kernel(&kernel).elements, before.elements);
        assert!(!second.needs_full(), "that they are there is as it should be");
        // And so it is for the next one, which has a state again.
        let mut third = engine(&kernel, second.allocator().allocations());
        third.set_nameless(second.nameless().clone());
        feed_vote(&mut third);
        third.synced(second.unread().clone());
        assert_eq!(turn(&mut third, true), Vec::<String>::new());
        // It can be read: what it has goes on, and what nothing has goes.
        second.feed([
            service_with("bad", published(81, 8080, Some(30081))),
            endpoints("bad", &["10.244.1.13"]),
        ]);
        second.synced(Unread::default());
        let done = second.turn(true, super::tests::now()).unwrap();
        assert_eq!(done.failures, vec![]);
        assert!(!done.ops.iter().any(|op| matches!(op, Op::CutFlows(_))), "{:?}", done.ops);
        let after = in_kernel(&kernel);
        let has = |addr: &str| {
            let all = after.virtual_servers.values().flat_map(|server| server.reals.keys());
            all.into_iter().any(|real| real.addr.to_string() == addr)
        };
        assert!(has("10.244.1.13") && !has("10.244.1.14"));
    }
}

fn weights(kernel: &FakeKernel, addr: &str) -> Vec<u32> {
    let state = in_kernel(kernel);
    let reals = state.virtual_servers.values().flat_map(|server| server.reals.iter());
    reals.filter(|(real, _)| real.addr.to_string() == addr).map(|(_, config)| config.weight).collect()
}

/// A dump leaves a service out while others change theirs.
#[test]
fn what_a_dump_missed_of_a_service_that_is_left_alone_is_not_deleted_later() {
    let kernel = FakeKernel::default();
    let mut second = after_a_restart(&kernel, &three(&kernel));
    let before = in_kernel(&kernel);
    let missed: Vec<_> = before
        .virtual_servers
        .iter()
        .filter(|(_, server)| server.reals.keys().any(|real| real.addr.to_string() == "10.244.1.13"))
        .map(|(key, _)| *key)
        .collect();
    assert!(!missed.is_empty());
    kernel.lock().missed.extend(missed);
    feed_vote(&mut second);
    second.synced(Unread { services: [key("bad"), key("gone")].into(), ..Unread::default() });
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    kernel.lock().missed.clear();
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    assert_eq!(in_kernel(&kernel), before);
}

/// Its number is nobody's to take, though it has no endpoint and its name was lost.
#[test]
fn a_published_number_without_an_endpoint_stays_guarded_though_the_state_was_lost() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    first.feed([service_with("empty", published(83, 8080, Some(30083)))]);
    turn(&mut first, true);
    let before = in_kernel(&kernel).elements;
    assert!(before.keys().any(|element| element.to_string().contains("30083")));
    let mut second = engine(&kernel, Allocations::default());
    feed_vote(&mut second);
    second.synced(Unread { services: [key("empty")].into(), ..Unread::default() });
    turn(&mut second, true);
    assert_eq!(in_kernel(&kernel).elements, before);
    second.synced(Unread::default());
    turn(&mut second, true);
    assert!(!in_kernel(&kernel).elements.keys().any(|element| element.to_string().contains("30083")));
}

/// Its marks are outside the new field, and would leave the node: it is refused until it can be read, and its number stays
/// guarded. That makes no turn a full one.
#[test]
fn a_service_that_is_left_alone_is_refused_with_another_mask() {
    use super::tests::engine_of;
    use crate::{
        compile::service::Drains,
        model::{
            fixtures::config,
            node::{MarkMask, NodeConfig},
        },
    };
    let kernel = FakeKernel::default();
    let first = three(&kernel);
    let node = NodeConfig { mask: MarkMask::new(0xff_c000).unwrap(), ..config() };
    let mut second = engine_of(node, &kernel, first.allocator().allocations(), Drains::new());
    second.set_earlier_mask(config().mask);
    feed_vote(&mut second);
    second.synced(Unread { services: [key("bad"), key("gone")].into(), ..Unread::default() });
    turn(&mut second, true);
    assert_eq!(weights(&kernel, "10.244.1.13"), Vec::<u32>::new());
    assert_eq!(turn(&mut second, true), Vec::<String>::new());
    assert!(!second.needs_full());
    let state = in_kernel(&kernel);
    let field = MarkMask::new(0xff_c000).unwrap();
    for (element, mark) in &state.elements {
        assert!(
            mark.is_none_or(|mark| mark == crate::model::ids::Mark::NOWHERE || field.covers(mark)),
            "{element}"
        );
    }
    let is_guarded = |state: &KernelState, number: &str| {
        state.elements.keys().any(|element| element.is_published() && element.to_string().contains(number))
    };
    assert!(is_guarded(&state, "30081"));
    second.synced(Unread::default());
    turn(&mut second, true);
    assert!(!is_guarded(&in_kernel(&kernel), "30081"));
    assert!(!second.needs_full() && !second.allocator().has_retired_marks());
}

/// A readable one that has no endpoint for the moment is not taken for one of those.
#[test]
fn a_number_of_a_readable_service_goes_with_it_though_the_state_was_lost() {
    let kernel = FakeKernel::default();
    let mut first = vote(&kernel, Allocations::default());
    first.feed([service_with("empty", published(83, 8080, Some(30083)))]);
    turn(&mut first, true);
    let mut second = engine(&kernel, Allocations::default());
    feed_vote(&mut second);
    second.feed([service_with("empty", published(83, 8080, Some(30083)))]);
    second.synced(Unread { services: [key("bad")].into(), ..Unread::default() });
    turn(&mut second, true);
    second.feed([crate::model::snapshot::Event::ServiceGone(key("empty"))]);
    turn(&mut second, false);
    turn(&mut second, true);
    assert!(!in_kernel(&kernel).elements.keys().any(|element| element.to_string().contains("30083")));
}

/// The state is lost, and another renderer's entries still lead to its marks: nobody is given one of them before they are gone.
#[test]
fn marks_that_another_renderers_entries_lead_to_are_given_to_nobody() {
    use crate::model::{ids::Mark, kernel::VirtualServerKey};
    let kernel = FakeKernel::default();
    let first = vote(&kernel, Allocations::default());
    let mut first = first;
    for n in 0..100 {
        let name = format!("s{n}");
        first.feed([service_with(&name, port(80, 8080)), endpoints(&name, &["10.244.1.13"])]);
    }
    turn(&mut first, true);
    let marks: BTreeSet<Mark> =
        first.allocator().iter().flat_map(|(_, a)| a.marks.values().copied()).collect();
    // Their own renderer is not asked any more.
    {
        let mut inner = kernel.lock();
        inner.state.elements.clear();
        inner.led_to.clone_from(&marks);
    }
    let mut second = engine(&kernel, Allocations::default());
    for n in 0..100 {
        let name = format!("other{n}");
        second.feed([service_with(&name, port(80, 8080)), endpoints(&name, &["10.244.1.14"])]);
    }
    second.synced(Unread::default());
    let ops = second.prepare(true, super::tests::now()).unwrap();
    for op in &ops {
        if let Op::Ipvs(crate::dataplane::IpvsChange::AddReal(VirtualServerKey { mark, .. }, ..)) = op {
            assert!(!marks.contains(mark), "{op}");
        }
    }
}
