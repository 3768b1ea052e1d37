//! The format of a segment file. All numbers are little-endian.
//!
//! ```text
//! 0       header, 4096 bytes: magic "RUDDERKV", version u32, tokens a block u32, payload bytes u64,
//!         slots u32, zero u32, segment number u64, fingerprint [32], checksum u64 of all before
//! 4096    table, 128 bytes a slot: key [32], tokens u32 x 16, payload checksum u64, mark u32, slot u32,
//!         label u64 (0: nobody's), checksum u64 of all before
//! P       payloads, in slots of whole pages; P is the end of the table, rounded up to a page
//! ```
//!
//! Checksums are XXH3 with 64 bits. A payload's is seeded with its key, so that a payload in the wrong
//! place does not pass. A slot's payload is written before its entry in the table, and its entry once; a
//! block that is erased has zeros for its entry, as a slot that was never written.

use twox_hash::XxHash3_64;

use crate::{BLOCK_TOKENS, BlockKey, Fingerprint, Label};

/// Changes whenever this format does.
pub const VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"RUDDERKV";
const MARK: u32 = 0x4b56_424c;
/// Pages of files and of memory, whose multiples direct I/O would ask for too.
const PAGE: u64 = 4096;
/// Bytes of a table entry.
pub(crate) const ENTRY: usize = 128;
/// Bytes of the header that carry something, its checksum included.
const HEADER: usize = 80;
/// A segment is about so large, so that one that goes takes little with it,
const SEGMENT_BYTES: u64 = 64 << 20;
/// but a store has about so many at most, since each is an open file.
const MOST_SEGMENTS: u64 = 256;
/// A store has room for at least so many segments, or else for one block a segment.
const LEAST_SEGMENTS: u64 = 8;
/// Bounds the table, in files of others too.
const MOST_SLOTS: u32 = 1 << 16;

/// Sizes within the segments of one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one block.
    pub block_bytes: usize,
    /// Blocks that a segment holds.
    pub slots: u32,
}

/// One slot's entry in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The block's name.
    pub key: BlockKey,
    /// Its own tokens; of no use to the store, but a file can be read by people with them.
    pub tokens: [u32; BLOCK_TOKENS],
    /// Of its payload.
    pub checksum: u64,
    /// Whose it is.
    pub label: Label,
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sizes.
    pub geometry: Geometry,
    /// Ascending by age; the file is named after it.
    pub number: u64,
    /// Whose keys and values these are.
    pub fingerprint: Fingerprint,
}

impl Geometry {
    /// For blocks of `block_bytes` in a store of `capacity` bytes.
    pub fn new(block_bytes: usize, capacity: u64) -> Self {
        let bytes = SEGMENT_BYTES.max(capacity / MOST_SEGMENTS).min(capacity / LEAST_SEGMENTS);
        let slots = bytes / (page_up(block_bytes as u64) + ENTRY as u64);
        Self { block_bytes, slots: slots.clamp(1, u64::from(MOST_SLOTS)) as u32 }
    }

    /// Where the table's entry of a slot begins.
    pub fn entry_at(&self, slot: u32) -> u64 {
        PAGE + u64::from(slot) * ENTRY as u64
    }

    /// Where a slot's payload begins.
    pub fn payload_at(&self, slot: u32) -> u64 {
        page_up(self.entry_at(self.slots)) + u64::from(slot) * page_up(self.block_bytes as u64)
    }

    /// Bytes of a file with so many slots written.
    pub fn file_bytes(&self, slots: u32) -> u64 {
        self.payload_at(slots)
    }

    /// Bytes of the table.
    pub fn table_bytes(&self) -> usize {
        self.slots as usize * ENTRY
    }
}

impl Header {
    /// As bytes, to be written at 0.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(BLOCK_TOKENS as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.geometry.block_bytes as u64).to_le_bytes());
        bytes.extend_from_slice(&self.geometry.slots.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.fingerprint.0);
        bytes.extend_from_slice(&XxHash3_64::oneshot(&bytes).to_le_bytes());
        bytes
    }

    /// Reads what [`Self::encode`] wrote; `None` for anything else.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (body, checksum) = bytes.split_at(HEADER - 8);
        let known =
            &body[..8] == MAGIC && u32_at(body, 8) == VERSION && u32_at(body, 12) == BLOCK_TOKENS as u32;
        if !known || u64_at(checksum, 0) != XxHash3_64::oneshot(body) {
            return None;
        }
        let geometry =
            Geometry { block_bytes: usize::try_from(u64_at(body, 16)).ok()?, slots: u32_at(body, 24) };
        if geometry.slots > MOST_SLOTS {
            return None;
        }
        let fingerprint = Fingerprint(body[40..72].try_into().ok()?);
        Some(Self { geometry, number: u64_at(body, 32), fingerprint })
    }
}

/// Bytes to read for [`Header::decode`].
pub const HEADER_BYTES: usize = HEADER;

impl Entry {
    /// The entry of a block.
    pub fn new(key: BlockKey, tokens: [u32; BLOCK_TOKENS], payload: &[u8], label: Label) -> Self {
        Self { key, tokens, checksum: payload_checksum(&key, payload), label }
    }

    /// As bytes, to be written at [`Geometry::entry_at`] of `slot`.
    pub fn encode(&self, slot: u32) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..32].copy_from_slice(&self.key.0);
        for (to, token) in bytes[32..96].chunks_exact_mut(4).zip(&self.tokens) {
            to.copy_from_slice(&token.to_le_bytes());
        }
        bytes[96..104].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[104..108].copy_from_slice(&MARK.to_le_bytes());
        bytes[108..112].copy_from_slice(&slot.to_le_bytes());
        bytes[112..120].copy_from_slice(&self.label.0.to_le_bytes());
        let checksum = XxHash3_64::oneshot(&bytes[..120]);
        bytes[120..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The entries of a table, each with its slot; those never written are passed over in silence,
    /// `damaged` is told of others that are not whole.
    pub fn decode_table(table: &[u8], mut damaged: impl FnMut()) -> Vec<(u32, Self)> {
        let mut entries = Vec::with_capacity(table.len() / ENTRY);
        for (slot, bytes) in (0u32..).zip(table.chunks_exact(ENTRY)) {
            let whole = u32_at(bytes, 104) == MARK
                && u32_at(bytes, 108) == slot
                && u64_at(bytes, 120) == XxHash3_64::oneshot(&bytes[..120]);
            if whole {
                entries.push((slot, Self::of(bytes)));
            } else if bytes.iter().any(|&b| b != 0) {
                damaged();
            }
        }
        entries
    }

    fn of(bytes: &[u8]) -> Self {
        let mut key = [0; 32];
        key.copy_from_slice(&bytes[..32]);
        let tokens = std::array::from_fn(|i| u32_at(bytes, 32 + 4 * i));
        Self { key: BlockKey(key), tokens, checksum: u64_at(bytes, 96), label: Label(u64_at(bytes, 112)) }
    }
}

/// The checksum of a block's bytes under its key.
pub fn payload_checksum(key: &BlockKey, payload: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(u64_at(&key.0, 0), payload)
}

fn page_up(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
