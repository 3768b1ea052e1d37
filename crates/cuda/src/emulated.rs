//! The CPU in a GPU's place: kernels compiled as C++, memory with a page behind it that faults.

use crate::dependent_launch::waits;
use crate::device::{Arg, Grid, KERNELS};
use crate::mapping::FabricHandle;
use crate::queue::{Product, ProductShape};
use crate::step::{bytes, bytes_mut};
use half::bf16;
use rudder_ops::{OpError, Result};
use std::ffi::{CString, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

unsafe extern "C" {
    fn rudder_emulate(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared: u32,
        arguments: *mut *mut c_void,
        count: u32,
        waits: bool,
    ) -> c_int;
    fn rudder_multicast(begin: u64, bytes: u64, memory: *const u64, count: u32);
}

#[cfg(test)]
thread_local! {
    /// The kernels that this thread launched, with their arguments.
    pub static LAUNCHED: std::cell::RefCell<Vec<(String, Vec<Arg>)>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Whether there is a kernel of this name.
#[cfg(test)]
pub fn exists(name: &str) -> bool {
    let name = CString::new(name).expect("a kernel's name");
    // SAFETY: without a grid nothing is run.
    unsafe {
        rudder_emulate(name.as_ptr(), std::ptr::null(), std::ptr::null(), 0, std::ptr::null_mut(), 0, false)
            == 0
    }
}

pub fn launch(kernel: &str, grid: Grid, shared: u32, args: &[Arg]) -> Result<()> {
    let declared = KERNELS.iter().find(|(name, _)| *name == kernel).map(|(_, shared)| *shared);
    // What a GPU gives without being asked for more.
    if declared.is_none_or(|most| shared > most.max(48 * 1024)) {
        return Err(OpError::Backend(format!("kernel {kernel} is not declared to use {shared} bytes")));
    }
    #[cfg(test)]
    LAUNCHED.with_borrow_mut(|launched| launched.push((kernel.to_owned(), args.to_vec())));
    let name = CString::new(kernel).expect("a kernel's name");
    let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::bits).collect();
    let block = [grid.threads, 1, 1];
    // SAFETY: the arguments are the kernel's own (the parity tests' concern); reads outside of buffers fault.
    let status = unsafe {
        let (blocks, count) = (grid.blocks.as_ptr(), pointers.len() as u32);
        let (block, arguments) = (block.as_ptr(), pointers.as_mut_ptr());
        rudder_emulate(name.as_ptr(), blocks, block, shared, arguments, count, waits(kernel))
    };
    if status == 0 { Ok(()) } else { Err(OpError::Backend(format!("there is no kernel {kernel}"))) }
}

/// The fewest rows of a product that is done in cuBLASLt's place; fewer are left to the kernels, so that tests see both.
pub const PRODUCT_ROWS: usize = 512;

/// What cuBLASLt would do.
pub fn multiply(product: &Product) {
    let ProductShape { rows, n, k, stride } = product.shape;
    let read = |address: u64, count: usize| -> Vec<f32> {
        let mut bits = vec![0u16; count];
        self::read(address, bytes_mut(&mut bits));
        bits.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
    };
    let (x, w) = (read(product.x, rows * k), read(product.w, n * k));
    let mut out = vec![0f32; n];
    for (row, x) in x.chunks_exact(k).enumerate() {
        for (out, w) in out.iter_mut().zip(w.chunks_exact(k)) {
            *out = x.iter().zip(w).map(|(x, w)| x * w).sum();
        }
        write(product.out + 4 * (row * stride) as u64, bytes(&out));
    }
}

/// Bytes of the mapping behind `bytes`: whole pages and one that nothing may touch.
fn mapping(bytes: usize) -> Option<(usize, usize)> {
    let page = page();
    let inside = bytes.checked_next_multiple_of(16)?.checked_next_multiple_of(page)?;
    Some((inside, inside.checked_add(page)?))
}

/// The buffer ends, but for rounding to 16 bytes, where the page that faults begins.
pub fn allocate(bytes: usize) -> Result<u64> {
    let refused = || OpError::Backend(format!("no memory for {bytes} bytes"));
    let (inside, all) = mapping(bytes).filter(|(_, all)| *all < 1 << 40).ok_or_else(refused)?;
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, touched by nobody else.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), all, access, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(refused());
    }
    // SAFETY: the last page of the mapping just made.
    unsafe { libc::mprotect(at.byte_add(inside), all - inside, libc::PROT_NONE) };
    Ok(at as u64 + (inside - bytes.next_multiple_of(16)) as u64)
}

