//! What each format marks, and what reads it.

use super::answer::{Mark, Opens};
use super::call_object;
use super::checked::Held;
use super::custom::{self, CustomCall};
use super::deepseek::{self, DeepSeekCalls};
use super::harmony;
use super::json_calls::{FencedCalls, JsonCalls};
use super::mistral::MistralCalls;
use super::pythonic::{self, PythonicCalls};
use super::reader::Start;
use super::tagged_calls::{QWEN, TaggedCall};
use super::tool_call::ToolCall;
use super::tools::Offered;
use super::{OutputFormat, ReasoningFormat, ToolFormat};

impl ReasoningFormat {
    /// What opens and closes the reasoning, where that is a pair of marks.
    pub(crate) fn marks(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Think => Some(("<think>", "</think>")),
            Self::Mistral => Some(("[THINK]", "[/THINK]")),
            Self::Harmony => None,
        }
    }

    /// Parts the text of an answer that holds its reasoning too, as servers give it that do not read it: the reasoning, between the marks at
    /// the beginning or, of one that the prompt opened, before a closing mark on a line of its own that stands in no code, and what follows.
    pub fn part(self, text: &str) -> Option<(&str, &str)> {
        let (opening, closing) = self.marks()?;
        let opened = text.trim_start().strip_prefix(opening);
        let (reasoning, answer) = opened.unwrap_or(text).split_once(closing)?;
        let alone = reasoning.ends_with('\n') && (answer.is_empty() || answer.starts_with('\n'));
        let fences = reasoning.lines().filter(|line| line.trim_start().starts_with("```")).count();
        let parts = opened.is_some() || alone && fences % 2 == 0 && !reasoning.contains(opening);
        parts.then(|| (reasoning.trim(), answer.trim_start()))
    }

    /// Whether a rendered prompt with this end has opened the reasoning already.
    pub fn is_open(self, prompt: &str) -> bool {
        self.marks().is_some_and(|(opening, _)| prompt.trim_end().ends_with(opening))
    }
}

impl OutputFormat {
    /// Whether the answer comes in harmony's messages.
    pub(crate) fn is_harmony(self) -> bool {
        self.tools == Some(ToolFormat::Harmony) || self.reasoning == Some(ReasoningFormat::Harmony)
    }

    /// The marks that may be control tokens in a vocabulary, which a decoder must keep for the parser
    /// to see them ([`crate::Text::decoder_for`]).
    ///
    /// None of them may end a generation but harmony's `<|call|>` and `<|return|>`, which must: after
    /// `<|end|>` a further message follows. Tokens that end a generation need not reach the parser.
    pub fn markers(self) -> Vec<&'static str> {
        let mut markers = match self.tools {
            None => Vec::new(),
            Some(ToolFormat::Pythonic) => vec!["<|python_start|>", "<|python_end|>"],
            Some(ToolFormat::Hermes | ToolFormat::QwenXml) => vec!["<tool_call>", "</tool_call>"],
            Some(ToolFormat::LlamaJson) => vec!["<|python_tag|>"],
            Some(ToolFormat::Mistral) => vec!["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            Some(ToolFormat::DeepSeek) => deepseek::MARKS.to_vec(),
            Some(ToolFormat::Glm) => {
                let arguments = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"];
                [&["<tool_call>", "</tool_call>"], &arguments[..]].concat()
            }
            Some(ToolFormat::Harmony) => harmony::MARKS.to_vec(),
        };
        if self.is_harmony() && self.tools != Some(ToolFormat::Harmony) {
            markers.extend(harmony::MARKS);
        }
        if let Some((opening, closing)) = self.reasoning.and_then(ReasoningFormat::marks) {
            markers.extend([opening, closing]);
        }
        markers
    }
}

