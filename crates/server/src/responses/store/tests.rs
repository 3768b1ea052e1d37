use proptest::prelude::*;
use serde_json::json;
use std::path::Path;
use tempfile::TempDir;

use super::*;

fn config(folder: &Path) -> StoreConfig {
    StoreConfig { folder: Some(folder.to_owned()), ..StoreConfig::default() }
}

fn owner(key: &[u8]) -> Owner {
    Owner::of_key(key)
}

fn message(id: &str, text: &str) -> Value {
    json!({"type": "message", "id": id, "role": "user", "content": text})
}

/// A completed response `id` after `previous`, asked `in-id`, answering `out-id`.
fn record(id: &str, previous: Option<&str>) -> Record {
    let response = json!({
        "id": id, "object": "response", "status": "completed", "previous_response_id": previous,
        "output": [message(&format!("out-{id}"), "answer")], "metadata": {"k": "v"},
    });
    Record { response, input: vec![message(&format!("in-{id}"), "question")] }
}

fn with_status(mut record: Record, status: &str) -> Record {
    record.response["status"] = json!(status);
    record
}

fn ids<'a>(items: impl IntoIterator<Item = &'a Value>) -> Vec<&'a str> {
    items.into_iter().map(|item| item["id"].as_str().unwrap()).collect()
}

async fn insert(store: &Store, record: Record) {
    store.insert(owner(b"key"), record).await.done().await.unwrap();
}

async fn history(store: &Store, id: &str) -> History {
    store.history(owner(b"key"), id).await.unwrap()
}

#[cfg(unix)]
#[tokio::test]
async fn stored_responses_are_for_the_servers_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let modes = || {
        let files = std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap);
        let mode = |file: std::fs::DirEntry| file.metadata().unwrap().permissions().mode() & 0o777;
        files.map(|file| (file.file_name().into_string().unwrap(), mode(file))).collect::<Vec<_>>()
    };
    for _ in 0..2 {
        let store = Store::open(&config(folder.path()));
        insert(&store, record("a", None)).await;
        let modes = modes();
        assert!(modes.iter().any(|(name, _)| name == FILE), "{modes:?}");
        assert!(modes.iter().all(|(_, mode)| *mode == 0o600), "{modes:?}");
        drop(store);
        // As an earlier version left it.
        let readable = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(folder.path().join(FILE), readable).unwrap();
    }
}

#[tokio::test]
async fn what_is_written_is_read_again_by_its_owner_alone() {
    let store = Store::open(&StoreConfig::default());
    insert(&store, record("a", None)).await;
    assert_eq!(store.get(owner(b"key"), "a").await.unwrap(), Some(record("a", None)));
    assert_eq!(store.get(owner(b"other"), "a").await.unwrap(), None);
    assert!(matches!(store.history(owner(b"other"), "a").await.unwrap(), History::Missing));
    assert!(!store.delete(owner(b"other"), "a").await.unwrap());
    assert!(!store.insert(owner(b"other"), record("a", None)).await.done().await.unwrap());
    assert_eq!(store.get(owner(b"other"), "a").await.unwrap(), None);
    assert!(store.delete(owner(b"key"), "a").await.unwrap());
    assert_eq!(store.get(owner(b"key"), "a").await.unwrap(), None);
}

#[tokio::test]
async fn a_history_is_the_whole_chain_oldest_first() {
    let store = Store::open(&StoreConfig::default());
    for (id, previous) in [("a", None), ("b", Some("a")), ("other", Some("a")), ("c", Some("b"))] {
        insert(&store, record(id, previous)).await;
    }
    let History::Found(link) = history(&store, "c").await else { panic!() };
    let mut items = Vec::new();
    link.items(&mut items);
    assert_eq!(ids(items), ["in-a", "out-a", "in-b", "out-b", "in-c", "out-c"]);
    assert!(store.delete(owner(b"key"), "a").await.unwrap());
    assert!(matches!(history(&store, "c").await, History::Missing));
}

#[tokio::test]
async fn a_chain_that_bites_its_tail_is_missing_not_endless() {
    let store = Store::open(&StoreConfig::default());
    insert(&store, record("a", Some("b"))).await;
    insert(&store, record("b", Some("a"))).await;
    assert!(matches!(history(&store, "a").await, History::Missing));
}

