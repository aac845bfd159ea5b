//! A user can load a base from a folder, however its checkpoint was written, and is told clearly why not.

#[path = "common/checkpoint.rs"]
mod checkpoint;

use std::path::Path;

use bitfit::base::{Base, BaseSpec};
use bitfit::{Error, Kind};
use checkpoint::{Stored, bare_folder, folder, golden, tensors, write};
use safetensors::Dtype;

fn load(folder: &tempfile::TempDir) -> bitfit::Result<Base> {
    Base::from_folder(folder.path())
}

/// The message of a refusal, which must hold every one of these words.
fn refused(result: Result<Base, Error>, words: &[&str]) {
    let error = match result {
        Ok(_) => panic!("expected a refusal that speaks of {words:?}"),
        Err(error) => error,
    };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn rename(tensors: &[Stored], name: impl Fn(&str) -> String) -> Vec<Stored> {
    tensors.iter().map(|t| Stored { name: name(&t.name), ..t.clone() }).collect()
}

#[test]
fn the_default_base_loads() {
    let base = default_base();
    assert_eq!(base.id(), "nreimers/MiniLM-L6-H384-uncased");
    assert_eq!(base.config(), &bitfit::base::Config::minilm());
    assert!(base.has_pooler());
    assert_eq!(base.parameters().iter().map(|p| p.len()).sum::<usize>(), 22_713_216);
    // Every patch for this base holds this hash: where it changes, none of them fits any more.
    assert_eq!(base.fingerprint(), "7f28e05e91be99ca22b555a0b898022c954f55f7b31f9647278d1a9c2dd63315");
    let name = "encoder.layer.5.output.LayerNorm.bias";
    let stored = checkpoint::read(&base.folder().unwrap().join("model.safetensors"));
    let stored = stored.iter().find(|t| t.name == name).unwrap();
    assert_eq!(base.tensor(name).unwrap(), f32s(&stored.bytes));
}

fn default_base() -> Base {
    let folder = bitfit::base::spec::default_folder().filter(|folder| folder.is_dir());
    let folder = folder.expect("the default base is not there; fetch it with: scripts/fetch-base.sh");
    Base::load(&BaseSpec::Folder(folder)).unwrap()
}

#[test]
fn the_same_model_has_the_same_fingerprint_in_every_container() {
    let plain = tensors();
    let prefixed = rename(&plain, |name| format!("bert.{name}"));
    let old = rename(&prefixed, |name| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    });
    let mut with_heads = prefixed.clone();
    let ids = (0..9i64).flat_map(i64::to_le_bytes).collect();
    for (name, dtype, shape, bytes) in [
        ("bert.embeddings.position_ids", Dtype::I64, vec![1, 9], ids),
        ("cls.predictions.bias", Dtype::F32, vec![19], vec![0; 76]),
        ("classifier.weight", Dtype::F32, vec![2, 8], vec![1; 64]),
    ] {
        with_heads.push(Stored { name: name.into(), dtype, shape, bytes });
    }

    let reference = load(&folder(&plain)).unwrap();
    assert_eq!(reference.fingerprint().len(), 64);
    for (what, folder) in [
        ("prefix", folder(&prefixed)),
        ("gamma and beta", folder(&old)),
        ("heads and position ids", folder(&with_heads)),
        ("shards", in_shards(&plain)),
        ("pickle", with_file("pytorch_model.bin", &std::fs::read(golden().join("pytorch_model.bin")).unwrap())),
    ] {
        let base = load(&folder).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(base.fingerprint(), reference.fingerprint(), "{what}");
        for stored in &plain {
            assert_eq!(base.tensor(&stored.name).unwrap(), f32s(&stored.bytes), "{what}: {}", stored.name);
        }
    }
}

