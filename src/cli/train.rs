//! `bitfit train`: flags to a checked config, rows to datasets, and how the run is told of.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitfit::base::problem::Texts;
use bitfit::data::{Columns, Dataset, GlueTask, Split, hold_out, load_table, task};
use bitfit::patch::{Selection, parse_layers, parse_terms};
use bitfit::train::{Existing, Job, Options, Outcome, run as train};
use bitfit::{Error, Result};
use serde_json::{Map, Value, json};

use super::args::{BaseArgs, ColumnArgs, DeviceArgs, parse_size, refuse};
use super::output::{resume_command, say};
use super::progress::{TrainProgress, shown};

/// What the first Ctrl-C is answered.
pub(super) const STOPPING: &str = "stopping at the end of this step; once more ends at once";

/// The share of a table that is held out where no dev file is given, and the name it goes by.
const HELD_OUT: (f64, &str) = (0.1, "held_out");

/// Flags of `bitfit train`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("rows").required(true).args(["task", "train"]))]
pub struct Args {
    #[command(flatten)]
    base: BaseArgs,
    /// A GLUE task: cola sst2 mrpc stsb qqp mnli qnli rte wnli
    #[arg(long, value_name = "TASK", help_heading = "GLUE")]
    task: Option<String>,
    /// The folder that holds CoLA/, SST-2/, MRPC/ and so on, the official files or those of `bitfit data fetch`
    #[arg(long, value_name = "DIR", conflicts_with = "train", help_heading = "GLUE")]
    data: Option<PathBuf>,

    /// The table to train on: .csv, .tsv, .jsonl or .parquet
    #[arg(long, value_name = "FILE", help_heading = "Your own table")]
    train: Option<PathBuf>,
    /// The table to choose the best epoch on [default: a tenth of --train, held out, stratified]
    #[arg(long, value_name = "FILE", requires = "train", help_heading = "Your own table")]
    dev: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
    /// The column of the label [default: label]
    #[arg(long, value_name = "COLUMN", requires = "train", help_heading = "Your own table")]
    label_column: Option<String>,
    /// Labels are numbers to be predicted, not classes
    #[arg(long, requires = "train", help_heading = "Your own table")]
    regression: bool,
    /// The task's name [default: the name of --train without its extension]
    #[arg(long, value_name = "NAME", requires = "train", help_heading = "Your own table")]
    name: Option<String>,

    /// The run's folder: patch.safetensors, run.json, metrics.jsonl and checkpoint/
    #[arg(long, value_name = "RUN", help_heading = "The run")]
    out: PathBuf,
    /// Go on with the run in --out from its checkpoint, to the patch it would have given uninterrupted
    #[arg(long, conflicts_with = "overwrite", help_heading = "The run")]
    resume: bool,
    /// Replace the run in --out; other files there stay
    #[arg(long, help_heading = "The run")]
    overwrite: bool,
    /// Print one JSON object on standard output
    #[arg(long, help_heading = "The run")]
    json: bool,
    /// The most memory that a step's activations take (500MB, 1.5GB): layers are computed again on the way back where
    /// needed, which takes time and changes no result. Not for full and random, which keep more [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "The run")]
    memory_budget: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    settings: Settings,
}

/// The settings of training; what is not given takes the library's default.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Settings")]
struct Settings {
    /// What trains beside the head: bitfit (every bias), frozen (nothing), random (scalars drawn over all
    /// parameters), full (everything) [default: bitfit]
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// The bias terms that train [default: all]: embeddings_layernorm, query, key, value, attention_output,
    /// attention_layernorm, intermediate, output, output_layernorm, pooler; the pooler always does. `query,intermediate`
    /// is the paper's 0.04 % variant; `value` is what PEFT calls BEFT
    #[arg(long, value_name = "LIST")]
    terms: Option<String>,
    /// How terms find tensors: exact, or substring as in the authors' script, where output also trains attention.output
    /// [default: exact]
    #[arg(long, value_name = "HOW")]
    terms_match: Option<String>,
    /// Train these encoder layers alone, from 0, B excluded
    #[arg(long, value_name = "A..B")]
    layers: Option<String>,
    /// How many scalars `random` draws [default: as many as there are biases]
    #[arg(long, value_name = "N")]
    random_count: Option<u64>,
    /// Times that the training rows are gone through [default: 10]
    #[arg(long, value_name = "N")]
    epochs: Option<u32>,
    /// Optimizer steps, in place of --epochs
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Rows in one pass [default: 16]
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Passes that make one optimizer step [default: 1]
    #[arg(long, value_name = "N")]
    gradient_accumulation_steps: Option<usize>,
    /// The largest learning rate [default: 3e-3 for bitfit, frozen and random, 5e-5 for full]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    learning_rate: Option<f64>,
    /// The head's [default: --learning-rate]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    head_learning_rate: Option<f64>,
    /// linear (falls to 0) or constant, both after the warm-up [default: linear]
    #[arg(long, value_name = "SCHEDULE")]
    schedule: Option<String>,
    /// The share of the steps over which the learning rate rises, 0 to 1 [default: 0.06]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    warmup: Option<f64>,
    /// AdamW's decoupled weight decay; biases never decay [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    weight_decay: Option<f64>,
    /// Scale gradients down to this norm; 0 turns it off [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    max_grad_norm: Option<f64>,
    /// Dropout everywhere [default: what the base's config.json says]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    dropout: Option<f32>,
    /// Cut texts to this many tokens [default: 128]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Make batches of rows of like length; batches are never padded, so this saves nothing
    #[arg(long)]
    group_by_length: bool,
    /// Train on the first rows alone
    #[arg(long, value_name = "ROWS")]
    limit: Option<usize>,
    /// Decides the head's start, the order of the rows, dropout and what random draws [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Which epoch becomes the patch: best (by the main metric on dev) or last [default: best]
    #[arg(long, value_name = "WHICH")]
    keep: Option<String>,
}

