//! A card of NVIDIA's: the driver's calls and cuBLASLt's behind [`Card`].
//!
//! A [`Gpu`] is one queue: a stream, its graphs, its way for constants, its workspace. Queues of a card share its
//! context, the kernels and the algorithms of products. Start reading at [`Card::submit`].

mod descriptors;
mod facts;
mod kernels;
mod key;
mod owned;
mod products;
mod replay;
mod staging;

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys as cu;

use super::card::{Address, Card, Command, Commands, Launch, Number, Precision, Product, Side};
use super::compiler;
use super::library::{self, CublasLt, Driver, Nvrtc};
use crate::error::{Error, Result};
pub use facts::Facts;
use kernels::Kernels;
use owned::{Context, Event, Graph, Memory, Module, Stream, Told};
pub use products::Algorithm;
use products::Products;
use replay::{Replay, Turn};
use staging::Staging;

/// The oldest cards whose tensor cores take bf16 and tf32.
const LEAST_CAPABILITY: (u32, u32) = (8, 0);
/// A kernel takes no more arguments.
const MOST_ARGS: usize = 64;

/// One queue of a card.
pub struct Gpu {
    // In the order in which they are given back: what a stream may still use goes before it, and the context last.
    queue: Mutex<Queue>,
    stream: Stream,
    graphs: bool,
    shared: Arc<Shared>,
}

struct Queue {
    replay: Replay<Graph>,
    staging: Staging,
    /// Once it has multiplied: a queue that only brings a task's weights to the card has none.
    workspace: Option<Memory>,
}

/// What queues of one card have in common.
struct Shared {
    products: Mutex<Products>,
    kernels: Kernels,
    facts: Facts,
    precision: Precision,
    workspace_bytes: usize,
    context: Context,
}

/// Whether a card, NVRTC and cuBLASLt are there.
///
/// # Errors
///
/// Where one is missing or too old, saying which and what to do.
pub fn check(ordinal: usize) -> Result<()> {
    libraries(ordinal).map(|_| ())
}

/// The driver, which shows the card, NVRTC and cuBLASLt.
fn libraries(ordinal: usize) -> Result<(Driver, &'static Nvrtc, &'static CublasLt)> {
    let driver = library::driver()?;
    check_ordinal(ordinal, driver.devices)?;
    Ok((driver, library::nvrtc(Some(driver.version))?, library::cublaslt(Some(driver.version))?))
}

