//! Load a patch into transformers with the lines of the README and with `examples/load_patch.py`, and a merged folder
//! too: both give this crate's logits.
//!
//! Needs Python with torch and transformers: `$BITFIT_PYTHON`, else `python3`. Where these are missing, the test says
//! so and passes.

mod tiny_base;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use bitfit::base::Base;
use bitfit::base::problem::Problem;
use bitfit::device::Placement;
use bitfit::device::batch::{Batch, DropoutKey};
use bitfit::encoder::Encoder;
use bitfit::patch::{Dtype, Patch, merge};
use tiny_base::{folder, patch, two};

/// What both sides answer: one token, upper case, and a text that the patch's maximum length cuts.
const TEXTS: [&str; 3] =
    ["a", "Bcd Ef", "x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x"];

/// Holds the model of `load_patch` against the merged folder's tensors, which this crate added up, and the logits that
/// transformers computes from either against this crate's.
const COMPARE: &str = r#"
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from load_patch import load_patch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, path, merged, labels, texts, logits = sys.argv[2:]
model, metadata = load_patch(base, path)
expected = load_file(merged + "/model.safetensors")
state = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
for name, tensor in expected.items():
    assert torch.equal(state[name], tensor), name
again = AutoModelForSequenceClassification.from_pretrained(merged).eval()
assert again.dtype == torch.float32, again.dtype
tokenizer = AutoTokenizer.from_pretrained(merged)
assert tokenizer.tokenize("Ab") == ['A', '##b'], tokenizer.tokenize("Ab")
batch = tokenizer(json.loads(texts), padding=True, truncation=True, return_tensors="pt")
assert batch["input_ids"].shape[1] == int(metadata["max_length"]), batch["input_ids"].shape
with torch.no_grad():
    a, b = model(**batch).logits, again(**batch).logits
assert torch.allclose(a, b, rtol=0, atol=1e-6), (a, b)  # equal tensors; sums may run in another order
ours = torch.tensor(json.loads(logits))
assert ours.shape == b.shape, (ours.shape, b.shape)
assert (ours - b).abs().max() < 1e-4, (ours, b)
if labels:
    assert ",".join(again.config.id2label[i] for i in range(again.config.num_labels)) == labels
else:
    assert again.config.num_labels == 1 and again.config.problem_type == "regression"
"#;

#[test]
fn ten_lines_of_python_load_a_patch_into_transformers() {
    let python = std::env::var("BITFIT_PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = Command::new(&python).args(["-c", "import torch, transformers, safetensors"]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        println!("skipped: `{python}` has no torch and transformers; name one that has with BITFIT_PYTHON");
        return;
    }
    let lines = tempfile::tempdir().unwrap();
    std::fs::write(lines.path().join("load_patch.py"), readme_lines()).unwrap();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for (lines, has_pooler, spec, dtype) in [
        (lines.path(), true, "bitfit", Dtype::F32),
        (&*example, true, "bitfit", Dtype::F32),
        (&*example, true, "random count=500 seed=2", Dtype::F32),
        (&*example, true, "bitfit", Dtype::F16),
        (&*example, false, "bitfit terms=query,intermediate", Dtype::F32),
    ] {
        let place = tempfile::tempdir().unwrap();
        let base = folder(place.path(), has_pooler);
        let problem = if spec.starts_with("random") { Problem::Value } else { two() };
        let labels = if problem == two() { "consonant,vowel" } else { "" };
        let (file, merged) = (place.path().join("patch.safetensors"), place.path().join("merged"));
        patch(&base, spec, problem).save(&file, dtype).unwrap();
        let patch = Patch::load(&file).unwrap();
        merge::merge(&patch, &base, &merged).unwrap();
        let run = Command::new(&python)
            .args(["-c", COMPARE])
            .args([lines, place.path(), &file, &merged])
            .arg(labels)
            .arg(serde_json::to_string(&TEXTS).unwrap())
            .arg(serde_json::to_string(&logits(&base, &patch)).unwrap())
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        assert!(run.status.success(), "{spec}: {}", String::from_utf8_lossy(&run.stderr));
    }
}

/// This crate's logits of [`TEXTS`]. No two texts have the same, so that a model which ignores its input is found out.
fn logits(base: &Base, patch: &Patch) -> Vec<Vec<f32>> {
    let encoder = Encoder::new(base, Placement { n_threads: 1, ..Placement::default() }).unwrap();
    let task = encoder.attach(patch.delta()).unwrap();
    let mut batch = Batch::new();
    for text in TEXTS {
        let encoding = base.tokenizer().unwrap().encode(text, None, patch.metadata().max_length).unwrap();
        batch.push(&encoding.ids, &encoding.type_ids, 0, DropoutKey::default(), None);
    }
    let logits = encoder.forward(&Arc::new(batch), &[Some(task)]).unwrap();
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        let apart = logits[a].iter().zip(&logits[b]).any(|(x, y)| (x - y).abs() > 1e-3);
        assert!(apart, "texts {a} and {b} have the same logits: {logits:?}");
    }
    logits
}

/// The README's lines of Python.
fn readme_lines() -> &'static str {
    let readme = include_str!("../README.md");
    let block = readme.split_once("```python\n").and_then(|(_, after)| after.split_once("```"));
    block.expect("a block of Python in the README").0
}
