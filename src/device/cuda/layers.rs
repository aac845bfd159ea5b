//! What a layer is made of: products with their biases, LayerNorm, attention, and sums by group.

use super::card::{Address, Card, Number, Precision};
use super::memory::{Mat, Stream, Vectors, Weight};
use super::queue::args;
use super::{COLUMN_THREADS, Cuda, Numbers, Rows, bytes_of};
use crate::device::batch::Space;
use crate::device::ops::{Affine, Norm, Site, Sum};

/// Rows of a block that one thread of the column-wise kernels takes, `PART_ROWS` in `linear.cu`: so many parts.
const PARTS: usize = 4;
/// Threads of a row-wise kernel: a warp a row.
const NORM_THREADS: u32 = 256;
/// Threads of a block of attention.
const ATTENTION_THREADS: u32 = 128;
/// Rows of a tile of attention, and of the other side's on the way back: `attention.cu`.
const TILE: usize = 64;
const OTHER: usize = 32;

/// A stream, what was kept of its LayerNorm.
type Normed<C, N> = (Stream<C>, Norm<Cuda<C, N>>);

/// A kernel whose warps hold a row of `n` numbers, by how many times eight a lane has.
macro_rules! by_width {
    ($name:literal, $n:expr) => {
        match $n {
            ..=256 => concat!($name, "_1"),
            ..=512 => concat!($name, "_2"),
            ..=1024 => concat!($name, "_4"),
            _ => concat!($name, "_8"),
        }
    };
}
pub(super) use by_width;

/// A kernel whose tiles hold heads of `d` columns.
macro_rules! by_head {
    ($name:literal, $d:expr) => {
        if $d <= 32 { concat!($name, "_32") } else { concat!($name, "_64") }
    };
}

impl<C: Card, N: Numbers> Cuda<C, N> {
    /// Launches a kernel with a warp a row.
    pub(super) fn each_row(&self, kernel: &'static str, space: Space, args: &[u64]) {
        let rows = self.rows(space).rows;
        self.launch(kernel, [rows.div_ceil(NORM_THREADS as usize / 32), 1, 1], NORM_THREADS, args);
    }

    /// Launches a kernel with a thread a column of a block of rows; in parts where no sum runs over the block.
    pub(super) fn each_column(&self, kernel: &'static str, space: Space, n: usize, parts: usize, args: &[u64]) {
        let grid = [n.div_ceil(COLUMN_THREADS), self.rows(space).n_blocks, parts];
        self.launch(kernel, grid, COLUMN_THREADS as u32, args);
    }

    pub(super) fn linear_forward(&self, x: &Stream<C>, w: &Weight<C>, b: &Vectors<C>) -> Mat<C> {
        let y = self.act(x.wide.space, w.n_out);
        self.times(x.wide.rows, self.read_by_products(x), w, y.at(), N::STORED);
        self.add_bias("add_bias", &y, b);
        y
    }

    /// f(y + b[g]) over y, by a kernel of that form.
    pub(super) fn add_bias(&self, kernel: &'static str, y: &Mat<C>, b: &Vectors<C>) {
        let args = args![y.at(), b.at(), b.stride(), self.rows(y.space).blocks, y.cols];
        self.each_column(kernel, y.space, y.cols, PARTS, args);
    }

    pub(super) fn feed_forward_forward(
        &self,
        x: &Stream<C>,
        wi: &Weight<C>,
        bi: &Vectors<C>,
        wo: &Weight<C>,
    ) -> (Mat<C>, Stream<C>) {
        let (space, rows) = (x.wide.space, x.wide.rows);
        let (u, f) = (self.act(space, wi.n_out), self.act(space, wi.n_out));
        self.times(rows, self.read_by_products(x), wi, u.at(), N::STORED);
        let blocks = self.rows(space).blocks;
        let args = args![u.at(), bi.at(), bi.stride(), f.at(), blocks, u.cols, self.activation()];
        self.each_column("add_bias_activate", space, u.cols, PARTS, args);
        let y = self.stream(space, wo.n_out);
        self.times(rows, f.at(), wo, y.wide.at(), Number::F32);
        (u, y)
    }

