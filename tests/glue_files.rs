//! GLUE's official files, read as they are. Those that cannot be had here are imitated; the real ones are read where
//! `BITFIT_GLUE_DIR` names the folder that holds `CoLA/`, `SST-2/` and so on.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use bitfit::base::problem::{Problem, Texts};
use bitfit::data::{Dataset, Metric, Split, majority, task};
use bitfit::device::batch::Target;
use tempfile::TempDir;

fn glue() -> Option<PathBuf> {
    let folder = std::env::var_os("BITFIT_GLUE_DIR").map(PathBuf::from);
    if folder.is_none() {
        // Not by `eprintln!`, which the test harness keeps to itself where a test passes.
        let _ = writeln!(std::io::stderr(), "skipped a test of GLUE's own files: BITFIT_GLUE_DIR is not set");
    }
    folder
}

/// A data folder with one file in it.
fn written(file: &str, bytes: impl AsRef<[u8]>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    dir
}

fn load(name: &str, dir: &Path, split: Split) -> Dataset {
    task(name).unwrap().load(dir, split).unwrap()
}

fn refusal(name: &str, file: &str, bytes: impl AsRef<[u8]>, split: Split) -> String {
    let dir = written(file, bytes);
    task(name).unwrap().load(dir.path(), split).unwrap_err().to_string()
}

#[test]
fn every_official_file_has_its_rows() {
    let Some(glue) = glue() else { return };
    for (name, split, n_rows) in [
        ("cola", Split::Train, 8551),
        ("cola", Split::Dev, 1043),
        ("cola", Split::Test, 1063),
        ("sst2", Split::Train, 67349),
        ("sst2", Split::Dev, 872),
        ("sst2", Split::Test, 1821),
        ("mrpc", Split::Train, 3668),
        ("mrpc", Split::Dev, 408),
        ("mrpc", Split::Test, 1725),
        ("stsb", Split::Train, 5749),
        ("stsb", Split::Dev, 1500),
        ("stsb", Split::Test, 1379),
        ("mnli", Split::Dev, 9815),
        ("mnli", Split::DevMismatched, 9832),
        ("rte", Split::Train, 2490),
        ("rte", Split::Dev, 277),
        ("rte", Split::Test, 3000),
        ("wnli", Split::Train, 635),
        ("wnli", Split::Dev, 71),
        ("wnli", Split::Test, 146),
        ("ax", Split::Test, 1104),
    ] {
        let data = load(name, &glue, split);
        assert_eq!((data.examples.len(), data.skipped), (n_rows, 0), "{name} {split}");
        let labelled = data.examples.iter().filter(|e| e.target.is_some()).count();
        assert_eq!(labelled, if split == Split::Test { 0 } else { n_rows }, "{name} {split}");
        assert!(data.examples.iter().all(|e| e.text_pair.is_some() == (data.texts == Texts::Two)), "{name} {split}");
    }
}

#[test]
fn official_rows_read_as_they_stand_in_the_files() {
    let Some(glue) = glue() else { return };
    let first = |name, split| load(name, &glue, split).examples.swap_remove(0);
    let mrpc = first("mrpc", Split::Train);
    assert!(mrpc.text.starts_with("Amrozi accused his brother , whom he called \" the witness \" ,"), "{}", mrpc.text);
    assert_eq!(mrpc.target, Some(Target::Class(1)));
    assert_eq!(first("cola", Split::Dev).text, "The sailors rode the breeze clear of the rocks.");
    assert_eq!(first("cola", Split::Test).text, "Bill whistled past the house.");
    assert_eq!(first("rte", Split::Dev).target, Some(Target::Class(1)), "not_entailment is the second label");
    assert_eq!(first("stsb", Split::Dev).target, Some(Target::Value(5.0)));
    assert_eq!(first("mnli", Split::Dev).target, Some(Target::Class(1)), "neutral is the second label");
    // WNLI's dev set is adversarial; its majority class is the figure to beat.
    let wnli = majority(&load("wnli", &glue, Split::Dev)).unwrap();
    assert_eq!(wnli, Target::Class(0));
}

