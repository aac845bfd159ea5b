//! What a context has been told and not yet handed over: commands, and the constants that they read.
//!
//! The optimizer's work comes tensor by tensor; what follows one another of a kind is put together into one launch.

use std::sync::Arc;

use super::card::{Address, Card, Command, Commands, Launch};
use super::memory::{Buffer, Pool};

/// Bytes of constants that one handing over may have.
const CONSTANTS: usize = 8 << 20;
/// Numbers of a chunk of a tensor, `CHUNK` in `optimizer.cu`.
const CHUNK: usize = 4096;
/// Threads of a block there.
const OPTIMIZER_THREADS: u32 = 256;
/// Tensors that one launch takes, so that their descriptions fit the constants.
const MOST_TENSORS: usize = 1 << 14;

/// An argument of a kernel, in the eight bytes that it is handed over in.
pub trait Argument {
    /// The bytes, low first.
    fn slot(self) -> u64;
}

impl Argument for u64 {
    fn slot(self) -> u64 {
        self
    }
}

/// Sizes are counted in 32 or 64 bits, as the kernel has it; positions stay below 2^31.
impl Argument for usize {
    fn slot(self) -> u64 {
        self as u64
    }
}

impl Argument for u32 {
    fn slot(self) -> u64 {
        u64::from(self)
    }
}

impl Argument for f32 {
    fn slot(self) -> u64 {
        u64::from(self.to_bits())
    }
}

/// Arguments of a launch, as [`Argument`]s.
macro_rules! args {
    ($($argument:expr),* $(,)?) => { &[$($crate::device::cuda::queue::Argument::slot($argument)),*] };
}
pub(super) use args;

/// Numbers that lie one behind the other, `Numbers` in `optimizer.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Numbers {
    /// Where they lie.
    pub at: Address,
    /// How many.
    pub n: u64,
}

/// A tensor of one group to step, `Step` in `optimizer.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[allow(missing_docs)]
pub struct Step {
    pub base: Address,
    pub gradient: Address,
    pub squares: Address,
    pub delta: Address,
    pub m: Address,
    pub v: Address,
    pub n: u64,
    pub max_norm: f64,
    pub b1: f32,
    pub rest1: f32,
    pub b2: f32,
    pub rest2: f32,
    pub rate: f32,
    pub root: f32,
    pub decay: f32,
    pub epsilon: f32,
}

/// A vector to put in use, `Sum` in `optimizer.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[allow(missing_docs)]
pub struct Sum {
    pub base: Address,
    pub delta: Address,
    /// Positions in `into`; 0 where it is all of it.
    pub at: Address,
    pub into: Address,
    pub n: u64,
}

/// Work of one kind that is being put together.
enum Pending {
    Nothing,
    /// Squared norms, added to the sums at an address, a group each.
    Squares {
        sums: Address,
        groups: usize,
        of: Vec<(usize, Numbers)>,
    },
    Steps(Vec<Step>),
    Sums(Vec<Sum>),
    /// Vectors to set to zero.
    Zeros(Vec<Numbers>),
}

/// Commands and constants, in the making.
pub struct Queue<C: Card> {
    card: Arc<C>,
    pool: Pool<C>,
    commands: Commands,
    constants: Vec<u8>,
    place: Option<Buffer<C>>,
    pending: Pending,
}

impl<C: Card> Queue<C> {
    /// An empty queue.
    pub fn new(card: Arc<C>, pool: Pool<C>) -> Self {
        Queue {
            card,
            pool,
            commands: Commands::default(),
            constants: Vec::new(),
            place: None,
            pending: Pending::Nothing,
        }
    }

    /// Adds a launch of `threads` threads a block.
    pub fn launch(&mut self, kernel: &'static str, grid: [usize; 3], threads: u32, shared: usize, args: &[u64]) {
        self.settle();
        self.add_launch(kernel, grid, threads, shared, args);
    }

