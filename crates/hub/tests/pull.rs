//! Pulling a small model from a hub on loopback and from wheels in a local folder: resume, damage,
//! falling over from one source to the next, and landing whole or not at all.

mod common;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{head, sha256};
use rudder_hub::hub::Hub;
use rudder_hub::packages::Pip;
use rudder_hub::{Cache, Entry, HubError, ModelRef, Sources};

/// Three parts' worth of bytes without a pattern that compresses away.
fn data() -> Vec<u8> {
    let mut x = 1u32;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 24) as u8
    };
    (0..300_000).map(|_| next()).collect()
}

fn entry(data: &[u8]) -> &'static Entry {
    let text = format!(
        r#"
        name = "tiny"
        description = "a test"
        architecture = "llama"
        parameters = "0"
        quantisation = "F32"
        licence = "MIT"
        context_length = 8
        file = "tiny.gguf"
        size = {}
        sha256 = "{}"
        [sources.hub]
        repo = "org/tiny"
        file = "tiny.gguf"
        revision = "main"
        [sources.packages]
        package = "tiny-part{{}}"
        version = "1.0"
        parts = 3
        member = "tiny_part{{}}/data/part{{:02}}.bin"
        size = 300000
        "#,
        data.len(),
        sha256(data)
    );
    Box::leak(Box::new(toml::from_str(&text).unwrap()))
}

/// How the hub on loopback behaves.
#[derive(Clone, Default)]
struct Behaviour {
    /// What it serves, and where in the repository.
    data: Vec<u8>,
    path: Option<&'static str>,
    /// What it says the SHA-256 is.
    oid: String,
    /// Ends the first transfers after so many bytes each.
    cuts: Vec<usize>,
    /// Answers 200 with everything, whatever range is asked for.
    no_ranges: bool,
}

/// Serves one repository; the list collects the `Range` of every file request.
fn hub(behaviour: Behaviour) -> (Hub, Arc<Mutex<Vec<Option<usize>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let seen = ranges.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = answer(&stream.unwrap(), &behaviour, &seen);
        }
    });
    (Hub::new(&address, None), ranges)
}