impl Gpu {
    /// The first queue of a card, with the kernels of a precision. The first start of a version compiles them, which
    /// takes some seconds; then they come from the user's cache.
    ///
    /// # Errors
    ///
    /// Where driver, card, NVRTC or cuBLASLt are missing or too old, saying which and what to do.
    pub fn new(ordinal: usize, precision: Precision) -> Result<Self> {
        // All before anything is loaded: who lacks one lacks others, more often than not.
        let (driver, nvrtc, cublaslt) = libraries(ordinal)?;
        let device = result::device::get(ordinal as i32).told("cuDeviceGet")?;
        let attribute = |attribute| {
            // SAFETY: the device is one that the driver gave.
            let value = unsafe { result::device::get_attribute(device, attribute) }.told("cuDeviceGetAttribute")?;
            Ok::<u32, Error>(u32::try_from(value).unwrap_or(0))
        };
        use cu::CUdevice_attribute::*;
        let model = result::device::get_name(device).told("cuDeviceGetName")?;
        let capability = (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        check_capability(&named(ordinal, &model), capability)?;
        let facts = Facts {
            ordinal,
            model,
            capability,
            // SAFETY: as above.
            memory_bytes: unsafe { result::device::total_mem(device) }.told("cuDeviceTotalMem")?,
            multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            driver: driver.version,
            nvrtc: nvrtc.version,
            cublaslt: cublaslt.version,
        };
        let most_shared = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;

        let image = compiler::kernels(nvrtc, capability, precision)?;
        let context = Context::retain(device)?;
        context.current()?;
        let kernels = Kernels::new(Module::load(&image)?, most_shared);
        // What NVIDIA advises: less keeps the best algorithms out.
        let workspace_bytes = if capability.0 >= 9 { 32 << 20 } else { 8 << 20 };
        let products = Mutex::new(Products::new(cublaslt, workspace_bytes)?);
        let shared = Shared { products, kernels, facts, precision, workspace_bytes, context };
        // A graph hides which of its commands failed.
        let graphs = std::env::var_os("BITFIT_CUDA_GRAPHS").is_none_or(|value| value != "0");
        Self::of(Arc::new(shared), graphs)
    }

    fn of(shared: Arc<Shared>, graphs: bool) -> Result<Self> {
        shared.context.current()?;
        let queue = Queue { replay: Replay::default(), staging: Staging::new()?, workspace: None };
        Ok(Self { queue: Mutex::new(queue), stream: Stream::new()?, graphs, shared })
    }

    /// What the card is.
    pub fn facts(&self) -> &Facts {
        &self.shared.facts
    }

    /// What its kernels compute in.
    pub fn precision(&self) -> Precision {
        self.shared.precision
    }

    /// The algorithms of products so far, each after the product that it is for.
    pub fn algorithms(&self) -> Vec<(String, Algorithm)> {
        lock(&self.shared.products).algorithms()
    }

    /// The card's highest rate in a precision, in floating-point operations a second: of a product of two matrices of
    /// 8192 x 8192, by the algorithm that cuBLASLt thinks the fastest, the best of several tries. Takes 0.8 GB of the
    /// card's memory for its time, in f32; half of it for bf16.
    ///
    /// # Errors
    ///
    /// Where there is no such memory, and what the card reports.
    pub fn peak(&self, precision: Precision) -> Result<f64> {
        const N: usize = 8192;
        const TRIES: usize = 8;
        const PRODUCTS: usize = 4;
        self.shared.context.current()?;
        let number = if precision == Precision::Bf16 { Number::Bf16 } else { Number::F32 };
        let (mut queue, products) = (lock(&self.queue), lock(&self.shared.products));
        let workspace = self.workspace(&mut queue.workspace)?;
        let matrix = || Memory::new(N * N * if number == Number::Bf16 { 2 } else { 4 });
        let (left, right, to) = (matrix()?, matrix()?, matrix()?);
        // Numbers as a model has them: a card that multiplies zeros uses less power and runs faster.
        self.fill(&left, number)?;
        self.fill(&right, number)?;
        let side = |memory: &Memory| Side { at: memory.at(), transposed: false };
        let (left, right, to) = (side(&left), side(&right), to.at());
        let product = Product { m: N, n: N, k: N, precision, left, right, to, number, accumulate: false };
        let mut multiply = products.fastest(&product, workspace)?;
        let (from, till) = (Event::timed()?, Event::timed()?);
        let mut best = f64::INFINITY;
        for attempt in 0..=TRIES {
            from.record(&self.stream)?;
            for _ in 0..PRODUCTS {
                multiply(&self.stream)?;
            }
            till.record(&self.stream)?;
            till.wait()?;
            // The first loads the kernel.
            if attempt > 0 {
                best = best.min(f64::from(till.ms_since(&from)?) / 1e3 / PRODUCTS as f64);
            }
        }
        Ok(2.0 * (N as f64).powi(3) / best)
    }

    /// Fills memory with numbers between -1 and 1, the same ones each time.
    fn fill(&self, memory: &Memory, number: Number) -> Result<()> {
        let mut state = 0_u32;
        let numbers = (0..1 << 18).map(|_| {
            // A linear congruential generator (Numerical Recipes, 7.1.4); its upper bits are good enough for this.
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        });
        let bytes: Vec<u8> = match number {
            Number::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
            Number::Bf16 => numbers.flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect(),
        };
        let mut filled = bytes.len().min(memory.size_bytes());
        self.write(memory.at(), &bytes[..filled])?;
        while filled < memory.size_bytes() {
            let more = filled.min(memory.size_bytes() - filled);
            self.copy(memory.at() + filled as u64, memory.at(), more)?;
            filled += more;
        }
        Ok(())
    }

    /// Where products of this queue put what they are not done with.
    fn workspace<'q>(&self, of: &'q mut Option<Memory>) -> Result<&'q Memory> {
        match of {
            Some(workspace) => Ok(workspace),
            none => Ok(none.insert(Memory::new(self.shared.workspace_bytes)?)),
        }
    }

    /// Gives every command to the stream.
    fn run(&self, workspace: &mut Option<Memory>, commands: &Commands) -> Result<()> {
        for command in &commands.list {
            match command {
                Command::Launch(launch) => self.launch(launch, commands.args_of(launch))?,
                Command::Product(product) => {
                    let workspace = self.workspace(workspace)?;
                    lock(&self.shared.products).run(product, workspace, &self.stream)?;
                }
                Command::Copy { to, from, bytes } => self.copy(*to, *from, *bytes)?,
            }
        }
        Ok(())
    }

    fn launch(&self, launch: &Launch, args: &[u64]) -> Result<()> {
        static NOTHING: u64 = 0;
        let Launch { kernel, grid: [x, y, z], threads, shared, .. } = *launch;
        if args.len() > MOST_ARGS {
            return Err(Error::Device(format!("{kernel}: {} arguments, {MOST_ARGS} at most", args.len())));
        }
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let function = self.shared.kernels.get(kernel, shared)?;
        // The driver reads as many as the kernel has parameters: those that nobody gave are zero.
        let mut pointers = [ptr::from_ref(&NOTHING).cast_mut().cast::<c_void>(); MOST_ARGS];
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = ptr::from_ref(arg).cast_mut().cast();
        }
        // SAFETY: the function is of a module that is loaded; arguments are of eight bytes, no parameter is larger, and
        // the driver reads them before the call returns. That addresses among them are good is on who made the list.
        let result = unsafe {
            cu::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                self.stream.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        match result.result() {
            Ok(()) => Ok(()),
            refused => refused.told(&format!("cuLaunchKernel of {kernel}")),
        }
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: that both are good is on who made the list.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.raw()) }.told("cuMemcpyDtoDAsync")
    }
}

