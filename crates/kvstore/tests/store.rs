//! The store through restarts, damage and full disks, on real files and on a medium that fails.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use rudder_kvstore::segment::{Geometry, Header};
use rudder_kvstore::{
    BLOCK_TOKENS, BlockKey, Disk, Fingerprint, Label, Medium, ReadError, SegmentFile, Store, StoreError,
};

const BYTES: usize = 5000;
const MIB: u64 = 1 << 20;
const MODEL: Fingerprint = Fingerprint([7; 32]);
const ALICE: Label = Label(11);
const BOB: Label = Label(12);

fn open(folder: &Path) -> Store {
    open_as(folder, 64 * MIB, MODEL)
}

fn open_as(folder: &Path, capacity: u64, model: Fingerprint) -> Store {
    Store::open(Arc::new(Disk::open(folder).unwrap()), capacity, BYTES, model).unwrap()
}

fn tokens(n: u32) -> [u32; BLOCK_TOKENS] {
    std::array::from_fn(|i| n * 100 + i as u32)
}

fn payload(n: u32) -> Vec<u8> {
    (0..BYTES as u32).map(|i| (i.wrapping_mul(n * 2 + 1) >> 3) as u8).collect()
}

/// Keys of a chain of `n` blocks.
fn chain(store: &Store, n: u32) -> Vec<BlockKey> {
    (0..n)
        .scan(store.root(), |key, i| {
            *key = key.child(&tokens(i));
            Some(*key)
        })
        .collect()
}

fn put(store: &Store, keys: &[BlockKey], n: u32) {
    assert!(store.announce(keys[n as usize], ALICE));
    store.write(keys[n as usize], tokens(n), &payload(n)).unwrap();
}

fn fill(store: &Store, n: u32) -> Vec<BlockKey> {
    let keys = chain(store, n);
    (0..n).for_each(|i| put(store, &keys, i));
    keys
}

fn get(store: &Store, key: &BlockKey) -> Result<Vec<u8>, ReadError> {
    let mut out = vec![0; BYTES];
    store.read(key, &mut out).map(|()| out)
}

/// The segment files, oldest first.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "kv"));
    files.sort();
    files
}

fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// Where the bytes of a payload lie in a file.
fn find(bytes: &[u8], payload: &[u8]) -> usize {
    bytes.windows(payload.len()).position(|window| window == payload).expect("the payload is in the file")
}

#[test]
fn what_is_written_is_read_now_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let keys = fill(&store, 40);
    assert_eq!((store.readable(&keys), store.stats().blocks), (40, 40));
    drop(store); // as a killed process would: nothing is closed or flushed
    let store = open(folder.path());
    assert_eq!(store.readable(&keys), 40);
    for (n, key) in (0..).zip(&keys) {
        assert_eq!(get(&store, key).unwrap(), payload(n));
    }
    assert_eq!(store.stats().read, 40);
    assert_eq!(store.stats().torn + store.stats().foreign + store.stats().damaged, 0);
    let more = chain(&store, 41);
    assert_eq!(store.readable(&more), 40);
    put(&store, &more, 40);
    assert_eq!(get(&store, &more[40]).unwrap(), payload(40));
}

#[test]
fn a_block_is_announced_once_until_it_is_withdrawn() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let keys = chain(&store, 2);
    assert!(store.announce(keys[0], ALICE) && !store.announce(keys[0], ALICE));
    assert_eq!((store.touch(&keys, ALICE), store.readable(&keys)), (1, 0));
    assert!(matches!(get(&store, &keys[0]), Err(ReadError::Missing)));
    store.withdraw(&keys[0]);
    assert_eq!(store.touch(&keys, ALICE), 0);
    put(&store, &keys, 0);
    assert!(!store.announce(keys[0], ALICE));
    store.withdraw(&keys[0]);
    assert_eq!(store.readable(&keys), 1, "what is written is not withdrawn");
}

