//! Memory that is mapped where several devices reach it, those of other processes too, and multicast objects, by which one address reaches
//! memory of several devices: the driver's virtual memory management and multicast (CUDA driver API manual, the chapters of these names).
//!
//! Other processes, on other machines of an NVLink domain too, find memory by its fabric handle, 64 bytes that any transport carries. The
//! driver and the IMEX daemons see to the rest. Whether GPUs are of one such domain is not asked of anybody: between others the import fails.
//! Not yet run on several GPUs.

use crate::device::Device;
#[cfg(feature = "emulate")]
use crate::emulated;
use crate::gpu::{Gpu, failed};
use cudarc::driver::sys;
use rudder_ops::{OpError, Result};
use std::sync::Arc;

/// What names memory to other processes: the bytes of a `CUmemFabricHandle`.
pub(crate) type FabricHandle = [u64; 8];

/// Who can map memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// This process alone.
    Process,
    /// Whoever is told its fabric handle and has the same IMEX channel.
    Fabric,
}

/// A device's memory, or a multicast object; given back when it is mapped and bound nowhere any more.
pub(crate) struct Handle(Kind);

enum Kind {
    Gpu(sys::CUmemGenericAllocationHandle),
    #[cfg(feature = "emulate")]
    Emulated(emulated::Shared),
}

/// Memory's place in a multicast object, which it leaves when dropped.
pub(crate) struct Binding {
    object: Arc<Handle>,
    device: sys::CUdevice,
    size: usize,
}

/// Addresses that memory is reached by.
pub(crate) struct Mapping {
    addresses: Addresses,
    /// What they reach.
    _handle: Arc<Handle>,
}

enum Addresses {
    Gpu(Mapped),
    #[cfg(feature = "emulate")]
    Emulated(emulated::Mapped),
}

/// Addresses with memory behind them.
struct Mapped(Reserved);

/// Addresses, whether or not anything lies there.
struct Reserved {
    at: sys::CUdeviceptr,
    size: usize,
}

fn call(what: &str, status: sys::CUresult) -> Result<()> {
    status.result().map_err(failed(what))
}

/// The same of a call that may fail because memory cannot be shared over the fabric: says what to look at.
fn call_for(reach: Reach, what: &str, status: sys::CUresult) -> Result<()> {
    match call(what, status) {
        Err(OpError::Backend(why)) if reach == Reach::Fabric && status != OUT_OF_MEMORY => {
            Err(OpError::Backend(format!(
                "{why}; GPUs of several nodes share memory where the IMEX daemon runs on all of them (systemctl status nvidia-imex) and this \
                 user has the same channel on all (/dev/nvidia-caps-imex-channels/channel0)"
            )))
        }
        done => done,
    }
}

const OUT_OF_MEMORY: sys::CUresult = sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY;

/// Nothing can be done about what is not given back but to say so.
fn given_back(what: &str, status: sys::CUresult) {
    if let Err(e) = call(what, status) {
        tracing::warn!("{e}");
    }
}

