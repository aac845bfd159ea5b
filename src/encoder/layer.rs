//! One encoder layer, forward and backward, once for every device and precision.
//!
//! T tokens, H hidden, A heads, I intermediate. In the last layer, where only the first token of each sequence is read
//! afterwards, everything but keys and values has S rows; the text is the same.

use std::sync::Arc;

use crate::base::parameters::Term;
use crate::device::ops::{Affine, At, Device, Norm, Ops, Site, Want};

/// One `T` for each bias term of a layer: values, gradients, or which are selected.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Terms<T> {
    pub query: T,
    pub key: T,
    pub value: T,
    pub attention_output: T,
    pub attention_layernorm: T,
    pub intermediate: T,
    pub output: T,
    pub output_layernorm: T,
}

impl<T> Terms<T> {
    /// The entry of a term; `None` for the terms of the two ends.
    pub fn get(&self, term: Term) -> Option<&T> {
        Some(match term {
            Term::Query => &self.query,
            Term::Key => &self.key,
            Term::Value => &self.value,
            Term::AttentionOutput => &self.attention_output,
            Term::AttentionLayernorm => &self.attention_layernorm,
            Term::Intermediate => &self.intermediate,
            Term::Output => &self.output,
            Term::OutputLayernorm => &self.output_layernorm,
            Term::EmbeddingsLayernorm | Term::Pooler => return None,
        })
    }

    /// As [`Terms::get`].
    pub fn get_mut(&mut self, term: Term) -> Option<&mut T> {
        Some(match term {
            Term::Query => &mut self.query,
            Term::Key => &mut self.key,
            Term::Value => &mut self.value,
            Term::AttentionOutput => &mut self.attention_output,
            Term::AttentionLayernorm => &mut self.attention_layernorm,
            Term::Intermediate => &mut self.intermediate,
            Term::Output => &mut self.output,
            Term::OutputLayernorm => &mut self.output_layernorm,
            Term::EmbeddingsLayernorm | Term::Pooler => return None,
        })
    }

    /// One entry a term, in the order of the network.
    pub fn try_from_fn<E>(mut f: impl FnMut(Term) -> Result<T, E>) -> Result<Self, E> {
        Ok(Terms {
            query: f(Term::Query)?,
            key: f(Term::Key)?,
            value: f(Term::Value)?,
            attention_output: f(Term::AttentionOutput)?,
            attention_layernorm: f(Term::AttentionLayernorm)?,
            intermediate: f(Term::Intermediate)?,
            output: f(Term::Output)?,
            output_layernorm: f(Term::OutputLayernorm)?,
        })
    }
}

/// One `M` for each matrix of a layer and one `V` for each LayerNorm weight, under the names of their biases: frozen
/// values, or what is wanted of them.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Weights<M, V> {
    pub query: M,
    pub key: M,
    pub value: M,
    pub attention_output: M,
    pub attention_layernorm: V,
    pub intermediate: M,
    pub output: M,
    pub output_layernorm: V,
}

impl<M, V> Weights<M, V> {
    /// The matrix whose bias is `term`.
    pub fn matrix_mut(&mut self, term: Term) -> Option<&mut M> {
        Some(match term {
            Term::Query => &mut self.query,
            Term::Key => &mut self.key,
            Term::Value => &mut self.value,
            Term::AttentionOutput => &mut self.attention_output,
            Term::Intermediate => &mut self.intermediate,
            Term::Output => &mut self.output,
            _ => return None,
        })
    }

    /// The LayerNorm weight whose bias is `term`.
    pub fn norm_mut(&mut self, term: Term) -> Option<&mut V> {
        Some(match term {
            Term::AttentionLayernorm => &mut self.attention_layernorm,
            Term::OutputLayernorm => &mut self.output_layernorm,
            _ => return None,
        })
    }
}

/// A layer's weights as they lie on the device; runs that do not train them share them.
pub type Frozen<D> = Weights<Arc<<D as Device>::Weight>, Arc<<D as Device>::Params>>;
/// A layer's biases in use, one row a group.
pub type Biases<D> = Terms<<D as Device>::Params>;
/// The sums of a layer's bias gradients that are asked for.
pub type BiasGrads<D> = Terms<Option<<D as Device>::Params>>;
/// What is wanted of a layer's weights.
pub type WeightGrads<D> = Weights<Want<D>, Option<<D as Device>::Params>>;

/// All that a layer saves: q, k, v; the log-sum-exp of its scores; x^ and 1/sigma of both LayerNorms; u. Nine values a
/// token and hidden unit where I = 4 H.
pub struct Kept<D: Device> {
    q: D::Act,
    k: D::Act,
    v: D::Act,
    lse: D::Rows,
    norm_1: Norm<D>,
    u: D::Act,
    norm_2: Norm<D>,
}

impl<D: Device> Kept<D> {
    /// The normalised output: the next layer's input, but for gamma and beta.
    pub fn output_norm(&self) -> &Norm<D> {
        &self.norm_2
    }

    /// As [`Kept::output_norm`], dropping the rest.
    pub fn into_output_norm(self) -> Norm<D> {
        self.norm_2
    }
}

/// How far down the backward must go in a layer, from the top: below is nothing that trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Until {
    /// Through the layer, to its input.
    Input,
    /// To query, key and value.
    Qkv,
    /// To attention.output, its LayerNorm included.
    AttentionOutput,
    /// To intermediate.
    Intermediate,
    /// To output, its LayerNorm included.
    Output,
}

