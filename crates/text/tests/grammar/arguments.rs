//! Arguments of strict tools, whatever their schemas refer to and combine: what the grammar lets through, the parser
//! reads as a value that the schema allows, and what the schema forbids is not let through.

use proptest::prelude::*;
use rudder_text::{AnswerRules, GrammarError, GrammarSpec, Text, Tool, ToolChoice, ToolFormat};
use serde_json::{Value, json};

use crate::tools::{check, format_of, grammar, json_tool, may_write, parse, prompt_of, rules};
use crate::walk::{Walk, text};
use crate::{PATIENCE, compile};

const TAGGED: [ToolFormat; 2] = [ToolFormat::QwenXml, ToolFormat::Glm];

/// A call of `f` with these arguments, each as its text.
fn call(family: ToolFormat, arguments: &[(&str, &str)]) -> String {
    let argument = |(name, value): &(&str, &str)| match family {
        ToolFormat::QwenXml => format!("<parameter={name}>\n{value}\n</parameter>\n"),
        ToolFormat::Glm => format!("<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n"),
        _ => format!("{name}={value}, "),
    };
    let arguments: String = arguments.iter().map(argument).collect();
    match family {
        ToolFormat::QwenXml => format!("<tool_call>\n<function=f>\n{arguments}</function>\n</tool_call>"),
        ToolFormat::Glm => format!("<tool_call>f\n{arguments}</tool_call>"),
        _ => format!("[f({})]", arguments.trim_end_matches(", ")),
    }
}

/// The input of the one call that the grammar lets through; `None` if it does not.
fn input(
    text: &Text,
    tools: &[Tool],
    choice: &ToolChoice,
    family: ToolFormat,
    answer: &str,
) -> Option<Value> {
    let spec = grammar(text, tools, choice, family, false);
    if !may_write(text, &spec, answer) {
        return None;
    }
    let (calls, rest) = parse(format_of(family), tools, prompt_of(family), answer);
    assert!(calls.len() == 1 && calls[0].whole && rest.trim().is_empty(), "{answer}: {calls:?} {rest:?}");
    let input: Value = serde_json::from_str(&calls[0].input).unwrap_or_else(|e| panic!("{calls:?}: {e}"));
    let strict = tools.iter().any(|tool| tool.name == calls[0].name && is_strict(tool));
    if strict {
        check(&calls, tools, answer);
    }
    Some(input)
}

fn is_strict(tool: &Tool) -> bool {
    matches!(tool.input, rudder_text::ToolInput::Json { strict: true, .. })
}

/// One required argument of this schema.
fn one(schema: Value) -> Value {
    json!({"type": "object", "required": ["a"], "additionalProperties": false, "properties": {"a": schema},
        "$defs": {"color": {"type": "string", "enum": ["red", "dark blue"]}, "count": {"type": "integer", "minimum": 2},
            "a<b/c>": {"const": "x"}, "node": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}}})
}

