//! The real binary on a very small base and small tables.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The very small BERT, a base in Hugging Face layout.
pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny")
}

/// The command, which never reaches a hub, and finds the very small base.
pub fn bitfit() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitfit"));
    command.env("HF_HUB_OFFLINE", "1").env("BITFIT_BASE", tiny());
    command
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Answer {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Answer {
    /// This answer, which must be a success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self
    }

    /// Asserts how it failed: the exit code, and words that the message holds.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "`{word}` is not in: {}", self.err);
        }
        assert!(self.out.is_empty(), "nothing on standard output: {}", self.out);
        assert!(!self.err.contains("panicked"), "{}", self.err);
    }
}

/// Runs the command with these arguments.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Answer {
    bitfit().args(args).output().unwrap().into()
}

/// `bitfit train --train TABLE --out OUT` and further arguments.
pub fn train(table: &Path, out: &Path, more: &[&str]) -> Answer {
    bitfit().arg("train").arg("--train").arg(table).arg("--out").arg(out).args(more).output().unwrap().into()
}

const GOOD: [&str; 3] = ["good", "great", "very good"];
const BAD: [&str; 3] = ["bad", "not good", "not great"];
const THINGS: [&str; 6] = ["movie", "film", "plot", "cat", "dog", "play"];

/// A CSV table `text,label` of `n` rows in the very small base's words; even rows are `good`, odd ones `bad`.
pub fn table(n: usize) -> String {
    let row = |i: usize| {
        let said = if i.is_multiple_of(2) { GOOD[i / 2 % 3] } else { BAD[i / 2 % 3] };
        let label = if i.is_multiple_of(2) { "good" } else { "bad" };
        let (thing, more) = (THINGS[i / 6 % 6], "it was the film . ".repeat(i % 5));
        format!("{more}the {thing} was {said} {},{label}\n", i % 10)
    };
    std::iter::once("text,label\n".to_string()).chain((0..n).map(row)).collect()
}

/// A CSV table `text,text_pair,label` of `n` rows with a value from 0 to 4.
pub fn pairs(n: usize) -> String {
    let row = |i: usize| {
        let (a, b) = (THINGS[i % 6], THINGS[i / 6 % 6]);
        format!("the {a} was {},they play the {b},{}\n", GOOD[i % 3], (i % 5) as f32 / 1.25)
    };
    std::iter::once("text,text_pair,label\n".to_string()).chain((0..n).map(row)).collect()
}

/// Writes a file into a folder and gives its path.
pub fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// The bytes of a run's patch.
pub fn patch(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("patch.safetensors")).unwrap()
}
