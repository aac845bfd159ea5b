//! Buffers on a card, and the pool they come from and go back to.
//!
//! Among free buffers of a size the lowest address is taken, so that a step that asks for the same sizes in the same
//! order as the one before gets the same addresses: its commands are then equal, and a graph made of them runs again.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::card::{Address, Card};
use crate::device::batch::Space;
use crate::device::ops::MemoryUse;
use crate::error::{Error, Result};

struct State {
    free: HashMap<usize, BTreeSet<Address>>,
    live: usize,
    peak: usize,
    /// The first error, kept until somebody asks.
    fault: Option<Error>,
}

/// What all pools of a card have taken of its memory, in bytes.
#[derive(Default)]
pub struct Taken {
    now: AtomicUsize,
    peak: AtomicUsize,
}

struct Shared<C: Card> {
    card: Arc<C>,
    taken: Arc<Taken>,
    state: Mutex<State>,
}

impl<C: Card> Shared<C> {
    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        let at = self.card.allocate(bytes)?;
        if at.is_some() {
            let now = self.taken.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
            self.taken.peak.fetch_max(now, Ordering::Relaxed);
        }
        Ok(at)
    }

    fn give_back(&self, free: &mut HashMap<usize, BTreeSet<Address>>) {
        for (bytes, free) in free.drain() {
            self.taken.now.fetch_sub(bytes * free.len(), Ordering::Relaxed);
            free.into_iter().for_each(|at| self.card.free(at));
        }
    }
}

impl<C: Card> Drop for Shared<C> {
    fn drop(&mut self) {
        let mut free = std::mem::take(&mut self.state.get_mut().unwrap_or_else(PoisonError::into_inner).free);
        self.give_back(&mut free);
    }
}

/// Free buffers by size. Clones share them.
pub struct Pool<C: Card>(Arc<Shared<C>>);

impl<C: Card> Clone for Pool<C> {
    fn clone(&self) -> Self {
        Pool(self.0.clone())
    }
}

impl<C: Card> Pool<C> {
    /// An empty pool of a card's memory; `taken` is the card's.
    pub fn new(card: Arc<C>, taken: Arc<Taken>) -> Self {
        let state = State { free: HashMap::new(), live: 0, peak: 0, fault: None };
        Pool(Arc::new(Shared { card, taken, state: Mutex::new(state) }))
    }

