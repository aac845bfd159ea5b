//! The trait of ops on a card: what is short stands here, the rest in the files beside it.

use std::sync::Arc;

use super::card::{Card, Command, Number};
use super::memory::{Index, Mat, Stream, Table, Vectors, Weight};
use super::queue::args;
use super::{Cuda, Numbers};
use crate::device::batch::{Batch, Space};
use crate::device::ops::{
    AdamW, Affine, Classifier, Device, Dropout, Loss, Norm, Ops, Site, Sum, Tables, Trained, Want,
};

/// Threads of a block in `rows.cu`.
const ROW_THREADS: u32 = 128;

impl<C: Card, N: Numbers> Cuda<C, N> {
    /// Rows of a stream in another space, or batch: row i is row `from_row[i]`, or zero.
    fn gather_rows(&self, x: &Stream<C>, space: Space, from_row: u64) -> Stream<C> {
        let n = x.wide.cols;
        let y = self.stream(space, n);
        let grid = [y.wide.rows, 1, 1];
        self.launch("gather_stream", grid, ROW_THREADS, args![x.wide.at(), y.wide.at(), from_row, n]);
        if let Some(rounded) = x.rounded.get() {
            let to = self.buffer(space, n, N::STORED);
            self.launch("gather_act", grid, ROW_THREADS, args![rounded.at(), to.at(), from_row, n]);
            y.rounded.get_or_init(|| to);
        }
        y
    }
}

impl<C: Card, N: Numbers> Ops for Cuda<C, N> {
    fn copy(&mut self, x: &Stream<C>) -> Stream<C> {
        let y = self.stream(x.wide.space, x.wide.cols);
        let bytes = y.wide.rows * y.wide.cols * size_of::<f32>();
        self.queue().push(Command::Copy { to: y.wide.at(), from: x.wide.at(), bytes });
        y
    }

    fn firsts(&mut self, x: Stream<C>) -> Stream<C> {
        match x.wide.space {
            Space::Firsts => x,
            Space::Tokens => self.gather_rows(&x, Space::Firsts, self.lists().first_rows),
        }
    }

    fn spread(&mut self, d: Stream<C>) -> Stream<C> {
        match d.wide.space {
            Space::Tokens => d,
            Space::Firsts => self.gather_rows(&d, Space::Tokens, self.lists().spread),
        }
    }

    fn branch(&mut self, x: Stream<C>, batch: Arc<Batch>, from: &[usize]) -> Stream<C> {
        let before = self.batch.clone();
        self.begin(batch, Dropout::NONE);
        let space = x.wide.space;
        let rows = from.iter().flat_map(|from| match space {
            Space::Tokens => before.tokens_of(*from),
            Space::Firsts => *from..*from + 1,
        });
        let mut from_row: Vec<i32> = rows.map(|row| row as i32).collect();
        from_row.resize(self.rows(space).rows, -1);
        let from_row = self.queue().values(&from_row);
        self.gather_rows(&x, space, from_row)
    }

    fn linear(&mut self, x: &Stream<C>, w: &Weight<C>, b: &Vectors<C>) -> Mat<C> {
        self.linear_forward(x, w, b)
    }

    fn linear_back(&mut self, dy: Mat<C>, w: &Weight<C>, dx: Stream<C>) -> Stream<C> {
        self.times_back(dy.rows, dy.at(), w, dx.wide.at(), Number::F32, true);
        Stream { wide: dx.wide, rounded: std::cell::OnceCell::new() }
    }

    fn product(&mut self, x: Mat<C>, w: &Weight<C>) -> Stream<C> {
        let y = self.stream(x.space, w.n_out);
        self.times(x.rows, x.at(), w, y.wide.at(), Number::F32);
        y
    }

    fn product_back(&mut self, dy: Mat<C>, w: &Weight<C>) -> Mat<C> {
        let dx = self.act(dy.space, w.n_in);
        self.times_back(dy.rows, dy.at(), w, dx.at(), N::STORED, false);
        dx
    }

    fn feed_forward(&mut self, x: &Stream<C>, wi: &Weight<C>, bi: &Vectors<C>, wo: &Weight<C>) -> (Mat<C>, Stream<C>) {
        self.feed_forward_forward(x, wi, bi, wo)
    }

    fn feed_forward_back(&mut self, dy: Mat<C>, wo: &Weight<C>, u: Mat<C>, dbi: Sum<Vectors<C>>) -> Mat<C> {
        self.feed_forward_backward(dy, wo, u, dbi)
    }

    fn attention(&mut self, q: &Mat<C>, k: &Mat<C>, v: &Mat<C>, site: Site) -> (Mat<C>, Mat<C>) {
        self.attention_forward(q, k, v, site)
    }

