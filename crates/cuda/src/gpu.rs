//! A GPU through CUDA's driver: context, stream, memory, kernels by name.

use crate::device::KERNELS;
use crate::kernels::IMAGES;
use crate::probe::probe;
use crate::queue::{Launch, MOST_ARGS};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use rudder_ops::{OpError, Result};
use std::collections::HashMap;
use std::ffi::{CString, c_void};

/// One GPU with the kernels loaded.
pub(crate) struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// For copies that need not wait for what is queued.
    beside: sys::CUstream,
    functions: HashMap<&'static str, sys::CUfunction>,
    compute_capability: (i32, i32),
    multiprocessors: usize,
    uuid: u64,
}

/// A point in the queue of work.
pub(crate) struct Event {
    at: sys::CUevent,
    context: sys::CUcontext,
}

// SAFETY: an event's calls bind the context; one thread at a time uses it.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: freed once; the driver keeps one that has not come until it has. Nothing could be done about an error.
        let _ = unsafe { result::ctx::set_current(self.context).and(result::event::destroy(self.at)) };
    }
}

/// A captured sequence of launches, ready to run.
pub(crate) struct Graph(sys::CUgraphExec);

// SAFETY: a graph's calls bind the context; one thread at a time uses it.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: freed once; the driver keeps one that still runs until it has ended. Nothing could be done about an error.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

// SAFETY: the driver may be called from any thread once that thread has the context, which every call here sees to.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver synchronises its own state.
unsafe impl Sync for Gpu {}

/// Says what failed, and how the driver words it.
pub(crate) fn failed(what: &str) -> impl Fn(DriverError) -> OpError + '_ {
    move |e| OpError::Backend(format!("{what}: {e}"))
}

impl Drop for Gpu {
    fn drop(&mut self) {
        for stream in [self.stream, self.beside] {
            // SAFETY: freed once; the driver keeps one whose work has not ended until it has. Nothing could be done about an error.
            let _ = unsafe { result::ctx::set_current(self.context).and(result::stream::destroy(stream)) };
        }
    }
}

