//! What a model's raw text says: reasoning, answer, tool calls; found as the text comes.
//!
//! Each model family marks tool calls and reasoning in its own way. One [`OutputParser`] reads them
//! all, so that every API dialect sees the same events, streamed or whole. What does not parse is
//! text: nothing the model says is lost.
//!
//! Custom tools, whose calls carry text, are called alike in every format, since no family has
//! markup for them:
//!
//! ```text
//! <custom_tool_call name="apply_patch">
//! ...the text as it is...
//! </custom_tool_call>
//! ```

mod answer;
mod arguments;
mod call_object;
mod checked;
mod custom;
mod deepseek;
mod detect;
mod harmony;
mod json;
mod json_calls;
mod json_input;
mod markdown;
mod mistral;
mod python_value;
mod pythonic;
mod reader;
mod sink;
mod syntax;
mod tagged_calls;
mod tagged_value;
mod tags;
mod tool_call;
mod tools;

use std::sync::Arc;

use crate::Tool;
use answer::Answer;
use harmony::Harmony;
use sink::Sink;
pub(crate) use tagged_calls::{GLM, QWEN};
pub(crate) use tagged_value::ValueTags;
use tools::Offered;

/// How a model marks tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToolFormat {
    /// `<tool_call>{"name": .., "arguments": ..}</tool_call>`: Qwen2.5, Qwen3, Hermes.
    Hermes,
    /// `<tool_call><function=f><parameter=x>..</parameter></function></tool_call>`: Qwen3-Coder.
    QwenXml,
    /// `{"name": .., "parameters": ..}`, after `<|python_tag|>` or alone: Llama 3.x.
    LlamaJson,
    /// `[f(x=1), g()]`: Llama 3.2 and 4.
    Pythonic,
    /// `[TOOL_CALLS]`, with an array of calls or as `name[ARGS]{..}`: Mistral, Devstral.
    Mistral,
    /// `<｜tool▁calls▁begin｜>` and its kin: DeepSeek V3 and R1.
    DeepSeek,
    /// `<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>`: GLM-4.x.
    Glm,
    /// Harmony channels, `to=functions.f`: gpt-oss.
    Harmony,
}

/// How a model marks its reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReasoningFormat {
    /// `<think>..</think>`; the opening mark may stand in the prompt already.
    Think,
    /// `[THINK]..[/THINK]`: Mistral's Magistral and its successors.
    Mistral,
    /// Harmony's `analysis` channel.
    Harmony,
}

/// The tokens that mark reasoning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReasoningMarks {
    /// Opens it.
    pub opening: u32,
    /// Closes it.
    pub closing: u32,
    /// What ends it where the model is to answer at once: `closing` with the line breaks around it.
    pub end: Vec<u32>,
}

/// How a model's output is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct OutputFormat {
    /// Its tool calls; `None`: it calls none.
    pub tools: Option<ToolFormat>,
    /// Its reasoning; `None`: it marks none.
    pub reasoning: Option<ReasoningFormat>,
}

/// What was found in the text, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputEvent {
    /// More of the reasoning.
    Reasoning(String),
    /// More of the answer.
    Text(String),
    /// A tool call begins. Calls never overlap: what follows, up to [`OutputEvent::CallEnd`], is its.
    CallBegin {
        /// The tool's name.
        name: String,
    },
    /// More of the call's input: a piece of a JSON object's text, or of a custom tool's text.
    CallInput(String),
    /// The call is whole. A JSON input is what the model wrote: it may not parse, or not be what the
    /// tool's schema asks for.
    CallEnd,
}

/// Reads one answer. See the module.
///
/// However the text is cut into pieces, the events say the same: only how many pieces the texts come
/// in differs.
pub struct OutputParser {
    reader: Reading,
}

enum Reading {
    Answer(Box<Answer>),
    Harmony(Box<Harmony>),
}

impl OutputParser {
    /// A parser for one answer. `tools`: those that may be called (they decide what is a custom call, and the
    /// types of arguments in formats that carry text); without any, nothing is read as a call. Calls of strict
    /// tools, and of those with a grammar, that [`crate::Text::answer_grammar`] does not hold are text unless they fit.
    /// `prompt`: the end of the rendered prompt, in which reasoning may have been opened.
    pub fn new(format: OutputFormat, tools: &[Tool], prompt: &str) -> Self {
        let tools = Arc::new(Offered::new(tools));
        if format.is_harmony() {
            return Self { reader: Reading::Harmony(Box::new(Harmony::new(format, tools, prompt))) };
        }
        let reasoning = format.reasoning.filter(|reasoning| reasoning.is_open(prompt));
        let open = reasoning.and_then(ReasoningFormat::marks);
        let answer = Answer::new(syntax::marks(format, &tools), tools, open);
        Self { reader: Reading::Answer(Box::new(answer)) }
    }

    /// Adds text; appends what is certain by now to `out`.
    pub fn push(&mut self, text: &str, out: &mut Vec<OutputEvent>) {
        match &mut self.reader {
            Reading::Answer(answer) => answer.push(text, &mut Sink::new(out)),
            Reading::Harmony(harmony) => harmony.push(text, &mut Sink::new(out)),
        }
    }

    /// The end of the text: appends what was held back. Nothing may be pushed after it. A call cut
    /// short becomes text if no [`OutputEvent::CallBegin`] was given out, else it stays without its
    /// [`OutputEvent::CallEnd`]. `ended`: the model ended it by itself, not a limit or a stop string: a call
    /// whose closing is a stop token is whole then.
    pub fn finish(&mut self, ended: bool, out: &mut Vec<OutputEvent>) {
        match &mut self.reader {
            Reading::Answer(answer) => answer.finish(&mut Sink::new(out)),
            Reading::Harmony(harmony) => harmony.finish(ended, &mut Sink::new(out)),
        }
    }

    /// Whether the text so far ends within a tool call, or within what may become one.
    pub fn in_call(&self) -> bool {
        match &self.reader {
            Reading::Answer(answer) => answer.in_call(),
            Reading::Harmony(harmony) => harmony.in_call(),
        }
    }

    /// Whether a mark that opened calls has not been closed yet, though all its calls may be whole.
    pub fn in_block(&self) -> bool {
        match &self.reader {
            Reading::Answer(answer) => answer.in_block(),
            // Its calls end with the message, by a token that ends the generation.
            Reading::Harmony(_) => false,
        }
    }
}
