//! Files of any length are answered at constant memory, in parts, and after a kill, and come back in their own format.

#[path = "common/command.rs"]
mod command;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arrow_array::builder::{Float32Builder, ListBuilder, StringDictionaryBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int8Type};
use arrow_array::{
    ArrayRef, BooleanArray, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
    TimestampMicrosecondArray,
};
use arrow_select::concat::concat_batches;
use bitfit::data::{Columns, Part, Row, Rows, Shard};
use bitfit::patch::Patch;
use command::{Answer, bitfit, run, table, train, write};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;
use proptest::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

/// Two tasks of one text, trained once: a class and a value.
struct Tasks {
    _place: TempDir,
    class: PathBuf,
    value: PathBuf,
}

fn tasks() -> &'static Tasks {
    static TASKS: OnceLock<Tasks> = OnceLock::new();
    TASKS.get_or_init(|| {
        let place = tempfile::tempdir().unwrap();
        let at = place.path();
        let films = write(at, "films.csv", table(80));
        let grades = write(at, "grade.csv", table(80).replace(",good", ",4.5").replace(",bad", ",1.5"));
        let fast = ["--epochs", "1", "--limit", "32"];
        train(&films, &at.join("films"), &fast).ok();
        train(&grades, &at.join("grade"), &[&fast[..], &["--regression"]].concat()).ok();
        let of = |name: &str| at.join(name).join("patch.safetensors");
        Tasks { class: of("films"), value: of("grade"), _place: place }
    })
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The arguments of `bitfit predict` with both tasks.
fn predicting<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let tasks = tasks();
    [&["predict", "--patch", text(&tasks.class), "--patch", text(&tasks.value)], more].concat()
}

fn predict(more: &[&str]) -> Answer {
    run(predicting(more))
}

/// Short texts in the very small base's words, no two rows alike.
fn texts(n: usize) -> impl Iterator<Item = (usize, String)> {
    const SAID: [&str; 4] = ["good", "bad", "very good", "not great"];
    const THINGS: [&str; 3] = ["film", "plot", "cat"];
    (0..n).map(|i| (i, format!("the {} was {} {i}", THINGS[i % 3], SAID[i / 3 % 4])))
}

fn csv(n: usize) -> String {
    let mut all = String::from("id,text\n");
    texts(n).for_each(|(i, text)| all += &format!("{i},{text}\n"));
    all
}

fn jsonl(n: usize) -> String {
    let mut all = String::new();
    texts(n).for_each(|(i, text)| all += &format!("{{\"id\":{i},\"text\":\"{text}\"}}\n"));
    all
}

fn write_parquet(path: &Path, batch: &RecordBatch, rows_in_group: usize) {
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(rows_in_group)).build();
    let mut writer = ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

fn parquet(path: &Path, n: usize, rows_in_group: usize) {
    let (ids, texts): (Vec<i64>, Vec<String>) = texts(n).map(|(i, text)| (i as i64, text)).unzip();
    let columns: [(&str, ArrayRef); 2] =
        [("id", Arc::new(Int64Array::from(ids))), ("text", Arc::new(StringArray::from(texts)))];
    write_parquet(path, &RecordBatch::try_from_iter(columns).unwrap(), rows_in_group);
}

fn read_parquet(path: &Path) -> RecordBatch {
    let builder = ParquetRecordBatchReaderBuilder::try_new(fs::File::open(path).unwrap()).unwrap();
    let schema = builder.schema().clone();
    let batches: Vec<RecordBatch> = builder.build().unwrap().collect::<Result<_, _>>().unwrap();
    concat_batches(&schema, &batches).unwrap()
}

/// An input of `n` rows, for each format that rows come back in.
fn inputs(folder: &Path, n: usize) -> [PathBuf; 3] {
    let columnar = folder.join("in.parquet");
    parquet(&columnar, n, 700);
    [write(folder, "in.csv", csv(n)), write(folder, "in.jsonl", jsonl(n)), columnar]
}

