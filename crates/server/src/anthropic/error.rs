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
        408 | 504 => "timeout_error",
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

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::middleware::from_fn;
    use http_body_util::BodyExt;
    use serde_json::{Value, json};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_server_that_ends_is_overloaded_and_says_when_to_try_again() {
        let router = Router::new().fallback(async || ApiError::shutting_down()).layer(from_fn(reword));
        let request = Request::post("/v1/messages/count_tokens").header(REQUEST_ID, "r1").body(Body::empty());
        let response = router.oneshot(request.unwrap()).await.unwrap();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "5");
        assert_eq!(response.headers()["request-id"], "r1");
        let body: Value =
            serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
        let message = ApiError::shutting_down().message;
        let error = json!({"type": "overloaded_error", "message": message});
        assert_eq!(body, json!({"type": "error", "error": error, "request_id": "r1"}));
    }

    #[test]
    fn the_field_at_fault_is_named_once() {
        assert_eq!(message(&ApiError::param("top_p", "top_p is too large.")), "top_p is too large.");
        assert_eq!(message(&ApiError::param("a[1].b", "Too large.")), "a[1].b: Too large.");
        assert_eq!(message(&ApiError::invalid("Too large.")), "Too large.");
    }
}
