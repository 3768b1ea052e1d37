//! `rudder serve`: brings the model up and answers HTTP until told to end.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rudder_hub::bytes;
use rudder_server::{ForcedCall, Server, ServerConfig, StoreConfig, serve, terminated};
use rudder_text::{ReasoningFormat, ToolFormat};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::launch::{Launched, Summary, follow, launch};
use crate::nodes;
use crate::settings::{ModelSettings, ServerSettings};

/// Serves until Ctrl-C or SIGTERM, and then until running requests have ended or had their time. A node other than 0 does not
/// serve: it runs what node 0 tells it to.
pub fn run(model: &ModelSettings, settings: ServerSettings, force_tool_call: Option<&Path>) -> Result<()> {
    let forced_calls = force_tool_call.map(forced_calls).transpose()?.unwrap_or_default();
    let runtime = Runtime::new().context("cannot start the async runtime")?;
    let begun = Arc::new(AtomicBool::new(false));
    let told = runtime.spawn(first_signal(begun.clone()));
    if model.node_rank.is_some_and(|node| node > 0) {
        runtime.spawn(told_in_vain(told));
        return follow(model, || begun.store(true, Ordering::Relaxed));
    }
    let host = settings.host.unwrap_or(Ipv4Addr::LOCALHOST.into());
    let address = SocketAddr::new(host, settings.port.unwrap_or(8000));
    // A port in use should be told before a model is downloaded and loaded. Then the port is let
    // go, so that a client that comes too early is refused and does not wait in a queue.
    drop(runtime.block_on(bind(address))?);

    let Launched { engine, text, name, group, summary } = launch(model)?;
    let config = ServerConfig { forced_calls, ..config(settings, name)? };
    let listener = runtime.block_on(bind(address))?;
    print_summary(&config, &summary, listener.local_addr()?);
    if !host.is_loopback() && config.api_keys.is_empty() {
        tracing::warn!(
            "anyone who can reach {host} may use this server; set RUDDER_API_KEY to ask for a key"
        );
    }
    let grace = config.grace;
    let (lost, mut fault) = (nodes::watch(&group)?, None);
    let computing = engine.clone();
    let end = async {
        tokio::select! {
            () = told_to_end(told, grace) => {}
            Ok(failed) = lost => {
                tracing::error!("{}; nothing can be computed without it", failed.reason);
                fault = Some(format!("{}; start all nodes again", failed.reason));
            }
            reason = computing.broken() => {
                tracing::error!("{reason}; nothing more can be computed in this process");
                fault = Some(format!("{reason}; nothing more can be computed in this process, start it again"));
            }
        }
    };
    begun.store(true, Ordering::Relaxed);
    let all_ended = runtime.block_on(serve(listener, Server::new(config, text, engine), end))?;
    if let Some(fault) = fault {
        bail!(fault);
    }
    if !all_ended {
        tracing::warn!("requests were still running after {} s and were cut off", grace.as_secs());
    }
    group.bye();
    Ok(())
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}; choose another with --port or --host"))
}

/// Calls for tests, which their file holds as a JSON array.
fn forced_calls(file: &Path) -> Result<Vec<ForcedCall>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no array of calls", file.display()))
}

fn config(settings: ServerSettings, name: String) -> Result<ServerConfig> {
    let served = settings.served_model_name.unwrap_or_else(|| name.clone());
    let mut aliases = settings.alias.unwrap_or_default();
    if served != name {
        aliases.insert(0, name);
    }
    let defaults = ServerConfig::new(served);
    let tool_parser = settings.tool_parser.as_deref().map(tool_format).transpose()?;
    let reasoning_parser = settings.reasoning_parser.as_deref().map(reasoning_format).transpose()?;
    Ok(ServerConfig {
        tool_parser,
        reasoning_parser,
        aliases,
        api_keys: settings.api_key.unwrap_or_default(),
        key_weights: settings.key_weight.unwrap_or_default(),
        max_body_bytes: settings
            .max_body
            .map_or(defaults.max_body_bytes, |b| usize::try_from(b.0).unwrap_or(usize::MAX)),
        keep_alive: settings.keep_alive.map_or(defaults.keep_alive, Duration::from_secs_f64),
        grace: settings.drain_seconds.map_or(defaults.grace, Duration::from_secs),
        store: StoreConfig {
            folder: settings.data_dir.or_else(default_data_dir),
            retention: settings.response_retention.map_or(defaults.store.retention, |time| time.0),
            max_bytes: settings.response_store_max.map_or(defaults.store.max_bytes, |bytes| bytes.0),
        },
        ..defaults
    })
}