#[test]
fn a_truncated_file_loses_its_tail_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let keys = fill(&open(folder.path()), 20);
    let whole = std::fs::read(&files(folder.path())[0]).unwrap();
    for keep in [0, 10, 79, 80, 4096, 4096 + 128 * 7 + 5, find(&whole, &payload(12)) + 100, whole.len() - 1] {
        std::fs::write(&files(folder.path())[0], &whole[..keep]).unwrap();
        let store = open(folder.path());
        let readable = store.readable(&keys);
        assert!(readable < 20 && (keep < whole.len() - 1 || readable == 19), "{readable} of {keep} bytes");
        assert!((0..).zip(&keys[..readable]).all(|(n, key)| get(&store, key).unwrap() == payload(n)));
        assert!(store.stats().torn > 0 || keep == 80 || keep == 4096, "{keep}");
        drop(store);
        std::fs::write(folder.path().join("0000000000000000.kv"), &whole).unwrap();
    }
}

#[test]
fn every_flipped_byte_of_header_or_table_is_found_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let keys = fill(&open(folder.path()), 3);
    let file = files(folder.path())[0].clone();
    let whole = std::fs::read(&file).unwrap();
    for at in (0..80).chain(4096..4096 + 3 * 128) {
        damage(&file, |bytes| bytes[at] ^= 0x20);
        let store = open(folder.path());
        let lost = if at < 4096 { 3 } else { 1 };
        assert_eq!(store.stats().blocks, 3 - lost, "byte {at}");
        assert!(store.stats().torn + store.stats().foreign > 0);
        assert!((0..).zip(&keys).all(|(n, key)| get(&store, key).is_ok_and(|found| found == payload(n))
            || store.readable(&[*key]) == 0));
        drop(store);
        std::fs::write(&file, &whole).unwrap();
        files(folder.path()).iter().skip(1).for_each(|more| std::fs::remove_file(more).unwrap());
    }
}

#[test]
fn a_flipped_byte_of_a_payload_is_found_when_read_and_the_block_can_be_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let keys = fill(&open(folder.path()), 3);
    let file = files(folder.path())[0].clone();
    damage(&file, |bytes| {
        let at = find(bytes, &payload(1)) + 4321;
        bytes[at] ^= 1;
    });
    let store = open(folder.path());
    assert_eq!(store.readable(&keys), 3);
    assert!(matches!(get(&store, &keys[1]), Err(ReadError::Damaged { .. })));
    assert_eq!((store.readable(&keys), store.stats().damaged, store.stats().blocks), (1, 1, 2));
    put(&store, &keys, 1);
    assert_eq!(get(&store, &keys[1]).unwrap(), payload(1));
}

#[test]
fn payloads_that_changed_places_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let keys = fill(&open(folder.path()), 2);
    damage(&files(folder.path())[0], |bytes| {
        let (a, b) = (find(bytes, &payload(0)), find(bytes, &payload(1)));
        bytes[a..a + BYTES].copy_from_slice(&payload(1));
        bytes[b..b + BYTES].copy_from_slice(&payload(0));
    });
    let store = open(folder.path());
    assert!(keys.iter().all(|key| matches!(get(&store, key), Err(ReadError::Damaged { .. }))));
}

#[test]
fn another_models_blocks_are_never_found_and_go_first() {
    let folder = tempfile::tempdir().unwrap();
    let capacity = 2 * MIB;
    let keys = fill(&open_as(folder.path(), capacity, MODEL), 30);
    let other = open_as(folder.path(), capacity, Fingerprint([8; 32]));
    assert_eq!((other.readable(&keys), other.stats().blocks), (0, 0));
    assert!(other.stats().foreign > 0 && get(&other, &keys[0]).is_err());
    drop(other);
    let store = open_as(folder.path(), capacity, MODEL);
    assert_eq!(store.readable(&keys), 30, "they stay for their own model");
    drop(store);
    let other = open_as(folder.path(), capacity, Fingerprint([8; 32]));
    fill(&other, 240);
    let held = other.stats().blocks;
    drop(other);
    assert_eq!(open_as(folder.path(), capacity, MODEL).readable(&keys), 0);
    assert!(held >= 200, "{held} blocks of 8 KiB in 2 MiB, less tables and the segment begun");
}