    pub(super) fn feed_forward_backward(
        &self,
        dy: Mat<C>,
        wo: &Weight<C>,
        u: Mat<C>,
        dbi: Sum<'_, Vectors<C>>,
    ) -> Mat<C> {
        let d = self.act(u.space, u.cols);
        self.times_back(dy.rows, dy.at(), wo, d.at(), N::STORED, false);
        let Rows { blocks, n_blocks, .. } = self.rows(u.space);
        let partial = dbi.is_some().then(|| self.take_alike(n_blocks * u.cols * size_of::<f32>()));
        let at = partial.as_ref().map_or(0, super::Buffer::at);
        let args = args![d.at(), u.at(), at, blocks, u.cols, self.activation()];
        self.each_column("activate_back", u.space, u.cols, 1, args);
        if let (Some(partial), Some(dbi)) = (partial, dbi) {
            self.add_blocks(u.space, u.cols, partial.at(), dbi);
        }
        u
    }

    /// Adds each block's sums to their group's.
    fn add_blocks(&self, space: Space, n: usize, partial: Address, into: &mut Vectors<C>) {
        let groups = self.lists().n_groups;
        assert!(into.rows >= groups, "each group of a batch has sums of its own");
        let args = args![partial, self.rows(space).first_block, into.at(), n];
        self.launch("add_blocks", [n.div_ceil(COLUMN_THREADS), groups, 1], COLUMN_THREADS as u32, args);
    }

    /// Adds column sums by group to `into`, where somebody asked for them; `of` are the kernel's inputs.
    fn sum_columns(&self, kernel: &'static str, (space, n): (Space, usize), of: &[u64], into: Sum<'_, Vectors<C>>) {
        let Some(into) = into else { return };
        let Rows { blocks, n_blocks, .. } = self.rows(space);
        let partial = self.take_alike(n_blocks * n * size_of::<f32>());
        let args: Vec<u64> = of.iter().chain(args![partial.at(), blocks, n]).copied().collect();
        self.each_column(kernel, space, n, 1, &args);
        self.add_blocks(space, n, partial.at(), into);
    }

    /// Column sums of a stream.
    pub(super) fn sum_stream(&self, y: &Stream<C>, into: Sum<'_, Vectors<C>>) {
        self.sum_columns("sum_stream", (y.wide.space, y.wide.cols), &[y.wide.at()], into);
    }

    /// Column sums of activations.
    pub(super) fn sum_act(&self, y: &Mat<C>, into: Sum<'_, Vectors<C>>) {
        self.sum_columns("sum_act", (y.space, y.cols), &[y.at()], into);
    }

    /// Column sums of the element-wise product of two matrices.
    pub(super) fn sum_products(&self, a: &Stream<C>, b: &Mat<C>, into: Sum<'_, Vectors<C>>) {
        self.sum_columns("sum_products", (b.space, b.cols), &[a.wide.at(), b.at()], into);
    }

    pub(super) fn norm_forward(
        &self,
        x: Stream<C>,
        a: Stream<C>,
        b: &Vectors<C>,
        ln: Affine<'_, Self>,
        site: Site,
    ) -> Normed<C, N> {
        let (space, n) = (x.wide.space, x.wide.cols);
        let Affine { gamma, beta } = ln;
        let (x_hat, r_sigma) = (self.act(space, n), self.mat(space, 1, Number::F32));
        let (rounding, rounded) = self.rounding(space, n);
        let (cut, scale, site) = self.mask(site);
        let (groups, keys, places) = (self.lists().groups, self.lists().keys, self.rows(space).places);
        let epsilon = self.arithmetic.layer_norm_eps as f32;
        let args = args![
            x.wide.at(),
            a.wide.at(),
            b.at(),
            b.stride(),
            gamma.at(),
            gamma.stride(),
            beta.at(),
            beta.stride(),
            rounding,
            x_hat.at(),
            r_sigma.at(),
            places,
            groups,
            keys,
            n,
            epsilon,
            cut,
            scale,
            site,
        ];
        self.each_row(by_width!("add_norm", n), space, args);
        (Stream { wide: x.wide, rounded }, Norm { x_hat, r_sigma })
    }

    /// From dh to dz, over dh; to M * dz, over x^, where a site is given.
    pub(super) fn norm_back(&self, dh: &Stream<C>, n: &Norm<Self>, gamma: &Vectors<C>, site: Option<Site>) {
        let Norm { x_hat, r_sigma } = n;
        let (space, cols) = (x_hat.space, x_hat.cols);
        let da = site.map_or(0, |_| x_hat.at());
        let (cut, scale, site) = site.map_or((0, 1.0, 0), |site| self.mask(site));
        let (groups, keys, places) = (self.lists().groups, self.lists().keys, self.rows(space).places);
        let args = args![
            dh.wide.at(),
            x_hat.at(),
            da,
            gamma.at(),
            gamma.stride(),
            r_sigma.at(),
            places,
            groups,
            keys,
            cols,
            cut,
            scale,
            site,
        ];
        self.each_row(by_width!("norm_back", cols), space, args);
    }

