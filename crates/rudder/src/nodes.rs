//! The ranks that share a model: threads of this process, or of several processes (nodes) that meet over the network.

use std::net::{Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, Result};
use rudder_comm::{Failed, Group, Terms};
use rudder_model::ModelSource;
use tokio::sync::oneshot;

use crate::settings::{KvCacheDtype, ModelSettings, Quantization};

/// As vLLM has it.
const PORT: u16 = 29501;
/// How long nodes wait for each other: longer than any of them takes to fetch the model.
const PATIENCE: Duration = Duration::from_secs(3600);

/// The ranks that a model is cut for, once all nodes are there.
///
/// # Errors
/// If the model cannot be cut so, or the nodes do not come together; says why.
pub fn join(settings: &ModelSettings, source: &ModelSource, gpu: bool) -> Result<Group> {
    let (nodes, world) = (settings.nnodes.unwrap_or(1), settings.tensor_parallel_size.unwrap_or(1));
    if world > 1 {
        source.check_ranks(world)?;
    }
    if nodes == 1 {
        return Ok(Group::new(world));
    }
    let terms = Terms { nodes, world, others: terms(settings, source, gpu) };
    let (host, port) =
        (settings.master_addr.as_deref().unwrap_or("127.0.0.1"), settings.master_port.unwrap_or(PORT));
    match settings.node_rank.unwrap_or(0) {
        0 => lead(host, port, &terms),
        node => {
            let address = unresolved(host, port);
            eprintln!("node {node} of {nodes}, waiting for node 0 at {address}");
            Group::follow(&address, node, &terms, PATIENCE).context("this node cannot join the others")
        }
    }
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    let what = || format!("{host} (master_addr) is no address");
    (host, port).to_socket_addrs().with_context(what)?.next().with_context(what)
}

/// Where node 0 is to be found, as text: a name may not resolve before node 0 is there.
fn unresolved(host: &str, port: u16) -> String {
    match host.parse::<Ipv6Addr>() {
        Ok(address) => SocketAddr::from((address, port)).to_string(),
        Err(_) => format!("{host}:{port}"),
    }
}

fn lead(host: &str, port: u16, terms: &Terms) -> Result<Group> {
    let address = address(host, port)?;
    let listener = TcpListener::bind(address).with_context(|| {
        format!("node 0 cannot listen on {address}; choose another with --master-addr or --master-port")
    })?;
    if !address.ip().is_loopback() {
        tracing::warn!(
            "nodes are not asked for a key, and what they tell each other is not encrypted: {} must be in a network of their own",
            address.ip()
        );
    }
    eprintln!("node 0 of {}, waiting for the others at {address}", terms.nodes);
    Group::lead(listener, terms, PATIENCE).context("the nodes have not come together")
}

/// What must be alike for the ranks' parts to fit each other.
fn terms(settings: &ModelSettings, source: &ModelSource, gpu: bool) -> Vec<(&'static str, String)> {
    let fp8 = |set: bool| if set { "fp8" } else { "auto" }.to_owned();
    let on = |set: Option<bool>| if set == Some(true) { "on" } else { "off" }.to_owned();
    let mut terms = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("device", if gpu { "cuda" } else { "cpu" }.to_owned()),
        ("kv_cache_dtype", fp8(settings.kv_cache_dtype == Some(KvCacheDtype::Fp8))),
        ("quantization", fp8(settings.quantization == Some(Quantization::Fp8))),
        ("fp8_activations", on(settings.fp8_activations)),
    ];
    terms.extend(source.terms());
    terms
}

/// Tells when a node is gone; nothing where the group ends in good order, or has but one.
pub fn watch(group: &Group) -> Result<oneshot::Receiver<Failed>> {
    let (tell, told) = oneshot::channel();
    let group = group.clone();
    // Nobody may be listening any more.
    let watch = move || group.lost().map(|failed| tell.send(failed));
    std::thread::Builder::new().name("nodes".into()).spawn(watch).context("cannot start a thread")?;
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_left_to_resolve_later_and_ipv6_stands_in_brackets() {
        assert_eq!(unresolved("leader.of-a-set", 29501), "leader.of-a-set:29501");
        assert_eq!(unresolved("10.0.0.1", 1), "10.0.0.1:1");
        assert_eq!(unresolved("fd00::1", 1), "[fd00::1]:1");
        assert_eq!(unresolved("[fd00::1]", 1), "[fd00::1]:1");
    }
}
