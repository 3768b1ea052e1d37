//! What loading a model can fail with. Every message says what was wrong and what to do about it.

use std::path::{Path, PathBuf};

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is damaged, lies about itself, lacks something, or asks for what Rudder cannot do.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, naming the tensor or key.
        reason: String,
    },
    /// The load options do not fit the model.
    #[error("{0}")]
    Options(String),
    /// The backend refused a weight or ran out of memory.
    #[error(transparent)]
    Backend(#[from] rudder_ops::OpError),
}

impl LoadError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn invalid(path: &Path, reason: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), reason: reason.into() }
    }
}
