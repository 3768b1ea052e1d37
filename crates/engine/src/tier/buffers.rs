//! A bounded number of buffers of one block each, handed to and fro between threads.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// See the module. Buffers are made as they are needed and used again.
pub(crate) struct Buffers {
    bytes: usize,
    limit: usize,
    state: Mutex<State>,
    returned: Condvar,
}

struct State {
    free: Vec<Box<[u8]>>,
    out: usize,
}

impl Buffers {
    /// Of `bytes` each, and of about `total` bytes together.
    pub fn new(bytes: usize, total: usize) -> Self {
        let limit = (total / bytes.max(1)).max(4);
        let state = State { free: Vec::new(), out: 0 };
        Self { bytes, limit, state: Mutex::new(state), returned: Condvar::new() }
    }

    /// A buffer, if there is one now. Its content is undefined.
    pub fn take(&self) -> Option<Box<[u8]>> {
        self.take_from(&mut self.lock())
    }

    /// A buffer, waiting at most so long for one.
    pub fn take_within(&self, patience: Duration) -> Option<Box<[u8]>> {
        let state = self.lock();
        let none_left = |state: &mut State| state.out == self.limit;
        let waited = self.returned.wait_timeout_while(state, patience, none_left);
        self.take_from(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Takes a buffer back.
    pub fn give(&self, buffer: Box<[u8]>) {
        let mut state = self.lock();
        state.free.push(buffer);
        state.out -= 1;
        drop(state);
        self.returned.notify_one();
    }

    /// Buffers that are out.
    pub fn out(&self) -> usize {
        self.lock().out
    }

    fn take_from(&self, state: &mut State) -> Option<Box<[u8]>> {
        if state.out == self.limit {
            return None;
        }
        state.out += 1;
        Some(state.free.pop().unwrap_or_else(|| vec![0; self.bytes].into()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
