//! Holds a JSON value against a structural schema, as the API server does: unknown fields, types, bounds,
//! patterns, enums, required fields, list types.
//!
//! It knows the schema features that our CRD and the EndpointSlice schema use and refuses to guess: see
//! [`unknown_keyword`].

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use regex::Regex;
use serde_json::{Map, Value};

use super::error::{FieldError, Reason};

/// What our patterns mean, for people.
const KNOWN_PATTERNS: &[(&str, &str)] = &[
    (
        r"^([0-9]+-)*[0-9]*[a-z][a-z0-9]*(-[a-z0-9]+)*$",
        "a port name: lower-case letters, digits and single '-' between them, with at least one letter",
    ),
    (
        "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        "a DNS label: lower-case letters, digits and '-', with a letter or digit at both ends",
    ),
    (
        "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
        "the value of a label: letters, digits, '-', '_' and '.', with a letter or digit at both ends, or nothing",
    ),
];

/// Nesting that no real manifest reaches.
const MAX_DEPTH: usize = 64;

/// Checks `value`, fills in defaults and drops nulls where the schema has no `nullable`, all as the API
/// server does. Errors come in the order of the manifest.
pub fn validate(schema: &Value, value: &mut Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    Walk { errors: &mut errors }.value(schema, value, &mut String::new(), 0);
    errors
}

/// Takes out the fields that the schema does not have, as a client of Kubernetes does that is older than the server.
pub fn prune(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            let properties = schema["properties"].as_object();
            let additional = schema.get("additionalProperties").filter(|a| a.is_object());
            let known = |name: &str| properties.and_then(|p| p.get(name)).or(additional);
            if schema["x-kubernetes-preserve-unknown-fields"] != true {
                map.retain(|name, _| known(name).is_some());
            }
            for (name, item) in map.iter_mut() {
                if let Some(schema) = known(name) {
                    prune(schema, item);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| prune(&schema["items"], item)),
        _ => {}
    }
}

struct Walk<'a> {
    errors: &'a mut Vec<FieldError>,
}

