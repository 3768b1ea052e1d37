//! Hermes's JSON in `<tool_call>`, custom calls, and what small models make of them.

use rudder_text::{OutputEvent, OutputParser, Tool, ToolFormat, ToolInput};
use serde_json::json;

use crate::support::*;

fn hermes() -> rudder_text::OutputFormat {
    format(ToolFormat::Hermes)
}

const WEATHER: &str = "{\"city\": \"Zürich\", \"days\": 2}";

fn weather() -> String {
    format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}\n</tool_call>")
}

#[test]
fn a_call_is_read_with_its_arguments_as_written() {
    assert_reads(hermes(), &weather(), &[call("get_weather", WEATHER)]);
    assert_reads(
        hermes(),
        "<tool_call>{\"name\":\"write_file\",\"arguments\":  {\"path\" :\"a\",\n \"content\": \"\\u00e9\\n\"} } </tool_call>\n",
        &[call("write_file", "{\"path\" :\"a\",\n \"content\": \"\\u00e9\\n\"}")],
    );
}

#[test]
fn control_characters_in_strings_are_escaped_and_stay_between_values() {
    assert_reads(
        hermes(),
        "<tool_call>\n{\"name\": \"write_file\", \"arguments\": {\n\t\"content\": \"a\n\tb\u{1}c \\\nd\\\\\ne\"\n}}\n</tool_call>",
        &[call("write_file", "{\n\t\"content\": \"a\\n\\tb\\u0001c \\\\\\nd\\\\\\ne\"\n}")],
    );
}

#[test]
fn calls_follow_text_and_each_other() {
    assert_reads(
        hermes(),
        &format!("I will look.\n\n{}\n{}\n\nDone.\n", weather(), weather()),
        &[text("I will look."), call("get_weather", WEATHER), call("get_weather", WEATHER), text("Done.\n")],
    );
    assert_reads(
        hermes(),
        "<tool_call>[{\"name\": \"now\", \"arguments\": {}},\n{\"name\": \"now\", \"arguments\": {}}]</tool_call>",
        &[call("now", "{}"), call("now", "{}")],
    );
}

#[test]
fn the_name_may_come_last() {
    assert_reads(
        hermes(),
        "<tool_call>\n{\"arguments\": {\"city\": \"a}\"}, \"name\": \"get_weather\"}\n</tool_call>",
        &[call("get_weather", "{\"city\": \"a}\"}")],
    );
    assert_reads(
        hermes(),
        "<tool_call>\n{\"id\": [1, {}], \"arguments\": null, \"type\": \"function\", \"name\": \"now\"}\n</tool_call>",
        &[call("now", "{}")],
    );
}

#[test]
fn arguments_stream_as_they_arise() {
    let mut parser = OutputParser::new(hermes(), &tools(), "");
    let mut events = Vec::new();
    parser.push("<tool_call>\n{\"name\": \"write_file\", \"arguments\":", &mut events);
    assert_eq!(events, []);
    assert!(parser.in_call());
    parser.push(" {\"path\": \"a", &mut events);
    let begin = OutputEvent::CallBegin { name: "write_file".into() };
    assert_eq!(events, [begin, OutputEvent::CallInput("{\"path\": \"a".into())]);
    events.clear();
    parser.push("/b\"", &mut events);
    assert_eq!(events, [OutputEvent::CallInput("/b\"".into())]);
    assert!(parser.in_call());
    parser.push("}}", &mut events);
    assert_eq!(events[1..], [OutputEvent::CallInput("}".into()), OutputEvent::CallEnd]);
    assert!(!parser.in_call());
}

#[test]
fn markup_in_arguments_is_theirs() {
    let code = "{\"content\": \"x = '</tool_call>'\\n<tool_call>{\\\"name\\\": 1} ```\\n```\"}";
    assert_reads(
        hermes(),
        &format!("<tool_call>\n{{\"name\": \"write_file\", \"arguments\": {code}}}\n</tool_call>"),
        &[call("write_file", code)],
    );
}

#[test]
fn markup_in_code_and_prose_is_text() {
    for answer in [
        "Use the `<tool_call>` tag: <tool_call> opens it.",
        "A model writes `<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>` to call.",
        &format!("Like this:\n\n```xml\n{}\n```\nSee?", weather()),
        &format!("~~~\n{}\n~~~", weather()),
        "a <b && <tool_c",
        "text\n\n",
        " \n text",
        "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\n{\"name\": \"get_weather\", \"arg",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\":",
        "<tool_call>\n{\"arguments\": {\"city\": 1}, \"name\": \"get_w",
        "<tool_call>{\"name\": \"\", \"arguments\": {}}</tool_call>",
        "<tool_call>not json</tool_call>",
    ] {
        assert_text(hermes(), answer);
    }
}

