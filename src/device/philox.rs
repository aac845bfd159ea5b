//! Dropout masks from Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2,
//! 3"), a counter-based generator: a mask is a function of where it stands, so it is regenerated instead of kept, and
//! is the same on every device, with any number of threads, and whether a run trains alone or beside others.
//!
//! Key: the run's 64-bit seed. Counter: (element or key position / 8; head * 2^16 + position; index of the sequence in
//! its run's batch * 2^12 + layer * 2^4 + site; step). A call gives eight 16-bit draws, low half first; an element is
//! kept where its draw is at least round(65536 p), and kept elements are scaled by 65536 / (65536 - round(65536 p)).

use super::batch::DropoutKey;
use super::ops::Site;

/// Rounds of a call.
pub const ROUNDS: usize = 10;
/// What the first and the third word of a counter are multiplied by.
pub const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the words of the key after a round.
pub const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The low half of a lane.
const LOW: u64 = u32::MAX as u64;

#[cfg(target_endian = "big")]
compile_error!("draws are taken from words as they lie in memory, low half first");

/// Ten rounds for `L` counters at once, lane by lane: words of the counters in, words of the draws out.
///
/// A word stands in the low half of a lane; what stands in the high half is ignored, and is anything on the way out. So
/// a multiplication of halves is all that a lane needs, and no word is ever moved to another lane.
#[inline(always)]
pub fn philox<const L: usize>(c: [[u64; L]; 4], mut key: [u32; 2]) -> [[u64; L]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = c;
    for _ in 0..ROUNDS {
        let [k0, k1] = key.map(u64::from);
        // Word by word: each of these is a vector in a register.
        let (mut p0, mut p1) = ([0; L], [0; L]);
        for i in 0..L {
            p0[i] = (c0[i] & LOW) * MULTIPLIERS[0];
        }
        for i in 0..L {
            p1[i] = (c2[i] & LOW) * MULTIPLIERS[1];
        }
        for i in 0..L {
            c0[i] = (p1[i] >> 32) ^ c1[i] ^ k0;
        }
        for i in 0..L {
            c2[i] = (p0[i] >> 32) ^ c3[i] ^ k1;
        }
        (c1, c3) = (p1, p0);
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    [c0, c1, c2, c3]
}

/// A row of a mask: which of eight draws a block each element reads.
#[derive(Debug, Clone, Copy)]
pub struct MaskRow {
    key: [u32; 2],
    counter: [u32; 3],
    cut: u32,
}

impl MaskRow {
    /// The mask of row `head * 2^16 + position` at a site of a sequence, for dropout probability `p` in 0..1.
    pub fn new(key: DropoutKey, site: Site, row: u32, p: f32) -> Self {
        MaskRow {
            key: [key.seed as u32, (key.seed >> 32) as u32],
            counter: [row, key.index << 12 | site.layer << 4 | site.at as u32, key.step],
            cut: cut(p),
        }
    }

    /// Whether nothing is dropped: p rounds to zero.
    pub fn keeps_all(&self) -> bool {
        self.cut == 0
    }

    /// What kept elements are multiplied by.
    pub fn scale(&self) -> f64 {
        65536.0 / f64::from(65536 - self.cut)
    }

    /// Calls `put(first, draws)` for the elements of the row from `first` on, block by block, until at least `n` have
    /// been drawn.
    #[inline(always)]
    pub fn blocks(&self, n: usize, mut put: impl FnMut(usize, &[u16])) {
        for first in (0..n).step_by(64) {
            put(first, bytemuck::cast_slice(self.draws::<8>(first / 8).as_flattened()));
        }
    }

    /// The draws of `L` calls from number `first` on, eight a call.
    #[inline(always)]
    fn draws<const L: usize>(&self, first: usize) -> [[u64; 2]; L] {
        let [row, place, step] = self.counter.map(|word| [u64::from(word); L]);
        let words = philox([std::array::from_fn(|i| (first + i) as u64), row, place, step], self.key);
        std::array::from_fn(|i| [words[0][i] & LOW | words[1][i] << 32, words[2][i] & LOW | words[3][i] << 32])
    }

    /// The key's words.
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// The counter's words, but for the first, which counts the calls.
    pub fn counter(&self) -> [u32; 3] {
        self.counter
    }

    /// The draw at and above which an element is kept.
    #[inline(always)]
    pub fn cut(&self) -> u32 {
        self.cut
    }
}

/// round(65536 p), at most 65535 so that a scale exists.
fn cut(p: f32) -> u32 {
    ((f64::from(p) * 65536.0).round() as u32).min(65535)
}

#[cfg(test)]
mod tests {
    use super::super::ops::At;
    use super::*;

    #[test]
    fn draws_equal_the_published_vectors() {
        // Known answers of the Random123 distribution, philox4x32 with 10 rounds.
        let cases = [
            ([0; 4], [0; 2], [0x6627e8d5u32, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter.map(|c| [u64::from(c)]), key).map(|w| w[0] as u32), expected);
        }
    }

    #[test]
    fn a_rows_draws_are_those_of_its_calls_in_order() {
        // Masks by another implementation: scripts/golden_philox.py.
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/philox.json")).unwrap();
        for mask in golden["masks"].as_array().unwrap() {
            let of = |key: &str| mask[key].as_u64().unwrap();
            let key = DropoutKey { seed: of("seed"), step: of("step") as u32, index: of("index") as u32 };
            let all = [At::Embeddings, At::Probabilities, At::AttentionOutput, At::Output, At::Pooled];
            let site = Site { layer: of("layer") as u32, at: all[of("site") as usize] };
            let place = (of("head") << 16 | of("position")) as u32;
            let row = MaskRow::new(key, site, place, mask["p"].as_f64().unwrap() as f32);
            assert_eq!((u64::from(row.cut()), row.scale()), (of("cut"), mask["scale"].as_f64().unwrap()));
            let draws = |n: usize| {
                let mut all = Vec::new();
                row.blocks(n, |first, draws| {
                    assert_eq!(first, all.len());
                    all.extend_from_slice(draws);
                });
                all
            };
            let expected: Vec<u16> =
                mask["draws"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as u16).collect();
            assert_eq!(draws(expected.len())[..expected.len()], expected);
            // However many are asked for.
            let one_by_one: Vec<u16> = (0..25)
                .flat_map(|call| row.draws::<1>(call)[0].map(u64::to_le_bytes).concat())
                .collect::<Vec<u8>>()
                .chunks(2)
                .map(|low_first| u16::from_le_bytes([low_first[0], low_first[1]]))
                .collect();
            for n in [1, 8, 64, 65, 128, 129, 200] {
                assert_eq!(draws(n)[..n], one_by_one[..n], "{n}");
            }
        }
    }

    #[test]
    fn a_mask_row_keeps_about_the_share_it_should() {
        let key = DropoutKey { seed: 7, step: 3, index: 5 };
        let row = MaskRow::new(key, Site { layer: 2, at: At::Output }, 11, 0.25);
        let mut kept = 0;
        row.blocks(12800, |_, draws| kept += draws.iter().filter(|d| u32::from(**d) >= row.cut()).count());
        assert!((kept as f64 / 12800.0 - 0.75).abs() < 0.02, "{kept} of 12800");
        assert_eq!(row.scale(), 65536.0 / 49152.0);
    }
}
