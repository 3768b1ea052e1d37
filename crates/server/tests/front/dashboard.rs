//! The page for operators: open to everyone, on its own, and true to the metrics there are.

use crate::common::{MODEL, Manner, engine_config, start_with};
use rudder_server::ServerConfig;
use serde_json::json;

/// Names in the page that end as those of metrics do, without `rudder_`.
fn metrics_named(page: &str) -> Vec<&str> {
    let ends = ["_total", "_seconds", "_running", "_waiting", "_perc", "_blocks"];
    page.split('"').filter(|word| ends.iter().any(|end| word.ends_with(end)) && !word.contains(' ')).collect()
}

#[tokio::test]
async fn the_dashboard_needs_no_key_and_nothing_from_elsewhere() {
    let config = ServerConfig { api_keys: vec!["secret".into()], ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let answer = fixture.get("/dashboard").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/html; charset=utf-8");
    assert!(answer.headers["content-security-policy"].to_str().unwrap().contains("connect-src 'self'"));
    assert!(!answer.text().contains("://"), "asks elsewhere");
}

#[tokio::test]
async fn every_metric_that_the_dashboard_draws_exists() {
    let config = ServerConfig::new(MODEL);
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let prompt = json!({"prompt": "fn main", "max_tokens": 4});
    assert_eq!(fixture.post("/v1/completions", &prompt).await.status, 200);
    fixture.idle().await;
    let (page, metrics) = (fixture.get("/dashboard").await.text(), fixture.get("/metrics").await.text());
    let named = metrics_named(&page);
    assert!(named.len() > 12, "{named:?}");
    for name in named {
        let name = format!("rudder_{}", name.trim_start_matches("rudder_"));
        assert!(metrics.contains(&format!("# TYPE {name} ")), "{name}");
    }
}
