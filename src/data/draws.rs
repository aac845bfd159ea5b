//! The one place where this layer gets random numbers from: a seed, and a stream a purpose.
//!
//! Streams of one ChaCha key never overlap, so a run's hold-out does not depend on how its batches were shuffled, and
//! any epoch can be drawn without drawing those before it, which is what a resumed run does.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What is drawn.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    /// Which rows are held out.
    HoldOut,
    /// The batches of an epoch, counted from 0.
    Epoch(u32),
}

pub(super) fn draws(seed: u64, purpose: Purpose) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(match purpose {
        Purpose::HoldOut => 0,
        Purpose::Epoch(epoch) => 1 + u64::from(epoch),
    });
    rng
}
