//! The CPU: every op in loops over safe slices, and the products of `product`.
//!
//! One text for f32, in which it works, and for f64, in which tests hold the same text to finite differences. Loops
//! over rows are compiled for the widest instruction set of the processor at run time (`simd`); their sums run in
//! fixed lanes, so that results do not depend on which one that is. Work is cut by rows, sequences or blocks of 64
//! rows, never by threads, so results do not depend on their number either.
//!
//! `buffer` holds the memory, `real` the arithmetic of a number, `step` the trait of ops; the other files are what it
//! is made of.

mod activation;
mod adamw;
mod attention;
mod buffer;
mod bytes;
mod ends;
mod lines;
mod masks;
mod norm;
mod precision;
mod product;
mod real;
mod simd;
mod step;
mod sums;
mod tables;
mod weights;

use std::marker::PhantomData;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use lines::Element;
use rayon::{ThreadPool, ThreadPoolBuilder};
pub use simd::Arch;

use super::PrecisionName;
use super::batch::{Batch, Space};
use super::ops::{Arithmetic, Device, Dropout, Site};
use super::philox::MaskRow;
use crate::error::{Error, Result};

pub use buffer::{Buffer, Mat, Pool, Vectors};
pub use precision::{Bf16, F32, F64, Int8, Precision, Stored};
pub use real::Real;
pub use tables::Table;
pub use weights::Weight;

use product::layout::Layout;

/// Rows that one task of a row-wise loop takes: enough to outweigh handing it out.
const CHUNK: usize = 32;

/// A context on the CPU: threads, a pool of buffers, and the batch of the step at hand.
pub struct Cpu<P: Precision> {
    threads: Arc<ThreadPool>,
    arch: Arch,
    arithmetic: Arithmetic,
    pool: Pool,
    /// Token rows that buffers are sized for.
    room: usize,
    batch: Arc<Batch>,
    dropout: Dropout,
    /// The sequence of each token row.
    sequence: Vec<u32>,
    precision: PhantomData<P>,
}

/// Activations, as they are kept.
type Act<P> = Mat<<P as Precision>::Stored>;
/// Rows at full width.
type Stream<P> = Mat<<P as Precision>::Real>;
/// What a loop over three arrays writes to.
type Three<'a, R> = (&'a mut [R], &'a mut [R], &'a mut [R]);

/// Where a row stands.
#[derive(Clone, Copy)]
struct Row {
    sequence: usize,
    group: usize,
    position: usize,
}

impl<P: Precision> Cpu<P> {
    /// A context with `n_threads` threads of its own; 0 means one a core.
    ///
    /// # Errors
    ///
    /// Where the system refuses to start the threads.
    pub fn new(arithmetic: Arithmetic, n_threads: usize) -> Result<Self> {
        Ok(Self::with(Arch::chosen()?, arithmetic, Arc::new(threads(n_threads)?)))
    }

    fn with(arch: Arch, arithmetic: Arithmetic, threads: Arc<ThreadPool>) -> Self {
        Cpu {
            threads,
            arch,
            arithmetic,
            pool: Pool::default(),
            room: 0,
            batch: Arc::new(Batch::new()),
            dropout: Dropout::NONE,
            sequence: Vec::new(),
            precision: PhantomData,
        }
    }

    fn n_threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// A buffer of any content.
    fn mat<E: Element>(&self, space: Space, cols: usize) -> Mat<E> {
        let rows = self.rows(space);
        // Numbers of rows vary from step to step; buffers of a few sizes serve them all.
        let room = if space == Space::Tokens { self.room } else { rows.next_power_of_two() };
        Mat { rows, cols, space, data: self.pool.take(rows * cols, room * cols) }
    }

    fn zeros<E: Element>(&self, space: Space, cols: usize) -> Mat<E> {
        let mut m = self.mat(space, cols);
        m.data.fill(E::zeroed());
        m
    }

