//! Answers made of pieces of every format's markup, in any order.

use proptest::prelude::*;
use rudder_text::{OutputFormat, ReasoningFormat, ToolFormat};

use crate::support::*;

const TOOLS: [ToolFormat; 8] = [
    ToolFormat::Hermes,
    ToolFormat::QwenXml,
    ToolFormat::LlamaJson,
    ToolFormat::Pythonic,
    ToolFormat::Mistral,
    ToolFormat::DeepSeek,
    ToolFormat::Glm,
    ToolFormat::Harmony,
];

const PIECES: &str = "<tool_call>¦</tool_call>¦{\"name\": \"now\"¦, \"arguments\": {¦\"a\": ¦\"x\"¦}¦{¦[¦]¦(¦)¦,¦=¦'¦\"¦\\¦\n\
    ¦ ¦`¦```¦```json\n¦<¦now¦get_weather¦apply_patch¦é¦1¦text ¦<function=now>¦<parameter=a>\n¦\n</parameter>\n¦</function>\
    ¦<arg_key>¦</arg_key>¦<arg_value>¦</arg_value>¦[TOOL_CALLS]¦[ARGS]¦[CALL_ID]¦<|python_tag|>¦<|python_start|>\
    ¦<|python_end|>¦<｜tool▁calls▁begin｜>¦<｜tool▁call▁begin｜>¦<｜tool▁sep｜>¦<｜tool▁call▁end｜>¦<｜tool▁calls▁end｜>\
    ¦<|start|>assistant¦<|channel|>commentary to=functions.now¦<|channel|>analysis¦<|message|>¦<|end|>¦<|call|>\
    ¦<think>¦</think>¦<custom_tool_call name=\"apply_patch\">¦\n</custom_tool_call>¦{\"input\": \"¦null¦\\u00e9¦[now()]";

fn answers() -> impl Strategy<Value = String> {
    let pieces: Vec<&'static str> = PIECES.split('¦').collect();
    prop::collection::vec(prop::sample::select(pieces), 0..24).prop_map(|pieces| pieces.concat())
}

/// What is left of a text without space and the marks of reasoning.
fn ink(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    text.replace("<think>", "").replace("</think>", "")
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..Default::default() })]

    #[test]
    fn no_cutting_changes_what_is_said_and_no_text_is_lost(
        answer in answers(),
        tools in prop::sample::select(&TOOLS[..]),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let reasoning = match tools {
            ToolFormat::Harmony => ReasoningFormat::Harmony,
            _ => ReasoningFormat::Think,
        };
        let format = OutputFormat { tools: Some(tools), reasoning: Some(reasoning) };
        let offered = crate::support::tools();
        let whole = read_pieces(format, &offered, "", [answer.as_str()]);
        let ends: Vec<usize> = answer.char_indices().map(|(at, _)| at).chain([answer.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
        cuts.sort_unstable();
        let (mut pieces, mut done) = (Vec::new(), 0);
        for cut in cuts.into_iter().chain([answer.len()]) {
            pieces.push(&answer[done..cut]);
            done = cut;
        }
        prop_assert_eq!(&read_pieces(format, &offered, "", pieces), &whole);
        let ones = ends.windows(2).map(|pair| &answer[pair[0]..pair[1]]);
        prop_assert_eq!(&read_pieces(format, &offered, "", ones), &whole);

        let called = whole.iter().any(|said| matches!(said, Said::Call(..) | Said::Cut(..)));
        if !called && tools != ToolFormat::Harmony {
            let said: String = whole
                .iter()
                .map(|said| match said {
                    Said::Text(text) | Said::Reasoning(text) => text.as_str(),
                    Said::Call(..) | Said::Cut(..) => "",
                })
                .collect();
            prop_assert_eq!(ink(&said), ink(&answer));
        }
    }
}

/// Long runs and deep nesting of what readers hold back: time and stack must not grow with more than
/// the length. Quadratic work would take minutes here.
#[test]
fn long_answers_take_linear_time() {
    let length = 1 << 17;
    for unit in [
        "<",
        "`",
        "{",
        "[",
        " ",
        "\n",
        "\\",
        "\"",
        "'",
        "(",
        "<tool_call>",
        "<think>",
        "</think>",
        "<function=now>",
        "<tool_call>{\"a\":\"",
        "<tool_call>{\"name\": \"now\", \"arguments\": {}}{\"x\": [\"",
        "</parameter>\n",
        "<parameter=a>\n",
        "<arg_key>",
        "</arg_value> ",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]now",
        "[now(",
        "<|end|>",
        "<|channel|>final",
        "<|channel|>final<|message|>",
        "<｜tool▁call▁begin｜>",
        "```json\n{",
        "<custom_tool_call name=\"apply_patch\">",
        "</custom_tool_call>",
    ] {
        let run = unit.repeat(length / unit.len());
        for opening in [
            "",
            "<tool_call>",
            "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": \"",
            "<tool_call>{\"name\": \"now\", \"arguments\": {}}",
            "<tool_call>{\"arguments\": {\"a\": \"",
            "<function=write_file><parameter=content>",
            "<custom_tool_call name=\"apply_patch\">",
        ] {
            let answer = format!("{opening}{run}");
            for tools in [ToolFormat::Hermes, ToolFormat::QwenXml] {
                let bound = std::time::Duration::from_secs(60);
                let start = std::time::Instant::now();
                read_pieces(thinking(tools), &crate::support::tools(), "", [answer.as_str()]);
                assert!(start.elapsed() < bound, "{opening}{unit} as {tools:?}");
            }
        }
    }
}
