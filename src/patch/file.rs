//! The patch file: one safetensors file whose bytes follow from what it holds, and which is believed in nothing.
//!
//! Reading goes from the cheap to the dear: lengths, header, metadata, tensor table, then the data, tensor by tensor
//! in the order of the file, then the content hash, then the numbers. Nothing is allocated on the word of a length
//! that has not been held against the real size of the file. The specification is `docs/patch-format.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use half::f16;
use sha2::{Digest, Sha256};

use super::aside::write_aside;
use super::delta::{self, check_finite, check_increasing, wrong};
use super::header::{self, Entry, Header, LENGTH_BYTES, MAX_HEADER_BYTES, Type, shown};
use super::metadata::Metadata;
use super::tensors::{self, Kind};
use crate::base::Base;
use crate::base::config::Config;
use crate::base::delta::{Change, Delta, Head};
use crate::base::hex;
use crate::base::parameters::{Parameter, parameters};
use crate::error::{Error, Result};

/// The precision of a file's floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Dtype {
    /// As trained, to the bit.
    #[default]
    F32,
    /// Half the size; values are rounded to the nearest, and the patch becomes another one, with a hash of its own.
    F16,
}

impl Dtype {
    fn on_disk(self) -> Type {
        match self {
            Dtype::F32 => Type::F32,
            Dtype::F16 => Type::F16,
        }
    }
}

/// A task over a frozen base: what it is and its values, checked, and never changed again.
#[derive(Debug, Clone)]
pub struct Patch {
    metadata: Metadata,
    delta: Delta,
    /// The shape of each dense change, which its values alone do not tell.
    shapes: BTreeMap<String, Vec<u64>>,
    dtype: Dtype,
    /// The file, or the task's name where it was made here: what messages name.
    origin: PathBuf,
}

impl Patch {
    /// A patch of trained values, for a base of this config; `metadata.content_hash` is computed.
    ///
    /// # Errors
    ///
    /// Metadata or values that [`Metadata::check`] or [`delta::check`] refuse, or a maximum length above the config's
    /// positions.
    pub fn new(metadata: Metadata, delta: Delta, config: &Config, has_pooler: bool) -> Result<Patch> {
        metadata.check()?;
        let table = parameters(config, has_pooler);
        let origin = PathBuf::from(&metadata.task);
        fits(&metadata, &delta, config, &table, &origin)?;
        let shapes = table
            .into_iter()
            .filter(|p| matches!(delta.changes.get(&p.name), Some(Change::Dense(_))))
            .map(|p| (p.name, p.shape.iter().map(|&d| d as u64).collect()))
            .collect();
        let mut patch = Patch { metadata, delta, shapes, dtype: Dtype::F32, origin };
        patch.metadata.content_hash = patch.seal(Dtype::F32)?.1;
        Ok(patch)
    }

