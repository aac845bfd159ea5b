//! The one table of a BERT's parameters: canonical names, shapes, and which bias term each bias is.
//!
//! Canonical names are those of a Hugging Face `BertModel` state dict (no `bert.` prefix, `LayerNorm.weight` and
//! `.bias`). Everything that names a tensor reads this table.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::config::Config;
use crate::error::{Error, Result};

/// A bias term of the paper: one name for a bias of every layer, or of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// `embeddings.LayerNorm.bias`.
    EmbeddingsLayernorm,
    /// `attention.self.query.bias`: the paper's b_q.
    Query,
    /// `attention.self.key.bias`: the paper's b_k. Its gradient is zero by definition: it cannot learn.
    Key,
    /// `attention.self.value.bias`: the paper's b_v.
    Value,
    /// `attention.output.dense.bias`: the paper's b_m1.
    AttentionOutput,
    /// `attention.output.LayerNorm.bias`.
    AttentionLayernorm,
    /// `intermediate.dense.bias`: the paper's b_m2.
    Intermediate,
    /// `output.dense.bias`: the paper's b_m3.
    Output,
    /// `output.LayerNorm.bias`.
    OutputLayernorm,
    /// `pooler.dense.bias`.
    Pooler,
}

impl Term {
    /// All terms, in the order of the network.
    pub const ALL: [Term; 10] = [
        Term::EmbeddingsLayernorm,
        Term::Query,
        Term::Key,
        Term::Value,
        Term::AttentionOutput,
        Term::AttentionLayernorm,
        Term::Intermediate,
        Term::Output,
        Term::OutputLayernorm,
        Term::Pooler,
    ];

    /// The name a user types.
    pub fn name(self) -> &'static str {
        match self {
            Term::EmbeddingsLayernorm => "embeddings_layernorm",
            Term::Query => "query",
            Term::Key => "key",
            Term::Value => "value",
            Term::AttentionOutput => "attention_output",
            Term::AttentionLayernorm => "attention_layernorm",
            Term::Intermediate => "intermediate",
            Term::Output => "output",
            Term::OutputLayernorm => "output_layernorm",
            Term::Pooler => "pooler",
        }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Term {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Term::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| {
            let known: Vec<_> = Term::ALL.iter().map(|t| t.name()).collect();
            Error::setting("bias term", format!("one of {}", known.join(", ")), format_args!("`{s}`"))
        })
    }
}

/// What a tensor is to the selection of trained parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A bias term (a vector that is added).
    Bias(Term),
    /// A LayerNorm's gamma, named by the term of its bias.
    NormWeight(Term),
    /// A weight matrix of encoder or pooler, (out, in), named by the term of its bias.
    Matrix(Term),
    /// A table of embeddings, (rows, hidden).
    Table(Table),
}

/// The tables of the embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// `embeddings.word_embeddings.weight`.
    Word,
    /// `embeddings.position_embeddings.weight`.
    Position,
    /// `embeddings.token_type_embeddings.weight`.
    TokenType,
}

/// One tensor of a BERT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Canonical name.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// The encoder layer it stands in; `None` for embeddings and pooler.
    pub layer: Option<usize>,
    /// What it is.
    pub role: Role,
}

impl Parameter {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never: every parameter of a valid config has entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Weight and bias of one linear layer or LayerNorm inside an encoder layer, without the layer's prefix.
const LAYER: [(&str, Term, bool); 8] = [
    ("attention.self.query", Term::Query, false),
    ("attention.self.key", Term::Key, false),
    ("attention.self.value", Term::Value, false),
    ("attention.output.dense", Term::AttentionOutput, false),
    ("attention.output.LayerNorm", Term::AttentionLayernorm, true),
    ("intermediate.dense", Term::Intermediate, false),
    ("output.dense", Term::Output, false),
    ("output.LayerNorm", Term::OutputLayernorm, true),
];

/// The canonical name of a layer's tensor, as `layer_tensor(3, "output.dense.bias")`.
pub fn layer_tensor(layer: usize, rest: &str) -> String {
    format!("encoder.layer.{layer}.{rest}")
}

/// Every parameter of a BERT of this config, in the order of the network; the pooler only where `pooler` says that
/// the checkpoint has one.
pub fn parameters(config: &Config, pooler: bool) -> Vec<Parameter> {
    let (h, i) = (config.hidden_size, config.intermediate_size);
    let mut all = Vec::new();
    let mut add = |name: String, shape: &[usize], layer, role| {
        all.push(Parameter { name, shape: shape.to_vec(), layer, role });
    };
    for (table, name, rows) in [
        (Table::Word, "word_embeddings", config.vocab_size),
        (Table::Position, "position_embeddings", config.max_position_embeddings),
        (Table::TokenType, "token_type_embeddings", config.type_vocab_size),
    ] {
        add(format!("embeddings.{name}.weight"), &[rows, h], None, Role::Table(table));
    }
    add("embeddings.LayerNorm.weight".into(), &[h], None, Role::NormWeight(Term::EmbeddingsLayernorm));
    add("embeddings.LayerNorm.bias".into(), &[h], None, Role::Bias(Term::EmbeddingsLayernorm));
    for layer in 0..config.num_hidden_layers {
        for (name, term, norm) in LAYER {
            let (n_out, n_in) = match term {
                Term::Intermediate => (i, h),
                Term::Output => (h, i),
                _ => (h, h),
            };
            let (shape, role) =
                if norm { (vec![h], Role::NormWeight(term)) } else { (vec![n_out, n_in], Role::Matrix(term)) };
            add(layer_tensor(layer, &format!("{name}.weight")), &shape, Some(layer), role);
            add(layer_tensor(layer, &format!("{name}.bias")), &[n_out], Some(layer), Role::Bias(term));
        }
    }
    if pooler {
        add("pooler.dense.weight".into(), &[h, h], None, Role::Matrix(Term::Pooler));
        add("pooler.dense.bias".into(), &[h], None, Role::Bias(Term::Pooler));
    }
    all
}