fn answer(mut stream: &TcpStream, b: &Behaviour, seen: &Mutex<Vec<Option<usize>>>) -> std::io::Result<()> {
    let lines = head(stream);
    if lines[0].contains("/api/") {
        let listing = format!(
            r#"[{{"type":"directory","path":"x","size":0}},{{"type":"file","path":"{}","size":9,"lfs":{{"oid":"{}","size":{}}}}}]"#,
            b.path.unwrap_or("tiny.gguf"),
            b.oid,
            b.data.len()
        );
        let commit = r#"{"sha":"c0ffee"}"#.to_owned();
        let body = if lines[0].contains("/revision/") { commit } else { listing };
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
    }
    let range =
        lines.iter().find_map(|l| l.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
    let from: Option<usize> = range.map(|r| r.trim_end_matches('-').parse().unwrap());
    let attempt = {
        let mut seen = seen.lock().unwrap();
        seen.push(from);
        seen.len() - 1
    };
    let (status, start) =
        if b.no_ranges { ("200 OK", 0) } else { ("206 Partial Content", from.unwrap_or(0)) };
    let status = if from.is_none() { "200 OK" } else { status };
    let body = &b.data[start..];
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
    let end = b.cuts.get(attempt).map_or(body.len(), |c| (*c).min(body.len()));
    stream.write_all(&body[..end])
}

/// A hub that nobody answers at: a port that was free a moment ago.
fn nobody() -> Hub {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    Hub::new(&format!("http://127.0.0.1:{port}"), None)
}

fn no_pip() -> Option<Pip> {
    Some(Pip::new("false", &[]))
}

/// Real wheels of the three parts.
fn wheels(folder: &Path, data: &[u8]) {
    for (n, part) in data.chunks(data.len().div_ceil(3)).enumerate().map(|(i, p)| (i + 1, p)) {
        let path = folder.join(format!("tiny_part{n}-1.0-py3-none-any.whl"));
        let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        let info = format!("tiny_part{n}-1.0.dist-info");
        let mut add = |name: String, content: &[u8]| {
            zip.start_file(name, options).unwrap();
            zip.write_all(content).unwrap();
        };
        add(format!("tiny_part{n}/__init__.py"), b"raise SystemExit('imported')");
        add(format!("tiny_part{n}/data/part{n:02}.bin"), part);
        add(
            format!("{info}/METADATA"),
            format!("Metadata-Version: 2.1\nName: tiny-part{n}\nVersion: 1.0\n").as_bytes(),
        );
        add(format!("{info}/WHEEL"), b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n");
        add(format!("{info}/RECORD"), b"");
        zip.finish().unwrap();
    }
}

/// Stands in for pip: copies the wheel of the requirement, writes the requirement to `log`, and
/// fails at the requirement in `fail_at` while that file exists.
fn scripted_pip(dir: &Path, wheels: &Path) -> Pip {
    let script = dir.join("pip.sh");
    let text = format!(
        r#"for last; do :; done
        while [ "$1" != --dest ]; do shift; done
        echo "$last" >> {log}
        if [ "$last" = "$(cat {fail} 2>/dev/null)" ]; then echo "ERROR: no route to $last" >&2; exit 1; fi
        name=$(echo "${{last%%==*}}" | tr - _)
        cp {wheels}/$name-*.whl "$2"/"#,
        log = dir.join("log").display(),
        fail = dir.join("fail_at").display(),
        wheels = wheels.display()
    );
    std::fs::write(&script, text).unwrap();
    Pip::new("sh", &[script.to_str().unwrap()])
}

struct Place {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("cache"));
        Self { dir, cache }
    }

    fn wheels(&self) -> PathBuf {
        let folder = self.dir.path().join("wheels");
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// No model and no half model under its final name.
    fn assert_nothing_landed(&self) {
        assert!(!self.cache.root().join("tiny").exists());
    }

    fn assert_landed(&self, path: &Path, data: &[u8]) {
        assert_eq!(path, self.cache.root().join("tiny/tiny.gguf"));
        assert!(std::fs::read(path).unwrap() == data);
        assert!(!self.cache.root().join(".partial/tiny").exists(), "nothing unfinished is left behind");
    }
}

#[test]
fn a_broken_transfer_goes_on_where_it_broke() {
    let (place, data) = (Place::new(), data());
    let (hub, ranges) = hub(Behaviour {
        oid: sha256(&data),
        data: data.clone(),
        cuts: vec![100_000, 50_000],
        ..Behaviour::default()
    });
    let path = place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub, pip: no_pip() }).unwrap();
    place.assert_landed(&path, &data);
    assert_eq!(*ranges.lock().unwrap(), [None, Some(100_000), Some(150_000)]);
}

#[test]
fn what_an_earlier_process_fetched_is_not_fetched_again() {
    let (place, data) = (Place::new(), data());
    let work = place.cache.root().join(".partial/tiny");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("tiny.gguf"), &data[..123_456]).unwrap();
    let (hub, ranges) = hub(Behaviour { oid: sha256(&data), data: data.clone(), ..Behaviour::default() });
    let path = place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub, pip: no_pip() }).unwrap();
    place.assert_landed(&path, &data);
    assert_eq!(*ranges.lock().unwrap(), [Some(123_456)]);
}

#[test]
fn a_hub_without_ranges_starts_over_and_still_ends_right() {
    let (place, data) = (Place::new(), data());
    let (hub, _) = hub(Behaviour {
        oid: sha256(&data),
        data: data.clone(),
        cuts: vec![100_000],
        no_ranges: true,
        ..Behaviour::default()
    });
    let path = place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub, pip: no_pip() }).unwrap();
    place.assert_landed(&path, &data);
}

#[test]
fn a_damaged_download_is_deleted_and_does_not_land() {
    let (place, data) = (Place::new(), data());
    let mut served = data.clone();
    served[200_000] ^= 1;
    let (hub, _) = hub(Behaviour { oid: sha256(&data), data: served, ..Behaviour::default() });
    let error =
        place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub, pip: no_pip() }).unwrap_err();
    assert!(error.to_string().contains("is damaged"), "{error}");
    place.assert_nothing_landed();
    assert!(!place.cache.root().join(".partial/tiny/tiny.gguf").exists());
}

