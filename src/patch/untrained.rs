//! Patches that nobody trained.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::file::Patch;
use super::metadata::{Metadata, Pooling};
use super::{Selection, delta};
use crate::base::Base;
use crate::base::delta::{Change, Head};
use crate::base::problem::{Problem, Texts};
use crate::error::Result;

/// How far the values lie from zero at most: enough that two patches answer differently.
const WIDTH: f32 = 0.2;
/// The longest input, where the base takes as much.
const MAX_LENGTH: usize = 128;

impl Patch {
    /// A patch of random values, for measurements and tests, as [`Base::random`] is a base: all that `selection` names,
    /// and the head, are uniform between -0.2 and 0.2, and follow from `seed`. Its metadata say that it has seen no
    /// training: task `random-SEED`, epoch 0, no metrics, a training digest of zeros.
    ///
    /// # Errors
    ///
    /// A selection that does not fit the base, and what [`Patch::new`] refuses.
    pub fn random(base: &Base, selection: &Selection, problem: Problem, texts: Texts, seed: u64) -> Result<Patch> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-WIDTH..WIDTH)).collect() };
        let (config, n_outputs) = (base.config(), problem.n_outputs());
        let h = config.hidden_size;
        let head = Head {
            n_outputs,
            weight: values(n_outputs * h),
            bias: values(n_outputs),
            pooler: (!base.has_pooler()).then(|| (values(h * h), values(h))),
        };
        let requests = selection.resolve(config, base.has_pooler())?;
        let mut delta = delta::zeros(&requests, base.parameters(), head);
        for change in delta.changes.values_mut() {
            let (Change::Dense(of) | Change::Sparse { values: of, .. }) = change;
            *of = values(of.len());
        }
        let none = || "0".repeat(64);
        let metadata = Metadata {
            task: format!("random-{seed}"),
            problem,
            texts,
            max_length: MAX_LENGTH.min(config.max_position_embeddings),
            pooling: Pooling::Cls,
            selection: selection.spec(),
            base_id: base.id().into(),
            base_fingerprint: base.fingerprint().into(),
            tokenizer_fingerprint: base.tokenizer().map_or_else(|_| none(), |t| t.fingerprint().into()),
            training_digest: none(),
            metrics: Default::default(),
            split: "none".into(),
            epoch: 0,
            content_hash: String::new(),
        };
        Patch::new(metadata, delta, config, base.has_pooler())
    }
}