pub fn free(address: u64, bytes: usize) {
    let Some((inside, all)) = mapping(bytes) else { return };
    let start = address - (inside - bytes.next_multiple_of(16)) as u64;
    // SAFETY: the mapping that `allocate` made for so many bytes.
    unsafe { libc::munmap(start as *mut c_void, all) };
}

/// What a fabric handle names: memory, or a multicast object, that other processes can map too. It is a file without a name, found by the
/// process that has it open and by its number there.
pub struct Shared {
    file: File,
    bytes: usize,
    /// Who imports it must have the same; none can where there is none.
    channel: Option<u32>,
    /// Of a multicast object, how many devices it is for. Its file has a slot for each.
    devices: usize,
}

/// A slot of a multicast object: whether its device was added, then the name of the memory that is bound.
const SLOT: usize = 8 * (1 + size_of::<FabricHandle>() / 8);

/// Addresses with shared memory behind them; or those that reach the memory of several devices at once, for kernels' multicast accesses alone:
/// any other faults.
pub struct Mapped {
    at: u64,
    /// With the page that faults.
    bytes: usize,
    parts: Vec<Mapped>,
}

pub fn page() -> usize {
    // SAFETY: asks for a constant.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

fn os_failed(what: &str) -> impl Fn(io::Error) -> OpError + '_ {
    move |e| OpError::Backend(format!("{what}: {e}"))
}

impl Shared {
    /// Memory of so many bytes, whole pages.
    pub fn memory(bytes: usize, channel: Option<u32>) -> Result<Self> {
        Ok(Self { file: file(bytes)?, bytes, channel, devices: 0 })
    }

    /// A multicast object for memory of so many bytes a device.
    pub fn multicast(devices: usize, bytes: usize, channel: Option<u32>) -> Result<Self> {
        Ok(Self { file: file(devices * SLOT)?, bytes, channel, devices })
    }

    pub fn export(&self) -> Result<FabricHandle> {
        match self.channel {
            Some(_) => Ok(self.name()),
            None => Err(OpError::Backend("memory that is exported was made for one process".into())),
        }
    }

    pub fn import(name: FabricHandle, channel: u32) -> Result<Self> {
        if name[3] != u64::from(channel) {
            return Err(OpError::Backend(format!("memory of IMEX channel {} in channel {channel}", name[3])));
        }
        Self::open(name)
    }

    fn name(&self) -> FabricHandle {
        let (process, file) = (u64::from(std::process::id()), self.file.as_raw_fd() as u64);
        let channel = self.channel.map_or(u64::MAX, u64::from);
        [process, file, self.bytes as u64, channel, self.devices as u64, 0, 0, 0]
    }

    fn open([process, file, bytes, channel, devices, ..]: FabricHandle) -> Result<Self> {
        let path = format!("/proc/{process}/fd/{file}");
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(os_failed("memory of another node cannot be imported"))?;
        let (bytes, channel) = (bytes as usize, u32::try_from(channel).ok());
        Ok(Self { file, bytes, channel, devices: devices as usize })
    }

    fn slot(&self, rank: usize) -> Result<(bool, FabricHandle)> {
        let mut words = [0u64; SLOT / 8];
        let read = self.file.read_exact_at(bytes_mut(&mut words), (rank * SLOT) as u64);
        read.map_err(os_failed("a multicast object cannot be read"))?;
        let [added, name @ ..] = words;
        Ok((added != 0, name))
    }