    fn add_launch(&mut self, kernel: &'static str, grid: [usize; 3], threads: u32, shared: usize, args: &[u64]) {
        if grid.contains(&0) {
            return;
        }
        let first = self.commands.args.len() as u32;
        self.commands.args.extend_from_slice(args);
        let (grid, shared, args) = (grid.map(|n| n as u32), shared as u32, (first, args.len() as u32));
        self.commands.list.push(Command::Launch(Launch { kernel, grid, threads, shared, args }));
    }

    /// Adds any other command.
    pub fn push(&mut self, command: Command) {
        self.settle();
        self.commands.list.push(command);
    }

    /// Makes room for constants that one launch reads: hands over what there is, where they would not fit beside it.
    pub fn reserve(&mut self, bytes: usize) {
        self.settle();
        assert!(bytes + 256 <= CONSTANTS, "constants of one launch fit");
        if self.constants.len() + bytes + 256 > CONSTANTS {
            self.hand_over();
        }
    }

    /// Puts constants where the commands that follow can read them, 16 bytes aligned. Room for all that one launch
    /// reads is reserved before.
    pub fn constants(&mut self, bytes: &[u8]) -> Address {
        let at = self.constants.len().next_multiple_of(16);
        assert!(at + bytes.len() <= CONSTANTS, "room was reserved");
        self.constants.resize(at, 0);
        self.constants.extend_from_slice(bytes);
        // One that there was no memory for is asked for again.
        self.place = self.place.take().filter(|place| place.at() != 0);
        let place = self.place.get_or_insert_with(|| self.pool.take(CONSTANTS));
        place.at() + at as u64
    }

    /// As [`Queue::constants`], of plain data, with its room.
    pub fn values<T: bytemuck::Pod>(&mut self, values: &[T]) -> Address {
        let bytes = bytemuck::cast_slice(values);
        self.reserve(bytes.len());
        self.constants(bytes)
    }

