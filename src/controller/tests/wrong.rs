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
    let mut next = stored.mesh(&mesh.used());
    assert!(stored.write(&mut next).is_empty());
    assert_eq!(stored.vip("a"), vip);
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
