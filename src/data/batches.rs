//! From examples to token ids, and from lengths to batches.
//!
//! Texts are tokenised once, before the first step. Batches are lists of indices; whoever runs them packs the
//! sequences. No batch is padded, so rows of like length in a batch save no tokens: training draws its batches plainly,
//! unless it is asked for transformers' `group_by_length`.

use rand::RngExt;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use super::dataset::Example;
use super::draws::{Purpose, draws};
use crate::base::tokenizer::Tokenizer;
use crate::device::batch::Target;
use crate::error::Result;

/// Batches in a pool: rows are shuffled over all of an epoch, and sorted by length inside a pool of this many batches.
/// At most fifty, and at most a quarter of the rows, as in transformers' `group_by_length`.
const POOL: usize = 50;

/// One tokenised example.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// Token ids with `[CLS]` and `[SEP]`, (tokens); never empty.
    pub ids: Vec<u32>,
    /// Token type ids, (tokens): 1 for the second text and its `[SEP]`.
    pub type_ids: Vec<u32>,
    /// The example's target.
    pub target: Option<Target>,
}

/// Tokenised examples, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// One sequence an example.
    pub sequences: Vec<Sequence>,
    /// How many were longer than the maximum length and are cut.
    pub truncated: usize,
}

impl Encoded {
    /// Tokens of each sequence: what batches are made by.
    pub fn lengths(&self) -> Vec<usize> {
        self.sequences.iter().map(|s| s.ids.len()).collect()
    }
}

/// Tokenises all examples, on all threads of the current pool, in order. Texts longer than `max_length` tokens (with
/// the special ones) are cut longest first, and counted.
///
/// # Errors
///
/// Where the tokenizer fails; of several failures, the first example's.
pub fn encode(examples: &[Example], tokenizer: &Tokenizer, max_length: usize) -> Result<Encoded> {
    let encode = |example: &Example| {
        let encoding = tokenizer.encode(&example.text, example.text_pair.as_deref(), max_length)?;
        let sequence = Sequence { ids: encoding.ids, type_ids: encoding.type_ids, target: example.target };
        Ok((sequence, encoding.truncated))
    };
    // Collected before the errors are looked at: rayon would answer whichever error came first in time.
    let encoded: Vec<Result<(Sequence, bool)>> = examples.par_iter().with_min_len(64).map(encode).collect();
    let mut all = Encoded { sequences: Vec::with_capacity(examples.len()), truncated: 0 };
    for one in encoded {
        let (sequence, truncated) = one?;
        all.sequences.push(sequence);
        all.truncated += usize::from(truncated);
    }
    Ok(all)
}

/// The batches of one epoch (counted from 0): every index of `lengths` once, shuffled by seed and epoch. All have
/// `batch_size` rows but the last, where it does not divide their number.
///
/// With `group_by_length` a batch's rows are of like length. The short batch then stands at a random place and is cut
/// at a random place of its pool's lengths, so that no row is favoured.
///
/// # Panics
///
/// Where `batch_size` is 0.
pub fn training_batches(
    lengths: &[usize],
    batch_size: usize,
    group_by_length: bool,
    seed: u64,
    epoch: u32,
) -> Vec<Vec<usize>> {
    assert!(batch_size > 0, "a batch has a row");
    let mut rng = draws(seed, Purpose::Epoch(epoch));
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.shuffle(&mut rng);
    if !group_by_length {
        return order.chunks(batch_size).map(<[usize]>::to_vec).collect();
    }
    let mut batches = Vec::with_capacity(lengths.len().div_ceil(batch_size));
    // Small sets would else be sorted whole, and every epoch have nearly the same batches.
    let pool = (order.len() / (4 * batch_size)).clamp(1, POOL);
    for pool in order.chunks_mut(pool * batch_size) {
        // A stable sort: rows of one length stay shuffled.
        pool.sort_by_key(|&i| lengths[i]);
        let n_full = pool.len() / batch_size;
        let short = pool.len() % batch_size;
        let (before, rest) = pool.split_at(rng.random_range(0..=n_full) * batch_size);
        let (short, after) = rest.split_at(short);
        let parts = before.chunks(batch_size).chain(short.chunks(batch_size)).chain(after.chunks(batch_size));
        batches.extend(parts.map(<[usize]>::to_vec));
    }
    batches.shuffle(&mut rng);
    batches
}