    fn attention_back(
        &mut self,
        d_o: Mat<C>,
        qkv: (Mat<C>, Mat<C>, Mat<C>),
        lse: Mat<C>,
        site: Site,
        dbq: Sum<Vectors<C>>,
        dbv: Sum<Vectors<C>>,
    ) -> (Mat<C>, Mat<C>, Mat<C>) {
        let (dq, dk, dv) = self.attention_backward(&d_o, qkv, &lse, site);
        self.sum_act(&dq, dbq);
        self.sum_act(&dv, dbv);
        (dq, dk, dv)
    }

    fn add_norm(
        &mut self,
        x: Stream<C>,
        a: Stream<C>,
        b: &Vectors<C>,
        ln: Affine<Self>,
        site: Site,
    ) -> (Stream<C>, Norm<Self>) {
        self.norm_forward(x, a, b, ln, site)
    }

    fn add_norm_back(
        &mut self,
        dh: Stream<C>,
        n: Norm<Self>,
        gamma: &Vectors<C>,
        site: Site,
        db: Sum<Vectors<C>>,
        dgamma: Sum<Vectors<C>>,
        dbeta: Sum<Vectors<C>>,
    ) -> (Stream<C>, Mat<C>) {
        self.sum_stream(&dh, dbeta);
        self.sum_products(&dh, &n.x_hat, dgamma);
        self.norm_back(&dh, &n, gamma, Some(site));
        self.sum_act(&n.x_hat, db);
        (dh, n.x_hat)
    }

    fn activate(&mut self, u: &Mat<C>) -> Mat<C> {
        let f = self.act(u.space, u.cols);
        self.each_number("activate", u.rows * u.cols, args![u.at(), f.at(), self.activation()]);
        f
    }

    fn renorm(&mut self, n: &Norm<Self>, ln: Affine<Self>, dropout: Option<Site>) -> Mat<C> {
        self.norm_again(n, ln, dropout)
    }

    fn weight_grad(&mut self, dy: &Mat<C>, x: &Mat<C>, want: &mut Want<Self>) {
        if !matches!(want, Want::Nothing) {
            self.weight_gradient(dy, x, want);
        }
    }

    fn embed(&mut self, tables: Tables<&Table<C>>, ln: Affine<Self>) -> (Stream<C>, Norm<Self>) {
        self.embed_forward(tables, ln)
    }

    fn embed_back(
        &mut self,
        dx: Stream<C>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<C>,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<Vectors<C>>,
        dbeta: Sum<Vectors<C>>,
    ) {
        self.embed_backward(dx, n, gamma, tables, dgamma, dbeta);
    }

    fn pool(&mut self, x: &Stream<C>, w: &[&Weight<C>], b: &Vectors<C>) -> Mat<C> {
        self.pool_forward(x, w, b)
    }

    fn pool_back(
        &mut self,
        dp: Stream<C>,
        pooled: Mat<C>,
        x: Option<&Stream<C>>,
        w: &[&Weight<C>],
        want: &mut Want<Self>,
        db: Sum<Vectors<C>>,
    ) -> Stream<C> {
        self.pool_backward(dp, pooled, x, w, want, db)
    }

    fn classify(&mut self, pooled: &Mat<C>, c: &Classifier<Self>) -> Mat<C> {
        self.classify_forward(pooled, c)
    }

    fn loss(&mut self, logits: Mat<C>, n_outputs: &[usize], loss: &[Loss]) -> (Mat<C>, Mat<C>) {
        self.loss_of(logits, n_outputs, loss)
    }

    fn classify_back(
        &mut self,
        dlogits: Mat<C>,
        pooled: &Mat<C>,
        c: &Classifier<Self>,
        dw: &mut Vectors<C>,
        db: &mut Vectors<C>,
    ) -> Stream<C> {
        self.classify_backward(&dlogits, pooled, c, dw, db)
    }

    fn add_squares(&mut self, grad: &Vectors<C>, rules: &[Option<AdamW>], sums: &mut Vectors<C>) {
        self.squares(grad, rules, sums);
    }

    fn adamw(&mut self, p: &mut Trained<Self>, grad: &Vectors<C>, squares: &Vectors<C>, rules: &[Option<AdamW>]) {
        self.step_of(p, grad, squares, rules);
    }

    fn sum(&mut self, base: &Vectors<C>, delta: &Vectors<C>, at: Option<&Index<C>>, into: &mut Vectors<C>) {
        self.put_in_use(base, delta, at, into);
    }

    fn write_weight(
        &mut self,
        base: &Vectors<C>,
        delta: &Vectors<C>,
        g: usize,
        at: Option<&Index<C>>,
        into: &mut Weight<C>,
    ) {
        self.write_stored(base.of(g), delta.of(g), delta.n, at, &into.data);
    }

    fn write_table(&mut self, base: &Vectors<C>, delta: &Vectors<C>, at: Option<&Index<C>>, into: &mut Table<C>) {
        self.write_stored(base.at(), delta.at(), delta.n, at, &into.data);
    }

    fn gather(&mut self, from: &Vectors<C>, at: &Index<C>, into: &mut Vectors<C>) {
        self.each_number("gather_entries", at.n, &[from.at(), at.data.at(), into.at()]);
    }
}
