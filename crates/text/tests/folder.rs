//! Hugging Face folders: small tokenizers trained here, with the `tokenizers` crate as the oracle.

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rudder_text::{Infill, Text, TextError};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::{NormalizedString, Normalizer, Tokenizer};
use unicode_normalization::UnicodeNormalization;

const CORPUS: &str = include_str!("gguf.rs");
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer.json with this normalizer, pre-tokenizer and decoder, trained on [`CORPUS`].
fn trained(normalizer: Value, pre_tokenizer: Value, decoder: Value, bytes: &[&str]) -> Value {
    let empty = json!({
        "version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    });
    let mut tokenizer: Tokenizer = serde_json::from_value(empty).unwrap();
    let byte_level = decoder["type"] == "ByteLevel";
    let alphabet = if byte_level {
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
    } else {
        Default::default()
    };
    let builder = BpeTrainerBuilder::new().vocab_size(600).initial_alphabet(alphabet.into_iter().collect());
    let mut trainer: TrainerWrapper = builder.build().into();
    tokenizer.train(&mut trainer, CORPUS.lines()).unwrap();
    let mut file: Value = serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap();
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    for byte in bytes {
        let id = vocab.len();
        vocab.insert((*byte).into(), id.into());
    }
    file
}

fn add(file: &mut Value, content: &str, special: bool) -> u64 {
    let words = file["model"]["vocab"].as_object().unwrap().len();
    let added = file["added_tokens"].as_array_mut().unwrap();
    let id = words + added.len();
    added.push(json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special,
    }));
    id as u64
}

fn byte_level() -> Value {
    let pre_tokenizer = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    ]});
    let decoder =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let mut file = trained(json!({"type": "NFC"}), pre_tokenizer, decoder, &[]);
    for (content, special) in [("<|im_start|>", true), ("<|im_end|>", true), ("<tool_call>", false)] {
        add(&mut file, content, special);
    }
    file
}

fn folder(files: &[(&str, String)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn open(file: &Value) -> (Text, Tokenizer) {
    let folder = folder(&[("tokenizer.json", file.to_string())]);
    let oracle = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    (Text::from_folder(folder.path()).unwrap(), oracle)
}

/// Whether the oracle composes a text as Unicode has it today: of marks that are newer than its tables it does not know the order.
fn composes_alike(oracle: &Tokenizer, text: &str) -> bool {
    let mut composed = NormalizedString::from(text);
    oracle.get_normalizer().expect("NFC").normalize(&mut composed).unwrap();
    composed.get().chars().eq(text.nfc())
}

/// Checks random texts, markup among them, against the oracle.
fn agrees(file: &Value) {
    let (text, oracle) = open(file);
    let added = file["added_tokens"].as_array().unwrap().iter();
    let added: Vec<String> = added.map(|token| token["content"].as_str().unwrap().to_owned()).collect();
    let piece = prop_oneof![
        any::<String>(),
        "[a-e ]{0,9}",
        "[ \t\r\n]{0,4}",
        "[0-9'stéé中😀]{0,6}",
        prop::sample::select(added),
        Just("<tool_call>".into()),
        Just("e\u{301}".into()),
    ];
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let texts = prop::collection::vec(piece, 0..8);
    let outcome = runner.run(&texts, |pieces| {
        let input = pieces.concat();
        prop_assume!(file["normalizer"]["type"] != "NFC" || composes_alike(&oracle, &input));
        let expected = oracle.encode_fast(input.as_str(), false).unwrap();
        prop_assert_eq!(text.encode(&input, true, false).unwrap(), expected.get_ids());
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn byte_level_folders_encode_as_the_library_does() {
    agrees(&byte_level());
}

#[test]
fn normalizers_in_a_list_are_those_in_it() {
    let mut file = byte_level();
    let nfc = file["normalizer"].clone();
    assert_eq!(nfc["type"], "NFC");
    for parts in [
        json!([]),
        json!([{"type": "Lowercase"}]),
        json!([{"type": "Strip", "strip_left": true, "strip_right": true}]),
    ] {
        file["normalizer"] = json!({"type": "Sequence", "normalizers": parts});
        agrees(&file);
    }
}

#[test]
fn gpt2s_implied_pattern_and_digits_are_understood() {
    let mut file = byte_level();
    file["normalizer"] = Value::Null;
    file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    ]});
    agrees(&file);
}

#[test]
fn pre_tokenizers_beyond_ours_are_the_librarys() {
    let mut file = byte_level();
    // A look-behind, and a space before the text.
    file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"(?<=[a-c])\s+|\w+"}, "behavior": "MergedWithPrevious", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    ]});
    agrees(&file);
}

#[test]
fn possessive_quantifiers_are_read_as_the_library_reads_them() {
    // As in tiktoken's cl100k_base.
    let cuts = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+";
    let mut file = byte_level();
    for cuts in [cuts, r"[^\r\n\p{L}\p{N}]?+\p{L}++", r" *+\p{L}|\p{N}{1,3}+"] {
        file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = cuts.into();
        agrees(&file);
    }
}

