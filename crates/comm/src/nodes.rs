//! The other processes of a group: node 0 has a connection to each, the others have one to node 0.
//!
//! A step begins on node 0, which sends it to the others, and ends when each has said how it ended there. In between, ranks' collectives
//! go by node 0: it receives what the ranks of the others show, and sends each what it has not. Connections carry one
//! step at a time; frames left over from one that failed are read and dropped.

use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::Failed;
use crate::frame::{self, Kind};
use crate::pulse::{End, Health};

/// Longest frame that is looked at before it is received.
const MOST_HEARD: usize = 4 << 10;

/// What each rank of the world shows, on two sides.
pub(crate) type Shown = [[RwLock<Vec<f32>>; 2]];

/// Who gets to see what ranks show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    All,
    /// Rank 0 alone.
    First,
}

/// This process's connections to the others.
pub(crate) struct Nodes {
    index: usize,
    count: usize,
    world: usize,
    wire: Mutex<Wire>,
    health: Arc<Health>,
}

struct Wire {
    /// The step that is open or was last; 0 before the first.
    step: u32,
    links: Vec<Link>,
}

/// A connection to a node.
pub(crate) struct Link {
    pub node: usize,
    /// The node's first rank.
    rank: usize,
    name: String,
    stream: TcpStream,
    out: Vec<u8>,
    body: Vec<u8>,
    /// Whether the node has ended the step.
    ended: bool,
}

impl Link {
    pub fn new(node: usize, rank: usize, name: String, stream: TcpStream) -> Self {
        Self { node, rank, name, stream, out: Vec::new(), body: Vec::new(), ended: true }
    }

    fn send(&mut self, kind: Kind, step: u32, body: &[u8]) -> io::Result<()> {
        frame::begin(&mut self.out, kind, step);
        self.out.extend_from_slice(body);
        frame::send(&mut self.out, &mut self.stream)
    }

    fn send_failed(&mut self, step: u32, failed: &Failed) -> io::Result<()> {
        frame::begin(&mut self.out, Kind::Failed, step);
        self.out.extend_from_slice(&(failed.rank as u32).to_le_bytes());
        self.out.extend_from_slice(failed.reason.as_bytes());
        frame::send(&mut self.out, &mut self.stream)
    }

    /// However long it is: the other side has shown that it is a node.
    fn receive(&mut self) -> io::Result<(Kind, u32)> {
        frame::receive(&mut self.stream, usize::MAX, &mut self.body)
    }

    /// What the other side says has failed in this step, if that is what comes next; it stays to be received.
    fn heard(&mut self, step: u32) -> Option<Failed> {
        let mut bytes = [0; MOST_HEARD];
        self.stream.set_nonblocking(true).ok()?;
        let came = self.stream.peek(&mut bytes);
        // Errors are those of whoever receives next.
        self.stream.set_nonblocking(false).ok()?;
        match frame::receive(&mut &bytes[..came.ok()?], MOST_HEARD, &mut self.body) {
            Ok((Kind::Failed, of)) if of == step => Some(self.failed()),
            _ => None,
        }
    }

    /// What the other side says has failed.
    fn failed(&self) -> Failed {
        let (rank, reason) = self.body.split_first_chunk().unwrap_or((&[0; 4], b"it does not say why"));
        let rank = u32::from_le_bytes(*rank) as usize;
        Failed { rank, reason: String::from_utf8_lossy(reason).into_owned() }
    }

    /// Sends what these ranks show.
    fn give(
        &mut self,
        step: u32,
        ranks: impl Iterator<Item = usize>,
        shown: &Shown,
        side: usize,
    ) -> io::Result<()> {
        frame::begin(&mut self.out, Kind::Parts, step);
        for rank in ranks {
            let part = shown[rank][side].read().unwrap_or_else(PoisonError::into_inner);
            frame::put_part(&mut self.out, &part);
        }
        frame::send(&mut self.out, &mut self.stream)
    }

