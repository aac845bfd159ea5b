//! A server's settings, checked once.

use std::time::Duration;

use super::name::TaskName;
use crate::error::{Error, Result};

/// What a server is told. The defaults are those of `bitfit serve`.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of patches that are kept attached, at least 1; the one least recently used goes first. Patches in use by a
    /// request live until it is answered. Default: no limit.
    pub patch_memory: usize,
    /// Tasks that are loaded before the server is ready, and never dropped.
    pub pins: Vec<TaskName>,
    /// Whether every task of the store is loaded before the server is ready, as far as `patch_memory` goes.
    pub preload: bool,
    /// Questions (a text of a task) that may wait, at least 1. Default 4096.
    pub queue: usize,
    /// Tokens of one forward, at least 1; a longer text runs alone. Default 4096.
    pub batch_tokens: usize,
    /// How long a request may take before it is given up. Default 30 s.
    pub deadline: Duration,
    /// How often the store is looked at for changes; 0 for never. Default 10 s.
    pub poll: Duration,
    /// Whether tasks can only be asked, not uploaded, removed or rolled back.
    pub read_only: bool,
    /// Bytes of a request's JSON. Default 2 MB.
    pub max_body: usize,
    /// Bytes of a text. Default 100 kB.
    pub max_text: usize,
    /// Texts of a request. Default 1024.
    pub max_inputs: usize,
    /// Connections at once; more wait. Default 1024.
    pub max_connections: usize,
    /// How long requests that were accepted are waited for when the server stops. Default 60 s.
    pub drain: Duration,
    /// The file of API keys; without it every request may do anything.
    pub api_keys: Option<std::path::PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            patch_memory: usize::MAX,
            pins: Vec::new(),
            preload: false,
            queue: 4096,
            batch_tokens: 4096,
            deadline: Duration::from_secs(30),
            poll: Duration::from_secs(10),
            read_only: false,
            max_body: 2_000_000,
            max_text: 100_000,
            max_inputs: 1024,
            max_connections: 1024,
            drain: Duration::from_secs(60),
            api_keys: None,
        }
    }
}

impl Options {
    /// Whether every setting is in its range.
    ///
    /// # Errors
    ///
    /// The first that is not, by its flag.
    pub fn check(&self) -> Result<()> {
        let at_least_one = [
            ("--patch-memory", self.patch_memory),
            ("--queue", self.queue),
            ("--batch-tokens", self.batch_tokens),
            ("--max-body", self.max_body),
            ("--max-text", self.max_text),
            ("--max-inputs", self.max_inputs),
            ("--max-connections", self.max_connections),
        ];
        if let Some((flag, found)) = at_least_one.iter().find(|(_, n)| *n == 0) {
            return Err(Error::setting(*flag, "at least 1", found));
        }
        if self.deadline.is_zero() {
            return Err(Error::setting("--deadline", "at least 1 ms", "0"));
        }
        Ok(())
    }
}
