//! The very small BERT of tests/golden/checkpoint, to be written to a folder with one thing changed.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// One tensor, as a safetensors file holds it.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl safetensors::View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The folder of the golden checkpoint.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoint")
}

/// The golden checkpoint's tensors.
pub fn tensors() -> Vec<Stored> {
    read(&golden().join("model.safetensors"))
}

pub fn read(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let stored = |(name, view): (&str, safetensors::tensor::TensorView)| Stored {
        name: name.to_string(),
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    let mut tensors: Vec<Stored> = file.iter().map(stored).collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// Writes a safetensors file.
pub fn write(path: &Path, tensors: &[Stored]) {
    let bytes = safetensors::serialize(tensors.iter().map(|t| (t.name.clone(), t)), None).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A folder that lives as long as the value: the golden checkpoint's config and vocabulary, and these weights.
pub fn folder(tensors: &[Stored]) -> tempfile::TempDir {
    let folder = bare_folder();
    write(&folder.path().join("model.safetensors"), tensors);
    folder
}

/// The same without weights.
pub fn bare_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "vocab.txt"] {
        std::fs::copy(golden().join(name), folder.path().join(name)).unwrap();
    }
    folder
}
