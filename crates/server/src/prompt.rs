//! From a client's messages or text to prompt tokens.
//!
//! What a client writes must not become the model's own markup: a file that contains
//! `<|im_start|>` is text. So markup in messages is replaced by placeholders before the template
//! is rendered, and stretches that hold one are encoded as plain text afterwards.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aho_corasick::{AhoCorasick, MatchKind};
use rudder_text::{Rendered, TemplateValue, Text, TextError, Tool};
use serde_json::{Map, Value, json};

use crate::conversation::{KnownMessage, Role};
use crate::openai::ApiError;
use crate::prompt_cache::{KnownPrompt, Literal, PromptCache, ShownMessage};
use crate::template_view::View;
use crate::verbatim::{Answer, Prefix, Verbatim};

/// Texts longer than this are tokenized off the async threads.
const INLINE_BYTES: usize = 8 * 1024;
/// From so many bytes on, a prompt is encoded up to the next markup, so that its next turn goes on from there.
const RUN_BYTES: usize = 2 * 1024;
/// How much of a rendered prompt's end is kept for the reader of its answer.
const TAIL_CHARS: usize = 128;
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
pub(crate) struct Markup {
    /// `None` if the model has none.
    finder: Option<AhoCorasick>,
    /// Bytes of the longest.
    longest: usize,
    /// Whether a text may be encoded apart before and behind any.
    cuts: bool,
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
        Self {
            finder: (!spellings.is_empty()).then(build).flatten(),
            longest: spellings.iter().map(String::len).max().unwrap_or(0),
            cuts: text.cuts_at_markup(),
        }
    }

    fn spans<'t>(&'t self, text: &'t str) -> impl Iterator<Item = std::ops::Range<usize>> + 't {
        self.finder.iter().flat_map(move |finder| finder.find_iter(text).map(|found| found.range()))
    }
}

/// A conversation to be rendered by the model's template.
pub(crate) struct ChatPrompt<'a> {
    pub messages: &'a [KnownMessage],
    pub tools: &'a [Tool],
    /// Further variables of the template.
    pub extra: &'a Map<String, Value>,
    pub view: View,
}

/// A rendered and tokenized conversation, up to where the assistant begins to speak.
pub(crate) struct EncodedPrompt {
    pub tokens: Arc<[u32]>,
    /// The end of the rendered text: what the assistant's answer continues.
    pub tail: String,
    /// What the template wrote there before the answer; `None` if that cannot be told from what came before it.
    pub opening: Option<Arc<str>>,
    /// How long it took to render the template, and to tokenize what it gave.
    pub rendering: Duration,
    pub tokenizing: Duration,
}

