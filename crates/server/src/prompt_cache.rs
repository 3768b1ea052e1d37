//! Rendered prompts with their tokens: a conversation's next prompt begins like its last one, and only what it
//! adds is rendered, searched for markup and encoded.
//!
//! A prompt knows the messages that it shows and where each begins, if the template shows one after the other
//! ([`rudder_text::Rendered`]): those that the next one has too, but for the last, which showed what came after it,
//! need not be rendered again.
//!
//! Prompts are found by the conversations that they rendered and compared as a whole, message by message or by
//! their text, so that none is used for another text. One is gone on from behind the last markup that both have: no token crosses markup. It then is
//! the longer conversation's prompt, and also found by the shorter one, whose next turn may be another. Only
//! where much would be lost, as where subagents part, is a prompt of its own made.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use lru::LruCache;
use rudder_text::{Tool, ToolInput, in_same_order};
use serde_json::{Map, Value};

use crate::conversation::KnownMessage;
use crate::verbatim::{Answer, Prefix};

/// Memory for prompts; one of 140,000 tokens takes about 1.2 MB, and half as much again and more where nobody else keeps its
/// messages any more.
const MAX_BYTES: usize = 128 << 20;
/// What a cut takes, roughly, and what a prompt takes besides its text and tokens.
const OVERHEAD: usize = 32;
/// What a message's text takes at most, as it was read and as the template sees it.
const COPIES: usize = 3;
/// What a conversation takes by which a prompt is found.
const KEY_BYTES: usize = 128;
/// Prompts that part so far from the known one's end have one of their own from there on.
const FORK_BYTES: usize = 16 << 10;
/// Texts are compared by as many bytes at once.
const COMPARED: usize = 1024;

/// What a placeholder in a rendered prompt stands for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Literal {
    /// Markup that a client wrote, which is text.
    Text(String),
    /// A whole answer, as it was generated.
    Answer(Answer),
}

/// A rendered prompt and its tokens.
#[derive(Debug, Clone, Default)]
pub(crate) struct KnownPrompt {
    /// With placeholders.
    pub text: String,
    /// What they stand for, each by its number.
    literals: Vec<Literal>,
    /// Its tokens, as far as it was encoded.
    pub tokens: Vec<u32>,
    /// Where it can be gone on from, in order.
    cuts: Vec<Cut>,
    /// The messages that it shows, in order; none where it is not known where each begins.
    shown: Vec<ShownMessage>,
    /// What they were shown with.
    setting: Setting,
    /// The prompt that this one parted from, to be kept as it was.
    origin: Option<Box<Self>>,
}

/// A message in a prompt.
#[derive(Debug, Clone)]
pub(crate) struct ShownMessage {
    pub message: KnownMessage,
    /// In whose stead stands what was generated.
    pub answer: Option<Answer>,
    /// Bytes of the prompt's text before it.
    pub start: usize,
}

/// What a template sees beside the messages.
#[derive(Debug, Clone, Default)]
struct Setting {
    tools: Vec<Tool>,
    extra: Map<String, Value>,
    /// What it takes, roughly.
    bytes: usize,
}

impl Setting {
    fn new(tools: &[Tool], extra: &Map<String, Value>) -> Self {
        let input = |tool: &Tool| match &tool.input {
            ToolInput::Json { schema, .. } => schema.to_string().len(),
            ToolInput::Lark(grammar) | ToolInput::Regex(grammar) => grammar.len(),
            ToolInput::Text => 0,
        };
        let tool = |tool: &Tool| OVERHEAD + tool.name.len() + tool.description.len() + input(tool);
        let extra_bytes: usize = extra.iter().map(|(name, value)| name.len() + value.to_string().len()).sum();
        // As trees, they take some times their text.
        let bytes = 4 * (tools.iter().map(tool).sum::<usize>() + extra_bytes);
        Self { tools: tools.to_vec(), extra: extra.clone(), bytes }
    }

    fn is(&self, tools: &[Tool], extra: &Map<String, Value>) -> bool {
        let alike = |(a, b): (&Tool, &Tool)| match (&a.input, &b.input) {
            (ToolInput::Json { schema: a, .. }, ToolInput::Json { schema: b, .. }) => in_same_order(a, b),
            _ => true,
        };
        let same = |(name, value)| extra.get(name).is_some_and(|other| in_same_order(value, other));
        self.tools == tools
            && self.extra == *extra
            && self.tools.iter().zip(tools).all(alike)
            && self.extra.iter().all(same)
    }
}

