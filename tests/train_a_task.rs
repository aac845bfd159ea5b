//! A task is trained from a table or from GLUE's files, by the real binary; and several at once, by the library.

#[path = "common/command.rs"]
mod command;

use std::fs;

use bitfit::base::Base;
use bitfit::data::{Columns, encode, load_table};
use bitfit::device::Placement;
use bitfit::encoder::Encoder;
use bitfit::patch::{Method, Patch, Selection};
use bitfit::train::{Options, Progress, start, step};
use command::{patch, run, table, tiny, train, write};
use serde_json::Value;

const FAST: [&str; 4] = ["--epochs", "2", "--batch-size", "8"];

fn json(text: &str) -> Value {
    assert_eq!(text.matches('\n').count(), 1, "one line: {text}");
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_table_of_ones_own_is_learned_and_scored() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(400));
    let out = folder.path().join("run");
    let settings = ["--epochs", "20", "--learning-rate", "0.005", "--dropout", "0", "--json"];
    let answer = train(&rows, &out, &settings).ok();
    let found = json(&answer.out);
    assert_eq!((&found["task"], &found["split"]), (&"films".into(), &"held_out".into()));
    assert_eq!(found["examples"], 40);
    assert!(found["metrics"]["accuracy"].as_f64().unwrap() > 0.8, "{found}");
    let patch = Patch::load(&out.join("patch.safetensors")).unwrap();
    assert_eq!(found["patch"], patch.content_hash());
    // Hidden size 32, intermediate 64, two layers.
    assert_eq!(found["parameters"]["encoder"], 32 + 2 * (7 * 32 + 64));
    assert_eq!((&found["parameters"]["pooler"], &found["parameters"]["head"]), (&32.into(), &(2 * 32 + 2).into()));
    assert_eq!(patch.metadata().metrics["accuracy"], found["metrics"]["accuracy"].as_f64().unwrap());

    let record: Value = serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
    assert_eq!((&record["finished"], &record["patch"]), (&true.into(), &found["patch"]));
    assert_eq!(record["evaluations"].as_array().unwrap().len(), 20);
    let log = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| line["split"] == "held_out").count(), 20);
    assert!(lines.iter().any(|line| line["loss"].is_f64() && line["learning_rate"].is_f64()));
    for epoch in 1..=20 {
        let of = Patch::load(&out.join(format!("checkpoint/epoch-{epoch}.safetensors"))).unwrap();
        assert_eq!(of.metadata().epoch, epoch);
    }

    // The same rows through `eval` give the same figures as the evaluation in training.
    let file = out.join("patch.safetensors");
    let answer = run(["eval", "--json", "--patch", file.to_str().unwrap(), "--input", rows.to_str().unwrap()]).ok();
    let evaluated = json(&answer.out);
    assert_eq!((&evaluated["task"], &evaluated["examples"]), (&"films".into(), &400.into()));
    assert!(evaluated["metrics"]["accuracy"].as_f64().unwrap() > 0.8);
}

#[test]
fn one_seed_gives_one_patch_with_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(120));
    let bf16 = ["--precision", "bf16"];
    for (method, precision) in
        [("bitfit", &[][..]), ("frozen", &[]), ("random", &[]), ("full", &[]), ("bitfit", &bf16), ("full", &bf16)]
    {
        let what = format!("{method}{}", precision.concat());
        let of = |name: &str, more: &[&str]| {
            let out = folder.path().join(format!("{what}-{name}"));
            train(&rows, &out, &[&FAST[..], &["--method", method, "--seed", "3"], precision, more].concat()).ok();
            patch(&out)
        };
        let first = of("first", &["--threads", "2"]);
        assert!(first == of("again", &["--threads", "2"]), "{what}: a second run gives other bytes");
        assert!(first == of("alone", &["--threads", "1"]), "{what}: one thread gives other bytes");
    }
}

#[test]
fn a_memory_budget_changes_no_byte_and_is_refused_where_it_cannot_hold() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(120));
    let of = |name: &str, more: &[&str]| train(&rows, &folder.path().join(name), &[&FAST[..], more].concat());
    of("free", &[]).ok();
    of("tight", &["--memory-budget", "320KB"]).ok();
    assert!(patch(&folder.path().join("free")) == patch(&folder.path().join("tight")));
    for (budget, message) in
        [("1KB", "MB of activations at least"), ("much", "a number of B, KB, MB or GB"), ("0", "500MB")]
    {
        of("refused", &["--memory-budget", budget]).refused(2, &[message]);
    }
    of("refused", &["--memory-budget", "1GB", "--method", "full"]).refused(2, &["biases or the head alone"]);
    assert!(!folder.path().join("refused").exists());
}

#[test]
fn another_seed_gives_another_patch() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(60));
    let of = |seed: &str| {
        let out = folder.path().join(seed);
        train(&rows, &out, &["--epochs", "1", "--seed", seed]).ok();
        patch(&out)
    };
    assert!(of("1") != of("2"));
}

