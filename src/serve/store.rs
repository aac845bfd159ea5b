//! Where patches lie: a folder, a bucket or an HTTP server. It is all the state that a server has.
//!
//! `TASK.safetensors` or `TASK/patch.safetensors` is the task's patch, so that a folder of runs is a store. Versions lie
//! beside them in `.versions/TASK/HASH.safetensors`; nothing else in a store is looked at.

mod folder;
#[cfg(feature = "object-store")]
mod remote;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use self::folder::Folder;
use super::name::TaskName;
use crate::error::{Error, Result};

/// A patch file above this is refused unread: far above any patch of biases, with ten thousand labels.
pub(super) const MAX_PATCH_BYTES: u64 = 64 << 20;

/// How many versions of a task a store keeps.
pub(super) const KEPT_VERSIONS: usize = 10;

/// What tells one state of a task's file from another without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tag(pub String);

/// A version of a task's patch that a store keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    /// Its content hash.
    pub patch: String,
    /// When it was stored.
    pub stored: SystemTime,
}

/// A store of patches. Clones share it.
#[derive(Clone)]
pub struct Store(Arc<Kind>);

enum Kind {
    Folder(Folder),
    #[cfg(feature = "object-store")]
    Remote(remote::Remote),
}

/// Calls the same method of whichever store it is.
macro_rules! each {
    ($store:expr, $call:ident ( $($argument:expr),* )) => {
        match &*$store.0 {
            Kind::Folder(store) => store.$call($($argument),*).await,
            #[cfg(feature = "object-store")]
            Kind::Remote(store) => store.$call($($argument),*).await,
        }
    };
}

impl Store {
    /// Opens a folder, or what a URL names: `s3://bucket/prefix`, `gs://`, `az://`, `http://`, `https://`. Keys and
    /// regions of clouds come from their usual environment variables.
    ///
    /// # Errors
    ///
    /// A folder that is not there; a URL of a kind that is not known, or whose settings are not whole.
    pub fn open(place: &str) -> Result<Store> {
        if !place.contains("://") {
            return Ok(Store(Arc::new(Kind::Folder(Folder::open(PathBuf::from(place))?))));
        }
        #[cfg(feature = "object-store")]
        return Ok(Store(Arc::new(Kind::Remote(remote::Remote::open(place)?))));
        #[cfg(not(feature = "object-store"))]
        Err(Error::Usage(format!(
            "{place}: this bitfit was built without the feature `object-store`; give --patches a folder"
        )))
    }

    /// Every task with a patch, and its tag; `None` where the store cannot be listed (a plain HTTP server).
    pub(super) async fn list(&self) -> Result<Option<BTreeMap<TaskName, Tag>>> {
        each!(self, list())
    }

    /// A task's tag; `None` where it has no patch.
    pub(super) async fn tag(&self, task: &TaskName) -> Result<Option<Tag>> {
        each!(self, tag(task))
    }

    /// A task's patch; `None` where it has none. A file above [`MAX_PATCH_BYTES`] is an error.
    pub(super) async fn read(&self, task: &TaskName) -> Result<Option<(Bytes, Tag)>> {
        each!(self, read(task))
    }

    /// Puts a task's patch in place of the one that is there. Readers meet the old or the new, and on an error the old.
    pub(super) async fn write(&self, task: &TaskName, bytes: Bytes) -> Result<Tag> {
        each!(self, write(task, bytes))
    }

    /// Takes out the file that [`Store::read`] reads; the task's versions stay.
    pub(super) async fn remove(&self, task: &TaskName) -> Result<()> {
        each!(self, remove(task))
    }

    /// The versions that are kept of a task, the newest first.
    pub(super) async fn versions(&self, task: &TaskName) -> Result<Vec<Version>> {
        let mut versions = each!(self, versions(task))?;
        versions.sort_by(|a, b| b.stored.cmp(&a.stored).then_with(|| a.patch.cmp(&b.patch)));
        Ok(versions)
    }

    /// A version's file; `None` where it is not kept.
    pub(super) async fn read_version(&self, task: &TaskName, patch: &str) -> Result<Option<Bytes>> {
        each!(self, read_version(task, patch))
    }

    /// Keeps a version, as the newest of the task's, and drops the oldest above [`KEPT_VERSIONS`].
    pub(super) async fn keep_version(&self, task: &TaskName, patch: &str, bytes: Bytes) -> Result<()> {
        each!(self, write_version(task, patch, bytes))?;
        for old in self.versions(task).await?.into_iter().skip(KEPT_VERSIONS) {
            each!(self, remove_version(task, &old.patch))?;
        }
        Ok(())
    }
}

/// Where a version lies, relative to the store's root. `patch` is a content hash.
fn version_path(task: &TaskName, patch: &str) -> String {
    format!(".versions/{task}/{patch}.safetensors")
}

/// The content hash that a version's file name carries.
fn version_of(file_name: &str) -> Option<String> {
    let hash = file_name.strip_suffix(".safetensors")?;
    (hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit())).then(|| hash.to_string())
}

fn too_large(place: &str, found: u64) -> Error {
    let expected = format!("expected a patch of at most {MAX_PATCH_BYTES} bytes, found {found}");
    Error::content(place, format!("{expected}; patches of biases are some hundred kilobytes"))
}
