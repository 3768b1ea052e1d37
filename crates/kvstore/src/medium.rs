//! Where segment files lie: a folder, or in tests one that fails on purpose.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
#[cfg(target_os = "linux")]
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A flat collection of named files.
pub trait Medium: Send + Sync {
    /// Names of the files.
    ///
    /// # Errors
    /// If the collection cannot be read.
    fn names(&self) -> io::Result<Vec<String>>;
    /// Makes a file that is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    fn create(&self, name: &str) -> io::Result<Box<dyn SegmentFile>>;
    /// Opens a file.
    ///
    /// # Errors
    /// If it cannot be opened.
    fn open(&self, name: &str) -> io::Result<Box<dyn SegmentFile>>;
    /// Removes a file; who has it open may go on reading.
    ///
    /// # Errors
    /// If it cannot be removed.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// One file of a [`Medium`].
pub trait SegmentFile: Send + Sync {
    /// Its length in bytes.
    ///
    /// # Errors
    /// If it cannot be told.
    fn size(&self) -> io::Result<u64>;
    /// Fills `out` from `offset` on.
    ///
    /// # Errors
    /// If the file ends before that, or cannot be read.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// If it cannot be written whole.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Lets go of `len` bytes from `offset` on, which read as zeros then; the file keeps its length.
    ///
    /// # Errors
    /// If the file's system cannot do that.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Waits until what was written would survive a power failure.
    ///
    /// # Errors
    /// If the device refuses.
    fn sync(&self) -> io::Result<()>;
    /// Says that `len` bytes from `offset` on will be read soon. Only a hint; it may be ignored.
    fn read_ahead(&self, offset: u64, len: u64);
}

/// A folder, locked for this process, and closed to other users: conversations can be read from it.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    /// Holds the lock, which the system lets go when the process ends, however it ends.
    _lock: File,
}

impl Disk {
    /// Opens a folder, which is made if it is not there.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if another process has it, else whatever keeps it from being used.
    pub fn open(folder: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("lock"))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::from(io::ErrorKind::WouldBlock),
            TryLockError::Error(error) => error,
        })?;
        Ok(Self { folder: folder.to_owned(), _lock: lock })
    }
}

impl Medium for Disk {
    fn names(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.folder)?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn SegmentFile>> {
        let path = self.folder.join(name);
        Ok(Box::new(OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).open(self.folder.join(name))?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.folder.join(name))
    }
}

impl SegmentFile for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(out, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    #[cfg(target_os = "linux")]
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags as Flags;
        Ok(rustix::fs::fallocate(self, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, offset, len)?)
    }

    #[cfg(not(target_os = "linux"))]
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn read_ahead(&self, offset: u64, len: u64) {
        #[cfg(target_os = "linux")]
        if let Some(len) = NonZeroU64::new(len) {
            // A file that cannot be advised on is read when it is wanted.
            let _ = rustix::fs::fadvise(self, offset, Some(len), rustix::fs::Advice::WillNeed);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }
}
