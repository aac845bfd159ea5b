//! The encoder against PyTorch and transformers in f64 (`scripts/golden_encoder.py`, dropout off): hidden states,
//! logits, losses, every gradient, and whole trajectories of AdamW.
//!
//! Hidden states and logits are compared by the largest absolute difference, gradients by the norm of the difference
//! over the norm.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitfit::base::delta::{Delta, Head, Request};
use bitfit::base::parameters::Role;
use bitfit::base::{Base, Config, config::Activation, spec};
use bitfit::device::batch::{Batch, DropoutKey, Target};
use bitfit::device::cpu::Arch;
use bitfit::device::ops::Dropout;
use bitfit::device::{Placement, PrecisionName};
use bitfit::encoder::{Encoder, Rule, Run, Training};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Hidden states, logits and losses: largest absolute difference.
const STATES: f64 = 1e-5;
/// Gradients and trained values: norm of the difference over the norm.
const GRADIENTS: f64 = 1e-4;
/// Gradients in bf16 against f32's: a tensor's, and all together.
const BF16_TENSOR: f64 = 5e-2;
const BF16_ALL: f64 = 2e-2;
/// The losses of 20 steps of AdamW.
const LOSSES: f64 = 1e-4;
/// The losses of 100 steps of MRPC.
const LOSSES_OF_MRPC: f64 = 1e-3;
/// The key bias's gradient, which is zero, over the query bias's.
const KEY: f64 = 1e-6;

/// One folder of golden files.
struct Golden {
    cases: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let folder = golden_path(name);
        let cases = std::fs::read_to_string(folder.join("cases.json")).unwrap();
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        Golden { cases: serde_json::from_str(&cases).unwrap(), bytes }
    }

    fn names(&self, prefix: &str) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let mut names: Vec<_> = tensors.names().into_iter().filter_map(|n| n.strip_prefix(prefix)).collect();
        names.sort_unstable();
        names.into_iter().map(str::to_string).collect()
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let t = tensors.tensor(name).unwrap();
        match t.dtype() {
            Dtype::F32 => t.data().as_chunks().0.iter().map(|b: &[u8; 4]| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::F64 => t.data().as_chunks().0.iter().map(|b: &[u8; 8]| f64::from_le_bytes(*b)).collect(),
            Dtype::I64 => t.data().as_chunks().0.iter().map(|b: &[u8; 8]| i64::from_le_bytes(*b) as f64).collect(),
            other => panic!("{name} has dtype {other:?}"),
        }
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.numbers(name).into_iter().map(|x| x as f32).collect()
    }

    fn positions(&self, name: &str) -> Vec<u64> {
        self.numbers(name).into_iter().map(|x| x as u64).collect()
    }

    fn head(&self, prefix: &str) -> Head {
        let (weight, bias) = (self.f32s(&format!("{prefix}weight")), self.f32s(&format!("{prefix}bias")));
        Head { n_outputs: bias.len(), weight, bias, pooler: None }
    }

    /// The sequences of a case as a batch of one group; values or classes as targets.
    fn batch(&self, sequences: &Value, target: &str) -> Arc<Batch> {
        let mut batch = Batch::new();
        for s in sequences.as_array().unwrap() {
            let ints = |key: &str| numbers(&s[key]).into_iter().map(|x| x as u32).collect::<Vec<_>>();
            let target = match target {
                "value" => Target::Value(s["value"].as_f64().unwrap() as f32),
                _ => Target::Class(s["class"].as_u64().unwrap() as u32),
            };
            batch.push(&ints("ids"), &ints("type_ids"), 0, DropoutKey::default(), Some(target));
        }
        Arc::new(batch)
    }
}

fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn tiny() -> Base {
    Base::from_folder(&golden_path("tiny")).unwrap()
}

fn minilm() -> Base {
    let folder = spec::default_folder().expect("a home folder");
    Base::from_folder(&folder).expect("the default base; scripts/fetch-base.sh brings it")
}

