//! A table of the user's own, as it is trained on, tested on and predicted for.

use std::fs;
use std::path::{Path, PathBuf};

use bitfit::base::problem::{Problem, Texts};
use bitfit::data::{Columns, Dataset, Fields, Metric, Rows, compute, hold_out, load_table, majority};
use bitfit::device::batch::Target;
use bitfit::{Kind, Result};
use tempfile::TempDir;

fn written(name: &str, bytes: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn columns(text_pair: Option<&str>) -> Columns {
    Columns { text: "text".into(), text_pair: text_pair.map(String::from), label: Some("label".into()) }
}

fn read(name: &str, bytes: impl AsRef<[u8]>, regression: bool, known: Option<&Problem>) -> Result<Dataset> {
    let (_dir, path) = written(name, bytes);
    load_table(&path, &columns(None), regression, known)
}

fn refusal(name: &str, bytes: impl AsRef<[u8]>) -> String {
    read(name, bytes, false, None).unwrap_err().to_string()
}

fn labels(data: &Dataset) -> &[String] {
    match &data.problem {
        Problem::Classes(labels) => labels,
        Problem::Value => &[],
    }
}

#[test]
fn classes_are_found_in_the_data() {
    let (_dir, path) = written("mails.csv", "label,text\nspam,Buy!\nham,\"Hello, you\"\n spam ,Buy more\n");
    let data = load_table(&path, &columns(None), false, None).unwrap();
    assert_eq!((data.name.as_str(), data.texts, data.skipped), ("mails", Texts::One, 0));
    assert_eq!(labels(&data), ["ham", "spam"]);
    let targets: Vec<_> = data.examples.iter().map(|e| e.target.unwrap()).collect();
    assert_eq!(targets, [1, 0, 1].map(Target::Class));
    assert_eq!(data.examples[1].text, "Hello, you");
    assert_eq!(data.metrics, [Metric::Accuracy, Metric::MacroF1]);
    assert_eq!(majority(&data).unwrap(), Target::Class(1));
}

#[test]
fn whole_numbers_are_ordered_as_numbers() {
    let data = read("a.csv", "text,label\na,10\nb,9\nc,-1\n", false, None).unwrap();
    assert_eq!(labels(&data), ["-1", "9", "10"]);
    let data = read("a.csv", "text,label\na,10\nb,9\nc,x\n", false, None).unwrap();
    assert_eq!(labels(&data), ["10", "9", "x"]);
    let data = read("a.csv", "text,label\na,10.0\nb,2.0\nc,1.0\n", false, None).unwrap();
    assert_eq!(labels(&data), ["1.0", "2.0", "10.0"]);
}

#[test]
fn the_three_formats_give_the_same_dataset() {
    let csv = read("a.csv", "text,label\n\"a \"\"b\"\"\",1\nc,0\n", false, None).unwrap();
    let tsv = read("a.tsv", "text\tlabel\n\"a \"\"b\"\"\"\t1\nc\t0\n", false, None).unwrap();
    let jsonl =
        read("a.jsonl", "{\"text\":\"a \\\"b\\\"\",\"label\":1}\n{\"text\":\"c\",\"label\":0}\n", false, None).unwrap();
    assert_eq!(csv, tsv);
    assert_eq!(csv, jsonl);
    assert_eq!(csv.examples[0].text, "a \"b\"");
}

#[test]
fn two_texts_are_read_where_a_second_column_is_named() {
    let (_dir, path) = written("a.csv", "text,other,label\na,b,x\nc,d,y\n");
    let data = load_table(&path, &columns(Some("other")), false, None).unwrap();
    assert_eq!(data.texts, Texts::Two);
    assert_eq!(data.examples[1].text_pair.as_deref(), Some("d"));
}

#[test]
fn a_value_is_read_where_regression_is_asked_for() {
    let data = read("a.csv", "text,label\na,0.25\nb,-3\nc,1e2\n", true, None).unwrap();
    assert_eq!(data.problem, Problem::Value);
    let targets: Vec<_> = data.examples.iter().map(|e| e.target.unwrap()).collect();
    assert_eq!(targets, [0.25, -3.0, 100.0].map(Target::Value));
    assert_eq!(data.metrics, [Metric::Spearman, Metric::Pearson]);
    assert!(matches!(majority(&data).unwrap(), Target::Value(mean) if (mean - 32.416_668).abs() < 1e-5));
    for bad in ["high", "NaN", "inf", "1e39"] {
        let error = read("a.csv", format!("text,label\na,1\nb,{bad}\n"), true, None).unwrap_err().to_string();
        assert!(error.contains(&format!("a.csv:3: expected a finite number in `label`, found `{bad}`")), "{error}");
    }
}

#[test]
fn fractions_and_many_labels_are_refused_with_the_hint() {
    let error = refusal("a.csv", "text,label\na,1\nb,2.5\n");
    assert!(error.contains("2.5 among them") && error.contains("--regression"), "{error}");
    let rows = |n: usize| (0..n).fold("text,label\n".to_string(), |all, i| all + &format!("a,{i}\n"));
    assert_eq!(labels(&read("a.csv", rows(100), false, None).unwrap()).len(), 100);
    let error = refusal("a.csv", rows(101));
    assert!(error.contains("a.csv:102: more than 100 different labels") && error.contains("--regression"), "{error}");
}

#[test]
fn the_training_file_fixes_the_labels_of_later_files() {
    let train = read("a.csv", "text,label\na,x\nb,y\nc,z\n", false, None).unwrap();
    let dev = read("b.jsonl", "{\"text\":\"a\",\"label\":\"z\"}\n", false, Some(&train.problem)).unwrap();
    assert_eq!((labels(&dev), dev.examples[0].target), (labels(&train), Some(Target::Class(2))));
    let error = read("b.csv", "text,label\na,x\nb,w\n", false, Some(&train.problem)).unwrap_err().to_string();
    assert!(
        error.contains("b.csv:3: expected one of the task's labels `x`, `y`, `z` in `label`, found `w`"),
        "{error}"
    );
    let error = read("b.csv", "text,label\na,1\n", true, Some(&train.problem)).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    let value = read("b.csv", "text,label\na,1\n", false, Some(&Problem::Value)).unwrap();
    assert_eq!(value.examples[0].target, Some(Target::Value(1.0)));
}

#[test]
fn bad_tables_are_refused_with_their_line() {
    for (name, bytes, expected) in [
        ("a.csv", &b"text,label\na,x\nb,y,z\n"[..], "a.csv:3: expected 2 fields as in the header, found 3"),
        ("a.csv", b"text,label\na,x\nb\n", "a.csv:3: expected 2 fields as in the header, found 1"),
        ("a.csv", b"text,label\na,x\ncaf\xE9,y\n", "a.csv:3: expected UTF-8 text"),
        ("a.csv", b"\xFF\xFEt\0e\0x\0t\0", "a.csv:1: expected UTF-8 text, found UTF-16"),
        ("a.csv", b"words,label\na,x\n", "a.csv:1: there is no column `text`; the header has `words`, `label`"),
        ("a.csv", b"text;label\na;x\n", "separated by commas"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"text,label\n", "there is no row in it"),
        ("a.csv", b"text,label\n,x\n", "a.csv:2: the text in `text` is empty"),
        ("a.csv", b"text,label\na,x\nb,x\n", "all labels in `label` are `x`"),
        ("a.csv", b"text,label\na,x\n\"b,y\nc,x\n", "a.csv:3: a field that begins with a double quote"),
        ("a.tsv", b"text\tlabel\na\tx\tz\n", "a.tsv:2: expected 2 fields"),
        ("a.jsonl", b"{\"text\":\"a\",\"label\":1}\nnot json\n", "a.jsonl:2: expected a JSON object a line"),
        ("a.jsonl", b"{\"text\":\"a\"}\n", "a.jsonl:1: there is no key `label`; the object has `text`"),
        ("a.jsonl", b"\n", "there is no row in it"),
        ("a.xlsx", b"", "a name that ends in .csv, .tsv, .jsonl or .parquet"),
    ] {
        let error = refusal(name, bytes);
        assert!(error.contains(expected), "{error}\n  should say {expected}");
    }
    let error = load_table(Path::new("nowhere.csv"), &columns(None), false, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    let unlabelled = Columns { label: None, ..columns(None) };
    let (_dir, path) = written("a.csv", "text\na\n");
    assert!(load_table(&path, &unlabelled, false, None).unwrap_err().to_string().contains("--label-column"));
}

#[test]
fn a_tenth_is_held_out_and_scored() {
    let rows = (0..200).fold("text,label\n".to_string(), |all, i| all + &format!("row {i},{}\n", i % 4 / 3));
    let data = read("a.csv", rows, false, None).unwrap();
    let (train, held) = hold_out(&data, 0.1, 0).unwrap();
    assert_eq!((train.examples.len(), held.examples.len()), (180, 20));
    let targets: Vec<Target> = held.examples.iter().map(|e| e.target.unwrap()).collect();
    let found = compute(held.metrics, &[majority(&train).unwrap(); 20], &targets).unwrap();
    assert_eq!(found["accuracy"], 0.75, "three of four rows are of the commonest class, in the split too");
    let lonely = read("a.csv", "text,label\na,x\nb,x\nc,y\n", false, None).unwrap();
    assert!(hold_out(&lonely, 0.1, 0).unwrap_err().to_string().contains("the class `y` has one example"));
}

#[test]
fn rows_stream_with_all_that_stood_in_them() {
    let (_dir, path) = written("a.csv", "id,text\n7,a\n8,\"b\nc\"\n9,d\n");
    let columns = Columns { text: "text".into(), text_pair: None, label: None };
    let rows = Rows::open(&path, &columns).unwrap();
    assert_eq!(rows.header().unwrap(), ["id", "text"]);
    let rows: Vec<_> = rows.map(Result::unwrap).collect();
    assert_eq!(rows.iter().map(|r| r.line).collect::<Vec<_>>(), [2, 3, 5]);
    assert_eq!(rows[1].fields, Fields::Columns(vec!["8".into(), "b\nc".into()]));
    assert_eq!((rows[1].text.as_str(), &rows[1].label), ("b\nc", &None));
}

#[test]
fn a_quote_that_would_swallow_text_or_rows_is_refused_with_its_line() {
    let refused = |name: &str, text: &str, at: &str| {
        let message = read(name, text, false, None).unwrap_err().to_string();
        assert!(message.contains(at) && message.contains("double quote"), "{message}");
    };
    refused("a.tsv", "text\tlabel\na\t0\n\"Hello\" he said\t1\n", "a.tsv:3");
    refused("a.csv", "text,label\na,0\n\"Hello\" he said,1\n", "a.csv:3");
    refused("a.tsv", "text\tlabel\na\t0\n\"Hello he said\t1\nb\t0\nand \"c\t1\n\"d\"\t1\n", "a.tsv:3");
    // A line break inside quotes is a table's own in CSV.
    let data = read("a.csv", "text,label\n\"a\nb\",0\nc,1\n", false, None).unwrap();
    assert_eq!(data.examples[0].text, "a\nb");
}
