//! A task as a whole Hugging Face model: a folder that `AutoModelForSequenceClassification` loads, for those who do
//! not share a base.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::applied::{pieces, values};
use super::aside::{parent, sync_folder};
use super::file::Patch;
use super::header::{self, Entry, Type};
use super::metadata::Pooling;
use crate::base::Base;
use crate::base::config::Config;
use crate::base::problem::Problem;
use crate::error::{Error, Result};

/// Writes the model of a patch over its base into a new folder: `config.json` (the base's own, made one of
/// `BertForSequenceClassification`), `model.safetensors` (f32, differences added), `tokenizer.json` and
/// `tokenizer_config.json`. Its logits are this crate's. The folder appears whole or not at all.
///
/// # Errors
///
/// A folder that is not empty, a patch for another base, a base that cannot be read, and whatever the operating system
/// refuses.
pub fn merge(patch: &Patch, base: &Base, out: &Path) -> Result<()> {
    match patch.metadata().pooling {
        // The one that BertForSequenceClassification has; any other must be refused here.
        Pooling::Cls => {}
    }
    refuse_occupied(out)?;
    patch.check_base(base)?;
    let folder = Aside::new(out)?;
    write_json(&folder.path.join("config.json"), &config(patch, base)?)?;
    write_model(patch, base, &folder.path.join("model.safetensors"))?;
    base.tokenizer()?.save(&folder.path)?;
    let settings = tokenizer_settings(patch, base, &folder.path)?;
    write_json(&folder.path.join("tokenizer_config.json"), &settings)?;
    folder.take_place_of(out)
}

fn refuse_occupied(out: &Path) -> Result<()> {
    match fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Usage(format!(
            "{}: expected a folder that is empty or not there, found one with files in it; name another, or empty it",
            out.display()
        ))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("write to", out)(e)),
    }
}

/// A folder beside the one that is wanted; removed again unless it takes its place.
struct Aside {
    path: PathBuf,
}

impl Aside {
    fn new(out: &Path) -> Result<Self> {
        let name =
            out.file_name().ok_or_else(|| Error::setting("output folder", "a path with a name", out.display()))?;
        fs::create_dir_all(parent(out)).map_err(Error::io("create", parent(out)))?;
        let path = parent(out).join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(Aside { path })
    }

    fn take_place_of(self, out: &Path) -> Result<()> {
        sync_folder(&self.path);
        if out.exists() {
            // Only an empty folder goes: the system refuses to remove any other.
            fs::remove_dir(out).map_err(Error::io("replace", out))?;
        }
        fs::rename(&self.path, out).map_err(Error::io("rename the finished folder to", out))?;
        sync_folder(parent(out));
        Ok(())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After the rename there is nothing of this name, and nothing to do about a folder that cannot be removed.
        fs::remove_dir_all(&self.path).ok();
    }
}

/// The base's own config.json with the task's head in it.
fn config(patch: &Patch, base: &Base) -> Result<Map<String, Value>> {
    let mut config = match base.config_json() {
        Some(text) => {
            serde_json::from_str(text).map_err(|e| Error::Usage(format!("config.json of base {}: {e}", base.id())))?
        }
        None => plain_config(base.config()),
    };
    let problem = &patch.metadata().problem;
    // transformers gives the one output of a regression a label too.
    let labels = match problem {
        Problem::Classes(labels) => labels.clone(),
        Problem::Value => vec!["LABEL_0".into()],
    };
    let by_id: Map<_, _> = labels.iter().enumerate().map(|(i, l)| (i.to_string(), json!(l))).collect();
    let by_label: Map<_, _> = labels.iter().enumerate().map(|(i, l)| (l.clone(), json!(i))).collect();
    for (key, value) in [
        ("architectures", json!(["BertForSequenceClassification"])),
        ("model_type", json!("bert")),
        ("num_labels", json!(labels.len())),
        ("id2label", by_id.into()),
        ("label2id", by_label.into()),
        ("problem_type", json!(problem.name())),
    ] {
        config.insert(key.into(), value);
    }
    // transformers loads in the precision that config.json names, and the tensors here are f32.
    for key in ["dtype", "torch_dtype"] {
        if config.contains_key(key) {
            config.insert(key.into(), json!("float32"));
        }
    }
    Ok(config)
}

/// For a base without a folder.
fn plain_config(config: &Config) -> Map<String, Value> {
    let fields = json!({
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "classifier_dropout": config.classifier_dropout,
        "hidden_act": config.hidden_act.name(),
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "position_embedding_type": "absolute",
        "type_vocab_size": config.type_vocab_size,
        "vocab_size": config.vocab_size,
    });
    match fields {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The base's own tokenizer_config.json, made to say what the tokenizer.json beside it does: transformers lets the
/// former's flags win over the latter's normalizer. Texts are cut where the task's were in training.
fn tokenizer_settings(patch: &Patch, base: &Base, folder: &Path) -> Result<Map<String, Value>> {
    let own = base.folder().map(|folder| folder.join("tokenizer_config.json")).filter(|path| path.is_file());
    let mut settings = match own {
        Some(path) => read_json(&path)?,
        None => Map::from_iter([("tokenizer_class".to_string(), json!("BertTokenizer"))]),
    };
    let tokenizer = read_json(&folder.join("tokenizer.json"))?;
    let normalizer = tokenizer.get("normalizer").unwrap_or(&Value::Null);
    if normalizer["type"] == "BertNormalizer" {
        for (flag, field) in [
            ("do_lower_case", "lowercase"),
            ("strip_accents", "strip_accents"),
            ("tokenize_chinese_chars", "handle_chinese_chars"),
        ] {
            settings.insert(flag.into(), normalizer[field].clone());
        }
    }
    settings.insert("model_max_length".into(), json!(patch.metadata().max_length));
    Ok(settings)
}

fn write_model(patch: &Patch, base: &Base, path: &Path) -> Result<()> {
    let delta = Some(patch.delta());
    let full_name = |name: &str| match name.starts_with("classifier.") {
        true => name.to_string(),
        false => format!("bert.{name}"),
    };
    let mut table: Vec<Entry> = pieces(base, delta)
        .into_iter()
        .map(|piece| Entry {
            name: full_name(&piece.name),
            dtype: Type::F32,
            shape: piece.shape.iter().map(|&d| d as u64).collect(),
        })
        .collect();
    header::sort(&mut table);
    let failed = || Error::io("write", path);
    let mut file = BufWriter::with_capacity(1 << 16, File::create(path).map_err(failed())?);
    let format = BTreeMap::from([("format", "pt".to_string())]);
    file.write_all(&header::framed(&header::json(&format, &table))).map_err(failed())?;
    for entry in &table {
        let name = entry.name.strip_prefix("bert.").unwrap_or(&entry.name);
        for value in values(base, delta, name)? {
            file.write_all(&value.to_le_bytes()).map_err(failed())?;
        }
    }
    let file = file.into_inner().map_err(|e| failed()(e.into_error()))?;
    file.sync_all().map_err(failed())
}

fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::content(path, e.to_string()))
}

fn write_json(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    let mut text = serde_json::to_string_pretty(fields).map_err(|e| Error::content(path, e.to_string()))?;
    text.push('\n');
    let mut file = File::create(path).map_err(Error::io("write", path))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}