impl ChatPrompt<'_> {
    /// Renders and encodes; answers that `memory` holds go in as the tokens they were, and what `prompts`
    /// holds of the conversation is not encoded again.
    ///
    /// # Errors
    /// If the model has no template or its template refuses the messages.
    pub fn encode(
        &self,
        text: &Text,
        markup: &Markup,
        memory: &Verbatim,
        prompts: &PromptCache,
    ) -> Result<EncodedPrompt, TextError> {
        let conversations = self.conversations(memory);
        let answers = self.remembered(&conversations, memory);
        let opening = memory.opening(self.extra, || self.opening(text).unwrap_or_default());
        // A template may show one call of a message.
        let encode = |answers: &[_], known: &mut _| match self.view.one_by_one(self.messages, answers) {
            None => self.encode_with(answers, &opening, text, markup, known),
            Some(parted) => {
                let (messages, answers): (Vec<_>, Vec<_>) = parted.into_iter().unzip();
                let parted = ChatPrompt { messages: &messages, ..*self };
                parted.encode_with(&answers, &opening, text, markup, known)
            }
        };
        prompts.with(&conversations, |known| {
            if answers.iter().any(Option::is_some) {
                match encode(&answers, known) {
                    // A template may want to see the calls that a result answers.
                    Ok(None) | Err(TextError::Template(_)) => {}
                    Ok(Some(encoded)) => return Ok(encoded),
                    Err(error) => return Err(error),
                }
            }
            let plain = encode(&[], known)?;
            plain.ok_or_else(|| TextError::Model("a prompt without answers could not be encoded".into()))
        })
    }

    /// The conversation up to and with each message.
    fn conversations(&self, memory: &Verbatim) -> Vec<Prefix> {
        let mut prefix = Prefix::default();
        let conversations = self.messages.iter().map(|message| {
            prefix = memory.after(prefix, message.digest());
            prefix
        });
        conversations.collect()
    }

    /// For each message, the answer that it was generated as.
    fn remembered(&self, conversations: &[Prefix], memory: &Verbatim) -> Vec<Option<Answer>> {
        let said = |message: &KnownMessage| message.role == Role::Assistant;
        let answers = self.messages.iter().zip(conversations);
        answers.map(|(message, &prefix)| said(message).then(|| memory.find(prefix)).flatten()).collect()
    }

    /// `opening` is what opens the answer to come. `None` if the template does not place an answer where a generated
    /// one stands.
    fn encode_with(
        &self,
        answers: &[Option<Answer>],
        opening: &Arc<str>,
        text: &Text,
        markup: &Markup,
        known: &mut KnownPrompt,
    ) -> Result<Option<EncodedPrompt>, TextError> {
        let begun = Instant::now();
        let mut literals = Literals::default();
        // Before the messages: so their placeholders have the same numbers in every turn.
        let tools = (!self.tools.is_empty()).then(|| {
            let mut tools = self.tools.iter().map(|tool| self.view.tool(tool)).collect();
            literals.hide(&mut tools, markup);
            TemplateValue::from(&tools)
        });
        // How many placeholders there are before each message.
        let mut numbers = Vec::with_capacity(self.messages.len());
        let answer = |index: usize| answers.get(index).and_then(Option::as_ref);
        let messages = self.messages.iter().enumerate().map(|(index, message)| {
            numbers.push(literals.hidden.len());
            match answer(index) {
                Some(answer) => literals.verbatim(answer.clone()),
                None => literals.shown(message, self.view, markup),
            }
        });
        let messages: Vec<_> = messages.collect();
        let mut rest = self.render(&messages, tools.as_ref(), text, known, answer)?;
        if answers.iter().any(Option::is_some) {
            let from = numbers.get(rest.messages).map_or(0, |&number| number);
            let mut opened = literals.open_answers(&mut rest, from);
            if !opened && rest.messages > 0 {
                // What opened the first answer may stand in what is known.
                rest = text.render_from(0, &messages, tools.as_ref(), self.extra)?.into();
                opened = literals.open_answers(&mut rest, 0);
            }
            if !opened {
                return Ok(None);
            }
        }
        let rendering = begun.elapsed();
        let (start, numbers) = known.go_on(rest.known, &rest.text, &literals.hidden, markup.longest);
        let shown = rest.starts.iter().zip(rest.messages..).map(|(start, index)| ShownMessage {
            message: self.messages[index].clone(),
            answer: answer(index).cloned(),
            start: rest.known + start,
        });
        known.show(rest.messages, shown, self.tools, self.extra);
        literals.encode(start, numbers, text, markup, known)?;
        let tail = known.text.char_indices().rev().nth(TAIL_CHARS).map_or(0, |(at, _)| at);
        Ok(Some(EncodedPrompt {
            tokens: Arc::from(&known.tokens[..]),
            tail: known.text[tail..].to_owned(),
            opening: Some(opening.clone()).filter(|it| !it.is_empty() && known.text.ends_with(&**it)),
            rendering,
            tokenizing: begun.elapsed() - rendering,
        }))
    }

    /// Renders what `known` does not show already.
    fn render<'m>(
        &'m self,
        messages: &[TemplateValue],
        tools: Option<&TemplateValue>,
        text: &Text,
        known: &KnownPrompt,
        answer: impl Fn(usize) -> Option<&'m Answer>,
    ) -> Result<Rest, TextError> {
        let shown = self.messages.iter().enumerate().map(|(index, message)| (message, answer(index)));
        let count = known.known_messages(self.tools, self.extra, shown);
        let mut rendered = text.render_from(count, messages, tools, self.extra)?;
        let (Some((head, known)), Some(&begin)) = (known.head_of(count), rendered.starts.first()) else {
            return Ok(rendered.into());
        };
        if rendered.text[..begin] != *head {
            return Ok(text.render_from(0, messages, tools, self.extra)?.into());
        }
        rendered.text.drain(..begin);
        rendered.starts.iter_mut().for_each(|start| *start -= begin);
        Ok(Rest { messages: count, known, text: rendered.text, starts: rendered.starts })
    }

    /// What the template writes before an answer that is to be generated, with these variables.
    fn opening(&self, text: &Text) -> Result<String, TextError> {
        let messages = json!([{"role": "user", "content": "x"}]);
        let open = text.render_chat(&messages, None, true, self.extra)?;
        let closed = text.render_chat(&messages, None, false, self.extra)?;
        Ok(open.strip_prefix(&closed).unwrap_or_default().to_owned())
    }
}

