//! A whole pass: embeddings, layers, pooler, classifier and loss; forward, and backward to the lowest tensor that
//! trains.

use std::sync::Arc;

use super::layer::{self, BiasGrads, Kept, Terms, Until, WeightGrads, Weights};
use super::network::{AllBiases, Network};
use crate::base::config::Config;
use crate::base::parameters::{Role, Table, Term};
use crate::device::ops::{Affine, Classifier, Device, Loss, Norm, Ops, Site, Tables, Want};

/// How far down a backward goes, known before the step: below it nothing is kept and nothing is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The head alone.
    Head,
    /// To a layer, and to `Until` inside it.
    Layer(usize, Until),
    /// To the embeddings.
    Embeddings,
}

impl Depth {
    /// The depth at which `trained` tensors (role, layer) all receive their gradients.
    pub fn of(trained: impl IntoIterator<Item = (Role, Option<usize>)>) -> Self {
        let mut deepest = Depth::Head;
        for (role, layer) in trained {
            let (Role::Bias(term) | Role::NormWeight(term) | Role::Matrix(term)) = role else {
                return Depth::Embeddings;
            };
            let here = match (term, layer) {
                (Term::EmbeddingsLayernorm, _) => return Depth::Embeddings,
                (term, Some(l)) => Depth::Layer(l, Until::reaching(term)),
                (_, None) => Depth::Head,
            };
            deepest = deepest.deeper(here);
        }
        deepest
    }

    fn deeper(self, other: Self) -> Self {
        match (self, other) {
            (Depth::Head, d) | (d, Depth::Head) => d,
            (Depth::Embeddings, _) | (_, Depth::Embeddings) => Depth::Embeddings,
            (Depth::Layer(a, u), Depth::Layer(b, v)) => match a.cmp(&b) {
                std::cmp::Ordering::Less => self,
                std::cmp::Ordering::Greater => other,
                std::cmp::Ordering::Equal => Depth::Layer(a, u.min(v)),
            },
        }
    }

    /// The lowest layer that keeps what its backward needs; `None` where no layer does.
    fn lowest_layer(self) -> Option<usize> {
        match self {
            Depth::Head => None,
            Depth::Layer(l, _) => Some(l),
            Depth::Embeddings => Some(0),
        }
    }
}

/// The heads of a batch's groups.
pub struct Heads<D: Device> {
    /// The classifiers.
    pub classifier: Classifier<D>,
    /// A pooler of its own for each group, where the base has none to share.
    pub poolers: Option<Vec<Arc<D::Weight>>>,
}

/// What a step sums up: a gradient for each tensor that asked for one, (G, n).
pub struct Gradients<D: Device> {
    /// `embeddings.LayerNorm.bias`.
    pub embeddings_layernorm: Option<D::Params>,
    /// `embeddings.LayerNorm.weight`.
    pub gamma: Option<D::Params>,
    /// The embeddings' tables.
    pub tables: Option<Tables<Want<D>>>,
    /// Each layer's biases.
    pub biases: Vec<BiasGrads<D>>,
    /// Each layer's weights, where any trains.
    pub weights: Option<Vec<WeightGrads<D>>>,
    /// `pooler.dense.bias`.
    pub pooler: Option<D::Params>,
    /// `pooler.dense.weight`.
    pub pooler_weight: Want<D>,
    /// `classifier.weight`.
    pub classifier: D::Params,
    /// `classifier.bias`.
    pub classifier_bias: D::Params,
}

impl<D: Device> Gradients<D> {
    /// Room for the head's gradients and for nothing else.
    pub fn head_only(layers: usize, classifier: D::Params, classifier_bias: D::Params) -> Self {
        let none = || {
            let Ok(terms) = Terms::try_from_fn(|_| Ok::<_, std::convert::Infallible>(None));
            terms
        };
        Gradients {
            embeddings_layernorm: None,
            gamma: None,
            tables: None,
            biases: (0..layers).map(|_| none()).collect(),
            weights: None,
            pooler: None,
            pooler_weight: Want::Nothing,
            classifier,
            classifier_bias,
        }
    }

