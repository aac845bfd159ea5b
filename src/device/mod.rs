//! What an encoder needs of a device, and the devices that provide it.
//!
//! Start reading at [`ops`], the traits; [`batch`] is what a step runs over, [`philox`] where dropout comes from,
//! [`cpu`] the first device.

pub mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
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
}

/// What an encoder computes in, as a user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrecisionName {
    /// `f32` throughout.
    #[default]
    F32,
    /// `bf16`: weights and kept activations, sums in f32.
    Bf16,
    /// `int8`: products, for inference alone.
    Int8,
}

impl PrecisionName {
    const ALL: [(&str, PrecisionName); 3] =
        [("f32", PrecisionName::F32), ("bf16", PrecisionName::Bf16), ("int8", PrecisionName::Int8)];
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
        if s == "tf32" {
            return Err(Error::Device("tf32 is of CUDA devices; on the CPU use --precision f32, bf16 or int8".into()));
        }
        let named = Self::ALL.iter().find(|(name, _)| *name == s);
        named
            .map(|(_, precision)| *precision)
            .ok_or_else(|| Error::setting("--precision", "f32, bf16 or int8", format_args!("`{s}`")))
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
    /// What a user should know before it runs: that the processor has no instruction for the precision.
    ///
    /// # Errors
    ///
    /// Where `$BITFIT_CPU` names what this processor cannot run.
    pub fn note(&self) -> Result<Option<String>> {
        let arch = cpu::Arch::chosen()?;
        let widened = self.precision == PrecisionName::Bf16 && !arch.multiplies_bf16();
        Ok(widened.then(|| {
            "this processor does not multiply bf16: weights and kept activations are stored in it and computed in f32, \
             which saves memory, not time"
                .to_string()
        }))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "cpu" => Ok(DeviceName::Cpu),
            s if s == "cuda" || s.starts_with("cuda:") => {
                Err(Error::Device(format!("{s} is not there: this version runs on the CPU; use --device cpu")))
            }
            s => Err(Error::setting("--device", "cpu", format_args!("`{s}`"))),
        }
    }
}
