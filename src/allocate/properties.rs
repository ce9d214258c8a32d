//! What must hold for any services, in any order of changes.

use proptest::prelude::*;

use super::{
    tests::{Services, all, config, fresh, key, port, wide, with},
    *,
};
use crate::model::service::{Mode, TrafficPolicy};

// What a random service of a small world looks like.
#[derive(Clone, Debug)]
struct Spec {
    vip: Option<u8>,
    dnsrr: bool,
    publish: Option<Option<u16>>,
    span: u16,
    local: bool,
}

fn spec() -> impl Strategy<Value = Spec> {
    (
        proptest::option::weighted(0.3, 3_u8..30),
        prop::bool::weighted(0.1),
        proptest::option::weighted(0.7, proptest::option::weighted(0.5, 100_u16..130)),
        prop_oneof![3 => Just(1_u16), 1 => 2_u16..8],
        any::<bool>(),
    )
        .prop_map(|(vip, dnsrr, publish, span, local)| Spec { vip, dnsrr, publish, span, local })
}

fn make(name: u8, spec: &Spec) -> Service {
    with(&format!("s{name:02}"), |s| {
        s.vips = spec.vip.map(|n| format!("10.200.0.{n}").parse().unwrap()).into_iter().collect();
        if spec.dnsrr {
            (s.mode, s.vips) = (Mode::Dnsrr, vec![]);
        }
        s.ports = vec![port(80, spec.publish)];
        if let Some(Some(first)) = spec.publish
            && spec.span > 1
        {
            s.ports[0].port = first;
            s.ports[0].end_port = Some(first + spec.span - 1);
        }
        if spec.local {
            s.external_policy = TrafficPolicy::Local;
        }
    })
}

fn steps() -> impl Strategy<Value = Vec<Vec<(u8, Option<Spec>)>>> {
    let step = proptest::collection::vec((0_u8..24, proptest::option::weighted(0.8, spec())), 1..6);
    proptest::collection::vec(step, 1..14)
}

fn apply(services: &mut Services, step: &[(u8, Option<Spec>)]) -> BTreeSet<ServiceKey> {
    step.iter()
        .map(|(name, spec)| {
            let key = key(&format!("s{name:02}"));
            match spec {
                Some(spec) => drop(services.insert(key.clone(), Arc::new(make(*name, spec)))),
                None => drop(services.remove(&key)),
            }
            key
        })
        .collect()
}

fn small() -> NodeConfig {
    config("10.200.0.0/27", 100..=120)
}

/// Everything that must hold at any time.
fn check(allocator: &Allocator, services: &Services) {
    let mut vips = HashMap::new();
    let mut ports = HashMap::new();
    let mut marks: HashMap<Mark, (ServiceKey, PortId)> = HashMap::new();
    assert_eq!(allocator.iter().count(), services.len());
    for (key, allocation) in allocator.iter() {
        let service = &services[key];
        for (_, vip) in allocation.vips.iter() {
            assert!(vips.insert(*vip, key.clone()).is_none(), "{vip} twice");
            assert!(service.vips.is_empty() || service.vips.contains(vip));
            assert!(
                !["10.200.0.0", "10.200.0.1", "10.200.0.2", "10.200.0.31"]
                    .contains(&vip.to_string().as_str())
            );
        }
        assert_eq!(
            allocation.vips.is_empty(),
            service.mode == Mode::Dnsrr
                || allocation.conflicts.iter().any(|c| c.reason().starts_with("VIP") && c.is_blocking()),
        );
        for p in &service.ports {
            let publish = p.publish.as_ref();
            let got = allocation.published.get(&p.id());
            let lost =
                allocation.conflicts.iter().any(|c| c.reason().starts_with("Published") && c.is_blocking());
            assert_eq!(got.is_some(), publish.is_some() && !lost, "{key} {allocation:?}");
            for n in got.into_iter().flat_map(|n| *n..*n + p.span()) {
                assert!(ports.insert(n, key.clone()).is_none(), "port {n} twice");
            }
            if let (Some(got), Some(asked)) = (got, publish.and_then(|p| p.port)) {
                assert_eq!(*got, asked);
            }
        }
        for ((port, _), mark) in &allocation.marks {
            let owner = marks.entry(*mark).or_insert_with(|| (key.clone(), *port));
            assert_eq!(*owner, (key.clone(), *port), "{mark} twice");
        }
    }
    // Who loses an explicit value loses it to an explicit value of an earlier key.
    for (key, allocation) in allocator.iter() {
        for conflict in &allocation.conflicts {
            match conflict {
                Conflict::VipTaken { vip, by } => assert!(by < key && vips.get(vip) == Some(by)),
                Conflict::PortTaken { number, by, .. } => assert!(by < key && ports.get(number) == Some(by)),
                _ => {}
            }
        }
    }
}

