//! Llama 3.x's JSON.

use rudder_text::{OutputFormat, ToolFormat};

use crate::support::*;

fn llama() -> OutputFormat {
    format(ToolFormat::LlamaJson)
}

#[test]
fn calls_are_bare_json_or_follow_the_tag() {
    for answer in [
        "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Rome\"}}",
        "{\"type\": \"function\", \"name\": \"get_weather\", \"parameters\": {\"city\": \"Rome\"}}",
        "<|python_tag|>{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Rome\"}}",
    ] {
        assert_reads(llama(), answer, &[call("get_weather", "{\"city\": \"Rome\"}")]);
    }
}

#[test]
fn several_calls_are_parted_by_semicolons() {
    assert_reads(
        llama(),
        "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {}}",
        &[call("now", "{}"), call("now", "{}")],
    );
}

#[test]
fn other_json_and_code_are_text() {
    assert_text(llama(), "{\"name\": \"Rome\", \"parameters\": {}}");
    assert_text(llama(), "<|python_tag|>print(1)");
    assert_text(llama(), "It is {\"name\": \"now\", \"parameters\": {}}.");
}

#[test]
fn unknown_tools_are_called_after_the_tag_alone() {
    assert_reads(
        llama(),
        "Well. <|python_tag|>{\"name\": \"f\", \"parameters\": {\"x\": 1}}\n",
        &[text("Well."), call("f", "{\"x\": 1}")],
    );
}
