//! A part of a schema as a document of its own.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ptr;

use serde_json::{Map, Value};

/// A schema that stands in the document `root` as a document of its own, with whatever it refers to under `$defs`, by
/// names that need no escapes. References that lead nowhere stay as they are.
///
/// What is referred to stands in the document once, but may hold parts that are referred to themselves, and so stand in
/// it again. No more is added once its text has more than `most` bytes; what is returned then has more, and is of no use.
pub(crate) fn closed(schema: &Value, root: &Value, most: usize) -> Value {
    let mut closing = Closing { root, known: Vec::new(), names: HashMap::new() };
    let mut whole = closing.schema(schema);
    let mut bytes = text_len(&whole);
    let mut definitions = Map::new();
    // What is referred to may refer to more.
    while let Some(&target) = closing.known.get(definitions.len()).filter(|_| bytes <= most) {
        let definition = closing.schema(target);
        bytes += text_len(&definition);
        definitions.insert(definitions.len().to_string(), definition);
    }
    if let (Value::Object(whole), false) = (&mut whole, definitions.is_empty()) {
        whole.insert("$defs".into(), Value::Object(definitions));
    }
    whole
}

/// Bytes of a value as JSON.
fn text_len(value: &Value) -> usize {
    value.to_string().len()
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
    /// What is referred to, each named by its place here.
    known: Vec<&'s Value>,
    /// The places by where these stand: a reference can be spelled in many ways.
    names: HashMap<*const Value, usize>,
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
    fn name(&mut self, reference: &str) -> Option<usize> {
        let target = target(reference, self.root)?;
        let name = *self.names.entry(ptr::from_ref(target)).or_insert(self.known.len());
        if name == self.known.len() {
            self.known.push(target);
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MOST: usize = 1 << 20;

    #[test]
    fn what_is_referred_to_stands_there_once_however_its_references_are_spelled() {
        let spellings = ["#/$defs/jj", "#/$defs/%6Aj", "#/$defs/j%6a", "#/%24defs/jj", "#/$defs/jj"];
        let all: Vec<Value> = spellings.iter().map(|reference| json!({"$ref": reference})).collect();
        let root = json!({"anyOf": all, "$defs": {"jj": {"items": {"$ref": "#/$defs/%6a%6A"}}}});
        let one = json!({"$ref": "#/$defs/0"});
        let expected = json!({"anyOf": vec![&one; 5], "$defs": {"0": {"items": one}}});
        assert_eq!(closed(&root, &root, MOST), expected);
    }

    #[test]
    fn parts_of_one_name_but_for_their_slashes_stay_apart() {
        let root = json!({"anyOf": [{"$ref": "#/a/b"}, {"$ref": "#/a.b"}],
            "a": {"b": {"const": 1}}, "a.b": {"const": 2}});
        let closed = closed(&root, &root, MOST);
        assert_eq!(closed["anyOf"], json!([{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}]));
        assert_eq!(closed["$defs"], json!({"0": {"const": 1}, "1": {"const": 2}}));
    }

    #[test]
    fn a_document_that_grows_too_large_is_left_off() {
        // Each holds all that are within it.
        let mut within = json!({"description": "x".repeat(1000)});
        let mut path = String::from("#");
        let mut all = Vec::new();
        for _ in 0..100 {
            within = json!({"not": within});
            path.push_str("/not");
            all.push(json!({"$ref": path}));
        }
        within["anyOf"] = all.into();
        let length = |most| text_len(&closed(&within, &within, most));
        assert!(length(MOST) > 100_000);
        assert!((20_001..30_000).contains(&length(20_000)), "{}", length(20_000));
    }
}
