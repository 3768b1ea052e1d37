//! Who gets in: the page that asks, the API key, the drain, and a name for every request.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::openai::ApiError;
use crate::{Server, ServerConfig, body, web_pages};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Asked by probes, scrapers and browsers, which hold no key and want an answer during a drain.
const OPEN: [&str; 6] = ["/health", "/ready", "/version", "/metrics", "/dashboard", "/api/hello"];

/// Who asks, told by the key: what one stores, nobody else gets to see. Handlers find it among a
/// request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Owner([u8; 32]);

impl Owner {
    /// Who shows this key.
    pub fn of_key(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// SHA-256 of the key; zeros where the server asks for none.
    pub fn digest(&self) -> &[u8; 32] {
        &self.0
    }
}

/// What the keys' owners weigh, each by the tag that stands for it.
pub(crate) fn weights(config: &ServerConfig) -> HashMap<Arc<str>, u32> {
    let tags = config.api_keys.iter().map(|key| Owner::of_key(key.as_bytes()).tag().into());
    tags.zip(config.key_weights.iter().copied()).collect()
}

/// Lets a request through if its page may ask, it shows a key and the server is not draining.
pub(crate) async fn admit(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let admitted = owner(&server, &request);
    match admitted {
        Ok(owner) => {
            request.extensions_mut().insert(owner);
            next.run(request).await
        }
        Err(error) => {
            body::discard(request.into_body()).await;
            error.into_response()
        }
    }
}

/// Whose the request is.
fn owner(server: &Server, request: &Request) -> Result<Owner, ApiError> {
    web_pages::check(&server.config, request.headers())?;
    match OPEN.contains(&request.uri().path()) {
        true => Ok(Owner::default()),
        false if server.is_draining() => Err(ApiError::shutting_down()),
        false => check_key(&server.config.api_keys, request.headers()),
    }
}

/// Echoes the client's request id, or gives the request one.
pub(crate) async fn request_id(mut request: Request, next: Next) -> Response {
    let id = request.headers().get(&REQUEST_ID).cloned();
    let id = id.or_else(|| HeaderValue::try_from(random_id("req-")).ok());
    if let Some(id) = &id {
        request.headers_mut().insert(REQUEST_ID, id.clone());
    }
    let mut response = next.run(request).await;
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// A prefix and 128 random bits in hexadecimal.
pub(crate) fn random_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", fastrand::u128(..))
}

fn check_key(keys: &[String], headers: &HeaderMap) -> Result<Owner, ApiError> {
    if keys.is_empty() {
        return Ok(Owner::default());
    }
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
    // Either will do: some clients send one of their own making, or a proxy's, beside the one they are given.
    let mut shown = bearer.into_iter().chain(headers.get("x-api-key").map(HeaderValue::as_bytes)).peekable();
    if shown.peek().is_none() {
        return Err(ApiError::unauthorized(
            "This server wants an API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
        ));
    }
    // No early end: how long it takes tells nothing of which key was nearly right.
    let is_ours = |shown: &&[u8]| keys.iter().fold(false, |found, key| found | same(key.as_bytes(), shown));
    match shown.find(is_ours) {
        Some(key) => Ok(Owner::of_key(key)),
        None => Err(ApiError::unauthorized("The API key is not one of this server's.")),
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

/// Compares in a time that depends on the lengths alone.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(keys: &[&str], headers: &[(&'static str, &'static str)]) -> Result<Owner, u16> {
        let keys: Vec<String> = keys.iter().map(|&key| key.into()).collect();
        let headers =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        check_key(&keys, &headers.collect()).map_err(|error| error.status.as_u16())
    }

    fn status(keys: &[&str], header: Option<(&'static str, &'static str)>) -> u16 {
        checked(keys, header.as_slice()).map_or_else(|status| status, |_| 200)
    }

    #[test]
    fn a_right_key_opens_beside_a_wrong_one() {
        for (bearer, own) in [("Bearer a", "x"), ("Bearer x", "a"), ("Basic eDp5", "a")] {
            let headers = [("authorization", bearer), ("x-api-key", own)];
            assert_eq!(checked(&["a"], &headers), Ok(Owner::of_key(b"a")), "{headers:?}");
        }
        assert_eq!(checked(&["a"], &[("authorization", "Bearer x"), ("x-api-key", "y")]), Err(401));
    }

    #[test]
    fn one_of_the_keys_opens_in_either_header() {
        assert_eq!(status(&[], None), 200);
        assert_eq!(status(&["a", "b"], Some(("authorization", "Bearer b"))), 200);
        assert_eq!(status(&["a", "b"], Some(("authorization", "bearer a"))), 200);
        assert_eq!(status(&["a", "b"], Some(("x-api-key", "a"))), 200);
    }

    #[test]
    fn anything_else_is_401() {
        assert_eq!(status(&["a"], None), 401);
        assert_eq!(status(&["a"], Some(("authorization", "Bearer aa"))), 401);
        assert_eq!(status(&["a"], Some(("authorization", "Basic a"))), 401);
        assert_eq!(status(&["a"], Some(("authorization", "a"))), 401);
        assert_eq!(status(&["a"], Some(("x-api-key", ""))), 401);
    }

    #[test]
    fn a_key_weighs_what_stands_in_its_place() {
        let api_keys = ["a", "b", "c"].map(str::to_owned).to_vec();
        let config = ServerConfig { api_keys, key_weights: vec![1, 4], ..ServerConfig::new("m") };
        let weights = weights(&config);
        let of = |key: &[u8]| weights.get(&*Owner::of_key(key).origin(None).owner.unwrap()).copied();
        assert_eq!([of(b"a"), of(b"b"), of(b"c")], [Some(1), Some(4), None]);
    }

    #[test]
    fn ids_do_not_repeat() {
        assert_ne!(random_id("req-"), random_id("req-"));
    }
}