#[test]
fn another_file_on_the_hub_is_refused_before_it_is_fetched_and_packages_serve() {
    let (place, data) = (Place::new(), data());
    wheels(&place.wheels(), &data);
    let other = vec![7; data.len()];
    let (hub, ranges) = hub(Behaviour { oid: sha256(&other), data: other, ..Behaviour::default() });
    let pip = Some(scripted_pip(place.dir.path(), &place.wheels()));
    let path = place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub, pip }).unwrap();
    place.assert_landed(&path, &data);
    assert!(ranges.lock().unwrap().is_empty(), "no byte of the wrong file was fetched");
}

#[test]
fn where_no_hub_answers_the_users_pip_fetches_wheels_that_are_joined() {
    let (place, data) = (Place::new(), data());
    wheels(&place.wheels(), &data);
    let links = format!("PIP_FIND_LINKS={}", place.wheels().display());
    let pip = Some(Pip::new("env", &["PIP_NO_INDEX=1", &links, "python3", "-m", "pip"]));
    let path = place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub: nobody(), pip }).unwrap();
    place.assert_landed(&path, &data);
}

#[test]
fn wheels_fetched_before_a_failure_are_kept_for_the_next_attempt() {
    let (place, data) = (Place::new(), data());
    wheels(&place.wheels(), &data);
    let pip = scripted_pip(place.dir.path(), &place.wheels());
    let pull = || {
        place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub: nobody(), pip: Some(pip.clone()) })
    };
    std::fs::write(place.dir.path().join("fail_at"), "tiny-part3==1.0").unwrap();
    let message = pull().unwrap_err().to_string();
    assert!(
        message.contains("no route to tiny-part3==1.0") && message.contains("does not answer"),
        "{message}"
    );
    assert!(message.contains("rudder pull tiny"), "{message}");
    place.assert_nothing_landed();
    std::fs::remove_file(place.dir.path().join("fail_at")).unwrap();
    place.assert_landed(&pull().unwrap(), &data);
    let log = std::fs::read_to_string(place.dir.path().join("log")).unwrap();
    assert_eq!(log.lines().filter(|l| l.starts_with("tiny-part1")).count(), 1, "{log}");
    assert_eq!(log.lines().filter(|l| l.starts_with("tiny-part3")).count(), 2, "{log}");
}

#[test]
fn damaged_wheels_are_deleted_so_that_the_next_attempt_is_fresh() {
    let (place, data) = (Place::new(), data());
    let mut wrong = data.clone();
    wrong[10] ^= 1;
    wheels(&place.wheels(), &wrong);
    let pip = scripted_pip(place.dir.path(), &place.wheels());
    let pull = || {
        place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub: nobody(), pip: Some(pip.clone()) })
    };
    let message = pull().unwrap_err().to_string();
    assert!(message.contains("is damaged"), "{message}");
    place.assert_nothing_landed();
    wheels(&place.wheels(), &data);
    place.assert_landed(&pull().unwrap(), &data);
}

#[test]
fn a_truncated_wheel_is_an_error_that_names_it() {
    let (place, data) = (Place::new(), data());
    wheels(&place.wheels(), &data);
    let second = place.wheels().join("tiny_part2-1.0-py3-none-any.whl");
    let whole = std::fs::read(&second).unwrap();
    std::fs::write(&second, &whole[..whole.len() / 2]).unwrap();
    let pip = Some(scripted_pip(place.dir.path(), &place.wheels()));
    let error =
        place.cache.pull(&ModelRef::Catalog(entry(&data)), &Sources { hub: nobody(), pip }).unwrap_err();
    assert!(error.to_string().contains("tiny-part2==1.0.whl"), "{error}");
    place.assert_nothing_landed();
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let (place, data) = (Place::new(), data());
    wheels(&place.wheels(), &data);
    let pip = scripted_pip(place.dir.path(), &place.wheels());
    let entry = entry(&data);
    std::thread::scope(|s| {
        let pull = || {
            let sources = Sources { hub: nobody(), pip: Some(pip.clone()) };
            place.cache.pull(&ModelRef::Catalog(entry), &sources).unwrap()
        };
        let handles = [s.spawn(pull), s.spawn(pull)];
        for h in handles {
            place.assert_landed(&h.join().unwrap(), &data);
        }
    });
    let log = std::fs::read_to_string(place.dir.path().join("log")).unwrap();
    assert_eq!(log.lines().count(), 3, "{log}");
}

