//! Files from the Hugging Face hub: a repository's commit, its files, and one of them with resume.
//!
//! Plain HTTP through ureq, not the hf-hub crate: three requests are all that is needed, and hf-hub
//! 1.0 brings reqwest with an async runtime of its own, some hundred crates more.
//!
//! Honours the hub's usual variables: HF_ENDPOINT (a mirror) and HF_TOKEN (gated models).

use std::io::Read;
use std::path::{Component, Path};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::Body;
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};

use crate::{HubError, Progress, Sha256Writer};

/// A hub that does not answer within this is taken for absent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A transfer that stands still for this long is broken.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a broken transfer is taken up again, counted from its last progress.
const RETRIES: usize = 4;
/// How often in a row a hub may point elsewhere.
const MAX_REDIRECTS: usize = 10;
/// Pages of a repository's list of files, of some 1,000 each.
const MAX_PAGES: usize = 100;

/// A file in a repository of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path inside the repository.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in hex; the hub states it for large files only.
    pub sha256: Option<String>,
}

/// The hub, or a mirror of it.
pub struct Hub {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<String>,
}

/// Why a transfer ended before its file did.
enum Break {
    /// The connection, or the hub for now: worth another attempt.
    Passing(String),
    /// Another attempt would end like this one.
    Lasting(HubError),
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

#[derive(Deserialize)]
struct TreeEntry {
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(rename = "type")]
    kind: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Hub {
    /// The hub that HF_ENDPOINT and HF_TOKEN name.
    pub fn from_env() -> Self {
        let var = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self::new(&endpoint, var("HF_TOKEN"))
    }

    /// A hub at this address. The token goes to this host alone, not to others that it points to.
    pub fn new(endpoint: &str, token: Option<String>) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(STALL_TIMEOUT))
            .http_status_as_error(false)
            // `get` follows them: ureq takes another port for the same host and would tell it the token.
            .max_redirects(0)
            // The system's certificates: companies put their own proxy's there.
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .user_agent(concat!("rudder/", env!("CARGO_PKG_VERSION")))
            .build();
        // A token read from a file often ends with a line break.
        let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        Self { agent: config.new_agent(), endpoint: endpoint.trim_end_matches('/').to_owned(), token }
    }

    /// The address in use.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The commit that a branch or tag is at. A small request: it also tells whether the hub answers at all.
    ///
    /// # Errors
    /// If the hub does not answer, or not with this repository.
    pub fn commit(&self, repo: &str, revision: &str) -> Result<String, HubError> {
        let url = format!("{}/api/models/{repo}/revision/{revision}", self.endpoint);
        let (Revision { sha }, _) = self.ask(repo, &url)?;
        if !is_hex(&sha) {
            return Err(strange(&url, &format!("names the commit `{sha}`, which is none")));
        }
        Ok(sha)
    }

    /// All files of a repository.
    ///
    /// # Errors
    /// If the hub does not answer, or not with this repository, or names a file that would not lie in it.
    pub fn files(&self, repo: &str, revision: &str) -> Result<Vec<RemoteFile>, HubError> {
        let url = format!("{}/api/models/{repo}/tree/{revision}?recursive=true", self.endpoint);
        let (mut files, mut next) = (Vec::new(), Some(url.clone()));
        for _ in 0..MAX_PAGES {
            let Some(page) = next.take() else { break };
            let entries: Vec<TreeEntry>;
            (entries, next) = self.ask(repo, &page)?;
            files.extend(entries.into_iter().filter(|e| e.kind == "file").map(RemoteFile::from));
        }
        if next.is_some() {
            return Err(strange(&url, &format!("lists more than {MAX_PAGES} pages of files")));
        }
        for RemoteFile { path, sha256, .. } in &files {
            if !is_inside(path) {
                let problem = format!("lists the file `{path}`, which lies outside of the repository");
                return Err(strange(&url, &problem));
            }
            if let Some(sha256) = sha256.as_ref().filter(|s| !is_hex(s)) {
                return Err(strange(&url, &format!("gives {path} the SHA-256 `{sha256}`, which is none")));
            }
        }
        Ok(files)
    }

    /// Fetches one file to `path`, going on where an earlier attempt ended, and checks it.
    ///
    /// # Errors
    /// If the transfer breaks for good (what has arrived is kept), or if the file is not the one
    /// that `file` describes (then it is deleted).
    pub fn fetch(
        &self,
        repo: &str,
        revision: &str,
        file: &RemoteFile,
        path: &Path,
        progress: &mut Progress,
    ) -> Result<(), HubError> {
        let url = format!("{}/{repo}/resolve/{revision}/{}", self.endpoint, file.path);
        let mut out = Sha256Writer::append(path)?;
        if out.length() > file.size {
            out = Sha256Writer::create(path)?;
        }
        progress.resume_at(out.length());
        let mut attempts = 0;
        while out.length() < file.size {
            let before = out.length();
            let broken = match self.transfer(&url, file.size, &mut out, path, progress) {
                Ok(()) => break,
                Err(Break::Passing(reason)) => reason,
                Err(Break::Lasting(e)) => return Err(e),
            };
            attempts = if out.length() > before { 1 } else { attempts + 1 };
            if attempts > RETRIES {
                return Err(HubError::Source(broken));
            }
            progress.say(&format!("{broken}; trying again"));
            std::thread::sleep(Duration::from_millis(500 << attempts));
        }
        out.finish(file.size, file.sha256.as_deref())
    }

    /// One request from the end of `out` to the end of the file, or to the first break.
    fn transfer(
        &self,
        url: &str,
        size: u64,
        out: &mut Sha256Writer,
        path: &Path,
        progress: &mut Progress,
    ) -> Result<(), Break> {
        let mut response = self.get(url, out.length()).map_err(Break::Passing)?;
        match response.status().as_u16() {
            206 => {}
            // The server knows no ranges and sends everything.
            200 => *out = Sha256Writer::create(path)?,
            status if is_lasting(status) => return Err(HubError::Source(refused(url, status)).into()),
            status => return Err(Break::Passing(refused(url, status))),
        }
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        while out.length() < size {
            let n = body.read(&mut buffer).map_err(|e| Break::Passing(format!("transfer broke: {e}")))?;
            if n == 0 {
                return Err(Break::Passing(format!("transfer ended early, at {} bytes", out.length())));
            }
            let wanted = n.min(usize::try_from(size - out.length()).unwrap_or(n));
            out.write(&buffer[..wanted])?;
            progress.set(out.length());
        }
        Ok(())
    }

    /// What the hub's API says at `url` about a repository, and where it goes on.
    fn ask<T: DeserializeOwned>(&self, repo: &str, url: &str) -> Result<(T, Option<String>), HubError> {
        let mut response = self.get(url, 0).map_err(HubError::Source)?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(HubError::Source(refused(repo, status)));
        }
        let next = next_page(url, &response);
        let text = response.body_mut().with_config().limit(16 << 20).read_to_string();
        let text = text.map_err(|e| HubError::Source(self.silent(&e)))?;
        let said = serde_json::from_str(&text)
            .map_err(|e| strange(url, &format!("sent something other than a hub's answer ({e})")))?;
        Ok((said, next))
    }

    /// Asks for what lies at `url`, or where the hub points to, from byte `from` on.
    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, String> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(token) = self.token.as_ref().filter(|_| host(&url) == host(&self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| self.silent(&e))?;
            match redirect(&url, &response) {
                Some(target) => url = target,
                None => return Ok(response),
            }
        }
        Err(format!("{} points elsewhere without end; use another hub or mirror", self.endpoint))
    }

    fn silent(&self, e: &ureq::Error) -> String {
        match e {
            ureq::Error::Http(_) | ureq::Error::BadUri(_) => {
                format!("{} cannot be asked ({e}); check HF_ENDPOINT and HF_TOKEN", self.endpoint)
            }
            _ => format!("{} does not answer ({e})", self.endpoint),
        }
    }
}

