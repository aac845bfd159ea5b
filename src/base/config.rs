//! The base's config.json: the fields that shape the network or change its arithmetic.

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
