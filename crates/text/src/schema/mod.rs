//! What a JSON schema asks of a value at its top: references followed, combinations taken apart.
//!
//! Formats that write arguments between tags or by name need it twice: the grammar, to let through what the schema
//! allows and nothing else, and the reader, to tell a string from JSON. Both ask here, so that what was let through
//! is read as it was meant.

mod closed;
mod fits;

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::{Map, Value};

pub(crate) use closed::closed;
use fits::Look;
pub(crate) use fits::{fits, surely_fits};

/// References and combinations are followed for so many steps; what takes more is a circle, or as good as one.
const MAX_STEPS: usize = 256;

/// More ways are none.
const MAX_WAYS: usize = 64;

/// Of a schema whose objects have more members, all its ways taken together, nothing is told.
const MAX_MEMBERS: usize = 1024;

static ANY: Value = Value::Bool(true);

/// One way to fit a schema: to fit all of these parts, each without its references and combinations.
#[derive(Debug, Clone)]
pub(crate) struct Way<'s> {
    parts: Vec<&'s Map<String, Value>>,
    /// All that a value may be, if the schema lists it (`enum`, `const`).
    listed: Option<Vec<&'s Value>>,
}

/// What an object must be to fit one way of a schema.
#[derive(Debug)]
pub(crate) struct Object<'s> {
    /// The members that the schema names, in its order, without those that it rules out.
    pub(crate) members: Vec<Member<'s>>,
    /// What all others must fit; `None` if there may be no others.
    pub(crate) others: Option<Cow<'s, Value>>,
}

/// A member of an object.
#[derive(Debug)]
pub(crate) struct Member<'s> {
    pub(crate) name: &'s str,
    pub(crate) schema: Cow<'s, Value>,
    pub(crate) required: bool,
}

/// A set of JSON types, as far as text formats tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Types(u8);

/// The ways to fit a schema that stands in the document `root`: whatever fits the schema fits one of them, and the
/// other way round, as far as the keywords say that are not followed here (`not`, `if`).
///
/// `$ref` is followed within the document, the members of `allOf` and what stands beside them join each way, those of
/// `anyOf` and `oneOf` are ways of their own. A way of no type at all is left out, so none are left of a schema that
/// nothing fits.
///
/// `None` where the ways cannot be told: a reference leads nowhere, out of the document or back to where it stands, or
/// there are too many, or it would take too long.
pub(crate) fn ways<'s>(schema: &'s Value, root: &'s Value) -> Option<Vec<Way<'s>>> {
    ways_within(schema, &Look::new(root))
}

/// The same, in the looks that are left.
fn ways_within<'s>(schema: &'s Value, look: &Look<'s>) -> Option<Vec<Way<'s>>> {
    let mut ways = Search::new(look).ways(schema)?;
    for way in &mut ways {
        way.listed = look.listed(&way.parts);
    }
    ways.retain(|way| way.types() != Types::NONE);
    (!look.is_over()).then_some(ways)
}

/// The types of what fits a schema; of all types, where it does not say.
pub(crate) fn types(schema: &Value, root: &Value) -> Types {
    let Some(ways) = ways(schema, root) else { return Types::named(schema) };
    ways.iter().fold(Types::NONE, |types, way| types.or(way.types()))
}

/// What the objects that fit a schema may be, in each of its ways. `None` where these cannot be told, there are too many
/// members, or it would take too long. `looks` are left for this schema and others, and are taken from.
pub(crate) fn objects<'s>(schema: &'s Value, looks: &mut usize) -> Option<Vec<Object<'s>>> {
    let look = Look::within(schema, *looks);
    let objects = objects_within(schema, &look);
    *looks = looks.saturating_sub(look.count());
    objects
}

fn objects_within<'s>(schema: &'s Value, look: &Look<'s>) -> Option<Vec<Object<'s>>> {
    let ways = ways_within(schema, look)?;
    if look.is_tired(ways.iter().map(Way::words).sum())
        || ways.iter().map(|way| way.names().len()).sum::<usize>() > MAX_MEMBERS
    {
        return None;
    }
    let of_objects = ways.iter().filter(|way| way.types().has(Types::OTHER));
    let objects = of_objects.filter_map(|way| way.object(look)).collect();
    (!look.is_over()).then_some(objects)
}

/// What a member of this name must fit in an object that fits a schema, whichever way it does.
pub(crate) fn member<'s>(schema: &'s Value, name: &str) -> Cow<'s, Value> {
    let look = Look::new(schema);
    let ways = ways_within(schema, &look);
    let schemas = ways.and_then(|ways| ways.iter().map(|way| way.member(name, &look)).collect());
    let Some(mut schemas): Option<Vec<Cow<'s, Value>>> = schemas else {
        return Cow::Borrowed(schema["properties"].get(name).unwrap_or(&ANY));
    };
    schemas.dedup();
    match schemas.len() {
        0 => Cow::Borrowed(&ANY),
        1 => schemas.swap_remove(0),
        _ => Cow::Owned(combined("anyOf", schemas)),
    }
}

