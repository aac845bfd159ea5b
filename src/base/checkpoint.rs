//! Reading a checkpoint: where each of a BERT's tensors lies, checked against the table of parameters, and its bytes.
//!
//! Start at [`Checkpoint::open`]. Opening reads headers only. Tensors are read one by one by seeking in the file, never
//! through a memory map: a map of a file that somebody truncates kills the process. Each read checks that the file is
//! still the one that was opened.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use candle_core::pickle::PthTensors;
use safetensors::tensor::Metadata;

use super::config::Config;
use super::parameters::{Parameter, parameters};
use crate::error::{Error, Result};

const SAFETENSORS: &str = "model.safetensors";
const SAFETENSORS_INDEX: &str = "model.safetensors.index.json";
const PICKLE: &str = "pytorch_model.bin";
const PICKLE_INDEX: &str = "pytorch_model.bin.index.json";

/// The weight files that a folder may hold, the preferred one first.
pub(super) const WEIGHTS: [&str; 3] = [SAFETENSORS, SAFETENSORS_INDEX, PICKLE];

/// The safetensors crate's own bound on a header.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes of a tensor that are in memory at a time.
const CHUNK: usize = 1 << 20;

/// The number formats that are read; all become f32, which holds each of them exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    /// The name in a safetensors header.
    pub(super) fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
        }
    }

    fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// Appends the numbers that these little-endian bytes are.
    fn decode(self, bytes: &[u8], into: &mut Vec<f32>) {
        let halves = bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b));
        match self {
            Dtype::F32 => into.extend(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b))),
            Dtype::F16 => into.extend(halves.map(f32_from_f16)),
            Dtype::Bf16 => into.extend(halves.map(|bits| f32::from_bits(u32::from(bits) << 16))),
        }
    }
}

/// IEEE 754 half precision, exactly.
fn f32_from_f16(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (bits >> 10 & 0x1f, f32::from(bits & 0x3ff));
    sign * match exponent {
        0 => fraction * 2f32.powi(-24),
        0x1f if fraction == 0.0 => f32::INFINITY,
        0x1f => f32::NAN,
        e => (1024.0 + fraction) * 2f32.powi(i32::from(e) - 25),
    }
}

/// One weight file, as it was when it was opened.
struct Source {
    path: PathBuf,
    length: u64,
    modified: Option<SystemTime>,
    pickle: Option<PthTensors>,
}

/// A tensor as a file's header describes it.
struct Found {
    /// The name in the file.
    name: String,
    /// The format's own name for the number format.
    dtype: String,
    shape: Vec<usize>,
    source: usize,
    /// Where its bytes begin in a safetensors file.
    offset: u64,
}

struct Tensor {
    found: Found,
    dtype: Dtype,
}

/// A checkpoint whose tensors all have been found, in the shapes that the config asks for.
pub(super) struct Checkpoint {
    sources: Vec<Source>,
    /// By canonical name.
    tensors: HashMap<String, Tensor>,
    parameters: Vec<Parameter>,
    has_pooler: bool,
}

impl Checkpoint {
    /// Finds a folder's weight file (`model.safetensors`, its shards, or `pytorch_model.bin`) and checks it against the
    /// config.
    ///
    /// # Errors
    ///
    /// No weight file, one that is truncated or no checkpoint, a tensor that is missing, has another shape than the
    /// config asks for or numbers of another kind than f32, f16 and bf16, and encoder tensors beyond the config's.
    pub(super) fn open(folder: &Path, config: &Config) -> Result<Checkpoint> {
        let mut sources = Vec::new();
        let mut found = Vec::new();
        if folder.join(SAFETENSORS).is_file() {
            read_safetensors(folder.join(SAFETENSORS), &mut sources, &mut found)?;
        } else if folder.join(SAFETENSORS_INDEX).is_file() {
            for shard in shards(&folder.join(SAFETENSORS_INDEX))? {
                read_safetensors(folder.join(shard), &mut sources, &mut found)?;
            }
        } else if folder.join(PICKLE).is_file() {
            read_pickle(folder.join(PICKLE), &mut sources, &mut found)?;
        } else if folder.join(PICKLE_INDEX).is_file() {
            return Err(Error::content(folder.join(PICKLE_INDEX), "shards in PyTorch's format are not read"));
        } else {
            let message = format!("holds no weights: expected one of {}", WEIGHTS.join(", "));
            return Err(Error::content(folder, message));
        }
        Checkpoint::check(sources, found, config)
    }

