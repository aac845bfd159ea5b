//! A run that was stopped goes on to the same patch.

#![cfg(unix)]

#[path = "common/command.rs"]
mod command;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command::{Answer, bitfit, patch, table, train, write};

/// Enough steps that a signal meets the run in the middle of an epoch.
const SETTINGS: [&str; 6] = ["--epochs", "3", "--batch-size", "2", "--seed", "5"];
const ROWS: usize = 1500;

fn log(run: &Path) -> String {
    fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default()
}

/// Trains until the log holds `wanted`, sends SIGINT `times` times, and waits.
fn interrupted(rows: &Path, out: &Path, more: &[&str], wanted: &str) -> Answer {
    let mut command = bitfit();
    command.arg("train").arg("--train").arg(rows).arg("--out").arg(out).args(SETTINGS).args(more);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while !log(out).contains(wanted) {
        assert!(began.elapsed() < Duration::from_secs(120), "the run does not get to {wanted}");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    child.wait_with_output().unwrap().into()
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(ROWS));
    let (whole, out) = (folder.path().join("whole"), folder.path().join("run"));
    train(&rows, &whole, &SETTINGS).ok();

    // Before the first epoch has ended, again in the second, and then to the end.
    let first = interrupted(&rows, &out, &[], "\"step\":50,");
    first.refused(130, &["stopped: at step ", "--resume", "to go on: "]);
    assert!(!out.join("patch.safetensors").exists());
    let at = first.err.split("at step ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(at.parse::<usize>().unwrap() < 675, "stopped at {at}, in the first epoch");
    let second = interrupted(&rows, &out, &["--resume"], "\"step\":900,");
    second.refused(130, &["stopped"]);
    train(&rows, &out, &[&SETTINGS[..], &["--resume"]].concat()).ok();
    assert!(patch(&out) == patch(&whole), "the resumed run gives other bytes");

    // No step is told of twice, and none is missing.
    let steps = |run: &Path| -> Vec<u64> {
        let lines = log(run);
        let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter(|line| line["split"].is_string()).map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps(&out), steps(&whole));
}

#[test]
fn a_run_that_was_killed_goes_on_from_its_last_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(ROWS));
    let (whole, out) = (folder.path().join("whole"), folder.path().join("run"));
    train(&rows, &whole, &SETTINGS).ok();
    let mut command = bitfit();
    command.arg("train").arg("--train").arg(&rows).arg("--out").arg(&out).args(SETTINGS);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while !log(&out).contains("\"step\":800,") {
        assert!(began.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    train(&rows, &out, &[&SETTINGS[..], &["--resume"]].concat()).ok();
    assert!(patch(&out) == patch(&whole));
}

#[test]
fn resume_starts_where_there_is_nothing_and_ends_where_all_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(60));
    let out = folder.path().join("run");
    let settings = ["--epochs", "1", "--resume"];
    train(&rows, &out, &settings).ok();
    let first = patch(&out);
    let again = train(&rows, &out, &settings).ok();
    assert!(again.err.contains("is finished"), "{}", again.err);
    assert!(again.out.contains("films: accuracy"), "{}", again.out);
    assert_eq!(first, patch(&out));
}

#[test]
fn resume_refuses_other_settings_or_rows_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(60));
    let out = folder.path().join("run");
    train(&rows, &out, &["--epochs", "1"]).ok();
    let first = patch(&out);
    let answer = train(&rows, &out, &["--epochs", "1", "--learning-rate", "0.001", "--resume"]);
    answer.refused(2, &["learning_rate was 0.003 and is 0.001"]);
    let others = write(folder.path(), "films.csv", table(62));
    train(&others, &out, &["--epochs", "1", "--resume"]).refused(2, &["the training rows differ"]);
    assert_eq!(first, patch(&out));
}

#[test]
fn a_folder_with_a_run_is_refused_and_overwriting_leaves_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(60));
    let out = folder.path().join("run");
    train(&rows, &out, &["--epochs", "2"]).ok();
    let notes = write(&out, "notes.txt", "mine");
    train(&rows, &out, &["--epochs", "1"]).refused(2, &["already holds a run", "--resume", "--overwrite"]);
    assert!(out.join("checkpoint/epoch-2.safetensors").exists());
    train(&rows, &out, &["--epochs", "1", "--overwrite"]).ok();
    assert!(!out.join("checkpoint/epoch-2.safetensors").exists());
    assert_eq!(fs::read_to_string(notes).unwrap(), "mine");
}

#[test]
fn a_finished_run_whose_checkpoint_was_removed_is_not_trained_over() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write(folder.path(), "films.csv", table(40));
    let out = folder.path().join("run");
    train(&rows, &out, &["--epochs", "1"]).ok();
    let before = patch(&out);
    fs::remove_dir_all(out.join("checkpoint")).unwrap();
    train(&rows, &out, &["--epochs", "1", "--seed", "5", "--resume"]).refused(2, &["nothing to go on from"]);
    assert!(patch(&out) == before, "the patch is left as it was");
}
