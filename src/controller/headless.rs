//! `spec.selector`: the headless core Service that lets Kubernetes find a MeshService's endpoints.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::mesh::Core;
use crate::{api, model::ids::ServiceKey};

/// Label of what the controller makes.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "meshlb");

/// What a MeshService wants in the way of a headless Service.
#[derive(Clone, PartialEq, Debug)]
pub enum Wanted {
    /// This one.
    This(Value),
    /// None: it has no selector.
    Nothing,
    /// Its spec is wrong, and nobody knows what the last valid one wanted: what there is stays as it is.
    Unknown,
}

/// The Service that a MeshService with a selector is to have; `None` without one.
pub fn desired(key: &ServiceKey, uid: &str, object: &Value) -> Option<Value> {
    let spec = &object["spec"];
    let selector = spec["selector"].as_object().filter(|labels| !labels.is_empty())?;
    let mut taken = BTreeSet::new();
    let mut ports = Vec::new();
    let all = || spec["ports"].as_array().into_iter().flatten();
    let looked_up: BTreeSet<&str> = all().filter_map(|port| port["targetPort"].as_str()).collect();
    for port in all() {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        let number = &port["port"];
        // A slice's ports are called as the Service's, whatever the pods call them: a named target is looked up by that name.
        let target = if port["targetPort"].is_null() { number } else { &port["targetPort"] };
        // A port with a number for a target is looked up by nothing, and leaves that name to the one that is.
        let free = |name: &&str| target.is_null() || !looked_up.contains(name);
        let name = target.as_str().or(port["name"].as_str().filter(free));
        let name = name.map_or_else(|| format!("{}-{number}", protocol.to_lowercase()), str::to_owned);
        if taken.insert((name.clone(), protocol.to_owned())) {
            ports.push((name, protocol.to_owned(), number.clone(), target.clone()));
        }
    }
    // Two ports of a Service may not have one name, not even with different protocols.
    let mut names = BTreeSet::new();
    let ports: Vec<Value> = ports
        .into_iter()
        .filter(|(name, ..)| names.insert(name.clone()))
        .map(|(name, protocol, port, target)| {
            json!({"name": name, "protocol": protocol, "port": port, "targetPort": target})
        })
        .collect();
    Some(json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": &*key.name,
            "namespace": &*key.namespace,
            "labels": {MANAGED_BY.0: MANAGED_BY.1},
            "ownerReferences": [{
                "apiVersion": api::API_VERSION, "kind": api::KIND, "name": &*key.name, "uid": uid,
                "controller": true,
            }],
        },
        "spec": {
            "clusterIP": "None",
            "selector": selector,
            "ports": ports,
            "ipFamilies": asked_families(spec),
            "ipFamilyPolicy": spec["ipFamilyPolicy"],
            "publishNotReadyAddresses": spec["publishNotReadyAddresses"].as_bool().unwrap_or(false),
        },
    }))
}

/// The families that its Service asks for. With `PreferDualStack` the first alone: the API server adds the second where the cluster has
/// one, and refuses one that is named where it has not.
fn asked_families(spec: &Value) -> Value {
    match families(spec) {
        [first, _, ..] if spec["ipFamilyPolicy"] == "PreferDualStack" => json!([first]),
        _ => spec["ipFamilies"].clone(),
    }
}

/// What of a Service's spec is kept, to be compared.
pub fn part_of(spec: &Value) -> Value {
    let fields = ["selector", "ports", "publishNotReadyAddresses", "ipFamilyPolicy", "ipFamilies"];
    fields.into_iter().map(|field| (field.to_owned(), spec[field].clone())).collect()
}

/// How a Service differs from what it is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Difference {
    /// In a way that can be changed.
    Spec,
    /// It has another primary family, which the API server lets nobody change.
    PrimaryFamily,
}

fn families(spec: &Value) -> &[Value] {
    spec["ipFamilies"].as_array().map_or(&[], Vec::as_slice)
}

