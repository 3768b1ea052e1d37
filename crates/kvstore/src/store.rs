//! The store: an index in memory over segment files, one writer, any number of readers.

use std::collections::{BTreeMap, HashMap, HashSet, hash_map};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::medium::{Medium, SegmentFile};
use crate::records::Records;
use crate::segment::{self, ENTRY, Entry, Geometry, HEADER_BYTES, Header};
use crate::{BLOCK_TOKENS, BlockKey, Fingerprint, Label};

/// Most segment files, each of which is open: more than a full store has, for every start begins one anew.
const MOST_FILES: usize = 400;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the folder.
    #[error("another process uses this folder; choose one for each server")]
    InUse,
    /// The folder cannot be used.
    #[error("the folder cannot be used: {0}")]
    Unusable(io::Error),
    /// The capacity is too small to be of use.
    #[error("{capacity} bytes hold no block of {block_bytes}; give the store at least {least}")]
    TooSmall {
        /// Bytes asked for.
        capacity: u64,
        /// Bytes of one block.
        block_bytes: usize,
        /// Least bytes that would do.
        least: u64,
    },
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::InUse,
            _ => Self::Unusable(error),
        }
    }
}

/// Why a block cannot be read; it is forgotten then.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store has no such block.
    #[error("the block is not in the store")]
    Missing,
    /// What was read is not what was written.
    #[error("segment {segment}, slot {slot}: the checksum is wrong")]
    Damaged {
        /// Its segment's number.
        segment: u64,
        /// Its slot.
        slot: u32,
    },
    /// The file cannot be read.
    #[error("segment {segment}: {error}")]
    Io {
        /// The segment's number.
        segment: u64,
        /// What the system says.
        error: io::Error,
    },
}

/// Why a block could not be written; it is not in the store then.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WriteError(#[from] io::Error);

/// Counters since the store was opened, and gauges now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Blocks that can be read.
    pub blocks: u64,
    /// Bytes of all segment files, other models' among them.
    pub bytes: u64,
    /// Blocks written.
    pub written: u64,
    /// Blocks read and found whole.
    pub read: u64,
    /// Blocks that went with their segment to make room.
    pub evicted: u64,
    /// Entries found torn or damaged at the start, and files that are no segments.
    pub torn: u64,
    /// Files of another model found at the start.
    pub foreign: u64,
    /// Blocks whose checksum was wrong when read.
    pub damaged: u64,
    /// Blocks that could not be read.
    pub read_errors: u64,
    /// Blocks that could not be written.
    pub write_errors: u64,
}

/// See the module. Shared between threads; [`Store::write`] calls wait for one another.
pub struct Store {
    medium: Arc<dyn Medium>,
    geometry: Geometry,
    fingerprint: Fingerprint,
    capacity: u64,
    index: Mutex<Index>,
    tail: Mutex<Tail>,
    records: Mutex<Records>,
}

/// Where everything is. Its lock is never held while a file is read or written.
#[derive(Default)]
struct Index {
    places: HashMap<BlockKey, Place>,
    bearing: Bearing,
    /// By number, so by age.
    segments: BTreeMap<u64, Segment>,
    /// Counts uses; takes the place of a clock.
    tick: u64,
    /// Labels whose blocks go last.
    pinned: HashSet<Label>,
    stats: StoreStats,
}

#[derive(Clone, Copy)]
enum Place {
    /// On its way to [`Store::write`].
    Coming { label: Label },
    At {
        segment: u64,
        slot: u32,
        checksum: u64,
        label: Label,
        /// It was asked for again.
        again: bool,
        /// By a pinned label, or it is one's.
        pinned: bool,
    },
}

impl Place {
    fn label(&self) -> Label {
        match *self {
            Self::Coming { label } | Self::At { label, .. } => label,
        }
    }

    /// `label` has asked for it: what another wrote is several people's from now on. Whether that is new.
    fn ask(&mut self, label: Label) -> bool {
        let (Self::Coming { label: whose } | Self::At { label: whose, .. }) = self;
        let shared = *whose != label && *whose != Label::NOBODY;
        if shared {
            *whose = Label::NOBODY;
        }
        shared
    }

