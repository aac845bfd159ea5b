//! A folder of patches.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::{MAX_PATCH_BYTES, Tag, Version, too_large, version_of, version_path};
use crate::error::{Error, Result};
use crate::patch::{rename, sync_folder, write_aside};
use crate::serve::name::TaskName;

/// See [`super::Store`], whose methods these are. Files are read and written on threads that may block.
pub(super) struct Folder {
    root: Arc<PathBuf>,
}

impl Folder {
    pub(super) fn open(root: PathBuf) -> Result<Folder> {
        let found = fs::metadata(&root).map_err(Error::io("open the folder of patches", &root))?;
        if !found.is_dir() {
            return Err(Error::setting("--patches", "a folder, or a URL", root.display()));
        }
        Ok(Folder { root: Arc::new(root) })
    }

    /// Runs `f`, which may block, with the folder.
    async fn with<T: Send + 'static>(&self, f: impl FnOnce(&Path) -> Result<T> + Send + 'static) -> Result<T> {
        let root = self.root.clone();
        let done = tokio::task::spawn_blocking(move || f(&root)).await;
        done.unwrap_or_else(|e| Err(Error::Audit(format!("reading or writing the folder of patches: {e}"))))
    }

    pub(super) async fn list(&self) -> Result<Option<BTreeMap<TaskName, Tag>>> {
        self.with(|root| {
            let failed = |e| Error::io("list", root)(e);
            let mut found = BTreeMap::new();
            for entry in fs::read_dir(root).map_err(failed)? {
                let name = entry.map_err(failed)?.file_name();
                let Some(name) = name.to_str() else { continue };
                // Either a patch or a folder that may hold one.
                let Some(task) = TaskName::of_path(name).or_else(|| name.parse().ok()) else { continue };
                // A file that cannot be looked at is there; what is wrong with it shows when it is asked for, and the
                // others do not suffer.
                match find(root, &task) {
                    Ok(Some((_, tag))) => drop(found.insert(task, tag)),
                    Ok(None) => {}
                    Err(error) => drop(found.insert(task, Tag(error.to_string()))),
                }
            }
            Ok(Some(found))
        })
        .await
    }

    pub(super) async fn tag(&self, task: &TaskName) -> Result<Option<Tag>> {
        let task = task.clone();
        self.with(move |root| Ok(find(root, &task)?.map(|(_, tag)| tag))).await
    }

    pub(super) async fn read(&self, task: &TaskName) -> Result<Option<(Bytes, Tag)>> {
        let task = task.clone();
        self.with(move |root| {
            let Some((path, tag)) = find(root, &task)? else { return Ok(None) };
            Ok(read(&path)?.map(|bytes| (bytes, tag)))
        })
        .await
    }

    pub(super) async fn write(&self, task: &TaskName, bytes: Bytes) -> Result<Tag> {
        let task = task.clone();
        self.with(move |root| {
            // Where the task has a file it is replaced; a new one gets the plain name.
            let path = find(root, &task)?.map_or_else(|| root.join(&task.paths()[0]), |(path, _)| path);
            // Under a name of this process's own, and then over the task's: a link there is replaced and not followed, as
            // it may lead out of the store.
            let aside = path.with_file_name(format!(".{task}.{}.tmp", std::process::id()));
            write_aside(&aside, |file| file.write_all(&bytes))?;
            rename(&aside, &path).inspect_err(|_| drop(fs::remove_file(&aside)))?;
            let gone = || Error::io("find again", &path)(io::ErrorKind::NotFound.into());
            Ok(find(root, &task)?.ok_or_else(gone)?.1)
        })
        .await
    }

    pub(super) async fn remove(&self, task: &TaskName) -> Result<()> {
        let task = task.clone();
        self.with(move |root| find(root, &task)?.map_or(Ok(()), |(path, _)| remove(&path))).await
    }

    pub(super) async fn versions(&self, task: &TaskName) -> Result<Vec<Version>> {
        let task = task.clone();
        self.with(move |root| {
            let folder = root.join(".versions").join(&task);
            let entries = match fs::read_dir(&folder) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries.map_err(Error::io("list", &folder))?,
            };
            let mut found = Vec::new();
            for entry in entries {
                let entry = entry.map_err(Error::io("list", &folder))?;
                let Some(patch) = entry.file_name().to_str().and_then(version_of) else { continue };
                let stored = entry.metadata().and_then(|about| about.modified());
                found.push(Version { patch, stored: stored.unwrap_or(UNIX_EPOCH) });
            }
            Ok(found)
        })
        .await
    }

    pub(super) async fn read_version(&self, task: &TaskName, patch: &str) -> Result<Option<Bytes>> {
        let path = version_path(task, patch);
        self.with(move |root| read(&root.join(path))).await
    }

    pub(super) async fn write_version(&self, task: &TaskName, patch: &str, bytes: Bytes) -> Result<()> {
        let (path, task) = (version_path(task, patch), task.clone());
        self.with(move |root| {
            let path = root.join(path);
            // Each folder stands in one that is synced, so that a version survives what its file does.
            let of_all = root.join(".versions");
            for (folder, above) in [(&of_all, root), (&of_all.join(&task), &*of_all)] {
                match fs::create_dir(folder) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    made => {
                        made.map_err(Error::io("create", folder))?;
                        sync_folder(above);
                    }
                }
            }
            if !path.is_file() {
                write_aside(&path, |file| file.write_all(&bytes))?;
            }
            // Versions are ordered by when they were stored. The clock that files get their times from is coarser than
            // this one, and a version that was there before is the newest again.
            let file = fs::File::options().write(true).open(&path).map_err(Error::io("open", &path))?;
            file.set_modified(SystemTime::now()).map_err(Error::io("write", &path))
        })
        .await
    }

    pub(super) async fn remove_version(&self, task: &TaskName, patch: &str) -> Result<()> {
        let path = version_path(task, patch);
        self.with(move |root| remove(&root.join(path))).await
    }
}

