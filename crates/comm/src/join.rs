//! How the processes of a model meet: node 0 listens, the others connect, and both sides check that they mean the same.
//!
//! A node connects twice, first for its pulse (`pulse.rs`), then for data. Each time it sends a [`Kind::Hello`], lines of text: this
//! protocol, what the connection is for, the node's number, and its terms, `name=value` each. Node 0 answers with a welcome, or refuses and
//! says which terms differ. Nothing is encrypted and nobody shows a key: the port is for a private network, and open only until all have come.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::frame::{self, Kind};
use crate::nodes::{Link, Nodes};
use crate::pulse::{End, Health};
use crate::{Failed, Group};

const PROTOCOL: &str = "rudder-node 2";
/// Longest text of a handshake.
const MOST_TEXT: usize = 64 << 10;
/// How long a node may take to present itself, and node 0, which greets one after the other, to answer.
const GREETING: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_millis(500);

const ALIKE: &str = "start all nodes with the same version, settings and model files";

/// What all nodes of a model must have alike.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Processes that share the model.
    pub nodes: usize,
    /// Ranks of the model, the same number in each process.
    pub world: usize,
    /// Everything else, as a name and a value each, without line breaks.
    pub others: Vec<(&'static str, String)>,
}

/// Why nodes did not come together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct JoinError(String);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Pulse,
    Data,
}

struct Hello<'a> {
    purpose: Purpose,
    node: usize,
    terms: HashMap<&'a str, &'a str>,
}

impl Terms {
    fn all(&self) -> Vec<(&str, String)> {
        let mut all =
            vec![("nnodes", self.nodes.to_string()), ("tensor_parallel_size", self.world.to_string())];
        all.extend(self.others.iter().cloned());
        all
    }

    /// What is different on the node of these terms, if anything is, and what to do.
    fn differences(&self, theirs: &HashMap<&str, &str>, node: usize) -> Option<String> {
        let differences: Vec<String> = self
            .all()
            .into_iter()
            .filter(|(name, ours)| theirs.get(name) != Some(&ours.as_str()))
            .map(|(name, ours)| {
                let theirs = theirs.get(name).unwrap_or(&"unknown");
                format!("{name} is {theirs} on node {node} and {ours} on node 0")
            })
            .collect();
        (!differences.is_empty()).then(|| format!("{}; {ALIKE}", differences.join("; ")))
    }

    fn check(&self) -> Result<(), JoinError> {
        match self.nodes >= 2 && self.world > 0 && self.world.is_multiple_of(self.nodes) {
            true => Ok(()),
            false => Err(JoinError(format!(
                "{} nodes cannot have as many of {} ranks each",
                self.nodes, self.world
            ))),
        }
    }
}

impl Group {
    /// Node 0 of a group: waits at `listener` until all others have come.
    ///
    /// # Errors
    /// If they have not within `patience`, one is gone again, or the ranks cannot be dealt out evenly.
    pub fn lead(listener: TcpListener, terms: &Terms, patience: Duration) -> Result<Self, JoinError> {
        terms.check()?;
        let failed = |error: io::Error| JoinError(format!("nodes cannot be waited for: {error}"));
        listener.set_nonblocking(true).map_err(failed)?;
        let mut leader =
            Leader { terms, health: Arc::default(), pulses: vec![false; terms.nodes], links: Vec::new() };
        let until = Instant::now() + patience;
        while leader.links.len() + 1 < terms.nodes {
            if let Some(End::Lost(Failed { reason, .. })) = leader.health.end() {
                return Err(JoinError(reason));
            }
            match listener.accept() {
                Ok((stream, peer)) => {
                    if let Err(error) = leader.greet(stream) {
                        tracing::warn!("{peer} does not join: {error}");
                    }
                }
                // None there, or it was lost before it was made.
                Err(_) => std::thread::sleep(POLL),
            }
            if Instant::now() > until {
                let missing: Vec<_> =
                    (1..terms.nodes).filter(|&node| !leader.has(node)).map(|n| n.to_string()).collect();
                return Err(JoinError(format!(
                    "node {} has not come in {} s",
                    missing.join(", "),
                    patience.as_secs()
                )));
            }
        }
        let Leader { health, mut links, .. } = leader;
        links.sort_by_key(|link| link.node);
        Ok(Self::over(Nodes::new(0, terms.nodes, terms.world, links, health)))
    }