#[test]
fn files_that_are_none_of_ours_are_left_alone_and_a_fake_segment_goes() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    std::fs::write(folder.path().join("00ff.kv"), "mine too").unwrap();
    std::fs::write(folder.path().join("00000000000000ff.kv"), "RUDDERKV no segment").unwrap();
    let store = open(folder.path());
    assert_eq!((store.stats().torn, store.stats().blocks), (1, 0));
    assert!(folder.path().join("notes.txt").exists() && folder.path().join("00ff.kv").exists());
    assert!(!folder.path().join("00000000000000ff.kv").exists());
}

#[test]
fn the_store_stays_below_its_capacity_and_drops_what_was_used_longest_ago() {
    let folder = tempfile::tempdir().unwrap();
    let capacity = 2 * MIB;
    let store = open_as(folder.path(), capacity, MODEL);
    let keys = chain(&store, 1000);
    let on_disk = || files(folder.path()).iter().map(|f| f.metadata().unwrap().len()).sum::<u64>();
    for n in 0..1000 {
        put(&store, &keys, n);
        store.touch(&keys[..8], ALICE); // a live session's
        assert!(on_disk() <= capacity && store.stats().bytes <= capacity, "after block {n}");
    }
    assert_eq!(store.readable(&keys[..8]), 8);
    assert!(store.readable(&keys[100..101]) == 0 && store.readable(&keys[990..]) == 10);
    let stats = store.stats();
    assert_eq!(stats.blocks + stats.evicted, 1000);
    drop(store);
    let store = open_as(folder.path(), capacity / 2, MODEL);
    assert!(store.stats().bytes <= capacity / 2 && on_disk() <= capacity / 2, "a lowered cap holds at once");
}

/// Has a store of 2 MiB, some 240 blocks, filled with what is asked for once, after `before` blocks that
/// `prepare` knows; tells how many of these are left.
fn left_after_a_flood(before: u32, flood: u32, prepare: impl Fn(&Store, &[BlockKey])) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let store = open_as(folder.path(), 2 * MIB, MODEL);
    let keys = fill(&store, before);
    prepare(&store, &keys);
    let others = chain(&store, before + flood);
    for n in before..before + flood {
        assert!(store.announce(others[n as usize], BOB));
        store.write(others[n as usize], tokens(n), &payload(n)).unwrap();
        assert_eq!(store.readable(&others[n as usize..=n as usize]), 1, "what is new is there");
    }
    keys.iter().filter(|key| store.readable(&[**key]) == 1).count()
}

#[test]
fn what_was_asked_for_again_outlasts_a_flood_of_what_was_not_and_leaves_it_half_of_the_store() {
    let again = |store: &Store, keys: &[BlockKey]| assert_eq!(store.touch(keys, ALICE), keys.len());
    assert_eq!(left_after_a_flood(60, 1000, |_, _| ()), 0);
    assert_eq!(left_after_a_flood(60, 1000, again), 60);
    let left = left_after_a_flood(200, 1000, again);
    assert!((60..=130).contains(&left), "{left}");
}

#[test]
fn what_a_pinned_label_uses_goes_last_until_it_is_unpinned() {
    let half = |store: &Store, keys: &[BlockKey]| {
        store.touch(&keys[..124], BOB);
        store.pin(ALICE, true);
        store.pin(ALICE, true);
    };
    let left = |prepare: &dyn Fn(&Store, &[BlockKey])| left_after_a_flood(186, 1000, prepare);
    let pinned = left(&half);
    assert!((60..=130).contains(&pinned), "{pinned}: a part of the store stays for others");
    let unpinned = left(&|store, keys| {
        half(store, keys);
        store.pin(ALICE, false);
    });
    let never = left(&|store, keys| assert_eq!(store.touch(&keys[..124], BOB), 124));
    assert_eq!(unpinned, never);
    let erased = left(&|store, keys| {
        half(store, keys);
        store.erase(ALICE).unwrap();
    });
    assert_eq!(erased, never);
}

