//! Sums over ranks, and the gathering of their logits, through NCCL, which is loaded at run time. Not yet run.
//!
//! NCCL adds in an order of its own, which is the same on all ranks, so that they go on from the same bits; but it is another one than the
//! ranks', and may change with a message's size and with the machine.
//!
//! Communicators do not block: what waits for other ranks asks again and again, and gives up when a rank has failed or too much time has
//! passed. Then the communicator is aborted, which ends its kernels and so frees the stream; the ranks make a new one for the next step.
//! Nothing here is captured into a graph: launches that were gathered are run before.
//!
//! A rank queues only so many sums ahead of its GPU, and waits here for the first of them before it queues another: the driver's queue, too, makes
//! who fills it wait, but tells nobody there that a rank has failed.

use crate::device::{Buffer, Device};
use crate::gpu::{Event, Gpu};
use crate::tensor::{Tensor, check};
use crate::waiting::wait_until;
use cudarc::nccl::result::{NcclError, NcclStatus};
use cudarc::nccl::sys::{self, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use rudder_comm::{Member, Rank};
use rudder_ops::{OpError, Result};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::Duration;

/// The library's names: the first is the one that is installed to run programs, the other is there where they are built. cudarc knows the second
/// alone.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// How long ranks may take to connect: over nodes NCCL looks for ways between all of them.
const CONNECTING: Duration = Duration::from_secs(60);
/// How long a step may take once it is queued, and one of its calls to be queued.
const PATIENCE: Duration = Duration::from_secs(10);
/// Calls that are queued before the first of them is done. The driver holds about a thousand launches of a stream, and where a prompt's weights are
/// widened, two hundred may lie between two sums. So few still keep a GPU at work: what lies between takes it longer than the host.
const AHEAD: usize = 4;
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
    /// Events behind the last calls, in turn, and whose turn it is: the one behind the oldest of them.
    behind: Vec<Event>,
    turn: usize,
    /// Whether no step has ended yet since the ranks connected. In the first one buffers grow, and memory that is allocated or given back while
    /// another rank's kernel waits for this one might wait for that kernel: so until then all have come before any calls, and each waits for
    /// what it called for.
    settles: bool,
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
        let behind = (0..AHEAD).map(|_| gpu.event()).collect::<Result<_>>()?;
        let comm = join(gpu, rank, words, member);
        let comm = comm.inspect_err(|reason| tracing::warn!("ranks do not connect: {reason}")).ok();
        member.share(u64::from(comm.is_some()), &mut all)?;
        let Some(comm) = comm.filter(|_| !all.contains(&0)) else { return Ok(None) };
        let device = device.clone();
        Ok(Some(Self { device, comm, rank, behind, turn: 0, settles: true, widths: None, arrived: None }))
    }

    /// What a call goes to, after what was queued before, once not too many calls are.
    fn stream(&self, member: &Member) -> Result<sys::cudaStream_t> {
        let gpu = self.device.expect_gpu()?;
        self.wait_until(member, || gpu.has_come(&self.behind[self.turn]))?;
        self.device.flush()?;
        gpu.bind()?;
        if self.settles {
            member.share(0, &mut vec![0; self.rank.world])?;
        }
        Ok(gpu.stream().cast())
    }

    /// Makes `x` the sum over the ranks.
    pub fn all_reduce(&mut self, member: &Member, x: &Tensor) -> Result<()> {
        x.expect_f32("what ranks add up")?;
        if x.elements() == 0 {
            return Ok(());
        }
        let (stream, at) = (self.stream(member)?, x.buffer.address());
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
        self.queued(member, queued)
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
        // First all parts come as they are, then each row's go to their places.
        let bytes = whole.map_or(0, |_| 4 * rows * (total - widths[0]));
        if self.arrived.as_ref().map_or(0, Buffer::bytes) < bytes {
            self.arrived = None; // first give back, then take
            self.arrived = Some(self.device.buffer(bytes)?);
        }
        let arrived = self.arrived.as_ref().map_or(0, Buffer::address);
        let stream = self.stream(member)?;
        let (f32s, Communicator { nccl, at: comm }) = (ncclDataType_t::ncclFloat32, &self.comm);
        let Some(whole) = whole else {
            // SAFETY: the part holds so many f32, and lives until the stream has been waited for.
            let sent = unsafe {
                (nccl.ncclSend)(pointer(part.buffer.address()), part.elements(), f32s, 0, *comm, stream)
            };
            return self.queued(member, sent);
        };
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
        self.queued(member, ended)?;
        let gpu = self.device.expect_gpu()?;
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
    fn queued(&mut self, member: &Member, call: ncclResult_t) -> Result<()> {
        if call.result().map_err(failed)? == NcclStatus::InProgress {
            let what = "NCCL: a call could not be queued";
            self.comm.wait(member, PATIENCE, what, || self.comm.is_settled())?;
        }
        self.device.expect_gpu()?.record(&self.behind[self.turn])?;
        self.turn = (self.turn + 1) % AHEAD;
        if self.settles { self.wait(member) } else { Ok(()) }
    }

    /// Ends a step: waits until all that was queued is done.
    ///
    /// # Errors
    /// If a rank has failed, or takes too long; the communicator is then to be dropped before anybody else waits for the stream.
    pub fn end(&mut self, member: &Member) -> Result<()> {
        self.wait(member)?;
        self.settles = false;
        Ok(())
    }

    fn wait(&self, member: &Member) -> Result<()> {
        self.wait_until(member, || self.device.is_idle())
    }

    /// Waits for something that was queued.
    fn wait_until(&self, member: &Member, done: impl Fn() -> Result<bool>) -> Result<()> {
        self.comm.wait(member, PATIENCE, "NCCL: a rank's GPU waited for another rank", done)
    }
}

impl Communicator {
    /// Waits until something is `done`, no longer than that, as long as nothing has gone wrong.
    fn wait(
        &self,
        member: &Member,
        patience: Duration,
        what: &str,
        done: impl Fn() -> Result<bool>,
    ) -> Result<()> {
        wait_until(member, |waited| {
            if done()? {
                return Ok(true);
            }
            self.is_settled()?;
            match waited > patience {
                true => Err(OpError::Backend(format!("{what} for more than {} s", patience.as_secs()))),
                false => Ok(false),
            }
        })
    }

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
    comm.wait(member, CONNECTING, "NCCL: ranks tried to connect", || comm.is_settled())?;
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