impl Gpu {
    pub fn new(index: usize) -> Result<Self> {
        let gpus = probe().map_err(|reason| OpError::Backend(reason.to_string()))?;
        let gpu = gpus.get(index).filter(|gpu| gpu.supported()).ok_or_else(|| {
            OpError::Backend(format!("cuda:{index} does not exist, or is older than the kernels support"))
        })?;
        let what = gpu.to_string();
        let device = result::device::get(index as i32).map_err(failed(&what))?;
        let uuid = result::device::get_uuid(device).map_err(failed(&what))?;
        let uuid = uuid.bytes.iter().enumerate();
        let uuid = uuid.fold(0, |folded, (i, &byte)| folded ^ u64::from(byte as u8) << (8 * (i % 8)));
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: the device exists.
        let multiprocessors =
            unsafe { result::device::get_attribute(device, count) }.map_err(failed(&what))?;
        // SAFETY: the device exists; its primary context lives until the process ends.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed(&what))?;
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed(&what))?;
        let stream =
            || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed(&what));
        let (stream, beside) = (stream()?, stream()?);
        let functions = load(device).map_err(failed("the embedded kernels cannot be loaded"))?;
        if let Some((name, _)) = KERNELS.iter().find(|(name, _)| !functions.contains_key(name)) {
            return Err(OpError::Backend(format!("kernel {name} is in none of the embedded images")));
        }
        let (compute_capability, multiprocessors) = (gpu.compute_capability, multiprocessors as usize);
        Ok(Self { device, context, stream, beside, functions, compute_capability, multiprocessors, uuid })
    }

    /// Major and minor number of its architecture.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.compute_capability
    }

    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Its UUID's halves, one over the other: what tells it from others, of other machines too.
    pub fn uuid(&self) -> u64 {
        self.uuid
    }

    /// The driver's number of it.
    pub fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// Whether memory of several GPUs, this one among them, can be reached by one address (NVLink SHARP).
    pub fn has_multicast(&self) -> Result<bool> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED;
        // SAFETY: the device exists.
        let has = unsafe { result::device::get_attribute(self.device, attribute) };
        has.map(|has| has != 0).map_err(failed("the driver knows of no multicast"))
    }

    /// Whether memory can be allocated that GPUs of other processes, on other machines too, reach by a fabric handle.
    pub fn has_fabric_handles(&self) -> Result<bool> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED;
        // SAFETY: the device exists.
        let has = unsafe { result::device::get_attribute(self.device, attribute) };
        has.map(|has| has != 0).map_err(failed("the driver knows of no fabric handles"))
    }

    /// The stream that all work is queued on.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// The context's address: what tells this GPU from others.
    pub fn id(&self) -> u64 {
        self.context.expose_provenance() as u64
    }

    /// Lets kernels here use the memory of the GPU of this id; false if the machine does not connect the two.
    pub fn reach(&self, id: u64) -> Result<bool> {
        self.bind()?;
        let context: sys::CUcontext = std::ptr::with_exposed_provenance_mut(id as usize);
        // SAFETY: another rank's context, which lives as long as the process.
        Ok(match unsafe { sys::cuCtxEnablePeerAccess(context, 0) } {
            sys::cudaError_enum::CUDA_SUCCESS
            | sys::cudaError_enum::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => true,
            refusal => {
                tracing::info!("GPUs do not reach each other's memory: {refusal:?}");
                false
            }
        })
    }

    /// Makes the context this thread's.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("the GPU's context cannot be set"))
    }

    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let failed = |e| OpError::Backend(format!("no GPU memory for {bytes} bytes: {e}"));
        // SAFETY: all work is on this stream, so that the zeros are there before anybody reads them. Nothing waits for the whole
        // context, which would fail while another thread captures.
        unsafe {
            let address = result::malloc_sync(bytes).map_err(failed)?;
            result::memset_d8_async(address, 0, bytes, self.stream).map_err(failed)?;
            Ok(address)
        }
    }

    pub fn free(&self, address: u64) {
        let freed = self.synchronize().and_then(|()| {
            // SAFETY: freed once, by the buffer that owns it; work that uses it was waited for.
            unsafe { result::free_sync(address) }.map_err(failed("GPU memory cannot be freed"))
        });
        if let Err(e) = freed {
            tracing::warn!("{e}");
        }
    }

    /// Page-locked memory of the host, zeros at first.
    pub fn allocate_host(&self, bytes: usize) -> Result<*mut u8> {
        self.bind()?;
        let failed = |e| OpError::Backend(format!("no page-locked memory for {bytes} bytes: {e}"));
        // SAFETY: the memory is set to zeros before anybody sees it.
        unsafe {
            let at = result::malloc_host(bytes, 0).map_err(failed)?.cast::<u8>();
            at.write_bytes(0, bytes);
            Ok(at)
        }
    }

    /// Gives back a stage's memory, once the copies from it are done.
    pub fn free_host(&self, at: *mut u8) {
        let freed = self.synchronize().and_then(|()| {
            // SAFETY: freed once, by the stage that owns it; copies from it were waited for.
            unsafe { result::free_host(at.cast()) }.map_err(failed("page-locked memory cannot be freed"))
        });
        if let Err(e) = freed {
            tracing::warn!("{e}");
        }
    }

    /// An event; until it is recorded it counts as come.
    pub fn event(&self) -> Result<Event> {
        self.bind()?;
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        let at = result::event::create(flags).map_err(failed("no event"))?;
        Ok(Event { at, context: self.context })
    }

    /// Queues an event's coming.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.bind()?;
        // SAFETY: both live as long as their owners.
        unsafe { result::event::record(event.at, self.stream) }.map_err(failed("an event cannot be recorded"))
    }

    /// Waits until an event has come.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.bind()?;
        // SAFETY: the event lives as long as its owner.
        unsafe { result::event::synchronize(event.at) }.map_err(failed("work on the GPU failed"))
    }

    /// Whether an event has come.
    pub fn has_come(&self, event: &Event) -> Result<bool> {
        self.bind()?;
        // SAFETY: the event lives as long as its owner.
        is_done(unsafe { sys::cuEventQuery(event.at) })
    }

    /// Queues a copy of `data`, which is not to be changed or given back before it is done: where the GPU reads the host's pages itself, as on
    /// GB200, pageable memory need not be taken over before this returns.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller checked the range, and waits before `data` changes or is given back.
        unsafe { result::memcpy_htod_async(address, data, self.stream) }.map_err(failed("copy to the GPU"))
    }

    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.fetch(address, data)?;
        self.synchronize()
    }

    /// Queues a copy to `data`, which is not to be looked at before it is done.
    pub fn fetch(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller checked the range, and waits before `data` is looked at or given back.
        unsafe { result::memcpy_dtoh_async(data, address, self.stream) }.map_err(failed("copy from the GPU"))
    }

    /// Has copies beside the work, from here on, wait until an event has come.
    pub fn wait_beside(&self, event: &Event) -> Result<()> {
        self.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live as long as their owners.
        unsafe { result::stream::wait_event(self.beside, event.at, flags) }
            .map_err(failed("an event cannot be waited for"))
    }

    /// Queues a copy beside the work, to `data`, which is not to be looked at before it is done.
    pub fn fetch_beside(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: as `fetch`.
        unsafe { result::memcpy_dtoh_async(data, address, self.beside) }.map_err(failed("copy from the GPU"))
    }

    /// Queues an event's coming behind the copies beside the work.
    pub fn record_beside(&self, event: &Event) -> Result<()> {
        self.bind()?;
        // SAFETY: both live as long as their owners.
        unsafe { result::event::record(event.at, self.beside) }.map_err(failed("an event cannot be recorded"))
    }

    /// Queues a kernel; if it is `dependent`, it may begin before the kernel before it has ended, for which it waits by itself.
    pub fn launch(&self, launch: &Launch, dependent: bool) -> Result<()> {
        self.bind()?;
        let &Launch { kernel, grid, shared, .. } = launch;
        let Some(&function) = self.functions.get(kernel) else {
            return Err(OpError::Backend(format!("there is no kernel {kernel}")));
        };
        let mut pointers: [*mut c_void; MOST_ARGS] = [std::ptr::null_mut(); MOST_ARGS];
        for (pointer, arg) in pointers.iter_mut().zip(launch.args()) {
            *pointer = arg.bits();
        }
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut early = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let [x, y, z] = grid.blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.stream,
            attrs: &raw mut early,
            numAttrs: dependent.into(),
        };
        // SAFETY: the arguments are the kernel's own, which the parity tests and the emulator check; the driver takes them over before it returns.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(|e| OpError::Backend(format!("kernel {kernel} with {grid:?}: {e}")))
    }

    /// What `queue` queues, as a graph that is brought to the GPU, if there is room for it; nothing of it is run.
    pub fn capture(&self, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.bind()?;
        let refused = failed("a step cannot be captured");
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as this; the capture is ended below whatever `queue` says.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(&refused)?;
        let queued = queue();
        // SAFETY: as above.
        let captured = unsafe { result::stream::end_capture(self.stream) }.map_err(&refused);
        let graph = queued.and(captured)?;
        // SAFETY: just captured; its executable form does not need it any more.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph).map_err(&refused)?;
            executable.map_err(&refused)?
        };
        let graph = Graph(executable);
        // SAFETY: both live as long as their owners.
        unsafe { result::graph::upload(graph.0, self.stream) }.map_err(&refused)?;
        Ok(graph)
    }

    /// Queues a graph.
    pub fn launch_graph(&self, graph: &Graph) -> Result<()> {
        self.bind()?;
        // SAFETY: both live as long as their owners.
        unsafe { result::graph::launch(graph.0, self.stream) }.map_err(failed("a step's graph cannot be run"))
    }

    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("work on the GPU failed"))
    }

    /// Whether nothing is queued that is not done; does not wait for it.
    pub fn is_idle(&self) -> Result<bool> {
        self.bind()?;
        // SAFETY: the stream lives as long as this.
        is_done(unsafe { sys::cuStreamQuery(self.stream) })
    }

    /// Queues a copy of `rows` rows of `bytes` each, which lie without gaps, to the rows that begin at an address and lie so many bytes apart.
    pub fn copy_rows(&self, from: u64, to: (u64, usize), bytes: usize, rows: usize) -> Result<()> {
        self.bind()?;
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: bytes,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: to.0,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.1,
            WidthInBytes: bytes,
            Height: rows,
        };
        // SAFETY: the caller checked that the rows lie in buffers that live until the stream has been waited for.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream) }
            .result()
            .map_err(failed("rows cannot be copied"))
    }

    /// Bytes of GPU memory that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().map_err(failed("the GPU's memory is unknown"))
    }
}