    /// What all pools of the card have taken.
    pub fn taken(&self) -> Arc<Taken> {
        self.0.taken.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the lists whole: they change in single steps.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of any content; `None` where there is no memory left.
    pub fn try_take(&self, bytes: usize) -> Option<Buffer<C>> {
        let bytes = bytes.max(16);
        let mut state = self.state();
        let at = match state.free.get_mut(&bytes).and_then(BTreeSet::pop_first) {
            Some(at) => at,
            None => match self.0.allocate(bytes) {
                Ok(at) => at?,
                Err(error) => {
                    state.fault.get_or_insert(error);
                    0
                }
            },
        };
        if at != 0 {
            state.live += bytes;
            state.peak = state.peak.max(state.live);
        }
        drop(state);
        Some(Buffer { at, bytes, pool: self.clone() })
    }

    /// As [`Pool::try_take`]. Where there is no memory left, the buffer lies nowhere and the error is kept: nothing that
    /// is handed over runs from then on, until [`Pool::take_fault`].
    pub fn take(&self, bytes: usize) -> Buffer<C> {
        self.try_take(bytes).unwrap_or_else(|| {
            let mut state = self.state();
            let [live, free, asked] = [state.live, self.0.card.free_bytes(), bytes].map(|n| n as f64 / 1e9);
            let name = self.0.card.name();
            state.fault.get_or_insert(Error::Device(format!(
                "{name} has no memory left: {asked:.3} GB were asked for beside {live:.3} GB in use here, and {free:.3} \
                 GB are free; take smaller batches, or free the card of others' work"
            )));
            drop(state);
            Buffer { at: 0, bytes, pool: self.clone() }
        })
    }

    /// Keeps an error, unless there is one already.
    pub fn keep_fault(&self, result: Result<()>) {
        if let Err(error) = result {
            self.state().fault.get_or_insert(error);
        }
    }

    /// Whether an error is kept.
    pub fn is_faulty(&self) -> bool {
        self.state().fault.is_some()
    }

    /// The kept error; the pool is as good as new then.
    pub fn take_fault(&self) -> Result<()> {
        self.state().fault.take().map_or(Ok(()), Err)
    }

    /// Gives free buffers back to the card. No work that is yet to run may use them.
    pub fn release(&self) {
        self.0.give_back(&mut self.state().free);
    }

    /// The card's memory.
    pub fn memory(&self) -> MemoryUse {
        let own: usize = self.state().free.iter().map(|(bytes, free)| bytes * free.len()).sum();
        let [taken, peak] = [&self.0.taken.now, &self.0.taken.peak].map(|n| n.load(Ordering::Relaxed));
        MemoryUse { taken, peak, available: self.0.card.free_bytes() + own }
    }

    /// The most bytes in use at once so far.
    pub fn peak_bytes(&self) -> usize {
        self.state().peak
    }
}

/// Memory on loan from a pool.
pub struct Buffer<C: Card> {
    at: Address,
    bytes: usize,
    pool: Pool<C>,
}

impl<C: Card> Buffer<C> {
    /// Where it lies.
    pub fn at(&self) -> Address {
        self.at
    }
}

impl<C: Card> Drop for Buffer<C> {
    fn drop(&mut self) {
        if self.at != 0 {
            let mut state = self.pool.state();
            state.live -= self.bytes;
            state.free.entry(self.bytes).or_default().insert(self.at);
        }
    }
}

/// A matrix of activations, row-major. Its rows are those of the batch, then rows of zeros up to the size class.
pub struct Mat<C: Card> {
    /// Which rows these are.
    pub space: Space,
    /// Rows of the batch.
    pub n: usize,
    /// Rows in all.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The values.
    pub data: Buffer<C>,
}

impl<C: Card> Mat<C> {
    /// Where it lies.
    pub fn at(&self) -> Address {
        self.data.at()
    }
}

/// The residual stream, and its values as a product reads them, where that is another number and somebody made them.
pub struct Stream<C: Card> {
    /// f32.
    pub wide: Mat<C>,
    /// Rounded.
    pub rounded: std::cell::OnceCell<Buffer<C>>,
}

/// Vectors, one a group or one for all.
pub struct Vectors<C: Card> {
    /// 1 or G.
    pub rows: usize,
    /// Length of each.
    pub n: usize,
    /// The values, f32, row-major.
    pub data: Buffer<C>,
}

impl<C: Card> Vectors<C> {
    /// Where they lie.
    pub fn at(&self) -> Address {
        self.data.at()
    }

    /// Where the vector of group `g` lies, or the one that all share.
    pub fn of(&self, g: usize) -> Address {
        let g = if self.rows == 1 { 0 } else { g };
        self.at() + (g * self.n * size_of::<f32>()) as u64
    }

    /// From one group's vector to the next's, in numbers: none where all share one.
    pub fn stride(&self) -> usize {
        if self.rows == 1 { 0 } else { self.n }
    }
}

/// A weight of a linear layer, (out, in), as it lay in the checkpoint: a product reads it either way.
pub struct Weight<C: Card> {
    /// Output features.
    pub n_out: usize,
    /// Input features.
    pub n_in: usize,
    /// The values, as activations are stored.
    pub data: Buffer<C>,
}

/// An embedding table.
pub struct Table<C: Card> {
    /// Columns.
    pub width: usize,
    /// Values in all.
    pub len: usize,
    /// The values, as activations are stored.
    pub data: Buffer<C>,
}

/// Flat positions.
pub struct Index<C: Card> {
    /// How many.
    pub n: usize,
    /// The positions, 64 bits each.
    pub data: Buffer<C>,
}
