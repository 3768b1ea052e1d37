//! The events of a stored response, made again from what it came to.
//!
//! The text of an item comes as one delta. Up to the first of these the numbers are those of the stream that
//! was; behind it there are fewer events than there were. A reader who has seen more than there are may not
//! have seen the end: it gets the last, which holds the whole response, with the number that it asks for.

use serde_json::{Value, json};

use super::events::Event;

/// Events from the number `first` on.
pub(crate) fn events(response: &Value, first: usize) -> Vec<Event> {
    let mut list = List::default();
    let mut begun = response.clone();
    begun["output"] = json!([]);
    for key in ["completed_at", "error", "incomplete_details", "usage"] {
        begun[key] = Value::Null;
    }
    let background = response["background"] == true;
    begun["status"] = if background { "queued" } else { "in_progress" }.into();
    list.add("response.created", json!({"response": begun}));
    if background {
        list.add("response.queued", json!({"response": begun}));
        begun["status"] = "in_progress".into();
    }
    list.add("response.in_progress", json!({"response": begun}));
    for (index, item) in response["output"].as_array().into_iter().flatten().enumerate() {
        list.item(index, item);
    }
    let end = match response["status"].as_str() {
        Some("completed") => "response.completed",
        Some("failed") => "response.failed",
        _ => "response.incomplete",
    };
    let before_end = list.events.len();
    list.add_numbered(first.max(before_end), end, json!({"response": response}));
    list.events
        .drain(first.min(before_end)..)
        .map(|(kind, event)| Event { kind, json: event.to_string().into() })
        .collect()
}

#[derive(Default)]
struct List {
    events: Vec<(&'static str, Value)>,
}

impl List {
    fn add(&mut self, kind: &'static str, fields: Value) {
        self.add_numbered(self.events.len(), kind, fields);
    }

    fn add_numbered(&mut self, number: usize, kind: &'static str, fields: Value) {
        let mut event = json!({"type": kind, "sequence_number": number});
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
        self.events.push((kind, event));
    }

    /// One finished item, as if it had come whole.
    fn item(&mut self, index: usize, item: &Value) {
        let mut begun = item.clone();
        begun["status"] = "in_progress".into();
        let (id, text) = (&item["id"], |key: &str| item[key].as_str().unwrap_or_default());
        match text("type") {
            kind @ ("message" | "reasoning") => {
                begun["content"] = json!([]);
                self.add("response.output_item.added", json!({"output_index": index, "item": begun}));
                for (part_index, part) in item["content"].as_array().into_iter().flatten().enumerate() {
                    self.part(
                        json!({"item_id": id, "output_index": index, "content_index": part_index}),
                        part,
                        kind,
                    );
                }
            }
            kind @ ("function_call" | "custom_tool_call") => {
                let (key, delta, done) = match kind {
                    "function_call" => (
                        "arguments",
                        "response.function_call_arguments.delta",
                        "response.function_call_arguments.done",
                    ),
                    _ => (
                        "input",
                        "response.custom_tool_call_input.delta",
                        "response.custom_tool_call_input.done",
                    ),
                };
                begun[key] = "".into();
                self.add("response.output_item.added", json!({"output_index": index, "item": begun}));
                let said = text(key);
                self.add(delta, json!({"item_id": id, "output_index": index, "delta": said}));
                let mut fields = json!({"item_id": id, "output_index": index});
                if kind == "function_call" {
                    fields["name"] = item["name"].clone();
                }
                fields[key] = said.into();
                self.add(done, fields);
            }
            _ => self.add("response.output_item.added", json!({"output_index": index, "item": begun})),
        }
        self.add("response.output_item.done", json!({"output_index": index, "item": item}));
    }

    fn part(&mut self, at: Value, part: &Value, kind: &str) {
        let with = |mut fields: Value, further: Value| {
            if let (Some(fields), Value::Object(further)) = (fields.as_object_mut(), further) {
                fields.extend(further);
            }
            fields
        };
        let (text, logprobs) = (&part["text"], &part["logprobs"]);
        let mut begun = part.clone();
        begun["text"] = "".into();
        if kind == "reasoning" {
            self.add("response.content_part.added", with(at.clone(), json!({"part": begun})));
            self.add("response.reasoning_text.delta", with(at.clone(), json!({"delta": text})));
            self.add("response.reasoning_text.done", with(at.clone(), json!({"text": text})));
        } else {
            begun["logprobs"] = json!([]);
            self.add("response.content_part.added", with(at.clone(), json!({"part": begun})));
            let delta = json!({"delta": text, "logprobs": logprobs});
            self.add("response.output_text.delta", with(at.clone(), delta));
            let done = json!({"text": text, "logprobs": logprobs});
            self.add("response.output_text.done", with(at.clone(), done));
        }
        self.add("response.content_part.done", with(at, json!({"part": part})));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conversation::Piece;
    use crate::responses::events::{Dressing, Ending, Recorder};
    use crate::responses::types::{Echo, Response, Status};

    /// A response that was told in one piece an item, and its events.
    fn told() -> (Value, Vec<Event>) {
        let echo = Echo { model: "m".into(), store: true, background: true, ..Echo::default() };
        let response = Response {
            id: "resp_1".into(),
            object: "response",
            created_at: 1,
            completed_at: None,
            status: Status::InProgress,
            incomplete_details: None,
            error: None,
            previous_response_id: None,
            output: Vec::new(),
            usage: None,
            rudder: None,
            echo: Arc::new(echo),
        };
        let dressing = Dressing { stream_id: None, names: Arc::default(), seal: None };
        let mut recorder = Recorder::new(response, dressing);
        recorder.queued();
        recorder.begin();
        recorder.piece(&Piece::Reasoning("hm".into()), &[]);
        recorder.piece(&Piece::Text("hello".into()), &[]);
        for custom in [false, true] {
            recorder.piece(&Piece::CallBegin { id: "call_1".into(), name: "f".into(), custom }, &[]);
            recorder.piece(&Piece::CallInput("{}".into()), &[]);
            recorder.piece(&Piece::CallEnd, &[]);
        }
        recorder.end(Ending::Completed, None);
        (serde_json::to_value(recorder.response()).unwrap(), recorder.events_from(0).to_vec())
    }

    fn parsed(events: &[Event]) -> Vec<Value> {
        events.iter().map(|event| serde_json::from_slice(&event.json).unwrap()).collect()
    }

    #[test]
    fn events_made_again_are_those_that_were_told() {
        let (response, told) = told();
        assert_eq!(parsed(&events(&response, 0)), parsed(&told));
        let kinds = |events: &[Event]| events.iter().map(|event| event.kind).collect::<Vec<_>>();
        assert_eq!(kinds(&events(&response, 0)), kinds(&told));
        assert_eq!(parsed(&events(&response, 7)), parsed(&told[7..]));
    }

    #[test]
    fn whoever_has_seen_more_gets_the_end() {
        let (response, _) = told();
        // Room for the greatest of them would be more than there is.
        for first in [1000, 1 << 32] {
            let last = parsed(&events(&response, first));
            assert_eq!(last.len(), 1);
            assert_eq!(
                (&last[0]["type"], &last[0]["sequence_number"]),
                (&json!("response.completed"), &json!(first))
            );
            assert_eq!(last[0]["response"], response);
        }
    }
}
