//! `bitfit predict`: texts through one task or many, over one base.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use bitfit::base::problem::Texts;
use bitfit::data::{Columns, Format, Shard};
use bitfit::encoder::Encoder;
use bitfit::patch::write_aside;
use bitfit::predict::{
    Existing, Form, Input, Job, Scored, Scorer, TaskPatch, can_resume, cells, check_output, json, names, predict,
};
use bitfit::{Error, Result};

use super::args::{BaseArgs, ColumnArgs, DeviceArgs, refuse};
use super::output::resume_command;
use super::progress::RowsProgress;
use super::train::stop_on_ctrl_c;

/// Flags of `bitfit predict`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("texts").required(true).args(["text", "input"]))]
pub struct Args {
    #[command(flatten)]
    base: BaseArgs,
    /// A patch; give several to answer each text with every task, in one batch
    #[arg(long, value_name = "FILE", required = true)]
    patch: Vec<PathBuf>,
    /// A text
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// The second text, for tasks of two
    #[arg(long, value_name = "TEXT", requires = "text")]
    text_pair: Option<String>,
    /// Rows of texts: .csv, .tsv, .jsonl or .parquet; - reads JSONL from standard input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Answer part I of N of the input alone; I counts from 0 to N - 1, as a Slurm array's or an indexed Kubernetes
    /// job's index does. The outputs behind each other are that of the whole: of CSV and TSV the first has the header
    #[arg(long, value_name = "I/N")]
    shard: Option<String>,
    /// Write there, once all is answered, and not to standard output. Until then the rows lie in FILE.partial
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Go on with an --output that was interrupted, to the same file as without
    #[arg(long, requires = "output", conflicts_with = "overwrite")]
    resume: bool,
    /// Replace the output file where it is there already, and what an interrupted run left
    #[arg(long, requires = "output")]
    overwrite: bool,
    /// Print one JSON object instead of rows
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    args.device.check()?;
    let shard = args.shard.as_deref().map_or(Ok(Shard::WHOLE), str::parse)?;
    match &args.input {
        Some(input) => {
            refuse("--text", &[("--text-pair", args.text_pair.is_some())])?;
            args.check_format(input)?;
        }
        None => refuse(
            "--input",
            &[
                ("--text-column", args.columns.text_column.is_some()),
                ("--text-pair-column", args.columns.text_pair_column.is_some()),
                ("--shard", args.shard.is_some()),
                ("--resume", args.resume),
            ],
        )?,
    }
    let existing = args.existing();
    if let Some(output) = &args.output
        && !check_output(output, existing)?
    {
        eprintln!("{} is finished; nothing was left to do", output.display());
        return Ok(());
    }
    let base = args.base.load()?;
    let encoder = args.device.encoder(&base)?;
    let tasks: Vec<TaskPatch> = args.patch.iter().map(|p| TaskPatch::load(p, &encoder)).collect::<Result<_>>()?;
    let truncated = match &args.input {
        None => args.answer_text(&encoder, &tasks)?,
        Some(input) => {
            let form = if args.json { Form::Json } else { Form::Rows };
            let job = Job { input: input.clone(), columns: args.columns(&tasks), shard, form };
            args.answer_rows(&Scorer { encoder: &encoder, tasks: &tasks, job: &job }, existing)?.truncated
        }
    };
    for (task, truncated) in tasks.iter().zip(truncated).filter(|(_, truncated)| *truncated > 0) {
        let (name, most) = (task.name(), task.metadata().max_length);
        eprintln!("{name}: {truncated} of the texts were longer than {most} tokens and were cut");
    }
    Ok(())
}

impl Args {
    fn existing(&self) -> Existing {
        match (self.resume, self.overwrite) {
            (true, _) => Existing::Resume,
            (_, true) => Existing::Overwrite,
            _ => Existing::Refuse,
        }
    }

    /// Rows come back in the input's format, so an output whose name says another would deceive whoever reads it; and
    /// Parquet is nothing to look at.
    fn check_format(&self, input: &Path) -> Result<()> {
        let format = if input == Path::new("-") { Format::Jsonl } else { Format::of(input)? };
        if self.json {
            return Ok(());
        }
        let extension = format.extension();
        match &self.output {
            Some(output) if Format::of(output).is_ok_and(|named| named != format) => Err(Error::setting(
                "--output",
                format!("a name that ends in .{extension}, as rows come back in the format of the input"),
                output.display(),
            )),
            None if format == Format::Parquet && io::stdout().is_terminal() => Err(Error::Usage(
                "rows of a Parquet file come back as Parquet, which is no text for a terminal; add --output \
                 FILE.parquet, or --json"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    fn columns(&self, tasks: &[TaskPatch]) -> Columns {
        let pairs = tasks.iter().all(|task| task.metadata().texts == Texts::Two);
        let default_pair = pairs.then(|| "text_pair".to_string());
        Columns {
            text: self.columns.text_column.clone().unwrap_or_else(|| "text".into()),
            text_pair: self.columns.text_pair_column.clone().or(default_pair),
            label: None,
        }
    }

    /// Answers the one text; gives what of it each task cut.
    fn answer_text(&self, encoder: &Encoder, tasks: &[TaskPatch]) -> Result<Vec<u64>> {
        let input = Input { text: self.text.clone().unwrap_or_default(), text_pair: self.text_pair.clone() };
        let found = predict(encoder, tasks, &[input])?;
        let mut text = String::new();
        if self.json {
            text = format!("{}\n", json::results(tasks, &found));
        } else {
            let names = names(tasks);
            let widest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
            for ((name, task), predictions) in names.iter().zip(tasks).zip(&found.of_tasks) {
                let cells = predictions.iter().flat_map(|p| cells(&task.metadata().problem, p));
                text += &format!("{name:widest$}  {}\n", cells.collect::<Vec<_>>().join("  "));
            }
        }
        match &self.output {
            Some(output) => write_aside(output, |file| file.write_all(text.as_bytes()))?,
            None => {
                let mut out = io::stdout().lock();
                let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                written.map_err(Error::io("write to", "standard output"))?;
            }
        }
        Ok(found.truncated.iter().map(|n| *n as u64).collect())
    }

    fn answer_rows(&self, scorer: &Scorer, existing: Existing) -> Result<Scored> {
        // A bar would run through rows that are printed on the same terminal.
        let mut progress = RowsProgress::new(self.output.is_some() || !io::stdout().is_terminal());
        let Some(output) = &self.output else {
            // Not the locked one, which cannot be handed to the writer of Parquet; nothing else prints meanwhile.
            let mut out = io::stdout();
            let scored = scorer.to_stream(&mut out, Path::new("standard output"), &mut |at| progress.show(at));
            progress.finish();
            let scored = scored?;
            out.flush().map_err(Error::io("write to", "standard output"))?;
            return Ok(scored);
        };
        // Ctrl-C stops between chunks of rows, where there is something to go on from.
        let stop = match can_be_read_again(&scorer.job.input) {
            true => stop_on_ctrl_c("stopping at the end of these rows; once more ends at once")?,
            false => AtomicBool::new(false).into(),
        };
        let scored = scorer.to_file(output, existing, &stop, &mut |at| progress.show(at));
        progress.finish();
        if scored.is_err() && can_resume(output) {
            eprintln!("what was answered is kept in {}.partial; to go on: {}", output.display(), resume_command());
        }
        scored
    }
}

fn can_be_read_again(input: &Path) -> bool {
    input != Path::new("-") && input.is_file()
}