impl Settings {
    fn options(&self) -> Result<Options> {
        let default = Options::default();
        let parsed = Selection {
            terms: self.terms.as_deref().map(parse_terms).transpose()?,
            terms_match: self.terms_match.as_deref().map(str::parse).transpose()?.unwrap_or_default(),
            layers: self.layers.as_deref().map(parse_layers).transpose()?,
            random_count: self.random_count,
            ..default.selection.clone()
        };
        let method = self.method.as_deref().map(str::parse).transpose()?.unwrap_or(default.selection.method);
        Ok(Options {
            selection: Selection { method, ..parsed },
            epochs: self.epochs.unwrap_or(default.epochs),
            max_steps: self.max_steps,
            batch_size: self.batch_size.unwrap_or(default.batch_size),
            gradient_accumulation_steps: self
                .gradient_accumulation_steps
                .unwrap_or(default.gradient_accumulation_steps),
            learning_rate: self.learning_rate,
            head_learning_rate: self.head_learning_rate,
            schedule: self.schedule.as_deref().map(str::parse).transpose()?.unwrap_or(default.schedule),
            warmup: self.warmup.unwrap_or(default.warmup),
            weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
            max_grad_norm: self.max_grad_norm.unwrap_or(default.max_grad_norm),
            dropout: self.dropout,
            max_length: self.max_length,
            group_by_length: self.group_by_length,
            limit: self.limit,
            seed: self.seed.unwrap_or(default.seed),
            keep: self.keep.as_deref().map(str::parse).transpose()?.unwrap_or(default.keep),
            ..default
        })
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let stop = stop_on_ctrl_c(STOPPING)?;
    let options = args.settings.options()?;
    args.device.check_training()?;
    let memory_budget = args.memory_budget.as_deref().map(|text| parse_size("--memory-budget", text)).transpose()?;
    let source = args.source()?;
    let base = args.base.load()?;
    let config = options.check(&base)?;
    let (rows, dev) = source.load(config.seed)?;
    let encoder = args.device.encoder(&base)?;
    let existing = match (args.resume, args.overwrite) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    let job = Job { config: &config, train: &rows, dev: &dev, out: &args.out, existing, memory_budget };
    let mut progress = TrainProgress::new();
    let outcome = train(&encoder, &job, &mut |event| progress.show(event), &stop);
    progress.finish();
    if let Err(Error::Interrupted(_)) = &outcome {
        eprintln!("to go on: {}", resume_command());
    }
    let outcome = outcome?;
    if outcome.was_finished {
        eprintln!("{} is finished; nothing was left to do", args.out.display());
    }
    if args.json {
        say!("{}", as_json(&outcome, &args.out))
    } else {
        print!("{}", summary(&outcome, &args.out))
    }
    Ok(())
}

/// Where the rows come from, found to be complete before anything is loaded.
enum Source<'a> {
    Glue { task: &'static GlueTask, folder: &'a Path },
    Table { args: &'a Args, train: &'a Path, columns: Columns },
}

impl Args {
    fn source(&self) -> Result<Source<'_>> {
        match (&self.task, &self.data, &self.train) {
            (Some(name), Some(folder), _) => {
                refuse(
                    "--train",
                    &[
                        ("--dev", self.dev.is_some()),
                        ("--text-column", self.columns.text_column.is_some()),
                        ("--text-pair-column", self.columns.text_pair_column.is_some()),
                        ("--label-column", self.label_column.is_some()),
                        ("--regression", self.regression),
                        ("--name", self.name.is_some()),
                    ],
                )?;
                Ok(Source::Glue { task: task(name)?, folder })
            }
            (Some(name), None, _) => {
                let task = task(name)?;
                Err(Error::Usage(format!(
                    "--task {name} needs --data DIR, which has the GLUE files {} in DIR/{}/; `bitfit data fetch {name} \
                     --out DIR` brings them from the hub",
                    task.files().join(", "),
                    task.folder
                )))
            }
            (None, _, Some(train)) => {
                let columns = Columns {
                    text: self.columns.text_column.clone().unwrap_or_else(|| "text".into()),
                    text_pair: self.columns.text_pair_column.clone(),
                    label: Some(self.label_column.clone().unwrap_or_else(|| "label".into())),
                };
                Ok(Source::Table { args: self, train, columns })
            }
            (None, _, None) => Err(Error::Usage("give --task TASK --data DIR, or --train FILE".into())),
        }
    }
}

