//! Has the system fetch into its page cache what waiting sequences will load.

use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Weak};

use rudder_kvstore::BlockKey;

/// Most orders that wait for the disk: what would be fetched after so many others comes too late.
const MOST_WAITING: usize = 64;
/// Blocks fetched between two looks at whether anybody still waits for them.
const STRETCH: usize = 32;

/// What is ordered is fetched as long as this is there.
pub(crate) type Hint = Arc<()>;

struct Order {
    keys: Vec<BlockKey>,
    wanted: Weak<()>,
}

/// The way to a thread of its own: the system may take its time even for a hint.
pub(crate) struct Ahead(SyncSender<Order>);

impl Ahead {
    /// Starts the thread, which calls `fetch` with a few blocks at a time.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(fetch: impl Fn(&[BlockKey]) + Send + 'static) -> std::io::Result<Self> {
        let (sender, orders) = mpsc::sync_channel::<Order>(MOST_WAITING);
        std::thread::Builder::new().name("rudder-kv-ahead".into()).spawn(move || {
            for Order { keys, wanted } in orders {
                keys.chunks(STRETCH).take_while(|_| wanted.strong_count() > 0).for_each(&fetch);
            }
        })?;
        Ok(Self(sender))
    }

    /// These blocks, in this order, will be read soon; none if so much is ordered that it would not help.
    pub fn fetch(&self, keys: Vec<BlockKey>) -> Option<Hint> {
        let hint = Hint::default();
        // The thread outlives this handle: it ends by the channel's end.
        self.0.try_send(Order { keys, wanted: Arc::downgrade(&hint) }).ok().map(|()| hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(order: u8) -> Vec<BlockKey> {
        vec![BlockKey([order; 32]); 3 * STRETCH]
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_fetched_and_few_orders_wait_for_the_disk() {
        let (tell, told) = mpsc::channel();
        let (gate, disk) = mpsc::channel::<()>();
        let ahead = Ahead::start(move |keys| {
            tell.send((keys[0].0[0], keys.len())).unwrap();
            disk.recv().unwrap();
        })
        .unwrap();
        let first = ahead.fetch(keys(0));
        assert_eq!(told.recv().unwrap(), (0, STRETCH));
        let waiting: Vec<_> = (1..=MOST_WAITING).map(|order| ahead.fetch(keys(order as u8))).collect();
        assert!(first.is_some() && waiting.iter().all(Option::is_some));
        assert!(ahead.fetch(keys(99)).is_none(), "the disk does not keep up");
        let last = waiting.into_iter().next_back();
        drop(first);
        for _ in 0..3 {
            gate.send(()).unwrap();
            assert_eq!(told.recv().unwrap(), (MOST_WAITING as u8, STRETCH));
        }
        drop(last);
        gate.send(()).unwrap();
        drop(ahead);
        assert!(told.recv().is_err(), "nothing else was fetched, and the thread has ended");
    }
}
