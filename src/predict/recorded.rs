//! How far a run has come: `OUT.progress`, beside the `OUT.partial` that it speaks of.
//!
//! It names everything that decides the output, so that rows of two different runs never meet in one file. The input is
//! known by its length and by a hash of its first and last bytes, not by its path, which may be another on the machine
//! that goes on, and not by all its bytes, which would be read twice: a file that was changed in its middle alone, at
//! equal length, is not noticed. The processor is not named either: another one may round the last digit differently.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::row_writer::Form;
use super::tasks::TaskPatch;
use crate::base::hex;
use crate::data::{Columns, Format, Shard};
use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::patch::write_aside;

/// The record's own version.
const VERSION: u32 = 1;

/// Bytes at either end of the input that are hashed.
const END_BYTES: u64 = 64 << 10;

/// What is written to `OUT.progress`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recorded {
    version: u32,
    /// What was asked.
    pub(super) asked: Asked,
    /// Rows that are answered.
    pub(super) rows: u64,
    /// Bytes of `OUT.partial` that hold them.
    pub(super) bytes: u64,
    /// For each task, how many of the rows were cut.
    pub(super) truncated: Vec<u64>,
}

/// Everything that decides an output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    input_bytes: u64,
    /// SHA-256 over the first and the last [`END_BYTES`].
    input_ends: String,
    input_format: String,
    text_column: String,
    text_pair_column: Option<String>,
    shard: String,
    form: String,
    base: String,
    patches: Vec<String>,
    precision: String,
}

impl Asked {
    /// What is asked of an input that is a file.
    pub(super) fn of(
        input: &Path,
        columns: &Columns,
        shard: Shard,
        form: Form,
        encoder: &Encoder,
        tasks: &[TaskPatch],
    ) -> Result<Self> {
        let (input_bytes, input_ends) = ends(input).map_err(Error::io("read", input))?;
        Ok(Asked {
            input_bytes,
            input_ends,
            input_format: Format::of(input)?.extension().into(),
            text_column: columns.text.clone(),
            text_pair_column: columns.text_pair.clone(),
            shard: shard.to_string(),
            form: form.name().into(),
            base: encoder.base().fingerprint().into(),
            patches: tasks.iter().map(|task| task.content_hash().into()).collect(),
            precision: encoder.precision().to_string(),
        })
    }

    /// What of it is not as it was, each with what it was where that can be said in a word.
    fn differences(&self, before: &Asked) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, now: &str, then: &str| {
            if now != then {
                found.push(format!("{what} was `{then}` and is `{now}`"));
            }
        };
        let pair = |asked: &Asked| asked.text_pair_column.clone().unwrap_or_else(|| "(none)".into());
        compare("the input's length", &self.input_bytes.to_string(), &before.input_bytes.to_string());
        compare("the input's format", &self.input_format, &before.input_format);
        compare("--text-column", &self.text_column, &before.text_column);
        compare("--text-pair-column", &pair(self), &pair(before));
        compare("--shard", &self.shard, &before.shard);
        compare("the form of the output (--json)", &self.form, &before.form);
        compare("--precision", &self.precision, &before.precision);
        if self.input_bytes == before.input_bytes && self.input_ends != before.input_ends {
            found.push("the input begins or ends with other bytes".into());
        }
        if self.base != before.base {
            found.push("the base is another".into());
        }
        if self.patches != before.patches {
            found.push("the patches are others, or in another order".into());
        }
        found
    }
}

impl Recorded {
    pub(super) fn new(asked: Asked, rows: u64, bytes: u64, truncated: Vec<u64>) -> Self {
        Recorded { version: VERSION, asked, rows, bytes, truncated }
    }