    /// Another node of a group, from 1 on: connects to node 0 at `address` (`host:port`), and waits for it if it is not there yet, its name included.
    ///
    /// # Errors
    /// If it does not come within `patience`, or refuses this node.
    pub fn follow(address: &str, node: usize, terms: &Terms, patience: Duration) -> Result<Self, JoinError> {
        terms.check()?;
        let failed = |error: io::Error| JoinError(format!("node 0 at {address} cannot be joined: {error}"));
        let until = Instant::now() + patience;
        let mut told = String::new();
        let pulse = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => return Err(failed(error)),
                Err(error) => {
                    if error.to_string() != told {
                        told = error.to_string();
                        tracing::warn!("node 0 at {address} is not there yet, trying on: {told}");
                    }
                    std::thread::sleep(RETRY);
                }
            }
        };
        // A name may stand for several addresses.
        let found = pulse.peer_addr().map_err(failed)?;
        let hello = |mut stream: TcpStream, purpose| {
            prepare(&stream, ANSWER).map_err(failed)?;
            let (mut bytes, mut body) = (Vec::new(), Vec::new());
            frame::begin(&mut bytes, Kind::Hello, 0);
            bytes.extend_from_slice(greeting(purpose, node, terms).as_bytes());
            frame::send(&mut bytes, &mut stream).map_err(failed)?;
            match frame::receive(&mut stream, MOST_TEXT, &mut body).map_err(failed)?.0 {
                Kind::Welcome => stream.set_read_timeout(None).map(|()| stream).map_err(failed),
                Kind::Refused => Err(JoinError(String::from_utf8_lossy(&body).into_owned())),
                _ => Err(JoinError(format!("what answers at {address} is not node 0"))),
            }
        };
        let pulse = hello(pulse, Purpose::Pulse)?;
        let health = Arc::<Health>::default();
        let name = format!("node 0 at {address}");
        health.keep(pulse, 0, name.clone()).map_err(failed)?;
        let data = hello(TcpStream::connect(found).map_err(failed)?, Purpose::Data)?;
        health.watch(data.try_clone().map_err(failed)?);
        let links = vec![Link::new(0, 0, name, data)];
        Ok(Self::over(Nodes::new(node, terms.nodes, terms.world, links, health)))
    }
}

/// Node 0 while it waits.
struct Leader<'a> {
    terms: &'a Terms,
    health: Arc<Health>,
    /// Whose pulse there is.
    pulses: Vec<bool>,
    links: Vec<Link>,
}

impl Leader<'_> {
    fn has(&self, node: usize) -> bool {
        self.links.iter().any(|link| link.node == node)
    }

    /// Takes in a connection, or refuses it.
    fn greet(&mut self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        prepare(&stream, GREETING)?;
        let (mut body, mut answer) = (Vec::new(), Vec::new());
        let (kind, _) = frame::receive(&mut stream, MOST_TEXT, &mut body)?;
        let text = String::from_utf8_lossy(&body);
        let hello = match kind {
            Kind::Hello => self.check(&text),
            _ => Err("no hello".into()),
        };
        let (purpose, node) = match hello {
            Ok(hello) => hello,
            Err(reason) => {
                frame::begin(&mut answer, Kind::Refused, 0);
                answer.extend_from_slice(reason.as_bytes());
                frame::send(&mut answer, &mut stream)?;
                return Err(io::Error::other(reason));
            }
        };
        frame::begin(&mut answer, Kind::Welcome, 0);
        frame::send(&mut answer, &mut stream)?;
        stream.set_read_timeout(None)?;
        let (rank, name) = (node * self.terms.world / self.terms.nodes, name(node, &stream));
        match purpose {
            Purpose::Pulse => {
                self.pulses[node] = true;
                self.health.keep(stream, rank, name)
            }
            Purpose::Data => {
                self.health.watch(stream.try_clone()?);
                self.links.push(Link::new(node, rank, name, stream));
                Ok(())
            }
        }
    }

    /// What a node wants, if it may have it; else why not.
    fn check(&self, text: &str) -> Result<(Purpose, usize), String> {
        let Hello { purpose, node, terms } = parse(text).ok_or_else(|| {
            format!("its first words are not {PROTOCOL:?}: it is no node, or another version")
        })?;
        if let Some(differences) = self.terms.differences(&terms, node) {
            return Err(differences);
        }
        if !(1..self.terms.nodes).contains(&node) {
            return Err(format!("node_rank {node} is not from 1 to {}", self.terms.nodes - 1));
        }
        match purpose {
            Purpose::Pulse if self.pulses[node] => {
                Err(format!("there is a node {node} already; give each node a node_rank of its own"))
            }
            Purpose::Data if !self.pulses[node] || self.has(node) => {
                Err(format!("node {node} sends data out of turn"))
            }
            _ => Ok((purpose, node)),
        }
    }
}

/// Small frames must not wait for one another, and a handshake must end.
fn prepare(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))
}

fn name(node: usize, stream: &TcpStream) -> String {
    match stream.peer_addr() {
        Ok(address) => format!("node {node} at {}", address.ip()),
        Err(_) => format!("node {node}"),
    }
}

fn greeting(purpose: Purpose, node: usize, terms: &Terms) -> String {
    let purpose = match purpose {
        Purpose::Pulse => "pulse",
        Purpose::Data => "data",
    };
    let mut text = format!("{PROTOCOL}\n{purpose}\n{node}\n");
    terms.all().iter().for_each(|(name, value)| text.extend([*name, "=", value.as_str(), "\n"]));
    text
}

fn parse(text: &str) -> Option<Hello<'_>> {
    let mut lines = text.lines();
    if lines.next()? != PROTOCOL {
        return None;
    }
    let purpose = match lines.next()? {
        "pulse" => Purpose::Pulse,
        "data" => Purpose::Data,
        _ => return None,
    };
    let node = lines.next()?.parse().ok()?;
    Some(Hello { purpose, node, terms: lines.map(|line| line.split_once('=')).collect::<Option<_>>()? })
}
