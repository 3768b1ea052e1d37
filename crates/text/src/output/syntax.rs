//! What each format marks, and what reads it.

use super::answer::{Mark, Opens};
use super::custom::{self, CustomCall};
use super::json_calls::{FencedCalls, JsonCalls};
use super::{OutputFormat, ReasoningFormat, ToolFormat};

impl ReasoningFormat {
    /// What opens and closes the reasoning, where that is a pair of marks.
    pub(super) fn marks(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Think => Some(("<think>", "</think>")),
            Self::Mistral => Some(("[THINK]", "[/THINK]")),
            Self::Harmony => None,
        }
    }
}

impl OutputFormat {
    /// The marks that may be control tokens in a vocabulary, which a decoder must keep for the parser
    /// to see them ([`crate::Text::decoder_for`]).
    pub fn markers(self) -> Vec<&'static str> {
        let mut markers = match self.tools {
            None => Vec::new(),
            Some(ToolFormat::Hermes) => vec!["<tool_call>", "</tool_call>"],
            Some(ToolFormat::LlamaJson) => vec!["<|python_tag|>"],
            _ => Vec::new(),
        };
        if let Some((opening, closing)) = self.reasoning.and_then(ReasoningFormat::marks) {
            markers.extend([opening, closing]);
        }
        markers
    }
}

/// The marks to look for in an answer; no mark begins another.
pub(super) fn marks(format: OutputFormat, with_tools: bool) -> Vec<Mark> {
    let mut marks = Vec::new();
    if let Some((text, closing)) = format.reasoning.and_then(ReasoningFormat::marks) {
        marks.push(Mark { text, leading: true, opens: Opens::Reasoning(closing) });
    }
    if let (Some(tools), true) = (format.tools, with_tools) {
        marks.push(calls(custom::OPENING, |tools| Box::new(CustomCall::new(tools))));
        tool_marks(tools, &mut marks);
    }
    marks
}

fn calls(text: &'static str, reader: super::reader::Start) -> Mark {
    Mark { text, leading: false, opens: Opens::Calls(reader) }
}

fn tool_marks(format: ToolFormat, marks: &mut Vec<Mark>) {
    match format {
        ToolFormat::Hermes => {
            marks.push(calls("<tool_call>", |tools| Box::new(JsonCalls::closed_by("</tool_call>", tools))));
            // The tag in which the prompt lists the tools: small models call in it as well.
            marks.push(calls("<tools>", |tools| Box::new(JsonCalls::unmarked("</tools>", tools))));
        }
        ToolFormat::LlamaJson => {
            marks.push(calls("<|python_tag|>", |tools| Box::new(JsonCalls::announced(tools))));
        }
        _ => {}
    }
    // Small models often leave the marks out.
    let leading = |text, opens| Mark { text, leading: true, opens };
    marks.push(leading("{", Opens::CallsFromMark(|tools| Box::new(JsonCalls::unmarked("", tools)))));
    marks.push(leading("```", Opens::CallsFromMark(|tools| Box::new(FencedCalls::new(tools)))));
}