#[test]
fn a_parquet_file_comes_back_with_all_its_columns_and_the_answers_that_a_table_gets() {
    let folder = tempfile::tempdir().unwrap();
    let n = 1300;
    let all: Vec<String> = texts(n).map(|(_, text)| text).collect();
    let mut dictionary = StringDictionaryBuilder::<Int8Type>::new();
    let mut lists = ListBuilder::new(Float32Builder::new());
    for i in 0..n {
        dictionary.append_value(["the film was good", "the plot was bad"][i % 2]);
        lists.append_option((i % 3 > 0).then_some([Some(i as f32), None]));
    }
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("text", Arc::new(StringArray::from(all.clone())), false),
        ("large", Arc::new(LargeStringArray::from(all.clone())), true),
        ("view", Arc::new(StringViewArray::from_iter_values(&all)), true),
        ("kind", Arc::new(dictionary.finish()), true),
        ("id", Arc::new((0..n as i64).map(|i| (i % 5 > 0).then_some(i)).collect::<Int64Array>()), true),
        ("lists", Arc::new(lists.finish()), true),
        ("seen", Arc::new(TimestampMicrosecondArray::from_iter_values(0..n as i64).with_timezone("UTC")), false),
        ("flag", Arc::new(BooleanArray::from_iter((0..n).map(|i| Some(i % 2 > 0)))), true),
    ];
    let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
    let (input, out) = (folder.path().join("in.parquet"), folder.path().join("out.parquet"));
    write_parquet(&input, &batch, 400);
    predict(&["--input", text(&input), "--output", text(&out)]).ok();

    let answered = read_parquet(&out);
    let names: Vec<&str> = answered.schema_ref().fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names[8..], ["films.label", "films.score", "grade.value"]);
    for (i, field) in batch.schema_ref().fields().iter().enumerate() {
        assert_eq!(answered.schema_ref().field(i), &**field);
        assert_eq!(answered.column(i), batch.column(i), "{}", field.name());
    }

    let table = write(folder.path(), "in.csv", csv(n));
    let lines = predict(&["--input", text(&table)]).ok().out;
    let (labels, scores) = (answered.column(8).as_string::<i32>(), answered.column(9).as_primitive::<Float32Type>());
    let values = answered.column(10).as_primitive::<Float32Type>();
    for (i, line) in lines.lines().skip(1).enumerate() {
        let row = format!("{i},{},{},{},{}", all[i], labels.value(i), scores.value(i), values.value(i));
        assert_eq!(line, row);
    }
    assert_eq!(lines.lines().count(), n + 1);

    // Each kind of text column gives what its texts give.
    for column in ["large", "view"] {
        let other = folder.path().join(format!("{column}.parquet"));
        predict(&["--input", text(&input), "--text-column", column, "--output", text(&other)]).ok();
        assert_eq!(read_parquet(&other).column(9), answered.column(9), "{column}");
    }
    let other = folder.path().join("kind.parquet");
    predict(&["--input", text(&input), "--text-column", "kind", "--output", text(&other)]).ok();
    let (scores, first) = (read_parquet(&other), predict(&["--text", "the film was good", "--json"]).ok());
    let first: Value = serde_json::from_str(&first.out).unwrap();
    let score = first["results"][0]["predictions"][0]["score"].as_f64().unwrap() as f32;
    assert_eq!(scores.column(9).as_primitive::<Float32Type>().value(0), score);

    // Without --output it goes to standard output, where that is no terminal.
    let piped = bitfit().args(predicting(&["--input", text(&input)])).output().unwrap();
    assert!(piped.status.success() && piped.stdout == fs::read(&out).unwrap());
}

