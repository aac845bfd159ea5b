//! What the driver hands out, given back when it is dropped, and what it says when it refuses.
//!
//! Dropping ignores errors: where the context is gone, so is all that it held. Everything here needs the context to be
//! current, which [`super::Gpu`] sees to.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys as cu;

use crate::device::cuda::card::Address;
use crate::device::cuda::library;
use crate::error::{Error, Result};

/// Names the call that failed.
pub trait Told<T> {
    /// The driver's error as this crate's.
    ///
    /// # Errors
    ///
    /// The driver's.
    fn told(self, call: &str) -> Result<T>;
}

impl<T> Told<T> for Result<T, DriverError> {
    fn told(self, call: &str) -> Result<T> {
        self.map_err(|error| Error::Device(format!("{call}: {}{}", library::told(error), advice(error.0))))
    }
}

/// What to do about errors that say nothing of where they come from: they are reported by whichever call comes next.
fn advice(error: cu::CUresult) -> &'static str {
    use cu::CUresult::*;
    match error {
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_LAUNCH_FAILED
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_HARDWARE_STACK_ERROR => {
            "; a kernel or product before this call failed: run again with BITFIT_CUDA_GRAPHS=0 under \
             compute-sanitizer, which names it"
        }
        CUDA_ERROR_OUT_OF_MEMORY => "; other programs on the card may hold its memory",
        _ => "",
    }
}

/// The primary context of a device, which every part of a program shares.
pub struct Context {
    device: cu::CUdevice,
    context: cu::CUcontext,
}

// SAFETY: a context may be made current on any thread, and on several at once.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here changes.
unsafe impl Sync for Context {}

impl Context {
    /// Takes hold of it.
    pub fn retain(device: cu::CUdevice) -> Result<Self> {
        // SAFETY: the device is one that the driver gave.
        let context = unsafe { result::primary_ctx::retain(device) }.told("cuDevicePrimaryCtxRetain")?;
        Ok(Self { device, context })
    }

    /// Makes it the one that this thread's calls mean.
    pub fn current(&self) -> Result<()> {
        // SAFETY: it is held until this is dropped.
        unsafe { result::ctx::set_current(self.context) }.told("cuCtxSetCurrent")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once and is released once.
        unsafe { result::primary_ctx::release(self.device) }.ok();
    }
}

/// Machine code on the card.
pub struct Module(cu::CUmodule);

// SAFETY: a handle that the driver lets any thread use; nothing here changes.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads what the compiler made: machine code, or PTX that ends in a zero.
    pub fn load(image: &[u8]) -> Result<Self> {
        // SAFETY: machine code knows its length, PTX ends in a zero; the driver makes a copy.
        unsafe { result::module::load_data(image.as_ptr().cast()) }.told("cuModuleLoadData").map(Self)
    }

    /// A kernel, by its name.
    pub fn function(&self, name: &CStr) -> Result<cu::CUfunction> {
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded, the name ends in a zero, and the place outlives the call.
        let found = unsafe { cu::cuModuleGetFunction(&mut function, self.0, name.as_ptr()) }.result();
        found.told(&format!("cuModuleGetFunction of {}", name.to_string_lossy()))?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once; its functions are not called again.
        unsafe { result::module::unload(self.0) }.ok();
    }
}

/// A queue of work.
pub struct Stream(cu::CUstream);

// SAFETY: a handle that the driver lets any thread use; nothing here changes.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// One that does not wait for the default stream, nor it for this one.
    pub fn new() -> Result<Self> {
        result::stream::create(result::stream::StreamKind::NonBlocking).told("cuStreamCreate").map(Self)
    }

    /// For calls of the driver.
    pub fn raw(&self) -> cu::CUstream {
        self.0
    }

    /// Waits until nothing is left to do.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the stream is there.
        unsafe { result::stream::synchronize(self.0) }.told("cuStreamSynchronize")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; work that is left runs to its end.
        unsafe { result::stream::destroy(self.0) }.ok();
    }
}

/// A point in a stream.
pub struct Event(cu::CUevent);

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Event {}

impl Event {
    /// One to wait for.
    pub fn new() -> Result<Self> {
        result::event::create(cu::CUevent_flags::CU_EVENT_DISABLE_TIMING).told("cuEventCreate").map(Self)
    }

    /// One that knows when it was passed.
    pub fn timed() -> Result<Self> {
        result::event::create(cu::CUevent_flags::CU_EVENT_DEFAULT).told("cuEventCreate").map(Self)
    }

