//! A conversation and what is wanted of its next turn, in no dialect's terms.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Instant;

use rudder_engine::SamplingParams;
use rudder_text::{TemplateValue, Tool, ToolChoice};
use serde_json::{Map, Value};

use crate::session::Origin;
use crate::urgency::Urgency;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Rules for the conversation, from a `system` or `developer`; may stand anywhere.
    System,
    /// The person or the program that asks.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name that templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message. All that a model said in one go is one message: reasoning, text and calls.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; a tool's result.
    pub text: String,
    /// An assistant's reasoning before it.
    pub reasoning: Option<String>,
    /// Tools that an assistant called after it.
    pub calls: Vec<ToolCall>,
    /// The call that a tool's result answers.
    pub call_id: Option<String>,
    /// The speaker's name, or the tool's.
    pub name: Option<String>,
}

impl Message {
    /// A message of text alone.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self { role, text: text.into(), reasoning: None, calls: Vec::new(), call_id: None, name: None }
    }

    /// Bytes of what it says, names and ids included.
    pub(crate) fn bytes(&self) -> usize {
        let call = |call: &ToolCall| call.id.len() + call.name.len() + call.input.len();
        let parts = [&self.reasoning, &self.call_id, &self.name].into_iter().flatten().map(String::len);
        self.text.len() + parts.sum::<usize>() + self.calls.iter().map(call).sum::<usize>()
    }

    /// A hash with a key of this process, the same however a client spells the message back. Reasoning does
    /// not count: many clients drop it.
    pub(crate) fn digest(&self) -> u64 {
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        let mut hasher = KEY.build_hasher();
        (self.role, self.text.trim(), &self.call_id).hash(&mut hasher);
        for ToolCall { id, name, input, .. } in &self.calls {
            (id, name, canonical(input)).hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// A message with what was worked out of it: in each turn of its conversation it comes again. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KnownMessage(Arc<Known>);

#[derive(Debug, Clone)]
struct Known {
    message: Message,
    digest: OnceLock<u64>,
    shown: OnceLock<TemplateValue>,
}

impl From<Message> for KnownMessage {
    fn from(message: Message) -> Self {
        Self(Arc::new(Known { message, digest: OnceLock::new(), shown: OnceLock::new() }))
    }
}

impl Deref for KnownMessage {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.0.message
    }
}

impl KnownMessage {
    /// The message, to be changed: what was worked out of it is forgotten. Other holders keep theirs.
    pub(crate) fn to_mut(&mut self) -> &mut Message {
        let known = Arc::make_mut(&mut self.0);
        (known.digest, known.shown) = (OnceLock::new(), OnceLock::new());
        &mut known.message
    }

    /// Whether both are the same one, not only equal.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// See [`Message::digest`].
    pub(crate) fn digest(&self) -> u64 {
        *self.0.digest.get_or_init(|| self.0.message.digest())
    }

    /// The message as templates see it, if that was kept. A process has one model, and so one way to show it.
    pub(crate) fn shown(&self) -> Option<TemplateValue> {
        self.0.shown.get().cloned()
    }

    /// Keeps the message as templates see it.
    pub(crate) fn keep_shown(&self, shown: TemplateValue) {
        // Two turns that show it at once make the same of it.
        let _ = self.0.shown.set(shown);
    }
}

/// What stands in a tool's result for what no model here can see. An agent that has looked at a picture must be able
/// to go on.
pub(crate) fn left_out(kind: &str) -> String {
    format!("[{kind} left out: this model reads text only]")
}

/// The same for a part of this type, behind the text before it; `None` where the type is none of those known.
pub(crate) fn part_left_out(part_type: &str, before: &str) -> Option<String> {
    let kind = match part_type {
        "image" | "image_url" | "input_image" | "computer_screenshot" => "image",
        "file" | "input_file" => "file",
        "input_audio" => "audio",
        _ => return None,
    };
    let gap = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    Some(format!("{gap}{}", left_out(kind)))
}

/// A tool call that a model made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Its id; those we give begin with `call_`.
    pub id: String,
    /// The tool.
    pub name: String,
    /// A JSON object's text as it was generated; a custom tool's text.
    pub input: String,
    /// Whether the tool is a custom one, which takes text.
    pub custom: bool,
}

/// Where calls stand, by their ids: of those with one id the first that the last message with any has.
#[derive(Debug, Default)]
pub(crate) struct CallPlaces {
    places: HashMap<String, CallPlace>,
}