#[test]
fn what_another_process_is_fetching_is_not_removed() {
    let (place, data) = (Place::new(), data());
    let name = "smollm2-135m";
    let ModelRef::Catalog(known) = ModelRef::parse(name).unwrap() else { panic!() };
    let part = place.cache.root().join(".partial").join(name).join(&known.file);
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, &data).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let hub = Hub::new(&format!("http://{}", listener.local_addr().unwrap()), None);
    std::thread::scope(|s| {
        let sources = Sources { hub, pip: no_pip() };
        let pull = s.spawn(|| place.cache.pull(&ModelRef::Catalog(known), &{ sources }));
        let asked = listener.accept().unwrap();
        let error = place.cache.remove(name).unwrap_err();
        assert!(matches!(error, HubError::Busy { .. }), "{error}");
        assert!(part.exists());
        drop((asked, listener));
        pull.join().unwrap().unwrap_err();
    });
    assert!(place.cache.remove(name).unwrap() >= Some(data.len() as u64));
    assert!(!part.exists());
}

#[test]
fn a_hub_model_lands_under_its_repository_and_can_be_listed_and_removed() {
    let (place, data) = (Place::new(), data());
    let (hub, _) = hub(Behaviour { oid: sha256(&data), data: data.clone(), ..Behaviour::default() });
    let id = ModelRef::parse("org/tiny").unwrap();
    let path = place.cache.pull(&id, &Sources { hub, pip: no_pip() }).unwrap();
    assert!(std::fs::read(&path).unwrap() == data);
    assert_eq!(place.cache.locate(&id).unwrap(), path);
    let listed = place.cache.list();
    assert_eq!((listed[0].name.as_str(), listed[0].size), ("org/tiny:tiny.gguf", data.len() as u64));
    assert_eq!(place.cache.remove("org/tiny:tiny.gguf").unwrap(), Some(data.len() as u64));
    assert!(place.cache.list().is_empty());
    assert_eq!(place.cache.remove("org/tiny:tiny.gguf").unwrap(), None);
}

#[test]
fn a_gguf_in_a_sub_folder_is_found_again_and_listed() {
    let (place, data) = (Place::new(), data());
    let path = Some("BF16/tiny.gguf");
    let (hub, ranges) = hub(Behaviour { oid: sha256(&data), data, path, ..Behaviour::default() });
    let id = ModelRef::parse("org/tiny").unwrap();
    let sources = Sources { hub, pip: no_pip() };
    let path = place.cache.pull(&id, &sources).unwrap();
    assert_eq!(path, place.cache.root().join("org--tiny/BF16/tiny.gguf"));
    assert_eq!(place.cache.pull(&id, &sources).unwrap(), path);
    assert_eq!(ranges.lock().unwrap().len(), 1, "it is fetched once");
    assert_eq!(place.cache.list()[0].name, "org/tiny:BF16/tiny.gguf");
}

#[test]
fn a_hub_that_names_files_outside_of_the_repository_is_refused() {
    let place = Place::new();
    let outside = place.dir.path().join("outside.gguf");
    let absolute: &'static str = Box::leak(outside.to_str().unwrap().to_owned().into_boxed_str());
    for path in ["../../../outside.gguf", "x/../../../../outside.gguf", absolute, ""] {
        let data = data();
        let (hub, ranges) =
            hub(Behaviour { oid: sha256(&data), data, path: Some(path), ..Behaviour::default() });
        let pulled = place.cache.pull(&ModelRef::parse("org/tiny").unwrap(), &Sources { hub, pip: no_pip() });
        let error = pulled.unwrap_err().to_string();
        assert!(error.contains("outside of the repository"), "{error}");
        assert!(ranges.lock().unwrap().is_empty() && !outside.exists());
    }
}
