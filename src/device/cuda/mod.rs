//! NVIDIA GPUs: every op as launches of own kernels (`kernels/`) and products by cuBLASLt.
//!
//! Nothing of CUDA is needed to build this, and nothing to start it: driver, compiler and cuBLASLt are found at run
//! time (`library`), kernels are compiled for the card at hand (`compiler`), and all of it is reached through one trait
//! (`card`), which tests implement by a grid that is emulated on the CPU. So the text of this side of the ops, and of
//! every kernel, runs without a GPU.
//!
//! Ops only write down what to do (`queue`), over buffers of a pool (`memory`) and the batch's lists (`lists`); it is
//! handed over when somebody wants to read a result. Activations have rows up to the batch's size class, those beyond
//! the batch are zeros.

pub mod card;
mod compiler;
#[cfg(test)]
pub(crate) mod emulated;
mod ends;
mod gpu;
mod layers;
mod library;
mod lists;
mod memory;
mod queue;
mod step;
#[cfg(test)]
pub(crate) mod tests;
mod training;

use std::borrow::Cow;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;

use card::{Address, Card, Command, Number, Precision, Product, Side};
use lists::{Lists, Rows, Writer, size_class};
use memory::{Buffer, Index, Mat, Pool, Stream, Table, Taken, Vectors, Weight};
use queue::Queue;

use super::batch::{Batch, DropoutKey, Space};
use super::ops::{Activation, Arithmetic, Device, Dropout, MemoryUse, Site};
use super::philox::MaskRow;
use crate::error::{Error, Result};

pub use gpu::{Algorithm, Facts, Gpu, check};
pub use library::Version;

/// The widest head that attention's tiles hold.
const WIDEST_HEAD: usize = 64;
/// The widest row that a warp's registers hold.
const WIDEST_ROW: usize = 2048;

/// What an encoder on a card computes in.
pub trait Numbers: Send + Sync + 'static {
    /// The kernels' precision.
    const PRECISION: Precision;
    /// What activations that are kept or multiplied, weights and tables are stored in.
    const STORED: Number;
}

/// f32 throughout.
pub struct F32;
/// f32, multiplied with 10 bits of fraction.
pub struct Tf32;
/// Weights and kept activations in bf16; the stream, sums and vectors in f32.
pub struct Bf16;

impl Numbers for F32 {
    const PRECISION: Precision = Precision::F32;
    const STORED: Number = Number::F32;
}

impl Numbers for Tf32 {
    const PRECISION: Precision = Precision::Tf32;
    const STORED: Number = Number::F32;
}

impl Numbers for Bf16 {
    const PRECISION: Precision = Precision::Bf16;
    const STORED: Number = Number::Bf16;
}

/// Bytes of a number.
const fn bytes_of(number: Number) -> usize {
    match number {
        Number::F32 => 4,
        Number::Bf16 => 2,
    }
}

/// Values as numbers of a kind lie in memory.
fn to_bytes(values: &[f32], number: Number) -> Cow<'_, [u8]> {
    match number {
        Number::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
        Number::Bf16 => {
            let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            Cow::Owned(bytemuck::pod_collect_to_vec(&rounded))
        }
    }
}

/// The reverse of [`to_bytes`].
fn from_bytes(bytes: &[u8], number: Number) -> Vec<f32> {
    match number {
        Number::F32 => bytemuck::pod_collect_to_vec(bytes),
        Number::Bf16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes).into_iter().map(bf16::to_f32).collect(),
    }
}

/// A context on a card: a queue, a pool of buffers, and the batch of the step at hand.
pub struct Cuda<C: Card, N: Numbers> {
    card: Arc<C>,
    pool: Pool<C>,
    queue: Mutex<Queue<C>>,
    arithmetic: Arithmetic,
    /// Token rows that buffers are sized for.
    room: usize,
    batch: Arc<Batch>,
    lists: Option<Lists<C>>,
    dropout: Dropout,
    /// Between [`Device::begin`] and [`Device::finish`]: nothing waits.
    in_pass: bool,
    writer: Writer,
    numbers: PhantomData<N>,
}

