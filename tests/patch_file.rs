//! Write a patch file and read it again; feed it every kind of bad file.
//!
//! The attacks are built by a second writer, straight from `docs/patch-format.md`, and every good file is opened by
//! the crate `safetensors` too.

use std::collections::BTreeMap;
use std::path::Path;

use bitfit::base::Config;
use bitfit::base::delta::{Change, Delta, Head};
use bitfit::base::parameters::parameters;
use bitfit::base::problem::{Problem, Texts};
use bitfit::patch::{Dtype, Metadata, Method, Patch, Pooling, Selection, delta};
use bitfit::{Error, Kind};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn metadata(problem: Problem) -> Metadata {
    Metadata {
        task: "mrpc".into(),
        problem,
        texts: Texts::Two,
        max_length: 32,
        pooling: Pooling::Cls,
        selection: "bitfit".into(),
        base_id: "org/tiny".into(),
        base_fingerprint: "0a".repeat(32),
        tokenizer_fingerprint: "1b".repeat(32),
        training_digest: "2c".repeat(32),
        metrics: [("accuracy".to_string(), 0.8676470588235294), ("f1".to_string(), 1.0)].into(),
        split: "dev".into(),
        epoch: 10,
        content_hash: String::new(),
    }
}

fn two() -> Problem {
    Problem::Classes(vec!["not_equivalent".into(), "equivalent".into()])
}

fn head(config: &Config, problem: &Problem, own_pooler: bool) -> Head {
    let (hidden, n_outputs) = (config.hidden_size, problem.n_outputs());
    let ramp = |n: usize| (0..n).map(|i| (i as f32 - 7.3) / 91.0).collect::<Vec<_>>();
    Head {
        n_outputs,
        weight: ramp(n_outputs * hidden),
        bias: ramp(n_outputs),
        pooler: own_pooler.then(|| (ramp(hidden * hidden), ramp(hidden))),
    }
}

/// A patch of this selection with every value different from zero.
fn patch_of(selection: &Selection, config: &Config, has_pooler: bool, problem: Problem) -> Patch {
    let requests = selection.resolve(config, has_pooler).unwrap();
    let table = parameters(config, has_pooler);
    let mut values = delta::zeros(&requests, &table, head(config, &problem, !has_pooler));
    for (n, change) in values.changes.values_mut().enumerate() {
        let (Change::Dense(values) | Change::Sparse { values, .. }) = change;
        values.iter_mut().enumerate().for_each(|(i, v)| *v = (n as f32 + 1.0) * 1e-3 - i as f32 * 1e-5);
    }
    let metadata = Metadata { selection: selection.spec(), ..metadata(problem) };
    Patch::new(metadata, values, config, has_pooler).unwrap()
}

/// One bias and a head of one output: small enough to attack at every byte.
fn small() -> Patch {
    let config = Config { hidden_size: 4, num_attention_heads: 1, ..Config::tiny() };
    let values = Delta {
        changes: [("pooler.dense.bias".to_string(), Change::Dense(vec![0.25, -0.5, 1e-8, 3.0]))].into(),
        head: head(&config, &two(), false),
    };
    Patch::new(metadata(two()), values, &config, true).unwrap()
}

fn read(bytes: &[u8]) -> Result<Patch, Error> {
    Patch::from_bytes(bytes, Path::new("p.safetensors"))
}

fn refusal(bytes: &[u8]) -> String {
    let error = read(bytes).expect_err("a bad file must be refused");
    assert_eq!(error.kind(), Kind::Content, "{error}");
    let message = error.to_string();
    assert!(message.starts_with("p.safetensors: "), "{message}");
    message
}

fn same(a: &Patch, b: &Patch) {
    assert_eq!(a.metadata(), b.metadata());
    assert_eq!(a.delta(), b.delta());
}

#[test]
fn every_methods_patch_comes_back_as_it_was() {
    let config = Config::tiny();
    for spec in ["bitfit", "frozen", "full", "random count=300 seed=7", "bitfit terms=query,intermediate layers=1..2"] {
        let selection = Selection::parse(spec).unwrap();
        for has_pooler in [true, false] {
            for problem in [two(), Problem::Value] {
                let patch = patch_of(&selection, &config, has_pooler, problem);
                let bytes = patch.to_bytes(Dtype::F32).unwrap();
                let again = read(&bytes).unwrap();
                same(&patch, &again);
                assert_eq!(again.to_bytes(Dtype::F32).unwrap(), bytes, "{spec}");
                assert_eq!(again.content_hash().len(), 64);
            }
        }
    }
}