/// What a query says of work that was queued.
fn is_done(status: sys::CUresult) -> Result<bool> {
    match status {
        sys::cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
        done => done.result().map(|()| true).map_err(failed("work on the GPU failed")),
    }
}

/// Loads every image, finds every kernel, and lets those that need it use more shared memory than the usual 48 KiB. A kernel that needs more than
/// the device has, as those of other chips may, is there all the same: only its launch fails.
fn load(device: sys::CUdevice) -> std::result::Result<HashMap<&'static str, sys::CUfunction>, DriverError> {
    let opt_in = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    // SAFETY: the device exists.
    let there = unsafe { result::device::get_attribute(device, opt_in) }?;
    let mut functions = HashMap::new();
    for (image, kernels) in IMAGES {
        // SAFETY: a fat binary that nvcc made; modules are never unloaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        for &(name, shared) in KERNELS.iter().filter(|(name, _)| kernels.contains(name)) {
            let c_name = CString::new(name).expect("a kernel's name");
            // SAFETY: the module was just loaded.
            let function = unsafe { result::module::get_function(module, c_name) }?;
            if (1..=there).contains(&(shared as i32)) {
                let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function was just found.
                unsafe { result::function::set_function_attribute(function, most, shared as i32) }?;
            }
            functions.insert(name, function);
        }
    }
    Ok(functions)
}
