//! `bitfit patch`: what is in a patch file, whether it is whole and fits, and what can be made of it.

use std::path::{Path, PathBuf};

use bitfit::base::problem::Problem;
use bitfit::patch::{Dtype, Metadata, Patch, merge};
use bitfit::{Error, Result};
use clap::Subcommand;
use serde_json::{Value, json};

use super::args::BaseArgs;
use super::output::{line, say};

/// Flags of `bitfit patch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what is in a patch
    Inspect {
        /// The patch
        file: PathBuf,
        /// Print one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Check that a patch is whole and fits a base
    Verify {
        /// The patch
        file: PathBuf,
        #[command(flatten)]
        base: BaseArgs,
    },
    /// Take a patch out of a run folder
    Export {
        /// The run folder
        run: PathBuf,
        /// An epoch's number, best or last [default: the one the run kept]
        #[arg(long, value_name = "N|best|last")]
        epoch: Option<String>,
        /// How numbers are stored: f32, or f16, which halves the file
        #[arg(long, value_name = "DTYPE", default_value = "f32")]
        dtype: String,
        /// The file to write
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Replace the file where it is there already
        #[arg(long)]
        overwrite: bool,
    },
    /// Write base and patch as one Hugging Face folder, for AutoModelForSequenceClassification
    Merge {
        /// The patch
        file: PathBuf,
        #[command(flatten)]
        base: BaseArgs,
        /// The folder to write
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
    },
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Inspect { file, json } => inspect(&Patch::load(&file)?, json)?,
        Command::Verify { file, base } => {
            let patch = Patch::load(&file)?;
            let base = base.load()?;
            patch.check_base(&base)?;
            say!("{}: whole, and made for base {}", file.display(), base.id());
        }
        Command::Export { run, epoch, dtype, output, overwrite } => {
            if output.exists() && !overwrite {
                let message = format!("{} is there already; --overwrite replaces it", output.display());
                return Err(Error::Usage(message).into());
            }
            let dtype = match dtype.as_str() {
                "f32" => Dtype::F32,
                "f16" => Dtype::F16,
                other => return Err(Error::setting("--dtype", "f32 or f16", format_args!("`{other}`")).into()),
            };
            let patch = of_run(&run, epoch.as_deref())?;
            patch.save(&output, dtype)?;
            let m = patch.metadata();
            say!("{}: {} of epoch {}, {}", output.display(), m.task, m.epoch, metrics(m));
        }
        Command::Merge { file, base, output } => {
            let patch = Patch::load(&file)?;
            merge::merge(&patch, &base.load()?, &output)?;
            say!("{}: a whole model of {}", output.display(), patch.metadata().task);
        }
    }
    Ok(())
}

fn labels(m: &Metadata) -> &[String] {
    match &m.problem {
        Problem::Classes(labels) => labels,
        Problem::Value => &[],
    }
}

fn metrics(m: &Metadata) -> String {
    let of = m.metrics.iter().map(|(name, value)| format!("{name} {value:.4}"));
    let all = of.collect::<Vec<_>>().join(", ");
    if all.is_empty() { "no metrics".into() } else { format!("{all} on {}", m.split) }
}

fn inspect(patch: &Patch, as_json: bool) -> Result<()> {
    let m = patch.metadata();
    let tensors = patch.tensors();
    let values = tensors.iter().filter(|(name, _)| !name.ends_with(".indices"));
    let values: u64 = values.map(|(_, shape)| shape.iter().product::<u64>()).sum();
    if as_json {
        let found = json!({
            "task": m.task, "patch": patch.content_hash(), "problem_type": m.problem.name(), "labels": labels(m),
            "texts": m.texts.count(), "max_length": m.max_length, "pooling": m.pooling.name(),
            "selection": m.selection, "base": m.base_id, "base_fingerprint": m.base_fingerprint,
            "tokenizer_fingerprint": m.tokenizer_fingerprint, "training_digest": m.training_digest,
            "metrics": m.metrics, "split": m.split, "epoch": m.epoch,
            "tensors": tensors.iter().map(|(name, shape)| json!({"name": name, "shape": shape})).collect::<Vec<_>>(),
        });
        say!("{found}");
        return Ok(());
    }
    let show = |name: &str, value: &str| line(format_args!("{name:12} {value}"));
    show("task", &m.task)?;
    show("patch", patch.content_hash())?;
    show("problem", m.problem.name())?;
    if let Problem::Classes(labels) = &m.problem {
        show("labels", &labels.join(", "))?;
    }
    show("texts", &format!("{}, cut at {} tokens", m.texts.count(), m.max_length))?;
    show("trained", &m.selection)?;
    show("base", &format!("{} ({})", m.base_id, m.base_fingerprint))?;
    show("tokenizer", &m.tokenizer_fingerprint)?;
    show("training", &m.training_digest)?;
    show("metrics", &format!("{}, epoch {}", metrics(m), m.epoch))?;
    show("tensors", &format!("{} of {values} values", tensors.len()))?;
    for (name, shape) in &tensors {
        say!("  {name} {shape:?}");
    }
    Ok(())
}