    /// Reads a patch file, checks all of it (see the module), and keeps nothing of it open.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or that is not a patch in every byte.
    pub fn load(path: &Path) -> Result<Patch> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let about = file.metadata().map_err(Error::io("read", path))?;
        if !about.is_file() {
            return Err(Error::content(path, "expected a patch file, found a folder or a device"));
        }
        Self::read(BufReader::with_capacity(1 << 16, file), about.len(), path)
    }

    /// Reads a patch from the bytes of its file; `origin` is what messages name.
    ///
    /// # Errors
    ///
    /// Bytes that are not a patch to the last one.
    pub fn from_bytes(bytes: &[u8], origin: &Path) -> Result<Patch> {
        Self::read(bytes, bytes.len() as u64, origin)
    }

    fn read(mut source: impl Read, size: u64, origin: &Path) -> Result<Patch> {
        let bad = |message: String| Error::content(origin, message);
        let read_failed = |e: io::Error| Error::io("read", origin)(e);
        let too_short = || bad(format!("expected a patch, found {size} bytes, too few; was the copy cut short?"));
        if size < LENGTH_BYTES {
            return Err(too_short());
        }
        let mut length = [0; LENGTH_BYTES as usize];
        source.read_exact(&mut length).map_err(read_failed)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            let found = format!("a header of at most {MAX_HEADER_BYTES} bytes, found one of {length}");
            return Err(bad(format!("expected {found}; this is no patch, or a damaged one")));
        }
        let data_bytes = (size - LENGTH_BYTES).checked_sub(length).ok_or_else(too_short)?;
        let mut bytes = vec![0; length as usize];
        source.read_exact(&mut bytes).map_err(read_failed)?;

        let Header { metadata, table, data_bytes: expected } = header::parse(&bytes).map_err(bad)?;
        let metadata = Metadata::from_strings(metadata).map_err(bad)?;
        let kinds = tensors::classify(&table, metadata.problem.n_outputs() as u64).map_err(bad)?;
        let canonical = header::framed(&header::json(&metadata.to_strings(), &table));
        if canonical[LENGTH_BYTES as usize..] != bytes {
            return Err(bad("its header is not in canonical form (sorted keys, no spaces); see the format's \
                            specification on how to write one"
                .into()));
        }
        if data_bytes != expected {
            return Err(bad(format!(
                "expected {expected} bytes of tensors after the header, found {data_bytes}; was the copy cut short?"
            )));
        }

        let mut hash = Sha256::new();
        hash.update(unsealed_json(&metadata, &table));
        let mut blocks = Vec::with_capacity(table.len());
        for entry in &table {
            blocks.push(read_tensor(&mut source, entry, &mut hash).map_err(read_failed)?);
        }
        let found = hex(&hash.finalize());
        if found != metadata.content_hash {
            return Err(bad(format!(
                "its content hash is {}, and its content hashes to {found}: the file was damaged or changed; fetch it again",
                metadata.content_hash
            )));
        }
        let dtype = if table.iter().any(|e| e.dtype == Type::F16) { Dtype::F16 } else { Dtype::F32 };
        let n_outputs = metadata.problem.n_outputs();
        let (delta, shapes) = assemble(table, kinds, blocks, n_outputs, origin)?;
        Ok(Patch { metadata, delta, shapes, dtype, origin: origin.to_path_buf() })
    }

    /// The bytes of the patch's file. Equal patches give equal bytes.
    ///
    /// # Errors
    ///
    /// A value that `dtype` cannot hold, or labels so long that the header would be above its limit.
    pub fn to_bytes(&self, dtype: Dtype) -> Result<Vec<u8>> {
        let mut bytes = self.seal(dtype)?.0;
        self.each_block(dtype, |block| bytes.extend_from_slice(block));
        Ok(bytes)
    }

    /// Writes the patch's file: aside, synced, renamed. A file that is there is replaced.
    ///
    /// # Errors
    ///
    /// As [`Patch::to_bytes`] and [`write_aside`].
    pub fn save(&self, path: &Path, dtype: Dtype) -> Result<()> {
        let head = self.seal(dtype)?.0;
        write_aside(path, |file| {
            let mut file = io::BufWriter::with_capacity(1 << 16, file);
            let mut done = io::Write::write_all(&mut file, &head);
            self.each_block(dtype, |block| {
                if done.is_ok() {
                    done = io::Write::write_all(&mut file, block);
                }
            });
            done.and_then(|()| io::Write::flush(&mut file))
        })
    }

    /// What the patch says about itself.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The patch's values.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    /// The patch's values, taken out of it.
    pub fn into_delta(self) -> Delta {
        self.delta
    }

    /// The precision of the file it was read from; [`Dtype::F32`] where it was made here.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The patch's identity: SHA-256 over its metadata, tensor table and data, as 64 hexadecimal digits.
    pub fn content_hash(&self) -> &str {
        &self.metadata.content_hash
    }

    /// Whether this patch is for this base: the same fingerprint, the same tokenizer, and every tensor as the base's
    /// table has it. Ask once, before anything is computed with the two.
    ///
    /// # Errors
    ///
    /// [`Error::WrongBase`] where a fingerprint differs; otherwise the first tensor that does not fit.
    pub fn check_base(&self, base: &Base) -> Result<()> {
        let wrong_base = |expected: String, found: String| Error::WrongBase {
            patch: self.origin.display().to_string(),
            expected,
            found,
        };
        let asked = &self.metadata;
        if asked.base_fingerprint != base.fingerprint() {
            let named = |id: &str, fingerprint: &str| format!("{id} (fingerprint {})", short(fingerprint));
            return Err(wrong_base(
                named(&asked.base_id, &asked.base_fingerprint),
                named(base.id(), base.fingerprint()),
            ));
        }
        let tokenizer = base.tokenizer()?.fingerprint();
        if asked.tokenizer_fingerprint != tokenizer {
            let named = |id: &str, fingerprint: &str| format!("{id} with tokenizer {}", short(fingerprint));
            return Err(wrong_base(named(&asked.base_id, &asked.tokenizer_fingerprint), named(base.id(), tokenizer)));
        }
        for parameter in base.parameters() {
            let expected = || parameter.shape.iter().map(|&d| d as u64);
            if let Some(found) = self.shapes.get(&parameter.name)
                && !expected().eq(found.iter().copied())
            {
                let expected = format!("shape {:?}, as in the base", parameter.shape);
                return Err(wrong(&self.origin, &parameter.name, expected, format!("{found:?}")));
            }
        }
        fits(asked, &self.delta, base.config(), base.parameters(), &self.origin)
    }

    /// Names and shapes of the tensors in the file, by name: for those who show a patch.
    pub fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        let mut all: Vec<_> = self.table(self.dtype).into_iter().map(|e| (e.name, e.shape)).collect();
        all.sort();
        all
    }

    fn table(&self, dtype: Dtype) -> Vec<Entry> {
        tensors::table(&self.delta, &self.shapes, dtype.on_disk())
    }

    /// The file up to its data, and the content hash in it.
    fn seal(&self, dtype: Dtype) -> Result<(Vec<u8>, String)> {
        if dtype == Dtype::F16 {
            self.check_half()?;
        }
        let table = self.table(dtype);
        let mut hash = Sha256::new();
        hash.update(unsealed_json(&self.metadata, &table));
        self.each_block(dtype, |block| hash.update(block));
        let content_hash = hex(&hash.finalize());
        let sealed = Metadata { content_hash: content_hash.clone(), ..self.metadata.clone() };
        let head = header::framed(&header::json(&sealed.to_strings(), &table));
        if head.len() as u64 > LENGTH_BYTES + MAX_HEADER_BYTES {
            return Err(Error::Usage(format!(
                "task {}: its labels are too long together: expected a header of at most {MAX_HEADER_BYTES} bytes, \
                 found {}",
                self.metadata.task,
                head.len()
            )));
        }
        Ok((head, content_hash))
    }

    /// Gives the data in the order of the file, in blocks that bound what is copied.
    fn each_block(&self, dtype: Dtype, mut give: impl FnMut(&[u8])) {
        const ENTRIES: usize = 8192;
        let mut block = Vec::with_capacity(8 * ENTRIES);
        let mut send = |fill: &mut dyn FnMut(&mut Vec<u8>)| {
            block.clear();
            fill(&mut block);
            give(&block);
        };
        for entry in self.table(dtype) {
            match tensors::data(&self.delta, &entry.name) {
                Some(tensors::Data::Positions(indices)) => {
                    for part in indices.chunks(ENTRIES) {
                        send(&mut |block| part.iter().for_each(|i| block.extend(i.to_le_bytes())));
                    }
                }
                Some(tensors::Data::Floats(values)) => {
                    for part in values.chunks(ENTRIES) {
                        send(&mut |block| match dtype {
                            Dtype::F32 => part.iter().for_each(|v| block.extend(v.to_le_bytes())),
                            Dtype::F16 => part.iter().for_each(|&v| block.extend(f16::from_f32(v).to_le_bytes())),
                        });
                    }
                }
                None => {}
            }
        }
    }

    fn check_half(&self) -> Result<()> {
        for entry in self.table(Dtype::F16) {
            let Some(tensors::Data::Floats(values)) = tensors::data(&self.delta, &entry.name) else { continue };
            if let Some(value) = values.iter().find(|&&v| f16::from_f32(v).is_infinite()) {
                let expected = "values that f16 can hold, at most 65504; save this patch as f32";
                return Err(wrong(&self.origin, &entry.name, expected, value.to_string()));
            }
        }
        Ok(())
    }
}

