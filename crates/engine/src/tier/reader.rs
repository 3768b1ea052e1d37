//! Reads blocks while the step loop goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rudder_kvstore::{BlockKey, ReadError, Store};

use super::buffers::Buffers;

/// Blocks that were read and wait for the step loop take at most about so many bytes of memory.
const AHEAD_BYTES: usize = 64 << 20;
/// How often a reader that waits for a buffer looks whether it is still wanted.
const LOOK_UP: Duration = Duration::from_millis(20);

/// Blocks to read, in order.
pub(crate) struct Order {
    pub ticket: u64,
    pub keys: Vec<BlockKey>,
    /// Set when nobody wants them any more.
    pub cancelled: Arc<AtomicBool>,
}

/// What comes of an [`Order`]: blocks in its order, then its end.
pub(crate) enum Arrival {
    /// The next block; the buffer goes back with [`Reader::give_back`].
    Block { ticket: u64, payload: Box<[u8]> },
    /// All were read, or one could not be. It took as long as all of it did, waiting for buffers too: where the
    /// step loop is slower than the disk, that is what a load takes.
    End { ticket: u64, bytes: usize, took: Duration, outcome: Result<(), ReadError> },
}

/// The way to the reading thread and back.
pub(crate) struct Reader {
    orders: mpsc::Sender<Order>,
    arrivals: mpsc::Receiver<Arrival>,
    /// One that was waited for.
    first: Option<Arrival>,
    buffers: Arc<Buffers>,
}

impl Reader {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(store: Arc<Store>) -> std::io::Result<Self> {
        let (orders, received) = mpsc::channel();
        let (sender, arrivals) = mpsc::channel();
        let buffers = Arc::new(Buffers::new(store.block_bytes(), AHEAD_BYTES));
        let reader = Self { orders, arrivals, first: None, buffers: buffers.clone() };
        std::thread::Builder::new().name("rudder-kv-reader".into()).spawn(move || {
            for order in received {
                if fill(&store, &order, &buffers, &sender).is_none() {
                    return;
                }
            }
        })?;
        Ok(reader)
    }

    /// Queues an order.
    pub fn read(&self, order: Order) {
        // The thread outlives this handle: it ends by the channel's end.
        let _ = self.orders.send(order);
    }

    /// The next arrival, if there is one.
    pub fn arrived(&mut self) -> Option<Arrival> {
        self.first.take().or_else(|| self.arrivals.try_recv().ok())
    }

    /// Waits until something has arrived, at most so long.
    pub fn wait(&mut self, patience: Duration) {
        if self.first.is_none() {
            self.first = self.arrivals.recv_timeout(patience).ok();
        }
    }

    /// Takes a block's buffer back.
    pub fn give_back(&self, buffer: Box<[u8]>) {
        self.buffers.give(buffer);
    }
}

/// Reads an order's blocks. None when nobody listens any more.
fn fill(store: &Store, order: &Order, buffers: &Buffers, to: &mpsc::Sender<Arrival>) -> Option<()> {
    let ticket = order.ticket;
    let (began, mut bytes, mut outcome) = (Instant::now(), 0, Ok(()));
    for key in &order.keys {
        let Some(mut payload) = buffer(buffers, &order.cancelled) else { break };
        outcome = store.read(key, &mut payload);
        if outcome.is_err() {
            buffers.give(payload);
            break;
        }
        bytes += payload.len();
        to.send(Arrival::Block { ticket, payload }).ok()?;
    }
    to.send(Arrival::End { ticket, bytes, took: began.elapsed(), outcome }).ok()
}

/// A buffer; none if the order is cancelled first.
fn buffer(buffers: &Buffers, cancelled: &AtomicBool) -> Option<Box<[u8]>> {
    while !cancelled.load(Ordering::Relaxed) {
        if let Some(buffer) = buffers.take_within(LOOK_UP) {
            return Some(buffer);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use rudder_kvstore::{Disk, Fingerprint, Label};

    use super::*;

    #[test]
    fn waiting_for_buffers_is_part_of_what_a_load_takes() {
        const HELD: Duration = Duration::from_millis(30);
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder.path()).unwrap();
        let store = Store::open(Arc::new(disk), 1 << 20, 4096, Fingerprint([7; 32])).unwrap();
        let keys: Vec<_> = (0..5).map(|n| store.root().child(&[n; 16])).collect();
        for (&key, n) in keys.iter().zip(0..) {
            store.announce(key, Label::NOBODY);
            store.write(key, [n; 16], &[0; 4096]).unwrap();
        }
        // Four at least, whatever they take.
        let buffers = Buffers::new(4096, 0);
        let (sender, arrivals) = mpsc::channel();
        let order = Order { ticket: 0, keys, cancelled: Arc::default() };
        let took = std::thread::scope(|scope| {
            scope.spawn(|| fill(&store, &order, &buffers, &sender));
            let first: Vec<_> = (0..4).map(|_| arrivals.recv().unwrap()).collect();
            std::thread::sleep(HELD);
            for arrival in first.into_iter().chain(arrivals.iter().take(1)) {
                let Arrival::Block { payload, .. } = arrival else { panic!("there are five blocks") };
                buffers.give(payload);
            }
            match arrivals.recv() {
                Ok(Arrival::End { took, outcome: Ok(()), .. }) => took,
                _ => panic!("all can be read"),
            }
        });
        assert!(took >= HELD, "{took:?}");
    }
}
