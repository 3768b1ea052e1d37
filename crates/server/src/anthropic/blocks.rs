//! Content blocks: what an answer's pieces become, as events for a stream; a whole answer is their sum.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::conversation::Piece;
use crate::responses::seal::Seal;

/// A block of an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ContentBlock {
    Thinking { thinking: String, signature: String },
    Text { text: String, citations: Option<()> },
    ToolUse { id: String, name: String, input: Value, caller: Value },
}

/// What happens to a block.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type")]
pub(super) enum BlockEvent {
    #[serde(rename = "content_block_start")]
    Start { index: usize, content_block: ContentBlock },
    #[serde(rename = "content_block_delta")]
    Delta { index: usize, delta: BlockDelta },
    #[serde(rename = "content_block_stop")]
    Stop {
        index: usize,
        /// Whether the model ended it: of a call, that its input is whole.
        #[serde(skip)]
        ended: bool,
    },
}

impl BlockEvent {
    /// Its name in a stream.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "content_block_start",
            Self::Delta { .. } => "content_block_delta",
            Self::Stop { .. } => "content_block_stop",
        }
    }
}

/// More of a block.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type")]
pub(super) enum BlockDelta {
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "signature_delta")]
    Signature { signature: String },
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: String },
}

/// What stands around the text of an input that is no object.
const WRAP: (&str, &str) = ("{\"arguments\":\"", "\"}");

/// Turns pieces into blocks: one at a time, in order.
#[derive(Default)]
pub(super) struct Blocks {
    omit_thinking: bool,
    open: Option<Open>,
    next: usize,
    /// White space that a text block may begin with: one of nothing else is none, as clients may not
    /// send it back.
    space: String,
}

enum Open {
    Thinking(String),
    Text,
    ToolUse(Input),
}

/// What a call's input is, told by its first character.
#[derive(Clone, Copy, PartialEq)]
enum Input {
    /// Nothing yet.
    Empty,
    /// An object, passed on as it is.
    Object,
    /// Something else, which stands as text in an object: clients take nothing but objects.
    Wrapped,
}

impl Blocks {
    /// No blocks yet. With `omit_thinking`, reasoning is kept to ourselves: its block has a signature
    /// only.
    pub fn new(omit_thinking: bool) -> Self {
        Self { omit_thinking, ..Self::default() }
    }

    /// Adds a piece; appends what that does to the blocks.
    pub fn push(&mut self, piece: &Piece, seal: &Seal, events: &mut Vec<BlockEvent>) {
        match piece {
            Piece::Reasoning(text) => self.thinking(text, seal, events),
            Piece::Text(text) => self.text(text, seal, events),
            Piece::CallBegin { id, name, .. } => {
                let (id, name) = (id.clone(), name.clone());
                let block =
                    ContentBlock::ToolUse { id, name, input: json!({}), caller: json!({"type": "direct"}) };
                self.start(Open::ToolUse(Input::Empty), block, seal, events);
            }
            Piece::CallInput(text) => self.input(text, events),
            Piece::CallEnd => self.end_call(seal, events),
        }
    }

    /// Closes the last block.
    pub fn finish(&mut self, seal: &Seal, events: &mut Vec<BlockEvent>) {
        self.stop(false, seal, events);
    }

    fn thinking(&mut self, text: &str, seal: &Seal, events: &mut Vec<BlockEvent>) {
        if !matches!(self.open, Some(Open::Thinking(_))) {
            let block = ContentBlock::Thinking { thinking: String::new(), signature: String::new() };
            self.start(Open::Thinking(String::new()), block, seal, events);
        }
        if let Some(Open::Thinking(thinking)) = &mut self.open {
            thinking.push_str(text);
        }
        if !self.omit_thinking {
            self.delta(BlockDelta::Thinking { thinking: text.to_owned() }, events);
        }
    }

    fn text(&mut self, text: &str, seal: &Seal, events: &mut Vec<BlockEvent>) {
        let mut text = text.to_owned();
        if !matches!(self.open, Some(Open::Text)) {
            if text.trim().is_empty() {
                self.space.push_str(&text);
                return;
            }
            text.insert_str(0, &self.space);
            let block = ContentBlock::Text { text: String::new(), citations: None };
            self.start(Open::Text, block, seal, events);
        }
        self.delta(BlockDelta::Text { text }, events);
    }

    fn input(&mut self, text: &str, events: &mut Vec<BlockEvent>) {
        let Some(Open::ToolUse(input)) = &mut self.open else { return };
        let begins = *input == Input::Empty;
        if begins {
            *input = match text.trim_start().chars().next() {
                None => return,
                Some('{') => Input::Object,
                Some(_) => Input::Wrapped,
            };
        }
        let partial_json = match input {
            Input::Wrapped => {
                let quoted = Value::from(text).to_string();
                let opening = if begins { WRAP.0 } else { "" };
                format!("{opening}{}", &quoted[1..quoted.len() - 1])
            }
            Input::Empty | Input::Object => text.to_owned(),
        };
        self.delta(BlockDelta::InputJson { partial_json }, events);
    }