#[test]
fn a_schema_means_the_same_wherever_it_is_written() {
    let color = json!({"$ref": "#/$defs/color"});
    let optional = json!({"anyOf": [color, {"type": "null"}], "default": null});
    let cases: Vec<(Value, &str, Option<Value>)> = vec![
        (color.clone(), "red", Some(json!("red"))),
        (color.clone(), "green", None),
        (json!({"allOf": [color], "description": "c"}), "dark blue", Some(json!("dark blue"))),
        (json!({"allOf": [color]}), "blue", None),
        (optional.clone(), "red", Some(json!("red"))),
        (optional.clone(), "null", Some(json!(null))),
        (optional, "nul", None),
        (json!({"type": ["string", "null"], "enum": ["r", "w", null]}), "w", Some(json!("w"))),
        (json!({"type": ["string", "null"], "enum": ["r", "w", null]}), "null", Some(json!(null))),
        (json!({"type": ["string", "null"], "enum": ["r", "w", null]}), "x", None),
        (json!({"enum": ["", "a"]}), "", Some(json!(""))),
        (json!({"enum": ["", "a"]}), "b", None),
        (json!({"enum": ["1", 2, true, "auto"]}), "1", Some(json!("1"))),
        (json!({"enum": ["1", 2, true, "auto"]}), "2", Some(json!(2))),
        (json!({"enum": ["1", 2, true, "auto"]}), "true", Some(json!(true))),
        (json!({"enum": ["1", 2, true, "auto"]}), "3", None),
        (json!({"$ref": "#/$defs/count"}), "2", Some(json!(2))),
        (json!({"$ref": "#/$defs/count"}), "1", None),
        (json!({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "null"}]}), "null", Some(json!(null))),
        (json!({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "null"}]}), "none", None),
        (json!({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "string"}]}), "7", Some(json!(7))),
        (json!({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "string"}]}), "1", Some(json!("1"))),
        (json!({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "string"}]}), "2.5", Some(json!("2.5"))),
        (json!({"$ref": "#/$defs/a%3Cb~1c%3E"}), "x", Some(json!("x"))),
        (json!({"$ref": "#/$defs/a%3Cb~1c%3E"}), "y", None),
        (json!({"$ref": "#/$defs/node"}), "[[], [[]]]", Some(json!([[], [[]]]))),
        (json!({"$ref": "#/$defs/node"}), "[1]", None),
        (json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}), "ab", Some(json!("ab"))),
        (json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}), "null", Some(json!(null))),
        (json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}), "abc", None),
        (
            json!({"allOf": [{"type": "string", "minLength": 2}, {"pattern": "^[a-z]+$"}]}),
            "ab",
            Some(json!("ab")),
        ),
        (json!({"allOf": [{"type": "string", "minLength": 2}, {"pattern": "^[a-z]+$"}]}), "a", None),
        (json!({"type": "string", "pattern": "^a|b$"}), "cb", Some(json!("cb"))),
        (json!({"type": "string", "pattern": "^a|b$"}), "bc", None),
        (json!({"type": "string", "pattern": r"^\d$"}), "\u{661}", None),
        (
            json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}),
            "\"ab\"",
            Some(json!("ab")),
        ),
        (json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}), "abc", None),
        (json!({"type": "array", "items": {"$ref": "#/properties/b"}}), "[\"s\"]", Some(json!(["s"]))),
        (json!({"type": "array", "items": {"$ref": "#/properties/b"}}), "[1]", None),
    ];
    for (schema, value, expected) in cases {
        let mut root = one(schema);
        root["properties"]["b"] = json!({"type": "string"});
        let tools = [json_tool("f", root, true)];
        for family in TAGGED {
            let answer = call(family, &[("a", value)]);
            let read = input(text(true), &tools, &ToolChoice::Required, family, &answer);
            assert_eq!(read.map(|input| input["a"].clone()), expected, "{family:?} {tools:?} {answer}");
        }
    }
}

#[test]
fn arguments_are_found_behind_references_and_combinations() {
    let point = json!({"type": "object", "required": ["x"], "additionalProperties": false,
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}});
    let behind = json!({"$ref": "#/$defs/point", "$defs": {"point": point}});
    let merged = json!({"allOf": [{"type": "object", "required": ["x"], "properties": {"x": {"type": "integer"}}},
        {"properties": {"y": {"type": "integer"}}}]});
    let either = json!({"type": "object", "additionalProperties": false,
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
        "anyOf": [{"required": ["x"]}, {"required": ["y"]}]});
    let (x, y, z) = (("x", "1"), ("y", "2"), ("z", "3"));
    for (schema, arguments, fits) in [
        (&behind, &[x][..], true),
        (&behind, &[x, y], true),
        (&behind, &[y], false),
        (&behind, &[x, z], false),
        (&merged, &[x, y], true),
        (&merged, &[y], false),
        (&merged, &[x, z], true),
        (&either, &[x], true),
        (&either, &[y], true),
        (&either, &[x, y], true),
        (&either, &[], false),
    ] {
        let tools = [json_tool("f", schema.clone(), true)];
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            let answer = call(family, arguments);
            let read = input(text(true), &tools, &ToolChoice::Required, family, &answer);
            assert_eq!(read.is_some(), fits, "{family:?} {schema} {answer}");
        }
    }
}

