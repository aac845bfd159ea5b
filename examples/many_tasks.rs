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
use bitfit::base::problem::{Problem, Texts};
use bitfit::base::{Base, BaseSpec, Config};
use bitfit::patch::{Dtype, Patch, Selection};
use safetensors::tensor::TensorView;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let (out, shape, tasks, selection) = match &args[..] {
        [_, out, shape, tasks] => (Path::new(out), shape, tasks, "bitfit"),
        [_, out, shape, tasks, selection] => (Path::new(out), shape, tasks, selection.as_str()),
        _ => anyhow::bail!("usage: many_tasks OUT SHAPE TASKS [SELECTION]"),
    };
    let (tasks, selection): (u64, _) = (tasks.parse().context("TASKS is a number")?, Selection::parse(selection)?);
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
        let classes = Problem::Classes(vec!["bad".into(), "good".into()]);
        let patch = Patch::random(&base, &selection, classes, Texts::One, task)?;
        patch.save(&store.join(format!("t{task:03}.safetensors")), Dtype::F32)?;
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
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "initializer_range": config.initializer_range,
        "pad_token_id": 0,
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