#[test]
fn a_call_after_code_or_a_stray_backtick_is_a_call() {
    let calls = weather();
    assert_reads(
        hermes(),
        &format!("Run `ls`:\n```sh\nls\n```\nit`s so:\n<tool_call> no, <{calls}"),
        &[text("Run `ls`:\n```sh\nls\n```\nit`s so:\n<tool_call> no, <"), call("get_weather", WEATHER)],
    );
    assert_reads(
        hermes(),
        &format!("<tool_call>{calls}"),
        &[text("<tool_call>"), call("get_weather", WEATHER)],
    );
}

#[test]
fn a_fence_within_a_fence_hides_no_call_behind_both() {
    for before in [
        "```markdown\n# X\n```sh\nmake\n```\nDone.\n```\nNow I write it.",
        "````markdown\n```sh\nmake\n```\n````\nNow I write it.",
        "```markdown\n```sh\nmake\n``` \n```",
        "Run:\n```ls```",
    ] {
        let answer = format!("{before}\n{}", weather());
        assert_reads(hermes(), &answer, &[text(before), call("get_weather", WEATHER)]);
    }
    assert_text(hermes(), &format!("```markdown\n```sh\nmake\n```\n{}\n```", weather()));
}

#[test]
fn a_call_right_behind_a_closing_fence_is_a_call() {
    let before = "Run:\n```sh\nls\n```";
    assert_reads(hermes(), &format!("{before}{}", weather()), &[text(before), call("get_weather", WEATHER)]);
    assert_text(hermes(), &format!("Like this:\n```{}\n```", weather()));
}

#[test]
fn without_tools_nothing_is_a_call() {
    assert_eq!(read_after(hermes(), &[], "", &weather()), [text(&weather())]);
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    let begun = "<tool_call>\n{\"name\": \"write_file\", \"arguments\": {\"path\": \"a";
    assert_reads(hermes(), &format!("Hi.\n{begun}"), &[text("Hi."), cut("write_file", "{\"path\": \"a")]);
    // Nothing is missing but the closing.
    for closing in ["\"}", "\"}}", "\"}}\n</tool_", "\"}\n</tool_call>"] {
        assert_reads(hermes(), &format!("{begun}{closing}"), &[call("write_file", "{\"path\": \"a\"}")]);
    }
}

#[test]
fn slips_in_arguments_are_passed_on() {
    for (arguments, rest) in [
        ("{\"a\": tru, b: 'c'}", ""),
        ("{\"a\": [1, 2}}", ""),
        ("{\"a\": 1", ""),
        ("{\"a\": 1 < 2}", "}"),
        ("[1]", "}"),
        ("17", "}"),
        ("\"text\"", "}"),
    ] {
        assert_reads(
            hermes(),
            &format!("<tool_call>{{\"name\": \"f\", \"arguments\": {arguments}{rest}</tool_call>ok"),
            &[call("f", arguments), text("ok")],
        );
    }
}

#[test]
fn known_quirks_are_forgiven() {
    for call_text in [
        "<tool_call>{{\"name\": \"now\", \"arguments\": {}}}</tool_call>",
        "<tool_call>{\"name\": \"now\", \"arguments\": {}}}\n</tool_call>",
        "<tool_call>{\"name\": \"now\", \"arguments\": \"{}\"}</tool_call>",
        "<tool_call>{\"name\": \"now\", \"parameters\": {}}</tool_call>",
        "<tool_call>{\"name\": \"now\"}</tool_call>",
        "<tools>\n{\"name\": \"now\", \"arguments\": {}}\n</tools>",
        "{\"name\": \"now\", \"arguments\": {}}",
        "{\n  \"name\": \"now\",\n  \"arguments\": {}\n}\n",
        "```json\n{\n  \"name\": \"now\",\n  \"arguments\": {}\n}\n```",
        "\n```\n[{\"name\": \"now\", \"arguments\": {}}]\n```\n",
    ] {
        assert_reads(hermes(), call_text, &[call("now", "{}")]);
    }
    assert_reads(
        hermes(),
        "{\"name\": \"now\", \"arguments\": {}}\n{\"name\": \"now\", \"arguments\": {}}\nDone",
        &[call("now", "{}"), call("now", "{}"), text("Done")],
    );
    assert_reads(
        hermes(),
        "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": \\\"b\\\\n\\\"}\"}</tool_call>",
        &[call("f", "{\"a\": \"b\\n\"}")],
    );
}