impl Walk<'_> {
    fn error(&mut self, path: &str, reason: Reason, message: String) {
        self.errors.push(FieldError::new(path, reason, message));
    }

    fn value(&mut self, schema: &Value, value: &mut Value, path: &mut String, depth: usize) {
        if depth > MAX_DEPTH {
            return self.error(path, Reason::Invalid, "is nested too deeply".into());
        }
        let int_or_string = schema["x-kubernetes-int-or-string"] == true;
        let expected = schema["type"].as_str();
        let fits = match (expected, &*value) {
            _ if int_or_string => value.is_string() || is_integer(value),
            (Some("object"), Value::Object(_))
            | (Some("array"), Value::Array(_))
            | (Some("string"), Value::String(_))
            | (Some("boolean"), Value::Bool(_))
            | (Some("number"), Value::Number(_))
            | (None, _) => true,
            (Some("integer"), n) => is_integer(n),
            _ => false,
        };
        if fits && (expected == Some("integer") || int_or_string) {
            // `80.0` and `1e2` are whole numbers to the API server, and are kept as such.
            if let Some(whole) = value.as_f64().filter(|f| value.is_f64() && f.abs() < 9e15) {
                *value = Value::from(whole as i64);
            }
        }
        if !fits {
            let want = match expected {
                _ if int_or_string => "a number or a string",
                Some("object") => "a mapping",
                Some("array") => "a list",
                Some("integer") => "a whole number",
                Some("number") => "a number",
                Some("boolean") => "true or false",
                _ => "a string",
            };
            let bare = expected == Some("string") && (value.is_boolean() || value.is_number());
            let hint = if bare { " (put it in quotes)" } else { "" };
            let message = format!("must be {want}, not {}{hint}", describe(value));
            return self.error(path, Reason::Invalid, message);
        }
        match value {
            Value::Object(map) => self.object(schema, map, path, depth),
            Value::Array(items) => self.array(schema, items, path, depth),
            Value::String(text) => self.string(schema, text, path),
            Value::Number(number) => self.number(schema, number.as_f64().unwrap_or(f64::NAN), path),
            Value::Bool(_) | Value::Null => {}
        }
        if let Some(allowed) = schema["enum"].as_array().filter(|a| !a.contains(value)) {
            let names: Vec<String> = allowed.iter().map(describe_plain).collect();
            let message = format!("must be one of {}, not {}", names.join(", "), describe(value));
            self.error(path, Reason::NotSupported, message);
        }
    }

    fn object(&mut self, schema: &Value, map: &mut Map<String, Value>, path: &mut String, depth: usize) {
        let properties = schema["properties"].as_object();
        let additional = schema.get("additionalProperties").filter(|a| a.is_object());
        for (name, property) in properties.into_iter().flatten() {
            let absent = match map.get(name) {
                None => true,
                Some(Value::Null) => property["nullable"] != true,
                Some(_) => false,
            };
            if absent {
                match property.get("default") {
                    Some(default) => map.insert(name.clone(), default.clone()),
                    None => map.remove(name),
                };
            }
        }
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !map.contains_key(name) {
                let at = join(path, name);
                self.error(&at, Reason::Required, "is required".into());
            }
        }
        if let Some(max) = schema["maxProperties"].as_u64().filter(|max| map.len() as u64 > *max) {
            let message = format!("has {} entries; at most {max} are allowed", map.len());
            self.error(path, Reason::Invalid, message);
        }
        let open = schema["x-kubernetes-preserve-unknown-fields"] == true;
        for (name, item) in map.iter_mut() {
            let known = properties.and_then(|p| p.get(name)).or(additional);
            let length = path.len();
            push(path, name);
            match known {
                Some(schema) => self.value(schema, item, path, depth + 1),
                None if open => {}
                None => {
                    let message = match nearest(name, properties) {
                        Some(near) => format!("is not a field here; did you mean {near}?"),
                        None => "is not a field here".into(),
                    };
                    self.error(path, Reason::UnknownField, message);
                }
            }
            path.truncate(length);
        }
    }

    fn array(&mut self, schema: &Value, items: &mut [Value], path: &mut String, depth: usize) {
        let length = items.len() as u64;
        if let Some(max) = schema["maxItems"].as_u64().filter(|max| length > *max) {
            let message = format!("has {length} items; at most {max} are allowed");
            return self.error(path, Reason::Invalid, message);
        }
        if let Some(min) = schema["minItems"].as_u64().filter(|min| length < *min) {
            let message = format!("has {length} items; at least {min} must be given");
            self.error(path, Reason::Invalid, message);
        }
        for (i, item) in items.iter_mut().enumerate() {
            let length = path.len();
            path.push_str(&format!("[{i}]"));
            self.value(&schema["items"], item, path, depth + 1);
            path.truncate(length);
        }
        let keys: Vec<&str> = match schema["x-kubernetes-list-type"].as_str() {
            Some("set") => Vec::new(),
            Some("map") => schema["x-kubernetes-list-map-keys"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect(),
            _ => return,
        };
        let mut seen = BTreeSet::new();
        for (i, item) in items.iter().enumerate() {
            let identity: Vec<String> = if keys.is_empty() {
                vec![item.to_string()]
            } else {
                keys.iter().map(|k| item[*k].to_string()).collect()
            };
            if !seen.insert(identity.clone()) {
                let what = match keys.as_slice() {
                    [] => format!("the value {}", identity.join("")),
                    _ => keys
                        .iter()
                        .zip(&identity)
                        .map(|(k, v)| format!("{k} {v}"))
                        .collect::<Vec<_>>()
                        .join(" and "),
                };
                let message = format!("is a duplicate: another item has {what}");
                self.error(&format!("{path}[{i}]"), Reason::Duplicate, message);
            }
        }
    }

    fn string(&mut self, schema: &Value, text: &str, path: &str) {
        let length = text.chars().count() as u64;
        if let Some(max) = schema["maxLength"].as_u64().filter(|max| length > *max) {
            let message = format!("has {length} characters; at most {max} are allowed");
            return self.error(path, Reason::Invalid, message);
        }
        if let Some(min) = schema["minLength"].as_u64().filter(|min| length < *min) {
            let message = format!("has {length} characters; at least {min} must be given");
            self.error(path, Reason::Invalid, message);
        }
        if let Some(pattern) = schema["pattern"].as_str()
            && !compiled(pattern).is_some_and(|r| r.is_match(text))
        {
            let message = match KNOWN_PATTERNS.iter().find(|(known, _)| *known == pattern) {
                Some((_, meaning)) => format!("{text:?} is not {meaning}"),
                None => format!("{text:?} does not match {pattern}"),
            };
            self.error(path, Reason::Invalid, message);
        }
    }

    fn number(&mut self, schema: &Value, number: f64, path: &str) {
        if let Some(min) = schema["minimum"].as_f64().filter(|min| number < *min) {
            self.error(path, Reason::Invalid, format!("must be at least {min}, not {number}"));
        }
        if let Some(max) = schema["maximum"].as_f64().filter(|max| number > *max) {
            self.error(path, Reason::Invalid, format!("must be at most {max}, not {number}"));
        }
        let width = match schema["format"].as_str() {
            Some("int32") => f64::from(i32::MAX),
            Some("int64") => i64::MAX as f64,
            _ => return,
        };
        if number.abs() > width {
            self.error(path, Reason::Invalid, format!("{number} does not fit {}", schema["format"]));
        }
    }
}

