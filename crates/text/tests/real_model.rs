//! The vocabulary and chat template of a real model against llama.cpp's tokens and Jinja2's text
//! (goldens/make.py). `RUDDER_TEST_MODEL` is the path of one of the GGUF files named there.

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rudder_model::Gguf;
use rudder_text::{
    AnswerRules, Infill, OutputFormat, TemplateValue, Text, TextSource, Tool, ToolChoice, ToolFormat,
    ToolInput,
};
use serde_json::{Map, Value};

const GOLDENS: [&str; 2] =
    [include_str!("goldens/qwen2.5-coder-0.5b.json"), include_str!("goldens/smollm2-135m.json")];

fn open() -> Gguf {
    let path = std::env::var("RUDDER_TEST_MODEL").expect("RUDDER_TEST_MODEL is the path of a GGUF file");
    Gguf::open(Path::new(&path)).unwrap()
}

fn source(file: &Gguf) -> TextSource {
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    let id = |name: &str| file.u32(&key(&format!("{name}_token_id")));
    let strings = |name: &str| {
        let strings = file.strings(&key(name)).unwrap_or_default();
        strings.into_iter().map(|string| string.into_owned()).collect()
    };
    TextSource {
        model: file.str(&key("model")).unwrap().into_owned(),
        pre: file.str(&key("pre")).map(|pre| pre.into_owned()),
        tokens: strings("tokens"),
        token_types: file.ints(&key("token_type")).unwrap().into_iter().map(|kind| kind as i32).collect(),
        merges: strings("merges"),
        bos: id("bos"),
        eos: id("eos"),
        pad: id("padding"),
        add_bos: file.bool(&key("add_bos_token")),
        chat_template: file.str("tokenizer.chat_template").map(|template| template.into_owned()),
        ..TextSource::default()
    }
}

fn runner() -> proptest::test_runner::TestRunner {
    proptest::test_runner::TestRunner::new(ProptestConfig { failure_persistence: None, ..Default::default() })
}

/// The model's text handling and its goldens.
fn subject() -> (Text, Value) {
    let file = open();
    let name = file.str("general.name").unwrap().into_owned();
    let goldens = GOLDENS.map(|goldens| serde_json::from_str::<Value>(goldens).unwrap());
    let found = goldens.into_iter().find(|goldens| goldens["name"] == name.as_str());
    let goldens = found.unwrap_or_else(|| panic!("no goldens of {name}: make them with goldens/make.py"));
    (Text::from_gguf(source(&file)).unwrap(), goldens)
}

#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn tokens_are_those_of_llama_cpp() {
    let (text, goldens) = subject();
    let cases = goldens["encodings"].as_array().unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let input = case["text"].as_str().unwrap();
        let special = case["special"].as_bool().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let tokens = text.encode(input, special, true).unwrap();
        assert_eq!(tokens, expected, "{input:?}, special: {special}");
    }
}

#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn chats_read_as_jinja2_renders_them() {
    let (text, goldens) = subject();
    for case in goldens["chats"].as_array().unwrap() {
        let prompt = case.get("add_generation_prompt") != Some(&Value::Bool(false));
        let rendered = text.render_chat(&case["messages"], case.get("tools"), prompt, &Map::new()).unwrap();
        assert_eq!(rendered, case["text"].as_str().unwrap());
    }
}

#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn a_chat_that_goes_on_reads_as_if_all_of_it_were_rendered() {
    let (text, goldens) = subject();
    for case in goldens["chats"].as_array().unwrap() {
        let messages = case["messages"].as_array().unwrap();
        let values: Vec<_> = messages.iter().map(TemplateValue::from).collect();
        let tools = case.get("tools").map(TemplateValue::from);
        let render = |known, messages| {
            text.render_from(known, &values[..messages], tools.as_ref(), &Map::new()).unwrap()
        };
        for (now, before) in (1..=values.len()).flat_map(|now| (1..=now).map(move |before| (now, before))) {
            let whole = Value::from(&messages[..now]);
            let whole = text.render_chat(&whole, case.get("tools"), true, &Map::new()).unwrap();
            let (earlier, rest) = (render(0, before), render(before - 1, now));
            let known = &earlier.text[earlier.starts[0]..earlier.starts[before - 1]];
            let (head, new) = rest.text.split_at(rest.starts[0]);
            assert_eq!([head, known, new].concat(), whole, "{now} messages after {before}");
        }
    }
}