impl ShownMessage {
    fn shows(&self, message: &KnownMessage, answer: Option<&Answer>) -> bool {
        // Short ones are read anew in each request.
        self.answer.as_ref() == answer && (self.message.is(message) || *self.message == **message)
    }
}

/// A place right behind markup.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Cut {
    /// Bytes, tokens, and numbers of placeholders before it.
    text: usize,
    tokens: usize,
    literals: usize,
}

impl KnownPrompt {
    /// How many of a conversation's first messages need not be rendered again: those that this prompt shows alike
    /// together with what follows them. Less than all.
    pub fn known_messages<'m>(
        &self,
        tools: &[Tool],
        extra: &Map<String, Value>,
        messages: impl Iterator<Item = (&'m KnownMessage, Option<&'m Answer>)>,
    ) -> usize {
        if !self.setting.is(tools, extra) {
            return 0;
        }
        let pairs = self.shown.iter().zip(messages);
        let common = pairs.take_while(|(shown, (message, answer))| shown.shows(message, *answer)).count();
        common.saturating_sub(1)
    }

    /// The text that stands before its messages, and where the text of its first `known` messages ends, if that is
    /// known: for none at all it is not.
    pub fn head_of(&self, known: usize) -> Option<(&str, usize)> {
        let (first, next) = (self.shown.first()?, self.shown.get(known).filter(|_| known > 0)?);
        Some((&self.text[..first.start], next.start))
    }

    /// Makes this the prompt of another text, of whose first `known` bytes it is known that they are its own, and of
    /// whose others `rest` is given; keeps of its tokens those that both have. Returns the byte from which on the
    /// text is to be encoded, and the numbers of placeholders that may stand before it. `longest` is the length of
    /// the longest markup: nearer to the texts' parting a longer one might begin.
    pub fn go_on(
        &mut self,
        known: usize,
        rest: &str,
        literals: &[Literal],
        longest: usize,
    ) -> (usize, usize) {
        let common = known + common_prefix(&self.text.as_bytes()[known..], rest.as_bytes());
        let same = self.literals.iter().zip(literals).take_while(|(ours, theirs)| ours == theirs).count();
        if self.text.len() - common > FORK_BYTES {
            self.origin = Some(Box::new(self.clone()));
        }
        let holds = |cut: &Cut| cut.text + longest <= common && cut.literals <= same;
        while self.cuts.pop_if(|cut| !holds(cut)).is_some() {}
        let cut = self.cuts.last().copied().unwrap_or_default();
        self.tokens.truncate(cut.tokens);
        self.text.truncate(known);
        self.text.push_str(rest);
        self.literals.truncate(same);
        self.literals.extend_from_slice(&literals[same..]);
        (cut.text, cut.literals)
    }

    /// Notes where the messages begin that it shows, after the first `known`; nowhere, if that is not known.
    pub fn show(
        &mut self,
        known: usize,
        more: impl Iterator<Item = ShownMessage>,
        tools: &[Tool],
        extra: &Map<String, Value>,
    ) {
        self.shown.truncate(known);
        self.shown.extend(more);
        if self.shown.is_empty() {
            self.setting = Setting::default();
        } else if !self.setting.is(tools, extra) {
            self.setting = Setting::new(tools, extra);
        }
    }

    /// Notes that the prompt can be gone on from here: all before byte `text`, where markup ends, is encoded.
    pub fn cut(&mut self, text: usize, literals: usize) {
        if self.cuts.last().is_none_or(|last| last.text < text) {
            self.cuts.push(Cut { text, tokens: self.tokens.len(), literals });
        }
    }

    fn bytes(&self) -> usize {
        let literal = |literal: &Literal| match literal {
            Literal::Text(text) => OVERHEAD + text.len(),
            // Shared with who remembers answers.
            Literal::Answer(_) => OVERHEAD,
        };
        self.text.capacity()
            + self.tokens.capacity() * size_of::<u32>()
            + (self.cuts.len() + 4) * OVERHEAD
            // A message, and what the template sees of it: reasoning by two names.
            + self.shown.iter().map(|shown| OVERHEAD + COPIES * shown.message.bytes()).sum::<usize>()
            + self.setting.bytes
            + self.literals.iter().map(literal).sum::<usize>()
    }
}