#[tokio::test]
async fn what_was_deleted_while_it_ran_stays_away() {
    let store = Store::open(&StoreConfig::default());
    insert(&store, with_status(record("a", None), "in_progress")).await;
    assert!(matches!(history(&store, "a").await, History::Missing));
    assert!(store.update(owner(b"key"), record("a", None)).await.done().await.unwrap());
    assert!(matches!(history(&store, "a").await, History::Found(_)));
    assert!(store.delete(owner(b"key"), "a").await.unwrap());
    assert!(!store.update(owner(b"key"), record("a", None)).await.done().await.unwrap());
    assert_eq!(store.get(owner(b"key"), "a").await.unwrap(), None);
}

#[tokio::test]
async fn a_restart_keeps_what_is_complete_and_fails_what_ran() {
    let folder = TempDir::new().unwrap();
    let store = Store::open(&config(folder.path()));
    insert(&store, record("done", None)).await;
    for status in ["queued", "in_progress"] {
        insert(&store, with_status(record(status, Some("done")), status)).await;
    }
    drop(store);
    let store = Store::open(&config(folder.path()));
    assert_eq!(store.get(owner(b"key"), "done").await.unwrap(), Some(record("done", None)));
    for id in ["queued", "in_progress"] {
        let cut = store.get(owner(b"key"), id).await.unwrap().unwrap();
        assert_eq!(cut.response["status"], "failed");
        assert_eq!(cut.response["error"]["code"], "server_error");
        assert_eq!(cut.input, record(id, None).input);
    }
}

#[tokio::test]
async fn a_completed_response_is_taken_up_by_its_conversation_once() {
    let store = Store::open(&StoreConfig::default());
    let me = owner(b"key");
    let conversation = Conversation { id: "conv".into(), created_at: 7, metadata: json!({}) };
    store.create_conversation(me, conversation.clone(), vec![message("first", "hi")]).await.unwrap();
    let belonging = |id: &str, status: &str| {
        let mut record = with_status(record(id, None), status);
        record.response["conversation"] = json!({"id": "conv"});
        record
    };
    insert(&store, belonging("a", "in_progress")).await;
    store.update(me, belonging("a", "completed")).await.done().await.unwrap();
    store.update(me, belonging("a", "completed")).await.done().await.unwrap();
    insert(&store, belonging("b", "failed")).await;
    insert(&store, belonging("c", "incomplete")).await;
    let items = store.conversation_items(me, "conv").await.unwrap().unwrap();
    assert_eq!(ids(&items), ["first", "in-a", "out-a", "in-c", "out-c"]);
    assert_eq!(store.conversation_items(owner(b"other"), "conv").await.unwrap(), None);
    assert_eq!(store.append(owner(b"other"), "conv", vec![message("x", "")]).await.unwrap(), None);
    assert_eq!(store.conversation(me, "conv").await.unwrap(), Some(conversation));
}

#[tokio::test]
async fn pages_go_either_way_and_meet_neither_gap_nor_repeat() {
    let store = Store::open(&StoreConfig::default());
    let me = owner(b"key");
    let names: Vec<String> = (0..10).map(|n| format!("m{n}")).collect();
    let items = names.iter().map(|name| message(name, "x")).collect();
    let conversation = Conversation { id: "conv".into(), created_at: 7, metadata: json!({}) };
    store.create_conversation(me, conversation, items).await.unwrap();
    assert!(store.delete_item(me, "conv", "m4").await.unwrap().is_some());
    assert!(store.delete_item(me, "conv", "m4").await.unwrap().is_none());
    assert_eq!(store.item(me, "conv", "m5").await.unwrap(), Some(message("m5", "x")));
    assert_eq!(store.item(owner(b"other"), "conv", "m5").await.unwrap(), None);
    for ascending in [true, false] {
        let mut expected: Vec<&str> = names.iter().map(String::as_str).filter(|name| *name != "m4").collect();
        if !ascending {
            expected.reverse();
        }
        let mut listed: Vec<String> = Vec::new();
        loop {
            let query = PageQuery { limit: 4, ascending, after: listed.last().cloned() };
            let page = store.page(me, "conv", query).await.unwrap().unwrap().unwrap();
            listed.extend(ids(&page.items).into_iter().map(String::from));
            if !page.has_more {
                break;
            }
            assert_eq!(page.items.len(), 4);
        }
        assert_eq!(listed, expected);
    }
    let query = PageQuery { limit: 4, ascending: true, after: Some("m4".into()) };
    assert_eq!(store.page(me, "conv", query.clone()).await.unwrap(), Some(None));
    assert_eq!(store.page(me, "none", query).await.unwrap(), None);
    assert!(store.delete_conversation(me, "conv").await.unwrap());
    assert_eq!(store.item(me, "conv", "m5").await.unwrap(), None);
}

