//! The three tasks that ship with the program, and their rows: `tone.tsv`, `urgency.tsv`, `answers.tsv` beside this
//! file, read by the reader of a user's own tables.

use std::path::Path;

use bitfit::base::problem::{Problem, Texts};
use bitfit::data::table::metrics_of;
use bitfit::data::{Columns, Dataset, Example, Fields, Format, Row, Rows};
use bitfit::device::batch::Target;
use bitfit::{Error, Result};

/// The split, in the files' first column, that training does not see.
pub const HELD_OUT: &str = "held_out";

/// A task that ships with the program.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    /// Its name, which is also its folder's.
    pub name: &'static str,
    /// What it asks, in a line.
    pub about: &'static str,
    tsv: &'static str,
    text: &'static str,
    text_pair: Option<&'static str>,
    label: &'static str,
    /// None for a value.
    labels: &'static [&'static str],
}

/// A classification and a regression of one text, and a classification of a pair.
pub const TASKS: [Task; 3] = [
    Task {
        name: "tone",
        about: "a customer's message: complaint, praise or question",
        tsv: include_str!("tone.tsv"),
        text: "text",
        text_pair: None,
        label: "label",
        labels: &["complaint", "praise", "question"],
    },
    Task {
        name: "urgency",
        about: "a note to a help desk: how urgent, from 0 to 10",
        tsv: include_str!("urgency.tsv"),
        text: "text",
        text_pair: None,
        label: "urgency",
        labels: &[],
    },
    Task {
        name: "answers",
        about: "a question and a reply: its own, or that to another question",
        tsv: include_str!("answers.tsv"),
        text: "question",
        text_pair: Some("answer"),
        label: "label",
        labels: &["answer", "other"],
    },
];

impl Task {
    /// The rows to train on, and those held out.
    ///
    /// # Errors
    ///
    /// None while the files are what the tests hold them to be.
    pub fn rows(&self) -> Result<(Dataset, Dataset)> {
        let columns = Columns {
            text: self.text.into(),
            text_pair: self.text_pair.map(String::from),
            label: Some(self.label.into()),
        };
        let file = format!("{}.tsv", self.name);
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for row in Rows::new(Box::new(self.tsv.as_bytes()), Format::Tsv, Path::new(&file), &columns)? {
            let row = row?;
            let split = if in_held_out(&row) { &mut held_out } else { &mut train };
            split.push(self.example(row, Path::new(&file))?);
        }
        let problem = self.problem();
        let texts = if self.text_pair.is_some() { Texts::Two } else { Texts::One };
        let metrics = metrics_of(&problem);
        let train = Dataset { name: self.name.into(), problem, texts, metrics, examples: train, skipped: 0 };
        let held_out = train.with(held_out);
        Ok((train, held_out))
    }

    /// What is predicted.
    pub fn problem(&self) -> Problem {
        match self.labels {
            [] => Problem::Value,
            labels => Problem::Classes(labels.iter().map(|label| label.to_string()).collect()),
        }
    }

    /// A class's label, or a value, as a person reads it.
    pub fn label(&self, target: Target) -> String {
        match target {
            Target::Class(class) => self.labels.get(class as usize).copied().unwrap_or_default().to_string(),
            Target::Value(value) => format!("{value:.1}"),
        }
    }

    fn example(&self, row: Row, file: &Path) -> Result<Example> {
        let label = row.label.unwrap_or_default();
        let target = match self.labels {
            [] => label.parse().ok().map(Target::Value),
            labels => labels.iter().position(|known| *known == label).map(|class| Target::Class(class as u32)),
        };
        let target = target.ok_or_else(|| Error::line(file, row.line, format!("unknown label `{label}`")))?;
        Ok(Example { text: row.text, text_pair: row.text_pair, target: Some(target) })
    }
}

fn in_held_out(row: &Row) -> bool {
    matches!(&row.fields, Fields::Columns(columns) if columns.first().is_some_and(|split| split == HELD_OUT))
}
