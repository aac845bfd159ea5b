//! The one JSON object of all answers, which holds a task's answers to every row before the next task's.
//!
//! Rows are answered by all tasks at once, so the answers are kept in frames, a chunk of rows each: where each task's
//! answers end (a u64 a task, little-endian, counted from behind these numbers), then the answers, task by task. In the
//! end each task reads its own stretch of every frame.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::json;
use super::row_writer::{Assembly, RowWriter};
use super::tasks::{Predictions, TaskPatch};
use crate::base::problem::Problem;
use crate::data::Row;
use crate::error::Result;

pub(super) struct JsonWriter {
    heads: Vec<String>,
    problems: Vec<Problem>,
}

impl JsonWriter {
    pub(super) fn new(tasks: &[TaskPatch]) -> Self {
        let problems = tasks.iter().map(|task| task.metadata().problem.clone()).collect();
        JsonWriter { heads: tasks.iter().map(json::task_head).collect(), problems }
    }
}

impl RowWriter for JsonWriter {
    fn rows(&self, _: Vec<Row>, found: &Predictions) -> Result<Vec<u8>> {
        let (mut ends, mut answers) = (Vec::new(), String::new());
        for (problem, of_task) in self.problems.iter().zip(&found.of_tasks) {
            for (i, answer) in of_task.iter().enumerate() {
                answers.push_str(if i > 0 { "," } else { "" });
                answers.push_str(&json::prediction(problem, answer).to_string());
            }
            ends.extend_from_slice(&(answers.len() as u64).to_le_bytes());
        }
        ends.extend_from_slice(answers.as_bytes());
        Ok(ends)
    }

    fn assembly(&self) -> Option<&dyn Assembly> {
        Some(self)
    }
}

impl Assembly for JsonWriter {
    fn assemble(&self, frames: &mut File, to: &mut (dyn Write + Send)) -> io::Result<()> {
        let (n_tasks, length) = (self.heads.len() as u64, frames.seek(SeekFrom::End(0))?);
        to.write_all(b"{\"results\":[")?;
        for (task, head) in (0..).zip(&self.heads) {
            write!(to, "{}{head}", if task > 0 { "," } else { "" })?;
            let mut frame = 0;
            while frame < length {
                let start = if task > 0 { number(frames, frame + 8 * (task - 1))? } else { 0 };
                let end = number(frames, frame + 8 * task)?;
                to.write_all(if frame > 0 { b"," } else { b"" })?;
                frames.seek(SeekFrom::Start(frame + 8 * n_tasks + start))?;
                if io::copy(&mut Read::take(&mut *frames, end - start), to)? != end - start {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                frame += 8 * n_tasks + number(frames, frame + 8 * (n_tasks - 1))?;
            }
            to.write_all(b"]}")?;
        }
        to.write_all(b"]}\n")
    }
}

fn number(file: &mut File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
