//! From a client's messages or text to prompt tokens.
//!
//! What a client writes must not become the model's own markup: a file that contains
//! `<|im_start|>` is text. So markup in messages is replaced by placeholders before the template
//! is rendered, and stretches that hold one are encoded as plain text afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aho_corasick::{AhoCorasick, MatchKind};
use rudder_text::{TemplateValue, Text, TextError, Tool, ToolInput};
use serde_json::{Map, Value, json};

use crate::conversation::{KnownMessage, Message, Role, ToolCall};
use crate::openai::ApiError;
use crate::prompt_cache::{KnownPrompt, Literal, PromptCache};
use crate::verbatim::{Prefix, Verbatim};

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
}

/// A rendered and tokenized conversation, up to where the assistant begins to speak.
pub(crate) struct EncodedPrompt {
    pub tokens: Arc<[u32]>,
    /// The end of the rendered text: what the assistant's answer continues.
    pub tail: String,
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
        prompts.with(&conversations, |known| {
            if answers.iter().any(Option::is_some) {
                match self.encode_with(&answers, text, markup, known) {
                    // A template may want to see the calls that a result answers.
                    Ok(None) | Err(TextError::Template(_)) => {}
                    Ok(Some(encoded)) => return Ok(encoded),
                    Err(error) => return Err(error),
                }
            }
            let plain = self.encode_with(&[], text, markup, known)?;
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

    /// For each message, the tokens that it was generated as.
    fn remembered(&self, conversations: &[Prefix], memory: &Verbatim) -> Vec<Option<Arc<[u32]>>> {
        let said = |message: &KnownMessage| message.role == Role::Assistant;
        let answers = self.messages.iter().zip(conversations);
        answers.map(|(message, &prefix)| said(message).then(|| memory.find(prefix)).flatten()).collect()
    }

    /// `None` if the template does not place an answer where a generated one stands.
    fn encode_with(
        &self,
        answers: &[Option<Arc<[u32]>>],
        text: &Text,
        markup: &Markup,
        known: &mut KnownPrompt,
    ) -> Result<Option<EncodedPrompt>, TextError> {
        let begun = Instant::now();
        let mut literals = Literals::default();
        // Before the messages: so their placeholders have the same numbers in every turn.
        let tools = (!self.tools.is_empty()).then(|| {
            let mut tools = self.tools.iter().map(template_tool).collect();
            literals.hide(&mut tools, markup);
            TemplateValue::from(&tools)
        });
        let messages = self.messages.iter().enumerate().map(|(index, message)| {
            match answers.get(index).and_then(Option::as_ref) {
                Some(tokens) => literals.verbatim(tokens.clone()),
                None => literals.shown(message, markup),
            }
        });
        let messages: Vec<_> = messages.collect();
        let mut rendered = text.render_messages(&messages, tools.as_ref(), true, self.extra)?;
        if answers.iter().any(Option::is_some) {
            let opening = self.opening(text)?;
            match literals.open_answers(&rendered, &opening) {
                Some(opened) => rendered = opened,
                None => return Ok(None),
            }
        }
        let rendering = begun.elapsed();
        literals.encode(&rendered, text, markup, known)?;
        let tail = rendered.char_indices().rev().nth(TAIL_CHARS).map_or(0, |(at, _)| at);
        Ok(Some(EncodedPrompt {
            tokens: Arc::from(&known.tokens[..]),
            tail: rendered.split_off(tail),
            rendering,
            tokenizing: begun.elapsed() - rendering,
        }))
    }

    /// What the template writes before an answer that is to be generated.
    fn opening(&self, text: &Text) -> Result<String, TextError> {
        let messages = json!([{"role": "user", "content": "x"}]);
        let open = text.render_chat(&messages, None, true, self.extra)?;
        let closed = text.render_chat(&messages, None, false, self.extra)?;
        Ok(open.strip_prefix(&closed).unwrap_or_default().to_owned())
    }
}

/// A tool in the shape that templates expect, OpenAI's.
fn template_tool(tool: &Tool) -> Value {
    let (description, parameters) = match &tool.input {
        ToolInput::Json { schema, .. } => (tool.description.clone(), schema.clone()),
        ToolInput::Text => (custom_description(tool, ""), json!({"type": "object", "properties": {}})),
        ToolInput::Lark(grammar) | ToolInput::Regex(grammar) => {
            let grammar = format!(" TEXT must match this grammar:\n{grammar}");
            (custom_description(tool, &grammar), json!({"type": "object", "properties": {}}))
        }
    };
    let function = json!({"name": tool.name, "description": description, "parameters": parameters});
    json!({"type": "function", "function": function})
}

/// How a model is told of a custom tool, for which no template has words.
fn custom_description(tool: &Tool, grammar: &str) -> String {
    format!(
        "{}\nThis tool takes plain text, not JSON. Call it by writing exactly:\n\
         <custom_tool_call name=\"{}\">\nTEXT\n</custom_tool_call>{grammar}",
        tool.description, tool.name
    )
}

/// What placeholders stand for, each by its number.
#[derive(Default)]
struct Literals {
    hidden: Vec<Literal>,
}

impl Literals {
    /// A message in the shape that templates expect: content as one string, arguments as objects.
    fn message(&mut self, message: &Message, markup: &Markup) -> Value {
        let mut fields = Map::new();
        let mut content = message.text.clone();
        let (custom, calls): (Vec<_>, Vec<_>) = message.calls.iter().partition(|call| call.custom);
        for ToolCall { name, input, .. } in custom {
            let gap = if content.is_empty() { "" } else { "\n" };
            content
                .push_str(&format!("{gap}<custom_tool_call name=\"{name}\">\n{input}\n</custom_tool_call>"));
        }
        // gpt-oss's template reads reasoning under this name, and refuses it where text and calls came after it.
        let thinking = message.reasoning.clone().filter(|_| content.is_empty() || calls.is_empty());
        fields.insert("content".into(), content.into());
        for (key, value) in [
            ("name", &message.name),
            ("reasoning_content", &message.reasoning),
            ("thinking", &thinking),
            ("tool_call_id", &message.call_id),
        ] {
            if let Some(value) = value {
                fields.insert(key.into(), value.as_str().into());
            }
        }
        if !calls.is_empty() {
            fields.insert("tool_calls".into(), calls.into_iter().map(template_call).collect());
        }
        let mut message_value = Value::Object(fields);
        self.hide(&mut message_value, markup);
        message_value["role"] = message.role.as_str().into();
        message_value
    }

    /// The same, ready for the template; kept with the message unless it holds placeholders, whose numbers
    /// go by what came before.
    fn shown(&mut self, message: &KnownMessage, markup: &Markup) -> TemplateValue {
        if let Some(shown) = message.shown() {
            return shown;
        }
        let before = self.hidden.len();
        let shown = TemplateValue::from(&self.message(message, markup));
        if self.hidden.len() == before {
            message.keep_shown(shown.clone());
        }
        shown
    }

    /// An answer as it was generated: the template sees a placeholder where the text would be.
    fn verbatim(&mut self, tokens: Arc<[u32]>) -> TemplateValue {
        let content = self.placeholder(Literal::Answer(tokens));
        TemplateValue::from(&json!({"role": "assistant", "content": content}))
    }

    fn placeholder(&mut self, literal: Literal) -> String {
        self.hidden.push(literal);
        format!("{OPEN}{}{CLOSE}", self.hidden.len() - 1)
    }

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
            out.push_str(&self.placeholder(Literal::Text(string[span.clone()].to_owned())));
            end = span.end;
        }
        out.push_str(&string[end..]);
        Some(out)
    }

