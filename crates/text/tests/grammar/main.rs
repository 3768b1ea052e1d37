//! Grammars over small vocabularies made here: random walks under the masks, what they force, where
//! they end, and what is refused.

mod arguments;
mod schema;
mod tools;
mod walk;

use std::time::Duration;

use proptest::prelude::*;
use rudder_text::{CompiledGrammar, GrammarError, GrammarPart, GrammarSpec, GrammarState, JsonLayout, Text};
use serde_json::{Value, json};
use walk::{Walk, allows, text};

const PATIENCE: Duration = Duration::from_secs(10);

/// OpenAI's apply_patch, as a custom tool of Codex's kind.
const PATCH: &str = r#"
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?
filename: /(.+)/
add_line: "+" /(.*)/ LF -> line
change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF
%import common.LF
"#;

fn compile(text: &Text, spec: &GrammarSpec) -> std::sync::Arc<CompiledGrammar> {
    text.compile_grammar(spec, PATIENCE).unwrap_or_else(|error| panic!("{spec:?}: {error}"))
}

fn strict(schema: Value) -> GrammarSpec {
    GrammarSpec::JsonSchema { schema, strict: true }
}

/// Whether a grammar lets exactly this text through, token by token.
fn accepts(text: &Text, spec: &GrammarSpec, answer: &str) -> bool {
    let mut state = compile(text, spec).start();
    let mut mask = vec![0; text.vocab_size().div_ceil(32)];
    for token in text.encode(answer, false, false).unwrap() {
        if state.is_complete() {
            return false;
        }
        state.mask(&mut mask).unwrap();
        if !walk::allows(&mask, token) {
            return false;
        }
        state.accept(token).unwrap();
    }
    if state.is_complete() {
        return true;
    }
    state.mask(&mut mask).unwrap();
    walk::allows(&mask, walk::stop(text))
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object"}),
        json!({"type": "object", "properties": {}, "additionalProperties": false}),
        json!({"type": "object", "required": ["path", "line", "mode"], "additionalProperties": false, "properties": {
            "path": {"type": "string"}, "line": {"type": "integer", "minimum": 1, "maximum": 400},
            "mode": {"enum": ["r", "w", "hello w"]}}}),
        json!({"type": "object", "required": ["b"], "additionalProperties": false, "properties": {
            "a": {"type": ["boolean", "null"]}, "b": {"type": "array", "items": {"type": "number", "minimum": -9.5, "maximum": 1e3}, "maxItems": 3},
            "c": {"type": "object", "required": ["d"], "properties": {"d": {"type": "string", "maxLength": 4}},
                "additionalProperties": false}}}),
        json!({"type": "object", "required": ["node"], "additionalProperties": false,
            "properties": {"node": {"$ref": "#/$defs/node"}},
            "$defs": {"node": {"type": "object", "required": ["v"], "additionalProperties": false, "properties": {
                "v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}}),
    ]
}

fn mask_of(text: &Text, state: &mut GrammarState) -> Vec<u32> {
    let mut mask = vec![0; text.vocab_size().div_ceil(32)];
    if !state.is_complete() {
        state.mask(&mut mask).unwrap();
    }
    mask
}

/// Takes up to four allowed tokens and what they force; returns how many that were.
fn detour(text: &Text, state: &mut GrammarState, mask: &[u32], seed: u64, jump: bool) -> usize {
    let mut taken = Vec::new();
    let mut mask = mask.to_vec();
    for step in 0..4 {
        let allowed = |&token: &u32| allows(&mask, token) && !text.stop_tokens().contains(&token);
        let tokens: Vec<u32> = (0..text.vocab_size() as u32).filter(allowed).collect();
        let Some(&token) = tokens.get((seed >> (8 * step)) as usize % tokens.len().max(1)) else { break };
        state.accept(token).unwrap();
        taken.push(token);
        if jump {
            state.force(&mut taken).unwrap();
        }
        mask = mask_of(text, state);
    }
    taken.len()
}

#[test]
fn schemas_whose_properties_stand_in_another_order_are_other_grammars() {
    let text = text(true);
    let schema = |properties: &str| {
        let schema = format!(
            r#"{{"type": "object", "properties": {properties}, "required": ["a", "b"], "additionalProperties": false}}"#
        );
        let part = GrammarPart {
            name: "answer".into(),
            grammar: strict(serde_json::from_str(&schema).unwrap()),
            layout: JsonLayout::Loose,
        };
        [part.grammar.clone(), GrammarSpec::Composed { lark: "start: @answer".into(), parts: vec![part] }]
    };
    let [ab, ba] = [r#"{"a": {"const": 1}, "b": {"const": 2}}"#, r#"{"b": {"const": 2}, "a": {"const": 1}}"#]
        .map(schema);
    let [a_first, b_first] = [r#"{"a":1,"b":2}"#, r#"{"b":2,"a":1}"#];
    for (one, other) in ab.iter().zip(&ba) {
        assert!(accepts(text, one, a_first) && !accepts(text, one, b_first));
        assert!(accepts(text, other, b_first) && !accepts(text, other, a_first));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(30) })]

    #[test]
    fn whatever_is_drawn_under_the_mask_fits_the_schema(seed: u64, jump: bool) {
        let text = text(true);
        for schema in schemas() {
            let walk = Walk { jump, ..Walk::new(seed) };
            let answer = walk.answer(text, &compile(text, &strict(schema.clone())));
            let value: Value = match serde_json::from_str(&answer) {
                Err(error) if error.to_string().contains("number out of range") => continue,
                parsed => parsed.unwrap_or_else(|error| panic!("{answer:?}: {error}")),
            };
            schema::check(&value, &schema, &schema).unwrap_or_else(|wrong| panic!("{answer}: {wrong}"));
        }
    }

    #[test]
    fn a_detour_that_is_given_back_leaves_no_trace(seed: u64, jump: bool) {
        let text = text(true);
        for schema in schemas() {
            let grammar = compile(text, &strict(schema));
            let (_, tokens) = Walk { jump: false, ..Walk::new(seed) }.run(text, &grammar);
            let (mut plain, mut other) = (grammar.start(), grammar.start());
            for (at, &token) in tokens.iter().enumerate() {
                if other.is_complete() {
                    break;
                }
                let mask = mask_of(text, &mut plain);
                prop_assert_eq!(&mask, &mask_of(text, &mut other), "at {}", at);
                let taken = detour(text, &mut other, &mask, seed.wrapping_mul(at as u64 + 1), jump);
                other.roll_back(taken).unwrap();
                plain.accept(token).unwrap();
                other.accept(token).unwrap();
            }
            prop_assert_eq!(plain.is_complete(), other.is_complete());
        }
    }

    #[test]
    fn whatever_is_drawn_under_the_mask_matches_the_expression(seed: u64) {
        let text = text(true);
        for regex in [r"[a-c]{2,5}(-\d+)?", r"^(hello|w)+\.$", r"/\w/[^a-z]\$"] {
            let grammar = compile(text, &GrammarSpec::Regex(regex.into()));
            let answer = Walk::new(seed).answer(text, &grammar);
            let whole = regex::Regex::new(&format!("^(?:{})$", regex)).unwrap();
            prop_assert!(whole.is_match(&answer), "{} does not match {}", answer, regex);
        }
    }
}

/// After both ways a string is open, that of a key and that of a value: the lexer is in the same state.
#[test]
fn what_followed_a_detour_is_not_taken_for_what_follows_now() {
    let text = text(true);
    let grammar = compile(text, &strict(schemas().remove(0)));
    let tokens = |pieces: &[&str]| -> Vec<u32> {
        pieces.iter().flat_map(|piece| text.encode(piece, false, false).unwrap()).collect()
    };
    let (mut plain, mut other) = (grammar.start(), grammar.start());
    for token in tokens(&["{\"", "m", "\"", "\n"]) {
        plain.accept(token).unwrap();
        other.accept(token).unwrap();
    }
    let detour = tokens(&[":", "{\""]);
    detour.iter().for_each(|&token| other.accept(token).unwrap());
    let key = mask_of(text, &mut other);
    other.roll_back(detour.len()).unwrap();
    for token in tokens(&[": \""]) {
        plain.accept(token).unwrap();
        other.accept(token).unwrap();
    }
    let value = mask_of(text, &mut other);
    assert_eq!(value, mask_of(text, &mut plain));
    assert_ne!(value, key);
}

#[test]
fn every_masked_token_is_accepted_and_every_accepted_one_masked_unless_one_is_forced() {
    let text = text(true);
    let specs = [strict(schemas().remove(2)), GrammarSpec::Lark(PATCH.into()), GrammarSpec::Json];
    for spec in specs {
        let grammar = compile(text, &spec);
        let (_, tokens) = Walk::new(7).run(text, &grammar);
        let mut mask = vec![0; text.vocab_size().div_ceil(32)];
        for len in (0..tokens.len()).step_by(3) {
            let at = || {
                let mut state = grammar.start();
                tokens[..len].iter().for_each(|&token| state.accept(token).unwrap());
                state
            };
            at().mask(&mut mask).unwrap();
            let forced = mask.iter().map(|word| word.count_ones()).sum::<u32>() == 1;
            for token in 0..text.vocab_size() as u32 {
                let (allowed, taken) = (walk::allows(&mask, token), at().accept(token).is_ok());
                let fits = if forced { taken || !allowed } else { taken == allowed };
                assert!(fits, "{token} after {:?}", text.decode(&tokens[..len], false));
            }
        }
    }
}

#[test]
fn forced_tokens_are_those_the_tokenizer_makes_of_their_text() {
    let text = text(true);
    let schema = json!({"type": "object", "required": ["hello w", "im_"], "additionalProperties": false,
        "properties": {"hello w": {"const": "<tool_call>"}, "im_": {"type": "boolean"}}});
    let mut state = compile(text, &strict(schema)).start();
    let mut forced = Vec::new();
    state.accept(text.encode("{", false, false).unwrap()[0]).unwrap();
    state.accept(text.encode("\"", false, false).unwrap()[0]).unwrap();
    state.force(&mut forced).unwrap();
    assert_eq!(
        forced,
        text.encode("hello w", false, false).unwrap(),
        "a quote may come with what follows it"
    );
    state.accept(text.encode("\"", false, false).unwrap()[0]).unwrap();
    state.accept(text.encode(":", false, false).unwrap()[0]).unwrap();
    state.accept(text.encode("\"", false, false).unwrap()[0]).unwrap();
    forced.clear();
    state.force(&mut forced).unwrap();
    assert_eq!(forced, [text.special_token("<tool_call>").unwrap()]);
}

#[test]
fn the_end_is_known_without_a_stop_token_and_the_stop_token_allowed_only_there() {
    let text = text(true);
    let choice = GrammarSpec::Choice(vec!["hello".into(), "he".into(), "\"w\"\n".into()]);
    for (answer, accepted) in
        [("hello", true), ("he", true), ("\"w\"\n", true), ("hell", false), ("w", false)]
    {
        assert_eq!(accepts(text, &choice, answer), accepted, "{answer}");
    }
    let mut state = compile(text, &choice).start();
    for token in text.encode("hello", false, false).unwrap() {
        assert!(!state.is_complete());
        state.accept(token).unwrap();
    }
    assert!(state.is_complete());
    let mut state = compile(text, &GrammarSpec::Json).start();
    "{}".chars().for_each(|c| state.accept(text.encode(&c.to_string(), false, false).unwrap()[0]).unwrap());
    assert!(state.is_complete(), "no white space follows an object");
    let mut state = compile(text, &choice).start();
    let refusal = state.accept(walk::stop(text)).unwrap_err();
    assert!(refusal.starts_with("the answer could not be held to its grammar"), "{refusal}");
}

#[test]
fn json_may_be_laid_out_but_white_space_ends() {
    let text = text(true);
    let pretty = serde_json::to_string_pretty(&json!({"a": [1, {"b": null}], "c": "x  y"})).unwrap();
    for answer in [pretty.as_str(), "{\"a\":1,\"b\":[true,false]}", "{ \"a\" : 1 }", "{\n\t\"a\": \"\\n\"\n}"]
    {
        assert!(accepts(text, &GrammarSpec::Json, answer), "{answer}");
    }
    let many = format!("{{{}\"a\": 1}}", " ".repeat(60));
    for answer in ["[1]", "{\"a\": 1", "{\"a\": 1}}", " {}", "{}\n", "{\n\n\n}", many.as_str(), "{'a': 1}"] {
        assert!(!accepts(text, &GrammarSpec::Json, answer), "{answer}");
    }
}

#[test]
fn codex_patches_are_held_to_their_grammar() {
    let text = text(true);
    let spec = GrammarSpec::Lark(PATCH.into());
    let patch = "*** Begin Patch\n*** Update File: a.rs\n@@ fn f()\n-    1\n+    2\n \n*** Add File: b\n+x\n*** End Patch";
    assert!(accepts(text, &spec, patch));
    assert!(!accepts(text, &spec, "*** Begin Patch\n*** End Patch"));
    assert!(!accepts(text, &spec, &patch.replace("+    2", "    2x\n2")));
}

#[test]
fn a_grammar_is_compiled_once_and_its_states_are_apart() {
    let text = text(true);
    let spec = strict(schemas().remove(2));
    let first = compile(text, &spec);
    assert!(std::sync::Arc::ptr_eq(&first, &compile(text, &spec)));
    let (mut a, b) = (first.start(), first.start());
    a.accept(text.encode("{", false, false).unwrap()[0]).unwrap();
    drop(b);
    let mut c = first.start();
    assert!(c.accept(text.encode("\"", false, false).unwrap()[0]).is_err());
    // A state that failed may have met the limits of what the states share.
    assert!(!std::sync::Arc::ptr_eq(&first, &compile(text, &spec)));
}

#[test]
fn what_cannot_be_used_is_refused_with_a_reason() {
    let text = text(true);
    let refusal = |spec: GrammarSpec| text.compile_grammar(&spec, PATIENCE).unwrap_err();
    let reasons = [
        (strict(json!({"type": "object", "properties": {"a": {"type": "strin"}}})), "strin"),
        (strict(json!({"type": "object", "not": {"required": ["a"]}})), "not"),
        (strict(json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
        (strict(json!({"$ref": "#/$defs/missing"})), "missing"),
        (strict(json!([1])), "must be an object"),
        (strict(json!({"type": "integer", "minimum": 3, "maximum": 2})), "nsatisfiable"),
        (GrammarSpec::Regex("(".into()), "regex"),
        (GrammarSpec::Regex("(?=a)b".into()), "look"),
        (GrammarSpec::Lark("begin: \"a\"".into()), "start"),
        (GrammarSpec::Lark("start: missing".into()), "missing"),
        (GrammarSpec::Choice(Vec::new()), "no choice"),
    ];
    for (spec, reason) in reasons {
        match refusal(spec.clone()) {
            GrammarError::Invalid(message) => assert!(message.contains(reason), "{spec:?}: {message}"),
            other => panic!("{spec:?}: {other:?}"),
        }
    }
    let lenient =
        GrammarSpec::JsonSchema { schema: json!({"type": "array", "uniqueItems": true}), strict: false };
    assert!(accepts(text, &lenient, "[1, 1]"));
}

#[test]
fn a_grammar_that_refers_to_itself_harms_nobody() {
    let text = text(true);
    for name in ["part0", "lark_grammar", "json_schema", "missing"] {
        for lark in [format!("start: @{name}"), format!("start: \"a\" @{name} | \"b\"")] {
            let own = GrammarSpec::Lark(lark);
            let tools = tools::rules(Default::default(), "");
            let rules = rudder_text::AnswerRules { text: Some(&own), ..tools };
            let whole = text.answer_grammar(rules).unwrap().unwrap();
            for spec in [own, whole] {
                // Refused or not, nothing fails but the compilation, and what is taken can be walked.
                if let Ok(grammar) = text.compile_grammar(&spec, PATIENCE) {
                    let mut mask = vec![0; text.vocab_size().div_ceil(32)];
                    let mut state = grammar.start();
                    let _ = state.mask(&mut mask);
                }
            }
        }
    }
}

#[test]
fn a_schema_whose_references_hold_one_another_is_refused_before_all_of_it_is_written() {
    let mut within = json!({"description": "x".repeat(100_000)});
    let mut path = String::from("#");
    let mut all = Vec::new();
    for _ in 0..100 {
        within = json!({"items": within});
        path.push_str("/items");
        all.push(json!({"$ref": path}));
    }
    within["anyOf"] = all.into();
    let spec = GrammarSpec::JsonSchema { schema: within, strict: false };
    let error = text(true).compile_grammar(&spec, Duration::from_secs(60)).unwrap_err();
    assert!(matches!(&error, GrammarError::TooLarge(reason) if reason.contains("refer to")), "{error}");
}

#[test]
fn bombs_are_refused_in_time() {
    let text = text(true);
    let nested = |depth: usize| {
        let mut schema = json!({"type": "string"});
        for _ in 0..depth {
            schema = json!({"anyOf": [schema.clone(), {"type": "array", "items": schema}]});
        }
        schema
    };
    let option = |i: usize| json!({"type": "object", "properties": {format!("p{i}"): {"type": "string"}}});
    let crossed = |n: usize| -> Value {
        let all: Vec<Value> =
            (0..n).map(|k| json!({"anyOf": (0..n).map(|i| option(k * n + i)).collect::<Vec<_>>()})).collect();
        json!({"allOf": all})
    };
    let patterns = |n: usize| -> Value {
        let all: serde_json::Map<String, Value> =
            (0..n).map(|i| (format!("^(a|b)*a(a|b){{{i}}}$"), json!({"type": "string"}))).collect();
        json!({"type": "object", "patternProperties": all})
    };
    let bombs = [
        strict(nested(14)),
        strict(crossed(12)),
        strict(patterns(60)),
        strict(json!({"type": "string", "pattern": "^(a|b)*a(a|b){200}$", "minLength": 100_000})),
        GrammarSpec::Regex(format!("{}a{}", "(".repeat(100_000), ")".repeat(100_000))),
        GrammarSpec::Lark(format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))),
        GrammarSpec::Choice(vec!["x".repeat(2 << 20)]),
    ];
    for spec in bombs {
        let begun = std::time::Instant::now();
        let outcome = text.compile_grammar(&spec, Duration::from_secs(5));
        let name: String = format!("{spec:?}").chars().take(80).collect();
        let message = outcome.err().unwrap_or_else(|| panic!("{name} was taken")).to_string();
        assert!(begun.elapsed() < Duration::from_secs(60), "{name}");
        assert!(message.len() < 1_000, "{name}: {message}");
    }
    let patience = Duration::from_millis(1);
    // Those that were given up may still hold all places.
    let impatient = walk::make(true).compile_grammar(&strict(nested(14)), patience);
    assert_eq!(impatient.unwrap_err(), GrammarError::TooSlow(patience));
}
