//! What an encoder needs of a device, and the devices that provide it.
//!
//! Start reading at [`ops`], the traits; [`batch`] is what a step runs over, [`philox`] where dropout comes from,
//! [`cpu`] the first device and `cuda` the second.

pub mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(all(test, feature = "cuda"))]
pub(crate) mod filled;
pub mod ops;
pub mod philox;

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A device, as a user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceName {
    /// The processor: `cpu`.
    #[default]
    Cpu,
    /// An NVIDIA GPU by its number: `cuda:0`, or `cuda` for the first.
    Cuda(usize),
}

/// What an encoder computes in, as a user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrecisionName {
    /// `f32` throughout.
    #[default]
    F32,
    /// `tf32`: f32, but products on a GPU's tensor cores read 10 bits of fraction.
    Tf32,
    /// `bf16`: weights and kept activations, sums in f32.
    Bf16,
    /// `int8`: products, for inference alone.
    Int8,
}

impl PrecisionName {
    const ALL: [(&str, PrecisionName); 4] = [
        ("f32", PrecisionName::F32),
        ("tf32", PrecisionName::Tf32),
        ("bf16", PrecisionName::Bf16),
        ("int8", PrecisionName::Int8),
    ];
}

impl fmt::Display for PrecisionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::ALL.iter().find(|(_, precision)| precision == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

impl FromStr for PrecisionName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let named = Self::ALL.iter().find(|(name, _)| *name == s);
        named
            .map(|(_, precision)| *precision)
            .ok_or_else(|| Error::setting("--precision", "f32, tf32, bf16 or int8", format_args!("`{s}`")))
    }
}

/// Where an encoder runs and what it computes in; the default is f32 on every core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Placement {
    /// The device.
    pub device: DeviceName,
    /// The precision.
    pub precision: PrecisionName,
    /// Threads on the CPU; 0 means one a core. Results do not depend on it.
    pub n_threads: usize,
}

impl Placement {
    /// Checks, before anything is loaded, that the device is there and computes in the precision.
    ///
    /// # Errors
    ///
    /// Where the device does not compute in it, is not there, or lacks a library, saying what to do; where
    /// `$BITFIT_CPU` names what this processor cannot run.
    pub fn check(&self) -> Result<()> {
        match (self.device, self.precision) {
            (DeviceName::Cpu, PrecisionName::Tf32) => {
                Err(Error::Device("tf32 is of CUDA devices; on the CPU use --precision f32, bf16 or int8".into()))
            }
            (DeviceName::Cpu, _) => cpu::Arch::chosen().map(|_| ()),
            (DeviceName::Cuda(_), PrecisionName::Int8) => {
                Err(Error::Device("int8 is of the CPU; on a GPU use --precision f32, tf32 or bf16".into()))
            }
            #[cfg(feature = "cuda")]
            (DeviceName::Cuda(ordinal), _) => cuda::check(ordinal),
            #[cfg(not(feature = "cuda"))]
            (DeviceName::Cuda(_), _) => Err(without_cuda()),
        }
    }

    /// What a user should know before it runs: that the processor has no instruction for the precision.
    ///
    /// # Errors
    ///
    /// Where `$BITFIT_CPU` names what this processor cannot run.
    pub fn note(&self) -> Result<Option<String>> {
        if self.device != DeviceName::Cpu {
            return Ok(None);
        }
        let arch = cpu::Arch::chosen()?;
        let widened = self.precision == PrecisionName::Bf16 && !arch.multiplies_bf16();
        Ok(widened.then(|| {
            "this processor does not multiply bf16: weights and kept activations are stored in it and computed in f32, \
             which saves memory, not time"
                .to_string()
        }))
    }
}

impl Placement {
    /// Floating-point operations a second that the device can do at most in the precision, measured; `None` where the
    /// compiler chooses the processor's instructions.
    ///
    /// # Errors
    ///
    /// As [`Placement::check`].
    pub fn peak(&self) -> Result<Option<f64>> {
        self.check()?;
        match self.device {
            DeviceName::Cpu => cpu::peak(self.precision, self.n_threads),
            #[cfg(feature = "cuda")]
            DeviceName::Cuda(ordinal) => {
                let precision = on_card(self.precision);
                cuda::Gpu::new(ordinal, precision)?.peak(precision).map(Some)
            }
            #[cfg(not(feature = "cuda"))]
            DeviceName::Cuda(_) => Err(without_cuda()),
        }
    }

    /// What computes, in words: the set of instructions, or the card and its libraries.
    ///
    /// # Errors
    ///
    /// As [`Placement::check`].
    pub fn describe(&self) -> Result<String> {
        self.check()?;
        match self.device {
            DeviceName::Cpu => Ok(cpu::Arch::chosen()?.name().to_string()),
            #[cfg(feature = "cuda")]
            DeviceName::Cuda(ordinal) => {
                let precision = on_card(self.precision);
                Ok(cuda::Gpu::new(ordinal, precision)?.facts().to_string())
            }
            #[cfg(not(feature = "cuda"))]
            DeviceName::Cuda(_) => Err(without_cuda()),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let ordinal = |s: &str| s.strip_prefix("cuda:").and_then(|n| n.parse().ok());
        match s {
            "cpu" => Ok(DeviceName::Cpu),
            "cuda" => Ok(DeviceName::Cuda(0)),
            s => ordinal(s)
                .map(DeviceName::Cuda)
                .ok_or_else(|| Error::setting("--device", "cpu, cuda or cuda:N", format_args!("`{s}`"))),
        }
    }
}

/// The precision of a card's kernels; f32 for what is none of a card's.
#[cfg(feature = "cuda")]
fn on_card(precision: PrecisionName) -> cuda::card::Precision {
    match precision {
        PrecisionName::F32 | PrecisionName::Int8 => cuda::card::Precision::F32,
        PrecisionName::Tf32 => cuda::card::Precision::Tf32,
        PrecisionName::Bf16 => cuda::card::Precision::Bf16,
    }
}

/// The error for a GPU where this was built without.
#[cfg(not(feature = "cuda"))]
pub(crate) fn without_cuda() -> Error {
    Error::Device("this was built without CUDA: build it with --features cuda, or use --device cpu".into())
}
