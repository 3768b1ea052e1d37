//! From a client's messages or text to prompt tokens.
//!
//! What a client writes must not become the model's own markup: a file that contains
//! `<|im_start|>` is text. So markup in messages is replaced by placeholders before the template
//! is rendered, and stretches that hold one are encoded as plain text afterwards.

use aho_corasick::{AhoCorasick, MatchKind};
use rudder_text::Text;
use serde_json::{Map, Value};

use crate::openai::ApiError;

/// Texts longer than this are tokenized off the async threads.
const INLINE_BYTES: usize = 8 * 1024;
/// Opens and closes a placeholder's number. Noncharacters: Unicode keeps them for such use.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// Runs `work` here if its input is small, else on a thread that may be busy for long.
pub(crate) async fn off_thread_if_large<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_BYTES {
        return work();
    }
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|error| Err(ApiError::internal(format!("preparing the prompt failed: {error}"))))
}

/// A model's markup: every token that is found in text by its spelling.
#[derive(Clone)]
pub struct Markup {
    /// `None` if the model has none.
    finder: Option<AhoCorasick>,
}

impl Markup {
    /// Collects a model's markup.
    pub fn of(text: &Text) -> Self {
        let ids = 0..u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
        let spellings = ids.filter_map(|id| {
            let spelling = String::from_utf8(text.token_bytes(id)).ok()?;
            (text.special_token(&spelling) == Some(id)).then_some(spelling)
        });
        let spellings: Vec<String> = spellings.collect();
        // An automaton this small is always built; without one, nothing is taken for markup here.
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&spellings).ok();
        Self { finder: (!spellings.is_empty()).then(build).flatten() }
    }

    fn spans<'t>(&'t self, text: &'t str) -> impl Iterator<Item = std::ops::Range<usize>> + 't {
        self.finder.iter().flat_map(move |finder| finder.find_iter(text).map(|found| found.range()))
    }
}

/// A conversation to be rendered by the model's template.
#[derive(Debug, Clone, Default)]
pub struct ChatPrompt {
    /// Messages as the template wants them: objects with `role` and `content`, text only.
    pub messages: Value,
    /// Tools in OpenAI's shape, if there are any.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub extra: Map<String, Value>,
}

impl ChatPrompt {
    /// Renders and encodes, up to where the assistant begins to speak.
    ///
    /// # Errors
    /// If the model has no template or its template refuses the messages.
    pub fn encode(mut self, text: &Text, markup: &Markup) -> Result<Vec<u32>, rudder_text::TextError> {
        let mut literals = Literals::default();
        for message in self.messages.as_array_mut().into_iter().flatten() {
            for (key, value) in message.as_object_mut().into_iter().flatten() {
                if key != "role" {
                    literals.hide(value, markup);
                }
            }
        }
        if let Some(tools) = &mut self.tools {
            literals.hide(tools, markup);
        }
        let rendered = text.render_chat(&self.messages, self.tools.as_ref(), true, &self.extra)?;
        literals.encode(&rendered, text, markup)
    }
}

/// The markup that clients wrote, each by its number.
#[derive(Default)]
struct Literals {
    hidden: Vec<String>,
}