/// As Llama 2's: bytes for what is not in the vocabulary, spaces as `▁`, one before the text.
fn sentence_piece(normalizer: Value, pre_tokenizer: Value) -> Value {
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let bytes: Vec<&str> = bytes.iter().map(String::as_str).collect();
    let mut file = trained(normalizer, pre_tokenizer, decoder, &bytes);
    file["model"]["byte_fallback"] = json!(true);
    add(&mut file, "<|im_start|>", true);
    file
}

#[test]
fn sentence_piece_folders_encode_and_decode_as_the_library_does() {
    let prepend = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    let first = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    for file in [sentence_piece(prepend, Value::Null), sentence_piece(Value::Null, first)] {
        agrees(&file);
        let (text, oracle) = open(&file);
        for input in ["let text", " two  spaces", "日本 😀"] {
            let tokens = text.encode(input, false, false).unwrap();
            assert_eq!(text.decode(&tokens, true), oracle.decode(&tokens, true).unwrap());
        }
        let tokens = text.encode("日本 😀", false, false).unwrap();
        assert_eq!(text.decode(&tokens, true), "日本 😀");
    }
}

#[test]
fn much_markup_is_encoded_in_linear_time() {
    let first = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let (text, _) = open(&sentence_piece(Value::Null, first));
    let begun = Instant::now();
    let tokens = text.encode(&"<|im_start|>".repeat(100_000), true, false).unwrap();
    assert_eq!(tokens.len(), 100_000);
    // Walking over all that comes before each mark would take minutes.
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}

#[test]
fn what_continues_a_text_gets_no_space_put_before_it() {
    let prepend = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    for (normalizer, pre_tokenizer) in
        [(prepend, Value::Null), (Value::Null, metaspace("first")), (Value::Null, metaspace("always"))]
    {
        let mut file = sentence_piece(normalizer, pre_tokenizer);
        for marker in ["<PRE>", "<SUF>", "<MID>"] {
            add(&mut file, marker, true);
        }
        let (text, _) = open(&file);
        let infill =
            Infill { prefix: "let a".into(), suffix: "b c".into(), middle: "d".into(), extra: vec![] };
        let tokens = text.encode_infill(&infill).unwrap();
        assert_eq!(text.decode(&tokens, false), "<PRE> let a<SUF>b c<MID>d");
    }
}

#[test]
fn added_tokens_are_found_only_where_asked_for_whatever_the_file_calls_them() {
    let mut file = byte_level();
    let newline = add(&mut file, "\n\n\n", false) as u32;
    let (text, _) = open(&file);
    for markup in ["<|im_end|>", "<tool_call>"] {
        let token = text.special_token(markup).unwrap();
        assert_eq!(text.encode(markup, true, false).unwrap(), [token]);
        assert!(!text.encode(markup, false, false).unwrap().contains(&token));
    }
    // Whitespace is spelling, not markup.
    assert!(text.encode("a\n\n\nb", false, false).unwrap().contains(&newline));
    let tokens = text.encode("<|im_start|><tool_call>é", true, false).unwrap();
    assert_eq!(text.decode(&tokens, true), "<tool_call>é");
}

#[test]
fn words_that_must_stand_alone_are_found_as_the_library_finds_them() {
    for (normalizer, normalized) in [(json!({"type": "NFC"}), false), (Value::Null, true)] {
        let mut file = byte_level();
        file["normalizer"] = normalizer;
        for content in ["abe", "<e>", "aé"] {
            add(&mut file, content, false);
        }
        for token in file["added_tokens"].as_array_mut().unwrap() {
            token["single_word"] = (token["content"] != "<|im_start|>").into();
            token["normalized"] = normalized.into();
        }
        agrees(&file);
        let (text, _) = open(&file);
        let word = text.special_token("abe").unwrap();
        assert_eq!(text.encode("abe", true, false).unwrap(), [word]);
        assert!(!text.encode("abed", true, false).unwrap().contains(&word));
        assert!(!text.cuts_at_markup());
    }
}

#[test]
fn words_that_stand_in_normalized_text_are_found_as_the_library_finds_them() {
    let with_words = |mut file: Value, words: &[&str]| {
        for word in words {
            add(&mut file, word, false);
        }
        let added = file["added_tokens"].as_array_mut().unwrap();
        added.iter_mut().rev().take(words.len()).for_each(|token| token["normalized"] = true.into());
        file
    };
    let words = ["aé", "e\u{301}d", "a b", "<x>", "<|im", "start|>b"];
    let composed = with_words(byte_level(), &words);
    agrees(&composed);
    let (text, _) = open(&composed);
    let word = text.special_token("aé").unwrap();
    assert_eq!(text.encode("ae\u{301}", true, false).unwrap(), [word]);
    // Composed, the mark is part of another character.
    assert!(text.encode("<x>\u{338}", true, false).unwrap().len() > 1);

    let mut plain = composed;
    plain["normalizer"] = Value::Null;
    agrees(&plain);
    let prepend = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    let first = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    for file in [sentence_piece(prepend, Value::Null), sentence_piece(Value::Null, first)] {
        agrees(&with_words(file, &words));
    }
}

