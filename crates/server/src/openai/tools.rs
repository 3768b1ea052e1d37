//! Chat's `tools` and `tool_choice`.

use std::collections::HashSet;

use rudder_text::{Tool, ToolChoice, ToolInput};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use crate::tool_names::{is_tool_name, name_rule};

/// A tool as Chat's clients write it. Of kinds that a server would have to run itself, none is
/// offered to the model.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatTool {
    r#type: Option<String>,
    function: Option<Function>,
    custom: Option<Custom>,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    description: Option<String>,
    parameters: Option<Value>,
    strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Custom {
    name: String,
    description: Option<String>,
    format: Option<CustomFormat>,
}

#[derive(Debug, Deserialize)]
struct CustomFormat {
    r#type: String,
    grammar: Option<CustomGrammar>,
}

/// A custom tool's grammar, as both of OpenAI's dialects write it.
#[derive(Debug, Deserialize)]
pub(crate) struct CustomGrammar {
    definition: String,
    syntax: String,
}

impl CustomGrammar {
    /// What a call's text is held to.
    pub fn input(self, param: &str) -> Result<ToolInput, ApiError> {
        match self.syntax.as_str() {
            "lark" => Ok(ToolInput::Lark(self.definition)),
            "regex" => Ok(ToolInput::Regex(self.definition)),
            other => Err(ApiError::param(param, format!("Unknown syntax `{other}`; use lark or regex."))),
        }
    }
}

/// Checks the tools and puts them in no dialect's terms.
pub(crate) fn tools(tools: Vec<ChatTool>) -> Result<Vec<Tool>, ApiError> {
    let mut known: Vec<Tool> = Vec::with_capacity(tools.len());
    let mut names = HashSet::with_capacity(tools.len());
    for (index, tool) in tools.into_iter().enumerate() {
        let Some(tool) = neutral(index, tool)? else { continue };
        let refuse = |message| Err(ApiError::param(format!("tools[{index}]"), message));
        if !is_tool_name(&tool.name) {
            return refuse(name_rule());
        }
        if !names.insert(tool.name.clone()) {
            return refuse(format!("Two tools are named `{}`.", tool.name));
        }
        known.push(tool);
    }
    Ok(known)
}

fn neutral(index: usize, tool: ChatTool) -> Result<Option<Tool>, ApiError> {
    let missing = |what: &str| {
        ApiError::param(format!("tools[{index}].{what}"), format!("A tool of this type needs `{what}`."))
    };
    match tool.r#type.as_deref().unwrap_or("function") {
        "function" => {
            let function = tool.function.ok_or_else(|| missing("function"))?;
            let param = format!("tools[{index}].function.parameters");
            let input = function_input(function.parameters, function.strict, &param)?;
            let description = function.description.unwrap_or_default();
            Ok(Some(Tool { name: function.name, description, input }))
        }
        "custom" => {
            let custom = tool.custom.ok_or_else(|| missing("custom"))?;
            let param = format!("tools[{index}].custom.format");
            let input = match custom.format {
                None => ToolInput::Text,
                Some(format) if format.r#type == "text" => ToolInput::Text,
                Some(CustomFormat { grammar: Some(grammar), .. }) => grammar.input(&param)?,
                Some(_) => {
                    return Err(ApiError::param(param, "A format is text, or grammar with `grammar`."));
                }
            };
            let description = custom.description.unwrap_or_default();
            Ok(Some(Tool { name: custom.name, description, input }))
        }
        _ => Ok(None),
    }
}

/// What a function's call is held to. Without parameters it takes an empty object.
pub(crate) fn function_input(
    parameters: Option<Value>,
    strict: Option<bool>,
    param: &str,
) -> Result<ToolInput, ApiError> {
    let schema = match parameters {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => schema,
        Some(_) => return Err(ApiError::param(param, "parameters must be a JSON schema, an object.")),
    };
    Ok(ToolInput::Json { schema, strict: strict.unwrap_or(false) })
}

/// `tool_choice`, and the tools it allows (`None`: all).
pub(crate) fn tool_choice(
    choice: Option<Value>,
    tools: &[Tool],
) -> Result<(ToolChoice, Option<HashSet<String>>), ApiError> {
    let wrong = |message: String| ApiError::param("tool_choice", message);
    let (choice, allowed) = match choice {
        None | Some(Value::Null) => (ToolChoice::Auto, None),
        Some(Value::String(mode)) => (mode_choice(&mode)?, None),
        Some(choice @ Value::Object(_)) => match choice["type"].as_str() {
            Some("allowed_tools") => allowed_tools(&choice)?,
            Some("function" | "custom") => (ToolChoice::Named(named(&choice)?), None),
            // A choice of a kind of tool that is not offered.
            Some(_) => (ToolChoice::Auto, None),
            None => return Err(wrong("tool_choice needs a `type`.".into())),
        },
        Some(_) => return Err(wrong("tool_choice is a string or an object.".into())),
    };
    let mut unknown: HashSet<&str> = match &choice {
        ToolChoice::Named(name) => HashSet::from([name.as_str()]),
        _ => allowed.iter().flatten().map(String::as_str).collect(),
    };
    for tool in tools {
        unknown.remove(tool.name.as_str());
    }
    if let Some(name) = unknown.iter().next() {
        return Err(wrong(format!("tool_choice names `{name}`, which is none of the tools.")));
    }
    if choice == ToolChoice::Required && tools.is_empty() {
        return Err(wrong("tool_choice is required, but there are no tools to call.".into()));
    }
    Ok((choice, allowed))
}

