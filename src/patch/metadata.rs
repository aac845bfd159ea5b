//! What a patch says about itself: its task, how its texts are read, the base it needs, and where its numbers are
//! from. Nothing that differs between two machines that train the same task: no time, path, host or thread count.

use std::collections::{BTreeMap, BTreeSet};

use super::header::shown;
use crate::base::problem::{Problem, Texts};
use crate::error::{Error, Result};

/// The version of the format that this crate writes, and the only one it reads.
const FORMAT_VERSION: &str = "1";
const FORMAT: &str = "bitfit-patch";

/// The longest name, split or selection, in bytes.
const MAX_TEXT_BYTES: usize = 1000;
const MAX_LABELS: usize = 10_000;
const MAX_METRICS: usize = 100;
/// Far above any BERT's positions; what a base allows is checked against the base.
const MAX_LENGTH: usize = 1 << 20;

/// How a sequence's hidden states become the classifier's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Pooling {
    /// The pooler over the first token, as in the paper.
    #[default]
    Cls,
}

impl Pooling {
    /// The name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Cls => "cls",
        }
    }
}

/// A patch's metadata. Texts are at most 1000 bytes and hold no control characters.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    /// The task's name; not empty.
    pub task: String,
    /// What is predicted; 2 to 10,000 labels where it is classes.
    pub problem: Problem,
    /// How many texts an input has.
    pub texts: Texts,
    /// The length in tokens that texts are cut to; at least 1, at most the base's positions.
    pub max_length: usize,
    /// How the classifier's input is made.
    pub pooling: Pooling,
    /// What trained, as [`Selection::spec`](super::Selection::spec) writes it.
    pub selection: String,
    /// The base's hub id or name.
    pub base_id: String,
    /// The base's fingerprint: 64 hexadecimal digits.
    pub base_fingerprint: String,
    /// The tokenizer's fingerprint: 64 hexadecimal digits.
    pub tokenizer_fingerprint: String,
    /// SHA-256 over the resolved settings and the training rows: 64 hexadecimal digits.
    pub training_digest: String,
    /// The final metrics by name; finite. Empty where there was nothing to measure on.
    pub metrics: BTreeMap<String, f64>,
    /// The split that `metrics` were measured on, as `dev`.
    pub split: String,
    /// The epoch, counted from 1, whose values these are; 0 before the first has ended.
    pub epoch: u32,
    /// The patch's identity: SHA-256 as 64 hexadecimal digits. Empty in metadata that no [`Patch`](super::Patch)
    /// holds yet, which computes it.
    pub content_hash: String,
}

impl Metadata {
    /// Whether every field is what it must be; `content_hash` is not looked at.
    ///
    /// # Errors
    ///
    /// The first field that is not, by name.
    pub fn check(&self) -> Result<()> {
        self.problem_with().map_err(Error::Usage)
    }

    pub(super) fn problem_with(&self) -> Result<(), String> {
        text("task", &self.task)?;
        problem(&self.problem)?;
        if !(1..=MAX_LENGTH).contains(&self.max_length) {
            return Err(format!("max_length: expected 1 to {MAX_LENGTH}, found {}", self.max_length));
        }
        text("selection", &self.selection)?;
        text("base_id", &self.base_id)?;
        hash("base_fingerprint", &self.base_fingerprint)?;
        hash("tokenizer_fingerprint", &self.tokenizer_fingerprint)?;
        hash("training_digest", &self.training_digest)?;
        text("split", &self.split)?;
        if self.metrics.len() > MAX_METRICS {
            return Err(format!("metrics: expected at most {MAX_METRICS}, found {}", self.metrics.len()));
        }
        for (name, value) in &self.metrics {
            text("metrics", name)?;
            if !value.is_finite() {
                return Err(format!("metric {name}: expected a finite number, found {value}"));
            }
        }
        Ok(())
    }