    fn rows(&self, space: Space) -> usize {
        match space {
            Space::Tokens => self.batch.n_tokens(),
            Space::Firsts => self.batch.n_sequences(),
        }
    }

    #[inline(always)]
    fn place(&self, space: Space, row: usize) -> Row {
        let (sequence, position) = match space {
            Space::Tokens => {
                let s = self.sequence[row] as usize;
                (s, row - self.batch.bounds()[s])
            }
            Space::Firsts => (row, 0),
        };
        Row { sequence, group: self.batch.groups()[sequence], position }
    }

    /// The group of a row.
    #[inline(always)]
    fn group(&self, space: Space, row: usize) -> usize {
        match space {
            Space::Tokens => self.batch.groups()[self.sequence[row] as usize],
            Space::Firsts => self.batch.groups()[row],
        }
    }

    /// The multipliers of a row at a site, 0 or the scale, written to `room`; `None` where nothing is dropped there.
    #[inline(always)]
    fn mask<'r>(&self, row: Row, head: usize, site: Site, room: &'r mut [P::Real]) -> Option<&'r [P::Real]> {
        let p = self.dropout.at(site.at);
        let mask = MaskRow::new(self.batch.keys()[row.sequence], site, (head << 16 | row.position) as u32, p);
        if mask.keeps_all() {
            return None;
        }
        P::Real::write_mask(self.arch, &mask, room);
        Some(room)
    }
}

/// Threads of their own; 0 means one a core.
fn threads(n: usize) -> Result<ThreadPool> {
    let builder = ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("bitfit-{i}"));
    builder.build().map_err(|e| Error::Device(format!("cannot start {n} threads: {e}; ask for fewer with --threads")))
}

/// Multiplications and additions a second that `n_threads` threads of this processor can do at most in a precision,
/// measured on registers; `None` where the compiler chooses the instructions.
///
/// # Errors
///
/// Where `$BITFIT_CPU` names what this processor cannot run, or the system refuses to start the threads.
pub fn peak(precision: PrecisionName, n_threads: usize) -> Result<Option<f64>> {
    let arch = Arch::chosen()?;
    let spin = |rounds| match precision {
        PrecisionName::F32 => f32::tile(arch).and_then(|tile| tile.spin(rounds)),
        PrecisionName::Bf16 => product::layout::spin_bf16(arch, rounds),
        PrecisionName::Int8 => product::layout::spin_int8(arch, rounds),
        PrecisionName::Tf32 => None,
    };
    // Clocks rise under load, and others take turns: the best of many windows in which all threads run, each some
    // milliseconds long, so that starting it is nothing.
    let (windows, rounds) = (60, 3_000_000);
    let threads = threads(n_threads)?;
    let barrier = Barrier::new(threads.current_num_threads());
    let began = Instant::now();
    let all: Vec<Vec<(f64, f64, Option<f64>)>> = threads.broadcast(|_| {
        let window = |_| {
            barrier.wait();
            let from = began.elapsed().as_secs_f64();
            let operations = spin(rounds);
            (from, began.elapsed().as_secs_f64(), operations)
        };
        (0..windows).map(window).collect()
    });
    let rate = |w: usize| {
        let of = || all.iter().map(|windows: &Vec<_>| windows[w]);
        let first = of().map(|(from, ..)| from).fold(f64::INFINITY, f64::min);
        let last = of().map(|(_, to, _)| to).fold(0.0, f64::max);
        let operations: Option<f64> = of().map(|(.., operations)| operations).sum();
        operations.map(|n| n / (last - first))
    };
    Ok((0..windows).filter_map(rate).reduce(f64::max))
}

impl<P: Precision> Device for Cpu<P> {
    type Stream = Mat<P::Real>;
    type Act = Mat<P::Stored>;
    type Rows = Mat<P::Real>;
    type Weight = Weight<P>;
    type Table = P::Table;
    type Params = Vectors<P::Real>;
    type Index = Vec<u64>;

