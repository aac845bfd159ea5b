//! The network on a device: the frozen weights, laid out once and shared by every run and request, and the vectors
//! that each group adds to them.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::layer::{Biases, Frozen, Terms, Weights};
use crate::base::base::Base;
use crate::base::config::Config;
use crate::base::hex;
use crate::base::parameters::{Parameter, Role, Table, Term};
use crate::device::batch::Batch;
use crate::device::ops::{Device, Tables};
use crate::error::{Error, Result};

/// The weights of a base as they lie on a device. A clone shares them; a run that trains weights replaces the ones it
/// touches by copies of its own.
pub struct Network<D: Device> {
    /// The embeddings' tables.
    pub tables: Tables<Arc<D::Table>>,
    /// The embeddings LayerNorm's gamma, (1, H).
    pub gamma: Arc<D::Params>,
    /// The layers, from the bottom.
    pub layers: Vec<Frozen<D>>,
    /// The pooler, where the checkpoint has one.
    pub pooler: Option<Arc<D::Weight>>,
}

impl<D: Device> Clone for Network<D> {
    fn clone(&self) -> Self {
        Network {
            tables: Tables {
                word: self.tables.word.clone(),
                position: self.tables.position.clone(),
                token_type: self.tables.token_type.clone(),
            },
            gamma: self.gamma.clone(),
            layers: self.layers.clone(),
            pooler: self.pooler.clone(),
        }
    }
}