/// The patch of a run: the one it kept, or that of an epoch.
fn of_run(run: &Path, epoch: Option<&str>) -> Result<Patch> {
    let kept = run.join("patch.safetensors");
    let Some(epoch) = epoch else {
        return Patch::load(&kept);
    };
    let n = match epoch {
        "best" => best(run)?,
        "last" => last(run)?,
        n => n.parse().map_err(|_| Error::setting("--epoch", "a number, best or last", format_args!("`{n}`")))?,
    };
    let file = run.join("checkpoint").join(format!("epoch-{n}.safetensors"));
    if file.exists() {
        return Patch::load(&file);
    }
    // Runs that train weights keep no patch an epoch, but the kept one may be the one asked for.
    let patch = Patch::load(&kept)?;
    if patch.metadata().epoch == n {
        return Ok(patch);
    }
    let known: Vec<String> = epochs(run)?.iter().map(u32::to_string).collect();
    let known = if known.is_empty() { patch.metadata().epoch.to_string() } else { known.join(", ") };
    Err(Error::setting(format!("--epoch of {}", run.display()), known, n))
}

fn nothing(run: &Path) -> Error {
    Error::content(run, "this folder holds no epochs of a run; name the folder that --out named")
}

/// The last epoch of a run: of those kept, else that of its own patch (runs that train weights keep no others).
fn last(run: &Path) -> Result<u32> {
    match epochs(run)?.last() {
        Some(epoch) => Ok(*epoch),
        None => evaluations(run)?.last().map(|(epoch, _)| *epoch).ok_or_else(|| nothing(run)),
    }
}

/// The epochs whose patches a run has kept, in order.
fn epochs(run: &Path) -> Result<Vec<u32>> {
    let folder = run.join("checkpoint");
    let entries = std::fs::read_dir(&folder).map_err(Error::io("read", &folder))?;
    let number = |name: &str| name.strip_prefix("epoch-")?.strip_suffix(".safetensors")?.parse().ok();
    let mut all: Vec<u32> = entries.flatten().filter_map(|e| number(&e.file_name().to_string_lossy())).collect();
    all.sort_unstable();
    Ok(all)
}

/// The epoch with the best main metric on the first dev split, from the run's record; of several, the first.
fn best(run: &Path) -> Result<u32> {
    let mut best: Option<(u32, f64)> = None;
    for (epoch, score) in evaluations(run)? {
        if let Some(score) = score
            && best.is_none_or(|(_, so_far)| score > so_far)
        {
            best = Some((epoch, score));
        }
    }
    best.map(|(epoch, _)| epoch).ok_or_else(|| nothing(run))
}

/// Every evaluation in a run's record: its epoch, and its main metric on the first dev split where there was one.
fn evaluations(run: &Path) -> Result<Vec<(u32, Option<f64>)>> {
    let path = run.join("run.json");
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let record: Value = serde_json::from_str(&text).map_err(|e| Error::content(&path, e.to_string()))?;
    let (split, metric) = (record["split"].as_str(), record["main_metric"].as_str());
    let score = |e: &Value| e["metrics"].get(split?)?.get(metric?)?.as_f64();
    let of = |e: &Value| Some((u32::try_from(e["epoch"].as_u64()?).ok()?, score(e)));
    Ok(record["evaluations"].as_array().into_iter().flatten().filter_map(of).collect())
}