    /// Asks for the gradient of one tensor; `want` is what a matrix or table is asked for, else its sums are taken.
    pub fn ask(&mut self, role: Role, layer: Option<usize>, sums: Want<D>) {
        let dense = |want| if let Want::Full(sums) = want { Some(sums) } else { None };
        let n = self.biases.len();
        let nothing = || Weights {
            query: Want::Nothing,
            key: Want::Nothing,
            value: Want::Nothing,
            attention_output: Want::Nothing,
            attention_layernorm: None,
            intermediate: Want::Nothing,
            output: Want::Nothing,
            output_layernorm: None,
        };
        match (role, layer) {
            (Role::Bias(Term::EmbeddingsLayernorm), _) => self.embeddings_layernorm = dense(sums),
            (Role::Bias(Term::Pooler), _) => self.pooler = dense(sums),
            (Role::Bias(term), Some(l)) => {
                if let Some(to) = self.biases[l].get_mut(term) {
                    *to = dense(sums);
                }
            }
            (Role::NormWeight(_), None) => self.gamma = dense(sums),
            (Role::NormWeight(term), Some(l)) => {
                let weights = self.weights.get_or_insert_with(|| (0..n).map(|_| nothing()).collect());
                if let Some(to) = weights[l].norm_mut(term) {
                    *to = dense(sums);
                }
            }
            (Role::Matrix(_), None) => self.pooler_weight = sums,
            (Role::Matrix(term), Some(l)) => {
                let weights = self.weights.get_or_insert_with(|| (0..n).map(|_| nothing()).collect());
                if let Some(to) = weights[l].matrix_mut(term) {
                    *to = sums;
                }
            }
            (Role::Table(table), _) => {
                let tables = self.tables.get_or_insert_with(|| Tables {
                    word: Want::Nothing,
                    position: Want::Nothing,
                    token_type: Want::Nothing,
                });
                match table {
                    Table::Word => tables.word = sums,
                    Table::Position => tables.position = sums,
                    Table::TokenType => tables.token_type = sums,
                }
            }
            (Role::Bias(_), None) => {}
        }
    }

    /// The sums of one tensor, where they were asked for.
    pub fn sums_mut(&mut self, role: Role, layer: Option<usize>) -> Option<&mut D::Params> {
        fn of<D: Device>(want: &mut Want<D>) -> Option<&mut D::Params> {
            match want {
                Want::Nothing => None,
                Want::Full(sums) => Some(sums),
                Want::Sampled { values, .. } => Some(values),
            }
        }
        match (role, layer) {
            (Role::Bias(Term::EmbeddingsLayernorm), _) => self.embeddings_layernorm.as_mut(),
            (Role::Bias(Term::Pooler), _) => self.pooler.as_mut(),
            (Role::Bias(term), Some(l)) => self.biases[l].get_mut(term)?.as_mut(),
            (Role::Bias(_), None) => None,
            (Role::NormWeight(_), None) => self.gamma.as_mut(),
            (Role::NormWeight(term), Some(l)) => self.weights.as_mut()?[l].norm_mut(term)?.as_mut(),
            (Role::Matrix(_), None) => of(&mut self.pooler_weight),
            (Role::Matrix(term), Some(l)) => of(self.weights.as_mut()?[l].matrix_mut(term)?),
            (Role::Table(table), _) => {
                let tables = self.tables.as_mut()?;
                of(match table {
                    Table::Word => &mut tables.word,
                    Table::Position => &mut tables.position,
                    Table::TokenType => &mut tables.token_type,
                })
            }
        }
    }
}

/// What a pass keeps for its backward, planned before the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// How far down the backward goes.
    pub depth: Depth,
    /// Whether weights train: the input of each layer is then rebuilt, so the normalised one under the lowest layer is
    /// kept too.
    pub weights: bool,
    /// How many of the layers that the backward goes through, from the lowest, keep their input alone and run again on
    /// the way back, to the same bits. 0 where weights train.
    pub recomputed: usize,
}

impl Plan {
    /// Layers that the backward goes through.
    pub fn layers(&self, config: &Config) -> usize {
        self.depth.lowest_layer().map_or(0, |lowest| config.num_hidden_layers - lowest)
    }