#[tokio::test]
async fn the_size_cap_throws_out_what_was_used_longest_ago() {
    let folder = TempDir::new().unwrap();
    let max_bytes = 1 << 20;
    let store = Store::open(&StoreConfig { max_bytes, ..config(folder.path()) });
    let count = 200;
    for number in 0..count {
        let mut record = record(&format!("r{number}"), None);
        record.input = vec![message("m", &"x".repeat(20_000))];
        // The oldest still runs: it is not for eviction.
        insert(&store, if number == 0 { with_status(record, "in_progress") } else { record }).await;
    }
    let mut there = Vec::new();
    for number in 0..count {
        if store.get(owner(b"key"), &format!("r{number}")).await.unwrap().is_some() {
            there.push(number);
        }
    }
    assert!((10..60).contains(&there.len()), "{there:?}");
    assert_eq!((there[0], *there.last().unwrap()), (0, count - 1));
    assert!(store.stats().evicted.load(Ordering::Relaxed) > 100);
    drop(store);
    let bytes = std::fs::metadata(folder.path().join(FILE)).unwrap().len();
    assert!(bytes <= max_bytes + (64 << 10), "{bytes}");
}

#[test]
fn retention_counts_from_the_last_use() {
    let db = Db::in_memory().unwrap();
    let me = owner(b"key");
    for (id, previous) in [("old", None), ("root", None), ("middle", Some("root")), ("leaf", Some("middle"))]
    {
        db.put(&me, &record(id, previous), Write::New, 1000).unwrap();
    }
    db.put(&me, &with_status(record("runs", None), "queued"), Write::New, 1000).unwrap();
    let conversation = Conversation { id: "conv".into(), created_at: 1000, metadata: json!({}) };
    db.put_conversation(&me, &conversation, 1000).unwrap();
    db.append("conv", [&message("m", "x")], 1000).unwrap();
    assert!(matches!(db.history(&me, "leaf", 5000).unwrap(), History::Found(_)));
    assert_eq!(db.expire(1000).unwrap(), 0);
    assert_eq!(db.expire(2000).unwrap(), 2);
    // A new response after a chain is a use of it too.
    db.put(&me, &record("next", Some("leaf")), Write::New, 9000).unwrap();
    assert_eq!(db.expire(8000).unwrap(), 0);
    for (id, kept) in [("old", false), ("root", true), ("leaf", true), ("runs", true)] {
        assert_eq!(db.get(&me, id).unwrap().is_some(), kept, "{id}");
    }
    assert_eq!(db.conversation(&me, "conv").unwrap(), None);
    assert!(db.items("conv").unwrap().is_empty());
}

#[tokio::test]
async fn a_full_disk_fails_the_write_and_is_counted_and_reads_go_on() {
    let store = Store::open(&StoreConfig::default());
    insert(&store, record("a", None)).await;
    store.submit(0, |db| db.pragma("max_page_count = 20")).await.done().await.unwrap();
    let me = owner(b"key");
    let mut big = record("b", None);
    big.input = vec![message("m", &"x".repeat(200_000))];
    // Together in one transaction: the small one is none the worse for the big one.
    let (big, small) = (store.insert(me, big).await, store.insert(me, record("c", None)).await);
    assert!(big.done().await.unwrap_err().to_string().contains("full"));
    assert_eq!(small.done().await, Ok(false));
    assert_eq!(store.stats().failures.load(Ordering::Relaxed), 1);
    assert!(store.get(owner(b"key"), "a").await.unwrap().is_some());
    assert_eq!(store.get(owner(b"key"), "b").await.unwrap(), None);
}

