//! Mistral's calls, old and new.

use rudder_text::{OutputFormat, ReasoningFormat, ToolFormat};

use crate::support::*;

fn mistral() -> OutputFormat {
    OutputFormat { tools: Some(ToolFormat::Mistral), reasoning: Some(ReasoningFormat::Mistral) }
}

#[test]
fn old_versions_write_an_array() {
    assert_reads(
        mistral(),
        "[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"[Rome]\"}, \"id\": \"abc123DEF\"}, \
         {\"name\": \"now\", \"arguments\": {}}]",
        &[call("get_weather", "{\"city\": \"[Rome]\"}"), call("now", "{}")],
    );
    assert_reads(mistral(), "[{\"name\": \"now\", \"arguments\": {}}]", &[call("now", "{}")]);
}

#[test]
fn new_versions_name_each_call() {
    assert_reads(
        mistral(),
        "[THINK]Hm.[/THINK]I look.[TOOL_CALLS]get_weather[ARGS]{\"city\": \"a]}\"}[TOOL_CALLS]now[CALL_ID]abc123DEF[ARGS]{}\
         [TOOL_CALLS]now{}",
        &[
            reasoning("Hm."),
            text("I look."),
            call("get_weather", "{\"city\": \"a]}\"}"),
            call("now", "{}"),
            call("now", "{}"),
        ],
    );
}

#[test]
fn custom_tools_take_the_text_of_their_input() {
    assert_reads(
        mistral(),
        "[TOOL_CALLS]apply_patch[ARGS]{\"input\": \"a\\nb\"}",
        &[call("apply_patch", "a\nb")],
    );
}

#[test]
fn a_mark_in_broken_markup_is_found() {
    assert_reads(
        mistral(),
        "[TOOL_CALLS]no[TOOL_CALLS]now[ARGS]{}",
        &[text("[TOOL_CALLS]no"), call("now", "{}")],
    );
}

#[test]
fn markup_in_prose_is_text() {
    for answer in [
        "[TOOL_CALLS] is a token.",
        "[TOOL_CALLS]now[ARGS]",
        "[TOOL_CALLS]now[ARG]{}",
        "[TOOL_CALLS][1]",
        "[1] See `[TOOL_CALLS]now[ARGS]{}`",
        "[link](x)",
        "[TOOL_",
    ] {
        assert_text(mistral(), answer);
    }
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    assert_reads(mistral(), "[TOOL_CALLS]now[ARGS]{\"a\"", &[cut("now", "{\"a\"")]);
}
