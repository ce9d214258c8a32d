//! The cheap look at a kernel in memory: what others change is seen, and what is as it should be is no drift.

use std::{sync::Arc, time::Duration};

use super::{
    Engine,
    rotation::Rotation,
    tests::{endpoints, foreign_server, service_with, turn, vote},
};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    model::{
        fixtures::port,
        ids::{Family, Mark},
        kernel::{RealServerConfig, VirtualServer, VirtualServerKey},
    },
};

/// A look at everything that lists show, and at nothing besides.
fn look(engine: &mut Engine) -> Option<String> {
    engine.look_at_all().unwrap()
}

fn other(family: Family) -> Family {
    Family::ALL.into_iter().find(|other| *other != family).unwrap()
}

/// `vote` with two endpoints, and `other` without any.
fn two(kernel: &FakeKernel) -> (Engine, VirtualServerKey) {
    let mut engine = vote(kernel, Allocations::default());
    engine.feed([service_with("other", port(81, 8080))]);
    turn(&mut engine, true);
    let with_reals =
        |(key, server): (&VirtualServerKey, &VirtualServer)| (!server.reals.is_empty()).then_some(*key);
    let key = kernel.lock().state.virtual_servers.iter().find_map(with_reals).unwrap();
    (engine, key)
}

/// And more than are looked at one by one.
fn many(kernel: &FakeKernel) -> Engine {
    let (mut engine, _) = two(kernel);
    for n in 0..40 {
        let name = format!("more-{n}");
        engine.feed([service_with(&name, port(82, 8080)), endpoints(&name, &["10.244.1.14"])]);
    }
    turn(&mut engine, false);
    engine
}

#[test]
fn what_is_as_it_should_be_is_no_drift() {
    let kernel = FakeKernel::default();
    let (mut engine, _) = two(&kernel);
    for no_list in [false, true] {
        kernel.lock().no_list = no_list;
        assert_eq!(look(&mut engine), None, "{no_list}");
    }
}

type Disturbance = fn(&mut VirtualServer);

#[test]
fn whatever_is_changed_on_a_service_or_a_destination_is_seen() {
    let cases: [(&str, Disturbance); 6] = [
        ("missing or different", |server| server.config.flags |= 1),
        ("missing or different", |server| server.config.scheduler = "sh".into()),
        ("destinations", |server| {
            let real = *server.reals.iter().next().unwrap().0;
            Arc::make_mut(&mut server.reals).remove(&real);
        }),
        ("destinations", |server| server.reals = Arc::default()),
        ("destinations", |server| {
            let real = *server.reals.iter().next().unwrap().0;
            Arc::make_mut(&mut server.reals).insert(real, RealServerConfig { weight: 7 });
        }),
        ("destinations", |server| {
            let mut real = *server.reals.iter().next().unwrap().0;
            real.port += 1;
            Arc::make_mut(&mut server.reals).insert(real, RealServerConfig { weight: 1 });
        }),
    ];
    for (what, disturb) in cases {
        let kernel = FakeKernel::default();
        let (mut engine, key) = two(&kernel);
        disturb(kernel.lock().state.virtual_servers.get_mut(&key).unwrap());
        let found = look(&mut engine).unwrap_or_else(|| panic!("{what} was not seen"));
        assert!(found.contains(what) && found.contains(&key.to_string()), "{found}");
        turn(&mut engine, true);
        assert_eq!(look(&mut engine), None);
    }
}

#[test]
fn a_service_that_is_gone_or_one_too_many_is_seen() {
    for no_list in [false, true] {
        let kernel = FakeKernel::default();
        kernel.lock().no_list = no_list;
        let (mut engine, key) = two(&kernel);
        let server = kernel.lock().state.virtual_servers.remove(&key).unwrap();
        assert_eq!(look(&mut engine), Some(format!("IPVS service {key} is missing or different")));
        kernel.lock().state.virtual_servers.insert(key, server);
        assert_eq!(look(&mut engine), None);
        // With one of our marks, and of the other family.
        let other = VirtualServerKey { family: other(key.family), mark: key.mark };
        if kernel.lock().state.virtual_servers.insert(other, foreign_server()).is_none() {
            assert!(look(&mut engine).unwrap().contains("not wanted"));
            kernel.lock().state.virtual_servers.remove(&other);
        }
        // Somebody else's is none of our business.
        let theirs = VirtualServerKey { family: Family::V4, mark: Mark(0x7fff_0000) };
        kernel.lock().state.virtual_servers.insert(theirs, foreign_server());
        assert_eq!(look(&mut engine), None);
    }
}