    /// Writes bytes to a place by way of the constants, in pieces that fit.
    pub fn upload(&mut self, to: Address, bytes: &[u8]) {
        const PIECE: usize = CONSTANTS / 2;
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            self.reserve(piece.len());
            let from = self.constants(piece);
            self.push(Command::Copy { to: to + (i * PIECE) as u64, from, bytes: piece.len() });
        }
    }

    /// Asks for a squared norm to be added to the group's sum.
    pub fn add_square(&mut self, sums: Address, groups: usize, g: usize, gradient: Numbers) {
        match &mut self.pending {
            Pending::Squares { sums: to, of, .. } if *to == sums => of.push((g, gradient)),
            _ => {
                self.settle();
                self.pending = Pending::Squares { sums, groups, of: vec![(g, gradient)] };
            }
        }
    }

    /// Asks for a step.
    pub fn add_step(&mut self, step: Step) {
        if let Pending::Steps(steps) = &mut self.pending {
            return steps.push(step);
        }
        self.settle();
        self.pending = Pending::Steps(vec![step]);
    }

    /// Asks for a vector to be put in use.
    pub fn add_sum(&mut self, sum: Sum) {
        if let Pending::Sums(sums) = &mut self.pending {
            return sums.push(sum);
        }
        self.settle();
        self.pending = Pending::Sums(vec![sum]);
    }

    /// Asks for numbers to be set to zero.
    pub fn add_zeros(&mut self, at: Address, n: usize) {
        let zeros = Numbers { at, n: n as u64 };
        if let Pending::Zeros(all) = &mut self.pending {
            return all.push(zeros);
        }
        self.settle();
        self.pending = Pending::Zeros(vec![zeros]);
    }

    /// Turns what is being put together into launches.
    fn settle(&mut self) {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Nothing => {}
            Pending::Squares { sums, groups, mut of } => {
                // Group by group, and within one in the order of the tensors: a sum has one order whoever is beside.
                of.sort_by_key(|(g, _)| *g);
                whole_groups(&of).for_each(|of| self.square(sums, groups, of));
            }
            Pending::Steps(steps) => self.by_chunk("adamw", &steps, |step| step.n),
            Pending::Sums(sums) => self.by_chunk("add_deltas", &sums, |sum| sum.n),
            Pending::Zeros(zeros) => self.by_chunk("clear_vectors", &zeros, |zeros| zeros.n),
        }
    }

    fn square(&mut self, sums: Address, groups: usize, of: &[(usize, Numbers)]) {
        let gradients: Vec<Numbers> = of.iter().map(|(_, gradient)| *gradient).collect();
        let chunks = chunks(gradients.iter().map(|gradient| gradient.n));
        let mut first = vec![0u32; groups + 1];
        for chunk in &chunks {
            first[of[chunk[0] as usize].0 + 1] += 1;
        }
        for g in 0..groups {
            first[g + 1] += first[g];
        }
        let partial = self.pool.take(chunks.len() * size_of::<f32>());
        self.reserve(size_of_val(&gradients[..]) + size_of_val(&chunks[..]) + size_of_val(&first[..]) + 64);
        let [gradients, of_chunks, first] = [
            self.constants(bytemuck::cast_slice(&gradients)),
            self.constants(bytemuck::cast_slice(&chunks)),
            self.constants(bytemuck::cast_slice(&first)),
        ];
        let grid = [chunks.len(), 1, 1];
        self.add_launch("square_chunks", grid, OPTIMIZER_THREADS, 0, args![gradients, of_chunks, partial.at()]);
        self.add_launch("add_squares", [groups, 1, 1], 32, 0, args![partial.at(), first, sums]);
    }

    fn by_chunk<T: bytemuck::Pod>(&mut self, kernel: &'static str, all: &[T], n: impl Fn(&T) -> u64) {
        for all in all.chunks(MOST_TENSORS) {
            let chunks = chunks(all.iter().map(&n));
            self.reserve(size_of_val(all) + size_of_val(&chunks[..]) + 64);
            let all = self.constants(bytemuck::cast_slice(all));
            let of_chunks = self.constants(bytemuck::cast_slice(&chunks));
            self.add_launch(kernel, [chunks.len(), 1, 1], OPTIMIZER_THREADS, 0, args![all, of_chunks]);
        }
    }

    /// Hands all over to the card, unless an error is kept.
    pub fn hand_over(&mut self) {
        self.settle();
        if !self.commands.list.is_empty() && !self.pool.is_faulty() {
            let place = self.place.as_ref().map_or(0, Buffer::at);
            let done = self.card.submit(place, &self.constants, &self.commands);
            self.pool.keep_fault(done);
        }
        self.commands.clear();
        self.constants.clear();
    }
}

/// Every tensor in chunks: which tensor, and the chunk's first number.
fn chunks(lengths: impl Iterator<Item = u64>) -> Vec<[u32; 2]> {
    let of = |(i, n): (usize, u64)| (0..n).step_by(CHUNK).map(move |first| [i as u32, first as u32]);
    lengths.enumerate().flat_map(of).collect()
}

/// Parts of at most so many tensors as one launch takes, which cut no group unless it alone has more.
fn whole_groups(mut rest: &[(usize, Numbers)]) -> impl Iterator<Item = &[(usize, Numbers)]> {
    std::iter::from_fn(move || {
        let n = match rest.get(MOST_TENSORS) {
            None => rest.len(),
            Some((next, _)) => match rest.partition_point(|(g, _)| g < next) {
                0 => MOST_TENSORS,
                first_of_next => first_of_next,
            },
        };
        let (part, others) = rest.split_at(n);
        rest = others;
        (n > 0).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_cut_where_they_end() {
        let of = |sizes: &[usize]| {
            let groups = sizes.iter().enumerate().flat_map(|(g, n)| vec![(g, Numbers { at: 0, n: 1 }); *n]);
            let all: Vec<_> = groups.collect();
            whole_groups(&all).map(<[_]>::len).collect::<Vec<_>>()
        };
        let most = MOST_TENSORS;
        assert_eq!(of(&[]), [0; 0]);
        assert_eq!(of(&[5, most - 5]), [most]);
        assert_eq!(of(&[5, most - 5, 1]), [most, 1]);
        assert_eq!(of(&[5, most, 1]), [5, most, 1]);
        assert_eq!(of(&[most + 7, 3]), [most, 10]);
    }
}
