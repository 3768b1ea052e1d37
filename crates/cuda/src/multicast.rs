//! A window of each rank's memory that one address reaches on all ranks, through the switch that connects them (NVLink SHARP): what is read
//! there is the sum of what all have there, added up on the way, and what is written there all get.
//!
//! The ranks are threads of one process, so that they hold the multicast object in common. GPUs of other processes, such as another tray's of
//! a rack, would import it by its fabric handle; that is not built. Not yet run on several GPUs.

#[cfg(feature = "emulate")]
use crate::device::Buffer;
use crate::device::Device;
use crate::gpu::{Gpu, failed};
use cudarc::driver::sys;
use rudder_comm::Member;
use rudder_ops::{OpError, Result};
use std::sync::Arc;

/// NCCL's variable that keeps it from using the switch so; 0 keeps us too.
const VARIABLE: &str = "NCCL_NVLS_ENABLE";

/// A rank's window.
pub(crate) struct Window {
    kind: Kind,
    device: Device,
}

enum Kind {
    Gpu(OnGpu),
    #[cfg(feature = "emulate")]
    Emulated(crate::emulated::Multicast, Buffer),
}

impl Window {
    /// Makes the ranks' windows of so many bytes. All call it, and all get one or none; why, the first rank that could not says in the log.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member, bytes: usize) -> Result<Option<Self>> {
        let kind = match device.on_gpu() {
            Some(gpu) => OnGpu::connect(gpu, member, bytes)?.map(Kind::Gpu),
            #[cfg(feature = "emulate")]
            None => emulated(device, member, bytes)?,
            #[cfg(not(feature = "emulate"))]
            None => None,
        };
        Ok(kind.map(|kind| Self { kind, device: device.clone() }))
    }

    /// Where this rank's own memory begins, for its own kernels' usual accesses.
    pub fn own(&self) -> u64 {
        match &self.kind {
            Kind::Gpu(window) => window.own.addresses.at,
            #[cfg(feature = "emulate")]
            Kind::Emulated(_, own) => own.address(),
        }
    }

    /// Where all ranks' memory begins, for `multimem` instructions alone.
    pub fn all(&self) -> u64 {
        match &self.kind {
            Kind::Gpu(window) => window.all.addresses.at,
            #[cfg(feature = "emulate")]
            Kind::Emulated(all, _) => all.address(),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // No kernel of this rank uses it any more; nor do the others', which a kernel meets before it ends.
        if let Err(e) = self.device.synchronize() {
            tracing::warn!("{e}");
        }
    }
}

/// What all ranks got in a step that every one of them got through, which is not 0.
fn agree(member: &Member, step: std::result::Result<u64, &OpError>) -> Result<Option<Vec<u64>>> {
    let rank = member.rank();
    let mut told = vec![0; rank.world];
    member.share(step.unwrap_or(0), &mut told)?;
    let first = told.iter().position(|&got| got == 0);
    if let Err(reason) = step
        && first == Some(rank.index)
    {
        tracing::info!("ranks do not add up in the switch: {reason}");
    }
    Ok(first.is_none().then_some(told))
}

/// Keeps what a step made, if all ranks got through it.
fn agree_on<T>(member: &Member, step: Result<T>) -> Result<Option<T>> {
    let agreed = agree(member, step.as_ref().map(|_| 1))?;
    Ok(agreed.and(step.ok()))
}

/// Windows on the CPU. Sums begin with whoever asks, so that each rank is told another: a switch keeps to no order either.
#[cfg(feature = "emulate")]
fn emulated(device: &Device, member: &Member, bytes: usize) -> Result<Option<Kind>> {
    let own = device.buffer(bytes);
    let Some(mut all) = agree(member, own.as_ref().map(Buffer::address))? else { return Ok(None) };
    all.rotate_left(member.rank().index);
    let all = agree_on(member, crate::emulated::Multicast::new(&all, bytes))?;
    Ok(all.zip(own.ok()).map(|(all, own)| Kind::Emulated(all, own)))
}

/// A GPU's window. The order counts: it is given back from the first on.
struct OnGpu {
    all: Mapping,
    _part: Part,
    own: Mapping,
}

/// Memory, or a multicast object; given back when it is mapped and bound nowhere any more.
struct Handle(sys::CUmemGenericAllocationHandle);

/// Memory's place in a multicast object.
struct Part {
    object: Arc<Handle>,
    device: sys::CUdevice,
    size: usize,
}

