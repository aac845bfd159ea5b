//! Answered rows as bytes: each row of the input in its own format with every task's answer behind, or one JSON object.
//!
//! A writer makes a piece of bytes of each chunk of rows, and keeps nothing, so that a run can be cut after any piece and
//! gone on with. Where the pieces are not yet the output (Parquet has its table of contents at the end; the JSON object
//! holds all answers of a task before the next task's), they are frames, and the writer puts them together in the end,
//! a frame at a time.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};

use serde_json::Value;

use super::columns::{cells, columns, names};
use super::json;
use super::json_writer::JsonWriter;
use super::parquet_writer::ParquetWriter;
use super::tasks::{Predictions, TaskPatch};
use crate::base::problem::Problem;
use crate::data::{Fields, Format, Row, Rows};
use crate::error::{Error, Result};

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A row for each row of the input, in the input's format: its columns, then those of the tasks.
    Rows,
    /// One JSON object of all predictions, as [`json::results`].
    Json,
}

impl Form {
    /// Its name in the record of a run's progress.
    pub(super) fn name(self) -> &'static str {
        match self {
            Form::Rows => "rows",
            Form::Json => "json",
        }
    }
}

/// Makes bytes of answered rows.
pub(super) trait RowWriter {
    /// What stands before the first row of the file.
    fn head(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// A chunk of rows and the answers to them.
    fn rows(&self, rows: Vec<Row>, found: &Predictions) -> Result<Vec<u8>>;

    /// The frames that the other methods made, put together; `None` where the pieces are the output as they are.
    fn assembly(&self) -> Option<&dyn Assembly> {
        None
    }
}

/// Puts frames together.
pub(super) trait Assembly {
    /// Reads frames from the beginning of a file to its end and writes the output.
    fn assemble(&self, frames: &mut File, to: &mut (dyn Write + Send)) -> io::Result<()>;
}

/// What answers look like in a row.
pub(super) struct Added {
    /// The tasks' names.
    pub(super) names: Vec<String>,
    pub(super) problems: Vec<Problem>,
}

impl Added {
    /// The columns that are added, in order.
    pub(super) fn columns(&self) -> Vec<String> {
        self.names.iter().zip(&self.problems).flat_map(|(name, problem)| columns(name, problem)).collect()
    }
}

/// The writer of a form and a format.
///
/// # Errors
///
/// Names that would stand twice in a row.
pub(super) fn row_writer(tasks: &[TaskPatch], rows: &Rows, form: Form, has_head: bool) -> Result<Box<dyn RowWriter>> {
    if form == Form::Json {
        return Ok(Box::new(JsonWriter::new(tasks)));
    }
    let problems = tasks.iter().map(|task| task.metadata().problem.clone()).collect();
    let added = Added { names: names(tasks), problems };
    let header: Vec<String> = match rows.header() {
        Some(header) => header.iter().cloned().chain(added.columns()).collect(),
        // Keys of JSONL are looked at row by row.
        None => added.names.clone(),
    };
    let mut seen = BTreeSet::new();
    if let Some(name) = header.iter().find(|name| !seen.insert(*name)) {
        return Err(Error::Usage(format!(
            "the output would have two columns `{name}`; rename the input's, or give each patch once"
        )));
    }
    let header = has_head.then_some(header);
    Ok(match (rows.format(), rows.schema()) {
        (Format::Parquet, Some(schema)) => Box::new(ParquetWriter::new(schema, added)),
        (Format::Csv, _) => Box::new(Delimited { separator: b',', header, problems: added.problems }),
        (Format::Tsv, _) => Box::new(Delimited { separator: b'\t', header, problems: added.problems }),
        (Format::Jsonl | Format::Parquet, _) => Box::new(Jsonl { added }),
    })
}

/// The error of a piece that could not be made, which only a defect or exhausted memory brings about.
pub(super) fn not_written(format: &str, reason: impl std::fmt::Display) -> Error {
    Error::Usage(format!("the answered rows cannot be written as {format}: {reason}"))
}

struct Delimited {
    separator: u8,
    header: Option<Vec<String>>,
    problems: Vec<Problem>,
}

impl Delimited {
    fn records<'r>(&self, records: impl Iterator<Item = &'r Vec<String>>) -> Result<Vec<u8>> {
        let mut table = csv::WriterBuilder::new().delimiter(self.separator).from_writer(Vec::new());
        for record in records {
            table.write_record(record).map_err(|e| not_written("a table", e))?;
        }
        table.into_inner().map_err(|e| not_written("a table", e))
    }
}

impl RowWriter for Delimited {
    fn head(&self) -> Result<Vec<u8>> {
        self.records(self.header.iter())
    }

    fn rows(&self, rows: Vec<Row>, found: &Predictions) -> Result<Vec<u8>> {
        let answered = rows.into_iter().enumerate().filter_map(|(i, row)| {
            let Fields::Columns(mut fields) = row.fields else { return None };
            let answers = self.problems.iter().zip(&found.of_tasks);
            fields.extend(answers.flat_map(|(problem, of_task)| cells(problem, &of_task[i])));
            Some(fields)
        });
        self.records(answered.collect::<Vec<_>>().iter())
    }
}

struct Jsonl {
    added: Added,
}

impl RowWriter for Jsonl {
    fn rows(&self, rows: Vec<Row>, found: &Predictions) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        for (i, row) in rows.into_iter().enumerate() {
            let Fields::Object(mut object) = row.fields else { continue };
            let answers = self.added.names.iter().zip(&self.added.problems).zip(&found.of_tasks);
            for ((name, problem), of_task) in answers {
                if object.insert(name.clone(), json::prediction(problem, &of_task[i])).is_some() {
                    let message = format!("line {} has a key `{name}` already; rename it", row.line);
                    return Err(Error::Usage(message));
                }
            }
            text.extend_from_slice(Value::Object(object).to_string().as_bytes());
            text.push(b'\n');
        }
        Ok(text)
    }
}
