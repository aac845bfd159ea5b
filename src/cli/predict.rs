//! `bitfit predict`: texts through one task or many, over one base.
//!
//! Rows stream: they are read, answered and written some hundreds at a time, so that a file may be larger than memory.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bitfit::base::problem::{Problem, Texts};
use bitfit::data::{Columns, Fields, Format, Row, Rows};
use bitfit::patch::write_aside;
use bitfit::predict::{Input, Prediction, Predictions, TaskPatch, json, predict};
use bitfit::{Error, Result};
use serde_json::Value;

use super::args::{BaseArgs, ColumnArgs, DeviceArgs, refuse};

/// Rows that are read before they are answered: enough to make full batches of like lengths.
const CHUNK: usize = 512;

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
    /// Rows of texts: .csv, .tsv or .jsonl; - reads JSONL from standard input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Write there, once all is answered, and not to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the output file where it is there already
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
    match args.input {
        Some(_) => refuse("--text", &[("--text-pair", args.text_pair.is_some())])?,
        None => refuse(
            "--input",
            &[
                ("--text-column", args.columns.text_column.is_some()),
                ("--text-pair-column", args.columns.text_pair_column.is_some()),
            ],
        )?,
    }
    if let Some(output) = args.output.as_ref().filter(|output| output.exists() && !args.overwrite) {
        return Err(Error::Usage(format!("{} is there already; --overwrite replaces it", output.display())).into());
    }
    let base = args.base.load()?;
    let encoder = args.device.encoder(&base)?;
    let tasks: Vec<TaskPatch> = args.patch.iter().map(|p| TaskPatch::load(p, &encoder)).collect::<Result<_>>()?;
    let mut answer = |inputs: &[Input]| predict(&encoder, &tasks, inputs);
    let mut truncated = vec![0; tasks.len()];
    let mut write = |mut out: Output| match &args.input {
        None => args.answer_text(&tasks, &mut answer, &mut truncated, &mut out),
        Some(input) => args.answer_rows(input, &tasks, &mut answer, &mut truncated, &mut out),
    };
    match &args.output {
        None => write(Output { to: &mut io::stdout().lock(), name: Path::new("standard output") })?,
        Some(output) => aside(output, write)?,
    }
    for (task, truncated) in tasks.iter().zip(truncated).filter(|(_, truncated)| *truncated > 0) {
        let (name, most) = (task.name(), task.metadata().max_length);
        eprintln!("{name}: {truncated} of the texts were longer than {most} tokens and were cut");
    }
    Ok(())
}

/// Where answers go, and its name for an error.
struct Output<'a> {
    to: &'a mut dyn Write,
    name: &'a Path,
}

impl Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).map_err(Error::io("write to", self.name))
    }

    fn line(&mut self, text: &str) -> Result<()> {
        self.write(format!("{text}\n").as_bytes())
    }
}

type Answer<'a> = &'a mut dyn FnMut(&[Input]) -> Result<Predictions>;

impl Args {
    fn answer_text(
        &self,
        tasks: &[TaskPatch],
        answer: Answer,
        truncated: &mut [usize],
        out: &mut Output,
    ) -> Result<()> {
        let input = Input { text: self.text.clone().unwrap_or_default(), text_pair: self.text_pair.clone() };
        let found = answer(&[input])?;
        count(truncated, &found);
        if self.json {
            return out.line(&json::results(tasks, &found).to_string());
        }
        let names = names(tasks);
        let widest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        for ((name, task), predictions) in names.iter().zip(tasks).zip(&found.of_tasks) {
            let cells = predictions.iter().flat_map(|p| cells(&task.metadata().problem, p));
            out.line(&format!("{name:widest$}  {}", cells.collect::<Vec<_>>().join("  ")))?;
        }
        Ok(())
    }

    fn answer_rows(
        &self,
        input: &Path,
        tasks: &[TaskPatch],
        answer: Answer,
        truncated: &mut [usize],
        out: &mut Output,
    ) -> Result<()> {
        let pairs = tasks.iter().all(|task| task.metadata().texts == Texts::Two);
        let default_pair = pairs.then(|| "text_pair".to_string());
        let columns = Columns {
            text: self.columns.text_column.clone().unwrap_or_else(|| "text".into()),
            text_pair: self.columns.text_pair_column.clone().or(default_pair),
            label: None,
        };
        let mut rows = Rows::open(input, &columns)?;
        let mut writer = if self.json { None } else { Some(RowWriter::new(tasks, &rows)?) };
        let mut all = Predictions { of_tasks: vec![Vec::new(); tasks.len()], truncated: vec![0; tasks.len()] };
        loop {
            let chunk: Vec<Row> = rows.by_ref().take(CHUNK).collect::<Result<_>>()?;
            if chunk.is_empty() {
                break;
            }
            let text = |row: &Row| Input { text: row.text.clone(), text_pair: row.text_pair.clone() };
            let found = answer(&chunk.iter().map(text).collect::<Vec<_>>())?;
            count(truncated, &found);
            match &mut writer {
                None => all.of_tasks.iter_mut().zip(found.of_tasks).for_each(|(all, found)| all.extend(found)),
                Some(writer) => writer.write(chunk, &found, out)?,
            }
        }
        if self.json { out.line(&json::results(tasks, &all).to_string()) } else { Ok(()) }
    }
}

