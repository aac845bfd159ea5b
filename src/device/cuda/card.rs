//! What the CUDA side asks of a card: memory, and work that it does in order.
//!
//! A step is written down first, as [`Commands`], and handed over whole: so a card may keep what it has been told once
//! (a CUDA graph) and do it again when it is told the same, and tests may do it on an emulated grid instead. What
//! differs from step to step (the batch, dropout keys, learning rates) is no argument of a command: it lies in a block
//! of memory, the constants, that is written before the commands run.

use crate::error::Result;

/// A place in a card's memory, in bytes.
pub type Address = u64;

/// What kernels and products compute in: one set of kernels a precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32, by multiply-adds.
    F32,
    /// f32 numbers, products on tensor cores with 10 bits of fraction, sums in f32.
    Tf32,
    /// bf16 for what is kept or multiplied, sums and the stream in f32.
    Bf16,
}

impl Precision {
    /// All of them, in the order of the number by which kernels know them.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::Tf32, Precision::Bf16];
}

/// A number in a card's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Number {
    /// Four bytes.
    F32,
    /// Two bytes.
    Bf16,
}

/// One launch of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Its name.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, along x alone; a multiple of 32.
    pub threads: u32,
    /// Bytes of shared memory that are asked for at launch.
    pub shared: u32,
    /// Where its arguments begin in [`Commands::args`], and how many they are.
    pub args: (u32, u32),
}

/// One side of a product, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Side {
    /// Where it lies.
    pub at: Address,
    /// Whether it lies transposed.
    pub transposed: bool,
}

/// y = left right, or y + left right: left is (m, k), right (k, n), y (m, n), all row-major and without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of y.
    pub m: usize,
    /// Columns of y.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// Numbers of both sides, and how they are multiplied.
    pub precision: Precision,
    /// The left side.
    pub left: Side,
    /// The right side.
    pub right: Side,
    /// Where y lies.
    pub to: Address,
    /// What y is stored in.
    pub number: Number,
    /// Whether to add to what lies there.
    pub accumulate: bool,
}

/// One thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Run a kernel.
    Launch(Launch),
    /// Multiply.
    Product(Product),
    /// Copy bytes that do not overlap.
    Copy {
        /// To.
        to: Address,
        /// From.
        from: Address,
        /// How many.
        bytes: usize,
    },
}

/// Things to do, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Commands {
    /// The commands.
    pub list: Vec<Command>,
    /// Arguments of launches, eight bytes each: an address, or a smaller number in the low bytes.
    pub args: Vec<u64>,
}

impl Commands {
    /// The arguments of a launch.
    pub fn args_of(&self, launch: &Launch) -> &[u64] {
        &self.args[launch.args.0 as usize..][..launch.args.1 as usize]
    }

    /// Forgets all, and keeps the room.
    pub fn clear(&mut self) {
        self.list.clear();
        self.args.clear();
    }
}

/// A card, or what stands in for one. A value is one queue: its work runs in the order in which it is handed over, and
/// beside that of other queues.
pub trait Card: Send + Sync + Sized + 'static {
    /// Another queue of the same card.
    ///
    /// # Errors
    ///
    /// Where the card refuses.
    fn another(&self) -> Result<Self>;
    /// What to call it: `cuda:0 (NVIDIA H100)`.
    fn name(&self) -> String;
    /// Memory of any content, at a multiple of 256 bytes; `None` where there is not so much left.
    ///
    /// # Errors
    ///
    /// Where the card fails otherwise.
    fn allocate(&self, bytes: usize) -> Result<Option<Address>>;
    /// What sizes that differ from batch to batch are rounded up to, so that like ones are shared: an eighth of a power of
    /// two.
    fn size_class(&self, bytes: usize) -> usize {
        bytes.next_multiple_of((bytes.max(256).next_power_of_two() / 16).max(256))
    }
    /// Gives memory back, once no work uses it any more.
    fn free(&self, at: Address);
    /// Bytes that nobody has taken.
    fn free_bytes(&self) -> usize;
    /// Writes bytes, at once and before any work that is handed over later; not in the middle of earlier work.
    ///
    /// # Errors
    ///
    /// What the card reports.
    fn write(&self, to: Address, bytes: &[u8]) -> Result<()>;
    /// Waits for the queue and reads bytes.
    ///
    /// # Errors
    ///
    /// What the card reports, of earlier work too.
    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()>;
    /// Writes `constants` to their place, then does the commands; does not wait for either, and keeps neither borrowed.
    ///
    /// # Errors
    ///
    /// What the card reports.
    fn submit(&self, place: Address, constants: &[u8], commands: &Commands) -> Result<()>;
    /// Waits for the queue.
    ///
    /// # Errors
    ///
    /// What the card reports, of earlier work too.
    fn wait(&self) -> Result<()>;
}