    fn end_call(&mut self, seal: &Seal, events: &mut Vec<BlockEvent>) {
        if let Some(Open::ToolUse(Input::Wrapped)) = self.open {
            self.delta(BlockDelta::InputJson { partial_json: WRAP.1.into() }, events);
        }
        self.stop(true, seal, events);
    }

    fn start(&mut self, open: Open, content_block: ContentBlock, seal: &Seal, events: &mut Vec<BlockEvent>) {
        self.stop(false, seal, events);
        events.push(BlockEvent::Start { index: self.next, content_block });
        self.open = Some(open);
        self.next += 1;
    }

    fn delta(&mut self, delta: BlockDelta, events: &mut Vec<BlockEvent>) {
        if self.open.is_some() {
            events.push(BlockEvent::Delta { index: self.next - 1, delta });
        }
    }

    fn stop(&mut self, ended: bool, seal: &Seal, events: &mut Vec<BlockEvent>) {
        self.space.clear();
        let Some(open) = self.open.take() else { return };
        let index = self.next - 1;
        if let Open::Thinking(thinking) = open {
            let delta = BlockDelta::Signature { signature: seal.close(&thinking) };
            events.push(BlockEvent::Delta { index, delta });
        }
        events.push(BlockEvent::Stop { index, ended });
    }
}

/// The blocks that events add up to.
pub(super) fn fold(events: Vec<BlockEvent>) -> Vec<ContentBlock> {
    let mut blocks: Vec<ContentBlock> = Vec::new();
    let mut json = String::new();
    for event in events {
        match (event, blocks.last_mut()) {
            (BlockEvent::Start { content_block, .. }, _) => blocks.push(content_block),
            (BlockEvent::Delta { delta, .. }, Some(block)) => add(delta, block, &mut json),
            (BlockEvent::Stop { ended, .. }, Some(ContentBlock::ToolUse { input, .. })) => {
                *input = whole_input(std::mem::take(&mut json), ended);
            }
            (BlockEvent::Stop { .. }, _) | (BlockEvent::Delta { .. }, None) => {}
        }
    }
    blocks
}

/// A call's input as its client is given it. Run without its arguments, a tool might do anything: those that cannot be
/// read are told as text.
fn whole_input(json: String, ended: bool) -> Value {
    match serde_json::from_str::<Map<_, _>>(&json) {
        Ok(input) => Value::Object(input),
        Err(_) if ended && !json.is_empty() => json!({"arguments": json}),
        // None, or cut short: it has no input yet.
        Err(_) => json!({}),
    }
}