/// Explicit values only: these never depend on history.
fn firm(allocator: &Allocator, services: &Services) -> Vec<(ServiceKey, Option<IpAddr>, Vec<u16>)> {
    services
        .iter()
        .map(|(key, s)| {
            let a = allocator.get(key).unwrap();
            let vip = a.vips.v4.filter(|vip| s.vips.contains(vip));
            let asked = s.ports[0].publish.as_ref().and_then(|p| p.port);
            (key.clone(), vip, a.published.values().copied().filter(|n| Some(*n) == asked).collect())
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn holds_at_any_time(steps in steps(), commits in any::<u16>()) {
        let mut services = Services::new();
        let mut allocator = fresh(&services, &small());
        let mut twin = fresh(&services, &small());
        for (i, step) in steps.iter().enumerate() {
            let before: HashMap<_, _> = allocator.iter().map(|(k, a)| (k.clone(), a.clone())).collect();
            let retired = allocator.allocations().retired_marks;
            let old = services.clone();
            let changed = apply(&mut services, step);
            let different = allocator.update(&changed, &services);
            check(&allocator, &services);

            // Determinism, and an exact answer to "what changed".
            prop_assert_eq!(&twin.update(&changed, &services), &different);
            prop_assert_eq!(twin.allocations(), allocator.allocations());
            for key in services.keys().chain(old.keys()) {
                prop_assert_eq!(before.get(key) != allocator.get(key), different.contains(key), "{}", key);
            }
            // Whoever did not change keeps its values, unless a manifest asks for them.
            for (key, service) in services.iter().filter(|(k, _)| !changed.contains(*k)) {
                let (was, is) = (&before[key], allocator.get(key).unwrap());
                prop_assert_eq!(&was.marks, &is.marks);
                if was.vips != is.vips && service.vips.is_empty() && !was.vips.is_empty() {
                    let taken = was.vips.v4.unwrap();
                    prop_assert!(services.values().any(|s| s.vips.contains(&taken)));
                }
            }
            // No mark that somebody had before this step turns up elsewhere in it.
            for (key, allocation) in allocator.iter() {
                for (at, mark) in &allocation.marks {
                    prop_assert!(!retired.contains(mark));
                    let others = before.iter().filter(|(k, _)| *k != key);
                    prop_assert!(others.flat_map(|(_, a)| a.marks.values()).all(|m| m != mark), "{:?}", at);
                }
            }
            if commits & (1 << (i % 16)) != 0 {
                let all = allocator.retired_marks().clone();
                allocator.commit(&all);
                twin.commit(&twin.retired_marks().clone());
            }
            // What manifests ask for by number is as if all had come at once.
            let at_once = fresh(&services, &small());
            prop_assert_eq!(firm(&allocator, &services), firm(&at_once, &services));
            // A restart changes nothing.
            let restarted = allocate(&services, &small(), allocator.allocations(), Lock::default(), BTreeSet::new());
            for key in services.keys() {
                let (a, b) = (allocator.get(key).unwrap(), restarted.get(key).unwrap());
                prop_assert_eq!((a.vips, &a.published, &a.marks), (b.vips, &b.published, &b.marks));
            }
        }
    }

    #[test]
    fn order_does_not_matter_where_nothing_collides(
        names in proptest::collection::btree_set("[a-z]{1,8}", 1..20), seed in any::<u64>(),
    ) {
        let services = all(names.iter().map(|n| with(n, |s| s.ports = vec![port(80, Some(None))])));
        let at_once = fresh(&services, &wide());
        prop_assume!(at_once.unsettled().is_empty());
        let mut order: Vec<&ServiceKey> = services.keys().collect();
        order.sort_by_key(|k| hash::stable(&format!("{seed}{k}")));
        let mut one_by_one = fresh(&Services::new(), &wide());
        for key in order {
            one_by_one.update(&BTreeSet::from([key.clone()]), &services);
        }
        for key in services.keys() {
            let (a, b) = (at_once.get(key).unwrap(), one_by_one.get(key).unwrap());
            prop_assert_eq!((a.vips, &a.published), (b.vips, &b.published));
        }
    }
}