#[test]
fn a_large_store_has_few_files_and_a_small_one_several() {
    for (capacity, files) in
        [(1 << 40, 128..=257), (20 << 30, 128..=330), (1 << 30, 16..=17), (8 * MIB, 8..=9)]
    {
        let geometry = Geometry::new(196_608, capacity);
        let segments = capacity / geometry.file_bytes(geometry.slots);
        assert!(files.contains(&segments), "{segments} in {capacity}");
    }
}

#[test]
fn a_server_that_starts_again_and_again_does_not_gather_files() {
    let folder = tempfile::tempdir().unwrap();
    let keys = fill(&open(folder.path()), 1);
    let geometry = Geometry::new(BYTES, 64 * MIB);
    for number in 1..600 {
        let header = Header { geometry, number, fingerprint: MODEL };
        std::fs::write(folder.path().join(format!("{number:016x}.kv")), header.encode()).unwrap();
    }
    let store = open(folder.path());
    fill(&store, 3);
    assert_eq!(files(folder.path()).len(), 400);
    assert_eq!(store.readable(&keys), 1, "written again");
}

#[test]
fn a_folder_serves_one_process_and_a_capacity_holds_a_block() {
    let folder = tempfile::tempdir().unwrap();
    let _store = open(folder.path());
    assert!(matches!(Disk::open(folder.path()).map_err(StoreError::from), Err(StoreError::InUse)));
    let other = tempfile::tempdir().unwrap();
    let small = Store::open(Arc::new(Disk::open(other.path()).unwrap()), 1000, BYTES, MODEL);
    assert!(matches!(small, Err(StoreError::TooSmall { .. })));
}

#[test]
fn the_newest_record_of_each_label_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let records = |store: &Store| store.read_records(3).unwrap();
    let store = open(folder.path());
    assert_eq!(records(&store), []);
    for (label, body) in [(ALICE, "a"), (BOB, "b"), (ALICE, "newer"), (Label(13), "")] {
        store.write_record(label, body.as_bytes()).unwrap();
    }
    drop(store);
    let store = open(folder.path());
    assert_eq!(records(&store), [(BOB, b"b".to_vec()), (ALICE, b"newer".to_vec()), (Label(13), Vec::new())]);
    store.write_record(Label(14), b"one too many").unwrap();
    store.erase(Label(13)).unwrap();
    store.remove_record(Label(99));
    drop(store);
    let store = open(folder.path());
    assert_eq!(records(&store), [(ALICE, b"newer".to_vec()), (Label(14), b"one too many".to_vec())]);
    assert_eq!(record_files(folder.path()).len(), 3, "Alice's, the one before it, and one");
    store.erase(ALICE).unwrap();
    assert_eq!(record_files(folder.path()).len(), 1);
}

#[test]
fn a_pinned_labels_record_outlasts_the_newer_ones_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let flood = |store: &Store, labels: std::ops::Range<u64>| {
        labels.for_each(|label| store.write_record(Label(label), b"other").unwrap());
        record_files(folder.path()).len()
    };
    let store = open(folder.path());
    store.read_records(3).unwrap();
    store.pin(ALICE, true);
    store.write_record(ALICE, b"pinned").unwrap();
    assert_eq!(flood(&store, 20..30), 3);
    drop(store);
    let store = open(folder.path());
    let other = |label| (Label(label), b"other".to_vec());
    assert_eq!(store.read_records(3).unwrap(), [(ALICE, b"pinned".to_vec()), other(28), other(29)]);
    assert_eq!(flood(&store, 30..32), 3);
    drop(store);
    assert_eq!(
        open(folder.path()).read_records(3).unwrap(),
        [29, 30, 31].map(other),
        "nobody pinned it again"
    );
}