    /// Sets it behind what the stream has to do by now.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are there and of one context.
        unsafe { result::event::record(self.0, stream.0) }.told("cuEventRecord")
    }

    /// Waits until it is passed; at once where it was never set.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event is there.
        unsafe { result::event::synchronize(self.0) }.told("cuEventSynchronize")
    }

    /// Milliseconds from an earlier one; both are timed and passed.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32> {
        type Elapsed = unsafe extern "C" fn(*mut f32, cu::CUevent, cu::CUevent) -> cu::CUresult;
        // `cudarc` knows only `cuEventElapsedTime_v2`, which drivers before 12.8 do not have: to ask would be a panic.
        // SAFETY: the driver is open, or there would be no event; the type is that of its header.
        let elapsed = unsafe { cu::culib().get::<Elapsed>("cuEventElapsedTime") }
            .map_err(|e| Error::Device(format!("the NVIDIA driver: {e}")))?;
        let mut ms = 0.0;
        // SAFETY: both events are there, and the place outlives the call.
        unsafe { elapsed(&mut ms, earlier.0, self.0) }.result().told("cuEventElapsedTime")?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe { result::event::destroy(self.0) }.ok();
    }
}

/// The host's memory, where the card can read it by itself.
pub struct Pinned {
    at: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Pinned {}

impl Pinned {
    /// So many bytes, at least one, of zeros.
    pub fn new(bytes: usize) -> Result<Self> {
        // SAFETY: it is given back when this is dropped.
        let at = unsafe { result::malloc_host(bytes, 0) }.told("cuMemHostAlloc")?;
        // SAFETY: so many bytes are there, and nobody else knows of them.
        unsafe { ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Self { at, bytes })
    }

    /// How many they are.
    pub fn size_bytes(&self) -> usize {
        self.bytes
    }

    /// The bytes; no copy that the card still makes from them may be under way.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes are there, written, and this value's alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated once, given back once.
        unsafe { result::free_host(self.at) }.ok();
    }
}

/// The card's memory, where this crate's own code and not a user of [`super::Gpu`] holds it.
pub struct Memory {
    at: Address,
    bytes: usize,
}

impl Memory {
    /// So many bytes, at least one, of any content.
    pub fn new(bytes: usize) -> Result<Self> {
        // SAFETY: it is given back when this is dropped.
        let at = unsafe { result::malloc_sync(bytes) }.told(&format!("cuMemAlloc of {bytes} bytes"))?;
        Ok(Self { at, bytes })
    }

    /// Where it lies.
    pub fn at(&self) -> Address {
        self.at
    }

    /// How many bytes.
    pub fn size_bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated once, given back once.
        unsafe { result::free_sync(self.at) }.ok();
    }
}

/// Work that was written down once and is done by one call.
pub struct Graph(cu::CUgraphExec);

// SAFETY: a handle that the driver lets any thread use, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Writes down what `work` gives the stream, which does none of it; `None` where the card has no memory for it.
    pub fn capture(stream: &Stream, work: impl FnOnce() -> Result<()>) -> Result<Option<Self>> {
        // Thread-local: what other threads do meanwhile (allocate, say) is their own matter.
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is there and nothing else captures it: its queue is locked.
        unsafe { result::stream::begin_capture(stream.0, mode) }.told("cuStreamBeginCapture")?;
        let worked = work();
        let mut graph = ptr::null_mut();
        // Ended in any case, or the stream would take no more work.
        // SAFETY: the capture was begun above, and the place outlives the call.
        let ended = unsafe { cu::cuStreamEndCapture(stream.0, &mut graph) }.result();
        let made = worked.and_then(|()| ended.told("cuStreamEndCapture")).and_then(|()| Self::of(graph));
        if !graph.is_null() {
            // SAFETY: the graph is this function's; what was made of it stands alone.
            unsafe { result::graph::destroy(graph) }.ok();
        }
        made
    }

    fn of(graph: cu::CUgraph) -> Result<Option<Self>> {
        let mut made = ptr::null_mut();
        // SAFETY: the graph is there, and the place outlives the call.
        match unsafe { cu::cuGraphInstantiateWithFlags(&mut made, graph, 0) }.result() {
            Err(DriverError(cu::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            result => result.told("cuGraphInstantiate").map(|()| Some(Self(made))),
        }
    }

    /// Does it all, behind what the stream has to do by now.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are there and of one context.
        unsafe { result::graph::launch(self.0, stream.0) }.told("cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; where it still runs, the driver frees it at its end.
        unsafe { result::graph::exec_destroy(self.0) }.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_says_nothing_of_its_place_comes_with_a_way_to_find_it() {
        for error in [cu::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, cu::CUresult::CUDA_ERROR_LAUNCH_FAILED] {
            assert!(advice(error).contains("BITFIT_CUDA_GRAPHS=0 under compute-sanitizer"));
        }
        assert_eq!(advice(cu::CUresult::CUDA_ERROR_INVALID_VALUE), "");
    }
}
