//! The base's config.json: the fields that shape the network or change its arithmetic.
//!
//! [`Config::from_json`] is the only way in from a file; what it returns has been checked, and the layers above trust
//! it. A field that the file leaves out takes the default of transformers' `BertConfig`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A BERT's configuration, checked. Field names are those of config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the word embeddings.
    pub vocab_size: usize,
    /// H.
    pub hidden_size: usize,
    /// Encoder layers.
    pub num_hidden_layers: usize,
    /// A; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// I.
    pub intermediate_size: usize,
    /// The feed-forward's activation.
    pub hidden_act: Activation,
    /// Dropout after embeddings, attention output and output; 0 to below 1.
    pub hidden_dropout_prob: f32,
    /// Dropout of attention probabilities; 0 to below 1.
    pub attention_probs_dropout_prob: f32,
    /// Dropout before the classifier; `None` means `hidden_dropout_prob`.
    pub classifier_dropout: Option<f32>,
    /// Rows of the position embeddings: the longest sequence.
    pub max_position_embeddings: usize,
    /// Rows of the token type embeddings.
    pub type_vocab_size: usize,
    /// Epsilon of every LayerNorm.
    pub layer_norm_eps: f64,
    /// Standard deviation of a new head's weights.
    pub initializer_range: f64,
}

/// The feed-forward's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU by the error function (`gelu`).
    Gelu,
    /// GELU by tanh (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `relu`.
    Relu,
}

impl Activation {
    /// The name in config.json; of several that mean the same arithmetic, the oldest.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_new",
            Activation::Relu => "relu",
        }
    }
}

/// The file that says what a folder's model is.
pub(super) const CONFIG: &str = "config.json";

/// Architectures that can be loaded, as config.json's `model_type` names them.
pub const SUPPORTED: [&str; 1] = ["bert"];

// The largest sizes taken. They are far above any BERT, and keep every product of two sizes within 64 bits. A dropout
// mask's counter has eight bits for the layer and sixteen for the position: see the batch's `DropoutKey`.
const MAX_LAYERS: usize = 255;
const MAX_POSITIONS: usize = 1 << 16;
const MAX_WIDTH: usize = 1 << 20;
const MAX_ROWS: usize = 1 << 28;

impl Config {
    /// Reads the text of a config.json; `path` is for the error messages.
    ///
    /// # Errors
    ///
    /// Text that is not a JSON object, an architecture other than [`SUPPORTED`], a decoder, position embeddings that
    /// are not absolute, an activation that is not known, a size, probability or epsilon outside its range, or heads
    /// that do not divide the hidden size.
    pub fn from_json(path: &Path, text: &str) -> Result<Config> {
        let file = Fields::parse(path, text)?;
        file.check_architecture()?;
        let config = Config {
            vocab_size: file.size("vocab_size", 30522, MAX_ROWS)?,
            hidden_size: file.size("hidden_size", 768, MAX_WIDTH)?,
            num_hidden_layers: file.size("num_hidden_layers", 12, MAX_LAYERS)?,
            num_attention_heads: file.size("num_attention_heads", 12, MAX_POSITIONS - 1)?,
            intermediate_size: file.size("intermediate_size", 3072, MAX_WIDTH)?,
            hidden_act: file.activation()?,
            hidden_dropout_prob: file.probability("hidden_dropout_prob")?.unwrap_or(0.1),
            attention_probs_dropout_prob: file.probability("attention_probs_dropout_prob")?.unwrap_or(0.1),
            classifier_dropout: file.probability("classifier_dropout")?,
            max_position_embeddings: file.size("max_position_embeddings", 512, MAX_POSITIONS)?,
            type_vocab_size: file.size("type_vocab_size", 2, MAX_ROWS)?,
            layer_norm_eps: file.positive("layer_norm_eps", 1e-12)?,
            initializer_range: file.positive("initializer_range", 0.02)?,
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err(file.wrong(
                "num_attention_heads",
                format!("a divisor of hidden_size, which is {}", config.hidden_size),
                config.num_attention_heads,
            ));
        }
        Ok(config)
    }