#[test]
fn a_parquet_file_that_cannot_be_answered_is_refused_by_file_and_row() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let refusal = |name: &str, words: &[&str]| {
        let out = at.join("out.parquet");
        let input = at.join(name);
        let answer = predict(&["--input", text(&input), "--output", text(&out)]);
        answer.refused(1, &[&[name], words].concat());
        let left: Vec<_> = fs::read_dir(at).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert!(left.iter().all(|name| !name.starts_with("out")), "{left:?}");
    };
    let file = |name: &str, column: &str, texts: Vec<Option<&str>>| {
        let column: [(&str, ArrayRef); 1] = [(column, Arc::new(StringArray::from(texts)))];
        write_parquet(&at.join(name), &RecordBatch::try_from_iter(column).unwrap(), 10);
    };
    file("null.parquet", "text", vec![Some("the film"), None]);
    refusal("null.parquet", &[":2: the text in `text` is null"]);
    file("blank.parquet", "text", vec![Some("the film"), Some("the plot"), Some(" ")]);
    refusal("blank.parquet", &[":3: the text in `text` is empty"]);
    file("other.parquet", "sentence", vec![Some("the film")]);
    refusal("other.parquet", &["no column `text`; the file has `sentence`"]);
    file("empty.parquet", "text", vec![]);
    refusal("empty.parquet", &["there is no row in it"]);
    write(at, "table.parquet", "text\nthe film\n");
    refusal("table.parquet", &["no Parquet file"]);
    write(at, "nothing.parquet", "");
    refusal("nothing.parquet", &["no Parquet file"]);
    parquet(&at.join("whole.parquet"), 3000, 1000);
    let bytes = fs::read(at.join("whole.parquet")).unwrap();
    write(at, "short.parquet", &bytes[..bytes.len() - 9]);
    refusal("short.parquet", &["no Parquet file, a damaged one"]);
    // A page of the second column's data that holds other bytes: rows before it may have been answered.
    let mut bytes = bytes;
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].fill(0xFF);
    write(at, "damaged.parquet", &bytes);
    let out = at.join("out.parquet");
    let damaged = predict(&["--input", text(&at.join("damaged.parquet")), "--output", text(&out)]);
    assert!(damaged.code == Some(1) && damaged.err.contains("damaged.parquet") && !out.exists(), "{damaged:?}");
}

#[test]
fn a_task_trains_and_is_scored_on_parquet_as_on_csv() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let rows = table(60);
    let rows: Vec<(&str, &str)> = rows.lines().skip(1).map(|line| line.rsplit_once(',').unwrap()).collect();
    let text_column: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.0)));
    let labels: ArrayRef = Arc::new(BooleanArray::from_iter(rows.iter().map(|row| Some(row.1 == "good"))));
    let batch = RecordBatch::try_from_iter([("text", text_column), ("label", labels)]).unwrap();
    write_parquet(&at.join("films.parquet"), &batch, 25);
    write(at, "films.csv", table(60).replace(",good", ",true").replace(",bad", ",false"));
    let runs = ["parquet", "csv"].map(|format| {
        let (input, out) = (at.join(format!("films.{format}")), at.join(format));
        train(&input, &out, &["--epochs", "1"]).ok();
        let patch = out.join("patch.safetensors");
        let score = run(["eval", "--patch", text(&patch), "--input", text(&input), "--json"]).ok();
        (fs::read(&patch).unwrap(), score.out)
    });
    assert_eq!(runs[0], runs[1]);
}

#[test]
fn one_json_object_of_many_rows_holds_the_predictions_that_rows_hold() {
    let folder = tempfile::tempdir().unwrap();
    let input = write(folder.path(), "in.jsonl", jsonl(1100));
    let rows = predict(&["--input", text(&input)]).ok().out;
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let object = predict(&["--input", text(&input), "--json"]).ok().out;
    let of = |name: &str| rows.iter().map(|row| row[name].clone()).collect::<Vec<Value>>();
    let one = |name: &str, patch: &Path| serde_json::json!({"task": name, "patch": Patch::load(patch).unwrap().content_hash(), "predictions": of(name)});
    let expected = serde_json::json!({"results": [one("films", &tasks().class), one("grade", &tasks().value)]});
    assert!(object == format!("{expected}\n"), "{}", &object[..400]);

    let out = folder.path().join("out.json");
    predict(&["--input", text(&input), "--json", "--output", text(&out)]).ok();
    assert!(fs::read_to_string(out).unwrap() == object);
}

/// A table whose rows are of any length, some with line breaks inside quotes, and what its rows begin with.
fn awkward(n: usize) -> String {
    let mut all = String::from("\u{feff}id,text\r\n");
    for (i, text) in texts(n) {
        all += &match i % 4 {
            0 => format!("{i},\"{text}\n{}\"\r\n", "it was\n".repeat(i % 7)),
            1 => format!("\n{i},\"{text} \"\"quoted\"\", and more\"\n"),
            _ => format!("{i},{text}\r\n"),
        };
    }
    all
}

