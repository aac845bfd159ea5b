//! What decides a run: its settings, its rows and its base. Two runs of one identity give one patch.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::config::TrainConfig;
use crate::base::Base;
use crate::base::hex;
use crate::base::problem::Problem;
use crate::data::{Dataset, Example};
use crate::device::PrecisionName;
use crate::device::batch::Target;
use crate::error::{Error, Result};

/// All that decides a run, by name; no path, device or number of threads is among it.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity(Map<String, Value>);

/// The key of the dev rows, which decide which epoch is kept but not what is learned.
const DEV_ROWS: &str = "dev rows";

impl Identity {
    /// Of a run of `config` on `train` in a precision, evaluated on `dev` (split and rows).
    ///
    /// # Errors
    ///
    /// Where the base has no tokenizer.
    pub fn of(
        base: &Base,
        precision: PrecisionName,
        config: &TrainConfig,
        train: &Dataset,
        dev: &[(String, Dataset)],
    ) -> Result<Self> {
        let labels = match &train.problem {
            Problem::Classes(labels) => json!(labels),
            Problem::Value => Value::Null,
        };
        let mut all = Map::new();
        all.insert("base".into(), base.fingerprint().into());
        all.insert("tokenizer".into(), base.tokenizer()?.fingerprint().into());
        // Runs of f32, the only precision at first, keep the digest they had.
        if precision != PrecisionName::F32 {
            all.insert("precision".into(), precision.to_string().into());
        }
        all.insert("task".into(), train.name.as_str().into());
        all.insert("problem".into(), train.problem.name().into());
        all.insert("labels".into(), labels);
        all.insert("texts".into(), train.texts.count().into());
        if let Ok(Value::Object(settings)) = serde_json::to_value(config) {
            all.extend(settings);
        }
        all.insert("training rows".into(), rows_digest(&train.examples).into());
        let of_split = |(split, rows): &(String, Dataset)| (split.clone(), Value::from(rows_digest(&rows.examples)));
        all.insert(DEV_ROWS.into(), Value::Object(dev.iter().map(of_split).collect()));
        Ok(Identity(all))
    }

    /// As a checkpoint holds it.
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// SHA-256, in hexadecimal digits, over the resolved settings and the training rows.
    pub fn training_digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"bitfit training 1\n");
        let mut named: Vec<_> = self.0.iter().filter(|(name, _)| *name != DEV_ROWS).collect();
        named.sort_by_key(|(name, _)| name.as_str());
        for (name, value) in named {
            hash.update(format!("{}={value}\n", Value::from(name.as_str())));
        }
        hex(&hash.finalize())
    }

    /// Whether a checkpoint of identity `other` is of this run.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] that names everything that differs.
    pub fn check_same(&self, other: &Value, folder: &std::path::Path) -> Result<()> {
        let nothing = Map::new();
        let other = other.as_object().unwrap_or(&nothing);
        let names = self.0.keys().chain(other.keys().filter(|name| !self.0.contains_key(*name)));
        let differs = names.filter(|name| self.0.get(*name) != other.get(*name));
        let differences: Vec<String> =
            differs.map(|name| difference(name, other.get(name), self.0.get(name))).collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "{} holds a run of other settings or data: {}; resume it with its own, choose another folder (--out), or \
             start anew with --overwrite",
            folder.display(),
            differences.join("; ")
        )))
    }
}

fn difference(name: &str, was: Option<&Value>, is: Option<&Value>) -> String {
    // Hashes tell nobody anything.
    if matches!(name, "base" | "tokenizer" | "training rows" | DEV_ROWS) {
        return format!("the {name} differ{}", if name.ends_with("rows") { "" } else { "s" });
    }
    let unset = if name == "precision" { "f32" } else { "unset" };
    let shown = |value: Option<&Value>| value.filter(|v| !v.is_null()).map_or(unset.to_string(), Value::to_string);
    format!("{name} was {} and is {}", shown(was), shown(is))
}

/// SHA-256 over rows, every text with its length before it so that no two lists of rows look alike.
fn rows_digest(examples: &[Example]) -> String {
    let mut hash = Sha256::new();
    hash.update((examples.len() as u64).to_le_bytes());
    let text = |hash: &mut Sha256, text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    for example in examples {
        text(&mut hash, &example.text);
        hash.update([u8::from(example.text_pair.is_some())]);
        if let Some(pair) = &example.text_pair {
            text(&mut hash, pair);
        }
        match example.target {
            None => hash.update([0]),
            Some(Target::Class(class)) => {
                hash.update([1]);
                hash.update(class.to_le_bytes());
            }
            Some(Target::Value(value)) => {
                hash.update([2]);
                hash.update(value.to_le_bytes());
            }
        }
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(text: &str, pair: Option<&str>, class: u32) -> Example {
        Example { text: text.into(), text_pair: pair.map(Into::into), target: Some(Target::Class(class)) }
    }

    #[test]
    fn rows_that_differ_anywhere_have_other_digests() {
        let rows = [
            vec![example("ab", None, 0)],
            vec![example("ab", None, 1)],
            vec![example("a", Some("b"), 0)],
            vec![example("", Some("ab"), 0)],
            vec![example("a", None, 0), example("b", None, 0)],
            vec![example("b", None, 0), example("a", None, 0)],
        ];
        let digests: std::collections::BTreeSet<String> = rows.iter().map(|rows| rows_digest(rows)).collect();
        assert_eq!(digests.len(), rows.len());
    }

    #[test]
    fn what_differs_is_named() {
        let of = |rate: f64, rows: &str| {
            let fields = json!({"learning_rate": rate, "training rows": rows, "limit": null});
            Identity(fields.as_object().cloned().unwrap())
        };
        let mine = of(0.001, "aa");
        let folder = std::path::Path::new("run");
        assert!(mine.check_same(&mine.to_json(), folder).is_ok());
        let message = mine.check_same(&of(0.002, "bb").to_json(), folder).unwrap_err().to_string();
        assert!(message.contains("learning_rate was 0.002 and is 0.001; the training rows differ;"), "{message}");
    }

    #[test]
    fn dev_rows_are_no_part_of_the_training_digest() {
        let of = |dev: &str| Identity(json!({"seed": 1, "dev rows": dev}).as_object().cloned().unwrap());
        assert_eq!(of("a").training_digest(), of("b").training_digest());
        let other = Identity(json!({"seed": 2, "dev rows": "a"}).as_object().cloned().unwrap());
        assert_ne!(of("a").training_digest(), other.training_digest());
    }
}
