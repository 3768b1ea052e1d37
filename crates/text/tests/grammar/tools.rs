//! Tool calls of every family: whatever is drawn under the grammar is read back as calls of the tools
//! offered, with inputs that fit.

use proptest::prelude::*;
use rudder_text::{
    AnswerRules, GrammarSpec, OutputEvent, OutputFormat, OutputParser, ReasoningFormat, Text, Tool,
    ToolChoice, ToolFormat, ToolInput,
};
use serde_json::{Value, json};

use crate::walk::{Walk, text};
use crate::{PATCH, compile, schema};

const FORMATS: [ToolFormat; 8] = [
    ToolFormat::Hermes,
    ToolFormat::QwenXml,
    ToolFormat::LlamaJson,
    ToolFormat::Pythonic,
    ToolFormat::Mistral,
    ToolFormat::DeepSeek,
    ToolFormat::Glm,
    ToolFormat::Harmony,
];

fn tool(name: &str, input: ToolInput) -> Tool {
    Tool { name: name.into(), description: String::new(), input }
}

pub fn json_tool(name: &str, schema: Value, strict: bool) -> Tool {
    tool(name, ToolInput::Json { schema, strict })
}

fn tools() -> Vec<Tool> {
    let read = json!({"type": "object", "required": ["path"], "additionalProperties": false,
        "properties": {"path": {"type": "string"}, "limit": {"type": "integer", "minimum": 0, "maximum": 99}}});
    let set = json!({"type": "object", "required": ["mode", "on", "tags"], "additionalProperties": false,
        "properties": {"mode": {"enum": ["r", "w"]}, "on": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2}}});
    let none = json!({"type": "object", "properties": {}, "additionalProperties": false});
    let label = json!({"type": "object", "required": ["id", "title"], "additionalProperties": false,
        "properties": {"id": {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$"},
            "title": {"type": "string", "minLength": 2, "maxLength": 6}, "note": {"type": "string", "pattern": "[0-9]"}}});
    vec![
        json_tool("read", read, true),
        json_tool("set_mode", set, true),
        json_tool("now", none, true),
        json_tool("label", label, true),
    ]
}

fn custom_tools() -> Vec<Tool> {
    vec![
        tool("apply_patch", ToolInput::Lark(PATCH.into())),
        tool("count", ToolInput::Regex(r"^\d+( \d+)*$".into())),
        tool("anything", ToolInput::Regex(r"(.|\n)+".into())),
        tool("note", ToolInput::Text),
    ]
}

/// A call as the parser read it.
#[derive(Debug)]
pub struct Call {
    pub name: String,
    pub input: String,
    pub whole: bool,
}

/// Calls and text of an answer.
pub fn parse(format: OutputFormat, tools: &[Tool], prompt: &str, answer: &str) -> (Vec<Call>, String) {
    let mut parser = OutputParser::new(format, tools, prompt);
    let mut events = Vec::new();
    parser.push(answer, &mut events);
    parser.finish(true, &mut events);
    let (mut calls, mut text) = (Vec::<Call>::new(), String::new());
    for event in events {
        match event {
            OutputEvent::Reasoning(_) => {}
            OutputEvent::Text(more) => text.push_str(&more),
            OutputEvent::CallBegin { name } => calls.push(Call { name, input: String::new(), whole: false }),
            OutputEvent::CallInput(more) => calls.last_mut().unwrap().input.push_str(&more),
            OutputEvent::CallEnd => calls.last_mut().unwrap().whole = true,
        }
    }
    (calls, text)
}

pub fn check(calls: &[Call], tools: &[Tool], answer: &str) {
    for call in calls {
        let tool = tools.iter().find(|tool| tool.name == call.name).unwrap_or_else(|| panic!("{answer}"));
        assert!(call.whole, "{call:?} in {answer}");
        match &tool.input {
            ToolInput::Json { schema, .. } => {
                let value: Value =
                    serde_json::from_str(&call.input).unwrap_or_else(|e| panic!("{call:?}: {e}: {answer}"));
                schema::check(&value, schema, schema)
                    .unwrap_or_else(|wrong| panic!("{call:?}: {wrong}: {answer}"));
            }
            ToolInput::Lark(_) => {
                assert!(call.input.starts_with("*** Begin Patch\n"), "{answer}");
                assert!(call.input.trim_end().ends_with("\n*** End Patch"), "{answer}");
            }
            ToolInput::Regex(regex) => {
                let whole = regex::Regex::new(&format!("^(?:{})$", regex.trim_matches(['^', '$']))).unwrap();
                assert!(whole.is_match(&call.input), "{call:?} in {answer}");
            }
            ToolInput::Text => {}
        }
    }
}