impl Drop for Kind {
    fn drop(&mut self) {
        match self {
            Self::Gpu(handle) => {
                // SAFETY: released once, by its owner.
                given_back("memory of the ranks cannot be released", unsafe { sys::cuMemRelease(*handle) });
            }
            #[cfg(feature = "emulate")]
            Self::Emulated(_) => {}
        }
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        match self.object.0 {
            Kind::Gpu(object) => {
                // SAFETY: bound once, at this place, by this device; the object lives.
                let status = unsafe { sys::cuMulticastUnbind(object, self.device, 0, self.size) };
                given_back("memory of the ranks cannot be unbound", status);
            }
            #[cfg(feature = "emulate")]
            Kind::Emulated(_) => {}
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped once; no kernel uses it any more, which its owner waits for.
        let status = unsafe { sys::cuMemUnmap(self.0.at, self.0.size) };
        given_back("memory of the ranks cannot be unmapped", status);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: reserved once; nothing is mapped there any more.
        let status = unsafe { sys::cuMemAddressFree(self.at, self.size) };
        given_back("addresses of the ranks cannot be freed", status);
    }
}

impl Reserved {
    fn new(size: usize) -> Result<Self> {
        let mut at = 0;
        // Of the granularity too, which is a power of two that divides the size.
        let alignment = 1 << size.trailing_zeros();
        // SAFETY: `at` outlives the call.
        let status = unsafe { sys::cuMemAddressReserve(&mut at, size, alignment, 0, 0) };
        call("no addresses for the ranks' memory", status)?;
        Ok(Self { at, size })
    }
}

/// What memory's size is a multiple of: a power of two.
pub(crate) fn granularity(device: &Device, reach: Reach) -> Result<usize> {
    #[cfg(feature = "emulate")]
    if device.imex_channel().is_some() {
        return Ok(emulated::page());
    }
    let gpu = device.expect_gpu()?;
    if reach == Reach::Fabric && !gpu.has_fabric_handles()? {
        return Err(OpError::Backend("a GPU, or its driver, has no memory that other nodes reach".into()));
    }
    let (mut bytes, option) =
        (0, sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    // SAFETY: all of these outlive the call.
    let status = unsafe { sys::cuMemGetAllocationGranularity(&mut bytes, &memory(gpu, reach), option) };
    call("the granularity of memory is unknown", status)?;
    Ok(bytes.max(1))
}

/// The same of memory that is bound to a multicast object of so many devices.
///
/// # Errors
/// If the device has no multicast.
pub(crate) fn multicast_granularity(
    device: &Device,
    world: usize,
    bytes: usize,
    reach: Reach,
) -> Result<usize> {
    let of_memory = granularity(device, reach)?;
    let Some(gpu) = device.on_gpu() else { return Ok(of_memory) };
    if !gpu.has_multicast()? {
        return Err(OpError::Backend("a GPU has no multicast".into()));
    }
    // What is recommended may be hundreds of MiB.
    let (mut of_object, option) = (0, sys::CUmulticastGranularity_flags::CU_MULTICAST_GRANULARITY_MINIMUM);
    // SAFETY: all of these outlive the call.
    let status =
        unsafe { sys::cuMulticastGetGranularity(&mut of_object, &object(world, bytes, reach), option) };
    call("the granularity of multicast is unknown", status)?;
    Ok(of_memory.max(of_object))
}

impl Handle {
    /// Memory of a device: `size` bytes of any content, a multiple of the granularity.
    pub fn memory(device: &Device, size: usize, reach: Reach) -> Result<Self> {
        #[cfg(feature = "emulate")]
        if let Some(channel) = device.imex_channel() {
            let channel = (reach == Reach::Fabric).then_some(channel);
            return Ok(Self(Kind::Emulated(emulated::Shared::memory(size, channel)?)));
        }
        let (gpu, mut handle) = (device.expect_gpu()?, 0);
        gpu.bind()?;
        // SAFETY: the properties outlive the call.
        let status = unsafe { sys::cuMemCreate(&mut handle, size, &memory(gpu, reach), 0) };
        call_for(reach, "no GPU memory for what the ranks share", status)?;
        Ok(Self(Kind::Gpu(handle)))
    }

    /// A multicast object of so many devices, to each of which `size` bytes can be bound.
    pub fn multicast(device: &Device, world: usize, size: usize, reach: Reach) -> Result<Self> {
        #[cfg(feature = "emulate")]
        if let Some(channel) = device.imex_channel() {
            let channel = (reach == Reach::Fabric).then_some(channel);
            return Ok(Self(Kind::Emulated(emulated::Shared::multicast(world, size, channel)?)));
        }
        device.expect_gpu()?.bind()?;
        let mut handle = 0;
        // SAFETY: the properties outlive the call.
        let status = unsafe { sys::cuMulticastCreate(&mut handle, &object(world, size, reach)) };
        call_for(reach, "no multicast object", status)?;
        Ok(Self(Kind::Gpu(handle)))
    }

    /// Its name for other processes, where it was made for them: good as long as this lives.
    pub fn export(&self) -> Result<FabricHandle> {
        match &self.0 {
            Kind::Gpu(handle) => {
                let mut name: FabricHandle = [0; 8];
                // SAFETY: a fabric handle's 64 bytes, which outlive the call.
                let status =
                    unsafe { sys::cuMemExportToShareableHandle((&raw mut name).cast(), *handle, FABRIC, 0) };
                call_for(Reach::Fabric, "memory of the ranks cannot be exported", status)?;
                Ok(name)
            }
            #[cfg(feature = "emulate")]
            Kind::Emulated(shared) => shared.export(),
        }
    }

    /// What a process, this or another, has exported by this name.
    pub fn import(device: &Device, mut name: FabricHandle) -> Result<Self> {
        #[cfg(feature = "emulate")]
        if let Some(channel) = device.imex_channel() {
            return Ok(Self(Kind::Emulated(emulated::Shared::import(name, channel)?)));
        }
        device.expect_gpu()?.bind()?;
        let mut handle = 0;
        // SAFETY: a fabric handle's 64 bytes, which outlive the call as `handle` does.
        let status =
            unsafe { sys::cuMemImportFromShareableHandle(&mut handle, (&raw mut name).cast(), FABRIC) };
        call_for(Reach::Fabric, "memory of another node cannot be imported", status)?;
        Ok(Self(Kind::Gpu(handle)))
    }

    /// Makes a rank's device one of those that this multicast object is for.
    pub fn add(&self, device: &Device, rank: usize) -> Result<()> {
        match &self.0 {
            Kind::Gpu(object) => {
                // SAFETY: the object lives.
                let status = unsafe { sys::cuMulticastAddDevice(*object, device.ordinal()) };
                call(&format!("rank {rank}'s GPU cannot be multicast to"), status)
            }
            #[cfg(feature = "emulate")]
            Kind::Emulated(object) => object.add(rank),
        }
    }
}

impl Binding {
    /// Binds memory of a rank's device, all `size` bytes, to a multicast object that all devices have been added to. If others than this
    /// process can map the one, they must be able to map the other.
    pub fn new(
        object: &Arc<Handle>,
        memory: &Handle,
        size: usize,
        device: &Device,
        rank: usize,
    ) -> Result<Self> {
        match (&object.0, &memory.0) {
            (Kind::Gpu(object), Kind::Gpu(memory)) => {
                // SAFETY: both live, and are of this size.
                let status = unsafe { sys::cuMulticastBindMem(*object, 0, *memory, 0, size, 0) };
                call(&format!("rank {rank}'s memory cannot be bound"), status)?;
            }
            #[cfg(feature = "emulate")]
            (Kind::Emulated(object), Kind::Emulated(memory)) => object.bind(rank, memory)?,
            #[cfg(feature = "emulate")]
            _ => return Err(OpError::Backend("a GPU's memory and another's object".into())),
        }
        Ok(Self { object: Arc::clone(object), device: device.ordinal(), size })
    }
}

impl Mapping {
    /// Lets devices of this process, by their ordinals, reach what a handle stands for, all `size` bytes. A multicast object that a rank's
    /// device is to reach is mapped once all memory is bound to it.
    pub fn new(handle: &Arc<Handle>, size: usize, devices: &[sys::CUdevice], rank: usize) -> Result<Self> {
        let addresses = match &handle.0 {
            Kind::Gpu(memory) => Addresses::Gpu(Mapped::new(*memory, size, devices, rank)?),
            #[cfg(feature = "emulate")]
            Kind::Emulated(memory) => Addresses::Emulated(memory.map(rank)?),
        };
        Ok(Self { addresses, _handle: Arc::clone(handle) })
    }

    /// Where it begins, for kernels of its devices.
    pub fn address(&self) -> u64 {
        match &self.addresses {
            Addresses::Gpu(mapped) => mapped.0.at,
            #[cfg(feature = "emulate")]
            Addresses::Emulated(mapped) => mapped.address(),
        }
    }
}

impl Mapped {
    fn new(
        memory: sys::CUmemGenericAllocationHandle,
        size: usize,
        devices: &[sys::CUdevice],
        rank: usize,
    ) -> Result<Self> {
        let reserved = Reserved::new(size)?;
        // SAFETY: the addresses are free, and as many as the memory.
        let status = unsafe { sys::cuMemMap(reserved.at, size, 0, memory, 0) };
        call(&format!("memory cannot be mapped for rank {rank}"), status)?;
        let mapped = Self(reserved);
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = |&device| sys::CUmemAccessDesc { location: location(device), flags };
        let access: Vec<_> = devices.iter().map(access).collect();
        // SAFETY: just mapped; as many descriptions as are told.
        let status = unsafe { sys::cuMemSetAccess(mapped.0.at, size, access.as_ptr(), access.len()) };
        call(&format!("a GPU is refused memory that is mapped for rank {rank}"), status)?;
        Ok(mapped)
    }
}

fn location(device: sys::CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

const FABRIC: sys::CUmemAllocationHandleType = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC;

fn handles(reach: Reach) -> sys::CUmemAllocationHandleType {
    match reach {
        Reach::Process => sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        Reach::Fabric => FABRIC,
    }
}

fn memory(gpu: &Gpu, reach: Reach) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: handles(reach),
        location: location(gpu.device()),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn object(world: usize, size: usize, reach: Reach) -> sys::CUmulticastObjectProp {
    sys::CUmulticastObjectProp {
        numDevices: world as u32,
        size,
        handleTypes: u64::from(handles(reach).0),
        flags: 0,
    }
}