impl Source<'_> {
    /// The rows to train on, and the dev splits.
    fn load(&self, seed: u64) -> Result<(Dataset, Vec<(String, Dataset)>)> {
        match self {
            Source::Glue { task, folder } => {
                let train = task.load(folder, Split::Train)?;
                let of = |split: Split| Ok((split.name().to_string(), task.load(folder, split)?));
                Ok((train, task.dev_splits().into_iter().map(of).collect::<Result<_>>()?))
            }
            Source::Table { args, train, columns } => {
                let mut rows = load_table(train, columns, args.regression, None)?;
                if let Some(name) = &args.name {
                    rows.name = name.clone();
                }
                let (rows, split, dev) = match &args.dev {
                    Some(dev) => {
                        let dev = load_table(dev, columns, args.regression, Some(&rows.problem))?;
                        (rows, "dev", dev)
                    }
                    None => {
                        let (rows, held) = hold_out(&rows, HELD_OUT.0, seed)?;
                        (rows, HELD_OUT.1, held)
                    }
                };
                Ok((rows, vec![(split.to_string(), dev)]))
            }
        }
    }
}

/// A flag that the first Ctrl-C raises, saying so; the second ends the program at once.
pub(super) fn stop_on_ctrl_c(said: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = stop.clone();
    let handler = move || {
        if raised.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("{said}");
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Usage(format!("Ctrl-C cannot be listened for: {e}")))?;
    Ok(stop)
}

/// The result as one JSON object.
fn as_json(outcome: &Outcome, out: &Path) -> Value {
    let (record, split) = (&outcome.record, &outcome.record.split);
    let examples = |split: &str| record.data.get(split).map_or(0, |data| data.examples);
    let mut all = Map::new();
    let mut add = |name: &str, value: Value| all.insert(name.to_string(), value);
    add("task", json!(record.task));
    add("split", json!(split));
    add("examples", json!(examples(split)));
    add("metrics", json!(record.metrics.get(split)));
    if record.metrics.len() > 1 {
        let of = |(split, metrics)| (String::clone(split), json!({"examples": examples(split), "metrics": metrics}));
        add("splits", Value::Object(record.metrics.iter().map(of).collect()));
    }
    add("epoch", json!(record.epoch));
    add("kept", json!(record.config.keep));
    add("steps", json!(record.steps));
    add("parameters", json!(record.parameters));
    add("truncated", record.data.iter().map(|(split, data)| (split.clone(), json!(data.truncated))).collect());
    add("patch", json!(record.patch));
    add("file", json!(out.join("patch.safetensors").display().to_string()));
    add("train_seconds", json!(record.train_seconds));
    add("tokens_per_s", json!(record.tokens_per_s));
    Value::Object(all)
}

/// The result for people.
fn summary(outcome: &Outcome, out: &Path) -> String {
    use std::fmt::Write;
    let record = &outcome.record;
    let mut text = String::new();
    for (split, metrics) in &record.metrics {
        let rows = record.data.get(split).map_or(0, |data| data.examples);
        writeln!(text, "{}: {} on {split} ({rows} rows)", record.task, shown(metrics)).ok();
    }
    let epochs = record.steps.div_ceil(record.steps_per_epoch);
    let how = match record.config.keep {
        bitfit::train::Keep::Best => format!("the best by {} on {}", record.main_metric, record.split),
        bitfit::train::Keep::Last => "the last".to_string(),
    };
    writeln!(text, "epoch {} of {epochs}, {how}", record.epoch).ok();
    let cut: Vec<String> = record.data.iter().filter(|(_, data)| data.truncated > 0).map(cut_rows).collect();
    if !cut.is_empty() {
        writeln!(text, "cut to {} tokens: {}", record.config.max_length, cut.join(", ")).ok();
    }
    for (split, data) in record.data.iter().filter(|(_, data)| data.skipped > 0) {
        writeln!(text, "skipped {} broken rows of {split}", data.skipped).ok();
    }
    let file = out.join("patch.safetensors");
    let size = std::fs::metadata(&file).map_or(0, |about| about.len());
    writeln!(text, "patch: {} ({size} bytes)", file.display()).ok();
    let pair = if outcome.patch.metadata().texts == Texts::Two { " --text-pair \"...\"" } else { "" };
    writeln!(text, "try it: bitfit predict --patch {} --text \"...\"{pair}", file.display()).ok();
    text
}

fn cut_rows((split, data): (&String, &bitfit::train::DataRecord)) -> String {
    format!("{} of {} rows of {split}", data.truncated, data.examples)
}
