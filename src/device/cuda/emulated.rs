//! A card that is a grid emulated on the CPU, so that kernels and what launches them are tested without a GPU.
//!
//! Memory ends at guard pages and is filled with NaN; products are plain loops. Bugs can be planted: a barrier taken
//! out, arguments in another order, a smaller grid.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use emulated_grid::{Order, Variant};

use super::card::{Address, Card, Command, Commands, Launch, Number, Precision, Product, Side};
use super::{bytes_of, from_bytes, to_bytes};
use crate::error::{Error, Result};

/// What is done to a launch before it runs.
pub(crate) type Tamper = fn(&mut Launch, &mut Vec<u64>);

/// How launches run; shared by all queues of a card.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conditions {
    /// The order of threads and blocks.
    pub order: Order,
    /// A planted bug.
    pub tamper: Option<Tamper>,
    /// Bytes of memory.
    pub memory: usize,
}

impl Default for Conditions {
    fn default() -> Self {
        Conditions { order: Order::Forward, tamper: None, memory: 1 << 30 }
    }
}

/// The emulated card.
pub(crate) struct Emulated {
    variant: Variant,
    conditions: Arc<Mutex<Conditions>>,
    /// What is taken of the memory, by address.
    taken: Arc<Mutex<HashMap<Address, usize>>>,
    /// A hash of each list of commands that was handed over, to whichever queue.
    handed_over: Arc<Mutex<Vec<u64>>>,
}

impl Emulated {
    /// A card whose kernels compute in a precision.
    pub fn new(precision: Precision) -> Self {
        let variant = match precision {
            Precision::F32 => Variant::F32,
            Precision::Tf32 => Variant::Tf32,
            Precision::Bf16 => Variant::Bf16,
        };
        Emulated { variant, conditions: Arc::default(), taken: Arc::default(), handed_over: Arc::default() }
    }

    /// How launches run from now on.
    pub fn conditions(&self) -> Arc<Mutex<Conditions>> {
        self.conditions.clone()
    }

    /// What is taken of the memory, by address.
    pub fn taken(&self) -> Arc<Mutex<HashMap<Address, usize>>> {
        self.taken.clone()
    }

    /// What was handed over so far.
    pub fn handed_over(&self) -> Arc<Mutex<Vec<u64>>> {
        self.handed_over.clone()
    }

    fn launch(&self, launch: &Launch, args: &[u64]) -> Result<()> {
        let Conditions { order, tamper, .. } = *self.conditions.lock().unwrap();
        let (mut launch, mut args) = (*launch, args.to_vec());
        if let Some(tamper) = tamper {
            tamper(&mut launch, &mut args);
        }
        let Launch { kernel, grid, threads, shared, .. } = launch;
        emulated_grid::launch(self.variant, kernel, grid, threads, shared, &args, order)
            .map_err(|why| Error::Device(format!("{kernel}: {why}")))
    }
}

fn values(at: Address, n: usize, number: Number) -> Vec<f32> {
    let mut bytes = vec![0; n * bytes_of(number)];
    emulated_grid::read(at, &mut bytes);
    from_bytes(&bytes, number)
}

/// 10 bits of fraction, ties away from zero.
fn tf32(x: f32) -> f32 {
    f32::from_bits(x.to_bits().wrapping_add(0x1000) & 0xffff_e000)
}

fn multiply(p: &Product) {
    let stored = if p.precision == Precision::Bf16 { Number::Bf16 } else { Number::F32 };
    let side = |side: Side, rows: usize, cols: usize| {
        let mut all = values(side.at, rows * cols, stored);
        if p.precision == Precision::Tf32 {
            all.iter_mut().for_each(|x| *x = tf32(*x));
        }
        move |i: usize, j: usize| if side.transposed { all[j * rows + i] } else { all[i * cols + j] }
    };
    let (left, right) = (side(p.left, p.m, p.k), side(p.right, p.k, p.n));
    let before = if p.accumulate { values(p.to, p.m * p.n, p.number) } else { vec![0.0; p.m * p.n] };
    let sum = |i: usize, j: usize| (0..p.k).fold(0f32, |sum, k| left(i, k).mul_add(right(k, j), sum));
    let y: Vec<f32> = before.iter().enumerate().map(|(at, before)| before + sum(at / p.n, at % p.n)).collect();
    emulated_grid::write(p.to, &to_bytes(&y, p.number));
}

impl Card for Emulated {
    fn another(&self) -> Result<Self> {
        let (conditions, taken, handed_over) = (self.conditions.clone(), self.taken.clone(), self.handed_over.clone());
        Ok(Emulated { variant: self.variant, conditions, taken, handed_over })
    }

    fn name(&self) -> String {
        "emulated grid".to_string()
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        if bytes > self.free_bytes() {
            return Ok(None);
        }
        let at = emulated_grid::allocate(bytes);
        self.taken.lock().unwrap().insert(at, bytes);
        Ok(Some(at))
    }

    /// Every buffer ends where it says, so that a read past its end is seen.
    fn size_class(&self, bytes: usize) -> usize {
        bytes
    }

    fn free(&self, at: Address) {
        self.taken.lock().unwrap().remove(&at);
        emulated_grid::free(at);
    }

    fn free_bytes(&self) -> usize {
        self.conditions.lock().unwrap().memory - self.taken.lock().unwrap().values().sum::<usize>()
    }

    fn write(&self, to: Address, bytes: &[u8]) -> Result<()> {
        emulated_grid::write(to, bytes);
        Ok(())
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        emulated_grid::read(from, bytes);
        Ok(())
    }

    fn submit(&self, place: Address, constants: &[u8], commands: &Commands) -> Result<()> {
        let mut hasher = DefaultHasher::new();
        commands.hash(&mut hasher);
        self.handed_over.lock().unwrap().push(hasher.finish());
        if !constants.is_empty() {
            emulated_grid::write(place, constants);
        }
        for command in &commands.list {
            match command {
                Command::Launch(launch) => self.launch(launch, commands.args_of(launch))?,
                Command::Product(product) => multiply(product),
                Command::Copy { to, from, bytes } => emulated_grid::copy(*to, *from, *bytes),
            }
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }
}
