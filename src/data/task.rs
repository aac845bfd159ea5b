//! GLUE: nine tasks and the diagnostic set AX, a row of one table each.
//!
//! The official TSV files are read as they are: no quoting (a stray `"` is text), columns found by the names in the
//! header, which differ from file to file, CoLA without a header. A row that does not fit is refused with its line;
//! QQP alone is known to have broken rows. A new task is one row of [`TASKS`].

use std::io::ErrorKind;
use std::path::Path;
use std::str::FromStr;
use std::{fmt, fs::File};

use super::dataset::{Dataset, Example};
use super::lines::Lines;
use super::metrics::Metric;
use crate::base::problem::{Problem, Texts};
use crate::device::batch::Target;
use crate::error::{Error, Result};

/// A part of a task's data, each an official file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is tested on; of MNLI, the matched set.
    Dev,
    /// MNLI's second dev set, of genres that its train file does not have.
    DevMismatched,
    /// Rows without labels, to be sent to the GLUE server; of MNLI, the matched set.
    Test,
    /// MNLI's second test set.
    TestMismatched,
}

impl Split {
    const ALL: [Split; 5] = [Split::Train, Split::Dev, Split::DevMismatched, Split::Test, Split::TestMismatched];

    /// The name a user types and JSON holds.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Dev => "dev",
            Split::DevMismatched => "dev_mismatched",
            Split::Test => "test",
            Split::TestMismatched => "test_mismatched",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Split {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Split::ALL.into_iter().find(|split| split.name() == s).ok_or_else(|| {
            let known = Split::ALL.map(Split::name).join(", ");
            Error::setting("split", format!("one of {known}"), format_args!("`{s}`"))
        })
    }
}

/// One task of GLUE: where its files lie, what they mean, and how it is scored.
#[derive(Debug)]
pub struct GlueTask {
    /// The name a user types, as `sst2`.
    pub name: &'static str,
    /// The folder of its files inside the data folder, as `SST-2`.
    pub folder: &'static str,
    /// How predictions are scored, the main metric first.
    pub metrics: &'static [Metric],
    /// The column of the text, or of both.
    pub(super) columns: (&'static str, Option<&'static str>),
    /// The column of the label in the files that have one.
    pub(super) label: &'static str,
    pub(super) labels: Labels,
    pub(super) files: &'static [GlueFile],
    pub(super) broken: Broken,
}

#[derive(Debug)]
pub(super) enum Labels {
    /// The file's value and the hub's name of each class, in the hub's order.
    Classes(&'static [(&'static str, &'static str)]),
    /// A value within these bounds.
    Value(f32, f32),
}

#[derive(Debug)]
pub(super) struct GlueFile {
    pub(super) split: Split,
    pub(super) name: &'static str,
    /// The names of the columns where the file has no header.
    pub(super) columns: Option<&'static [&'static str]>,
}

/// What is done with rows that are short or hold an empty text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Broken {
    /// No official file but QQP's has any: the file at hand is not the official one.
    Refuse,
    /// QQP: a line break inside a question leaves two short rows, which are skipped and counted; a few questions are
    /// empty, and are kept, as by everybody who reports figures on this set.
    Skip,
}

const fn file(split: Split, name: &'static str) -> GlueFile {
    GlueFile { split, name, columns: None }
}

const FILES: &[GlueFile] =
    &[file(Split::Train, "train.tsv"), file(Split::Dev, "dev.tsv"), file(Split::Test, "test.tsv")];

/// CoLA's columns: where the sentence was published, its label, the author's own mark, the sentence.
const COLA: Option<&[&str]> = Some(&["source", "label", "mark", "sentence"]);

const ENTAILMENT: Labels = Labels::Classes(&[("entailment", "entailment"), ("not_entailment", "not_entailment")]);
const INFERENCE: Labels =
    Labels::Classes(&[("entailment", "entailment"), ("neutral", "neutral"), ("contradiction", "contradiction")]);

