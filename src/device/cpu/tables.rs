//! Embedding tables, (rows, hidden), read by row: at the precision that activations are stored in, or in bytes.

use bytemuck::cast_slice;

use super::bytes::{TOP, larger, quantised, scale_of};
use super::precision::Stored;
use super::real::Real;
use super::weights::Values;

/// A table, as a precision stores it.
pub trait Table<R: Real>: Values<R> + Sized + Send + Sync + 'static {
    /// Stores row-major values.
    fn pack(width: usize, values: &[R]) -> Self;
    /// Columns.
    fn width(&self) -> usize;
    /// Adds row `i` to `sums`.
    fn add_row(&self, i: usize, sums: &mut [R]);
    /// Hands all values to `visit` as they lie, for hashing.
    fn visit(&self, visit: &mut dyn FnMut(&[u8]));
}

/// Numbers as activations are stored.
pub struct Numbers<E> {
    width: usize,
    data: Vec<E>,
}

impl<R: Real, E: Stored<R>> Table<R> for Numbers<E> {
    fn pack(width: usize, values: &[R]) -> Self {
        Numbers { width, data: values.iter().map(|v| E::store(*v)).collect() }
    }

    fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    fn add_row(&self, i: usize, sums: &mut [R]) {
        for (sum, x) in sums.iter_mut().zip(&self.data[i * self.width..][..self.width]) {
            *sum += x.load();
        }
    }

    fn visit(&self, visit: &mut dyn FnMut(&[u8])) {
        visit(cast_slice(&self.data));
    }
}

impl<R: Real, E: Stored<R>> Values<R> for Numbers<E> {
    fn rewrite(&mut self, value: impl Fn(usize) -> R + Sync) {
        self.data.iter_mut().enumerate().for_each(|(at, to)| *to = E::store(value(at)));
    }

    fn set(&mut self, at: usize, value: R) {
        self.data[at] = E::store(value);
    }
}

/// Bytes with a scale a row.
pub struct Bytes {
    width: usize,
    data: Vec<i8>,
    scales: Vec<f32>,
}

impl Bytes {
    fn scale_row(&mut self, i: usize, value: impl Fn(usize) -> f32) {
        let at = i * self.width..(i + 1) * self.width;
        // What is no number makes its whole row none.
        self.scales[i] = scale_of(at.clone().fold(0.0, |most, at| larger(most, value(at))), TOP);
        let inverse = 1.0 / self.scales[i];
        for at in at {
            self.data[at] = quantised(value(at), inverse, TOP) as i8;
        }
    }
}

impl Table<f32> for Bytes {
    fn pack(width: usize, values: &[f32]) -> Self {
        let mut table = Bytes { width, data: vec![0; values.len()], scales: vec![1.0; values.len() / width] };
        table.rewrite(|at| values[at]);
        table
    }

    fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    fn add_row(&self, i: usize, sums: &mut [f32]) {
        let scale = self.scales[i];
        for (sum, q) in sums.iter_mut().zip(&self.data[i * self.width..][..self.width]) {
            *sum += f32::from(*q) * scale;
        }
    }

    fn visit(&self, visit: &mut dyn FnMut(&[u8])) {
        visit(cast_slice(&self.data));
        visit(cast_slice(&self.scales));
    }
}

impl Values<f32> for Bytes {
    fn rewrite(&mut self, value: impl Fn(usize) -> f32 + Sync) {
        for i in 0..self.scales.len() {
            self.scale_row(i, &value);
        }
    }

    fn set(&mut self, at: usize, value: f32) {
        // The row's scale stays, and bounds the value; training, which alone asks for this, does not run in bytes.
        self.data[at] = quantised(value, 1.0 / self.scales[at / self.width], TOP) as i8;
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn row<T: Table<f32>>(table: &T, i: usize) -> Vec<f32> {
        let mut sums = vec![0.0; table.width()];
        table.add_row(i, &mut sums);
        sums
    }

    #[test]
    fn bytes_are_within_half_a_step_of_their_row_and_keep_its_largest() {
        let values = [0.5, -1.27, 0.004, 0.0, 0.0, 0.0, 254.0, 3.0, -100.0, 1e-38, 1e-39, 0.0];
        let table = Bytes::pack(3, &values);
        for (i, exact) in values.chunks(3).enumerate() {
            let largest = exact.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (found, exact) in row(&table, i).iter().zip(exact) {
                assert!((found - exact).abs() <= largest / 254.0 * 1.0001 + 1e-37, "{found} {exact}");
            }
        }
        assert_eq!(row(&table, 1), [0.0; 3]);
    }

    #[test]
    fn a_row_that_holds_no_number_is_none() {
        let table = Bytes::pack(2, &[f32::NAN, 1.0, 1.0, 2.0]);
        assert!(row(&table, 0).iter().all(|x| x.is_nan()) && row(&table, 1).iter().all(|x| x.is_finite()));
    }

    #[test]
    fn values_are_replaced_where_they_are_told_to() {
        fn check<T: Table<f32>>() {
            let mut table = T::pack(2, &[1.0, 2.0, 3.0, 4.0]);
            table.set(2, 4.0);
            assert_eq!(row(&table, 1), [4.0, 4.0]);
            table.rewrite(|at| -(at as f32));
            assert_eq!(row(&table, 0), [0.0, -1.0]);
        }
        check::<Numbers<f32>>();
        check::<Numbers<bf16>>();
        check::<Bytes>();
    }
}
