//! GLUE's official files, made of those on the hub.
//!
//! The files are not ours to give away. The hub's data set [`DATASET`] holds the same rows as Parquet, and they are written
//! here as the TSV files that [`GlueTask::load`] reads, in the official layout: the official names of files and columns,
//! no quoting, no header where CoLA has none, no labels in test files. Columns that the hub does not have (MRPC's ids,
//! MNLI's parses, the sources of CoLA and STS-B) are there and empty. A new task is one row of `LAYOUTS`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::columnar::Parquet;
use super::part::Part;
use super::rows::Columns;
use super::task::{Broken, GlueFile, GlueTask, Labels};
use crate::base::{Download, dataset};
use crate::error::{Error, Result};

/// Where the rows come from.
pub const DATASET: &str = "nyu-mll/glue";

/// A task's rows on the hub and in its official files.
struct Layout {
    task: &'static str,
    /// The hub's columns of the text, or of both.
    texts: (&'static str, Option<&'static str>),
    /// One for each of the task's files, in their order.
    files: &'static [OfficialFile],
}

struct OfficialFile {
    /// The split's name on the hub.
    on_hub: &'static str,
    /// The columns of the official file.
    columns: &'static [&'static str],
}

const fn file(on_hub: &'static str, columns: &'static [&'static str]) -> OfficialFile {
    OfficialFile { on_hub, columns }
}

const SENTENCES: (&str, Option<&str>) = ("sentence1", Some("sentence2"));
const INFERENCE: (&str, Option<&str>) = ("premise", Some("hypothesis"));

const COLA: &[&str] = &["source", "label", "mark", "sentence"];
const INDEXED: &[&str] = &["index", "sentence"];
const PAIRS: &[&str] = &["index", "sentence1", "sentence2"];
const LABELLED_PAIRS: &[&str] = &["index", "sentence1", "sentence2", "label"];
const MRPC: &[&str] = &["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"];
const QQP: &[&str] = &["id", "qid1", "qid2", "question1", "question2", "is_duplicate"];
const QNLI: &[&str] = &["index", "question", "sentence", "label"];
const STSB: &[&str] =
    &["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"];
const MNLI_TRAIN: &[&str] = &[
    "index",
    "promptID",
    "pairID",
    "genre",
    "sentence1_binary_parse",
    "sentence2_binary_parse",
    "sentence1_parse",
    "sentence2_parse",
    "sentence1",
    "sentence2",
    "label1",
    "gold_label",
];
const MNLI_DEV: &[&str] = &[
    "index",
    "promptID",
    "pairID",
    "genre",
    "sentence1_binary_parse",
    "sentence2_binary_parse",
    "sentence1_parse",
    "sentence2_parse",
    "sentence1",
    "sentence2",
    "label1",
    "label2",
    "label3",
    "label4",
    "label5",
    "gold_label",
];
/// Up to the second text.
const MNLI_TEST: &[&str] = MNLI_DEV.split_at(10).0;

const LAYOUTS: &[Layout] = &[
    Layout {
        task: "cola",
        texts: ("sentence", None),
        files: &[file("train", COLA), file("validation", COLA), file("test", INDEXED)],
    },
    Layout {
        task: "sst2",
        texts: ("sentence", None),
        files: &[
            file("train", &["sentence", "label"]),
            file("validation", &["sentence", "label"]),
            file("test", INDEXED),
        ],
    },
    Layout {
        task: "mrpc",
        texts: SENTENCES,
        files: &[
            file("train", MRPC),
            file("validation", MRPC),
            file("test", &["index", "#1 ID", "#2 ID", "#1 String", "#2 String"]),
        ],
    },
    Layout {
        task: "stsb",
        texts: SENTENCES,
        files: &[file("train", STSB), file("validation", STSB), file("test", STSB.split_at(STSB.len() - 1).0)],
    },
    Layout {
        task: "qqp",
        texts: ("question1", Some("question2")),
        files: &[file("train", QQP), file("validation", QQP), file("test", &["id", "question1", "question2"])],
    },
    Layout {
        task: "mnli",
        texts: INFERENCE,
        files: &[
            file("train", MNLI_TRAIN),
            file("validation_matched", MNLI_DEV),
            file("validation_mismatched", MNLI_DEV),
            file("test_matched", MNLI_TEST),
            file("test_mismatched", MNLI_TEST),
        ],
    },
    Layout {
        task: "qnli",
        texts: ("question", Some("sentence")),
        files: &[file("train", QNLI), file("validation", QNLI), file("test", QNLI.split_at(QNLI.len() - 1).0)],
    },
    Layout {
        task: "rte",
        texts: SENTENCES,
        files: &[file("train", LABELLED_PAIRS), file("validation", LABELLED_PAIRS), file("test", PAIRS)],
    },
    Layout {
        task: "wnli",
        texts: SENTENCES,
        files: &[file("train", LABELLED_PAIRS), file("validation", LABELLED_PAIRS), file("test", PAIRS)],
    },
    Layout { task: "ax", texts: INFERENCE, files: &[file("test", PAIRS)] },
];

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The file.
    pub path: PathBuf,
    /// Its rows.
    pub rows: u64,
    /// Texts with a tab or a line break in them, which would end a field: a space stands for each.
    pub replaced: u64,
}

