//! From a [`GrammarSpec`] to a [`CompiledGrammar`]: limits, a thread of its own, the cache.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory, earley::SlicedBiasComputer, regex_to_lark};
use serde_json::{Value, json};

use super::cache::Cache;
use super::vocabulary::Vocabulary;
use super::{CompiledGrammar, GrammarError, GrammarPart, GrammarSpec, JsonLayout};
use crate::schema::closed;
use crate::{Parts, Text};

/// Largest grammar, as text.
pub(super) const MAX_BYTES: usize = 1 << 20;
/// Most text of all its schemas, once what they refer to stands where it is needed.
const MAX_CLOSED_BYTES: usize = 4 * MAX_BYTES;
/// Compilations at once; more wait, within their time.
const MAX_COMPILING: usize = 2;
/// Compilation recurses as deeply as the grammar is nested.
const STACK_BYTES: usize = 16 << 20;
/// White space between the parts of a JSON text: a space, or a new line with its indentation. Small
/// models fall into endless white space where they may.
const JSON_GAP: &str = r"[ ]|\r?\n([ ]{0,32}|\t{0,8})";

/// What all grammars of a model share.
#[derive(Default)]
pub(crate) struct Grammars {
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    cache: Cache,
    compiling: Arc<AtomicUsize>,
}

impl Text {
    /// Compiles a grammar, or finds it compiled already. Blocks for at most `patience`; what takes
    /// longer goes on for a while, within limits of its own, on a thread that nobody waits for. The
    /// first call prepares the vocabulary, which takes half a second that is not counted.
    ///
    /// # Errors
    /// See [`GrammarError`].
    pub fn compile_grammar(
        &self,
        spec: &GrammarSpec,
        patience: Duration,
    ) -> Result<Arc<CompiledGrammar>, GrammarError> {
        let grammars = &self.parts.grammars;
        if let Some(found) = grammars.cache.find(spec) {
            return Ok(found);
        }
        check_size(spec)?;
        let factory = grammars.factory(&self.parts)?;
        let compiled = Arc::new(grammars.compile(factory, top_level(spec)?, patience)?);
        grammars.cache.insert(spec.clone(), compiled.clone());
        Ok(compiled)
    }
}

impl Grammars {
    fn factory(&self, parts: &Parts) -> Result<Arc<ParserFactory>, GrammarError> {
        let made = self.factory.get_or_init(|| {
            let made = catch_unwind(AssertUnwindSafe(|| new_factory(parts)));
            made.unwrap_or_else(|_| Err("its vocabulary has a form that is not supported".into()))
        });
        made.clone().map_err(GrammarError::Unsupported)
    }

    /// Compiles on a thread of its own.
    fn compile(
        &self,
        factory: Arc<ParserFactory>,
        grammar: TopLevelGrammar,
        patience: Duration,
    ) -> Result<CompiledGrammar, GrammarError> {
        let deadline = Instant::now() + patience;
        let place = Place::take(&self.compiling, patience)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        let work = move || {
            let _place = place;
            let compiled = catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar)));
            let compiled = match compiled {
                Ok(parser) => parser.map_err(|error| refusal(&error.to_string())),
                Err(_) => Err(GrammarError::Invalid("it made the compiler fail".into())),
            };
            // Nobody listens any more if it took too long.
            let _ = sender.send(compiled.map(|parser| CompiledGrammar::new(Matcher::new(Ok(parser)))));
        };
        let thread = std::thread::Builder::new().name("rudder-grammar".into()).stack_size(STACK_BYTES);
        if let Err(error) = thread.spawn(work) {
            return Err(GrammarError::Unsupported(format!(
                "the system has no thread to compile it: {error}"
            )));
        }
        let patience_left = deadline.saturating_duration_since(Instant::now());
        receiver.recv_timeout(patience_left).unwrap_or(Err(GrammarError::TooSlow(patience)))
    }
}