#[test]
fn fewer_or_more_services_are_seen_by_their_number() {
    let kernel = FakeKernel::default();
    let (mut engine, _) = two(&kernel);
    let is_of = |family| move |key: &&VirtualServerKey| key.family == family;
    let key = *kernel.lock().state.virtual_servers.keys().find(is_of(Family::V4)).unwrap();
    assert!(!engine.counts_otherwise(), "nothing was looked at");
    assert_eq!(look(&mut engine), None);
    engine.feed([service_with("one-more", port(83, 8080))]);
    turn(&mut engine, false);
    assert!(!engine.counts_otherwise(), "our own change");
    let gone = kernel.lock().state.virtual_servers.remove(&key).unwrap();
    assert!(engine.counts_otherwise());
    look(&mut engine).unwrap();
    assert!(engine.counts_otherwise(), "it is not back yet");
    kernel.lock().state.virtual_servers.insert(key, gone);
    assert!(!engine.counts_otherwise());
    let theirs = VirtualServerKey { family: Family::V4, mark: Mark(0x7fff_0000) };
    kernel.lock().state.virtual_servers.insert(theirs, foreign_server());
    assert!(engine.counts_otherwise());
    assert_eq!(look(&mut engine), None);
    assert!(!engine.counts_otherwise(), "somebody else's");
    // The kernel counts none of IPv6.
    let theirs = VirtualServerKey { family: Family::V6, ..theirs };
    kernel.lock().state.virtual_servers.insert(theirs, foreign_server());
    assert!(!engine.counts_otherwise());
}

/// The kernel goes by position in its table, and others may change theirs meanwhile; and a list leaves out as many as other network
/// namespaces have.
#[test]
fn what_a_list_leaves_out_is_looked_at_by_itself() {
    let kernel = FakeKernel::default();
    let (mut engine, key) = two(&kernel);
    kernel.lock().left_out.insert(key);
    assert_eq!(look(&mut engine), None);
    kernel.lock().state.virtual_servers.get_mut(&key).unwrap().reals = Arc::default();
    assert!(look(&mut engine).unwrap().contains("destinations"));
    turn(&mut engine, true);
    // Then a stranger may be left out as well.
    let stranger = VirtualServerKey { family: other(key.family), mark: key.mark };
    kernel.lock().left_out.insert(stranger);
    kernel.lock().state.virtual_servers.insert(stranger, foreign_server());
    let found = (0..=60).find_map(|_| look(&mut engine)).unwrap();
    assert!(found.contains("not wanted"), "{found}");
    kernel.lock().state.virtual_servers.remove(&stranger);
    kernel.lock().missed.insert(key);
    assert_eq!(look(&mut engine), None);
    kernel.lock().state.virtual_servers.remove(&key);
    assert!(look(&mut engine).unwrap().contains("missing"));
}

/// Looking at each would be dear, each time.
#[test]
fn a_list_that_leaves_out_many_is_not_asked_for_a_while() {
    let kernel = FakeKernel::default();
    let mut engine = many(&kernel);
    let all: Vec<_> = kernel.lock().state.virtual_servers.keys().copied().collect();
    kernel.lock().left_out.extend(all.clone());
    assert_eq!(look(&mut engine), None);
    kernel.lock().faults.push("list".into());
    for _ in 0..60 {
        assert_eq!(look(&mut engine), None);
    }
    engine.look_at_all().unwrap_err();
    kernel.lock().left_out.clear();
    assert_eq!(look(&mut engine), None);
    kernel.lock().state.virtual_servers.remove(&all[0]);
    assert!(look(&mut engine).unwrap().contains("missing"));
}

/// `ipvsadm -C` is no reason to do without it.
#[test]
fn a_list_is_asked_again_after_all_was_gone() {
    let kernel = FakeKernel::default();
    let mut engine = many(&kernel);
    let all = std::mem::take(&mut kernel.lock().state.virtual_servers);
    assert!(look(&mut engine).unwrap().contains("missing"));
    kernel.lock().state.virtual_servers = all;
    turn(&mut engine, true);
    kernel.lock().faults.push("list".into());
    engine.look_at_all().unwrap_err();
}

#[test]
fn the_rotation_sees_what_a_list_does_not_show() {
    let kernel = FakeKernel::default();
    let (mut engine, key) = two(&kernel);
    kernel.lock().state.virtual_servers.get_mut(&key).unwrap().config.flags = 8;
    assert_eq!(look(&mut engine), None);
    let mut rotation = Rotation::new(1000, 1000, Duration::from_secs(1));
    let found = engine.look_at_some(&mut rotation).unwrap();
    assert_eq!(found, Some(format!("IPVS service {key} is missing or different")));
}

#[test]
fn endpoints_that_come_are_no_drift() {
    let kernel = FakeKernel::default();
    let (mut engine, _) = two(&kernel);
    engine.feed([endpoints("other", &["10.244.1.15", "10.244.1.16"])]);
    turn(&mut engine, false);
    assert_eq!(look(&mut engine), None);
}