/// Addresses that memory is reached by.
struct Mapping {
    addresses: Addresses,
    /// What they reach.
    _handle: Arc<Handle>,
}

/// Addresses, whether or not anything lies there.
struct Addresses {
    at: sys::CUdeviceptr,
    size: usize,
}

fn call(what: &str, status: sys::CUresult) -> Result<()> {
    status.result().map_err(failed(what))
}

/// Nothing can be done about what is not given back but to say so.
fn given_back(what: &str, status: sys::CUresult) {
    if let Err(e) = call(what, status) {
        tracing::warn!("{e}");
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: released once, by its owner.
        given_back("memory of the ranks cannot be released", unsafe { sys::cuMemRelease(self.0) });
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: bound once, at this place, by this device; the object lives.
        let status = unsafe { sys::cuMulticastUnbind(self.object.0, self.device, 0, self.size) };
        given_back("memory of the ranks cannot be unbound", status);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped once; no kernel uses it any more, since the window waits for them before it is dropped.
        let status = unsafe { sys::cuMemUnmap(self.addresses.at, self.addresses.size) };
        given_back("memory of the ranks cannot be unmapped", status);
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        // SAFETY: reserved once; nothing is mapped there any more.
        let status = unsafe { sys::cuMemAddressFree(self.at, self.size) };
        given_back("addresses of the ranks cannot be freed", status);
    }
}

impl Addresses {
    fn reserve(size: usize) -> Result<Self> {
        let mut at = 0;
        // Of the granularity too, which is a power of two that divides the size.
        let alignment = 1 << size.trailing_zeros();
        // SAFETY: `at` outlives the call.
        let status = unsafe { sys::cuMemAddressReserve(&mut at, size, alignment, 0, 0) };
        call("no addresses for the ranks' memory", status)?;
        Ok(Self { at, size })
    }
}

