//! Has the system fetch into its page cache what waiting sequences will load.

use std::sync::{Arc, mpsc};

use rudder_kvstore::{BlockKey, Store};

/// The way to a thread of its own: the system may take its time even for a hint.
pub(crate) struct Ahead(mpsc::Sender<Vec<BlockKey>>);

impl Ahead {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(store: Arc<Store>) -> std::io::Result<Self> {
        let (sender, wanted) = mpsc::channel::<Vec<BlockKey>>();
        std::thread::Builder::new()
            .name("rudder-kv-ahead".into())
            .spawn(move || wanted.into_iter().for_each(|keys| store.read_ahead(&keys)))?;
        Ok(Self(sender))
    }

    /// These blocks, in this order, will be read soon.
    pub fn fetch(&self, keys: Vec<BlockKey>) {
        // The thread outlives this handle: it ends by the channel's end.
        let _ = self.0.send(keys);
    }
}
