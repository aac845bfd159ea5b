//! Buffers of given values, for tests that hold one device's ops to another's.

use super::batch::Space;
use super::ops::Device;

/// A device whose activations can be made of values on the host. All of it between [`Device::begin`] and
/// [`Device::finish`].
pub(crate) trait Filled: Device {
    /// A stream of `cols` columns.
    fn stream_of(&self, space: Space, cols: usize, values: &[f32]) -> Self::Stream;
    /// Activations of `cols` columns.
    fn act_of(&self, space: Space, cols: usize, values: &[f32]) -> Self::Act;
}
