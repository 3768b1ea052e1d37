//! Model architectures over the op set, and weight loading (GGUF, safetensors).
//!
//! ```text
//! path -> ModelSource::open (config, mapped weights) -> load onto a Backend -> dyn Model
//!                                                     -> load_ranks, cut over several -> dyn Model
//!                                                     -> load_node, its part of a model that another process has -> Node
//! ```

mod arch;
mod batch_bytes;
mod compare;
mod config;
mod crew;
mod decoder;
mod dummy;
mod error;
mod fingerprint;
mod fp8;
mod fused_experts;
mod gguf;
mod hf_config;
mod int4;
mod load;
mod mapped;
mod nvfp4;
mod ranks;
mod rope;
mod safetensors;
mod shard;
mod weights;

pub use compare::{Difference, worst_difference};
pub use config::{ModelConfig, MoeConfig};
pub use error::LoadError;
pub use gguf::{Array, Gguf, Value};
pub use load::{KvSize, LoadOptions, Loaded, ModelSource, load};
pub use ranks::Node;

use rudder_ops::{Batch, SampleRow, Sampled};

/// What a KV block of a loaded model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBlock {
    /// Bytes of all layers together.
    pub bytes: usize,
    /// A hash of everything beside the tokens that its content depends on: configuration, weights,
    /// dtype and layout.
    pub fingerprint: [u8; 32],
}

/// A model loaded on some backend, ready to run steps. The engine knows nothing more of it.
pub trait Model: Send {
    /// What the model is.
    fn config(&self) -> &ModelConfig;
    /// Runs one step over `batch` and keeps the logits of `batch.outputs`.
    ///
    /// # Errors
    /// If the batch exceeds what the model was loaded for, or the backend fails; the step's KV is then
    /// undefined, the model stays usable if [`Model::recover`] says so.
    fn forward(&mut self, batch: &Batch) -> Result<(), rudder_ops::OpError>;
    /// Draws one token for every output row of the last `forward`.
    ///
    /// # Errors
    /// If the backend fails.
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), rudder_ops::OpError>;
    /// Whether [`Model::draw`] works, so that a step can be queued while the one before it runs. It may begin and cease to between steps.
    fn draws_ahead(&self) -> bool {
        false
    }
    /// Queues what [`Model::sample`] does and does not wait for it. The next `forward` may be of a batch that names the tokens
    /// ([`Batch::drawn`]) before [`Model::drawn`] gives what was drawn; another draw must come after. No row may ask for more than
    /// [`rudder_ops::MOST_DRAWN_AHEAD`] alternatives.
    ///
    /// # Errors
    /// If the backend fails or does not draw ahead.
    fn draw(&mut self, _rows: &[SampleRow<'_>]) -> Result<(), rudder_ops::OpError> {
        Err(rudder_ops::OpError::Backend("this model does not draw ahead".into()))
    }
    /// Waits for the draw on its way and gives what it drew.
    ///
    /// # Errors
    /// If the backend failed; the draw then is not on its way any more.
    fn drawn(&mut self, _out: &mut Vec<Sampled>) -> Result<(), rudder_ops::OpError> {
        Err(rudder_ops::OpError::Backend("this model does not draw ahead".into()))
    }
    /// Of a rank's part of a model that is cut: whether all went well here that led to what rank 0 drew, which has come. Only then can this
    /// be told of steps that were queued and not waited for.
    ///
    /// # Errors
    /// If it did not.
    fn landed(&mut self) -> Result<(), rudder_ops::OpError> {
        Ok(())
    }
    /// After something failed: waits for what is queued, and tells whether the model can be used on.
    ///
    /// # Errors
    /// If a device has had a fault after which it computes no more in this process.
    fn recover(&mut self) -> Result<(), rudder_ops::OpError> {
        Ok(())
    }
    /// What a KV block is, if blocks can be taken out and put back.
    fn kv_block(&self) -> Option<KvBlock> {
        None
    }
    /// Copies KV block `block` of all layers to `out`, [`KvBlock::bytes`] bytes.
    ///
    /// # Errors
    /// If there is no such block, `out` has another length, or the backend fails.
    fn export_block(&mut self, _block: u32, _out: &mut [u8]) -> Result<(), rudder_ops::OpError> {
        Err(rudder_ops::OpError::Backend("this model does not move KV blocks".into()))
    }
    /// Fills KV block `block` of all layers with what [`Model::export_block`] gave, in this process or
    /// another whose [`KvBlock`] is the same. On an error the block's content is undefined.
    ///
    /// # Errors
    /// As [`Model::export_block`].
    fn import_block(&mut self, _block: u32, _bytes: &[u8]) -> Result<(), rudder_ops::OpError> {
        Err(rudder_ops::OpError::Backend("this model does not move KV blocks".into()))
    }
    /// Logits of the last `forward`, `[outputs, vocab]`; for tests.
    ///
    /// # Errors
    /// If the backend fails.
    fn logits(&mut self) -> Result<Vec<f32>, rudder_ops::OpError>;
}