/// The members that a schema names, in its order.
pub(crate) fn names(schema: &Value) -> Vec<&str> {
    let ways = ways(schema, schema).unwrap_or_default();
    each_once(ways.iter().flat_map(Way::names))
}

/// These names without those that came before.
fn each_once<'s>(names: impl Iterator<Item = &'s str>) -> Vec<&'s str> {
    let mut seen = HashSet::new();
    names.filter(|&name| seen.insert(name)).collect()
}

/// Follows references and combinations.
struct Search<'l, 's> {
    look: &'l Look<'s>,
    steps: usize,
}

impl<'l, 's> Search<'l, 's> {
    fn new(look: &'l Look<'s>) -> Self {
        Self { look, steps: 0 }
    }

    fn ways(&mut self, schema: &'s Value) -> Option<Vec<Way<'s>>> {
        self.steps += 1;
        if self.steps > MAX_STEPS || self.look.is_tired(1) {
            return None;
        }
        let part = match schema {
            Value::Bool(true) => return Some(vec![Way { parts: Vec::new(), listed: None }]),
            Value::Bool(false) => return Some(Vec::new()),
            Value::Object(part) => part,
            _ => return None,
        };
        let mut ways = vec![Way { parts: vec![part], listed: None }];
        if let Some(reference) = part.get("$ref") {
            let target = closed::target(reference.as_str()?, self.look.root)?;
            let target = self.ways(target)?;
            ways = self.crossed(&ways, &target)?;
        }
        for also in part.get("allOf").and_then(Value::as_array).into_iter().flatten() {
            let also = self.ways(also)?;
            ways = self.crossed(&ways, &also)?;
        }
        for key in ["anyOf", "oneOf"] {
            let Some(options) = part.get(key).and_then(Value::as_array) else { continue };
            let mut any = Vec::new();
            for option in options {
                any.extend(self.ways(option)?);
            }
            ways = self.crossed(&ways, &any)?;
        }
        Some(ways)
    }

    /// Each of the ways joined with each of the others.
    fn crossed(&self, ways: &[Way<'s>], others: &[Way<'s>]) -> Option<Vec<Way<'s>>> {
        let parts = |ways: &[Way<'_>]| ways.iter().map(|way| way.parts.len()).sum::<usize>();
        let joined = parts(ways) * others.len() + parts(others) * ways.len();
        if ways.len() * others.len() > MAX_WAYS || self.look.is_tired(joined) {
            return None;
        }
        let join = |way: &Way<'s>, other: &Way<'s>| Way {
            parts: way.parts.iter().chain(&other.parts).copied().collect(),
            listed: None,
        };
        Some(ways.iter().flat_map(|way| others.iter().map(move |other| join(way, other))).collect())
    }
}

impl<'s> Way<'s> {
    /// All that a value may be, if the schema lists it (`enum`, `const`).
    pub(crate) fn listed(&self) -> Option<&[&'s Value]> {
        self.listed.as_deref()
    }

    /// The types of what fits. A schema that names no type but members or items means an object or array.
    pub(crate) fn types(&self) -> Types {
        if let Some(listed) = self.listed() {
            return listed.iter().fold(Types::NONE, |types, value| types.or(Types::of(value)));
        }
        let said = self.parts.iter().fold(Types::ALL, |types, part| types.and(Types::said(part)));
        let structured =
            |part: &&Map<String, Value>| part.contains_key("properties") || part.contains_key("items");
        if said == Types::ALL && self.parts.iter().any(structured) { Types::OTHER } else { said }
    }

    /// The values of a keyword, in all parts that have it.
    pub(crate) fn all(&self, keyword: &'static str) -> impl Iterator<Item = &'s Value> {
        self.parts.iter().filter_map(move |part| part.get(keyword))
    }

    fn names(&self) -> Vec<&'s str> {
        let named =
            self.all("properties").filter_map(Value::as_object).flat_map(Map::keys).map(String::as_str);
        each_once(named.chain(self.required()))
    }

    fn required(&self) -> impl Iterator<Item = &'s str> {
        self.all("required").filter_map(Value::as_array).flatten().filter_map(Value::as_str)
    }

    /// How often its parts say a name.
    fn words(&self) -> usize {
        let properties = self.all("properties").filter_map(Value::as_object).map(Map::len);
        properties.sum::<usize>() + self.required().count()
    }

    /// What a member must fit: in each part what it says of this one, or of all that it does not name. `None` where
    /// telling it would take too long.
    fn member(&self, name: &str, look: &Look<'_>) -> Option<Cow<'s, Value>> {
        let of_part = |part: &&'s Map<String, Value>| {
            part.get("properties").and_then(|named| named.get(name)).or_else(|| unnamed(part))
        };
        self.all_of(of_part, look)
    }

