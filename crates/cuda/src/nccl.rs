//! Sums over ranks, and the gathering of their logits, through NCCL, which is loaded at run time. Not yet run.
//!
//! NCCL adds in an order of its own, which is the same on all ranks, so that they go on from the same bits; but it is another one than the
//! ranks', and may change with a message's size and with the machine.
//!
//! Communicators do not block: what waits for other ranks asks again and again, and gives up when a rank has failed or too much time has
//! passed. Then the communicator is aborted, which ends its kernels and so frees the stream; the ranks make a new one for the next step.
//! Nothing here is captured into a graph: launches that were gathered are run before.

use crate::device::{Buffer, Device};
use crate::gpu::Gpu;
use crate::tensor::{Tensor, check};
use cudarc::nccl::result::{NcclError, NcclStatus};
use cudarc::nccl::sys::{self, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use rudder_comm::{Member, Rank};
use rudder_ops::{OpError, Result};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The library's names: the first is the one that is installed to run programs, the other is there where they are built. cudarc knows the second
/// alone.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// How long ranks may take to connect: over nodes NCCL looks for ways between all of them.
const CONNECTING: Duration = Duration::from_secs(60);
/// How long a step may take once it is queued, and one of its calls to be queued.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often who waits asks whether a rank has failed.
const CHECK: Duration = Duration::from_millis(1);
/// Bytes of a unique id.
const ID: usize = 128;
/// `NCCL_CONFIG_INITIALIZER` of nccl.h: what marks a configuration, and what marks a setting that is not set.
const MAGIC: u32 = 0xcafe_beef;
const UNSET: c_int = c_int::MIN;
/// The version of nccl.h that the configuration is laid out by.
const VERSION: u32 = 22_203;

/// Declares the functions of the library that are called here.
macro_rules! library {
    ($($name:ident($($argument:ty),*) -> $result:ty;)*) => {
        #[allow(non_snake_case)] // its names
        struct Library {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            /// # Safety
            /// The functions are those of nccl.h.
            unsafe fn of(library: &'static libloading::Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: as above.
                unsafe { Ok(Self { $($name: *library.get(stringify!($name))?,)* }) }
            }
        }
    };
}

library! {
    ncclGetVersion(*mut c_int) -> ncclResult_t;
    ncclGetUniqueId(*mut sys::ncclUniqueId) -> ncclResult_t;
    ncclGetErrorString(ncclResult_t) -> *const c_char;
    ncclCommInitRankConfig(*mut ncclComm_t, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> ncclResult_t;
    ncclCommGetAsyncError(ncclComm_t, *mut ncclResult_t) -> ncclResult_t;
    ncclCommAbort(ncclComm_t) -> ncclResult_t;
    ncclAllReduce(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, sys::cudaStream_t) -> ncclResult_t;
    ncclSend(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, sys::cudaStream_t) -> ncclResult_t;
    ncclRecv(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, sys::cudaStream_t) -> ncclResult_t;
    ncclGroupStart() -> ncclResult_t;
    ncclGroupEnd() -> ncclResult_t;
}

/// The library, if it is there. Once loaded, it stays.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let load = || {
        // SAFETY: loads libnccl, whose initialisers are NVIDIA's own.
        let library = NAMES.into_iter().find_map(|name| unsafe { libloading::Library::new(name) }.ok())?;
        // SAFETY: it is that library.
        unsafe { Library::of(Box::leak(Box::new(library))) }.ok()
    };
    LIBRARY.get_or_init(load).as_ref()
}

/// A rank's communicator.
pub(crate) struct Nccl {
    device: Device,
    comm: Communicator,
    rank: Rank,
    /// Widths of the parts that are gathered, once they were.
    widths: Option<Vec<usize>>,
    /// On rank 0, where the others' parts arrive, one rank after the other.
    arrived: Option<Buffer>,
}

/// Aborted when dropped.
struct Communicator {
    nccl: &'static Library,
    at: ncclComm_t,
}

