//! The response object, its parts, and what of it outlives its run.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::items::{self, Reading};
use super::tools::CallNames;
use crate::generate::{Failed, Totals};
use crate::openai::ApiError;
use crate::timing::Timing;

/// Where a response stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl Status {
    /// Whether nothing more will come.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::InProgress)
    }
}

/// Why a response is incomplete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reason {
    /// The token limit or the context's end was reached.
    MaxOutputTokens,
    /// A `response.steer` ended it; its successor goes on.
    Steered,
    /// A `response.interrupt` ended it.
    Interrupted,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IncompleteDetails {
    pub reason: Reason,
}

/// Why a response failed: OpenAI's code and words for the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub code: String,
    pub message: String,
}

impl Failure {
    /// As who waits for the whole response is told.
    pub fn error(&self) -> ApiError {
        let expired = ApiError::from(Failed::Expired);
        match expired.code == Some(self.code.as_str()) {
            true => expired,
            false => ApiError::internal(self.message.as_str()),
        }
    }
}

/// Token counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    pub input_tokens: usize,
    pub input_tokens_details: InputDetails,
    pub output_tokens: usize,
    pub output_tokens_details: OutputDetails,
    pub total_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InputDetails {
    /// Found in the prefix cache.
    pub cached_tokens: usize,
    /// Computed, and in the cache from now on.
    pub cache_write_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OutputDetails {
    pub reasoning_tokens: usize,
}

impl From<Totals> for Usage {
    fn from(totals: Totals) -> Self {
        Self {
            input_tokens: totals.prompt_tokens,
            input_tokens_details: InputDetails {
                cached_tokens: totals.cached_tokens,
                cache_write_tokens: totals.prompt_tokens.saturating_sub(totals.cached_tokens),
            },
            output_tokens: totals.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: totals.reasoning_tokens },
            total_tokens: totals.prompt_tokens + totals.completion_tokens,
        }
    }
}

/// The request's settings as every response object repeats them. Defaults are filled in.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct Echo {
    pub model: String,
    pub instructions: Option<String>,
    pub tools: Vec<Value>,
    pub tool_choice: Value,
    pub parallel_tool_calls: bool,
    pub text: Value,
    pub reasoning: Value,
    pub temperature: f32,
    pub top_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub top_logprobs: u32,
    pub max_output_tokens: Option<usize>,
    pub max_tool_calls: Option<i64>,
    pub truncation: &'static str,
    pub store: bool,
    pub background: bool,
    pub service_tier: &'static str,
    pub metadata: Map<String, Value>,
    pub prompt_cache_key: Option<String>,
    pub safety_identifier: Option<String>,
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversation: Option<ConversationRef>,
}

/// The conversation that a response belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConversationRef {
    pub id: String,
}

/// A response, as GET answers it and as the events carry it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Response {
    pub id: String,
    pub object: &'static str,
    /// Unix times in seconds.
    pub created_at: u64,
    pub completed_at: Option<u64>,
    pub status: Status,
    pub incomplete_details: Option<IncompleteDetails>,
    pub error: Option<Failure>,
    pub previous_response_id: Option<String>,
    /// Finished output items.
    pub output: Vec<Value>,
    pub usage: Option<Usage>,
    /// Where its time went; once it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rudder: Option<Timing>,
    #[serde(flatten, serialize_with = "by_reference")]
    pub echo: Arc<Echo>,
}

fn by_reference<S: Serializer>(echo: &Arc<Echo>, serializer: S) -> Result<S::Ok, S::Error> {
    echo.as_ref().serialize(serializer)
}

/// A response as it is kept: what GET answers, and what it was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The response object.
    pub response: Value,
    /// Its own input items, without those of the responses before it.
    pub input: Vec<Value>,
}