/// A keyword in a schema that [`validate`] does not know, if there is one: a test keeps our schemas free of
/// them, so that nothing goes unchecked.
pub fn unknown_keyword(schema: &Value) -> Option<String> {
    const KNOWN: &[&str] = &[
        "type",
        "description",
        "default",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "enum",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "maxProperties",
        "pattern",
        "format",
        "nullable",
        "title",
        "$schema",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-map-type",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-validations",
    ];
    let map = schema.as_object()?;
    map.keys().find(|k| !KNOWN.contains(&k.as_str())).cloned().or_else(|| {
        let properties =
            map.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(_, v)| v);
        ["items", "additionalProperties"]
            .into_iter()
            .filter_map(|k| map.get(k))
            .chain(properties)
            .find_map(unknown_keyword)
    })
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0)
}

fn describe(value: &Value) -> String {
    match value {
        Value::Object(_) => "a mapping".into(),
        Value::Array(_) => "a list".into(),
        Value::Null => "null".into(),
        Value::String(s) if s.chars().count() > 80 => {
            format!("{:?}…", s.chars().take(80).collect::<String>())
        }
        other => other.to_string(),
    }
}

fn describe_plain(value: &Value) -> String {
    match value.as_str() {
        Some(text) if !text.is_empty() => text.into(),
        _ => value.to_string(),
    }
}

/// Appends a field's name to a path. Names that would read as a path are bracketed.
pub fn push(path: &mut String, name: &str) {
    let plain =
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '$'));
    if !plain {
        path.push_str(&format!("[{name:?}]"));
    } else {
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(name);
    }
}

fn join(path: &str, name: &str) -> String {
    let mut joined = path.to_owned();
    push(&mut joined, name);
    joined
}

/// The known field that `name` was probably meant to be.
fn nearest<'a>(name: &str, properties: Option<&'a Map<String, Value>>) -> Option<&'a str> {
    let best = properties?.keys().map(|known| (distance(name, known), known)).min()?;
    (best.0 <= 2 && best.0 * 2 <= name.chars().count()).then_some(best.1.as_str())
}

/// Edit distance, letter case counting for nothing.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) =
        (a.to_lowercase().chars().collect(), b.to_lowercase().chars().collect());
    if a.len().abs_diff(b.len()) > 2 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            let cost = substituted.min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], cost);
        }
    }
    row[b.len()]
}