#[test]
fn arguments_that_no_schema_names_may_be_given_where_it_allows_them() {
    let open =
        json!({"type": "object", "properties": {"path": {"type": "string"}, "x-y": {"type": "integer"}}});
    let typed = json!({"type": "object", "additionalProperties": {"type": "integer"}});
    for words in [true, false] {
        for (schema, name, value, expected) in [
            (json!({}), "any", "1", Some(json!({"any": 1}))),
            (json!({"type": "object"}), "any", "1", Some(json!({"any": 1}))),
            (open.clone(), "patience", "1", Some(json!({"patience": 1}))),
            (open.clone(), "x-y", "1", Some(json!({"x-y": 1}))),
            (open.clone(), "x-y", "[1]", None),
            (typed.clone(), "any", "1", Some(json!({"any": 1}))),
            (typed.clone(), "any", "[1]", None),
            (json!({"type": "object", "additionalProperties": false}), "any", "1", None),
        ] {
            let tools = [json_tool("f", schema, true)];
            for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
                let answer = call(family, &[(name, value)]);
                let read = input(text(words), &tools, &ToolChoice::Required, family, &answer);
                assert_eq!(read, expected, "{family:?} {tools:?} {answer}");
            }
        }
    }
}

#[test]
fn a_free_call_of_a_tool_that_is_not_strict_is_held_to_the_form_alone() {
    let now = json!({"type": "object", "properties": {}, "additionalProperties": false});
    let loose = json!({"type": "object", "required": ["a", "b"], "additionalProperties": false,
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}});
    for schema in [json!({}), json!({"type": "object"}), loose] {
        let tools = [json_tool("f", schema, false), json_tool("now", now.clone(), true)];
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            for arguments in [&[][..], &[("b", "1"), ("a", "2")], &[("c", "[1]")]] {
                let answer = call(family, arguments);
                let read = input(text(true), &tools, &ToolChoice::Auto, family, &answer);
                assert!(
                    read.is_some_and(|read| read.as_object().unwrap().len() == arguments.len()),
                    "{answer}"
                );
            }
        }
    }
}

#[test]
fn python_has_words_of_its_own_for_what_may_be_missing() {
    let schema = one(json!({"anyOf": [{"type": "boolean"}, {"type": "null"}]}));
    let color = one(json!({"anyOf": [{"$ref": "#/$defs/color"}, {"type": "null"}]}));
    for (schema, value, expected) in [
        (&schema, "None", Some(json!(null))),
        (&schema, "True", Some(json!(true))),
        (&schema, "1", None),
        (&color, "None", Some(json!(null))),
        (&color, "\"red\"", Some(json!("red"))),
        (&color, "\"green\"", None),
        (&color, "True", None),
    ] {
        let tools = [json_tool("f", schema.clone(), true)];
        let answer = call(ToolFormat::Pythonic, &[("a", value)]);
        let read = input(text(true), &tools, &ToolChoice::Required, ToolFormat::Pythonic, &answer);
        assert_eq!(read.map(|input| input["a"].clone()), expected, "{answer}");
    }
}