/// The task's file and its tag, where it has one.
fn find(root: &Path, task: &TaskName) -> Result<Option<(PathBuf, Tag)>> {
    for path in task.paths().map(|path| root.join(path)) {
        match fs::metadata(&path) {
            Ok(about) if about.is_file() => return Ok(Some((path, tag_of(&about)))),
            Ok(_) => {}
            Err(e) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&e.kind()) => {}
            Err(e) => return Err(Error::io("look at", &path)(e)),
        }
    }
    // A folder that is gone, unmounted for one, is no folder without tasks.
    fs::metadata(root).map_err(Error::io("look at", root))?;
    Ok(None)
}

/// A renamed file is another one, so a replacement shows even where size and time are as before.
fn tag_of(about: &fs::Metadata) -> Tag {
    let modified = about.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    #[cfg(unix)]
    let file = std::os::unix::fs::MetadataExt::ino(about);
    #[cfg(not(unix))]
    let file = 0u64;
    Tag(format!("{}-{}-{file}", modified.as_nanos(), about.len()))
}

/// A file's bytes; `None` where it is not there.
fn read(path: &Path) -> Result<Option<Bytes>> {
    let file = match fs::File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(Error::io("read", path))?,
    };
    let length = file.metadata().map_err(Error::io("look at", path))?.len();
    if length > MAX_PATCH_BYTES {
        return Err(too_large(&path.display().to_string(), length));
    }
    // A file that grows while it is read ends here too.
    let mut bytes = Vec::new();
    file.take(MAX_PATCH_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MAX_PATCH_BYTES {
        return Err(too_large(&path.display().to_string(), bytes.len() as u64));
    }
    Ok(Some(bytes.into()))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&e.kind()) => Ok(()),
        done => {
            done.map_err(Error::io("remove", path))?;
            // Else a power cut could bring it back.
            path.parent().into_iter().for_each(sync_folder);
            Ok(())
        }
    }
}