/// Batches for a forward pass alone: every index of `lengths` once, longest first, so that the first batch needs the
/// most memory, each filled up to `max_tokens` tokens. A sequence that is longer than that is a batch of its own.
pub fn evaluation_batches(lengths: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut n_tokens = 0;
    for i in order {
        match batches.last_mut() {
            Some(batch) if n_tokens + lengths[i] <= max_tokens => {
                batch.push(i);
                n_tokens += lengths[i];
            }
            _ => {
                batches.push(vec![i]);
                n_tokens = lengths[i];
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"];
        Tokenizer::from_vocab(vocab.map(String::from).to_vec(), true).unwrap()
    }

    #[test]
    fn examples_are_encoded_in_order_and_cuts_are_counted() {
        let example = |i: usize| Example {
            text: ["a", "b b", "c c c c c c"][i % 3].to_string(),
            text_pair: (i % 2 == 1).then(|| "a".to_string()),
            target: Some(Target::Class(i as u32)),
        };
        let examples: Vec<Example> = (0..1000).map(example).collect();
        let encoded = encode(&examples, &tokenizer(), 6).unwrap();
        assert!(encoded.sequences.iter().zip(&examples).all(|(s, e)| s.target == e.target));
        assert_eq!(encoded.sequences[0].ids, [2, 5, 3]);
        assert_eq!(encoded.sequences[1].ids, [2, 6, 6, 3, 5, 3]);
        assert_eq!(encoded.sequences[1].type_ids, [0, 0, 0, 0, 1, 1]);
        assert_eq!(encoded.sequences[2].ids, [2, 7, 7, 7, 7, 3]);
        assert_eq!(encoded.sequences[5].ids, [2, 7, 7, 3, 5, 3]);
        assert_eq!(encoded.truncated, 333);
        assert_eq!(encoded.lengths()[..3], [3, 6, 6]);
        assert!(encode(&examples, &tokenizer(), 2).is_err(), "no room for a text");
    }

    fn sorted(batches: &[Vec<usize>]) -> Vec<usize> {
        let mut all = batches.concat();
        all.sort_unstable();
        all
    }

    proptest! {
        #[test]
        fn an_epoch_holds_every_row_once(
            lengths in prop::collection::vec(1usize..200, 0..3000), batch_size in 1usize..40, group: bool, seed: u64,
            epoch in 0u32..9,
        ) {
            let batches = training_batches(&lengths, batch_size, group, seed, epoch);
            prop_assert!(sorted(&batches).into_iter().eq(0..lengths.len()));
            prop_assert_eq!(batches.len(), lengths.len().div_ceil(batch_size));
            let short = lengths.len() % batch_size;
            prop_assert!(batches.iter().all(|b| b.len() == batch_size || b.len() == short));
        }

        #[test]
        fn evaluation_fills_its_token_budget_and_loses_no_row(
            lengths in prop::collection::vec(1usize..200, 0..500), max_tokens in 1usize..1000,
        ) {
            let batches = evaluation_batches(&lengths, max_tokens);
            prop_assert!(sorted(&batches).into_iter().eq(0..lengths.len()));
            let n_tokens: Vec<usize> = batches.iter().map(|b| b.iter().map(|&i| lengths[i]).sum()).collect();
            prop_assert!(batches.iter().zip(&n_tokens).all(|(b, &n)| n <= max_tokens || b.len() == 1));
            // Nothing that would have fitted was left for the next batch.
            prop_assert!(batches.windows(2).zip(&n_tokens).all(|(b, &n)| n + lengths[b[1][0]] > max_tokens));
        }
    }

    #[test]
    fn seed_and_epoch_decide_the_batches() {
        let lengths: Vec<usize> = (0..500).map(|i| 5 + i * 7 % 60).collect();
        for group in [false, true] {
            let batches = |seed, epoch| training_batches(&lengths, 16, group, seed, epoch);
            assert_eq!(batches(1, 2), batches(1, 2));
            assert_ne!(batches(1, 2), batches(1, 3));
            assert_ne!(batches(1, 2), batches(2, 2));
        }
    }

    #[test]
    fn grouped_by_length_a_batch_holds_rows_of_like_length() {
        let lengths: Vec<usize> = (0..4000).map(|i| 1 + i * 37 % 128).collect();
        let spread = |batch: &Vec<usize>| {
            let of = |i: &usize| lengths[*i];
            batch.iter().map(of).max().unwrap() - batch.iter().map(of).min().unwrap()
        };
        let batches = training_batches(&lengths, 16, true, 0, 0);
        let mean = |batches: &[Vec<usize>]| batches.iter().map(spread).sum::<usize>() as f64 / batches.len() as f64;
        let (grouped, plain) = (mean(&batches), mean(&training_batches(&lengths, 16, false, 0, 0)));
        assert!(grouped < 8.0 && plain > 90.0, "mean spread {grouped} and {plain} of lengths up to 128");
        assert!(!batches.is_sorted_by_key(|b| lengths[b[0]]), "batches are shuffled");
    }

    #[test]
    fn the_short_batch_is_not_always_of_one_length() {
        let lengths: Vec<usize> = (1..=101).collect();
        let short = |seed| training_batches(&lengths, 10, true, seed, 0).into_iter().find(|b| b.len() == 1).unwrap()[0];
        let places: std::collections::BTreeSet<usize> = (0..40).map(short).collect();
        assert!(places.len() > 3, "{places:?}");
    }
}