#[test]
fn a_tokenizer_that_panics_refuses_the_text() {
    // The library looks for the text's bytes where this table has none.
    for table in ["BAAAAAAAAAA=", "AAAAAA=="] {
        let mut file = byte_level();
        file["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": table});
        let folder = folder(&[("tokenizer.json", file.to_string())]);
        let text = Text::from_folder(folder.path()).unwrap();
        let refusal = text.encode("abc", true, false).unwrap_err().to_string();
        assert!(refusal.contains("tokenizer failed"), "{refusal}");
    }
}

#[test]
fn configurations_beside_the_tokenizer_are_read() {
    let mut file = byte_level();
    let end = add(&mut file, "<end>", true);
    let words = file["model"]["vocab"].as_object().unwrap().len();
    let config = json!({
        "bos_token": {"content": "<|im_start|>"}, "eos_token": "<end>", "add_bos_token": true,
        "chat_template": [{"name": "default", "template": "{{ bos_token }}"}, {"name": "tool_use", "template": "T"}],
    });
    let files = [
        ("tokenizer.json", file.to_string()),
        ("tokenizer_config.json", config.to_string()),
        ("generation_config.json", json!({"eos_token_id": [0, end]}).to_string()),
        ("config.json", json!({"eos_token_id": 1}).to_string()),
    ];
    let folder = folder(&files);
    let text = Text::from_folder(folder.path()).unwrap();
    assert_eq!(text.vocab_size() as u64, end + 1);
    assert_eq!(text.stop_tokens(), [0, text.special_token("<|im_end|>").unwrap(), end as u32]);
    assert_eq!(text.encode("", false, true).unwrap(), [words as u32]);
    let render = |tools: Option<&Value>| text.render_chat(&json!([]), tools, true, &Map::new()).unwrap();
    assert_eq!(render(None), "<|im_start|>");
    assert_eq!(render(Some(&json!([]))), "T");

    std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
    let text = Text::from_folder(folder.path()).unwrap();
    assert_eq!(text.render_chat(&json!([]), None, true, &Map::new()).unwrap(), "file");
}

#[test]
fn the_begin_token_may_come_from_the_post_processor() {
    let mut file = byte_level();
    file["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [600], "tokens": ["<|im_start|>"]}}});
    let (text, oracle) = open(&file);
    let with_begin = text.encode("let x", true, true).unwrap();
    assert_eq!(with_begin[0], text.special_token("<|im_start|>").unwrap());
    assert_eq!(with_begin[1..], *oracle.encode("let x", false).unwrap().get_ids());
}

#[test]
fn broken_folders_are_refused_with_the_reason() {
    let refused = |what: &str, files: &[(&str, String)]| {
        let folder = folder(files);
        match Text::from_folder(folder.path()) {
            Err(TextError::Model(message)) => assert!(message.contains(what), "{message}"),
            Err(other) => panic!("{what}: {other:?}"),
            Ok(_) => panic!("{what}: accepted"),
        }
    };
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut file = byte_level();
        change(&mut file);
        [("tokenizer.json", file.to_string())]
    };
    refused("no tokenizer.json", &[]);
    refused("is broken", &[("tokenizer.json", "{".into())]);
    refused("Unigram", &changed(&|file| file["model"]["type"] = "Unigram".into()));
    refused("merge 0", &changed(&|file| file["model"]["merges"] = json!([["a", "nowhere"]])));
    let longest = "a".repeat(500);
    let long = changed(&|file| file["model"]["merges"] = json!([["a", longest], [longest, "a"]]));
    refused("merge 0", &long);
    for mark in ["continuing_subword_prefix", "end_of_word_suffix"] {
        refused(mark, &changed(&|file| file["model"][mark] = "##".into()));
    }
    refused(
        "FixedLength",
        &changed(&|file| {
            let pre_tokenizers = file["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap();
            pre_tokenizers.insert(0, json!({"type": "FixedLength", "length": 0}));
        }),
    );
    // No table, and one that is said to have a billion entries.
    for table in ["", "/////w=="] {
        let normalizer = json!({"type": "Precompiled", "precompiled_charsmap": table});
        let normalizer = json!({"type": "Sequence", "normalizers": [normalizer]});
        refused("Precompiled", &changed(&|file| file["normalizer"] = normalizer.clone()));
    }
    refused("past the limit", &changed(&|file| file["model"]["vocab"]["zz"] = u32::MAX.into()));
    refused(
        "neither",
        &changed(&|file| {
            file["decoder"] = Value::Null;
            file["pre_tokenizer"] = Value::Null;
        }),
    );
    let mut files = changed(&|_| ()).to_vec();
    files.push(("generation_config.json", json!({"eos_token_id": 99999}).to_string()));
    refused("99999", &files);
    assert!(Text::from_folder(Path::new("/nonexistent")).is_err());
}

#[test]
fn the_oracle_has_learned_merges() {
    let model = &byte_level()["model"];
    assert!(model["merges"].as_array().unwrap().len() > 200);
}