#[test]
fn equal_patches_are_equal_files_and_other_values_are_another_patch() {
    let selection = Selection::new(Method::Bitfit);
    let make = || patch_of(&selection, &Config::tiny(), true, two());
    assert_eq!(make().to_bytes(Dtype::F32).unwrap(), make().to_bytes(Dtype::F32).unwrap());
    let mut other = make().delta().clone();
    other.head.bias[0] = 0.125;
    let other = Patch::new(make().metadata().clone(), other, &Config::tiny(), true).unwrap();
    assert_ne!(other.content_hash(), make().content_hash());
}

#[test]
fn any_safetensors_reader_opens_a_patch() {
    let selection = Selection::parse("random count=500 seed=3").unwrap();
    let patch = patch_of(&selection, &Config::tiny(), true, two());
    let bytes = patch.to_bytes(Dtype::F32).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header_bytes % 8, 0);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 2 * patch.delta().changes.len() + 2);
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let strings = header.metadata().clone().unwrap();
    assert_eq!(strings["labels"], r#"["not_equivalent","equivalent"]"#);
    assert_eq!(strings["content_hash"], patch.content_hash());
    for (name, change) in &patch.delta().changes {
        let Change::Sparse { indices, values } = change else { panic!("random trains single entries") };
        let tensor = file.tensor(&format!("{name}.indices")).unwrap();
        let found: Vec<u64> = tensor.data().as_chunks().0.iter().map(|&b| u64::from_le_bytes(b)).collect();
        assert_eq!((tensor.dtype(), &found), (safetensors::Dtype::I64, indices));
        let tensor = file.tensor(&format!("{name}.values")).unwrap();
        let found: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        assert_eq!((tensor.dtype(), &found), (safetensors::Dtype::F32, values));
    }
    let weight = file.tensor("classifier.weight").unwrap();
    assert_eq!(weight.shape(), [2, Config::tiny().hidden_size]);
}

#[test]
fn a_minilm_patch_of_two_classes_takes_at_most_118_000_bytes() {
    let selection = Selection::new(Method::Bitfit);
    let patch = patch_of(&selection, &Config::minilm(), true, two());
    let bytes = patch.to_bytes(Dtype::F32).unwrap().len();
    assert!(bytes <= 118_000, "{bytes}");
    assert!(bytes > 4 * (26_112 + 770), "{bytes}");
    let half = patch.to_bytes(Dtype::F16).unwrap().len();
    assert!(half < 62_000, "{half}");
}

#[test]
fn a_half_precision_export_is_rounded_and_has_a_hash_of_its_own() {
    let selection = Selection::parse("random count=300 seed=7").unwrap();
    let patch = patch_of(&selection, &Config::tiny(), true, two());
    let bytes = patch.to_bytes(Dtype::F16).unwrap();
    let half = read(&bytes).unwrap();
    assert_eq!((half.dtype(), half.to_bytes(Dtype::F16).unwrap()), (Dtype::F16, bytes));
    assert_ne!(half.content_hash(), patch.content_hash());
    for (found, exact) in half.delta().head.weight.iter().zip(&patch.delta().head.weight) {
        assert_eq!(*found, half::f16::from_f32(*exact).to_f32());
        assert!((found - exact).abs() <= exact.abs() * 4.9e-4, "{found} {exact}");
    }
    // Rounded values fit f32 exactly, so going back and forth again changes nothing more.
    let wide = read(&half.to_bytes(Dtype::F32).unwrap()).unwrap();
    assert_eq!(wide.delta(), half.delta());
}

#[test]
fn a_value_that_half_precision_cannot_hold_is_refused_by_its_tensor() {
    let mut values = small().into_delta();
    values.head.bias[0] = 70_000.0;
    let config = Config { hidden_size: 4, num_attention_heads: 1, ..Config::tiny() };
    let patch = Patch::new(metadata(two()), values, &config, true).unwrap();
    patch.to_bytes(Dtype::F32).unwrap();
    let message = patch.to_bytes(Dtype::F16).unwrap_err().to_string();
    assert!(message.contains("classifier.bias") && message.contains("70000"), "{message}");
}

