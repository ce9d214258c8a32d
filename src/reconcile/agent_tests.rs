//! The loop on a kernel in memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{
    Drift, Engine, Turn,
    agent::{Agent, Input, Observer, Pace, services_pause},
    tests::{endpoints, engine, vote},
};
use crate::{
    allocate::Allocations,
    dataplane::fake::FakeKernel,
    model::{ids::ServiceKey, refusal::Refusal, unread::Unread},
    plan::Op,
};

/// What the loop told.
#[derive(Default)]
struct Told {
    turns: Vec<(bool, usize, usize)>,
    failed: Vec<String>,
    drift: Vec<String>,
    drifted: Drift,
    in_sync: bool,
    refuse: bool,
    refused: BTreeMap<ServiceKey, Refusal>,
}

#[derive(Clone, Default)]
struct Ear(Arc<Mutex<Told>>);

impl Observer for Ear {
    fn before_apply(&mut self, _: &Engine, _: &[Op]) -> Result<(), String> {
        if std::mem::take(&mut self.0.lock().unwrap().refuse) {
            Err("no room for the state".into())
        } else {
            Ok(())
        }
    }

    fn after_turn(&mut self, _: &Engine, turn: &Turn, _: Option<Instant>) {
        self.0.lock().unwrap().turns.push((turn.full, turn.ops.len(), turn.failures.len()));
    }

    fn turn_failed(&mut self, _: &Engine, error: &str) {
        self.0.lock().unwrap().failed.push(error.into());
    }

    fn drift(&mut self, what: &str) {
        self.0.lock().unwrap().drift.push(what.into());
    }

    fn drifted(&mut self, drift: &Drift) {
        self.0.lock().unwrap().drifted.extend(drift);
    }

    fn refused(&mut self, services: BTreeMap<ServiceKey, Refusal>) {
        self.0.lock().unwrap().refused = services;
    }

    fn heartbeat(&mut self, _: &Engine, synced: bool, in_sync: bool) {
        self.0.lock().unwrap().in_sync = synced && in_sync;
    }
}

struct Running {
    ear: Ear,
    inputs: mpsc::Sender<Input>,
    /// Ends with whether it was asked to.
    thread: thread::JoinHandle<bool>,
}

fn run(kernel: &FakeKernel, make: fn(&FakeKernel, Allocations) -> Engine) -> Running {
    let (inputs, receiver) = mpsc::channel();
    let ear = Ear::default();
    let (kernel, told) = (kernel.clone(), ear.clone());
    let thread = thread::spawn(move || {
        let engine = make(&kernel, Allocations::default());
        let pace = Pace { resync: Duration::from_secs(3600), probe: Duration::from_millis(20) };
        Agent::new(engine, told, pace).run(&receiver)
    });
    Running { ear, inputs, thread }
}