pub fn format_of(tools: ToolFormat) -> OutputFormat {
    OutputFormat {
        tools: Some(tools),
        reasoning: (tools == ToolFormat::Harmony).then_some(ReasoningFormat::Harmony),
    }
}

pub fn prompt_of(tools: ToolFormat) -> &'static str {
    if tools == ToolFormat::Harmony { "<|start|>assistant" } else { "<|im_start|>assistant\n" }
}

/// Rules that hold nothing.
pub fn rules(format: OutputFormat, prompt: &str) -> AnswerRules<'_> {
    AnswerRules {
        format,
        prompt,
        tools: &[],
        others_shown: false,
        choice: &ToolChoice::Auto,
        parallel: true,
        text: None,
    }
}

pub fn grammar(
    text: &Text,
    tools: &[Tool],
    choice: &ToolChoice,
    family: ToolFormat,
    parallel: bool,
) -> GrammarSpec {
    let rules = AnswerRules { tools, choice, parallel, ..rules(format_of(family), prompt_of(family)) };
    text.answer_grammar(rules).unwrap().unwrap_or_else(|| panic!("{family:?} has no grammar"))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn a_required_call_is_made_and_fits(seed: u64, words: bool, parallel: bool, jump: bool) {
        let (text, tools) = (text(words), tools());
        for family in FORMATS {
            let spec = grammar(text, &tools, &ToolChoice::Required, family, parallel);
            let answer = Walk { jump, ..Walk::new(seed) }.answer(text, &compile(text, &spec));
            let (calls, rest) = parse(format_of(family), &tools, prompt_of(family), &answer);
            check(&calls, &tools, &answer);
            prop_assert!(!calls.is_empty() && rest.trim().is_empty(), "{:?}: {:?}", family, answer);
            prop_assert!(parallel || calls.len() == 1, "{:?}: {:?}", family, answer);
        }
    }

    #[test]
    fn a_named_tool_is_called_once(seed: u64, words: bool) {
        let (text, tools) = (text(words), [tools(), custom_tools()].concat());
        for family in FORMATS {
            for name in ["set_mode", "label", "count", "apply_patch", "anything", "note"] {
                if family == ToolFormat::Harmony && name == "anything" {
                    continue; // where the parser guesses: it may look like a text in an object
                }
                let spec = grammar(text, &tools, &ToolChoice::Named(name.into()), family, true);
                let answer = Walk::new(seed).answer(text, &compile(text, &spec));
                let (calls, rest) = parse(format_of(family), &tools, prompt_of(family), &answer);
                check(&calls, &tools, &answer);
                let named = calls.len() == 1 && calls[0].name == name;
                prop_assert!(named && rest.trim().is_empty(), "{:?}: {:?} {:?} {:?}", family, answer, calls, rest);
            }
        }
    }

    #[test]
    fn a_free_model_speaks_as_it_likes_and_calls_as_it_must(seed: u64, words: bool) {
        let (text, tools) = (text(words), tools());
        let opened = [
            (ToolFormat::Hermes, "hello w. <tool_call>"),
            (ToolFormat::QwenXml, "hello\n<tool_call>"),
            (ToolFormat::Glm, "hello\n\n<tool_call>"),
            (ToolFormat::LlamaJson, "hello <|python_tag|>"),
            (ToolFormat::LlamaJson, "{\"name\": \"read\", \"parameters\": "),
            (ToolFormat::Pythonic, "[set_mode("),
            (ToolFormat::Mistral, "hello[TOOL_CALLS]"),
            (ToolFormat::DeepSeek, "hello<｜tool▁calls▁begin｜>"),
            (ToolFormat::Harmony, "<|channel|>analysis<|message|>hello<|end|><|start|>assistant<|channel|>commentary to="),
        ];
        for (family, begin) in opened {
            let spec = grammar(text, &tools, &ToolChoice::Auto, family, false);
            let begin = text.encode(begin, true, false).unwrap();
            let answer = Walk { begin, ..Walk::new(seed) }.answer(text, &compile(text, &spec));
            let (calls, rest) = parse(format_of(family), &tools, prompt_of(family), &answer);
            check(&calls, &tools, &answer);
            prop_assert!(!calls.is_empty(), "{:?}: {:?}", family, answer);
            prop_assert!(matches!(rest.trim(), "" | "hello" | "hello w."), "{:?}: {:?}", family, answer);
        }
    }

    #[test]
    fn values_that_show_calls_are_read_to_their_end(seed: u64) {
        let (text, tools) = (text(true), tools());
        let qwen = "<tool_call>\n<function=read>\n<parameter=path>\n";
        let glm = "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>";
        let begun = [
            (ToolFormat::QwenXml, qwen, "<parameter=a>\n1\n</parameter>\n</function>\nhello"),
            (ToolFormat::QwenXml, qwen, "hello\n <parameter=a>1</parameter>"),
            (ToolFormat::QwenXml, qwen, "\n\n<parameter=a>\n<parameter=b>"),
            (ToolFormat::QwenXml, qwen, "a </parameter> hello <parameter=b>"),
            (ToolFormat::Glm, glm, "<arg_value>hello"),
            (ToolFormat::Glm, glm, "\n<arg_value>1</arg_value>\n</tool_call>\n<arg_value>"),
            (ToolFormat::Glm, glm, "hello\n  <arg_value>\n<arg_value>1</arg_value>2</arg_value>3"),
        ];
        for (family, head, value) in begun {
            let spec = grammar(text, &tools, &ToolChoice::Required, family, false);
            let begin = text.encode(&format!("{head}{value}"), true, false).unwrap();
            let answer = Walk { begin, ..Walk::new(seed) }.answer(text, &compile(text, &spec));
            let (calls, rest) = parse(format_of(family), &tools, prompt_of(family), &answer);
            check(&calls, &tools, &answer);
            prop_assert!(calls.len() == 1 && rest.trim().is_empty(), "{:?}: {:?} {:?}", answer, calls, rest);
            let input: Value = serde_json::from_str(&calls[0].input).unwrap();
            prop_assert!(input["path"].as_str().unwrap().starts_with(value), "{:?}: {:?}", answer, input);
        }
    }

    #[test]
    fn reasoning_comes_first_wherever_it_was_opened(seed: u64, words: bool) {
        let (text, tools) = (text(words), tools());
        let format = OutputFormat { tools: Some(ToolFormat::Hermes), reasoning: Some(ReasoningFormat::Think) };
        let thought = "hello {\"a\"} \n</think>\n\n";
        for (prompt, begin) in [("<think>\n", thought.to_owned()), ("", format!("<think>{thought}")), ("", String::new())] {
            let required = AnswerRules { tools: &tools, choice: &ToolChoice::Required, ..rules(format, prompt) };
            let spec = text.answer_grammar(required).unwrap().unwrap();
            let begin = text.encode(&begin, true, false).unwrap();
            let answer = Walk { begin, ..Walk::new(seed) }.answer(text, &compile(text, &spec));
            let (calls, rest) = parse(format, &tools, prompt, &answer);
            check(&calls, &tools, &answer);
            prop_assert!(!calls.is_empty() && rest.trim().is_empty(), "{answer:?}");
        }
    }
}