#[test]
fn glue_files_are_trained_on_and_scored() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("RTE");
    fs::create_dir(&data).unwrap();
    let lines = |n: usize| -> String {
        let of = |i: usize| {
            let label = if i.is_multiple_of(2) { "entailment" } else { "not_entailment" };
            format!("{i}\tthe cat was good\tit was {}\t{label}\n", if i.is_multiple_of(2) { "good" } else { "bad" })
        };
        std::iter::once("index\tsentence1\tsentence2\tlabel\n".to_string()).chain((0..n).map(of)).collect()
    };
    write(&data, "train.tsv", lines(64));
    write(&data, "dev.tsv", lines(16));
    let (dir, out) = (folder.path().to_str().unwrap(), folder.path().join("run"));
    let answer =
        run(["train", "--task", "rte", "--data", dir, "--json", "--epochs", "1", "--out", out.to_str().unwrap()]);
    let trained = json(&answer.ok().out);
    assert_eq!((&trained["split"], &trained["examples"]), (&"dev".into(), &16.into()));
    let file = out.join("patch.safetensors");
    let scored = json(&run(["eval", "--patch", file.to_str().unwrap(), "--data", dir, "--json"]).ok().out);
    assert_eq!(scored["metrics"], trained["metrics"]);
    assert_eq!(scored["patch"], trained["patch"]);
}

#[test]
fn accumulated_passes_count_as_one_batch() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(80));
    let losses = |name: &str, more: &[&str]| -> Vec<f64> {
        let out = folder.path().join(name);
        train(&rows, &out, &[&["--epochs", "1", "--keep", "last"], more].concat()).ok();
        let log = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        log.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).collect()
    };
    let whole = losses("whole", &["--batch-size", "12"]);
    let parts = losses("parts", &["--batch-size", "4", "--gradient-accumulation-steps", "3"]);
    assert_eq!(whole.len(), parts.len());
    for (a, b) in whole.iter().zip(&parts) {
        assert!((a - b).abs() < 1e-4 * a.abs(), "{a} and {b}");
    }
}

#[test]
fn max_steps_end_a_run_in_mid_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(100));
    let out = folder.path().join("run");
    let found = json(&train(&rows, &out, &["--max-steps", "8", "--keep", "last", "--json"]).ok().out);
    assert_eq!((&found["steps"], &found["epoch"]), (&8.into(), &2.into()));
}

#[test]
fn texts_that_are_too_long_are_cut_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(60));
    let out = folder.path().join("run");
    let found = json(&train(&rows, &out, &["--max-length", "10", "--epochs", "1", "--json"]).ok().out);
    assert!(found["truncated"]["train"].as_u64().unwrap() > 0, "{found}");
}

/// Three runs with seeds and learning rates of their own, trained in the same steps, are to the bit what each is alone.
#[test]
fn runs_trained_as_groups_give_the_patches_they_give_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "films.csv", table(50));
    let columns = Columns { text: "text".into(), text_pair: None, label: Some("label".into()) };
    let rows = load_table(&path, &columns, false, None).unwrap();
    let base = Base::from_folder(&tiny()).unwrap();
    let encoder = Encoder::new(&base, Placement { n_threads: 2, ..Placement::default() }).unwrap();
    let sequences = encode(&rows.examples, base.tokenizer().unwrap(), 40).unwrap().sequences;
    let prepared = |seed: u64, learning_rate: f64, batch_size: usize, epochs: u32| {
        let selection = Selection::new(if seed == 2 { Method::Frozen } else { Method::Bitfit });
        let options =
            Options { seed, learning_rate: Some(learning_rate), batch_size, epochs, selection, ..Options::default() };
        let config = options.check(&base).unwrap();
        let run = start(&base, &config.selection, 2, seed).unwrap();
        (run, Progress::new(&config, sequences.clone(), 0).unwrap())
    };
    let settings = [(1, 1e-2, 8, 2), (2, 3e-3, 16, 3), (3, 5e-3, 5, 1)];

    let (runs, mut progress): (Vec<_>, Vec<_>) = settings.iter().map(|s| prepared(s.0, s.1, s.2, s.3)).unzip();
    let mut together = encoder.trainer(&runs).unwrap();
    while progress.iter().any(|p| !p.is_done()) {
        step(&mut *together, &mut progress).unwrap();
    }
    for (g, (seed, learning_rate, batch_size, epochs)) in settings.into_iter().enumerate() {
        let (run, progress) = prepared(seed, learning_rate, batch_size, epochs);
        let (mut alone, mut progress) = (encoder.trainer(&[run]).unwrap(), [progress]);
        while !progress[0].is_done() {
            step(&mut *alone, &mut progress).unwrap();
        }
        assert_eq!(together.delta(g), alone.delta(0), "run {g}: the values differ");
        assert_eq!(together.moments(g), alone.moments(0), "run {g}: the moments differ");
    }
}
