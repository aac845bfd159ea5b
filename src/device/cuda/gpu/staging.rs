//! Constants on their way to the card: through memory that it reads by itself, so that nobody waits for a copy.

use super::owned::{Event, Pinned, Stream, Told};
use crate::device::cuda::card::Address;
use crate::error::Result;

use cudarc::driver::result;

/// So many steps may be handed over before the first of them is begun; then the host waits for the card.
const BUFFERS: usize = 4;
/// Constants of most steps fit, so that a buffer seldom grows.
const LEAST_BYTES: usize = 64 << 10;

/// Buffers that are written in turn.
pub struct Staging {
    buffers: [Buffer; BUFFERS],
    next: usize,
}

struct Buffer {
    memory: Option<Pinned>,
    /// Passed when the card has read it.
    read: Event,
}

impl Staging {
    /// Empty ones.
    pub fn new() -> Result<Self> {
        let buffer = || Ok(Buffer { memory: None, read: Event::new()? });
        Ok(Self { buffers: [buffer()?, buffer()?, buffer()?, buffer()?], next: 0 })
    }

    /// Copies `bytes` to the card behind what the stream has to do by now; they may change as soon as this returns.
    pub fn send(&mut self, to: Address, bytes: &[u8], stream: &Stream) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let buffer = &mut self.buffers[self.next];
        self.next = (self.next + 1) % BUFFERS;
        buffer.read.wait()?;
        let memory = match &mut buffer.memory {
            Some(memory) if memory.size_bytes() >= bytes.len() => memory,
            memory => {
                // The old one goes first, so that both are never held at once.
                *memory = None;
                memory.insert(Pinned::new(bytes.len().next_power_of_two().max(LEAST_BYTES))?)
            }
        };
        let staged = &mut memory.bytes()[..bytes.len()];
        staged.copy_from_slice(bytes);
        // SAFETY: the card reads the buffer until the event is passed, before which it is neither written nor freed.
        unsafe { result::memcpy_htod_async(to, staged, stream.raw()) }
            .told("cuMemcpyHtoDAsync of a step's constants")?;
        buffer.read.record(stream)
    }
}
