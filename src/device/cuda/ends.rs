//! The two ends of the network: embeddings, and pooler, classifier and loss.

use super::card::{Card, Number};
use super::layers::by_width;
use super::memory::{Mat, Stream, Table, Vectors, Weight};
use super::queue::args;
use super::{Cuda, Numbers};
use crate::device::batch::Space;
use crate::device::ops::{Affine, Classifier, Loss, Norm, Site, Sum, Tables, Want};

/// Threads of a block in `heads.cu`.
const HEAD_THREADS: usize = 128;

impl<C: Card, N: Numbers> Cuda<C, N> {
    pub(super) fn embed_forward(&self, tables: Tables<&Table<C>>, ln: Affine<'_, Self>) -> (Stream<C>, Norm<Self>) {
        let Affine { gamma, beta } = ln;
        let (space, n) = (Space::Tokens, tables.word.width);
        let h = self.mat(space, n, Number::F32);
        let (x_hat, r_sigma) = (self.act(space, n), self.mat(space, 1, Number::F32));
        let (rounding, rounded) = self.rounding(space, n);
        let (cut, scale, site) = self.mask(Site::EMBEDDINGS);
        let lists = self.lists();
        let epsilon = self.arithmetic.layer_norm_eps as f32;
        let args = args![
            tables.word.data.at(),
            tables.position.data.at(),
            tables.token_type.data.at(),
            lists.ids,
            lists.types,
            gamma.at(),
            gamma.stride(),
            beta.at(),
            beta.stride(),
            h.at(),
            rounding,
            x_hat.at(),
            r_sigma.at(),
            lists.tokens.places,
            lists.groups,
            lists.keys,
            n,
            epsilon,
            cut,
            scale,
            site,
        ];
        self.each_row(by_width!("embed", n), space, args);
        (Stream { wide: h, rounded }, Norm { x_hat, r_sigma })
    }

    pub(super) fn embed_backward(
        &self,
        dx: Stream<C>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<C>,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<'_, Vectors<C>>,
        dbeta: Sum<'_, Vectors<C>>,
    ) {
        let (cut, scale, site) = self.mask(Site::EMBEDDINGS);
        if cut > 0 {
            let args =
                args![dx.wide.at(), self.lists().tokens.places, self.lists().keys, dx.wide.cols, cut, scale, site];
            self.each_row("drop_rows", Space::Tokens, args);
        }
        self.sum_stream(&dx, dbeta);
        let Some(n) = n else { return };
        self.sum_products(&dx, &n.x_hat, dgamma);
        let Some(tables) = tables else { return };
        self.norm_back(&dx, &n, gamma, None);
        let batch = &self.batch;
        let positions: Vec<u32> = (0..batch.n_sequences()).flat_map(|s| 0..batch.tokens_of(s).len() as u32).collect();
        self.scatter_rows(&dx, batch.ids(), &mut tables.word);
        self.scatter_rows(&dx, &positions, &mut tables.position);
        self.scatter_rows(&dx, batch.type_ids(), &mut tables.token_type);
    }

