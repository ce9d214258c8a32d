mod wrong;

use serde_json::{Value, json};

use super::{
    headless::Wanted,
    mesh::{Core, Mesh, Meta},
    nodes::Said,
    numbers::Numbers,
    order,
    pools::{PoolId, Used},
    status::{gives_up, news},
};
use crate::{
    api::status::{MeshServiceStatus, PortStatus},
    meshnode::{Fault, Report, State},
    model::{
        endpoints::{Endpoint, Slice, SlicePort},
        fixtures::{self, config},
        ids::{Family, Protocol, ServiceKey},
    },
};

fn now() -> jiff::Timestamp {
    jiff::Timestamp::from_second(1_800_000_000).unwrap()
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

/// MeshServices as an API server would keep them.
#[derive(Default)]
struct Stored(std::collections::BTreeMap<String, (Meta, Value)>);

impl Stored {
    fn apply(&mut self, name: &str, created: u64, spec: Value) {
        let version = self.0.get(name).map_or(1, |(meta, _)| meta.generation.unwrap() + 1);
        let status = self.0.get(name).map_or(Value::Null, |(_, value)| value["status"].clone());
        let meta = Meta {
            uid: format!("uid-{name}"),
            resource_version: format!("{}", 100 * version),
            generation: Some(version),
            created,
        };
        let value = json!({"apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService",
            "metadata": {"name": name, "namespace": "default"}, "spec": spec, "status": status});
        self.0.insert(name.to_owned(), (meta, value));
    }

    /// What a controller that has just begun to lead knows.
    fn mesh(&self, entered: &Used) -> Mesh {
        let mut mesh = Mesh::new(config());
        node(&mut mesh, &[]);
        for name in self.0.keys() {
            self.show(name, &mut mesh);
        }
        mesh.begin(entered);
        mesh.allocate();
        mesh
    }

    fn show(&self, name: &str, mesh: &mut Mesh) {
        let (meta, value) = &self.0[name];
        mesh.put_service(&key(name), meta.clone(), value.clone());
    }

    /// Writes all statuses that are not as they should be; returns whose.
    fn write(&mut self, mesh: &mut Mesh) -> Vec<String> {
        mesh.allocate();
        let dirty: Vec<ServiceKey> = mesh.dirty().cloned().collect();
        let mut written = Vec::new();
        for key in dirty {
            let status = mesh.desired(&key, now()).unwrap();
            if status != mesh.entry(&key).unwrap().status {
                self.0.get_mut(&*key.name).unwrap().1["status"] = serde_json::to_value(&status).unwrap();
                written.push(key.name.to_string());
            }
            mesh.written(&key, status, None);
        }
        written
    }

    fn status(&self, name: &str) -> MeshServiceStatus {
        serde_json::from_value(self.0[name].1["status"].clone()).unwrap()
    }

    fn vip(&self, name: &str) -> String {
        self.status(name).vips.first().map(|vip| vip.0.clone()).unwrap_or_default()
    }

    fn condition(&self, name: &str, type_: &str) -> String {
        let status = self.status(name);
        let c = status.conditions.iter().find(|c| c.type_ == type_).unwrap();
        format!("{} {}: {}", c.status, c.reason, c.message)
    }
}

/// A node with an agent, on which these services fail.
fn node(mesh: &mut Mesh, failing: &[&str]) {
    let fault =
        |name: &&str| (key(name), Fault { reason: "PublishedPortHeld", message: "it is held".into() });
    let named: Vec<_> = failing.iter().map(fault).collect();
    let report = Report { count: named.len(), named, ..Report::of(State::Serving) };
    mesh.put_node("n1", Some("uid-n1".into()));
    mesh.put_said("n1", Some(Said::new(Some("uid-n1".into()), &report.status(None, now()))));
}

fn plain() -> Value {
    json!({"ports": [{"port": 80, "publish": {}}]})
}

#[test]
fn what_was_given_is_kept_by_the_next_leader() {
    let mut stored = Stored::default();
    for name in ["a", "b", "c"] {
        stored.apply(name, 1, plain());
    }
    let mut mesh = stored.mesh(&Used::new());
    assert_eq!(stored.write(&mut mesh), ["a", "b", "c"]);
    assert_eq!(stored.condition("a", "Accepted"), "True Accepted: the spec is valid");
    assert!(stored.condition("a", "Ready").starts_with("False NoEndpoints: there is no Service default/a"));
    let vips: std::collections::BTreeSet<String> = ["a", "b", "c"].map(|n| stored.vip(n)).into();
    assert_eq!(vips.len(), 3, "{vips:?}");
    let used = mesh.used();
    let mut next = stored.mesh(&used);
    assert!(!next.has_orphans());
    assert!(stored.write(&mut next).is_empty());
    assert_eq!(next.used(), used);
}

#[test]
fn of_two_explicit_claims_the_older_wins() {
    let mut stored = Stored::default();
    let explicit = json!({"vips": ["10.200.9.9"], "ports": [{"port": 80}]});
    stored.apply("a", 20, explicit.clone());
    stored.apply("b", 10, explicit);
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    assert_eq!(stored.vip("b"), "10.200.9.9");
    assert_eq!(
        stored.condition("a", "Allocated"),
        "False VIPTaken: virtual IP 10.200.9.9 belongs to default/b"
    );
    // It heals by itself.
    stored.0.remove("b");
    mesh.remove_service(&key("b"));
    assert_eq!(stored.write(&mut mesh), ["a"]);
    assert_eq!(stored.vip("a"), "10.200.9.9");
}

#[test]
fn numbers_that_an_earlier_leader_entered_are_given_to_nobody_at_first() {
    let mut stored = Stored::default();
    stored.apply("a", 1, plain());
    let mut mesh = stored.mesh(&Used::new());
    // It dies when the pools are written and the status is not.
    let entered = mesh.used();
    let number = |mesh: &Mesh| mesh.used()[&PoolId::Vips(Family::V4)].clone();
    let first = number(&mesh);
    let mut next = stored.mesh(&entered);
    assert!(next.has_orphans());
    stored.write(&mut next);
    assert_ne!(number(&next), first, "the number may still be on its way into the status");
    next.free_orphans();
    assert!(!next.has_orphans());
    // From here on it is free again: as the hash of the same name asks for it, a new service of that name gets it.
    stored.0.clear();
    next.remove_service(&key("a"));
    next.allocate();
    stored.apply("a", 2, plain());
    stored.show("a", &mut next);
    stored.write(&mut next);
    assert_eq!(number(&next), first);
    mesh.allocate();
}

#[test]
fn node_ports_of_core_services_are_refused_by_name() {
    let mut stored = Stored::default();
    stored.apply("a", 1, json!({"ports": [{"port": 80, "publish": {"port": 30080}}]}));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").ports[0].published_port, Some(30080));
    let core =
        Core { uid: "x".into(), owner: None, node_ports: vec![(Protocol::Tcp, 30080)], ..Core::default() };
    mesh.put_core(&ServiceKey::new("default", "other"), Some(core));
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").ports[0].published_port, None);
    let message = stored.condition("a", "Allocated");
    assert!(message.contains("PublishedPortTaken") && message.contains("Service default/other"), "{message}");
    mesh.put_core(&ServiceKey::new("default", "other"), None);
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").ports[0].published_port, Some(30080));
}

#[test]
fn why_there_can_be_no_endpoints_is_said() {
    let mut stored = Stored::default();
    stored.apply("a", 1, json!({"serviceName": "web", "ports": [{"port": 80}]}));
    stored.apply("b", 1, json!({"selector": {"app": "b"}, "ports": [{"port": 80}]}));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let ready = stored.condition("a", "Ready");
    assert!(ready.starts_with("False NoEndpoints: there is no Service default/web"), "{ready}");
    assert_eq!(stored.condition("b", "Ready"), "False NoEndpoints: there are no endpoints");
    let core = |external_name| Some(Core { uid: "x".into(), external_name, ..Core::default() });
    mesh.put_core(&key("web"), core(true));
    assert_eq!(stored.write(&mut mesh), ["a"]);
    let ready = stored.condition("a", "Ready");
    assert!(ready.contains("default/web is of type ExternalName"), "{ready}");
    mesh.put_core(&key("web"), core(false));
    assert_eq!(stored.write(&mut mesh), ["a"]);
    assert_eq!(stored.condition("a", "Ready"), "False NoEndpoints: there are no endpoints");
    // Slices can be somebody's who has no Service.
    let slice = |endpoints| Slice {
        key: key("w"),
        service_name: "web".into(),
        family: Family::V4,
        ports: vec![],
        endpoints,
    };
    mesh.put_core(&key("web"), None);
    mesh.put_slice(&key("w"), Some(&slice(vec![])));
    stored.write(&mut mesh);
    assert_eq!(stored.condition("a", "Ready"), "False NoEndpoints: there are no endpoints");
    mesh.put_slice(&key("w"), Some(&slice(vec![fixtures::endpoint("10.0.0.1", "n1")])));
    stored.write(&mut mesh);
    assert!(stored.condition("a", "Ready").starts_with("True Serving"));
    // One that can't be used is told, and is no reason to count its last good version out.
    let problem = |text: &str| Some((key("web"), text.to_owned()));
    mesh.set_unusable(&key("w"), problem("endpoints[0].addresses[0]: is no address"));
    assert_eq!(stored.write(&mut mesh), ["a"]);
    let ready = stored.condition("a", "Ready");
    assert!(ready.starts_with("True EndpointSliceUnusable: "), "{ready}");
    assert!(
        ready.ends_with("; EndpointSlice default/w: endpoints[0].addresses[0]: is no address"),
        "{ready}"
    );
    mesh.set_unusable(&key("w"), problem("endpoints[0].addresses[0]: is no address"));
    assert!(stored.write(&mut mesh).is_empty());
    mesh.put_slice(&key("w"), None);
    mesh.set_unusable(&key("other"), problem("x: y"));
    stored.write(&mut mesh);
    let ready = stored.condition("a", "Ready");
    assert!(
        ready.starts_with("False NoEndpoints: ") && ready.ends_with("; 1 more can't be used either"),
        "{ready}"
    );
    assert!(mesh.slice_keys().any(|k| *k == key("other")), "one that goes while nobody looks");
    mesh.set_unusable(&key("w"), None);
    mesh.set_unusable(&key("other"), None);
    stored.write(&mut mesh);
    assert!(!stored.condition("a", "Ready").contains("can't be used"));
}

#[test]
fn what_moves_is_given_up_before_it_is_given() {
    let mut stored = Stored::default();
    stored.apply("a", 1, plain());
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    stored.apply("b", 2, json!({"vips": [stored.vip("a")], "ports": [{"port": 80}]}));
    stored.show("b", &mut mesh);
    mesh.allocate();
    let desired = |mesh: &Mesh, name: &str| mesh.desired(&key(name), now()).unwrap();
    let (a, b) = (desired(&mesh, "a"), desired(&mesh, "b"));
    assert_eq!(b.vips[0].0, stored.vip("a"));
    let new = [(&key("b"), &b)];
    assert_eq!(mesh.too_early(new), [(key("b"), [key("a")].into())].into());
    mesh.written(&key("a"), a, None);
    assert!(mesh.too_early(new).is_empty());
}

#[test]
fn of_those_that_give_and_take_who_gives_is_the_first() {
    let mut stored = Stored::default();
    let on = |port: u16| json!({"ports": [{"port": 80, "publish": {"port": port}}]});
    stored.apply("a", 1, on(30080));
    stored.apply("b", 2, on(30081));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    for (name, port) in [("a", 30081), ("b", 30082)] {
        stored.apply(name, 1, on(port));
        stored.show(name, &mut mesh);
    }
    mesh.allocate();
    let desired = |name: &str| mesh.desired(&key(name), now()).unwrap();
    let (a, b) = (desired("a"), desired("b"));
    assert!(gives_up(&stored.status("a"), &a) && gives_up(&stored.status("b"), &b));
    let new = [(&key("a"), &a), (&key("b"), &b)];
    let waits = mesh.too_early(new);
    assert_eq!(waits, [(key("a"), [key("b")].into())].into());
    assert_eq!(order::next(&[key("a"), key("b")].into(), &waits), [key("b")].into());
    mesh.written(&key("b"), b.clone(), None);
    assert!(mesh.too_early(new).is_empty());
}

#[test]
fn a_number_in_the_middle_of_a_range_is_given_up_before_it_is_given() {
    let mut stored = Stored::default();
    stored.apply("a", 2, json!({"ports": [{"port": 31000, "endPort": 31009, "publish": {"port": 31000}}]}));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").ports[0].published_port, Some(31000));
    // The older one gets it.
    stored.apply("b", 1, json!({"ports": [{"port": 80, "publish": {"port": 31005}}]}));
    stored.show("b", &mut mesh);
    mesh.allocate();
    let desired = |mesh: &Mesh, name: &str| mesh.desired(&key(name), now()).unwrap();
    let (a, b) = (desired(&mesh, "a"), desired(&mesh, "b"));
    assert_eq!(b.ports[0].published_port, Some(31005));
    let new = [(&key("b"), &b)];
    assert_eq!(mesh.too_early(new), [(key("b"), [key("a")].into())].into());
    mesh.written(&key("a"), a, None);
    assert!(mesh.too_early(new).is_empty());
}

#[test]
fn numbers_of_endpoints_keep_no_number_from_being_freed() {
    let mut stored = Stored::default();
    stored.apply("a", 1, plain());
    let mut mesh = stored.mesh(&Used::new());
    assert!(!mesh.only_counts_are_due(now()), "it has yet to get its numbers");
    stored.write(&mut mesh);
    assert!(mesh.only_counts_are_due(now()));
    let slice = Slice {
        key: key("a-1"),
        service_name: "a".into(),
        family: Family::V4,
        ports: vec![],
        endpoints: vec![fixtures::endpoint("10.0.0.1", "n1")],
    };
    mesh.put_slice(&key("a-1"), Some(&slice));
    assert!(mesh.dirty().next().is_some() && mesh.only_counts_are_due(now()));
    stored.apply("b", 1, plain());
    stored.show("b", &mut mesh);
    mesh.allocate();
    assert!(!mesh.only_counts_are_due(now()));
}

#[test]
fn the_first_status_of_a_selector_waits_for_slices() {
    let mut stored = Stored::default();
    for (name, spec) in [
        ("a", json!({"selector": {"app": "a"}, "ports": [{"port": 80}]})),
        ("b", plain()),
        ("taken", json!({"selector": {"app": "a"}, "ports": [{"port": 80}]})),
        ("wrong", json!({"selector": {"app": "a"}, "vips": ["10.9.9.9"], "ports": [{"port": 80}]})),
        ("refused", json!({"selector": {"app": "a"}, "ports": [{"port": 80}]})),
    ] {
        stored.apply(name, 1, spec);
    }
    let mut mesh = stored.mesh(&Used::new());
    mesh.put_core(&key("taken"), Some(Core { uid: "1".into(), owner: None, ..Core::default() }));
    mesh.headless_problem(&key("refused"), Some("no".into()));
    // What is to be told without any slice is told at once.
    for (name, waits) in [("a", true), ("b", false), ("taken", false), ("wrong", false), ("refused", false)] {
        assert_eq!(mesh.awaits_slices(&key(name)), waits, "{name}");
    }
    // One without endpoints says that there are none.
    let slice = Slice {
        key: key("a-1"),
        service_name: "a".into(),
        family: Family::V4,
        ports: vec![],
        endpoints: vec![],
    };
    mesh.put_slice(&key("a-1"), Some(&slice));
    assert!(!mesh.awaits_slices(&key("a")));
    stored.write(&mut mesh);
    mesh.put_slice(&key("a-1"), None);
    assert!(!mesh.awaits_slices(&key("a")), "it has a status");
}

#[test]
fn a_name_that_is_somebody_elses_is_told() {
    let mut stored = Stored::default();
    stored.apply("a", 1, json!({"selector": {"app": "a"}, "ports": [{"port": 80}]}));
    let mut mesh = stored.mesh(&Used::new());
    assert!(matches!(mesh.entry(&key("a")).unwrap().headless, Wanted::This(_)));
    stored.write(&mut mesh);
    assert!(!stored.vip("a").is_empty());
    mesh.put_core(&key("a"), Some(Core { uid: "1".into(), owner: None, ..Core::default() }));
    stored.write(&mut mesh);
    assert_eq!(stored.vip("a"), "");
    assert!(stored.condition("a", "Accepted").starts_with("False ServiceNameTaken"));
    mesh.put_core(&key("a"), Some(Core { uid: "2".into(), owner: Some("uid-a".into()), ..Core::default() }));
    stored.write(&mut mesh);
    assert!(!stored.vip("a").is_empty());
}

#[test]
fn endpoints_are_counted_once() {
    let mut stored = Stored::default();
    stored.apply("a", 1, plain());
    let mut mesh = stored.mesh(&Used::new());
    let endpoint = |address: &str, target: &str, ready: bool| Endpoint {
        address: address.parse().unwrap(),
        ready,
        serving: ready,
        terminating: false,
        node: None,
        zone: None,
        hints: None,
        target: Some(target.into()),
        hostname: None,
    };
    for (name, family, endpoints) in [
        ("a-4", Family::V4, vec![endpoint("10.0.0.1", "p1", true), endpoint("10.0.0.2", "p2", false)]),
        ("a-6", Family::V6, vec![endpoint("fd00::1", "p1", true)]),
    ] {
        let slice = Slice { key: key(name), service_name: "a".into(), family, ports: vec![], endpoints };
        mesh.put_slice(&key(name), Some(&slice));
    }
    stored.write(&mut mesh);
    let counts = stored.status("a").endpoints.unwrap();
    assert_eq!((counts.ready, counts.total), (1, 2));
    assert_eq!(stored.status("a").summary.unwrap().endpoints, "1/2");
    assert!(stored.condition("a", "Ready").starts_with("True Serving"));
    mesh.put_slice(&key("a-4"), None);
    mesh.put_slice(&key("a-6"), None);
    assert_eq!(stored.write(&mut mesh), ["a"]);
    assert!(stored.condition("a", "Ready").starts_with("False NoEndpoints"));
}

#[test]
fn endpoints_are_counted_as_nodes_see_them() {
    let mut stored = Stored::default();
    let named = |target: &str| {
        json!({"ports": [
            {"name": "web", "port": 80, "targetPort": target}, {"name": "more", "port": 81, "targetPort": 8081},
        ]})
    };
    stored.apply("a", 1, named("htpp"));
    let mut mesh = stored.mesh(&Used::new());
    let http = SlicePort { name: Some("http".into()), protocol: Protocol::Tcp, port: Some(8080) };
    let ends = vec![
        fixtures::endpoint("10.0.0.1", "n1"),
        Endpoint { ready: false, serving: false, ..fixtures::endpoint("10.0.0.2", "n1") },
    ];
    let slice = Slice {
        key: key("a-4"),
        service_name: "a".into(),
        family: Family::V4,
        ports: vec![http],
        endpoints: ends,
    };
    mesh.put_slice(&key("a-4"), Some(&slice));
    stored.write(&mut mesh);
    let ready = stored.condition("a", "Ready");
    assert!(ready.starts_with("False NoTargetPort") && ready.contains("80/TCP: see"), "{ready}");
    assert_eq!(stored.status("a").summary.unwrap().endpoints, "1/2");
    stored.apply("a", 1, named("http"));
    stored.show("a", &mut mesh);
    stored.write(&mut mesh);
    assert!(stored.condition("a", "Ready").starts_with("True Serving"));
    // Those that are not ready too, if that is asked for.
    let mut spec = named("http");
    spec["publishNotReadyAddresses"] = true.into();
    stored.apply("a", 1, spec);
    stored.show("a", &mut mesh);
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").summary.unwrap().endpoints, "2/2");
    // An endpoint without any port that is asked for is none.
    stored.apply("a", 1, json!({"ports": [{"port": 80, "targetPort": "htpp"}]}));
    stored.show("a", &mut mesh);
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").summary.unwrap().endpoints, "0/2");
    assert!(stored.condition("a", "Ready").starts_with("False NoTargetPort"));
}

#[test]
fn ranges_enter_all_of_their_numbers() {
    let mut stored = Stored::default();
    let range = json!({"ports": [{"port": 31000, "endPort": 31009, "publish": {"port": 31000}}]});
    stored.apply("a", 1, range);
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    assert_eq!(mesh.used()[&PoolId::Ports(Protocol::Tcp)], Numbers((31000..=31009).collect()));
    assert_eq!(stored.status("a").summary.unwrap().published, "31000-31009/TCP");
}

#[test]
fn the_next_leader_keeps_all_of_a_range_whose_spec_is_wrong_by_then() {
    let mut stored = Stored::default();
    let range = json!({"ports": [{"port": 31000, "endPort": 31009, "publish": {"port": 31000}}]});
    stored.apply("a", 2, range);
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let used = mesh.used();
    stored.apply("a", 2, json!({"ports": [{"port": 31000, "endPort": 30000, "publish": {"port": 31000}}]}));
    stored.apply("b", 1, json!({"ports": [{"port": 80, "publish": {"port": 31005}}]}));
    let mut mesh = stored.mesh(&used);
    stored.write(&mut mesh);
    assert_eq!(stored.status("a").summary.unwrap().published, "31000-31009/TCP");
    assert!(
        stored.condition("b", "Allocated").starts_with("False"),
        "{}",
        stored.condition("b", "Allocated")
    );
}

#[test]
fn what_was_a_range_waits_for_nobody_who_has_a_number_that_it_would_have_spanned() {
    let mut stored = Stored::default();
    stored.apply("a", 1, json!({"ports": [{"port": 31000, "endPort": 31009, "publish": {"port": 31000}}]}));
    stored.apply("b", 2, json!({"ports": [{"port": 80, "publish": {"port": 30085}}]}));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    stored.apply("a", 1, json!({"ports": [{"port": 31000, "publish": {"port": 30080}}]}));
    stored.show("a", &mut mesh);
    mesh.allocate();
    let new = mesh.desired(&key("a"), now()).unwrap();
    assert_eq!(new.ports[0].published_port, Some(30080));
    assert!(mesh.too_early([(&key("a"), &new)]).is_empty());
}

#[test]
fn a_range_gives_up_what_it_does_not_span_any_more() {
    let status = |end: i32| MeshServiceStatus {
        ports: vec![PortStatus {
            name: None,
            protocol: crate::api::values::Protocol::Tcp,
            port: 31000,
            end_port: (end > 31000).then_some(end),
            published_port: Some(31000),
        }],
        ..MeshServiceStatus::default()
    };
    let gives_up = |old, new| super::status::gives_up(&status(old), &status(new));
    let seen = [(31000, 31009), (31009, 31009), (31009, 31004), (31009, 31000)].map(|(a, b)| gives_up(a, b));
    assert_eq!(seen, [false, false, true, true]);
}

#[test]
fn news_is_what_was_not_told_yet() {
    let mut stored = Stored::default();
    stored.apply(
        "a",
        1,
        json!({"vips": ["10.200.9.9"], "ports": [{"port": 80, "publish": {"port": 30080}}]}),
    );
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let old = MeshServiceStatus::default();
    let told: Vec<String> = news(&old, &stored.status("a")).into_iter().map(|n| n.message).collect();
    assert_eq!(told, ["virtual IP 10.200.9.9, 80/TCP published on 30080"]);
    assert!(news(&stored.status("a"), &stored.status("a")).is_empty());
}

#[test]
fn what_nodes_say_is_in_the_status() {
    let mut stored = Stored::default();
    for name in ["a", "b"] {
        stored.apply(name, 1, plain());
    }
    let mut mesh = stored.mesh(&Used::new());
    for name in ["a", "b"] {
        let endpoint = Endpoint {
            address: "10.0.0.1".parse().unwrap(),
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            zone: None,
            hints: None,
            target: None,
            hostname: None,
        };
        let slice = Slice {
            key: key(name),
            service_name: name.into(),
            family: Family::V4,
            ports: vec![],
            endpoints: vec![endpoint],
        };
        mesh.put_slice(&key(name), Some(&slice));
    }
    assert_eq!(stored.write(&mut mesh), ["a", "b"]);
    assert!(stored.condition("a", "Programmed").starts_with("True Programmed"));
    assert!(stored.condition("a", "Ready").starts_with("True Serving"));
    let before = stored.status("a");
    node(&mut mesh, &["a", "gone"]);
    assert_eq!(stored.write(&mut mesh), ["a"]);
    let programmed = stored.condition("a", "Programmed");
    assert!(
        programmed.starts_with("False PublishedPortHeld") && programmed.contains("n1: it is held"),
        "{programmed}"
    );
    assert_eq!(stored.condition("a", "Ready"), "False PublishedPortHeld: see the condition Programmed");
    // It is told once that it begins and once that it is over.
    let told = |old: &MeshServiceStatus, new: &MeshServiceStatus| -> Vec<(bool, String)> {
        news(old, new).into_iter().map(|n| (n.good, n.reason)).collect()
    };
    let failed = stored.status("a");
    assert_eq!(told(&before, &failed), [(false, "PublishedPortHeld".to_owned())]);
    assert!(super::status::only_counts(&before, &failed), "it is written at the pace of endpoints");
    mesh.put_node("n1", None);
    assert_eq!(stored.write(&mut mesh), ["a", "b"]);
    assert!(stored.condition("b", "Programmed").starts_with("Unknown NoAgents"));
    assert!(stored.condition("b", "Ready").starts_with("Unknown NoAgents"));
    node(&mut mesh, &[]);
    assert_eq!(stored.write(&mut mesh), ["a", "b"]);
    assert_eq!(told(&failed, &stored.status("a")), [(true, "Programmed".to_owned())]);
}

#[test]
fn a_node_that_fails_as_a_whole_is_no_event_of_every_service() {
    let mut stored = Stored::default();
    stored.apply("a", 1, plain());
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let says = |mesh: &mut Mesh, state: State, failing: &[&str]| {
        let fault =
            |name: &&str| (key(name), Fault { reason: "PublishedPortHeld", message: "it is held".into() });
        let named: Vec<_> = failing.iter().map(fault).collect();
        let report = Report { count: named.len(), named, ..Report::of(state) };
        mesh.put_said("n1", Some(Said::new(Some("uid-n1".into()), &report.status(None, now()))));
    };
    let whole = || State::ProgrammingFailed("no memory".into());
    for (state, failing, programmed, told) in [
        (whole(), vec![], "False NodeFailing", vec![]),
        (State::Serving, vec![], "True Programmed", vec![]),
        // What it says of one service is that one's.
        (whole(), vec!["a"], "False PublishedPortHeld", vec!["PublishedPortHeld"]),
        (State::Serving, vec![], "True Programmed", vec!["Programmed"]),
        (whole(), vec![], "False NodeFailing", vec![]),
        (State::Serving, vec!["a"], "False PublishedPortHeld", vec!["PublishedPortHeld"]),
    ] {
        let before = stored.status("a");
        says(&mut mesh, state, &failing);
        assert_eq!(stored.write(&mut mesh), ["a"]);
        assert!(stored.condition("a", "Programmed").starts_with(programmed));
        let news: Vec<String> = news(&before, &stored.status("a")).into_iter().map(|n| n.reason).collect();
        assert_eq!(news, told, "{programmed}");
    }
}

#[test]
fn an_alias_that_another_service_has_is_told() {
    let mut stored = Stored::default();
    let with = |aliases: &[&str]| json!({"ports": [{"port": 80}], "dns": {"aliases": aliases}});
    stored.apply("a", 1, with(&["shared", "b"]));
    stored.apply("b", 1, with(&["shared"]));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    // The older one has it; a service's own name is nobody's alias.
    let ready = stored.condition("a", "Ready");
    assert!(ready.ends_with("; spec.dns.aliases[1]: b is the name of the service default/b"), "{ready}");
    let ready = stored.condition("b", "Ready");
    assert!(ready.contains("spec.dns.aliases[0]: shared is an alias of default/a"), "{ready}");
    mesh.remove_service(&key("a"));
    stored.write(&mut mesh);
    assert!(!stored.condition("b", "Ready").contains("alias"));
}

#[test]
fn every_reason_is_documented() {
    let documented = include_str!("../../docs/kubernetes.md");
    let sources = [
        include_str!("status.rs"),
        include_str!("nodes.rs"),
        include_str!("../meshnode/mod.rs"),
        include_str!("../cli/watcher.rs"),
        include_str!("../allocate/conflict.rs"),
    ];
    let word = regex::Regex::new("\"([A-Z]+[a-z][A-Za-z]+)\"").unwrap();
    // Statuses, a type, a kind; and what is said of folders only.
    let others = ["True", "False", "Unknown", "Ready", "Node", "LockNotFollowed"];
    let mut seen = 0;
    for source in sources {
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        for reason in word.captures_iter(code).map(|found| found[1].to_owned()) {
            if !others.contains(&&*reason) {
                seen += 1;
                assert!(
                    documented.contains(&format!("`{reason}`")),
                    "docs/kubernetes.md does not say what {reason} is"
                );
            }
        }
    }
    assert!(seen > 30, "only {seen} are found");
}

#[test]
fn that_endpoints_are_there_is_news_where_there_were_none_for_a_while() {
    let ready = |status: &str, reason: &str, at: i64| {
        let condition = json!({"type": "Ready", "status": status, "reason": reason, "message": "",
            "lastTransitionTime": jiff::Timestamp::from_second(at).unwrap().to_string()});
        serde_json::from_value::<MeshServiceStatus>(json!({"conditions": [condition]})).unwrap()
    };
    let (none, some) = (|at| ready("False", "NoEndpoints", at), |at| ready("True", "Serving", at));
    assert!(news(&none(1000), &some(1002)).is_empty());
    assert_eq!(news(&none(1000), &some(1040)).len(), 1);
    assert_eq!(news(&some(1000), &none(1002)).len(), 1, "that they have gone is news at once");
}
