//! What a batch runs through the lower layers only once: tasks that leave those layers as the base has them share them
//! over equal texts.
//!
//! A task trained with `--layers 8..12` is the base up to layer 8. Where a batch asks several such tasks over one text,
//! the text goes through these layers as a single sequence of the base's and branches where the first of the tasks
//! begins. A row's bits depend on its own text and values alone, so an answer is the one it would be without sharing.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::device::batch::{Batch, DropoutKey};

/// A stretch of layers over one batch.
#[derive(Debug)]
pub(super) struct Stage {
    /// The layers, from 0. The embeddings belong to the first stage; the head follows the last.
    pub layers: Range<usize>,
    /// What runs through them.
    pub batch: Arc<Batch>,
    /// Whose values each of its groups has: those of a group of the whole batch, or the base's.
    pub groups: Vec<Option<usize>>,
    /// For each sequence, the one of the stage before that it goes on from; empty in the first stage.
    pub from: Vec<usize>,
}

/// The stages of a batch in which group `g` is as the base up to layer `begins[g]`, at most `n_layers`. The last one
/// runs the batch as it is; it is the only one where nothing would be shared.
pub(super) fn plan(batch: &Arc<Batch>, begins: &[usize], n_layers: usize) -> Vec<Stage> {
    let of = |s: usize| (batch.groups()[s], begins[batch.groups()[s]]);
    let sequences = 0..batch.n_sequences();
    let mut levels: Vec<usize> = sequences.clone().map(|s| of(s).1).collect();
    levels.push(0);
    levels.sort_unstable();
    levels.dedup();
    let n_like_base = sequences.clone().filter(|s| of(*s).1 > 0).count();
    if n_like_base == 0 || texts(batch, sequences.clone().filter(|s| of(*s).1 > 0)).len() == n_like_base {
        levels.truncate(1);
    }

    let mut stages = Vec::with_capacity(levels.len());
    // Where each sequence of the whole batch runs in the stage before.
    let mut places: Vec<usize> = Vec::new();
    for (i, level) in levels.iter().enumerate() {
        let layers = *level..levels.get(i + 1).copied().unwrap_or(n_layers);
        if i + 1 == levels.len() {
            let groups = (0..batch.n_groups()).map(Some).collect();
            stages.push(Stage { layers, batch: batch.clone(), groups, from: places });
            break;
        }
        let mut stage = Stage { layers, batch: Arc::default(), groups: vec![None], from: Vec::new() };
        let (mut here, mut packed) = (vec![0; batch.n_sequences()], Batch::new());
        let mut push = |packed: &mut Batch, s: usize, group: usize| {
            let tokens = batch.tokens_of(s);
            let (ids, type_ids) = (&batch.ids()[tokens.clone()], &batch.type_ids()[tokens]);
            packed.push(ids, type_ids, group, DropoutKey::default(), None);
            stage.from.extend(places.get(s));
            packed.n_sequences() - 1
        };
        let shared = texts(batch, sequences.clone().filter(|s| of(*s).1 > *level));
        for members in shared {
            let place = push(&mut packed, members[0], 0);
            members.into_iter().for_each(|s| here[s] = place);
        }
        for s in sequences.clone().filter(|s| of(*s).1 <= *level) {
            if stage.groups.last() != Some(&Some(of(s).0)) {
                stage.groups.push(Some(of(s).0));
            }
            here[s] = push(&mut packed, s, stage.groups.len() - 1);
        }
        stage.batch = Arc::new(packed);
        stages.push(stage);
        places = here;
    }
    stages
}

/// These sequences by text: those of one text together, in the order of the first of each.
fn texts(batch: &Batch, sequences: impl Iterator<Item = usize>) -> Vec<Vec<usize>> {
    let mut at = HashMap::new();
    let mut found: Vec<Vec<usize>> = Vec::new();
    for s in sequences {
        let tokens = batch.tokens_of(s);
        let text = (&batch.ids()[tokens.clone()], &batch.type_ids()[tokens]);
        let i = *at.entry(text).or_insert(found.len());
        if i == found.len() {
            found.push(Vec::new());
        }
        found[i].push(s);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(of: &[(&[u32], usize)]) -> Arc<Batch> {
        let mut batch = Batch::new();
        for (ids, group) in of {
            batch.push(ids, &vec![0; ids.len()], *group, DropoutKey::default(), None);
        }
        Arc::new(batch)
    }

    #[test]
    fn one_text_of_many_tasks_runs_once_up_to_where_they_begin() {
        let whole = batch(&[(&[1, 2], 0), (&[1, 2], 1), (&[1, 2], 2), (&[3], 2)]);
        let stages = plan(&whole, &[8, 8, 10], 12);
        let layers: Vec<_> = stages.iter().map(|s| s.layers.clone()).collect();
        assert_eq!(layers, [0..8, 8..10, 10..12]);
        assert_eq!((stages[0].batch.ids(), &stages[0].groups[..]), (&[1, 2, 3][..], &[None][..]));
        // Group 2 is still the base's in the middle.
        assert_eq!(stages[1].batch.bounds(), [0, 2, 3, 5, 7]);
        assert_eq!(stages[1].groups, [None, Some(0), Some(1)]);
        assert_eq!(stages[1].batch.groups(), [0, 0, 1, 2]);
        assert_eq!(stages[1].from, [0, 1, 0, 0]);
        assert_eq!((&stages[2].batch, &stages[2].from[..]), (&whole, &[2, 3, 0, 1][..]));
    }

    #[test]
    fn tasks_of_the_head_alone_branch_behind_the_last_layer() {
        let whole = batch(&[(&[1], 0), (&[1], 1)]);
        let stages = plan(&whole, &[2, 2], 2);
        assert_eq!((stages[0].layers.clone(), stages[1].layers.clone()), (0..2, 2..2));
        assert_eq!(stages[0].batch.n_sequences(), 1);
    }

    #[test]
    fn nothing_is_staged_where_nothing_is_shared() {
        for begins in [[0, 0], [4, 4], [0, 4]] {
            let texts: [(&[u32], usize); 3] = [(&[1, 2], 0), (&[1], 1), (&[2], 1)];
            let stages = plan(&batch(&texts), &begins, 6);
            assert_eq!((stages.len(), stages[0].layers.clone()), (1, 0..6));
            assert!(stages[0].from.is_empty());
        }
        // The same ids as first and as second text are two texts.
        let mut two = Batch::new();
        two.push(&[1], &[0], 0, DropoutKey::default(), None);
        two.push(&[1], &[1], 1, DropoutKey::default(), None);
        assert_eq!(plan(&Arc::new(two), &[4, 4], 6).len(), 1);
    }
}