/// Whether a string holds what a placeholder has to stand for.
fn hides(string: &str, markup: &Markup) -> bool {
    string.contains(OPEN) || markup.spans(string).next().is_some()
}

/// What of a rendered prompt is not known.
struct Rest {
    /// Messages before it, and bytes.
    messages: usize,
    known: usize,
    text: String,
    /// Where in it each message begins, or nothing.
    starts: Vec<usize>,
}

/// What placeholders stand for, each by its number.
#[derive(Default)]
struct Literals {
    hidden: Vec<Literal>,
}

impl Literals {
    /// A message as the template sees it, ready for it; kept with the message unless it holds placeholders, whose
    /// numbers go by what came before.
    fn shown(&mut self, message: &KnownMessage, view: View, markup: &Markup) -> TemplateValue {
        if let Some(shown) = message.shown() {
            return shown;
        }
        let before = self.hidden.len();
        let mut value = view.message(message);
        self.hide(&mut value, markup);
        value["role"] = message.role.as_str().into();
        let shown = TemplateValue::from(&value);
        if self.hidden.len() == before {
            message.keep_shown(shown.clone());
        }
        shown
    }

    /// An answer as it was generated: the template sees a placeholder where the text would be.
    fn verbatim(&mut self, answer: Answer) -> TemplateValue {
        let content = self.placeholder(Literal::Answer(answer));
        TemplateValue::from(&json!({"role": "assistant", "content": content}))
    }

    fn placeholder(&mut self, literal: Literal) -> String {
        self.hidden.push(literal);
        format!("{OPEN}{}{CLOSE}", self.hidden.len() - 1)
    }