    /// D: the width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// The probability of dropout before the classifier, 0 to below 1.
    pub fn classifier_dropout(&self) -> f32 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }

    /// The smallest shape that has everything (two layers, four heads), for tests.
    pub fn tiny() -> Config {
        Config { vocab_size: 97, max_position_embeddings: 40, ..Config::shape(32, 2, 4, 64) }
    }

    /// The shape of MiniLM-L6, which the default base has: 22.7 million parameters.
    pub fn minilm() -> Config {
        Config::shape(384, 6, 12, 1536)
    }

    /// The shape of BERT-base (uncased): 109 million parameters.
    pub fn base() -> Config {
        Config::shape(768, 12, 12, 3072)
    }

    /// The shape of BERT-large (uncased): 335 million parameters.
    pub fn large() -> Config {
        Config::shape(1024, 24, 16, 4096)
    }

    fn shape(hidden: usize, layers: usize, heads: usize, intermediate: usize) -> Config {
        Config {
            vocab_size: 30522,
            hidden_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            intermediate_size: intermediate,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            classifier_dropout: None,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
        }
    }
}

/// The name that a config.json gives its model in `_name_or_path`; `None` where it gives none, or a path on the
/// machine that wrote it.
pub(super) fn model_name(text: &str) -> Option<String> {
    let file: Value = serde_json::from_str(text).ok()?;
    let name = file.get("_name_or_path")?.as_str()?;
    let words = name.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains('\\'));
    (words && name.matches('/').count() <= 1).then(|| name.to_string())
}