impl Until {
    /// Where the backward may stop once it has reached `term`, whether its bias or its weight trains.
    pub fn reaching(term: Term) -> Self {
        match term {
            Term::OutputLayernorm | Term::Output => Until::Output,
            Term::Intermediate => Until::Intermediate,
            Term::AttentionLayernorm | Term::AttentionOutput => Until::AttentionOutput,
            Term::Query | Term::Key | Term::Value => Until::Qkv,
            Term::EmbeddingsLayernorm | Term::Pooler => Until::Input,
        }
    }
}

/// x (T, H) to h: (T, H), or (S, H) where `first_rows` alone are asked for.
pub fn forward<D: Ops>(
    d: &mut D,
    layer: usize,
    w: &Frozen<D>,
    b: &Biases<D>,
    x: D::Stream,
    first_rows: bool,
) -> (D::Stream, Kept<D>) {
    let site = |at| Site { layer: layer as u32, at };
    let k = d.linear(&x, &w.key, &b.key); // (T, H)
    let v = d.linear(&x, &w.value, &b.value); // (T, H)
    let x = if first_rows { d.firsts(x) } else { x };
    let q = d.linear(&x, &w.query, &b.query); // (T or S, H), as is all that follows
    let (o, lse) = d.attention(&q, &k, &v, site(At::Probabilities)); // (.., H), (.., A)
    let a = d.product(o, &w.attention_output); // (.., H)
    let ln = Affine { gamma: &*w.attention_layernorm, beta: &b.attention_layernorm };
    let (h, norm_1) = d.add_norm(x, a, &b.attention_output, ln, site(At::AttentionOutput));
    let (u, y) = d.feed_forward(&h, &w.intermediate, &b.intermediate, &w.output); // (.., I), (.., H)
    let ln = Affine { gamma: &*w.output_layernorm, beta: &b.output_layernorm };
    let (h, norm_2) = d.add_norm(h, y, &b.output, ln, site(At::Output));
    (h, Kept { q, k, v, lse, norm_1, u, norm_2 })
}

/// From dh, the gradient of the layer's output, to that of its input, unless nothing below `until` trains. `input`
/// rebuilds the layer's input (T, H); it is called only where weights want a gradient.
#[allow(clippy::too_many_arguments)]
pub fn backward<D: Ops>(
    d: &mut D,
    layer: usize,
    w: &Frozen<D>,
    b: &Biases<D>,
    kept: Kept<D>,
    dh: D::Stream,
    until: Until,
    db: &mut BiasGrads<D>,
    mut dw: Option<&mut WeightGrads<D>>,
    input: impl FnOnce(&mut D) -> D::Act,
) -> Option<D::Stream> {
    let site = |at| Site { layer: layer as u32, at };
    let Kept { q, k, v, lse, norm_1, u, norm_2 } = kept;

    let dgamma = dw.as_mut().and_then(|g| g.output_layernorm.as_mut());
    let (gamma, dbeta) = (&w.output_layernorm, db.output_layernorm.as_mut());
    let (dh, dy) = d.add_norm_back(dh, norm_2, gamma, site(At::Output), db.output.as_mut(), dgamma, dbeta);
    if let Some(g) = dw.as_mut() {
        let f = d.activate(&u);
        d.weight_grad(&dy, &f, &mut g.output);
    }
    if until == Until::Output {
        return None;
    }

    let du = d.feed_forward_back(dy, &w.output, u, db.intermediate.as_mut()); // (.., I)
    if let Some(g) = dw.as_mut() {
        let ln = Affine { gamma: &*w.attention_layernorm, beta: &b.attention_layernorm };
        let h = d.renorm(&norm_1, ln, None);
        d.weight_grad(&du, &h, &mut g.intermediate);
    }
    if until == Until::Intermediate {
        return None;
    }

    let dh = d.linear_back(du, &w.intermediate, dh); // (.., H)
    let dgamma = dw.as_mut().and_then(|g| g.attention_layernorm.as_mut());
    let (gamma, dbeta) = (&w.attention_layernorm, db.attention_layernorm.as_mut());
    let at = site(At::AttentionOutput);
    let (dx, da) = d.add_norm_back(dh, norm_1, gamma, at, db.attention_output.as_mut(), dgamma, dbeta);
    if let Some(g) = dw.as_mut() {
        let (o, _) = d.attention(&q, &k, &v, site(At::Probabilities));
        d.weight_grad(&da, &o, &mut g.attention_output);
    }
    if until == Until::AttentionOutput {
        return None;
    }

    let d_o = d.product_back(da, &w.attention_output); // (.., H)
    let sums = (db.query.as_mut(), db.value.as_mut());
    let (dq, dk, dv) = d.attention_back(d_o, (q, k, v), lse, site(At::Probabilities), sums.0, sums.1);
    if let Some(g) = dw.as_mut() {
        let x = input(d);
        d.weight_grad(&dq, &x, &mut g.query);
        d.weight_grad(&dk, &x, &mut g.key);
        d.weight_grad(&dv, &x, &mut g.value);
    }
    if until == Until::Qkv {
        return None;
    }
    let dx = d.linear_back(dq, &w.query, dx);
    let dx = d.spread(dx); // (T, H)
    let dx = d.linear_back(dk, &w.key, dx);
    Some(d.linear_back(dv, &w.value, dx))
}
