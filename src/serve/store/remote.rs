//! A bucket of patches (S3, Google Cloud Storage, Azure), or an HTTP server that hands patches out.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutResult, parse_url_opts};
use url::Url;

use super::{MAX_PATCH_BYTES, Tag, Version, too_large, version_of, version_path};
use crate::error::{Error, Result};
use crate::serve::name::TaskName;

/// Longer than a sound store takes for any patch; past it, tasks that are loaded go on and the call is an error.
const PATIENCE: Duration = Duration::from_secs(15);

/// See [`super::Store`], whose methods these are.
pub(super) struct Remote {
    url: String,
    objects: Box<dyn ObjectStore>,
    prefix: Path,
    /// A plain HTTP server can neither be listed nor written to.
    is_http: bool,
}

type Outcome<T> = Result<T, object_store::Error>;

impl Remote {
    pub(super) fn open(place: &str) -> Result<Remote> {
        let refuse = |reason: String| {
            let expected = "a folder, or a URL with s3://, gs://, az://, http:// or https://";
            Error::setting("--patches", expected, format_args!("{place} ({reason})"))
        };
        let url = Url::parse(place).map_err(|e| refuse(e.to_string()))?;
        let (scheme, _) = ObjectStoreScheme::parse(&url).map_err(|e| refuse(e.to_string()))?;
        if matches!(scheme, ObjectStoreScheme::Local | ObjectStoreScheme::Memory) {
            return Err(refuse("give a folder by its path".into()));
        }
        // Only what clouds' own tools read too: a variable `REGION` of something else must not steer this.
        let of_clouds = ["AWS_", "GOOGLE_", "AZURE_"];
        let mut settings: Vec<(String, String)> =
            std::env::vars().filter(|(name, _)| of_clouds.iter().any(|cloud| name.starts_with(cloud))).collect();
        // Who writes http:// has asked for it; others never fall back to it.
        let is_http_endpoint = |(name, at): &(String, String)| name.contains("ENDPOINT") && at.starts_with("http://");
        if url.scheme() == "http" || settings.iter().any(is_http_endpoint) {
            settings.push(("allow_http".into(), "true".into()));
        }
        settings.push(("connect_timeout".into(), "5 seconds".into()));
        let (objects, prefix) = parse_url_opts(&url, settings).map_err(|e| refuse(e.to_string()))?;
        Ok(Remote { url: place.into(), objects, prefix, is_http: scheme == ObjectStoreScheme::Http })
    }

    /// What a call gives, within [`PATIENCE`]; `None` where there is no such object.
    async fn call<T>(
        &self,
        doing: &'static str,
        path: &str,
        call: impl Future<Output = Outcome<T>>,
    ) -> Result<Option<T>> {
        let place = PathBuf::from(format!("{}/{path}", self.url.trim_end_matches('/')));
        let failed = |kind: io::ErrorKind, reason: String| Error::io(doing, &place)(io::Error::new(kind, reason));
        match tokio::time::timeout(PATIENCE, call).await {
            Ok(Ok(found)) => Ok(Some(found)),
            Ok(Err(object_store::Error::NotFound { .. })) => Ok(None),
            Ok(Err(e)) => Err(failed(io::ErrorKind::Other, e.to_string())),
            Err(_) => Err(failed(io::ErrorKind::TimedOut, format!("no answer in {} s", PATIENCE.as_secs()))),
        }
    }

