//! Fingerprints: SHA-256 over a description that does not depend on the file it was read from.
//!
//! A description is a sequence of texts, numbers and data, so that no two descriptions share their bytes: a text is
//! its length in bytes (64 bits, little-endian) and its UTF-8; a number is 64 bits, little-endian; data stand as they
//! are, and their length follows from what stands before them. The first text names the kind of the description and
//! its version; whoever changes what is hashed changes that name.

use sha2::{Digest, Sha256};

use super::config::Config;

/// A description that is being hashed.
pub(super) struct Fingerprint(Sha256);

impl Fingerprint {
    /// Begins a description of this kind.
    pub(super) fn new(kind: &str) -> Self {
        let mut begun = Fingerprint(Sha256::new());
        begun.text(kind);
        begun
    }

    pub(super) fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    pub(super) fn number(&mut self, number: u64) {
        self.0.update(number.to_le_bytes());
    }

    /// A value that may be absent.
    pub(super) fn option(&mut self, number: Option<u64>) {
        self.number(number.is_some() as u64);
        self.number(number.unwrap_or(0));
    }

    pub(super) fn data(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The config fields that change the arithmetic and do not show in the tensors' shapes.
    pub(super) fn arithmetic(&mut self, config: &Config) {
        self.number(config.num_attention_heads as u64);
        self.text(config.hidden_act.name());
        self.number(config.layer_norm_eps.to_bits());
        self.text("absolute");
    }

    /// What stands before a tensor's little-endian bytes; `dtype` as in a safetensors header.
    pub(super) fn tensor(&mut self, name: &str, dtype: &str, shape: &[usize]) {
        self.text(name);
        self.text(dtype);
        self.number(shape.len() as u64);
        for &size in shape {
            self.number(size as u64);
        }
    }

    /// The hash itself.
    pub(super) fn bytes(self) -> [u8; 32] {
        self.0.finalize().into()
    }

    /// The hash in 64 hexadecimal digits.
    pub(super) fn finish(self) -> String {
        hex(&self.bytes())
    }
}

/// A hash in hexadecimal digits, as every fingerprint is written.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_hashed_as_the_module_says() {
        let mut ours = Fingerprint::new("kind 1");
        ours.number(7);
        ours.tensor("a", "F32", &[2, 3]);
        let mut bytes = Vec::new();
        bytes.extend(6u64.to_le_bytes());
        bytes.extend(b"kind 1");
        bytes.extend(7u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(b"a");
        bytes.extend(3u64.to_le_bytes());
        bytes.extend(b"F32");
        for number in [2u64, 2, 3] {
            bytes.extend(number.to_le_bytes());
        }
        let expected: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(ours.finish(), expected);
    }

    #[test]
    fn every_field_that_changes_the_arithmetic_changes_the_fingerprint() {
        let of = |config: &Config| {
            let mut f = Fingerprint::new("test");
            f.arithmetic(config);
            f.finish()
        };
        let tiny = Config::tiny();
        let same = Config { hidden_dropout_prob: 0.3, initializer_range: 0.5, ..tiny.clone() };
        assert_eq!(of(&tiny), of(&same));
        for other in [
            Config { num_attention_heads: 2, ..tiny.clone() },
            Config { hidden_act: crate::base::config::Activation::Relu, ..tiny.clone() },
            Config { layer_norm_eps: 1e-5, ..tiny.clone() },
        ] {
            assert_ne!(of(&tiny), of(&other));
        }
    }
}