/// The marks to look for in an answer; no mark begins another.
pub(super) fn marks(format: OutputFormat, tools: &Offered) -> Vec<Mark> {
    let mut marks = Vec::new();
    if let Some((text, closing)) = format.reasoning.and_then(ReasoningFormat::marks) {
        let opens = Opens::Reasoning(closing);
        marks.push(Mark { text, leading: true, opens, held: Held::Yes });
    }
    let Some(of_calls) = format.tools.filter(|_| !tools.is_empty()) else { return marks };
    // In harmony's messages the grammar leaves text as it is.
    let held = if of_calls == ToolFormat::Harmony { Held::No } else { Held::Yes };
    marks.push(calls(custom::OPENING, held, |tools| Box::new(CustomCall::new(tools))));
    // A grammar of custom tools alone does not know the format's own marks.
    let held = if tools.any_takes_json() { Held::Yes } else { Held::No };
    tool_marks(of_calls, held, &mut marks);
    unmarked(of_calls, &mut marks);
    let checked = tools.any_is_held() || !tools.any_takes_json();
    if !checked {
        let known = marks.iter_mut().filter(|mark| !matches!(mark.held, Held::AtLine));
        known.for_each(|mark| mark.held = Held::Yes);
    }
    marks
}

/// A mark after which calls stand.
fn calls(text: &'static str, held: Held, reader: Start) -> Mark {
    Mark { text, leading: false, opens: Opens::Calls(reader), held }
}

/// A format's own marks.
fn tool_marks(format: ToolFormat, held: Held, marks: &mut Vec<Mark>) {
    let mut add = |text, reader| marks.push(calls(text, held, reader));
    match format {
        ToolFormat::Hermes | ToolFormat::QwenXml => {
            add("<tool_call>", |tools| Box::new(ToolCall::new(false, tools)));
        }
        ToolFormat::Glm => add("<tool_call>", |tools| Box::new(ToolCall::new(true, tools))),
        ToolFormat::LlamaJson => add("<|python_tag|>", |tools| Box::new(JsonCalls::announced(tools))),
        ToolFormat::Pythonic => add("<|python_start|>", |tools| Box::new(PythonicCalls::marked(tools))),
        ToolFormat::Mistral => add("[TOOL_CALLS]", |tools| Box::new(MistralCalls::new(tools))),
        ToolFormat::DeepSeek => {
            add(deepseek::ALL_BEGIN, |tools| Box::new(DeepSeekCalls::all(tools)));
            add(deepseek::BEGIN, |tools| Box::new(DeepSeekCalls::one(tools)));
        }
        // Its envelopes are read before its text.
        ToolFormat::Harmony => {}
    }
    if format == ToolFormat::QwenXml {
        // The outer tag is often forgotten. Within a line it may be talk of calls, so there the grammar leaves it be.
        let opens = Opens::CallsFromMark(|tools| Box::new(TaggedCall::new(&QWEN, tools)));
        let held = if let Held::Yes = held { Held::AtLine } else { held };
        marks.push(Mark { text: "<function=", leading: false, opens, held });
    }
}

/// What else calls begin with: small models often leave the marks out.
fn unmarked(format: ToolFormat, marks: &mut Vec<Mark>) {
    let object = match format {
        ToolFormat::Harmony => return,
        ToolFormat::LlamaJson => Held::At(call_object::is_head),
        _ => Held::No,
    };
    if format == ToolFormat::Hermes {
        // The tag in which the prompt lists the tools.
        marks.push(calls("<tools>", Held::No, |tools| Box::new(JsonCalls::unmarked("</tools>", tools))));
    }
    marks.push(leading("{", object, |tools| Box::new(JsonCalls::unmarked("", tools))));
    marks.push(leading("```", Held::No, |tools| Box::new(FencedCalls::new(tools))));
    marks.push(match format {
        ToolFormat::Pythonic => {
            leading("[", Held::At(pythonic::is_head), |tools| Box::new(PythonicCalls::new(tools)))
        }
        _ => leading("[{", Held::No, |tools| Box::new(JsonCalls::unmarked("", tools))),
    });
}

/// A mark that is itself part of the calls, and opens them at the start alone.
fn leading(text: &'static str, held: Held, reader: Start) -> Mark {
    Mark { text, leading: true, opens: Opens::CallsFromMark(reader), held }
}
