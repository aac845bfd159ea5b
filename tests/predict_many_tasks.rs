//! Texts are answered by one task or many over one base: exactly as alone, in order, in every format.

#[path = "common/command.rs"]
mod command;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitfit::base::problem::{Problem, Texts};
use bitfit::base::{Base, Config};
use bitfit::device::batch::{Batch, DropoutKey};
use bitfit::device::{Placement, PrecisionName};
use bitfit::encoder::{Encoder, Task};
use bitfit::patch::{Patch, Selection};
use command::{pairs, run, table, tiny, train, write};
use proptest::prelude::*;
use serde_json::Value;

/// Sequence `i` of a composition: its length and tokens follow from the number.
fn push(batch: &mut Batch, i: u64, group: usize) {
    let n = 1 + (i * 7 % 39) as usize;
    let ids: Vec<u32> = (0..n as u64).map(|t| ((i * 31 + t * 17) % 97) as u32).collect();
    let types: Vec<u32> = (0..n).map(|t| u32::from(2 * t > n)).collect();
    batch.push(&ids, &types, group, DropoutKey::default(), None);
}

/// One batch of these sequences, each with its group's task: every row has the bits that it has alone.
fn each_row_is_as_alone(
    encoder: &Encoder,
    tasks: &[Option<Task>],
    mut rows: Vec<(usize, u64)>,
) -> Result<(), TestCaseError> {
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    rows.sort_by_key(|row| row.0);
    let mut mixed = Batch::new();
    rows.iter().for_each(|(group, i)| push(&mut mixed, *i, *group));
    let together = encoder.forward(&Arc::new(mixed), tasks).unwrap();
    for ((group, i), row) in rows.iter().zip(&together) {
        let mut alone = Batch::new();
        push(&mut alone, *i, 0);
        let alone = encoder.forward(&Arc::new(alone), &tasks[*group..=*group]).unwrap();
        let precision = encoder.precision();
        prop_assert_eq!(bits(row), bits(&alone[0]), "{}: sequence {} of group {}", precision, i, group);
    }
    Ok(())
}

