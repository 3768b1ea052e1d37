//! What a hub on loopback is asked, and what it is told: redirects, the token, refusals.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use rudder_hub::Progress;
use rudder_hub::hub::{Hub, RemoteFile};

const FILES: &str = r#"[{"type":"file","path":"m.gguf","size":3}]"#;

/// A server that answers as `answer` says (status line, further headers, body) to a path and its token.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(
        answer: impl Fn(&str, Option<&str>) -> (&'static str, String, &'static str) + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let lines: Vec<String> = lines.take_while(|l| !l.is_empty()).collect();
                let path = lines[0].split(' ').nth(1).unwrap().to_owned();
                let token = lines.iter().find_map(|l| l.strip_prefix("authorization: Bearer "));
                let (status, headers, body) = answer(&path, token);
                log.lock().unwrap().push(path);
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}"
                );
                let _ = write!(stream, "{head}\r\n{body}");
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// A hub that shows its files to `secret` alone.
fn gated(_: &str, token: Option<&str>) -> (&'static str, String, &'static str) {
    if token == Some("secret") {
        ("200 OK", String::new(), FILES)
    } else {
        ("401 Unauthorized", String::new(), "")
    }
}

fn location(target: &str) -> String {
    format!("Location: {target}\r\n")
}

#[test]
fn a_renamed_repository_is_still_shown_the_token() {
    let server = Server::start(|path, token| match path.strip_prefix("/api/models/old/name/") {
        Some(rest) => {
            ("307 Temporary Redirect", location(&format!("/api/models/new/name/{rest}")), "elsewhere")
        }
        None => gated(path, token),
    });
    let files = Hub::new(&server.address, Some("secret".into())).files("old/name", "main").unwrap();
    assert_eq!(files[0].path, "m.gguf");
    assert_eq!(server.asked()[1], "/api/models/new/name/tree/main?recursive=true");
}

#[test]
fn a_list_of_several_pages_is_read_to_its_end() {
    let server = Server::start(|path, _| {
        let next = |at: &str| format!("Link: <{at}>; rel=\"next\"\r\n");
        match path.rsplit_once("cursor=") {
            None => ("200 OK", next("/api/models/a/b/tree/main?cursor=2"), FILES),
            Some((_, "2")) => ("200 OK", String::new(), r#"[{"type":"file","path":"last","size":1}]"#),
            Some(_) => ("404 Not Found", String::new(), ""),
        }
    });
    let files = Hub::new(&server.address, None).files("a/b", "main").unwrap();
    assert_eq!(files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), ["m.gguf", "last"]);
    let endless = Server::start(|path, _| ("200 OK", format!("Link: <{path}>; rel=\"next\"\r\n"), FILES));
    assert!(Hub::new(&endless.address, None).files("a/b", "main").unwrap_err().to_string().contains("pages"));
}

#[test]
fn another_host_is_not_told_the_token() {
    let open = Server::start(|_, token| match token {
        None => ("200 OK", String::new(), FILES),
        Some(_) => ("400 Bad Request", String::new(), ""),
    });
    let target = location(&format!("{}/elsewhere", open.address));
    let server = Server::start(move |_, _| ("302 Found", target.clone(), ""));
    let files = Hub::new(&server.address, Some("secret".into())).files("a/b", "main").unwrap();
    assert_eq!((files.len(), open.asked()), (1, vec!["/elsewhere".to_owned()]));
}

#[test]
fn a_hub_that_points_to_itself_for_ever_is_left() {
    let server = Server::start(|path, _| ("302 Found", location(path), ""));
    let error = Hub::new(&server.address, None).files("a/b", "main").unwrap_err().to_string();
    assert!(error.contains("without end"), "{error}");
}

#[test]
fn a_token_may_end_with_a_line_break_but_not_hold_one() {
    let server = Server::start(gated);
    let ask = |token: &str| Hub::new(&server.address, Some(token.into())).files("a/b", "main");
    assert_eq!(ask(" secret\r\n").unwrap().len(), 1);
    let error = ask("sec\nret").unwrap_err().to_string();
    assert!(error.contains("HF_TOKEN") && !error.contains("does not answer"), "{error}");
    assert!(ask("\n").unwrap_err().to_string().contains("access refused (401)"));
}

#[test]
fn a_refusal_is_not_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    for status in ["401 Unauthorized", "403 Forbidden", "404 Not Found", "416 Range Not Satisfiable"] {
        let server = Server::start(move |_, _| (status, String::new(), ""));
        let file = RemoteFile { path: "m.gguf".into(), size: 3, sha256: None };
        let mut progress = Progress::new("", 3);
        let hub = Hub::new(&server.address, None);
        let error = hub.fetch("a/b", "main", &file, &dir.path().join("m"), &mut progress).unwrap_err();
        assert!(error.to_string().contains(&status[..3]), "{error}");
        assert_eq!(server.asked().len(), 1, "{status}");
    }
}

#[test]
fn a_hub_that_is_busy_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let busy = Mutex::new(true);
    let server = Server::start(move |_, _| match std::mem::take(&mut *busy.lock().unwrap()) {
        true => ("429 Too Many Requests", String::new(), ""),
        false => ("200 OK", String::new(), "abc"),
    });
    let file = RemoteFile { path: "m.gguf".into(), size: 3, sha256: None };
    let hub = Hub::new(&server.address, None);
    hub.fetch("a/b", "main", &file, &dir.path().join("m"), &mut Progress::new("", 3)).unwrap();
    assert_eq!(std::fs::read(dir.path().join("m")).unwrap(), b"abc");
}

#[test]
fn a_commit_or_hash_that_would_be_a_path_is_refused() {
    let server = Server::start(|path, _| match path.contains("/revision/") {
        true => ("200 OK", String::new(), r#"{"sha":"../../x"}"#),
        false => (
            "200 OK",
            String::new(),
            r#"[{"type":"file","path":"m","size":1,"lfs":{"oid":"../../x","size":1}}]"#,
        ),
    });
    let hub = Hub::new(&server.address, None);
    assert!(hub.commit("a/b", "main").unwrap_err().to_string().contains("which is none"));
    assert!(hub.files("a/b", "main").unwrap_err().to_string().contains("which is none"));
}