    const STREAM_BYTES: usize = size_of::<P::Real>();
    const ACT_BYTES: usize = size_of::<P::Stored>();

    fn fork(&self) -> Self {
        Self::with(self.arch, self.arithmetic, self.threads.clone())
    }

    fn run<T: Send>(&mut self, f: impl FnOnce(&mut Self) -> T + Send) -> T {
        let threads = self.threads.clone();
        threads.install(|| f(self))
    }

    fn begin(&mut self, batch: Arc<Batch>, dropout: Dropout) {
        if batch.n_tokens() > self.room {
            self.pool.release();
            self.room = batch.n_tokens();
        }
        self.sequence.clear();
        for s in 0..batch.n_sequences() {
            self.sequence.extend(batch.tokens_of(s).map(|_| s as u32));
        }
        self.batch = batch;
        self.dropout = dropout;
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(&mut self) {
        self.pool.release();
        self.room = 0;
    }

    fn settle(&self) {
        lines::trim();
    }

    fn peak_bytes(&self) -> usize {
        self.pool.peak_bytes()
    }

    fn weight(&self, n_out: usize, n_in: usize, values: Vec<f32>) -> Weight<P> {
        Weight::new(self.arch, n_out, n_in, &P::Real::from_f32(values))
    }

    fn prepare_backward(&self, w: &Weight<P>) {
        w.for_backward();
    }

    fn table(&self, width: usize, values: Vec<f32>) -> P::Table {
        assert_eq!(values.len() % width, 0, "a table has whole rows");
        P::Table::pack(width, &P::Real::from_f32(values))
    }

    fn params(&self, rows: usize, values: Vec<f32>) -> Vectors<P::Real> {
        assert_eq!(values.len() % rows, 0, "vectors are of one length");
        Vectors { rows, n: values.len() / rows, data: P::Real::from_f32(values) }
    }

    fn zeros(&self, rows: usize, n: usize) -> Vectors<P::Real> {
        Vectors { rows, n, data: vec![P::Real::ZERO; rows * n] }
    }

    fn index(&self, positions: &[u64]) -> Vec<u64> {
        positions.to_vec()
    }

    fn clear(&mut self, p: &mut Vectors<P::Real>) {
        p.data.fill(P::Real::ZERO);
    }

    fn visit_weight(&self, w: &Weight<P>, visit: &mut dyn FnMut(&[u8])) {
        w.for_forward().visit(visit);
    }

    fn visit_table(&self, t: &P::Table, visit: &mut dyn FnMut(&[u8])) {
        t.visit(visit);
    }

    fn read_params(&self, p: &Vectors<P::Real>) -> Vec<f32> {
        to_f32(&p.data)
    }

    fn read_rows(&self, r: &Mat<P::Real>) -> Vec<f64> {
        r.data.iter().map(|v| v.to_f64()).collect()
    }

    fn read_stream(&self, s: &Mat<P::Real>) -> Vec<f32> {
        to_f32(&s.data)
    }

    fn read_act(&self, a: &Mat<P::Stored>) -> Vec<f32> {
        a.data.iter().map(|v| v.load().to_f64() as f32).collect()
    }
}

fn to_f32<R: Real>(values: &[R]) -> Vec<f32> {
    values.iter().map(|v| v.to_f64() as f32).collect()
}

#[cfg(all(test, feature = "cuda"))]
impl<P: Precision> super::filled::Filled for Cpu<P> {
    fn stream_of(&self, space: Space, cols: usize, values: &[f32]) -> Stream<P> {
        let mut m: Stream<P> = self.mat(space, cols);
        m.data.copy_from_slice(&P::Real::from_f32(values.to_vec()));
        m
    }

    fn act_of(&self, space: Space, cols: usize, values: &[f32]) -> Act<P> {
        let mut m: Act<P> = self.mat(space, cols);
        for (to, value) in m.data.iter_mut().zip(values) {
            *to = P::Stored::store(P::Real::of(f64::from(*value)));
        }
        m
    }
}
