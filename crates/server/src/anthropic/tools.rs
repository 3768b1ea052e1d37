//! The tools of a request: those that are offered to the model, and whether it may call them.
//!
//! A tool may be held back until it is asked for (`defer_loading`): then it is offered from the first
//! `tool_reference` to it on. Tools that Anthropic's servers would run are passed over.

use std::collections::{HashMap, HashSet};

use rudder_text::{Tool, ToolChoice, ToolInput};
use serde_json::{Map, Value};

use super::types::{Block, ToolChoiceField};
use crate::openai::ApiError;
use crate::tool_names::{is_tool_name, name_rule};

/// What a conversation says about tools after they were defined.
#[derive(Debug)]
pub(super) enum ToolChange {
    /// A deferred tool was asked for, or a removed one is back.
    Load(String),
    /// A new one.
    Add(Map<String, Value>),
    /// One is no longer there.
    Remove(String),
}

impl ToolChange {
    /// What a block changes: `tool_reference`, `tool_addition`, `tool_removal`.
    pub fn of(block: &Block) -> Option<Self> {
        let tool = |key| block.fields.get("tool").and_then(|tool| tool.get(key));
        let name = || tool("name").and_then(Value::as_str).map(str::to_owned);
        match block.kind() {
            "tool_reference" => block.str("tool_name").map(|name| Self::Load(name.to_owned())),
            "tool_addition" => match tool("definition").and_then(Value::as_object) {
                Some(definition) => Some(Self::Add(definition.clone())),
                None => name().map(Self::Load),
            },
            "tool_removal" => name().map(Self::Remove),
            _ => None,
        }
    }
}

/// The tools to offer, after all that a conversation changed.
pub(super) fn offered(
    definitions: Vec<Map<String, Value>>,
    changes: Vec<ToolChange>,
) -> Result<Vec<Tool>, ApiError> {
    // Whoever relies on a search that the server runs cannot load tools, so all are there at once.
    let search_is_ours = definitions.iter().any(|tool| kind(tool).starts_with("tool_search_tool_"));
    let mut waiting = HashSet::new();
    let mut tools = Tools::default();
    for (index, definition) in definitions.iter().enumerate() {
        let Some(tool) = tool(definition, &format!("tools[{index}]"))? else { continue };
        if tools.places.contains_key(&tool.name) {
            let message = format!("tools: `{}` is defined twice; names must be unique.", tool.name);
            return Err(ApiError::param(format!("tools[{index}].name"), message));
        }
        if definition.get("defer_loading") == Some(&Value::Bool(true)) && !search_is_ours {
            waiting.insert(tool.name.clone());
        }
        tools.push(tool);
    }
    for change in changes {
        match change {
            ToolChange::Load(name) => {
                waiting.remove(&name);
            }
            ToolChange::Add(definition) => {
                if let Some(tool) = tool(&definition, "tool_addition")? {
                    waiting.remove(&tool.name);
                    tools.push(tool);
                }
            }
            ToolChange::Remove(name) => {
                waiting.insert(name);
            }
        }
    }
    Ok(tools.list.into_iter().flatten().filter(|tool| !waiting.contains(&tool.name)).collect())
}

/// Tools in the order in which they came.
#[derive(Default)]
struct Tools {
    /// Without those that a later one of the same name replaced.
    list: Vec<Option<Tool>>,
    places: HashMap<String, usize>,
}

impl Tools {
    fn push(&mut self, tool: Tool) {
        if let Some(replaced) = self.places.insert(tool.name.clone(), self.list.len()) {
            self.list[replaced] = None;
        }
        self.list.push(Some(tool));
    }
}

fn kind(definition: &Map<String, Value>) -> &str {
    definition.get("type").and_then(Value::as_str).unwrap_or("custom")
}

/// `None` for a tool of Anthropic's own, which has no schema.
fn tool(definition: &Map<String, Value>, at: &str) -> Result<Option<Tool>, ApiError> {
    let schema = definition.get("input_schema");
    if kind(definition) != "custom" && schema.is_none() {
        return Ok(None);
    }
    let name = definition.get("name").and_then(Value::as_str).unwrap_or_default();
    if !is_tool_name(name) {
        return Err(ApiError::param(format!("{at}.name"), name_rule()));
    }
    let Some(schema @ Value::Object(_)) = schema else {
        let message = format!("The tool `{name}` needs an `input_schema`, a JSON schema of an object.");
        return Err(ApiError::param(format!("{at}.input_schema"), message));
    };
    let strict = definition.get("strict") == Some(&Value::Bool(true));
    Ok(Some(Tool {
        name: name.to_owned(),
        description: definition.get("description").and_then(Value::as_str).unwrap_or_default().to_owned(),
        input: ToolInput::Json { schema: schema.clone(), strict },
    }))
}

