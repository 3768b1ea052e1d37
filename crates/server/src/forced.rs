//! Calls forced by grammar, for tests of real clients.
//!
//! A client's task may need a certain call, and no small model makes it reliably. So for tests the
//! answer of a conversation without tool results is held to the call, and every later answer to a
//! few words of plain text; everything else is as in service.

use std::collections::HashSet;

use rudder_text::{Tool, ToolChoice, ToolInput};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::conversation::{AnswerFormat, Role, Turn};

/// A short answer, after which a client's task is done.
const FEW_WORDS: &str = "[A-Z][a-z]{2,8}( [a-z]{1,8}){2,8}\\.";

/// A call to be made where its tool is offered.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ForcedCall {
    /// The tool.
    pub name: String,
    /// A function's arguments.
    #[serde(default)]
    pub arguments: Option<Value>,
    /// A custom tool's text.
    #[serde(default)]
    pub input: Option<String>,
}

/// Makes the first call whose tool is offered; after a tool's result, or without one, text.
pub(crate) fn force(turn: &mut Turn, calls: &[ForcedCall]) {
    if calls.is_empty() {
        return;
    }
    let has_result = turn.messages.iter().any(|message| message.role == Role::Tool);
    let offered = calls.iter().find_map(|call| Some((call, turn.tools.iter().find(|tool| is(tool, call))?)));
    match offered {
        Some((call, tool)) if !has_result && turn.tool_choice != ToolChoice::None => {
            let tool = Tool { input: exactly(call), ..tool.clone() };
            turn.tool_choice = ToolChoice::Named(tool.name.clone());
            turn.parallel_tool_calls = false;
            turn.held_tools = Some(vec![tool]);
        }
        _ => {
            turn.allowed_tools = Some(HashSet::new());
            if turn.tool_choice != ToolChoice::None {
                turn.tool_choice = ToolChoice::Auto;
            }
            if turn.answer == AnswerFormat::Text {
                turn.answer = AnswerFormat::Regex(FEW_WORDS.into());
            }
        }
    }
}

/// A tool of a namespace is offered under both names.
fn is(tool: &Tool, call: &ForcedCall) -> bool {
    let name = tool.name.strip_suffix(&call.name);
    name.is_some_and(|rest| rest.is_empty() || rest.ends_with(['.', '_', '/', ':']))
        && tool.is_custom() == call.input.is_some()
}

fn exactly(call: &ForcedCall) -> ToolInput {
    match &call.input {
        Some(text) => ToolInput::Regex(regex_syntax::escape(text)),
        None => {
            let arguments = call.arguments.clone().unwrap_or_else(|| json!({}));
            ToolInput::Json { schema: json!({"const": arguments}), strict: true }
        }
    }
}
