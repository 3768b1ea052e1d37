//! The CPU in a GPU's place: kernels compiled as C++, memory with a page behind it that faults.

use crate::device::{Arg, Grid, KERNELS};
use crate::queue::{Product, ProductShape};
use half::bf16;
use rudder_ops::{OpError, Result};
use std::ffi::{CString, c_char, c_int, c_void};

unsafe extern "C" {
    fn rudder_emulate(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared: u32,
        arguments: *mut *mut c_void,
        count: u32,
    ) -> c_int;
    fn rudder_multicast(begin: u64, bytes: u64, memory: *const u64, count: u32);
}

/// Whether there is a kernel of this name.
#[cfg(test)]
pub fn exists(name: &str) -> bool {
    let name = CString::new(name).expect("a kernel's name");
    // SAFETY: without a grid nothing is run.
    unsafe {
        rudder_emulate(name.as_ptr(), std::ptr::null(), std::ptr::null(), 0, std::ptr::null_mut(), 0) == 0
    }
}

pub fn launch(kernel: &str, grid: Grid, shared: u32, args: &[Arg]) -> Result<()> {
    let declared = KERNELS.iter().find(|(name, _)| *name == kernel).map(|(_, shared)| *shared);
    // What a GPU gives without being asked for more.
    if declared.is_none_or(|most| shared > most.max(48 * 1024)) {
        return Err(OpError::Backend(format!("kernel {kernel} is not declared to use {shared} bytes")));
    }
    let name = CString::new(kernel).expect("a kernel's name");
    let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::bits).collect();
    let block = [grid.threads, 1, 1];
    // SAFETY: the arguments are the kernel's own (the parity tests' concern); reads outside of buffers fault.
    let status = unsafe {
        let (blocks, count) = (grid.blocks.as_ptr(), pointers.len() as u32);
        rudder_emulate(name.as_ptr(), blocks, block.as_ptr(), shared, pointers.as_mut_ptr(), count)
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
        self::read(address, crate::step::bytes_mut(&mut bits));
        bits.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
    };
    let (x, w) = (read(product.x, rows * k), read(product.w, n * k));
    let mut out = vec![0f32; n];
    for (row, x) in x.chunks_exact(k).enumerate() {
        for (out, w) in out.iter_mut().zip(w.chunks_exact(k)) {
            *out = x.iter().zip(w).map(|(x, w)| x * w).sum();
        }
        write(product.out + 4 * (row * stride) as u64, crate::step::bytes(&out));
    }
}

/// Bytes of the mapping behind `bytes`: whole pages and one that nothing may touch.
fn mapping(bytes: usize) -> Option<(usize, usize)> {
    // SAFETY: asks for a constant.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
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

/// Addresses that reach the memory of several devices at once, for kernels' multicast accesses alone: any other faults.
pub struct Multicast {
    address: u64,
    bytes: usize,
}

impl Multicast {
    /// Such addresses of `bytes` bytes at each of `memory`, which outlives their use.
    pub fn new(memory: &[u64], bytes: usize) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, which nothing may touch.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(OpError::Backend(format!("no addresses for {bytes} bytes")));
        }
        let address = at as u64;
        // SAFETY: takes the list over before it returns.
        unsafe { rudder_multicast(address, bytes as u64, memory.as_ptr(), memory.len() as u32) };
        Ok(Self { address, bytes })
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Multicast {
    fn drop(&mut self) {
        // SAFETY: no kernel uses them any more; the mapping is the one that `new` made.
        unsafe {
            rudder_multicast(self.address, self.bytes as u64, std::ptr::null(), 0);
            libc::munmap(self.address as *mut c_void, self.bytes);
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
