//! What a card is.

use std::fmt;

use crate::device::cuda::library::Version;

/// What a card is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The driver's number for it: 0 of `cuda:0`.
    pub ordinal: usize,
    /// `NVIDIA H100 80GB HBM3`.
    pub model: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// All its memory.
    pub memory_bytes: usize,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// The CUDA that the driver is for.
    pub driver: Version,
    /// The compiler of kernels.
    pub nvrtc: Version,
    /// cuBLASLt's own number: 130400 is 13.4.0.
    pub cublaslt: usize,
}

/// `NVIDIA H100 80GB HBM3 (sm 9.0, 79.2 GiB), driver for CUDA 13.0, NVRTC 13.0, cuBLASLt 13.1.0`.
impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Facts { model, capability: (major, minor), driver, nvrtc, cublaslt, .. } = self;
        let gib = self.memory_bytes as f64 / (1u64 << 30) as f64;
        let (lt_major, lt_minor, patch) = (cublaslt / 10_000, cublaslt / 100 % 100, cublaslt % 100);
        write!(f, "{model} (sm {major}.{minor}, {gib:.1} GiB), driver for CUDA {driver}, NVRTC {nvrtc}, ")?;
        write!(f, "cuBLASLt {lt_major}.{lt_minor}.{patch}")
    }
}