    /// Takes what these ranks show out of the body that came last; false if it is something else.
    fn take(&self, ranks: impl Iterator<Item = usize>, shown: &Shown, side: usize) -> bool {
        let mut body = &self.body[..];
        for rank in ranks {
            let mut part = shown[rank][side].write().unwrap_or_else(PoisonError::into_inner);
            if frame::take_part(&mut body, &mut part).is_none() {
                return false;
            }
        }
        body.is_empty()
    }
}

impl Nodes {
    pub fn new(index: usize, count: usize, world: usize, links: Vec<Link>, health: Arc<Health>) -> Self {
        Self { index, count, world, wire: Mutex::new(Wire { step: 0, links }), health }
    }

    /// This process's number among the nodes.
    pub fn index(&self) -> usize {
        self.index
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn world(&self) -> usize {
        self.world
    }

    pub fn health(&self) -> &Health {
        &self.health
    }

    /// The ranks of this process.
    pub fn local(&self) -> Range<usize> {
        self.ranks_of(self.index)
    }

    fn ranks_of(&self, node: usize) -> Range<usize> {
        let each = self.world / self.count;
        node * each..(node + 1) * each
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the group because this connection does not work: the failure to report, which is an earlier one if there was one.
    fn lose(&self, link: &Link, why: &dyn std::fmt::Display) -> Failed {
        let failed = Failed { rank: link.rank, reason: format!("{} is gone: {why}", link.name) };
        match self.health.finish_late(End::Lost(failed)) {
            End::Lost(failed) => failed,
            End::Bye => Failed { rank: link.rank, reason: format!("{} has ended", link.name) },
        }
    }

    /// Shows what this process's ranks show to the ranks elsewhere, and fills in what those show. To be called by one thread of each
    /// process.
    pub fn exchange(&self, shown: &Shown, side: usize, audience: Audience) -> Result<(), Failed> {
        let wire = &mut *self.wire();
        let (step, all) = (wire.step, 0..self.world);
        let elsewhere = |node: usize| all.clone().filter(move |rank| !self.ranks_of(node).contains(rank));
        if self.index != 0 {
            let link = &mut wire.links[0];
            link.give(step, self.local(), shown, side).map_err(|e| self.lose(link, &e))?;
            return match audience {
                Audience::All => self.take_parts(link, step, elsewhere(self.index), shown, side),
                Audience::First => Ok(()),
            };
        }
        for link in &mut wire.links {
            let ranks = self.ranks_of(link.node);
            self.take_parts(link, step, ranks, shown, side)?;
        }
        if audience == Audience::All {
            for link in &mut wire.links {
                link.give(step, elsewhere(link.node), shown, side).map_err(|e| self.lose(link, &e))?;
            }
        }
        Ok(())
    }

    fn take_parts(
        &self,
        link: &mut Link,
        step: u32,
        ranks: impl Iterator<Item = usize>,
        shown: &Shown,
        side: usize,
    ) -> Result<(), Failed> {
        match link.receive() {
            Ok((Kind::Parts, of)) if of == step && link.take(ranks, shown, side) => Ok(()),
            Ok((Kind::Failed, of)) if of == step => {
                link.ended = true;
                Err(link.failed())
            }
            Ok((kind, of)) => Err(self.lose(link, &format!("{kind:?} of step {of} came in step {step}"))),
            Err(error) => Err(self.lose(link, &error)),
        }
    }

    /// Tells each node every node's `word`, in their order.
    pub fn agree(&self, word: u64) -> Result<Vec<u64>, Failed> {
        let mut words = vec![word; self.count];
        let wire = &mut *self.wire();
        let step = wire.step;
        if self.index != 0 {
            wire.links[0]
                .send(Kind::Words, step, &word.to_le_bytes())
                .map_err(|e| self.lose(&wire.links[0], &e))?;
        }
        for link in &mut wire.links {
            self.take_words(link, step)?;
            let told = link.body.as_chunks::<8>().0.iter().map(|&bytes| u64::from_le_bytes(bytes));
            let told_of = if self.index == 0 { link.node..link.node + 1 } else { 0..self.count };
            if !told.len().eq(&told_of.len()) {
                return Err(self.lose(link, &"it agrees on something else"));
            }
            words[told_of].iter_mut().zip(told).for_each(|(word, told)| *word = told);
        }
        if self.index == 0 {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            for link in &mut wire.links {
                link.send(Kind::Words, step, &bytes).map_err(|e| self.lose(link, &e))?;
            }
        }
        Ok(words)
    }

    fn take_words(&self, link: &mut Link, step: u32) -> Result<(), Failed> {
        match link.receive() {
            Ok((Kind::Words, of)) if of == step => Ok(()),
            Ok((Kind::Failed, _)) => Err(link.failed()),
            Ok((kind, of)) => Err(self.lose(link, &format!("{kind:?} of step {of} came before the first"))),
            Err(error) => Err(self.lose(link, &error)),
        }
    }

    /// Begins a step on the other nodes; node 0 does.
    pub fn begin(&self, body: &[u8]) -> Result<(), Failed> {
        let wire = &mut *self.wire();
        wire.step = wire.step.wrapping_add(1).max(1);
        for link in &mut wire.links {
            link.ended = false;
            link.send(Kind::Step, wire.step, body).map_err(|e| self.lose(link, &e))?;
        }
        Ok(())
    }

    /// Ends a step on node 0, which may have failed: tells the others if so, waits until each has ended it, and returns what failed there.
    pub fn end(&self, failed: Option<&Failed>) -> Option<Failed> {
        let wire = &mut *self.wire();
        let (step, mut first) = (wire.step, None);
        for link in &mut wire.links {
            if let Some(failed) = failed.filter(|_| !link.ended)
                && let Err(error) = link.send_failed(step, failed)
            {
                first.get_or_insert(self.lose(link, &error));
            }
        }
        for link in &mut wire.links {
            while !link.ended {
                let failed = match link.receive() {
                    Ok((Kind::Done, of)) if of == step => None,
                    Ok((Kind::Failed, of)) if of == step => Some(link.failed()),
                    Ok((Kind::Parts, of)) if of == step => continue,
                    Ok((kind, of)) => {
                        Some(self.lose(link, &format!("{kind:?} of step {of} came in step {step}")))
                    }
                    Err(error) => Some(self.lose(link, &error)),
                };
                link.ended = true;
                first = first.or(failed);
            }
        }
        first
    }

    /// Waits for the next step that node 0 begins, and puts it into `body`; false if the group has ended in good order.
    pub fn next(&self, body: &mut Vec<u8>) -> Result<bool, Failed> {
        let Wire { step, links } = &mut *self.wire();
        let link = &mut links[0];
        loop {
            match link.receive() {
                Ok((Kind::Step, of)) => {
                    *step = of;
                    body.clone_from(&link.body);
                    return Ok(true);
                }
                // Left over from a step that failed here.
                Ok((Kind::Parts | Kind::Failed, of)) if of == *step => {}
                Ok((kind, of)) => {
                    return Err(self.lose(link, &format!("{kind:?} of step {of} came between steps")));
                }
                Err(error) => {
                    return match self.lose(link, &error) {
                        _ if self.health.end() == Some(End::Bye) => Ok(false),
                        failed => Err(failed),
                    };
                }
            }
        }
    }

    /// Tells node 0 how the step ended here.
    pub fn done(&self, failed: Option<&Failed>) -> Result<(), Failed> {
        let wire = &mut *self.wire();
        let (step, link) = (wire.step, &mut wire.links[0]);
        let sent = match failed {
            Some(failed) => link.send_failed(step, failed),
            None => link.send(Kind::Done, step, &[]),
        };
        sent.map_err(|error| self.lose(link, &error))
    }

    /// What has failed in the open step on a node that has said so already; waits for nobody.
    pub fn heard(&self) -> Option<Failed> {
        // Who holds it hears for itself.
        let mut wire = self.wire.try_lock().ok()?;
        let Wire { step, links } = &mut *wire;
        links.iter_mut().find_map(|link| link.heard(*step))
    }

    /// Tells the others that this process cannot go on, before steps begin.
    pub fn withdraw(&self, failed: &Failed) {
        let wire = &mut *self.wire();
        let step = wire.step;
        // Who is gone does not ask why.
        wire.links.iter_mut().for_each(|link| drop(link.send_failed(step, failed)));
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.health.finish(End::Bye);
    }
}