impl Card for Gpu {
    fn another(&self) -> Result<Self> {
        Self::of(self.shared.clone(), self.graphs)
    }

    fn name(&self) -> String {
        named(self.shared.facts.ordinal, &self.shared.facts.model)
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        self.shared.context.current()?;
        // The driver refuses to give nothing; what it gives lies at a multiple of 256 bytes at least.
        // SAFETY: who asked gives it back by `free`; at the latest it goes with the context.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Err(DriverError(cu::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            result => result.told(&format!("cuMemAlloc of {bytes} bytes")).map(Some),
        }
    }

    fn free(&self, at: Address) {
        if self.shared.context.current().is_ok() {
            // SAFETY: it was allocated here, and who gives it back says that no work uses it any more. An error would be
            // that of earlier work, which the next call that waits reports.
            unsafe { result::free_sync(at) }.ok();
        }
    }

    fn free_bytes(&self) -> usize {
        let free = self.shared.context.current().ok().and_then(|()| result::mem_get_info().ok());
        free.map_or(0, |(free, _)| free)
    }

    fn write(&self, to: Address, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.shared.context.current()?;
        // SAFETY: the bytes are borrowed until the wait below; that the place is good is on the caller.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.raw()) }.told("cuMemcpyHtoDAsync")?;
        self.stream.wait()
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.shared.context.current()?;
        if !bytes.is_empty() {
            // SAFETY: the bytes are borrowed until the wait below; that the place is good is on the caller.
            unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.raw()) }.told("cuMemcpyDtoHAsync")?;
        }
        self.stream.wait()
    }

    fn submit(&self, place: Address, constants: &[u8], commands: &Commands) -> Result<()> {
        self.shared.context.current()?;
        let Queue { replay, staging, workspace } = &mut *lock(&self.queue);
        staging.send(place, constants, &self.stream)?;
        if !self.graphs {
            return self.run(workspace, commands);
        }
        match replay.turn(commands) {
            Turn::Replay(graph) => graph.launch(&self.stream),
            Turn::Plain => self.run(workspace, commands),
            Turn::Capture(hash) => {
                // Not while a graph is made: memory cannot be had then.
                self.workspace(workspace)?;
                match Graph::capture(&self.stream, || self.run(workspace, commands)) {
                    Ok(Some(graph)) => replay.keep(hash, commands, graph).launch(&self.stream),
                    // Nothing has run yet, and there are easier ways.
                    Ok(None) => self.run(workspace, commands),
                    Err(e) => Err(Error::Device(format!(
                        "{e}, while a graph was made of {} commands; BITFIT_CUDA_GRAPHS=0 goes without graphs",
                        commands.list.len()
                    ))),
                }
            }
        }
    }

    fn wait(&self) -> Result<()> {
        self.shared.context.current()?;
        self.stream.wait()
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What the fields give back may be in use until the stream is done, and needs the context. Errors were told, or
        // are nobody's any more.
        if self.shared.context.current().is_ok() {
            self.stream.wait().ok();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // cuBLASLt and the kernels are given back in it.
        self.context.current().ok();
    }
}