/// The object of a config.json, with the file's name for messages.
struct Fields<'a> {
    path: &'a Path,
    object: Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn parse(path: &'a Path, text: &str) -> Result<Self> {
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) => Ok(Fields { path, object }),
            Ok(_) => Err(Error::content(path, "expected a JSON object, the config.json of a BERT")),
            Err(e) => Err(Error::line(path, e.line() as u64, format!("not JSON: {e}"))),
        }
    }

    /// A field; null counts as absent, as in transformers.
    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Error {
        Error::content(self.path, format!("`{key}`: expected {expected}, found {found}"))
    }

    fn size(&self, key: &str, default: usize, max: usize) -> Result<usize> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        match value.as_u64() {
            Some(size) if (1..=max as u64).contains(&size) => Ok(size as usize),
            _ => Err(self.wrong(key, format_args!("a whole number from 1 to {max}"), value)),
        }
    }

    fn probability(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            // Compared after rounding: 0.99999999999 would round to 1, and divide by zero later.
            Some(p) if (0.0..1.0).contains(&(p as f32)) => Ok(Some(p as f32)),
            _ => Err(self.wrong(key, "a probability from 0 to below 1", value)),
        }
    }

    fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => Err(self.wrong(key, "a finite number above 0", value)),
        }
    }

    fn activation(&self) -> Result<Activation> {
        let Some(value) = self.get("hidden_act") else {
            return Ok(Activation::Gelu);
        };
        match value.as_str() {
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            _ => Err(self.wrong("hidden_act", "one of gelu, gelu_new, gelu_pytorch_tanh, relu", value)),
        }
    }

    /// Early BERT checkpoints name neither model type nor architecture; their tensors' names are checked later.
    fn check_architecture(&self) -> Result<()> {
        let supported = SUPPORTED.join(", ");
        if let Some(model_type) = self.get("model_type") {
            if !model_type.as_str().is_some_and(|name| SUPPORTED.contains(&name)) {
                return Err(self.wrong(
                    "model_type",
                    format_args!("a supported architecture ({supported})"),
                    model_type,
                ));
            }
        } else if let Some(architectures) = self.get("architectures") {
            let bert = |name: &Value| name.as_str().is_some_and(|n| n == "BertModel" || n.starts_with("BertFor"));
            if !architectures.as_array().is_some_and(|all| all.iter().all(bert)) {
                let expected = format_args!("a supported architecture ({supported}), as BertModel");
                return Err(self.wrong("architectures", expected, architectures));
            }
        }
        for key in ["is_decoder", "add_cross_attention"] {
            if let Some(value) = self.get(key).filter(|&value| value != &Value::Bool(false)) {
                return Err(self.wrong(key, "false: only encoders are supported", value));
            }
        }
        if let Some(position) = self.get("position_embedding_type").filter(|&value| value != "absolute") {
            return Err(self.wrong("position_embedding_type", "\"absolute\"", position));
        }
        let pruned = |value: &&Value| !value.as_object().is_some_and(Map::is_empty);
        if let Some(heads) = self.get("pruned_heads").filter(pruned) {
            return Err(self.wrong("pruned_heads", "none: a pruned BERT is not supported", heads));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        Config::from_json(Path::new("config.json"), text)
    }

    #[test]
    fn missing_fields_take_the_defaults_of_transformers() {
        assert_eq!(read("{}").unwrap(), Config::base());
    }

    #[test]
    fn fields_are_read() {
        let config = read(
            r#"{"model_type": "bert", "vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
                "intermediate_size": 5, "hidden_act": "gelu_new", "hidden_dropout_prob": 0, "classifier_dropout": 0.25,
                "attention_probs_dropout_prob": 0.5, "max_position_embeddings": 6, "type_vocab_size": 1,
                "layer_norm_eps": 1e-5, "initializer_range": 0.1, "position_embedding_type": "absolute"}"#,
        )
        .unwrap();
        let expected = Config {
            vocab_size: 7,
            hidden_size: 8,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            intermediate_size: 5,
            hidden_act: Activation::GeluTanh,
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.5,
            classifier_dropout: Some(0.25),
            max_position_embeddings: 6,
            type_vocab_size: 1,
            layer_norm_eps: 1e-5,
            initializer_range: 0.1,
        };
        assert_eq!(config, expected);
        assert_eq!((config.head_size(), config.classifier_dropout()), (4, 0.25));
    }

    #[test]
    fn every_activation_goes_by_its_names() {
        for (name, activation) in [
            ("gelu", Activation::Gelu),
            ("gelu_new", Activation::GeluTanh),
            ("gelu_pytorch_tanh", Activation::GeluTanh),
            ("relu", Activation::Relu),
        ] {
            assert_eq!(read(&format!(r#"{{"hidden_act": "{name}"}}"#)).unwrap().hidden_act, activation);
        }
    }

    #[test]
    fn what_cannot_be_run_is_refused_with_the_field_and_what_was_expected() {
        for (text, words) in [
            (r#"{"model_type": "roberta"}"#, &["model_type", "bert", "roberta"][..]),
            (r#"{"architectures": ["DistilBertModel"]}"#, &["architectures", "bert", "DistilBertModel"]),
            (
                r#"{"position_embedding_type": "relative_key"}"#,
                &["position_embedding_type", "absolute", "relative_key"],
            ),
            (r#"{"is_decoder": true}"#, &["is_decoder", "encoders"]),
            (r#"{"add_cross_attention": true}"#, &["add_cross_attention", "encoders"]),
            (r#"{"pruned_heads": {"0": [1]}}"#, &["pruned_heads", "pruned"]),
            (r#"{"hidden_act": "swish"}"#, &["hidden_act", "gelu_pytorch_tanh", "swish"]),
            (r#"{"num_attention_heads": 7}"#, &["num_attention_heads", "768", "7"]),
            (r#"{"hidden_size": 0}"#, &["hidden_size", "from 1", "0"]),
            (r#"{"vocab_size": -3}"#, &["vocab_size", "-3"]),
            (r#"{"num_hidden_layers": 1000000000000}"#, &["num_hidden_layers", "255"]),
            (r#"{"intermediate_size": 1.5}"#, &["intermediate_size", "whole", "1.5"]),
            (r#"{"hidden_dropout_prob": 1.0}"#, &["hidden_dropout_prob", "below 1"]),
            (r#"{"hidden_dropout_prob": 0.99999999999}"#, &["hidden_dropout_prob", "below 1"]),
            (r#"{"attention_probs_dropout_prob": -0.1}"#, &["attention_probs_dropout_prob", "-0.1"]),
            (r#"{"classifier_dropout": "some"}"#, &["classifier_dropout", "some"]),
            (r#"{"layer_norm_eps": 0}"#, &["layer_norm_eps", "above 0"]),
            (r#"[1]"#, &["JSON object"]),
            ("{\n\"vocab_size\": }", &["config.json:2", "not JSON"]),
        ] {
            let message = read(text).unwrap_err().to_string();
            for word in words {
                assert!(message.contains(word), "{text} gave {message:?}, which lacks {word:?}");
            }
        }
    }

    #[test]
    fn a_name_in_the_config_is_a_hub_id_and_never_a_path() {
        let name = |n: &str| model_name(&format!(r#"{{"_name_or_path": "{n}"}}"#));
        assert_eq!(name("nreimers/MiniLM-L6-H384-uncased").as_deref(), Some("nreimers/MiniLM-L6-H384-uncased"));
        assert_eq!(name("bert-base-uncased").as_deref(), Some("bert-base-uncased"));
        for path in ["", "./model", "/home/me/model", "runs/7/model", "..", "org/"] {
            assert_eq!(name(path), None, "{path}");
        }
        assert_eq!(model_name("{}"), None);
    }
}
