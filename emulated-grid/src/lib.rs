//! bitfit's CUDA kernels on the CPU: what they compute, and what is wrong with them, where there is no card.
//!
//! The kernels are compiled as C++, once a [`Variant`]. A [`launch`] runs one block at a time, each CUDA thread a fiber
//! that runs until it reaches a barrier or a collective of its warp. Memory that nobody wrote is NaN, in shared memory
//! and out of it; memory ends at a guard page; threads and blocks run in an [`Order`] of choice; and a barrier that
//! not all threads reach is named by its line. Results are those of the same arithmetic in f32, without fused
//! operations that the source does not ask for; `mma` sums in its own order.
//!
//! Not emulated: the memory model (a write is seen at once), bank conflicts, limits on registers, and any instruction
//! that `device.cuh` does not offer.
//!
//! Start with [`launch`], and with `grid.cpp` for how it works. Linux only: elsewhere the crate is empty.
#![cfg(target_os = "linux")]
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod ffi;
mod memory;

use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use memory::{allocate, copy, free, read, write, zero};

/// The most bytes of shared memory that a launch may ask for.
pub const MOST_SHARED: u32 = 227 << 10;
/// The most blocks along x, and along y or z.
pub const MOST_BLOCKS: [u32; 2] = [i32::MAX as u32, 65535];

/// Which compilation of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Variant {
    /// With `PRECISION` 0.
    F32,
    /// With `PRECISION` 1.
    Tf32,
    /// With `PRECISION` 2.
    Bf16,
    /// The grid's own test kernels.
    Tests,
}

/// The order of threads and blocks, where barriers leave it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// The first first, as far as it may run.
    Forward,
    /// The last first.
    Backward,
    /// Another order for each seed, and after each barrier.
    Shuffled(u64),
}

/// What a parameter of a kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Param {
    /// An address.
    Pointer,
    /// `int`.
    Int,
    /// `unsigned`.
    Unsigned,
    /// `float`.
    Float,
    /// A whole number of 64 bits.
    Wide,
}

impl Param {
    /// Its size in bytes.
    pub fn size_bytes(self) -> usize {
        match self {
            Param::Pointer | Param::Wide => 8,
            Param::Int | Param::Unsigned | Param::Float => 4,
        }
    }
}

/// A kernel that can be launched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// What it takes.
    pub params: Vec<Param>,
    /// The most threads of a block: what `KERNEL_BOUNDS` says, or 1024.
    pub most_threads: u32,
}

/// A call of `__syncthreads` or `__syncwarp`. Displayed as `norm.cu:31`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Barrier {
    /// The name of the file, without its folder.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Whoever holds it owns all that grid.cpp keeps.
static GRID: Mutex<()> = Mutex::new(());

fn lock() -> MutexGuard<'static, ()> {
    GRID.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static LEFT_OUT: RefCell<Option<(CString, i32)>> = const { RefCell::new(None) };
}

/// The kernels of a variant, in the order in which they stand in the source.
pub fn kernels(variant: Variant) -> Vec<Kernel> {
    let mut all: Vec<Kernel> = entries(variant)
        .map(|kernel| Kernel {
            name: kernel.name().to_string_lossy().into_owned(),
            params: kernel.params().iter().map(|number| param(*number)).collect(),
            most_threads: kernel.most_threads,
        })
        .collect();
    all.reverse();
    all
}

fn param(number: u32) -> Param {
    [Param::Pointer, Param::Int, Param::Unsigned, Param::Float, Param::Wide][number as usize]
}

/// The kernels of a variant, last first.
fn entries(variant: Variant) -> impl Iterator<Item = &'static ffi::Kernel> {
    // SAFETY: the list is complete before main and never changes; each link is null or lives for ever.
    let next = |at: *const ffi::Kernel| unsafe { at.as_ref() };
    // SAFETY: any number is a variant.
    let last = next(unsafe { ffi::emulated_grid_last_kernel(variant as u32) });
    std::iter::successors(last, move |kernel| next(kernel.before))
}

/// Every barrier that threads have passed together in this process so far, in the order of file and line.
pub fn barriers() -> Vec<Barrier> {
    let _grid = lock();
    let mut all: Vec<Barrier> = (0..)
        .map_while(|i| {
            let (mut file, mut line) = (std::ptr::null(), 0);
            // SAFETY: the grid is ours; both places can be written to.
            let found = unsafe { ffi::emulated_grid_barrier(i, &mut file, &mut line) };
            // SAFETY: where there is an i-th barrier its file is a literal of C++.
            found.then(|| Barrier { file: unsafe { text(file) }, line: line as u32 })
        })
        .collect();
    all.sort();
    all
}