    fn set(&self, rank: usize, word: usize, words: &[u64]) -> Result<()> {
        let set = self.file.write_all_at(bytes(words), (rank * SLOT + 8 * word) as u64);
        set.map_err(os_failed("a multicast object cannot be written"))
    }

    pub fn add(&self, rank: usize) -> Result<()> {
        self.set(rank, 0, &[1])
    }

    pub fn bind(&self, rank: usize, memory: &Self) -> Result<()> {
        for other in 0..self.devices {
            if !self.slot(other)?.0 {
                return Err(OpError::Backend(format!("memory is bound before rank {other} was added")));
            }
        }
        if memory.bytes != self.bytes || memory.channel != self.channel {
            return Err(OpError::Backend("memory is bound that the object is not for".into()));
        }
        self.set(rank, 1, &memory.name())
    }

    /// Maps memory; or, of a multicast object, what is bound to it. There sums begin with the rank that asks, so that each is told another: a
    /// switch keeps to no order either.
    pub fn map(&self, rank: usize) -> Result<Mapped> {
        let mapped = Mapped::reserve(self.bytes)?;
        if self.devices == 0 {
            return mapped.with(&self.file);
        }
        let part = |turn: usize| {
            let part = Self::open(self.slot((rank + turn) % self.devices)?.1)?;
            Mapped::reserve(self.bytes)?.with(&part.file)
        };
        mapped.with_parts((0..self.devices).map(part).collect::<Result<_>>()?)
    }
}

/// A file of so many zeros that has no name.
fn file(bytes: usize) -> Result<File> {
    // SAFETY: the name, which only shows in lists, is a string; the number is that of a new file, which nobody else closes.
    let file = unsafe {
        match libc::memfd_create(c"rudder".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            file => Ok(File::from_raw_fd(file)),
        }
    };
    let sized = file.and_then(|file| file.set_len(bytes as u64).map(|()| file));
    sized.map_err(os_failed("no memory to share"))
}

impl Mapped {
    /// Addresses that nothing may touch, and a page more.
    fn reserve(bytes: usize) -> Result<Self> {
        let (all, flags) = (bytes.saturating_add(page()), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, touched by nobody else.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(OpError::Backend(format!("no addresses for {bytes} bytes")));
        }
        Ok(Self { at: at as u64, bytes: all, parts: Vec::new() })
    }

    /// Puts a file's memory there.
    fn with(self, file: &File) -> Result<Self> {
        let (access, bytes) = (libc::PROT_READ | libc::PROT_WRITE, self.bytes - page());
        let (at, flags) = (self.at as *mut c_void, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: over addresses that were just reserved, in this mapping.
        let mapped = unsafe { libc::mmap(at, bytes, access, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(os_failed("shared memory cannot be mapped")(io::Error::last_os_error()));
        }
        Ok(self)
    }

    /// Lets multicast accesses there reach all of these.
    fn with_parts(mut self, parts: Vec<Mapped>) -> Result<Self> {
        let memory: Vec<u64> = parts.iter().map(Mapped::address).collect();
        let bytes = (self.bytes - page()) as u64;
        // SAFETY: takes the list over before it returns.
        unsafe { rudder_multicast(self.at, bytes, memory.as_ptr(), memory.len() as u32) };
        self.parts = parts;
        Ok(self)
    }

    pub fn address(&self) -> u64 {
        self.at
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: no kernel uses them any more; the mapping is the one that `reserve` made.
        unsafe {
            if !self.parts.is_empty() {
                rudder_multicast(self.at, 0, std::ptr::null(), 0);
            }
            libc::munmap(self.at as *mut c_void, self.bytes);
        }
    }
}

pub fn write(address: u64, data: &[u8]) {
    // SAFETY: the caller checked that the bytes lie in a buffer.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), address as *mut u8, data.len()) };
}

pub fn read(address: u64, data: &mut [u8]) {
    // SAFETY: the caller checked that the bytes lie in a buffer.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, data.as_mut_ptr(), data.len()) };
}
