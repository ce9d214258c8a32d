//! `spec.selector`: the headless core Service that lets Kubernetes find a MeshService's endpoints.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{api, model::ids::ServiceKey};

/// Label of what the controller makes.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "meshlb");

/// The Service that a MeshService with a selector is to have; `None` without one.
pub fn desired(key: &ServiceKey, uid: &str, object: &Value) -> Option<Value> {
    let spec = &object["spec"];
    let selector = spec["selector"].as_object().filter(|labels| !labels.is_empty())?;
    let mut taken = BTreeSet::new();
    let mut ports = Vec::new();
    for port in spec["ports"].as_array().into_iter().flatten() {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        let number = &port["port"];
        // A slice's ports are called as the Service's, whatever the pods call them: a named target is looked up by that name.
        let target = if port["targetPort"].is_null() { number } else { &port["targetPort"] };
        let name = target.as_str().or(port["name"].as_str());
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
            "ipFamilies": spec["ipFamilies"],
            "ipFamilyPolicy": spec["ipFamilyPolicy"],
            "publishNotReadyAddresses": spec["publishNotReadyAddresses"].as_bool().unwrap_or(false),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spec: Value) -> Option<Value> {
        desired(&ServiceKey::new("shop", "vote"), "u1", &json!({"spec": spec}))
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
        assert_eq!(service["metadata"]["ownerReferences"][0]["uid"], "u1");
        assert_eq!(service["spec"]["clusterIP"], "None");
    }
}