/// What a free model may write, ending there.
pub fn may_write(text: &Text, spec: &GrammarSpec, answer: &str) -> bool {
    let mut state = compile(text, spec).start();
    let mut mask = vec![0; text.vocab_size().div_ceil(32)];
    for token in text.encode(answer, true, false).unwrap() {
        if state.mask(&mut mask).is_err() || !crate::walk::allows(&mask, token) {
            return false;
        }
        state.accept(token).unwrap();
    }
    state.is_complete()
        || state.mask(&mut mask).is_ok_and(|()| crate::walk::allows(&mask, crate::walk::stop(text)))
}

#[test]
fn a_free_model_may_do_without_a_call() {
    let call = "<tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"a\"}}\n</tool_call>";
    for words in [true, false] {
        let (text, tools) = (text(words), [tools(), custom_tools()].concat());
        let spec = grammar(text, &tools, &ToolChoice::Auto, ToolFormat::Hermes, true);
        let patch = "<custom_tool_call name=\"count\">\n1 2\n</custom_tool_call>";
        for answer in ["", "hello", "{\"name\": 1}", "a <b> <tool\n", call, patch] {
            assert!(may_write(text, &spec, answer), "{answer}");
        }
        assert!(may_write(text, &spec, &format!("hello {call}\n{call} and {patch}\nhello")));
        for answer in [
            &call[..call.len() - 3],
            &call.replace("path", "patch"),
            &call.replace("read", "write"),
            &patch.replace("1 2", "x"),
            &patch.replace("count", "counts"),
        ] {
            assert!(!may_write(text, &spec, answer), "{answer}");
        }
        let one = grammar(text, &tools, &ToolChoice::Auto, ToolFormat::Hermes, false);
        assert!(may_write(text, &one, call) && !may_write(text, &one, &format!("{call}\n{call}")));
    }
}

