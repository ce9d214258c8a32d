//! The CustomResourceDefinitions, as YAML for `kubectl apply` and as the schema that manifests are held
//! against.

use std::sync::OnceLock;

use kube::CustomResourceExt;
use serde_json::{Map, Value};

use super::{mesh_node::MeshNode, v1alpha1::MeshService};

/// The CRD of MeshServices as JSON.
///
/// What the derive macros make, less `nullable` (the API server then drops explicit nulls, as kubectl
/// users expect) and less integer formats that Kubernetes does not know (`uint16`).
pub fn crd() -> &'static Value {
    static CRD: OnceLock<Value> = OnceLock::new();
    CRD.get_or_init(|| {
        let mut value = serde_json::to_value(MeshService::crd()).unwrap_or_default();
        clean(&mut value);
        value
    })
}

/// The CRD of MeshNodes as JSON, cleaned in the same way. There is no spec: nothing is asked of a node.
pub fn node_crd() -> &'static Value {
    static CRD: OnceLock<Value> = OnceLock::new();
    CRD.get_or_init(|| {
        let mut value = serde_json::to_value(MeshNode::crd()).unwrap_or_default();
        clean(&mut value);
        if let Some(schema) = value.pointer_mut(SCHEMA).and_then(Value::as_object_mut) {
            schema.remove("required");
            if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
                properties.remove("spec");
            }
        }
        value
    })
}

const SCHEMA: &str = "/spec/versions/0/schema/openAPIV3Schema";

/// The CRDs as YAML, by the file of `crds/` that holds each; `meshlb crd` prints all.
///
/// # Errors
/// They can't be serialized, which a test rules out.
pub fn crds_yaml() -> Result<[(&'static str, String); 2], serde_saphyr::SerializeError> {
    let yaml = |crd: &Value| -> Result<String, serde_saphyr::SerializeError> {
        let yaml = serde_saphyr::to_string(crd)?;
        Ok(format!("# Written by `meshlb crd`. Do not edit.\n{}", yaml.trim_start_matches("---\n")))
    };
    Ok([("meshservice.yaml", yaml(crd())?), ("meshnode.yaml", yaml(node_crd())?)])
}

/// The schema of a MeshService.
pub fn schema() -> &'static Value {
    crd().pointer(SCHEMA).unwrap_or(&Value::Null)
}

fn clean(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if is_schema(map) {
                map.remove("nullable");
                if map.get("format").and_then(Value::as_str).is_some_and(|f| f.starts_with("uint")) {
                    map.remove("format");
                }
            }
            map.values_mut().for_each(clean);
        }
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Number(n) => {
            // JSONSchemaProps holds bounds as floating point: 65535.0 reads better as 65535.
            if let Some(whole) = n.as_f64().filter(|f| n.is_f64() && f.fract() == 0.0 && f.abs() < 1e15) {
                *value = Value::from(whole as i64);
            }
        }
        _ => {}
    }
}

/// A schema, in contrast to a map of properties that happens to have one called `nullable`.
fn is_schema(map: &Map<String, Value>) -> bool {
    map.get("nullable").is_none_or(Value::is_boolean) && map.get("format").is_none_or(Value::is_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_up_to_date() {
        // A chart can't hold links to files outside of it.
        let dirs = ["crds", "charts/meshlb/files"];
        for (dir, (file, text)) in
            dirs.iter().flat_map(|dir| crds_yaml().unwrap().into_iter().map(move |f| (dir, f)))
        {
            let path = format!("{}/{dir}/{file}", env!("CARGO_MANIFEST_DIR"));
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            assert_eq!(std::fs::read_to_string(path).unwrap_or_default(), text, "run with UPDATE_GOLDEN=1");
        }
    }

    #[test]
    fn a_mesh_node_has_a_status_only() {
        let schema = node_crd().pointer(SCHEMA).unwrap();
        let properties: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(properties, ["status"]);
        assert!(schema.get("required").is_none());
        assert_eq!(node_crd()["spec"]["scope"], "Cluster");
        let status = &schema["properties"]["status"]["properties"];
        assert_eq!(status["failing"]["properties"]["services"]["maxItems"], super::super::mesh_node::NAMED);
        assert_eq!(status["addresses"]["maxItems"], super::super::mesh_node::ADDRESSES);
    }

    #[test]
    fn lists_and_strings_are_bounded() {
        fn walk(path: &str, schema: &Value) {
            let kind = schema["type"].as_str().unwrap_or("");
            let bounded = match kind {
                "string" => schema.get("maxLength").is_some() || schema.get("enum").is_some(),
                "array" => schema.get("maxItems").is_some(),
                _ => schema.get("additionalProperties").is_none() || schema.get("maxProperties").is_some(),
            };
            assert!(bounded, "{path} has no upper bound");
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                walk(&format!("{path}.{name}"), property);
            }
            for below in ["items", "additionalProperties"] {
                if let Some(inner) = schema.get(below) {
                    walk(&format!("{path}[]"), inner);
                }
            }
        }
        walk("spec", &schema()["properties"]["spec"]);
        // Conditions are Kubernetes' own type.
        let mut node = node_crd().pointer(SCHEMA).unwrap()["properties"]["status"].clone();
        node["properties"].as_object_mut().unwrap().remove("conditions");
        walk("status", &node);
    }

    /// An object has every default as soon as the CRD has it, and an agent that does not know the field refuses the object.
    #[test]
    fn defaults_are_those_of_the_first_version() {
        fn walk(path: &str, schema: &Value, out: &mut Vec<String>) {
            out.extend(schema.get("default").map(|_| path.to_owned()));
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                walk(&format!("{path}.{name}"), property, out);
            }
            if let Some(inner) = schema.get("items") {
                walk(&format!("{path}[]"), inner, out);
            }
        }
        let mut found = Vec::new();
        walk("spec", &schema()["properties"]["spec"], &mut found);
        let first = [
            "spec.dns",
            "spec.dns.aliases",
            "spec.dns.answer",
            "spec.dns.ttlSeconds",
            "spec.drain",
            "spec.drain.timeoutSeconds",
            "spec.externalTrafficPolicy",
            "spec.forwarding",
            "spec.healthCheck.fall",
            "spec.healthCheck.intervalSeconds",
            "spec.healthCheck.rise",
            "spec.healthCheck.timeoutSeconds",
            "spec.internalTrafficPolicy",
            "spec.ipFamilies",
            "spec.ipFamilyPolicy",
            "spec.mode",
            "spec.ports[].protocol",
            "spec.ports[].publish.addresses",
            "spec.ports[].publish.mode",
            "spec.ports[].publish.nodeSelector",
            "spec.publishNotReadyAddresses",
            "spec.schedulerFlags",
            "spec.selector",
            "spec.sessionAffinity",
            "spec.sourceRanges",
            "spec.trafficDistribution",
            "spec.vips",
            "spec.weights",
        ];
        assert_eq!(
            found, first,
            "a later field has no default in the CRD: make it optional, and absent mean as before"
        );
    }

    #[test]
    fn no_format_that_kubernetes_does_not_know_and_no_nullable() {
        let text = schema().to_string() + &node_crd().to_string();
        assert!(!text.contains("\"uint") && !text.contains("nullable"), "{text}");
    }
}