#[test]
fn an_unmarked_call_of_a_strict_tool_is_one_only_if_it_fits() {
    let mut tools = tools();
    for tool in &mut tools[..2] {
        let ToolInput::Json { strict, .. } = &mut tool.input else { panic!("{tool:?}") };
        *strict = true;
    }
    let read = |answer: &str| read_after(hermes(), &tools, "", answer);
    let object = |arguments: &str| format!("{{\"name\": \"get_weather\", \"arguments\": {arguments}}}");
    let (fits, other) = (object("{\"days\": 2}"), object("{\"days\": \"two\"}"));
    let called = [call("get_weather", "{\"days\": 2}")];
    for form in ["X", "\n X", "```json\nX\n```", "```\n[X]\n```", "[X]", "<tools>\nX\n</tools>"] {
        assert_eq!(read(&form.replace('X', &fits)), called, "{form}");
        let answer = form.replace('X', &other);
        assert_eq!(read(&answer), [text(&answer)]);
    }
    assert_eq!(
        read(&format!("{fits}\n{other}\nDone.")),
        [called[0].clone(), text(&format!("{other}\nDone."))]
    );
    assert_eq!(read(&format!("{other}\n{fits}")), [text(&format!("{other}\n{fits}"))]);
    // The closing is missing, or more.
    assert_eq!(read(&fits[..fits.len() - 1]), called);
    assert_eq!(read(&fits[..fits.len() - 2]), [text(&fits[..fits.len() - 2])]);
    // Nothing looks at the tags of Hermes, which the grammar holds, nor at tools that are not strict.
    assert_eq!(
        read(&format!("<tool_call>\n{other}\n</tool_call>")),
        [call("get_weather", "{\"days\": \"two\"}")]
    );
    assert_eq!(read("{\"name\": \"now\", \"arguments\": {\"a\": 1}}"), [call("now", "{\"a\": 1}")]);
}

#[test]
fn an_unmarked_call_of_a_strict_tool_is_held_to_patterns_and_formats() {
    let string = |rule: serde_json::Value| {
        let schema = json!({"type": "object", "properties": {"a": rule}});
        let input = ToolInput::Json { schema, strict: true };
        [Tool { name: "f".into(), description: String::new(), input }]
    };
    let object = |value: &str| format!("{{\"name\": \"f\", \"arguments\": {{\"a\": {value}}}}}");
    for (rule, fits, other) in [
        (json!({"type": "string", "pattern": "^v[0-9]+"}), "\"v1.2\"", "\"1.2\""),
        (json!({"type": "string", "format": "date"}), "\"2026-02-28\"", "\"2026-02-30\""),
        (json!({"type": ["string", "null"], "format": "uri"}), "null", "\"no address\""),
        (json!({"items": {"type": "string", "pattern": "é$"}}), "[\"\\u00e9\"]", "[\"é\", \"e\"]"),
    ] {
        let (tools, arguments) = (string(rule), format!("{{\"a\": {fits}}}"));
        assert_eq!(read_after(hermes(), &tools, "", &object(fits)), [call("f", &arguments)]);
        assert_eq!(read_after(hermes(), &tools, "", &object(other)), [text(&object(other))]);
    }
}

#[test]
fn arguments_of_an_unmarked_call_stream_unless_the_tool_is_strict() {
    let mut tools = tools();
    let ToolInput::Json { strict, .. } = &mut tools[0].input else { panic!("{tools:?}") };
    *strict = true;
    let begun = |name: &str| {
        let (mut parser, mut events) = (OutputParser::new(hermes(), &tools, ""), Vec::new());
        parser.push(&format!("{{\"name\": \"{name}\", \"arguments\": {{\"a"), &mut events);
        assert!(parser.in_call());
        events.len()
    };
    assert_eq!((begun("now"), begun("get_weather")), (2, 0));
}