    fn check(sources: Vec<Source>, found: Vec<Found>, config: &Config) -> Result<Checkpoint> {
        let mut by_name: HashMap<String, Found> = HashMap::new();
        for tensor in found {
            let path = &sources[tensor.source].path;
            if let Some(twice) = by_name.insert(canonical(&tensor.name), tensor) {
                let message = format!("two tensors are {} under different names", canonical(&twice.name));
                return Err(Error::content(path, message));
            }
        }
        let has_pooler = by_name.keys().any(|name| name.starts_with("pooler."));
        let parameters = parameters(config, has_pooler);
        // With no tensor at all there is still one source.
        let first = sources[0].path.clone();
        let mut tensors = HashMap::with_capacity(parameters.len());
        for parameter in &parameters {
            let Some(tensor) = by_name.remove(&parameter.name) else {
                return Err(Error::Tensor {
                    path: first,
                    tensor: parameter.name.clone(),
                    expected: format!("shape {:?}", parameter.shape),
                    found: "no tensor of that name, with or without the prefix `bert.`".into(),
                });
            };
            let path = || sources[tensor.source].path.clone();
            if tensor.shape != parameter.shape {
                return Err(Error::Tensor {
                    path: path(),
                    expected: format!("shape {:?}, which config.json asks for", parameter.shape),
                    found: format!("shape {:?}", tensor.shape),
                    tensor: tensor.name,
                });
            }
            let known = [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|dtype| dtype.name() == tensor.dtype);
            let Some(dtype) = known else {
                return Err(Error::Tensor {
                    path: path(),
                    expected: "numbers of type F32, F16 or BF16".into(),
                    found: tensor.dtype,
                    tensor: tensor.name,
                });
            };
            tensors.insert(parameter.name.clone(), Tensor { found: tensor, dtype });
        }
        // What is left over is no part of the encoder (a head, `position_ids`), or the config describes another model.
        let inside = |name: &&String| {
            name.starts_with("encoder.") || (name.starts_with("embeddings.") && name.ends_with("weight"))
        };
        if let Some(name) = by_name.keys().filter(inside).min() {
            let tensor = &by_name[name];
            return Err(Error::Tensor {
                path: sources[tensor.source].path.clone(),
                tensor: tensor.name.clone(),
                expected: format!(
                    "no such tensor in a BERT of {} layers, as config.json says",
                    config.num_hidden_layers
                ),
                found: format!("one of shape {:?}", tensor.shape),
            });
        }
        Ok(Checkpoint { sources, tensors, parameters, has_pooler })
    }

    pub(super) fn has_pooler(&self) -> bool {
        self.has_pooler
    }

