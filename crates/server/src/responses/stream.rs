//! A response's events as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures_util::stream;
use tokio::time::timeout;

use super::events::Event;
use super::live::{Reader, Tether};
use crate::sse;

/// Where events come from.
pub(crate) trait Source: Send + 'static {
    /// Waits for events and appends all that are there; false at the end. Cancel-safe.
    fn read(&mut self, out: &mut Vec<Event>) -> impl Future<Output = bool> + Send;
}

impl Source for Reader {
    fn read(&mut self, out: &mut Vec<Event>) -> impl Future<Output = bool> + Send {
        Self::read(self, out)
    }
}

/// Streams what a source gives, with comments where that is silent. The tethered response is cancelled
/// with the client's connection.
pub(crate) fn respond(source: impl Source, tether: Option<Tether>, keep_alive: Duration) -> Response {
    let writer = Writer { source, tether, keep_alive, events: Vec::new() };
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
    events: Vec<Event>,
}

impl<S: Source> Writer<S> {
    /// The next write: everything that is ready at once.
    async fn next(&mut self) -> Option<Bytes> {
        match timeout(self.keep_alive, self.source.read(&mut self.events)).await {
            Err(_) => return Some(Bytes::from_static(b": keep-alive\n\n")),
            Ok(true) => {}
            Ok(false) => {
                if let Some(tether) = self.tether.take() {
                    tether.let_go();
                }
                return None;
            }
        }
        let mut chunk = Vec::new();
        for event in self.events.drain(..) {
            frame(&event, &mut chunk);
        }
        Some(chunk.into())
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