fn encoder(base: &Base) -> Encoder {
    Encoder::new(base, Placement { n_threads: 2, ..Placement::default() }).unwrap()
}

fn close(what: &str, ours: &[f32], golden: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), golden.len(), "{what}");
    let worst = ours.iter().zip(golden).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "{what}: largest difference {worst:.1e}, allowed {tolerance:.0e}");
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

fn close_by_norm(what: &str, ours: &[f32], golden: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), golden.len(), "{what}");
    let difference = norm(ours.iter().zip(golden).map(|(a, b)| f64::from(*a) - b));
    let error = difference / norm(golden.iter().copied()).max(1e-12);
    assert!(error <= tolerance, "{what}: relative difference {error:.1e}, allowed {tolerance:.0e}");
}

fn requests(base: &Base, of: impl Fn(Role) -> bool) -> BTreeMap<String, Request> {
    base.parameters().iter().filter(|p| of(p.role)).map(|p| (p.name.clone(), Request::Dense)).collect()
}

fn is_bias(role: Role) -> bool {
    matches!(role, Role::Bias(_))
}

fn trainer(encoder: &Encoder, requests: BTreeMap<String, Request>, head: Head) -> Box<dyn Training> {
    encoder.trainer(&[Run { requests, start: Delta { changes: BTreeMap::new(), head } }]).unwrap()
}

/// Every gradient of a case; those of key biases against the query's.
fn gradients_agree(golden: &Golden, prefix: &str, ours: &BTreeMap<String, Vec<f32>>) {
    let names = golden.names(prefix);
    assert!(!names.is_empty());
    for name in names {
        let gradient = &ours[&name];
        match name.strip_suffix("key.bias") {
            Some(stem) => {
                let query = norm(ours[&format!("{stem}query.bias")].iter().map(|x| f64::from(*x)));
                let key = norm(gradient.iter().map(|x| f64::from(*x)));
                assert!(key <= KEY * query, "{name}: {key:e} against the query's {query:e}");
            }
            None => {
                close_by_norm(&name, gradient, &golden.numbers(&format!("{prefix}{name}")), GRADIENTS);
            }
        }
    }
}

#[test]
fn hidden_states_of_a_tiny_bert_agree_layer_by_layer() {
    let (golden, encoder) = (Golden::read("tiny"), encoder(&tiny()));
    let batch = golden.batch(&golden.cases["sequences"], "class");
    let states = encoder.hidden_states(&batch, &[None]).unwrap();
    assert_eq!(states.len(), 3);
    for (l, state) in states.iter().enumerate() {
        let name = format!("hidden_states.{l}");
        let state: Vec<f32> = state.flatten_all().unwrap().to_vec1().unwrap();
        close(&name, &state, &golden.numbers(&name), STATES);
    }
    let pooled: Vec<f32> = encoder.pooled(&batch, &[None]).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    close("pooled", &pooled, &golden.numbers("pooled"), STATES);
}

