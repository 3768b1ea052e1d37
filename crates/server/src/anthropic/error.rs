//! Errors in Anthropic's shape: `{"type": "error", "error": {type, message}, "request_id"}`.

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderName, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::admission::REQUEST_ID;
use crate::openai::ApiError;

const OWN_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const VERSION: HeaderName = HeaderName::from_static("anthropic-version");

#[derive(Serialize)]
pub(super) struct ErrorBody<'a> {
    r#type: &'static str,
    error: ErrorFields<'a>,
    request_id: Option<&'a str>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    r#type: &'static str,
    message: &'a str,
}

/// An error as this dialect words it.
pub(super) fn body<'a>(status: StatusCode, message: &'a str, request_id: Option<&'a str>) -> ErrorBody<'a> {
    ErrorBody { r#type: "error", error: ErrorFields { r#type: kind(status), message }, request_id }
}

fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        // Anthropic's own status for it is 529, which no proxy knows; clients look at the type.
        503 => "overloaded_error",
        504 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    }
}

/// Words every error of this dialect's paths, and every answer's request id, as its clients expect
/// them, wherever in the server the error came up. Elsewhere clients are known by their header.
pub(crate) async fn reword(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let ours = path == "/v1/messages" || path.starts_with("/v1/messages/");
    if !ours && !request.headers().contains_key(VERSION) {
        return next.run(request).await;
    }
    let id = request.headers().get(REQUEST_ID).cloned();
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let text = id.as_ref().and_then(|id| id.to_str().ok());
        let body = Json(body(error.status, &message(&error), text)).into_response();
        response = error.respond_with(body);
    }
    if let Some(id) = id {
        response.headers_mut().insert(OWN_REQUEST_ID, id);
    }
    response
}

/// There is no field for the parameter at fault, so the message must name it.
fn message(error: &ApiError) -> String {
    match &error.param {
        Some(param) if !error.message.contains(param) => format!("{param}: {}", error.message),
        _ => error.message.clone(),
    }
}
