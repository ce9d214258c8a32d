//! What becomes of a service whose spec is wrong.

use super::*;
use crate::controller::headless::{Todo, todo};

#[test]
fn what_is_wrong_keeps_what_it_has_over_a_change_of_leaders() {
    let mut stored = Stored::default();
    stored.apply("a", 1, plain());
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let vip = stored.vip("a");
    stored.apply("a", 1, json!({"ports": [{"port": 70_000}]}));
    stored.show("a", &mut mesh);
    stored.write(&mut mesh);
    assert_eq!(stored.vip("a"), vip);
    assert!(
        stored.condition("a", "Accepted").contains("spec.ports[0].port"),
        "{}",
        stored.condition("a", "Accepted")
    );
    let used = mesh.used();
    stored.apply("b", 2, json!({"vips": [vip.clone()], "ports": [{"port": 80}]}));
    let mut next = stored.mesh(&used);
    stored.write(&mut next);
    assert_eq!(stored.vip("a"), vip);
    assert!(
        stored.condition("b", "Allocated").contains("VIPTaken"),
        "{}",
        stored.condition("b", "Allocated")
    );
    stored.apply("a", 1, plain());
    stored.show("a", &mut next);
    stored.write(&mut next);
    // In order again, it has what it had by chance: what b asks for explicitly is b's then, and a moves.
    assert_ne!(stored.vip("a"), vip);
    assert_eq!(stored.vip("b"), vip);
}

#[test]
fn what_is_wrong_loses_nothing_to_who_asks_for_it() {
    let mut stored = Stored::default();
    stored.apply("a", 5, plain());
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let vip = stored.vip("a");
    // Outside the range, which no schema can know.
    stored.apply("a", 5, json!({"vips": ["10.9.9.9"], "ports": [{"port": 80}]}));
    stored.show("a", &mut mesh);
    stored.write(&mut mesh);
    stored.apply("b", 1, json!({"vips": [vip.clone()], "ports": [{"port": 80}]}));
    stored.show("b", &mut mesh);
    stored.write(&mut mesh);
    assert_eq!((stored.vip("a"), stored.vip("b")), (vip.clone(), String::new()));
    assert!(stored.condition("b", "Allocated").contains("belongs to default/a"));
    // Nor over a change of leaders.
    let allocated = stored.condition("a", "Allocated");
    let mut next = stored.mesh(&mesh.used());
    stored.write(&mut next);
    assert_eq!((stored.vip("a"), stored.condition("a", "Allocated")), (vip, allocated));
    // Which endpoints it has it does not say: nobody knows which EndpointSlices that version names.
    let ready = stored.condition("a", "Ready");
    assert!(
        ready.starts_with("Unknown Invalid: the last valid version goes on, and is not known"),
        "{ready}"
    );
    assert!(stored.write(&mut next).is_empty());
}

#[test]
fn what_was_never_right_has_nothing() {
    let mut stored = Stored::default();
    stored.apply("a", 1, json!({"vips": ["10.9.9.9"], "ports": [{"port": 80}]}));
    let mut mesh = stored.mesh(&Used::new());
    stored.write(&mut mesh);
    let accepted = stored.condition("a", "Accepted");
    assert!(accepted.contains("spec.vips") && !accepted.contains("stays in force"), "{accepted}");
    assert!(stored.condition("a", "Ready").starts_with("False NotAccepted"));
}

#[test]
fn what_is_wrong_keeps_its_headless_service() {
    let mut stored = Stored::default();
    let wrong = |selector: Value| json!({"selector": selector, "ports": [{"port": 70_000}]});
    stored.apply("a", 1, json!({"selector": {"app": "a"}, "ports": [{"port": 80}]}));
    let mut mesh = stored.mesh(&Used::new());
    let needs = |mesh: &Mesh| {
        let entry = mesh.entry(&key("a")).unwrap();
        todo(&entry.meta.uid, &entry.headless, mesh.core(&key("a")))
    };
    let Some(Todo::Create(made)) = needs(&mesh) else { panic!("{:?}", needs(&mesh)) };
    let spec = crate::controller::headless::part_of(&made["spec"]);
    let core =
        || Core { uid: "c".into(), owner: Some("uid-a".into()), spec: spec.clone(), ..Core::default() };
    mesh.put_core(&key("a"), Some(core()));
    assert_eq!(needs(&mesh), None);
    // Another selector, none, or nothing that could be one: the last valid one stays in force.
    for selector in [json!({"app": "b"}), json!({}), json!("app=b"), Value::Null] {
        stored.apply("a", 1, wrong(selector.clone()));
        stored.show("a", &mut mesh);
        assert_eq!(needs(&mesh), None, "{selector}");
    }
    mesh.put_core(&key("a"), None);
    assert_eq!(needs(&mesh), Some(Todo::Create(made)));
    // A controller that has just begun to lead has not seen it: what there is stays, and nothing is made.
    let mut next = stored.mesh(&Used::new());
    assert_eq!(needs(&next), None);
    next.put_core(&key("a"), Some(core()));
    assert_eq!(needs(&next), None);
    stored.apply("a", 1, wrong(json!({"app": "b"})));
    stored.show("a", &mut next);
    assert_eq!(needs(&next), None);
    // In order again, it is as it says.
    stored.apply("a", 1, json!({"ports": [{"port": 80}]}));
    stored.show("a", &mut next);
    assert_eq!(needs(&next), Some(Todo::Delete("c".into())));
}