impl Literals {
    /// Replaces markup in every string of `value` by placeholders. A string that holds the
    /// placeholder's own character has that replaced too, so a client cannot name one.
    fn hide(&mut self, value: &mut Value, markup: &Markup) {
        match value {
            Value::String(string) => {
                if let Some(hidden) = self.hide_in(string, markup) {
                    *string = hidden;
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.hide(value, markup)),
            Value::Object(fields) => fields.values_mut().for_each(|value| self.hide(value, markup)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn hide_in(&mut self, string: &str, markup: &Markup) -> Option<String> {
        let opens = string.match_indices(OPEN).map(|(at, open)| at..at + open.len());
        let mut spans: Vec<_> = markup.spans(string).chain(opens).collect();
        if spans.is_empty() {
            return None;
        }
        spans.sort_by_key(|span| span.start);
        let (mut out, mut end) = (String::with_capacity(string.len()), 0);
        for span in spans.into_iter().filter(|span| !span.is_empty()) {
            // Markup that contains the character itself was replaced as a whole.
            if span.start < end {
                continue;
            }
            out.push_str(&string[end..span.start]);
            out.push(OPEN);
            out.push_str(&self.hidden.len().to_string());
            out.push(CLOSE);
            self.hidden.push(string[span.clone()].to_owned());
            end = span.end;
        }
        out.push_str(&string[end..]);
        Some(out)
    }

    /// Encodes rendered text: its markup is the template's own, that behind placeholders is text.
    fn encode(
        &self,
        rendered: &str,
        text: &Text,
        markup: &Markup,
    ) -> Result<Vec<u32>, rudder_text::TextError> {
        if self.hidden.is_empty() {
            return text.encode(rendered, true, false);
        }
        // Markup cuts the text into stretches that are tokenized each by itself, so a stretch with
        // a placeholder can be encoded apart from its neighbours without changing them.
        let mut tokens = Vec::new();
        let (mut done, mut begin) = (0, 0);
        let cuts = markup.spans(rendered).chain(std::iter::once(rendered.len()..rendered.len()));
        for cut in cuts {
            let stretch = &rendered[begin..cut.start];
            if stretch.contains(OPEN) {
                if done < begin {
                    tokens.extend(text.encode(&rendered[done..begin], true, false)?);
                }
                tokens.extend(text.encode(&self.restore(stretch), false, false)?);
                done = cut.start;
            }
            begin = cut.end;
        }
        if done < rendered.len() {
            tokens.extend(text.encode(&rendered[done..], true, false)?);
        }
        Ok(tokens)
    }

    /// Puts the literals back.
    fn restore(&self, stretch: &str) -> String {
        let mut out = String::with_capacity(stretch.len());
        let mut parts = stretch.split(OPEN);
        out.push_str(parts.next().unwrap_or_default());
        for part in parts {
            let literal = part.split_once(CLOSE).and_then(|(number, rest)| {
                let literal = number.parse::<usize>().ok().and_then(|number| self.hidden.get(number))?;
                Some((literal, rest))
            });
            match literal {
                Some((literal, rest)) => {
                    out.push_str(literal);
                    out.push_str(rest);
                }
                // The template took the placeholder apart: what is left of it is text.
                None => out.push_str(part),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn markup() -> Markup {
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(["<|a|>", "<|a|>b", "<s>"])
            .unwrap();
        Markup { finder: Some(finder) }
    }

    #[test]
    fn ordinary_text_is_left_as_it_is() {
        let mut literals = Literals::default();
        let mut value = json!({"content": "plain <| a |> \u{fdd1}", "n": [1, null, "x"]});
        let before = value.clone();
        literals.hide(&mut value, &markup());
        assert_eq!(value, before);
        assert!(literals.hidden.is_empty());
    }

    #[test]
    fn hiding_and_restoring_gives_the_text_back() {
        for text in ["<s>", "x<|a|>b<|a|>c<s><s>", "\u{fdd0}0\u{fdd1}", "\u{fdd0}<s>\u{fdd0}", "a<s>7"] {
            let mut literals = Literals::default();
            let hidden = literals.hide_in(text, &markup()).expect(text);
            assert!(markup().spans(&hidden).next().is_none(), "{text}: {hidden:?}");
            assert_eq!(literals.restore(&hidden), text);
        }
    }

    #[test]
    fn strings_are_hidden_however_deep_they_lie() {
        let mut literals = Literals::default();
        let mut value = json!([{"function": {"arguments": {"text": "<s>"}}}]);
        literals.hide(&mut value, &markup());
        assert!(!value.to_string().contains("<s>"));
        assert_eq!(literals.hidden, ["<s>"]);
    }
}