    /// What all others must fit. `None` where telling it would take too long.
    fn others(&self, look: &Look<'_>) -> Option<Cow<'s, Value>> {
        self.all_of(|part| unnamed(part), look)
    }

    /// All that its parts say of something.
    fn all_of(
        &self,
        of_part: impl FnMut(&&'s Map<String, Value>) -> Option<&'s Value>,
        look: &Look<'_>,
    ) -> Option<Cow<'s, Value>> {
        if look.is_tired(self.parts.len()) {
            return None;
        }
        let mut schemas: Vec<&Value> = self.parts.iter().filter_map(of_part).collect();
        schemas.dedup_by(|a, b| std::ptr::eq(*a, *b));
        if schemas.len() > 1 && look.is_tired(schemas.iter().map(|schema| size(schema)).sum()) {
            return None;
        }
        schemas.dedup();
        Some(match schemas[..] {
            [] => Cow::Borrowed(&ANY),
            [schema] => Cow::Borrowed(schema),
            _ => Cow::Owned(combined("allOf", schemas.into_iter().map(Cow::Borrowed))),
        })
    }

    /// `None` if no object fits, since it lacks a member that may not be there, or where telling it would take too long.
    fn object(&self, look: &Look<'s>) -> Option<Object<'s>> {
        let required: HashSet<&str> = self.required().collect();
        let ruled_out = |schema: &Value| ways_within(schema, look).is_some_and(|ways| ways.is_empty());
        let mut members = Vec::new();
        for name in self.names() {
            let (schema, required) = (self.member(name, look)?, required.contains(name));
            match ruled_out(&schema) {
                false => members.push(Member { name, schema, required }),
                true if required => return None,
                true => {}
            }
        }
        let others = self.others(look)?;
        Some(Object { members, others: (!ruled_out(&others)).then_some(others) })
    }
}

impl Object<'_> {
    /// Any object.
    pub(crate) fn any() -> Self {
        Self { members: Vec::new(), others: Some(Cow::Borrowed(&ANY)) }
    }
}

impl Types {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const STRING: Self = Self(1);
    pub(crate) const NULL: Self = Self(2);
    pub(crate) const BOOLEAN: Self = Self(4);
    /// Numbers, arrays, objects.
    pub(crate) const OTHER: Self = Self(8);
    pub(crate) const ALL: Self = Self(15);

    pub(crate) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) fn has(self, other: Self) -> bool {
        self.and(other) == other
    }

    /// Whether nothing beside these is in it.
    pub(crate) fn within(self, other: Self) -> bool {
        other.has(self)
    }

    fn of(value: &Value) -> Self {
        match value {
            Value::String(_) => Self::STRING,
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(_) | Value::Array(_) | Value::Object(_) => Self::OTHER,
        }
    }

    /// What a schema names as its type, or those of its options that name one; of all types, where none does.
    pub(crate) fn named(schema: &Value) -> Self {
        let said = |schema: &Value| schema.as_object().map_or(Self::ALL, Self::said);
        let own = said(schema);
        if own != Self::ALL {
            return own;
        }
        let options = ["anyOf", "oneOf"].into_iter().filter_map(|key| schema.get(key)?.as_array()).flatten();
        let named = options.map(said).filter(|&types| types != Self::ALL).fold(Self::NONE, Self::or);
        if named == Self::NONE { Self::ALL } else { named }
    }

    /// What a part says by its own `type`.
    fn said(part: &Map<String, Value>) -> Self {
        let named = |name: &str| match name {
            "string" => Self::STRING,
            "null" => Self::NULL,
            "boolean" => Self::BOOLEAN,
            _ => Self::OTHER,
        };
        match part.get("type") {
            Some(Value::String(name)) => named(name),
            Some(Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).fold(Self::NONE, |types, name| types.or(named(name)))
            }
            _ => Self::ALL,
        }
    }
}

/// What a part lists.
fn list(part: &Map<String, Value>) -> Option<&[Value]> {
    let listed = part.get("enum").and_then(Value::as_array).map(Vec::as_slice);
    listed.or_else(|| part.get("const").map(std::slice::from_ref))
}

/// What a part says of the members that it does not name. Which of them match a pattern is not looked at.
fn unnamed(part: &Map<String, Value>) -> Option<&Value> {
    part.get("additionalProperties").filter(|_| !part.contains_key("patternProperties"))
}

/// Values in a value, itself among them.
fn size(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(size).sum::<usize>(),
        Value::Object(members) => 1 + members.values().map(size).sum::<usize>(),
        _ => 1,
    }
}

fn combined<'s>(key: &str, schemas: impl IntoIterator<Item = Cow<'s, Value>>) -> Value {
    let schemas = schemas.into_iter().map(Cow::into_owned).collect();
    Value::Object(Map::from_iter([(key.to_owned(), Value::Array(schemas))]))
}
