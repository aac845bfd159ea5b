//! Buffers of given values, for tests that hold one device's ops to another's.

use super::ops::Device;

/// Which rows a buffer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// One a token of the batch.
    Tokens,
    /// One a sequence.
    Firsts,
}

/// A device whose activations can be made of values on the host. All of it between [`Device::begin`] and
/// [`Device::finish`].
pub(crate) trait Filled: Device {
    /// A stream of `cols` columns.
    fn stream_of(&self, over: Over, cols: usize, values: &[f32]) -> Self::Stream;
    /// Activations of `cols` columns.
    fn act_of(&self, over: Over, cols: usize, values: &[f32]) -> Self::Act;
}