impl Running {
    fn until(&self, what: &str, f: impl Fn(&Told) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !f(&self.ear.0.lock().unwrap()) {
            assert!(Instant::now() < end, "not within 20 s: {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn stop(self) {
        self.inputs.send(Input::Stop).unwrap();
        assert!(self.thread.join().unwrap());
    }
}

#[test]
fn who_hears_nothing_of_the_source_any_more_ends_to_be_started_anew() {
    let agent = run(&FakeKernel::default(), vote);
    agent.inputs.send(Input::Synced(Unread::default())).unwrap();
    agent.until("in sync", |told| told.in_sync);
    agent.inputs.send(Input::SourceLost).unwrap();
    assert!(!agent.thread.join().unwrap());
}

#[test]
fn what_this_node_alone_refuses_is_passed_on() {
    let agent = run(&FakeKernel::default(), vote);
    let refusal = Refusal { generation: 2, why: "spec.later".to_owned() };
    let services = BTreeMap::from([(ServiceKey::new("default", "later"), refusal)]);
    agent.inputs.send(Input::Refused(services.clone())).unwrap();
    agent.until("it is told", |told| told.refused == services);
    agent.stop();
}

#[test]
fn nothing_is_done_before_the_source_has_synced() {
    let kernel = FakeKernel::default();
    let agent = run(&kernel, engine);
    agent.inputs.send(Input::Events(vec![endpoints("vote", &["10.244.1.11"])], Instant::now())).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert!(agent.ear.0.lock().unwrap().turns.is_empty());
    assert_eq!(kernel.lock().writes, 0);
    agent.inputs.send(Input::Synced(Unread::default())).unwrap();
    agent.until("in sync", |told| told.in_sync);
    agent.stop();
}

#[test]
fn what_fails_is_tried_again_until_it_is_done() {
    let kernel = FakeKernel::default();
    for fault in ["read rules", "read services", "install", "-> 10.244.1.12:8080", "route"] {
        kernel.lock().faults.push(fault.into());
    }
    let agent = run(&kernel, vote);
    agent.ear.0.lock().unwrap().refuse = true;
    agent.inputs.send(Input::Synced(Unread::default())).unwrap();
    agent.until("in sync", |told| told.in_sync);
    assert_eq!(kernel.lock().faults, Vec::<String>::new());
    let told = agent.ear.0.lock().unwrap();
    assert!(told.failed.iter().any(|e| e.contains("injected: read rules")), "{:?}", told.failed);
    assert!(told.failed.iter().any(|e| e.contains("no room for the state")), "{:?}", told.failed);
    assert!(told.turns.iter().any(|(_, _, failures)| *failures > 0), "{:?}", told.turns);
    assert_eq!(told.turns.last().map(|(full, _, failures)| (*full, *failures)), Some((true, 0)));
    drop(told);
    agent.stop();
}

#[test]
fn what_the_cheap_look_finds_is_healed_and_a_failed_look_is_repeated() {
    let kernel = FakeKernel::default();
    let agent = run(&kernel, vote);
    agent.inputs.send(Input::Synced(Unread::default())).unwrap();
    agent.until("in sync", |told| told.in_sync);
    let good = kernel.lock().state.clone();
    // The rules.
    {
        let mut inner = kernel.lock();
        inner.state.elements.clear();
        inner.changed = Some("a set was emptied".into());
        inner.faults.push("probe".into());
    }
    agent.until("healed", |told| told.drift.iter().any(|d| d == "a set was emptied"));
    agent.until("counted", |told| told.drifted.contains_key("set_element"));
    // It is counted before it is healed.
    agent.until("as before", |told| told.in_sync && kernel.lock().state == good);
    // IPVS, found by the look at services or destinations.
    kernel.lock().state.virtual_servers.clear();
    agent.until("healed", |told| told.drifted.contains_key("ipvs_service"));
    agent.until("as before", |told| {
        told.in_sync && kernel.lock().state.virtual_servers == good.virtual_servers
    });
    // A service that goes afterwards goes all the same.
    let gone = crate::model::snapshot::Event::ServiceGone(ServiceKey::new("default", "vote"));
    agent.inputs.send(Input::Events(vec![gone], Instant::now())).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while kernel.lock().state.virtual_servers.values().any(|s| !s.reals.is_empty()) {
        assert!(Instant::now() < end, "the service is still there");
        thread::sleep(Duration::from_millis(5));
    }
    agent.stop();
}

#[test]
fn what_is_taken_away_is_put_back_at_once_though_something_fails_each_time() {
    let kernel = FakeKernel::default();
    kernel.lock().impossible.push("scheduler lc".into());
    let agent = run(&kernel, vote);
    let odd = crate::model::service::Service {
        ports: vec![crate::model::fixtures::port(90, 8080)],
        scheduler: crate::model::service::Scheduler { name: "lc".into(), flags: 0 },
        ..crate::model::fixtures::service("odd")
    };
    let events = vec![crate::model::snapshot::Event::Service(odd.into()), endpoints("odd", &["10.244.1.15"])];
    agent.inputs.send(Input::Events(events, Instant::now())).unwrap();
    agent.inputs.send(Input::Synced(Unread::default())).unwrap();
    // By then the next try of what fails is seconds away.
    agent.until("several tries", |told| {
        told.turns.iter().filter(|(_, _, failures)| *failures > 0).count() >= 6
    });
    // Another change that fails once, and a look, have not to wait for that.
    for fault in ["-> 10.244.1.16:8080", "probe"] {
        kernel.lock().faults.push(fault.into());
        let events = vec![endpoints("vote", &["10.244.1.11", "10.244.1.12", "10.244.1.16"])];
        agent.inputs.send(Input::Events(events, Instant::now())).unwrap();
        let begun = Instant::now();
        let there = |kernel: &FakeKernel| {
            let inner = kernel.lock();
            let mut reals = inner.state.virtual_servers.values().flat_map(|server| server.reals.keys());
            inner.faults.is_empty() && reals.any(|real| real.addr.to_string() == "10.244.1.16")
        };
        while !there(&kernel) {
            assert!(begun.elapsed() < Duration::from_millis(1500), "{fault}: not made good");
            thread::sleep(Duration::from_millis(5));
        }
    }
    let whole = kernel.lock().state.elements.clone();
    {
        let mut inner = kernel.lock();
        inner.state.elements.clear();
        inner.changed = Some("all of it".into());
    }
    let begun = Instant::now();
    while kernel.lock().state.elements != whole {
        assert!(begun.elapsed() < Duration::from_millis(1500), "not put back");
        thread::sleep(Duration::from_millis(5));
    }
    agent.stop();
}

/// What is gone is seen within four seconds and a probe's one where looking takes no longer than on a core of today.
#[test]
fn looking_at_all_services_takes_less_than_a_percent_of_a_core() {
    for micros in [10, 500, 3000, 15_000, 25_000, 33_000, 34_000, 280_000] {
        let took = Duration::from_micros(micros);
        let pause = services_pause(took);
        let most = if micros <= 33_000 { 0.0085 } else { 0.005 };
        assert!(took.as_secs_f64() / (pause + took).as_secs_f64() < most, "{took:?}");
        assert!(pause <= Duration::from_secs(4) || micros > 33_000, "{took:?}");
    }
}