/// Whether a patch's task and values fit a base of this config and table.
fn fits(metadata: &Metadata, delta: &Delta, config: &Config, table: &[Parameter], origin: &Path) -> Result<()> {
    delta::check(delta, table, metadata.problem.n_outputs(), origin)?;
    let positions = config.max_position_embeddings;
    if metadata.max_length > positions {
        let expected = format!("at most {positions}, the positions of the base");
        return Err(Error::setting("max_length", expected, metadata.max_length));
    }
    Ok(())
}

/// What the content hash begins with: the header's JSON, in which the hash itself is an empty string.
fn unsealed_json(metadata: &Metadata, table: &[Entry]) -> String {
    let unsealed = Metadata { content_hash: String::new(), ..metadata.clone() };
    header::json(&unsealed.to_strings(), table)
}

/// A tensor's entries as read, before they are believed.
enum Block {
    Positions(Vec<i64>),
    Floats(Vec<f32>),
}

/// Reads the next tensor, whose size has been held against that of the file.
fn read_tensor(source: &mut impl Read, entry: &Entry, hash: &mut Sha256) -> io::Result<Block> {
    let n = entry.len().unwrap_or(0) as usize;
    let size = entry.dtype.size() as usize;
    let mut left = n;
    let mut buffer = vec![0u8; size * n.min(8192)];
    let mut block = match entry.dtype {
        Type::I64 => Block::Positions(Vec::with_capacity(n)),
        Type::F32 | Type::F16 => Block::Floats(Vec::with_capacity(n)),
    };
    while left > 0 {
        let bytes = &mut buffer[..size * left.min(8192)];
        source.read_exact(bytes)?;
        hash.update(&*bytes);
        left -= bytes.len() / size;
        match (&mut block, entry.dtype) {
            (Block::Positions(all), _) => all.extend(bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b))),
            (Block::Floats(all), Type::F16) => {
                all.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()));
            }
            (Block::Floats(all), _) => all.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
        }
    }
    Ok(block)
}