/// Small schemas of an argument, which may refer to `#/$defs/0` and `#/$defs/1`.
fn schemas() -> impl Strategy<Value = Value> {
    let leaf = prop::sample::select(vec![
        json!({"type": "string"}),
        json!({"type": "string", "maxLength": 3}),
        json!({"type": "string", "pattern": "^[a-c]{1,3}$"}),
        json!({"enum": ["r", "w"]}),
        json!({"enum": ["1", 1, null, "null", true]}),
        json!({"const": "x"}),
        json!({"type": "integer", "minimum": 1, "maximum": 40}),
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"type": ["string", "null"]}),
        json!({"type": ["integer", "null"], "minimum": 0, "maximum": 9}),
        json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}),
        json!({"type": "object", "required": ["k"], "additionalProperties": false, "properties": {"k": {"const": 1}}}),
    ]);
    let defined = prop::sample::select(vec![json!({"$ref": "#/$defs/0"}), json!({"$ref": "#/$defs/1"})]);
    let any = json!({"type": ["string", "integer", "boolean", "null", "array", "object"]});
    prop_oneof![3 => leaf, 1 => defined].prop_recursive(2, 6, 3, move |inner| {
        let any = any.clone();
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..3).prop_map(|options| json!({"anyOf": options})),
            inner.clone().prop_map(|schema| json!({"allOf": [schema], "description": "d"})),
            inner.clone().prop_map(move |schema| json!({"allOf": [any, schema]})),
            inner.prop_map(|schema| json!({"oneOf": [schema, {"type": "null"}], "default": null})),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn what_is_let_through_is_read_as_what_the_schema_allows(
        a in schemas(), b in schemas(), leaf in schemas(), closed: bool, behind: bool, seed: u64, words: bool,
    ) {
        let definitions = json!({"0": {"type": "string", "enum": ["dark", "2"]}, "1": {"type": ["integer", "null"], "maximum": 9, "minimum": 0}});
        let others = if closed { json!(false) } else { leaf };
        let object = json!({"type": "object", "required": ["a"], "properties": {"a": a, "b": b}, "additionalProperties": others});
        let schema = match behind {
            true => json!({"allOf": [{"$ref": "#/$defs/all"}], "$defs": {"0": definitions["0"], "1": definitions["1"], "all": object}}),
            false => { let mut object = object; object["$defs"] = definitions; object }
        };
        let (text, tools) = (text(words), [json_tool("f", schema, true)]);
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            let spec = grammar(text, &tools, &ToolChoice::Required, family, false);
            let answer = Walk::new(seed).answer(text, &compile(text, &spec));
            let (calls, rest) = parse(format_of(family), &tools, prompt_of(family), &answer);
            check(&calls, &tools, &answer);
            prop_assert!(calls.len() == 1 && rest.trim().is_empty(), "{:?}: {:?} {:?}", family, answer, calls);
        }
    }
}

#[test]
fn a_pattern_that_looks_around_is_not_held_and_refuses_nothing() {
    let text = text(false);
    let relative = json!({"type": "string", "pattern": "^(?!/).*$"});
    for schema in [relative.clone(), json!({"anyOf": [relative, {"type": "null"}]})] {
        let tools = [json_tool("f", one(schema), false)];
        for family in TAGGED {
            let said = call(family, &[("a", "src/x")]);
            assert_eq!(
                input(text, &tools, &ToolChoice::Required, family, &said),
                Some(json!({"a": "src/x"}))
            );
        }
    }
}

/// A schema of 4 KB whose references lead to 40 others each, in eight rows: trillions of ways through it.
fn branching() -> Value {
    let row = |next: usize| json!({"anyOf": vec![json!({"$ref": format!("#/$defs/{next}")}); 40]});
    let mut rows: serde_json::Map<String, Value> = (1..8).map(|i| (i.to_string(), row(i + 1))).collect();
    rows.insert("8".into(), json!({"type": "integer"}));
    json!({"type": "object", "required": ["a"], "properties": {"a": row(1)}, "$defs": rows})
}