fn mode_choice(mode: &str) -> Result<ToolChoice, ApiError> {
    match mode {
        "auto" => Ok(ToolChoice::Auto),
        "none" => Ok(ToolChoice::None),
        "required" | "any" => Ok(ToolChoice::Required),
        other => {
            let message =
                format!("tool_choice `{other}` is unknown; use auto, none, required or name a tool.");
            Err(ApiError::param("tool_choice", message))
        }
    }
}

/// Chat nests the name under the type, Responses does not.
fn named(choice: &Value) -> Result<String, ApiError> {
    let nested = choice["type"].as_str().and_then(|kind| choice[kind]["name"].as_str());
    let name = nested.or(choice["name"].as_str());
    name.map(str::to_owned)
        .ok_or_else(|| ApiError::param("tool_choice", "tool_choice needs the tool's `name`."))
}

fn allowed_tools(choice: &Value) -> Result<(ToolChoice, Option<HashSet<String>>), ApiError> {
    let allowed = if choice["allowed_tools"].is_object() { &choice["allowed_tools"] } else { choice };
    let mode = mode_choice(allowed["mode"].as_str().unwrap_or("auto"))?;
    let tools = allowed["tools"].as_array();
    let tools = tools.ok_or_else(|| ApiError::param("tool_choice", "allowed_tools needs `tools`."))?;
    let callable = tools.iter().filter(|tool| matches!(tool["type"].as_str(), Some("function" | "custom")));
    Ok((mode, Some(callable.map(named).collect::<Result<_, _>>()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(list: Value) -> Result<Vec<Tool>, ApiError> {
        tools(serde_json::from_value(list).unwrap())
    }

    fn function(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}, "strict": true}})
    }

    #[test]
    fn tools_of_every_kind_are_taken_and_those_of_servers_left_out() {
        let grammar = json!({"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: \"x\""}});
        let custom = json!({"type": "custom", "custom": {"name": "p", "format": grammar}});
        let tools = check(json!([function("f"), {"type": "web_search"}, custom])).unwrap();
        let names: Vec<&str> = tools.iter().map(|tool| &tool.name[..]).collect();
        assert_eq!(names, ["f", "p"]);
        assert_eq!(tools[0].input, ToolInput::Json { schema: json!({"type": "object"}), strict: true });
        assert_eq!(tools[1].input, ToolInput::Lark("start: \"x\"".into()));
    }

    #[test]
    fn faults_are_named_by_their_place() {
        for (list, param) in [
            (json!([function("f"), function("f")]), "tools[1]"),
            (json!([function("f x")]), "tools[0]"),
            (json!([{"type": "function"}]), "tools[0].function"),
            (json!([{"type": "custom"}]), "tools[0].custom"),
            (json!([{"function": {"name": "f", "parameters": 7}}]), "tools[0].function.parameters"),
        ] {
            assert_eq!(check(list).unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn a_choice_is_a_mode_a_tool_or_a_set() {
        let tools = check(json!([function("f"), function("g")])).unwrap();
        let choose = |choice: Value| tool_choice(Some(choice), &tools);
        assert_eq!(choose(json!("required")).unwrap(), (ToolChoice::Required, None));
        let named = ToolChoice::Named("g".into());
        assert_eq!(choose(json!({"type": "function", "function": {"name": "g"}})).unwrap().0, named);
        assert_eq!(choose(json!({"type": "function", "name": "g"})).unwrap().0, named);
        let set = json!({"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]});
        let (choice, allowed) = choose(json!({"type": "allowed_tools", "allowed_tools": set})).unwrap();
        assert_eq!((choice, allowed.unwrap()), (ToolChoice::Required, HashSet::from(["f".to_owned()])));
        for wrong in [json!("sometimes"), json!(7), json!({}), json!({"type": "function", "name": "h"})] {
            assert_eq!(choose(wrong).unwrap_err().param.as_deref(), Some("tool_choice"));
        }
        assert!(tool_choice(Some(json!("required")), &[]).is_err());
    }
}