impl<C: Card, N: Numbers> Cuda<C, N> {
    /// A context on a card.
    ///
    /// # Errors
    ///
    /// Where the kernels do not have the network's shape: hidden sizes and heads are multiples of 8, up to 2,048 and 64
    /// wide.
    pub fn new(card: C, arithmetic: Arithmetic, hidden: usize, intermediate: usize) -> Result<Self> {
        let head = hidden / arithmetic.n_heads;
        let widths = [("hidden_size", hidden, WIDEST_ROW), ("intermediate_size", intermediate, usize::MAX)];
        for (what, width, widest) in widths.into_iter().chain([("the size of a head", head, WIDEST_HEAD)]) {
            if width % 8 != 0 || width > widest {
                let most = if widest == usize::MAX { String::new() } else { format!(", at most {widest}") };
                let expected = format!("a multiple of 8{most} on a GPU (--device cpu takes any)");
                return Err(Error::setting(what, expected, width));
            }
        }
        Ok(Self::with(Arc::new(card), Arc::default(), arithmetic))
    }

    fn with(card: Arc<C>, taken: Arc<Taken>, arithmetic: Arithmetic) -> Self {
        let pool = Pool::new(card.clone(), taken);
        Cuda {
            queue: Mutex::new(Queue::new(card.clone(), pool.clone())),
            card,
            pool,
            arithmetic,
            room: 0,
            batch: Arc::new(Batch::new()),
            lists: None,
            dropout: Dropout::NONE,
            in_pass: false,
            writer: Writer::default(),
            numbers: PhantomData,
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue<C>> {
        // What a panic left in the queue runs before what comes next, over memory that nobody reads any more.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self) -> &Lists<C> {
        self.lists.as_ref().expect("a pass begins before its ops")
    }

    fn rows(&self, space: Space) -> Rows {
        self.lists().rows(space)
    }

    /// Hands over what is queued and waits for it.
    fn wait(&self) {
        self.queue().hand_over();
        // Whatever is kept: what was handed over before may still run, and memory is given back next.
        self.pool.keep_fault(self.card.wait());
    }

    /// A buffer of any content. Where there is no memory left, free buffers go back to the card first.
    fn take(&self, bytes: usize) -> Buffer<C> {
        if let Some(buffer) = self.pool.try_take(bytes) {
            return buffer;
        }
        self.wait();
        self.pool.release();
        self.pool.take(bytes)
    }

    /// As [`Cuda::take`], of a size that differs from batch to batch.
    fn take_alike(&self, bytes: usize) -> Buffer<C> {
        self.take(self.card.size_class(bytes))
    }

    /// Adds a launch.
    fn launch(&self, kernel: &'static str, grid: [usize; 3], threads: u32, args: &[u64]) {
        self.queue().launch(kernel, grid, threads, 0, args);
    }

    /// A buffer for rows of a space, of any content.
    fn buffer(&self, space: Space, cols: usize, number: Number) -> Buffer<C> {
        let rows = match space {
            Space::Tokens => self.room,
            Space::Firsts => self.rows(space).rows,
        };
        self.take(rows * cols * bytes_of(number))
    }

    fn mat(&self, space: Space, cols: usize, number: Number) -> Mat<C> {
        let Rows { n, rows, .. } = self.rows(space);
        Mat { space, n, rows, cols, data: self.buffer(space, cols, number) }
    }

    fn stream(&self, space: Space, cols: usize) -> Stream<C> {
        Stream { wide: self.mat(space, cols, Number::F32), rounded: std::cell::OnceCell::new() }
    }

    fn act(&self, space: Space, cols: usize) -> Mat<C> {
        self.mat(space, cols, N::STORED)
    }

    /// Where a kernel that makes a stream may put its rounding, and what to keep of it: nowhere at full width.
    fn rounding(&self, space: Space, cols: usize) -> (Address, std::cell::OnceCell<Buffer<C>>) {
        if N::STORED == Number::F32 {
            return (0, std::cell::OnceCell::new());
        }
        let buffer = self.buffer(space, cols, N::STORED);
        (buffer.at(), std::cell::OnceCell::from(buffer))
    }

    /// A stream as products read it.
    fn read_by_products(&self, x: &Stream<C>) -> Address {
        if N::STORED == Number::F32 {
            return x.wide.at();
        }
        let round = || {
            let rounded = self.buffer(x.wide.space, x.wide.cols, N::STORED);
            self.each_number("round_stream", x.wide.rows * x.wide.cols, &[x.wide.at(), rounded.at()]);
            rounded
        };
        x.rounded.get_or_init(round).at()
    }

    /// Launches a kernel that has a thread a number: its arguments, then how many there are.
    fn each_number(&self, kernel: &'static str, n: usize, args: &[u64]) {
        let args: Vec<u64> = args.iter().copied().chain([n as u64]).collect();
        self.launch(kernel, [n.div_ceil(COLUMN_THREADS), 1, 1], COLUMN_THREADS as u32, &args);
    }

    /// y (m, n) = left right, or is added to.
    #[allow(clippy::too_many_arguments)]
    fn multiply(
        &self,
        (m, n, k): (usize, usize, usize),
        precision: Precision,
        left: (Address, bool),
        right: (Address, bool),
        to: Address,
        number: Number,
        accumulate: bool,
    ) {
        let side = |(at, transposed)| Side { at, transposed };
        let (left, right) = (side(left), side(right));
        self.queue().push(Command::Product(Product { m, n, k, precision, left, right, to, number, accumulate }));
    }

    /// x W' of stored rows.
    fn times(&self, rows: usize, x: Address, w: &Weight<C>, to: Address, number: Number) {
        let shape = (rows, w.n_out, w.n_in);
        self.multiply(shape, N::PRECISION, (x, false), (w.data.at(), true), to, number, false);
    }

    /// dy W of stored rows.
    fn times_back(&self, rows: usize, dy: Address, w: &Weight<C>, to: Address, number: Number, accumulate: bool) {
        let shape = (rows, w.n_in, w.n_out);
        self.multiply(shape, N::PRECISION, (dy, false), (w.data.at(), false), to, number, accumulate);
    }

    /// What a kernel is told of a site: from which draw on an element is kept, what it is multiplied by, which site.
    fn mask(&self, site: Site) -> (u32, f32, u32) {
        let row = MaskRow::new(DropoutKey::default(), site, 0, self.dropout.at(site.at));
        (row.cut(), row.scale() as f32, site.layer << 4 | site.at as u32)
    }

    fn activation(&self) -> u32 {
        match self.arithmetic.activation {
            Activation::Gelu => 0,
            Activation::GeluTanh => 1,
            Activation::Relu => 2,
        }
    }

    /// Writes values at full width to memory that is new: at once, or, in a pass, when its turn comes.
    fn put(&self, to: &Buffer<C>, bytes: &[u8]) {
        if self.in_pass {
            return self.queue().upload(to.at(), bytes);
        }
        // What is queued may still use this memory.
        self.wait();
        if !self.pool.is_faulty() {
            self.pool.keep_fault(self.card.write(to.at(), bytes));
        }
    }

    /// A buffer that holds values as activations are stored.
    fn stored(&self, values: &[f32]) -> Buffer<C> {
        let buffer = self.take(values.len() * bytes_of(N::STORED));
        self.put(&buffer, &to_bytes(values, N::STORED));
        buffer
    }

    /// Bytes of a buffer, after all that is queued; zeros where an error is kept.
    fn bytes(&self, at: Address, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        self.queue().hand_over();
        if !self.pool.is_faulty() {
            self.pool.keep_fault(self.card.read(at, &mut bytes));
        }
        bytes
    }

    fn numbers(&self, at: Address, n: usize, number: Number) -> Vec<f32> {
        from_bytes(&self.bytes(at, n * bytes_of(number)), number)
    }
}

/// Threads of a block in kernels with a thread a column or a number.
const COLUMN_THREADS: usize = 128;

impl<C: Card, N: Numbers> Device for Cuda<C, N> {
    type Stream = Stream<C>;
    type Act = Mat<C>;
    type Rows = Mat<C>;
    type Weight = Weight<C>;
    type Table = Table<C>;
    type Params = Vectors<C>;
    type Index = Index<C>;

    const STREAM_BYTES: usize = size_of::<f32>();
    const ACT_BYTES: usize = bytes_of(N::STORED);

    fn size_class(tokens: usize, sequences: usize) -> (usize, usize) {
        size_class(tokens, sequences)
    }

    /// In the feed-forward: its input, that rounded, and f(u).
    fn running_bytes(rows: usize, hidden: usize, intermediate: usize) -> usize {
        let rounded = if N::STORED == Number::F32 { 0 } else { Self::ACT_BYTES };
        let own = hidden * (Self::STREAM_BYTES + rounded) + intermediate * Self::ACT_BYTES;
        rows * own.max(hidden * (3 * Self::STREAM_BYTES + 2 * Self::ACT_BYTES))
    }

    fn fork(&self) -> Self {
        let taken = self.pool.taken();
        match self.card.another() {
            Ok(card) => Self::with(Arc::new(card), taken, self.arithmetic),
            Err(error) => {
                // The same queue then; the fork's first pass reports why.
                let fork = Self::with(self.card.clone(), taken, self.arithmetic);
                fork.pool.keep_fault(Err(error));
                fork
            }
        }
    }

    fn run<T: Send>(&mut self, f: impl FnOnce(&mut Self) -> T + Send) -> T {
        let out = f(self);
        if !self.in_pass {
            // Other contexts may read what this one has made.
            self.wait();
        }
        out
    }

    fn begin(&mut self, batch: Arc<Batch>, dropout: Dropout) {
        // Before the new lists: so both passes of a step find the same memory.
        self.lists = None;
        let tokens = size_class(batch.n_tokens(), batch.n_sequences()).0;
        if tokens > self.room {
            self.wait();
            self.pool.release();
            self.room = tokens;
        }
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.lists = Some(self.writer.write(&batch, &*self.card, &self.pool, queue));
        self.batch = batch;
        self.dropout = dropout;
        self.in_pass = true;
    }

    fn finish(&mut self) -> Result<()> {
        self.wait();
        self.in_pass = false;
        self.pool.take_fault()
    }

    fn release(&mut self) {
        self.wait();
        self.lists = None;
        self.pool.release();
        self.room = 0;
    }

    fn settle(&self) {}

    fn peak_bytes(&self) -> usize {
        self.pool.peak_bytes()
    }

    fn memory(&self) -> Option<MemoryUse> {
        Some(self.pool.memory())
    }

    fn weight(&self, n_out: usize, n_in: usize, values: Vec<f32>) -> Weight<C> {
        assert_eq!(values.len(), n_out * n_in, "a weight has out * in values");
        Weight { n_out, n_in, data: self.stored(&values) }
    }

    fn prepare_backward(&self, _: &Weight<C>) {}

    fn table(&self, width: usize, values: Vec<f32>) -> Table<C> {
        assert_eq!(values.len() % width, 0, "a table has whole rows");
        Table { width, len: values.len(), data: self.stored(&values) }
    }

    fn params(&self, rows: usize, values: Vec<f32>) -> Vectors<C> {
        assert_eq!(values.len() % rows, 0, "vectors are of one length");
        let data = self.take_alike(values.len() * size_of::<f32>());
        self.put(&data, bytemuck::cast_slice(&values));
        Vectors { rows, n: values.len() / rows, data }
    }

    fn zeros(&self, rows: usize, n: usize) -> Vectors<C> {
        self.params(rows, vec![0.0; rows * n])
    }

    fn index(&self, positions: &[u64]) -> Index<C> {
        let data = self.take(size_of_val(positions));
        self.put(&data, bytemuck::cast_slice(positions));
        Index { n: positions.len(), data }
    }

    fn clear(&mut self, p: &mut Vectors<C>) {
        self.queue().add_zeros(p.at(), p.rows * p.n);
    }

    fn visit_weight(&self, w: &Weight<C>, visit: &mut dyn FnMut(&[u8])) {
        visit(&self.bytes(w.data.at(), w.n_out * w.n_in * bytes_of(N::STORED)));
    }

    fn visit_table(&self, t: &Table<C>, visit: &mut dyn FnMut(&[u8])) {
        visit(&self.bytes(t.data.at(), t.len * bytes_of(N::STORED)));
    }

    fn read_params(&self, p: &Vectors<C>) -> Vec<f32> {
        self.numbers(p.at(), p.rows * p.n, Number::F32)
    }

    fn read_rows(&self, r: &Mat<C>) -> Vec<f64> {
        self.numbers(r.at(), r.n * r.cols, Number::F32).into_iter().map(f64::from).collect()
    }

    fn read_stream(&self, s: &Stream<C>) -> Vec<f32> {
        self.numbers(s.wide.at(), s.wide.n * s.wide.cols, Number::F32)
    }

    fn read_act(&self, a: &Mat<C>) -> Vec<f32> {
        self.numbers(a.at(), a.n * a.cols, N::STORED)
    }
}
