//! skeleton
use super::config::Config;
use crate::error::Result;
use std::path::Path;
/// A BERT's tokenizer.
pub struct Tokenizer {}
/// A text, or a pair, as ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids, with `[CLS]` and `[SEP]`.
    pub ids: Vec<u32>,
    /// Token type ids, one a token: 0 for the first text, 1 for the second.
    pub type_ids: Vec<u32>,
    /// Whether tokens were cut off to fit the maximum length.
    pub truncated: bool,
}
#[expect(unused_variables)]
impl Tokenizer {
    /// From a folder.
    pub fn load(folder: &Path, config: &Config) -> Result<Tokenizer> {
        todo!()
    }
    /// From a vocabulary.
    pub fn from_vocab(lines: Vec<String>, do_lower_case: bool) -> Result<Tokenizer> {
        todo!()
    }
    /// Text to ids.
    pub fn encode(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<Encoding> {
        todo!()
    }
    /// Hex SHA-256.
    pub fn fingerprint(&self) -> &str {
        todo!()
    }
    /// Writes `tokenizer.json`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        todo!()
    }
}
