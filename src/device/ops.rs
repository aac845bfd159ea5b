//! What one encoder needs of a device: memory ([`Device`]) and arithmetic ([`Ops`]).
//!
//! A value that implements both is a context: it holds one step over one packed batch at a time, knows each row's
//! sequence and group, the dropout of the step, the pool of buffers and the threads or the stream. Calls between
//! [`Device::begin`] and [`Device::finish`] only enqueue work; none returns a number to the host and none returns a
//! `Result`: the first error of a device is kept and reported by `finish`.
//!
//! Buffers are owned values. A buffer goes back to the pool when it is dropped, so ownership is the memory plan: what
//! `Kept` holds is what is saved for the backward. An argument taken by value may be written over and handed back.
//!
//! Activations live in one of two row spaces: one row a token (T), or one row a sequence, that of its first token (S).
//! A buffer knows its own; ops find each row's group and position from it, so the encoder's text is the same for both.
//!
//! Shape letters: see [`super::batch`].

use std::sync::Arc;

use super::batch::Batch;
use crate::error::Result;

/// Where in the network a dropout mask is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The encoder layer; 0 at the two ends.
    pub layer: u32,
    /// The place in it.
    pub at: At,
}

impl Site {
    /// The embeddings' output.
    pub const EMBEDDINGS: Site = Site { layer: 0, at: At::Embeddings };
    /// The pooled output.
    pub const POOLED: Site = Site { layer: 0, at: At::Pooled };
}

/// The places that drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The embeddings' output.
    Embeddings = 0,
    /// The attention probabilities.
    Probabilities = 1,
    /// The attention's output projection.
    AttentionOutput = 2,
    /// The feed-forward's output.
    Output = 3,
    /// The pooled output, before the classifier.
    Pooled = 4,
}

/// Dropout probabilities of a training step, each from 0 to below 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// `hidden_dropout_prob`.
    pub hidden: f32,
    /// `attention_probs_dropout_prob`.
    pub attention: f32,
    /// `classifier_dropout`.
    pub classifier: f32,
}

impl Dropout {
    /// No dropout at all: inference, or a parity test.
    pub const NONE: Dropout = Dropout { hidden: 0.0, attention: 0.0, classifier: 0.0 };

    /// The probability at a place.
    pub fn at(&self, at: At) -> f32 {
        match at {
            At::Embeddings | At::AttentionOutput | At::Output => self.hidden,
            At::Probabilities => self.attention,
            At::Pooled => self.classifier,
        }
    }
}

/// The feed-forward's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// u Φ(u), Φ by the error function (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its approximation by tanh, equation 2 there.
    GeluTanh,
    /// max(u, 0).
    Relu,
}

/// What of a network changes the arithmetic of an op.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arithmetic {
    /// A; the hidden size is a multiple of it.
    pub n_heads: usize,
    /// Epsilon of every LayerNorm.
    pub layer_norm_eps: f64,
    /// The feed-forward's activation.
    pub activation: Activation,
}

/// What a backward wants of one weight matrix or table.
pub enum Want<D: Device> {
    /// No gradient: the weight is frozen.
    Nothing,
    /// The whole gradient, added to these (1, out * in) sums; (G, out * in) where each group has a weight of its own.
    Full(D::Params),
    /// The gradient of the entries at these flat positions alone, added to (1, entries) sums.
    Sampled {
        /// Flat, row-major positions, strictly increasing.
        entries: D::Index,
        /// One sum a position.
        values: D::Params,
    },
}

/// A LayerNorm's normalised input and 1/sigma: all that its backward, or its output rebuilt, needs.
pub struct Norm<D: Device> {
    /// x^, (rows, H).
    pub x_hat: D::Act,
    /// 1/sigma, (rows, 1).
    pub r_sigma: D::Rows,
}

/// The vectors of one LayerNorm.
pub struct Affine<'a, D: Device> {
    /// gamma, (1 or G, H).
    pub gamma: &'a D::Params,
    /// beta, (1 or G, H).
    pub beta: &'a D::Params,
}

/// A sum that a gradient is added to, where somebody asked for it.
pub type Sum<'a, P> = Option<&'a mut P>;

/// The three tables of the embeddings: word, position, token type.
pub struct Tables<T> {
    /// (vocab_size, H).
    pub word: T,
    /// (max_position_embeddings, H).
    pub position: T,
    /// (type_vocab_size, H).
    pub token_type: T,
}

/// The classifiers of a batch's groups, one behind the other: padded to the widest where they train, as they are where
/// they answer, so that one task of ten thousand classes does not widen all others.
pub struct Classifier<D: Device> {
    /// (outputs, H).
    pub weight: D::Params,
    /// (outputs).
    pub bias: D::Params,
    /// Each group's first output.
    pub first: Vec<usize>,
    /// C of each group.
    pub n_outputs: Vec<usize>,
}

