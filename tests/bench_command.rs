//! Measure a step with `bitfit bench`, through the real binary, on a tiny base.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny");
    let size = ["--batch", "3", "--length", "9", "--steps", "2", "--threads", "1"];
    Command::new(env!("CARGO_BIN_EXE_bitfit")).args(["bench", "--shape", tiny]).args(size).args(args).output().unwrap()
}

#[test]
fn every_method_is_measured_and_told_in_one_line_of_json() {
    for method in ["bitfit", "full", "frozen", "random", "forward"] {
        let output = bench(&["--method", method, "--json"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{method}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.lines().count(), 1, "{method}: {text}");
        let found: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&found["method"], &found["batch"], &found["length"]), (&method.into(), &3.into(), &9.into()));
        for key in ["step_s", "tokens_per_s", "gflops"] {
            assert!(found[key].as_f64().unwrap() > 0.0, "{method}: {key} {}", found[key]);
        }
        for key in ["model_mb", "peak_mb", "peak_over_model_mb"] {
            assert!(found[key].as_f64().unwrap() >= 0.0, "{method}: {key} {}", found[key]);
        }
    }
}

#[test]
fn a_part_of_the_biases_is_measured_and_shown_in_words() {
    let output = bench(&["--terms", "query,intermediate", "--layers", "1..2"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("tokens a second"), "{text}");
}

#[test]
fn every_precision_is_measured_and_several_counts_of_tasks_in_turn() {
    for (method, precision) in [("bitfit", "bf16"), ("full", "bf16"), ("forward", "bf16"), ("forward", "int8")] {
        let output = bench(&["--method", method, "--precision", precision, "--tasks", "1,3", "--json"]);
        if method == "full" {
            let text = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && text.contains("alone"), "{text}");
            continue;
        }
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["precision"], precision);
        let tasks = found["tasks"].as_array().unwrap();
        assert_eq!((&tasks[0]["tasks"], &tasks[0]["ratio"], &tasks[1]["tasks"]), (&1.into(), &1.0.into(), &3.into()));
        assert!(tasks[1]["ratio"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn wrong_uses_are_refused_with_what_is_known() {
    for (args, message) in [
        (&["--method", "lora"][..], "bitfit, full, frozen, random or forward"),
        (&["--method", "forward", "--terms", "query"], "--terms goes with a --method that trains"),
        (&["--terms", "key"], "key"),
        (&["--terms", "bias"], "one of embeddings_layernorm"),
        (&["--layers", "1..5"], "layer"),
        (&["--dropout", "1.5"], "--dropout"),
        (&["--precision", "fp16"], "f32, tf32, bf16 or int8"),
        (&["--precision", "int8"], "int8 goes with --method forward"),
        (&["--tasks", "4"], "--tasks"),
        (&["--device", "cuda:99"], "--device cpu"),
        (&["--device", "cuda", "--precision", "int8", "--method", "forward"], "int8 is of the CPU"),
        (&["--precision", "tf32"], "tf32 is of CUDA devices"),
    ] {
        let output = bench(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}");
        assert!(text.contains(message) && text.lines().count() == 1, "{args:?}: {text}");
    }
    let mut forced = Command::new(env!("CARGO_BIN_EXE_bitfit"));
    let output = forced.args(["bench", "--steps", "1"]).env("BITFIT_CPU", "z80").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && text.contains("BITFIT_CPU: expected portable"), "{text}");
    let output = Command::new(env!("CARGO_BIN_EXE_bitfit")).args(["bench", "--batch", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
