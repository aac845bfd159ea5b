//! Rows of a Parquet file with their answers, as Parquet again.
//!
//! A Parquet file ends with its table of contents, so one that breaks off is none, and nothing can be appended to it.
//! Answered rows are therefore kept in frames, a chunk of rows each: its length (u64, little-endian) and an Arrow IPC
//! stream of one record batch, which keeps every type as it is. In the end frame after frame goes into the file. A frame
//! holds the same rows however the input was cut into batches, so the file does not depend on where a run was
//! interrupted.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use arrow_select::concat::concat_batches;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use super::answer::Prediction;
use super::columns::columns;
use super::row_writer::{Added, Assembly, RowWriter, not_written};
use super::tasks::Predictions;
use crate::base::problem::Problem;
use crate::data::{Fields, Row};
use crate::error::Result;

/// A row group is kept in memory until it is written: its bounds bound the memory.
const ROWS_IN_GROUP: usize = 32_768;
const BYTES_IN_GROUP: usize = 32 << 20;

/// What the `datasets` library says of a file's columns. It does not hold for a file with more of them.
const OF_FEWER_COLUMNS: &str = "huggingface";

pub(super) struct ParquetWriter {
    /// The input's columns and those that are added.
    schema: SchemaRef,
    problems: Vec<Problem>,
}

impl ParquetWriter {
    pub(super) fn new(input: &Schema, added: Added) -> Self {
        let mut fields: Vec<Arc<Field>> = input.fields().iter().cloned().collect();
        for (name, problem) in added.names.iter().zip(&added.problems) {
            let types: &[DataType] = match problem {
                Problem::Classes(_) => &[DataType::Utf8, DataType::Float32],
                Problem::Value => &[DataType::Float32],
            };
            let of_task = columns(name, problem).into_iter().zip(types);
            fields.extend(of_task.map(|(name, kind)| Arc::new(Field::new(name, kind.clone(), false))));
        }
        let mut metadata = input.metadata().clone();
        metadata.remove(OF_FEWER_COLUMNS);
        ParquetWriter { schema: Arc::new(Schema::new_with_metadata(fields, metadata)), problems: added.problems }
    }

    fn batch(&self, rows: &[Row], found: &Predictions) -> Result<RecordBatch, ArrowError> {
        let runs = runs(rows);
        let input = match &runs[..] {
            [one] => one.clone(),
            [first, ..] => concat_batches(&first.schema(), &runs)?,
            [] => return Err(ArrowError::InvalidArgumentError("there are no rows of a Parquet file".into())),
        };
        let mut columns = input.columns().to_vec();
        for (problem, of_task) in self.problems.iter().zip(&found.of_tasks) {
            columns.extend(answers(problem, of_task));
        }
        RecordBatch::try_new(self.schema.clone(), columns)
    }
}

/// The rows as slices of the batches they were decoded in, as few as there can be.
fn runs(rows: &[Row]) -> Vec<RecordBatch> {
    let mut runs: Vec<(&Arc<RecordBatch>, usize, usize)> = Vec::new();
    for row in rows {
        let Fields::Record(record) = &row.fields else { continue };
        match runs.last_mut() {
            Some((batch, start, n)) if Arc::ptr_eq(batch, &record.batch) && *start + *n == record.row => *n += 1,
            _ => runs.push((&record.batch, record.row, 1)),
        }
    }
    runs.into_iter().map(|(batch, start, n)| batch.slice(start, n)).collect()
}

/// The columns that a task adds.
fn answers(problem: &Problem, of_task: &[Prediction]) -> Vec<ArrayRef> {
    let number = |prediction: &Prediction| match prediction {
        Prediction::Class { class, scores } => scores.get(*class).copied().unwrap_or(f32::NAN),
        Prediction::Value(value) => *value,
    };
    let numbers: ArrayRef = Arc::new(Float32Array::from_iter_values(of_task.iter().map(number)));
    let Problem::Classes(labels) = problem else { return vec![numbers] };
    let label = |prediction: &Prediction| match prediction {
        Prediction::Class { class, .. } => labels.get(*class).map_or("", String::as_str),
        Prediction::Value(_) => "",
    };
    vec![Arc::new(StringArray::from_iter_values(of_task.iter().map(label))), numbers]
}

impl RowWriter for ParquetWriter {
    fn rows(&self, rows: Vec<Row>, found: &Predictions) -> Result<Vec<u8>> {
        let frame = || -> Result<Vec<u8>, ArrowError> {
            let mut frame = vec![0; 8];
            let mut stream = StreamWriter::try_new(&mut frame, &self.schema)?;
            stream.write(&self.batch(&rows, found)?)?;
            stream.finish()?;
            drop(stream);
            let length = (frame.len() - 8) as u64;
            frame[..8].copy_from_slice(&length.to_le_bytes());
            Ok(frame)
        };
        frame().map_err(|e| not_written("Arrow", e))
    }

    fn assembly(&self) -> Option<&dyn Assembly> {
        Some(self)
    }
}

impl Assembly for ParquetWriter {
    fn assemble(&self, frames: &mut File, to: &mut (dyn Write + Send)) -> io::Result<()> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_max_row_group_row_count(Some(ROWS_IN_GROUP))
            .set_max_row_group_bytes(Some(BYTES_IN_GROUP))
            .build();
        let mut writer = ArrowWriter::try_new(to, self.schema.clone(), Some(properties)).map_err(io::Error::other)?;
        let mut left = frames.metadata()?.len();
        frames.rewind()?;
        while left > 0 {
            let mut length = [0; 8];
            frames.read_exact(&mut length)?;
            let length = u64::from_le_bytes(length);
            left = left.checked_sub(8).and_then(|left| left.checked_sub(length)).ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut frame = Vec::with_capacity(length as usize);
            Read::take(&mut *frames, length).read_to_end(&mut frame)?;
            for batch in StreamReader::try_new(&frame[..], None).map_err(io::Error::other)? {
                writer.write(&batch.map_err(io::Error::other)?).map_err(io::Error::other)?;
            }
        }
        writer.close().map(drop).map_err(io::Error::other)
    }
}