/// GLUE. The labels' names and their order are the hub's, so heads fit those of other tools.
pub const TASKS: &[GlueTask] = &[
    GlueTask {
        name: "cola",
        folder: "CoLA",
        columns: ("sentence", None),
        label: "label",
        labels: Labels::Classes(&[("0", "unacceptable"), ("1", "acceptable")]),
        metrics: &[Metric::Matthews, Metric::Accuracy],
        files: &[
            GlueFile { split: Split::Train, name: "train.tsv", columns: COLA },
            GlueFile { split: Split::Dev, name: "dev.tsv", columns: COLA },
            file(Split::Test, "test.tsv"),
        ],
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "sst2",
        folder: "SST-2",
        columns: ("sentence", None),
        label: "label",
        labels: Labels::Classes(&[("0", "negative"), ("1", "positive")]),
        metrics: &[Metric::Accuracy],
        files: FILES,
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "mrpc",
        folder: "MRPC",
        columns: ("#1 String", Some("#2 String")),
        label: "Quality",
        labels: Labels::Classes(&[("0", "not_equivalent"), ("1", "equivalent")]),
        metrics: &[Metric::F1, Metric::Accuracy],
        files: FILES,
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "stsb",
        folder: "STS-B",
        columns: ("sentence1", Some("sentence2")),
        label: "score",
        labels: Labels::Value(0.0, 5.0),
        metrics: &[Metric::Spearman, Metric::Pearson],
        files: FILES,
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "qqp",
        folder: "QQP",
        columns: ("question1", Some("question2")),
        label: "is_duplicate",
        labels: Labels::Classes(&[("0", "not_duplicate"), ("1", "duplicate")]),
        metrics: &[Metric::F1, Metric::Accuracy],
        files: FILES,
        broken: Broken::Skip,
    },
    GlueTask {
        name: "mnli",
        folder: "MNLI",
        columns: ("sentence1", Some("sentence2")),
        label: "gold_label",
        labels: INFERENCE,
        metrics: &[Metric::Accuracy],
        files: &[
            file(Split::Train, "train.tsv"),
            file(Split::Dev, "dev_matched.tsv"),
            file(Split::DevMismatched, "dev_mismatched.tsv"),
            file(Split::Test, "test_matched.tsv"),
            file(Split::TestMismatched, "test_mismatched.tsv"),
        ],
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "qnli",
        folder: "QNLI",
        columns: ("question", Some("sentence")),
        label: "label",
        labels: ENTAILMENT,
        metrics: &[Metric::Accuracy],
        files: FILES,
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "rte",
        folder: "RTE",
        columns: ("sentence1", Some("sentence2")),
        label: "label",
        labels: ENTAILMENT,
        metrics: &[Metric::Accuracy],
        files: FILES,
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "wnli",
        folder: "WNLI",
        columns: ("sentence1", Some("sentence2")),
        label: "label",
        labels: Labels::Classes(&[("0", "not_entailment"), ("1", "entailment")]),
        metrics: &[Metric::Accuracy],
        files: FILES,
        broken: Broken::Refuse,
    },
    GlueTask {
        name: "ax",
        folder: "AX",
        columns: ("sentence1", Some("sentence2")),
        label: "label",
        labels: INFERENCE,
        // The server's figure for AX; its rows carry no labels here.
        metrics: &[Metric::Matthews],
        files: &[file(Split::Test, "diagnostic.tsv")],
        broken: Broken::Refuse,
    },
];

/// The task of this name.
///
/// # Errors
///
/// Where there is none; the message lists those that there are.
pub fn task(name: &str) -> Result<&'static GlueTask> {
    TASKS.iter().find(|task| task.name == name).ok_or_else(|| {
        let known: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
        let expected = format!("one of {}, or a table of your own (--train)", known.join(", "));
        Error::setting("task", expected, format_args!("`{name}`"))
    })
}

impl GlueTask {
    /// Classes, with the labels in the hub's order, or a value on its raw scale.
    pub fn problem(&self) -> Problem {
        match self.labels {
            Labels::Classes(labels) => Problem::Classes(labels.iter().map(|(_, name)| name.to_string()).collect()),
            Labels::Value(..) => Problem::Value,
        }
    }

    /// One text or two.
    pub fn texts(&self) -> Texts {
        if self.columns.1.is_some() { Texts::Two } else { Texts::One }
    }

    /// The splits that have labels and are not trained on, the one that chooses the best epoch first: two for MNLI,
    /// none for AX.
    pub fn dev_splits(&self) -> Vec<Split> {
        let is_dev = |split: &Split| matches!(split, Split::Dev | Split::DevMismatched);
        self.files.iter().map(|file| file.split).filter(is_dev).collect()
    }

