//! A batch, as kernels read it: `kernels/batch.cuh` says what the lists hold.
//!
//! All lists are as long as the batch's size class needs: tokens are rounded up to [`TOKENS`], sequences to a power of
//! two. So steps of one class have equal commands.

use super::card::{Address, Card};
use super::memory::{Buffer, Pool};
use super::queue::Queue;
use crate::device::batch::{Batch, Space, Target};

/// What numbers of tokens are rounded up to.
const TOKENS: usize = 256;
/// The fewest rows of a space: those that a block of the row-wise kernels takes.
const ROWS: usize = 8;
/// Rows of a block, and of a tile.
const BLOCK: usize = 64;

/// A word of a list.
type Word = i32;

/// No sequence, no group, no row.
const NONE: Word = -1;

/// The rows of one space.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Rows of the batch.
    pub n: usize,
    /// Rows of its size class.
    pub rows: usize,
    /// Each row's sequence and position.
    pub places: Address,
    /// Blocks of rows of a group.
    pub blocks: Address,
    /// How many.
    pub n_blocks: usize,
    /// Each group's first block.
    pub first_block: Address,
    /// Tiles of rows of a sequence.
    pub tiles: Address,
    /// How many.
    pub n_tiles: usize,
}

/// A batch on the card.
pub struct Lists<C: Card> {
    /// One row a token.
    pub tokens: Rows,
    /// One row a sequence.
    pub firsts: Rows,
    /// Token ids.
    pub ids: Address,
    /// Token type ids.
    pub types: Address,
    /// The group of each sequence.
    pub groups: Address,
    /// Each sequence's dropout key.
    pub keys: Address,
    /// Where sequences begin and end.
    pub bounds: Address,
    /// Each group's sequences, from and to.
    pub sequences: Address,
    /// Each sequence's target.
    pub targets: Address,
    /// The token row of each sequence's first token.
    pub first_rows: Address,
    /// For each token row the sequence whose first it is.
    pub spread: Address,
    /// G.
    pub n_groups: usize,
    memory: Buffer<C>,
}

impl<C: Card> Lists<C> {
    /// The rows of a space.
    pub fn rows(&self, space: Space) -> Rows {
        match space {
            Space::Tokens => self.tokens,
            Space::Firsts => self.firsts,
        }
    }
}

/// Rows of each space in the size class of a batch of so many tokens and sequences.
pub fn size_class(tokens: usize, sequences: usize) -> (usize, usize) {
    (tokens.next_multiple_of(TOKENS), sequences.next_power_of_two().max(ROWS))
}

/// Lists one behind the other, each 16 bytes aligned.
#[derive(Default)]
pub struct Writer(Vec<Word>);

impl Writer {
    /// Begins a list; gives its offset in bytes.
    fn list(&mut self, words: impl IntoIterator<Item = Word>) -> u64 {
        let at = self.0.len().next_multiple_of(4);
        self.0.resize(at, 0);
        self.0.extend(words);
        (at * size_of::<Word>()) as u64
    }

    /// As [`Writer::list`], filled up to `n` entries with `rest`.
    fn padded<const W: usize>(&mut self, all: impl IntoIterator<Item = [Word; W]>, n: usize, rest: [Word; W]) -> u64 {
        let at = self.list(all.into_iter().flatten());
        let from = (at as usize) / size_of::<Word>();
        assert!(self.0.len() <= from + n * W, "a list fits its size class");
        while self.0.len() < from + n * W {
            self.0.extend_from_slice(&rest);
        }
        at
    }