// SAFETY: a communicator may be used from any thread, by one at a time, which owning it sees to.
unsafe impl Send for Communicator {}

impl Drop for Communicator {
    fn drop(&mut self) {
        // SAFETY: freed once; work that is under way is ended. Nothing could be done about an error.
        let _ = unsafe { (self.nccl.ncclCommAbort)(self.at) };
    }
}

fn failed(NcclError(error): NcclError) -> OpError {
    // SAFETY: a text that lives as long as the library.
    let text = library().map(|nccl| unsafe { CStr::from_ptr((nccl.ncclGetErrorString)(error)) });
    OpError::Backend(format!("NCCL: {} ({error:?})", text.unwrap_or_default().to_string_lossy()))
}

fn late(what: &str) -> OpError {
    OpError::Backend(format!("NCCL: {what}, for more than {} s", PATIENCE.as_secs()))
}

impl Nccl {
    /// Connects the ranks. All of them call it, and all get it or none: where the library is not there for one of them, or they do not reach each
    /// other, or share a GPU, which NCCL refuses.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member) -> Result<Option<Self>> {
        let rank = member.rank();
        let mut all = vec![0; rank.world];
        member.share(device.uuid(), &mut all)?;
        if (1..all.len()).any(|i| all[..i].contains(&all[i])) {
            return Ok(None);
        }
        let id = device.on_gpu().map_or(Ok(None), |gpu| first_words(gpu, rank));
        let id = id.inspect_err(|reason| tracing::warn!("{reason}")).ok().flatten();
        member.share(u64::from(id.is_some()), &mut all)?;
        let Some(mut words) = id.filter(|_| !all.contains(&0)) else { return Ok(None) };
        for word in &mut words {
            member.share(*word, &mut all)?;
            *word = all[0];
        }
        let Some(gpu) = device.on_gpu() else { return Ok(None) };
        let comm = join(gpu, rank, words, member);
        let comm = comm.inspect_err(|reason| tracing::warn!("ranks do not connect: {reason}")).ok();
        member.share(u64::from(comm.is_some()), &mut all)?;
        let Some(comm) = comm.filter(|_| !all.contains(&0)) else { return Ok(None) };
        Ok(Some(Self { device: device.clone(), comm, rank, widths: None, arrived: None }))
    }

    /// What all calls go to, after what was queued before.
    fn gpu(&self) -> Result<&Gpu> {
        self.device.flush()?;
        let gpu = self.device.on_gpu().ok_or_else(|| OpError::Backend("NCCL without a GPU".into()))?;
        gpu.bind()?;
        Ok(gpu)
    }

    /// Makes `x` the sum over the ranks.
    pub fn all_reduce(&self, x: &Tensor) -> Result<()> {
        x.expect_f32("what ranks add up")?;
        if x.elements() == 0 {
            return Ok(());
        }
        let (stream, at) = (self.gpu()?.stream().cast(), x.buffer.address());
        // SAFETY: the buffer holds so many f32, and lives until the stream has been waited for.
        let queued = unsafe {
            (self.comm.nccl.ncclAllReduce)(
                pointer(at),
                pointer(at),
                x.elements(),
                ncclDataType_t::ncclFloat32,
                ncclRedOp_t::ncclSum,
                self.comm.at,
                stream,
            )
        };
        self.queued(queued)
    }

    /// Puts the ranks' parts side by side into `whole` on rank 0, which gives it.
    pub fn gather(&mut self, member: &Member, part: &Tensor, whole: Option<&Tensor>) -> Result<()> {
        part.expect_f32("what ranks gather")?;
        let widths = self.widths(member, part.width)?;
        let (rows, total) = (part.rows, widths.iter().sum::<usize>());
        check(whole.is_none_or(|whole| whole.width == total), || {
            format!("the ranks' parts are {total} columns")
        })?;
        if rows == 0 {
            return Ok(());
        }
        let stream = self.gpu()?.stream().cast();
        let (f32s, Communicator { nccl, at: comm }) = (ncclDataType_t::ncclFloat32, &self.comm);
        let Some(whole) = whole else {
            // SAFETY: the part holds so many f32, and lives until the stream has been waited for.
            let sent = unsafe {
                (nccl.ncclSend)(pointer(part.buffer.address()), part.elements(), f32s, 0, *comm, stream)
            };
            return self.queued(sent);
        };
        // First all parts as they are, then each row's to its place.
        let bytes = 4 * rows * (total - widths[0]);
        if self.arrived.as_ref().is_none_or(|arrived| arrived.bytes() < bytes) {
            self.arrived = None; // first give back, then take
            self.arrived = Some(self.device.buffer(bytes)?);
        }
        let arrived = self.arrived.as_ref().map_or(0, Buffer::address);
        // SAFETY: ended below.
        unsafe { (nccl.ncclGroupStart)() }.result().map_err(failed)?;
        let received = starts(&widths[1..], rows).zip(1..).try_for_each(|((at, width), rank)| {
            // SAFETY: the buffer has room for all parts, one after the other.
            unsafe { (nccl.ncclRecv)(pointer(arrived + at), rows * width, f32s, rank, *comm, stream) }
                .result()
                .map(drop)
        });
        // Ended in any case: what is left open would swallow the calls of the next step.
        // SAFETY: begun above.
        let ended = unsafe { (nccl.ncclGroupEnd)() };
        received.map_err(failed)?;
        self.queued(ended)?;
        let gpu = self.gpu()?;
        let to = |column: usize| (whole.buffer.address() + 4 * column as u64, 4 * total);
        gpu.copy_rows(part.buffer.address(), to(0), 4 * widths[0], rows)?;
        let mut column = widths[0];
        for (at, width) in starts(&widths[1..], rows) {
            gpu.copy_rows(arrived + at, to(column), 4 * width, rows)?;
            column += width;
        }
        Ok(())
    }

    /// Each rank's width of what is gathered. Ranks that gather for the first time tell each other.
    fn widths(&mut self, member: &Member, width: usize) -> Result<Vec<usize>> {
        let widths = match &self.widths {
            Some(widths) => widths.clone(),
            None => {
                let mut widths = vec![0; self.rank.world];
                member.share(width as u64, &mut widths)?;
                let widths = widths.into_iter().map(|width| width as usize).collect();
                self.widths.insert(widths).clone()
            }
        };
        let before = widths[self.rank.index];
        check(before == width, || format!("parts of {width} columns are gathered, and were of {before}"))?;
        Ok(widths)
    }

    /// Waits until a call has been queued.
    fn queued(&self, call: ncclResult_t) -> Result<()> {
        match call.result().map_err(failed)? {
            NcclStatus::InProgress => {
                let began = Instant::now();
                while !self.comm.is_settled()? {
                    if began.elapsed() > PATIENCE {
                        return Err(late("a call could not be queued"));
                    }
                    std::thread::yield_now();
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// If a rank has failed, or takes too long; the communicator is then to be dropped before anybody else waits for the stream.
    pub fn wait(&self, member: &Member) -> Result<()> {
        let gpu = self.gpu()?;
        let (began, mut checked) = (Instant::now(), Instant::now());
        while !gpu.is_idle()? {
            if checked.elapsed() > CHECK {
                checked = Instant::now();
                self.comm.is_settled()?;
                member.check()?;
                if began.elapsed() > PATIENCE {
                    return Err(late("a rank's GPU waited for another rank"));
                }
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Communicator {
    /// Whether nothing is under way that was called for; an error if something went wrong since.
    fn is_settled(&self) -> Result<bool> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives, and `state` outlives the call.
        unsafe { (self.nccl.ncclCommGetAsyncError)(self.at, &mut state) }.result().map_err(failed)?;
        Ok(state.result().map_err(failed)? == NcclStatus::Success)
    }
}

/// The words of the unique id, which rank 0 makes and the others are told.
fn first_words(gpu: &Gpu, rank: Rank) -> Result<Option<[u64; ID / 8]>> {
    let nccl = loaded()?;
    gpu.bind()?;
    if rank.index > 0 {
        return Ok(Some([0; ID / 8]));
    }
    let (mut version, mut id) = (0, sys::ncclUniqueId { internal: [0; ID] });
    // SAFETY: both outlive the calls.
    unsafe {
        (nccl.ncclGetVersion)(&mut version).result().map_err(failed)?;
        (nccl.ncclGetUniqueId)(&mut id).result().map_err(failed)?;
    }
    tracing::info!("NCCL {version}");
    let byte = |word: usize, i: usize| id.internal[8 * word + i] as u8;
    Ok(Some(std::array::from_fn(|word| u64::from_le_bytes(std::array::from_fn(|i| byte(word, i))))))
}

/// The library, or why there is none.
fn loaded() -> Result<&'static Library> {
    library().ok_or_else(|| {
        OpError::Backend(
            "libnccl cannot be loaded (LD_LIBRARY_PATH may name it): what ranks add up in no memory of each other's goes by the host, slowly"
                .into(),
        )
    })
}

/// Makes a rank's communicator.
fn join(gpu: &Gpu, rank: Rank, words: [u64; ID / 8], member: &Member) -> Result<Communicator> {
    let nccl = loaded()?;
    gpu.bind()?;
    let id =
        sys::ncclUniqueId { internal: std::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8] as c_char) };
    let mut config = sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: MAGIC,
        version: VERSION,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
    };
    let mut at = std::ptr::null_mut();
    let (world, index) = (rank.world as c_int, rank.index as c_int);
    // SAFETY: all of these outlive the call.
    let begun = unsafe { (nccl.ncclCommInitRankConfig)(&mut at, world, id, index, &mut config) };
    let comm = Communicator { nccl, at };
    begun.result().map_err(failed)?;
    let began = Instant::now();
    while !comm.is_settled()? {
        member.check()?;
        if began.elapsed() > CONNECTING {
            let seconds = CONNECTING.as_secs();
            return Err(OpError::Backend(format!("NCCL: not all ranks have connected in {seconds} s")));
        }
        std::thread::sleep(CHECK);
    }
    Ok(comm)
}

/// Where parts of these widths begin that lie one after the other, in bytes, and their widths.
fn starts(widths: &[usize], rows: usize) -> impl Iterator<Item = (u64, usize)> {
    widths.iter().scan(0, move |next, &width| {
        let at = *next;
        *next += (4 * rows * width) as u64;
        Some((at, width))
    })
}

fn pointer(address: u64) -> *mut c_void {
    address as *mut c_void
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_arrive_one_after_the_other() {
        assert_eq!(starts(&[5, 0, 7], 3).collect::<Vec<_>>(), [(0, 5), (60, 0), (60, 7)]);
        assert_eq!(starts(&[], 3).count(), 0);
    }

    /// nccl.h's `ncclConfig_t` up to the version that is told: older and newer libraries read as much of it as they know.
    #[test]
    fn the_configuration_is_laid_out_as_the_version_says() {
        assert_eq!(size_of::<sys::ncclConfig_t>(), 48);
        assert_eq!(std::mem::offset_of!(sys::ncclConfig_t, netName), 32);
        assert_eq!(VERSION, 2 * 10_000 + 22 * 100 + 3);
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn where_there_is_no_gpu_no_rank_gets_a_communicator() {
        let group = rudder_comm::Group::new(2);
        let found: Vec<_> = std::thread::scope(|scope| {
            let ranks = group.members().into_iter().map(|member| {
                scope.spawn(move || {
                    Nccl::connect(&Device::emulated(), &member).map(|nccl| nccl.is_some()).ok()
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        });
        assert_eq!(found, [Some(false); 2]);
    }
}
