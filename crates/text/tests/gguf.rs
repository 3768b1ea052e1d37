//! Tokenizers built from GGUF metadata: small ones, made here.

use std::collections::BTreeSet;

use proptest::prelude::*;
use rudder_text::{Infill, Text, TextError, TextSource};
use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const SPECIALS: [(&str, i32); 11] = [
    ("<s>", 3),
    ("<|im_start|>", 3),
    ("<|im_end|>", 3),
    ("<tool_call>", 4),
    ("<|fim_prefix|>", 3),
    ("<|fim_suffix|>", 3),
    ("<|fim_middle|>", 3),
    ("<|repo_name|>", 3),
    ("<|file_sep|>", 3),
    ("[PAD0]", 5),
    // Some files call an end of turn a normal token.
    ("<|eot_id|>", 1),
];

/// All 256 bytes, a few merged words, then [`SPECIALS`].
fn byte_level() -> TextSource {
    let bytes: BTreeSet<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    let mut tokens: Vec<String> = bytes.into_iter().collect();
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "i m", "im _"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut token_types = vec![1; tokens.len()];
    for (token, kind) in SPECIALS {
        tokens.push(token.into());
        token_types.push(kind);
    }
    TextSource {
        model: "gpt2".into(),
        pre: Some("qwen2".into()),
        bos: Some((tokens.len() - SPECIALS.len()) as u32),
        tokens,
        token_types,
        merges: merges.map(String::from).to_vec(),
        ..TextSource::default()
    }
}

fn text() -> Text {
    Text::from_gguf(byte_level()).unwrap()
}

fn stream(text: &Text, tokens: &[u32]) -> String {
    let mut decoder = text.decoder();
    let mut out = String::new();
    for &token in tokens {
        decoder.push(token, &mut out);
    }
    decoder.finish(&mut out);
    out
}

fn spelled(text: &Text, tokens: &[u32]) -> Vec<String> {
    tokens.iter().map(|&token| String::from_utf8_lossy(&text.token_bytes(token)).into_owned()).collect()
}

#[test]
fn words_are_merged_in_order() {
    let text = text();
    let tokens = text.encode("hello wé", false, false).unwrap();
    assert_eq!(spelled(&text, &tokens), ["hello", " w", "é"]);
}

#[test]
fn markup_is_a_token_only_where_asked_for() {
    let text = text();
    for (markup, _) in SPECIALS.into_iter().filter(|&(_, kind)| kind != 5) {
        let input = format!("hello{markup} w");
        let special = text.encode(&input, true, false).unwrap();
        assert_eq!(spelled(&text, &special), ["hello", markup, " w"]);
        assert_eq!(special[1], text.special_token(markup).unwrap());
        let plain = text.encode(&input, false, false).unwrap();
        assert!(!plain.contains(&special[1]), "{markup}");
        assert_eq!(text.decode(&plain, true), input);
    }
    assert_eq!(text.special_token("[PAD0]"), None);
    assert_eq!(text.special_token("hello"), None);
}

#[test]
fn words_taken_whole_are_never_markup() {
    let source = TextSource { pre: Some("llama-bpe".into()), ..byte_level() };
    let text = Text::from_gguf(source).unwrap();
    for (markup, _) in SPECIALS {
        let tokens = text.encode(markup, false, false).unwrap();
        assert!(tokens.len() > 1, "{markup}");
    }
}

#[test]
fn the_begin_token_comes_once_and_only_where_wanted() {
    let bos = byte_level().bos.unwrap();
    let text = text();
    assert_eq!(text.encode("a", true, true).unwrap(), text.encode("a", true, false).unwrap());
    let text = Text::from_gguf(TextSource { add_bos: Some(true), ..byte_level() }).unwrap();
    assert_eq!(text.encode("a", true, true).unwrap()[0], bos);
    assert_eq!(text.encode("a", true, false).unwrap().len(), 1);
    assert_eq!(text.encode("<s>a", true, true).unwrap(), text.encode("a", true, true).unwrap());
    assert_eq!(text.encode("", true, true).unwrap(), [bos]);
    // Only one that means to begin is dropped.
    assert_eq!(text.encode("<s><s>", true, true).unwrap(), [bos, bos]);
}

#[test]
fn control_tokens_are_skipped_and_added_words_are_not() {
    let text = text();
    let tokens = text.encode("<|im_start|>he<tool_call>llo<|eot_id|>", true, false).unwrap();
    assert_eq!(text.decode(&tokens, true), "he<tool_call>llo");
    assert_eq!(text.decode(&tokens, false), "<|im_start|>he<tool_call>llo<|eot_id|>");
    assert_eq!(stream(&text, &tokens), "he<tool_call>llo");
}

#[test]
fn a_character_comes_when_it_is_whole() {
    let text = text();
    let tokens = text.encode("a😀", false, false).unwrap();
    assert_eq!(tokens.len(), 5);
    let mut decoder = text.decoder();
    let mut out = String::new();
    for &token in &tokens[..4] {
        decoder.push(token, &mut out);
        assert_eq!(out, "a");
    }
    decoder.push(tokens[4], &mut out);
    assert_eq!(out, "a😀");
    decoder.push(tokens[1], &mut out);
    decoder.finish(&mut out);
    assert_eq!(out, "a😀\u{fffd}");
}

