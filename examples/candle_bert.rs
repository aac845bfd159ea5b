//! A task in candle's own BertModel: `cargo run --release --example candle_bert BASE_FOLDER PATCH "a text"`.

use std::path::Path;

use bitfit::base::Base;
use bitfit::patch::{Patch, candle};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};
use candle_transformers::models::bert::BertModel;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, folder, patch, text] = &args[..] else { anyhow::bail!("usage: candle_bert BASE_FOLDER PATCH TEXT") };
    let base = Base::from_folder(Path::new(folder))?;
    let patch = Patch::load(Path::new(patch))?;
    let weights = candle::var_builder(&base, Some(&patch), DType::F32, &Device::Cpu)?;
    let bert = BertModel::load(weights.clone(), &candle::bert_config(base.config()))?;

    let encoding = base.tokenizer()?.encode(text, None, patch.metadata().max_length)?;
    let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
    let hidden_states = bert.forward(&row(&encoding.ids)?, &row(&encoding.type_ids)?, None)?; // (1, tokens, hidden)

    let linear = |name: &str, n: usize| -> candle_core::Result<Linear> {
        let weights = weights.pp(name);
        Ok(Linear::new(weights.get((n, base.config().hidden_size), "weight")?, Some(weights.get(n, "bias")?)))
    };
    let first = hidden_states.narrow(1, 0, 1)?.squeeze(1)?; // (1, hidden): the first token's
    let pooled = linear("pooler.dense", base.config().hidden_size)?.forward(&first)?.tanh()?;
    let logits = linear("classifier", patch.metadata().problem.n_outputs())?.forward(&pooled)?;
    println!("{:?}", logits.squeeze(0)?.to_vec1::<f32>()?);
    Ok(())
}