    /// Bytes of activations at the peak of a step over so many tokens and sequences.
    ///
    /// Kept of a layer are nine values a token and hidden unit (where I = 4 H), the log-sum-exp and both 1/sigma; of one
    /// that is recomputed its input. The last layer has a row a sequence, but for keys and values. On top come the
    /// values that a layer hands on while it runs, which a device counts itself.
    pub fn bytes<D: Device>(&self, config: &Config, tokens: usize, sequences: usize) -> usize {
        let (tokens, sequences) = D::size_class(tokens, sequences);
        let [h, i, a] = [config.hidden_size, config.intermediate_size, config.num_attention_heads];
        let (stream, act) = (D::STREAM_BYTES, D::ACT_BYTES);
        let rest = |rows: usize| rows * ((3 * h + i) * act + (a + 2) * stream);
        let (whole, last) = (2 * tokens * h * act + rest(tokens), 2 * tokens * h * act + rest(sequences));
        let running = D::running_bytes(tokens, h, i);
        let layers = self.layers(config);
        let inputs = self.recomputed * tokens * h * stream;
        let kept = match layers - self.recomputed.min(layers) {
            0 => 0,
            n => (n - 1) * whole + last,
        };
        // A layer that keeps nothing is whole while it runs: forward, or again on the way back when those above are gone.
        let passing = if self.recomputed > 0 || layers < config.num_hidden_layers { whole } else { 0 };
        inputs + kept.max(passing) + running
    }

    /// Nothing is kept.
    pub const INFERENCE: Plan = Plan { depth: Depth::Head, weights: false, recomputed: 0 };
}

/// What a pass has kept.
pub struct Saved<D: Device> {
    /// The normalised input of the lowest layer kept: that of the embeddings, or of the layer below.
    below: Option<Norm<D>>,
    layers: Vec<SavedLayer<D>>,
}

/// What a pass has kept of a layer.
enum SavedLayer<D: Device> {
    /// All that its backward needs.
    Kept(Kept<D>),
    /// Its input, from which that is computed again.
    Input(D::Stream),
}

impl<D: Device> SavedLayer<D> {
    fn output_norm(&self) -> Option<&Norm<D>> {
        match self {
            SavedLayer::Kept(kept) => Some(kept.output_norm()),
            SavedLayer::Input(_) => None,
        }
    }
}

/// The network and the vectors in use: what both ways of a pass read.
pub struct Pass<'n, D: Device> {
    /// The weights.
    pub network: &'n Network<D>,
    /// The biases, a row a group.
    pub biases: &'n AllBiases<D>,
}