/// Whether the model may call them, and whether several in one turn.
pub(super) fn choice(
    field: Option<&ToolChoiceField>,
    tools: &[Tool],
) -> Result<(ToolChoice, bool), ApiError> {
    let Some(field) = field else { return Ok((ToolChoice::Auto, true)) };
    let parallel = !field.disable_parallel_tool_use.unwrap_or(false);
    let choice = match (field.r#type.as_str(), field.name.as_deref()) {
        ("auto", _) => ToolChoice::Auto,
        ("none", _) => ToolChoice::None,
        ("any", _) if tools.is_empty() => {
            let message = "tool_choice `any` needs tools that the model can call; the request has none.";
            return Err(ApiError::param("tool_choice", message));
        }
        ("any", _) => ToolChoice::Required,
        ("tool", Some(name)) if tools.iter().any(|tool| tool.name == name) => {
            ToolChoice::Named(name.to_owned())
        }
        ("tool", Some(name)) => {
            let message = format!("tool_choice names `{name}`, which is not among the tools to call.");
            return Err(ApiError::param("tool_choice.name", message));
        }
        ("tool", None) => {
            return Err(ApiError::param("tool_choice.name", "tool_choice `tool` needs the tool's `name`."));
        }
        (other, _) => {
            let message = format!("Unknown tool_choice `{other}`; use auto, any, tool or none.");
            return Err(ApiError::param("tool_choice.type", message));
        }
    };
    Ok((choice, parallel))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn definitions(tools: Value) -> Vec<Map<String, Value>> {
        serde_json::from_value(tools).unwrap()
    }

    fn names(tools: Value, changes: Vec<ToolChange>) -> Vec<String> {
        offered(definitions(tools), changes).unwrap().into_iter().map(|tool| tool.name).collect()
    }

    fn change(block: Value) -> ToolChange {
        ToolChange::of(&serde_json::from_value(block).unwrap()).unwrap()
    }

    const SCHEMA: &str = r#"{"type": "object"}"#;

    fn tool(name: &str, more: Value) -> Value {
        let mut tool = json!({"name": name, "input_schema": serde_json::from_str::<Value>(SCHEMA).unwrap()});
        tool.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        tool
    }

    #[test]
    fn tools_of_anthropics_servers_are_passed_over() {
        let web = json!({"type": "web_search_20250305", "name": "web_search"});
        let mcp = json!({"type": "mcp_toolset", "mcp_server_name": "x"});
        let custom = tool("b", json!({"type": "custom", "strict": true, "description": "d"}));
        let tools =
            offered(definitions(json!([web, tool("a", json!({})), mcp, custom])), Vec::new()).unwrap();
        assert_eq!(tools.len(), 2);
        assert_eq!((tools[1].name.as_str(), tools[1].description.as_str()), ("b", "d"));
        let strict = |tool: &Tool| matches!(tool.input, ToolInput::Json { strict, .. } if strict);
        assert!(!strict(&tools[0]) && strict(&tools[1]));
    }

    #[test]
    fn a_deferred_tool_is_offered_once_it_is_referred_to() {
        let tools = json!([tool("search", json!({})), tool("rare", json!({"defer_loading": true}))]);
        assert_eq!(names(tools.clone(), Vec::new()), ["search"]);
        let reference = change(json!({"type": "tool_reference", "tool_name": "rare"}));
        assert_eq!(names(tools, vec![reference]), ["search", "rare"]);
    }

    #[test]
    fn deferred_tools_that_only_a_server_could_search_for_are_offered() {
        let search = json!({"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"});
        assert_eq!(
            names(json!([search, tool("rare", json!({"defer_loading": true}))]), Vec::new()),
            ["rare"]
        );
    }

    #[test]
    fn a_conversation_may_add_and_remove_tools() {
        let add = change(json!({"type": "tool_addition", "tool": {"type": "tool_definition",
            "definition": tool("new", json!({}))}}));
        let remove =
            change(json!({"type": "tool_removal", "tool": {"type": "tool_reference", "name": "old"}}));
        assert_eq!(
            names(json!([tool("old", json!({})), tool("a", json!({}))]), vec![add, remove]),
            ["a", "new"]
        );
        let again = json!({"type": "tool_addition", "tool": {"type": "tool_reference", "name": "old"}});
        let changes = vec![ToolChange::Remove("old".into()), change(again)];
        assert_eq!(names(json!([tool("old", json!({}))]), changes), ["old"]);
    }

    #[test]
    fn a_wrong_tool_is_named_by_its_place() {
        for (tools, param) in [
            (json!([{"input_schema": {}}]), "tools[0].name"),
            (json!([tool("a b", json!({}))]), "tools[0].name"),
            (json!([tool("a", json!({})), {"name": "b"}]), "tools[1].input_schema"),
            (json!([{"name": "b", "input_schema": []}]), "tools[0].input_schema"),
            (json!([tool("a", json!({})), tool("a", json!({}))]), "tools[1].name"),
        ] {
            let error = offered(definitions(tools), Vec::new()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)));
        }
    }

    #[test]
    fn choices_are_put_in_our_terms() {
        let tools = offered(definitions(json!([tool("f", json!({}))])), Vec::new()).unwrap();
        let read = |field: Value, tools: &[Tool]| {
            choice(Some(&serde_json::from_value(field).unwrap()), tools).map_err(|error| error.param.unwrap())
        };
        assert_eq!(choice(None, &tools).unwrap(), (ToolChoice::Auto, true));
        assert_eq!(read(json!({"type": "none"}), &tools), Ok((ToolChoice::None, true)));
        let any = json!({"type": "any", "disable_parallel_tool_use": true});
        assert_eq!(read(any.clone(), &tools), Ok((ToolChoice::Required, false)));
        assert_eq!(read(any, &[]), Err("tool_choice".into()));
        let named = |name: &str| json!({"type": "tool", "name": name});
        assert_eq!(read(named("f"), &tools), Ok((ToolChoice::Named("f".into()), true)));
        assert_eq!(read(named("g"), &tools), Err("tool_choice.name".into()));
        assert_eq!(read(json!({"type": "tool"}), &tools), Err("tool_choice.name".into()));
        assert_eq!(read(json!({"type": "maybe"}), &tools), Err("tool_choice.type".into()));
    }
}
