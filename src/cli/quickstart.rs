//! `bitfit quickstart`: the whole job, end to end, on three small tasks that ship with the program.
//!
//! The rows of [`shipped`] were written by hand, one by one; no phrase runs through them that would give a label away,
//! and no text stands in both splits. Each task is trained like any other, into a run folder of its own, and the
//! figures are those of its last epoch. The settings were chosen while looking at the held-out rows, so the figures
//! show that the tasks are learned; they are no clean test of how well.

mod shipped;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Context;
use bitfit::base::{Base, BaseSpec};
use bitfit::data::{compute, encode, majority};
use bitfit::device::Placement;
use bitfit::device::batch::{Batch, DropoutKey, Target};
use bitfit::encoder::Encoder;
use bitfit::patch::{Method, Patch, Selection};
use bitfit::predict::from_logits;
use bitfit::train::{Event, Existing, Job, Keep, Options, Outcome, run as train};
use bitfit::{Error, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use self::shipped::{HELD_OUT, TASKS, Task};
use super::output::{quoted, say};
use super::train::{STOPPING, stop_on_ctrl_c};

/// Where the run folders go, in the current folder.
const FOLDER: &str = "quickstart";
/// Held-out rows of each task that are answered before the user's eyes.
const N_SHOWN: usize = 2;
/// What is printed fits a terminal of this many columns.
const WIDTH: u16 = 80;

/// Flags of `bitfit quickstart`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Settings of all runs. So few rows want many small steps more than they want dropout. A head alone wants far larger
/// steps than biases do: at theirs it would hardly leave its start, and be no baseline.
fn options(method: Method) -> Options {
    let learning_rate = if method == Method::Frozen { 0.1 } else { 4e-3 };
    Options {
        selection: Selection::new(method),
        epochs: 8,
        batch_size: 8,
        learning_rate: Some(learning_rate),
        dropout: Some(0.0),
        keep: Keep::Last,
        ..Options::default()
    }
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let stop = stop_on_ctrl_c(STOPPING)?;
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let base = Base::load(&BaseSpec::resolve(None)?)?;
    let encoder = Encoder::new(&base, Placement::default())?;
    let n_parameters: usize = base.parameters().iter().map(|p| p.len()).sum();
    say!("One frozen base for all: {}, {} parameters\n", base.id(), thousands(n_parameters as u64));
    for task in &TASKS {
        say!("  {:8} {}", task.name, task.about);
    }
    say!("\n200 rows each to learn from, 100 held out to be scored on; two runs a task:\n");

    let mut learned = Vec::new();
    for task in TASKS {
        learned.push(learn(task, &encoder, &stop).map_err(from_the_start)?);
    }
    say!("\n{}\n", scores(&learned)?.trim_fmt());
    say!("majority  the commonest label of the training rows, or their mean");
    say!("frozen    the head alone, at a larger learning rate of its own");
    say!("bitfit    the head and every bias: {} runs in {FOLDER}/\n", learned.len());
    say!("Held-out rows of all tasks, answered in one batch over the one base:\n");
    say!("{}\n", answers(&encoder, &learned)?.trim_fmt());
    say!("Done in {:.0} s. To go on from here:\n\n{}", started.elapsed().as_secs_f64(), next_commands(&program));
    Ok(())
}

/// A task once trained.
struct Learned {
    task: Task,
    /// The main metric on the held-out rows: of the commonest label, of the head alone, of BitFit.
    metric: &'static str,
    majority: f64,
    frozen: f64,
    bitfit: f64,
    outcome: Outcome,
    /// Where its patch lies.
    patch: PathBuf,
}

fn learn(task: Task, encoder: &Encoder, stop: &AtomicBool) -> Result<Learned> {
    let (rows, held_out) = task.rows()?;
    let metric = rows.main_metric();
    let targets: Vec<Target> = held_out.examples.iter().filter_map(|e| e.target).collect();
    let constant = vec![majority(&rows)?; targets.len()];
    let majority = compute(&[metric], &constant, &targets)?[metric.name()];

    let dev = [(HELD_OUT.to_string(), held_out)];
    let fit = |method: Method, out: &Path| -> Result<(Outcome, f64)> {
        let config = options(method).check(encoder.base())?;
        let job =
            Job { config: &config, train: &rows, dev: &dev, out, existing: Existing::Overwrite, memory_budget: None };
        let bar = Progress::new(format!("{} ({method})", task.name));
        let outcome = train(encoder, &job, &mut |event| bar.show(&event), stop)?;
        let score = outcome.patch.metadata().metrics.get(metric.name()).copied();
        let score = score.ok_or_else(|| Error::Audit(format!("{}: the run has no {}", task.name, metric.name())))?;
        bar.finish(metric.name(), score);
        Ok((outcome, score))
    };
    // Only BitFit's run is for keeping.
    let aside = tempfile::tempdir().map_err(Error::io("make a folder in", std::env::temp_dir()))?;
    let (_, frozen) = fit(Method::Frozen, aside.path())?;
    let out = Path::new(FOLDER).join(task.name);
    let (outcome, bitfit) = fit(Method::Bitfit, &out)?;
    let patch = out.join("patch.safetensors");
    Ok(Learned { task, metric: metric.name(), majority, frozen, bitfit, outcome, patch })
}

/// Stopped runs are not gone on with: all of it takes less time than to think about where it stood.
fn from_the_start(error: Error) -> Error {
    match error {
        Error::Interrupted(_) => Error::Interrupted("quickstart begins anew when it is run again".into()),
        error => error,
    }
}

/// The table of results.
fn scores(learned: &[Learned]) -> Result<Table> {
    let mut table = plain_table();
    table.set_header(["task", "metric", "majority", "frozen", "bitfit", "trained", "patch", "seconds"]);
    for one in learned {
        let n_bytes = std::fs::metadata(&one.patch).map_err(Error::io("read", &one.patch))?.len();
        let record = &one.outcome.record;
        let n_trained = record.parameters.get("total").copied().unwrap_or_default();
        table.add_row([
            one.task.name.to_string(),
            one.metric.to_string(),
            format!("{:.3}", one.majority),
            format!("{:.3}", one.frozen),
            format!("{:.3}", one.bitfit),
            thousands(n_trained),
            format!("{:.0} KB", n_bytes as f64 / 1000.0),
            format!("{:.1}", record.train_seconds),
        ]);
    }
    table.column_iter_mut().skip(2).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    Ok(flush_left(table))
}

/// The first held-out rows of every task, answered by the patches as they lie on disk, in one batch.
fn answers(encoder: &Encoder, learned: &[Learned]) -> Result<Table> {
    let mut batch = Batch::new();
    let (mut tasks, mut rows) = (Vec::new(), Vec::new());
    for (group, one) in learned.iter().enumerate() {
        let patch = Patch::load(&one.patch)?;
        patch.check_base(encoder.base())?;
        let (_, held_out) = one.task.rows()?;
        let shown = &held_out.examples[..N_SHOWN.min(held_out.examples.len())];
        let encoded = encode(shown, encoder.base().tokenizer()?, patch.metadata().max_length)?;
        for (example, sequence) in shown.iter().zip(encoded.sequences) {
            batch.push(&sequence.ids, &sequence.type_ids, group, DropoutKey::default(), None);
            rows.push((one.task, example.clone()));
        }
        tasks.push(Some(encoder.attach(patch.delta())?));
    }
    let logits = encoder.forward(&Arc::new(batch), &tasks)?;

    let mut table = plain_table();
    table.set_width(WIDTH).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["task", "bitfit", "labelled", "text"]);
    for ((task, example), logits) in rows.into_iter().zip(logits) {
        let answer = from_logits(&task.problem(), &logits).into();
        let label = example.target.map(|target| task.label(target)).unwrap_or_default();
        let text = [Some(example.text), example.text_pair].into_iter().flatten().collect::<Vec<_>>().join("\n> ");
        table.add_row([task.name.to_string(), task.label(answer), label, text]);
    }
    Ok(flush_left(table))
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

/// Takes away the blank that the first column begins with.
fn flush_left(mut table: Table) -> Table {
    if let Some(column) = table.column_mut(0) {
        column.set_padding((0, 1));
    }
    table
}

/// Commands that run as they stand, from the folder that quickstart ran in.
fn next_commands(program: &Path) -> String {
    let program = quoted(&program.to_string_lossy());
    let patch = |name: &str| format!("--patch {FOLDER}/{name}/patch.safetensors");
    let mut text = String::new();
    let mut add = |what: &str, lines: &[&str]| {
        // A String takes whatever is written to it.
        let _ = writeln!(text, "# {what}\n{}\n", lines.join(" \\\n    "));
    };
    let (tone, urgency, answers) = (patch("tone"), patch("urgency"), patch("answers"));
    let predict = format!("{program} predict");
    let train = format!("{program} train");
    add(
        "one text through two tasks at once",
        &[&predict, &tone, &urgency, "--text \"The boiler has failed again and the whole house is cold.\""],
    );
    add(
        "a pair of texts",
        &[
            &predict,
            &answers,
            "--text \"When does the bakery open on Sundays?\"",
            "--text-pair \"The bakery opens at eight on Sundays.\"",
        ],
    );
    add(
        "your own table (CSV, TSV, JSONL, Parquet): a column of texts, one of labels",
        &[&train, "--train your.csv --text-column text --label-column label", "--out runs/yours"],
    );
    text.truncate(text.trim_end().len());
    text
}

/// 27267 as 27,267.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let of = |(i, digit): (usize, char)| {
        let comma = i > 0 && (digits.len() - i).is_multiple_of(3);
        comma.then_some(',').into_iter().chain([digit])
    };
    digits.chars().enumerate().flat_map(of).collect()
}

/// A bar while a run trains, on standard error, and a line once it is done.
struct Progress {
    name: String,
    bar: ProgressBar,
}

impl Progress {
    fn new(name: String) -> Self {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("  {prefix:18} {bar:24} {pos}/{len}  {msg}  {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(name.clone());
        Progress { name, bar }
    }

    fn show(&self, event: &Event) {
        match event {
            Event::Started { steps, .. } => self.bar.set_length(*steps),
            Event::Step { step, loss, .. } => {
                self.bar.set_message(format!("loss {loss:.3}"));
                self.bar.set_position(*step);
            }
            _ => {}
        }
    }

    fn finish(&self, metric: &str, score: f64) {
        let seconds = self.bar.elapsed().as_secs_f64();
        self.bar.finish_and_clear();
        eprintln!("  {:18} {seconds:5.1} s  {metric} {score:.3}", self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_parted_by_thousands() {
        let shown = [0, 999, 1000, 27267, 22_713_216].map(thousands);
        assert_eq!(shown, ["0", "999", "1,000", "27,267", "22,713,216"]);
    }
}