    /// Puts before every answer exactly what stood before it when it was generated: a template may
    /// open the answer to come otherwise than past ones (with a mark for reasoning, say). `None` if
    /// an answer is not found where `opening` begins a message.
    fn open_answers(&self, rendered: &str, opening: &str) -> Option<String> {
        // A message begins with the first line of its opening, whatever follows.
        let begin = &opening[..opening.find('\n').map_or(opening.len(), |at| at + 1)];
        let (mut out, mut done) = (String::with_capacity(rendered.len()), 0);
        let mut found = 0;
        for (at, _) in rendered.match_indices(OPEN) {
            let Some((number, _)) = rendered[at + OPEN.len_utf8()..].split_once(CLOSE) else { continue };
            let literal = number.parse::<usize>().ok().and_then(|number| self.hidden.get(number));
            if !matches!(literal, Some(Literal::Answer(_))) {
                continue;
            }
            let begin_at = done + rendered[done..at].rfind(begin)?;
            let between = &rendered[begin_at + begin.len()..at];
            if !between.replace("<think>", "").replace("</think>", "").trim().is_empty() {
                return None;
            }
            out.push_str(&rendered[done..begin_at]);
            out.push_str(opening);
            done = at;
            found += 1;
        }
        out.push_str(&rendered[done..]);
        let wanted = self.hidden.iter().filter(|literal| matches!(literal, Literal::Answer(_))).count();
        (found == wanted && !begin.is_empty()).then_some(out)
    }

