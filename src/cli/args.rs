//! Flags that several commands share, and what they open.

use bitfit::base::{Base, BaseSpec};
use bitfit::device::DeviceName;
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
    /// The device: cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Threads on the CPU [default: all cores]. Results do not depend on it
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// The device and the number of threads (0: one a core), checked before anything is loaded.
    pub fn check(&self) -> bitfit::Result<(DeviceName, usize)> {
        let device = self.device.parse()?;
        match self.threads {
            None => Ok((device, 0)),
            Some(n @ 1..=1024) => Ok((device, n)),
            Some(n) => Err(bitfit::Error::setting("--threads", "1 to 1024", n)),
        }
    }

    /// Lays a base out on the device.
    pub fn encoder(&self, base: &Base) -> bitfit::Result<Encoder> {
        let (device, n_threads) = self.check()?;
        Encoder::new(base, device, n_threads)
    }
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