/// `none` turns the reading of calls off.
fn tool_format(name: &str) -> Result<Option<ToolFormat>> {
    if name == "none" {
        return Ok(None);
    }
    let format = ToolFormat::named(name);
    format.map(Some).with_context(|| {
        format!("unknown tool parser `{name}`; use none, hermes, qwen3_coder, llama3_json, pythonic, mistral, deepseek_v3, glm45 or harmony")
    })
}

/// `none` turns the reading of reasoning off.
fn reasoning_format(name: &str) -> Result<Option<ReasoningFormat>> {
    if name == "none" {
        return Ok(None);
    }
    let format = ReasoningFormat::named(name);
    format
        .map(Some)
        .with_context(|| format!("unknown reasoning parser `{name}`; use none, think, mistral or harmony"))
}

/// `rudder` in the user's data folder, if there is one.
fn default_data_dir() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = var("XDG_DATA_HOME").or_else(|| var("HOME").map(|home| home.join(".local/share")));
    if base.is_none() {
        tracing::warn!("stored responses are kept in memory; choose a folder with --data-dir to keep them");
    }
    base.map(|base| base.join("rudder"))
}

/// Done at the first signal to end. One that comes before all has `begun` ends the process: there is nothing to finish. It is listened for
/// from the start on: signals do nothing to the first process of a container that does not.
async fn first_signal(begun: Arc<AtomicBool>) {
    terminated().await;
    if !begun.load(Ordering::Relaxed) {
        eprintln!("ended before anything was served");
        std::process::exit(0);
    }
}

/// Done once `told` is. The second signal ends the process at once.
async fn told_to_end(told: JoinHandle<()>, grace: Duration) {
    let _ = told.await;
    eprintln!("finishing running requests, at most {} s; again to end at once", grace.as_secs());
    tokio::spawn(end_at_once());
}

/// The same of a node other than 0.
async fn told_in_vain(told: JoinHandle<()>) {
    let _ = told.await;
    eprintln!("going on until node 0 ends; again to end at once");
    end_at_once().await;
}

/// Ends the process at the first signal to end.
async fn end_at_once() {
    terminated().await;
    std::process::exit(1);
}

fn print_summary(config: &ServerConfig, s: &Summary, address: SocketAddr) {
    let licence = s.licence.map(|l| format!(", licence {l}")).unwrap_or_default();
    let key = if config.api_keys.is_empty() { "" } else { " -H \"Authorization: Bearer $RUDDER_API_KEY\"" };
    let url = format!("http://{}", reachable(address));
    println!("model     {} ({}: {}){licence}", config.model, s.architecture, s.formats);
    println!("weights   {}", bytes(s.weight_bytes));
    println!("kv cache  {} of {}, {} tokens", bytes(s.kv_bytes), s.kv_format, s.kv_tokens);
    if let Some((capacity, tokens)) = s.kv_disk {
        println!("kv disk   up to {}, {tokens} tokens found", bytes(capacity));
    }
    if let Some(draft) = &s.draft {
        let (weights, kv) = (bytes(draft.weight_bytes), bytes(draft.kv_bytes));
        let (name, window) = (&draft.name, draft.window);
        println!(
            "draft     {name} ({}), {weights}, {kv} of kv cache, {window} tokens a sequence",
            draft.formats
        );
    }
    println!("context   {} tokens a sequence (the model's own: {})", s.max_context, s.context_length);
    println!("device    {}", s.device);
    if s.ranks > 1 {
        let nodes = if s.nodes > 1 { format!(" on {} nodes", s.nodes) } else { String::new() };
        println!("ranks     {} that share the model{nodes}", s.ranks);
    }
    println!("threads   {}", s.threads);
    println!("address   {url}, ready {:.1} s after loading began", s.took.as_secs_f64());
    println!("watch     {url}/dashboard");
    println!(
        "try       curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \
         -d '{{\"model\": \"{}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Reverse a string in Go.\"}}]}}'",
        config.model
    );
}

/// The address as a client on this machine would write it: "all addresses" is none to connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