#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn text_survives_encoding_and_decoding_token_by_token() {
    let (text, _) = subject();
    let mut runner = runner();
    let any_text =
        prop_oneof![any::<String>(), "[ -~\n\t]{0,200}", "(<\\|im_(start|end)\\|>|[ a-zé中😀\n]){0,40}"];
    let every_byte = text.encode("\u{0}\u{7f}\u{1b}", false, false).unwrap().len() == 3;
    runner
        .run(&any_text, |input| {
            let tokens = text.encode(&input, false, false).unwrap();
            prop_assert!(tokens.iter().all(|token| !text.stop_tokens().contains(token)));
            let whole = text.decode(&tokens, true);
            // SmolLM2's vocabulary lacks a few control bytes.
            if every_byte || !input.contains(|c: char| c.is_control() && !c.is_whitespace()) {
                prop_assert_eq!(&whole, &input);
            }
            let mut decoder = text.decoder();
            let mut streamed = String::new();
            tokens.iter().for_each(|&token| decoder.push(token, &mut streamed));
            decoder.finish(&mut streamed);
            prop_assert_eq!(streamed, whole);
            Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn random_tokens_stream_as_they_decode() {
    let (text, _) = subject();
    let mut runner = runner();
    let any_tokens = prop::collection::vec(0..text.vocab_size() as u32 + 9, 0..40);
    runner
        .run(&any_tokens, |tokens| {
            let mut decoder = text.decoder();
            let mut streamed = String::new();
            tokens.iter().for_each(|&token| decoder.push(token, &mut streamed));
            decoder.finish(&mut streamed);
            prop_assert_eq!(streamed, text.decode(&tokens, true));
            Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn turns_end_and_holes_are_filled_with_the_models_own_tokens() {
    let (text, _) = subject();
    for name in ["<|im_end|>", "<|endoftext|>"] {
        assert!(text.stop_tokens().contains(&text.special_token(name).unwrap()), "{name}");
    }
    let infill = Infill {
        prefix: "def f():".into(),
        suffix: "<|im_end|>".into(),
        extra: vec![("a.py".into(), "x = 1".into())],
        ..Infill::default()
    };
    if !text.has_infill() {
        assert!(text.encode_infill(&infill).is_err());
        return;
    }
    let tokens = text.encode_infill(&infill).unwrap();
    assert_eq!(
        text.decode(&tokens, false),
        "<|repo_name|>repository\n<|file_sep|>a.py\nx = 1\n<|file_sep|>current\n<|fim_prefix|>def f():<|fim_suffix|><|im_end|><|fim_middle|>"
    );
    assert!(tokens.iter().all(|token| !text.stop_tokens().contains(token)));
    let marker = text.special_token("<|file_sep|>").unwrap();
    assert!(text.infill_stop_tokens().contains(&marker) && !text.stop_tokens().contains(&marker));
}

/// How a real model writes a call goes through the grammar of its calls, on the real vocabulary.
#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn calls_go_through_their_grammar() {
    let (text, _) = subject();
    if text.special_token("<tool_call>").is_none() {
        return; // a model without calls
    }
    let schema = serde_json::json!({"type": "object", "required": ["path", "line"], "additionalProperties": false,
        "properties": {"path": {"type": "string"}, "line": {"type": "integer"}}});
    let input = ToolInput::Json { schema, strict: true };
    let tools = [Tool { name: "read_file".into(), description: String::new(), input }];
    let format = OutputFormat { tools: Some(ToolFormat::Hermes), reasoning: None };
    let rules = AnswerRules {
        format,
        prompt: "",
        tools: &tools,
        choice: &ToolChoice::Auto,
        others_shown: false,
        parallel: true,
        text: None,
    };
    let spec = text.answer_grammar(rules).unwrap().unwrap();
    let grammar = text.compile_grammar(&spec, Duration::from_secs(20)).unwrap();
    let answer = "I will read it.\n<tool_call>\n\
        {\"name\": \"read_file\", \"arguments\": {\"path\": \"src/main.rs\", \"line\": 12}}\n</tool_call>";
    let tokens = text.encode(answer, true, false).unwrap();
    let (mut state, mut mask, mut at) = (grammar.start(), vec![0u32; text.vocab_size().div_ceil(32)], 0);
    let (mut forced, mut drawn, mut spent) = (Vec::new(), 0, Vec::new());
    while at < tokens.len() {
        let begun = Instant::now();
        forced.clear();
        state.force(&mut forced).unwrap();
        assert_eq!(forced, tokens[at..at + forced.len()]);
        at += forced.len();
        let Some(&token) = tokens.get(at) else { break };
        state.mask(&mut mask).unwrap();
        assert!(
            mask[token as usize / 32] >> (token % 32) & 1 == 1,
            "{:?}",
            text.decode(&tokens[..=at], false)
        );
        state.accept(token).unwrap();
        (at, drawn) = (at + 1, drawn + 1);
        spent.push(begun.elapsed());
    }
    assert!(drawn < tokens.len() - 10, "{drawn} of {} tokens were drawn", tokens.len());
    spent.sort_unstable();
    assert!(spent[drawn / 2] < Duration::from_millis(5), "a token takes {:?}", spent[drawn / 2]);
}
