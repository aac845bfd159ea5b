//! Look into a patch, check it, take it out of a run, merge it: through the real binary.

#[path = "common/command.rs"]
mod command;

use std::fs;
use std::path::Path;

use bitfit::base::Base;
use bitfit::patch::Patch;
use command::{patch, run, table, tiny, train, write};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_run_is_inspected_verified_exported_and_merged() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    let rows = write(at, "films.csv", table(80));
    let out = at.join("films");
    train(&rows, &out, &["--epochs", "3"]).ok();
    let file = out.join("patch.safetensors");

    let shown = run(["patch", "inspect", text(&file)]).ok().out;
    for words in ["films", "bad, good", "bitfit/tiny-bert-for-tests", "accuracy", "pooler.dense.bias [32]"] {
        assert!(shown.contains(words), "`{words}` is not in: {shown}");
    }
    let found: Value = serde_json::from_str(&run(["patch", "inspect", text(&file), "--json"]).ok().out).unwrap();
    assert_eq!(found["patch"], Patch::load(&file).unwrap().content_hash());
    assert_eq!((&found["texts"], &found["labels"][1]), (&1.into(), &"good".into()));

    let base = tiny();
    assert!(run(["patch", "verify", text(&file), "--base", text(&base)]).ok().out.contains("whole"));

    let export = |epoch: &str, dtype: &str, to: &Path| {
        run(["patch", "export", text(&out), "--epoch", epoch, "--dtype", dtype, "-o", text(to)])
    };
    let to = at.join("out.safetensors");
    for epoch in [1, 2, 3] {
        let to = at.join(format!("epoch-{epoch}"));
        export(&epoch.to_string(), "f32", &to).ok();
        assert_eq!(
            fs::read(&to).unwrap(),
            fs::read(out.join(format!("checkpoint/epoch-{epoch}.safetensors"))).unwrap()
        );
    }
    export("last", "f32", &to).ok();
    assert_eq!(Patch::load(&to).unwrap().metadata().epoch, 3);
    export("last", "f32", &to).refused(2, &["--overwrite"]);
    // `--keep best` is the default, so the run's own patch is its best epoch's, value for value.
    let best = at.join("best.safetensors");
    export("best", "f32", &best).ok();
    assert_eq!(fs::read(&best).unwrap(), patch(&out));
    let half = at.join("half.safetensors");
    export("best", "f16", &half).ok();
    assert!(fs::metadata(&half).unwrap().len() < fs::metadata(&best).unwrap().len() * 3 / 4);
    export("4", "f32", &at.join("no")).refused(2, &["1, 2, 3", "found 4"]);
    export("first", "f32", &at.join("no")).refused(2, &["best or last"]);
    export("1", "f64", &at.join("no")).refused(2, &["f32 or f16"]);
    run(["patch", "export", text(at), "-o", text(&at.join("no"))]).refused(1, &["patch.safetensors"]);
    assert!(!at.join("no").exists());

    let merged = at.join("merged");
    run(["patch", "merge", text(&file), "--base", text(&base), "-o", text(&merged)]).ok();
    let config: Value = serde_json::from_slice(&fs::read(merged.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["architectures"][0], &config["id2label"]["1"]),
        (&"BertForSequenceClassification".into(), &"good".into())
    );
    // What was merged is a base again, of other values.
    let again = Base::from_folder(&merged).unwrap();
    assert_ne!(again.fingerprint(), Base::from_folder(&base).unwrap().fingerprint());
    run(["patch", "merge", text(&file), "--base", text(&base), "-o", text(&merged)]).refused(2, &["merged"]);
}

#[test]
fn files_that_are_no_patches_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let missing = place.path().join("missing");
    run(["patch", "inspect", text(&missing)]).refused(1, &["missing"]);
    let file = write(place.path(), "text.safetensors", "not a patch at all");
    run(["patch", "inspect", text(&file)]).refused(1, &["text.safetensors"]);
    let base = tiny().join("model.safetensors");
    run(["patch", "verify", text(&base), "--base", text(&tiny())]).refused(1, &["model.safetensors"]);
}

/// A full device on Linux: every write to it fails.
#[cfg(target_os = "linux")]
#[test]
fn an_output_that_cannot_be_written_is_an_error_and_no_panic() {
    let place = tempfile::tempdir().unwrap();
    let rows = write(place.path(), "films.csv", table(40));
    let out = place.path().join("films");
    train(&rows, &out, &["--epochs", "1"]).ok();
    let file = out.join("patch.safetensors");
    for more in [&["inspect", text(&file)][..], &["inspect", text(&file), "--json"], &["verify", text(&file)]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = command::bitfit().arg("patch").args(more).stdout(full).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{more:?}: {message}");
        assert!(message.contains("standard output") && !message.contains("panicked"), "{message}");
    }
}