#[test]
fn a_schema_without_an_end_of_ways_is_not_gone_through() {
    let (text, around) =
        (text(false), json!({"properties": {"a": {"anyOf": vec![json!({"$ref": "#"}); 60]}}}));
    for schema in [branching(), around] {
        let tools = [json_tool("f", schema, true)];
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            grammar(text, &tools, &ToolChoice::Required, family, false);
            let nested = format!("{}1{}", r#"{"a": "#.repeat(20), "}".repeat(20));
            let (calls, _) =
                parse(format_of(family), &tools, prompt_of(family), &call(family, &[("a", &nested)]));
            assert!(calls.len() == 1 && calls[0].whole, "{calls:?}");
        }
    }
}

/// The grammar of a required call of `f`, whose parameters these are.
fn required(schema: &Value, strict: bool, family: ToolFormat) -> Result<Option<GrammarSpec>, GrammarError> {
    let (tools, choice) = ([json_tool("f", schema.clone(), strict)], ToolChoice::Required);
    let format = format_of(family);
    text(false).answer_grammar(AnswerRules {
        tools: &tools,
        choice: &choice,
        ..rules(format, prompt_of(family))
    })
}

/// A schema of 64 ways and 1024 members in each, all of which have 64 ways of 180 parts that list this.
fn crowded(listed: Option<Value>) -> Value {
    let properties: serde_json::Map<String, Value> =
        (0..1024).map(|i| (format!("p{i}"), json!({"$ref": "#/$defs/x"}))).collect();
    let mut schema = json!({"$ref": "#/$defs/y", "properties": properties,
        "$defs": {"y": {"anyOf": vec![json!({}); 64]}, "x": {"$ref": "#/$defs/y", "allOf": vec![json!({}); 180]}}});
    if let Some(listed) = listed {
        schema["$defs"]["x"]["enum"] = listed;
    }
    schema
}

/// Gone through, each of these schemas takes minutes or hours.
#[test]
fn a_schema_of_many_members_in_many_ways_is_refused_before_it_is_gone_through() {
    let numbers: Value = (0..1000).collect();
    let mut in_one_way = crowded(Some(numbers.clone()));
    in_one_way.as_object_mut().unwrap().remove("$ref");
    for schema in [crowded(None), crowded(Some(numbers)), in_one_way] {
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            let Err(GrammarError::Invalid(message)) = required(&schema, true, family) else {
                panic!("{family:?}: {schema} is held")
            };
            assert!(message.contains("`f`") && message.contains("too many"), "{message}");
            assert!(required(&schema, false, family).is_ok_and(|spec| spec.is_some()), "{family:?}");
        }
    }
}

#[test]
fn a_strict_tool_whose_arguments_cannot_be_told_is_refused() {
    let nowhere = json!({"$ref": "#/$defs/nothing"});
    let alternatives = json!({"anyOf": vec![json!({"type": "object"}); 65]});
    for schema in [nowhere, alternatives, json!({"type": "string"})] {
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            assert!(required(&schema, true, family).is_err(), "{family:?} {schema}");
            assert!(required(&schema, false, family).is_ok(), "{family:?} {schema}");
        }
    }
}

#[test]
fn a_reference_that_leads_nowhere_leaves_an_argument_free_unless_its_tool_is_strict() {
    let schema = one(json!({"$ref": "#/$defs/nothing"}));
    for family in TAGGED {
        let compiles = |strict| {
            let spec = required(&schema, strict, family).unwrap().expect("calls are required");
            text(false).compile_grammar(&spec, PATIENCE).is_ok()
        };
        assert!(compiles(false) && !compiles(true), "{family:?}");
    }
}

/// Whether a listed value fits may depend on what its own schema lists.
#[test]
fn a_list_of_values_that_are_told_by_the_list_has_an_end() {
    let around = json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "enum": [{"a": {"a": 1}}, {}]});
    let pair = json!({"properties": {"a": {"$ref": "#/$defs/b"}},
        "$defs": {"b": {"enum": [{"b": 1}], "properties": {"b": {"$ref": "#/$defs/c"}}},
            "c": {"enum": [{"a": 1}], "properties": {"a": {"$ref": "#/$defs/b"}}}}});
    for schema in [around, pair] {
        for family in [ToolFormat::QwenXml, ToolFormat::Glm, ToolFormat::Pythonic] {
            assert!(required(&schema, false, family).is_ok(), "{family:?}");
            let tools = [json_tool("f", schema.clone(), false)];
            let said = call(family, &[("a", "{\"a\": 1}")]);
            assert_eq!(parse(format_of(family), &tools, prompt_of(family), &said).0.len(), 1, "{said}");
        }
    }
}

