//! Any text in any format: the events are well formed, and no cutting of the text changes them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rudder_text::{OutputEvent, OutputFormat, OutputParser, ReasoningFormat, Tool, ToolFormat, ToolInput};
use serde_json::json;

const TOOLS: [Option<ToolFormat>; 9] = [
    None,
    Some(ToolFormat::Hermes),
    Some(ToolFormat::QwenXml),
    Some(ToolFormat::LlamaJson),
    Some(ToolFormat::Pythonic),
    Some(ToolFormat::Mistral),
    Some(ToolFormat::DeepSeek),
    Some(ToolFormat::Glm),
    Some(ToolFormat::Harmony),
];
const REASONING: [Option<ReasoningFormat>; 4] =
    [None, Some(ReasoningFormat::Think), Some(ReasoningFormat::Mistral), Some(ReasoningFormat::Harmony)];

// The first byte chooses the format, the second where the text is cut.
fuzz_target!(|data: &[u8]| {
    let [choice, step, text @ ..] = data else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let format = OutputFormat {
        tools: TOOLS[usize::from(choice & 15) % TOOLS.len()],
        reasoning: REASONING[usize::from(choice >> 4) % REASONING.len()],
    };
    let whole = read(format, [text]);
    assert_eq!(read(format, pieces(text, usize::from(step % 16) + 1)), whole);
    if format == OutputFormat::default() {
        assert!(text.is_empty() || whole == [OutputEvent::Text(text.to_owned())]);
    }
});

/// The text in pieces of so many characters.
fn pieces(text: &str, length: usize) -> Vec<&str> {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).step_by(length).collect();
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    starts.iter().zip(ends).map(|(&start, end)| &text[start..end]).collect()
}

fn tools() -> Vec<Tool> {
    let tool = |name: &str, input| Tool { name: name.into(), description: String::new(), input };
    let schema = json!({"properties": {"a": {"type": "string"}, "b": {"type": ["string", "null"]}, "c": {"type": "array"}}});
    vec![tool("f", ToolInput::Json { schema, strict: false }), tool("g", ToolInput::Text)]
}

/// The events, with pieces of one kind joined.
fn read<'t>(format: OutputFormat, pieces: impl IntoIterator<Item = &'t str>) -> Vec<OutputEvent> {
    let mut parser = OutputParser::new(format, &tools(), "");
    let mut events = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut events);
    }
    parser.finish(true, &mut events);
    let mut joined: Vec<OutputEvent> = Vec::new();
    let mut open = false;
    for event in events {
        let inside = matches!(event, OutputEvent::CallInput(_) | OutputEvent::CallEnd);
        assert_eq!(open, inside, "{event:?} out of place");
        open = matches!(event, OutputEvent::CallBegin { .. } | OutputEvent::CallInput(_));
        match (joined.last_mut(), &event) {
            (Some(OutputEvent::Text(text)), OutputEvent::Text(more))
            | (Some(OutputEvent::Reasoning(text)), OutputEvent::Reasoning(more))
            | (Some(OutputEvent::CallInput(text)), OutputEvent::CallInput(more)) => text.push_str(more),
            _ => joined.push(event),
        }
    }
    joined
}
