//! Pulling from a repository that changes between two attempts, and several files of one: what is
//! fetched is of one commit, and what was fetched is kept for whom it belongs to.

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{head, sha256};
use rudder_hub::hub::Hub;
use rudder_hub::packages::Pip;
use rudder_hub::{Cache, HubError, ModelRef, Sources};

/// A file of a repository; the hub states the SHA-256 of a large one.
#[derive(Clone)]
struct Remote {
    path: &'static str,
    data: &'static str,
    large: bool,
}

const fn large(path: &'static str, data: &'static str) -> Remote {
    Remote { path, data, large: true }
}

const fn small(path: &'static str, data: &'static str) -> Remote {
    Remote { path, data, large: false }
}

/// A repository on the hub: its commits, the last of them `main`.
#[derive(Default)]
struct Repo {
    commits: Vec<(&'static str, Vec<Remote>)>,
    /// Of this file so many bytes are served, then it is refused.
    cut: Option<(&'static str, usize)>,
    /// What was fetched: commit, file and first byte.
    fetched: Vec<String>,
}

struct Place {
    dir: tempfile::TempDir,
    cache: Cache,
    repo: Arc<Mutex<Repo>>,
    sources: Sources,
}

impl Place {
    /// A cache beside a hub on loopback with the repository `org/m`.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let repo = Arc::new(Mutex::new(Repo::default()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Hub::new(&format!("http://{}", listener.local_addr().unwrap()), None);
        let served = repo.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(&stream.unwrap(), &mut served.lock().unwrap());
            }
        });
        let sources = Sources { hub, pip: Some(Pip::new("false", &[])) };
        Self { cache: Cache::new(dir.path().join("cache")), dir, repo, sources }
    }

    fn push(&self, commit: &'static str, files: &[Remote]) {
        self.repo.lock().unwrap().commits.push((commit, files.to_vec()));
    }

    fn pull(&self, name: &str) -> Result<std::path::PathBuf, HubError> {
        self.cache.pull(&ModelRef::parse(name).unwrap(), &self.sources)
    }

    /// A pull that ends in the midst of a file.
    fn pull_cut(&self, name: &str, file: &'static str, bytes: usize) {
        self.repo.lock().unwrap().cut = Some((file, bytes));
        self.pull(name).unwrap_err();
        let mut repo = self.repo.lock().unwrap();
        (repo.cut, repo.fetched) = (None, Vec::new());
    }

    fn fetched(&self) -> Vec<String> {
        self.repo.lock().unwrap().fetched.clone()
    }

    fn assert_nothing_unfinished(&self) {
        assert!(!self.cache.root().join(".partial/org--m").exists());
    }
}

fn answer(mut stream: &TcpStream, repo: &mut Repo) -> std::io::Result<()> {
    let lines = head(stream);
    let path = lines[0].split(' ').nth(1).unwrap();
    let mut send = |status: &str, length: usize, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n")?;
        stream.write_all(body)
    };
    let (main, _) = repo.commits.last().unwrap();
    if path == "/api/models/org/m/revision/main" {
        let body = format!(r#"{{"id":"org/m","sha":"{main}"}}"#);
        return send("200 OK", body.len(), body.as_bytes());
    }
    let files = |commit: &str| &repo.commits.iter().find(|c| c.0 == commit).unwrap().1;
    if let Some(rest) = path.strip_prefix("/api/models/org/m/tree/") {
        let body = listing(files(rest.trim_end_matches("?recursive=true")));
        return send("200 OK", body.len(), body.as_bytes());
    }
    let (commit, name) = path.strip_prefix("/org/m/resolve/").unwrap().split_once('/').unwrap();
    let data = files(commit).iter().find(|f| f.path == name).unwrap().data.as_bytes();
    let range = lines.iter().find_map(|l| l.strip_prefix("range: bytes=")).unwrap_or("0-");
    let from: usize = range.trim_end_matches('-').parse().unwrap();
    repo.fetched.push(format!("{commit} {name} {from}"));
    let end = repo.cut.filter(|c| c.0 == name).map_or(data.len(), |c| c.1);
    if end <= from {
        return send("403 Forbidden", 0, b"");
    }
    let status = if from == 0 { "200 OK" } else { "206 Partial Content" };
    send(status, data.len() - from, &data[from..end])
}

