//! A response's events as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures_util::stream;
use tokio::time::{Instant, timeout_at};

use super::events::Event;
use super::live::{Reader, Tether};
use crate::progress::{self, Progress};
use crate::sse;

/// Where events come from.
pub(crate) trait Source: Send + 'static {
    /// Waits for events and appends all that are there; false at the end. Cancel-safe.
    fn read(&mut self, out: &mut Vec<Event>) -> impl Future<Output = bool> + Send;
    /// How far that has come which says nothing yet.
    fn progress(&self) -> Option<Progress> {
        None
    }
}

impl Source for Reader {
    fn read(&mut self, out: &mut Vec<Event>) -> impl Future<Output = bool> + Send {
        Self::read(self, out)
    }

    fn progress(&self) -> Option<Progress> {
        Self::progress(self)
    }
}

/// Streams what a source gives, with comments where that is silent. The tethered response is cancelled
/// with the client's connection.
pub(crate) fn respond(source: impl Source, tether: Option<Tether>, keep_alive: Duration) -> Response {
    let writer = Writer { source, tether, keep_alive, told: None, events: Vec::new() };
    let chunks = stream::unfold(writer, async |mut writer| {
        let chunk = writer.next().await?;
        Some((Ok::<_, Infallible>(chunk), writer))
    });
    sse::headed(Body::from_stream(chunks))
}

struct Writer<S> {
    source: S,
    tether: Option<Tether>,
    keep_alive: Duration,
    /// The progress that was told last.
    told: Option<Progress>,
    events: Vec<Event>,
}

impl<S: Source> Writer<S> {
    /// The next write: everything that is ready at once.
    async fn next(&mut self) -> Option<Bytes> {
        let silent_until = Instant::now() + self.keep_alive;
        loop {
            let look = silent_until.min(Instant::now() + progress::INTERVAL);
            match timeout_at(look, self.source.read(&mut self.events)).await {
                Err(_) => {
                    if let Some(comment) = self.comment(silent_until) {
                        return Some(comment);
                    }
                }
                Ok(true) => break,
                Ok(false) => {
                    if let Some(tether) = self.tether.take() {
                        tether.let_go();
                    }
                    return None;
                }
            }
        }
        let mut chunk = Vec::new();
        for event in self.events.drain(..) {
            frame(&event, &mut chunk);
        }
        Some(chunk.into())
    }
}

impl<S: Source> Writer<S> {
    /// How far it has come, if that is new; else, when it is time to, only that it is still there.
    fn comment(&mut self, silent_until: Instant) -> Option<Bytes> {
        let mut comment = Vec::new();
        match self.source.progress().filter(|&progress| self.told != Some(progress)) {
            Some(progress) => {
                self.told = Some(progress);
                progress::comment(progress, &mut comment);
            }
            None if Instant::now() >= silent_until => comment.extend_from_slice(b": keep-alive\n\n"),
            None => return None,
        }
        Some(comment.into())
    }
}

/// Streams events that are all there.
pub(crate) fn whole(events: &[Event]) -> Response {
    let mut body = Vec::new();
    for event in events {
        frame(event, &mut body);
    }
    sse::headed(Body::from(body))
}

/// Appends one event as it goes over the wire.
pub(crate) fn frame(event: &Event, out: &mut Vec<u8>) {
    for part in [b"event: ", event.kind.as_bytes(), b"\ndata: ", &event.json, b"\n\n"] {
        out.extend_from_slice(part);
    }
}
