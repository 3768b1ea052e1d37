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
use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys;
use rudder_comm::{Member, Rank};
use rudder_ops::{OpError, Result};
use std::ffi::{CStr, c_int};
use std::time::{Duration, Instant};

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
struct Communicator(sys::ncclComm_t);

// SAFETY: a communicator may be used from any thread, by one at a time, which owning it sees to.
unsafe impl Send for Communicator {}

impl Drop for Communicator {
    fn drop(&mut self) {
        // SAFETY: freed once; work that is under way is ended. Nothing could be done about an error.
        let _ = unsafe { result::comm_abort(self.0) };
    }
}

fn failed(NcclError(error): NcclError) -> OpError {
    // SAFETY: a text that lives as long as the library.
    let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(error)) };
    OpError::Backend(format!("NCCL: {} ({error:?})", text.to_string_lossy()))
}

fn late(what: &str) -> OpError {
    OpError::Backend(format!("NCCL: {what}, for more than {} s", PATIENCE.as_secs()))
}

impl Nccl {
    /// Connects the ranks. All of them call it, and all get it or none: where the library is not there for one of them, or they do not reach each
    /// other.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member) -> Result<Option<Self>> {
        let rank = member.rank();
        let mut all = vec![0; rank.world];
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
            result::all_reduce(
                pointer(at),
                pointer(at),
                x.elements(),
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                self.comm.0,
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
        let (f32s, comm) = (sys::ncclDataType_t::ncclFloat32, self.comm.0);
        let Some(whole) = whole else {
            // SAFETY: the part holds so many f32, and lives until the stream has been waited for.
            let sent = unsafe {
                result::send(pointer(part.buffer.address()), part.elements(), f32s, 0, comm, stream)
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
        result::group_start().map_err(failed)?;
        let received = starts(&widths[1..], rows).zip(1..).try_for_each(|((at, width), rank)| {
            // SAFETY: the buffer has room for all parts, one after the other.
            unsafe { result::recv(pointer(arrived + at), rows * width, f32s, rank, comm, stream) }.map(drop)
        });
        // Ended in any case: what is left open would swallow the calls of the next step.
        let ended = result::group_end();
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
    fn queued(&self, call: std::result::Result<NcclStatus, NcclError>) -> Result<()> {
        match call.map_err(failed)? {
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
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives, and `state` outlives the call.
        unsafe { sys::ncclCommGetAsyncError(self.0, &mut state) }.result().map_err(failed)?;
        Ok(state.result().map_err(failed)? == NcclStatus::Success)
    }
}

/// The words of the unique id, which rank 0 makes and the others are told.
fn first_words(gpu: &Gpu, rank: Rank) -> Result<Option<[u64; ID / 8]>> {
    // SAFETY: loads libnccl, whose initialisers are NVIDIA's own.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpError::Backend(
            "libnccl cannot be loaded (LD_LIBRARY_PATH may name it): what ranks add up in no memory of each other's goes by the host, slowly"
                .into(),
        ));
    }
    gpu.bind()?;
    if rank.index > 0 {
        return Ok(Some([0; ID / 8]));
    }
    let version = result::get_nccl_version().map_err(failed)?;
    tracing::info!("NCCL {version}");
    let id = result::get_uniqueid().map_err(failed)?;
    let byte = |word: usize, i: usize| id.internal[8 * word + i] as u8;
    Ok(Some(std::array::from_fn(|word| u64::from_le_bytes(std::array::from_fn(|i| byte(word, i))))))
}

/// Makes a rank's communicator.
fn join(gpu: &Gpu, rank: Rank, words: [u64; ID / 8], member: &Member) -> Result<Communicator> {
    gpu.bind()?;
    let id = sys::ncclUniqueId {
        internal: std::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8] as std::ffi::c_char),
    };
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
    let mut comm = std::ptr::null_mut();
    let (world, index) = (rank.world as c_int, rank.index as c_int);
    // SAFETY: all of these outlive the call.
    let begun = unsafe { result::comm_init_rank_config(&mut comm, world, id, index, &mut config) };
    let comm = Communicator(comm);
    begun.map_err(failed)?;
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

fn pointer(address: u64) -> *mut std::ffi::c_void {
    address as *mut std::ffi::c_void
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
