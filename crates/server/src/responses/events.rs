//! From pieces of an answer to typed events, and to the response that they add up to.
//!
//! ```text
//! created, in_progress,
//! for each item: output_item.added, (content_part.added, deltas, done, content_part.done), output_item.done,
//! completed | incomplete | failed
//! ```
//!
//! Items follow one another; at most one is open. The final response is the fold of the same items,
//! so a stream and its end never differ.

use std::sync::Arc;

use axum::body::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use super::seal::Seal;
use super::tools::CallNames;
use super::types::{Failure, IncompleteDetails, Reason, Response, Status, Usage};
use crate::admission::random_id;
use crate::conversation::Piece;
use crate::timing::Timing;
use crate::unix_now;

/// One event, serialised.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// Its `type`.
    pub kind: &'static str,
    /// The whole event.
    pub json: Bytes,
}

/// How a response ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The model ended by itself, or waits for its tools.
    Completed,
    /// It was ended; what was said until then stays.
    Incomplete(Reason),
    /// It was ended; an unfinished item is dropped.
    Interrupted,
    /// It was ended for good; an unfinished item is dropped.
    Cancelled,
    /// It failed; an unfinished item is dropped.
    Failed(Failure),
}

/// What the events of a response need besides its pieces.
pub(crate) struct Dressing {
    /// The WebSocket lane, which every event names.
    pub stream_id: Option<String>,
    /// Names of tools as their clients know them.
    pub names: Arc<CallNames>,
    /// Seals reasoning, if the client is to get it sealed.
    pub seal: Option<Arc<Seal>>,
}

/// Events in order.
#[derive(Default)]
struct Log {
    list: Vec<Event>,
    /// The sequence number of the first in the list.
    first: usize,
}

impl Log {
    /// The sequence number of the next one.
    fn count(&self) -> usize {
        self.first + self.list.len()
    }
}

/// Records an answer as events.
pub(crate) struct Recorder {
    response: Response,
    dressing: Dressing,
    events: Log,
    open: Option<Open>,
    /// White space that may begin a message; alone it makes none.
    blank: String,
}

/// The item that is being said.
struct Open {
    id: String,
    kind: Kind,
    /// Its text, arguments or input so far.
    text: String,
    logprobs: Vec<Value>,
}

enum Kind {
    Reasoning,
    Message,
    Function { call_id: String, name: String, namespace: Option<String> },
    Custom { call_id: String, name: String, namespace: Option<String> },
}

/// What every event has around its own fields.
#[derive(Serialize)]
struct Envelope<'a, T> {
    r#type: &'static str,
    sequence_number: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_id: Option<&'a str>,
    #[serde(flatten)]
    fields: T,
}

/// A change of the response as a whole.
#[derive(Serialize)]
struct Whole<'a> {
    response: &'a Response,
}

#[derive(Serialize)]
struct Item<'a> {
    output_index: usize,
    item: &'a Value,
}

/// Where in the output something happens.
#[derive(Serialize)]
struct At<'a, T> {
    item_id: &'a str,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(flatten)]
    fields: T,
}

#[derive(Serialize)]
struct Part {
    part: Value,
}

#[derive(Serialize)]
struct More<'a> {
    delta: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [Value]>,
}

#[derive(Serialize)]
struct Done<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [Value]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<&'a str>,
}

impl Recorder {
    /// A recorder of `response`, of which nothing has been said.
    pub fn new(response: Response, dressing: Dressing) -> Self {
        Self { response, dressing, events: Log::default(), open: None, blank: String::new() }
    }

    /// The response so far; an open item is not in it yet.
    pub fn response(&self) -> &Response {
        &self.response
    }

    /// The events from this sequence number on that are still there.
    pub fn events_from(&self, sequence: usize) -> &[Event] {
        self.events.list.get(sequence.saturating_sub(self.events.first)..).unwrap_or_default()
    }

    /// How many events there have been.
    pub fn count(&self) -> usize {
        self.events.count()
    }

    /// Forgets the events so far; later ones count on.
    pub fn forget_events(&mut self) {
        self.events.first = self.events.count();
        self.events.list = Vec::new();
    }

    /// Appends an event that the response's own course does not make.
    pub fn note(&mut self, kind: &'static str, fields: &impl Serialize) {
        emit(&mut self.events, &self.dressing, kind, fields);
    }

    /// It waits for its turn.
    pub fn queued(&mut self) {
        self.response.status = Status::Queued;
        for kind in ["response.created", "response.queued"] {
            emit(&mut self.events, &self.dressing, kind, &Whole { response: &self.response });
        }
    }