fn add(delta: BlockDelta, block: &mut ContentBlock, json: &mut String) {
    match (delta, block) {
        (BlockDelta::Thinking { thinking: more }, ContentBlock::Thinking { thinking, .. }) => {
            thinking.push_str(&more);
        }
        (BlockDelta::Signature { signature: whole }, ContentBlock::Thinking { signature, .. }) => {
            *signature = whole;
        }
        (BlockDelta::Text { text: more }, ContentBlock::Text { text, .. }) => text.push_str(&more),
        (BlockDelta::InputJson { partial_json }, ContentBlock::ToolUse { .. }) => {
            json.push_str(&partial_json);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal() -> Seal {
        Seal::new([7; 32])
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.into())
    }

    fn call(name: &str) -> Piece {
        Piece::CallBegin { id: format!("call_{name}"), name: name.into(), custom: false }
    }

    fn events(omit_thinking: bool, pieces: &[Piece], seal: &Seal) -> Vec<BlockEvent> {
        let mut blocks = Blocks::new(omit_thinking);
        let mut events = Vec::new();
        for piece in pieces {
            blocks.push(piece, seal, &mut events);
        }
        blocks.finish(seal, &mut events);
        events
    }

    fn folded(pieces: &[Piece]) -> Value {
        serde_json::to_value(fold(events(false, pieces, &seal()))).unwrap()
    }

    fn text_block(text: &str) -> Value {
        json!({"type": "text", "text": text, "citations": null})
    }

    #[test]
    fn an_answer_of_every_kind_becomes_blocks_in_order() {
        let pieces = [
            Piece::Reasoning("so ".into()),
            Piece::Reasoning("so".into()),
            text("\n\n"),
            text("I look"),
            text(" it up.\n"),
            call("f"),
            Piece::CallInput("{\"x\":".into()),
            Piece::CallInput(" [1]}".into()),
            Piece::CallEnd,
            text("\n"),
            call("g"),
            Piece::CallEnd,
        ];
        let seal = seal();
        let blocks = serde_json::to_value(fold(events(false, &pieces, &seal))).unwrap();
        let signature = blocks[0]["signature"].as_str().unwrap();
        assert_eq!(seal.open(signature).as_deref(), Some("so so"));
        let direct = json!({"type": "direct"});
        let expected = json!([
            {"type": "thinking", "thinking": "so so", "signature": signature},
            text_block("\n\nI look it up.\n"),
            {"type": "tool_use", "id": "call_f", "name": "f", "input": {"x": [1]}, "caller": direct},
            {"type": "tool_use", "id": "call_g", "name": "g", "input": {}, "caller": direct},
        ]);
        assert_eq!(blocks, expected);
    }

    #[test]
    fn blocks_begin_and_end_one_after_the_other() {
        let pieces = [text("a"), call("f"), Piece::CallInput("{}".into()), Piece::Reasoning("r".into())];
        let events = serde_json::to_value(events(false, &pieces, &seal())).unwrap();
        let order: Vec<_> = events
            .as_array()
            .unwrap()
            .iter()
            .map(|event| {
                (
                    event["type"].as_str().unwrap().trim_start_matches("content_block_"),
                    event["index"].as_u64().unwrap(),
                )
            })
            .collect();
        let block = |index, deltas| {
            std::iter::once(("start", index))
                .chain((0..deltas).map(move |_| ("delta", index)))
                .chain([("stop", index)])
        };
        assert_eq!(order, block(0, 1).chain(block(1, 1)).chain(block(2, 2)).collect::<Vec<_>>());
        assert_eq!(events[1]["delta"], json!({"type": "text_delta", "text": "a"}));
        assert_eq!(events[3]["content_block"]["input"], json!({}));
        assert_eq!(events[4]["delta"], json!({"type": "input_json_delta", "partial_json": "{}"}));
        assert_eq!(events[7]["delta"], json!({"type": "thinking_delta", "thinking": "r"}));
        assert_eq!(events[8]["delta"]["type"], "signature_delta");
    }

    #[test]
    fn white_space_alone_is_no_block() {
        assert_eq!(folded(&[text(" \n"), text("\n")]), json!([]));
        assert_eq!(folded(&[text("\n"), text(" a")]), json!([text_block("\n a")]));
        assert_eq!(folded(&[text("a"), text("\n")]), json!([text_block("a\n")]));
    }

    #[test]
    fn a_call_cut_short_has_an_empty_input() {
        for input in ["", "{\"x\": ", "[1]", "7"] {
            let blocks = folded(&[call("f"), Piece::CallInput(input.into())]);
            assert_eq!(blocks[0]["input"], json!({}), "{input}");
        }
        let blocks = folded(&[
            call("f"),
            Piece::CallInput("{".into()),
            call("g"),
            Piece::CallInput("{\"a\":1}".into()),
        ]);
        assert_eq!((&blocks[0]["input"], &blocks[1]["input"]), (&json!({}), &json!({"a": 1})));
    }

    #[test]
    fn arguments_that_are_no_object_are_told_as_text() {
        for (input, expected) in [
            (&["[1", ", \"\n\"]"][..], json!({"arguments": "[1, \"\n\"]"})),
            (&[" ", "7"], json!({"arguments": "7"})),
            (&["{\"x\": a", ".txt}"], json!({"arguments": "{\"x\": a.txt}"})),
            (&[" ", " {\"x\":", "1}"], json!({"x": 1})),
        ] {
            let input = input.iter().map(|&part| Piece::CallInput(part.into()));
            let pieces: Vec<_> = std::iter::once(call("f")).chain(input).chain([Piece::CallEnd]).collect();
            assert_eq!(folded(&pieces)[0]["input"], expected);
        }
    }

    #[test]
    fn a_stream_wraps_what_it_can_tell_at_once_to_be_no_object() {
        let streamed = |pieces: &[Piece]| {
            let events = serde_json::to_value(events(false, pieces, &seal())).unwrap();
            let parts = events.as_array().unwrap().iter().filter_map(|event| {
                assert!(event.get("ended").is_none());
                event["delta"]["partial_json"].as_str().map(str::to_owned)
            });
            parts.collect::<String>()
        };
        let said = |input: &str| [call("f"), Piece::CallInput(input.into()), Piece::CallEnd];
        assert_eq!(streamed(&said("[\"a\"]")), "{\"arguments\":\"[\\\"a\\\"]\"}");
        assert_eq!(streamed(&said("{\"x\": a.txt}")), "{\"x\": a.txt}");
        assert_eq!(streamed(&said("[1]")[..2]), "{\"arguments\":\"[1]");
    }

    #[test]
    fn omitted_thinking_is_in_the_signature_alone() {
        let seal = seal();
        let blocks = fold(events(true, &[Piece::Reasoning("secret".into()), text("a")], &seal));
        let ContentBlock::Thinking { thinking, signature } = &blocks[0] else { panic!("{blocks:?}") };
        assert_eq!((thinking.as_str(), seal.open(signature).as_deref()), ("", Some("secret")));
    }
}