    /// It is not there any more.
    fn leave(&self, segments: &mut BTreeMap<u64, Segment>) {
        if let Self::At { segment, again, pinned, .. } = self
            && let Some(segment) = segments.get_mut(segment)
        {
            segment.again -= u32::from(*again);
            segment.pinned -= u32::from(*pinned);
        }
    }
}

/// How many places bear each label. Nobody's are not counted.
#[derive(Default)]
struct Bearing(HashMap<Label, u64>);

impl Bearing {
    fn add(&mut self, label: Label) {
        if label != Label::NOBODY {
            *self.0.entry(label).or_default() += 1;
        }
    }

    fn remove(&mut self, label: Label) {
        if let hash_map::Entry::Occupied(mut count) = self.0.entry(label) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// A block to be read.
struct Found {
    file: Arc<dyn SegmentFile>,
    payload_at: u64,
    segment: u64,
    slot: u32,
    checksum: u64,
}

struct Segment {
    /// `None`: another model's.
    file: Option<Arc<dyn SegmentFile>>,
    /// Its own: a store of another capacity may have made it.
    geometry: Geometry,
    bytes: u64,
    keys: Vec<BlockKey>,
    /// When one of its blocks was asked for last.
    used: u64,
    /// Blocks that were asked for again, and by pinned labels.
    again: u32,
    pinned: u32,
}

impl Segment {
    fn new(geometry: Geometry) -> Self {
        Self { file: None, geometry, bytes: 0, keys: Vec::new(), used: 0, again: 0, pinned: 0 }
    }
}

/// Where the next block goes.
struct Tail {
    number: u64,
    open: Option<(Arc<dyn SegmentFile>, u32)>,
}

impl Store {
    /// Opens a store of at most `capacity` bytes for blocks of `block_bytes`, and indexes what an
    /// earlier one left. Segments of other models stay as they are, count towards the capacity, and
    /// are the first to go.
    ///
    /// # Errors
    /// If the medium cannot be listed or the capacity holds no block. A damaged file is no error.
    pub fn open(
        medium: Arc<dyn Medium>,
        capacity: u64,
        block_bytes: usize,
        fingerprint: Fingerprint,
    ) -> Result<Self, StoreError> {
        let geometry = Geometry::new(block_bytes, capacity);
        let least = geometry.file_bytes(geometry.slots);
        if capacity < least {
            return Err(StoreError::TooSmall { capacity, block_bytes, least });
        }
        let mut index = Index::default();
        let mut numbers: Vec<u64> = medium.names()?.iter().filter_map(|name| number_of(name)).collect();
        numbers.sort_unstable();
        for &number in &numbers {
            index.adopt(medium.as_ref(), number, &fingerprint, block_bytes);
        }
        let tail = Tail { number: numbers.last().map_or(0, |last| last + 1), open: None };
        let store = Self {
            medium,
            geometry,
            fingerprint,
            capacity,
            index: Mutex::new(index),
            tail: Mutex::new(tail),
            records: Mutex::default(),
        };
        store.make_room(0);
        Ok(store)
    }

    /// What the first block of every prefix continues.
    pub fn root(&self) -> BlockKey {
        BlockKey::root(&self.fingerprint)
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.geometry.block_bytes
    }

    /// Most bytes on disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// How many of the first keys can be read, one after another.
    pub fn readable(&self, keys: &[BlockKey]) -> usize {
        let index = self.lock();
        keys.iter().take_while(|key| matches!(index.places.get(key), Some(Place::At { .. }))).count()
    }

    /// How many of the first keys are stored or on their way. Their segments count as used now, they as asked
    /// for again, and those that are another's than `label`'s as several people's.
    pub fn touch(&self, keys: &[BlockKey], label: Label) -> usize {
        let mut index = self.lock();
        index.tick += 1;
        let Index { places, bearing, segments, tick, pinned, .. } = &mut *index;
        let pins = pinned.contains(&label);
        for (known, key) in keys.iter().enumerate() {
            match places.get_mut(key) {
                None => return known,
                Some(place) => {
                    let before = place.label();
                    if place.ask(label) {
                        bearing.remove(before);
                    }
                    if let Place::At { segment, again, pinned, .. } = place
                        && let Some(segment) = segments.get_mut(segment)
                    {
                        segment.used = *tick;
                        segment.again += u32::from(!std::mem::replace(again, true));
                        segment.pinned += u32::from(pins && !std::mem::replace(pinned, true));
                    }
                }
            }
        }
        keys.len()
    }

    /// What a label uses goes last from now on, when room is needed, or no longer. It looks at all there is, a segment at
    /// a time.
    pub fn pin(&self, label: Label, pins: bool) {
        if self.lock().set_pinned(label, pins) {
            self.segments().into_iter().for_each(|number| self.lock().pin_again(number, pins));
        }
    }

    /// The segments that are there, oldest first.
    fn segments(&self) -> Vec<u64> {
        self.lock().segments.keys().copied().collect()
    }

    /// Reads the labels' records that an earlier store for this model left, at most `most` of them: the newest,
    /// oldest first. From now on so many are kept. Call it before the first is written.
    ///
    /// # Errors
    /// If the medium cannot be listed. A damaged record is passed over.
    pub fn read_records(&self, most: usize) -> io::Result<Vec<(Label, Vec<u8>)>> {
        let (records, found) = Records::open(&*self.medium, &self.fingerprint, most)?;
        *self.lock_records() = records;
        Ok(found)
    }

    /// Keeps a record for a label, in place of the one before it, or of the oldest that is no pinned label's.
    ///
    /// # Errors
    /// If it cannot be written; then the one before it stays.
    pub fn write_record(&self, label: Label, body: &[u8]) -> Result<(), WriteError> {
        let is_pinned = |label| self.lock().pinned.contains(&label);
        Ok(self.lock_records().write(&*self.medium, &self.fingerprint, label, body, is_pinned)?)
    }

    /// Removes a label's record, if it has one.
    pub fn remove_record(&self, label: Label) {
        self.lock_records().remove(&*self.medium, &self.fingerprint, label);
    }

    fn lock_records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a block of `label`'s for [`Store::write`], so that nobody else does. False if it is there
    /// already.
    pub fn announce(&self, key: BlockKey, label: Label) -> bool {
        let mut index = self.lock();
        let new = !index.places.contains_key(&key);
        if new {
            index.put(key, Place::Coming { label });
        }
        new
    }

    /// Takes an announcement back.
    pub fn withdraw(&self, key: &BlockKey) {
        let mut index = self.lock();
        if let Some(Place::Coming { .. }) = index.places.get(key) {
            index.remove(key);
        }
    }

    /// Writes an announced block of [`Store::block_bytes`] bytes.
    ///
    /// # Errors
    /// If the file cannot be written; then the block is not announced any more, and the place is
    /// used by the next one.
    pub fn write(
        &self,
        key: BlockKey,
        tokens: [u32; BLOCK_TOKENS],
        payload: &[u8],
    ) -> Result<(), WriteError> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let label = self.lock().places.get(&key).map_or(Label::NOBODY, Place::label);
        let entry = Entry::new(key, tokens, payload, label);
        self.append(&mut tail, &entry, payload).map_err(|error| {
            self.withdraw(&key);
            self.lock().stats.write_errors += 1;
            WriteError(error)
        })
    }

    fn append(&self, tail: &mut Tail, entry: &Entry, payload: &[u8]) -> io::Result<()> {
        let (file, slot) = match &tail.open {
            Some((file, slot)) => (file.clone(), *slot),
            None => {
                let file = self.begin_segment(tail)?;
                tail.open = Some((file.clone(), 0));
                (file, 0)
            }
        };
        let geometry = self.geometry;
        // The entry comes last: without it the payload was never there.
        file.write_at(payload, geometry.payload_at(slot))?;
        file.write_at(&entry.encode(slot), geometry.entry_at(slot))?;
        let mut index = self.lock();
        index.add(tail.number, slot, entry, geometry.file_bytes(slot + 1));
        index.stats.written += 1;
        drop(index);
        tail.open = Some((file, slot + 1));
        if slot + 1 == geometry.slots {
            self.end_segment(tail);
        }
        Ok(())
    }

    fn begin_segment(&self, tail: &mut Tail) -> io::Result<Arc<dyn SegmentFile>> {
        self.make_room(self.geometry.file_bytes(self.geometry.slots));
        let number = tail.number;
        let file: Arc<dyn SegmentFile> = self.medium.create(&name_of(number))?.into();
        let header = Header { geometry: self.geometry, number, fingerprint: self.fingerprint };
        if let Err(error) = file.write_at(&header.encode(), 0) {
            // Nothing is lost if this fails too: the file is no segment, and the next start removes it.
            let _ = self.medium.remove(&name_of(number));
            tail.number += 1;
            return Err(error);
        }
        let mut index = self.lock();
        index.tick += 1;
        let bytes = self.geometry.file_bytes(0);
        let geometry = self.geometry;
        let segment = Segment { file: Some(file.clone()), bytes, used: index.tick, ..Segment::new(geometry) };
        index.segments.insert(number, segment);
        index.stats.bytes += bytes;
        Ok(file)
    }

    /// Ends the segment being written, if there is one. Its blocks stay readable.
    fn end_segment(&self, tail: &mut Tail) {
        if let Some((file, _)) = tail.open.take() {
            tail.number += 1;
            // What a failed sync leaves unwritten is found by its checksum if the power fails.
            let _ = file.sync();
        }
    }

    /// Removes segments until `bytes` more fit, in one more file.
    fn make_room(&self, bytes: u64) {
        loop {
            let number = {
                let mut index = self.lock();
                if index.stats.bytes + bytes <= self.capacity && index.segments.len() < MOST_FILES {
                    return;
                }
                match index.least_valuable() {
                    Some(number) => index.forget_segment(number),
                    None => return,
                }
            };
            // A file that stays is met again at the next start.
            let _ = self.medium.remove(&name_of(number));
        }
    }

    /// Reads a block of [`Store::block_bytes`] bytes into `out`.
    ///
    /// # Errors
    /// If it is not there, cannot be read, or is not as it was written; it is forgotten then, and
    /// `out` undefined.
    pub fn read(&self, key: &BlockKey, out: &mut [u8]) -> Result<(), ReadError> {
        let Found { file, payload_at, segment, slot, checksum } = self.find(key).ok_or(ReadError::Missing)?;
        let outcome = match file.read_at(out, payload_at) {
            Err(error) => Err(ReadError::Io { segment, error }),
            Ok(()) if segment::payload_checksum(key, out) != checksum => {
                Err(ReadError::Damaged { segment, slot })
            }
            Ok(()) => Ok(()),
        };
        let mut index = self.lock();
        match &outcome {
            Ok(()) => index.stats.read += 1,
            Err(error) => {
                match error {
                    ReadError::Io { .. } => index.stats.read_errors += 1,
                    _ => index.stats.damaged += 1,
                }
                index.forget(key, segment);
            }
        }
        outcome
    }

    /// Has those of the first keys that are stored fetched into the system's page cache. It may wait for
    /// the disk, but reads nothing into memory of this process.
    pub fn read_ahead(&self, keys: &[BlockKey]) {
        for key in keys {
            let Some(found) = self.find(key) else { return };
            found.file.read_ahead(found.payload_at, self.geometry.block_bytes as u64);
        }
    }

    fn find(&self, key: &BlockKey) -> Option<Found> {
        let mut index = self.lock();
        let Some(&Place::At { segment, slot, checksum, .. }) = index.places.get(key) else { return None };
        index.tick += 1;
        let tick = index.tick;
        let found = index.segments.get_mut(&segment)?;
        found.used = tick;
        let (file, payload_at) = (found.file.clone()?, found.geometry.payload_at(slot));
        Some(Found { file, payload_at, segment, slot, checksum })
    }

    /// Erases the blocks that were written under a label and that nobody else has asked for since: their
    /// tokens, and their payloads where the medium can discard them. Their files keep their length. Returns
    /// how many they were.
    ///
    /// # Errors
    /// If one could not be erased. None of them can be read any more all the same, but such a one is back
    /// after a restart.
    pub fn erase(&self, label: Label) -> Result<usize, WriteError> {
        self.remove_record(label);
        self.pin(label, false);
        let (mut blocks, mut outcome) = (0, Ok(()));
        let segments = if self.bears(label) { self.segments() } else { Vec::new() };
        for number in segments {
            let taken = self.lock().take(label, number);
            if let Some((file, geometry, slots)) = taken {
                blocks += slots.len();
                outcome = outcome.and(erase_slots(&*file, geometry, &slots));
            }
        }
        Ok(outcome.map(|()| blocks)?)
    }

    /// Whether any block bears a label, on disk or on its way.
    pub fn bears(&self, label: Label) -> bool {
        self.lock().bearing.0.contains_key(&label)
    }

    /// A snapshot of the counters.
    pub fn stats(&self) -> StoreStats {
        self.lock().stats
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    /// Indexes a segment that an earlier store left, as far as it is whole. What is none is removed.
    fn adopt(&mut self, medium: &dyn Medium, number: u64, fingerprint: &Fingerprint, block_bytes: usize) {
        let Ok((file, bytes)) = medium.open(&name_of(number)).and_then(|file| {
            let bytes = file.size()?;
            Ok((Arc::<dyn SegmentFile>::from(file), bytes))
        }) else {
            self.stats.read_errors += 1;
            return;
        };
        let mut header = [0; HEADER_BYTES];
        let header = match file.read_at(&mut header, 0) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                self.stats.read_errors += 1;
                return;
            }
            Err(_) => None,
            Ok(()) => Header::decode(&header).filter(|header| header.number == number),
        };
        self.stats.bytes += bytes;
        let geometry = header.map_or(Geometry { block_bytes, slots: 0 }, |header| header.geometry);
        let mut segment = Segment { bytes, ..Segment::new(geometry) };
        match header {
            None => {
                self.stats.torn += 1;
                // It carries a segment's name and is none: nobody else will ever want it.
                if medium.remove(&name_of(number)).is_ok() {
                    self.stats.bytes -= bytes;
                    return;
                }
            }
            Some(header)
                if header.fingerprint != *fingerprint || header.geometry.block_bytes != block_bytes =>
            {
                self.stats.foreign += 1;
            }
            Some(_) => {
                segment.file = Some(file.clone());
                self.tick += 1;
                segment.used = self.tick;
                self.segments.insert(number, segment);
                self.read_table(file.as_ref(), number, geometry, bytes);
                return;
            }
        }
        self.segments.insert(number, segment);
    }