/// Compiled patterns; there are a handful.
fn compiled(pattern: &str) -> Option<Arc<Regex>> {
    static CACHE: OnceLock<Mutex<HashMap<String, Option<Arc<Regex>>>>> = OnceLock::new();
    let mut cache = CACHE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    match cache.get(pattern) {
        Some(found) => found.clone(),
        None => cache.entry(pattern.to_owned()).or_insert(Regex::new(pattern).ok().map(Arc::new)).clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(schema: Value, mut value: Value) -> Vec<String> {
        validate(&schema, &mut value).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let schema = json!({"type": "object", "required": ["a"], "properties": {
            "a": {"type": "integer", "minimum": 1, "maximum": 9},
            "list": {"type": "array", "maxItems": 2, "x-kubernetes-list-type": "set", "items": {"type": "string", "maxLength": 3}},
            "mode": {"type": "string", "enum": ["x", ""]},
            "either": {"x-kubernetes-int-or-string": true, "maximum": 5, "maxLength": 2},
            "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
        }});
        let cases = [
            (json!({}), vec!["a: is required"]),
            (json!({"a": null}), vec!["a: is required"]),
            (json!({"a": 10}), vec!["a: must be at most 9, not 10"]),
            (json!({"a": 0}), vec!["a: must be at least 1, not 0"]),
            (json!({"a": "1"}), vec!["a: must be a whole number, not \"1\""]),
            (json!({"a": 1.5}), vec!["a: must be a whole number, not 1.5"]),
            (json!({"a": 1, "lits": []}), vec!["lits: is not a field here; did you mean list?"]),
            (
                json!({"a": 1, "list": ["abc", "abcd"]}),
                vec!["list[1]: has 4 characters; at most 3 are allowed"],
            ),
            (
                json!({"a": 1, "list": ["x", "x"]}),
                vec!["list[1]: is a duplicate: another item has the value \"x\""],
            ),
            (json!({"a": 1, "list": ["x", "y", "z"]}), vec!["list: has 3 items; at most 2 are allowed"]),
            (json!({"a": 1, "mode": "y"}), vec!["mode: must be one of x, \"\", not \"y\""]),
            (json!({"a": 1, "either": 6}), vec!["either: must be at most 5, not 6"]),
            (json!({"a": 1, "either": []}), vec!["either: must be a number or a string, not a list"]),
            (json!({"a": 1, "map": {"a.b/c": 1}}), vec!["map[\"a.b/c\"]: must be true or false, not 1"]),
            (json!({"a": 1, "either": "ab", "map": {"x": true}, "list": ["x", "y"], "mode": ""}), vec![]),
        ];
        for (value, expected) in cases {
            assert_eq!(errors(schema.clone(), value.clone()), expected, "{value}");
        }
    }

    #[test]
    fn takes_out_what_the_schema_does_not_have() {
        let schema = json!({"type": "object", "properties": {
            "a": {"type": "array", "items": {"type": "object", "properties": {"b": {"type": "string"}}}},
            "map": {"type": "object", "additionalProperties": {"type": "string"}},
            "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        }});
        let mut value = json!({"a": [{"b": "x", "c": 1}], "map": {"k": "v"}, "open": {"k": {}}, "more": []});
        prune(&schema, &mut value);
        assert_eq!(value, json!({"a": [{"b": "x"}], "map": {"k": "v"}, "open": {"k": {}}}));
    }

    #[test]
    fn fills_in_defaults_and_drops_nulls() {
        let schema = json!({"type": "object", "properties": {
            "a": {"type": "object", "default": {}, "properties": {"b": {"type": "integer", "default": 3}}},
            "c": {"type": "string"},
        }});
        let mut value = json!({"c": null});
        assert_eq!(validate(&schema, &mut value), vec![]);
        assert_eq!(value, json!({"a": {"b": 3}}));
    }
}
