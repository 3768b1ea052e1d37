//! Whether a string is what grammars hold strings to.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::ApproximateTokEnv;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value};

use super::JsonLayout;
use super::compile::{limited_factory, with_options};

/// Checks strings by grammars for each of them alone, byte by byte, so that they are held as those of marked calls are.
#[derive(Default)]
pub(crate) struct StringCheck {
    /// By what they hold a string to, as JSON; `None` where no grammar can.
    grammars: HashMap<String, Option<Matcher>>,
}

impl StringCheck {
    /// Whether a string fits these keywords. `None` if no grammar can hold it to them; a format that is not known asks
    /// nothing.
    pub(crate) fn fits(&mut self, text: &str, keywords: &Map<String, Value>) -> Option<bool> {
        let key = Value::from(keywords.clone()).to_string();
        let matcher = self.grammars.entry(key).or_insert_with(|| compiled(keywords)).as_mut()?;
        let end = matcher.tok_env().ok()?.tok_trie().eos_token();
        let bytes = Value::from(text).to_string().into_bytes();
        let tokens: Vec<u32> = bytes.into_iter().map(u32::from).chain([end]).collect();
        Some(matcher.validate_tokens(&tokens).ok()? == tokens.len())
    }
}

/// A grammar of bytes for a string with these keywords.
fn compiled(keywords: &Map<String, Value>) -> Option<Matcher> {
    static FACTORY: OnceLock<Option<ParserFactory>> = OnceLock::new();
    let factory =
        FACTORY.get_or_init(|| limited_factory(&ApproximateTokEnv::single_byte_env(), &[]).ok()).as_ref()?;
    let mut schema = keywords.clone();
    schema.insert("type".into(), "string".into());
    let schema = with_options(Value::Object(schema), false, JsonLayout::OneLine).ok()?;
    let grammar = TopLevelGrammar::from_grammar(GrammarWithLexer::from_json_schema(schema));
    let parser = catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar))).ok()?.ok()?;
    Some(Matcher::new(Ok(parser)))
}
