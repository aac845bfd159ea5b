//! A file of rows through many tasks, at constant memory: rows are read, answered and written some hundreds at a time.
//!
//! To a file, the work can be interrupted at any moment and gone on with, and the output is the same, to the byte. Start
//! reading at [`Scorer::to_file`].

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::partial::{Existing, Partial, Places};
use super::recorded::Asked;
use super::row_writer::{Form, RowWriter, row_writer};
use super::tasks::{Input, TaskPatch, predict_from};
use crate::data::{Columns, Part, Row, Rows, Shard};
use crate::encoder::Encoder;
use crate::error::{Error, Result};

/// Rows that are read before they are answered: enough to make full batches of like lengths. An output's pieces, and the
/// row groups of a Parquet file, follow from it; the answers do not depend on it.
const CHUNK: usize = 512;

/// What is to be answered, and how it is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The file; `-` is JSONL from standard input.
    pub input: PathBuf,
    /// Its columns.
    pub columns: Columns,
    /// The part of it.
    pub shard: Shard,
    /// Rows, or one JSON object.
    pub form: Form,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Rows that are answered.
    pub rows: u64,
    /// How many of them an earlier run had answered.
    pub resumed: u64,
    /// How much of the input has been read, from 0 to 1, where its length is known.
    pub share: Option<f64>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scored {
    /// Rows that are answered.
    pub rows: u64,
    /// How many of them an earlier run had answered.
    pub resumed: u64,
    /// For each task, how many rows were longer than its maximum length and were cut.
    pub truncated: Vec<u64>,
    /// Whether the output was finished before, and nothing was done.
    pub was_finished: bool,
}

/// Answers the rows of a file with every task.
pub struct Scorer<'a> {
    /// The base on its device.
    pub encoder: &'a Encoder,
    /// The tasks, in the order of their columns.
    pub tasks: &'a [TaskPatch],
    /// What is asked.
    pub job: &'a Job,
}