#[test]
fn an_argument_of_more_ways_than_are_told_apart_is_held_as_json() {
    let constants = |count: usize| (0..count).map(|i| json!({"const": i})).collect::<Vec<_>>();
    let objects = |count: usize| (0..count).map(|i| json!({"type": "object", "required": [format!("k{i}")]}));
    for (schema, value, expected) in [
        (json!({"oneOf": constants(65)}), "3", Some(json!(3))),
        (json!({"oneOf": constants(65)}), "abc", None),
        (json!({"oneOf": constants(65)}), "65", None),
        (json!({"anyOf": objects(65).collect::<Vec<_>>()}), "{\"k7\": 1}", Some(json!({"k7": 1}))),
        (json!({"anyOf": objects(65).collect::<Vec<_>>()}), "{}", None),
    ] {
        let tools = [json_tool("f", one(schema), true)];
        for family in TAGGED {
            let answer = call(family, &[("a", value)]);
            let read = input(text(true), &tools, &ToolChoice::Required, family, &answer);
            assert_eq!(read.map(|input| input["a"].clone()), expected, "{family:?} {answer}");
        }
    }
}

/// References to one definition, each spelled otherwise, stand for one definition.
#[test]
fn a_definition_whose_name_is_spelled_in_many_ways_is_held_as_one() {
    let spelled = |number: usize| -> String {
        (0..8).map(|place| if number >> place & 1 == 1 { "%6A" } else { "j" }).collect()
    };
    let reference = |number: usize| json!({"$ref": format!("#/$defs/{}", spelled(number))});
    let list = json!({"type": "array", "items": {"anyOf": (0..256).map(reference).collect::<Vec<_>>()}});
    let mut schema = one(reference(0));
    schema["$defs"] = json!({"jjjjjjjj": list});
    let (text, tools) = (text(false), [json_tool("f", schema, true)]);
    for family in TAGGED {
        let said = call(family, &[("a", "[[], [[]]]")]);
        let input = input(text, &tools, &ToolChoice::Required, family, &said);
        assert_eq!(input, Some(json!({"a": [[], [[]]]})));
    }
}

#[test]
fn a_grammar_that_is_too_large_is_refused_before_all_of_it_is_written() {
    let long = json!({"type": "array", "items": {"enum": ["x".repeat(600_000)]}});
    let named = |schema: Value, count: usize| -> serde_json::Map<String, Value> {
        (0..count).map(|i| (format!("p{i}"), schema.clone())).collect()
    };
    let referring =
        json!({"properties": named(json!({"$ref": "#/$defs/long"}), 1000), "$defs": {"long": long}});
    let optional = json!({"properties": named(json!({"type": "array"}), 1000)});
    let text = text(false);
    for (schema, families, most_parts) in
        [(referring, &TAGGED[..], 3), (optional, &[ToolFormat::Pythonic][..], 1001)]
    {
        let tools = [json_tool("f", schema, true)];
        for &family in families {
            let spec = grammar(text, &tools, &ToolChoice::Required, family, false);
            let Err(error) = text.compile_grammar(&spec, std::time::Duration::from_secs(60)) else {
                panic!("{family:?}: compiled")
            };
            assert!(error.to_string().contains("at most"), "{error}");
            let rudder_text::GrammarSpec::Composed { lark, parts } = &spec else { panic!("{spec:?}") };
            let sizes = (lark.len(), parts.len());
            assert!(sizes.0 < 2 << 20 && sizes.1 <= most_parts, "{sizes:?}");
        }
    }
}