#[test]
fn the_parts_of_a_file_behind_each_other_are_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let awkward = write(at, "awkward.csv", awkward(40));
    let tsv = write(at, "in.tsv", csv(40).replace(',', "\t"));
    let [_, jsonl, columnar] = inputs(at, 40);
    for input in [&awkward, &tsv, &jsonl] {
        let whole = predict(&["--input", text(input)]).ok().out;
        for n in [1, 3, 7] {
            let part = |i: usize| predict(&["--input", text(input), "--shard", &format!("{i}/{n}")]).ok().out;
            assert_eq!((0..n).map(part).collect::<String>(), whole, "{} in {n}", input.display());
        }
    }
    let whole = at.join("whole.parquet");
    predict(&["--input", text(&columnar), "--output", text(&whole)]).ok();
    let parts: Vec<RecordBatch> = (0..3)
        .map(|i| {
            let out = at.join(format!("part-{i}.parquet"));
            predict(&["--input", text(&columnar), "--output", text(&out), "--shard", &format!("{i}/3")]).ok();
            read_parquet(&out)
        })
        .collect();
    assert!(parts.iter().all(|part| (13..=14).contains(&part.num_rows())));
    assert_eq!(concat_batches(&parts[0].schema(), &parts).unwrap(), read_parquet(&whole));

    // More parts than rows: some have none, and are files all the same.
    let one = write(at, "one.csv", "text\nthe film\n");
    let outputs: Vec<String> = (0..4)
        .map(|i| {
            let out = at.join(format!("one-{i}.csv"));
            predict(&["--input", text(&one), "--output", text(&out), "--shard", &format!("{i}/4")]).ok();
            fs::read_to_string(out).unwrap()
        })
        .collect();
    assert_eq!(outputs.concat(), predict(&["--input", text(&one)]).ok().out);
    assert!(outputs.iter().filter(|out| out.is_empty()).count() >= 2);

    predict(&["--input", text(&one), "--shard", "4/4"]).refused(2, &["--shard", "I from 0 to N - 1", "4/4"]);
    predict(&["--input", "-", "--shard", "0/2"]).refused(2, &["standard input", "no parts"]);
    predict(&["--text", "a film", "--shard", "0/2"]).refused(2, &["--shard goes with --input"]);
    let missing = at.join("missing.csv");
    predict(&["--input", text(&missing), "--shard", "0/2"]).refused(1, &["missing.csv"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No row is lost or doubled, wherever the bounds of the parts fall, and skipping goes on from any row.
    #[test]
    fn every_row_of_a_text_file_is_of_exactly_one_part(
        fields in prop::collection::vec("[a-z\",\n ]{0,12}", 1..40), count in 1u32..12, skip in 0u64..40, is_json: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let file = if is_json {
            let line = |field: &String| format!("{}\n\n", serde_json::json!({"text": format!("x{field}")}));
            write(folder.path(), "in.jsonl", fields.iter().map(line).collect::<String>())
        } else {
            let row = |field: &String| format!("\"x{}\"\n", field.replace('"', "\"\""));
            write(folder.path(), "in.csv", format!("text\n{}", fields.iter().map(row).collect::<String>()))
        };
        let columns = Columns { text: "text".into(), text_pair: None, label: None };
        let read = |part: Part| -> Vec<Row> {
            Rows::open_part(&file, &columns, part).unwrap().collect::<Result<_, _>>().unwrap()
        };
        let whole = read(Part::default());
        prop_assert_eq!(whole.len(), fields.len());
        let shards = (0..count).map(|index| Shard::new(index, count).unwrap());
        let parts: Vec<Vec<Row>> = shards.clone().map(|shard| read(Part { shard, skip: 0 })).collect();
        prop_assert_eq!(&parts.concat(), &whole);
        for (shard, part) in shards.zip(&parts) {
            prop_assert_eq!(&read(Part { shard, skip })[..], &part[part.len().min(skip as usize)..]);
        }
    }
}

fn beside(out: &Path, extension: &str) -> PathBuf {
    PathBuf::from(format!("{}.{extension}", out.display()))
}

/// Rows that a run's record says are answered.
fn recorded(out: &Path) -> u64 {
    let text = fs::read_to_string(beside(out, "progress")).unwrap_or_default();
    serde_json::from_str::<Value>(&text).map_or(0, |record| record["rows"].as_u64().unwrap())
}

/// Starts a run and returns when it has recorded its first rows.
fn started(arguments: &[&str], out: &Path) -> Child {
    let mut child = bitfit().args(predicting(arguments)).stderr(Stdio::piped()).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(120);
    while recorded(out) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be interrupted; give it more rows");
        assert!(Instant::now() < patience, "no rows were recorded");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Rows enough that a run is still at it after its first record.
const MANY: usize = 60_000;

#[test]
fn a_run_that_was_killed_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let [csv, jsonl, columnar] = inputs(at, MANY);
    for (input, name, more) in [
        (&csv, "out.csv", &[][..]),
        (&jsonl, "out.jsonl", &["--shard", "0/1"]),
        (&columnar, "out.parquet", &[]),
        (&csv, "out.json", &["--json"]),
    ] {
        let (expected, out) = (at.join(format!("expected-{name}")), at.join(name));
        predict(&[&["--input", text(input), "--output", text(&expected)], more].concat()).ok();
        let given = [&["--input", text(input), "--output", text(&out)], more].concat();
        let with = |flag: &'static str| predict(&[&given[..], &[flag]].concat());

        let mut child = started(&given, &out);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!out.exists() && beside(&out, "partial").exists(), "{name}");
        let rows = recorded(&out);
        assert!(rows > 0 && rows < MANY as u64, "{name}");
        // What a kill cuts off in the middle of a write.
        let mut partial = fs::OpenOptions::new().append(true).open(beside(&out, "partial")).unwrap();
        std::io::Write::write_all(&mut partial, b"half a row, and no").unwrap();
        drop(partial);

        predict(&given).refused(2, &[name, "--resume", "--overwrite"]);
        assert_eq!(recorded(&out), rows, "a refusal touches nothing");
        with("--resume").ok();
        assert!(fs::read(&out).unwrap() == fs::read(&expected).unwrap(), "{name} is not what it would have been");
        assert!(!beside(&out, "partial").exists() && !beside(&out, "progress").exists(), "{name}");
        let again = with("--resume").ok();
        assert!(again.err.contains("is finished; nothing was left to do"), "{}", again.err);
        predict(&given).refused(2, &[name, "--overwrite"]);
    }
}

