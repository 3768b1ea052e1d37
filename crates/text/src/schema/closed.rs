//! A part of a schema as a document of its own.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

/// A schema that stands in the document `root` as a document of its own, with whatever it refers to under `$defs`, by
/// names that need no escapes. References that lead nowhere stay as they are.
pub(crate) fn closed(schema: &Value, root: &Value) -> Value {
    let mut closing = Closing { root, known: Vec::new(), names: HashMap::new(), taken: HashSet::new() };
    let mut whole = closing.schema(schema);
    let mut definitions = Map::new();
    // What is referred to may refer to more.
    let mut at = 0;
    while let Some((name, target)) = closing.known.get(at).cloned() {
        let definition = closing.schema(target);
        definitions.insert(name, definition);
        at += 1;
    }
    if let (Value::Object(whole), false) = (&mut whole, definitions.is_empty()) {
        whole.insert("$defs".into(), Value::Object(definitions));
    }
    whole
}

/// What a reference within the document leads to.
pub(super) fn target<'s>(reference: &str, root: &'s Value) -> Option<&'s Value> {
    let path = reference.strip_prefix('#')?;
    // Some write the document itself as `#/`.
    if path == "/" {
        return Some(root);
    }
    root.pointer(path).or_else(|| root.pointer(&percent_decoded(path)))
}

/// Rewrites references.
struct Closing<'s> {
    root: &'s Value,
    /// What is referred to: by what new name, and the schema.
    known: Vec<(String, &'s Value)>,
    /// The new name of what a reference leads to.
    names: HashMap<String, String>,
    taken: HashSet<String>,
}

impl<'s> Closing<'s> {
    fn schema(&mut self, schema: &Value) -> Value {
        let Value::Object(schema) = schema else { return schema.clone() };
        let own = schema.iter().filter(|(key, _)| !matches!(key.as_str(), "$defs" | "definitions"));
        Value::Object(own.map(|(key, value)| (key.clone(), self.keyword(key, value))).collect())
    }

    fn keyword(&mut self, key: &str, value: &Value) -> Value {
        match (key, value) {
            ("$ref", Value::String(reference)) => match self.name(reference) {
                Some(name) => format!("#/$defs/{name}").into(),
                None => value.clone(),
            },
            ("enum" | "const" | "default" | "examples", _) => value.clone(),
            ("properties" | "patternProperties" | "dependentSchemas", Value::Object(schemas)) => {
                schemas.iter().map(|(name, schema)| (name.clone(), self.schema(schema))).collect()
            }
            (_, Value::Array(schemas)) => schemas.iter().map(|schema| self.schema(schema)).collect(),
            _ => self.schema(value),
        }
    }

    /// The new name of what a reference leads to.
    fn name(&mut self, reference: &str) -> Option<String> {
        if let Some(name) = self.names.get(reference) {
            return Some(name.clone());
        }
        let target = target(reference, self.root)?;
        let path = reference.trim_start_matches(['#', '/']);
        let mut name = path.strip_prefix("$defs/").unwrap_or(path).replace('/', ".");
        while name.is_empty() || !self.taken.insert(name.clone()) {
            name.push('_');
        }
        self.names.insert(reference.to_owned(), name.clone());
        self.known.push((name.clone(), target));
        Some(name)
    }
}

/// A URI's fragment without its escapes.
fn percent_decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        let code = match (first, others) {
            (b'%', [high, low, ..]) => {
                std::str::from_utf8(&[*high, *low]).ok().and_then(|code| u8::from_str_radix(code, 16).ok())
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &others[2..] } else { others };
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}
