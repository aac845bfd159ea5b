//! What can go wrong, with its evidence: which file, line, tensor or setting, what was expected, what was found,
//! and what to do about it.
//!
//! Every layer returns this one type. Its [`Kind`] decides an exit code at the command line and, later, an HTTP
//! status; the text is written where the evidence is at hand.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of thing went wrong; one match on it gives an exit code or an HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A setting, flag or request that cannot be carried out as asked: exit code 2, HTTP 422.
    Usage,
    /// A file or folder that could not be read or written.
    Io,
    /// A file whose contents are not what they must be (a checkpoint, a table, a patch).
    Content,
    /// A patch that was made for another base: HTTP 409.
    WrongBase,
    /// The hub could not be reached, or refused.
    Hub,
    /// A device that is not there, or failed.
    Device,
    /// A training run whose loss, gradients or outputs are no longer finite.
    Diverged,
    /// A check of the program on itself failed: a defect, never the user's fault.
    Audit,
    /// Stopped on request at a safe point: exit code 130.
    Interrupted,
}

/// An error with its evidence. See the module for what a message must say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting outside its range, an unknown name, or a request that does not fit.
    #[error("{what}: expected {expected}, found {found}")]
    Setting {
        /// The setting, as the user knows it (a flag, a JSON field).
        what: String,
        /// The valid range or the known names.
        expected: String,
        /// What was given.
        found: String,
    },
    /// Wrong usage that is not about one value.
    #[error("{0}")]
    Usage(String),
    /// A file or folder that could not be opened, read, written, synced or renamed.
    #[error("cannot {doing} {}: {reason}{}", path.display(), hint(reason))]
    Io {
        /// What was tried, as a verb: "read", "write", "rename".
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason; part of the message, so it is not a source beside it.
        reason: std::io::Error,
    },
    /// A file whose contents are wrong, at a line where lines are known.
    #[error("{}{}: {message}", path.display(), At(*line))]
    Content {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1, where the file has lines.
        line: Option<u64>,
        /// What was expected, what was found, and what to do.
        message: String,
    },
    /// A tensor that is missing or has the wrong shape or type.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape or type it must have.
        expected: String,
        /// What it has.
        found: String,
    },
    /// A patch for a base other than the one at hand.
    #[error(
        "patch {patch} was made for base {expected}, not for {found}; load that base or train the task on this one"
    )]
    WrongBase {
        /// The patch: file or task name.
        patch: String,
        /// Base id and fingerprint that the patch names.
        expected: String,
        /// Base id and fingerprint at hand.
        found: String,
    },
    /// The hub could not be reached, or refused.
    #[error("hub: {0}")]
    Hub(String),
    /// A device that is not there, or failed.
    #[error("device: {0}")]
    Device(String),
    /// A training run whose loss, gradients or outputs are no longer finite; the text says where, and what to try.
    #[error("the training diverged: {0}")]
    Diverged(String),
    /// A check of the program on itself failed.
    #[error("audit: {0}")]
    Audit(String),
    /// Stopped on request at a safe point; the text says how to go on.
    #[error("stopped: {0}")]
    Interrupted(String),
}

impl Error {
    /// What sort of thing went wrong.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Setting { .. } | Error::Usage(_) => Kind::Usage,
            Error::Io { .. } => Kind::Io,
            Error::Content { .. } | Error::Tensor { .. } => Kind::Content,
            Error::WrongBase { .. } => Kind::WrongBase,
            Error::Hub(_) => Kind::Hub,
            Error::Device(_) => Kind::Device,
            Error::Diverged(_) => Kind::Diverged,
            Error::Audit(_) => Kind::Audit,
            Error::Interrupted(_) => Kind::Interrupted,
        }
    }

    /// A setting outside its range.
    pub fn setting(what: impl Into<String>, expected: impl Into<String>, found: impl fmt::Display) -> Self {
        Error::Setting { what: what.into(), expected: expected.into(), found: found.to_string() }
    }

    /// For `map_err` on file operations: `File::open(p).map_err(Error::io("open", p))`.
    pub fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |reason| Error::Io { doing, path, reason }
    }

    /// A file whose contents are wrong as a whole.
    pub fn content(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Content { path: path.as_ref().to_path_buf(), line: None, message: message.into() }
    }

    /// A file whose contents are wrong at a line, counted from 1.
    pub fn line(path: impl AsRef<Path>, line: u64, message: impl Into<String>) -> Self {
        Error::Content { path: path.as_ref().to_path_buf(), line: Some(line), message: message.into() }
    }
}

struct At(Option<u64>);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(line) => write!(f, ":{line}"),
            None => Ok(()),
        }
    }
}

/// The commonest reasons deserve a word on what to do.
fn hint(reason: &std::io::Error) -> &'static str {
    match reason.kind() {
        std::io::ErrorKind::StorageFull => "; free some space and try again, nothing was left half-written",
        std::io::ErrorKind::PermissionDenied => "; check the permissions of the file and its folder",
        _ => "",
    }
}
