//! KV blocks on their way to the host, beside the step that runs, and back, behind it.
//!
//! A block lies in pieces, keys and values of each layer. Their copies are queued together, by page-locked stages that are made once. Many blocks
//! on their way back share a stage, so that who writes some does not wait for the step before them. Those to the
//! host are queued on a stream of their own and waited for once. They begin when the steps are done that filled the block: one that goes on from what the step before it drew is
//! queued while that one runs, and only blocks of steps that have landed are read, so that such a step is not waited for.

use crate::device::{Buffer, Device, Point, Staging};
use crate::kv::KvCache;
use crate::tensor::check;
use rudder_ops::Result;

/// Bytes of a stage for blocks on their way back, if a block is not larger: together as much as the engine brings back at a time.
const STAGE: usize = 16 << 20;

/// See the module.
pub(crate) struct BlockMover {
    /// For a block on its way to the host.
    stage: Staging,
    /// For blocks on their way back: those that come next, from `used` bytes on, and those before them.
    back: [Staging; 2],
    used: usize,
    /// Behind what filled the blocks.
    filled: Point,
    /// Whether that is where the last step began, which went on from tokens that nobody had seen; else it is behind all that is queued.
    ahead: bool,
}

impl BlockMover {
    /// For blocks of so many bytes.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let back = [Staging::new(device, bytes.max(STAGE))?, Staging::new(device, bytes.max(STAGE))?];
        Ok(Self {
            stage: Staging::new(device, bytes)?,
            back,
            used: 0,
            filled: Point::new(device)?,
            ahead: false,
        })
    }

    /// A step begins, and goes on from tokens that nobody has seen or does not. When it has landed itself, its draw has come, which is behind all
    /// that it wrote, on other ranks too.
    pub fn begin(&mut self, ahead: bool) -> Result<()> {
        self.ahead = ahead;
        if ahead { self.filled.record() } else { Ok(()) }
    }

    /// Copies a block of all layers to the host: keys, then values, layer by layer.
    pub fn read(&mut self, cache: &KvCache, block: u32, out: &mut [u8]) -> Result<()> {
        let pieces = self.pieces(cache, block, out.len())?;
        if !self.ahead {
            self.filled.record()?;
        }
        self.stage.fetch_beside(&self.filled, pieces, cache.half_block())?;
        out.copy_from_slice(&self.stage.memory()?[..out.len()]);
        Ok(())
    }

    /// Queues the filling of a block of all layers with what was read. A block that is read after it is read behind it.
    pub fn write(&mut self, cache: &KvCache, block: u32, bytes: &[u8]) -> Result<()> {
        let pieces = self.pieces(cache, block, bytes.len())?;
        self.ahead = false;
        if self.used + bytes.len() > self.back[0].bytes() {
            self.back.swap(0, 1);
            self.used = 0;
            // What it held has left.
            self.back[0].memory()?;
        }
        self.back[0].send_pieces(self.used, bytes, pieces, cache.half_block())?;
        self.used += bytes.len();
        Ok(())
    }

    /// Where a block of so many bytes lies, which fit the stage.
    fn pieces<'a>(
        &self,
        cache: &'a KvCache,
        block: u32,
        bytes: usize,
    ) -> Result<impl Iterator<Item = (&'a Buffer, usize)> + use<'a>> {
        let pieces = cache.pieces(block, bytes)?;
        check(bytes <= self.stage.bytes(), || "a KV block of another cache than the last".to_owned())?;
        Ok(pieces)
    }
}
