//! Reading a case in every cutting, and a short way to write what is expected.

use rudder_text::{OutputEvent, OutputFormat, OutputParser, ReasoningFormat, Tool, ToolFormat, ToolInput};
use serde_json::json;

/// Tools of the usual kinds.
pub fn tools() -> Vec<Tool> {
    let function = |name: &str, properties: serde_json::Value| Tool {
        name: name.into(),
        description: String::new(),
        input: ToolInput::Json { schema: json!({"type": "object", "properties": properties}), strict: false },
    };
    vec![
        function("get_weather", json!({"city": {"type": "string"}, "days": {"type": "integer"}})),
        function(
            "write_file",
            json!({
                "path": {"type": "string"},
                "content": {"type": "string"},
                "append": {"type": "boolean"},
                "mode": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "tags": {"type": "array", "items": {"type": "string"}},
                "options": {"$ref": "#/$defs/options"},
                "any": {},
            }),
        ),
        function("now", json!({})),
        Tool { name: "apply_patch".into(), description: String::new(), input: ToolInput::Text },
    ]
}

pub fn format(tools: ToolFormat) -> OutputFormat {
    OutputFormat { tools: Some(tools), reasoning: None }
}

pub fn thinking(tools: ToolFormat) -> OutputFormat {
    OutputFormat { reasoning: Some(ReasoningFormat::Think), ..format(tools) }
}

/// What an answer says, pieces of one kind joined.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    Text(String),
    Reasoning(String),
    Call(String, String),
    /// A call without an end.
    Cut(String, String),
}

pub fn text(text: &str) -> Said {
    Said::Text(text.into())
}

pub fn reasoning(text: &str) -> Said {
    Said::Reasoning(text.into())
}

pub fn call(name: &str, input: &str) -> Said {
    Said::Call(name.into(), input.into())
}

pub fn cut(name: &str, input: &str) -> Said {
    Said::Cut(name.into(), input.into())
}

/// Joins pieces, and checks that calls are well formed.
pub fn said(events: Vec<OutputEvent>) -> Vec<Said> {
    let mut said: Vec<Said> = Vec::new();
    let mut open = false;
    for event in events {
        assert!(open || !matches!(event, OutputEvent::CallInput(_) | OutputEvent::CallEnd), "{event:?}");
        assert!(!open || matches!(event, OutputEvent::CallInput(_) | OutputEvent::CallEnd), "{event:?}");
        match (event, said.last_mut()) {
            (OutputEvent::Text(piece) | OutputEvent::Reasoning(piece), _) if piece.is_empty() => {
                panic!("an empty piece")
            }
            (OutputEvent::Text(piece), Some(Said::Text(text))) => text.push_str(&piece),
            (OutputEvent::Text(piece), _) => said.push(Said::Text(piece)),
            (OutputEvent::Reasoning(piece), Some(Said::Reasoning(text))) => text.push_str(&piece),
            (OutputEvent::Reasoning(piece), _) => said.push(Said::Reasoning(piece)),
            (OutputEvent::CallBegin { name }, _) => {
                open = true;
                said.push(Said::Cut(name, String::new()));
            }
            (OutputEvent::CallInput(piece), Some(Said::Cut(_, input))) => input.push_str(&piece),
            (OutputEvent::CallEnd, Some(last)) => {
                open = false;
                let Said::Cut(name, input) = last.clone() else { panic!("an end without a call") };
                *last = Said::Call(name, input);
            }
            (event, _) => panic!("{event:?} out of place"),
        }
    }
    said
}

pub fn read_pieces<'p>(
    format: OutputFormat,
    tools: &[Tool],
    prompt: &str,
    pieces: impl IntoIterator<Item = &'p str>,
) -> Vec<Said> {
    let mut parser = OutputParser::new(format, tools, prompt);
    let mut events = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut events);
    }
    parser.finish(true, &mut events);
    said(events)
}

/// Reads the answer to a prompt in every cutting.
pub fn read_after(format: OutputFormat, tools: &[Tool], prompt: &str, answer: &str) -> Vec<Said> {
    let whole = read_pieces(format, tools, prompt, [answer]);
    for (at, _) in answer.char_indices() {
        let (left, right) = answer.split_at(at);
        assert_eq!(read_pieces(format, tools, prompt, [left, right]), whole, "cut after {left:?}");
    }
    let mut characters = Vec::new();
    let mut rest = answer;
    while let Some(c) = rest.chars().next() {
        let (first, others) = rest.split_at(c.len_utf8());
        characters.push(first);
        rest = others;
    }
    assert_eq!(read_pieces(format, tools, prompt, characters), whole, "one by one");
    whole
}

pub fn read(format: OutputFormat, answer: &str) -> Vec<Said> {
    read_after(format, &tools(), "<|im_start|>assistant\n", answer)
}

/// Whether an answer ends within a call so far.
pub fn ends_in_call(format: OutputFormat, answer: &str) -> bool {
    let mut parser = OutputParser::new(format, &tools(), "");
    parser.push(answer, &mut Vec::new());
    parser.in_call()
}

/// Checks that the format reads the answer as what it is.
#[track_caller]
pub fn assert_reads(format: OutputFormat, answer: &str, expected: &[Said]) {
    assert_eq!(read(format, answer), expected, "{answer:?}");
}

/// Checks that the answer is text, to the letter.
#[track_caller]
pub fn assert_text(format: OutputFormat, answer: &str) {
    assert_reads(format, answer, &[text(answer)]);
}