    /// Replaces markup in every string and key of `value` by placeholders. A string that holds the
    /// placeholder's own character has that replaced too, so a client cannot name one.
    fn hide(&mut self, value: &mut Value, markup: &Markup) {
        match value {
            Value::String(string) => {
                if let Some(hidden) = self.hide_in(string, markup) {
                    *string = hidden;
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.hide(value, markup)),
            Value::Object(fields) => {
                fields.values_mut().for_each(|value| self.hide(value, markup));
                if fields.keys().any(|key| hides(key, markup)) {
                    let hidden =
                        |(key, value): (String, Value)| (self.hide_in(&key, markup).unwrap_or(key), value);
                    *fields = std::mem::take(fields).into_iter().map(hidden).collect();
                }
            }
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
            out.push_str(&self.placeholder(Literal::Text(string[span.clone()].to_owned())));
            end = span.end;
        }
        out.push_str(&string[end..]);
        Some(out)
    }

    /// Puts before every answer exactly what stood before it when it was generated: a template may open the answer
    /// to come otherwise than past ones (with a mark for reasoning, say), and otherwise in each turn. False if an
    /// answer is not found where its opening begins a message; those with numbers below `from` are not looked for.
    fn open_answers(&self, rest: &mut Rest, from: usize) -> bool {
        let rendered = &rest.text;
        let mut openings: Vec<(Range<usize>, &str)> = Vec::new();
        for (at, _) in rendered.match_indices(OPEN) {
            let Some((number, _)) = rendered[at + OPEN.len_utf8()..].split_once(CLOSE) else { continue };
            let literal = number.parse::<usize>().ok().and_then(|number| self.hidden.get(number));
            let Some(Literal::Answer(Answer { opening, .. })) = literal else { continue };
            // A message begins with the first line of its opening, whatever follows.
            let begin = &opening[..opening.find('\n').map_or(opening.len(), |at| at + 1)];
            let done = openings.last().map_or(0, |(last, _)| last.end);
            let Some(found) = rendered[done..at].rfind(begin) else { return false };
            let between = &rendered[done + found + begin.len()..at];
            if !between.replace("<think>", "").replace("</think>", "").trim().is_empty() {
                return false;
            }
            openings.push((done + found..at, &**opening));
        }
        let wanted =
            self.hidden[from..].iter().filter(|literal| matches!(literal, Literal::Answer(_))).count();
        if openings.len() != wanted {
            return false;
        }
        if openings.iter().any(|(place, opening)| rendered[place.clone()] != **opening) {
            rest.replace(&openings);
        }
        true
    }

    /// Encodes the text of `known`, of which it has the tokens before byte `start`, and which has `numbers`
    /// placeholders there: its markup is the template's own, that behind placeholders is text.
    fn encode(
        &self,
        start: usize,
        numbers: usize,
        text: &Text,
        markup: &Markup,
        known: &mut KnownPrompt,
    ) -> Result<(), TextError> {
        let rendered = std::mem::take(&mut known.text);
        let outcome = self.encode_text(&rendered, start, numbers, text, markup, known);
        known.text = rendered;
        outcome
    }

    fn encode_text(
        &self,
        rendered: &str,
        start: usize,
        mut numbers: usize,
        text: &Text,
        markup: &Markup,
        known: &mut KnownPrompt,
    ) -> Result<(), TextError> {
        // Markup cuts the text into stretches that are tokenized each by itself, so a stretch with
        // a placeholder can be encoded apart from its neighbours without changing them.
        let (mut done, mut begin) = (start, start);
        let cuts = markup.spans(&rendered[start..]).map(|cut| start + cut.start..start + cut.end);
        for cut in cuts.chain(std::iter::once(rendered.len()..rendered.len())) {
            let stretch = &rendered[begin..cut.start];
            if stretch.contains(OPEN) {
                if done < begin {
                    known.tokens.extend(text.encode(&rendered[done..begin], true, false)?);
                }
                if markup.cuts && begin > 0 {
                    known.cut(begin, numbers);
                }
                let encode = |plain: &str| text.encode(plain, false, false);
                numbers = numbers.max(self.encode_stretch(stretch, &mut known.tokens, encode)?);
                done = cut.start;
            } else if markup.cuts && !cut.is_empty() && cut.end - done >= RUN_BYTES {
                known.tokens.extend(text.encode(&rendered[done..cut.end], true, false)?);
                known.cut(cut.end, numbers);
                done = cut.end;
            }
            begin = cut.end;
        }
        if done < rendered.len() {
            known.tokens.extend(text.encode(&rendered[done..], true, false)?);
        }
        Ok(())
    }

    /// Encodes a stretch without markup, with what its placeholders stand for. Returns a number that is
    /// greater than theirs.
    fn encode_stretch(
        &self,
        stretch: &str,
        tokens: &mut Vec<u32>,
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, TextError>,
    ) -> Result<usize, TextError> {
        let mut numbers = 0;
        let mut plain = String::with_capacity(stretch.len());
        let mut parts = stretch.split(OPEN);
        plain.push_str(parts.next().unwrap_or_default());
        for part in parts {
            let literal = part.split_once(CLOSE).and_then(|(number, rest)| {
                let number = number.parse::<usize>().ok()?;
                let literal = self.hidden.get(number)?;
                numbers = numbers.max(number + 1);
                Some((literal, rest))
            });
            match literal {
                Some((Literal::Text(literal), rest)) => {
                    plain.push_str(literal);
                    plain.push_str(rest);
                }
                Some((Literal::Answer(answer), rest)) => {
                    if !plain.is_empty() {
                        tokens.extend(encode(&plain)?);
                        plain.clear();
                    }
                    tokens.extend_from_slice(&answer.tokens);
                    plain.push_str(rest);
                }
                // The template took the placeholder apart: what is left of it is text.
                None => plain.push_str(part),
            }
        }
        if !plain.is_empty() {
            tokens.extend(encode(&plain)?);
        }
        Ok(numbers)
    }
}

impl From<Rendered> for Rest {
    /// A whole prompt, of which nothing is known.
    fn from(whole: Rendered) -> Self {
        Self { messages: 0, known: 0, text: whole.text, starts: whole.starts }
    }
}

impl Rest {
    /// Puts other text into all these places of the text, which do not overlap.
    fn replace(&mut self, places: &[(Range<usize>, &str)]) {
        let (mut text, mut done) = (String::with_capacity(self.text.len()), 0);
        let mut starts = self.starts.iter_mut().peekable();
        let mut known = true;
        for (place, other) in places {
            while let Some(start) = starts.next_if(|start| **start <= place.start) {
                *start = text.len() + (*start).saturating_sub(done);
            }
            // A message that begins within what is put elsewhere begins nowhere; one that begins right behind it
            // has what opens it in one before, which would be shown otherwise without it.
            known &= starts.peek().is_none_or(|start| **start > place.end);
            text.push_str(&self.text[done..place.start]);
            text.push_str(other);
            done = place.end;
        }
        starts.for_each(|start| *start = text.len() + (*start).saturating_sub(done));
        text.push_str(&self.text[done..]);
        self.text = text;
        if !known {
            self.starts.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    use rudder_text::{OutputFormat, TextSource, ToolInput};

    use super::*;
    use crate::conversation::Message;

    fn markup() -> Markup {
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(["<|a|>", "<|a|>b", "<s>"])
            .unwrap();
        Markup { finder: Some(finder), longest: 6, cuts: true }
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

    /// A stretch's text, with `#N#` for answer tokens.
    fn restored(literals: &Literals, stretch: &str) -> String {
        let mut tokens = Vec::new();
        let encode = |plain: &str| Ok(plain.chars().map(u32::from).collect());
        literals.encode_stretch(stretch, &mut tokens, encode).unwrap();
        let text = |token| char::from_u32(token).map_or_else(|| format!("#{token}#"), String::from);
        tokens.into_iter().map(text).collect()
    }

    const ANSWER: u32 = u32::MAX;

    fn answered(tokens: &[u32], opening: &str) -> Answer {
        Answer { tokens: tokens.into(), opening: opening.into() }
    }

    #[test]
    fn hiding_and_restoring_gives_the_text_back() {
        for text in ["<s>", "x<|a|>b<|a|>c<s><s>", "\u{fdd0}0\u{fdd1}", "\u{fdd0}<s>\u{fdd0}", "a<s>7"] {
            let mut literals = Literals::default();
            let hidden = literals.hide_in(text, &markup()).expect(text);
            assert!(markup().spans(&hidden).next().is_none(), "{text}: {hidden:?}");
            assert_eq!(restored(&literals, &hidden), text);
        }
    }

    #[test]
    fn strings_and_keys_are_hidden_however_deep_they_lie() {
        for mut value in [
            json!([{"function": {"arguments": {"text": "<s>"}}}]),
            json!({"properties": {"a": {}, "<s>": {"type": "string"}, "b": {}}}),
        ] {
            let (mut literals, before) = (Literals::default(), value.to_string());
            literals.hide(&mut value, &markup());
            assert!(!value.to_string().contains("<s>"));
            assert!(matches!(&literals.hidden[..], [Literal::Text(text)] if text == "<s>"));
            assert_eq!(restored(&literals, &value.to_string()), before);
        }
    }

    #[test]
    fn an_answer_follows_what_opened_it_when_it_was_generated() {
        let mut literals = Literals::default();
        let opening = "<s>assistant\n<think>\n";
        let answer = literals.placeholder(Literal::Answer(answered(&[ANSWER], opening)));
        let open = |rendered: &str| {
            let starts = rendered.match_indices("<s>").map(|(at, _)| at).collect();
            let mut rest = Rest { messages: 0, known: 0, text: rendered.to_owned(), starts };
            literals.open_answers(&mut rest, 0).then_some(rest)
        };
        for between in ["", "<think>\n\n</think>\n\n", "<think>\n"] {
            let rendered = format!("<s>user\nhi\n<s>assistant\n{between}{answer}\n<s>user\nso");
            let opened = open(&rendered).expect(between);
            let expected = format!("<s>user\nhi\n{opening}#{ANSWER}#\n<s>user\nso");
            assert_eq!(restored(&literals, &opened.text), expected);
            let starts = opened.text.match_indices("<s>").map(|(at, _)| at);
            assert_eq!(opened.starts, starts.collect::<Vec<_>>());
        }
        for elsewhere in ["<s>user\n", "<s>assistant\nhi<s>user\n", ""] {
            assert!(open(&format!("{elsewhere}{answer}")).is_none());
        }
        assert!(open("<s>assistant\n").is_none(), "the template left it out");
    }

    #[test]
    fn where_a_message_begins_within_what_is_replaced_is_not_known() {
        let rest = || Rest { messages: 1, known: 7, text: "0123456789".into(), starts: vec![0, 2, 5, 9] };
        let replaced = |places: &[Range<usize>]| {
            let mut rest = rest();
            let places: Vec<_> = places.iter().map(|place| (place.clone(), "xxx")).collect();
            rest.replace(&places);
            (rest.text, rest.starts)
        };
        assert_eq!(replaced(&[2..4, 9..9]), ("01xxx45678xxx9".into(), vec![0, 2, 6, 10]));
        assert_eq!(replaced(&[1..3, 7..8]), ("0xxx3456xxx89".into(), vec![]));
        assert_eq!(replaced(&[4..6, 6..10]), ("0123xxxxxx".into(), vec![]));
        assert_eq!(
            replaced(&[2..5, 9..9]),
            ("01xxx5678xxx9".into(), vec![]),
            "what opens the third stands in the second"
        );
    }

    /// A vocabulary of bytes and the marks of ChatML, with a chat template.
    fn text(template: &str) -> Text {
        let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let others = (0..256).filter(|&byte| !printable(byte)).zip(0x100..);
        let others: std::collections::HashMap<u32, u32> = others.collect();
        let character = |byte: u32| char::from_u32(*others.get(&byte).unwrap_or(&byte)).unwrap().to_string();
        let mut tokens: Vec<String> = (0..256).map(character).collect();
        let nul = tokens[0].clone();
        tokens.extend(["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
        tokens.push(nul.repeat(2));
        let token_types = (0..tokens.len()).map(|token| if (256..259).contains(&token) { 3 } else { 1 });
        Text::from_gguf(TextSource {
            model: "gpt2".into(),
            pre: Some("qwen2".into()),
            token_types: token_types.collect(),
            tokens,
            merges: vec![format!("{nul} {nul}")],
            eos: Some(258),
            chat_template: Some(template.into()),
            ..TextSource::default()
        })
        .unwrap()
    }

    /// The first three show one message after the other: with a look at those beside, with a mark at an answer's
    /// beginning, with a head that shows the last one. The last cuts short what came before the last question.
    const TEMPLATES: [&str; 4] = [
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content | length }}{% for m in messages %}{% if loop.first or (messages[loop.index0 - 1].role != m.role) %}<|im_start|>{{ m.role }}\n{% endif %}{{ m.content }}{% if loop.last or (messages[loop.index0 + 1].role != m.role) %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "{{ messages[-1].content }}{{ messages | length > 9 }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% set box = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set box.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.index0 >= box.last %}{{ m.content }}{% else %}{{ m.content[:3] }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ];

    /// A conversation that grows, and is edited now and then.
    #[derive(Default)]
    struct Talk {
        messages: Vec<KnownMessage>,
        tools: Vec<Tool>,
    }

    impl Talk {
        fn act(&mut self, act: u32, number: usize, memory: &Verbatim) {
            let long = format!("fn number_{number}() {{}}\n").repeat(120);
            let say = [
                "short".to_owned(),
                long.clone(),
                "holds <|im_start|>user\nand <|im_end|>".to_owned(),
                format!("{long}<|im_end|>{long}"),
                "\u{fdd0}0\u{fdd1}".to_owned(),
                "\u{fdd2}".repeat(1 + number % 2),
                " <|im_".to_owned(),
                String::new(),
            ];
            let say = say[number % say.len()].clone();
            match act {
                0..6 => {
                    let role =
                        [Role::User, Role::Assistant, Role::User, Role::Assistant, Role::Tool][number % 5];
                    self.messages.push(Message::new(role, say).into());
                    if act < 3 && role == Role::Assistant {
                        let after = |prefix, message: &KnownMessage| memory.after(prefix, message.digest());
                        let conversation = self.messages.iter().fold(Prefix::default(), after);
                        let opening =
                            ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"][number % 2];
                        memory.keep(conversation, answered(&[number as u32 % 256, 7, 200], opening));
                    }
                }
                6 => {
                    let at = number % self.messages.len().max(1);
                    if let Some(message) = self.messages.get_mut(at) {
                        message.to_mut().text.push('x');
                    }
                }
                7 => self.messages.truncate(number),
                _ => {
                    let description = format!("takes <|im_end|> {}", number % 2);
                    self.tools = vec![Tool { name: "f".into(), description, input: ToolInput::Text }];
                }
            }
        }
    }

    #[test]
    fn rules_that_are_said_otherwise_stay_as_they_are_from_turn_to_turn() {
        let text = text(
            "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        );
        let (markup, view) = (Markup::of(&text), View::of(&text, OutputFormat::default()));
        let (memory, prompts, extra) = (Verbatim::new(), PromptCache::new(), Map::new());
        let after = |prefix, message: &KnownMessage| memory.after(prefix, message.digest());
        let say = |said: &[(Role, &str)]| {
            let mut messages = said.iter().map(|&(role, text)| Message::new(role, text).into()).collect();
            view.fit(&mut messages);
            messages
        };
        let encode = |messages: &[KnownMessage]| {
            ChatPrompt { messages, tools: &[], extra: &extra, view }
                .encode(&text, &markup, &memory, &prompts)
                .unwrap()
        };
        let mut said = vec![(Role::System, "a"), (Role::System, "b"), (Role::User, "c"), (Role::System, "d")];
        let asked = say(&said);
        encode(&asked);
        let answer: KnownMessage = Message::new(Role::Assistant, "e").into();
        let conversation = after(asked.iter().fold(Prefix::default(), after), &answer);
        memory.keep(conversation, answered(&[7, 200], "<|im_start|>assistant\n"));
        said.extend([(Role::Assistant, "e"), (Role::System, "f")]);
        let going_on = say(&said);
        let prompt = ChatPrompt { messages: &going_on, tools: &[], extra: &extra, view };
        prompts.with(&prompt.conversations(&memory), |known| {
            let plain = going_on.iter().map(|message| (message, None));
            assert_eq!(known.known_messages(&[], &extra, plain), asked.len() - 1);
        });
        let shown = encode(&going_on).tokens;
        let answer = text.decode(&[7, 200], false);
        let expected = "<|im_start|>system\na\n\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>user\nd\
                        <|im_end|>\n<|im_start|>assistant\n#<|im_end|>\n<|im_start|>user\nf<|im_end|>\n\
                        <|im_start|>assistant\n";
        assert_eq!(text.decode(&shown, false), expected.replace('#', &answer));
    }

    #[test]
    fn a_prompt_that_goes_on_from_the_last_one_is_what_it_is_alone() {
        let mut reused = 0;
        for template in TEMPLATES {
            let text = text(template);
            let markup = Markup::of(&text);
            let view = View::of(&text, OutputFormat::default());
            let config = ProptestConfig { failure_persistence: None, cases: 64, ..Default::default() };
            let acts = prop::collection::vec((0u32..9, 0usize..40), 1..40);
            let counted = std::cell::Cell::new(0);
            TestRunner::new(config)
                .run(&acts, |acts| {
                    let (memory, prompts) = (Verbatim::new(), PromptCache::new());
                    let mut talk = Talk::default();
                    for (act, number) in acts {
                        talk.act(act, number, &memory);
                        if talk.messages.is_empty() {
                            continue;
                        }
                        let extra = Map::new();
                        let prompt =
                            ChatPrompt { messages: &talk.messages, tools: &talk.tools, extra: &extra, view };
                        prompts.with(&prompt.conversations(&memory), |known| {
                            let plain = talk.messages.iter().map(|message| (message, None));
                            counted.update(|count| count + known.known_messages(&talk.tools, &extra, plain));
                        });
                        let encode = |prompts| prompt.encode(&text, &markup, &memory, prompts).unwrap();
                        let (one, alone) = (encode(&prompts), encode(&PromptCache::new()));
                        prop_assert!(one.tokens == alone.tokens, "tokens differ before {}", alone.tail);
                        prop_assert_eq!(one.tail, alone.tail);
                    }
                    Ok(())
                })
                .unwrap();
            if template == TEMPLATES[3] {
                assert_eq!(counted.get(), 0, "what it shows of a message depends on those after it");
            } else {
                reused += counted.get();
            }
        }
        assert!(reused > 100, "{reused} messages were known");
    }
}