/// How many bytes both begin with.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    let whole = a.chunks_exact(COMPARED).zip(b.chunks_exact(COMPARED)).take_while(|(a, b)| a == b).count();
    let start = whole * COMPARED;
    start + a[start..].iter().zip(&b[start..]).take_while(|(a, b)| a == b).count()
}

/// Prompts by the conversations that they rendered. Bounded; those not asked for longest go first.
pub(crate) struct PromptCache {
    kept: Mutex<Kept>,
    max_bytes: usize,
}

struct Kept {
    /// A prompt may be found by several.
    prompts: LruCache<Prefix, Arc<Shared>>,
    bytes: usize,
}

#[derive(Default)]
struct Shared {
    prompt: Mutex<KnownPrompt>,
    counted: Mutex<Counted>,
}

/// What is counted of a prompt; changed with [`Kept`] locked.
#[derive(Default)]
struct Counted {
    /// Conversations that it is found by.
    keys: usize,
    /// Bytes in [`Kept::bytes`]; none without a key.
    bytes: usize,
}

impl PromptCache {
    pub fn new() -> Self {
        Self::of_size(MAX_BYTES)
    }

    fn of_size(max_bytes: usize) -> Self {
        let kept = Kept { prompts: LruCache::unbounded(), bytes: 0 };
        Self { kept: Mutex::new(kept), max_bytes }
    }