#[test]
fn a_run_is_gone_on_with_by_what_was_asked_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let input = write(at, "in.csv", csv(MANY));
    let out = at.join("out.csv");
    let given = ["--input", text(&input), "--output", text(&out)];
    let mut child = started(&given, &out);
    child.kill().unwrap();
    child.wait().unwrap();
    let resume = |more: &[&str]| predict(&[&given[..], &["--resume"], more].concat());

    resume(&["--precision", "bf16"]).refused(2, &["out.csv.progress", "--precision was `f32` and is `bf16`"]);
    resume(&["--text-column", "id"]).refused(2, &["--text-column was `text` and is `id`"]);
    resume(&["--shard", "0/2"]).refused(2, &["--shard was `0/1` and is `0/2`"]);
    resume(&["--json"]).refused(2, &["--json"]);
    let patch = text(&tasks().class);
    let one = run(["predict", "--patch", patch, "--input", text(&input), "--output", text(&out), "--resume"]);
    one.refused(2, &["the patches are others"]);
    let moved = at.join("moved.csv");
    fs::rename(&input, &moved).unwrap();
    write(at, "in.csv", csv(MANY).replace("0,the film", "0,the plot"));
    resume(&[]).refused(2, &["begins or ends with other bytes", "--overwrite"]);
    write(at, "in.csv", csv(100));
    resume(&[]).refused(2, &["the input's length was"]);

    // The path is not asked: the same file under another name will do.
    let half = fs::read(beside(&out, "partial")).unwrap();
    fs::write(beside(&out, "partial"), &half[..10]).unwrap();
    let moved = ["--input", text(&moved), "--output", text(&out), "--resume"];
    predict(&moved).refused(1, &["out.csv.partial", "as recorded, found 10"]);
    fs::write(beside(&out, "partial"), &half).unwrap();
    predict(&moved).ok();
    assert_eq!(fs::read_to_string(&out).unwrap().lines().count(), MANY + 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_between_rows_and_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let input = write(folder.path(), "in.csv", csv(MANY));
    let out = folder.path().join("out.csv");
    let given = ["--input", text(&input), "--output", text(&out)];
    let child = started(&given, &out);
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let answer: Answer = child.wait_with_output().unwrap().into();
    answer.refused(130, &["rows are answered", "to go on: ", "--resume"]);
    assert!(!out.exists() && recorded(&out) > 0);
    predict(&[&given[..], &["--resume"]].concat()).ok();
    assert_eq!(fs::read_to_string(&out).unwrap().lines().count(), MANY + 1);
}

