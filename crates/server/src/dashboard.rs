//! `GET /dashboard`: one page without outside parts that draws `/metrics` and `/v1/sessions` in the browser.

use axum::http::header;
use axum::response::{Html, IntoResponse};

/// What the page may do: nothing but ask this server.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page holds nothing secret, so no key is asked for; the sessions that it then asks for need one.
pub(crate) async fn page() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(include_str!("dashboard.html")))
}
