//! The folder of a run: which files are its own, and what is done with those of an earlier run.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What to do where the folder already holds a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Refuse.
    #[default]
    Refuse,
    /// Go on from its checkpoint; where there is none yet, start.
    Resume,
    /// Remove the run's files, and no others, and start anew.
    Overwrite,
}

/// A run's folder.
#[derive(Debug, Clone)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// The folder at this path, which need not exist.
    pub fn new(path: &Path) -> Self {
        RunFolder { path: path.to_path_buf() }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The finished patch.
    pub fn patch(&self) -> PathBuf {
        self.path.join("patch.safetensors")
    }

    /// The record of the run.
    pub fn record(&self) -> PathBuf {
        self.path.join("run.json")
    }

    /// A line of JSON for some steps and for every evaluation.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoint")
    }

    /// The state to go on from.
    pub fn state(&self) -> PathBuf {
        self.checkpoints().join("state.safetensors")
    }

    /// The patch of an epoch, counted from 1.
    pub fn epoch(&self, epoch: u32) -> PathBuf {
        self.checkpoints().join(format!("epoch-{epoch}.safetensors"))
    }

    /// Whether a run has left files here.
    pub fn holds_a_run(&self) -> bool {
        [self.patch(), self.record(), self.metrics(), self.state()].iter().any(|file| file.exists())
    }

    /// Refuses a folder that cannot be used as asked. Changes nothing, so it can stand before long work.
    ///
    /// # Errors
    ///
    /// Where the path is a file, or holds a run and `existing` is to refuse that.
    pub fn check(&self, existing: Existing) -> Result<()> {
        if self.path.exists() && !self.path.is_dir() {
            return Err(Error::setting("--out", "a folder, or a path where one can be made", self.path.display()));
        }
        if existing == Existing::Refuse && self.holds_a_run() {
            return Err(Error::Usage(format!(
                "{} already holds a run; go on with it (--resume), replace it (--overwrite), or choose another folder \
                 (--out)",
                self.path.display()
            )));
        }
        Ok(())
    }

    /// Makes the folder and that of its checkpoints.
    ///
    /// # Errors
    ///
    /// Where they cannot be made.
    pub fn create(&self) -> Result<()> {
        let folder = self.checkpoints();
        fs::create_dir_all(&folder).map_err(Error::io("make the folder", &folder))
    }

    /// Removes the run's own files, then the folders that are left empty. Other files stay.
    ///
    /// # Errors
    ///
    /// Where a file that is there cannot be removed.
    pub fn remove_run(&self) -> Result<()> {
        let mut files = vec![self.patch(), self.record(), self.metrics(), self.state()];
        if let Ok(entries) = fs::read_dir(self.checkpoints()) {
            let is_epoch = |name: &str| {
                let epoch = name.strip_prefix("epoch-").and_then(|name| name.strip_suffix(".safetensors"));
                epoch.is_some_and(|epoch| !epoch.is_empty() && epoch.bytes().all(|b| b.is_ascii_digit()))
            };
            let paths = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_epoch));
            files.extend(paths.map(|entry| entry.path()));
        }
        for file in files {
            match fs::remove_file(&file) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io("remove", &file)(e)),
                _ => {}
            }
        }
        // Not empty, not there: either way there is nothing to remove.
        fs::remove_dir(self.checkpoints()).ok();
        fs::remove_dir(&self.path).ok();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_a_run() -> (tempfile::TempDir, RunFolder) {
        let temporary = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(&temporary.path().join("run"));
        folder.create().unwrap();
        for file in
            [folder.patch(), folder.record(), folder.metrics(), folder.state(), folder.epoch(1), folder.epoch(12)]
        {
            fs::write(file, "x").unwrap();
        }
        (temporary, folder)
    }

    #[test]
    fn a_folder_that_holds_a_run_is_refused_unless_asked() {
        let (_temporary, folder) = with_a_run();
        assert!(folder.check(Existing::Refuse).unwrap_err().to_string().contains("already holds a run"));
        assert!(folder.check(Existing::Resume).is_ok());
        assert!(folder.check(Existing::Overwrite).is_ok());
    }

    #[test]
    fn a_run_is_removed_with_its_folders() {
        let (_temporary, folder) = with_a_run();
        folder.remove_run().unwrap();
        assert!(!folder.path().exists());
        folder.remove_run().unwrap();
    }

    #[test]
    fn files_that_are_not_the_runs_stay() {
        let (_temporary, folder) = with_a_run();
        let others = [folder.path().join("notes.txt"), folder.checkpoints().join("epoch-best.safetensors")];
        others.iter().for_each(|file| fs::write(file, "mine").unwrap());
        folder.remove_run().unwrap();
        assert!(!folder.holds_a_run() && !folder.epoch(1).exists());
        assert!(others.iter().all(|file| file.exists()));
    }

    #[test]
    fn a_file_in_the_folders_place_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(RunFolder::new(file.path()).check(Existing::Overwrite).is_err());
    }
}
