//! A content-addressed store of KV blocks on disk: what a block holds is found by the tokens up to
//! its end, after a restart too.
//!
//! ```text
//! tokens -> BlockKey (a chain of SHA-256) -> index in memory -> slot of a segment file
//! ```
//!
//! - A [`BlockKey`] is a hash over the model's [`Fingerprint`] and all tokens up to the block's end, so
//!   equal keys mean equal keys and values, and nothing of another model is ever found.
//! - Blocks are appended to segment files ([`segment`]). Each slot is written once; a segment goes as
//!   a whole, of those used longest ago the one whose blocks were asked for again least, so that the store
//!   stays below its capacity without ever compacting.
//! - The index is rebuilt at [`Store::open`] from the segments' tables. What is torn, damaged or
//!   another model's is not indexed, and every payload is checked against its checksum when read.
//! - A block carries the [`Label`] of whoever wrote it; what only they have used is erased on request. Beside
//!   the blocks, a small record can be kept for each label, of whatever is to be known of it after a restart.
//! - Nothing here depends on a clock or on file times.
//!
//! Writes go through the system's page cache and are not synced one by one: after a killed process
//! everything is there; after a power failure what is missing is found torn by its checksum and
//! computed anew. A segment is synced once, when it is full; a label's record before the one it replaces is removed. Reads profit from the page cache too: on
//! the machines this runs on today, device memory is host memory, and a restarted server finds most
//! of its blocks there. Direct I/O would lose that and save a copy that costs less than the checksum.

mod key;
mod label;
mod medium;
mod records;
pub mod segment;
mod store;

pub use key::{BLOCK_TOKENS, BlockKey, Fingerprint};
pub use label::Label;
pub use medium::{Disk, Medium, SegmentFile};
pub use store::{ReadError, Store, StoreError, StoreStats, WriteError};