#[test]
fn a_record_that_is_torn_or_damaged_gives_way_to_the_one_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.read_records(9).unwrap();
    store.write_record(ALICE, b"before").unwrap();
    let before = record_files(folder.path())[0].clone();
    let bytes = std::fs::read(&before).unwrap();
    store.write_record(ALICE, b"after").unwrap();
    drop(store);
    let [one, other] = &record_files(folder.path())[..] else { panic!("the one before it is still there") };
    let after = if *one == before { other.clone() } else { one.clone() };
    assert_eq!(open(folder.path()).read_records(9).unwrap(), [(ALICE, b"after".to_vec())]);
    let whole = std::fs::read(&after).unwrap();
    let flipped = [&[whole[0] ^ 1], &whole[1..]].concat();
    for damaged in [&flipped[..], &whole[..whole.len() - 1], &whole[..3], &[]] {
        std::fs::write(&before, &bytes).unwrap();
        std::fs::write(&after, damaged).unwrap();
        assert_eq!(open(folder.path()).read_records(9).unwrap(), [(ALICE, b"before".to_vec())]);
    }
    std::fs::write(&after, &bytes).unwrap();
    let store = open(folder.path());
    assert_eq!(store.read_records(9).unwrap(), [(ALICE, b"before".to_vec())], "a renamed one");
    for body in [b"one", b"two", b"six"] {
        store.write_record(ALICE, body).unwrap();
        assert_eq!(record_files(folder.path()).len(), 2);
    }
    drop(store);
    assert_eq!(open(folder.path()).read_records(9).unwrap(), [(ALICE, b"six".to_vec())]);
}

#[test]
fn another_models_records_stay_its_own() {
    let folder = tempfile::tempdir().unwrap();
    for (model, body) in [(MODEL, "mine"), (Fingerprint([8; 32]), "other")] {
        let store = open_as(folder.path(), 64 * MIB, model);
        assert_eq!(store.read_records(9).unwrap(), []);
        store.write_record(ALICE, body.as_bytes()).unwrap();
    }
    assert_eq!(open(folder.path()).read_records(9).unwrap(), [(ALICE, b"mine".to_vec())]);
}

/// The records' files.
fn record_files(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "record")).collect()
}

/// A folder whose disk can be full or broken.
struct Failing {
    disk: Disk,
    switches: Arc<Switches>,
}

#[derive(Default)]
struct Switches {
    /// Bytes that can still be written, if limited.
    room: AtomicU64,
    limited: AtomicBool,
    /// Whether the next write fails, and it alone.
    refuses_next: AtomicBool,
    unreadable: AtomicBool,
}

struct FailingFile(Box<dyn SegmentFile>, Arc<Switches>);

impl Medium for Failing {
    fn names(&self) -> io::Result<Vec<String>> {
        self.disk.names()
    }
    fn create(&self, name: &str) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(FailingFile(self.disk.create(name)?, self.switches.clone())))
    }
    fn open(&self, name: &str) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(FailingFile(self.disk.open(name)?, self.switches.clone())))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }
}

impl SegmentFile for FailingFile {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        match self.1.unreadable.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the disk is broken")),
            false => self.0.read_at(out, offset),
        }
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.1.refuses_next.swap(false, Ordering::SeqCst) {
            return Err(io::Error::other("one place of the disk is broken"));
        }
        if !self.1.limited.load(Ordering::SeqCst) {
            return self.0.write_at(bytes, offset);
        }
        let room = self.1.room.load(Ordering::SeqCst);
        let fits = room.min(bytes.len() as u64);
        self.1.room.store(room - fits, Ordering::SeqCst);
        self.0.write_at(&bytes[..fits as usize], offset)?;
        if fits == bytes.len() as u64 { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn read_ahead(&self, offset: u64, len: u64) {
        self.0.read_ahead(offset, len);
    }
}