    /// Indexes the entries of a segment's table whose payloads lie within the file's `bytes`.
    fn read_table(&mut self, file: &dyn SegmentFile, number: u64, geometry: Geometry, bytes: u64) {
        let mut table = vec![0; geometry.table_bytes()];
        let there = bytes.saturating_sub(geometry.entry_at(0)).min(table.len() as u64) as usize;
        if file.read_at(&mut table[..there], geometry.entry_at(0)).is_err() {
            self.stats.read_errors += 1;
            return;
        }
        let mut torn = 0;
        for (slot, entry) in Entry::decode_table(&table, || torn += 1) {
            if geometry.payload_at(slot) + geometry.block_bytes as u64 <= bytes {
                self.add(number, slot, &entry, bytes);
            } else {
                torn += 1;
            }
        }
        self.stats.torn += torn;
    }

    /// A block can be read from now on; its segment's file has `bytes`.
    fn add(&mut self, number: u64, slot: u32, entry: &Entry, bytes: u64) {
        let Some(segment) = self.segments.get_mut(&number) else { return };
        self.stats.bytes += bytes.saturating_sub(segment.bytes);
        segment.bytes = segment.bytes.max(bytes);
        segment.keys.push(entry.key);
        let pinned = self.pinned.contains(&entry.label);
        segment.pinned += u32::from(pinned);
        let (checksum, label) = (entry.checksum, entry.label);
        let mut place = Place::At { segment: number, slot, checksum, label, again: false, pinned };
        if let Some(before) = self.places.get(&entry.key) {
            // Somebody else may have asked for it while it was written.
            place.ask(before.label());
        }
        match self.put(entry.key, place) {
            Some(before @ Place::At { .. }) => before.leave(&mut self.segments),
            _ => self.stats.blocks += 1,
        }
    }