    fn at(&self, path: &str) -> Path {
        path.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// An object's path below the prefix.
    fn below(&self, path: &Path) -> Option<String> {
        let parts: Vec<String> = path.prefix_match(&self.prefix)?.map(|part| part.as_ref().to_string()).collect();
        Some(parts.join("/"))
    }

    fn writable(&self) -> Result<()> {
        if self.is_http {
            return Err(Error::Usage(format!("{} is a plain HTTP server: patches are only read from it", self.url)));
        }
        Ok(())
    }

    pub(super) async fn list(&self) -> Result<Option<BTreeMap<TaskName, Tag>>> {
        if self.is_http {
            return Ok(None);
        }
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let all = self.call("list", "", self.objects.list(prefix).try_collect::<Vec<_>>()).await?;
        let mut found: BTreeMap<TaskName, (usize, Tag)> = BTreeMap::new();
        for object in all.into_iter().flatten() {
            let Some(path) = self.below(&object.location) else { continue };
            let Some(task) = TaskName::of_path(&path) else { continue };
            // Of a task's two paths the first counts.
            let rank = task.paths().iter().position(|p| *p == path).unwrap_or(usize::MAX);
            if found.get(&task).is_none_or(|(known, _)| rank < *known) {
                found.insert(task, (rank, tag_of(&object)));
            }
        }
        Ok(Some(found.into_iter().map(|(task, (_, tag))| (task, tag)).collect()))
    }

    /// The object of a task, where it has one.
    async fn find(&self, task: &TaskName) -> Result<Option<(String, ObjectMeta)>> {
        for path in task.paths() {
            if let Some(object) = self.call("look at", &path, self.objects.head(&self.at(&path))).await? {
                return Ok(Some((path, object)));
            }
        }
        Ok(None)
    }

    async fn bytes(&self, path: &str) -> Result<Option<(Bytes, Tag)>> {
        let at = self.at(path);
        let Some(found) = self.call("read", path, self.objects.get(&at)).await? else { return Ok(None) };
        if found.meta.size > MAX_PATCH_BYTES {
            return Err(too_large(path, found.meta.size));
        }
        let tag = tag_of(&found.meta);
        Ok(self.call("read", path, found.bytes()).await?.map(|bytes| (bytes, tag)))
    }

    pub(super) async fn tag(&self, task: &TaskName) -> Result<Option<Tag>> {
        Ok(self.find(task).await?.map(|(_, object)| tag_of(&object)))
    }

    pub(super) async fn read(&self, task: &TaskName) -> Result<Option<(Bytes, Tag)>> {
        for path in task.paths() {
            if let Some(found) = self.bytes(&path).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    pub(super) async fn write(&self, task: &TaskName, bytes: Bytes) -> Result<Tag> {
        self.writable()?;
        let path = self.find(task).await?.map_or_else(|| task.paths()[0].clone(), |(path, _)| path);
        let gone = || Error::io("find again", format!("{}/{path}", self.url))(io::ErrorKind::NotFound.into());
        // Of what was written: asked for afterwards, it could be another replica's.
        match self.put(&path, bytes).await?.and_then(|put| put.e_tag) {
            Some(tag) => Ok(without_quotes(&tag)),
            None => self.tag(task).await?.ok_or_else(gone),
        }
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<Option<PutResult>> {
        let at = self.at(path);
        self.call("write", path, self.objects.put(&at, bytes.into())).await
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let at = self.at(path);
        self.call("remove", path, self.objects.delete(&at)).await?;
        Ok(())
    }

    pub(super) async fn remove(&self, task: &TaskName) -> Result<()> {
        self.writable()?;
        match self.find(task).await? {
            Some((path, _)) => self.delete(&path).await,
            None => Ok(()),
        }
    }

    pub(super) async fn versions(&self, task: &TaskName) -> Result<Vec<Version>> {
        if self.is_http {
            return Ok(Vec::new());
        }
        let folder = format!(".versions/{task}");
        let at = self.at(&folder);
        let all = self.call("list", &folder, self.objects.list(Some(&at)).try_collect::<Vec<_>>()).await?;
        let version = |object: ObjectMeta| {
            Some(Version { patch: version_of(object.location.filename()?)?, stored: object.last_modified.into() })
        };
        Ok(all.into_iter().flatten().filter_map(version).collect())
    }

    pub(super) async fn read_version(&self, task: &TaskName, patch: &str) -> Result<Option<Bytes>> {
        Ok(self.bytes(&version_path(task, patch)).await?.map(|(bytes, _)| bytes))
    }

    pub(super) async fn write_version(&self, task: &TaskName, patch: &str, bytes: Bytes) -> Result<()> {
        self.writable()?;
        self.put(&version_path(task, patch), bytes).await?;
        Ok(())
    }

    pub(super) async fn remove_version(&self, task: &TaskName, patch: &str) -> Result<()> {
        self.delete(&version_path(task, patch)).await
    }
}

fn tag_of(object: &ObjectMeta) -> Tag {
    let of_time = || Tag(format!("{}-{}", object.last_modified, object.size));
    object.e_tag.as_deref().map_or_else(of_time, without_quotes)
}

/// An entity tag. Azure's lists write it without the quotes that its headers have.
fn without_quotes(tag: &str) -> Tag {
    Tag(tag.trim_matches('"').into())
}
