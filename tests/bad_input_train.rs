//! Bad input to `train` and `eval`: one clear message with its evidence, the right exit code, nothing left behind.

#[path = "common/command.rs"]
mod command;

use std::fs;
use std::path::{Path, PathBuf};

use command::{Answer, bitfit, pairs, run, table, tiny, train, write};

/// A folder with a good table, and a place for a run.
struct Place {
    folder: tempfile::TempDir,
    rows: PathBuf,
    out: PathBuf,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let (rows, out) = (write(folder.path(), "films.csv", table(40)), folder.path().join("run"));
    Place { folder, rows, out }
}

impl Place {
    /// Trains on the good table with these arguments, which must be refused and leave nothing.
    #[track_caller]
    fn refuses(&self, code: i32, args: &[&str], words: &[&str]) {
        train(&self.rows, &self.out, args).refused(code, words);
        assert!(!self.out.exists(), "{args:?} left a folder");
    }

    /// Trains on this table, which must be refused and leave nothing.
    #[track_caller]
    fn refuses_table(&self, name: &str, text: impl AsRef<[u8]>, args: &[&str], words: &[&str]) {
        let path = write(self.folder.path(), name, text);
        let answer = train(&path, &self.out, args);
        assert!(matches!(answer.code, Some(1 | 2)), "{}", answer.err);
        answer.refused(answer.code.unwrap(), words);
        assert!(!self.out.exists(), "{name} left a folder");
    }

    /// A copy of the very small base with one thing changed.
    fn base(&self, change: impl Fn(&Path)) -> PathBuf {
        let folder = self.folder.path().join("base");
        fs::create_dir_all(&folder).unwrap();
        for name in ["config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"] {
            fs::copy(tiny().join(name), folder.join(name)).unwrap();
        }
        change(&folder);
        folder
    }
}