#[test]
fn a_tool_that_is_not_strict_is_held_to_its_schema_only_where_a_call_is_required() {
    let text = text(true);
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let loose = [json_tool("f", schema.clone(), false)];
    let mixed = [json_tool("f", schema, false), tools().remove(2)];
    let call =
        |input: &str| format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {input}}}\n</tool_call>");
    let format = format_of(ToolFormat::Hermes);
    for (format, choice) in [
        (format, ToolChoice::Auto),
        (format, ToolChoice::None),
        (OutputFormat::default(), ToolChoice::Required),
    ] {
        let free = AnswerRules { tools: &loose, choice: &choice, ..rules(format, "") };
        assert_eq!(text.answer_grammar(free), Ok(None), "{choice:?}");
    }
    let required = grammar(text, &loose, &ToolChoice::Required, ToolFormat::Hermes, true);
    let free = grammar(text, &mixed, &ToolChoice::Auto, ToolFormat::Hermes, true);
    for (input, fits) in [("{\"a\": 1}", true), ("{\"a\": \"x\"}", false), ("{}", false)] {
        assert_eq!(may_write(text, &required, &call(input)), fits, "{input}");
        assert!(may_write(text, &free, &call(input)), "{input}");
    }
    assert!(!may_write(text, &free, &call("[]")));
}

#[test]
fn a_tool_that_is_shown_but_not_allowed_is_not_called() {
    let schema = json!({"type": "object"});
    let (text, tools) = (text(true), [json_tool("f", schema, false)]);
    let calls: [(ToolFormat, &[&str]); 6] = [
        (ToolFormat::Hermes, &["<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>"]),
        (
            ToolFormat::QwenXml,
            &[
                "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
                "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
            ],
        ),
        (ToolFormat::Glm, &["<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"]),
        (ToolFormat::Mistral, &["[TOOL_CALLS]f[ARGS]{\"a\": 1}"]),
        (
            ToolFormat::DeepSeek,
            &[
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜>",
            ],
        ),
        (
            ToolFormat::Harmony,
            &["<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}"],
        ),
    ];
    for (family, answers) in calls {
        let plain = AnswerRules { tools: &tools, ..rules(format_of(family), prompt_of(family)) };
        assert_eq!(text.answer_grammar(plain), Ok(None), "{family:?}");
        let others_shown = AnswerRules { others_shown: true, ..plain };
        let spec = text.answer_grammar(others_shown).unwrap().unwrap();
        for answer in answers {
            let read = |answer: &str| parse(format_of(family), &tools, prompt_of(family), answer).0;
            assert!(may_write(text, &spec, answer) && read(answer).len() == 1, "{answer}");
            let of_other = ["\"f\"", "=f>", ">f\n", "]f[", ">f<", ".f "]
                .iter()
                .fold(answer.to_string(), |answer, name| answer.replace(name, &name.replace('f', "g")));
            assert!(of_other != *answer && !may_write(text, &spec, &of_other), "{of_other}");
        }
    }
    let none = AnswerRules { others_shown: true, ..rules(format_of(ToolFormat::Hermes), "") };
    assert_eq!(text.answer_grammar(none), Ok(None), "no tool is read as called");
}