fn in_shards(tensors: &[Stored]) -> tempfile::TempDir {
    let folder = bare_folder();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(9).enumerate() {
        let file = format!("model-{i}.safetensors");
        write(&folder.path().join(&file), part);
        map.extend(part.iter().map(|t| (t.name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

fn with_file(name: &str, bytes: &[u8]) -> tempfile::TempDir {
    let folder = bare_folder();
    std::fs::write(folder.path().join(name), bytes).unwrap();
    folder
}

#[test]
fn a_checkpoint_without_a_pooler_loads_and_is_another_base() {
    let all = tensors();
    let without: Vec<Stored> = all.iter().filter(|t| !t.name.starts_with("pooler.")).cloned().collect();
    let base = load(&folder(&without)).unwrap();
    assert!(!base.has_pooler());
    assert!(base.parameters().iter().all(|p| !p.name.starts_with("pooler.")));
    assert!(base.tensor("pooler.dense.bias").is_err());
    assert_ne!(base.fingerprint(), load(&folder(&all)).unwrap().fingerprint());
}

#[test]
fn half_precision_is_read_exactly_and_is_another_base() {
    // One number of each kind: zero, one, the smallest, the largest, a third, and their negatives.
    let f16: [(u16, f32); 6] =
        [(0, 0.0), (0x3c00, 1.0), (1, 5.960_464_5e-8), (0x7bff, 65504.0), (0x3555, 0.333_251_95), (0xc000, -2.0)];
    let bf16: [(u16, f32); 4] = [(0, 0.0), (0x3f80, 1.0), (0xbfc0, -1.5), (0x3eab, 0.333_984_38)];
    let mut fingerprints = vec![load(&folder(&tensors())).unwrap().fingerprint().to_string()];
    for (dtype, table) in [(Dtype::F16, &f16[..]), (Dtype::BF16, &bf16[..])] {
        let mut halved = tensors();
        for t in &mut halved {
            let n = t.bytes.len() / 4;
            t.dtype = dtype;
            t.bytes = (0..n).flat_map(|i| table[i % table.len()].0.to_le_bytes()).collect();
        }
        let folder = folder(&halved);
        let base = load(&folder).unwrap();
        let read = base.tensor("embeddings.word_embeddings.weight").unwrap();
        for (i, value) in read.iter().enumerate() {
            assert_eq!(value.to_bits(), table[i % table.len()].1.to_bits(), "{dtype:?} {i}: {value}");
        }
        fingerprints.push(base.fingerprint().to_string());
    }
    fingerprints.sort();
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 3);
}

#[test]
fn one_changed_bit_or_another_number_of_heads_is_another_base() {
    let reference = load(&folder(&tensors())).unwrap();
    let mut changed = tensors();
    changed[3].bytes[0] ^= 1;
    assert_ne!(load(&folder(&changed)).unwrap().fingerprint(), reference.fingerprint());

    let other = folder(&tensors());
    edit_config(other.path(), "num_attention_heads", 4.into());
    assert_ne!(load(&other).unwrap().fingerprint(), reference.fingerprint());
}

fn edit_config(folder: &Path, key: &str, value: serde_json::Value) {
    let path = folder.join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_base_is_called_what_its_config_says_or_else_after_its_folder() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("my-bert");
    std::fs::rename(folder(&tensors()).keep(), &path).unwrap();
    assert_eq!(Base::from_folder(&path).unwrap().id(), "my-bert");
    edit_config(&path, "_name_or_path", "org/their-bert".into());
    assert_eq!(Base::from_folder(&path).unwrap().id(), "org/their-bert");
}

#[test]
fn a_config_that_does_not_fit_the_weights_is_refused_by_tensor() {
    for (key, value, words) in [
        ("vocab_size", 20, &["embeddings.word_embeddings.weight", "[20, 8]", "[19, 8]"][..]),
        ("intermediate_size", 16, &["encoder.layer.0.intermediate.dense.weight", "[16, 8]", "[12, 8]"]),
        ("num_hidden_layers", 2, &["encoder.layer.1.attention.self.query.weight", "no tensor of that name"]),
        ("max_position_embeddings", 512, &["position_embeddings", "[512, 8]"]),
    ] {
        let folder = folder(&tensors());
        edit_config(folder.path(), key, value.into());
        refused(load(&folder), words);
    }
    let mut two_layers = tensors();
    let more = rename(&two_layers, |name| name.replace("layer.0.", "layer.1."));
    two_layers.extend(more.into_iter().filter(|t| t.name.contains("layer.1.")));
    refused(load(&folder(&two_layers)), &["encoder.layer.1.", "1 layers"]);
}

#[test]
fn a_tensor_that_is_missing_doubled_or_of_the_wrong_kind_is_refused_by_name() {
    let change = |what: &dyn Fn(&mut Vec<Stored>)| {
        let mut all = tensors();
        what(&mut all);
        load(&folder(&all))
    };
    let index = |all: &[Stored], name: &str| all.iter().position(|t| t.name == name).unwrap();
    let name = "encoder.layer.0.output.dense.bias";
    refused(change(&|all| drop(all.remove(index(all, name)))), &[name, "no tensor of that name", "model.safetensors"]);
    let half_a_pooler = change(&|all| drop(all.remove(index(all, "pooler.dense.bias"))));
    refused(half_a_pooler, &["pooler.dense.bias"]);
    let doubled = change(&|all| all.push(Stored { name: format!("bert.{name}"), ..all[index(all, name)].clone() }));
    refused(doubled, &["two tensors", name]);
    let integers = change(&|all| {
        let at = index(all, name);
        all[at].dtype = Dtype::I32;
    });
    refused(integers, &[name, "F16", "I32"]);
    for bits in [f32::NAN, f32::INFINITY] {
        let poisoned = change(&|all| {
            let at = index(all, name);
            all[at].bytes[12..16].copy_from_slice(&bits.to_le_bytes());
        });
        refused(poisoned, &[name, "finite", "position 3"]);
    }
}

#[test]
fn a_truncated_safetensors_file_is_refused_at_every_length() {
    let whole = std::fs::read(golden().join("model.safetensors")).unwrap();
    let path = |folder: &tempfile::TempDir| folder.path().join("model.safetensors");
    let folder = with_file("model.safetensors", &whole);
    load(&folder).unwrap();
    for length in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        std::fs::write(path(&folder), &whole[..length]).unwrap();
        refused(load(&folder), &["model.safetensors"]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    std::fs::write(path(&folder), longer).unwrap();
    refused(load(&folder), &["model.safetensors", "expected"]);
}

#[test]
fn a_file_that_is_no_checkpoint_is_refused() {
    let header = |json: &str, data: usize| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let pickle = std::fs::read(golden().join("pytorch_model.bin")).unwrap();
    let legacy = std::fs::read(golden().join("legacy.bin")).unwrap();
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    let huge = r#"{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4], "data_offsets": [0, 4]}}"#;
    for (name, bytes, words) in [
        ("model.safetensors", b"".to_vec(), &["0 bytes"][..]),
        ("model.safetensors", u64::MAX.to_le_bytes().to_vec(), &["header"]),
        ("model.safetensors", header("not json", 4), &["header"]),
        ("model.safetensors", header(huge, 4), &["header"]),
        ("model.safetensors", header("{}", 0), &["embeddings.word_embeddings.weight"]),
        ("model.safetensors", lfs.to_vec(), &["Git LFS"]),
        ("pytorch_model.bin", lfs.to_vec(), &["Git LFS"]),
        ("pytorch_model.bin", legacy, &["zip", "python3 -c", "torch.save(torch.load("]),
        ("pytorch_model.bin", pickle[..pickle.len() / 2].to_vec(), &["pytorch_model.bin", "fetch the file again"]),
        ("pytorch_model.bin", b"PK\x03\x04 and nothing that follows".to_vec(), &["fetch the file again"]),
        ("pytorch_model.bin.index.json", b"{}".to_vec(), &["shards"]),
        ("model.safetensors.index.json", b"{}".to_vec(), &["weight_map"]),
        (
            "model.safetensors.index.json",
            br#"{"weight_map": {"a": "../x.safetensors"}}"#.to_vec(),
            &["../x.safetensors"],
        ),
        ("model.safetensors.index.json", br#"{"weight_map": {"a": "x.safetensors"}}"#.to_vec(), &["x.safetensors"]),
        ("README.md", b"".to_vec(), &["no weights", "model.safetensors", "pytorch_model.bin"]),
    ] {
        refused(load(&with_file(name, &bytes)), words);
    }
}

#[test]
fn a_folder_that_is_missing_or_has_no_config_is_named() {
    refused(Base::from_folder(Path::new("/nothing/here")), &["/nothing/here"]);
    let empty = tempfile::tempdir().unwrap();
    refused(load(&empty), &["config.json", empty.path().to_str().unwrap()]);
    let other = folder(&tensors());
    edit_config(other.path(), "model_type", "roberta".into());
    refused(load(&other), &["model_type", "bert", "roberta"]);
}

#[test]
fn a_checkpoint_that_changes_under_a_running_program_is_noticed() {
    let folder = folder(&tensors());
    let path = folder.path().join("model.safetensors");
    let base = load(&folder).unwrap();
    let name = "embeddings.LayerNorm.weight";
    base.tensor(name).unwrap();
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 4]).unwrap();
    let error = base.tensor(name).unwrap_err();
    assert!(error.to_string().contains("changed since it was loaded"), "{error}");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(base.tensor(name).unwrap_err().kind(), Kind::Io);
}

#[test]
fn a_tensor_that_a_bert_does_not_have_is_refused_by_name() {
    let base = load(&folder(&tensors())).unwrap();
    let error = base.tensor("classifier.weight").unwrap_err();
    assert!(error.to_string().contains("classifier.weight"), "{error}");
}

#[test]
fn a_base_without_a_tokenizer_loads_and_says_so_when_one_is_needed() {
    let folder = folder(&tensors());
    std::fs::remove_file(folder.path().join("vocab.txt")).unwrap();
    let base = load(&folder).unwrap();
    let message = base.tokenizer().err().unwrap().to_string();
    assert!(message.contains("vocab.txt") && message.contains(folder.path().to_str().unwrap()), "{message}");
}

#[test]
fn a_tokenizer_that_does_not_fit_or_cannot_be_read_is_refused() {
    let words = std::fs::read_to_string(golden().join("vocab.txt")).unwrap();
    let with = |name: &str, text: &str| {
        let folder = folder(&tensors());
        std::fs::write(folder.path().join(name), text).unwrap();
        load(&folder)
    };
    let more = format!("{words}one\ntoo\nmany\n");
    refused(with("vocab.txt", &more), &["vocab.txt", "21", "vocab_size", "19"]);
    refused(with("vocab.txt", &words.replace("[SEP]", "[sep]")), &["vocab.txt", "[SEP]"]);
    refused(with("tokenizer.json", "{}"), &["tokenizer.json"]);
    refused(with("tokenizer_config.json", "{"), &["tokenizer_config.json:1"]);
    refused(with("tokenizer_config.json", r#"{"do_lower_case": "yes"}"#), &["do_lower_case", "yes"]);
}