    /// It runs.
    pub fn begin(&mut self) {
        self.response.status = Status::InProgress;
        let kinds = ["response.created", "response.in_progress"];
        let known = usize::from(self.events.count() > 0);
        for kind in &kinds[known..] {
            emit(&mut self.events, &self.dressing, kind, &Whole { response: &self.response });
        }
    }

    /// Appends a piece of the answer. `logprobs`: those of its tokens, if it is text.
    pub fn piece(&mut self, piece: &Piece, logprobs: &[Value]) {
        match piece {
            Piece::Reasoning(text) => {
                if !matches!(&self.open, Some(Open { kind: Kind::Reasoning, .. })) {
                    self.open("rs_", Kind::Reasoning);
                }
                self.more("response.reasoning_text.delta", text, None);
            }
            Piece::Text(text) => self.text(text, logprobs),
            Piece::CallBegin { id, name, custom } => self.open_call(id, name, *custom),
            Piece::CallInput(text) => match &self.open {
                Some(Open { kind: Kind::Function { .. }, .. }) => {
                    self.more("response.function_call_arguments.delta", text, None);
                }
                Some(Open { kind: Kind::Custom { .. }, .. }) => {
                    self.more("response.custom_tool_call_input.delta", text, None);
                }
                _ => {}
            },
            Piece::CallEnd => self.close("completed"),
        }
    }

    /// Notes where its time went.
    pub fn time(&mut self, timing: Timing) {
        self.response.rudder = Some(timing);
    }

    /// Ends the response. `usage`: `None` if nothing was run.
    pub fn end(&mut self, ending: Ending, usage: Option<Usage>) {
        let response = &mut self.response;
        response.usage = usage;
        let (status, reason) = match &ending {
            Ending::Completed => (Status::Completed, None),
            Ending::Incomplete(reason) => (Status::Incomplete, Some(*reason)),
            Ending::Interrupted => (Status::Incomplete, Some(Reason::Interrupted)),
            Ending::Cancelled => (Status::Cancelled, None),
            Ending::Failed(failure) => {
                response.error = Some(failure.clone());
                (Status::Failed, None)
            }
        };
        match ending {
            // A call that is still open was cut short.
            Ending::Completed if matches!(&self.open, Some(open) if open.part("").is_none()) => {
                self.close("incomplete");
            }
            Ending::Completed => self.close("completed"),
            Ending::Incomplete(_) => self.close("incomplete"),
            Ending::Interrupted | Ending::Cancelled | Ending::Failed(_) => self.open = None,
        }
        let response = &mut self.response;
        response.status = status;
        response.incomplete_details = reason.map(|reason| IncompleteDetails { reason });
        response.completed_at = (status == Status::Completed).then(unix_now);
        let kind = match status {
            Status::Completed => "response.completed",
            Status::Failed => "response.failed",
            _ => "response.incomplete",
        };
        emit(&mut self.events, &self.dressing, kind, &Whole { response: &self.response });
    }

    /// A response that completes with nothing said has an empty message.
    pub fn answer_at_least_nothing(&mut self) {
        if self.open.is_none() && self.response.output.is_empty() {
            self.open("msg_", Kind::Message);
            let blank = std::mem::take(&mut self.blank);
            if !blank.is_empty() {
                self.more("response.output_text.delta", &blank, Some(&[]));
            }
        }
    }

    fn text(&mut self, text: &str, logprobs: &[Value]) {
        if matches!(&self.open, Some(Open { kind: Kind::Message, .. })) {
            return self.more("response.output_text.delta", text, Some(logprobs));
        }
        self.blank.push_str(text);
        if !text.trim().is_empty() {
            let text = std::mem::take(&mut self.blank);
            self.open("msg_", Kind::Message);
            self.more("response.output_text.delta", &text, Some(logprobs));
        }
    }

    fn open_call(&mut self, call_id: &str, name: &str, custom: bool) {
        let (name, namespace) = self.dressing.names.outward(name);
        let (call_id, name, namespace) = (call_id.to_owned(), name.to_owned(), namespace.map(str::to_owned));
        match custom {
            true => self.open("ctc_", Kind::Custom { call_id, name, namespace }),
            false => self.open("fc_", Kind::Function { call_id, name, namespace }),
        }
    }

    fn open(&mut self, prefix: &str, kind: Kind) {
        self.close("completed");
        self.blank.clear();
        let open = Open { id: random_id(prefix), kind, text: String::new(), logprobs: Vec::new() };
        let output_index = self.response.output.len();
        let item = open.item("in_progress", None);
        emit(
            &mut self.events,
            &self.dressing,
            "response.output_item.added",
            &Item { output_index, item: &item },
        );
        if let Some(part) = open.part("") {
            let at = At { item_id: &open.id, output_index, content_index: Some(0), fields: Part { part } };
            emit(&mut self.events, &self.dressing, "response.content_part.added", &at);
        }
        self.open = Some(open);
    }