/// How one group's loss is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// What a sequence's loss is multiplied by: 1 / the sequences of the group's whole batch, so that accumulated
    /// micro-batches make one mean.
    pub scale: f32,
}

/// AdamW for one tensor of one group (Loshchilov and Hutter 2019, as PyTorch computes it: epsilon is added outside
/// the bias-corrected root).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, on `base + delta`.
    pub weight_decay: f64,
    /// This step's number, from 1.
    pub step: u64,
    /// The gradient is scaled so that the norm over all of the group's tensors is at most this; infinite for none.
    pub max_grad_norm: f64,
}

impl AdamW {
    /// The learning rate over the first moment's bias correction, and the root of the second's.
    pub fn corrections(&self) -> (f64, f64) {
        let steps = self.step.min(i32::MAX as u64) as i32;
        let root = (1.0 - self.beta2.powi(steps)).sqrt();
        (self.learning_rate / (1.0 - self.beta1.powi(steps)), root)
    }
}

/// One trained tensor of every group: its difference to the base, and AdamW's moments.
pub struct Trained<D: Device> {
    /// The base's own values, (1 or G, n).
    pub base: D::Params,
    /// Difference to the base, (G, n).
    pub delta: D::Params,
    /// First moment, (G, n).
    pub m: D::Params,
    /// Second moment, (G, n).
    pub v: D::Params,
}

/// A device's own memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Taken by this context and those that it shares the device with in this process, free buffers among them.
    pub taken: usize,
    /// The most that were taken at once.
    pub peak: usize,
    /// What this context could still use: what nobody has taken, and its own free buffers.
    pub available: usize,
}

/// Memory: what lies on the device, how it gets there and back.
pub trait Device: Sized + Send + 'static {
    /// (rows, n), f32: the residual stream and its gradient.
    type Stream: Send;
    /// (rows, n) at the step's precision: what feeds a product or is kept. Rounded once, where it is made; every later
    /// use reads the rounded value.
    type Act: Send;
    /// (rows, m), f32: 1/sigma (m = 1), log-sum-exp (m = A), logits (m = C_max).
    type Rows: Send;
    /// (out, in), laid out for this device and precision: at load for the forward, for the backward when one first asks.
    type Weight: Send + Sync;
    /// (rows, H), read by row.
    type Table: Send + Sync;
    /// (groups, n), one row a group (one row in all: shared): vectors, gradients, optimizer state.
    type Params: Send + Sync;
    /// Flat positions of sampled entries.
    type Index: Send + Sync;

    /// Bytes of a number of [`Device::Stream`] and [`Device::Rows`].
    const STREAM_BYTES: usize;
    /// Bytes of a number of [`Device::Act`].
    const ACT_BYTES: usize;

    /// Rows of the buffers for a batch of so many tokens and sequences.
    fn size_class(tokens: usize, sequences: usize) -> (usize, usize) {
        (tokens, sequences.next_power_of_two())
    }
    /// The most bytes that a layer hands on while it runs, beside what is kept, for so many rows: three values of the
    /// stream and two of activations, a hidden unit each.
    fn running_bytes(rows: usize, hidden: usize, _intermediate: usize) -> usize {
        rows * hidden * (3 * Self::STREAM_BYTES + 2 * Self::ACT_BYTES)
    }

    /// Another context over the same threads or device, with a pool of its own.
    fn fork(&self) -> Self;
    /// Runs `f` where the device's threads are at hand.
    fn run<T: Send>(&mut self, f: impl FnOnce(&mut Self) -> T + Send) -> T;
    /// Starts a pass over `batch`.
    fn begin(&mut self, batch: Arc<Batch>, dropout: Dropout);
    /// Waits for the pass and reports the first error of the device since [`Device::begin`].
    fn finish(&mut self) -> Result<()>;
    /// Gives back the memory of passes that are over.
    fn release(&mut self);
    /// Gives back to the system what laying weights out has freed.
    fn settle(&self);
    /// The most bytes of pooled buffers that were in use at once, since the context was made.
    fn peak_bytes(&self) -> usize;
    /// What of the device's own memory is in use; `None` where it has none of its own.
    fn memory(&self) -> Option<MemoryUse> {
        None
    }

    /// Lays out a weight of `n_out` rows and `n_in` columns, row-major.
    fn weight(&self, n_out: usize, n_in: usize, values: Vec<f32>) -> Self::Weight;
    /// Lays a weight out for the backward too, where it is not yet; without this the first backward does.
    fn prepare_backward(&self, w: &Self::Weight);
    /// A table of `width` columns, row-major.
    fn table(&self, width: usize, values: Vec<f32>) -> Self::Table;
    /// Vectors, (rows, values.len() / rows).
    fn params(&self, rows: usize, values: Vec<f32>) -> Self::Params;
    /// Vectors of zeros, (rows, n).
    fn zeros(&self, rows: usize, n: usize) -> Self::Params;
    /// Positions.
    fn index(&self, positions: &[u64]) -> Self::Index;
    /// Sets every entry to zero.
    fn clear(&mut self, p: &mut Self::Params);
    /// Hands the weight's bytes, as laid out, to `visit`: for the hash that shows that frozen means frozen.
    fn visit_weight(&self, w: &Self::Weight, visit: &mut dyn FnMut(&[u8]));
    /// As [`Device::visit_weight`], for a table.
    fn visit_table(&self, t: &Self::Table, visit: &mut dyn FnMut(&[u8]));

    /// All values, row-major, on the host.
    fn read_params(&self, p: &Self::Params) -> Vec<f32>;
    /// All values, row-major, on the host, at full width: a test differentiates losses.
    fn read_rows(&self, r: &Self::Rows) -> Vec<f64>;
    /// All values, row-major, on the host.
    fn read_stream(&self, s: &Self::Stream) -> Vec<f32>;
    /// All values, row-major, on the host.
    fn read_act(&self, a: &Self::Act) -> Vec<f32>;
}