/// Fetches tasks' files from the hub, all of one commit, and writes the official ones into the folders of `data_dir`.
/// `watch` is told how downloads go, from another thread; `written` of each file, in order.
///
/// # Errors
///
/// Where a file is there already and `overwrite` does not say to replace it, before anything is fetched; all of
/// [`dataset::fetch`]; a file of the hub that does not hold what it should: another column, a class or value that the
/// task does not have, a text that is null or, but for QQP, empty.
pub fn fetch(
    tasks: &[&'static GlueTask],
    data_dir: &Path,
    overwrite: bool,
    watch: impl Fn(&Download) + Send + Sync + 'static,
    written: &mut dyn FnMut(&Written),
) -> Result<()> {
    let mut sheets = Vec::new();
    for layout in LAYOUTS {
        let Some(&task) = tasks.iter().find(|task| task.name == layout.task) else { continue };
        for (official, file) in layout.files.iter().zip(task.files) {
            let path = data_dir.join(task.folder).join(file.name);
            if path.exists() && !overwrite {
                return Err(Error::Usage(format!("{} is there already; --overwrite replaces it", path.display())));
            }
            sheets.push(Sheet { task, texts: layout.texts, official, file, path });
        }
    }
    let names: Vec<String> = sheets.iter().map(Sheet::on_hub).collect();
    let fetched = dataset::fetch(DATASET, &names, watch)?;
    for (sheet, from) in sheets.into_iter().zip(fetched) {
        let (rows, replaced) = sheet.write(&from)?;
        written(&Written { path: sheet.path, rows, replaced });
    }
    Ok(())
}

/// An official file that is to be written.
struct Sheet {
    task: &'static GlueTask,
    texts: (&'static str, Option<&'static str>),
    official: &'static OfficialFile,
    file: &'static GlueFile,
    path: PathBuf,
}

impl Sheet {
    /// The file on the hub that has its rows.
    fn on_hub(&self) -> String {
        format!("{}/{}-00000-of-00001.parquet", self.task.name, self.official.on_hub)
    }

    /// Writes every row; gives how many there are, and how many texts were not written as they are.
    fn write(&self, from: &Path) -> Result<(u64, u64)> {
        let columns = Columns {
            text: self.texts.0.into(),
            text_pair: self.texts.1.map(String::from),
            label: self.official.columns.contains(&self.task.label).then(|| "label".into()),
        };
        let mut rows = Parquet::open(from, &columns, Part::default())?;
        // Aside, in the same folder, as everything that may be read while it is written.
        let (path, folder) = (&self.path, self.path.parent().unwrap_or(&self.path));
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let io = |e| Error::io("write", path)(e);
        let place = tempfile::Builder::new().prefix(".fetched.").suffix(".tmp").tempdir_in(folder).map_err(io)?;
        let unfinished = place.path().join(self.file.name);
        let mut to = BufWriter::new(File::create(&unfinished).map_err(io)?);
        if self.file.columns.is_none() {
            writeln!(to, "{}", self.official.columns.join("\t")).map_err(io)?;
        }
        let (mut n_rows, mut n_replaced) = (0, 0);
        while let Some(row) = rows.next()? {
            let texts = [row.text, row.text_pair.flatten()];
            let refuse = |message: String| {
                Error::line(from, n_rows + 1, format!("{message}; {DATASET} held something else when this was written"))
            };
            let line = self.line(n_rows, &texts, row.label.flatten().as_deref(), &mut n_replaced).map_err(refuse)?;
            writeln!(to, "{line}").map_err(io)?;
            n_rows += 1;
        }
        let file = to.into_inner().map_err(|e| io(e.into_error()))?;
        file.sync_all().map_err(Error::io("sync", path))?;
        std::fs::rename(&unfinished, path).map_err(Error::io("rename the finished file to", path))?;
        Ok((n_rows, n_replaced))
    }

    /// A row of the file, or what is wrong with it.
    fn line(
        &self,
        index: u64,
        texts: &[Option<String>; 2],
        label: Option<&str>,
        n_replaced: &mut u64,
    ) -> Result<String, String> {
        let field = |column: &&'static str| match *column {
            column if column == self.task.columns.0 => self.text(column, texts[0].as_deref(), n_replaced),
            column if Some(column) == self.task.columns.1 => self.text(column, texts[1].as_deref(), n_replaced),
            column if column == self.task.label => self.label(label),
            "index" | "id" => Ok(index.to_string()),
            _ => Ok(String::new()),
        };
        let fields: Vec<String> = self.official.columns.iter().map(field).collect::<Result<_, String>>()?;
        Ok(fields.join("\t"))
    }

    fn text(&self, column: &str, text: Option<&str>, n_replaced: &mut u64) -> Result<String, String> {
        let kept = |text: &&str| !text.trim().is_empty() || self.task.broken == Broken::Skip;
        let text = text.filter(kept).ok_or_else(|| format!("the text for `{column}` is empty"))?;
        if !text.contains(['\t', '\n', '\r']) {
            return Ok(text.to_string());
        }
        *n_replaced += 1;
        Ok(text.replace("\r\n", " ").replace(['\t', '\n', '\r'], " "))
    }

    /// The hub's number of a class, or value, as the official file writes it.
    fn label(&self, label: Option<&str>) -> Result<String, String> {
        let found = label.unwrap_or("null");
        match self.task.labels {
            Labels::Classes(labels) => match found.parse().ok().and_then(|class: usize| labels.get(class)) {
                Some((value, _)) => Ok(value.to_string()),
                None => Err(format!("expected a class from 0 to {} in `label`, found {found}", labels.len() - 1)),
            },
            Labels::Value(low, high) => match found.parse::<f32>() {
                Ok(value) if (low..=high).contains(&value) => {
                    // Three places, as in the official files, unless that is another number.
                    let official = format!("{value:.3}");
                    Ok(if official.parse() == Ok(value) { official } else { value.to_string() })
                }
                _ => Err(format!("expected a number from {low} to {high} in `label`, found {found}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Split;
    use crate::data::task::TASKS;

    #[test]
    fn every_official_file_of_every_task_has_a_layout_with_its_columns() {
        for task in TASKS {
            let layout = LAYOUTS.iter().find(|layout| layout.task == task.name).unwrap();
            assert_eq!(layout.texts.1.is_some(), task.columns.1.is_some(), "{}", task.name);
            assert_eq!(layout.files.len(), task.files.len(), "{}", task.name);
            for (official, file) in layout.files.iter().zip(task.files) {
                let split = file.split.name().replace("dev", "validation");
                assert!(
                    official.on_hub == split || official.on_hub == format!("{split}_matched"),
                    "{} {split}",
                    task.name
                );
                let has = |column: &str| official.columns.contains(&column);
                assert!(has(task.columns.0) && task.columns.1.is_none_or(has), "{} {}", task.name, file.split);
                let is_test = matches!(file.split, Split::Test | Split::TestMismatched);
                assert_eq!(has(task.label), !is_test, "{} {}", task.name, file.split);
                assert!(file.columns.is_none_or(|columns| columns == official.columns), "{} {}", task.name, file.split);
            }
        }
        assert_eq!(LAYOUTS.len(), TASKS.len());
    }
}