    fn more(&mut self, kind: &'static str, delta: &str, logprobs: Option<&[Value]>) {
        let Some(open) = &mut self.open else { return };
        open.text.push_str(delta);
        open.logprobs.extend_from_slice(logprobs.unwrap_or_default());
        let fields = More { delta, logprobs };
        let output_index = self.response.output.len();
        let at = At { item_id: &open.id, output_index, content_index: open.content_index(), fields };
        emit(&mut self.events, &self.dressing, kind, &at);
    }

    /// Ends the open item, if there is one.
    fn close(&mut self, status: &'static str) {
        let Some(open) = self.open.take() else { return };
        let output_index = self.response.output.len();
        let (kind, fields) = open.done();
        let at = At { item_id: &open.id, output_index, content_index: open.content_index(), fields };
        emit(&mut self.events, &self.dressing, kind, &at);
        if let Some(part) = open.part(&open.text) {
            let fields = Part { part };
            let at = At { item_id: &open.id, output_index, content_index: Some(0), fields };
            emit(&mut self.events, &self.dressing, "response.content_part.done", &at);
        }
        let item = open.item(status, self.dressing.seal.as_deref());
        let fields = Item { output_index, item: &item };
        emit(&mut self.events, &self.dressing, "response.output_item.done", &fields);
        self.response.output.push(item);
    }
}

fn emit(events: &mut Log, dressing: &Dressing, kind: &'static str, fields: &impl Serialize) {
    let envelope = Envelope {
        r#type: kind,
        sequence_number: events.count(),
        stream_id: dressing.stream_id.as_deref(),
        fields,
    };
    match serde_json::to_vec(&envelope) {
        Ok(json) => events.list.push(Event { kind, json: json.into() }),
        // Our own structures with string keys always serialise.
        Err(error) => tracing::error!(%error, kind, "an event could not be serialised"),
    }
}

impl Open {
    fn content_index(&self) -> Option<usize> {
        matches!(self.kind, Kind::Reasoning | Kind::Message).then_some(0)
    }

    /// The item as JSON, with what was said so far.
    fn item(&self, status: &str, seal: Option<&Seal>) -> Value {
        let begun = status != "in_progress";
        let content = || Value::Array(self.part(&self.text).filter(|_| begun).into_iter().collect());
        let call = |kind: &str, call_id: &str, name: &str, namespace: &Option<String>, key: &str| {
            let mut item =
                json!({"type": kind, "id": self.id, "status": status, "call_id": call_id, "name": name});
            item[key] = self.text.as_str().into();
            if let Some(namespace) = namespace {
                item["namespace"] = namespace.as_str().into();
            }
            item
        };
        match &self.kind {
            Kind::Message => json!({
                "type": "message", "id": self.id, "status": status, "role": "assistant", "content": content(),
            }),
            Kind::Reasoning => {
                let mut item = json!({
                    "type": "reasoning", "id": self.id, "status": status, "summary": [], "content": content(),
                });
                if let Some(seal) = seal.filter(|_| begun) {
                    item["encrypted_content"] = seal.close(&self.text).into();
                }
                item
            }
            Kind::Function { call_id, name, namespace } => {
                call("function_call", call_id, name, namespace, "arguments")
            }
            Kind::Custom { call_id, name, namespace } => {
                call("custom_tool_call", call_id, name, namespace, "input")
            }
        }
    }

    /// The content part that `text` makes; calls have none.
    fn part(&self, text: &str) -> Option<Value> {
        match self.kind {
            Kind::Reasoning => Some(json!({"type": "reasoning_text", "text": text})),
            Kind::Message => Some(json!({
                "type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs,
            })),
            Kind::Function { .. } | Kind::Custom { .. } => None,
        }
    }

    /// The event that repeats the whole text.
    fn done(&self) -> (&'static str, Done<'_>) {
        let mut done = Done { text: None, logprobs: None, name: None, arguments: None, input: None };
        let text = Some(self.text.as_str());
        let kind = match &self.kind {
            Kind::Reasoning => {
                done.text = text;
                "response.reasoning_text.done"
            }
            Kind::Message => {
                done.text = text;
                done.logprobs = Some(&self.logprobs);
                "response.output_text.done"
            }
            Kind::Function { name, .. } => {
                done.name = Some(name);
                done.arguments = text;
                "response.function_call_arguments.done"
            }
            Kind::Custom { .. } => {
                done.input = text;
                "response.custom_tool_call_input.done"
            }
        };
        (kind, done)
    }
}