    /// The table that the tensors were checked against.
    pub(super) fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The number format of a tensor in the file; `None` for a name that is not in the table.
    pub(super) fn dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|tensor| tensor.dtype)
    }

    /// A tensor's numbers, row-major.
    ///
    /// # Errors
    ///
    /// A name that is not in the table, a file that cannot be read or has changed, and a number that is not finite.
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>> {
        // The shape is the table's, and the file has been found to be as long as its shapes say.
        let n_values = self.tensors.get(name).map_or(0, |tensor| tensor.found.shape.iter().product());
        let mut values = Vec::with_capacity(n_values);
        self.stream(name, |dtype, bytes| dtype.decode(bytes, &mut values))?;
        Ok(values)
    }

    /// A tensor's little-endian bytes as they stand in the file, part by part in order; checked as [`Checkpoint::read`]
    /// checks them.
    pub(super) fn hash(&self, name: &str, mut part: impl FnMut(&[u8])) -> Result<()> {
        self.stream(name, |_, bytes| part(bytes))
    }

    /// Hands out a tensor's little-endian bytes, some whole numbers at a time.
    fn stream(&self, name: &str, mut part: impl FnMut(Dtype, &[u8])) -> Result<()> {
        let tensor = self.tensors.get(name).ok_or_else(|| Error::setting("tensor", "a BERT's tensor", name))?;
        let source = &self.sources[tensor.found.source];
        let mut file = source.reopen()?;
        let mut n_seen = 0;
        let mut finite = |bytes: &[u8]| match first_not_finite(tensor.dtype, bytes) {
            None => {
                n_seen += bytes.len() / tensor.dtype.size();
                Ok(())
            }
            Some(index) => Err(Error::Tensor {
                path: source.path.clone(),
                tensor: tensor.found.name.clone(),
                expected: "finite numbers".into(),
                found: format!("NaN or infinity at flat position {}", n_seen + index),
            }),
        };
        if let Some(pickle) = &source.pickle {
            let bytes = pickle_bytes(pickle, &tensor.found.name).map_err(|e| source.broken(e))?;
            finite(&bytes)?;
            part(tensor.dtype, &bytes);
            return Ok(());
        }
        file.seek(SeekFrom::Start(tensor.found.offset)).map_err(Error::io("read", &source.path))?;
        let mut left = tensor.found.shape.iter().product::<usize>() * tensor.dtype.size();
        let mut buffer = vec![0; CHUNK.min(left)];
        while left > 0 {
            let bytes = &mut buffer[..CHUNK.min(left)];
            file.read_exact(bytes).map_err(Error::io("read", &source.path))?;
            finite(bytes)?;
            part(tensor.dtype, bytes);
            left -= bytes.len();
        }
        Ok(())
    }
}

/// The first number that is infinite or NaN: its exponent has all bits set.
fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    let half = |mask: u16| bytes.as_chunks::<2>().0.iter().position(|&b| u16::from_le_bytes(b) & mask == mask);
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().position(|&b| !f32::from_le_bytes(b).is_finite()),
        Dtype::F16 => half(0x7c00),
        Dtype::Bf16 => half(0x7f80),
    }
}

/// A tensor's name without the prefix of a model with a head, and with LayerNorm's parameters as they are called today.
fn canonical(name: &str) -> String {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    match name.rsplit_once('.') {
        Some((layer_norm, "gamma")) => format!("{layer_norm}.weight"),
        Some((layer_norm, "beta")) => format!("{layer_norm}.bias"),
        _ => name.to_string(),
    }
}

impl Source {
    fn open(path: PathBuf) -> Result<(Source, File)> {
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        let metadata = file.metadata().map_err(Error::io("read", &path))?;
        let modified = metadata.modified().ok();
        Ok((Source { path, length: metadata.len(), modified, pickle: None }, file))
    }

    /// Opens the file once more, and makes sure that it is still the same.
    fn reopen(&self) -> Result<File> {
        let (now, file) = Source::open(self.path.clone())?;
        if (now.length, now.modified) != (self.length, self.modified) {
            return Err(Error::content(&self.path, "the file has changed since it was loaded; load the base again"));
        }
        Ok(file)
    }

    fn broken(&self, reason: impl std::fmt::Display) -> Error {
        Error::content(&self.path, format!("cannot be read as a checkpoint ({reason}); fetch the file again"))
    }
}

