//! A product whose right side was packed once, and the blocks it is cut into.
//!
//! The right side lies in panels of a tile's columns, each step after step, so that a tile reads it from front to back.
//! The left side is made row by row by whoever asks for the product (read, activated, rounded, quantised), into scratch,
//! in blocks of rows that fit into the second cache. Finished rows are handed over while they lie in the first.
//!
//! The cut into blocks, of rows where there are many and of columns where there are few, changes no entry's arithmetic.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::super::lines::{Element, Lines, prefetch, with_scratch};
use super::super::simd::Arch;
use super::tile::{Left, Tile};

/// Steps of the inner dimension that a tile runs at a time: their part of a panel stays in the second cache.
const STEPS: usize = 768;
/// Bytes of a block's left side: what a second cache of 1 MiB holds. Half of it was slower (105 against 111 of 115
/// GFLOP/s a thread at 3,072 steps, AMD Zen 4): a panel is then fetched for too few tiles.
const LEFT_BYTES: usize = 1 << 20;
/// Columns that are finished at a time: enough to outweigh the call, and few enough that their sums stay near.
const GROUP: usize = 256;
/// Elements that a prepared row has behind its steps.
const BESIDES: usize = 2;
/// Tiles of a block: enough to outweigh fetching the panel that they share.
const TILES: usize = 12;
/// Rows a thread from which on rows are shared out, and every thread reads the whole right side: with fewer, reading it
/// takes longer than multiplying.
const ROWS: usize = 22;

/// A right side, (steps, columns).
pub struct Panels<B> {
    steps: usize,
    cols: usize,
    width: usize,
    data: Lines<B>,
}

impl<B: Element> Panels<B> {
    /// Zeros, in panels of `width` columns.
    pub fn zeros(steps: usize, cols: usize, width: usize) -> Self {
        Panels { steps, cols, width, data: Lines::zeros(cols.div_ceil(width) * width * steps) }
    }

    /// Replaces every value by `value(step, column)`, over the threads of the current pool.
    pub fn repack(&mut self, value: impl Fn(usize, usize) -> B + Sync) {
        let Panels { steps, cols, width, data } = self;
        data.par_chunks_mut(*steps * *width).enumerate().for_each(|(j, panel)| {
            let own = (*cols - j * *width).min(*width);
            for (k, row) in panel.chunks_mut(*width).enumerate() {
                for (c, to) in row[..own].iter_mut().enumerate() {
                    *to = value(k, j * *width + c);
                }
            }
        });
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The value of a column at a step.
    #[inline(always)]
    pub fn at(&self, step: usize, col: usize) -> B {
        self.data[self.place(step, col)]
    }

    /// The value of a column at a step.
    pub fn at_mut(&mut self, step: usize, col: usize) -> &mut B {
        let place = self.place(step, col);
        &mut self.data[place]
    }

    fn place(&self, step: usize, col: usize) -> usize {
        (col / self.width * self.steps + step) * self.width + col % self.width
    }

    /// All values as they lie.
    pub fn as_laid_out(&self) -> &[B] {
        &self.data
    }

    /// All of it, to multiply by.
    pub fn view(&self) -> PanelsView<'_, B> {
        PanelsView { steps: self.steps, cols: self.cols, width: self.width, data: &self.data }
    }
}

/// A right side in panels, wherever it lies.
#[derive(Clone, Copy)]
pub struct PanelsView<'b, B> {
    /// Steps.
    pub steps: usize,
    /// Columns.
    pub cols: usize,
    /// Columns of a panel.
    pub width: usize,
    /// Panel after panel, the last one padded.
    pub data: &'b [B],
}

impl<B> PanelsView<'_, B> {
    /// Another right side in panels of the same shape.
    pub fn over<C>(self, data: &[C]) -> PanelsView<'_, C> {
        assert_eq!(self.data.len(), data.len(), "panels of the same shape");
        PanelsView { steps: self.steps, cols: self.cols, width: self.width, data }
    }

    /// Steps `steps` of panel `j`.
    #[inline(always)]
    fn part(&self, j: usize, steps: Range<usize>) -> &[B] {
        let panel = j * self.steps;
        &self.data[(panel + steps.start) * self.width..(panel + steps.end) * self.width]
    }
}

