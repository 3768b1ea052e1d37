//! gpt-oss's messages.

use rudder_text::{OutputFormat, OutputParser, ReasoningFormat, ToolFormat};

use crate::support::*;

fn harmony() -> OutputFormat {
    OutputFormat { tools: Some(ToolFormat::Harmony), reasoning: Some(ReasoningFormat::Harmony) }
}

const ANALYSIS: &str = "<|channel|>analysis<|message|>";
const FINAL: &str = "<|start|>assistant<|channel|>final<|message|>";

#[test]
fn channels_part_reasoning_and_answer() {
    assert_reads(
        harmony(),
        &format!("{ANALYSIS}Hm: 2 < 3.<|end|>{FINAL}Yes.\n\n```\n<|end|> is a mark\n```\n<|return|>"),
        &[reasoning("Hm: 2 < 3."), text("Yes.\n\n```\n<|end|> is a mark\n```\n")],
    );
    assert_reads(
        harmony(),
        &format!("{ANALYSIS}a<|end|><|start|>assistant{ANALYSIS}b<|end|>{FINAL}c<|end|>"),
        &[reasoning("a\n\nb"), text("c")],
    );
}

#[test]
fn recipients_are_called() {
    for header in [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.get_weather<|message|>",
        " to=functions.get_weather<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=get_weather code<|message|>",
    ] {
        for end in ["<|call|>", "", "<|end|>", "\n"] {
            assert_reads(
                harmony(),
                &format!("{header}{{\"city\": \"<|call|>\"}}{end}"),
                &[call("get_weather", "{\"city\": \"<|call|>\"}")],
            );
        }
    }
}

#[test]
fn a_preamble_and_several_calls() {
    let call_text =
        "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>";
    assert_reads(
        harmony(),
        &format!(
            "{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>{call_text}{call_text}"
        ),
        &[reasoning("Hm."), text("I look."), call("now", "{}"), call("now", "{}")],
    );
}

#[test]
fn custom_tools_take_text_or_an_object() {
    let header = "<|channel|>commentary to=functions.apply_patch<|message|>";
    for input in
        ["*** Begin\n+ {\"a\"}\n", "\n*** Begin\n+ {\"a\"}", "{\"input\": \"*** Begin\\n+ {\\\"a\\\"}\"}"]
    {
        assert_reads(
            harmony(),
            &format!("{header}{input}<|call|>"),
            &[call("apply_patch", "*** Begin\n+ {\"a\"}")],
        );
    }
    assert_reads(
        harmony(),
        &format!(
            "{ANALYSIS}a<|end|>{FINAL}b\n<custom_tool_call name=\"apply_patch\">\nx\n</custom_tool_call>"
        ),
        &[reasoning("a"), text("b"), call("apply_patch", "x")],
    );
}

#[test]
fn the_prompt_may_have_begun_the_message() {
    let read = |prompt: &str, answer: &str| read_after(harmony(), &tools(), prompt, answer);
    assert_eq!(read("<|start|>assistant", "<|channel|>final<|message|>a"), [text("a")]);
    assert_eq!(read("<|start|>assistant<|channel|>final<|message|>", "a"), [text("a")]);
    assert_eq!(read("<|start|>assistant<|channel|>analysis", "<|message|>a"), [reasoning("a")]);
    let call_text = "<|start|>assistant<|channel|>commentary to=functions.now<|message|>";
    assert_eq!(read(call_text, "{}"), [call("now", "{}")]);
}

#[test]
fn what_is_no_message_is_text() {
    for answer in ["Hello <|message|> there", "total", "to", "assistant says", "<|chan", "{\"a\": 1}"] {
        assert_text(harmony(), answer);
    }
    let endless = format!("<|channel|>{}", "x".repeat(600));
    assert_text(harmony(), &endless);
}

#[test]
fn without_tools_a_call_is_text() {
    let answer =
        format!("{ANALYSIS}a<|end|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{{}}");
    assert_eq!(read_after(harmony(), &[], "", &answer), [reasoning("a"), text("{}")]);
    let only_tools = format(ToolFormat::Harmony);
    assert_reads(only_tools, &format!("{ANALYSIS}a<|end|>{FINAL}b"), &[text("a\n\nb")]);
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    let header = "<|channel|>commentary to=functions.now<|message|>";
    assert_reads(harmony(), &format!("{header}{{\"a\": \""), &[cut("now", "{\"a\": \"")]);
    assert_reads(harmony(), "<|channel|>commentary to=functions.now", &[]);
    for literal in ["", " ", "null", "1"] {
        assert_eq!(read_ended(&format!("{header}{literal}"), false), [cut("now", "")], "{literal:?}");
    }
}

#[test]
fn a_call_without_a_body_has_an_empty_object() {
    let header = "<|channel|>commentary to=functions.now<|message|>";
    for body in ["", " ", "\n", "null", " None\n"] {
        for end in ["<|call|>", "<|end|><|start|>", ""] {
            assert_reads(harmony(), &format!("{header}{body}{end}"), &[call("now", "{}")]);
        }
    }
    assert_reads(harmony(), &format!("{header}17<|call|>"), &[call("now", "17")]);
    let custom = "<|channel|>commentary to=functions.apply_patch<|message|>";
    for end in ["<|call|>", ""] {
        assert_reads(harmony(), &format!("{custom}{end}"), &[call("apply_patch", "")]);
    }
    assert_eq!(read_ended(custom, false), [cut("apply_patch", "")]);
    // What has begun is not whole because the model stopped.
    assert_reads(harmony(), &format!("{header}{{\"a\": 1"), &[cut("now", "{\"a\": 1")]);
}

/// Reads an answer that the model ended itself, or that was cut.
fn read_ended(answer: &str, ended: bool) -> Vec<Said> {
    let (mut parser, mut events) = (OutputParser::new(harmony(), &tools(), ""), Vec::new());
    parser.push(answer, &mut events);
    parser.finish(ended, &mut events);
    said(events)
}

#[test]
fn a_custom_tools_text_is_whole_only_where_the_model_ended_it() {
    let header = "<|channel|>commentary to=functions.apply_patch<|message|>";
    let read = |input: &str, ended| read_ended(&format!("{header}{input}"), ended);
    assert_eq!(read("*** Begin\n+ a\n", true), [call("apply_patch", "*** Begin\n+ a")]);
    assert_eq!(read("*** Begin\n+ a\n", false), [cut("apply_patch", "*** Begin\n+ a\n")]);
    // An object is whole where it closes.
    assert_eq!(read("{\"input\": \"a\"}", false), [call("apply_patch", "a")]);
}