/// A task of two to four classes with values that nobody trained.
fn attached(encoder: &Encoder, spec: &str, seed: u64) -> Task {
    let classes = Problem::Classes((0..2 + seed % 3).map(|class| class.to_string()).collect());
    let selection = Selection::parse(spec).unwrap();
    let patch = Patch::random(encoder.base(), &selection, classes, Texts::One, seed).unwrap();
    encoder.attach(patch.delta()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Eight patches and the bare base in one batch: each row has the bits it has alone.
    #[test]
    fn a_mixed_batch_gives_each_row_what_it_gets_alone(
        rows in prop::collection::vec((0usize..9, 0u64..1000), 1..40),
        n_threads in 1usize..3,
        precision in prop::sample::select(vec![PrecisionName::F32, PrecisionName::Bf16, PrecisionName::Int8]),
    ) {
        let base = Base::from_folder(&tiny()).unwrap();
        let encoder = Encoder::new(&base, Placement { n_threads, precision, ..Placement::default() }).unwrap();
        let attach = |seed| attached(&encoder, "bitfit", seed);
        // The ninth group is the base without a task.
        let tasks: Vec<Option<Task>> = (0..8).map(|seed| Some(attach(seed))).chain([None]).collect();
        each_row_is_as_alone(&encoder, &tasks, rows)?;
    }

    /// Tasks that leave lower layers as the base has them run these once over equal texts: each row still has the bits
    /// it has alone.
    #[test]
    fn shared_layers_change_no_answer(
        rows in prop::collection::vec((0usize..9, 0u64..6), 2..40),
        precision in prop::sample::select(vec![PrecisionName::F32, PrecisionName::Bf16, PrecisionName::Int8]),
    ) {
        let base = Base::random(Config { num_hidden_layers: 4, initializer_range: 0.2, ..Config::tiny() }, 5);
        let encoder = Encoder::new(&base, Placement { n_threads: 2, precision, ..Placement::default() }).unwrap();
        let specs = ["bitfit layers=2..4", "bitfit layers=2..4", "bitfit layers=1..3", "bitfit", "frozen", "frozen"];
        let specs = specs.into_iter().chain(["bitfit terms=intermediate layers=3..4", "bitfit terms=pooler"]);
        let attach = |(seed, spec)| Some(attached(&encoder, spec, seed));
        let tasks: Vec<Option<Task>> = (0..).zip(specs).map(attach).chain([None]).collect();
        let begins: Vec<usize> = tasks.iter().flatten().map(Task::begins).collect();
        prop_assert_eq!(begins, [2, 2, 1, 0, 4, 4, 3, 4]);
        each_row_is_as_alone(&encoder, &tasks, rows)?;
    }
}

/// Three trained runs over the tiny base: two of one text, one of two.
struct Trained {
    _place: tempfile::TempDir,
    good: PathBuf,
    grade: PathBuf,
    pair: PathBuf,
}

impl Trained {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let at = place.path();
        let fast = ["--epochs", "1", "--limit", "64"];
        let films = write(at, "films.csv", table(80));
        let grades = at.join("grade.csv");
        let graded = table(80).replace(",good", ",4.5").replace(",bad", ",1.5");
        fs::write(&grades, graded).unwrap();
        let both = write(at, "both.csv", pairs(80));
        train(&films, &at.join("films"), &fast).ok();
        train(&grades, &at.join("grade"), &[&fast[..], &["--regression"]].concat()).ok();
        let pair = ["--text-pair-column", "text_pair", "--regression"];
        train(&both, &at.join("both"), &[&fast[..], &pair].concat()).ok();
        let of = |name: &str| at.join(name).join("patch.safetensors");
        Trained { good: of("films"), grade: of("grade"), pair: of("both"), _place: place }
    }

    fn folder(&self) -> &Path {
        self._place.path()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn one_text_and_rows_of_every_format_are_answered_alike_and_in_order() {
    let t = Trained::new();
    let both = ["--patch", text(&t.good), "--patch", text(&t.grade)];
    let predict = |more: &[&str]| run([&["predict"], &both[..], more].concat());

    let one = predict(&["--text", "the film was great", "--json"]).ok();
    assert_eq!(one.out.lines().count(), 1);
    let one: Value = serde_json::from_str(&one.out).unwrap();
    let results = one["results"].as_array().unwrap();
    assert_eq!((&results[0]["task"], &results[1]["task"]), (&"films".into(), &"grade".into()));
    assert_eq!(results[0]["patch"], Patch::load(&t.good).unwrap().content_hash());
    let p = &results[0]["predictions"][0];
    assert_eq!(p["scores"].as_object().unwrap().keys().collect::<Vec<_>>(), ["bad", "good"]);
    assert_eq!(p["score"], p["scores"][p["label"].as_str().unwrap()]);
    let value = &results[1]["predictions"][0]["value"];
    assert!(value.is_f64());
    let shown = predict(&["--text", "the film was great"]).ok();
    assert!(shown.out.contains(&format!("films  {}  {}", p["label"].as_str().unwrap(), p["score"])), "{}", shown.out);

    let long = "it was the film . ".repeat(40);
    let csv =
        write(t.folder(), "in.csv", format!("id,text\n7,\"the plot, was bad\"\n8,the film was great\n9,{long}\n"));
    let tsv = write(t.folder(), "in.tsv", "id\ttext\n8\tthe film was great\n");
    let jsonl = write(t.folder(), "in.jsonl", "{\"text\":\"the film was great\",\"id\":[8]}\n");

    let answer = predict(&["--input", text(&csv)]).ok();
    let lines: Vec<&str> = answer.out.lines().collect();
    assert_eq!(lines[0], "id,text,films.label,films.score,grade.value");
    assert!(lines[1].starts_with("7,\"the plot, was bad\",") && lines.len() == 4, "{}", answer.out);
    let row = format!("8,the film was great,{},{},{value}", p["label"].as_str().unwrap(), p["score"]);
    assert_eq!(lines[2], row);
    assert!(answer.err.contains("films: 1 of the texts were longer than 40 tokens"), "{}", answer.err);

    assert_eq!(predict(&["--input", text(&tsv)]).ok().out.lines().nth(1).unwrap(), row.replace(',', "\t"));
    let line: Value = serde_json::from_str(&predict(&["--input", text(&jsonl)]).ok().out).unwrap();
    assert_eq!((&line["id"][0], &line["films"], &line["grade"]["value"]), (&8.into(), p, value));

    let out = t.folder().join("out.csv");
    predict(&["--input", text(&csv), "--output", text(&out)]).ok();
    assert_eq!(fs::read_to_string(&out).unwrap(), answer.out);
    predict(&["--input", text(&csv), "--output", text(&out)]).refused(2, &["--overwrite"]);
    predict(&["--input", text(&csv), "--output", text(&out), "--overwrite"]).ok();
}

#[test]
fn two_patches_of_one_task_are_told_apart() {
    let t = Trained::new();
    let epoch = t.folder().join("films/checkpoint/epoch-1.safetensors");
    let half = t.folder().join("half.safetensors");
    let films = t.folder().join("films");
    run(["patch", "export", text(&films), "--epoch", "last", "--dtype", "f16", "-o", text(&half)]).ok();
    assert!(epoch.exists());
    let csv = write(t.folder(), "in.csv", "text\nthe film was great\n");
    let answer = run(["predict", "--patch", text(&t.good), "--patch", text(&half), "--input", text(&csv)]).ok();
    let name = |path: &Path| format!("films@{}", &Patch::load(path).unwrap().content_hash()[..8]);
    let header = answer.out.lines().next().unwrap();
    assert_eq!(header, format!("text,{0}.label,{0}.score,{1}.label,{1}.score", name(&t.good), name(&half)));
    // The same patch twice has no two names.
    let twice = run(["predict", "--patch", text(&t.good), "--patch", text(&t.good), "--input", text(&csv)]);
    twice.refused(2, &["two columns"]);
}

#[test]
fn wrong_uses_are_refused_and_leave_nothing() {
    let t = Trained::new();
    let at = t.folder();
    let out = at.join("out.csv");
    let predict = |more: &[&str]| {
        let all = [&["predict", "--output", text(&out)], more].concat();
        let answer = run(all);
        assert!(!out.exists(), "{more:?} left an output");
        answer
    };
    let good = ["--patch", text(&t.good)];
    let with = |more: &[&str]| predict(&[&good[..], more].concat());
    with(&["--text", "a film", "--text-pair", "a plot"]).refused(2, &["films", "expected 1", "found 2"]);
    predict(&["--patch", text(&t.pair), "--text", "a film"]).refused(2, &["both", "expected 2", "found 1"]);
    let mixed = ["--patch", text(&t.good), "--patch", text(&t.pair), "--text", "a film"];
    predict(&mixed).refused(2, &["both"]);
    with(&["--text", "  "]).refused(2, &["words"]);
    with(&["--text", "a film", "--text-column", "x"]).refused(2, &["--text-column goes with --input"]);
    with(&[]).refused(2, &["--input"]);
    let csv = |name: &str, content: &[u8]| write(at, name, content);
    let file = csv("other.csv", b"sentence,id\nthe film,1\n");
    with(&["--input", text(&file)]).refused(1, &["`text`", "sentence"]);
    let file = csv("ragged.csv", b"text,id\nthe film,1\nthe plot\n");
    with(&["--input", text(&file)]).refused(1, &["ragged.csv:3"]);
    let file = csv("empty.csv", b"");
    with(&["--input", text(&file)]).refused(1, &["empty.csv"]);
    let file = csv("latin.csv", b"text\nthe caf\xe9\n");
    with(&["--input", text(&file)]).refused(1, &["latin.csv:2", "UTF-8"]);
    let file = csv("blank.csv", b"text,id\nthe film,1\n,2\n");
    with(&["--input", text(&file)]).refused(1, &["blank.csv:3"]);
    let answer = with(&["--input", text(&at.join("missing.csv"))]);
    answer.refused(1, &["missing.csv"]);
    assert_eq!(answer.err.matches("No such file").count(), 1, "the reason is given once: {}", answer.err);
    let file = csv("films.txt", b"text\nthe film\n");
    with(&["--input", text(&file)]).refused(2, &[".csv"]);
    let file = csv("taken.csv", b"text,films.label\nthe film,x\n");
    with(&["--input", text(&file)]).refused(2, &["films.label"]);
    let one = ["predict", "--patch", text(&t.good), "--text", "a film", "--device"];
    run([&one[..], &["cuda:99"]].concat()).refused(1, &["--device cpu"]);

    // A damaged patch, and one of another base.
    let mut bytes = fs::read(&t.good).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let damaged = csv("damaged.safetensors", &bytes);
    run(["predict", "--patch", text(&damaged), "--text", "a film"]).refused(1, &["damaged.safetensors"]);
    let other = at.join("other");
    fs::create_dir(&other).unwrap();
    for entry in fs::read_dir(tiny()).unwrap().flatten().filter(|e| e.path().is_file()) {
        fs::copy(entry.path(), other.join(entry.file_name())).unwrap();
    }
    let config = fs::read_to_string(other.join("config.json")).unwrap().replace("1e-12", "1e-5");
    fs::write(other.join("config.json"), config).unwrap();
    let args = ["predict", "--base", text(&other), "--patch", text(&t.good), "--text", "a film"];
    run(args).refused(1, &["was made for base"]);
    run(["patch", "verify", text(&t.good), "--base", text(&other)]).refused(1, &["was made for base"]);
}