    /// The rows that each pooler reads: all of the size class, where one is shared.
    fn rows_by_pooler<'w>(&self, w: &[&'w Weight<C>]) -> Vec<(std::ops::Range<usize>, &'w Weight<C>)> {
        match w {
            [shared] => vec![(0..self.rows(Space::Firsts).rows, *shared)],
            own => self.batch.sequences_by_group().into_iter().zip(own.iter().copied()).collect(),
        }
    }

    pub(super) fn pool_forward(&self, x: &Stream<C>, w: &[&Weight<C>], b: &Vectors<C>) -> Mat<C> {
        let h = x.wide.cols;
        let pooled = self.act(Space::Firsts, h);
        let x = self.read_by_products(x);
        for (rows, w) in self.rows_by_pooler(w).into_iter().filter(|(rows, _)| !rows.is_empty()) {
            let at = (rows.start * h) as u64;
            let [from, to] = [x, pooled.at()].map(|matrix| matrix + at * Self::stored_bytes());
            self.times(rows.len(), from, w, to, N::STORED);
        }
        self.add_bias("add_bias_tanh", &pooled, b);
        pooled
    }

    pub(super) fn pool_backward(
        &self,
        dp: Stream<C>,
        pooled: Mat<C>,
        x: Option<&Stream<C>>,
        w: &[&Weight<C>],
        want: &mut Want<Self>,
        db: Sum<'_, Vectors<C>>,
    ) -> Stream<C> {
        let (h, rows) = (dp.wide.cols, dp.wide.rows);
        let (rounding, rounded) = self.rounding(Space::Firsts, h);
        self.each_number("tanh_back", rows * h, &[dp.wide.at(), pooled.at(), rounding]);
        self.sum_stream(&dp, db);
        let from = rounded.get().map_or(dp.wide.at(), super::Buffer::at);
        let dx = self.stream(Space::Firsts, h);
        if w.len() > 1 {
            // Rows of no group are nobody's to write.
            self.queue().add_zeros(dx.wide.at(), rows * h);
        }
        for (g, (rows, w)) in self.rows_by_pooler(w).into_iter().enumerate().filter(|(_, (rows, _))| !rows.is_empty()) {
            let at = (rows.start * h) as u64;
            self.times_back(rows.len(), from + at * Self::stored_bytes(), w, dx.wide.at() + at * 4, Number::F32, false);
            if let Some(x) = x {
                let sides = ((dp.wide.at() + at * 4, h), (x.wide.at() + at * 4, h));
                self.grad_of(rows.len(), sides, Number::F32, g, want);
            }
        }
        dx
    }

    /// A list of each group's first output and number of outputs, where kernels can read it.
    fn outputs(&self, first: &[usize], n_outputs: &[usize]) -> u64 {
        let outputs: Vec<[i32; 2]> = first.iter().zip(n_outputs).map(|(first, n)| [*first as i32, *n as i32]).collect();
        self.queue().values(&outputs)
    }

    pub(super) fn classify_forward(&self, pooled: &Mat<C>, c: &Classifier<Self>) -> Mat<C> {
        let widest = c.n_outputs.iter().copied().max().unwrap_or(0);
        let logits = self.mat(Space::Firsts, widest, Number::F32);
        let outputs = self.outputs(&c.first, &c.n_outputs);
        let (cut, scale, site) = self.mask(Site::POOLED);
        let (lists, weights) = (self.lists(), (c.weight.at(), c.bias.at()));
        let args = args![
            pooled.at(),
            weights.0,
            weights.1,
            outputs,
            logits.at(),
            lists.firsts.places,
            lists.groups,
            lists.keys,
            pooled.cols,
            widest,
            cut,
            scale,
            site,
        ];
        self.launch("classify", [logits.rows, 1, 1], HEAD_THREADS as u32, args);
        logits
    }

    pub(super) fn loss_of(&self, logits: Mat<C>, n_outputs: &[usize], loss: &[Loss]) -> (Mat<C>, Mat<C>) {
        let lists = self.lists();
        let groups = lists.n_groups;
        let data = self.take(groups * size_of::<f32>());
        let losses = Mat { space: Space::Firsts, n: groups, rows: groups, cols: 1, data };
        let scales: Vec<f32> = loss.iter().map(|loss| loss.scale).collect();
        let (outputs, scales) = {
            let outputs: Vec<[i32; 2]> = n_outputs.iter().map(|n| [0, *n as i32]).collect();
            let mut queue = self.queue();
            // Both lists of one launch lie in one handing over.
            queue.reserve(size_of_val(&outputs[..]) + size_of_val(&scales[..]) + 64);
            (queue.constants(bytemuck::cast_slice(&outputs)), queue.constants(bytemuck::cast_slice(&scales)))
        };
        let args = args![logits.at(), outputs, lists.targets, lists.sequences, scales, losses.at(), logits.cols];
        self.launch("loss", [groups, 1, 1], 32, args);
        (losses, logits)
    }

    pub(super) fn classify_backward(
        &self,
        dlogits: &Mat<C>,
        pooled: &Mat<C>,
        c: &Classifier<Self>,
        dw: &mut Vectors<C>,
        db: &mut Vectors<C>,
    ) -> Stream<C> {
        let (h, widest) = (pooled.cols, dlogits.cols);
        let lists = self.lists();
        let (cut, scale, site) = self.mask(Site::POOLED);
        let outputs = self.outputs(&c.first, &c.n_outputs);
        let args = args![
            dlogits.at(),
            pooled.at(),
            outputs,
            lists.sequences,
            lists.keys,
            dw.at(),
            db.at(),
            dw.stride(),
            db.stride(),
            h,
            widest,
            cut,
            scale,
            site,
        ];
        let grid = [h.div_ceil(HEAD_THREADS), widest, lists.n_groups];
        self.launch("classify_weights", grid, HEAD_THREADS as u32, args);
        let dp = self.stream(Space::Firsts, h);
        let args = args![
            dlogits.at(),
            c.weight.at(),
            outputs,
            dp.wide.at(),
            lists.firsts.places,
            lists.groups,
            lists.keys,
            h,
            widest,
            cut,
            scale,
            site,
        ];
        self.launch("classify_back", [dp.wide.rows, 1, 1], HEAD_THREADS as u32, args);
        dp
    }
}
