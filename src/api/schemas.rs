//! The schemas that manifests are held against.
//!
//! They follow from the types of [`super::v1alpha1`] and of `k8s-openapi`. Deriving them takes longer than all else that a
//! command does at its start, so the result is kept in files, which a test holds against the types.

use std::sync::OnceLock;

use serde_json::Value;

/// That of a MeshService: the CRD's, with the metadata that no CRD describes.
pub fn mesh_service() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| parsed(include_str!("schemas/mesh_service.json")))
}

/// That of an EndpointSlice, with the bounds that Kubernetes' own validation has beside its schema.
pub fn endpoint_slice() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| parsed(include_str!("schemas/endpoint_slice.json")))
}

/// The same with any type of addresses and any protocol, since a newer Kubernetes may have more.
pub fn served_endpoint_slice() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let mut schema = endpoint_slice().clone();
        let port = "/properties/ports/items/properties/protocol";
        for field in ["/properties/addressType", port] {
            if let Some(Value::Object(field)) = schema.pointer_mut(field) {
                field.remove("enum");
            }
        }
        schema
    })
}

#[expect(clippy::expect_used, reason = "both files are compiled in")]
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("a test reads both files")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{api::discovery::v1::EndpointSlice, apimachinery::pkg::apis::meta::v1::ObjectMeta};
    use kube::core::cel::compile_schema;
    use schemars::{JsonSchema, generate::SchemaSettings};
    use serde_json::json;

    use super::*;
    use crate::api::{crd, structural};

    fn derived_mesh_service() -> Value {
        let mut schema = crd::schema().clone();
        schema["properties"]["apiVersion"] = json!({"type": "string"});
        schema["properties"]["kind"] = json!({"type": "string"});
        schema["properties"]["metadata"] = derived_metadata();
        without_descriptions(schema)
    }

    fn derived_endpoint_slice() -> Value {
        let mut schema = schema_of::<EndpointSlice>();
        schema["properties"]["metadata"] = derived_metadata();
        schema["properties"]["addressType"]["enum"] = json!(["IPv4", "IPv6", "FQDN"]);
        schema["properties"]["ports"]["maxItems"] = json!(20_000);
        schema["properties"]["endpoints"]["maxItems"] = json!(1000);
        schema["properties"]["endpoints"]["items"]["properties"]["addresses"]["minItems"] = json!(1);
        schema["properties"]["endpoints"]["items"]["properties"]["addresses"]["maxItems"] = json!(100);
        let port = &mut schema["properties"]["ports"]["items"]["properties"];
        port["port"]["minimum"] = json!(0);
        port["port"]["maximum"] = json!(65_535);
        port["protocol"]["enum"] = json!(["TCP", "UDP", "SCTP"]);
        without_descriptions(schema)
    }

    fn derived_metadata() -> Value {
        let mut schema = schema_of::<ObjectMeta>();
        let fields = &mut schema["properties"]["managedFields"]["items"]["properties"]["fieldsV1"];
        *fields = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        schema
    }

    fn schema_of<T: JsonSchema>() -> Value {
        let generator = SchemaSettings::openapi3()
            .with(|s| {
                s.inline_subschemas = true;
                s.meta_schema = None;
            })
            .into_generator();
        let mut schema = generator.into_root_schema_for::<T>().to_value();
        drop_nullable(&mut schema);
        schema
    }

    /// Go drops nulls for want of another meaning: so do we, by not letting any through.
    fn drop_nullable(value: &mut Value) {
        match value {
            Value::Object(map) => {
                if map.get("nullable").is_some_and(Value::is_boolean) {
                    map.remove("nullable");
                }
                map.values_mut().for_each(drop_nullable);
            }
            Value::Array(items) => items.iter_mut().for_each(drop_nullable),
            _ => {}
        }
    }

    /// Without the text, which no check looks at. A property that is called `description` is an object and stays.
    fn without_descriptions(mut value: Value) -> Value {
        fn walk(value: &mut Value) {
            match value {
                Value::Object(map) => {
                    map.retain(|key, value| {
                        !(matches!(key.as_str(), "description" | "title") && value.is_string())
                    });
                    map.values_mut().for_each(walk);
                }
                Value::Array(items) => items.iter_mut().for_each(walk),
                _ => {}
            }
        }
        walk(&mut value);
        value
    }

    #[test]
    fn the_files_are_up_to_date() {
        for (name, derived, kept) in [
            ("mesh_service", derived_mesh_service(), mesh_service as fn() -> &'static Value),
            ("endpoint_slice", derived_endpoint_slice(), endpoint_slice),
        ] {
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                let path = format!("{}/src/api/schemas/{name}.json", env!("CARGO_MANIFEST_DIR"));
                std::fs::write(path, format!("{derived}\n")).unwrap();
            } else {
                assert_eq!(*kept(), derived, "run with UPDATE_GOLDEN=1");
            }
        }
    }

    #[test]
    fn nothing_in_them_goes_unchecked() {
        assert_eq!(structural::unknown_keyword(mesh_service()), None);
        assert_eq!(structural::unknown_keyword(endpoint_slice()), None);
        assert!(compile_schema(mesh_service()).compilation_errors().is_empty());
    }
}