    /// The names of the official files, as they lie in the task's folder.
    pub fn files(&self) -> Vec<&'static str> {
        self.files.iter().map(|file| file.name).collect()
    }

    /// Reads an official file. `data_dir` is the folder that holds `CoLA/`, `SST-2/` and so on. The files of test
    /// splits have no labels, so their examples have no targets.
    ///
    /// # Errors
    ///
    /// Where the task has no such split (AX has no train file: it is answered by a patch trained on MNLI), the file is
    /// missing (the message names all of the task's files and where they go), empty, not UTF-8, or lacks a column; and
    /// at a row, named by its line, with another number of fields, an empty text or an unknown label. QQP's short rows
    /// are skipped and counted instead.
    pub fn load(&self, data_dir: &Path, split: Split) -> Result<Dataset> {
        let file = self.files.iter().find(|file| file.split == split).ok_or_else(|| self.no_split(split))?;
        let folder = data_dir.join(self.folder);
        let path = folder.join(file.name);
        let source = File::open(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => self.missing(&path, &folder),
            _ => Error::io("open", &path)(e),
        })?;
        let mut lines = Lines::new(Box::new(source), &path)?;
        let columns: Vec<String> = match file.columns {
            Some(columns) => columns.iter().map(|c| c.to_string()).collect(),
            None => match lines.next()? {
                Some((_, header)) => header.split('\t').map(String::from).collect(),
                None => return Err(Error::content(&path, "the file is empty; expected a header and rows")),
            },
        };
        let place = |column: &str| {
            columns.iter().position(|c| c == column).ok_or_else(|| {
                let message = format!("there is no column `{column}`; the header has `{}`", columns.join("`, `"));
                Error::line(&path, 1, message)
            })
        };
        let text = place(self.columns.0)?;
        let text_pair = self.columns.1.map(place).transpose()?;
        let label = match split {
            Split::Test | Split::TestMismatched => None,
            Split::Train | Split::Dev | Split::DevMismatched => Some(place(self.label)?),
        };
        let mut examples = Vec::new();
        let mut skipped = 0;
        while let Some((line, row)) = lines.next()? {
            let refuse = |message: String| Error::line(&path, line, message);
            let fields: Vec<&str> = row.split('\t').collect();
            if self.broken == Broken::Skip && fields.len() < columns.len() {
                skipped += 1;
                continue;
            }
            if fields.len() != columns.len() {
                let message = format!(
                    "expected {} fields separated by tabs ({}), found {}; GLUE's files have no quoting",
                    columns.len(),
                    columns.join(", "),
                    fields.len(),
                );
                return Err(refuse(message));
            }
            let text_of = |place: usize| match fields[place] {
                blank if blank.trim().is_empty() && self.broken == Broken::Refuse => {
                    Err(refuse(format!("the text in `{}` is empty", columns[place])))
                }
                text => Ok(text.to_string()),
            };
            examples.push(Example {
                text: text_of(text)?,
                text_pair: text_pair.map(text_of).transpose()?,
                target: label.map(|place| self.target(fields[place]).map_err(refuse)).transpose()?,
            });
        }
        if examples.is_empty() {
            return Err(Error::content(&path, "there is no row in it"));
        }
        Ok(Dataset {
            name: self.name.to_string(),
            problem: self.problem(),
            texts: self.texts(),
            metrics: self.metrics,
            examples,
            skipped,
        })
    }

    /// A file's label as a target, or what is wrong with it.
    fn target(&self, found: &str) -> Result<Target, String> {
        match self.labels {
            Labels::Classes(labels) => {
                let class = labels.iter().position(|(value, _)| *value == found);
                class.map(|class| Target::Class(class as u32)).ok_or_else(|| {
                    let known: Vec<&str> = labels.iter().map(|(value, _)| *value).collect();
                    format!("expected one of {} in `{}`, found `{found}`", known.join(", "), self.label)
                })
            }
            Labels::Value(low, high) => match found.parse() {
                Ok(value) if (low..=high).contains(&value) => Ok(Target::Value(value)),
                _ => Err(format!("expected a number from {low} to {high} in `{}`, found `{found}`", self.label)),
            },
        }
    }

    fn no_split(&self, split: Split) -> Error {
        let splits: Vec<&str> = self.files.iter().map(|file| file.split.name()).collect();
        let note = if self.name == "ax" { "; AX is answered by a patch trained on mnli" } else { "" };
        Error::setting(format!("split of {}", self.name), format!("one of {}{note}", splits.join(", ")), split)
    }

    fn missing(&self, path: &Path, folder: &Path) -> Error {
        let files = self.files();
        let message = format!(
            "there is no such file; {} reads the GLUE files {} from {}, and the data folder (--data) is the one that \
             holds {}/; `bitfit data fetch {} --out DIR` brings them from the hub",
            self.name,
            files.join(", "),
            folder.display(),
            self.folder,
            self.name,
        );
        Error::content(path, message)
    }
}