fn named(ordinal: usize, model: &str) -> String {
    format!("cuda:{ordinal} ({model})")
}

fn check_ordinal(ordinal: usize, devices: usize) -> Result<()> {
    if ordinal < devices {
        return Ok(());
    }
    let there = if devices == 1 {
        "one device, cuda:0".into()
    } else {
        format!("{devices} devices, cuda:0 to cuda:{}", devices - 1)
    };
    Err(Error::Device(format!(
        "cuda:{ordinal} is not there: the driver shows {there}; name one of those, or use --device cpu"
    )))
}

fn check_capability(name: &str, (major, minor): (u32, u32)) -> Result<()> {
    if (major, minor) >= LEAST_CAPABILITY {
        return Ok(());
    }
    Err(Error::Device(format!(
        "{name} has compute capability {major}.{minor}, {}.{} (Ampere) or later is needed: use another card, or --device \
         cpu",
        LEAST_CAPABILITY.0, LEAST_CAPABILITY.1
    )))
}

/// Locks; what a panic in another thread may have left is no worse than an error there.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_that_is_not_there_is_told_with_those_that_are() {
        let message = |ordinal, devices| check_ordinal(ordinal, devices).unwrap_err().to_string();
        assert!(check_ordinal(1, 2).is_ok());
        assert_eq!(
            message(1, 1),
            "device: cuda:1 is not there: the driver shows one device, cuda:0; name one of those, or use --device cpu"
        );
        assert_eq!(
            message(9, 4),
            "device: cuda:9 is not there: the driver shows 4 devices, cuda:0 to cuda:3; name one of those, or use --device cpu"
        );
    }

    #[test]
    fn a_card_that_is_too_old_is_told_by_name() {
        assert!(check_capability("cuda:0 (NVIDIA A100)", (8, 0)).is_ok());
        let message = check_capability("cuda:0 (Tesla T4)", (7, 5)).unwrap_err().to_string();
        assert!(
            message.starts_with("device: cuda:0 (Tesla T4) has compute capability 7.5, 8.0 (Ampere) or"),
            "{message}"
        );
    }

    #[test]
    fn where_nothing_is_installed_an_error_says_so() {
        match Gpu::new(0, Precision::F32) {
            Ok(gpu) => assert!(gpu.name().starts_with("cuda:0 (")),
            Err(e) => assert!(e.to_string().contains("--device cpu"), "{e}"),
        }
    }
}