impl Scorer<'_> {
    /// Answers into a file, which appears when all is answered.
    ///
    /// Until then the rows lie in `OUT.partial`, and `OUT.progress` is a record of how many there are; both are written
    /// so that a run that is killed can be gone on with ([`Existing::Resume`]). The record holds what was asked, and a
    /// run of something else is refused. `stop` is looked at between chunks of rows.
    ///
    /// # Errors
    ///
    /// All of [`check_output`](super::check_output), [`Rows::open_part`], of reading the rows and of
    /// [`predict`](super::predict()); names that would stand twice in a row; a record of another run, or a beginning that
    /// is shorter than its record; [`Error::Interrupted`] after `stop`. What was answered before a failure is kept where
    /// the input is a file.
    pub fn to_file(
        &self,
        output: &Path,
        existing: Existing,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(&Progress),
    ) -> Result<Scored> {
        let places = Places::of(output)?;
        if places.is_finished(existing)? {
            places.tidy()?;
            return Ok(Scored { rows: 0, resumed: 0, truncated: Vec::new(), was_finished: true });
        }
        let Job { input, columns, shard, form } = self.job;
        let is_stdin = input == Path::new("-");
        let asked = (!is_stdin && input.is_file())
            .then(|| Asked::of(input, columns, *shard, *form, self.encoder, self.tasks))
            .transpose()?;
        if existing == Existing::Resume && asked.is_none() && (is_stdin || input.exists()) {
            let message = "--resume needs an input that can be read again from its beginning: a file";
            return Err(Error::Usage(message.into()));
        }
        let recorded = places.recorded(existing, asked.as_ref())?;
        let resumed = recorded.as_ref().map_or(0, |recorded| recorded.rows);
        let truncated = recorded.as_ref().map_or(vec![0; self.tasks.len()], |recorded| recorded.truncated.clone());
        let mut scored = Scored { rows: resumed, resumed, truncated, was_finished: false };
        let (mut rows, writer) = self.open(resumed)?;
        let mut file = ToFile { partial: Partial::open(places, asked, recorded.as_ref())?, stop };
        let mut fill = || -> Result<()> {
            if recorded.is_none() {
                file.append(&writer.head()?)?;
                file.partial.record(&scored.truncated, 0)?;
            }
            let answered = self.answer(&mut rows, &*writer, &mut scored, &mut file, watch);
            // After a failure too: what was appended and counted is whole.
            answered.and(file.partial.record(&scored.truncated, scored.rows))
        };
        match fill() {
            Ok(()) => file.partial.finish(&*writer)?,
            Err(error) => {
                file.partial.give_up();
                return Err(error);
            }
        }
        Ok(scored)
    }

    /// Answers into a stream, `name` in errors. Rows of text go out as they are answered; Parquet and the JSON object
    /// are put together in a temporary file first.
    ///
    /// # Errors
    ///
    /// As [`Scorer::to_file`], as far as it goes without a file.
    pub fn to_stream(
        &self,
        to: &mut (dyn Write + Send),
        name: &Path,
        watch: &mut dyn FnMut(&Progress),
    ) -> Result<Scored> {
        let mut scored = Scored { rows: 0, resumed: 0, truncated: vec![0; self.tasks.len()], was_finished: false };
        let (mut rows, writer) = self.open(0)?;
        let Some(assembly) = writer.assembly() else {
            let mut stream = ToStream { to, name };
            stream.append(&writer.head()?)?;
            self.answer(&mut rows, &*writer, &mut scored, &mut stream, watch)?;
            return Ok(scored);
        };
        let place = std::env::temp_dir();
        let mut frames = tempfile::tempfile_in(&place).map_err(Error::io("write a temporary file in", &place))?;
        let mut stream = ToStream { to: &mut frames, name: &place };
        self.answer(&mut rows, &*writer, &mut scored, &mut stream, watch)?;
        let mut to = BufWriter::new(to);
        assembly.assemble(&mut frames, &mut to).and_then(|()| to.flush()).map_err(Error::io("write to", name))?;
        Ok(scored)
    }

    /// The rows behind those that are answered, and what writes them.
    fn open(&self, answered: u64) -> Result<(Rows, Box<dyn RowWriter>)> {
        let Job { input, columns, shard, form } = self.job;
        let rows = Rows::open_part(input, columns, Part { shard: *shard, skip: answered })?;
        // Only the first part has the header, so that the parts behind each other are the whole.
        let writer = row_writer(self.tasks, &rows, *form, shard.is_first())?;
        Ok((rows, writer))
    }

    fn answer(
        &self,
        rows: &mut Rows,
        writer: &dyn RowWriter,
        scored: &mut Scored,
        to: &mut dyn Sink,
        watch: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        loop {
            let chunk: Vec<Row> = rows.by_ref().take(CHUNK).collect::<Result<_>>()?;
            if chunk.is_empty() {
                return Ok(());
            }
            let text = |row: &Row| Input { text: row.text.clone(), text_pair: row.text_pair.clone() };
            let inputs: Vec<Input> = chunk.iter().map(text).collect();
            let found = predict_from(self.encoder, self.tasks, &inputs, scored.rows as usize)?;
            to.append(&writer.rows(chunk, &found)?)?;
            // Counted once they are written: a record must not speak of more.
            scored.rows += inputs.len() as u64;
            scored.truncated.iter_mut().zip(&found.truncated).for_each(|(all, n)| *all += *n as u64);
            watch(&Progress { rows: scored.rows, resumed: scored.resumed, share: rows.share_read() });
            to.answered(scored)?;
        }
    }
}

/// Where pieces go.
trait Sink {
    fn append(&mut self, piece: &[u8]) -> Result<()>;

    /// Told after each chunk.
    fn answered(&mut self, _: &Scored) -> Result<()> {
        Ok(())
    }
}

struct ToStream<'a> {
    to: &'a mut dyn Write,
    name: &'a Path,
}

impl Sink for ToStream<'_> {
    fn append(&mut self, piece: &[u8]) -> Result<()> {
        self.to.write_all(piece).map_err(Error::io("write to", self.name))
    }
}

struct ToFile<'a> {
    partial: Partial,
    stop: &'a AtomicBool,
}

impl Sink for ToFile<'_> {
    fn append(&mut self, piece: &[u8]) -> Result<()> {
        self.partial.append(piece)
    }

    fn answered(&mut self, scored: &Scored) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted(format!("{} rows are answered", scored.rows)));
        }
        self.partial.record_in_time(&scored.truncated, scored.rows)
    }
}