/// How the spec of a Service differs from what was asked for, without what the API server fills in.
fn difference(found: &Value, wanted: &Value) -> Option<Difference> {
    let (have, want) = (families(found), families(wanted));
    if want.first().is_some_and(|first| have.first().is_some_and(|have| have != first)) {
        return Some(Difference::PrimaryFamily);
    }
    let policy = &wanted["ipFamilyPolicy"];
    let ready = |spec: &Value| spec["publishNotReadyAddresses"].as_bool().unwrap_or(false);
    let same = found["selector"] == wanted["selector"]
        && found["ports"] == wanted["ports"]
        && ready(found) == ready(wanted)
        && (policy.is_null() || found["ipFamilyPolicy"] == *policy)
        // With two families allowed, who names one gets the other too.
        && have.starts_with(want);
    (!same).then_some(Difference::Spec)
}

/// What makes a Service of ours what it is to be, as a JSON merge patch (RFC 7386). That leaves every key of a map as it is which
/// it does not name: labels of the selector that are not wanted are named, as null.
fn patch(found: &Value, wanted: &Value) -> Value {
    let mut patch = wanted.clone();
    if let Some(selector) = patch["spec"]["selector"].as_object_mut() {
        for label in found["selector"].as_object().into_iter().flatten().map(|(label, _)| label) {
            selector.entry(label.clone()).or_insert(Value::Null);
        }
    }
    // The API server has added the second family: a list without it would ask to release it, which only `SingleStack` may.
    let dual = wanted["spec"]["ipFamilyPolicy"] != "SingleStack";
    if dual
        && families(found).starts_with(families(&wanted["spec"]))
        && let Some(spec) = patch["spec"].as_object_mut()
    {
        spec.remove("ipFamilies");
    }
    patch
}

/// Something to do about a headless Service; of one that is there its uid is known.
#[derive(Clone, PartialEq, Debug)]
pub enum Todo {
    /// Make it.
    Create(Value),
    /// Change it by this merge patch.
    Change(String, Value),
    /// Delete it.
    Delete(String),
}