    /// A block cannot be read any more.
    fn forget(&mut self, key: &BlockKey, segment: u64) -> bool {
        let there = matches!(self.places.get(key), Some(Place::At { segment: s, .. }) if *s == segment);
        if there && let Some(place) = self.remove(key) {
            place.leave(&mut self.segments);
            self.stats.blocks -= 1;
        }
        there
    }

    /// Puts a block in its place; returns where it was.
    fn put(&mut self, key: BlockKey, place: Place) -> Option<Place> {
        self.bearing.add(place.label());
        self.places.insert(key, place).inspect(|before| self.bearing.remove(before.label()))
    }

    fn remove(&mut self, key: &BlockKey) -> Option<Place> {
        self.places.remove(key).inspect(|place| self.bearing.remove(place.label()))
    }

    /// Forgets the blocks under a label in a segment; returns their slots.
    fn take(&mut self, label: Label, number: u64) -> Option<Erased> {
        let segment = self.segments.get_mut(&number)?;
        let (file, geometry) = (segment.file.clone()?, segment.geometry);
        let mut keys = std::mem::take(&mut segment.keys);
        let mut slots = Vec::new();
        keys.retain(|key| match self.places.get(key) {
            Some(&Place::At { segment, slot, label: whose, .. }) if (segment, whose) == (number, label) => {
                slots.push(slot);
                !self.forget(key, number)
            }
            _ => true,
        });
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.keys = keys;
        }
        (!slots.is_empty()).then_some((file, geometry, slots))
    }

    /// Another model's segment, else, of the half that was used longest ago, the one with the fewest blocks that
    /// a pinned label uses, then that anybody has asked for again: they are likely to be asked for again, and as
    /// all blocks are of as many tokens and bytes, each saves about as much. The other half is for newcomers.
    fn least_valuable(&self) -> Option<u64> {
        if let Some((&foreign, _)) = self.segments.iter().find(|(_, segment)| segment.file.is_none()) {
            return Some(foreign);
        }
        let mut oldest: Vec<_> = self.segments.iter().collect();
        oldest.sort_by_key(|(_, segment)| segment.used);
        oldest.truncate(self.segments.len().div_ceil(2));
        let value = |segment: &Segment| (segment.pinned, segment.again, segment.used);
        oldest.into_iter().min_by_key(|(_, segment)| value(segment)).map(|(&number, _)| number)
    }

    /// Whether that is new of a label.
    fn set_pinned(&mut self, label: Label, pins: bool) -> bool {
        if pins { self.pinned.insert(label) } else { self.pinned.remove(&label) }
    }

    /// A label is pinned now, or no longer: so are the blocks of a segment.
    fn pin_again(&mut self, number: u64, pins: bool) {
        let Some(Segment { keys, pinned: count, .. }) = self.segments.get_mut(&number) else { return };
        for key in keys {
            if let Some(Place::At { segment, pinned, label, .. }) = self.places.get_mut(key)
                && *segment == number
            {
                // What several use is pinned again when a pinned one asks for it next.
                let now = self.pinned.contains(label) || pins && *pinned;
                *count = *count + u32::from(now) - u32::from(*pinned);
                *pinned = now;
            }
        }
    }

    fn forget_segment(&mut self, number: u64) -> u64 {
        if let Some(segment) = self.segments.remove(&number) {
            self.stats.bytes -= segment.bytes;
            let gone = segment.keys.iter().filter(|key| self.forget(key, number)).count();
            self.stats.evicted += gone as u64;
        }
        number
    }
}

/// Of one segment: its file, its geometry, and the slots to erase.
type Erased = (Arc<dyn SegmentFile>, Geometry, Vec<u32>);

/// Erases all that can be; the first error is what it ends with.
fn erase_slots(file: &dyn SegmentFile, geometry: Geometry, slots: &[u32]) -> io::Result<()> {
    let mut outcome = Ok(());
    for &slot in slots {
        outcome = outcome.and(file.write_at(&[0; ENTRY], geometry.entry_at(slot)));
        // Where it cannot be, the payload stays until its segment goes, without the tokens it is of.
        let _ = file.discard(geometry.payload_at(slot), geometry.block_bytes as u64);
    }
    outcome.and(file.sync())
}

fn name_of(number: u64) -> String {
    format!("{number:016x}.kv")
}

fn number_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".kv").filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok().filter(|&number| name_of(number) == name)
}