#[test]
fn a_patch_is_checked_before_it_is_written_too() {
    let config = Config::tiny();
    let good = patch_of(&Selection::new(Method::Bitfit), &config, true, two());
    let made = |metadata: Metadata, delta: Delta| Patch::new(metadata, delta, &config, true).unwrap_err().to_string();
    let mut nan = good.delta().clone();
    nan.head.weight[5] = f32::NAN;
    assert!(made(good.metadata().clone(), nan).contains("NaN at position 5"));
    let long = Metadata { max_length: 41, ..good.metadata().clone() };
    assert!(made(long, good.delta().clone()).contains("at most 40"));
    let three = Metadata { problem: Problem::Classes(["a", "b", "c"].map(String::from).into()), ..metadata(two()) };
    assert!(made(three, good.delta().clone()).contains("classifier.weight"));
    let twins = Metadata { problem: Problem::Classes(vec!["a".into(), "a".into()]), ..metadata(two()) };
    assert!(made(twins, good.delta().clone()).contains("all labels different"));
}

#[test]
fn saving_replaces_the_file_and_leaves_nothing_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("patch.safetensors");
    std::fs::write(&path, "old").unwrap();
    let patch = patch_of(&Selection::new(Method::Full), &Config::tiny(), true, two());
    patch.save(&path, Dtype::F32).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), patch.to_bytes(Dtype::F32).unwrap());
    same(&Patch::load(&path).unwrap(), &patch);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_is_not_there_or_a_folder_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.safetensors");
    assert!(Patch::load(&missing).unwrap_err().to_string().contains("none.safetensors"));
    assert!(Patch::load(folder.path()).unwrap_err().to_string().contains("found a folder"));
}