#[test]
fn logits_losses_and_bias_gradients_of_a_tiny_bert_agree_for_every_activation_and_problem() {
    let (golden, base) = (Golden::read("tiny"), tiny());
    for (case, activation) in [
        ("classification", Activation::Gelu),
        ("regression", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("relu", Activation::Relu),
    ] {
        let config = Config { hidden_act: activation, ..base.config().clone() };
        let tensors = base.parameters().iter().map(|p| (p.name.clone(), base.tensor(&p.name).unwrap())).collect();
        let encoder = encoder(&Base::in_memory("test/tiny", config, None, tensors).unwrap());
        let (head, target) = match case {
            "regression" => ("head.regression.", "value"),
            _ => ("head.classification.", "class"),
        };
        let head = golden.head(head);
        let batch = golden.batch(&golden.cases["sequences"], target);

        let task = encoder.attach(&Delta { changes: BTreeMap::new(), head: head.clone() }).unwrap();
        let logits = encoder.forward(&batch, &[Some(task)]).unwrap().concat();
        close(&format!("{case} logits"), &logits, &golden.numbers(&format!("{case}.logits")), STATES);

        let mut trainer = trainer(&encoder, requests(&base, is_bias), head);
        let loss = trainer.accumulate(&[batch], Dropout::NONE).unwrap();
        close(&format!("{case} loss"), &[loss[0] as f32], &[golden.cases[case]["loss"].as_f64().unwrap()], STATES);
        let ours = trainer.gradients(0);
        let prefix = format!("{case}.grad.");
        let of_biases: BTreeMap<_, _> = ours.into_iter().collect();
        let names = golden.names(&prefix);
        let biases: Vec<_> = names.iter().filter(|n| of_biases.contains_key(*n)).collect();
        assert_eq!(biases.len(), of_biases.len(), "{case}");
        for name in biases.into_iter().filter(|n| !n.ends_with("key.bias")) {
            let golden = golden.numbers(&format!("{prefix}{name}"));
            close_by_norm(&format!("{case} {name}"), &of_biases[name], &golden, GRADIENTS);
        }
    }
}

#[test]
fn every_gradient_of_a_tiny_bert_agrees() {
    let (golden, base) = (Golden::read("tiny"), tiny());
    let batch = golden.batch(&golden.cases["sequences"], "class");
    let head = golden.head("head.classification.");
    let mut trainer = trainer(&encoder(&base), requests(&base, |_| true), head);
    trainer.accumulate(&[batch], Dropout::NONE).unwrap();
    let ours = trainer.gradients(0);
    assert_eq!(ours.len(), base.parameters().len() + 2);
    gradients_agree(&golden, "classification.grad.", &ours);
}

/// Trains as a record says and holds the losses and gradient norms to it.
fn trajectory_agrees(
    what: &str,
    record: &Value,
    trainer: &mut dyn Training,
    of_step: impl Fn(usize) -> Arc<Batch>,
    tolerance: f64,
) {
    let rates = numbers(&record["learning_rates"]);
    for (i, rate) in rates.iter().enumerate() {
        let rule = Rule {
            learning_rate: *rate,
            head_learning_rate: *rate,
            betas: (0.9, 0.999),
            epsilon: record["epsilon"].as_f64().unwrap(),
            weight_decay: record["weight_decay"].as_f64().unwrap(),
            decay_biases: true,
            max_grad_norm: record["max_grad_norm"].as_f64().unwrap(),
        };
        let report = trainer.step(&[of_step(i)], Dropout::NONE, &[Some(rule)]).unwrap()[0];
        let (loss, norm) = (record["losses"][i].as_f64().unwrap(), record["grad_norms"][i].as_f64().unwrap());
        let (loss_error, norm_error) = ((report.loss - loss).abs(), (report.grad_norm / norm - 1.0).abs());
        assert!(loss_error <= tolerance, "{what}: loss of step {i}: {} against {loss}", report.loss);
        assert!(norm_error <= 100.0 * tolerance, "{what}: norm of step {i}: {} against {norm}", report.grad_norm);
    }
    assert_eq!(rates.len(), record["losses"].as_array().unwrap().len());
}

#[test]
fn twenty_steps_of_adamw_on_a_tiny_bert_follow_the_same_losses_to_the_same_values() {
    let (golden, base) = (Golden::read("tiny"), tiny());
    let encoder = encoder(&base);
    let training = &golden.cases["training"];
    for (name, record) in training["runs"].as_object().unwrap() {
        let (problem, target) = match record["problem"].as_str().unwrap() {
            "regression" => ("head.regression.", "value"),
            _ => ("head.classification.", "class"),
        };
        let requests = match record["method"].as_str().unwrap() {
            "frozen" => BTreeMap::new(),
            "full" => requests(&base, |_| true),
            "random" => {
                let prefix = format!("train.{name}.indices.");
                let entries = |n: &String| Request::Entries(golden.positions(&format!("{prefix}{n}")));
                golden.names(&prefix).into_iter().map(|n| (n.clone(), entries(&n))).collect()
            }
            _ => requests(&base, is_bias),
        };
        let mut trainer = trainer(&encoder, requests.clone(), golden.head(problem));
        let batches: Vec<_> = training["batches"].as_array().unwrap().iter().map(|b| golden.batch(b, target)).collect();
        trajectory_agrees(name, record, &mut *trainer, |i| batches[i % batches.len()].clone(), LOSSES);

        let delta = trainer.delta(0);
        let prefix = format!("train.{name}.final.");
        for tensor in golden.names(&prefix).into_iter().filter(|n| !n.ends_with("key.bias")) {
            let expected = golden.numbers(&format!("{prefix}{tensor}"));
            let ours = match tensor.as_str() {
                "classifier.weight" => delta.head.weight.clone(),
                "classifier.bias" => delta.head.bias.clone(),
                _ => in_use(&base, &tensor, &delta),
            };
            close_by_norm(&format!("{name} {tensor}"), &ours, &expected, 1e-3);
        }
    }
}

/// base + difference of one tensor; of sampled entries, those alone.
fn in_use(base: &Base, name: &str, delta: &Delta) -> Vec<f32> {
    use bitfit::base::delta::Change;
    let values = base.tensor(name).unwrap();
    match &delta.changes[name] {
        Change::Dense(delta) => values.iter().zip(delta).map(|(v, d)| v + d).collect(),
        Change::Sparse { indices, values: delta } => {
            indices.iter().zip(delta).map(|(i, d)| values[*i as usize] + d).collect()
        }
    }
}

#[test]
fn minilm_agrees_on_real_sentences() {
    let (golden, base) = (Golden::read("minilm"), minilm());
    let encoder = encoder(&base);
    let h = base.config().hidden_size;
    let tokenizer = base.tokenizer().unwrap();
    for s in golden.cases["sequences"].as_array().unwrap() {
        let encoding = tokenizer.encode(s["text"].as_str().unwrap(), s["text_pair"].as_str(), 128).unwrap();
        assert_eq!(encoding.ids, numbers(&s["ids"]).into_iter().map(|x| x as u32).collect::<Vec<_>>());
    }
    let batch = golden.batch(&golden.cases["sequences"], "class");
    let states = encoder.hidden_states(&batch, &[None]).unwrap();
    for l in [0, 6] {
        let state: Vec<f32> = states[l].flatten_all().unwrap().to_vec1().unwrap();
        for s in numbers(&golden.cases["whole"]) {
            let rows = batch.tokens_of(s as usize);
            let name = format!("hidden_states.{l}.sequence.{s}");
            close(&name, &state[rows.start * h..rows.end * h], &golden.numbers(&name), STATES);
        }
    }
    let last: Vec<f32> = states[6].flatten_all().unwrap().to_vec1().unwrap();
    let first: Vec<f32> = batch.bounds()[..8].iter().flat_map(|row| last[row * h..][..h].to_vec()).collect();
    close("hidden_states.6.first", &first, &golden.numbers("hidden_states.6.first"), STATES);
    let pooled: Vec<f32> = encoder.pooled(&batch, &[None]).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    close("pooled", &pooled, &golden.numbers("pooled"), STATES);

    let head = golden.head("classifier.");
    let task = encoder.attach(&Delta { changes: BTreeMap::new(), head: head.clone() }).unwrap();
    let logits = encoder.forward(&batch, &[Some(task)]).unwrap().concat();
    close("logits", &logits, &golden.numbers("logits"), STATES);

    let mut biases = trainer(&encoder, requests(&base, is_bias), head.clone());
    let loss = biases.accumulate(std::slice::from_ref(&batch), Dropout::NONE).unwrap()[0];
    close("loss", &[loss as f32], &[golden.cases["loss"].as_f64().unwrap()], STATES);
    gradients_agree(&golden, "grad.", &biases.gradients(0));
    let record = &golden.cases["training"]["runs"]["bitfit"];
    let mut biases = trainer(&encoder, requests(&base, is_bias), head);
    trajectory_agrees("bitfit", record, &mut *biases, |_| batch.clone(), LOSSES);
}

/// The gradients of MiniLM's biases on real sentences in bf16, against f32's. The sentences have one class: where two
/// classes pull against each other, the last layer's sums are a twentieth of their parts, and the cancelling would be
/// measured, not the rounding.
#[test]
fn bf16_keeps_the_gradients_of_minilm() {
    let (golden, base) = (Golden::read("minilm"), minilm());
    let sequences = golden.batch(&golden.cases["sequences"], "class");
    let mut batch = Batch::new();
    for s in 0..sequences.n_sequences() {
        let (rows, key) = (sequences.tokens_of(s), sequences.keys()[s]);
        let types = &sequences.type_ids()[rows.clone()];
        batch.push(&sequences.ids()[rows], types, 0, key, Some(Target::Class(0)));
    }
    let batch = Arc::new(batch);
    let [mut exact, mut rounded] = [PrecisionName::F32, PrecisionName::Bf16].map(|precision| {
        let encoder = Encoder::new(&base, Placement { precision, n_threads: 2, ..Placement::default() }).unwrap();
        let mut biases = trainer(&encoder, requests(&base, is_bias), golden.head("classifier."));
        biases.accumulate(std::slice::from_ref(&batch), Dropout::NONE).unwrap();
        biases.gradients(0)
    });
    let [exact, rounded] = [&mut exact, &mut rounded].map(|all| {
        all.retain(|name, _| !name.ends_with("key.bias"));
        all
    });
    let (mut difference, mut size) = (0.0, 0.0);
    for (name, exact) in exact {
        let exact: Vec<f64> = exact.iter().map(|x| f64::from(*x)).collect();
        close_by_norm(name, &rounded[name], &exact, BF16_TENSOR);
        difference += exact.iter().zip(&rounded[name]).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>();
        size += exact.iter().map(|x| x * x).sum::<f64>();
    }
    let error = (difference / size).sqrt();
    assert!(error <= BF16_ALL, "all biases together: {error:.1e}, allowed {BF16_ALL:.0e}");
}

/// Logits of MiniLM on real sentences in bytes, against f32's: far nearer than two texts are to each other. Without
/// VNNI weights have seven bits, at which the logits were off by 0.13 of the spread (0.07 in eight bits).
#[test]
fn int8_keeps_the_logits_of_minilm() {
    let (golden, base) = (Golden::read("minilm"), minilm());
    let batch = golden.batch(&golden.cases["sequences"], "class");
    let [exact, rounded] = [PrecisionName::F32, PrecisionName::Int8].map(|precision| {
        let encoder = Encoder::new(&base, Placement { precision, n_threads: 2, ..Placement::default() }).unwrap();
        let head = golden.head("classifier.");
        let task = encoder.attach(&Delta { changes: BTreeMap::new(), head }).unwrap();
        encoder.forward(&batch, &[Some(task)]).unwrap()
    });
    let spread = |c: usize| {
        let of_class = || exact.iter().map(|row| row[c]);
        of_class().fold(f32::MIN, f32::max) - of_class().fold(f32::MAX, f32::min)
    };
    let allowed = if ["avx2", "avx512"].contains(&Arch::chosen().unwrap().name()) { 0.2 } else { 0.1 };
    for c in 0..exact[0].len() {
        assert!(rounded.iter().all(|row| row[c].is_finite()), "class {c}");
        let worst = exact.iter().zip(&rounded).map(|(a, b)| (a[c] - b[c]).abs()).fold(0.0, f32::max);
        assert!(worst < allowed * spread(c), "class {c}: off by {worst} where texts spread over {}", spread(c));
    }
}

#[test]
fn whole_and_sampled_gradients_of_minilm_agree() {
    let (golden, base) = (Golden::read("minilm"), minilm());
    let encoder = encoder(&base);
    let batch = golden.batch(&golden.cases["sequences"], "class");
    let head = golden.head("classifier.");

    let mut full = trainer(&encoder, requests(&base, |_| true), head.clone());
    full.accumulate(std::slice::from_ref(&batch), Dropout::NONE).unwrap();
    let gradients = full.gradients(0);
    let norms = golden.cases["grad_norms"].as_object().unwrap();
    assert_eq!(gradients.len(), norms.len());
    let scale = |name: &str| norms[name].as_f64().unwrap();
    for (name, gradient) in gradients.iter().filter(|(name, _)| !name.ends_with("key.bias")) {
        let error = norm(gradient.iter().map(|x| f64::from(*x))) / scale(name) - 1.0;
        assert!(error.abs() <= GRADIENTS, "{name}: its norm is off by {error:.1e}");
        if name.starts_with("classifier") {
            continue;
        }
        let at = golden.positions(&format!("full.indices.{name}"));
        let expected = golden.numbers(&format!("full.values.{name}"));
        let difference = norm(at.iter().zip(&expected).map(|(i, e)| f64::from(gradient[*i as usize]) - e));
        assert!(difference <= GRADIENTS * scale(name), "{name}: {difference:.1e} of {:.1e}", scale(name));
    }
    drop(full);

    let names = golden.names("random.indices.");
    let entries = |n: &String| Request::Entries(golden.positions(&format!("random.indices.{n}")));
    let sampled = names.iter().map(|n| (n.clone(), entries(n))).collect();
    let mut random = trainer(&encoder, sampled, head);
    random.accumulate(&[batch], Dropout::NONE).unwrap();
    let gradients = random.gradients(0);
    for name in names.iter().filter(|n| !n.ends_with("key.bias")) {
        let expected = golden.numbers(&format!("random.values.{name}"));
        let difference = norm(gradients[name].iter().zip(&expected).map(|(a, b)| f64::from(*a) - b));
        assert!(difference <= GRADIENTS * scale(name), "{name}: {difference:.1e} of {:.1e}", scale(name));
    }
}

#[test]
fn a_hundred_steps_of_mrpc_follow_the_same_losses() {
    let Some(glue) = std::env::var_os("BITFIT_GLUE_DIR") else {
        println!("skipped: BITFIT_GLUE_DIR does not name the folder of the GLUE files");
        return;
    };
    let (golden, base) = (Golden::read("minilm"), minilm());
    let record: Value = serde_json::from_slice(&std::fs::read(golden_path("minilm/mrpc.json")).unwrap()).unwrap();
    let (rows, size) = (record["rows"].as_u64().unwrap() as usize, record["batch_size"].as_u64().unwrap() as usize);
    let train = bitfit::data::task("mrpc").unwrap().load(Path::new(&glue), bitfit::data::Split::Train).unwrap();
    let tokenizer = base.tokenizer().unwrap();
    let encoded = bitfit::data::encode(&train.examples[..rows], tokenizer, 128).unwrap();
    let mut hash = Sha256::new();
    let mut batches = Vec::new();
    for sequences in encoded.sequences.chunks(size) {
        let mut batch = Batch::new();
        for s in sequences {
            s.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            batch.push(&s.ids, &s.type_ids, 0, DropoutKey::default(), s.target);
        }
        batches.push(Arc::new(batch));
    }
    let hash: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hash, record["ids_sha256"].as_str().unwrap(), "the same tokens in the same batches");
    let mut trainer = trainer(&encoder(&base), requests(&base, is_bias), golden.head("classifier."));
    trajectory_agrees("mrpc", &record, &mut *trainer, |i| batches[i].clone(), LOSSES_OF_MRPC);
}