    /// The metadata as the header's strings.
    pub(super) fn to_strings(&self) -> BTreeMap<&'static str, String> {
        let labels = match &self.problem {
            Problem::Classes(labels) => labels.as_slice(),
            Problem::Value => &[],
        };
        // Written through serde_json's values, whose maps and strings have one form; `metrics` is in sorted order.
        let metrics: serde_json::Map<_, _> = self.metrics.iter().map(|(k, &v)| (k.clone(), v.into())).collect();
        [
            ("base_fingerprint", self.base_fingerprint.clone()),
            ("base_id", self.base_id.clone()),
            ("content_hash", self.content_hash.clone()),
            ("epoch", self.epoch.to_string()),
            ("format", FORMAT.into()),
            ("format_version", FORMAT_VERSION.into()),
            ("labels", serde_json::Value::from(labels).to_string()),
            ("max_length", self.max_length.to_string()),
            ("metrics", serde_json::Value::from(metrics).to_string()),
            ("pooling", self.pooling.name().into()),
            ("problem_type", self.problem.name().into()),
            ("selection", self.selection.clone()),
            ("split", self.split.clone()),
            ("task", self.task.clone()),
            ("texts", self.texts.count().to_string()),
            ("tokenizer_fingerprint", self.tokenizer_fingerprint.clone()),
            ("training_digest", self.training_digest.clone()),
        ]
        .into()
    }

    /// Reads the header's strings and checks them. The error says what is wrong.
    pub(super) fn from_strings(mut strings: BTreeMap<String, String>) -> Result<Metadata, String> {
        let mut take = |key: &str| strings.remove(key).ok_or_else(|| format!("its metadata have no `{key}`"));
        let format = take("format").map_err(|e| format!("{e}, so it is a safetensors file but no patch"))?;
        let version = take("format_version")?;
        if (format.as_str(), version.as_str()) != (FORMAT, FORMAT_VERSION) {
            return Err(format!(
                "expected format {FORMAT} of version {FORMAT_VERSION}, found {} of version {}; a newer bitfit may read it",
                shown(&format),
                shown(&version)
            ));
        }
        let (problem_type, labels) = (take("problem_type")?, take("labels")?);
        let labels: Vec<String> = serde_json::from_str(&labels).map_err(|e| format!("labels: {e}"))?;
        let metadata = Metadata {
            problem: match (problem_type.as_str(), labels.is_empty()) {
                ("single_label_classification", _) => Problem::Classes(labels),
                ("regression", true) => Problem::Value,
                ("regression", false) => return Err("labels: a regression has none".into()),
                _ => return Err(format!("problem_type: unknown, {}", shown(&problem_type))),
            },
            texts: match take("texts")?.as_str() {
                "1" => Texts::One,
                "2" => Texts::Two,
                other => return Err(format!("texts: expected 1 or 2, found {}", shown(other))),
            },
            pooling: match take("pooling")?.as_str() {
                "cls" => Pooling::Cls,
                other => return Err(format!("pooling: expected cls, found {}", shown(other))),
            },
            max_length: number("max_length", &take("max_length")?)?,
            epoch: number("epoch", &take("epoch")?)?,
            metrics: serde_json::from_str(&take("metrics")?).map_err(|e| format!("metrics: {e}"))?,
            task: take("task")?,
            selection: take("selection")?,
            base_id: take("base_id")?,
            base_fingerprint: take("base_fingerprint")?,
            tokenizer_fingerprint: take("tokenizer_fingerprint")?,
            training_digest: take("training_digest")?,
            split: take("split")?,
            content_hash: take("content_hash")?,
        };
        if let Some(key) = strings.keys().next() {
            return Err(format!("its metadata have an unknown key {}; a newer bitfit may read it", shown(key)));
        }
        metadata.problem_with()?;
        hash("content_hash", &metadata.content_hash)?;
        Ok(metadata)
    }
}

/// Whether a task's labels can stand in a patch: ask before training, not after it.
///
/// # Errors
///
/// Fewer than two labels, more than 10,000, one that is empty, too long, holds a control character, or stands twice.
pub fn check_problem(asked: &Problem) -> Result<()> {
    problem(asked).map_err(Error::Usage)
}

/// Whether a task's name can stand in a patch: ask before training, not after it.
///
/// # Errors
///
/// A name that is empty, above 1000 bytes, or holds a control character.
pub fn check_task_name(name: &str) -> Result<()> {
    text("task", name).map_err(Error::Usage)
}

fn problem(problem: &Problem) -> Result<(), String> {
    let Problem::Classes(labels) = problem else { return Ok(()) };
    if !(2..=MAX_LABELS).contains(&labels.len()) {
        return Err(format!("labels: expected 2 to {MAX_LABELS}, found {}", labels.len()));
    }
    let mut seen = BTreeSet::new();
    for label in labels {
        text("label", label)?;
        if !seen.insert(label) {
            return Err(format!("label {}: expected all labels different, found it twice", shown(label)));
        }
    }
    Ok(())
}

