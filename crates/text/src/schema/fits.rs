//! Whether a value fits a schema.

use std::cell::{Cell, RefCell};

use serde_json::{Map, Value};

use super::{Search, list, unnamed};
use crate::grammar::StringCheck;

/// Whether a value fits a schema of the document `root`. It is given the benefit of the doubt: keywords that are not
/// looked at (`pattern`, `not`, `uniqueItems`), ways that cannot be told and what would take too long rule nothing out.
pub(crate) fn fits(value: &Value, schema: &Value, root: &Value) -> bool {
    Look::new(root).fits(value, schema)
}

/// Whether a value fits a schema of the document `root` without doubt. What grammars hold strings to is looked at too.
pub(crate) fn surely_fits(value: &Value, schema: &Value, root: &Value) -> bool {
    let look = Look { strings: Some(RefCell::default()), ..Look::new(root) };
    look.fits(value, schema) && !look.doubtful.get()
}

/// Looks at parts of a schema and of values before there are no more: in a schema of many ways that contains itself
/// there is no end of them.
const MAX_LOOKS: usize = 100_000;

/// Looking at a string's `pattern` and `format` takes as long as so many looks.
const STRING_LOOKS: usize = 32;

/// All keywords that are looked at, and those that ask nothing of a value.
const KNOWN: [&str; 38] = [
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "enum",
    "const",
    "type",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minItems",
    "maxItems",
    "prefixItems",
    "items",
    "minProperties",
    "maxProperties",
    "required",
    "properties",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
];

/// Looks at a document, and counts its looks.
pub(super) struct Look<'s> {
    pub(super) root: &'s Value,
    looks: Cell<usize>,
    most: usize,
    /// Looks at `pattern` and `format`, if these are looked at.
    strings: Option<RefCell<StringCheck>>,
    /// Whether something was let pass without a look.
    doubtful: Cell<bool>,
}

impl<'s> Look<'s> {
    pub(super) fn new(root: &'s Value) -> Self {
        Self::within(root, MAX_LOOKS)
    }

    /// With at most so many looks.
    pub(super) fn within(root: &'s Value, most: usize) -> Self {
        let (looks, doubtful) = (Cell::new(0), Cell::new(false));
        Self { root, looks, most: most.min(MAX_LOOKS), strings: None, doubtful }
    }

    /// The looks so far.
    pub(super) fn count(&self) -> usize {
        self.looks.get()
    }

    /// Whether there is no more looking.
    pub(super) fn is_over(&self) -> bool {
        self.looks.get() > self.most
    }

    /// Whether there is no more looking, as so many looks more would be too many.
    pub(super) fn is_tired(&self, looks: usize) -> bool {
        self.looks.update(|all| all.saturating_add(looks));
        self.is_over()
    }

