//! Model architectures over the op set, and weight loading (GGUF, safetensors).
//!
//! ```text
//! path -> ModelSource::open (config, mapped weights) -> load onto a Backend -> dyn Model
//! ```

mod arch;
mod config;
mod decoder;
mod error;
mod gguf;
mod hf_config;
mod load;
mod mapped;
mod rope;
mod safetensors;
mod weights;

pub use config::{ModelConfig, MoeConfig};
pub use error::LoadError;
pub use gguf::{Array, Gguf, Value};
pub use load::{KvSize, LoadOptions, Loaded, ModelSource, load};

use rudder_ops::{Batch, SampleRow, Sampled};

/// A model loaded on some backend, ready to run steps. The engine knows nothing more of it.
pub trait Model: Send {
    /// What the model is.
    fn config(&self) -> &ModelConfig;
    /// Runs one step over `batch` and keeps the logits of `batch.outputs`.
    ///
    /// # Errors
    /// If the batch exceeds what the model was loaded for, or the backend fails; the step's KV is then
    /// undefined, the model stays usable.
    fn forward(&mut self, batch: &Batch) -> Result<(), rudder_ops::OpError>;
    /// Draws one token for every output row of the last `forward`.
    ///
    /// # Errors
    /// If the backend fails.
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), rudder_ops::OpError>;
    /// Logits of the last `forward`, `[outputs, vocab]`; for tests.
    ///
    /// # Errors
    /// If the backend fails.
    fn logits(&mut self) -> Result<Vec<f32>, rudder_ops::OpError>;
}
