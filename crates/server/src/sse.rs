//! Server-sent events: the answer as it comes, and comments while it does not.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::stream;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use crate::generate::{Delta, Running};
use crate::openai::ApiError;
use crate::progress::{self, Progress};

/// How OpenAI's streams end.
pub(crate) const DONE: &[u8] = b"data: [DONE]\n\n";

/// How a dialect words its events.
pub(crate) trait Events: Send + 'static {
    /// What is sent before anything is generated.
    fn begin(&mut self, running: &Running, out: &mut Vec<u8>);
    /// News of one choice. It has not failed.
    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>);
    /// What is sent after the last choice has ended.
    fn end(&mut self, running: &Running, out: &mut Vec<u8>);
    /// What is sent where nothing has been for too long.
    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b": keep-alive\n\n");
    }
    /// What is sent last if there is no answer.
    fn failed(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        event(&error.body(), out);
    }
}

/// Appends one event that has a name.
pub(crate) fn named_event(name: &str, payload: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("event: {name}\n").as_bytes());
    event(payload, out);
}

/// Appends one event.
pub(crate) fn event(payload: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    // Our own structures with string keys always serialise.
    if let Err(error) = serde_json::to_writer(&mut *out, payload) {
        tracing::error!(%error, "an event could not be serialised");
    }
    out.extend_from_slice(b"\n\n");
}

/// A response that streams `running` in a dialect's events. Dropped with the client's connection,
/// it cancels what runs.
pub(crate) fn respond(running: Running, events: impl Events, keep_alive: Duration) -> Response {
    let state = State::Begin;
    let writer = Writer { running, events, keep_alive, state, told: None, buffer: Vec::new() };
    let chunks = stream::unfold(writer, async |mut writer| {
        let chunk = writer.next().await?;
        Some((Ok::<_, Infallible>(chunk), writer))
    });
    headed(Body::from_stream(chunks))
}

/// A response whose body is server-sent events.
pub(crate) fn headed(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Reverse proxies of nginx's kind hold small writes back unless told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Writer<E> {
    running: Running,
    events: E,
    keep_alive: Duration,
    state: State,
    /// The progress that was told last.
    told: Option<Progress>,
    buffer: Vec<u8>,
}

#[derive(PartialEq)]
enum State {
    Begin,
    Running,
    Ended,
}

impl<E: Events> Writer<E> {
    /// The next write: everything that is ready at once.
    async fn next(&mut self) -> Option<Bytes> {
        match self.state {
            State::Begin => {
                self.state = State::Running;
                self.events.begin(&self.running, &mut self.buffer);
            }
            State::Running => {}
            State::Ended => return None,
        }
        let silent_until = Instant::now() + self.keep_alive;
        while self.buffer.is_empty() && self.state != State::Ended {
            let look = match self.running.is_silent() {
                true => silent_until.min(Instant::now() + progress::INTERVAL),
                false => silent_until,
            };
            tokio::select! {
                biased;
                news = self.running.advance() => self.write(news),
                () = sleep_until(look) => self.break_silence(silent_until),
            }
        }
        let bytes = Bytes::copy_from_slice(&self.buffer);
        self.buffer.clear();
        // A dialect may have nothing to say after its last delta.
        (!bytes.is_empty()).then_some(bytes)
    }

    /// Tells how far it has come, if that is new; else only that it is still there, when it is time to.
    fn break_silence(&mut self, silent_until: Instant) {
        match self.running.progress().filter(|&progress| self.told != Some(progress)) {
            Some(progress) => {
                self.told = Some(progress);
                progress::comment(progress, &mut self.buffer);
            }
            None if Instant::now() >= silent_until => self.events.keep_alive(&mut self.buffer),
            None => {}
        }
    }

    fn write(&mut self, news: bool) {
        if !news {
            self.events.end(&self.running, &mut self.buffer);
            self.state = State::Ended;
            return;
        }
        for delta in self.running.deltas() {
            if let Some(failure) = delta.end.as_ref().and_then(|end| end.reason.failure()) {
                self.events.failed(&failure.into(), &mut self.buffer);
                self.state = State::Ended;
                return;
            }
            self.events.delta(delta, &mut self.buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_of_data_and_an_empty_line() {
        let mut out = Vec::new();
        event(&serde_json::json!({"text": "a\nb\u{2028}"}), &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), "data: {\"text\":\"a\\nb\u{2028}\"}\n\n");
    }
}