fn listing(files: &[Remote]) -> String {
    let entry = |f: &Remote| {
        let size = f.data.len();
        let lfs = format!(r#","lfs":{{"oid":"{}","size":{size}}}"#, sha256(f.data.as_bytes()));
        let lfs = if f.large { lfs } else { String::new() };
        format!(r#"{{"type":"file","path":"{}","size":{size}{lfs}}}"#, f.path)
    };
    format!("[{}]", files.iter().map(entry).collect::<Vec<_>>().join(","))
}

/// The folder holds these files and nothing else.
fn assert_holds(folder: &Path, files: &[Remote]) {
    let there: BTreeSet<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, files.iter().map(|f| f.path.to_owned()).collect());
    for f in files {
        assert_eq!(std::fs::read_to_string(folder.join(f.path)).unwrap(), f.data, "{}", f.path);
    }
}

const OLD: [Remote; 3] = [
    large("1.safetensors", "first shard, old"),
    small("config.json", "{ old config  }"),
    large("2.safetensors", "second shard"),
];
// As long as the old ones, so that lengths tell nothing.
const NEW: [Remote; 3] = [
    large("1.safetensors", "first shard, new"),
    small("config.json", "{ new config  }"),
    large("2.safetensors", "second shard"),
];
const GGUFS: [Remote; 2] = [large("Q4.gguf", "four bits"), large("Q8.gguf", "eight bits, many more")];

#[test]
fn a_pull_that_goes_on_at_a_later_commit_is_all_of_that() {
    for (file, bytes) in [("1.safetensors", 7), ("config.json", 0), ("config.json", 4), ("2.safetensors", 5)]
    {
        let place = Place::new();
        place.push("aaa", &OLD);
        place.pull_cut("org/m", file, bytes);
        place.push("bbb", &NEW);
        assert_holds(&place.pull("org/m").unwrap(), &NEW);
        assert!(place.fetched().iter().all(|f| f.starts_with("bbb ")), "{:?}", place.fetched());
        place.assert_nothing_unfinished();
    }
}

#[test]
fn a_large_file_that_a_commit_left_as_it_was_is_gone_on_with() {
    let place = Place::new();
    place.push("aaa", &OLD);
    place.pull_cut("org/m", "2.safetensors", 5);
    place.push("bbb", &NEW);
    place.pull("org/m").unwrap();
    assert_eq!(place.fetched(), ["bbb 1.safetensors 0", "bbb config.json 0", "bbb 2.safetensors 5"]);
}

#[test]
fn finished_files_are_not_fetched_again_at_the_same_commit() {
    let place = Place::new();
    place.push("aaa", &OLD);
    place.pull_cut("org/m", "2.safetensors", 0);
    assert_holds(&place.pull("org/m").unwrap(), &OLD);
    assert_eq!(place.fetched(), ["aaa 2.safetensors 0"]);
}

#[test]
fn a_finished_file_that_was_damaged_since_does_not_land() {
    let place = Place::new();
    place.push("aaa", &OLD);
    place.pull_cut("org/m", "2.safetensors", 0);
    let parts = place.cache.root().join(".partial/org--m/1.safetensors.parts");
    std::fs::write(parts.join(sha256(OLD[0].data.as_bytes())), "first shard, odd").unwrap();
    assert!(matches!(place.pull("org/m"), Err(HubError::Corrupt { .. })));
    assert_holds(&place.pull("org/m").unwrap(), &OLD);
}

#[test]
fn a_folder_whose_putting_together_was_interrupted_is_finished_without_a_fetch() {
    let place = Place::new();
    place.push("aaa", &OLD);
    place.pull_cut("org/m", "2.safetensors", 0);
    let work = place.cache.root().join(".partial/org--m");
    let part = work.join("1.safetensors.parts").join(sha256(OLD[0].data.as_bytes()));
    std::fs::create_dir(work.join("aaa")).unwrap();
    std::fs::rename(part, work.join("aaa/1.safetensors")).unwrap();
    assert_holds(&place.pull("org/m").unwrap(), &OLD);
    assert_eq!(place.fetched(), ["aaa 2.safetensors 0"]);
    place.assert_nothing_unfinished();
}

#[test]
fn an_interrupted_file_outlives_the_pull_and_the_removal_of_another() {
    let place = Place::new();
    place.push("aaa", &GGUFS);
    place.pull_cut("org/m:Q8.gguf", "Q8.gguf", 10);
    let folder = place.dir.path().join("cache/org--m");
    place.pull("org/m:Q4.gguf").unwrap();
    assert_holds(&folder, &GGUFS[..1]);
    assert_eq!(place.cache.remove("org/m:Q4.gguf").unwrap(), Some(9));
    place.pull("org/m:Q8.gguf").unwrap();
    assert_eq!(place.fetched(), ["aaa Q4.gguf 0", "aaa Q8.gguf 10"]);
    assert_holds(&folder, &GGUFS[1..]);
    place.assert_nothing_unfinished();
}

#[test]
fn removing_an_interrupted_file_frees_what_was_fetched_of_it() {
    let place = Place::new();
    place.push("aaa", &GGUFS);
    place.pull_cut("org/m:Q8.gguf", "Q8.gguf", 10);
    assert_eq!(place.cache.remove("org/m:Q4.gguf").unwrap(), None);
    assert_eq!(place.cache.remove("org/m:Q8.gguf").unwrap(), Some(10));
    place.assert_nothing_unfinished();
}

#[test]
fn a_folder_lands_without_what_was_fetched_of_other_files() {
    let place = Place::new();
    place.push("aaa", &[OLD.as_slice(), &GGUFS].concat());
    place.pull_cut("org/m:Q8.gguf", "Q8.gguf", 10);
    assert_holds(&place.pull("org/m").unwrap(), &OLD);
    place.pull("org/m:Q8.gguf").unwrap();
    assert_eq!(place.fetched().last().unwrap(), "aaa Q8.gguf 10");
}