/// Where a product's rows go: row `i` at `i * stride`.
pub struct Rows<'y, E> {
    /// From the first row on.
    pub data: &'y mut [E],
    /// Distance of two rows, at least the columns.
    pub stride: usize,
}

/// A destination that tasks write to at once, each its own rows and columns.
pub struct Shared<'y, E> {
    start: *mut E,
    len: usize,
    stride: usize,
    lifetime: PhantomData<&'y mut [E]>,
}

// SAFETY: `row` hands out what the caller promises is nobody else's.
unsafe impl<E: Send> Sync for Shared<'_, E> {}

impl<'y, E> Shared<'y, E> {
    /// Shares rows out.
    pub fn new(y: Rows<'y, E>) -> Self {
        Shared { len: y.data.len(), start: y.data.as_mut_ptr(), stride: y.stride, lifetime: PhantomData }
    }

    /// Columns of a row.
    ///
    /// # Safety
    ///
    /// Nobody else may hold these columns of this row.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, row: usize, cols: Range<usize>) -> &mut [E] {
        let first = row * self.stride + cols.start;
        assert!(cols.end <= self.stride && first + cols.len() <= self.len, "a product lies inside its destination");
        // SAFETY: the range was asserted to lie inside the slice that `Rows` borrows; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), cols.len()) }
    }

    /// Asks for columns of a row to be brought near.
    #[inline(always)]
    pub fn prefetch(&self, row: usize, cols: Range<usize>) {
        prefetch(self.start.wrapping_add(row * self.stride + cols.start), cols.len());
    }
}

/// A product of `m` rows, cut into `tiles` tiles of rows of one height, give or take a row.
struct Cut<'p, A: 'static, B: 'static, C: 'static> {
    tile: &'p Tile<A, B, C>,
    b: PanelsView<'p, B>,
    m: usize,
    tiles: usize,
    /// Elements, of four bytes, from one prepared row to the next: an odd number of lines, as at a power of two all
    /// rows would fall into the same few sets of the cache.
    ld: usize,
}

impl<A: Element, B: Element, C: Element> Cut<'_, A, B, C> {
    /// The rows of tiles `ts`.
    #[inline(always)]
    fn rows(&self, ts: &Range<usize>) -> Range<usize> {
        self.m * ts.start / self.tiles..self.m * ts.end / self.tiles
    }

    /// Panels whose columns are finished together.
    fn group(&self) -> usize {
        (GROUP / self.tile.cols).min(self.b.cols.div_ceil(self.tile.cols))
    }

    /// Elements of the sums of `rows` rows.
    fn sums(&self, rows: usize) -> usize {
        rows * self.group() * self.tile.cols
    }

    /// What a prepared row has: its steps, and what `finish` may need besides.
    fn prepared(&self) -> usize {
        self.b.steps + BESIDES
    }

    /// Tiles `ts` of panels `js`; `left` holds the rows of these tiles.
    #[inline(always)]
    fn block<E: Send>(
        &self,
        (left, sums): (&[A], &mut [C]),
        ts: Range<usize>,
        js: Range<usize>,
        y: &Shared<'_, E>,
        finish: &impl Fn(usize, usize, &mut [E], &[C], &[A]),
    ) {
        let Cut { tile, b, ld, .. } = self;
        let rows = self.rows(&ts);
        let stride = self.group() * tile.cols;
        for first in js.clone().step_by(self.group()) {
            let group = first..js.end.min(first + self.group());
            let cols = group.start * tile.cols..b.cols.min(group.end * tile.cols);
            for j in group.clone() {
                let mut k = 0;
                while k < b.steps {
                    // Even parts, so that none is a stub.
                    let parts = (b.steps - k).div_ceil(STEPS);
                    let end = k + (b.steps - k).div_ceil(parts);
                    for t in ts.clone() {
                        let own = self.rows(&(t..t + 1));
                        if j == group.start && k == 0 {
                            own.clone().for_each(|i| y.prefetch(i, cols.clone()));
                        }
                        let at = own.start - rows.start;
                        let left = Left { data: &left[at * ld + k..], row: *ld, step: 1 };
                        let sums = &mut sums[at * stride + (j - first) * tile.cols..];
                        tile.run(own.len(), end - k, left, b.part(j, k..end), (sums, stride), k == 0);
                    }
                    k = end;
                }
            }
            let prepared = left.chunks(*ld).map(|left| &left[..self.prepared()]);
            for ((i, sums), left) in rows.clone().zip(sums.chunks(stride)).zip(prepared) {
                // SAFETY: blocks have no row and column in common, and this one's rows are handed out one by one.
                let y = unsafe { y.row(i, cols.clone()) };
                finish(i, cols.start, y, &sums[..cols.len()], left);
            }
        }
    }
}

