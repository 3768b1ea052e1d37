//! Qwen3-Coder's tags.

use rudder_text::{OutputEvent, OutputFormat, OutputParser, ToolFormat, ToolInput};

use crate::support::*;

fn xml() -> OutputFormat {
    format(ToolFormat::QwenXml)
}

#[test]
fn arguments_are_typed_by_the_schema() {
    assert_reads(
        xml(),
        "I'll write it.\n\n<tool_call>\n<function=write_file>\n<parameter=path>\nsrc/a b.rs\n</parameter>\n\
         <parameter=content>\n\nfn f() -> &str {\n    \"x\\n\"\n}\n\n</parameter>\n<parameter=append>\nTrue\n\
         </parameter>\n<parameter=mode>\nnull\n</parameter>\n<parameter=tags>\n[\"a\", \"b\"]\n</parameter>\n\
         </function>\n</tool_call>",
        &[
            text("I'll write it."),
            call(
                "write_file",
                "{\"path\": \"src/a b.rs\", \"content\": \"\\nfn f() -> &str {\\n    \\\"x\\\\n\\\"\\n}\\n\", \
                 \"append\": true, \"mode\": null, \"tags\": [\"a\", \"b\"]}",
            ),
        ],
    );
    assert_reads(
        xml(),
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n\
         </parameter>\n<parameter=other>\n7\n</parameter>\n<parameter=more>\nseven\n</parameter>\n</function>\n</tool_call>\n",
        &[call("get_weather", "{\"city\": \"7\", \"days\": 7, \"other\": 7, \"more\": \"seven\"}")],
    );
    assert_reads(
        xml(),
        "<tool_call>\n<function=write_file>\n<parameter=mode>\nnullable\n</parameter>\n<parameter=append>\nmaybe\n\
         </parameter>\n</function>\n</tool_call>",
        &[call("write_file", "{\"mode\": \"nullable\", \"append\": \"maybe\"}")],
    );
}

#[test]
fn strings_stream_as_they_arise() {
    let mut parser = OutputParser::new(xml(), &tools(), "");
    let mut events = Vec::new();
    parser.push("<tool_call>\n<function=write_file>\n<parameter=content", &mut events);
    assert_eq!(events, []);
    parser.push(">\nab\n", &mut events);
    let begin = OutputEvent::CallBegin { name: "write_file".into() };
    assert_eq!(events, [begin, OutputEvent::CallInput("{\"content\": \"ab".into())]);
    events.clear();
    parser.push("c", &mut events);
    assert_eq!(events, [OutputEvent::CallInput("\\nc".into())]);
}

#[test]
fn calls_without_arguments_and_several_calls() {
    let now = "<tool_call>\n<function=now>\n</function>\n</tool_call>";
    assert_reads(xml(), &format!("{now}\n{now}\n"), &[call("now", "{}"), call("now", "{}")]);
    assert_reads(
        xml(),
        "<tool_call>\n<function=now>\n</function>\n<function=now></function>\n</tool_call>done",
        &[call("now", "{}"), call("now", "{}"), text("done")],
    );
}

#[test]
fn the_outer_tag_may_be_missing() {
    assert_reads(
        xml(),
        "Look:\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
        &[text("Look:"), call("get_weather", "{\"city\": \"Rome\"}")],
    );
    assert_reads(
        xml(),
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</tool_call>",
        &[call("get_weather", "{\"city\": \"Rome\"}")],
    );
}

#[test]
fn within_a_line_a_call_without_the_outer_tag_is_one_of_an_offered_tool_that_fits() {
    let call_of = |name: &str, days: &str| {
        format!("<function={name}>\n<parameter=days>\n{days}\n</parameter>\n</function>\n</tool_call>")
    };
    let called = [text("Look:"), call("get_weather", "{\"days\": 2}")];
    assert_reads(xml(), &format!("Look: {}", call_of("get_weather", "2")), &called);
    assert_text(xml(), &format!("Look: {}", call_of("get_wether", "2")));
    let mut tools = tools();
    let ToolInput::Json { strict, .. } = &mut tools[0].input else { panic!("{tools:?}") };
    *strict = true;
    let read = |answer: &str| read_after(xml(), &tools, "", answer);
    assert_eq!(read(&format!("Look: {}", call_of("get_weather", "2"))), called);
    let other = call_of("get_weather", "two");
    assert_eq!(read(&format!("Look: {other}")), [text(&format!("Look: {other}"))]);
    // The grammar holds it elsewhere, so nothing looks at it.
    let passed = call("get_weather", "{\"days\": \"two\"}");
    let two = format!("Look:\n\t{other}\n{other}");
    assert_eq!(read(&two), [text("Look:"), passed.clone(), passed.clone()]);
    assert_eq!(read(&format!("\n {other}")), [passed]);
}

#[test]
fn markup_in_a_value_is_its() {
    let example = "<tool_call>\n<function=now>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>";
    let value = format!("A </parameter> tag, </function>\n</parameter></b>\n{example}\n </tool_call>");
    assert_reads(
        xml(),
        &format!(
            "<tool_call>\n<function=write_file>\n<parameter=content>\n{value}\n</parameter>\n</function>\n</tool_call>"
        ),
        &[call("write_file", &serde_json::json!({"content": value}).to_string().replacen(':', ": ", 1))],
    );
}

#[test]
fn markup_in_code_and_prose_is_text() {
    for answer in [
        "Use <function=name> with `<function=now></function>`.",
        "To call it, write <function=name></function>.",
        "```\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n```",
        "<tool_call>\n<function=now>\nwhat?",
        "<tool_call>\n<function=now",
        "<tool_call>\n<function=write_file>\n<parameter=a",
        "a <function of x",
    ] {
        assert_text(xml(), answer);
    }
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    assert_reads(
        xml(),
        "<tool_call>\n<function=write_file>\n<parameter=content>\nab\n</para",
        &[cut("write_file", "{\"content\": \"ab")],
    );
}

#[test]
fn json_in_the_tag_is_read_too() {
    assert_reads(
        xml(),
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        &[call("now", "{}")],
    );
}

#[test]
fn custom_tools_take_their_text_raw() {
    assert_reads(
        xml(),
        "<tool_call>\n<function=apply_patch>\n<parameter=input>\n*** \"a\"\n+\\n\n</parameter>\n</function>\n</tool_call>",
        &[call("apply_patch", "*** \"a\"\n+\\n")],
    );
    assert_reads(
        xml(),
        "<custom_tool_call name=\"apply_patch\">\nx\n</custom_tool_call>",
        &[call("apply_patch", "x")],
    );
}
