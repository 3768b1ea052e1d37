//! Messages that were read before: a conversation's next request repeats them byte for byte.
//!
//! Of a body's `messages`, those that an earlier request held in the same places of the same conversation are
//! compared with what is kept and not read again; only new ones are parsed. What they were read as (and what
//! was worked out of that since) comes with them. A body that this reader does not understand is left to the
//! JSON parser, which also words all errors.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use serde::de::DeserializeOwned;

use crate::conversation::KnownMessage;

/// Memory for messages; a conversation of 140,000 tokens takes about 1.7 MB.
const MAX_BYTES: usize = 96 << 20;
/// Messages are looked for by so many of their first bytes. Shorter ones are read anew.
const HEAD_BYTES: usize = 64;
/// What a message takes for each byte of its JSON: that, its text, and its text as templates see it.
const COPIES: usize = 3;
/// What a message takes besides, roughly.
const OVERHEAD: usize = 512;
/// Most that is copied of messages that are gone on with, for each byte of a body.
const MAX_COPIED: usize = 8;

/// See the module.
pub(crate) struct MessageCache {
    hasher: RandomState,
    kept: Mutex<Kept>,
    max_bytes: usize,
}

struct Kept {
    messages: LruCache<Place, Arc<Entry>>,
    bytes: usize,
}

/// Where a message is looked for. Of two with the same place, the later is kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    /// A hash of all that comes before it.
    before: u64,
    /// One of its first bytes.
    head: u64,
}

/// A message as a client wrote it, and what it made of the conversation before it.
struct Entry {
    json: Box<[u8]>,
    /// A hash of all up to and with it.
    through: u64,
    /// It left so many messages as they were: all, or all but the last.
    kept: usize,
    /// Bytes of the last one, if it went on with that.
    joined: usize,
    /// These came after them.
    added: Vec<KnownMessage>,
}

/// How messages are written. What is read in one dialect means nothing in another.
#[derive(Clone, Copy)]
pub(crate) enum Dialect {
    Chat,
    Messages,
}

/// A body in two: its messages, and its other fields.
pub(crate) struct ReadBody {
    pub messages: Vec<KnownMessage>,
    /// The body with an empty list of messages. Whether it is JSON, its parser tells.
    pub rest: Vec<u8>,
}

impl ReadBody {
    /// Its two parts, of a body that could be read so.
    pub fn parts(read: Option<Self>) -> (Option<Vec<KnownMessage>>, Option<Vec<u8>>) {
        read.map_or((None, None), |read| (Some(read.messages), Some(read.rest)))
    }
}

impl MessageCache {
    pub fn new() -> Self {
        Self::of_size(MAX_BYTES)
    }

    fn of_size(max_bytes: usize) -> Self {
        let kept = Kept { messages: LruCache::unbounded(), bytes: 0 };
        Self { hasher: RandomState::new(), kept: Mutex::new(kept), max_bytes }
    }

    /// Reads the messages of a body that is a JSON object with a list of that name. `add` puts one to those
    /// before it, of which it may change the last. `None` if the body is anything else, or `add` refuses one, or
    /// much would be copied since message after message goes on with the last.
    pub fn read<M: DeserializeOwned>(
        &self,
        dialect: Dialect,
        body: &[u8],
        mut add: impl FnMut(&mut Vec<KnownMessage>, M) -> Option<()>,
    ) -> Option<ReadBody> {
        let list = list_at(body, "messages")?;
        let (mut messages, mut before, mut at) = (Vec::new(), dialect as u64, skip_space(body, list + 1));
        let mut copied = 0;
        loop {
            let entry = match self.find(before, &body[at..]) {
                Some(entry) => {
                    messages.truncate(entry.kept);
                    messages.extend_from_slice(&entry.added);
                    entry
                }
                None => {
                    let entry = self.add(before, &body[at..], &mut messages, &mut add)?;
                    copied += entry.joined;
                    if copied > MAX_COPIED * body.len() {
                        return None;
                    }
                    entry
                }
            };
            before = entry.through;
            at = skip_space(body, at + entry.json.len());
            match body.get(at)? {
                b',' => at = skip_space(body, at + 1),
                b']' => break,
                _ => return None,
            }
        }
        Some(ReadBody { messages, rest: [&body[..=list], &body[at..]].concat() })
    }

