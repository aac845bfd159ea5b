//! An output that takes hours to fill: it grows as `OUT.partial`, `OUT.progress` says how much of that is whole, and in
//! the end it gets its name.
//!
//! Invariant: what `OUT.progress` speaks of is on the disk. The rows are synced before the record is written, and the
//! record is written aside, so a run that is killed at any moment goes on from a record that is true; bytes of
//! `OUT.partial` behind it are cut off.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::recorded::{Asked, Recorded};
use super::row_writer::RowWriter;
use crate::error::{Error, Result};
use crate::patch::{destination, rename, write_aside};

/// Time between two records.
const EVERY: Duration = Duration::from_secs(1);

/// A record takes a sync of the disk; where that is slow, it is made rarely enough to take this share of the time.
const SHARE: u32 = 20;

/// What to do where an output, or the beginning of one, is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Refuse.
    Refuse,
    /// Go on with what is there. Nothing there is a start; a finished output is nothing to do.
    Resume,
    /// Start anew.
    Overwrite,
}

/// Where an output and its beginnings lie.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub(super) output: PathBuf,
    partial: PathBuf,
    progress: PathBuf,
}

impl Places {
    pub(super) fn of(output: &Path) -> Result<Self> {
        let output = destination(output)?;
        let beside = |extension: &str| {
            let mut path = output.clone().into_os_string();
            path.push(extension);
            PathBuf::from(path)
        };
        Ok(Places { partial: beside(".partial"), progress: beside(".progress"), output })
    }

    /// Whether the output is finished and is to stay so.
    ///
    /// # Errors
    ///
    /// Where something is there that is not to be touched.
    pub(super) fn is_finished(&self, existing: Existing) -> Result<bool> {
        let (output, partial) = (self.output.exists(), self.partial.exists());
        match existing {
            Existing::Overwrite => Ok(false),
            Existing::Resume => Ok(output && !partial),
            Existing::Refuse if output => {
                Err(Error::Usage(format!("{} is there already; --overwrite replaces it", self.output.display())))
            }
            Existing::Refuse if partial => Err(Error::Usage(format!(
                "{} is there, of a run that did not end; --resume goes on with it, --overwrite starts anew",
                self.partial.display()
            ))),
            Existing::Refuse => Ok(false),
        }
    }

    /// Takes away what a run left that was killed behind its last step.
    pub(super) fn tidy(&self) -> Result<()> {
        remove(&self.progress)
    }

    /// The record of the run that is to be gone on with, where there is one.
    ///
    /// # Errors
    ///
    /// A record of something else than what is asked.
    pub(super) fn recorded(&self, existing: Existing, asked: Option<&Asked>) -> Result<Option<Recorded>> {
        let (Existing::Resume, Some(asked)) = (existing, asked) else { return Ok(None) };
        let Some(recorded) = Recorded::load(&self.progress)?.filter(|_| self.partial.exists()) else {
            return Ok(None);
        };
        recorded.check(asked, &self.progress)?;
        Ok(Some(recorded))
    }
}

/// Whether `output` is to be started or gone on with; `false` where it is finished and `existing` says to leave it so.
/// To be asked before anything costly is done.
///
/// # Errors
///
/// Where something is there that is not to be touched, or that is no file.
pub fn check_output(output: &Path, existing: Existing) -> Result<bool> {
    Ok(!Places::of(output)?.is_finished(existing)?)
}

/// Whether a run that did not end has left something that can be gone on with.
pub fn can_resume(output: &Path) -> bool {
    Places::of(output).is_ok_and(|places| places.partial.exists() && places.progress.exists())
}

/// An output that is being filled.
pub(super) struct Partial {
    places: Places,
    file: File,
    /// `None` for an input that cannot be read again: nothing is recorded then, and nothing left.
    asked: Option<Asked>,
    bytes: u64,
    recorded_rows: u64,
    recorded_at: Instant,
    record_took: Duration,
}

impl Partial {
    /// Starts, or goes on from a record.
    ///
    /// # Errors
    ///
    /// Where another process is at it, `OUT.partial` is shorter than its record says, or the system refuses.
    pub(super) fn open(places: Places, asked: Option<Asked>, recorded: Option<&Recorded>) -> Result<Self> {
        let path = &places.partial;
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(Error::io("write", path))?;
        // Where the file system knows no locks, there is none.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let message = "another process is writing it; wait for its end, or stop it";
            return Err(Error::content(path, message));
        }
        let bytes = recorded.map_or(0, |recorded| recorded.bytes);
        let found = file.metadata().map_err(Error::io("read", path))?.len();
        if found < bytes {
            let message = format!("expected {bytes} bytes, as recorded, found {found}; --overwrite starts anew");
            return Err(Error::content(path, message));
        }
        if recorded.is_none() {
            // Before anything is written: an old record must not speak of new rows.
            remove(&places.progress)?;
        }
        file.set_len(bytes).and_then(|()| file.seek(SeekFrom::End(0))).map_err(Error::io("write", path))?;
        let recorded_rows = recorded.map_or(0, |recorded| recorded.rows);
        let (recorded_at, record_took) = (Instant::now(), Duration::ZERO);
        Ok(Partial { places, file, asked, bytes, recorded_rows, recorded_at, record_took })
    }

    /// Adds a piece.
    pub(super) fn append(&mut self, piece: &[u8]) -> Result<()> {
        self.file.write_all(piece).map_err(Error::io("write", &self.places.partial))?;
        self.bytes += piece.len() as u64;
        Ok(())
    }

    /// Records how far it is, where the last record is old enough.
    pub(super) fn record_in_time(&mut self, truncated: &[u64], rows: u64) -> Result<()> {
        if self.recorded_at.elapsed() < EVERY.max(self.record_took * SHARE) {
            return Ok(());
        }
        self.record(truncated, rows)
    }

    /// Records how far it is: first the rows, then the record.
    pub(super) fn record(&mut self, truncated: &[u64], rows: u64) -> Result<()> {
        let Some(asked) = &self.asked else { return Ok(()) };
        let start = Instant::now();
        self.file.sync_all().map_err(Error::io("sync", &self.places.partial))?;
        Recorded::new(asked.clone(), rows, self.bytes, truncated.to_vec()).save(&self.places.progress)?;
        self.recorded_rows = rows;
        (self.recorded_at, self.record_took) = (Instant::now(), start.elapsed());
        Ok(())
    }

    /// Makes the output of it and gives it its name.
    pub(super) fn finish(mut self, writer: &dyn RowWriter) -> Result<()> {
        let Places { output, partial, progress } = &self.places;
        match writer.assembly() {
            None => {
                self.file.sync_all().map_err(Error::io("sync", partial))?;
                rename(partial, output)?;
            }
            Some(assembly) => {
                let frames = &mut self.file;
                write_aside(output, |to| {
                    let mut to = BufWriter::new(to);
                    assembly.assemble(frames, &mut to)?;
                    to.flush()
                })?;
                remove(partial)?;
            }
        }
        remove(progress)
    }

    /// What a run that failed leaves: its rows, where there are recorded ones to go on from, and else nothing.
    pub(super) fn give_up(self) {
        if self.recorded_rows == 0 {
            remove(&self.places.partial).ok();
            remove(&self.places.progress).ok();
        }
    }
}

/// Removes a file that need not be there.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}
