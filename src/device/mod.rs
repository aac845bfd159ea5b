//! What an encoder needs of a device, and the devices that provide it.
//!
//! Start reading at [`ops`], the traits; [`batch`] is what a step runs over, [`philox`] where dropout comes from,
//! [`cpu`] the first device.

pub mod batch;
pub mod cpu;
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