/// What the Service of a MeshService with this uid is in need of. One that is not ours is left alone.
pub fn todo(uid: &str, wanted: &Wanted, found: Option<&Core>) -> Option<Todo> {
    let ours = |core: &&Core| core.owner.as_deref() == Some(uid);
    match (wanted, found) {
        (Wanted::This(wanted), None) => Some(Todo::Create(wanted.clone())),
        (Wanted::This(wanted), Some(core)) if ours(&core) => {
            difference(&core.spec, &wanted["spec"]).map(|difference| match difference {
                Difference::Spec => Todo::Change(core.uid.clone(), patch(&core.spec, wanted)),
                // Made anew when it is gone.
                Difference::PrimaryFamily => Todo::Delete(core.uid.clone()),
            })
        }
        (Wanted::Nothing, Some(core)) if ours(&core) => Some(Todo::Delete(core.uid.clone())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spec: Value) -> Option<Value> {
        desired(&ServiceKey::new("shop", "vote"), "u1", &json!({"spec": spec}))
    }

    #[test]
    fn what_the_api_server_fills_in_is_no_difference_and_what_was_edited_is() {
        let wanted = |policy: &str, families: &[&str], not_ready: bool| {
            of(json!({"selector": {"app": "vote"}, "ipFamilies": families, "ipFamilyPolicy": policy,
                      "publishNotReadyAddresses": not_ready, "ports": [{"port": 80}]}))
            .unwrap()["spec"]
                .clone()
        };
        let found = |policy: &str, families: &[&str], not_ready: bool| {
            // As of an API server: what is false is left out.
            let mut spec = json!({"selector": {"app": "vote"}, "clusterIP": "None", "sessionAffinity": "None",
                "ports": [{"name": "tcp-80", "protocol": "TCP", "port": 80, "targetPort": 80}],
                "ipFamilyPolicy": policy, "ipFamilies": families});
            if not_ready {
                spec["publishNotReadyAddresses"] = true.into();
            }
            part_of(&spec)
        };
        let (single, prefer, require) = ("SingleStack", "PreferDualStack", "RequireDualStack");
        let (v4, both) = (&["IPv4"][..], &["IPv4", "IPv6"][..]);
        for (have, want, difference_is) in [
            (found(single, v4, false), wanted(single, v4, false), None),
            (found(require, both, false), wanted(require, v4, false), None),
            (found(prefer, v4, false), wanted(prefer, both, false), None),
            (found(prefer, both, true), wanted(prefer, both, true), None),
            (found(require, both, false), wanted(prefer, both, false), Some(Difference::Spec)),
            (
                found(prefer, both, false),
                wanted(prefer, &["IPv6", "IPv4"], false),
                Some(Difference::PrimaryFamily),
            ),
            (found(single, v4, true), wanted(single, v4, false), Some(Difference::Spec)),
            (found(single, v4, false), wanted(single, v4, true), Some(Difference::Spec)),
            (found(single, v4, false), wanted(require, v4, false), Some(Difference::Spec)),
            (found(require, both, false), wanted(single, v4, false), Some(Difference::Spec)),
            (found(single, v4, false), wanted(single, &["IPv6"], false), Some(Difference::PrimaryFamily)),
        ] {
            assert_eq!(difference(&have, &want), difference_is, "{have} {want}");
        }
        let mut other = found(single, v4, false);
        other["selector"]["app"] = "web".into();
        assert_eq!(difference(&other, &wanted(single, v4, false)), Some(Difference::Spec));
    }

    fn selected(selector: &Value) -> Value {
        of(json!({"selector": selector, "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "ports": [{"port": 80}]}))
            .unwrap()
    }

    /// One of the MeshService `u1`, or of nobody.
    fn core(owner: Option<&str>, spec: &Value) -> Core {
        Core { uid: "c1".into(), owner: owner.map(Into::into), spec: part_of(spec), ..Core::default() }
    }

    #[test]
    fn a_label_that_is_not_wanted_goes() {
        for (have, want, sent) in [
            // Taken away, called otherwise, set by somebody else.
            (
                json!({"app": "vote", "tier": "x"}),
                json!({"app": "vote"}),
                json!({"app": "vote", "tier": null}),
            ),
            (json!({"app": "vote"}), json!({"name": "vote"}), json!({"name": "vote", "app": null})),
            (
                json!({"app": "wrong", "a.b/c": ""}),
                json!({"app": "vote"}),
                json!({"app": "vote", "a.b/c": null}),
            ),
            (Value::Null, json!({"app": "vote"}), json!({"app": "vote"})),
        ] {
            let (found, wanted) = (&selected(&json!({"app": "vote"}))["spec"], selected(&want));
            let mut found = found.clone();
            found["selector"] = have;
            let Some(Todo::Change(uid, patch)) =
                todo("u1", &Wanted::This(wanted.clone()), Some(&core(Some("u1"), &found)))
            else {
                panic!("{found}");
            };
            assert_eq!((&*uid, &patch["spec"]["selector"]), ("c1", &sent));
            let mut rest = patch;
            rest["spec"]["selector"] = want;
            assert_eq!(rest, wanted);
        }
    }

    #[test]
    fn a_family_that_the_api_server_added_is_not_asked_back() {
        let (v4, both) = (&["IPv4"][..], &["IPv4", "IPv6"][..]);
        let of = |policy: &str, families: &[&str], app: &str| {
            of(json!({"selector": {"app": app}, "ipFamilies": families, "ipFamilyPolicy": policy, "ports": [{"port": 80}]}))
                .unwrap()
        };
        for ((had, families), (policy, asked), sent) in [
            (("PreferDualStack", both), ("PreferDualStack", v4), Value::Null),
            (("PreferDualStack", both), ("PreferDualStack", both), Value::Null),
            (("PreferDualStack", v4), ("PreferDualStack", both), Value::Null),
            (("RequireDualStack", both), ("RequireDualStack", v4), Value::Null),
            (("RequireDualStack", both), ("PreferDualStack", v4), Value::Null),
            (("SingleStack", v4), ("PreferDualStack", v4), Value::Null),
            (("SingleStack", v4), ("RequireDualStack", both), json!(both)),
            (("RequireDualStack", both), ("SingleStack", v4), json!(v4)),
        ] {
            let mut found = of(had, v4, "web")["spec"].clone();
            found["ipFamilies"] = json!(families);
            let wanted = Wanted::This(of(policy, asked, "vote"));
            let Some(Todo::Change(_, patch)) = todo("u1", &wanted, Some(&core(Some("u1"), &found))) else {
                panic!("{found}");
            };
            assert_eq!(patch["spec"]["ipFamilies"], sent, "{had} {families:?} to {policy} {asked:?}");
            assert_eq!(patch["spec"]["ipFamilyPolicy"], policy);
        }
    }

    #[test]
    fn a_second_family_that_is_only_preferred_is_not_asked_for() {
        let asked = |policy: &str, families: &[&str]| {
            let spec = json!({"selector": {"app": "vote"}, "ipFamilies": families, "ipFamilyPolicy": policy, "ports": [{"port": 80}]});
            of(spec).unwrap()["spec"]["ipFamilies"].clone()
        };
        // A cluster with one family alone refuses a Service that names the other.
        assert_eq!(asked("PreferDualStack", &["IPv6", "IPv4"]), json!(["IPv6"]));
        assert_eq!(asked("PreferDualStack", &["IPv4"]), json!(["IPv4"]));
        assert_eq!(asked("RequireDualStack", &["IPv4", "IPv6"]), json!(["IPv4", "IPv6"]));
    }

    #[test]
    fn only_what_is_ours_is_changed_or_deleted() {
        let service = selected(&json!({"app": "vote"}));
        let wanted = Wanted::This(service.clone());
        let same = core(Some("u1"), &service["spec"]);
        assert_eq!(todo("u1", &wanted, None), Some(Todo::Create(service)));
        assert_eq!(todo("u1", &wanted, Some(&same)), None);
        assert_eq!(todo("u1", &Wanted::Nothing, Some(&same)), Some(Todo::Delete("c1".into())));
        assert_eq!(todo("u1", &Wanted::Nothing, None), None);
        // Somebody else's, and one of an earlier MeshService of this name.
        for owner in [None, Some("u0")] {
            let other = core(owner, &selected(&json!({"app": "web"}))["spec"]);
            assert_eq!(todo("u1", &wanted, Some(&other)), None);
            assert_eq!(todo("u1", &Wanted::Nothing, Some(&other)), None);
        }
        assert_eq!(
            (todo("u1", &Wanted::Unknown, Some(&same)), todo("u1", &Wanted::Unknown, None)),
            (None, None)
        );
    }

    #[test]
    fn only_with_a_selector() {
        assert_eq!(of(json!({"ports": [{"port": 80}]})), None);
        assert_eq!(of(json!({"selector": {}, "ports": [{"port": 80}]})), None);
    }

    #[test]
    fn ports_are_found_by_the_names_that_the_slices_have() {
        let service = of(json!({
            "selector": {"app": "vote"}, "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"},
                      {"name": "again", "port": 81, "targetPort": "web", "protocol": "TCP"},
                      {"name": "dns", "port": 53, "protocol": "UDP"}],
        }))
        .unwrap();
        assert_eq!(
            service["spec"]["ports"],
            json!([{"name": "web", "protocol": "TCP", "port": 80, "targetPort": "web"},
                   {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 53}])
        );
        let service = of(json!({
            "selector": {"app": "vote"},
            "ports": [{"name": "web", "port": 80, "targetPort": 8080}, {"name": "x", "port": 81, "targetPort": "web"}],
        }));
        assert_eq!(
            service.unwrap()["spec"]["ports"],
            json!([{"name": "tcp-80", "protocol": "TCP", "port": 80, "targetPort": 8080},
                   {"name": "web", "protocol": "TCP", "port": 81, "targetPort": "web"}])
        );
    }

    #[test]
    fn it_is_the_mesh_services_own() {
        let service = of(json!({"selector": {"app": "vote"}, "ports": [{"port": 80}]})).unwrap();
        assert_eq!(service["metadata"]["ownerReferences"][0]["uid"], "u1");
        assert_eq!(service["spec"]["clusterIP"], "None");
    }
}
