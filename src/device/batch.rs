//! The packed batch: what one step runs over.
//!
//! A batch is the concatenation of its sequences without padding. Sequences are ordered by group (a patch, or a
//! training run), so each group owns a contiguous range of sequences and of token rows.
//!
//! Shape letters, here and in every layer above: T tokens in the batch, S sequences, H hidden, A attention heads,
//! D head size, I intermediate, G groups, C outputs of a head.

use std::ops::Range;

/// What keys a sequence's dropout masks, so that they do not depend on what else is in the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The run's optimizer step, from 0.
    pub step: u32,
    /// The sequence's index in its run's batch, below 2^20; micro-batches that are accumulated count on.
    pub index: u32,
}

/// What a sequence should be predicted as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// A class, an index into the task's labels.
    Class(u32),
    /// A value, on its raw scale.
    Value(f32),
}

/// Which rows an activation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// One a token.
    Tokens,
    /// One a sequence: its first token's.
    Firsts,
}

/// Sequences packed without padding, ordered by group. Build it with [`Batch::push`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    bounds: Vec<usize>,
    groups: Vec<usize>,
    keys: Vec<DropoutKey>,
    targets: Vec<Option<Target>>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Batch { bounds: vec![0], ..Default::default() }
    }

    /// Adds a sequence to the end.
    ///
    /// # Panics
    ///
    /// Where the sequence is empty, `ids` and `type_ids` differ in length, or `group` is below the last sequence's:
    /// callers order sequences by group. A group may be skipped; it then has no sequences.
    pub fn push(&mut self, ids: &[u32], type_ids: &[u32], group: usize, key: DropoutKey, target: Option<Target>) {
        assert!(!ids.is_empty() && ids.len() == type_ids.len(), "a sequence has one type id a token, and a token");
        assert!(self.groups.last().is_none_or(|last| *last <= group), "sequences come ordered by group");
        if self.bounds.is_empty() {
            self.bounds.push(0);
        }
        self.ids.extend_from_slice(ids);
        self.type_ids.extend_from_slice(type_ids);
        self.bounds.push(self.ids.len());
        self.groups.push(group);
        self.keys.push(key);
        self.targets.push(target);
    }

    /// Token ids, (T).
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Token type ids, (T).
    pub fn type_ids(&self) -> &[u32] {
        &self.type_ids
    }

    /// Where sequences begin and end, (S + 1): sequence `s` owns token rows `bounds[s]..bounds[s + 1]`.
    pub fn bounds(&self) -> &[usize] {
        &self.bounds
    }

    /// The group of each sequence, (S), never decreasing.
    pub fn groups(&self) -> &[usize] {
        &self.groups
    }

    /// Each sequence's dropout key, (S).
    pub fn keys(&self) -> &[DropoutKey] {
        &self.keys
    }

    /// Each sequence's target where there is one, (S).
    pub fn targets(&self) -> &[Option<Target>] {
        &self.targets
    }

    /// T.
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    /// S.
    pub fn n_sequences(&self) -> usize {
        self.groups.len()
    }

    /// G: one more than the last sequence's group.
    pub fn n_groups(&self) -> usize {
        self.groups.last().map_or(0, |g| g + 1)
    }

    /// Token rows of sequence `s`.
    pub fn tokens_of(&self, s: usize) -> Range<usize> {
        self.bounds[s]..self.bounds[s + 1]
    }

    /// Sequences of each group, in order; an empty range for a group that was skipped.
    pub fn sequences_by_group(&self) -> Vec<Range<usize>> {
        let first = |g| self.groups.partition_point(|of| *of < g);
        (0..self.n_groups()).map(|g| first(g)..first(g + 1)).collect()
    }
}