    /// Has `work` make the prompt of a conversation, the last one, given as it is up to each of its messages. It
    /// is given the prompt of the longest of these that has one, or an empty one.
    pub fn with<T>(&self, conversations: &[Prefix], work: impl FnOnce(&mut KnownPrompt) -> T) -> T {
        let Some(&whole) = conversations.last() else { return work(&mut KnownPrompt::default()) };
        let found = {
            let mut kept = self.kept();
            conversations.iter().rev().find_map(|prefix| kept.prompts.get(prefix).cloned())
        };
        let known = found.unwrap_or_default();
        let mut prompt = match known.prompt.try_lock() {
            Ok(prompt) => prompt,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            // Another turn is made of it right now.
            Err(TryLockError::WouldBlock) => {
                let mut own = KnownPrompt::default();
                let outcome = work(&mut own);
                self.keep_own(whole, own);
                return outcome;
            }
        };
        let outcome = work(&mut prompt);
        match prompt.origin.take() {
            None => {
                let bytes = prompt.bytes();
                drop(prompt);
                self.keep(whole, known, bytes);
            }
            Some(origin) => {
                let parted = std::mem::replace(&mut *prompt, *origin);
                drop(prompt);
                self.keep_own(whole, parted);
            }
        }
        outcome
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the prompt of a conversation, which no other has.
    fn keep_own(&self, conversation: Prefix, prompt: KnownPrompt) {
        let bytes = prompt.bytes();
        self.keep(conversation, Arc::new(Shared { prompt: Mutex::new(prompt), ..Shared::default() }), bytes);
    }

    /// Keeps the prompt of a conversation, which takes so many bytes now.
    fn keep(&self, conversation: Prefix, prompt: Arc<Shared>, bytes: usize) {
        let mut kept = self.kept();
        {
            let mut counted = prompt.counted();
            counted.keys += 1;
            kept.bytes = kept.bytes + bytes - std::mem::replace(&mut counted.bytes, bytes);
        }
        if let Some(old) = kept.prompts.put(conversation, prompt) {
            kept.bytes -= old.lose_key();
        }
        while kept.bytes + kept.prompts.len() * KEY_BYTES > self.max_bytes {
            let Some((_, oldest)) = kept.prompts.pop_lru() else { break };
            kept.bytes -= oldest.lose_key();
        }
    }
}

impl Shared {
    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One conversation less finds it; returns the bytes that are not counted any more.
    fn lose_key(&self) -> usize {
        let mut counted = self.counted();
        counted.keys -= 1;
        if counted.keys == 0 { std::mem::take(&mut counted.bytes) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::conversation::{Message, Role, ToolCall};
    use crate::verbatim::Verbatim;

    /// A prompt of a token for each byte, with a cut behind every `>`.
    fn known(text: &str, literals: &[Literal]) -> KnownPrompt {
        let mut known = KnownPrompt::default();
        encode(&mut known, text, literals);
        known
    }

    /// Encodes the text as the last one's continuation; returns where it went on.
    fn encode(known: &mut KnownPrompt, text: &str, literals: &[Literal]) -> usize {
        let (from, mut numbers) = known.go_on(0, text, literals, 3);
        for (at, byte) in text.bytes().enumerate().skip(from) {
            known.tokens.push(byte.into());
            numbers += usize::from(byte == b'#');
            if byte == b'>' {
                known.cut(at + 1, numbers);
            }
        }
        assert_eq!(known.tokens, text.bytes().map(u32::from).collect::<Vec<_>>());
        from
    }

    #[test]
    fn a_prompt_is_gone_on_from_the_last_markup_that_both_have() {
        let mut prompt = known("<a>one<b>two<c>", &[]);
        assert_eq!(encode(&mut prompt, "<a>one<b>two<c>three", &[]), 9, "the last might have been longer");
        assert_eq!(encode(&mut prompt, "<a>one<b>two<c>three<d>", &[]), 15);
        assert_eq!(encode(&mut prompt, "<a>one<b>tw", &[]), 3);
        assert_eq!(encode(&mut prompt, "other", &[]), 0);
    }

    #[test]
    fn placeholders_that_stand_for_something_else_part_two_prompts() {
        let text = |text: &str| Literal::Text(text.into());
        let answer = |token| Literal::Answer(Answer { tokens: [token].into(), opening: "".into() });
        let mut prompt = known("<a>#<b>####<c>", &[text("x"), answer(7), answer(8)]);
        assert_eq!(encode(&mut prompt, "<a>#<b>####<c>", &[text("x"), answer(7), answer(8)]), 7);
        assert_eq!(encode(&mut prompt, "<a>#<b>####<c>", &[text("x"), answer(9), answer(8)]), 7);
        assert_eq!(encode(&mut prompt, "<a>#<b>####<c>", &[text("y"), answer(9), answer(8)]), 3);
        assert_eq!(prompt.literals, [text("y"), answer(9), answer(8)]);
    }

    #[test]
    fn texts_part_at_their_first_difference() {
        let text = "0123456789".repeat(400);
        for at in [0, 1, 1023, 1024, 1025, 3999] {
            let mut other = text.clone().into_bytes();
            other[at] = b'x';
            assert_eq!(common_prefix(text.as_bytes(), &other), at);
            assert_eq!(common_prefix(text.as_bytes(), &other[..at]), at);
        }
        assert_eq!(common_prefix(text.as_bytes(), text.as_bytes()), text.len());
    }

    /// Has the cache make the prompt of the last conversation; returns where it went on.
    fn ask(cache: &PromptCache, conversations: &[Prefix], text: &str) -> usize {
        cache.with(conversations, |known| encode(known, text, &[]))
    }

    fn conversation(number: u64) -> Prefix {
        static MEMORY: LazyLock<Verbatim> = LazyLock::new(Verbatim::new);
        MEMORY.after(Prefix::default(), number)
    }

    #[test]
    fn a_conversation_goes_on_from_its_last_prompt_and_so_does_another_that_began_alike() {
        let cache = PromptCache::of_size(1 << 20);
        let [first, second, other] = [1, 2, 3].map(conversation);
        let base = "<a>".to_owned() + &"x".repeat(1000) + "<b>yyy";
        assert_eq!(ask(&cache, &[first], &base), 0);
        let base = base + "<c>zzz";
        assert_eq!(ask(&cache, &[first, second], &(base.clone() + "second")), 1006);
        assert_eq!(ask(&cache, &[first, other], &(base.clone() + "other")), 1012);
        assert_eq!(ask(&cache, &[first, second], &(base + "second")), 1012);
    }

    #[test]
    fn conversations_that_part_have_prompts_of_their_own() {
        let cache = PromptCache::of_size(1 << 20);
        let [first, second, other] = [1, 2, 3].map(conversation);
        let base = "<a>".to_owned() + &"x".repeat(1000) + "<b>yyy";
        let [long, longer] = ["2", "3"].map(|text| base.clone() + &text.repeat(2 * FORK_BYTES) + "<c>...");
        ask(&cache, &[first], &base);
        assert_eq!(ask(&cache, &[first, second], &long), 1006);
        assert_eq!(ask(&cache, &[first, other], &longer), 1006);
        assert_eq!(ask(&cache, &[first, second], &long), long.len() - 3, "it is as it was");
        assert_eq!(ask(&cache, &[first, other], &longer), longer.len() - 3);
    }

    #[test]
    fn a_prompt_in_use_is_waited_for_by_nobody() {
        let cache = PromptCache::of_size(1 << 20);
        let [first, second] = [1, 2].map(conversation);
        ask(&cache, &[first], "<a>xxx");
        cache.with(&[first], |_| assert_eq!(ask(&cache, &[first, second], "<a>xxx<b>"), 0));
        assert_eq!(ask(&cache, &[first, second], "<a>xxx<b>yyy"), 3);
    }

    fn shown(message: Message) -> ShownMessage {
        ShownMessage { message: message.into(), answer: None, start: 0 }
    }

    #[test]
    fn messages_count_with_what_their_template_does_not_print() {
        let long = || "x".repeat(50_000);
        let message = || Message::new(Role::Assistant, "x");
        let call = |id: String| ToolCall { id, name: "f".into(), input: "{}".into(), custom: false };
        for (number, message) in [
            Message { reasoning: Some(long()), ..message() },
            Message { name: Some(long()), ..message() },
            Message { call_id: Some(long()), ..message() },
            Message { calls: vec![call(long())], ..message() },
        ]
        .into_iter()
        .enumerate()
        {
            let cache = PromptCache::of_size(400_000);
            for conversation in (0..50).map(|other| self::conversation(100 * number as u64 + other)) {
                cache.with(&[conversation], |known| {
                    encode(known, "<a>x", &[]);
                    known.show(0, std::iter::once(shown(message.clone())), &[], &Map::new());
                });
            }
            assert!((1..=8).contains(&cache.kept().prompts.len()), "case {number}");
        }
    }

    #[test]
    fn schemas_whose_members_stand_in_another_order_are_shown_anew() {
        let tools = |schema: &str| {
            let schema = serde_json::from_str(schema).unwrap();
            let input = ToolInput::Json { schema, strict: false };
            [Tool { name: "f".into(), description: String::new(), input }]
        };
        let [one, other] = [r#"{"a": {}, "b": {}}"#, r#"{"b": {}, "a": {}}"#].map(tools);
        let messages = ["hi", "ho"].map(|text| KnownMessage::from(Message::new(Role::User, text)));
        let mut known = KnownPrompt::default();
        let all = || messages.iter().map(|message| (message, None));
        let shown = messages.iter().map(|message| shown((**message).clone()));
        known.show(0, shown, &one, &Map::new());
        let counts = [&one, &other].map(|tools| known.known_messages(tools, &Map::new(), all()));
        assert_eq!(counts, [1, 0]);
    }

    #[test]
    fn memory_is_bounded_and_what_was_not_asked_for_longest_goes() {
        let cache = PromptCache::of_size(100_000);
        let counts = || {
            let kept = cache.kept();
            let mut seen: Vec<&Arc<Shared>> = Vec::new();
            for (_, shared) in &kept.prompts {
                if !seen.iter().any(|one| Arc::ptr_eq(one, shared)) {
                    seen.push(shared);
                }
            }
            assert!(kept.bytes <= 100_000);
            let bytes = |shared: &&Arc<Shared>| shared.prompt.lock().unwrap().bytes();
            assert_eq!(kept.bytes, seen.iter().map(bytes).sum::<usize>());
            kept.prompts.len()
        };
        let text = "x".repeat(1000) + "<a>xxx";
        for number in 0..50 {
            ask(&cache, &[conversation(number)], &text);
            counts();
        }
        for number in 50..2000 {
            ask(&cache, &[conversation(49), conversation(number)], &text);
            assert!(counts() < 100_000 / KEY_BYTES);
        }
        assert_eq!(ask(&cache, &[conversation(0)], &text), 0);
        assert_eq!(ask(&cache, &[conversation(49)], &text), 1003);
    }
}