/// Names are shown on terminals and in logs, so nothing in them may steer one: no control characters, and none of
/// those that reorder or break a line.
fn text(what: &str, text: &str) -> Result<(), String> {
    let steers = |c: char| {
        c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if text.trim().is_empty() {
        Err(format!("{what}: expected a text, found {}", shown(text)))
    } else if text.len() > MAX_TEXT_BYTES {
        Err(format!("{what}: expected at most {MAX_TEXT_BYTES} bytes, found {}: {}", text.len(), shown(text)))
    } else if text.contains(steers) {
        Err(format!("{what}: expected no control characters, found {}", shown(text)))
    } else {
        Ok(())
    }
}

fn hash(what: &str, text: &str) -> Result<(), String> {
    if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    Err(format!("{what}: expected 64 hexadecimal digits in lower case, found {}", shown(text)))
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{what}: expected a whole number, found {}", shown(text)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn metadata() -> Metadata {
        Metadata {
            task: "mrpc".into(),
            problem: Problem::Classes(vec!["not_equivalent".into(), "equivalent".into()]),
            texts: Texts::Two,
            max_length: 128,
            pooling: Pooling::Cls,
            selection: "bitfit".into(),
            base_id: "org/tiny".into(),
            base_fingerprint: "0".repeat(64),
            tokenizer_fingerprint: "1".repeat(64),
            training_digest: "2".repeat(64),
            metrics: [("accuracy".to_string(), 0.75), ("f1".to_string(), 1.0)].into(),
            split: "dev".into(),
            epoch: 3,
            content_hash: "3".repeat(64),
        }
    }

    fn strings(metadata: &Metadata) -> BTreeMap<String, String> {
        metadata.to_strings().into_iter().map(|(k, v)| (k.to_string(), v)).collect()
    }

    #[test]
    fn metadata_read_back_from_their_strings() {
        let value = Metadata { problem: Problem::Value, texts: Texts::One, metrics: BTreeMap::new(), ..metadata() };
        for metadata in [metadata(), value] {
            assert_eq!(Metadata::from_strings(strings(&metadata)).unwrap(), metadata);
        }
        assert_eq!(metadata().to_strings()["metrics"], r#"{"accuracy":0.75,"f1":1.0}"#);
        assert_eq!(metadata().to_strings()["labels"], r#"["not_equivalent","equivalent"]"#);
    }

    #[test]
    fn a_missing_or_unknown_key_is_refused_by_name() {
        for key in metadata().to_strings().into_keys() {
            let mut strings = strings(&metadata());
            strings.remove(key);
            assert!(Metadata::from_strings(strings).unwrap_err().contains(&format!("`{key}`")));
        }
        let mut strings = strings(&metadata());
        strings.insert("thresholds".into(), "[]".into());
        assert!(Metadata::from_strings(strings).unwrap_err().contains("newer bitfit"));
    }

    #[test]
    fn a_value_that_is_not_what_it_must_be_is_refused() {
        let long = "x".repeat(1001);
        for (key, value) in [
            ("format", "pt"),
            ("format_version", "2"),
            ("task", ""),
            ("task", " "),
            ("task", &long),
            ("task", "a\u{1b}[31m"),
            ("task", "a\nb"),
            ("task", "a\u{202e}b"),
            ("problem_type", "token_classification"),
            ("problem_type", "regression"),
            ("labels", "[]"),
            ("labels", r#"["only"]"#),
            ("labels", r#"["a","a"]"#),
            ("labels", r#"["a",""]"#),
            ("labels", r#"["a","b\u0000"]"#),
            ("labels", r#"["a",1]"#),
            ("labels", r#"{"a":1}"#),
            ("labels", "not json"),
            ("texts", "3"),
            ("texts", "01"),
            ("max_length", "0"),
            ("max_length", "-1"),
            ("max_length", "99999999999999999999999"),
            ("pooling", "mean"),
            ("selection", ""),
            ("base_id", "a\tb"),
            ("base_fingerprint", ""),
            ("base_fingerprint", &"A".repeat(64)),
            ("tokenizer_fingerprint", &"g".repeat(64)),
            ("training_digest", &"0".repeat(63)),
            ("content_hash", ""),
            ("metrics", r#"{"f1":null}"#),
            ("metrics", r#"{"f1":1e999}"#),
            ("metrics", r#"{"":0.5}"#),
            ("metrics", "[0.5]"),
            ("split", ""),
            ("epoch", "1.5"),
            ("epoch", "4294967296"),
        ] {
            let mut strings = strings(&metadata());
            strings.insert(key.into(), value.into());
            assert!(Metadata::from_strings(strings).is_err(), "{key}={value:?}");
        }
    }

    #[test]
    fn a_metric_that_is_not_finite_is_refused_before_it_is_written() {
        let metrics = [("f1".to_string(), f64::NAN)].into();
        assert!(Metadata { metrics, ..metadata() }.check().unwrap_err().to_string().contains("f1"));
    }
}
