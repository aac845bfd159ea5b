//! A base of random weights and patches of random values over it: what a server's speed and memory are measured on,
//! which do not depend on the numbers.
//!
//! ```text
//! cargo run --release --example many_tasks OUT SHAPE TASKS [SELECTION]
//! ```
//!
//! SHAPE is `base`, `minilm`, or an own base (a folder or hub id), which is then used as it is. OUT/base is the base, in
//! Hugging Face's layout with the default base's tokenizer, OUT/patches the store, with tasks `t000`, `t001` and so on, of
//! two classes. SELECTION is what the patches change, `bitfit` where it is left out, as `patch inspect` shows it.

use std::fs;
use std::path::Path;

use anyhow::Context;
use bitfit::base::delta::{Change, Head};
use bitfit::base::problem::{Problem, Texts};
use bitfit::base::{Base, BaseSpec, Config};
use bitfit::patch::{Dtype, Metadata, Patch, Pooling, Selection, delta};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::tensor::TensorView;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let (out, shape, tasks, selection) = match &args[..] {
        [_, out, shape, tasks] => (Path::new(out), shape, tasks, "bitfit"),
        [_, out, shape, tasks, selection] => (Path::new(out), shape, tasks, selection.as_str()),
        _ => anyhow::bail!("usage: many_tasks OUT SHAPE TASKS [SELECTION]"),
    };
    let tasks: usize = tasks.parse().context("TASKS is a number")?;
    let folder = out.join("base");
    match shape.as_str() {
        _ if folder.exists() => {}
        "base" => write_base(&Base::random(Config::base(), 1), &folder)?,
        "minilm" => write_base(&Base::random(Config::minilm(), 1), &folder)?,
        own => write_base(&Base::load(&BaseSpec::parse(own)?)?, &folder)?,
    }
    let base = Base::from_folder(&folder)?;
    let store = out.join("patches");
    fs::create_dir_all(&store)?;
    for task in 0..tasks {
        let bytes = random_patch(&base, selection, task as u64)?;
        fs::write(store.join(format!("t{task:03}.safetensors")), bytes)?;
    }
    Ok(())
}

/// Writes a base as a folder that anything can load.
fn write_base(base: &Base, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let config = base.config();
    let json = serde_json::json!({
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act.name(),
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
    });
    fs::write(folder.join("config.json"), json.to_string())?;
    Base::load(&BaseSpec::resolve(None)?)?.tokenizer()?.save(folder)?;
    let mut tensors = Vec::new();
    for parameter in base.parameters() {
        let bytes: Vec<u8> = base.tensor(&parameter.name)?.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((&parameter.name, &parameter.shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let shape = shape.to_vec();
        Ok((name, TensorView::new(safetensors::Dtype::F32, shape, bytes)?))
    });
    let views = views.collect::<anyhow::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(())
}

/// A patch of two classes whose values follow from `seed`.
fn random_patch(base: &Base, selection: &str, seed: u64) -> anyhow::Result<Vec<u8>> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-0.1..0.1)).collect() };
    let h = base.config().hidden_size;
    let head = Head { n_outputs: 2, weight: numbers(2 * h), bias: numbers(2), pooler: None };
    let requests = Selection::parse(selection)?.resolve(base.config(), base.has_pooler())?;
    let mut values = delta::zeros(&requests, base.parameters(), head);
    for change in values.changes.values_mut() {
        let (Change::Dense(values) | Change::Sparse { values, .. }) = change;
        *values = numbers(values.len());
    }
    let metadata = Metadata {
        task: format!("t{seed:03}"),
        problem: Problem::Classes(vec!["bad".into(), "good".into()]),
        texts: Texts::One,
        max_length: 128,
        pooling: Pooling::Cls,
        selection: selection.into(),
        base_id: base.id().into(),
        base_fingerprint: base.fingerprint().into(),
        tokenizer_fingerprint: base.tokenizer()?.fingerprint().into(),
        training_digest: "0".repeat(64),
        metrics: [("accuracy".to_string(), 0.5)].into(),
        split: "dev".into(),
        epoch: 0,
        content_hash: String::new(),
    };
    Ok(Patch::new(metadata, values, base.config(), base.has_pooler())?.to_bytes(Dtype::F32)?)
}
