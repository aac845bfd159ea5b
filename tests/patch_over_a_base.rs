//! Put a patch over a base: only its own, in a Hugging Face folder, and in candle.

mod tiny_base;

use std::collections::BTreeMap;
use std::path::Path;

use bitfit::Kind;
use bitfit::base::problem::Problem;
use bitfit::base::{Base, Config, Tokenizer};
use bitfit::patch::{Dtype, Metadata, Patch, candle, merge};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::bert::BertModel;
use safetensors::SafeTensors;
use tiny_base::{folder, patch, two, weights};

/// Base plus difference, by canonical name.
fn expected(base: &Base, patch: &Patch) -> BTreeMap<String, Vec<f32>> {
    let mut all: BTreeMap<_, _> =
        base.parameters().iter().map(|p| (p.name.clone(), base.tensor(&p.name).unwrap())).collect();
    for (name, change) in &patch.delta().changes {
        change.add_to(name, all.get_mut(name).unwrap()).unwrap();
    }
    let head = patch.delta().head.clone();
    all.insert("classifier.weight".into(), head.weight);
    all.insert("classifier.bias".into(), head.bias);
    if let Some((weight, bias)) = head.pooler {
        all.insert("pooler.dense.weight".into(), weight);
        all.insert("pooler.dense.bias".into(), bias);
    }
    all
}

#[test]
fn a_patch_fits_its_own_base_wherever_that_lies() {
    let places = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [here, there] = places.each_ref().map(|place| folder(place.path(), true));
    for spec in ["bitfit", "frozen", "full", "random count=200 seed=5"] {
        let patch = patch(&here, spec, two());
        let again = Patch::from_bytes(&patch.to_bytes(Dtype::F32).unwrap(), Path::new("p")).unwrap();
        again.check_base(&here).unwrap();
        again.check_base(&there).unwrap();
    }
}

#[test]
fn a_patch_for_another_base_or_tokenizer_is_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let base = folder(place.path(), true);
    let patch = patch(&base, "bitfit", two());
    let memory = |seed: u64, do_lower_case: bool| {
        let weights = weights(seed);
        let tensors = weights.parameters().iter().map(|p| (p.name.clone(), weights.tensor(&p.name).unwrap()));
        let vocab = std::fs::read_to_string(place.path().join("vocab.txt")).unwrap();
        let tokenizer = Tokenizer::from_vocab(vocab.lines().map(String::from).collect(), do_lower_case).unwrap();
        Base::in_memory("other/base", Config::tiny(), Some(tokenizer), tensors.collect()).unwrap()
    };
    let error = patch.check_base(&memory(12, false)).unwrap_err();
    assert_eq!(error.kind(), Kind::WrongBase);
    let message = error.to_string();
    assert!(message.contains("org/tiny") && message.contains("other/base"), "{message}");
    assert!(message.contains(&base.fingerprint()[..12]), "{message}");
    patch.check_base(&memory(11, false)).unwrap();
    let error = patch.check_base(&memory(11, true)).unwrap_err();
    assert_eq!(error.kind(), Kind::WrongBase);
    assert!(error.to_string().contains("tokenizer"), "{error}");
}

#[test]
fn a_patch_that_only_claims_to_be_for_this_base_is_refused_by_its_tensor() {
    let place = tempfile::tempdir().unwrap();
    let base = folder(place.path(), true);
    let good = patch(&base, "bitfit", two());
    // A base of more layers and more positions makes the values; the metadata name the other one.
    let deeper = Config { num_hidden_layers: 3, max_position_embeddings: 400, ..Config::tiny() };
    let mut values = good.delta().clone();
    let last = values.changes["encoder.layer.1.output.dense.bias"].clone();
    values.changes.insert("encoder.layer.2.output.dense.bias".into(), last);
    let claims = Patch::new(good.metadata().clone(), values, &deeper, true).unwrap();
    let message = claims.check_base(&base).unwrap_err().to_string();
    assert!(message.contains("encoder.layer.2.output.dense.bias") && message.contains("2 layers"), "{message}");
    let long = Metadata { max_length: 300, ..good.metadata().clone() };
    let claims = Patch::new(long, good.delta().clone(), &deeper, true).unwrap();
    assert!(claims.check_base(&base).unwrap_err().to_string().contains("at most 40"));
}

