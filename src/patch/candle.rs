//! A base and a patch as candle's users want them: a `VarBuilder`, from which candle's own `BertModel` runs the task.
//!
//! candle carries tensors here, at the library's edge; it is not in the training step.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert;

use super::applied::{Piece, pieces, values};
use super::file::Patch;
use crate::base::Base;
use crate::base::config::{Activation, Config};
use crate::error::{Error, Result};

/// The tensors of a base, or of a task over it, as `candle_transformers::models::bert::BertModel::load` names them
/// (`embeddings.*`, `encoder.*`), with `pooler.dense.*` where there is one and, with a patch, `classifier.weight`
/// (C, H) and `classifier.bias` (C). Differences are added in f32, then converted to `dtype`.
///
/// # Errors
///
/// A patch for another base, a base that cannot be read, and what candle refuses (a device without memory, a number
/// format that the device has not).
pub fn var_builder(base: &Base, patch: Option<&Patch>, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    if let Some(patch) = patch {
        patch.check_base(base)?;
    }
    let delta = patch.map(Patch::delta);
    let mut tensors = HashMap::new();
    for Piece { name, shape } in pieces(base, delta) {
        let tensor = Tensor::from_vec(values(base, delta, &name)?, shape, device).and_then(|t| t.to_dtype(dtype));
        tensors.insert(name, tensor.map_err(|e| Error::Device(format!("candle: {e}")))?);
    }
    Ok(VarBuilder::from_tensors(tensors, dtype, device))
}

/// A base's config as candle's `BertModel` wants it. The padding id, which candle's forward pass does not read, is 0.
pub fn bert_config(config: &Config) -> bert::Config {
    bert::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        hidden_act: match config.hidden_act {
            Activation::Gelu => bert::HiddenAct::Gelu,
            Activation::GeluTanh => bert::HiddenAct::GeluApproximate,
            Activation::Relu => bert::HiddenAct::Relu,
        },
        hidden_dropout_prob: config.hidden_dropout_prob.into(),
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        initializer_range: config.initializer_range,
        layer_norm_eps: config.layer_norm_eps,
        pad_token_id: 0,
        position_embedding_type: bert::PositionEmbeddingType::Absolute,
        use_cache: false,
        classifier_dropout: config.classifier_dropout.map(f64::from),
        model_type: Some("bert".into()),
    }
}