    /// M * (gamma x^ + beta), rebuilt.
    pub(super) fn norm_again(&self, n: &Norm<Self>, ln: Affine<'_, Self>, dropout: Option<Site>) -> Mat<C> {
        let Affine { gamma, beta } = ln;
        let (space, cols) = (n.x_hat.space, n.x_hat.cols);
        let h = self.act(space, cols);
        let (cut, scale, site) = dropout.map_or((0, 1.0, 0), |site| self.mask(site));
        let (groups, keys, places) = (self.lists().groups, self.lists().keys, self.rows(space).places);
        let args = args![
            n.x_hat.at(),
            gamma.at(),
            gamma.stride(),
            beta.at(),
            beta.stride(),
            h.at(),
            places,
            groups,
            keys,
            cols,
            cut,
            scale,
            site,
        ];
        self.each_row("renorm", space, args);
        h
    }

    /// Launches a kernel of attention: a block a tile of `space` and head. `rows` are those of all tiles of matrices in
    /// shared memory, `scores` the columns of that of scores.
    fn each_tile(&self, kernel: &'static str, space: Space, d: usize, (rows, scores): (usize, usize), args: &[u64]) {
        let number = bytes_of(N::STORED);
        let stride = |width: usize| width + 16 / number;
        let shared = (rows * stride(if d <= 32 { 32 } else { 64 }) + TILE * stride(scores)) * number;
        let grid = [self.rows(space).n_tiles, self.arithmetic.n_heads, 1];
        self.queue().launch(kernel, grid, ATTENTION_THREADS, shared, args);
    }

    /// Arguments that all kernels of attention end with.
    fn of_attention(&self, h: usize, site: Site) -> [u64; 7] {
        let heads = self.arithmetic.n_heads;
        let (cut, scale, site) = self.mask(site);
        let d = h / heads;
        let root = 1.0 / (d as f64).sqrt();
        *args![h, heads, d, root as f32, cut, scale, site]
    }

    pub(super) fn attention_forward(&self, q: &Mat<C>, k: &Mat<C>, v: &Mat<C>, site: Site) -> (Mat<C>, Mat<C>) {
        let (h, heads) = (q.cols, self.arithmetic.n_heads);
        let (o, lse) = (self.act(q.space, h), self.mat(q.space, heads, Number::F32));
        let tiles = self.rows(q.space).tiles;
        let (bounds, keys) = (self.lists().bounds, self.lists().keys);
        let own = args![q.at(), k.at(), v.at(), o.at(), lse.at(), tiles, bounds, keys];
        let args: Vec<u64> = own.iter().copied().chain(self.of_attention(h, site)).collect();
        self.each_tile(by_head!("attention", h / heads), q.space, h / heads, (3 * TILE, TILE), &args);
        (o, lse)
    }

    pub(super) fn attention_backward(
        &self,
        d_o: &Mat<C>,
        (q, k, v): (Mat<C>, Mat<C>, Mat<C>),
        lse: &Mat<C>,
        site: Site,
    ) -> (Mat<C>, Mat<C>, Mat<C>) {
        let (h, space, d) = (q.cols, q.space, q.cols / self.arithmetic.n_heads);
        let (dq, dots) = (self.act(space, h), self.mat(space, self.arithmetic.n_heads, Number::F32));
        let (bounds, keys) = (self.lists().bounds, self.lists().keys);
        let last = self.of_attention(h, site);
        let back = (2 * TILE + 2 * OTHER, OTHER);
        let tiles = self.rows(space).tiles;
        let own = args![q.at(), k.at(), v.at(), d_o.at(), lse.at(), dq.at(), dots.at(), tiles, bounds, keys];
        let args: Vec<u64> = own.iter().copied().chain(last).collect();
        self.each_tile(by_head!("attention_queries", d), space, d, back, &args);
        let tiles = self.rows(Space::Tokens).tiles;
        let firsts = u32::from(space == Space::Firsts);
        let own = args![q.at(), k.at(), v.at(), d_o.at(), lse.at(), dots.at(), tiles, bounds, keys, firsts];
        let args: Vec<u64> = own.iter().copied().chain(last).collect();
        self.each_tile(by_head!("attention_keys", d), Space::Tokens, d, back, &args);
        (dq, k, v)
    }

    /// Which precision products of full-width numbers are made in.
    pub(super) const FULL_WIDTH: Precision = match N::PRECISION {
        Precision::Tf32 => Precision::Tf32,
        _ => Precision::F32,
    };
}