impl From<HubError> for Break {
    fn from(e: HubError) -> Self {
        Self::Lasting(e)
    }
}

impl From<TreeEntry> for RemoteFile {
    fn from(e: TreeEntry) -> Self {
        let size = e.lfs.as_ref().map_or(e.size, |l| l.size);
        Self { path: e.path, size, sha256: e.lfs.map(|l| l.oid.to_ascii_lowercase()) }
    }
}

/// Whether a path leads to something below the folder that it is joined to.
fn is_inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Whether a hash or commit is one, and so a plain file name too.
fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Scheme, host and port of a URL.
fn host(url: &str) -> &str {
    url.match_indices('/').nth(2).map_or(url, |(end, _)| &url[..end])
}

/// Where the answer from `url` points to, if it is no answer itself.
fn redirect(url: &str, response: &Response<Body>) -> Option<String> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let target = response.headers().get("Location")?.to_str().ok()?;
    Some(resolve(url, target))
}

/// Where a list goes on: the header `Link` (RFC 8288) with `rel="next"`.
fn next_page(url: &str, response: &Response<Body>) -> Option<String> {
    let links = response.headers().get("Link")?.to_str().ok()?;
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    let (_, target) = next.split_once('<')?;
    Some(resolve(url, target.split_once('>')?.0))
}

/// A target that the answer from `url` names, as an address of its own.
fn resolve(url: &str, target: &str) -> String {
    if target.starts_with("http://") || target.starts_with("https://") {
        target.to_owned()
    } else if target.starts_with('/') {
        format!("{}{target}", host(url))
    } else {
        format!("{}/{target}", url.rsplit_once('/').map_or(url, |(folder, _)| folder))
    }
}

/// Whether a status would be the same a moment later.
fn is_lasting(status: u16) -> bool {
    (400..500).contains(&status) && !matches!(status, 408 | 429)
}

fn strange(url: &str, problem: &str) -> HubError {
    HubError::Source(format!("{url} {problem}; use another hub or mirror"))
}

fn refused(what: &str, status: u16) -> String {
    match status {
        401 | 403 => format!(
            "{what}: access refused ({status}); it does not exist, or accept its licence on the hub and set HF_TOKEN"
        ),
        404 => format!("{what}: not found (404); check the spelling"),
        429 => format!("{what}: too many requests (429); wait a little or set HF_TOKEN"),
        _ => format!("{what}: the hub answered with status {status}"),
    }
}