    fn rows(&mut self, batch: &Batch, space: Space, rows: usize) -> Rows {
        let (n, of_sequence): (usize, &dyn Fn(usize) -> std::ops::Range<usize>) = match space {
            Space::Tokens => (batch.n_tokens(), &|s| batch.tokens_of(s)),
            Space::Firsts => (batch.n_sequences(), &|s| s..s + 1),
        };
        let (sequences, groups) = (batch.n_sequences(), batch.n_groups());
        let word = |n: usize| n as Word;
        let pieces = |rows: std::ops::Range<usize>| {
            let end = rows.end;
            rows.step_by(BLOCK).map(move |first| first..end.min(first + BLOCK))
        };
        let places = (0..sequences).flat_map(|s| (0..of_sequence(s).len()).map(move |p| [word(s), word(p)]));
        let places = self.padded(places, rows, [NONE, 0]);
        let mut first_block = vec![0];
        let mut blocks = Vec::new();
        for (g, of_group) in batch.sequences_by_group().into_iter().enumerate() {
            if !of_group.is_empty() {
                let rows = of_sequence(of_group.start).start..of_sequence(of_group.end - 1).end;
                blocks.extend(pieces(rows).map(|rows| [word(g), word(rows.start), word(rows.end), 0]));
            }
            first_block.push(word(blocks.len()));
        }
        blocks.extend(pieces(n..rows).map(|rows| [NONE, word(rows.start), word(rows.end), 0]));
        let n_blocks = rows / BLOCK + groups + 1;
        let blocks = self.padded(blocks, n_blocks, [NONE, 0, 0, 0]);
        let first_block = self.list(first_block);
        let tiles = (0..sequences).flat_map(|s| {
            let own = of_sequence(s);
            pieces(own.clone())
                .map(move |rows| [word(s), word(rows.start), word(rows.len()), word(rows.start - own.start)])
        });
        let none = pieces(n..rows).map(|rows| [NONE, word(rows.start), word(rows.len()), 0]);
        let n_tiles = match space {
            Space::Tokens => rows / BLOCK + size_class(n, sequences).1 + 1,
            Space::Firsts => rows + 1,
        };
        let tiles = self.padded(tiles.chain(none), n_tiles, [NONE, 0, 0, 0]);
        Rows { n, rows, places, blocks, n_blocks, first_block, tiles, n_tiles }
    }

    /// Writes a batch's lists to the card, by the queue.
    pub fn write<C: Card>(&mut self, batch: &Batch, card: &C, pool: &Pool<C>, queue: &mut Queue<C>) -> Lists<C> {
        self.0.clear();
        let (tokens, sequences) = size_class(batch.n_tokens(), batch.n_sequences());
        let bits = |of: &[u32]| of.iter().map(|id| [*id as Word]).collect::<Vec<_>>();
        let mut lists = Lists {
            tokens: self.rows(batch, Space::Tokens, tokens),
            firsts: self.rows(batch, Space::Firsts, sequences),
            ids: self.padded(bits(batch.ids()), tokens, [0]),
            types: self.padded(bits(batch.type_ids()), tokens, [0]),
            groups: self.padded(batch.groups().iter().map(|g| [*g as Word]), sequences, [NONE]),
            keys: self.padded(
                batch.keys().iter().map(|key| {
                    let (low, high) = (key.seed as u32, (key.seed >> 32) as u32);
                    [low, high, key.index << 12, key.step].map(|word| word as Word)
                }),
                sequences,
                [0; 4],
            ),
            bounds: self.padded(
                batch.bounds().iter().map(|bound| [*bound as Word]),
                sequences + 1,
                [batch.n_tokens() as Word],
            ),
            sequences: self
                .list(batch.sequences_by_group().into_iter().flat_map(|of| [of.start as Word, of.end as Word])),
            targets: self.padded(
                batch.targets().iter().map(|target| match target {
                    None => [0, 0],
                    Some(Target::Class(class)) => [1, *class as Word],
                    Some(Target::Value(value)) => [2, value.to_bits() as Word],
                }),
                sequences,
                [0, 0],
            ),
            first_rows: self.padded((0..batch.n_sequences()).map(|s| [batch.bounds()[s] as Word]), sequences, [NONE]),
            spread: self.padded(
                (0..batch.n_sequences())
                    .flat_map(|s| (0..batch.tokens_of(s).len()).map(move |p| [if p == 0 { s as Word } else { NONE }])),
                tokens,
                [NONE],
            ),
            n_groups: batch.n_groups(),
            memory: pool.take(card.size_class(self.0.len() * size_of::<Word>())),
        };
        let base = lists.memory.at();
        for rows in [&mut lists.tokens, &mut lists.firsts] {
            for at in [&mut rows.places, &mut rows.blocks, &mut rows.first_block, &mut rows.tiles] {
                *at += base;
            }
        }
        let Lists { ids, types, groups, keys, bounds, sequences, targets, first_rows, spread, .. } = &mut lists;
        for at in [ids, types, groups, keys, bounds, sequences, targets, first_rows, spread] {
            *at += base;
        }
        queue.upload(base, bytemuck::cast_slice(&self.0));
        lists
    }
}
