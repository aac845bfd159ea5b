//! A tiny base in a folder, as Hugging Face lays one out, and a patch over it.

use std::path::Path;

use bitfit::base::problem::{Problem, Texts};
use bitfit::base::{Base, Config};
use bitfit::patch::{Patch, Selection};
use safetensors::tensor::{Dtype, TensorView};

/// Random weights of the tiny shape, spread wider than before pretraining: with 0.02, two texts differ in their logits by
/// less than a test's tolerance.
pub fn weights(seed: u64) -> Base {
    Base::random(Config { initializer_range: 0.2, ..Config::tiny() }, seed)
}

/// Writes a cased base of random weights; its config names `float16`, as some do whose weights are not. Its weights are
/// those of [`weights`].
pub fn folder(path: &Path, has_pooler: bool) -> Base {
    let config = Config::tiny();
    let weights = weights(11);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for p in weights.parameters().iter().filter(|p| has_pooler || !p.name.starts_with("pooler.")) {
        let bytes = weights.tensor(&p.name).unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push((p.name.clone(), p.shape.clone(), bytes));
    }
    let views = tensors.iter().map(|(n, s, b)| (n.as_str(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    let format = [("format".to_string(), "pt".to_string())].into();
    std::fs::write(path.join("model.safetensors"), safetensors::serialize(views, Some(format)).unwrap()).unwrap();
    let json = serde_json::json!({
        "architectures": ["BertModel"], "model_type": "bert", "_name_or_path": "org/tiny", "torch_dtype": "float16",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
        "pad_token_id": 0
    });
    std::fs::write(path.join("config.json"), json.to_string()).unwrap();
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from);
    let letters = ('a'..='z').chain('A'..='Z').flat_map(|c| [c.to_string(), format!("##{c}")]);
    let vocab: Vec<String> = special.into_iter().chain(letters).take(config.vocab_size).collect();
    std::fs::write(path.join("vocab.txt"), vocab.join("\n") + "\n").unwrap();
    std::fs::write(path.join("tokenizer_config.json"), r#"{"do_lower_case": false}"#).unwrap();
    Base::from_folder(path).unwrap()
}

/// A patch of this selection, with every value different from zero.
pub fn patch(base: &Base, spec: &str, problem: Problem) -> Patch {
    Patch::random(base, &Selection::parse(spec).unwrap(), problem, Texts::One, 1).unwrap()
}

/// Two classes.
pub fn two() -> Problem {
    Problem::Classes(vec!["consonant".into(), "vowel".into()])
}
