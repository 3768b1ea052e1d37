//! KV blocks on their way to the host, beside the step that runs.
//!
//! A block lies in pieces, keys and values of each layer. Their copies are queued together, on a stream of their own, to a page-locked stage that is made
//! once, and waited for once. They begin when the steps are done that filled the block: one that goes on from what the step before it drew is
//! queued while that one runs, and only blocks of steps that have landed are read, so that such a step is not waited for.

use crate::device::{Device, Point, Staging};
use crate::kv::KvCache;
use crate::tensor::check;
use rudder_ops::Result;

/// See the module.
pub(crate) struct BlockReader {
    stage: Staging,
    /// Behind what filled the blocks.
    filled: Point,
    /// Whether that is where the last step began, which went on from tokens that nobody had seen; else it is behind all that is queued.
    ahead: bool,
}

impl BlockReader {
    /// For blocks of so many bytes.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { stage: Staging::new(device, bytes)?, filled: Point::new(device)?, ahead: false })
    }

    /// A step begins, and goes on from tokens that nobody has seen or does not. When it has landed itself, its draw has come, which is behind all
    /// that it wrote, on other ranks too.
    pub fn begin(&mut self, ahead: bool) -> Result<()> {
        self.ahead = ahead;
        if ahead { self.filled.record() } else { Ok(()) }
    }

    /// A block was written from the host, behind the step that runs.
    pub fn wrote(&mut self) {
        self.ahead = false;
    }

    /// Copies a block of all layers to the host: keys, then values, layer by layer.
    pub fn read(&mut self, cache: &KvCache, block: u32, out: &mut [u8]) -> Result<()> {
        let pieces = cache.pieces(block, out.len())?;
        check(out.len() <= self.stage.bytes(), || "a KV block of another cache than the last".to_owned())?;
        if !self.ahead {
            self.filled.record()?;
        }
        self.stage.fetch_beside(&self.filled, pieces, cache.half_block())?;
        out.copy_from_slice(&self.stage.memory()?[..out.len()]);
        Ok(())
    }
}