#[test]
fn turns_end_with_the_files_tokens_and_the_well_known_ones() {
    let source = byte_level();
    let eos = source.tokens.iter().position(|token| token == "hello").unwrap() as u32;
    let text = Text::from_gguf(TextSource { eos: Some(eos), ..source }).unwrap();
    let mut expected =
        [eos, text.special_token("<|im_end|>").unwrap(), text.special_token("<|eot_id|>").unwrap()];
    expected.sort_unstable();
    assert_eq!(text.stop_tokens(), expected);
}

#[test]
fn holes_are_marked_in_the_models_order() {
    let text = Text::from_gguf(TextSource { add_bos: Some(true), ..byte_level() }).unwrap();
    let infill = Infill {
        prefix: "hello".into(),
        suffix: "<|im_end|>".into(),
        middle: "<s>w".into(),
        extra: vec![("a".into(), "b".into()), ("c".into(), "d\n".into())],
    };
    let tokens = text.encode_infill(&infill).unwrap();
    assert_eq!(
        text.decode(&tokens, false),
        "<s><|repo_name|>repository\n<|file_sep|>a\nb\n<|file_sep|>c\nd\n<|file_sep|>current\n<|fim_prefix|>hello<|fim_suffix|><|im_end|><|fim_middle|><s>w"
    );
    assert_eq!(tokens.iter().filter(|&&token| Some(token) == text.special_token("<s>")).count(), 1);
    assert!(!tokens.contains(&text.special_token("<|im_end|>").unwrap()));
    for marker in ["<|fim_middle|>", "<|file_sep|>", "<|im_end|>"] {
        assert!(text.infill_stop_tokens().contains(&text.special_token(marker).unwrap()), "{marker}");
    }
}

#[test]
fn other_files_are_told_whatever_markers_a_model_has() {
    let infill = Infill {
        prefix: "x".into(),
        suffix: "y".into(),
        middle: String::new(),
        extra: vec![("a".into(), "b".into()), ("c".into(), "d\n".into())],
    };
    let told = |renamed: &[(&str, &str)]| {
        let mut source = byte_level();
        for (from, to) in renamed {
            source.tokens.iter_mut().filter(|token| token == from).for_each(|token| *token = (*to).into());
        }
        let text = Text::from_gguf(source).unwrap();
        text.decode(&text.encode_infill(&infill).unwrap(), false)
    };
    let hole = "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>";
    // Granite's and the first StarCoder's.
    assert_eq!(
        told(&[("<|repo_name|>", "<reponame>"), ("<|file_sep|>", "<filename>")]),
        format!("<reponame>repository\n<filename>a\nb\n<filename>c\nd\n<filename>current\n{hole}")
    );
    assert_eq!(
        told(&[("<|repo_name|>", "<x>")]),
        format!("<|file_sep|>a\nb\n<|file_sep|>c\nd\n<|file_sep|>current\n{hole}")
    );
    assert_eq!(told(&[("<|file_sep|>", "<x>")]), format!("\n\n--- a ---\n\nb\n\n\n--- c ---\n\nd\n{hole}"));
}

#[test]
fn ids_that_the_file_names_come_before_well_known_names() {
    let source = byte_level();
    let position = |name| source.tokens.iter().position(|token| token == name).map(|at| at as u32);
    let (begin, tool) = (position("<s>"), position("<tool_call>"));
    let text = Text::from_gguf(TextSource { fim_middle: tool, fim_prefix: begin, ..source }).unwrap();
    let infill = Infill { prefix: "a".into(), suffix: "b".into(), ..Infill::default() };
    assert_eq!(text.decode(&text.encode_infill(&infill).unwrap(), false), "<s>a<|fim_suffix|>b<tool_call>");
}

#[test]
fn abilities_a_model_lacks_are_said() {
    let mut source = byte_level();
    for token in &mut source.tokens {
        *token = token.replace("<|fim", "<|xim");
    }
    let text = Text::from_gguf(source).unwrap();
    assert!(!text.has_infill() && !text.has_chat_template());
    assert!(matches!(text.encode_infill(&Infill::default()), Err(TextError::Unsupported(_))));
    let chat = text.render_chat(&json!([]), None, true, &Map::new());
    assert!(matches!(chat, Err(TextError::Unsupported(advice)) if advice.contains("/v1/completions")));
}

#[test]
fn templates_see_the_models_tokens() {
    let template = Some("{{ bos_token }}{{ messages[0].content }}{{ eos_token is defined }}".into());
    let text = Text::from_gguf(TextSource { chat_template: template, ..byte_level() }).unwrap();
    let messages = json!([{"role": "user", "content": "x"}]);
    assert_eq!(text.render_chat(&messages, None, true, &Map::new()).unwrap(), "<s>xFalse");
}