/// Where a weight of a [`Network`] lies.
pub enum Slot<'n, D: Device> {
    /// A LayerNorm's gamma.
    Gamma(&'n mut Arc<D::Params>),
    /// A matrix.
    Matrix(&'n mut Arc<D::Weight>),
    /// A table.
    Table(&'n mut Arc<D::Table>),
}

impl<D: Device> Network<D> {
    /// Reads a base tensor by tensor and lays each out on the device; the raw tensor is dropped at once.
    ///
    /// # Errors
    ///
    /// Where a tensor cannot be read.
    pub fn load(d: &D, base: &Base) -> Result<Self> {
        let config = base.config();
        let find = |role: Role, layer: Option<usize>| parameter(base, role, layer);
        let matrix = |term, layer| -> Result<Arc<D::Weight>> {
            let p = find(Role::Matrix(term), layer)?;
            Ok(Arc::new(d.weight(p.shape[0], p.shape[1], base.tensor(&p.name)?)))
        };
        let gamma = |term, layer| -> Result<Arc<D::Params>> {
            Ok(Arc::new(d.params(1, base.tensor(&find(Role::NormWeight(term), layer)?.name)?)))
        };
        let table = |table| -> Result<Arc<D::Table>> {
            let p = find(Role::Table(table), None)?;
            Ok(Arc::new(d.table(p.shape[1], base.tensor(&p.name)?)))
        };
        let layer = |l| -> Result<Frozen<D>> {
            Ok(Weights {
                query: matrix(Term::Query, Some(l))?,
                key: matrix(Term::Key, Some(l))?,
                value: matrix(Term::Value, Some(l))?,
                attention_output: matrix(Term::AttentionOutput, Some(l))?,
                attention_layernorm: gamma(Term::AttentionLayernorm, Some(l))?,
                intermediate: matrix(Term::Intermediate, Some(l))?,
                output: matrix(Term::Output, Some(l))?,
                output_layernorm: gamma(Term::OutputLayernorm, Some(l))?,
            })
        };
        Ok(Network {
            tables: Tables {
                word: table(Table::Word)?,
                position: table(Table::Position)?,
                token_type: table(Table::TokenType)?,
            },
            gamma: gamma(Term::EmbeddingsLayernorm, None)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            pooler: base.has_pooler().then(|| matrix(Term::Pooler, None)).transpose()?,
        })
    }

    /// The embeddings' tables, to be read.
    pub fn tables(&self) -> Tables<&D::Table> {
        let Tables { word, position, token_type } = &self.tables;
        Tables { word: &**word, position: &**position, token_type: &**token_type }
    }

    /// The weight of a role; `None` for biases.
    pub fn slot(&mut self, role: Role, layer: Option<usize>) -> Option<Slot<'_, D>> {
        match (role, layer) {
            (Role::Table(Table::Word), _) => Some(Slot::Table(&mut self.tables.word)),
            (Role::Table(Table::Position), _) => Some(Slot::Table(&mut self.tables.position)),
            (Role::Table(Table::TokenType), _) => Some(Slot::Table(&mut self.tables.token_type)),
            (Role::NormWeight(_), None) => Some(Slot::Gamma(&mut self.gamma)),
            (Role::NormWeight(term), Some(l)) => self.layers[l].norm_mut(term).map(Slot::Gamma),
            (Role::Matrix(_), None) => self.pooler.as_mut().map(Slot::Matrix),
            (Role::Matrix(term), Some(l)) => self.layers[l].matrix_mut(term).map(Slot::Matrix),
            (Role::Bias(_), _) => None,
        }
    }

    /// Puts a copy with these values in place of a weight; others that share this network keep theirs.
    pub fn replace(&mut self, d: &D, p: &Parameter, values: Vec<f32>) {
        match self.slot(p.role, p.layer) {
            Some(Slot::Gamma(to)) => *to = Arc::new(d.params(1, values)),
            Some(Slot::Matrix(to)) => *to = Arc::new(d.weight(p.shape[0], p.shape[1], values)),
            Some(Slot::Table(to)) => *to = Arc::new(d.table(p.shape[1], values)),
            None => {}
        }
    }

    /// Lays out what a backward reads, where it is not yet.
    pub fn prepare_backward(&self, d: &D) {
        self.matrices().for_each(|w| d.prepare_backward(w));
    }

    fn matrices(&self) -> impl Iterator<Item = &Arc<D::Weight>> {
        let of_layer = |w| {
            let Weights { query, key, value, attention_output, intermediate, output, .. }: &Frozen<D> = w;
            [query, key, value, attention_output, intermediate, output]
        };
        self.layers.iter().flat_map(of_layer).chain(&self.pooler)
    }

    /// SHA-256 over every weight as laid out for the forward: equal before and after a run that trains biases alone.
    pub fn hash(&self, d: &D) -> String {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| hash.update(bytes);
        for table in [&self.tables.word, &self.tables.position, &self.tables.token_type] {
            d.visit_table(table, &mut add);
        }
        for w in self.matrices() {
            d.visit_weight(w, &mut add);
        }
        let gammas = self.layers.iter().flat_map(|w| [&w.attention_layernorm, &w.output_layernorm]);
        for gamma in gammas.chain([&self.gamma]) {
            for value in d.read_params(gamma) {
                hash.update(value.to_le_bytes());
            }
        }
        hex(&hash.finalize())
    }
}

/// The table's row of a role.
fn parameter(base: &Base, role: Role, layer: Option<usize>) -> Result<&Parameter> {
    base.parameters()
        .iter()
        .find(|p| p.role == role && p.layer == layer)
        .ok_or_else(|| Error::Audit(format!("the table of parameters has no {role:?} in layer {layer:?}")))
}

/// Every bias in use, (1 or G, n).
pub struct AllBiases<D: Device> {
    /// `embeddings.LayerNorm.bias`.
    pub embeddings_layernorm: D::Params,
    /// Each layer's.
    pub layers: Vec<Biases<D>>,
    /// `pooler.dense.bias`.
    pub pooler: D::Params,
}

impl<D: Device> AllBiases<D> {
    /// The base's own, one row for all groups; a checkpoint without a pooler has zeros in its place.
    ///
    /// # Errors
    ///
    /// Where a tensor cannot be read.
    pub fn of_base(d: &D, base: &Base) -> Result<Self> {
        let vector = |term, layer| -> Result<D::Params> {
            Ok(d.params(1, base.tensor(&parameter(base, Role::Bias(term), layer)?.name)?))
        };
        let layers = 0..base.config().num_hidden_layers;
        Ok(AllBiases {
            embeddings_layernorm: vector(Term::EmbeddingsLayernorm, None)?,
            layers: layers.map(|l| Terms::try_from_fn(|term| vector(term, Some(l)))).collect::<Result<_>>()?,
            pooler: match base.has_pooler() {
                true => vector(Term::Pooler, None)?,
                false => d.zeros(1, base.config().hidden_size),
            },
        })
    }

    /// The bias of a term.
    pub fn get_mut(&mut self, term: Term, layer: Option<usize>) -> Option<&mut D::Params> {
        match (term, layer) {
            (Term::EmbeddingsLayernorm, _) => Some(&mut self.embeddings_layernorm),
            (Term::Pooler, _) => Some(&mut self.pooler),
            (term, Some(l)) => self.layers.get_mut(l)?.get_mut(term),
            (_, None) => None,
        }
    }
}

/// Refuses a batch that an op would read past a table for: no sequences, ids outside the vocabulary or the token
/// types, a sequence longer than the positions.
pub fn check_batch(config: &Config, batch: &Batch) -> Result<()> {
    if batch.n_sequences() == 0 {
        return Err(Error::setting("batch", "at least one sequence", "none"));
    }
    if let Some(id) = batch.ids().iter().find(|id| **id as usize >= config.vocab_size) {
        return Err(Error::setting("token id", format!("below {}", config.vocab_size), id));
    }
    if let Some(id) = batch.type_ids().iter().find(|id| **id as usize >= config.type_vocab_size) {
        return Err(Error::setting("token type id", format!("below {}", config.type_vocab_size), id));
    }
    let longest = (0..batch.n_sequences()).map(|s| batch.tokens_of(s).len()).max().unwrap_or(0);
    if longest > config.max_position_embeddings {
        let expected = format!("at most {} tokens", config.max_position_embeddings);
        return Err(Error::setting("sequence", expected, longest));
    }
    Ok(())
}