/// What a response added to its conversation, and what came before.
#[derive(Debug)]
pub(crate) struct Link {
    pub previous: Option<Arc<Link>>,
    pub input: Arc<[Value]>,
    pub output: Vec<Value>,
    /// The name of the session that it is part of.
    pub session: Option<Arc<str>>,
    /// About the bytes of `input` and `output`, and of the messages that are made of them.
    pub bytes: usize,
    /// The same of it and of all links before it.
    pub chain_bytes: usize,
    read: OnceLock<ReadLink>,
}

/// A conversation as it was read up to some link, and the names of tools that it was read with.
#[derive(Debug)]
struct ReadLink {
    names: CallNames,
    conversation: items::Conversation,
}

/// Texts are kept in items, in messages, and as templates see them.
const COPIES: usize = 3;

impl Link {
    pub fn new(
        previous: Option<Arc<Link>>,
        input: impl Into<Arc<[Value]>>,
        output: Vec<Value>,
        session: Option<Arc<str>>,
    ) -> Self {
        let input = input.into();
        let bytes = COPIES * input.iter().chain(&output).map(weight).sum::<usize>();
        let chain_bytes = bytes + previous.as_ref().map_or(0, |previous| previous.chain_bytes);
        Self { previous, input, output, session, bytes, chain_bytes, read: OnceLock::new() }
    }

    /// The conversation up to and with this response's output. What was read of it before is not read again.
    pub fn conversation(self: &Arc<Self>, reading: &Reading<'_>) -> Result<items::Conversation, ApiError> {
        let known = |link: &Self| {
            let read = link.read.get().filter(|read| read.names == *reading.names)?;
            Some(read.conversation.clone())
        };
        let (mut links, mut next) = (Vec::new(), Some(self));
        let mut conversation = items::Conversation::default();
        while let Some(link) = next {
            if let Some(read) = known(link) {
                conversation = read;
                break;
            }
            links.push(link);
            next = link.previous.as_ref();
        }
        // Whatever their numbers, these items are not the request's own.
        let items = links.iter().rev().flat_map(|link| link.input.iter().chain(&link.output));
        reading.go_on(&mut conversation, 0, items)?;
        if !links.is_empty() {
            let read = ReadLink { names: reading.names.clone(), conversation: conversation.clone() };
            // Read with other names before, it is read anew each time.
            let _ = self.read.set(read);
        }
        Ok(conversation)
    }

    /// All items up to and with this response's output, oldest first.
    pub fn items<'a>(self: &'a Arc<Self>, out: &mut Vec<&'a Value>) {
        let mut links = vec![self];
        while let Some(previous) = links.last().and_then(|link| link.previous.as_ref()) {
            links.push(previous);
        }
        out.extend(links.iter().rev().flat_map(|link| link.input.iter().chain(&link.output)));
    }
}

/// Chains grow long: they are taken apart one by one, not one within the other.
impl Drop for Link {
    fn drop(&mut self) {
        let mut next = self.previous.take();
        while let Some(link) = next {
            next = Arc::into_inner(link).and_then(|mut link| link.previous.take());
        }
    }
}

/// About a value's size in memory, in bytes.
pub(crate) fn weight(value: &Value) -> usize {
    const NODE: usize = 32;
    match value {
        Value::String(text) => NODE + text.len(),
        Value::Array(items) => NODE + items.iter().map(weight).sum::<usize>(),
        Value::Object(fields) => {
            NODE + fields.iter().map(|(key, value)| NODE + key.len() + weight(value)).sum::<usize>()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => NODE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_chain_gives_its_items_oldest_first() {
        let first = Arc::new(Link::new(None, vec![json!(1)], vec![json!(2)], None));
        let second = Arc::new(Link::new(Some(first), vec![json!(3)], vec![json!(4)], None));
        let mut items = Vec::new();
        second.items(&mut items);
        assert_eq!(items, [&json!(1), &json!(2), &json!(3), &json!(4)]);
    }

    #[test]
    fn a_long_chain_is_dropped_without_recursion() {
        let mut last = None;
        for _ in 0..200_000 {
            last = Some(Arc::new(Link::new(last, Vec::new(), Vec::new(), None)));
        }
        drop(last);
    }
}
