//! Flags that several commands share, and what they open.

use bitfit::base::{Base, BaseSpec};
use bitfit::device::{Placement, PrecisionName};
use bitfit::encoder::Encoder;

/// Refuses flags that mean something only beside `with`, which was not given.
pub fn refuse(with: &str, flags: &[(&str, bool)]) -> bitfit::Result<()> {
    match flags.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(bitfit::Error::Usage(format!("{flag} goes with {with}, which is not given"))),
        None => Ok(()),
    }
}

/// Which base.
#[derive(Debug, clap::Args)]
pub struct BaseArgs {
    /// The frozen base: a folder in Hugging Face layout, or a hub id (org/name[@revision]). Without it: $BITFIT_BASE,
    /// else the folder that scripts/fetch-base.sh fills, else sentence-transformers/all-MiniLM-L6-v2 from the hub
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
}

impl BaseArgs {
    /// Loads it, from its folder or by way of the hub's cache.
    pub fn load(&self) -> bitfit::Result<Base> {
        Base::load(&BaseSpec::resolve(self.base.as_deref())?)
    }
}

/// Where it runs.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// The device: cpu, or an NVIDIA GPU: cuda for the first, cuda:N for another
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// What is computed in: f32, bf16, on a GPU tf32 or, for inference on the CPU, int8
    #[arg(long, value_name = "PRECISION", default_value = "f32")]
    pub precision: String,
    /// Threads on the CPU [default: all cores]. Results do not depend on it
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// Where to run, checked before anything is loaded.
    pub fn check(&self) -> bitfit::Result<Placement> {
        let device = self.device.parse()?;
        let n_threads = match self.threads {
            None => 0,
            Some(n @ 1..=1024) => n,
            Some(n) => return Err(bitfit::Error::setting("--threads", "1 to 1024", n)),
        };
        let placement = Placement { device, precision: self.precision.parse()?, n_threads };
        placement.check()?;
        Ok(placement)
    }

    /// As [`DeviceArgs::check`], for training.
    pub fn check_training(&self) -> bitfit::Result<Placement> {
        let placement = self.check()?;
        if placement.precision == PrecisionName::Int8 {
            return Err(bitfit::Error::setting("--precision", "f32, tf32 or bf16: int8 is for inference", "`int8`"));
        }
        Ok(placement)
    }

    /// Lays a base out on the device; a note on what the processor lacks goes to standard error.
    pub fn encoder(&self, base: &Base) -> bitfit::Result<Encoder> {
        let placement = self.check()?;
        if let Some(note) = placement.note()? {
            eprintln!("note: {note}");
        }
        Encoder::new(base, placement)
    }
}

/// Bytes out of a flag's `500MB`, `1.5GB` or plain number; units are of a thousand.
pub fn parse_size(flag: &str, text: &str) -> bitfit::Result<usize> {
    let refuse =
        || bitfit::Error::setting(flag, "a number of B, KB, MB or GB, as 500MB or 1.5GB", format_args!("`{text}`"));
    let units = [("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1.0)];
    let upper = text.trim().to_ascii_uppercase();
    let unit = units.iter().find_map(|(unit, bytes)| Some((upper.strip_suffix(unit)?, *bytes)));
    let (number, unit) = unit.unwrap_or((&upper, 1.0));
    let bytes = number.trim().parse::<f64>().map_err(|_| refuse())? * unit;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as usize) } else { Err(refuse()) }
}

/// Which columns of a table of one's own hold what.
#[derive(Debug, Clone, clap::Args)]
pub struct ColumnArgs {
    /// The column of the text, or of the first of two [default: text]
    #[arg(long, value_name = "COLUMN")]
    pub text_column: Option<String>,
    /// The column of the second text of a pair task
    #[arg(long, value_name = "COLUMN")]
    pub text_pair_column: Option<String>,
}