#[test]
fn resume_starts_where_there_is_nothing_and_overwrite_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let input = write(at, "in.csv", csv(20));
    let out = at.join("out.csv");
    let given = ["--input", text(&input), "--output", text(&out)];
    let with = |flag: &'static str| predict(&[&given[..], &[flag]].concat());
    with("--resume").ok();
    let expected = fs::read(&out).unwrap();

    // A run that was killed before its first record, over an output that is to be replaced.
    fs::write(beside(&out, "partial"), "rubbish").unwrap();
    predict(&given).refused(2, &["out.csv is there already"]);
    with("--overwrite").ok();
    assert!(fs::read(&out).unwrap() == expected && !beside(&out, "partial").exists());
    fs::remove_file(&out).unwrap();
    fs::write(beside(&out, "partial"), "rubbish").unwrap();
    predict(&given).refused(2, &["out.csv.partial is there", "--resume", "--overwrite"]);
    with("--resume").ok();
    assert!(fs::read(&out).unwrap() == expected);

    let other = at.join("out.tsv");
    let named = ["--input", text(&input), "--output", text(&other)];
    predict(&named).refused(2, &["--output", "ends in .csv", "out.tsv"]);
    predict(&[&named[..], &["--json"]].concat()).ok();
    predict(&["--input", text(&input), "--resume"]).refused(2, &["--output"]);
    predict(&["--input", "-", "--output", text(&at.join("x.jsonl")), "--resume"]).refused(2, &["read again"]);
    predict(&["--text", "a film", "--output", text(&at.join("x")), "--resume"]).refused(2, &["--resume goes with"]);
    with("--resume").ok();
    predict(&[&given[..], &["--resume", "--overwrite"]].concat()).refused(2, &["cannot be used with"]);
}

#[test]
fn what_was_answered_before_a_bad_row_is_kept_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let out = at.join("out.csv");
    let late = write(at, "late.csv", csv(2000) + "2000,\n");
    let answer = predict(&["--input", text(&late), "--output", text(&out)]);
    answer.refused(1, &["late.csv:2002: the text in `text` is empty", "out.csv.partial", "--resume"]);
    assert_eq!(recorded(&out), 1536, "whole chunks of rows");
    let early = write(at, "early.csv", "id,text\n0,\n");
    let answer = predict(&["--input", text(&early), "--output", text(&out), "--overwrite"]);
    answer.refused(1, &["early.csv:2"]);
    assert!(!beside(&out, "partial").exists() && !beside(&out, "progress").exists(), "there is nothing to keep");
}

#[test]
fn one_process_at_a_time_writes_an_output() {
    let folder = tempfile::tempdir().unwrap();
    let input = write(folder.path(), "in.csv", csv(MANY));
    let out = folder.path().join("out.csv");
    let given = ["--input", text(&input), "--output", text(&out)];
    let mut child = started(&given, &out);
    predict(&[&given[..], &["--resume"]].concat()).refused(1, &["out.csv.partial", "another process"]);
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_to_string(&out).unwrap().lines().count(), MANY + 1);
}

/// The most memory that a run has had resident, in KiB, as the system keeps account of it.
#[cfg(target_os = "linux")]
fn peak_kib(arguments: &[&str]) -> u64 {
    let mut child = bitfit().args(predicting(arguments)).args(["--threads", "1"]).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(peak);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return peak;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `BITFIT_ROWS` gives the rows of the long file: 200,000, or the 1,000,000 of the claim.
#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_rows() {
    let n = std::env::var("BITFIT_ROWS").map_or(200_000, |n| n.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let (short, long) = (folder.path().join("short"), folder.path().join("long"));
    for (folder, n) in [(&short, 10_000), (&long, n)] {
        fs::create_dir(folder).unwrap();
        inputs(folder, n);
    }
    for (name, more) in [("in.csv", &[][..]), ("in.jsonl", &["--json"]), ("in.parquet", &[])] {
        let peak = |folder: &Path| {
            let out = folder.join(format!("out.{name}"));
            peak_kib(&[&["--input", text(&folder.join(name)), "--output", text(&out)], more].concat())
        };
        let (few, many) = (peak(&short), peak(&long));
        println!("{name} {more:?}: {few} KiB for 10000 rows, {many} KiB for {n}");
        assert!(many < few + 12 * 1024, "{name} {more:?}: {few} KiB for 10000 rows, {many} KiB for {n}");
    }
}
