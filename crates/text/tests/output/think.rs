//! `<think>..</think>`.

use rudder_text::{OutputFormat, ReasoningFormat, ToolFormat};

use crate::support::*;

fn think() -> OutputFormat {
    OutputFormat { tools: None, reasoning: Some(ReasoningFormat::Think) }
}

#[test]
fn reasoning_is_split_from_the_answer_with_and_without_tools() {
    let answer = "<think>\nThe user wants 2 < 3.\n\nSo: yes.\n</think>\n\nYes.\n";
    let expected = [reasoning("The user wants 2 < 3.\n\nSo: yes."), text("Yes.\n")];
    assert_reads(think(), answer, &expected);
    assert_eq!(read_after(think(), &[], "", answer), expected);
    assert_reads(thinking(ToolFormat::Hermes), answer, &expected);
    assert_reads(think(), "<think>\n\n</think>\n\nYes.", &[text("Yes.")]);
}

#[test]
fn the_prompt_may_have_opened_it() {
    let expected = [reasoning("Hm."), text("Yes.")];
    for answer in ["Hm.\n</think>\nYes.", "\nHm.</think>Yes.", "<think>\nHm.\n</think>\nYes."] {
        assert_eq!(read_after(think(), &[], "<|im_start|>assistant\n<think>\n", answer), expected);
    }
    assert_eq!(read_after(think(), &[], "<think>\n\n</think>\n\n", "Yes."), [text("Yes.")]);
}

#[test]
fn cut_reasoning_stays_reasoning() {
    assert_reads(think(), "<think>\nLet me see </thi", &[reasoning("Let me see </thi")]);
    assert_reads(think(), "<think>\nLet me\n", &[reasoning("Let me\n")]);
    assert_reads(think(), "<think>", &[]);
}

#[test]
fn marks_elsewhere_are_text() {
    assert_text(think(), "The tag <think> opens reasoning, </think> closes it.");
    assert_text(think(), "\n\nAnswer <thi");
    assert_text(think(), "<thin");
    assert_text(OutputFormat::default(), "<think>a</think>b");
}

#[test]
fn calls_in_reasoning_are_reasoning() {
    let call_text = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    assert_reads(
        thinking(ToolFormat::Hermes),
        &format!("<think>I could write {call_text}.</think>{call_text}"),
        &[reasoning(&format!("I could write {call_text}.")), call("now", "{}")],
    );
}

#[test]
fn reasoning_may_follow_a_call_but_none_hides_in_its_arguments() {
    assert_reads(
        thinking(ToolFormat::Hermes),
        "<think>a</think>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {\"x\": \"<think>\"}}\n</tool_call>\n<think>b</think>done",
        &[reasoning("a"), call("now", "{\"x\": \"<think>\"}"), reasoning("b"), text("done")],
    );
}

#[test]
fn mistral_marks_it_in_brackets() {
    let format = OutputFormat { tools: None, reasoning: Some(ReasoningFormat::Mistral) };
    assert_reads(format, "[THINK]Hm [1].[/THINK]Yes.", &[reasoning("Hm [1]."), text("Yes.")]);
}
