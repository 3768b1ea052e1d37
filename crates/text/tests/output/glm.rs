//! GLM-4.x's keys and values.

use rudder_text::{OutputFormat, ToolFormat};

use crate::support::*;

fn glm() -> OutputFormat {
    thinking(ToolFormat::Glm)
}

#[test]
fn keys_and_values_become_an_object() {
    assert_reads(
        glm(),
        "\n<think>Look it up.</think>\nI'll look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n\
         <arg_value>Köln \"am\" Rhein</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n\
         <tool_call>now\n</tool_call>",
        &[
            reasoning("Look it up."),
            text("I'll look."),
            call("get_weather", "{\"city\": \"Köln \\\"am\\\" Rhein\", \"days\": 3}"),
            call("now", "{}"),
        ],
    );
}

#[test]
fn newer_versions_leave_out_the_newlines() {
    assert_reads(
        glm(),
        "<tool_call>write_file<arg_key>content</arg_key><arg_value>\na </arg_value> b\n</arg_value>\
         <arg_key>tags</arg_key><arg_value>[1]</arg_value></tool_call><tool_call>now</tool_call>",
        &[call("write_file", "{\"content\": \"\\na </arg_value> b\\n\", \"tags\": [1]}"), call("now", "{}")],
    );
}

#[test]
fn a_forgotten_tag_loses_nothing() {
    assert_reads(
        glm(),
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_Rome</arg_value>\n</tool_call>",
        &[call("get_weather", "{\"city\": \"<arg_Rome\"}")],
    );
}

#[test]
fn markup_in_prose_is_text() {
    for answer in [
        "<tool_call> opens a call.",
        "<tool_call>name\n<b>",
        "<tool_call>get_weather\n<arg_key>city</arg",
        "`<tool_call>now</tool_call>`",
    ] {
        assert_text(glm(), answer);
    }
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    assert_reads(
        glm(),
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Ro</arg_v",
        &[cut("get_weather", "{\"city\": \"Ro")],
    );
}
