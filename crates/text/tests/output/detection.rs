//! Which format a model is taken to write, and what its decoder keeps.

use rudder_text::{OutputFormat, ReasoningFormat, Text, TextSource, ToolFormat};

const TOKENS: [&str; 8] =
    ["a", "<|python_tag|>", "<|im_end|>", "[TOOL_CALLS]", "<tool_call>", "<|channel|>", "<think>", "b"];

/// A model with this template, whose markup is control tokens.
fn model(template: &str) -> Text {
    Text::from_gguf(TextSource {
        model: "llama".into(),
        tokens: TOKENS.iter().map(|&token| token.into()).collect(),
        token_types: TOKENS.iter().map(|token| if token.len() == 1 { 1 } else { 3 }).collect(),
        scores: vec![0.0; TOKENS.len()],
        chat_template: Some(template.into()),
        ..TextSource::default()
    })
    .unwrap()
}

#[test]
fn the_template_shows_the_format() {
    let both = |tools, reasoning| OutputFormat { tools, reasoning };
    for (template, tools, reasoning) in [
        ("{{ messages }}", None, None),
        ("<tool_call>\n{\"name\": <function-name>}", Some(ToolFormat::Hermes), None),
        ("<tool_call> </think>", Some(ToolFormat::Hermes), Some(ReasoningFormat::Think)),
        ("<tool_call>\n<function=f>", Some(ToolFormat::QwenXml), None),
        ("<tool_call>{n}\n<arg_key>k</arg_key> <think>", Some(ToolFormat::Glm), Some(ReasoningFormat::Think)),
        ("{\"name\": function name, \"parameters\": x}", Some(ToolFormat::LlamaJson), None),
        ("[func_name1(params_name1=x)]", Some(ToolFormat::Pythonic), None),
        ("[TOOL_CALLS] [THINK]", Some(ToolFormat::Mistral), Some(ReasoningFormat::Mistral)),
        ("<think> <｜tool▁call▁begin｜>", Some(ToolFormat::DeepSeek), Some(ReasoningFormat::Think)),
        ("<|channel|>analysis", Some(ToolFormat::Harmony), Some(ReasoningFormat::Harmony)),
    ] {
        assert_eq!(model(template).output_format(), both(tools, reasoning), "{template}");
    }
}

#[test]
fn formats_have_the_names_of_others_parsers() {
    for name in [
        "hermes",
        "qwen3_coder",
        "llama3_json",
        "pythonic",
        "mistral",
        "deepseek_v3",
        "deepseek_v31",
        "glm45",
        "openai",
        "harmony",
    ] {
        assert!(ToolFormat::named(name).is_some(), "{name}");
    }
    for name in ["deepseek_r1", "qwen3", "glm45", "mistral", "openai_gptoss"] {
        assert!(ReasoningFormat::named(name).is_some(), "{name}");
    }
    let glm = OutputFormat { tools: Some(ToolFormat::Glm), reasoning: Some(ReasoningFormat::Think) };
    assert_eq!(OutputFormat::named("glm45"), Some(glm));
    assert_eq!(OutputFormat::named("unknown"), None);
}

#[test]
fn a_decoder_keeps_the_control_tokens_of_its_format_alone() {
    let text = model("");
    let decode = |name: Option<&str>| {
        let mut decoder = match name {
            Some(name) => text.decoder_for(OutputFormat::named(name).unwrap()),
            None => text.decoder(),
        };
        let mut out = String::new();
        (0..TOKENS.len() as u32).for_each(|token| decoder.push(token, &mut out));
        out
    };
    assert_eq!(decode(None), "ab");
    assert_eq!(decode(Some("llama3_json")), "a<|python_tag|>b");
    assert_eq!(decode(Some("mistral")), "a[TOOL_CALLS]b");
    assert_eq!(decode(Some("qwen3")), "a<tool_call><think>b");
    assert_eq!(decode(Some("harmony")), "a<|channel|>b");
}
