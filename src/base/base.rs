//! A frozen base: config, tensors, tokenizer and fingerprint, checked against each other once and then only read.
//!
//! [`Base::load`] hashes each tensor as it passes and keeps none: whoever prepares weights for a device asks for them
//! one by one with [`Base::tensor`] and drops them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::checkpoint::Checkpoint;
use super::config::{self, CONFIG, Config};
use super::fingerprint::Fingerprint;
use super::hub::{self, Download};
use super::parameters::{Parameter, Role, parameters};
use super::spec::BaseSpec;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// What is hashed into a base's fingerprint, and in which order, is version 1.
const KIND: &str = "bitfit base 1";

/// A pretrained BERT that never changes. A clone shares it, and threads may.
#[derive(Clone)]
pub struct Base {
    inner: Arc<Inner>,
}

struct Inner {
    id: String,
    folder: Option<PathBuf>,
    config: Config,
    config_json: Option<String>,
    fingerprint: String,
    tokenizer: Option<Tokenizer>,
    parameters: Vec<Parameter>,
    has_pooler: bool,
    source: Source,
}

/// Where tensors come from.
enum Source {
    Checkpoint(Checkpoint),
    Memory(BTreeMap<String, Vec<f32>>),
    Random(u64),
}

impl Base {
    /// Loads a base from its folder, or from the hub by way of the hub tools' own cache.
    ///
    /// # Errors
    ///
    /// As [`Base::from_folder`], and for a hub id whatever kept its files from being fetched.
    pub fn load(spec: &BaseSpec) -> Result<Base> {
        Base::load_watched(spec, |_| ())
    }

    /// [`Base::load`] that tells how a download goes. `watch` is called from another thread, often; it must not block.
    ///
    /// # Errors
    ///
    /// As [`Base::load`].
    pub fn load_watched(spec: &BaseSpec, watch: impl Fn(&Download) + Send + Sync + 'static) -> Result<Base> {
        match spec {
            BaseSpec::Folder(path) => Base::from_folder(path),
            BaseSpec::Hub { id, revision } => {
                let folder = hub::fetch(id, revision.as_deref(), Arc::new(watch))?;
                Base::read(&folder, Some(id))
            }
        }
    }

    /// Loads a base from a folder in Hugging Face layout: `config.json`; `model.safetensors`, its shards, or
    /// `pytorch_model.bin`; `tokenizer.json` or `vocab.txt`. A folder without tokenizer files loads too, and then only
    /// [`Base::tokenizer`] fails.
    ///
    /// # Errors
    ///
    /// A folder or file that is missing, an architecture that is not supported, a config that does not fit the weights,
    /// a checkpoint or tokenizer that is damaged, and numbers that are not finite.
    pub fn from_folder(path: &Path) -> Result<Base> {
        Base::read(path, None)
    }

    fn read(folder: &Path, id: Option<&str>) -> Result<Base> {
        let path = folder.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let config = Config::from_json(&path, &text)?;
        let checkpoint = Checkpoint::open(folder, &config)?;
        let tokenizer = Tokenizer::is_in(folder).then(|| Tokenizer::load(folder, &config)).transpose()?;
        let (parameters, has_pooler) = (checkpoint.parameters().to_vec(), checkpoint.has_pooler());

        let mut hash = Fingerprint::new(KIND);
        hash.arithmetic(&config);
        for parameter in in_order_of_name(&parameters) {
            let dtype = checkpoint.dtype(&parameter.name).map_or("", |dtype| dtype.name());
            hash.tensor(&parameter.name, dtype, &parameter.shape);
            checkpoint.hash(&parameter.name, |bytes| hash.data(bytes))?;
        }
        let folder_name = || folder.canonicalize().ok()?.file_name()?.to_str().map(str::to_string);
        let id = id.map(str::to_string).or_else(|| config::model_name(&text)).or_else(folder_name);
        Ok(Base::new(Inner {
            id: id.unwrap_or_else(|| "unnamed".into()),
            folder: Some(folder.to_path_buf()),
            config,
            config_json: Some(text),
            fingerprint: hash.finish(),
            tokenizer,
            parameters,
            has_pooler,
            source: Source::Checkpoint(checkpoint),
        }))
    }

