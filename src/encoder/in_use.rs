//! What a forward of some tasks reads: the network, and the biases and heads of its groups.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use super::layer::{self, Terms};
use super::network::Network;
use crate::base::base::Base;
use crate::base::delta::Head;
use crate::base::parameters::Term;
use crate::device::ops::{Affine, Classifier, Ops};

/// One bias of the base, on the host: what a batch's rows are gathered from.
pub(super) struct BaseBias {
    pub name: String,
    pub term: Term,
    pub layer: Option<usize>,
    pub values: Vec<f32>,
}

/// A task's values for a device.
pub(super) struct Attached<D: Ops> {
    /// Summed with the base's, in the order of the base's own.
    pub biases: Vec<Vec<f32>>,
    pub head: Head,
    pub pooler: Option<Arc<D::Weight>>,
    /// Where the task has weights of its own.
    pub network: Option<Network<D>>,
}

/// What a pass of some tasks, a group each, reads; a group without a task is the base's. Biases are gathered when a
/// layer runs: those of many tasks are never all there, and what a layer's took serves the next one's.
pub(super) struct InUse<'t, D: Ops> {
    base: &'t Base,
    biases: &'t [BaseBias],
    tasks: Vec<Option<&'t Attached<D>>>,
    network: &'t Network<D>,
}

impl<'t, D: Ops> InUse<'t, D> {
    pub(super) fn new(
        base: &'t Base,
        shared: &'t Network<D>,
        biases: &'t [BaseBias],
        tasks: Vec<Option<&'t Attached<D>>>,
    ) -> Self {
        let network = match tasks[..] {
            [Some(Attached { network: Some(own), .. })] => own,
            _ => shared,
        };
        InUse { base, biases, tasks, network }
    }

    /// A bias of all groups, (G, n).
    fn bias(&self, d: &D, term: Term, layer: Option<usize>) -> D::Params {
        let base = self.biases.iter().position(|b| b.term == term && b.layer == layer);
        // A checkpoint without a pooler: its bias is each head's own.
        let zeros = vec![0.0; if base.is_none() { self.base.config().hidden_size } else { 0 }];
        let of = self.tasks.iter().map(|task| match (base, *task) {
            (Some(i), Some(task)) => &task.biases[i][..],
            (Some(i), None) => &self.biases[i].values,
            (None, task) => task.and_then(|task| task.head.pooler.as_ref()).map_or(&zeros[..], |(_, bias)| bias),
        });
        d.params(self.tasks.len(), of.collect::<Vec<_>>().concat())
    }

    /// The embeddings' output (T, H).
    pub(super) fn embed(&self, d: &mut D) -> D::Stream {
        let beta = self.bias(d, Term::EmbeddingsLayernorm, None);
        d.embed(self.network.tables(), Affine { gamma: &self.network.gamma, beta: &beta }).0
    }

    /// Some layers over (T, H), to the hidden state (T, H); the network's last gives first rows alone (S, H) where they
    /// are asked for. `visit` sees each layer's output.
    pub(super) fn layers(
        &self,
        d: &mut D,
        layers: Range<usize>,
        mut x: D::Stream,
        first_rows: bool,
        mut visit: impl FnMut(&mut D, &D::Stream),
    ) -> D::Stream {
        let n = self.network.layers.len();
        for l in layers {
            let Ok(b) = Terms::try_from_fn(|term| Ok::<_, Infallible>(self.bias(d, term, Some(l))));
            (x, _) = layer::forward(d, l, &self.network.layers[l], &b, x, first_rows && l + 1 == n);
            visit(d, &x);
        }
        x
    }

    /// The pooled output of first rows, (S, H).
    pub(super) fn pooled(&self, d: &mut D, first: &D::Stream) -> D::Act {
        let own = self.tasks.iter().map(|task| task.and_then(|task| task.pooler.as_deref()));
        let poolers: Vec<&D::Weight> = match own.collect::<Option<_>>() {
            Some(own) => own,
            None => self.network.pooler.as_deref().into_iter().collect(),
        };
        let bias = self.bias(d, Term::Pooler, None);
        d.pool(first, &poolers, &bias)
    }

    /// The classifiers of the groups that have one; none where no group has.
    pub(super) fn classifier(&self, d: &D) -> Option<Classifier<D>> {
        if self.tasks.iter().all(Option::is_none) {
            return None;
        }
        let n_outputs: Vec<usize> = self.tasks.iter().map(|task| task.map_or(0, |task| task.head.n_outputs)).collect();
        let before = |outputs: &mut usize, n: &usize| Some(std::mem::replace(outputs, *outputs + n));
        let heads = || self.tasks.iter().flatten().map(|task| &task.head);
        Some(Classifier {
            weight: d.params(1, heads().flat_map(|head| head.weight.iter().copied()).collect()),
            bias: d.params(1, heads().flat_map(|head| head.bias.iter().copied()).collect()),
            first: n_outputs.iter().scan(0, before).collect(),
            n_outputs,
        })
    }
}
