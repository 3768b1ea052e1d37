//! Request bodies: bytes to a checked JSON structure, every fault a clear 4xx.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutError};

use crate::openai::ApiError;
use crate::{Server, ServerConfig};

/// Gives up a body of which nothing more comes: a client that has vanished would hold what it sent for ever.
pub(crate) fn pause_limit(config: &ServerConfig) -> RequestBodyTimeoutLayer {
    RequestBodyTimeoutLayer::new(config.body_pause)
}

/// Of all bodies that are being received, as many bytes at most as so many of the largest have.
const MOST_LARGE: usize = 16;

/// What has come of bodies that are not whole yet.
#[derive(Debug, Default)]
pub(crate) struct Receiving(AtomicUsize);

/// Of one body.
struct Part {
    receiving: Arc<Receiving>,
    bytes: usize,
}

impl Part {
    /// Adds what has come, unless all would be too much.
    fn add(&mut self, bytes: usize, most: usize) -> Result<(), TooMuch> {
        let all = self.receiving.0.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.bytes += bytes;
        if all > most { Err(TooMuch) } else { Ok(()) }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.receiving.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Too much is being received at the moment.
#[derive(Debug, thiserror::Error)]
#[error("too much is being received at the moment")]
struct TooMuch;

/// Bounds what bodies take that are being received, all together: before it is whole a body is in nobody's queue, and
/// there may be any number of connections.
pub(crate) async fn bound(State(server): State<Arc<Server>>, request: Request) -> Request {
    let most = server.config.max_body_bytes.saturating_mul(MOST_LARGE);
    let mut part = Part { receiving: server.receiving.clone(), bytes: 0 };
    request.map(|body| {
        let pieces = body.into_data_stream().map(move |piece| {
            let piece = piece?;
            part.add(piece.len(), most).map_err(axum::Error::new)?;
            Ok::<_, axum::Error>(piece)
        });
        Body::from_stream(pieces)
    })
}

/// The body's bytes, or why they could not be had.
pub(crate) fn bytes(body: Result<Bytes, BytesRejection>, config: &ServerConfig) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(config.max_body_bytes),
        _ if is::<TimeoutError>(&rejection) => ApiError::body_too_slow(config.body_pause),
        _ if is::<TooMuch>(&rejection) => ApiError::overloaded(
            "The server is receiving as much as it has memory for; send the request again.",
        ),
        _ => ApiError::invalid(format!("The request body could not be read: {rejection}.")),
    })
}

/// Whether an error is such a one, or comes of one.
fn is<E: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    error.is::<E>() || error.source().is_some_and(is::<E>)
}

/// Reads what a refused request still sends, within bounds: unread, it would cost the client its
/// connection, and perhaps the answer too.
pub(crate) async fn discard(body: Body) {
    // Longer or slower bodies are not worth keeping the connection for.
    let _ = tokio::time::timeout(Duration::from_secs(1), axum::body::to_bytes(body, 1 << 20)).await;
}

/// Parses a JSON body. An error names the field it is about.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::invalid(format!("The request body is not valid UTF-8 (at byte {}).", error.valid_up_to()))
    })?;
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match inner.classify() {
            serde_json::error::Category::Data if path != "." => {
                ApiError::param(path.as_str(), format!("`{path}`: {inner}."))
            }
            serde_json::error::Category::Data => ApiError::invalid(format!("The request: {inner}.")),
            _ => ApiError::invalid(format!("The request body is not valid JSON: {inner}.")),
        }
    })?;
    reader
        .end()
        .map_err(|error| ApiError::invalid(format!("The request body is not valid JSON: {error}.")))?;
    Ok(value)
}

/// Parses a body of which a part was read already, from the `rest` if there is one. What is wrong with that is
/// said of the whole body.
pub(crate) fn parse_rest<T: DeserializeOwned>(body: &[u8], rest: Option<&[u8]>) -> Result<T, ApiError> {
    match rest.map(parse) {
        Some(Ok(fields)) => Ok(fields),
        Some(Err(_)) | None => parse(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Outer {
        #[serde(default)]
        items: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[serde(rename = "name")]
        _name: String,
    }

    #[test]
    fn a_wrong_type_names_the_path_to_it() {
        let error = parse::<Outer>(br#"{"items": [{"name": "a"}, {"name": 3}]}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("items[1].name"));
        assert!(error.message.contains("expected a string"), "{}", error.message);
    }

    #[test]
    fn what_is_not_json_or_not_utf8_is_a_400() {
        for body in
            [&b"{"[..], b"", b"{} x", b"\"\xff\"", b"{\"u\": \"\xff\"}", b"nul", b"{\"items\": 1e999}"]
        {
            assert_eq!(parse::<Outer>(body).unwrap_err().status, 400, "{body:?}");
        }
        assert!(parse::<Outer>(b" {} ").unwrap().items.is_empty());
    }

    #[test]
    fn deep_nesting_is_refused_not_followed() {
        let deep = [&b"{\"items\": "[..], &b"[".repeat(100_000)].concat();
        assert_eq!(parse::<Outer>(&deep).unwrap_err().status, 400);
    }
}
