//! A newcomer's first command: `bitfit quickstart`, and the rows that it ships with.
//!
//! The run needs the default base (`scripts/fetch-base.sh` brings it).

#[path = "common/served.rs"]
mod served;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Output};

use bitfit::base::{Base, BaseSpec};
use bitfit::device::Placement;
use bitfit::encoder::Encoder;
use bitfit::patch::Patch;
use served::Served;

/// Each task's name, rows, number of texts, and labels (none for a value).
const TASKS: [(&str, &str, usize, &[&str]); 3] = [
    ("tone", include_str!("../src/cli/quickstart/tone.tsv"), 1, &["complaint", "praise", "question"]),
    ("urgency", include_str!("../src/cli/quickstart/urgency.tsv"), 1, &[]),
    ("answers", include_str!("../src/cli/quickstart/answers.tsv"), 2, &["answer", "other"]),
];

struct Row {
    split: &'static str,
    texts: Vec<&'static str>,
    label: &'static str,
}

fn rows(tsv: &'static str, n_texts: usize) -> Vec<Row> {
    let row = |line: &'static str| {
        let fields: Vec<&str> = line.split('\t').collect();
        assert_eq!(fields.len(), n_texts + 2, "{line}");
        Row { split: fields[0], texts: fields[1..=n_texts].to_vec(), label: fields[n_texts + 1] }
    };
    tsv.lines().skip(1).map(row).collect()
}

/// Lower-cased words without punctuation.
fn words(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| c.is_alphanumeric() || c.is_whitespace()).collect();
    plain.split_whitespace().map(String::from).collect()
}

#[test]
fn each_task_has_200_rows_to_train_on_and_100_held_out_evenly_labelled() {
    for (task, tsv, n_texts, labels) in TASKS {
        let rows = rows(tsv, n_texts);
        for (split, n_rows) in [("train", 200), ("held_out", 100)] {
            let of_split: Vec<&Row> = rows.iter().filter(|row| row.split == split).collect();
            assert_eq!(of_split.len(), n_rows, "{task}, {split}");
            for label in labels {
                let n = of_split.iter().filter(|row| row.label == *label).count();
                assert!(n.abs_diff(n_rows / labels.len()) <= 1, "{task}, {split}: {n} rows of {label}");
            }
        }
        let known = |label: &str| match labels {
            [] => label.parse::<f64>().is_ok_and(|value| (0.0..=10.0).contains(&value)),
            _ => labels.contains(&label),
        };
        assert!(rows.len() == 300 && rows.iter().all(|row| known(row.label)), "{task}");
    }
}

#[test]
fn no_text_stands_twice_so_no_held_out_text_was_trained_on() {
    for (task, tsv, n_texts, _) in TASKS {
        let mut seen = BTreeSet::new();
        for text in rows(tsv, n_texts).into_iter().flat_map(|row| row.texts) {
            assert!(seen.insert(words(text)), "{task}: `{text}` stands twice");
        }
    }
}

#[test]
fn no_phrase_of_four_words_stands_in_more_than_three_rows_of_a_task() {
    for (task, tsv, n_texts, _) in TASKS {
        let mut n_rows: BTreeMap<Vec<String>, usize> = BTreeMap::new();
        for row in rows(tsv, n_texts) {
            let phrases = |text: &&str| words(text).windows(4).map(<[String]>::to_vec).collect::<Vec<_>>();
            let of_row: BTreeSet<_> = row.texts.iter().flat_map(phrases).collect();
            of_row.into_iter().for_each(|phrase| *n_rows.entry(phrase).or_default() += 1);
        }
        assert!(n_rows.len() > 1000, "{task}: phrases are found");
        let (phrase, n) = n_rows.iter().max_by_key(|(_, n)| **n).unwrap();
        assert!(*n <= 3, "{task}: `{}` stands in {n} rows", phrase.join(" "));
    }
}

fn quickstart(folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitfit")).arg("quickstart").current_dir(folder).output().unwrap()
}

/// The row of a task in the table of results, cut at blanks.
fn cells<'a>(printed: &'a str, task: &str, metric: &str) -> Vec<&'a str> {
    let cells = printed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = cells.filter(|cells| cells.len() > 2 && cells[..2] == [task, metric]).collect::<Vec<_>>();
    assert_eq!(found.len(), 1, "one row of {task}:\n{printed}");
    found[0].clone()
}