/// # Safety
///
/// `at` points at text that ends with a zero and that nobody writes to meanwhile.
unsafe fn text(at: *const std::ffi::c_char) -> String {
    // SAFETY: as asked for.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}

/// Calls `f`; launches of this thread meanwhile pass by the barrier as if it were not in the source.
pub fn without_barrier<R>(barrier: &Barrier, f: impl FnOnce() -> R) -> R {
    struct PutBack(Option<(CString, i32)>);
    impl Drop for PutBack {
        fn drop(&mut self) {
            LEFT_OUT.set(self.0.take());
        }
    }
    let left_out = (CString::new(barrier.file.as_str()).expect("a file's name has no zero"), barrier.line as i32);
    let _put_back = PutBack(LEFT_OUT.replace(Some(left_out)));
    f()
}

/// Runs a kernel over a grid of blocks, and waits for it. Arguments are eight bytes each: an address, or a number of
/// four bytes in the low half. One launch runs at a time; others wait.
///
/// # Errors
///
/// What would be an error on a card or worse, in words, with the kernel, block, threads and lines concerned:
/// - no such kernel; another number of arguments; an argument that does not fit its parameter;
/// - a configuration that cards refuse, or a block that is no multiple of 32 threads;
/// - a barrier or collective that not all threads reach, or not at the same line;
/// - a collective over a part of a warp; a row for `ldmatrix` that is misaligned or not in shared memory;
/// - a read or write outside of memory, and a write to the slack around an allocation;
/// - a misaligned address, an index outside of an array, a shift that cards do otherwise, a whole number divided by
///   zero.
///
/// What the kernel wrote until then stays written; the next launch is not concerned.
pub fn launch(
    variant: Variant,
    kernel: &str,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    args: &[u64],
    order: Order,
) -> Result<(), String> {
    let entry = entries(variant)
        .find(|entry| entry.name().to_bytes() == kernel.as_bytes())
        .ok_or_else(|| format!("no kernel `{kernel}` in {variant:?}"))?;
    check_args(entry, args).map_err(|e| format!("kernel `{kernel}`: {e}"))?;
    check_configuration(entry, grid, threads, shared).map_err(|e| format!("kernel `{kernel}`: {e}"))?;
    let (order, seed) = match order {
        Order::Forward => (0, 0),
        Order::Backward => (1, 0),
        Order::Shuffled(seed) => (2, seed),
    };
    let left_out = LEFT_OUT.with_borrow(Clone::clone);
    let launch = ffi::Launch {
        kernel: entry,
        variant: variant as u32,
        grid,
        threads,
        shared,
        order,
        seed,
        args: args.as_ptr(),
        without_file: left_out.as_ref().map_or(std::ptr::null(), |(file, _)| file.as_ptr()),
        without_line: left_out.as_ref().map_or(0, |(_, line)| *line),
    };
    let _grid = lock();
    let mut fault = 0;
    // SAFETY: the grid is ours, and what `launch` points at outlives the call; the kernel's arguments are as many as it
    // has parameters. What a kernel touches wrongly is caught, but for what it may hit in between: it is trusted as far
    // as any other code of the project.
    let error = unsafe { ffi::emulated_grid_launch(&launch, &mut fault) };
    // SAFETY: an error is text that stays until the next launch, which waits for the grid.
    let error = (!error.is_null()).then(|| unsafe { text(error) });
    match (error, memory::check_slack()) {
        (Some(error), _) if fault != 0 => Err(format!("{error}: {}", memory::describe(fault))),
        (Some(error), _) => Err(error),
        (None, Some(slack)) => Err(format!("kernel `{kernel}` {slack}")),
        (None, None) => Ok(()),
    }
}

fn check_args(kernel: &ffi::Kernel, args: &[u64]) -> Result<(), String> {
    let params = kernel.params();
    if params.len() != args.len() {
        return Err(format!("takes {} arguments, is given {}", params.len(), args.len()));
    }
    for (i, (number, arg)) in params.iter().zip(args).enumerate() {
        let fits = match param(*number) {
            Param::Pointer | Param::Wide => true,
            Param::Unsigned | Param::Float => u32::try_from(*arg).is_ok(),
            Param::Int => u32::try_from(*arg).is_ok() || i32::try_from(*arg as i64).is_ok(),
        };
        if !fits {
            return Err(format!("argument {i} is {arg:#x}, which is no {:?}", param(*number)));
        }
    }
    Ok(())
}

fn check_configuration(kernel: &ffi::Kernel, grid: [u32; 3], threads: u32, shared: u32) -> Result<(), String> {
    let [x, y, z] = grid;
    let [most_x, most_yz] = MOST_BLOCKS;
    let most_threads = kernel.most_threads;
    if !(1..=most_x).contains(&x) || [y, z].iter().any(|n| !(1..=most_yz).contains(n)) {
        return Err(format!("a grid of {x} by {y} by {z} blocks"));
    }
    if threads == 0 || threads > most_threads || !threads.is_multiple_of(32) {
        return Err(format!("blocks of {threads} threads, not a multiple of 32 up to {most_threads}"));
    }
    if shared > MOST_SHARED {
        return Err(format!("{shared} bytes of shared memory, more than {MOST_SHARED}"));
    }
    Ok(())
}
