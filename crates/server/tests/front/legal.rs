//! The order that a response's events must keep, as a small state machine.

use serde_json::{Value, json};

/// Follows one response; panics at the first event that is not legal where it comes.
#[derive(Default)]
pub struct Order {
    next: u64,
    status: Option<String>,
    items: Vec<Value>,
    open: Option<Open>,
    /// The lane that every event must name.
    lane: Option<String>,
    /// The response as its last whole event showed it.
    pub response: Value,
}

struct Open {
    id: Value,
    kind: String,
    /// What the deltas add up to.
    text: String,
    part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Before,
    Open,
    Said,
    Done,
}

/// The kind of item that a delta or a done belongs to, and the field of the whole text.
fn said_of(kind: &str) -> Option<(&'static str, &'static str, bool)> {
    let (event, done) = match kind.strip_suffix(".delta") {
        Some(event) => (event, false),
        None => (kind.strip_suffix(".done")?, true),
    };
    let (item, field) = match event.strip_prefix("response.")? {
        "output_text" => ("message", "text"),
        "reasoning_text" => ("reasoning", "text"),
        "function_call_arguments" => ("function_call", "arguments"),
        "custom_tool_call_input" => ("custom_tool_call", "input"),
        _ => return None,
    };
    Some((item, field, done))
}

impl Order {
    /// An order whose events name a lane.
    pub fn on(lane: Option<&str>) -> Self {
        Self { lane: lane.map(str::to_owned), ..Self::default() }
    }

    /// Whether the response has ended.
    pub fn ended(&self) -> bool {
        self.status.as_deref().is_some_and(|status| status != "in_progress" && status != "queued")
    }

    /// The text said so far in the open message or the last one.
    pub fn text(&self) -> String {
        let open = self.open.as_ref().filter(|open| open.kind == "message");
        let last = || self.items.iter().rev().find(|item| item["type"] == "message");
        match open {
            Some(open) => open.text.clone(),
            None => last().map_or(String::new(), |item| item["content"][0]["text"].as_str().unwrap().into()),
        }
    }

    pub fn take(&mut self, event: &Value) {
        let kind = event["type"].as_str().expect("an event has a type");
        assert_eq!(event.get("stream_id").and_then(Value::as_str), self.lane.as_deref(), "{event}");
        if kind == "response.steer.failed" && event["steer"].get("id").is_none() {
            // A correction that was not taken is none of the response's, and takes no number.
            assert!(event["sequence_number"].is_u64(), "{event}");
            return;
        }
        assert_eq!(event["sequence_number"], self.next, "{event}");
        self.next += 1;
        if kind.starts_with("response.steer.") {
            let late = kind != "response.steer.accepted";
            assert!(self.status.is_some() && self.ended() == late, "{event}");
            return;
        }
        assert!(!self.ended(), "after the end: {event}");
        match kind {
            "response.created" => {
                assert!(self.status.is_none(), "{event}");
                self.whole(event, &["in_progress", "queued"]);
            }
            "response.queued" => self.whole(event, &["queued"]),
            "response.in_progress" => self.whole(event, &["in_progress"]),
            "response.completed" => self.end(event, &["completed"]),
            "response.incomplete" => self.end(event, &["incomplete", "cancelled"]),
            "response.failed" => self.end(event, &["failed"]),
            "response.output_item.added" => self.added(event),
            "response.content_part.added" => self.part(event, Part::Before, Part::Open),
            "response.content_part.done" => self.part(event, Part::Said, Part::Done),
            "response.output_item.done" => self.done(event),
            other => self.said(event, said_of(other).unwrap_or_else(|| panic!("unknown: {event}"))),
        }
    }

    fn whole(&mut self, event: &Value, statuses: &[&str]) {
        let response = &event["response"];
        let status = response["status"].as_str().unwrap();
        assert!(statuses.contains(&status), "{event}");
        if !self.response.is_null() {
            assert_eq!(response["id"], self.response["id"]);
        }
        assert_eq!(response["object"], "response");
        self.status = Some(status.into());
        self.response = response.clone();
    }

