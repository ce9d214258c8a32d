//! YAML (and so JSON) text as a tree that remembers the line of every value.
//!
//! Scalars are read as kubectl reads them (YAML 1.1: `no` is false, `010` is 8), so that a manifest means the
//! same in a folder and in a cluster. Duplicate keys are errors; aliases and nesting are bounded.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::{Options, Spanned};

/// A value and where it stands.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// Line, counted from 1; 0 where it is not known.
    pub line: u64,
    /// The value.
    pub content: Content,
}

/// A YAML value.
#[derive(Clone, PartialEq, Debug)]
pub enum Content {
    /// Null, a boolean, a number or a string.
    Scalar(Value),
    /// A list.
    List(Vec<Node>),
    /// A mapping: the line of each key, the key, the value.
    Map(Vec<(u64, String, Node)>),
}

/// Why a text is not YAML.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ParseError {
    /// Line, where it is known.
    pub line: Option<u64>,
    /// What is wrong.
    pub message: String,
}

/// All documents of a text, empty ones left out.
///
/// # Errors
/// The first place where it is not YAML. JSON is YAML too.
pub fn parse(text: &str) -> Result<Vec<Node>, ParseError> {
    let mut options = Options::default();
    // How large a text is, and with it all that is in it, is limited by who reads it. What aliases make of it is not.
    if let Some(budget) = &mut options.budget {
        let most = text.len().saturating_add(1);
        (budget.max_documents, budget.max_nodes, budget.max_events) = (most, most, most.saturating_mul(4));
        budget.max_total_scalar_bytes = budget.max_total_scalar_bytes.max(most);
    }
    options.legacy_octal_numbers = true;
    options.emit_comments = false;
    let nodes: Vec<Node> = serde_saphyr::from_multiple_with_options(text, options).map_err(|e| {
        ParseError { line: e.location().map(|l| l.line()).filter(|l| *l > 0), message: plain_message(&e) }
    })?;
    Ok(nodes.into_iter().filter(|n| n.content != Content::Scalar(Value::Null)).collect())
}

/// The error in one line, without position and source excerpt, which the caller prints in its own way.
fn plain_message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let line = text.lines().next().unwrap_or_default();
    let message = match line.find(" at line ") {
        Some(at) => &line[..at],
        None => line,
    };
    // Advice to the author of a program, not of a manifest.
    let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or(message);
    message.trim_end_matches([':', ',', ' ']).to_owned()
}

impl Node {
    /// The value as JSON, positions left out.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Scalar(value) => value.clone(),
            Content::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Content::Map(entries) => {
                Value::Object(entries.iter().map(|(_, k, v)| (k.clone(), v.to_json())).collect::<Map<_, _>>())
            }
        }
    }

    /// The value of a key of a mapping.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.entry(key).map(|(_, node)| node)
    }

    /// The text of a key of a mapping.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.content {
            Content::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    fn entry(&self, key: &str) -> Option<(u64, &Self)> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|(_, k, _)| k == key).map(|(line, _, v)| (*line, v)),
            _ => None,
        }
    }

    /// The line of the value at a path as [`crate::api::FieldError`] writes them, or of the nearest thing
    /// around it that exists.
    pub fn line_of(&self, path: &str) -> u64 {
        let mut node = self;
        let mut line = self.line;
        for step in steps(path) {
            let next = match (step, &node.content) {
                (Step::Key(key), _) => node.entry(&key),
                (Step::Index(i), Content::List(items)) => items.get(i).map(|item| (item.line, item)),
                (Step::Index(_), _) => None,
            };
            match next {
                Some((at, found)) => (line, node) = (if at > 0 { at } else { line }, found),
                None => break,
            }
        }
        line
    }
}

enum Step {
    Key(String),
    Index(usize),
}

/// Splits `spec.ports[0].publish` and `spec.weights["a.b"]`.
fn steps(path: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let Some((key, after)) = quoted.split_once("\"]") else { break };
            steps.push(Step::Key(key.to_owned()));
            rest = after;
        } else if let Some(bracket) = rest.strip_prefix('[') {
            let Some((index, after)) = bracket.split_once(']') else { break };
            let Ok(index) = index.parse() else { break };
            steps.push(Step::Index(index));
            rest = after;
        } else {
            let name = rest.trim_start_matches('.');
            let end = name.find(['.', '[']).unwrap_or(name.len());
            if end == 0 {
                break;
            }
            steps.push(Step::Key(name[..end].to_owned()));
            rest = &name[end..];
        }
    }
    steps
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), content: spanned.value })
    }
}

/// A key of a mapping. Kubernetes has no other keys than strings; kubectl writes scalars as JSON keys.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Bool(v)))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Content, E> {
        Ok(Content::Scalar(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Content, E> {
        Ok(Content::Scalar(v.into()))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Content, E> {
        Ok(Content::Scalar(Number::from_f64(v).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E>(self, v: &str) -> Result<Content, E> {
        Ok(Content::Scalar(v.into()))
    }

    fn visit_string<E>(self, v: String) -> Result<Content, E> {
        Ok(Content::Scalar(v.into()))
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Content::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<Key>>()? {
            entries.push((key.referenced.line(), key.value.0, map.next_value()?));
        }
        Ok(Content::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_as_kubectl_does() {
        let nodes = parse("# nothing\n---\na: no\nb: 010\nc: '010'\nd: [1, 2.5, null, ~]\ne: {f: on}\n---\n---\n{\"g\": 1}\n").unwrap();
        let values: Vec<Value> = nodes.iter().map(Node::to_json).collect();
        assert_eq!(
            values,
            [
                json!({"a": false, "b": 8, "c": "010", "d": [1, 2.5, null, null], "e": {"f": true}}),
                json!({"g": 1})
            ]
        );
    }

    #[test]
    fn knows_lines() {
        let nodes = parse("---\na: 1\nb:\n- c: 2\n- c: 3\n  'x.y':\n    z: 1\n---\nq: 1\n").unwrap();
        let line = |path| nodes[0].line_of(path);
        assert_eq!(
            [
                line(""),
                line("a"),
                line("b"),
                line("b[1].c"),
                line("b[1][\"x.y\"].z"),
                line("b[1].nope"),
                line("b[7]")
            ],
            [2, 2, 3, 5, 7, 5, 3]
        );
        assert_eq!(nodes[1].line_of("q"), 9);
    }

    /// As many as there are: who reads a file limits its size.
    #[test]
    fn has_no_limit_of_documents_or_values() {
        let many = "---\na: 1\n".repeat(3000);
        assert_eq!(parse(&many).unwrap().len(), 3000);
        let list = format!("a:\n{}", "- {b: [1, 2, 3], c: {d: e}}\n".repeat(60_000));
        assert_eq!(parse(&list).unwrap().len(), 1);
        // But what a text makes of itself by aliases is limited.
        let bomb: String = (1..12)
            .map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 9].join(", ")))
            .collect();
        assert!(parse(&format!("a0: &a0 x\n{bomb}")).is_err());
    }

    #[test]
    fn errors_have_lines() {
        for (text, line) in
            [("a: 1\nb: [\n", 2), ("a: 1\na: 2\n", 2), ("a: 1\n\tb: 2\n", 1), ("a: *nope\n", 1)]
        {
            let error = parse(text).unwrap_err();
            assert_eq!(error.line, Some(line), "{text:?}: {error}");
            assert!(!error.message.is_empty() && !error.message.contains('\n'), "{error:?}");
        }
    }
}
