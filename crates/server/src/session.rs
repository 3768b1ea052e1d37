//! Whose a request is: the key that asked, and the session that it belongs to by what the client sends.
//!
//! In this order: `prompt_cache_key` (of the Messages dialect: the session in `metadata.user_id`), a session
//! header, the chain that `previous_response_id` goes on from, the conversation, the lane of a WebSocket. A
//! stored response that begins a chain gives it its own id. A session's key in the engine bears its owner's
//! tag, so nobody meets another's session by naming it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::admission::Owner;
use crate::openai::ApiError;
use crate::urgency;

/// Headers that name a session, the surest first. Codex sends `session-id`, Claude Code
/// `x-claude-code-session-id`, opencode `x-session-id` and `x-session-affinity`.
const HEADERS: [&str; 5] =
    ["session_id", "session-id", "x-session-id", "x-claude-code-session-id", "x-session-affinity"];
/// Longer names are told apart by their digests.
const MAX_NAME: usize = 128;

/// Whose a request is, in the engine's terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// Stands for the API key; none where the server asks for none.
    pub owner: Option<Arc<str>>,
    /// The session's key, owner included.
    pub session: Option<Arc<str>>,
}

/// Who asks, and the session that the request's headers or its connection name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller {
    pub owner: Owner,
    /// When what it asks is not worth answering any more.
    pub deadline: Option<Instant>,
    /// How long that is after it came.
    timeout: Option<Duration>,
    header: Option<Arc<str>>,
    lane: Option<Arc<str>>,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let owner = parts.extensions.get::<Owner>().copied().unwrap_or_default();
        let value = |name| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let timeout = urgency::timeout(&parts.headers)?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let header = HEADERS.into_iter().filter_map(value).find_map(name);
        Ok(Self { owner, deadline, timeout, header, lane: None })
    }
}

impl Caller {
    /// The same on a lane of a WebSocket, which is a session to whom nothing else names one. What it asks
    /// there came at `arrived`.
    pub fn on_lane(&self, connection: &str, stream_id: Option<&str>, arrived: Instant) -> Self {
        let lane = match stream_id {
            Some(stream_id) => name(&format!("{connection}/{stream_id}")),
            None => name(connection),
        };
        Self { lane, deadline: self.timeout.map(|timeout| arrived + timeout), ..self.clone() }
    }

    /// The session that the body's key or the headers name.
    pub fn session(&self, key: Option<&str>) -> Option<Arc<str>> {
        key.and_then(name).or_else(|| self.header.clone())
    }

    /// The lane that the request came on.
    pub fn lane(&self) -> Option<Arc<str>> {
        self.lane.clone()
    }

    /// Whose a request is that has this key in its body.
    pub fn origin(&self, key: Option<&str>) -> Origin {
        self.owner.origin(self.session(key).as_deref())
    }
}

impl Owner {
    /// Stands for the owner in keys and figures; it does not tell the API key.
    pub fn tag(&self) -> String {
        self.digest()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The key of a session of this owner's.
    pub fn session_key(&self, name: &str) -> Arc<str> {
        format!("{}:{name}", self.tag()).into()
    }

    /// The name in the key of a session of this owner's; a key that the engine made up is one itself.
    pub fn session_name<'a>(&self, key: &'a str) -> &'a str {
        key.strip_prefix(&self.tag()).and_then(|rest| rest.strip_prefix(':')).unwrap_or(key)
    }

    /// Whose a request is that belongs to the session of this name.
    pub fn origin(&self, session: Option<&str>) -> Origin {
        Origin {
            owner: (*self != Self::default()).then(|| self.tag().into()),
            session: session.map(|name| self.session_key(name)),
        }
    }
}

/// A session's name as it is kept: bounded, and never empty.
pub(crate) fn name(given: &str) -> Option<Arc<str>> {
    let given = given.trim();
    match given.len() {
        0 => None,
        1..=MAX_NAME => Some(given.into()),
        _ => Some(Sha256::digest(given).iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()),
    }
}

/// The session in the Messages dialect's `metadata`: Claude Code's `user_id` is JSON with a `session_id`,
/// before that `user_..._session_ID`. Another `user_id` names a user, not a session.
pub(crate) fn in_metadata(metadata: &Map<String, Value>) -> Option<String> {
    let user = metadata.get("user_id")?.as_str()?;
    match serde_json::from_str::<Map<String, Value>>(user) {
        Ok(fields) => fields.get("session_id")?.as_str().map(str::to_owned),
        Err(_) => user.rsplit_once("_session_").map(|(_, session)| session.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;
    use serde_json::json;

    async fn caller(headers: &[(&str, &str)]) -> Caller {
        let request =
            headers.iter().fold(Request::builder(), |request, (name, value)| request.header(*name, *value));
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        Caller::from_request_parts(&mut parts, &()).await.unwrap()
    }

    #[tokio::test]
    async fn the_bodys_key_comes_before_the_headers() {
        let caller = caller(&[("x-session-affinity", "c"), ("Session-Id", "b")]).await;
        assert_eq!(caller.session(Some("a")).as_deref(), Some("a"));
        assert_eq!(caller.session(Some("  ")).as_deref(), Some("b"));
        assert_eq!(caller.session(None).as_deref(), Some("b"));
    }

    #[tokio::test]
    async fn without_any_there_is_none() {
        assert_eq!(caller(&[("x-session-id", "")]).await.origin(None), Origin::default());
    }

    #[test]
    fn two_keys_sessions_of_one_name_are_two() {
        let (a, b) = (Owner::of_key(b"a").origin(Some("s")), Owner::of_key(b"b").origin(Some("s")));
        assert_ne!(a.session, b.session);
        assert_ne!(a.owner, b.owner);
    }

    #[test]
    fn a_long_name_stays_short_and_its_own() {
        let long = |last| name(&("x".repeat(10_000) + last)).unwrap();
        assert_eq!(long("a").len(), 64);
        assert_ne!(long("a"), long("b"));
    }

    #[test]
    fn claude_codes_user_id_tells_the_session() {
        let of = |user: &str| in_metadata(json!({"user_id": user}).as_object().unwrap());
        assert_eq!(of(r#"{"device_id": "d", "session_id": "s-1"}"#).as_deref(), Some("s-1"));
        assert_eq!(of("user_ab_account__session_s-2").as_deref(), Some("s-2"));
        assert_eq!(of("somebody"), None);
        assert_eq!(of("{}"), None);
    }
}