/// Arithmetic. `g` is the row's group, M a dropout mask already divided by 1 - p, P the attention probabilities.
pub trait Ops: Device {
    /// The same values again.
    fn copy(&mut self, x: &Self::Stream) -> Self::Stream;

    // Row spaces.

    /// The rows of the sequences' first tokens: (T, n) to (S, n).
    fn firsts(&mut self, x: Self::Stream) -> Self::Stream;
    /// The reverse for a gradient: (S, n) to (T, n), zero elsewhere. A stream of tokens is handed back as it is.
    fn spread(&mut self, d: Self::Stream) -> Self::Stream;
    /// Goes on over another batch, without dropout: its sequence `s` has the rows of sequence `from[s]` of the batch so
    /// far, of the same length.
    fn branch(&mut self, x: Self::Stream, batch: Arc<Batch>, from: &[usize]) -> Self::Stream;

    // Products. `linear` goes stream -> act and adds its bias; `product` goes act -> stream, its bias is `add_norm`'s.

    /// `x W' + b[g]`.
    fn linear(&mut self, x: &Self::Stream, w: &Self::Weight, b: &Self::Params) -> Self::Act;
    /// dx + dy W.
    fn linear_back(&mut self, dy: Self::Act, w: &Self::Weight, dx: Self::Stream) -> Self::Stream;
    /// x W'.
    fn product(&mut self, x: Self::Act, w: &Self::Weight) -> Self::Stream;
    /// dy W.
    fn product_back(&mut self, dy: Self::Act, w: &Self::Weight) -> Self::Act;

    /// `u = x Wi' + bi[g]` and `y = f(u) Wo'`. One op, so that a device may apply f while it packs the second product's
    /// rows and never store it.
    fn feed_forward(
        &mut self,
        x: &Self::Stream,
        wi: &Self::Weight,
        bi: &Self::Params,
        wo: &Self::Weight,
    ) -> (Self::Act, Self::Stream);
    /// du = (dy Wo) * f'(u), over u; its column sums to `dbi`.
    fn feed_forward_back(
        &mut self,
        dy: Self::Act,
        wo: &Self::Weight,
        u: Self::Act,
        dbi: Sum<Self::Params>,
    ) -> Self::Act;

    /// O = (M * P) V inside each sequence, and the log-sum-exp of each row of scores, (rows, A). Where `q` holds first
    /// rows alone, so does O.
    fn attention(&mut self, q: &Self::Act, k: &Self::Act, v: &Self::Act, site: Site) -> (Self::Act, Self::Rows);
    /// dq, dk, dv, over q, k, v; P is rebuilt from the log-sum-exp. Column sums of dq and dv to `dbq` and `dbv`. The
    /// key bias has no gradient: adding a constant to every key of a query leaves its softmax as it is.
    #[allow(clippy::too_many_arguments)]
    fn attention_back(
        &mut self,
        d_o: Self::Act,
        qkv: (Self::Act, Self::Act, Self::Act),
        lse: Self::Rows,
        site: Site,
        dbq: Sum<Self::Params>,
        dbv: Sum<Self::Params>,
    ) -> (Self::Act, Self::Act, Self::Act);