    /// Reads a record; `None` where there is none.
    ///
    /// # Errors
    ///
    /// A file that is no record of this version.
    pub(super) fn load(path: &Path) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let advice = "--overwrite starts anew";
        let recorded: Recorded = serde_json::from_str(&text).map_err(|e| {
            Error::content(path, format!("expected the record of a run that did not end: {e}; {advice}"))
        })?;
        if recorded.version != VERSION {
            let message = format!("expected a record of version {VERSION}, found {}; {advice}", recorded.version);
            return Err(Error::content(path, message));
        }
        Ok(Some(recorded))
    }

    /// Whether it is the record of a run of what is asked now.
    ///
    /// # Errors
    ///
    /// Where it is not, saying in what.
    pub(super) fn check(&self, asked: &Asked, path: &Path) -> Result<()> {
        let differences = asked.differences(&self.asked);
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "{} is of another run: {}; give what was given, or --overwrite to start anew",
            path.display(),
            differences.join(", "),
        )))
    }

    pub(super) fn save(&self, path: &Path) -> Result<()> {
        write_aside(path, |file| {
            serde_json::to_writer_pretty(&mut *file, self)?;
            file.write_all(b"\n")
        })
    }
}

/// The length of a file and a hash of its two ends.
fn ends(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut bytes = Vec::new();
    for start in [0, length.saturating_sub(END_BYTES)] {
        bytes.clear();
        file.seek(SeekFrom::Start(start))?;
        Read::take(&mut file, END_BYTES).read_to_end(&mut bytes)?;
        hash.update(&bytes);
    }
    Ok((length, hex(&hash.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Asked {
        Asked {
            input_bytes: 7,
            input_ends: "0".into(),
            input_format: "csv".into(),
            text_column: "text".into(),
            text_pair_column: None,
            shard: "0/1".into(),
            form: "rows".into(),
            base: "b".into(),
            patches: vec!["p".into()],
            precision: "f32".into(),
        }
    }

    #[test]
    fn a_record_reads_back_and_anything_else_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.csv.progress");
        assert_eq!(Recorded::load(&path).unwrap(), None);
        let recorded = Recorded::new(asked(), 512, 4096, vec![3]);
        recorded.save(&path).unwrap();
        assert_eq!(Recorded::load(&path).unwrap(), Some(recorded.clone()));
        let text = std::fs::read_to_string(&path).unwrap();
        for other in ["{}".to_string(), text.replace("\"version\": 1", "\"version\": 2"), text[..40].to_string()] {
            std::fs::write(&path, other).unwrap();
            let message = Recorded::load(&path).unwrap_err().to_string();
            assert!(message.contains("out.csv.progress") && message.contains("--overwrite"), "{message}");
        }
    }

    #[test]
    fn what_differs_is_named() {
        let before = Recorded::new(asked(), 1, 1, vec![0]);
        let path = Path::new("out.progress");
        before.check(&asked(), path).unwrap();
        for (other, expected) in [
            (Asked { input_bytes: 8, ..asked() }, "the input's length was `7` and is `8`"),
            (Asked { input_ends: "1".into(), ..asked() }, "begins or ends with other bytes"),
            (Asked { text_pair_column: Some("b".into()), ..asked() }, "--text-pair-column was `(none)` and is `b`"),
            (Asked { shard: "1/2".into(), ..asked() }, "--shard was `0/1` and is `1/2`"),
            (Asked { patches: vec![], ..asked() }, "the patches are others"),
            (Asked { precision: "int8".into(), ..asked() }, "--precision was `f32` and is `int8`"),
            (Asked { base: "c".into(), ..asked() }, "the base is another"),
            (Asked { form: "json".into(), ..asked() }, "--json"),
        ] {
            let message = before.check(&other, path).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("--overwrite"), "{message}");
        }
    }

    #[test]
    fn the_ends_of_a_file_tell_it_from_another() {
        let folder = tempfile::tempdir().unwrap();
        let of = |bytes: &[u8]| {
            let path = folder.path().join("a");
            std::fs::write(&path, bytes).unwrap();
            ends(&path).unwrap()
        };
        let mut long = vec![7u8; 200_000];
        let first = of(&long);
        assert_eq!(first.0, 200_000);
        long[199_999] ^= 1;
        assert_ne!(of(&long), first);
        assert_eq!(of(b"").0, 0);
        assert_ne!(of(b"a"), of(b"b"));
    }
}
