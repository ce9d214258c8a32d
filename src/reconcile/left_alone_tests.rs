//! Services that the source can't speak for stay in the kernel, whatever else is lost.

use std::collections::BTreeSet;

use super::tests::{after_a_restart, endpoints, engine, service_with, turn, vote};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    model::{
        fixtures::{port, published},
        ids::ServiceKey,
        kernel::KernelState,
        unread::Unread,
    },
    plan::Op,
    reconcile::Engine,
};

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

/// A service that stays readable, and two that don't.
fn three(kernel: &FakeKernel) -> Engine {
    let mut engine = vote(kernel, Allocations::default());
    engine.feed([
        service_with("bad", published(81, 8080, Some(30081))),
        endpoints("bad", &["10.244.1.13"]),
        service_with("gone", port(82, 8080)),
        endpoints("gone", &["10.244.1.14"]),
    ]);
    turn(&mut engine, true);
    engine
}

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