#[test]
fn what_is_wrong_is_ready_by_its_last_valid_version() {
    let mut stored = Stored::default();
    let web = |port: u32| json!({"serviceName": "web", "ports": [{"port": port, "publish": {}}]});
    stored.apply("a", 1, web(80));
    let mut mesh = stored.mesh(&Used::new());
    let slice = |endpoints| Slice {
        key: key("web-1"),
        service_name: "web".into(),
        family: Family::V4,
        ports: vec![],
        endpoints,
    };
    let two = vec![fixtures::endpoint("10.0.0.1", "n1"), fixtures::endpoint("10.0.0.2", "n1")];
    mesh.put_slice(&key("web-1"), Some(&slice(two.clone())));
    stored.write(&mut mesh);
    let (vip, allocated) = (stored.vip("a"), stored.condition("a", "Allocated"));
    let seen = |stored: &Stored| {
        let ready = stored.condition("a", "Ready");
        let reason = ready.split(':').next().unwrap_or_default().to_owned();
        (reason, stored.status("a").summary.unwrap().endpoints)
    };
    assert_eq!(seen(&stored), ("True Serving".into(), "2/2".into()));
    stored.apply("a", 1, web(70_000));
    stored.show("a", &mut mesh);
    stored.write(&mut mesh);
    assert!(stored.condition("a", "Accepted").ends_with("; the last valid version stays in force"));
    assert_eq!(seen(&stored), ("True Serving".into(), "2/2".into()));
    // Endpoints and nodes come and go meanwhile.
    mesh.put_slice(&key("web-1"), None);
    stored.write(&mut mesh);
    assert_eq!(seen(&stored), ("False NoEndpoints".into(), "0/0".into()));
    mesh.put_slice(&key("web-1"), Some(&slice(two)));
    node(&mut mesh, &["a"]);
    stored.write(&mut mesh);
    assert_eq!(seen(&stored), ("False PublishedPortHeld".into(), "2/2".into()));
    node(&mut mesh, &[]);
    stored.write(&mut mesh);
    assert_eq!(seen(&stored), ("True Serving".into(), "2/2".into()));
    assert_eq!((stored.vip("a"), stored.condition("a", "Allocated")), (vip, allocated));
    // The next controller has not seen it, and does not count the endpoints of a Service that it may not name.
    let mut next = stored.mesh(&mesh.used());
    stored.write(&mut next);
    assert_eq!(seen(&stored), ("Unknown Invalid".into(), "2/2".into()));
    // Wrong in another way, it knows no more.
    stored.apply("a", 1, web(70_001));
    stored.show("a", &mut next);
    stored.write(&mut next);
    assert_eq!(seen(&stored).0, "Unknown Invalid");
}

#[test]
fn what_is_wrong_and_did_not_have_all_is_not_ready() {
    let mut stored = Stored::default();
    let explicit = |port: u32| json!({"vips": ["10.200.9.9"], "ports": [{"port": port}]});
    stored.apply("a", 1, explicit(80));
    stored.apply("b", 2, explicit(80));
    let mut mesh = stored.mesh(&Used::new());
    let slice = Slice {
        key: key("b-1"),
        service_name: "b".into(),
        family: Family::V4,
        ports: vec![],
        endpoints: vec![fixtures::endpoint("10.0.0.1", "n1")],
    };
    mesh.put_slice(&key("b-1"), Some(&slice));
    stored.write(&mut mesh);
    stored.apply("b", 2, explicit(70_000));
    stored.show("b", &mut mesh);
    stored.write(&mut mesh);
    assert_eq!(stored.condition("b", "Ready"), "False VIPTaken: not all that was asked for is allocated");
}