    /// A base from tensors by canonical name, each row-major. It has a pooler if `tensors` has one.
    ///
    /// # Errors
    ///
    /// A tensor that is missing, of the wrong length or not a BERT's, a number that is not finite, and a tokenizer
    /// whose ids the config has no embeddings for.
    pub fn in_memory(
        id: &str,
        config: Config,
        tokenizer: Option<Tokenizer>,
        tensors: BTreeMap<String, Vec<f32>>,
    ) -> Result<Base> {
        let path = Path::new("in memory");
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check(&config, path)?;
        }
        let has_pooler = tensors.keys().any(|name| name.starts_with("pooler."));
        let parameters = parameters(&config, has_pooler);
        let wrong = |tensor: &str, expected: String, found: String| Error::Tensor {
            path: path.to_path_buf(),
            tensor: tensor.to_string(),
            expected,
            found,
        };
        if let Some(name) = tensors.keys().find(|name| parameters.iter().all(|parameter| &parameter.name != *name)) {
            return Err(wrong(name, "a tensor of this config's BERT".into(), "another".into()));
        }
        let mut hash = Fingerprint::new(KIND);
        hash.arithmetic(&config);
        for parameter in in_order_of_name(&parameters) {
            let values = tensors.get(&parameter.name).map_or(&[][..], Vec::as_slice);
            if values.len() != parameter.len() {
                let expected = format!("{} values, shape {:?}", parameter.len(), parameter.shape);
                return Err(wrong(&parameter.name, expected, values.len().to_string()));
            }
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                let found = format!("NaN or infinity at flat position {index}");
                return Err(wrong(&parameter.name, "finite numbers".into(), found));
            }
            hash.tensor(&parameter.name, "F32", &parameter.shape);
            for value in values {
                hash.data(&value.to_le_bytes());
            }
        }
        Ok(Base::new(Inner {
            id: id.to_string(),
            folder: None,
            config,
            config_json: None,
            fingerprint: hash.finish(),
            tokenizer,
            parameters,
            has_pooler,
            source: Source::Memory(tensors),
        }))
    }

    /// A base of this shape as it would be before pretraining, for measurements: matrices and tables are normal with
    /// deviation `initializer_range`, LayerNorm weights 1, biases 0. It has a pooler and no tokenizer. Each tensor is
    /// made when it is asked for, from the seed and its name, so the model is never in memory as a whole; for the same
    /// reason the fingerprint covers config and seed in place of the numbers.
    pub fn random(config: Config, seed: u64) -> Base {
        let parameters = parameters(&config, true);
        let mut hash = Fingerprint::new("bitfit random base 1");
        hash.arithmetic(&config);
        hash.number(seed);
        hash.number(config.initializer_range.to_bits());
        for parameter in in_order_of_name(&parameters) {
            hash.tensor(&parameter.name, "F32", &parameter.shape);
        }
        Base::new(Inner {
            id: format!("random-{seed}"),
            folder: None,
            config,
            config_json: None,
            fingerprint: hash.finish(),
            tokenizer: None,
            parameters,
            has_pooler: true,
            source: Source::Random(seed),
        })
    }

    fn new(inner: Inner) -> Base {
        Base { inner: Arc::new(inner) }
    }

    /// The hub id, or the name in config.json, or else the folder's name.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// The config, checked.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The text of the base's own config.json, with all that this program does not read; `None` without a folder.
    pub fn config_json(&self) -> Option<&str> {
        self.inner.config_json.as_deref()
    }

    /// SHA-256 in hexadecimal over what decides the arithmetic: the config's heads, activation, LayerNorm epsilon and
    /// position type, and the tensors of embeddings, encoder and pooler in order of canonical name, in the number
    /// format of the file. The same model in another container, or with other names, has the same.
    pub fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }

    /// The tokenizer.
    ///
    /// # Errors
    ///
    /// A base that has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.inner.tokenizer.as_ref().ok_or_else(|| match &self.inner.folder {
            Some(folder) => {
                Error::content(folder, "this base has no tokenizer; put its tokenizer.json or vocab.txt there")
            }
            None => Error::Usage(format!("base {} has no tokenizer, so it cannot read texts", self.id())),
        })
    }

    /// Whether the checkpoint has a pooler to share; otherwise each task's head brings its own.
    pub fn has_pooler(&self) -> bool {
        self.inner.has_pooler
    }

    /// The table of this base's tensors: [`parameters`] of its config and pooler.
    pub fn parameters(&self) -> &[Parameter] {
        &self.inner.parameters
    }

    /// A tensor by canonical name, row-major, in f32. It is read from the file again at each call.
    ///
    /// # Errors
    ///
    /// A name that is not in [`Base::parameters`], and a file that cannot be read or has changed since it was loaded.
    pub fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        let Some(parameter) = self.inner.parameters.iter().find(|parameter| parameter.name == name) else {
            return Err(Error::setting("tensor", "a canonical name of this base's tensors", format_args!("`{name}`")));
        };
        match &self.inner.source {
            Source::Checkpoint(checkpoint) => checkpoint.read(name),
            Source::Memory(tensors) => Ok(tensors[name].clone()),
            Source::Random(seed) => Ok(random_tensor(&self.inner.config, parameter, *seed)),
        }
    }

    /// The folder that the base was loaded from: for a hub id, the one in the hub's cache.
    pub fn folder(&self) -> Option<&Path> {
        self.inner.folder.as_deref()
    }
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Base").field("id", &self.id()).field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