    /// Encodes rendered text: its markup is the template's own, that behind placeholders is text. What
    /// `known` has of it already stays; in the end `known` has it all.
    fn encode(
        &self,
        rendered: &str,
        text: &Text,
        markup: &Markup,
        known: &mut KnownPrompt,
    ) -> Result<(), TextError> {
        // Markup cuts the text into stretches that are tokenized each by itself, so a stretch with
        // a placeholder can be encoded apart from its neighbours without changing them.
        let (start, mut numbers) = known.go_on(rendered, &self.hidden, markup.longest);
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
                    tokens.extend_from_slice(answer);
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

/// A call in the shape that templates expect: arguments as an object where they are one.
fn template_call(call: &ToolCall) -> Value {
    let arguments = match serde_json::from_str::<Map<String, Value>>(&call.input) {
        Ok(arguments) => Value::Object(arguments),
        Err(_) => call.input.as_str().into(),
    };
    json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}})
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn strings_are_hidden_however_deep_they_lie() {
        let mut literals = Literals::default();
        let mut value = json!([{"function": {"arguments": {"text": "<s>"}}}]);
        literals.hide(&mut value, &markup());
        assert!(!value.to_string().contains("<s>"));
        assert!(matches!(&literals.hidden[..], [Literal::Text(text)] if text == "<s>"));
    }

    #[test]
    fn reasoning_has_both_names_that_templates_read_but_beside_text_and_calls() {
        let call = ToolCall { id: "call_1".into(), name: "f".into(), input: "{}".into(), custom: false };
        for (text, calls, both) in
            [("", vec![call.clone()], true), ("so", vec![], true), ("so", vec![call], false)]
        {
            let reasoning = Some("hm".to_owned());
            let message = Message { reasoning, calls, ..Message::new(Role::Assistant, text) };
            let value = Literals::default().message(&message, &markup());
            assert_eq!((&value["reasoning_content"], value.get("thinking").is_some()), (&json!("hm"), both));
        }
    }

    #[test]
    fn an_answer_follows_what_opened_it_when_it_was_generated() {
        let mut literals = Literals::default();
        let answer = literals.placeholder(Literal::Answer(Arc::from([ANSWER])));
        let opening = "<s>assistant\n<think>\n";
        for between in ["", "<think>\n\n</think>\n\n", "<think>\n"] {
            let rendered = format!("<s>user\nhi\n<s>assistant\n{between}{answer}\n");
            let opened = literals.open_answers(&rendered, opening).expect(between);
            assert_eq!(restored(&literals, &opened), format!("<s>user\nhi\n{opening}#{ANSWER}#\n"));
        }
        for elsewhere in ["<s>user\n", "<s>assistant\nhi<s>user\n", ""] {
            assert!(literals.open_answers(&format!("{elsewhere}{answer}"), opening).is_none());
        }
        assert!(literals.open_answers("<s>assistant\n", opening).is_none(), "the template left it out");
    }

    #[test]
    fn custom_calls_stand_in_the_text_as_they_are_written() {
        let call =
            |custom, input: &str| ToolCall { id: "c".into(), name: "f".into(), input: input.into(), custom };
        let calls = vec![call(true, "a\nb"), call(false, r#"{"x":1}"#), call(false, "no json")];
        let message = Message { calls, ..Message::new(Role::Assistant, "so:") };
        let value = Literals::default().message(&message, &markup());
        assert_eq!(value["content"], "so:\n<custom_tool_call name=\"f\">\na\nb\n</custom_tool_call>");
        assert_eq!(value["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(value["tool_calls"][1]["function"]["arguments"], "no json");
    }
}