#[test]
fn settings_outside_their_range_are_refused() {
    let place = place();
    for (args, words) in [
        (["--learning-rate", "0"], ["--learning-rate: expected above 0", "found 0"]),
        (["--learning-rate", "-1"], ["--learning-rate: expected above 0", "found -1"]),
        (["--learning-rate", "nan"], ["--learning-rate: expected above 0", "found NaN"]),
        (["--learning-rate", "inf"], ["--learning-rate: expected above 0", "found inf"]),
        (["--head-learning-rate", "0"], ["--head-learning-rate", "found 0"]),
        (["--batch-size", "0"], ["--batch-size", "found 0"]),
        (["--epochs", "0"], ["--epochs", "found 0"]),
        (["--max-steps", "0"], ["--max-steps", "found 0"]),
        (["--gradient-accumulation-steps", "0"], ["--gradient-accumulation-steps", "found 0"]),
        (["--warmup", "1.5"], ["--warmup: expected a share", "found 1.5"]),
        (["--warmup", "-0.1"], ["--warmup: expected a share", "found -0.1"]),
        (["--weight-decay", "nan"], ["--weight-decay", "found NaN"]),
        (["--max-grad-norm", "-1"], ["--max-grad-norm", "found -1"]),
        (["--dropout", "1"], ["--dropout", "found 1"]),
        (["--max-length", "41"], ["--max-length: expected 3 to 40", "found 41"]),
        (["--limit", "0"], ["--limit", "found 0"]),
        (["--layers", "0..3"], ["--layers", "at most 2"]),
        (["--layers", "1..1"], ["--layers", "1..1"]),
        (["--layers", "one"], ["--layers", "`one`"]),
        (["--terms", "query,beta"], ["bias term", "`beta`"]),
        (["--terms", "key"], ["--terms key", "cannot learn"]),
        (["--terms-match", "fuzzy"], ["--terms-match", "`fuzzy`"]),
        (["--method", "lora"], ["lora", "bitfit"]),
        (["--schedule", "cosine"], ["--schedule", "`cosine`"]),
        (["--keep", "first"], ["--keep", "`first`"]),
        (["--random-count", "5"], ["--random-count", "random"]),
        (["--threads", "0"], ["--threads", "found 0"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
    ] {
        place.refuses(2, &args, &words);
    }
    place.refuses(1, &["--device", "cuda:99"], &["--device cpu"]);
    place.refuses(2, &["--device", "tpu"], &["--device", "`tpu`"]);
}

#[test]
fn tables_that_cannot_be_used_are_refused_with_their_line() {
    let place = place();
    place.refuses_table("a.csv", "text,label\na b,x\nc,d,y\n", &[], &["a.csv:3"]);
    place.refuses_table("b.csv", b"text,label\na b,x\n\xff\xfe,y\n", &[], &["b.csv:3", "UTF-8"]);
    place.refuses_table("c.csv", "", &[], &["c.csv", "empty"]);
    place.refuses_table("d.csv", "text,label\n", &[], &["d.csv"]);
    place.refuses_table("e.csv", "text,label\na,x\n  ,y\n", &[], &["e.csv:3", "empty"]);
    place.refuses_table("f.csv", "text,label\na,x\nb,x\nc,x\nd,y\n", &[], &["`y`", "one example"]);
    place.refuses_table("g.csv", "text,label\na,x\nb,x\n", &[], &["g.csv"]);
    place.refuses_table("h.csv", "text,label\na,0.5\nb,1.5\n", &[], &["--regression"]);
    place.refuses_table("i.jsonl", "{\"text\": \"a\", \"label\": 1}\n[1]\n", &[], &["i.jsonl:2"]);
    place.refuses_table("j.csv", table(20), &["--label-column", "class"], &["class", "label"]);
    place.refuses_table("k.xlsx", "x", &[], &[".csv"]);
    place.refuses_table("l.csv", pairs(20), &["--text-pair-column", "other", "--regression"], &["other", "text_pair"]);
    let dev = write(place.folder.path(), "dev.csv", "text,label\na,good\nb,other\n");
    place.refuses(1, &["--dev", dev.to_str().unwrap()], &["dev.csv:3", "other"]);
    let missing = place.folder.path().join("none.csv");
    train(&missing, &place.out, &[]).refused(1, &["none.csv"]);
    assert!(!place.out.exists());
}

fn glue(place: &Place, args: &[&str]) -> Answer {
    bitfit().arg("train").arg("--out").arg(&place.out).args(args).output().unwrap().into()
}

#[test]
fn glue_that_is_unknown_or_not_there_is_named() {
    let place = place();
    let dir = place.folder.path().to_str().unwrap();
    glue(&place, &["--task", "mrcp", "--data", dir]).refused(2, &["`mrcp`", "mrpc", "sst2"]);
    glue(&place, &["--task", "mrpc"]).refused(2, &["--data DIR", "train.tsv", "dev.tsv", "DIR/MRPC/"]);
    glue(&place, &["--task", "mrpc", "--data", dir]).refused(1, &["train.tsv", "MRPC"]);
    fs::create_dir(place.folder.path().join("RTE")).unwrap();
    let header = "index\tsentence1\tsentence2\tlabel\n";
    for (name, row, words) in [
        ("wrong columns", "0\ta\tb\n", ["train.tsv:2", "4 fields"]),
        ("a wrong label", "0\ta\tb\tmaybe\n", ["train.tsv:2", "`maybe`"]),
    ] {
        write(&place.folder.path().join("RTE"), "train.tsv", format!("{header}{row}"));
        let answer = glue(&place, &["--task", "rte", "--data", dir]);
        answer.refused(1, &words);
        assert!(!place.out.exists(), "{name}");
    }
    glue(&place, &[]).refused(2, &["--task", "--train"]);
}

#[test]
fn a_base_that_is_missing_or_damaged_is_refused() {
    let place = place();
    let with = |base: &Path| train(&place.rows, &place.out, &["--base", base.to_str().unwrap()]);
    let missing = place.folder.path().join("nowhere");
    let answer = with(&missing);
    assert!(matches!(answer.code, Some(1 | 2)) && answer.err.contains("nowhere"), "{answer:?}");
    let without = place.base(|base| fs::remove_file(base.join("model.safetensors")).unwrap());
    with(&without).refused(1, &["model.safetensors"]);
    let cut = place.base(|base| {
        let bytes = fs::read(base.join("model.safetensors")).unwrap();
        fs::write(base.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    });
    with(&cut).refused(1, &["model.safetensors"]);
    let other = place.base(|base| {
        let text = fs::read_to_string(base.join("config.json")).unwrap();
        fs::write(base.join("config.json"), text.replace("\"intermediate_size\": 64", "\"intermediate_size\": 48"))
            .unwrap();
    });
    with(&other).refused(1, &["intermediate.dense", "48"]);
    let foreign = place.base(|base| {
        let text = fs::read_to_string(base.join("config.json")).unwrap();
        fs::write(base.join("config.json"), text.replace("\"bert\"", "\"gpt2\"").replace("BertModel", "GPT2Model"))
            .unwrap();
    });
    let answer = with(&foreign);
    assert!(answer.code != Some(0) && answer.err.contains("bert"), "{answer:?}");
    assert!(!place.out.exists());
}

#[test]
fn a_file_in_the_runs_place_is_refused() {
    let place = place();
    write(place.folder.path(), "run", "a file");
    train(&place.rows, &place.out, &[]).refused(2, &["--out"]);
    assert_eq!(fs::read_to_string(&place.out).unwrap(), "a file");
}

#[test]
fn a_run_that_diverges_says_where_and_leaves_nothing() {
    let place = place();
    // Values whose squares are beyond f32.
    let text: String =
        std::iter::once("text,label\n".to_string())
            .chain((0..20).map(|i: u32| {
                format!("the movie was good {i},{}\n", if i.is_multiple_of(2) { "3e38" } else { "-3e38" })
            }))
            .collect();
    let path = write(place.folder.path(), "huge.csv", text);
    train(&path, &place.out, &["--regression"]).refused(1, &["the training diverged", "at step 1", "--learning-rate"]);
    assert!(!place.out.exists());
}

#[cfg(unix)]
#[test]
fn no_space_left_leaves_nothing_half_written() {
    let place = place();
    // A limit on the size of files stands in for a full disk: the system refuses the bytes beyond it.
    let script = "trap '' XFSZ; ulimit -f 4; exec \"$@\"";
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script, "bash", env!("CARGO_BIN_EXE_bitfit"), "train", "--epochs", "1"]);
    command.arg("--base").arg(tiny()).arg("--train").arg(&place.rows).arg("--out").arg(&place.out);
    let answer: Answer = command.output().unwrap().into();
    answer.refused(1, &["cannot write", "epoch-1.safetensors"]);
    assert!(!place.out.exists(), "{:?}", fs::read_dir(&place.out).map(|d| d.flatten().collect::<Vec<_>>()));
}

/// A trained patch of one text.
fn patch(place: &Place) -> PathBuf {
    train(&place.rows, &place.out, &["--epochs", "1"]).ok();
    place.out.join("patch.safetensors")
}

#[test]
fn eval_refuses_what_does_not_fit_the_patch() {
    let place = place();
    let file = patch(&place);
    let (file, rows) = (file.to_str().unwrap(), place.rows.to_str().unwrap());
    let eval = |args: &[&str]| run(["eval", "--patch", file].iter().chain(args));
    eval(&["--data", "."]).refused(2, &["`films` is no task of GLUE", "--input"]);
    eval(&[]).refused(2, &["--data", "--input"]);
    eval(&["--input", rows, "--text-pair-column", "text"]).refused(2, &["films", "one text"]);
    let other = write(place.folder.path(), "other.csv", "text,label\na,good\nb,fine\n");
    eval(&["--input", other.to_str().unwrap()]).refused(1, &["other.csv:3", "fine"]);

    let two = write(place.folder.path(), "pairs.csv", pairs(40));
    let out = place.folder.path().join("two");
    train(&two, &out, &["--epochs", "1", "--regression", "--text-pair-column", "text_pair"]).ok();
    let two_patch = out.join("patch.safetensors");
    // The second text has the name that `predict` takes too; a table without it lists what it has.
    run(["eval", "--patch", two_patch.to_str().unwrap(), "--input", two.to_str().unwrap()]).ok();
    run(["eval", "--patch", two_patch.to_str().unwrap(), "--input", rows]).refused(1, &["`text_pair`", "text"]);
    run(["eval", "--patch", file, "--data", ".", "--label-column", "x"]).refused(2, &["--label-column goes with"]);
}

#[test]
fn eval_refuses_a_damaged_patch_and_one_for_another_base() {
    let place = place();
    let file = patch(&place);
    let rows = place.rows.to_str().unwrap();
    let bytes = fs::read(&file).unwrap();
    let eval = |bytes: &[u8], base: &Path| {
        let path = write(place.folder.path(), "other.safetensors", bytes);
        run(["eval", "--patch", path.to_str().unwrap(), "--input", rows, "--base", base.to_str().unwrap()])
    };
    eval(&bytes, &tiny()).ok();
    eval(&bytes[..bytes.len() - 5], &tiny()).refused(1, &["other.safetensors"]);
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    eval(&flipped, &tiny()).refused(1, &["other.safetensors"]);
    let label = bytes.windows(4).position(|w| w == b"good").unwrap();
    let mut renamed = bytes.clone();
    renamed[label] = b'f';
    eval(&renamed, &tiny()).refused(1, &["other.safetensors"]);

    let another = place.base(|base| {
        let mut weights = fs::read(base.join("model.safetensors")).unwrap();
        let at = weights.len() - 2;
        weights[at] ^= 1;
        fs::write(base.join("model.safetensors"), weights).unwrap();
    });
    eval(&bytes, &another).refused(1, &["was made for base"]);
}