/// Checks the numbers and puts them where they belong.
fn assemble(
    table: Vec<Entry>,
    kinds: Vec<Kind>,
    blocks: Vec<Block>,
    n_outputs: usize,
    origin: &Path,
) -> Result<(Delta, BTreeMap<String, Vec<u64>>)> {
    let mut positions: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut delta = Delta {
        changes: BTreeMap::new(),
        head: Head { n_outputs, weight: Vec::new(), bias: Vec::new(), pooler: None },
    };
    let (mut shapes, mut pooler) = (BTreeMap::new(), (None, None));
    for ((entry, kind), block) in table.into_iter().zip(kinds).zip(blocks) {
        match (kind, block) {
            (Kind::Indices(of), Block::Positions(signed)) => {
                let unsigned = signed.iter().map(|&i| {
                    let negative = || wrong(origin, &entry.name, "positions from 0", i.to_string());
                    u64::try_from(i).map_err(|_| negative())
                });
                let indices: Vec<u64> = unsigned.collect::<Result<_>>()?;
                check_increasing(&indices, &entry.name, origin)?;
                positions.insert(of, indices);
            }
            (kind, Block::Floats(values)) => {
                check_finite(&values, &entry.name, origin)?;
                match kind {
                    Kind::Weight => delta.head.weight = values,
                    Kind::Bias => delta.head.bias = values,
                    Kind::PoolerWeight => pooler.0 = Some(values),
                    Kind::PoolerBias => pooler.1 = Some(values),
                    Kind::Dense => {
                        shapes.insert(entry.name.clone(), entry.shape);
                        delta.changes.insert(entry.name, Change::Dense(values));
                    }
                    // Positions come before floats in a file, and `classify` has found both of each pair.
                    Kind::Indices(of) | Kind::Values(of) => {
                        let indices = positions.remove(&of).unwrap_or_default();
                        delta.changes.insert(of, Change::Sparse { indices, values });
                    }
                }
            }
            (_, Block::Positions(_)) => {
                return Err(Error::content(origin, format!("tensor {}: expected floats", shown(&entry.name))));
            }
        }
    }
    delta.head.pooler = pooler.0.zip(pooler.1);
    Ok((delta, shapes))
}

/// Enough of a fingerprint to tell two apart by eye.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}
