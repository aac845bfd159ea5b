//! `bitfit eval`: a patch scored on rows with labels.

use std::path::PathBuf;
use std::sync::Arc;

use bitfit::base::problem::Texts;
use bitfit::data::{Columns, Dataset, Split, encode, load_table, task};
use bitfit::patch::Patch;
use bitfit::train::evaluate;
use bitfit::{Error, Result};
use serde_json::json;

use super::args::{BaseArgs, ColumnArgs, DeviceArgs, refuse};
use super::output::say;
use super::progress::shown;

/// Flags of `bitfit eval`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("rows").required(true).args(["data", "input"]))]
pub struct Args {
    #[command(flatten)]
    base: BaseArgs,
    /// The patch
    #[arg(long, value_name = "FILE")]
    patch: PathBuf,
    /// GLUE: the folder that holds CoLA/, SST-2/, MRPC/ and so on; the task is the patch's
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The split of --data: train, dev, dev_mismatched [default: dev]
    #[arg(long, value_name = "SPLIT", requires = "data")]
    split: Option<String>,
    /// A table of your own: .csv, .tsv, .jsonl or .parquet
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
    /// The column of the label [default: label]
    #[arg(long, value_name = "COLUMN", requires = "input")]
    label_column: Option<String>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    args.device.check()?;
    match args.data {
        Some(_) => refuse(
            "--input",
            &[
                ("--text-column", args.columns.text_column.is_some()),
                ("--text-pair-column", args.columns.text_pair_column.is_some()),
                ("--label-column", args.label_column.is_some()),
            ],
        )?,
        None => refuse("--data", &[("--split", args.split.is_some())])?,
    }
    let patch = Patch::load(&args.patch)?;
    let (split, rows) = args.rows(&patch)?;
    let base = args.base.load()?;
    patch.check_base(&base)?;
    let encoder = args.device.encoder(&base)?;
    let attached = [Some(encoder.attach(patch.delta())?)];
    let metadata = patch.metadata();
    let encoded = encode(&rows.examples, base.tokenizer()?, metadata.max_length)?;
    let mut forward = |batch: &Arc<bitfit::device::batch::Batch>| encoder.forward(batch, &attached);
    let found = evaluate(&encoded.sequences, &metadata.problem, rows.metrics, &mut forward)?;
    if args.json {
        let line = json!({
            "task": metadata.task,
            "split": split,
            "examples": found.examples,
            "metrics": found.metrics,
            "patch": patch.content_hash(),
            "truncated": encoded.truncated,
            "skipped": rows.skipped,
        });
        say!("{line}");
        return Ok(());
    }
    say!("{}: {} on {split} ({} rows)", metadata.task, shown(&found.metrics), found.examples);
    if encoded.truncated > 0 {
        say!("cut to {} tokens: {} rows", metadata.max_length, encoded.truncated);
    }
    if rows.skipped > 0 {
        say!("skipped {} broken rows", rows.skipped);
    }
    Ok(())
}

impl Args {
    /// The rows to score on, and what to call them.
    fn rows(&self, patch: &Patch) -> Result<(String, Dataset)> {
        let metadata = patch.metadata();
        let glue = task(&metadata.task).ok().filter(|task| task.problem() == metadata.problem);
        if let Some(folder) = &self.data {
            if self.columns.text_column.is_some() || self.columns.text_pair_column.is_some() {
                return Err(Error::Usage("--text-column and --text-pair-column are for --input, not --data".into()));
            }
            let Some(task) = glue else {
                return Err(Error::Usage(format!(
                    "{}: `{}` is no task of GLUE, so --data has no rows of it; give a table with --input",
                    self.patch.display(),
                    metadata.task
                )));
            };
            let split: Split = self.split.as_deref().unwrap_or("dev").parse()?;
            if matches!(split, Split::Test | Split::TestMismatched) {
                return Err(Error::setting("--split", "a split with labels: train, dev, dev_mismatched", split));
            }
            return Ok((split.name().to_string(), task.load(folder, split)?));
        }
        let Some(input) = &self.input else {
            return Err(Error::Usage("give --data DIR, or --input FILE".into()));
        };
        let given = self.columns.text_pair_column.clone();
        let pair = match (metadata.texts, given) {
            (Texts::One, Some(_)) => {
                let message = format!("`{}` is a task of one text: leave --text-pair-column away", metadata.task);
                return Err(Error::Usage(message));
            }
            (Texts::One, None) => None,
            (Texts::Two, given) => Some(given.unwrap_or_else(|| "text_pair".into())),
        };
        let columns = Columns {
            text: self.columns.text_column.clone().unwrap_or_else(|| "text".into()),
            text_pair: pair,
            label: Some(self.label_column.clone().unwrap_or_else(|| "label".into())),
        };
        let mut rows = load_table(input, &columns, false, Some(&metadata.problem))?;
        if let Some(task) = glue {
            rows.metrics = task.metrics;
        }
        Ok((rows.name.clone(), rows))
    }
}