    fn end(&mut self, event: &Value, statuses: &[&str]) {
        self.whole(event, statuses);
        let response = &event["response"];
        let reason = &response["incomplete_details"]["reason"];
        let dropped =
            reason == "interrupted" || response["status"] == "failed" || response["status"] == "cancelled";
        assert!(self.open.is_none() || dropped, "an item is open: {event}");
        assert_eq!(response["output"], Value::Array(self.items.clone()), "the end is the fold of the events");
        assert_eq!(response["incomplete_details"].is_object(), response["status"] == "incomplete");
    }

    fn added(&mut self, event: &Value) {
        assert!(self.status.as_deref() == Some("in_progress") && self.open.is_none(), "{event}");
        assert_eq!(event["output_index"], self.items.len());
        let item = &event["item"];
        assert_eq!(item["status"], "in_progress");
        let kind = item["type"].as_str().unwrap().to_owned();
        let prefix = match kind.as_str() {
            "message" => "msg_",
            "reasoning" => "rs_",
            "function_call" => "fc_",
            "custom_tool_call" => "ctc_",
            other => panic!("unknown item {other}"),
        };
        assert!(item["id"].as_str().unwrap().starts_with(prefix), "{item}");
        assert!(self.items.iter().all(|known| known["id"] != item["id"]));
        let part = if kind.ends_with("_call") { Part::Open } else { Part::Before };
        self.open = Some(Open { id: item["id"].clone(), kind, text: String::new(), part });
    }

    /// The open item, which the event must name.
    fn at(&mut self, event: &Value) -> &mut Open {
        assert_eq!(event["output_index"], self.items.len(), "{event}");
        let open = self.open.as_mut().unwrap_or_else(|| panic!("no item is open: {event}"));
        assert_eq!(event["item_id"], open.id, "{event}");
        let content = matches!(open.kind.as_str(), "message" | "reasoning");
        assert_eq!(event.get("content_index"), content.then_some(&json!(0)), "{event}");
        open
    }

    fn part(&mut self, event: &Value, from: Part, to: Part) {
        let open = self.at(event);
        assert_eq!(open.part, from, "{event}");
        let kind = if open.kind == "message" { "output_text" } else { "reasoning_text" };
        assert_eq!(event["part"]["type"], kind);
        let said = if to == Part::Open { "" } else { open.text.as_str() };
        assert_eq!(event["part"]["text"], said);
        open.part = to;
    }

    fn said(&mut self, event: &Value, (kind, field, done): (&str, &str, bool)) {
        let open = self.at(event);
        assert_eq!((open.kind.as_str(), open.part), (kind, Part::Open), "{event}");
        if done {
            assert_eq!(event[field], open.text, "{event}");
            open.part = Part::Said;
            return;
        }
        let delta = event["delta"].as_str().unwrap();
        assert!(!delta.is_empty(), "{event}");
        open.text.push_str(delta);
    }

    fn done(&mut self, event: &Value) {
        assert_eq!(event["output_index"], self.items.len(), "{event}");
        let open = self.open.take().unwrap_or_else(|| panic!("no item is open: {event}"));
        let item = &event["item"];
        assert_eq!((&item["id"], &item["type"]), (&open.id, &json!(open.kind)));
        let (part, text) = match open.kind.as_str() {
            "message" | "reasoning" => (Part::Done, &item["content"][0]["text"]),
            "function_call" => (Part::Said, &item["arguments"]),
            _ => (Part::Said, &item["input"]),
        };
        assert_eq!((open.part, text), (part, &json!(open.text)), "{event}");
        self.items.push(item.clone());
    }
}

/// Checks a whole response's events; returns the response they end with.
pub fn check(events: &[Value]) -> Value {
    let mut order = Order::default();
    events.iter().for_each(|event| order.take(event));
    assert!(order.ended(), "no end: {:?}", events.last());
    order.response
}
