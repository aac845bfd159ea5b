//! Which rows of a file are wanted: one part of it, for one of many processes that divide it among them, and of that
//! part what was not answered before.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Part `index` of `count`, counted from 0, as Slurm's arrays and Kubernetes' indexed jobs count theirs.
///
/// Parts are contiguous: a row belongs to the part in whose share of the file it begins, by bytes for CSV, TSV and
/// JSONL, by rows for Parquet. So every row is of exactly one part, each process finds its own without knowing of the
/// others, and their outputs in the order of the parts are the output of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: u32,
    count: u32,
}

impl Shard {
    /// The whole file.
    pub const WHOLE: Shard = Shard { index: 0, count: 1 };

    /// Part `index` of `count`.
    ///
    /// # Errors
    ///
    /// An index that is not below the count.
    pub fn new(index: u32, count: u32) -> Result<Shard> {
        if index < count {
            return Ok(Shard { index, count });
        }
        Err(refusal(format_args!("{index}/{count}")))
    }

    /// Whether this is all there is.
    pub fn is_whole(self) -> bool {
        self.count == 1
    }

    /// Whether the file begins with this part.
    pub fn is_first(self) -> bool {
        self.index == 0
    }

    /// The share of this part in `extent` bytes or rows.
    pub(super) fn share(self, extent: u64) -> Range<u64> {
        let bound = |index: u32| (u128::from(extent) * u128::from(index) / u128::from(self.count)) as u64;
        bound(self.index)..bound(self.index + 1)
    }
}

fn refusal(found: fmt::Arguments) -> Error {
    Error::setting("--shard", "I/N, part I of N with I from 0 to N - 1", format_args!("`{found}`"))
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parts = s.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        let (index, count) = parts.ok_or_else(|| refusal(format_args!("{s}")))?;
        Shard::new(index, count).map_err(|_| refusal(format_args!("{s}")))
    }
}

/// Which rows of a file are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The part of the file.
    pub shard: Shard,
    /// How many rows of that part are passed over.
    pub skip: u64,
}

impl Default for Part {
    /// All of them.
    fn default() -> Self {
        Part { shard: Shard::WHOLE, skip: 0 }
    }
}

/// Which rows of a text file are wanted. A row may begin anywhere (a line break inside quotes begins none), so a part is
/// found by going through what comes before it, which is read at hundreds of megabytes a second and not answered.
pub(super) struct Wanted {
    /// Bytes at which rows of the part begin.
    pub(super) bytes: Range<u64>,
    pub(super) skip: u64,
    /// The byte that the row at hand begins at.
    pub(super) at: u64,
    /// Whether there was any row in the file.
    pub(super) any: bool,
}

impl Wanted {
    pub(super) fn all() -> Self {
        Wanted { bytes: 0..u64::MAX, skip: 0, at: 0, any: false }
    }

    /// Notes that a row begins at this byte, and tells whether it is wanted; `None` behind the part.
    pub(super) fn row_at(&mut self, byte: u64) -> Option<bool> {
        (self.at, self.any) = (byte, true);
        if byte >= self.bytes.end {
            return None;
        }
        if byte < self.bytes.start {
            return Some(false);
        }
        let wanted = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_cover_the_whole_without_a_gap_or_an_overlap(extent in any::<u64>(), count in 1u32..200) {
            let parts: Vec<_> = (0..count).map(|i| Shard::new(i, count).unwrap().share(extent)).collect();
            prop_assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, extent));
            prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths = parts.iter().map(|part| part.end - part.start);
            prop_assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
        }
    }

    #[test]
    fn parts_count_from_0_and_print_as_they_are_typed() {
        for text in ["0/1", "3/4", "0/1000"] {
            assert_eq!(text.parse::<Shard>().unwrap().to_string(), text);
        }
        assert_eq!("0/1".parse::<Shard>().unwrap(), Shard::WHOLE);
        for text in ["4/4", "1", "0/0", "-1/4", "a/b", "1/2/3", ""] {
            let message = text.parse::<Shard>().unwrap_err().to_string();
            assert!(message.contains("I from 0 to N - 1") && message.contains(text), "{message}");
        }
    }
}
