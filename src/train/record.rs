//! What a run leaves for people and programs to read: `run.json` and `metrics.jsonl`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::TrainConfig;
use crate::error::{Error, Result};
use crate::patch::write_aside;

/// What was read of one split.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataRecord {
    /// Rows.
    pub examples: usize,
    /// Of these, rows whose texts were longer than the maximum length, and cut.
    pub truncated: usize,
    /// Rows of the file that were left out because they are broken.
    pub skipped: usize,
}

/// An evaluation: the metrics of every dev split after an epoch, or after the last step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The epoch, counted from 1.
    pub epoch: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Metrics by name, by split.
    pub metrics: BTreeMap<String, BTreeMap<String, f64>>,
}

/// `run.json`: all that one needs to know of a run without running it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunRecord {
    /// The version of this program.
    pub bitfit: &'static str,
    /// Whether the run is done and its patch written.
    pub finished: bool,
    /// The task's name.
    pub task: String,
    /// What is predicted: `single_label_classification` or `regression`.
    pub problem: &'static str,
    /// The labels in order; empty for a value.
    pub labels: Vec<String>,
    /// Texts of an input, 1 or 2.
    pub texts: usize,
    /// The base's id.
    pub base: String,
    /// The base's fingerprint.
    pub base_fingerprint: String,
    /// The tokenizer's fingerprint.
    pub tokenizer_fingerprint: String,
    /// SHA-256 over the resolved settings and the training rows.
    pub training_digest: String,
    /// The resolved settings.
    pub config: TrainConfig,
    /// Trained scalars: `encoder`, `pooler`, `head`, and their `total`.
    pub parameters: BTreeMap<&'static str, u64>,
    /// What was read, by split.
    pub data: BTreeMap<String, DataRecord>,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Optimizer steps of an epoch.
    pub steps_per_epoch: u64,
    /// Every evaluation, in order.
    pub evaluations: Vec<EpochRecord>,
    /// The main metric's name.
    pub main_metric: &'static str,
    /// The split that chose the epoch, and that the patch's metrics are of.
    pub split: String,
    /// The epoch whose values the patch holds, counted from 1.
    pub epoch: u32,
    /// The metrics of that epoch on every dev split.
    pub metrics: BTreeMap<String, BTreeMap<String, f64>>,
    /// The patch's content hash; empty until the run is done.
    pub patch: String,
    /// Seconds spent in training steps.
    pub train_seconds: f64,
    /// Tokens that went through training steps, for each second in them.
    pub tokens_per_s: f64,
}

impl RunRecord {
    /// Writes `run.json`: aside, synced, renamed.
    ///
    /// # Errors
    ///
    /// What the operating system reports.
    pub fn save(&self, path: &Path) -> Result<()> {
        let invalid = |e: serde_json::Error| Error::Audit(format!("the record of the run cannot be written: {e}"));
        let mut text = serde_json::to_string_pretty(self).map_err(invalid)?;
        text.push('\n');
        write_aside(path, |file| file.write_all(text.as_bytes()))
    }
}

/// `metrics.jsonl`, to which lines are added as they come.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log of a run of which `step` steps are done: what a stopped run has written beyond them is taken
    /// back, since those steps come again.
    ///
    /// # Errors
    ///
    /// What the operating system reports.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if path.exists() {
            let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
            let done = |line: &&str| {
                let line: Option<Value> = serde_json::from_str(line).ok();
                line.and_then(|line| line.get("step")?.as_u64()).is_some_and(|of| of <= step)
            };
            let kept: String = text.lines().filter(done).flat_map(|line| [line, "\n"]).collect();
            write_aside(path, |file| file.write_all(kept.as_bytes()))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("open", path))?;
        Ok(MetricsLog { path: path.to_path_buf(), file })
    }

    /// Adds a line.
    ///
    /// # Errors
    ///
    /// What the operating system reports.
    pub fn add(&mut self, line: &Value) -> Result<()> {
        // One write a line, so that whoever follows the file never reads half of one.
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).map_err(Error::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_of_steps_that_come_again_are_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        for step in [10, 20, 30] {
            log.add(&json!({"step": step})).unwrap();
        }
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"ste").unwrap();
        MetricsLog::open(&path, 20).unwrap().add(&json!({"step": 21})).unwrap();
        let lines = std::fs::read_to_string(&path).unwrap();
        assert_eq!(lines, "{\"step\":10}\n{\"step\":20}\n{\"step\":21}\n");
    }
}