/// Forms of a call of `f` that formats forgive, X for its arguments.
const UNMARKED: [(ToolFormat, &str); 23] = [
    (ToolFormat::Hermes, "{\"name\": \"f\", \"arguments\": X}"),
    (ToolFormat::Hermes, "{\n  \"arguments\": X,\n  \"name\": \"f\"\n}\n"),
    (ToolFormat::Hermes, "```json\n{\"name\": \"f\", \"arguments\": X}\n```"),
    (ToolFormat::Hermes, "\n```\n[{\"name\": \"f\", \"arguments\": X}]\n```\n"),
    (ToolFormat::Hermes, "<tools>\n{\"name\": \"f\", \"arguments\": X}\n</tools>"),
    (ToolFormat::QwenXml, "{\"name\": \"f\", \"arguments\": X}"),
    (ToolFormat::QwenXml, "<function=f>\n<parameter=a>\nY\n</parameter>\n</function>\n</tool_call>"),
    (ToolFormat::QwenXml, "Look:\n<function=f>\n<parameter=a>\nY\n</parameter>\n</function>"),
    (ToolFormat::QwenXml, "Look: <function=f>\n<parameter=a>\nY\n</parameter>\n</function>"),
    (ToolFormat::Glm, "[{\"name\": \"f\", \"arguments\": X}]"),
    (ToolFormat::LlamaJson, "{\"name\": \"f\", \"parameters\": X}"),
    (ToolFormat::LlamaJson, " {\"name\": \"f\", \"parameters\": X}"),
    (ToolFormat::LlamaJson, "{\"name\": \"f\",  \"parameters\": X}"),
    (ToolFormat::LlamaJson, "{\"name\": \"\\u0066\", \"parameters\": X}"),
    (ToolFormat::LlamaJson, "{\"type\": \"function\", \"name\": \"f\", \"parameters\": X}"),
    (ToolFormat::Pythonic, "[f(a=Y)]"),
    (ToolFormat::Pythonic, "[ f(a=Y)]"),
    (ToolFormat::Pythonic, "\n[f(a=Y)]"),
    (ToolFormat::Pythonic, "Look: <|python_start|>[f(a=Y)]<|python_end|>"),
    (ToolFormat::Mistral, "[{\"name\": \"f\", \"arguments\": X}]"),
    (ToolFormat::DeepSeek, "<｜tool▁call▁begin｜>f<｜tool▁sep｜>X<｜tool▁call▁end｜>"),
    (ToolFormat::DeepSeek, "<｜tool▁call▁begin｜>f<｜tool▁sep｜>X<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    (ToolFormat::DeepSeek, "{\"name\": \"f\", \"arguments\": X}"),
];

#[test]
fn a_call_without_its_mark_is_held_or_checked_too() {
    let schema = json!({"type": "object", "required": ["a"], "additionalProperties": false,
        "properties": {"a": {"type": "integer", "minimum": 0}}});
    let now = json_tool("now", json!({"type": "object"}), true);
    for (family, form) in UNMARKED {
        for (text, strict) in [(text(true), true), (text(false), true), (text(true), false)] {
            let tools = [json_tool("f", schema.clone(), strict), now.clone()];
            let spec = grammar(text, &tools, &ToolChoice::Auto, family, true);
            for (value, fits) in [("1", true), ("-1", !strict), ("\"x\"", !strict)] {
                let answer = form.replace('X', &format!("{{\"a\": {value}}}")).replace('Y', value);
                let (calls, rest) = parse(format_of(family), &tools, prompt_of(family), &answer);
                let called = may_write(text, &spec, &answer) && !calls.is_empty();
                assert_eq!(called, fits, "{family:?} {answer}: {calls:?}");
                assert!(!fits || calls.len() == 1 && calls[0].whole, "{answer}: {calls:?}");
                assert!(!calls.is_empty() || rest.trim() == answer.trim(), "{answer}: {rest}");
            }
        }
    }
}

#[test]
fn a_free_model_may_speak_of_qwens_tag_within_a_line() {
    let family = ToolFormat::QwenXml;
    let call = "<function=now>\n</function>";
    for text in [text(true), text(false)] {
        let spec = grammar(text, &tools(), &ToolChoice::Auto, family, true);
        for (before, held) in [
            ("", true),
            ("\n  ", true),
            ("hello\n\n", true),
            ("hello ", false),
            ("hello\n hello ", false),
            (&format!("{call}\n</tool_call>\n"), true),
            (&format!("{call} hello "), false),
            (&format!("{call}\nhello\n\t"), true),
        ] {
            let talk = format!("{before}<function=name> hello");
            assert_eq!(may_write(text, &spec, &talk), !held, "{talk:?}");
            let (calls, rest) = parse(format_of(family), &tools(), prompt_of(family), &talk);
            assert!(held || rest.ends_with("<function=name> hello"), "{talk:?}: {rest:?}");
            assert_eq!(calls.len(), talk.matches(call).count(), "{talk:?}");
            let called = format!("{before}{call}");
            assert!(may_write(text, &spec, &called), "{called:?}");
            let (calls, _) = parse(format_of(family), &tools(), prompt_of(family), &called);
            assert_eq!(calls.len(), called.matches(call).count(), "{called:?}");
        }
    }
}

#[test]
fn a_custom_tool_with_a_grammar_is_called_after_its_mark_alone() {
    let input = "{\"input\": \"x\"}";
    let forms = [
        (ToolFormat::Hermes, format!("{{\"name\": \"count\", \"arguments\": {input}}}")),
        (
            ToolFormat::Hermes,
            format!("<tool_call>\n{{\"name\": \"count\", \"arguments\": {input}}}\n</tool_call>"),
        ),
        (ToolFormat::LlamaJson, format!("{{\"name\": \"count\", \"parameters\": {input}}}")),
        (ToolFormat::Pythonic, "[count(input=\"x\")]".to_owned()),
        (ToolFormat::Mistral, format!("[TOOL_CALLS]count[ARGS]{input}")),
        (ToolFormat::QwenXml, "<function=count>\n<parameter=input>\nx\n</parameter>\n</function>".to_owned()),
        (
            ToolFormat::Harmony,
            "<|channel|>final<|message|><custom_tool_call name=\"count\">\nx\n</custom_tool_call>".to_owned(),
        ),
    ];
    for with_json in [false, true] {
        let mut tools = custom_tools();
        if with_json {
            tools.extend(self::tools());
        }
        for (family, answer) in &forms {
            let spec = grammar(text(true), &tools, &ToolChoice::Auto, *family, true);
            let (calls, _) = parse(format_of(*family), &tools, prompt_of(*family), answer);
            assert!(
                calls.is_empty() || !may_write(text(true), &spec, answer),
                "{family:?} {answer}: {calls:?}"
            );
            let note = answer.replace("count", "note");
            let (calls, _) = parse(format_of(*family), &tools, prompt_of(*family), &note);
            assert!(calls.len() == 1 && calls[0].input == "x", "{family:?} {note}: {calls:?}");
        }
    }
}

#[test]
fn a_text_of_a_given_form_may_follow_reasoning_or_give_way_to_calls() {
    let text = text(true);
    let number = GrammarSpec::JsonSchema {
        schema: json!({"type": "object", "properties": {"n": {"type": "integer"}},
        "required": ["n"], "additionalProperties": false}),
        strict: true,
    };
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let think = OutputFormat { reasoning: Some(ReasoningFormat::Think), ..format_of(ToolFormat::Hermes) };
    let tools = tools();
    let spec = |format, prompt, tools| {
        let rules = AnswerRules { text: Some(&number), tools, ..rules(format, prompt) };
        text.answer_grammar(rules).unwrap().unwrap()
    };
    for (format, prompt, offered, answer, fits) in [
        (OutputFormat::default(), "", &[][..], "{\n  \"n\": 1\n}", true),
        (OutputFormat::default(), "", &[][..], "hello {\"n\": 1}", false),
        (think, "", &[][..], "<think>hello</think>\n{\"n\": 1}", true),
        (think, "", &[][..], "{\"n\": 1}", true),
        (think, "", &[][..], call, false),
        (think, "<think>", &[][..], "{\"n\": 1}", false),
        (think, "<think>", &[][..], "hello</think>{\"n\": 1}", true),
        (think, "<think>", &tools[..], &format!("hello</think>\n\n{call}"), true),
        (think, "", &tools[..], call, true),
        (think, "", &tools[..], &format!("{call}\nhello"), false),
        (format_of(ToolFormat::Harmony), "", &[][..], "<|channel|>final<|message|>{\"n\": 1}", true),
        (format_of(ToolFormat::Harmony), "", &[][..], "<|channel|>final<|message|>{}", false),
    ] {
        assert_eq!(may_write(text, &spec(format, prompt, offered), answer), fits, "{prompt}{answer}");
    }
}