/// The order of a fingerprint.
fn in_order_of_name(parameters: &[Parameter]) -> Vec<&Parameter> {
    let mut sorted: Vec<&Parameter> = parameters.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    sorted
}

fn random_tensor(config: &Config, parameter: &Parameter, seed: u64) -> Vec<f32> {
    match parameter.role {
        Role::Bias(_) => vec![0.0; parameter.len()],
        Role::NormWeight(_) => vec![1.0; parameter.len()],
        Role::Matrix(_) | Role::Table(_) => {
            let mut hash = Fingerprint::new("bitfit random tensor 1");
            hash.number(seed);
            hash.text(&parameter.name);
            let mut generator = ChaCha8Rng::from_seed(hash.bytes());
            let normal = StandardNormal.sample_iter(&mut generator);
            normal.take(parameter.len()).map(|x: f64| (config.initializer_range * x) as f32).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_base_is_the_same_for_the_same_seed_alone() {
        let [a, b, c] = [1, 1, 2].map(|seed| Base::random(Config::tiny(), seed));
        let name = "encoder.layer.1.output.dense.weight";
        assert_eq!(a.tensor(name).unwrap(), b.tensor(name).unwrap());
        assert_ne!(a.tensor(name).unwrap(), c.tensor(name).unwrap());
        assert_ne!(a.tensor(name).unwrap(), a.tensor("encoder.layer.0.output.dense.weight").unwrap());
        assert_eq!(a.fingerprint(), b.fingerprint());
        assert_ne!(a.fingerprint(), c.fingerprint());
    }

    #[test]
    fn a_random_base_is_distributed_as_before_pretraining() {
        let base = Base::random(Config { initializer_range: 0.5, ..Config::minilm() }, 7);
        let weights = base.tensor("encoder.layer.0.attention.self.query.weight").unwrap();
        let n = weights.len() as f64;
        let mean = weights.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let deviation = (weights.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.5).abs() < 0.01, "mean {mean}, deviation {deviation}");
        assert!(base.tensor("encoder.layer.0.output.LayerNorm.weight").unwrap().iter().all(|&x| x == 1.0));
        assert!(base.tensor("pooler.dense.bias").unwrap().iter().all(|&x| x == 0.0));
        assert!(base.has_pooler() && base.tokenizer().is_err() && base.folder().is_none());
    }

    #[test]
    fn tensors_in_memory_are_checked() {
        type Tensors = BTreeMap<String, Vec<f32>>;
        let config = Config::tiny();
        let shape = Base::random(config.clone(), 3);
        let all: Tensors =
            shape.parameters().iter().map(|p| (p.name.clone(), shape.tensor(&p.name).unwrap())).collect();
        let base = Base::in_memory("tiny", config.clone(), None, all.clone()).unwrap();
        assert_eq!(base.tensor("pooler.dense.weight").unwrap(), all["pooler.dense.weight"]);

        let refusal = |change: &dyn Fn(&mut Tensors)| {
            let mut tensors = all.clone();
            change(&mut tensors);
            Base::in_memory("tiny", config.clone(), None, tensors).unwrap_err().to_string()
        };
        let missing = refusal(&|t| t.retain(|name, _| name != "pooler.dense.bias"));
        assert!(missing.contains("pooler.dense.bias") && missing.contains("32"), "{missing}");
        let short = refusal(&|t| t.get_mut("embeddings.LayerNorm.bias").unwrap().truncate(31));
        assert!(short.contains("embeddings.LayerNorm.bias") && short.contains("31"), "{short}");
        let extra = refusal(&|t| t.extend([("classifier.bias".to_string(), vec![0.0])]));
        assert!(extra.contains("classifier.bias"), "{extra}");
        let nan = refusal(&|t| t.get_mut("embeddings.LayerNorm.bias").unwrap()[5] = f32::NAN);
        assert!(nan.contains("position 5"), "{nan}");
    }

    #[test]
    fn threads_may_share_a_base() {
        fn shared<T: Send + Sync + Clone>() {}
        shared::<Base>();
    }
}