/// Where a call stands: the message's place, and the call's in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallPlace {
    pub message: usize,
    pub call: usize,
}

impl CallPlaces {
    /// Notes a message's call, after all that stand before it.
    pub fn note(&mut self, id: &str, place: CallPlace) {
        let known = self.places.entry(id.to_owned()).or_insert(place);
        if known.message != place.message {
            *known = place;
        }
    }

    /// Notes the calls of a message, after all that stand before it.
    pub fn note_all(&mut self, message: usize, calls: &[ToolCall]) {
        for (call, ToolCall { id, .. }) in calls.iter().enumerate() {
            self.note(id, CallPlace { message, call });
        }
    }

    pub fn find(&self, id: &str) -> Option<CallPlace> {
        self.places.get(id).copied()
    }
}

/// A call's input in one spelling: clients parse JSON and write it anew.
fn canonical(input: &str) -> String {
    match serde_json::from_str::<Value>(input) {
        Ok(mut value) => {
            value.sort_all_objects();
            value.to_string()
        }
        Err(_) => input.to_owned(),
    }
}

/// What is wanted: the next turn of a conversation.
#[derive(Debug, Clone)]
pub struct Turn {
    /// What was said so far.
    pub messages: Vec<KnownMessage>,
    /// Tools that the model is told of.
    pub tools: Vec<Tool>,
    /// Whether it may, must or must not call them.
    pub tool_choice: ToolChoice,
    /// Of `tools`, those it may call in this turn; `None`: all.
    pub allowed_tools: Option<HashSet<String>>,
    /// Tools as calls are held to them, in place of the allowed ones; for forced calls.
    pub(crate) held_tools: Option<Vec<Tool>>,
    /// Whether it may make several calls.
    pub parallel_tool_calls: bool,
    /// What the answer's text is held to.
    pub answer: AnswerFormat,
    /// Further variables of the chat template.
    pub template_args: Map<String, Value>,
    /// Choices. Choice `i` draws with `sampling.seed + i`.
    pub n: usize,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Most tokens of a choice; `None` is the rest of the context, 0 only reads the prompt.
    pub max_tokens: Option<usize>,
    /// Most tokens that a choice may reason, where the model marks its reasoning by tokens.
    pub reasoning_budget: Option<usize>,
    /// Text is cut before the first of these, and its choice ends there.
    pub stop: Arc<[String]>,
    /// Tokens that end a choice, besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Go on past the model's own stop tokens.
    pub ignore_eos: bool,
    /// What the answer is expected to be, or empty.
    pub prediction: String,
    /// Report the ids of generated tokens.
    pub token_ids: bool,
    /// Whose it is.
    pub origin: Origin,
    /// How soon it is wanted.
    pub urgency: Urgency,
    /// When the request came in; times are measured from here.
    pub arrived: Instant,
}

impl Turn {
    /// The next turn of a conversation, without tools, with default sampling.
    pub fn new(messages: impl IntoIterator<Item = impl Into<KnownMessage>>) -> Self {
        Self {
            messages: messages.into_iter().map(Into::into).collect(),
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            allowed_tools: None,
            held_tools: None,
            parallel_tool_calls: true,
            answer: AnswerFormat::Text,
            template_args: Map::new(),
            n: 1,
            sampling: SamplingParams::default(),
            max_tokens: None,
            reasoning_budget: None,
            stop: Arc::from([]),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            prediction: String::new(),
            token_ids: false,
            origin: Origin::default(),
            urgency: Urgency::default(),
            arrived: Instant::now(),
        }
    }
}

/// What an answer's text is held to while it is generated.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum AnswerFormat {
    /// Nothing.
    #[default]
    Text,
    /// A JSON object.
    JsonObject,
    /// A value of this JSON schema.
    JsonSchema(Value),
    /// A regular expression, as a whole.
    Regex(String),
    /// A grammar in Lark's syntax.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// A piece of an answer, as it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// More of the reasoning.
    Reasoning(String),
    /// More of the text.
    Text(String),
    /// A call begins; pieces up to [`Piece::CallEnd`] are its.
    CallBegin {
        /// Its id.
        id: String,
        /// The tool.
        name: String,
        /// Whether the tool is a custom one.
        custom: bool,
    },
    /// More of the call's input: JSON text, or a custom tool's text.
    CallInput(String),
    /// The call is whole. A call whose answer was cut short lacks this.
    CallEnd,
}