#[test]
fn labels_and_main_metrics_are_those_of_the_hub_and_of_glue() {
    for (name, labels, main) in [
        ("cola", &["unacceptable", "acceptable"][..], Metric::Matthews),
        ("sst2", &["negative", "positive"], Metric::Accuracy),
        ("mrpc", &["not_equivalent", "equivalent"], Metric::F1),
        ("stsb", &[], Metric::Spearman),
        ("qqp", &["not_duplicate", "duplicate"], Metric::F1),
        ("mnli", &["entailment", "neutral", "contradiction"], Metric::Accuracy),
        ("qnli", &["entailment", "not_entailment"], Metric::Accuracy),
        ("rte", &["entailment", "not_entailment"], Metric::Accuracy),
        ("wnli", &["not_entailment", "entailment"], Metric::Accuracy),
        ("ax", &["entailment", "neutral", "contradiction"], Metric::Matthews),
    ] {
        let task = task(name).unwrap();
        match task.problem() {
            Problem::Classes(found) => assert_eq!(found, labels, "{name}"),
            Problem::Value => assert!(labels.is_empty(), "{name}"),
        }
        assert_eq!(task.metrics[0], main, "{name}");
        assert_eq!(task.texts() == Texts::One, matches!(name, "cola" | "sst2"), "{name}");
    }
    assert_eq!(task("mnli").unwrap().dev_splits(), [Split::Dev, Split::DevMismatched]);
    assert_eq!(task("rte").unwrap().dev_splits(), [Split::Dev]);
    assert!(task("ax").unwrap().dev_splits().is_empty());
}

#[test]
fn qqps_short_rows_are_skipped_and_counted() {
    let text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n\
                1\t2\t3\tWhat is \"this?\tWhat's this?\t1\n\
                2\t4\t5\tA question that breaks\n\
                off\tAnother?\t0\n\
                3\t6\t7\tHow?\t\t0\n";
    let dir = written("QQP/train.tsv", text);
    let data = load("qqp", dir.path(), Split::Train);
    assert_eq!((data.examples.len(), data.skipped), (2, 2));
    assert_eq!(data.examples[0].text, "What is \"this?");
    assert_eq!(data.examples[0].target, Some(Target::Class(1)));
    assert_eq!(data.examples[1].text_pair.as_deref(), Some(""), "an empty question of QQP is kept");
    let dir = written("QQP/test.tsv", "id\tquestion1\tquestion2\n0\tWhy?\tWhy not?\n");
    assert_eq!(load("qqp", dir.path(), Split::Test).examples[0].target, None);
    let long = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t1\textra\n";
    let error = refusal("qqp", "QQP/dev.tsv", long, Split::Dev);
    assert!(error.contains("QQP/dev.tsv:2: expected 6 fields") && error.contains("found 7"), "{error}");
}