#[test]
fn a_further_call_that_is_not_given_out_yet_is_a_call() {
    let mut tools = tools();
    let ToolInput::Json { strict, .. } = &mut tools[0].input else { panic!("{tools:?}") };
    *strict = true;
    let object = "{\"name\": \"get_weather\", \"arguments\": {\"days\": 2}}";
    let marked = format!("<tool_call>\n{object}");
    let array = format!("[{object}");
    for (begin, gap, end) in
        [(object, "\n", "\n"), (&array, ", ", "]"), (&marked, "\n</tool_call>\n<tool_call>", "\n</tool_ca")]
    {
        let (mut parser, mut events) = (OutputParser::new(hermes(), &tools, ""), Vec::new());
        let mut in_call = |piece: &str| {
            parser.push(piece, &mut events);
            parser.in_call()
        };
        assert!(!in_call(begin), "{begin}");
        assert_eq!(in_call(gap), gap.ends_with("<tool_call>"), "{begin}{gap}");
        assert!(in_call(&object[..6]) && in_call(&object[6..45]), "{begin}");
        assert!(!in_call(&object[45..]) && !in_call(end), "{begin}");
        parser.finish(true, &mut events);
        let called = call("get_weather", "{\"days\": 2}");
        assert_eq!(said(events), [called.clone(), called]);
    }
}

#[test]
fn keys_behind_an_unmarked_calls_arguments_are_passed_over() {
    let object = "{\"name\": \"now\", \"arguments\": {}, \"description\": \"x\", \"more\": {\"a\": [1]}}";
    for answer in [object, &format!("```json\n{object}\n```"), &format!("[{object}]")] {
        assert_reads(hermes(), answer, &[call("now", "{}")]);
    }
    assert_reads(hermes(), &format!("{object}\nDone."), &[call("now", "{}"), text("Done.")]);
}

#[test]
fn bare_json_of_another_kind_is_text() {
    for answer in [
        "{\"name\": \"Bob\", \"age\": 3}",
        "{\"name\": \"unknown\", \"arguments\": {}}",
        "{\"name\": \"now\"}",
        "{\"name\": \"now\", \"description\": \"x\", \"arguments\": {}}",
        "{\"result\": {\"name\": \"now\", \"arguments\": {}}}",
        "[1, 2]",
        "{",
        "Call: {\"name\": \"now\", \"arguments\": {}}",
        "```json\n{\"a\": 1}\n```",
        "```rust\nfn main() {}\n```\n",
        "```json\n{\"name\": \"now\", \"argu",
    ] {
        assert_text(hermes(), answer);
    }
}

#[test]
fn custom_calls_carry_their_text_raw() {
    let patch = "*** Begin Patch\n+a \"b\" \\n <tool_call>\n+ </custom_tool_call> x\n\n*** End Patch";
    assert_reads(
        hermes(),
        &format!("Patching.\n<custom_tool_call name=\"apply_patch\">\n{patch}\n</custom_tool_call>\nDone"),
        &[text("Patching."), call("apply_patch", patch), text("Done")],
    );
    assert_reads(
        hermes(),
        "<custom_tool_call name=\"apply_patch\">x</custom_tool_call>\n",
        &[call("apply_patch", "x")],
    );
    assert_reads(
        hermes(),
        "<custom_tool_call name=\"apply_patch\">\n</custom_tool_call>",
        &[call("apply_patch", "")],
    );
    assert_reads(
        hermes(),
        "<custom_tool_call name=\"apply_patch\">\nx</custom_tool_call>\ny",
        &[cut("apply_patch", "x</custom_tool_call>\ny")],
    );
    assert_text(hermes(), "<custom_tool_call name=\"now\">\nx\n</custom_tool_call>");
    assert_text(hermes(), "<custom_tool_call name=\"apply_patch\"");
}

#[test]
fn custom_tools_may_be_called_in_json() {
    for arguments in
        ["{\"input\": \"a\\n\\\"b\\\"\"}", "{ \"input\" : \"a\\n\\\"b\\\"\", \"x\": 1}", "\"a\\n\\\"b\\\"\""]
    {
        assert_reads(
            hermes(),
            &format!("<tool_call>{{\"name\": \"apply_patch\", \"arguments\": {arguments}}}</tool_call>"),
            &[call("apply_patch", "a\n\"b\"")],
        );
    }
    assert_reads(
        hermes(),
        "<tool_call>{\"name\": \"apply_patch\", \"arguments\": {\"in\": 1}}</tool_call>",
        &[call("apply_patch", "{\"in\": 1}")],
    );
}

#[test]
fn a_missing_closing_mark_hides_no_call() {
    let open = weather().replace("</tool_call>", "");
    assert_reads(
        hermes(),
        &format!("{open}{}", weather()),
        &[call("get_weather", WEATHER), call("get_weather", WEATHER)],
    );
    assert_reads(hermes(), &format!("{open}Done <b>"), &[call("get_weather", WEATHER), text("Done <b>")]);
}
