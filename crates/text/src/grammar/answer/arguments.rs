//! What a tool's arguments are held to, in the formats that write each by its name.

use serde_json::Value;

use super::writer::Writer;
use crate::grammar::GrammarSpec;
use crate::grammar::compile::MAX_BYTES;
use crate::schema::{self, Object};
use crate::{Tool, ToolInput};

/// How arguments are held.
#[derive(Clone, Copy)]
pub(super) struct Held<'t> {
    /// The tool's schema, to which references lead.
    pub(super) root: &'t Value,
    pub(super) strict: bool,
}

/// The objects that a tool takes, one for each way of its schema. Of a free call of a tool that is not strict any
/// object, as of one whose objects cannot be told; if it is strict, the grammar is refused then.
pub(super) fn objects<'t>(writer: &mut Writer<'_>, tool: &'t Tool) -> Option<(Held<'t>, Vec<Object<'t>>)> {
    let ToolInput::Json { schema, strict } = &tool.input else { return None };
    let held = Held { root: schema, strict: *strict };
    if writer.free && !strict || writer.is_full() || !schema.is_object() {
        return Some((held, vec![Object::any()]));
    }
    let objects = schema::objects(schema, &mut writer.looks).filter(|objects| !objects.is_empty());
    if objects.is_none() && *strict {
        writer.refuse(format!(
            "which arguments the strict tool `{}` takes cannot be told from its parameters: a reference leads \
             nowhere, nothing fits them, or they have too many alternatives or members; mend or simplify them, or \
             leave `strict` out",
            tool.name
        ));
    }
    Some((held, objects.unwrap_or_else(|| vec![Object::any()])))
}

impl Held<'_> {
    /// A value as JSON that its schema allows.
    pub(super) fn json(self, writer: &mut Writer<'_>, value: &Value) -> String {
        if writer.is_full() {
            return String::new();
        }
        let schema = schema::closed(value, self.root, MAX_BYTES);
        writer.part(GrammarSpec::JsonSchema { schema, strict: self.strict })
    }
}
