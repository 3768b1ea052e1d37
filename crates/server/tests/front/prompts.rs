//! Prompts that go on from earlier ones have the tokens that they have on a server that knows nothing.

use serde_json::{Value, json};

use crate::common::{Fixture, start, start_agent, start_harmony, start_hybrid};

async fn tokens(server: &Fixture, messages: &[Value], tools: bool) -> Value {
    let tool = json!({"type": "function", "function": {"name": "f", "description": "takes <|im_end|>"}});
    let tools: &[Value] = if tools { &[tool] } else { &[] };
    let answer = server.post("/tokenize", &json!({"messages": messages, "tools": tools})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["tokens"].take()
}

fn message(number: usize, role: &str) -> Value {
    let long = format!("fn number_{number}() {{ let x = \"é\"; }}\n").repeat(120);
    let texts = [
        "short".to_owned(),
        long.clone(),
        "a file that holds <|im_start|>user\nand <|im_end|>".to_owned(),
        format!("{long}<|im_end|>{long}"),
        "\u{fdd0}0\u{fdd1} and \u{fdd0}".to_owned(),
        "  \n <|im_".to_owned(),
        "end|> \n".to_owned(),
        String::new(),
    ];
    json!({"role": role, "content": texts[number % texts.len()]})
}

#[tokio::test]
async fn a_conversation_has_the_same_tokens_however_it_came_about() {
    let knowing = start_agent(&["x"]);
    let mut messages: Vec<Value> = Vec::new();
    for step in 0..40 {
        match step % 8 {
            // A retry, an edit of what was said last, one of what was said long ago.
            5 => {}
            6 => *messages.last_mut().unwrap() = message(step * 7 + 1, "user"),
            7 => messages[step % 5] = message(step * 5 + 3, "user"),
            _ => messages.push(message(step * 3, ["user", "assistant"][step % 2])),
        }
        let tools = step > 20;
        let known = tokens(&knowing, &messages, tools).await;
        assert_eq!(known, tokens(&start_agent(&["x"]), &messages, tools).await, "step {step}");
    }
}

#[tokio::test]
async fn a_request_that_repeats_known_messages_is_checked_like_any_other() {
    let server = start();
    let said = json!({"role": "user", "content": "x".repeat(100)});
    let ask = |messages: Value, more: Value| {
        let mut body = json!({"messages": messages, "max_tokens": 1});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let good = ask(json!([said]), json!({}));
    for _ in 0..2 {
        assert_eq!(server.post("/v1/chat/completions", &good).await.status, 200);
        for (body, param) in [
            (ask(json!([said]), json!({"temperature": "hot"})), "temperature"),
            (ask(json!([said, {"role": "king", "content": "y"}]), json!({})), "messages[1].role"),
            (ask(json!([said, {"role": "user", "content": 7}]), json!({})), "messages[1].content"),
            (ask(json!([said, {"role": "user"}]), json!({})), "messages[1].content"),
            (ask(json!([said, 7]), json!({})), "messages[1]"),
        ] {
            let answer = server.post("/v1/chat/completions", &body).await;
            assert_eq!((answer.error().0, &*answer.error().1), (400, param), "{body}");
        }
    }
    let doubled = br#"{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "messages": []}"#;
    assert_eq!(server.post_bytes("/v1/chat/completions", doubled.to_vec()).await.status, 400);
}

#[tokio::test]
async fn what_one_says_in_several_messages_is_counted_the_same_when_it_is_known() {
    let knowing = start_agent(&["x"]);
    let long = "x".repeat(100);
    let mut messages = Vec::new();
    for step in 0..3 {
        let (id, before) = (format!("toolu_{step}"), format!("toolu_{}", step - 1i32));
        let call = json!({"type": "tool_use", "id": id, "name": "f", "input": {"text": long}});
        messages.extend([
            json!({"role": "user", "content": [{"type": "text", "text": format!("{step} {long}")}]}),
            json!({"role": "user", "content": format!("and {long}")}),
            json!({"role": "assistant", "content": [{"type": "text", "text": long}]}),
            json!({"role": "assistant", "content": [call]}),
            json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": id, "content": long}]}),
            json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": before, "content": long}]}),
        ]);
        let body = json!({"system": "be brief", "messages": messages});
        let mut counts = Vec::new();
        for server in [&knowing, &knowing, &start_agent(&["x"])] {
            let answer = server.post("/v1/messages/count_tokens", &body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            counts.push(answer.json()["input_tokens"].as_u64().unwrap());
        }
        assert!(counts[0] > 0 && counts.iter().all(|&count| count == counts[2]), "{counts:?}");
    }
}

#[tokio::test]
async fn rules_that_a_template_shows_nowhere_are_told_all_the_same() {
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let messages = [
        said("system", "one"),
        said("developer", "two"),
        said("user", "go"),
        said("assistant", "Done."),
        said("developer", "three"),
    ];
    let harmony = start_harmony(&["<|channel|>final<|message|>x"]);
    let expected = "<|start|>developer<|message|>one\n\ntwo<|end|><|start|>user<|message|>go<|end|>\
                    <|start|>assistant<|message|>Done.<|end|><|start|>user<|message|>three<|end|><|start|>assistant";
    let tools = json!([]);
    assert_eq!(harmony.shown(&json!(messages), &tools).await, expected);
    let expected = "<|im_start|>system\none<|im_end|>\n<|im_start|>system\ntwo<|im_end|>\n";
    let shown = start_agent(&["x"]).shown(&json!(messages), &tools).await;
    assert!(shown.starts_with(expected) && shown.contains("<|im_start|>system\nthree"), "{shown}");
    let body = json!({"messages": messages, "max_tokens": 1});
    let answered = harmony.post("/v1/chat/completions", &body).await.json();
    assert_eq!(
        answered["usage"]["prompt_tokens"],
        tokens(&harmony, &messages, false).await.as_array().unwrap().len()
    );
}

#[tokio::test]
async fn past_answers_stand_behind_what_opened_them_whether_the_next_may_reason_or_not() {
    let server = start_hybrid(&["<think>plan</think>Done.", "Fine."]);
    let thinks = |thinks: bool| json!({"enable_thinking": thinks});
    let mut messages = vec![json!({"role": "user", "content": "go"})];
    let mut expected = String::from("<|im_start|>user\ngo<|im_end|>\n");
    for (thinking, said, opened) in
        [(true, "Done.", "<think>plan</think>Done."), (false, "Fine.", "<think>\n\n</think>\n\nFine.")]
    {
        let body = json!({"messages": messages, "chat_template_kwargs": thinks(thinking), "temperature": 0});
        let answer = server.post("/v1/chat/completions", &body).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], said, "{answer}");
        messages.push(json!({"role": "assistant", "content": said}));
        messages.push(json!({"role": "user", "content": "on"}));
        expected += &format!("<|im_start|>assistant\n{opened}<|im_end|>\n<|im_start|>user\non<|im_end|>\n");
        for (thinking, opening) in [(true, ""), (false, "<think>\n\n</think>\n\n")] {
            let body = json!({"messages": messages, "chat_template_kwargs": thinks(thinking)});
            let tokens = server.post("/tokenize", &body).await.json()["tokens"].take();
            let shown = server.text.decode(&serde_json::from_value::<Vec<u32>>(tokens).unwrap(), false);
            assert_eq!(shown, format!("{expected}<|im_start|>assistant\n{opening}"));
        }
    }
}

#[tokio::test]
async fn an_effort_means_the_same_to_the_template_in_every_dialect() {
    let server = start_hybrid(&["Fine."]);
    let prompt_tokens = async |path: &str, more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "go"}], "input": "go", "max_tokens": 20,
            "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.post(path, &body).await.json();
        let usage = answer["usage"].as_object().unwrap_or_else(|| panic!("{answer}"));
        let count = |key: &str| usage.get(key).and_then(Value::as_u64).unwrap_or(0);
        count("prompt_tokens") + count("input_tokens") + count("cache_read_input_tokens")
    };
    for (effort, known, thinks) in [
        ("none", "low", false),
        ("minimal", "low", false),
        ("medium", "medium", true),
        ("xhigh", "high", true),
        ("max", "high", true),
    ] {
        let mut args = json!({"reasoning_effort": known});
        if !thinks {
            args["enable_thinking"] = json!(false);
        }
        let expected = prompt_tokens("/v1/chat/completions", json!({"chat_template_kwargs": args})).await;
        let thinking = if thinks { "adaptive" } else { "disabled" };
        for (path, more) in [
            ("/v1/chat/completions", json!({"reasoning_effort": effort})),
            ("/v1/responses", json!({"reasoning": {"effort": effort}})),
            ("/v1/messages", json!({"output_config": {"effort": effort}, "thinking": {"type": thinking}})),
        ] {
            assert_eq!(prompt_tokens(path, more).await, expected, "{path} {effort}");
        }
    }
}
