use super::*;
use crate::model::{
    node::MarkMask,
    service::{
        FamilyPolicy, Granted, Mode, Publish, PublishMode, Scheduler, ServicePort, TargetPort,
        TrafficDistribution, TrafficPolicy,
    },
};

pub(super) type Services = BTreeMap<ServiceKey, Arc<Service>>;

pub(super) fn config(v4: &str, publish: std::ops::RangeInclusive<u16>) -> NodeConfig {
    NodeConfig {
        name: "n1".into(),
        ranges: PerFamily { v4: Some(v4.parse().unwrap()), v6: Some("fd00:200::/112".parse().unwrap()) },
        publish_range: publish,
        reserved: vec!["22".parse().unwrap()],
        mask: MarkMask::new(0x3ff).unwrap(),
        zone: None,
    }
}

pub(super) fn wide() -> NodeConfig {
    config("10.200.0.0/16", 30000..=32767)
}

pub(super) fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn service(name: &str) -> Service {
    Service {
        key: key(name),
        mode: Mode::Vip,
        service_name: name.into(),
        vips: vec![],
        families: vec![Family::V4],
        family_policy: FamilyPolicy::SingleStack,
        weights: BTreeMap::new(),
        ports: vec![port(80, None)],
        scheduler: Scheduler::default(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        distribution: TrafficDistribution::Any,
        drain: std::time::Duration::ZERO,
        publish_not_ready: false,
        dns: crate::model::service::Dns::default(),
        created: 0,
        granted: None,
    }
}

pub(super) fn port(port: u16, publish: Option<Option<u16>>) -> ServicePort {
    ServicePort {
        name: None,
        protocol: Protocol::Tcp,
        port,
        end_port: None,
        target: TargetPort::Inferred,
        publish: publish.map(|port| Publish { mode: PublishMode::Ingress, port, addresses: vec![] }),
    }
}

pub(super) fn with(name: &str, change: impl FnOnce(&mut Service)) -> Service {
    let mut service = service(name);
    change(&mut service);
    service
}

pub(super) fn all(services: impl IntoIterator<Item = Service>) -> Services {
    services.into_iter().map(|s| (s.key.clone(), Arc::new(s))).collect()
}

pub(super) fn fresh(services: &Services, config: &NodeConfig) -> Allocator {
    allocate(services, config, Allocations::default(), Lock::default(), BTreeSet::new())
}

fn change(allocator: &mut Allocator, services: &mut Services, new: Service) -> Vec<String> {
    let key = new.key.clone();
    services.insert(key.clone(), Arc::new(new));
    names(allocator.update(&BTreeSet::from([key]), services))
}

fn delete(allocator: &mut Allocator, services: &mut Services, name: &str) -> Vec<String> {
    services.remove(&key(name));
    names(allocator.update(&BTreeSet::from([key(name)]), services))
}

fn names(keys: BTreeSet<ServiceKey>) -> Vec<String> {
    keys.into_iter().map(|k| k.name.to_string()).collect()
}

fn vip(allocator: &Allocator, name: &str) -> Option<String> {
    allocator.get(&key(name))?.vips.v4.map(|vip| vip.to_string())
}

fn published(allocator: &Allocator, name: &str) -> Vec<u16> {
    allocator.get(&key(name)).map_or_else(Vec::new, |a| a.published.values().copied().collect())
}

fn conflicts(allocator: &Allocator, name: &str) -> Vec<String> {
    let allocation = allocator.get(&key(name)).cloned().unwrap_or_default();
    allocation.conflicts.iter().map(ToString::to_string).collect()
}

#[test]
fn the_same_names_get_the_same_values_everywhere() {
    let services = all([with("vote", |s| s.ports = vec![port(80, Some(None))]), service("result")]);
    let allocator = fresh(&services, &wide());
    // Written down: a change here would move every service of every user.
    let vote = allocator.get(&key("vote")).unwrap();
    assert_eq!(
        (
            vip(&allocator, "vote").as_deref(),
            published(&allocator, "vote"),
            vip(&allocator, "result").as_deref()
        ),
        (Some("10.200.245.146"), vec![32052], Some("10.200.255.8"))
    );
    assert_eq!(
        vote.marks[&("80/TCP".parse().unwrap(), Scope::Vip)],
        vote.marks[&("80/TCP".parse().unwrap(), Scope::Ingress)]
    );
}

#[test]
fn explicit_beats_automatic_and_the_first_key_beats_the_others() {
    let config = wide();
    let mut services = all([service("auto")]);
    let mut allocator = fresh(&services, &config);
    let wanted = vip(&allocator, "auto").unwrap();
    let explicit = |name: &str| with(name, |s| s.vips = vec![wanted.parse().unwrap()]);

    assert_eq!(change(&mut allocator, &mut services, explicit("m")), ["auto", "m"]);
    assert_eq!(vip(&allocator, "m"), Some(wanted.clone()));
    let moved = vip(&allocator, "auto").unwrap();
    assert_ne!(moved, wanted);
    assert_eq!(
        conflicts(&allocator, "auto"),
        [format!(
            "virtual IP moved from {wanted} to {moved}, because default/m asks for {wanted} explicitly"
        )]
    );

    assert_eq!(change(&mut allocator, &mut services, explicit("z")), ["z"]);
    assert_eq!(conflicts(&allocator, "z"), [format!("virtual IP {wanted} belongs to default/m")]);
    assert_eq!(vip(&allocator, "z"), None);
    assert_eq!(change(&mut allocator, &mut services, explicit("b")), ["b", "m", "z"]);
    assert_eq!(conflicts(&allocator, "m"), [format!("virtual IP {wanted} belongs to default/b")]);

    // Each heals when the one before it goes.
    assert_eq!(delete(&mut allocator, &mut services, "b"), ["b", "m", "z"]);
    assert_eq!((vip(&allocator, "m"), conflicts(&allocator, "m")), (Some(wanted.clone()), vec![]));
    assert_eq!(delete(&mut allocator, &mut services, "m"), ["m", "z"]);
    assert_eq!(vip(&allocator, "z"), Some(wanted));
    // The one that moved stays where it is.
    delete(&mut allocator, &mut services, "z");
    assert_eq!(vip(&allocator, "auto"), Some(moved));
}

#[test]
fn published_ports_are_unique_per_protocol_and_a_range_is_taken_as_a_whole() {
    let config = wide();
    let mut services = all([
        with("a", |s| s.ports = vec![port(80, Some(Some(8080)))]),
        with("b", |s| s.ports = vec![ServicePort { protocol: Protocol::Udp, ..port(80, Some(Some(8080))) }]),
        with("c", |s| s.ports = vec![ServicePort { end_port: Some(8090), ..port(8070, Some(Some(8070))) }]),
        with("d", |s| s.ports = vec![port(1, Some(Some(8075)))]),
    ]);
    let mut allocator = fresh(&services, &config);
    assert_eq!([published(&allocator, "a"), published(&allocator, "b")], [[8080], [8080]]);
    assert_eq!(
        conflicts(&allocator, "c"),
        ["port 8070/TCP can't be published on 8080/TCP: it belongs to port 80/TCP of default/a"]
    );
    assert_eq!(published(&allocator, "d"), [8075]);
    // The range gets its ports when a goes, and so d loses.
    assert_eq!(delete(&mut allocator, &mut services, "a"), ["a", "c", "d"]);
    assert_eq!((published(&allocator, "c"), published(&allocator, "d")), (vec![8070], vec![]));
    assert_eq!(
        conflicts(&allocator, "d"),
        ["port 1/TCP can't be published on 8075/TCP: it belongs to port 8070/TCP of default/c"]
    );
}

#[test]
fn a_full_range_is_a_condition_that_heals() {
    let config = config("10.200.0.0/29", 30000..=30000); // offsets 3 to 6 are free
    let mut services = all((0..6).map(|i| with(&format!("s{i}"), |s| s.ports = vec![port(80, Some(None))])));
    let mut allocator = fresh(&services, &config);
    let got: BTreeSet<String> = (0..6).filter_map(|i| vip(&allocator, &format!("s{i}"))).collect();
    assert_eq!(got.into_iter().collect::<Vec<_>>(), ["10.200.0.3", "10.200.0.4", "10.200.0.5", "10.200.0.6"]);
    assert_eq!(
        conflicts(&allocator, "s5"),
        [
            "no IPv4 virtual IP is free: delete services or widen the range (--vip-cidr)",
            "no published port is free for 80/TCP: give publish.port or widen the range (--publish-range)"
        ]
    );
    assert_eq!(published(&allocator, "s0"), [30000]);
    assert_eq!(delete(&mut allocator, &mut services, "s0"), ["s0", "s1", "s4"]);
    assert!(vip(&allocator, "s4").is_some());
    assert_eq!(published(&allocator, "s1"), [30000]);
}

#[test]
fn families_follow_the_policy() {
    let mut config = wide();
    let policy = |name: &str, policy| {
        with(name, |s| {
            s.family_policy = policy;
            s.families = vec![Family::V6, Family::V4];
        })
    };
    let services = all([
        policy("single", FamilyPolicy::SingleStack),
        policy("prefer", FamilyPolicy::PreferDualStack),
        policy("require", FamilyPolicy::RequireDualStack),
        with("names", |s| s.mode = Mode::Dnsrr),
    ]);
    let got = |allocator: &Allocator| {
        ["single", "prefer", "require", "names"].map(|n| {
            let vips = allocator.get(&key(n)).unwrap().vips;
            (vips.v4.is_some(), vips.v6.is_some())
        })
    };
    assert_eq!(got(&fresh(&services, &config)), [(false, true), (true, true), (true, true), (false, false)]);
    config.ranges.v4 = None;
    let allocator = fresh(&services, &config);
    assert_eq!(got(&allocator), [(false, true), (false, true), (false, false), (false, false)]);
    assert_eq!(
        conflicts(&allocator, "require"),
        ["no IPv4 VIP range is configured (--vip-cidr), and the service needs one"]
    );
    assert!(allocator.get(&key("require")).unwrap().marks.is_empty());
}

#[test]
fn scopes_share_a_mark_while_their_endpoints_are_the_same() {
    let id: PortId = "80/TCP".parse().unwrap();
    let publish = |s: &mut Service| s.ports = vec![port(80, Some(Some(8080)))];
    let mut services = all([with("s", publish)]);
    let mut allocator = fresh(&services, &wide());
    let marks = |a: &Allocator| a.get(&key("s")).unwrap().marks.clone();
    let shared = marks(&allocator)[&(id, Scope::Vip)];
    assert_eq!(marks(&allocator)[&(id, Scope::Ingress)], shared);

    let local = with("s", |s| {
        publish(s);
        s.external_policy = TrafficPolicy::Local;
    });
    change(&mut allocator, &mut services, local);
    assert_eq!(marks(&allocator)[&(id, Scope::Vip)], shared);
    let own = marks(&allocator)[&(id, Scope::Ingress)];
    assert_ne!(own, shared);

    change(&mut allocator, &mut services, with("s", publish));
    assert_eq!(marks(&allocator)[&(id, Scope::Ingress)], shared);
    assert!(allocator.has_retired_marks());
    // Not published, no VIP: only what is left is kept.
    change(&mut allocator, &mut services, service("s"));
    assert_eq!(marks(&allocator).len(), 1);
    assert_eq!(allocator.allocations().retired_marks, BTreeSet::from([own]));
}

fn commit(allocator: &mut Allocator) -> BTreeSet<ServiceKey> {
    let all = allocator.retired_marks().clone();
    allocator.commit(&all)
}

#[test]
fn a_retired_mark_waits_for_the_kernel_and_then_for_all_others() {
    let config = wide();
    let mut services = all([service("a"), service("b")]);
    let mut allocator = fresh(&services, &config);
    let mark = |a: &Allocator, n: &str| a.get(&key(n)).unwrap().marks.values().next().copied();
    let first = mark(&allocator, "a").unwrap();
    delete(&mut allocator, &mut services, "a");
    let mut seen = BTreeSet::new();
    for i in 0..config.mask.capacity() - 1 {
        let name = format!("n{i}");
        change(&mut allocator, &mut services, service(&name));
        match mark(&allocator, &name) {
            Some(mark) => assert!(mark != first && seen.insert(mark)),
            None => assert_eq!(conflicts(&allocator, &name).len(), 1),
        }
    }
    let last = format!("n{}", config.mask.capacity() - 2);
    assert_eq!(mark(&allocator, &last), None);
    let heal = commit(&mut allocator);
    assert_eq!(names(heal.clone()), [last.as_str()]);
    allocator.update(&heal, &services);
    assert_eq!(mark(&allocator, &last), Some(first));
}

#[test]
fn marks_that_an_edit_made_idle_while_no_agent_ran_are_given_back() {
    let publish = |s: &mut Service| s.ports = vec![port(80, Some(Some(8080)))];
    let local = with("s", |s| {
        publish(s);
        s.external_policy = TrafficPolicy::Local;
    });
    let other = with("t", |s| s.ports = vec![port(80, None)]);
    let first = fresh(&all([local, other.clone()]), &wide());
    let kept = first.allocations();
    assert_eq!(kept.known_marks().len(), 3);
    // The policies are one again, and the other has another port.
    let moved = with("t", |s| s.ports = vec![port(81, None)]);
    let services = all([with("s", publish), moved]);
    let mut again = allocate(&services, &wide(), kept, Lock::default(), BTreeSet::new());
    assert_eq!(again.retired_marks().len(), 2);
    commit(&mut again);
    assert_eq!(again.allocations().known_marks().len(), 2);
}

#[test]
fn survives_a_restart_and_marks_of_others() {
    let config = wide();
    let mut services = all((0..50).map(|i| with(&format!("s{i}"), |s| s.ports = vec![port(80, Some(None))])));
    let mut allocator = fresh(&services, &config);
    delete(&mut allocator, &mut services, "s7");
    let kept = allocator.allocations();
    let text = serde_json::to_string(&kept).unwrap();
    let kept: Allocations = serde_json::from_str(&text).unwrap();
    services.insert(key("s99"), Arc::new(service("s99")));
    let again = allocate(&services, &config, kept.clone(), Lock::default(), BTreeSet::new());
    for name in services.keys().filter(|k| **k != key("s99")) {
        assert_eq!(again.get(name), allocator.get(name), "{name}");
    }
    assert_eq!(again.allocations().retired_marks, kept.retired_marks);

    let stolen = *again.get(&key("s3")).unwrap().marks.values().next().unwrap();
    let mut again = again;
    let affected = again.set_foreign_marks(BTreeSet::from([stolen]));
    assert_eq!(names(affected.clone()), ["s3"]);
    assert_eq!(names(again.update(&affected, &services)), ["s3"]);
    assert!(again.get(&key("s3")).unwrap().marks.values().all(|m| *m != stolen));
}

#[test]
fn the_lock_file_settles_collisions() {
    let config = config("10.200.0.0/27", 30000..=30063);
    let mut services =
        all((0..12).map(|i| with(&format!("s{i:02}"), |s| s.ports = vec![port(80, Some(None))])));
    // One after the other, backwards: history decides.
    let mut one_by_one = fresh(&Services::new(), &config);
    for (key, _) in services.iter().rev() {
        one_by_one.update(&BTreeSet::from([key.clone()]), &services);
    }
    assert!(!one_by_one.unsettled().is_empty());
    let lock = Lock::parse(&Lock::of(&services, &one_by_one).to_text().unwrap()).unwrap();
    let locked = allocate(&services, &config, Allocations::default(), lock.clone(), BTreeSet::new());
    for key in services.keys() {
        let (a, b) = (locked.get(key).unwrap(), one_by_one.get(key).unwrap());
        assert_eq!((a.vips, &a.published), (b.vips, &b.published));
    }
    assert!(locked.unsettled().is_empty());
    assert_eq!(Lock::of(&services, &locked), lock);

    // A manifest beats it, and a locked value is kept for a service that is away.
    let mut locked = locked;
    let theirs = vip(&locked, "s03").unwrap();
    change(&mut locked, &mut services, with("x", |s| s.vips = vec![theirs.parse().unwrap()]));
    assert_eq!(vip(&locked, "x"), Some(theirs.clone()));
    assert!(vip(&locked, "s03").is_some_and(|v| v != theirs));
    let told = conflicts(&locked, "s03")
        .iter()
        .any(|c| c.contains(&format!("not virtual IP {theirs} as meshlb.lock")));
    assert!(told, "{:?}", conflicts(&locked, "s03"));
    delete(&mut locked, &mut services, "x");
    assert_eq!((vip(&locked, "s03"), conflicts(&locked, "s03")), (Some(theirs), vec![]));
    let free = vip(&locked, "s05").unwrap();
    delete(&mut locked, &mut services, "s05");
    for i in 0..40 {
        change(&mut locked, &mut services, service(&format!("y{i}")));
        assert_ne!(vip(&locked, &format!("y{i}")), Some(free.clone()));
    }
    change(&mut locked, &mut services, service("s05"));
    assert_eq!(vip(&locked, "s05"), Some(free));
}

#[test]
fn what_a_service_had_waits_for_it() {
    let config = config("10.200.0.0/28", 30000..=30003);
    let mut services = all(["a", "b"].map(|n| with(n, |s| s.ports = vec![port(80, Some(None))])));
    let before = fresh(&services, &config);
    // A restart where a's manifest can't be read yet; meanwhile others come in plenty.
    let a = services.remove(&key("a")).unwrap();
    let mut allocator = allocate(&services, &config, before.allocations(), Lock::default(), BTreeSet::new());
    for i in 0..20 {
        change(
            &mut allocator,
            &mut services,
            with(&format!("n{i}"), |s| s.ports = vec![port(80, Some(None))]),
        );
    }
    let mut forgetful =
        allocate(&services, &config, allocator.allocations(), Lock::default(), BTreeSet::new());
    change(&mut allocator, &mut services, (*a).clone());
    for name in ["a", "b"] {
        assert_eq!(allocator.get(&key(name)), before.get(&key(name)));
    }
    // When it is known to be gone, others may have it.
    services.remove(&key("a"));
    assert_eq!(forgetful.remembered().count(), 1);
    forgetful.forget(&BTreeSet::from([key("a")]));
    forgetful.update(&BTreeSet::from([key("n0")]), &services);
    let had = before.get(&key("a")).unwrap();
    assert!(forgetful.iter().any(|(_, a)| a.vips == had.vips));
    assert!(forgetful.iter().any(|(_, a)| a.published == had.published));
}

/// Work is in proportion to what changes: shown by time, generously.
#[test]
fn ten_thousand_services() {
    let mut config = wide();
    config.mask = MarkMask::default();
    let mut services = all((0..10_000).map(|i| service(&format!("s{i}"))));
    let mut allocator = fresh(&services, &config);
    let start = std::time::Instant::now();
    for i in 0..1000 {
        let name = format!("s{}", i * 7);
        delete(&mut allocator, &mut services, &name);
        change(&mut allocator, &mut services, service(&name));
    }
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn marks_that_run_out_are_told_and_given_when_one_is_free() {
    let config = wide();
    // From 0x100 to the sentinel.
    let room = 0x3ff - 0x100;
    let mut services = all((0..=room).map(|n| service(&format!("s{n:04}"))));
    let mut allocator = fresh(&services, &config);
    let without = |allocator: &Allocator| -> Vec<String> {
        let none = |n: &u32| !conflicts(allocator, &format!("s{n:04}")).is_empty();
        (0..=room).filter(none).map(|n| format!("s{n:04}")).collect()
    };
    let poor = without(&allocator);
    assert_eq!(poor.len(), 1, "{poor:?}");
    assert!(conflicts(&allocator, &poor[0])[0].contains("mark"), "{:?}", conflicts(&allocator, &poor[0]));
    let rich = services.keys().map(|key| key.name.to_string()).find(|name| *name != poor[0]).unwrap();
    delete(&mut allocator, &mut services, &rich);
    // Not before the kernel no longer has it.
    assert_eq!(without(&allocator), poor);
    let due = commit(&mut allocator);
    assert_eq!(names(allocator.update(&due, &services)), poor);
    assert_eq!(without(&allocator), Vec::<String>::new());
}

#[test]
fn a_port_whose_number_is_edited_keeps_its_published_port() {
    let web = |ports: Vec<ServicePort>| with("web", |s| s.ports = ports);
    let mut services = all([web(vec![port(80, Some(None)), port(90, Some(Some(31000)))])]);
    let changed = BTreeSet::from([key("web")]);
    let mut mesh = Allocator::for_mesh(wide(), Allocations::default());
    mesh.update(&changed, &services);
    let before = published(&mesh, "web");
    let edited = || web(vec![port(81, Some(None)), port(91, Some(Some(31000)))]);
    change(&mut mesh, &mut services, edited());
    assert_eq!(published(&mesh, "web"), before);
    // The controller that comes next knows it from the status, which may be of before the edit.
    let numbers = |number| PortId { port: number, protocol: Protocol::Tcp };
    let had = BTreeMap::from([(numbers(80), before[0]), (numbers(90), 31000)]);
    let kept = Kept { published: had.clone(), ..Kept::default() };
    let previous = Allocations { services: [(key("web"), kept)].into(), ..Allocations::default() };
    let mut next = Allocator::for_mesh(wide(), previous);
    next.update(&changed, &services);
    assert_eq!(published(&next, "web"), before);
    // An agent goes by the same status until there is another one.
    let granted = Granted { vips: PerFamily::default(), published: had };
    let mut at_node = all([Service { granted: Some(granted), ..edited() }]);
    let mut agent = fresh(&at_node, &wide());
    assert_eq!(published(&agent, "web"), before);
    // Two that come for one that went: nobody knows whose it was. Another number that is named has to be granted first.
    let two = web(vec![port(82, Some(None)), port(83, Some(None)), port(91, Some(Some(31001)))]);
    let granted = at_node[&key("web")].granted.clone();
    change(&mut agent, &mut at_node, Service { granted, ..two.clone() });
    assert_eq!(published(&agent, "web"), Vec::<u16>::new());
    change(&mut mesh, &mut services, two);
    assert_eq!(published(&mesh, "web").len(), 3);
}

#[test]
fn what_is_granted_is_had_and_nothing_else() {
    let granted = |vip: Option<&str>, number: Option<u16>| {
        let mut out = crate::model::service::Granted::default();
        out.vips.v4 = vip.map(|vip| vip.parse().unwrap());
        out.published.extend(number.map(|n| ("80/TCP".parse().unwrap(), n)));
        Some(out)
    };
    let web = |granted| {
        with("web", |s| {
            s.vips = vec!["10.200.1.1".parse().unwrap()];
            s.ports = vec![port(80, Some(Some(30080)))];
            s.granted = granted;
        })
    };
    let mut services = all([web(granted(None, None))]);
    let mut allocator = fresh(&services, &wide());
    // Its manifest asks, but somebody else may have it.
    assert_eq!((vip(&allocator, "web"), published(&allocator, "web")), (None, vec![]));
    assert!(conflicts(&allocator, "web").is_empty());
    change(&mut allocator, &mut services, web(granted(Some("10.200.2.2"), Some(31000))));
    assert_eq!(vip(&allocator, "web").as_deref(), Some("10.200.2.2"));
    assert_eq!(published(&allocator, "web"), [31000]);
}
