//! A GGUF file's `tokenizer.*` metadata in the terms of the text crate.

use std::borrow::Cow;

use rudder_model::Gguf;
use rudder_text::TextSource;

/// Copies what the file says about text; keys that it lacks stay empty.
pub fn from_gguf(gguf: &Gguf) -> TextSource {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let string = |name: &str| gguf.str(name).map(Cow::into_owned);
    let strings = |name: &str| -> Vec<String> {
        gguf.strings(&key(name)).unwrap_or_default().into_iter().map(Cow::into_owned).collect()
    };
    let token = |name: &str| gguf.u32(&key(&format!("{name}_token_id")));
    let types = gguf.ints(&key("token_type")).unwrap_or_default();
    TextSource {
        model: string(&key("model")).unwrap_or_default(),
        pre: string(&key("pre")),
        tokens: strings("tokens"),
        // A type out of range is as unknown as any other unknown one.
        token_types: types.into_iter().map(|t| i32::try_from(t).unwrap_or(-1)).collect(),
        merges: strings("merges"),
        scores: gguf.floats(&key("scores")).unwrap_or_default(),
        bos: token("bos"),
        eos: token("eos"),
        eot: token("eot"),
        eom: token("eom"),
        pad: token("padding"),
        unknown: token("unknown"),
        add_bos: gguf.bool(&key("add_bos_token")),
        add_space_prefix: gguf.bool(&key("add_space_prefix")),
        // Older converters wrote prefix_token_id and its like, without fim_.
        fim_prefix: token("fim_pre").or_else(|| token("prefix")),
        fim_suffix: token("fim_suf").or_else(|| token("suffix")),
        fim_middle: token("fim_mid").or_else(|| token("middle")),
        fim_pad: token("fim_pad"),
        fim_repo: token("fim_rep"),
        fim_separator: token("fim_sep"),
        chat_template: string("tokenizer.chat_template"),
        tool_use_template: string("tokenizer.chat_template.tool_use"),
    }
}