    /// What a value that fits all of these parts may be, if one of them lists it.
    pub(super) fn listed(&self, parts: &[&'s Map<String, Value>]) -> Option<Vec<&'s Value>> {
        let (at, list) = parts.iter().enumerate().find_map(|(at, part)| Some((at, list(part)?)))?;
        let fits = |value: &&Value| {
            parts.iter().enumerate().all(|(other, part)| match other == at {
                true => self.fits_unlisted(value, part),
                false => self.fits_part(value, part),
            })
        };
        Some(list.iter().filter(fits).collect())
    }

    fn fits(&self, value: &Value, schema: &Value) -> bool {
        let Some(ways) = Search::new(self).ways(schema) else { return self.passes() };
        let doubtful = self.doubtful.get();
        ways.iter().any(|way| {
            // What was doubted of a way that it does not fit is of no matter.
            self.doubtful.set(doubtful);
            way.parts.iter().all(|part| self.fits_part(value, part))
        })
    }

    /// Lets something pass without a look.
    fn passes(&self) -> bool {
        self.doubtful.set(true);
        true
    }

    /// Whether it fits what a schema says without its references and combinations.
    fn fits_part(&self, value: &Value, part: &Map<String, Value>) -> bool {
        let is_listed = |list: &[Value]| match self.is_tired(list.len()) {
            true => self.passes(),
            false => list.iter().any(|listed| same(listed, value)),
        };
        list(part).is_none_or(is_listed) && self.fits_unlisted(value, part)
    }

    /// The same, whatever the schema lists.
    fn fits_unlisted(&self, value: &Value, part: &Map<String, Value>) -> bool {
        if self.is_tired(length(value)) {
            return self.passes();
        }
        if part.get("const").is_some_and(|only| !same(only, value)) {
            return false;
        }
        let of_type = match part.get("type") {
            Some(Value::String(name)) => is_a(value, name),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).any(|name| is_a(value, name)),
            _ => true,
        };
        if !of_type {
            return false;
        }
        if !self.doubtful.get() && part.keys().any(|key| !KNOWN.contains(&key.as_str())) {
            self.passes();
        }
        match value {
            Value::Number(number) => number.as_f64().is_none_or(|number| number_fits(number, part)),
            Value::String(text) => {
                count_fits(text.chars().count(), part, "minLength", "maxLength") && self.text_fits(text, part)
            }
            Value::Array(items) => {
                count_fits(items.len(), part, "minItems", "maxItems") && self.items_fit(items, part)
            }
            Value::Object(object) => {
                count_fits(object.len(), part, "minProperties", "maxProperties")
                    && self.members_fit(object, part)
            }
            Value::Null | Value::Bool(_) => true,
        }
    }

    /// Whether a string fits `pattern` and `format`.
    fn text_fits(&self, text: &str, part: &Map<String, Value>) -> bool {
        let keywords = ["pattern", "format"].into_iter();
        let keywords: Map<String, Value> =
            keywords.filter_map(|key| Some((key.to_owned(), part.get(key)?.clone()))).collect();
        if keywords.is_empty() {
            return true;
        }
        let told = match &self.strings {
            Some(strings) if !self.is_tired(STRING_LOOKS + text.len() / 16) => {
                strings.borrow_mut().fits(text, &keywords)
            }
            _ => None,
        };
        told.unwrap_or_else(|| self.passes())
    }

    fn items_fit(&self, items: &[Value], part: &Map<String, Value>) -> bool {
        let first = part.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let rest = part.get("items").filter(|rest| !rest.is_array());
        if part.contains_key("items") && rest.is_none() {
            self.passes();
        }
        items.iter().enumerate().all(|(at, item)| {
            let schema = first.get(at).or(rest);
            schema.is_none_or(|schema| self.fits(item, schema))
        })
    }

    fn members_fit(&self, object: &Map<String, Value>, part: &Map<String, Value>) -> bool {
        let required = part.get("required").and_then(Value::as_array).into_iter().flatten();
        let complete = required.filter_map(Value::as_str).all(|name| object.contains_key(name));
        complete
            && object.iter().all(|(name, value)| {
                let schema =
                    part.get("properties").and_then(|named| named.get(name)).or_else(|| unnamed(part));
                schema.is_none_or(|schema| self.fits(value, schema))
            })
    }
}

/// How long it takes to look at a value, but for what is in it.
fn length(value: &Value) -> usize {
    1 + match value {
        Value::String(text) => text.len() / 64,
        Value::Array(items) => items.len(),
        Value::Object(members) => members.len(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// Numbers are the same if their values are: 1 is 1.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

fn is_a(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => true,
    }
}

fn number_fits(number: f64, part: &Map<String, Value>) -> bool {
    let bound = |key: &str| part.get(key).and_then(Value::as_f64);
    bound("minimum").is_none_or(|least| number >= least)
        && bound("maximum").is_none_or(|most| number <= most)
        && bound("exclusiveMinimum").is_none_or(|least| number > least)
        && bound("exclusiveMaximum").is_none_or(|most| number < most)
        && bound("multipleOf").is_none_or(|unit| {
            let times = number / unit;
            // 0.3 is three times 0.1, which floating point does not know.
            (times - times.round()).abs() < 1e-9
        })
}

fn count_fits(count: usize, part: &Map<String, Value>, least: &str, most: &str) -> bool {
    let bound = |key: &str| part.get(key).and_then(Value::as_u64);
    bound(least).is_none_or(|least| count as u64 >= least)
        && bound(most).is_none_or(|most| count as u64 <= most)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cannot_be_told_is_doubted_where_it_asks_something_of_the_value() {
        let date_or_null = json!({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]});
        let matched = json!({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^a"}]});
        for (schema, value, sure) in [
            (json!({"type": "integer", "format": "int32"}), json!(3), true),
            (json!({"type": "string", "format": "date"}), json!("2024-02-29"), true),
            (json!({"type": "string", "format": "date"}), json!("x"), false),
            (json!({"type": "string", "format": "path"}), json!("x"), true),
            (json!({"type": "string", "pattern": "[0-9]", "maxLength": 3}), json!("a\n1"), true),
            (json!({"type": "string", "pattern": "^\\d+$", "format": "date"}), json!("2024-02-29"), false),
            (json!({"type": "string", "pattern": "^[^a]+$"}), json!("\u{1}\t\"\\/é𝄞"), true),
            (json!({"type": "string", "pattern": "^(?!a)"}), json!("b"), false),
            (json!({"type": "string", "pattern": 1}), json!("b"), false),
            (date_or_null.clone(), json!(null), true),
            (date_or_null, json!("x"), false),
            (matched.clone(), json!(null), true),
            (matched.clone(), json!("ab"), true),
            (matched, json!("b"), false),
            (json!({"not": {"type": "null"}}), json!(1), false),
            (json!({"type": "string", "title": "t", "description": "d"}), json!("x"), true),
        ] {
            assert!(fits(&value, &schema, &schema), "{value} in {schema}");
            assert_eq!(surely_fits(&value, &schema, &schema), sure, "{value} in {schema}");
        }
    }
}
