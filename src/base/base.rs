//! skeleton
use super::config::Config;
use super::parameters::Parameter;
use super::spec::BaseSpec;
use super::tokenizer::Tokenizer;
use crate::error::Result;
use std::collections::BTreeMap;
use std::path::Path;
/// A frozen base; a clone shares it.
#[derive(Clone)]
pub struct Base {}
#[expect(unused_variables)]
impl Base {
    /// Folder or hub.
    pub fn load(spec: &BaseSpec) -> Result<Base> {
        todo!()
    }
    /// From a folder.
    pub fn from_folder(path: &Path) -> Result<Base> {
        todo!()
    }
    /// From tensors by canonical name.
    pub fn in_memory(
        id: &str,
        config: Config,
        tokenizer: Option<Tokenizer>,
        tensors: BTreeMap<String, Vec<f32>>,
    ) -> Result<Base> {
        todo!()
    }
    /// Random weights.
    pub fn random(config: Config, seed: u64) -> Base {
        todo!()
    }
    /// Hub id or name.
    pub fn id(&self) -> &str {
        todo!()
    }
    /// Config.
    pub fn config(&self) -> &Config {
        todo!()
    }
    /// Hex SHA-256.
    pub fn fingerprint(&self) -> &str {
        todo!()
    }
    /// Tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        todo!()
    }
    /// Pooler.
    pub fn has_pooler(&self) -> bool {
        todo!()
    }
    /// The table.
    pub fn parameters(&self) -> &[Parameter] {
        todo!()
    }
    /// A tensor.
    pub fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        todo!()
    }
    /// The folder.
    pub fn folder(&self) -> Option<&Path> {
        todo!()
    }
}