#[test]
fn a_file_cut_short_at_any_length_is_refused() {
    let bytes = small().to_bytes(Dtype::F32).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    for n in 0..bytes.len() {
        refusal(&bytes[..n]);
        if n % 37 == 0 {
            std::fs::write(&path, &bytes[..n]).unwrap();
            assert!(Patch::load(&path).is_err());
        }
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(refusal(&longer).contains("bytes of tensors"));
}

#[test]
fn a_file_with_any_single_bit_flipped_is_refused() {
    for dtype in [Dtype::F32, Dtype::F16] {
        let mut bytes = small().to_bytes(dtype).unwrap();
        for i in 0..bytes.len() {
            for bit in 0..8 {
                bytes[i] ^= 1 << bit;
                refusal(&bytes);
                bytes[i] ^= 1 << bit;
            }
        }
        read(&bytes).unwrap();
    }
}

/// A patch file by the specification, without the crate under test: what the attacks change before it is sealed.
struct Forged {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (&'static str, Value, Vec<u8>)>,
}

impl Forged {
    fn new() -> Self {
        let digest = |c: &str| c.repeat(64);
        let metadata = [
            ("format", "bitfit-patch".to_string()),
            ("format_version", "1".into()),
            ("task", "t".into()),
            ("problem_type", "single_label_classification".into()),
            ("labels", r#"["no","yes"]"#.into()),
            ("texts", "1".into()),
            ("max_length", "16".into()),
            ("pooling", "cls".into()),
            ("selection", "bitfit".into()),
            ("base_id", "b".into()),
            ("base_fingerprint", digest("0")),
            ("tokenizer_fingerprint", digest("1")),
            ("training_digest", digest("2")),
            ("metrics", r#"{"accuracy":0.5}"#.into()),
            ("split", "dev".into()),
            ("epoch", "1".into()),
        ];
        let mut forged =
            Forged { metadata: metadata.map(|(k, v)| (k.to_string(), v)).into(), tensors: BTreeMap::new() };
        forged.floats("classifier.weight", &[2, 2], &[0.1, 0.2, 0.3, 0.4]);
        forged.floats("classifier.bias", &[2], &[0.0, 0.5]);
        forged.positions(&[0, 3]);
        forged.floats(&format!("{MATRIX}.values"), &[2], &[1.0, -1.0]);
        forged
    }

    fn floats(&mut self, name: &str, shape: &[u64], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.insert(name.into(), ("F32", json!(shape), bytes));
    }

    fn positions(&mut self, positions: &[i64]) {
        let bytes = positions.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.insert(format!("{MATRIX}.indices"), ("I64", json!([positions.len()]), bytes));
    }

    fn header(&self, content_hash: &str) -> (String, Vec<u8>) {
        let mut metadata = self.metadata.clone();
        metadata.insert("content_hash".into(), content_hash.into());
        let mut order: Vec<_> = self.tensors.iter().collect();
        order.sort_by_key(|(name, (dtype, ..))| (*dtype != "I64", *name));
        let (mut data, mut lines) = (Vec::new(), BTreeMap::new());
        for (name, (dtype, shape, bytes)) in order {
            let begin = data.len();
            data.extend(bytes);
            let line = format!(r#"{{"data_offsets":[{begin},{}],"dtype":"{dtype}","shape":{shape}}}"#, data.len());
            lines.insert(name, line);
        }
        let mut json = format!("{{\"__metadata__\":{}", serde_json::to_string(&metadata).unwrap());
        for (name, line) in lines {
            json += &format!(",{}:{line}", json!(name));
        }
        (json + "}", data)
    }

    fn bytes(&self) -> Vec<u8> {
        let (unsealed, data) = self.header("");
        let hash = Sha256::new().chain_update(unsealed).chain_update(&data).finalize();
        let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        framed(&self.header(&hash).0, &data)
    }

    fn with_text(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }
}

const MATRIX: &str = "encoder.layer.0.output.dense.weight";

fn framed(json: &str, data: &[u8]) -> Vec<u8> {
    let padded = format!("{json}{}", " ".repeat(json.len().next_multiple_of(8) - json.len()));
    [&(padded.len() as u64).to_le_bytes()[..], padded.as_bytes(), data].concat()
}

#[test]
fn a_file_by_the_specification_is_read() {
    let bytes = Forged::new().bytes();
    let patch = read(&bytes).unwrap();
    assert_eq!(patch.to_bytes(Dtype::F32).unwrap(), bytes);
    let change = Change::Sparse { indices: vec![0, 3], values: vec![1.0, -1.0] };
    assert_eq!(patch.delta().changes[MATRIX], change);
    assert_eq!(patch.delta().head.bias, [0.0, 0.5]);
}

#[test]
fn a_header_length_beyond_the_file_or_the_limit_is_refused() {
    let good = Forged::new().bytes();
    for length in [0, 1, 7, good.len() as u64, 1 << 22, (1 << 22) + 1, 1 << 40, i64::MAX as u64, u64::MAX] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refusal(&bytes);
    }
    let huge = u64::MAX.to_le_bytes();
    assert!(refusal(&huge).contains("at most"));
}

#[test]
fn a_sealed_patch_with_numbers_that_are_none_is_refused() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut forged = Forged::new();
        forged.floats("classifier.bias", &[2], &[0.0, value]);
        assert!(refusal(&forged.bytes()).contains("classifier.bias: expected finite numbers"));
        let mut forged = Forged::new();
        forged.floats(&format!("{MATRIX}.values"), &[2], &[value, 0.0]);
        assert!(refusal(&forged.bytes()).contains("finite"));
    }
    let mut forged = Forged::new();
    for (dtype, _, bytes) in forged.tensors.values_mut().filter(|t| t.0 == "F32") {
        *dtype = "F16";
        *bytes = bytes.chunks(4).flat_map(|_| half::f16::NAN.to_le_bytes()).collect();
    }
    assert!(refusal(&forged.bytes()).contains("NaN"));
}

#[test]
fn a_sealed_patch_with_bad_positions_is_refused() {
    for (positions, expected) in [
        ([3, 3], "3 after 3"),
        ([3, 1], "1 after 3"),
        ([-1, 3], "positions from 0"),
        ([0, i64::MIN], "positions from 0"),
    ] {
        let mut forged = Forged::new();
        forged.positions(&positions);
        let message = refusal(&forged.bytes());
        assert!(message.contains(expected), "{message}");
    }
    let mut forged = Forged::new();
    forged.positions(&[0, 1, 2]);
    assert!(refusal(&forged.bytes()).contains("expected shape [3]"));
}

#[test]
fn a_sealed_patch_with_label_tricks_is_refused() {
    for (labels, expected) in [
        (r#"["yes","yes"]"#, "all labels different"),
        (r#"["no",""]"#, "expected a text"),
        (r#"["no"," "]"#, "expected a text"),
        (r#"["no"]"#, "2 to 10000"),
        (r#"["no","yes","maybe"]"#, "expected shape [3"),
        (r#"["no","y\u001bes"]"#, "control characters"),
        (r#"["no","y\u202ees"]"#, "control characters"),
        (r#"["no", "yes"]"#, "canonical form"),
        (r#"["no","\u0079es"]"#, "canonical form"),
        (r#"["no",["yes"]]"#, "labels"),
    ] {
        let message = refusal(&Forged::new().with_text("labels", labels).bytes());
        assert!(message.contains(expected), "{labels}: {message}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(refusal(&Forged::new().with_text("labels", &deep).bytes()).contains("labels"));
    assert!(refusal(&Forged::new().with_text("metrics", &deep).bytes()).contains("metrics"));
    let twice = r#"{"accuracy":0.5,"accuracy":0.6}"#;
    assert!(refusal(&Forged::new().with_text("metrics", twice).bytes()).contains("canonical form"));
    let many = serde_json::to_string(&(0..10_001).map(|i| i.to_string()).collect::<Vec<_>>()).unwrap();
    assert!(refusal(&Forged::new().with_text("labels", &many).bytes()).contains("2 to 10000"));
}

#[test]
fn a_message_about_a_hostile_file_does_not_repeat_its_control_characters() {
    let mut forged = Forged::new().with_text("task", "a\u{1b}[2Jb");
    assert!(!refusal(&forged.bytes()).contains('\u{1b}'));
    forged = Forged::new();
    forged.floats("pooler.\u{1b}[2J", &[1], &[0.0]);
    assert!(!refusal(&forged.bytes()).contains('\u{1b}'));
    forged = Forged::new();
    forged.floats(&"x".repeat(100_000), &[1], &[0.0]);
    assert!(refusal(&forged.bytes()).len() < 1000);
}

#[test]
fn a_shape_of_ten_to_the_eighteenth_is_refused_without_allocating_it() {
    for shape in [json!([1_000_000_000_000_000_000u64]), json!([1u64 << 62, 1u64 << 62]), json!([u64::MAX]), json!([0])]
    {
        let mut forged = Forged::new();
        forged.tensors.get_mut("classifier.bias").unwrap().1 = shape;
        refusal(&forged.bytes());
    }
    // Shape and offsets agree here, and only the file's real size tells.
    let mut forged = Forged::new();
    forged.floats("pooler.dense.bias", &[1], &[0.0]);
    let (json, data) = forged.header(&"0".repeat(64));
    let (from, to) = (
        r#"[48,52],"dtype":"F32","shape":[1]"#,
        r#"[48,4000000000000000048],"dtype":"F32","shape":[1000000000000000000]"#,
    );
    assert!(json.contains(from), "{json}");
    assert!(refusal(&framed(&json.replacen(from, to, 1), &data)).contains("bytes of tensors after the header"));
}

#[test]
fn overlapping_or_holey_offsets_are_refused() {
    let (json, data) = Forged::new().header("");
    for (from, to) in [("[16,24]", "[8,16]"), ("[16,24]", "[24,32]"), ("[16,24]", "[24,16]"), ("[0,16]", "[0,8]")] {
        assert!(json.contains(from), "{json}");
        assert!(refusal(&framed(&json.replacen(from, to, 1), &data)).contains("expected data_offsets"));
    }
}

#[test]
fn a_header_that_says_the_same_in_other_bytes_is_refused() {
    let forged = Forged::new();
    let bytes = forged.bytes();
    let json_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json = std::str::from_utf8(&bytes[8..json_end]).unwrap().trim_end();
    let data = &bytes[json_end..];
    read(&framed(json, data)).unwrap();
    for (from, to) in [
        (r#"{"__metadata__""#, r#"{ "__metadata__""#),
        (r#""dtype":"F32","shape":[2]"#, r#""shape":[2],"dtype":"F32""#),
        (r#""task":"t""#, r#""task":"\u0074""#),
        (r#""epoch":"1""#, r#""epoch":"01""#),
        (r#""max_length":"16""#, r#""max_length":"+16""#),
        (r#"{\"accuracy\":0.5}"#, r#"{\"accuracy\":5e-1}"#),
    ] {
        assert!(json.contains(from), "{from}");
        assert!(refusal(&framed(&json.replacen(from, to, 1), data)).contains("canonical form"), "{from}");
    }
    let mut padded = bytes[..json_end].to_vec();
    padded.extend([b' '; 8]);
    padded.extend(data);
    padded[..8].copy_from_slice(&((json_end as u64) - 8 + 8).to_le_bytes());
    assert!(refusal(&padded).contains("canonical form"));
}

#[test]
fn what_is_no_patch_is_refused_with_a_word_on_what_it_is() {
    assert!(refusal(b"").contains("too few"));
    assert!(refusal(b"PK\x03\x04 a zip archive, as a pytorch_model.bin is").contains("no patch"));
    let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
    let model = safetensors::serialize([("pooler.dense.bias", tensor)], None).unwrap();
    assert!(refusal(&model).contains("a safetensors file but no patch"));
    let with_format = framed(r#"{"__metadata__":{"format":"pt"}}"#, &[]);
    assert!(refusal(&with_format).contains("format_version"));
    assert!(refusal(&Forged::new().with_text("format_version", "2").bytes()).contains("newer bitfit"));
    assert!(refusal(&framed(&"[".repeat(1 << 20), &[])).contains("not one of a patch"));
    assert!(refusal(&framed(&r#"{"a":"#.repeat(1 << 18), &[])).contains("not one of a patch"));
    let mut not_utf8 = Forged::new().bytes();
    not_utf8[20] = 0xff;
    assert!(refusal(&not_utf8).contains("UTF-8"));
}

fn finite() -> impl Strategy<Value = f32> {
    prop_oneof![any::<f32>().prop_filter("finite", |v| v.is_finite()), Just(-0.0), Just(f32::MIN_POSITIVE / 4.0)]
}

fn label() -> impl Strategy<Value = String> {
    "[ -~\u{e9}\u{4e2d}\u{1f600}\"\\\\]{0,12}".prop_map(|rest| format!("x{rest}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_a_patch_holds_comes_back_to_the_bit(
        labels in prop::collection::btree_set(label(), 2..5),
        task in label(),
        metric in any::<f64>().prop_filter("finite", |v| v.is_finite()),
        dense in prop::collection::vec(finite(), 32),
        sparse in prop::collection::btree_map(0u64..32 * 64, finite(), 1..40),
        weights in prop::collection::vec(finite(), 4 * 32 + 4),
        own_pooler in any::<bool>(),
    ) {
        let config = Config::tiny();
        let n_outputs = labels.len();
        let problem = Problem::Classes(labels.into_iter().collect());
        let mut values = Delta {
            changes: [
                ("embeddings.LayerNorm.bias".to_string(), Change::Dense(dense)),
                (MATRIX.to_string(), Change::Sparse {
                    indices: sparse.keys().copied().collect(),
                    values: sparse.values().copied().collect(),
                }),
            ].into(),
            head: head(&config, &problem, own_pooler),
        };
        values.head.weight = weights[..n_outputs * 32].to_vec();
        values.head.bias = weights[4 * 32..][..n_outputs].to_vec();
        let metadata = Metadata { task, metrics: [("m".to_string(), metric)].into(), ..metadata(problem) };
        let patch = Patch::new(metadata, values, &config, !own_pooler).unwrap();
        let bytes = patch.to_bytes(Dtype::F32).unwrap();
        SafeTensors::deserialize(&bytes).unwrap();
        let again = read(&bytes).unwrap();
        same(&patch, &again);
        prop_assert_eq!(bits(patch.delta()), bits(again.delta())); // == holds 0 and -0 equal; these are bits
        prop_assert_eq!(again.to_bytes(Dtype::F32).unwrap(), bytes);
    }

    #[test]
    fn no_bytes_bring_the_reader_down(noise in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>()) {
        read(&noise).unwrap_err();
        let mut bytes = small().to_bytes(Dtype::F32).unwrap();
        let at = at.index(bytes.len());
        for (byte, with) in bytes[at..].iter_mut().zip(&noise) {
            *byte = *with;
        }
        if bytes != small().to_bytes(Dtype::F32).unwrap() {
            read(&bytes).unwrap_err();
        }
    }
}

fn bits(delta: &Delta) -> Vec<u32> {
    let changes = delta.changes.values().flat_map(|change| match change {
        Change::Dense(values) | Change::Sparse { values, .. } => values.iter(),
    });
    changes.chain(&delta.head.weight).chain(&delta.head.bias).map(|v| v.to_bits()).collect()
}
