//! Whether the other nodes are there: a connection of its own to each, over which both sides send a byte every second.
//!
//! A node that dies closes it, one that is cut off falls silent. Either way the group is over: what it computes on is partly gone. The
//! connections for data are shut down then, so that nobody waits in them; they need no time limits of their own.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Failed;

const BEAT: Duration = Duration::from_secs(1);
/// How long a node may be silent.
const SILENCE: Duration = Duration::from_secs(10);
const MOMENT: Duration = Duration::from_millis(500);
const ALIVE: u8 = 1;
const BYE: u8 = 2;

/// What is known of the other nodes.
#[derive(Default)]
pub(crate) struct Health {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    end: Option<End>,
    /// The connections that are shut down at the end.
    data: Vec<TcpStream>,
    pulses: Vec<TcpStream>,
}

/// How a group of nodes ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// In good order.
    Bye,
    /// A node is gone.
    Lost(Failed),
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the group ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.lock().end.clone()
    }

    /// Waits until the group has ended.
    pub fn wait(&self) -> End {
        let mut state = self.lock();
        loop {
            match &state.end {
                Some(end) => return end.clone(),
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Ends the group as [`Health::finish`] does, unless the pulse tells within a moment how it ended: a connection for data that breaks
    /// does not say whether that was in good order.
    pub fn finish_late(&self, end: End) -> End {
        let waited = self.changed.wait_timeout_while(self.lock(), MOMENT, |state| state.end.is_none());
        drop(waited);
        self.finish(end)
    }

    /// Ends the group; the first reason stays and is returned.
    pub fn finish(&self, end: End) -> End {
        let mut state = self.lock();
        if let Some(end) = &state.end {
            return end.clone();
        }
        state.end = Some(end.clone());
        // Errors are of nodes that are gone, and do not mind.
        for pulse in &mut state.pulses {
            let _ = match end {
                End::Bye => pulse.write_all(&[BYE]),
                End::Lost(_) => pulse.shutdown(Shutdown::Both),
            };
        }
        state.data.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        self.changed.notify_all();
        end
    }

    /// Shuts this connection down at the end.
    pub fn watch(&self, data: TcpStream) {
        self.lock().data.push(data);
    }

    /// Keeps up the pulse with a node on a thread of its own. `rank` is the node's first, `node` how to name it. That node 0 ends is in good
    /// order, that another one does is not.
    pub fn keep(self: &Arc<Self>, pulse: TcpStream, rank: usize, node: String) -> std::io::Result<()> {
        pulse.set_read_timeout(Some(BEAT))?;
        self.lock().pulses.push(pulse.try_clone()?);
        let health = self.clone();
        let beat = move || {
            let why = match beat(pulse, &health) {
                Ok(()) if rank == 0 => return drop(health.finish(End::Bye)),
                Ok(()) => "it has ended".to_owned(),
                Err(why) => why,
            };
            health.finish(End::Lost(Failed { rank, reason: format!("{node} is gone: {why}") }));
        };
        std::thread::Builder::new().name("pulse".into()).spawn(beat).map(drop)
    }
}

/// Keeps up a pulse until the group ends or the other side says goodbye; else says why it cannot.
fn beat(mut pulse: TcpStream, health: &Health) -> Result<(), String> {
    let (mut heard, mut sent, mut bytes) = (Instant::now(), None::<Instant>, [0; 64]);
    while health.end().is_none() {
        if sent.is_none_or(|sent| sent.elapsed() >= BEAT) {
            if let Err(error) = pulse.write_all(&[ALIVE]) {
                return Err(error.to_string());
            }
            sent = Some(Instant::now());
        }
        match pulse.read(&mut bytes) {
            Ok(0) => return Err("it closed the connection".into()),
            Ok(n) if bytes[..n].contains(&BYE) => return Ok(()),
            Ok(_) => heard = Instant::now(),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error.to_string()),
        }
        if heard.elapsed() > SILENCE {
            return Err(format!("nothing was heard from it for {} s", SILENCE.as_secs()));
        }
    }
    Ok(())
}
