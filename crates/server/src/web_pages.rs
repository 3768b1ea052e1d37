//! Which web pages may ask a server that wants no API key: its own, and those of this machine.
//!
//! A browser sends requests of any page to any address, to loopback too, and tells the page's origin. Without a key
//! to know clients by, a page from elsewhere would read what others have stored. Who sends no `Origin` is no
//! page of another site.

use std::net::{Ipv4Addr, Ipv6Addr};

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::ServerConfig;
use crate::openai::ApiError;

/// Refuses a request of a page that may not ask.
///
/// # Errors
/// 403, with what to do.
pub(crate) fn check(config: &ServerConfig, headers: &HeaderMap) -> Result<(), ApiError> {
    match headers.get(header::ORIGIN) {
        Some(origin) if config.api_keys.is_empty() && !is_near(origin, headers) => {
            let origin = String::from_utf8_lossy(origin.as_bytes());
            Err(ApiError::forbidden(format!(
                "Pages of the origin `{origin}` may not use a server without API keys, only its own and those of \
                 this machine may. Set one with `--api-key`, and have the page send it."
            )))
        }
        _ => Ok(()),
    }
}

/// What browsers are told of the pages that may ask.
pub(crate) fn cors(config: &ServerConfig) -> CorsLayer {
    // By name: a `*` speaks of all headers but `authorization`.
    let cors = CorsLayer::permissive().allow_headers(AllowHeaders::mirror_request());
    match config.api_keys.is_empty() {
        true => {
            cors.allow_origin(AllowOrigin::predicate(|origin, request| is_near(origin, &request.headers)))
        }
        false => cors,
    }
}

/// Schemes of pages that programs on this machine show as their own: Electron's, and editors'. No website has them.
const PROGRAMS: [&str; 3] = ["app", "vscode-webview", "vscode-file"];

/// Whether an origin is this machine's, or that of the server as its client knows it.
fn is_near(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let Some((scheme, authority)) = origin.to_str().ok().and_then(|origin| origin.split_once("://")) else {
        return false;
    };
    if PROGRAMS.contains(&scheme) {
        return true;
    }
    let Ok(authority) = authority.parse::<Authority>() else { return false };
    let own = headers.get(header::HOST).map(HeaderValue::as_bytes);
    is_loopback(authority.host())
        || own.is_some_and(|own| own.eq_ignore_ascii_case(authority.as_str().as_bytes()))
}

fn is_loopback(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    if host == "localhost" || host.ends_with(".localhost") {
        return true;
    }
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => host.parse().is_ok_and(|address: Ipv6Addr| address.is_loopback()),
        None => host.parse().is_ok_and(|address: Ipv4Addr| address.is_loopback()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(keys: &[&str], origin: &str, host: &str) -> u16 {
        let api_keys = keys.iter().map(|&key| key.to_owned()).collect();
        let config = ServerConfig { api_keys, ..ServerConfig::new("m") };
        let mut headers = HeaderMap::new();
        headers.insert(header::ORIGIN, origin.parse().unwrap());
        headers.insert(header::HOST, host.parse().unwrap());
        check(&config, &headers).map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn pages_of_this_machine_and_the_servers_own_may_ask() {
        for origin in [
            "http://localhost",
            "https://LOCALHOST:3000",
            "http://app.localhost:3000",
            "http://127.0.0.1:5173",
            "http://127.8.0.1",
            "http://[::1]:5173",
            "tauri://localhost",
            "app://obsidian.md",
            "vscode-webview://1qvvd3b0",
            "https://models.example.org",
        ] {
            assert_eq!(status(&[], origin, "models.Example.org"), 200, "{origin}");
        }
        assert_eq!(status(&[], "http://192.168.0.7:8000", "192.168.0.7:8000"), 200);
    }

    #[test]
    fn pages_from_elsewhere_may_not_without_a_key() {
        for origin in [
            "https://example.org",
            "http://localhost.example.org",
            "http://notlocalhost",
            "http://127.0.0.1.example.org",
            "http://localhost@example.org",
            "http://192.168.0.7:8001",
            "http://[::2]",
            "null",
            "chrome-extension://abc",
            "localhost",
            "",
        ] {
            assert_eq!(status(&[], origin, "192.168.0.7:8000"), 403, "{origin}");
            assert_eq!(status(&["key"], origin, "192.168.0.7:8000"), 200, "{origin}");
        }
    }
}