fn count(truncated: &mut [usize], found: &Predictions) {
    truncated.iter_mut().zip(&found.truncated).for_each(|(all, n)| *all += n);
}

/// Each task's name in an output; two patches of one name are told apart by the beginning of their content hash.
fn names(tasks: &[TaskPatch]) -> Vec<String> {
    let shared = |name: &str| tasks.iter().filter(|task| task.name() == name).count() > 1;
    let of = |task: &TaskPatch| match shared(task.name()) {
        true => format!("{}@{}", task.name(), &task.content_hash()[..8]),
        false => task.name().to_string(),
    };
    tasks.iter().map(of).collect()
}

/// A prediction as the cells of a row: label and score, or the value.
fn cells(problem: &Problem, prediction: &Prediction) -> Vec<String> {
    match (problem, prediction) {
        (Problem::Classes(labels), Prediction::Class { class, scores }) => {
            vec![labels[*class].clone(), json::number(scores[*class]).to_string()]
        }
        (_, Prediction::Value(value)) => vec![json::number(*value).to_string()],
        (Problem::Value, Prediction::Class { .. }) => vec![],
    }
}

/// Repeats the rows of the input in its own format, with each task's answer behind.
struct RowWriter {
    format: Format,
    /// Columns of the input, until they are written.
    header: Option<Vec<String>>,
    names: Vec<String>,
    problems: Vec<Problem>,
}

impl RowWriter {
    /// Refuses names that would stand twice in a row.
    fn new(tasks: &[TaskPatch], rows: &Rows) -> Result<Self> {
        let names = names(tasks);
        let problems: Vec<Problem> = tasks.iter().map(|task| task.metadata().problem.clone()).collect();
        let added = names.iter().zip(&problems).flat_map(|(name, problem)| match problem {
            Problem::Classes(_) => vec![format!("{name}.label"), format!("{name}.score")],
            Problem::Value => vec![format!("{name}.value")],
        });
        let header = rows.header().map(|header| header.iter().cloned().chain(added).collect::<Vec<_>>());
        let mut seen = BTreeSet::new();
        for name in header.iter().flatten().chain(if header.is_none() { &names[..] } else { &[] }) {
            if !seen.insert(name) {
                return Err(Error::Usage(format!(
                    "the output would have two columns `{name}`; rename the input's, or give each patch once"
                )));
            }
        }
        Ok(RowWriter { format: rows.format(), header, names, problems })
    }

    fn write(&mut self, rows: Vec<Row>, found: &Predictions, out: &mut Output) -> Result<()> {
        let separator = if self.format == Format::Tsv { b'\t' } else { b',' };
        let mut table = csv::WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
        let in_memory = |e: csv::Error| Error::io("write to", out.name)(io::Error::other(e));
        let mut text = Vec::new();
        if let Some(header) = self.header.take() {
            table.write_record(&header).map_err(in_memory)?;
        }
        for (i, row) in rows.into_iter().enumerate() {
            let answers = found.of_tasks.iter().map(|of_task| &of_task[i]);
            match row.fields {
                Fields::Columns(mut fields) => {
                    fields.extend(self.problems.iter().zip(answers).flat_map(|(problem, p)| cells(problem, p)));
                    table.write_record(&fields).map_err(in_memory)?;
                }
                Fields::Object(mut object) => {
                    for ((name, problem), p) in self.names.iter().zip(&self.problems).zip(answers) {
                        if object.insert(name.clone(), json::prediction(problem, p)).is_some() {
                            let message = format!("line {} has a key `{name}` already; rename it", row.line);
                            return Err(Error::Usage(message));
                        }
                    }
                    text.extend_from_slice(Value::Object(object).to_string().as_bytes());
                    text.push(b'\n');
                }
            }
        }
        let table = table.into_inner().map_err(|e| Error::io("write to", out.name)(e.into_error()))?;
        out.write(&table)?;
        out.write(&text)
    }
}

/// Writes a file aside and renames it once it is whole; an error of `write` leaves nothing.
fn aside(path: &Path, write: impl FnOnce(Output) -> Result<()>) -> Result<()> {
    let mut failed = None;
    let written = write_aside(path, |to| {
        write(Output { to, name: path }).map_err(|error| {
            failed = Some(error);
            io::Error::other("not answered")
        })
    });
    failed.map_or(written, Err)
}