/// One of the places for compilations; dropping it frees it.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>, patience: Duration) -> Result<Self, GrammarError> {
        let deadline = Instant::now() + patience;
        let more = |n: usize| (n < MAX_COMPILING).then_some(n + 1);
        while taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            if Instant::now() >= deadline {
                return Err(GrammarError::Busy(patience));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Self(taken.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn new_factory(parts: &Parts) -> Result<Arc<ParserFactory>, String> {
    let vocabulary: TokEnv = Arc::new(Vocabulary::new(parts));
    limited_factory(&vocabulary, &SlicedBiasComputer::general_slices()).map(Arc::new)
}

/// A factory whose grammars stay within our limits.
pub(super) fn limited_factory(vocabulary: &TokEnv, slices: &[String]) -> Result<ParserFactory, String> {
    let capabilities = InferenceCapabilities { ff_tokens: true, ..Default::default() };
    let mut factory =
        ParserFactory::new(vocabulary, capabilities, slices).map_err(|error| error.to_string())?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits {
        max_lexer_states: 20_000, // some 40 MB
        verbose_errors: false,
        ..ParserLimits::default()
    };
    Ok(factory)
}

fn check_size(spec: &GrammarSpec) -> Result<(), GrammarError> {
    let bytes = size(spec);
    if bytes > MAX_BYTES {
        return Err(GrammarError::TooLarge(format!("{bytes} bytes, {MAX_BYTES} at most")));
    }
    Ok(())
}

/// Bytes of a grammar's text.
pub(super) fn size(spec: &GrammarSpec) -> usize {
    match spec {
        GrammarSpec::Json => 0,
        GrammarSpec::JsonSchema { schema, .. } => schema.to_string().len(),
        GrammarSpec::Regex(text) | GrammarSpec::Lark(text) => text.len(),
        GrammarSpec::Choice(texts) => texts.iter().map(String::len).sum(),
        GrammarSpec::Composed { lark, parts } => {
            lark.len() + parts.iter().map(|part| part.name.len() + size(&part.grammar)).sum::<usize>()
        }
    }
}

/// In llguidance's terms.
fn top_level(spec: &GrammarSpec) -> Result<TopLevelGrammar, GrammarError> {
    let mut room = MAX_CLOSED_BYTES;
    let GrammarSpec::Composed { lark, parts } = spec else {
        return Ok(TopLevelGrammar::from_grammar(single(spec, JsonLayout::Loose, &mut room)?));
    };
    let mut grammars = vec![GrammarWithLexer::from_lark(lark.clone())];
    for GrammarPart { name, grammar, layout } in parts {
        grammars.push(GrammarWithLexer { name: Some(name.clone()), ..single(grammar, *layout, &mut room)? });
    }
    Ok(TopLevelGrammar { grammars, max_tokens: None })
}

/// A grammar without parts. The text of its schema is taken from `room`.
fn single(
    spec: &GrammarSpec,
    layout: JsonLayout,
    room: &mut usize,
) -> Result<GrammarWithLexer, GrammarError> {
    let json = |schema: Value, strict| {
        Ok::<_, GrammarError>(GrammarWithLexer::from_json_schema(with_options(schema, strict, layout)?))
    };
    Ok(match spec {
        GrammarSpec::Json => json(json!({"type": "object"}), true)?,
        GrammarSpec::JsonSchema { schema, strict } => json(with_definitions(schema, room)?, *strict)?,
        GrammarSpec::Regex(regex) => {
            GrammarWithLexer::from_lark(format!("start: /{}/", regex_to_lark(unanchored(regex), "")))
        }
        GrammarSpec::Lark(lark) => GrammarWithLexer::from_lark(lark.clone()),
        GrammarSpec::Choice(texts) if texts.is_empty() => {
            return Err(GrammarError::Invalid("it has no choice to choose from".into()));
        }
        GrammarSpec::Choice(texts) => {
            let texts: Vec<String> = texts.iter().map(|text| lark_string(text)).collect();
            GrammarWithLexer::from_lark(format!("start: {}", texts.join(" | ")))
        }
        GrammarSpec::Composed { .. } => {
            return Err(GrammarError::Invalid("a part of a grammar has parts itself".into()));
        }
    })
}

/// A schema with what it refers to, whose text is taken from `room`.
fn with_definitions(schema: &Value, room: &mut usize) -> Result<Value, GrammarError> {
    let schema = closed(schema, schema, *room);
    let left = room.checked_sub(schema.to_string().len());
    *room = left.ok_or_else(|| {
        GrammarError::TooLarge(format!("over {MAX_CLOSED_BYTES} bytes with what its schemas refer to"))
    })?;
    Ok(schema)
}

/// A text as a literal in Lark, whose strings are JSON's.
pub(super) fn lark_string(text: &str) -> String {
    Value::from(text).to_string()
}

/// A schema with our way of writing JSON, as llguidance takes it: in the schema itself.
pub(super) fn with_options(schema: Value, strict: bool, layout: JsonLayout) -> Result<Value, GrammarError> {
    let mut schema = match schema {
        Value::Object(schema) => schema,
        Value::Bool(true) => serde_json::Map::new(),
        _ => return Err(GrammarError::Invalid("a JSON schema must be an object".into())),
    };
    let mut options = match layout {
        JsonLayout::Loose => json!({"whitespace_pattern": JSON_GAP}),
        JsonLayout::OneLine => {
            json!({"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": false})
        }
    };
    options["coerce_one_of"] = true.into();
    options["lenient"] = (!strict).into();
    schema.insert("x-guidance".into(), options);
    Ok(Value::Object(schema))
}

/// A regular expression without the anchors around it: it is matched as a whole anyway.
pub(super) fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        // An odd number of backslashes makes the dollar a character.
        Some(rest) if rest.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 0 => rest,
        _ => regex,
    }
}

/// llguidance's error in our words.
fn refusal(error: &str) -> GrammarError {
    let reason = client_part(error);
    let limits = ["too large", "too big", "too complex", "too deeply", "limit", "fuel"];
    if limits.iter().any(|word| reason.to_lowercase().contains(word)) {
        GrammarError::TooLarge(reason.to_owned())
    } else {
        GrammarError::Invalid(reason.to_owned())
    }
}

/// The part of llguidance's message that is for clients. It may quote the grammar.
pub(super) fn client_part(error: &str) -> &str {
    const MOST: usize = 500;
    let end = error.find("\n<non-verbose").or_else(|| error.find("\n<state>")).unwrap_or(error.len());
    let end = end.min(error.floor_char_boundary(MOST));
    error[..end].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_no_place_is_told_that_others_have_them() {
        let taken = Arc::default();
        let take = || Place::take(&taken, Duration::ZERO);
        let mut places: Vec<Place> = (0..MAX_COMPILING).map(|_| take().unwrap()).collect();
        assert_eq!(take().err(), Some(GrammarError::Busy(Duration::ZERO)));
        places.pop();
        assert!(take().is_ok());
    }
}