impl Mapping {
    /// Lets a device reach what a handle stands for, all of it.
    fn new(handle: &Arc<Handle>, size: usize, device: sys::CUdevice) -> Result<Self> {
        let addresses = Addresses::reserve(size)?;
        // SAFETY: the addresses are free, and as many as the memory.
        let status = unsafe { sys::cuMemMap(addresses.at, size, 0, handle.0, 0) };
        call("memory of the ranks cannot be mapped", status)?;
        let mapping = Self { addresses, _handle: Arc::clone(handle) };
        let access = sys::CUmemAccessDesc {
            location: location(device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: just mapped.
        let status = unsafe { sys::cuMemSetAccess(mapping.addresses.at, size, &access, 1) };
        call("a GPU is refused memory of the ranks", status)?;
        Ok(mapping)
    }
}

fn location(device: sys::CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// A device's memory, shared with no other process.
fn memory(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: NO_HANDLES,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

const NO_HANDLES: sys::CUmemAllocationHandleType = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;

/// A multicast object of so many devices.
fn object(world: usize, size: usize) -> sys::CUmulticastObjectProp {
    sys::CUmulticastObjectProp {
        numDevices: world as u32,
        size,
        handleTypes: u64::from(NO_HANDLES.0),
        flags: 0,
    }
}

impl OnGpu {
    fn connect(gpu: &Gpu, member: &Member, bytes: usize) -> Result<Option<Self>> {
        let rank = member.rank();
        let size = size(gpu, rank.world, bytes);
        let Some(sizes) = agree(member, size.as_ref().map(|&size| size as u64))? else { return Ok(None) };
        let size = sizes.into_iter().max().unwrap_or(0) as usize;
        let made = match rank.index {
            0 => create(rank.world, size).map(Some),
            _ => Ok(None),
        };
        let Some(made) = agree_on(member, made)? else { return Ok(None) };
        let Some(object) = hand_out(member, made)? else { return Ok(None) };
        // SAFETY: the object lives.
        let added = call("a GPU cannot be multicast to", unsafe {
            sys::cuMulticastAddDevice(object.0, gpu.device())
        });
        // Memory is bound only once all devices are there.
        if agree_on(member, added)?.is_none() {
            return Ok(None);
        }
        agree_on(member, Self::new(&object, gpu.device(), size))
    }

    fn new(object: &Arc<Handle>, device: sys::CUdevice, size: usize) -> Result<Self> {
        let mut handle = 0;
        // SAFETY: the properties outlive the call.
        let status = unsafe { sys::cuMemCreate(&mut handle, size, &memory(device), 0) };
        call("no GPU memory for what the ranks share", status)?;
        let handle = Arc::new(Handle(handle));
        let own = Mapping::new(&handle, size, device)?;
        // SAFETY: both live, and are of this size.
        let status = unsafe { sys::cuMulticastBindMem(object.0, 0, handle.0, 0, size, 0) };
        call("memory of the ranks cannot be bound", status)?;
        let part = Part { object: Arc::clone(object), device, size };
        Ok(Self { all: Mapping::new(object, size, device)?, _part: part, own })
    }
}

/// The size of a window of so many bytes and more.
fn size(gpu: &Gpu, world: usize, bytes: usize) -> Result<usize> {
    if std::env::var_os(VARIABLE).is_some_and(|value| value == "0") {
        return Err(OpError::Backend(format!("{VARIABLE} is 0")));
    }
    if !gpu.has_multicast()? {
        return Err(OpError::Backend("a GPU has no multicast".into()));
    }
    let (mut of_memory, mut of_object) = (0, 0);
    let memory_option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // What is recommended may be hundreds of MiB.
    let object_option = sys::CUmulticastGranularity_flags::CU_MULTICAST_GRANULARITY_MINIMUM;
    // SAFETY: all of these outlive the calls.
    let (memory, object) = unsafe {
        (
            sys::cuMemGetAllocationGranularity(&mut of_memory, &memory(gpu.device()), memory_option),
            sys::cuMulticastGetGranularity(&mut of_object, &object(world, bytes), object_option),
        )
    };
    call("the granularity of memory is unknown", memory)?;
    call("the granularity of multicast is unknown", object)?;
    // Both are powers of two.
    Ok(bytes.next_multiple_of(of_memory.max(of_object).max(1)))
}

/// Makes the multicast object.
fn create(world: usize, size: usize) -> Result<Arc<Handle>> {
    let mut handle = 0;
    // SAFETY: the properties outlive the call.
    let status = unsafe { sys::cuMulticastCreate(&mut handle, &object(world, size)) };
    call("no multicast object", status)?;
    Ok(Arc::new(Handle(handle)))
}

/// Gives all ranks what rank 0 has made; the last that has it releases it.
fn hand_out(member: &Member, made: Option<Arc<Handle>>) -> Result<Option<Arc<Handle>>> {
    let rank = member.rank();
    // One for each rank: if one fails before it takes its own, the object stays, and nobody finds it gone.
    let raw = made.map_or(1, |object| {
        (1..rank.world).for_each(|_| std::mem::forget(Arc::clone(&object)));
        Arc::into_raw(object).expose_provenance() as u64
    });
    let Some(told) = agree(member, Ok(raw))? else { return Ok(None) };
    // SAFETY: rank 0's pointer, of this process; each rank takes over one of the counts that rank 0 made.
    Ok(Some(unsafe { Arc::from_raw(std::ptr::with_exposed_provenance(told[0] as usize)) }))
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;
    use rudder_comm::Group;

    /// Whether each of two ranks gets a window that asks for one of so many bytes.
    fn windows(bytes: [usize; 2]) -> Vec<bool> {
        let group = Group::new(2);
        std::thread::scope(|scope| {
            let ranks = group.members().into_iter().map(|member| {
                let bytes = bytes[member.rank().index];
                scope.spawn(move || {
                    Window::connect(&Device::emulated(), &member, bytes).map(|window| window.is_some())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic").expect("no rank fails")).collect()
        })
    }

    #[test]
    fn where_one_rank_gets_no_window_none_does() {
        assert_eq!(windows([64, 64]), [true; 2]);
        assert_eq!(windows([64, 1 << 50]), [false; 2]);
        assert_eq!(windows([1 << 50, 64]), [false; 2]);
    }

    #[test]
    fn what_one_rank_made_all_have_and_the_last_releases() {
        let group = Group::new(3);
        let made = Arc::new(Handle(0));
        std::thread::scope(|scope| {
            for member in group.members() {
                let made = (member.rank().index == 0).then(|| Arc::clone(&made));
                scope.spawn(move || {
                    let object = hand_out(&member, made).expect("no rank fails").expect("rank 0 made it");
                    member.share(0, &mut [0; 3]).expect("no rank fails");
                    assert!(Arc::strong_count(&object) > 1);
                });
            }
        });
        assert_eq!(Arc::strong_count(&made), 1);
        std::mem::forget(made); // no driver knows of it
    }
}
