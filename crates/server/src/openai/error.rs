//! The error body that OpenAI's clients parse: `{"error": {message, type, param, code}}`.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rudder_engine::SubmitError;
use rudder_text::TextError;
use serde::Serialize;

use crate::generate::Failed;

/// A refused or failed request, as its client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What was wrong and what to do.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The request field at fault.
    pub param: Option<String>,
    /// OpenAI's code, where it has one.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

/// The JSON form of an [`ApiError`].
#[derive(Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// 400.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 for one field.
    pub fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::invalid(message) }
    }

    /// 400 for a prompt that the context cannot hold. Clients recognise an overflow by the code or
    /// by one of two phrases, so the message has both.
    pub fn context_length(tokens: usize, maximum: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {maximum} tokens, and the request leaves no room for an \
             answer: prompt is too long: {tokens} tokens > {maximum} maximum. Shorten the prompt."
        );
        Self { code: Some("context_length_exceeded"), ..Self::param("prompt", message) }
    }

    /// 401.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// 403 for a web page of another origin.
    pub fn forbidden(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message);
        Self { code: Some("origin_not_allowed"), ..error }
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// 404 for a path.
    pub fn unknown_route(method: &str, path: &str) -> Self {
        let message = format!("Unknown request URL: {method} {path}.");
        Self { code: Some("unknown_url"), ..Self::not_found(message) }
    }

    /// 400 for a request that names no model.
    pub fn missing_model(served: &str) -> Self {
        Self::param("model", format!("model is missing; this server serves `{served}`."))
    }

    /// 404 for a model.
    pub fn unknown_model(model: &str, served: &str) -> Self {
        let message = format!(
            "The model `{model}` does not exist here; this server serves `{served}`. To have it answer to this \
             name too, start it with `--alias {model}`."
        );
        Self { param: Some("model".into()), code: Some("model_not_found"), ..Self::not_found(message) }
    }

    /// 405.
    pub fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not answer {method}.");
        let error = Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message);
        Self { code: Some("method_not_allowed"), ..error }
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is over the limit of {limit} bytes.");
        let error = Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message);
        Self { code: Some("request_too_large"), ..error }
    }

    /// 408 for a body of which nothing came for this long.
    pub fn body_too_slow(pause: Duration) -> Self {
        let message = format!(
            "Nothing of the request body came for {} s, and it is not whole; send the request again.",
            pause.as_secs_f64()
        );
        let error = Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message);
        Self { code: Some("request_timeout"), ..error }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503 while draining.
    pub fn shutting_down() -> Self {
        let message =
            "The server is shutting down; send the request again, to another replica if there is one.";
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("shutting_down"), retry_after: Some(5), ..error }
    }

    /// 503 for want of something that others use up at the moment.
    pub fn overloaded(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("overloaded"), retry_after: Some(5), ..error }
    }

    /// The same error, blamed on `param`.
    #[must_use]
    pub fn at(self, param: &str) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    pub(crate) fn body(&self) -> ErrorBody<'_> {
        ErrorBody {
            error: ErrorFields {
                message: &self.message,
                r#type: self.kind,
                param: self.param.as_deref(),
                code: self.code,
            },
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::TooLong { tokens, maximum } => Self::context_length(tokens, maximum),
            SubmitError::Busy { retry_after, .. } => {
                let busy = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", error.to_string());
                let seconds = retry_after.as_secs().max(1);
                Self { code: Some("rate_limit_exceeded"), retry_after: Some(seconds), ..busy }
            }
            SubmitError::ShuttingDown => Self::shutting_down(),
            SubmitError::TooMany { .. } => Self::invalid(error.to_string()),
            SubmitError::EmptyPrompt | SubmitError::BadToken { .. } => {
                Self::param("prompt", error.to_string())
            }
        }
    }
}

impl From<Failed> for ApiError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Engine(message) => Self::internal(message),
            Failed::Expired => {
                let error = Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", failed.to_string());
                Self { code: Some("deadline_exceeded"), ..error }
            }
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Model(message) => Self::internal(message),
            TextError::Template(_) => Self::param("messages", error.to_string()),
            TextError::Unsupported(message) => Self::invalid(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = Json(self.body()).into_response();
        self.respond_with(body)
    }
}

impl ApiError {
    /// A response of this error's status and headers around a body. It carries the error along, for
    /// those further out who word it otherwise.
    pub(crate) fn respond_with(self, body: Response) -> Response {
        let mut response = (self.status, body).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(error: &ApiError) -> serde_json::Value {
        serde_json::to_value(error.body()).unwrap()
    }

    #[test]
    fn an_error_has_all_four_fields_of_openais_shape() {
        let body = json(&ApiError::param("temperature", "too hot"));
        assert_eq!(
            body,
            serde_json::json!({"error": {"message": "too hot", "type": "invalid_request_error",
                "param": "temperature", "code": null}})
        );
    }

    #[test]
    fn an_overflow_is_recognisable_by_code_and_by_either_phrase() {
        let error = ApiError::from(SubmitError::TooLong { tokens: 5000, maximum: 4096 });
        assert_eq!((error.status.as_u16(), error.code), (400, Some("context_length_exceeded")));
        assert!(error.message.contains("maximum context length is 4096 tokens"));
        assert!(error.message.contains("prompt is too long: 5000 tokens > 4096 maximum"));
    }

    #[test]
    fn a_full_queue_says_when_to_retry_and_never_after_zero_seconds() {
        let busy = SubmitError::Busy { waiting: 3, retry_after: Duration::from_millis(200) };
        let response = ApiError::from(busy).into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
    }

    #[test]
    fn draining_is_503_with_retry_after() {
        let response = ApiError::from(SubmitError::ShuttingDown).into_response();
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
    }
}