#[test]
fn mnlis_columns_are_found_by_header_in_files_that_differ() {
    let train = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t\
                 sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n\
                 0\t1\t1n\ttelephone\t(\t(\t(\t(\tA dog runs.\tAn animal moves.\tneutral\tentailment\n";
    let dir = written("MNLI/train.tsv", train);
    let example = load("mnli", dir.path(), Split::Train).examples.swap_remove(0);
    assert_eq!((example.text.as_str(), example.text_pair.as_deref()), ("A dog runs.", Some("An animal moves.")));
    assert_eq!(example.target, Some(Target::Class(0)));
    let test = "index\tsentence1\tgenre\tsentence2\n0\ta\tfiction\tb\n";
    let dir = written("MNLI/test_mismatched.tsv", test);
    assert_eq!(load("mnli", dir.path(), Split::TestMismatched).examples[0].text_pair.as_deref(), Some("b"));
}

#[test]
fn qnli_reads_with_windows_line_ends() {
    let dir = written("QNLI/train.tsv", "index\tquestion\tsentence\tlabel\r\n0\tWho?\tShe.\tnot_entailment\r\n");
    let example = load("qnli", dir.path(), Split::Train).examples.swap_remove(0);
    assert_eq!((example.text.as_str(), example.text_pair.as_deref()), ("Who?", Some("She.")));
    assert_eq!(example.target, Some(Target::Class(1)));
}

#[test]
fn a_bad_row_is_refused_with_its_file_and_line() {
    let header = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n";
    for (row, expected) in [
        ("1\ta\tentailment\n", "expected 4 fields separated by tabs (index, sentence1, sentence2, label), found 3"),
        ("1\ta\tb\tc\tentailment\n", "found 5"),
        ("1\ta\tb\tmaybe\n", "expected one of entailment, not_entailment in `label`, found `maybe`"),
        ("1\ta\t \tentailment\n", "the text in `sentence2` is empty"),
    ] {
        let error = refusal("rte", "RTE/train.tsv", format!("{header}{row}"), Split::Train);
        assert!(error.contains("RTE/train.tsv:3: ") && error.contains(expected), "{error}");
    }
    let error = refusal("rte", "RTE/dev.tsv", [header.as_bytes(), b"1\tcaf\xE9\tb\tentailment\n"].concat(), Split::Dev);
    assert!(error.contains("RTE/dev.tsv:3: expected UTF-8 text"), "{error}");
    let error = refusal("cola", "CoLA/train.tsv", "gj04\t1\t\tFine.\ngj04\t2\t\tNot.\n", Split::Train);
    assert!(error.contains("CoLA/train.tsv:2: expected one of 0, 1"), "{error}");
}

#[test]
fn a_score_outside_its_range_is_refused() {
    for score in ["5.1", "-1", "NaN", "inf", "four", ""] {
        let text = format!("sentence1\tsentence2\tscore\na\tb\t{score}\n");
        let error = refusal("stsb", "STS-B/dev.tsv", text, Split::Dev);
        assert!(error.contains("STS-B/dev.tsv:2: expected a number from 0 to 5 in `score`"), "{error}");
    }
}

#[test]
fn a_missing_column_or_an_empty_file_is_refused() {
    let error = refusal("sst2", "SST-2/train.tsv", "text\tlabel\na\t1\n", Split::Train);
    assert!(error.contains("no column `sentence`; the header has `text`, `label`"), "{error}");
    assert!(refusal("sst2", "SST-2/train.tsv", "", Split::Train).contains("the file is empty"));
    assert!(refusal("sst2", "SST-2/train.tsv", "sentence\tlabel\n", Split::Train).contains("no row"));
    assert!(refusal("cola", "CoLA/train.tsv", "", Split::Train).contains("no row"));
}

#[test]
fn missing_files_are_named_with_the_folder_they_go_to() {
    let dir = tempfile::tempdir().unwrap();
    let error = task("mnli").unwrap().load(dir.path(), Split::Train).unwrap_err().to_string();
    let folder = dir.path().join("MNLI");
    for part in ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv", "holds MNLI/", folder.to_str().unwrap()] {
        assert!(error.contains(part), "{error}\n  should name {part}");
    }
}

#[test]
fn an_unknown_task_or_split_is_refused_with_those_there_are() {
    let error = task("snli").unwrap_err().to_string();
    assert!(error.contains("cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, ax"), "{error}");
    assert!(error.contains("found `snli`"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let error = task("ax").unwrap().load(dir.path(), Split::Train).unwrap_err().to_string();
    assert!(error.contains("a patch trained on mnli"), "{error}");
    let error = task("rte").unwrap().load(dir.path(), Split::DevMismatched).unwrap_err().to_string();
    assert!(error.contains("expected one of train, dev, test, found dev_mismatched"), "{error}");
    assert_eq!("dev".parse::<Split>().unwrap(), Split::Dev);
    assert!("validation".parse::<Split>().unwrap_err().to_string().contains("one of train, dev"));
}