#[test]
fn a_full_disk_refuses_blocks_keeps_the_others_and_takes_more_once_there_is_room() {
    for room in [0, 50, 80, 3000, BYTES as u64 + 80, BYTES as u64 + 80 + 100, 2 * BYTES as u64 + 700] {
        let folder = tempfile::tempdir().unwrap();
        let switches = Arc::new(Switches::default());
        let disk = Disk::open(folder.path()).unwrap();
        let medium = Arc::new(Failing { disk, switches: switches.clone() });
        let store = Store::open(medium, 64 * MIB, BYTES, MODEL).unwrap();
        let keys = chain(&store, 6);
        switches.room.store(room, Ordering::SeqCst);
        switches.limited.store(true, Ordering::SeqCst);
        let mut written = 0;
        for (n, key) in (0..5).zip(&keys) {
            assert!(store.announce(*key, ALICE), "a block that could not be written may be tried again");
            written += usize::from(store.write(*key, tokens(n), &payload(n)).is_ok());
        }
        assert!(written <= (room as usize) / BYTES);
        assert_eq!(store.stats().write_errors as usize, 5 - written);
        assert_eq!(store.readable(&keys), written);
        switches.limited.store(false, Ordering::SeqCst);
        (written as u32..6).for_each(|n| put(&store, &keys, n));
        drop(store);
        let store = open(folder.path());
        assert_eq!(store.readable(&keys), 6, "room for {room}");
        assert!((0..).zip(&keys).all(|(n, key)| get(&store, key).unwrap() == payload(n)));
    }
}

#[test]
fn an_unreadable_disk_is_an_error_for_the_block_and_for_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let switches = Arc::new(Switches::default());
    let disk = Disk::open(folder.path()).unwrap();
    let store = Store::open(Arc::new(Failing { disk, switches: switches.clone() }), 64 * MIB, BYTES, MODEL);
    let store = store.unwrap();
    let keys = fill(&store, 3);
    switches.unreadable.store(true, Ordering::SeqCst);
    assert!(matches!(get(&store, &keys[0]), Err(ReadError::Io { .. })));
    switches.unreadable.store(false, Ordering::SeqCst);
    assert!(matches!(get(&store, &keys[0]), Err(ReadError::Missing)));
    assert_eq!(get(&store, &keys[1]).unwrap(), payload(1));
    assert_eq!((store.stats().read_errors, store.stats().blocks), (1, 2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_damage_makes_the_store_fail_or_lie(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40),
        within in prop_oneof![Just(4096 + 12 * 128), Just(usize::MAX)],
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let keys = fill(&open(folder.path()), 12);
        damage(&files(folder.path())[0], |bytes| {
            for (at, value) in flips {
                let at = at.index(bytes.len().min(within));
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
        });
        let store = open(folder.path());
        for (n, key) in (0..).zip(&keys) {
            if let Ok(found) = get(&store, key) {
                prop_assert_eq!(found, payload(n));
            }
        }
    }
}

#[test]
fn what_is_erased_is_gone_from_the_files_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let keys = fill(&store, 6);
    let bobs = BlockKey(*b"a key of a block that is Bob's..");
    assert!(store.announce(bobs, BOB));
    store.write(bobs, tokens(9), &payload(9)).unwrap();
    assert_eq!(store.touch(&keys[..2], BOB), 2);
    assert_eq!(store.erase(Label::NOBODY).unwrap(), 0);
    assert_eq!(store.erase(ALICE).unwrap(), 4);
    let check = |store: &Store| {
        assert_eq!((store.readable(&keys), store.stats().blocks, store.stats().torn), (2, 3, 0));
        assert!(matches!(get(store, &keys[2]), Err(ReadError::Missing)));
        assert_eq!(get(store, &keys[1]).unwrap(), payload(1));
        assert_eq!(get(store, &bobs).unwrap(), payload(9));
    };
    check(&store);
    drop(store);
    let bytes: Vec<u8> = files(folder.path()).iter().flat_map(|file| std::fs::read(file).unwrap()).collect();
    let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let first_token = |n: u32| tokens(n).map(u32::to_le_bytes).concat();
    assert!(holds(&first_token(1)) && holds(&payload(1)));
    assert!(!holds(&first_token(2)) && !holds(&payload(2)));
    let store = open(folder.path());
    check(&store);
    put(&store, &keys, 2);
    assert_eq!(get(&store, &keys[2]).unwrap(), payload(2), "and can be written anew");
}