#[test]
fn merge_writes_the_whole_model_and_its_settings() {
    for has_pooler in [true, false] {
        let place = tempfile::tempdir().unwrap();
        let base = folder(place.path(), has_pooler);
        for (spec, problem) in [("bitfit", two()), ("random count=99 seed=1", Problem::Value), ("full", two())] {
            let patch = patch(&base, spec, problem);
            let out = place.path().join(spec).join("merged");
            merge::merge(&patch, &base, &out).unwrap();
            let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let mut found = BTreeMap::new();
            for (name, tensor) in file.tensors() {
                let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                let name = name.strip_prefix("bert.").map(String::from).unwrap_or(name);
                found.insert(name, values);
            }
            assert_eq!(found, expected(&base, &patch), "{spec}");
            let json = |name: &str| -> serde_json::Value {
                serde_json::from_str(&std::fs::read_to_string(out.join(name)).unwrap()).unwrap()
            };
            let config = json("config.json");
            assert_eq!(config["architectures"][0], "BertForSequenceClassification");
            assert_eq!(config["torch_dtype"], "float32");
            assert_eq!(config["problem_type"], patch.metadata().problem.name());
            if patch.metadata().problem == two() {
                assert_eq!(config["id2label"], serde_json::json!({"0": "consonant", "1": "vowel"}));
                assert_eq!(config["label2id"], serde_json::json!({"consonant": 0, "vowel": 1}));
            } else {
                assert_eq!(config["num_labels"], 1);
            }
            let tokenizer = json("tokenizer_config.json");
            assert_eq!((&tokenizer["do_lower_case"], &tokenizer["model_max_length"]), (&false.into(), &40.into()));
            // What comes out is a base again, with the same tokenizer.
            let again = Base::from_folder(&out).unwrap();
            assert_eq!(again.tokenizer().unwrap().fingerprint(), base.tokenizer().unwrap().fingerprint());
        }
    }
}

#[test]
fn merge_leaves_an_occupied_folder_as_it_is_and_nothing_half_written() {
    let place = tempfile::tempdir().unwrap();
    let base = folder(place.path(), true);
    let patch = patch(&base, "bitfit", two());
    let out = place.path().join("out");
    std::fs::create_dir(&out).unwrap();
    merge::merge(&patch, &base, &out).unwrap(); // an empty folder is as good as none
    let before = std::fs::read(out.join("model.safetensors")).unwrap();
    let error = merge::merge(&patch, &base, &out).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert_eq!(std::fs::read(out.join("model.safetensors")).unwrap(), before);

    let listing = || std::fs::read_dir(place.path()).unwrap().count();
    let files = listing();
    let fails = place.path().join("fails");
    std::fs::remove_file(place.path().join("model.safetensors")).unwrap();
    merge::merge(&patch, &base, &fails).unwrap_err();
    assert_eq!(listing(), files - 1, "only the removed checkpoint is missing");
}

#[test]
fn candle_runs_the_task_from_a_base_and_a_patch() {
    let place = tempfile::tempdir().unwrap();
    let base = folder(place.path(), true);
    let patch = patch(&base, "bitfit", two());
    let config = candle::bert_config(base.config());
    let ids = Tensor::new(&[[2u32, 7, 8, 9, 3]], &Device::Cpu).unwrap();
    let run = |patch| {
        let variables = candle::var_builder(&base, patch, DType::F32, &Device::Cpu).unwrap();
        let model = BertModel::load(variables, &config).unwrap();
        let hidden = model.forward(&ids, &ids.zeros_like().unwrap(), None).unwrap();
        hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (plain, patched) = (run(None), run(Some(&patch)));
    assert_eq!(plain.len(), 5 * base.config().hidden_size);
    assert_ne!(plain, patched);

    let variables = candle::var_builder(&base, Some(&patch), DType::F32, &Device::Cpu).unwrap();
    for (name, values) in expected(&base, &patch) {
        let found = variables.get_unchecked_dtype(&name, DType::F32).unwrap();
        assert_eq!(found.flatten_all().unwrap().to_vec1::<f32>().unwrap(), values, "{name}");
    }
    let weight = variables.get((2, base.config().hidden_size), "classifier.weight").unwrap();
    assert_eq!(weight.dtype(), DType::F32);
    let half = candle::var_builder(&base, Some(&patch), DType::F16, &Device::Cpu).unwrap();
    assert_eq!(half.get(2, "classifier.bias").unwrap().dtype(), DType::F16);
}