#[test]
fn three_tasks_are_learned_replacing_an_earlier_quickstart_and_nothing_else() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("quickstart");
    // What an earlier quickstart, stopped at any point, may have left; and what is the user's own.
    let (tone, mine) = (folder.join("tone"), folder.join("mine"));
    std::fs::create_dir_all(tone.join("checkpoint")).unwrap();
    std::fs::create_dir_all(&mine).unwrap();
    for file in ["patch.safetensors", "run.json", "metrics.jsonl", "checkpoint/epoch-77.safetensors"] {
        std::fs::write(tone.join(file), "of an earlier run").unwrap();
    }
    for file in [mine.join("patch.safetensors"), tone.join("notes.txt")] {
        std::fs::write(file, "mine").unwrap();
    }

    let output = quickstart(temporary.path());
    let (printed, told) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{printed}\n{told}");

    let base = Base::load(&BaseSpec::resolve(None).unwrap()).unwrap();
    let encoder = Encoder::new(&base, Placement::default()).unwrap();
    for (task, ..) in TASKS {
        let patch = Patch::load(&folder.join(task).join("patch.safetensors")).unwrap();
        patch.check_base(&base).unwrap();
        encoder.attach(patch.delta()).unwrap();
        assert_eq!(patch.metadata().task, task);
        assert!(folder.join(task).join("run.json").is_file());
    }
    assert!(!tone.join("checkpoint/epoch-77.safetensors").exists());
    assert_eq!(std::fs::read_to_string(mine.join("patch.safetensors")).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(tone.join("notes.txt")).unwrap(), "mine");

    for (task, metric) in [("tone", "accuracy"), ("urgency", "spearman"), ("answers", "accuracy")] {
        let cells = cells(&printed, task, metric);
        let scores: Vec<f64> = cells[2..5].iter().map(|cell| cell.parse().unwrap()).collect();
        let (majority, frozen, bitfit) = (scores[0], scores[1], scores[2]);
        assert!(bitfit >= majority + 0.20, "{task}: majority {majority}, bitfit {bitfit}");
        assert!(bitfit >= frozen + 0.05, "{task}: frozen {frozen}, bitfit {bitfit}");
        let file = folder.join(task).join("patch.safetensors");
        assert!(cells[5].replace(',', "").parse::<u64>().unwrap() > 26_112, "parameters of {task}");
        let kilobytes: f64 = cells[6].parse().unwrap();
        assert!((kilobytes - std::fs::metadata(file).unwrap().len() as f64 / 1000.0).abs() <= 0.5, "{cells:?}");
    }
    let wide = printed.lines().find(|line| line.chars().count() > 80 && !line.contains(env!("CARGO_BIN_EXE_bitfit")));
    assert_eq!(wide, None, "fits a terminal");
    the_commands_it_ends_with_run(&printed, temporary.path());
    the_server_answers_as_the_command_does(temporary.path());
}

/// `bitfit serve --patches quickstart`, as the README has it.
fn the_server_answers_as_the_command_does(folder: &Path) {
    // What stands beside the tasks is no patch, and is reported when it is asked for, not before.
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitfit"));
    command.current_dir(folder);
    let server = Served::start(command, "quickstart", &[]);
    let text = "The lid was cracked when it arrived.";
    for (task, _, n_texts, _) in TASKS {
        let second = (n_texts == 2).then_some("What was wrong with it?");
        let patch = format!("quickstart/{task}/patch.safetensors");
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitfit"));
        command.current_dir(folder).args(["predict", "--patch", &patch, "--text", text, "--json"]);
        command.args(second.iter().flat_map(|second| ["--text-pair", second]));
        let output = command.output().unwrap();
        let expected: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut input = serde_json::json!({"text": text});
        if let Some(second) = second {
            input["text_pair"] = second.into();
        }
        let body = serde_json::json!({"inputs": [input]}).to_string();
        let found = server.ask("POST", &format!("/v1/tasks/{task}/predict"), body).ok().json();
        assert_eq!(found, expected["results"][0]);
    }
}

/// As a user would: copied into a shell, in the folder where quickstart ran.
fn the_commands_it_ends_with_run(printed: &str, folder: &Path) {
    let commands = &printed[printed.find("To go on").unwrap()..];
    let predictions = commands.split("\n\n").filter(|command| command.contains(" predict ")).collect::<Vec<_>>();
    assert!(predictions.len() == 2 && commands.contains(" train "), "{commands}");
    for command in predictions {
        let output = Command::new("sh").args(["-c", command]).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{command}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(!output.stdout.is_empty(), "{command}");
    }
    std::fs::write(folder.join("your.csv"), "text,label\n").unwrap();
    let train = commands.split("\n\n").find(|command| command.contains(" train ")).unwrap();
    let output = Command::new("sh").args(["-c", train]).current_dir(folder).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("your.csv") && output.status.code() == Some(1), "an empty table, but no wrong flag: {told}");
}