#[test]
fn files_that_contradict_themselves_are_refused() {
    let whole = byte_level();
    let refused = |what: &str, source: TextSource| match Text::from_gguf(source) {
        Err(TextError::Model(message)) => assert!(message.contains(what), "{message}"),
        Err(other) => panic!("{what}: {other:?}"),
        Ok(_) => panic!("{what}: accepted"),
    };
    refused("`t5`", TextSource { model: "t5".into(), ..whole.clone() });
    refused("no tokens", TextSource { tokens: vec![], ..whole.clone() });
    refused("token types", TextSource { token_types: vec![1], ..whole.clone() });
    refused("`klingon`", TextSource { pre: Some("klingon".into()), ..whole.clone() });
    refused("99999", TextSource { eos: Some(99999), ..whole.clone() });
    refused("99999", TextSource { fim_pad: Some(99999), ..whole.clone() });
    refused("no merges", TextSource { merges: vec![], ..whole.clone() });
    refused("no pair", TextSource { merges: vec!["he".into()], ..whole.clone() });
    refused("merge 0", TextSource { merges: vec!["h x".into()], ..whole.clone() });
    let long = vec!["hello hello".into()];
    refused("`hellohello`", TextSource { merges: long, ..whole.clone() });
    refused("does not compile", TextSource { chat_template: Some("{% for %}".into()), ..whole.clone() });
    refused("scores", TextSource { model: "llama".into(), scores: vec![0.0], ..whole });

    let (mut pieces, _) = sentence_piece();
    let (last, longest) = (pieces.tokens.len() - 1, "a".repeat(1024));
    pieces.tokens[last] = longest.clone();
    assert!(Text::from_gguf(pieces.clone()).is_ok());
    pieces.tokens[last] = longest + "a";
    refused("1025 bytes", pieces);
}

/// The vocabulary of goldens/make_sentencepiece.py.
fn sentence_piece() -> (TextSource, Value) {
    let goldens: Value = serde_json::from_str(include_str!("goldens/sentencepiece.json")).unwrap();
    let source = TextSource {
        model: "llama".into(),
        tokens: serde_json::from_value(goldens["tokens"].clone()).unwrap(),
        scores: serde_json::from_value(goldens["scores"].clone()).unwrap(),
        token_types: serde_json::from_value(goldens["kinds"].clone()).unwrap(),
        bos: Some(1),
        eos: Some(2),
        ..TextSource::default()
    };
    (source, goldens)
}

#[test]
fn sentence_piece_vocabularies_encode_as_the_library_does() {
    let (source, goldens) = sentence_piece();
    let text = Text::from_gguf(source).unwrap();
    let cases: Vec<(String, Vec<u32>)> = serde_json::from_value(goldens["encodings"].clone()).unwrap();
    assert!(cases.len() > 50);
    for (input, expected) in cases {
        let tokens = text.encode(&input, false, false).unwrap();
        assert_eq!(tokens, expected, "{input:?}");
        let with_begin = text.encode(&input, false, true).unwrap();
        assert_eq!((with_begin[0], &with_begin[1..]), (1, expected.as_slice()));
        // A `▁` in the text cannot be told from a space.
        let output = text.decode(&tokens, true);
        assert_eq!(output, input.replace('▁', " "));
        let continued = if input.is_empty() { String::new() } else { format!(" {output}") };
        assert_eq!(stream(&text, &tokens), continued);
    }
    assert_eq!(text.stop_tokens(), [2]);
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[hello wé_😀<|>\n ]{0,12}",
        Just("<|im_end|>".into()),
        Just("<tool_call>".into())
    ]
}

proptest! {
    #[test]
    fn text_survives_encoding_and_decoding(pieces in prop::collection::vec(piece(), 0..6), special: bool) {
        let (text, input) = (text(), pieces.concat());
        let tokens = text.encode(&input, special, false).unwrap();
        prop_assert_eq!(text.decode(&tokens, false), input);
        prop_assert!(special || tokens.iter().all(|token| !text.stop_tokens().contains(token)));
    }

    #[test]
    fn tokens_stream_as_they_decode(tokens in prop::collection::vec(0u32..280, 0..40)) {
        let text = text();
        prop_assert_eq!(stream(&text, &tokens), text.decode(&tokens, true));
    }

    #[test]
    fn what_has_come_is_never_taken_back(tokens in prop::collection::vec(0u32..280, 0..20)) {
        let text = text();
        let mut decoder = text.decoder();
        let mut out = String::new();
        for (count, &token) in tokens.iter().enumerate() {
            decoder.push(token, &mut out);
            let whole = text.decode(&tokens[..=count], true);
            prop_assert!(whole.starts_with(&out));
            // At most one unfinished character is held back.
            prop_assert!(whole[out.len()..].chars().count() <= 1);
        }
    }

    #[test]
    fn sentence_piece_text_survives_too(input in "[a-e t é中😀\n()]{0,40}", special: bool) {
        let text = Text::from_gguf(sentence_piece().0).unwrap();
        let tokens = text.encode(&input, special, false).unwrap();
        prop_assert_eq!(text.decode(&tokens, true), input);
    }
}