#[test]
fn a_label_bears_what_it_wrote_until_that_is_anothers_too_or_gone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let keys = chain(&store, 3);
    let bears = |store: &Store| [ALICE, BOB, Label::NOBODY].map(|label| store.bears(label));
    assert!(store.announce(keys[0], ALICE) && !store.announce(keys[0], BOB));
    assert_eq!(bears(&store), [true, false, false], "on its way");
    store.withdraw(&keys[0]);
    assert_eq!(bears(&store), [false; 3]);
    for (n, label) in [(0, ALICE), (1, ALICE), (2, BOB)] {
        assert!(store.announce(keys[n as usize], label));
        store.write(keys[n as usize], tokens(n), &payload(n)).unwrap();
    }
    for label in [BOB, BOB, ALICE] {
        store.touch(&keys[..1], label);
        assert_eq!(bears(&store), [true, true, false], "one block is several people's");
    }
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.erase(BOB).unwrap(), 1);
    assert_eq!(bears(&store), [true, false, false]);
    assert_eq!(store.touch(&keys[..2], BOB), 2);
    assert_eq!((bears(&store), store.erase(ALICE).unwrap()), ([false; 3], 0));
    drop(store);
    // What others write takes everything with it in time.
    let store = open_as(folder.path(), 2 * MIB, MODEL);
    let others = chain(&store, 1000);
    for n in 10..1000 {
        assert!(store.announce(others[n as usize], BOB));
        store.write(others[n as usize], tokens(n), &payload(n)).unwrap();
    }
    assert_eq!(bears(&store), [false, true, false]);
}

#[test]
fn a_place_that_cannot_be_erased_keeps_no_other_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let switches = Arc::<Switches>::default();
    let disk = Disk::open(folder.path()).unwrap();
    let failing = Failing { disk, switches: switches.clone() };
    let store = Store::open(Arc::new(failing), 32 * MIB, BYTES, MODEL).unwrap();
    fill(&store, 6);
    switches.refuses_next.store(true, Ordering::SeqCst);
    assert!(store.erase(ALICE).is_err());
    drop(store);
    assert_eq!(open(folder.path()).stats().blocks, 1, "the one that could not be");
}

#[test]
fn a_store_of_another_size_reads_what_the_first_has_written() {
    let folder = tempfile::tempdir().unwrap();
    let keys = fill(&open(folder.path()), 4);
    for capacity in [32 * MIB, 640 * MIB] {
        let store = open_as(folder.path(), capacity, MODEL);
        for (n, key) in (0..).zip(&keys) {
            assert_eq!(get(&store, key).unwrap(), payload(n), "{capacity}");
        }
    }
}

#[test]
fn a_block_that_another_asked_for_before_it_was_written_is_not_erased() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let keys = chain(&store, 1);
    assert!(store.announce(keys[0], ALICE));
    assert_eq!(store.touch(&keys, BOB), 1);
    store.write(keys[0], tokens(0), &payload(0)).unwrap();
    assert_eq!(store.erase(ALICE).unwrap(), 0);
    drop(store);
    let store = open(folder.path());
    assert_eq!((store.erase(ALICE).unwrap(), store.readable(&keys)), (0, 1));
}