    /// h = gamma x^ + beta with `x^ = norm(x + M * (a + b[g]))`.
    fn add_norm(
        &mut self,
        x: Self::Stream,
        a: Self::Stream,
        b: &Self::Params,
        ln: Affine<Self>,
        site: Site,
    ) -> (Self::Stream, Norm<Self>);
    /// dz (over dh) to the residual, M * dz (over x^) to the branch; column sums of M * dz to `db`, of dh * x^ to
    /// `dgamma`, of dh to `dbeta`.
    #[allow(clippy::too_many_arguments)]
    fn add_norm_back(
        &mut self,
        dh: Self::Stream,
        n: Norm<Self>,
        gamma: &Self::Params,
        site: Site,
        db: Sum<Self::Params>,
        dgamma: Sum<Self::Params>,
        dbeta: Sum<Self::Params>,
    ) -> (Self::Stream, Self::Act);

    // Only for `Want::Full` and `Want::Sampled`: a layer's inputs once more, and the gradient of a weight.

    /// f(u).
    fn activate(&mut self, u: &Self::Act) -> Self::Act;
    /// M * (gamma x^ + beta), M only where a site is given.
    fn renorm(&mut self, n: &Norm<Self>, ln: Affine<Self>, dropout: Option<Site>) -> Self::Act;
    /// dW = dy' x, of the entries asked for. Where `dy` holds first rows and `x` all, x's first rows are read.
    fn weight_grad(&mut self, dy: &Self::Act, x: &Self::Act, want: &mut Want<Self>);

    // The two ends.

    /// M * LN(word + position + type).
    fn embed(&mut self, tables: Tables<&Self::Table>, ln: Affine<Self>) -> (Self::Stream, Norm<Self>);
    /// The gradients of the embeddings' LayerNorm and, where wanted, of the tables. `n` is what [`Ops::embed`] kept,
    /// needed for `dgamma` and the tables.
    fn embed_back(
        &mut self,
        dx: Self::Stream,
        n: Option<Norm<Self>>,
        gamma: &Self::Params,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<Self::Params>,
        dbeta: Sum<Self::Params>,
    );
    /// `tanh(x W' + b[g])` of the first rows (S, H); one weight for all groups, or one a group.
    fn pool(&mut self, x: &Self::Stream, w: &[&Self::Weight], b: &Self::Params) -> Self::Act;
    /// From the gradient of the pooled output: that of the pooler's input (S, H), column sums to `db`, and the weight's
    /// gradient; `x` is the pooler's input, needed where a weight wants one.
    fn pool_back(
        &mut self,
        dp: Self::Stream,
        pooled: Self::Act,
        x: Option<&Self::Stream>,
        w: &[&Self::Weight],
        want: &mut Want<Self>,
        db: Sum<Self::Params>,
    ) -> Self::Stream;
    /// Logits (S, C_max) of M * pooled; entries past a group's own outputs are zero.
    fn classify(&mut self, pooled: &Self::Act, c: &Classifier<Self>) -> Self::Rows;
    /// Cross entropy of classes (the mean of -log softmax), squared error of values: each group's loss, (G, 1), and
    /// the gradient of the logits. Targets come from the batch.
    fn loss(&mut self, logits: Self::Rows, n_outputs: &[usize], loss: &[Loss]) -> (Self::Rows, Self::Rows);
    /// The gradient of the pooled output (S, H), and of the classifiers.
    fn classify_back(
        &mut self,
        dlogits: Self::Rows,
        pooled: &Self::Act,
        c: &Classifier<Self>,
        dw: &mut Self::Params,
        db: &mut Self::Params,
    ) -> Self::Stream;

    // The optimizer's arithmetic. `train` keeps the schedule and hands over scalars.

    /// Adds each group's squared norm of `grad` to `sums` (G, 1), for the groups with a rule.
    fn add_squares(&mut self, grad: &Self::Params, rules: &[Option<AdamW>], sums: &mut Self::Params);
    /// One step of AdamW for the groups with a rule; `squares` are the sums of [`Ops::add_squares`] over all tensors.
    fn adamw(&mut self, p: &mut Trained<Self>, grad: &Self::Params, squares: &Self::Params, rules: &[Option<AdamW>]);
    /// `into = base + delta`, or `into[at[i]] = base[i] + delta[i]`; `base` may have one row for all groups.
    fn sum(&mut self, base: &Self::Params, delta: &Self::Params, at: Option<&Self::Index>, into: &mut Self::Params);
    /// As [`Ops::sum`], laying the weight of group `g` out anew.
    fn write_weight(
        &mut self,
        base: &Self::Params,
        delta: &Self::Params,
        g: usize,
        at: Option<&Self::Index>,
        into: &mut Self::Weight,
    );
    /// As [`Ops::sum`], for a table, which groups never own.
    fn write_table(
        &mut self,
        base: &Self::Params,
        delta: &Self::Params,
        at: Option<&Self::Index>,
        into: &mut Self::Table,
    );
    /// `into[i] = from[at[i]]`, one row.
    fn gather(&mut self, from: &Self::Params, at: &Self::Index, into: &mut Self::Params);
}
