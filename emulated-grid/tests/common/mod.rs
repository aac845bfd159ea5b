//! What the tests share: memory that is freed, and short ways to launch.
#![allow(dead_code)]

use emulated_grid::*;

pub const ORDERS: [Order; 4] = [Order::Forward, Order::Backward, Order::Shuffled(1), Order::Shuffled(2)];

/// An allocation, freed in the end.
pub struct Buffer {
    pub at: u64,
    bytes: usize,
}

/// What lies in memory as its bytes: any bits are a value.
pub trait Plain: Copy {
    fn from_bytes(bytes: &[u8]) -> Self;
    fn put(&self, bytes: &mut Vec<u8>);
}

macro_rules! plain {
    ($($number:ty)*) => {
        $(impl Plain for $number {
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_ne_bytes(bytes.try_into().unwrap())
            }
            fn put(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_ne_bytes());
            }
        })*
    };
}
plain!(u8 u16 u32 u64 i32 f32);

impl<T: Plain, const N: usize> Plain for [T; N] {
    fn from_bytes(bytes: &[u8]) -> Self {
        std::array::from_fn(|i| T::from_bytes(&bytes[i * size_of::<T>()..][..size_of::<T>()]))
    }
    fn put(&self, bytes: &mut Vec<u8>) {
        self.iter().for_each(|v| v.put(bytes));
    }
}

impl Buffer {
    pub fn unset(bytes: usize) -> Self {
        Buffer { at: allocate(bytes), bytes }
    }

    pub fn of<T: Plain>(values: &[T]) -> Self {
        let mut bytes = Vec::new();
        values.iter().for_each(|v| v.put(&mut bytes));
        let buffer = Buffer::unset(bytes.len());
        write(buffer.at, &bytes);
        buffer
    }

    pub fn read<T: Plain>(&self) -> Vec<T> {
        let mut bytes = vec![0; self.bytes];
        read(self.at, &mut bytes);
        bytes.chunks(size_of::<T>()).map(T::from_bytes).collect()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        free(self.at);
    }
}

pub fn run(kernel: &str, blocks: u32, threads: u32, shared: u32, args: &[u64], order: Order) -> Result<(), String> {
    launch(Variant::Tests, kernel, [blocks, 1, 1], threads, shared, args, order)
}

/// The error of a warp.
pub fn error(kernel: &str, args: &[u64]) -> String {
    run(kernel, 1, 32, 0, args, Order::Forward).unwrap_err()
}

/// The line of the test kernels that ends with this comment.
pub fn line(comment: &str) -> u32 {
    let found: Vec<usize> = include_str!("../kernels.cu")
        .lines()
        .enumerate()
        .filter(|(_, line)| line.ends_with(&format!("// {comment}")))
        .map(|(i, _)| i + 1)
        .collect();
    let [line] = found[..] else { panic!("{comment}: lines {found:?}") };
    line as u32
}