    /// The message that `json` begins with, if it is known in this place. An object that is repeated byte for
    /// byte ends where it ended.
    fn find(&self, before: u64, json: &[u8]) -> Option<Arc<Entry>> {
        let head = self.hasher.hash_one(json.get(..HEAD_BYTES)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = kept.messages.get(&Place { before, head })?.clone();
        drop(kept);
        json.starts_with(&entry.json).then_some(entry)
    }

    /// Reads the message that `json` begins with, and keeps it.
    fn add<M: DeserializeOwned>(
        &self,
        before: u64,
        json: &[u8],
        messages: &mut Vec<KnownMessage>,
        add: impl FnOnce(&mut Vec<KnownMessage>, M) -> Option<()>,
    ) -> Option<Arc<Entry>> {
        if json.first() != Some(&b'{') {
            return None;
        }
        let mut values = serde_json::Deserializer::from_slice(json).into_iter::<M>();
        let message = values.next()?.ok()?;
        let json = &json[..values.byte_offset()];
        let (last, count) = (messages.last().cloned(), messages.len());
        add(messages, message)?;
        let gone = last.filter(|last| messages.get(count - 1).is_none_or(|now| !now.is(last)));
        let kept = if gone.is_some() { count - 1 } else { count };
        let entry = Arc::new(Entry {
            json: json.into(),
            through: self.hasher.hash_one((before, json)),
            kept,
            joined: gone.map_or(0, |last| last.bytes()),
            added: messages[kept..].to_vec(),
        });
        if let Some(head) = json.get(..HEAD_BYTES) {
            let place = Place { before, head: self.hasher.hash_one(head) };
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.keep(place, entry.clone(), self.max_bytes);
        }
        Some(entry)
    }
}

impl Kept {
    fn keep(&mut self, place: Place, entry: Arc<Entry>, max_bytes: usize) {
        self.bytes += entry.bytes();
        if let Some(old) = self.messages.put(place, entry) {
            self.bytes -= old.bytes();
        }
        while self.bytes > max_bytes {
            let Some((_, old)) = self.messages.pop_lru() else { break };
            self.bytes -= old.bytes();
        }
    }
}

impl Entry {
    fn bytes(&self) -> usize {
        COPIES * (self.json.len() + self.joined) + OVERHEAD
    }
}

/// Where the list begins that a JSON object has under this key, spelled without escapes. Only what comes before
/// it is passed over, and not checked.
fn list_at(body: &[u8], key: &str) -> Option<usize> {
    let mut at = skip_space(body, 0);
    if body.get(at)? != &b'{' {
        return None;
    }
    loop {
        at = skip_space(body, at + 1);
        if body.get(at)? != &b'"' {
            return None;
        }
        let end = skip_string(body, at)?;
        let name = &body[at + 1..end - 1];
        at = skip_space(body, end);
        if body.get(at)? != &b':' {
            return None;
        }
        at = skip_space(body, at + 1);
        if name == key.as_bytes() {
            return (body.get(at)? == &b'[').then_some(at);
        }
        at = skip_space(body, skip_value(body, at)?);
        if body.get(at)? != &b',' {
            return None;
        }
    }
}

fn skip_space(body: &[u8], at: usize) -> usize {
    let space = |byte: &&u8| matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
    at + body.get(at..).map_or(0, |rest| rest.iter().take_while(space).count())
}

/// Behind the string that begins here.
fn skip_string(body: &[u8], mut at: usize) -> Option<usize> {
    at += 1;
    loop {
        at += body.get(at..)?.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
        match body[at] {
            b'"' => return Some(at + 1),
            _ => at += 2,
        }
    }
}

/// Behind the value that begins here, if it ends.
fn skip_value(body: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0usize;
    loop {
        match body.get(at)? {
            b'"' => at = skip_string(body, at)?,
            b'{' | b'[' => {
                depth += 1;
                at += 1;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                at += 1;
            }
            _ => at += body[at..].iter().position(|byte| b",:{}[]\" \n\r\t".contains(byte))?.max(1),
        }
        if depth == 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    use serde_json::{Value, json};

    use super::*;
    use crate::conversation::{Message, Role};

    /// A cache, and how many messages were parsed.
    struct Fixture {
        cache: MessageCache,
        parsed: Cell<usize>,
    }

    impl Fixture {
        fn new(max_bytes: usize) -> Self {
            Self { cache: MessageCache::of_size(max_bytes), parsed: Cell::new(0) }
        }

        /// The texts of a body's messages and its other fields, and how many were parsed for it.
        fn read(&self, body: &str) -> Option<(Vec<String>, String, usize)> {
            self.parsed.set(0);
            // What begins with a plus goes on with the message before it.
            let add = |messages: &mut Vec<KnownMessage>, message: Value| {
                self.parsed.set(self.parsed.get() + 1);
                let text = message.get("text")?.as_str()?;
                match messages.last_mut().filter(|last| text.starts_with('+') && !last.text.is_empty()) {
                    Some(last) => last.to_mut().text.push_str(text),
                    None => messages.push(Message::new(Role::User, text).into()),
                }
                Some(())
            };
            let read = self.cache.read(Dialect::Chat, body.as_bytes(), add)?;
            let texts = read.messages.iter().map(|message| message.text.clone()).collect();
            Some((texts, String::from_utf8(read.rest).unwrap(), self.parsed.get()))
        }
    }

    fn body(texts: &[&str]) -> String {
        let messages: Vec<Value> = texts.iter().map(|text| json!({"role": "user", "text": text})).collect();
        json!({"model": "]{", "messages": messages, "n": [1, {"messages": []}]}).to_string()
    }

    #[test]
    fn of_a_longer_conversation_only_what_is_new_is_parsed() {
        let fixture = Fixture::new(1 << 20);
        let (first, second, third) = ("a".repeat(100), "\"é\n\\".repeat(40), "c".repeat(80));
        let rest = body(&[]);
        let read = |texts: &[&str]| {
            let (got, other, parsed) = fixture.read(&body(texts)).unwrap();
            assert_eq!(got, texts);
            assert_eq!(other, rest);
            parsed
        };
        assert_eq!(read(&[&first, &second]), 2);
        assert_eq!(read(&[&first, &second]), 0);
        assert_eq!(read(&[&first, &second, "short", &third]), 2);
        assert_eq!(read(&[&first, &second, "short", &third]), 1, "short ones are read anew");
        assert_eq!(read(&[&second, &first]), 2, "a place is a place in a conversation");
        assert_eq!(read(&[&first, &(second.clone() + "x")]), 1);
    }

    #[test]
    fn a_message_that_goes_on_with_the_one_before_changes_it_for_those_alone_who_send_it() {
        let fixture = Fixture::new(1 << 20);
        let (first, more, other) = ("a".repeat(100), "+".repeat(100), "b".repeat(100));
        for _ in 0..2 {
            assert_eq!(
                fixture.read(&body(&[&first, &more, &other])).unwrap().0,
                [first.clone() + &more, other.clone()]
            );
            assert_eq!(fixture.read(&body(&[&first, &other])).unwrap().0, [first.clone(), other.clone()]);
        }
        assert_eq!(fixture.read(&body(&[&first, &more, &other])).unwrap().2, 0);
    }

    #[test]
    fn a_body_whose_messages_go_on_with_one_another_over_and_over_is_left_to_the_parser() {
        let fixture = Fixture::new(1 << 20);
        let more = "+".repeat(100);
        let some = vec![more.as_str(); 10];
        assert_eq!(fixture.read(&body(&some)).unwrap().0, [more.repeat(10)]);
        assert!(fixture.read(&body(&[more.as_str(); 100])).is_none());
        let kept = fixture.cache.kept.lock().unwrap();
        let texts =
            kept.messages.iter().flat_map(|(_, entry)| &entry.added).map(|message| message.text.len());
        assert!(texts.sum::<usize>() <= kept.bytes, "what was joined is counted");
    }

    #[test]
    fn what_one_dialect_reads_another_does_not_find() {
        let cache = MessageCache::of_size(1 << 20);
        let body = body(&[&"a".repeat(100)]);
        let read = |dialect, says: &str| {
            let add = |messages: &mut Vec<KnownMessage>, _: Value| {
                messages.push(Message::new(Role::User, says).into());
                Some(())
            };
            cache.read(dialect, body.as_bytes(), add).unwrap().messages[0].text.clone()
        };
        assert_eq!(read(Dialect::Chat, "x"), "x");
        assert_eq!(read(Dialect::Messages, "y"), "y");
        assert_eq!(read(Dialect::Chat, "z"), "x");
    }

    #[test]
    fn what_is_no_list_of_messages_is_left_to_the_parser() {
        let fixture = Fixture::new(1 << 20);
        let long = "x".repeat(100);
        for body in [
            "",
            "[]",
            "{",
            "{}",
            r#"{"messages""#,
            r#"{"messages": 7}"#,
            r#"{"messages": []}"#,
            r#"{"messages": [7]}"#,
            r#"{"messages": [{"text": 7}]}"#,
            r#"{"messages": [{"text": "a"}"#,
            r#"{"messages": [{"text": "a"} {"text": "b"}]}"#,
            r#"{"messages": [{"text": "a"},]}"#,
            r#"{"messages": [{"text": "a]}"#,
            r#"{"a": ]], "messages": [{"text": "a"}]}"#,
            r#"{"a" "messages": [{"text": "a"}]}"#,
            r#"{"x": {"messages": [{"text": "a"}]}}"#,
            &format!(r#"{{"messages": [{{"text": "{long}"}}"#),
        ] {
            // Twice, as what is known is not parsed.
            assert!(fixture.read(body).is_none() && fixture.read(body).is_none(), "{body}");
        }
    }

    #[test]
    fn the_other_fields_stay_as_they_are() {
        let fixture = Fixture::new(1 << 20);
        let body = "\n{ \"a\" : -1.5e3 ,\"b\\\"\":\"}\\\"]\", \"c\":null, \"messages\" : [ {\"text\":\"x\"} , {\"text\":\"y\"} ] ,\"z\":1} ";
        let (texts, rest, _) = fixture.read(body).unwrap();
        assert_eq!(texts, ["x", "y"]);
        assert_eq!(
            serde_json::from_str::<Value>(&rest).unwrap(),
            json!({"a": -1.5e3, "b\"": "}\"]", "c": null, "messages": [], "z": 1})
        );
    }

    #[test]
    fn read_in_parts_a_body_says_what_it_says_as_a_whole() {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-z\"\\\\\\[\\]{}:, é]{0,12}".prop_map(Value::from),
        ];
        let any_value = leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-c\"]{0,3}", inner), 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        });
        let texts = prop::collection::vec("[a-b\"\\\\{}\\[\\], é]{0,80}", 1..6);
        let config = ProptestConfig { failure_persistence: None, ..Default::default() };
        let fixture = Fixture::new(1 << 20);
        TestRunner::new(config)
            .run(&(texts, any_value.clone(), any_value, any::<bool>()), |(texts, before, after, pretty)| {
                let messages: Vec<Value> =
                    texts.iter().map(|text| json!({"text": text, "x": before})).collect();
                let whole = json!({"before": before, "messages": messages, "after": after});
                let body = if pretty { format!("{whole:#}") } else { whole.to_string() };
                let (read, rest, _) = fixture.read(&body).unwrap();
                prop_assert_eq!(read, texts);
                let rest: Value = serde_json::from_str(&rest).unwrap();
                prop_assert_eq!(rest, json!({"before": before, "messages": [], "after": after}));
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn memory_is_bounded() {
        let fixture = Fixture::new(20_000);
        for number in 0..50 {
            fixture.read(&body(&[&format!("{number}").repeat(200)])).unwrap();
            let kept = fixture.cache.kept.lock().unwrap();
            assert!(kept.bytes <= 20_000);
            assert_eq!(kept.bytes, kept.messages.iter().map(|(_, entry)| entry.bytes()).sum::<usize>());
        }
        assert_eq!(fixture.read(&body(&[&"0".repeat(200)])).unwrap().2, 1);
        assert_eq!(fixture.read(&body(&[&"49".repeat(200)])).unwrap().2, 0);
    }
}
