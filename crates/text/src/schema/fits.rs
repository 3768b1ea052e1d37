//! Whether a value fits a schema.

use std::cell::Cell;

use serde_json::{Map, Value};

use super::{list, unnamed, ways};

/// Whether a value fits a schema of the document `root`. It is given the benefit of the doubt: keywords that are not
/// looked at (`pattern`, `not`, `uniqueItems`), ways that cannot be told and what would take too long rule nothing out.
pub(crate) fn fits(value: &Value, schema: &Value, root: &Value) -> bool {
    Look::new(root).fits(value, schema)
}

/// Comparisons of a value's parts with a schema's before there are no more: in a schema of many ways that contains itself there is no end of
/// them.
const MAX_LOOKS: usize = 100_000;

/// Looks whether values fit schemas of a document.
pub(super) struct Look<'s> {
    root: &'s Value,
    looks: Cell<usize>,
}

impl<'s> Look<'s> {
    pub(super) fn new(root: &'s Value) -> Self {
        Self { root, looks: Cell::new(0) }
    }

    /// Whether there is no more looking, as so many looks more would be too many.
    fn is_tired(&self, looks: usize) -> bool {
        self.looks.update(|all| all.saturating_add(looks));
        self.looks.get() > MAX_LOOKS
    }

    fn fits(&self, value: &Value, schema: &Value) -> bool {
        let Some(ways) = ways(schema, self.root).filter(|ways| !self.is_tired(ways.len())) else {
            return true;
        };
        ways.iter().any(|way| way.parts.iter().all(|part| self.fits_part(value, part)))
    }

    /// Whether it fits what a schema says without its references and combinations.
    pub(super) fn fits_part(&self, value: &Value, part: &Map<String, Value>) -> bool {
        list(part)
            .is_none_or(|list| self.is_tired(list.len()) || list.iter().any(|listed| same(listed, value)))
            && self.fits_unlisted(value, part)
    }

    /// The same, whatever the schema lists.
    pub(super) fn fits_unlisted(&self, value: &Value, part: &Map<String, Value>) -> bool {
        if part.get("const").is_some_and(|only| !same(only, value)) {
            return false;
        }
        let of_type = match part.get("type") {
            Some(Value::String(name)) => is_a(value, name),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).any(|name| is_a(value, name)),
            _ => true,
        };
        of_type
            && match value {
                Value::Number(number) => number.as_f64().is_none_or(|number| number_fits(number, part)),
                Value::String(text) => count_fits(text.chars().count(), part, "minLength", "maxLength"),
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

    fn items_fit(&self, items: &[Value], part: &Map<String, Value>) -> bool {
        let first = part.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let rest = part.get("items").filter(|rest| !rest.is_array());
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