impl<D: Ops> Pass<'_, D> {
    fn embeddings_affine(&self) -> Affine<'_, D> {
        Affine { gamma: &self.network.gamma, beta: &self.biases.embeddings_layernorm }
    }

    /// The last hidden state of first rows, (S, H).
    fn hidden(&self, d: &mut D, plan: Plan) -> (D::Stream, Saved<D>) {
        let (mut x, norm) = d.embed(self.network.tables(), self.embeddings_affine());
        let lowest = plan.depth.lowest_layer();
        let mut saved = Saved { below: (plan.weights && lowest == Some(0)).then_some(norm), layers: Vec::new() };
        let n = self.network.layers.len();
        for (l, (w, b)) in self.network.layers.iter().zip(&self.biases.layers).enumerate() {
            let again = lowest.is_some_and(|lowest| lowest <= l && l < lowest + plan.recomputed);
            let input = again.then(|| d.copy(&x));
            let (h, kept) = layer::forward(d, l, w, b, x, l + 1 == n);
            x = h;
            match lowest {
                Some(lowest) if lowest <= l => saved.layers.push(match input {
                    Some(input) => SavedLayer::Input(input),
                    None => SavedLayer::Kept(kept),
                }),
                Some(lowest) if plan.weights && lowest == l + 1 => saved.below = Some(kept.into_output_norm()),
                _ => {}
            }
        }
        (x, saved)
    }

    /// The poolers that the groups read, one shared or one a group.
    fn poolers<'p>(&'p self, heads: &'p Heads<D>) -> Vec<&'p D::Weight> {
        match &heads.poolers {
            Some(own) => own.iter().map(|w| &**w).collect(),
            None => self.network.pooler.iter().map(|w| &**w).collect(),
        }
    }

    /// The pooled output of first rows, (S, H).
    fn pooled(&self, d: &mut D, first: &D::Stream, heads: &Heads<D>) -> D::Act {
        d.pool(first, &self.poolers(heads), &self.biases.pooler)
    }

    /// Logits (S, C_max) in inference.
    pub fn logits(&self, d: &mut D, heads: &Heads<D>) -> D::Rows {
        let (first, _) = self.hidden(d, Plan::INFERENCE);
        let pooled = self.pooled(d, &first, heads);
        d.classify(&pooled, &heads.classifier)
    }

    /// Forward, loss and backward of one (micro-)batch; gradients are added to `grads`. Gives each group's loss.
    pub fn train(&self, d: &mut D, heads: &Heads<D>, loss: &[Loss], plan: Plan, grads: &mut Gradients<D>) -> D::Rows {
        let (first, saved) = self.hidden(d, plan);
        let pooled = self.pooled(d, &first, heads);
        let logits = d.classify(&pooled, &heads.classifier);
        let (losses, dlogits) = d.loss(logits, &heads.classifier.n_outputs, loss);
        let dp =
            d.classify_back(dlogits, &pooled, &heads.classifier, &mut grads.classifier, &mut grads.classifier_bias);
        let wants_pooler = grads.pooler.is_some() || !matches!(grads.pooler_weight, Want::Nothing);
        if plan.depth == Depth::Head && !wants_pooler {
            return losses;
        }
        let poolers = self.poolers(heads);
        let input = (!matches!(grads.pooler_weight, Want::Nothing)).then_some(&first);
        let dh = d.pool_back(dp, pooled, input, &poolers, &mut grads.pooler_weight, grads.pooler.as_mut());
        drop(first);
        self.backward(d, saved, dh, plan.depth, grads);
        losses
    }

    fn backward(&self, d: &mut D, saved: Saved<D>, mut dh: D::Stream, depth: Depth, grads: &mut Gradients<D>) {
        let Some(lowest) = depth.lowest_layer() else { return };
        let Saved { below, mut layers } = saved;
        let Gradients { biases, weights, gamma, tables, embeddings_layernorm, .. } = grads;
        while let Some(of_layer) = layers.pop() {
            let l = lowest + layers.len();
            let until = match depth {
                Depth::Layer(at, until) if at == l => until,
                _ => Until::Input,
            };
            // The plan keeps the norm below wherever weights train, and only they ask for the input.
            let norm = layers.last().and_then(SavedLayer::output_norm).or(below.as_ref());
            let input = |d: &mut D| self.input(d, l, norm);
            let (w, b) = (&self.network.layers[l], &self.biases.layers[l]);
            let kept = match of_layer {
                SavedLayer::Kept(kept) => kept,
                SavedLayer::Input(x) => layer::forward(d, l, w, b, x, l + 1 == self.network.layers.len()).1,
            };
            let dw = weights.as_mut().map(|w| &mut w[l]);
            match layer::backward(d, l, w, b, kept, dh, until, &mut biases[l], dw, input) {
                Some(dx) => dh = dx,
                None => return,
            }
        }
        if depth == Depth::Embeddings {
            let gamma_in_use = &self.network.gamma;
            d.embed_back(dh, below, gamma_in_use, tables.as_mut(), gamma.as_mut(), embeddings_layernorm.as_mut());
        }
    }

    /// The input of a layer, rebuilt from the normalised output of what lies below it.
    fn input(&self, d: &mut D, layer: usize, norm: Option<&Norm<D>>) -> D::Act {
        let norm = norm.expect("a plan for training weights keeps the norm below the lowest layer");
        match layer.checked_sub(1) {
            Some(below) => {
                let gamma = &*self.network.layers[below].output_layernorm;
                let beta = &self.biases.layers[below].output_layernorm;
                d.renorm(norm, Affine { gamma, beta }, None)
            }
            None => d.renorm(norm, self.embeddings_affine(), Some(Site::EMBEDDINGS)),
        }
    }
}