/// Reads a safetensors file's header. Everything in it is checked before it is used: the crate's [`Metadata`] holds
/// offsets that follow on each other and fit their shapes, and the file must be exactly as long as they say.
fn read_safetensors(path: PathBuf, sources: &mut Vec<Source>, found: &mut Vec<Found>) -> Result<()> {
    let (source, mut file) = Source::open(path)?;
    let mut size = [0; 8];
    if source.length < 8 {
        return Err(source.broken(format_args!("{} bytes are too few for a header", source.length)));
    }
    file.read_exact(&mut size).map_err(Error::io("read", &source.path))?;
    if &size == b"version " {
        let message = "is a Git LFS pointer, not the weights; run `git lfs pull` where it came from";
        return Err(Error::content(&source.path, message));
    }
    let n_header = u64::from_le_bytes(size);
    if n_header > MAX_HEADER || n_header > source.length - 8 {
        return Err(source.broken(format_args!("a header of {n_header} bytes in a file of {}", source.length)));
    }
    let mut header = vec![0; n_header as usize];
    file.read_exact(&mut header).map_err(Error::io("read", &source.path))?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|e| source.broken(format_args!("its header: {e}")))?;
    let tensors = header.tensors();
    let n_data = tensors.values().map(|tensor| tensor.data_offsets.1 as u64).max().unwrap_or(0);
    if 8 + n_header + n_data != source.length {
        return Err(source.broken(format_args!(
            "expected {} bytes, found {}: a download or copy that broke off?",
            8 + n_header + n_data,
            source.length
        )));
    }
    for (name, tensor) in tensors {
        found.push(Found {
            name,
            dtype: tensor.dtype.to_string(),
            shape: tensor.shape.clone(),
            source: sources.len(),
            offset: 8 + n_header + tensor.data_offsets.0 as u64,
        });
    }
    sources.push(source);
    Ok(())
}

/// The files that an index names.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let file: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::line(index, e.line() as u64, format!("not JSON: {e}")))?;
    let names = file.get("weight_map").and_then(|map| map.as_object()).filter(|map| !map.is_empty());
    let names =
        names.ok_or_else(|| Error::content(index, "expected an object `weight_map` of tensor names to files"))?;
    // A shard lies beside its index; a name that leads elsewhere is not followed.
    let plain = |name: &str| !name.starts_with('.') && !name.contains(['/', '\\']) && name.ends_with(".safetensors");
    names
        .values()
        .map(|name| match name.as_str() {
            Some(name) if plain(name) => Ok(name.to_string()),
            _ => {
                Err(Error::content(index, format!("`weight_map`: expected a safetensors file beside it, found {name}")))
            }
        })
        .collect()
}

/// Reads the table of contents of a PyTorch checkpoint.
fn read_pickle(path: PathBuf, sources: &mut Vec<Source>, found: &mut Vec<Found>) -> Result<()> {
    let (mut source, file) = Source::open(path)?;
    let mut magic = Vec::new();
    file.take(8).read_to_end(&mut magic).map_err(Error::io("read", &source.path))?;
    if magic == b"version " {
        let message = "is a Git LFS pointer, not the weights; run `git lfs pull` where it came from";
        return Err(Error::content(&source.path, message));
    }
    if !magic.starts_with(b"PK") {
        let message = format!(
            "is not a zip archive: PyTorch before 1.6 wrote it, or it is damaged. If PyTorch still reads it, this line \
             converts it: python3 -c \"import torch; p = '{PICKLE}'; torch.save(torch.load(p, map_location='cpu', \
             weights_only=True), p)\""
        );
        return Err(Error::content(&source.path, message));
    }
    let pickle = PthTensors::new(&source.path, None).map_err(|e| source.broken(e))?;
    for (name, tensor) in pickle.tensor_infos() {
        found.push(Found {
            name: name.clone(),
            dtype: tensor.dtype.as_str().to_uppercase(),
            shape: tensor.layout.dims().to_vec(),
            source: sources.len(),
            offset: 0,
        });
    }
    source.pickle = Some(pickle);
    sources.push(source);
    Ok(())
}

/// A tensor's numbers as little-endian bytes.
fn pickle_bytes(pickle: &PthTensors, name: &str) -> candle_core::Result<Vec<u8>> {
    let tensor = pickle.get(name)?.ok_or_else(|| candle_core::Error::Msg(format!("no tensor {name}")))?;
    let mut bytes = Vec::with_capacity(tensor.elem_count() * tensor.dtype().size_in_bytes());
    tensor.write_bytes(&mut bytes)?;
    Ok(bytes)
}