/// y = finish(prepare(rows) B) for `m` rows.
///
/// `prepare(row, to)` writes a row's steps and, behind them, two elements for `finish` where it needs any.
/// `finish(row, column, y, sums, left)`: `y` are the destination's columns from `column` on, `sums` as many sums, `left`
/// what `prepare` wrote.
pub fn multiply<A: Element, B: Element, C: Element, E: Send>(
    arch: Arch,
    (tile, b): (&Tile<A, B, C>, PanelsView<'_, B>),
    m: usize,
    y: Rows<'_, E>,
    prepare: impl Fn(usize, &mut [A]) + Sync,
    finish: impl Fn(usize, usize, &mut [E], &[C], &[A]) + Sync,
) {
    assert_eq!(b.width, tile.cols, "panels as wide as the tile");
    if m == 0 {
        return;
    }
    let y = Shared::new(y);
    let ld = (b.steps + BESIDES).next_multiple_of(32) + 16;
    let (panels, n_threads) = (b.cols.div_ceil(b.width), rayon::current_num_threads());
    let fewest = m.div_ceil(tile.rows);
    let by_rows = m >= ROWS * n_threads || panels == 1;
    // As many as divide by the threads: seven tiles of fourteen rows on two threads would leave one idle for a seventh
    // of the time.
    let tiles = if by_rows { fewest.next_multiple_of(n_threads).min(m) } else { fewest };
    let cut = Cut { tile, b, m, tiles, ld };
    if by_rows {
        // Blocks of rows, as many as divide by the threads.
        let per_block = (LEFT_BYTES / (tile.rows * ld * size_of::<A>())).clamp(1, TILES);
        let n = tiles.div_ceil(per_block).next_multiple_of(n_threads).min(tiles);
        (0..n).into_par_iter().with_max_len(1).for_each(|i| {
            let ts = tiles * i / n..tiles * (i + 1) / n;
            let rows = cut.rows(&ts);
            with_scratch(rows.len() * ld, cut.sums(rows.len()), |left: &mut [A], sums: &mut [C]| {
                arch.run(
                    (left, sums),
                    #[inline(always)]
                    |(left, sums): (&mut [A], &mut [C])| {
                        for (i, to) in rows.clone().zip(left.chunks_mut(ld)) {
                            prepare(i, &mut to[..cut.prepared()]);
                        }
                        cut.block((left, sums), ts.clone(), 0..panels, &y, &finish);
                    },
                );
            });
        });
    } else {
        // Too few rows to share out: the left side is made once, and the columns are.
        with_scratch(m * ld, 0, |left: &mut [A], _: &mut [u8]| {
            left.par_chunks_mut(ld).enumerate().for_each(|(i, to)| {
                arch.run(
                    to,
                    #[inline(always)]
                    |to: &mut [A]| prepare(i, &mut to[..cut.prepared()]),
                );
            });
            let (left, n) = (&*left, panels.min(4 * n_threads));
            (0..n).into_par_iter().with_max_len(1).for_each(|i| {
                let js = panels * i / n..panels * (i + 1) / n;
                with_scratch::<A, C, _>(0, cut.sums(m), |_, sums| {
                    arch.run(
                        sums,
                        #[inline(always)]
                        |sums: &mut [C]| cut.block((left, sums), 0..tiles, js.clone(), &y, &finish),
                    );
                });
            });
        });
    }
}