#[tokio::test]
async fn a_second_server_does_not_touch_the_firsts_file() {
    let folder = TempDir::new().unwrap();
    let first = Store::open(&config(folder.path()));
    insert(&first, with_status(record("a", None), "in_progress")).await;
    let second = Store::open(&config(folder.path()));
    assert_eq!(second.get(owner(b"key"), "a").await.unwrap(), None);
    insert(&second, record("b", None)).await;
    assert_eq!(first.get(owner(b"key"), "a").await.unwrap().unwrap().response["status"], "in_progress");
    assert_eq!(
        std::fs::read_dir(folder.path())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("damaged"))
            .count(),
        0
    );
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_means_memory() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let store = Store::open(&config(&file.join("below")));
    insert(&store, record("a", None)).await;
    assert!(store.get(owner(b"key"), "a").await.unwrap().is_some());
}

#[tokio::test]
async fn damage_met_while_running_begins_a_new_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(FILE);
    let store = Store::open(&config(folder.path()));
    for number in 0..300 {
        insert(&store, record(&format!("r{number}"), None)).await;
    }
    // Closing brings everything into the file, which is overwritten while it is open again.
    drop(store);
    let store = Store::open(&config(folder.path()));
    let mut bytes = std::fs::read(&path).unwrap();
    let whole = bytes.len();
    bytes[4096..].fill(0xa5);
    std::fs::write(&path, &bytes).unwrap();
    store.submit(0, |db| db.pragma("shrink_memory")).await.done().await.unwrap();
    for number in 0..300 {
        let _ = store.get(owner(b"key"), &format!("r{number}")).await;
    }
    // It may be the upkeep that meets it; then what is read is already the new file.
    let failed = store.stats().failures.load(Ordering::Relaxed);
    assert!(whole > 40_960 && failed > 0, "{whole} {failed}");
    insert(&store, record("new", None)).await;
    assert!(store.get(owner(b"key"), "new").await.unwrap().is_some());
    drop(store);
    let store = Store::open(&config(folder.path()));
    assert!(store.get(owner(b"key"), "new").await.unwrap().is_some());
}

/// A database with some of everything in it.
fn sample() -> Vec<u8> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(FILE);
    let db = Db::open(&path).unwrap();
    let me = owner(b"key");
    for number in 0..40 {
        let previous = (number > 0).then(|| format!("r{}", number - 1));
        let mut record = record(&format!("r{number}"), previous.as_deref());
        record.input.push(message("long", &"y".repeat(number * 300)));
        let status = if number == 39 { "queued" } else { "completed" };
        db.put(&me, &with_status(record, status), Write::New, 1000).unwrap();
    }
    let conversation = Conversation { id: "conv".into(), created_at: 1000, metadata: json!({}) };
    db.put_conversation(&me, &conversation, 1000).unwrap();
    db.append("conv", &(0..50).map(|n| message(&format!("m{n}"), "x")).collect::<Vec<_>>(), 1000).unwrap();
    drop(db);
    std::fs::read(path).unwrap()
}

/// Opens a file of these bytes and does a bit of everything; then writes and reads again.
fn use_damaged(bytes: &[u8]) -> Result<(), TestCaseError> {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join(FILE), bytes).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(&config(folder.path()));
        let me = owner(b"key");
        // Whatever these answer, they do answer.
        let _ = store.get(me, "r3").await;
        let _ = store.history(me, "r38").await;
        let _ = store.conversation_items(me, "conv").await;
        let _ = store.append(me, "conv", vec![message("new", "x")]).await;
        let _ = store.delete(me, "r5").await;
        let _ = store.submit(0, |db| db.evict(4096)).await.done().await;
        for _ in 0..3 {
            if store.insert(me, record("fresh", None)).await.done().await.is_ok() {
                break;
            }
        }
        let read = store.get(me, "fresh").await;
        prop_assert_eq!(read, Ok(Some(record("fresh", None))));
        Ok(())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_in_the_file_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000), magic: bool) {
        let mut bytes = bytes;
        if magic && bytes.len() > 16 {
            bytes[..16].copy_from_slice(b"SQLite format 3\0");
        }
        use_damaged(&bytes)?;
    }

    #[test]
    fn a_file_with_flipped_or_missing_bytes_never_panics(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        static SAMPLE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(sample);
        let mut bytes = SAMPLE.clone();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        use_damaged(&bytes)?;
    }
}
