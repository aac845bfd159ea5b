//! Files appear whole or not at all: written beside their place, synced, renamed.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::Builder;

use crate::error::{Error, Result};

/// Writes a file through `write` so that no reader, and no crash, ever meets half of it: the bytes go to a temporary
/// file in the same folder, which is synced and renamed over `path`. A file that was there before is replaced; a link
/// stays, and what it leads to is replaced.
///
/// # Errors
///
/// Where `path` is there and is no file (a folder, a device, a pipe), before `write` is called; and whatever the
/// operating system refuses, naming `path`: the temporary file is then removed.
pub fn write_aside(path: &Path, write: impl FnOnce(&mut (dyn Write + Send)) -> io::Result<()>) -> Result<()> {
    let path = &*destination(path)?;
    let folder = parent(path);
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let prefix = format!(".{name}.");
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    // Temporary files are private by default, and the rename would keep that; a result is for whom the umask says.
    #[cfg(unix)]
    let builder = builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(Error::io("write", path))?;
    write(file.as_file_mut()).map_err(Error::io("write", path))?;
    file.as_file().sync_all().map_err(Error::io("sync", path))?;
    file.persist(path).map_err(|e| Error::io("rename the finished file to", path)(e.error))?;
    sync_folder(folder);
    Ok(())
}

/// Where a file of this name is to be put: itself, or what it leads to where it is a link.
///
/// # Errors
///
/// Where `path` is there and is no file. A rename would put a file in the place of whatever stands there, a device
/// among others.
pub(crate) fn destination(path: &Path) -> Result<PathBuf> {
    match std::fs::canonicalize(path) {
        Ok(found) if found.is_file() => Ok(found),
        Ok(_) => Err(Error::setting("file to write", "a file, or a name that is free", path.display())),
        Err(_) => Ok(path.to_path_buf()),
    }
}

/// Gives a finished and synced file its name, in the same folder, over what had it.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::io("rename the finished file to", to))?;
    sync_folder(parent(to));
    Ok(())
}

/// The folder a path stands in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename last through a power cut, where the system can sync a folder. The file itself is whole either way,
/// so a system that cannot is no error.
pub(crate) fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        folder.sync_all().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_aside(&path, |f| f.write_all(b"old")).unwrap();
        let full = |f: &mut (dyn Write + Send)| {
            f.write_all(b"ne")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        let message = write_aside(&path, full).unwrap_err().to_string();
        assert!(message.contains("a.txt") && message.contains("free some space"), "{message}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_what_is_no_file_is_refused_and_left() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link, socket) =
            (folder.path().join("file"), folder.path().join("link"), folder.path().join("socket"));
        std::fs::write(&file, b"old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_aside(&link, |f| f.write_all(b"new")).unwrap();
        assert!(link.is_symlink() && std::fs::read(&file).unwrap() == b"new");

        let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&socket, &folder.path().to_path_buf()] {
            let never = |_: &mut (dyn Write + Send)| panic!("nothing is written to {}", path.display());
            assert!(write_aside(path, never).unwrap_err().to_string().contains("expected a file"));
        }
        assert!(!socket.is_file());
    }

    #[cfg(unix)]
    #[test]
    fn a_finished_file_is_as_readable_as_any_other() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        write_aside(&ours, |f| f.write_all(b"x")).unwrap();
        std::fs::write(&plain, b"x").unwrap();
        let mode = |p| std::fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
