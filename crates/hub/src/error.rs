//! What finding and fetching a model can fail with; every message says what to do next.

use std::io;
use std::path::{Path, PathBuf};

use crate::progress::bytes;

/// Why a model was not found or not fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Nothing of this name exists.
    #[error("unknown model `{name}`{}; `rudder models list` shows the catalog. A GGUF file, a Hugging Face folder or a hub id (organisation/name) will do too", hint(.nearest))]
    Unknown {
        /// What was asked for.
        name: String,
        /// The catalog name most like it.
        nearest: Option<&'static str>,
    },
    /// A path that does not lead to a model.
    #[error("{}: {problem}", .path.display())]
    BadPath {
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Reading or writing a file failed.
    #[error("cannot {what} {}: {source}{}", .path.display(), advice(.source))]
    Io {
        /// The operation, as a verb.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The disk has not enough room.
    #[error("{} has {} free, but {} are needed; free some space or choose another folder with --cache or RUDDER_CACHE", .path.display(), bytes(*.free), bytes(*.needed))]
    NoSpace {
        /// The cache folder.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// Another process is at it.
    #[error(
        "another process is fetching {name} or more of its repository; wait for it or end it, then try again"
    )]
    Busy {
        /// The model.
        name: String,
    },
    /// What arrived is not what was expected; it was deleted.
    #[error(
        "{what} is damaged or not the expected version ({expected} expected, {found} found); it was deleted"
    )]
    Corrupt {
        /// The file.
        what: String,
        /// Expected size or SHA-256.
        expected: String,
        /// What it was instead.
        found: String,
    },
    /// One source failed.
    #[error("{0}")]
    Source(String),
    /// Every source failed.
    #[error("cannot fetch {name}. Tried:\n{}\nFinished parts are kept: once the cause is gone, `rudder pull {name}` goes on from there. With a file you have already, use --model FILE.gguf.", tried.iter().map(|t| format!("  - {t}")).collect::<Vec<_>>().join("\n"))]
    AllFailed {
        /// The model.
        name: String,
        /// One line a source.
        tried: Vec<String>,
    },
}

impl HubError {
    /// Makes an [`HubError::Io`] from an operating system's error.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
        move |source| HubError::Io { what, path: path.to_owned(), source }
    }
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default()
}

fn advice(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space or choose another folder with --cache or RUDDER_CACHE"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a folder that you may write to with --cache or RUDDER_CACHE"
        }
        _ => "",
    }
}
