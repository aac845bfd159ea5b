//! Which base is meant: from what the user typed, or did not, to a folder or a hub id.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The hub id of the default base.
pub const DEFAULT_ID: &str = "sentence-transformers/all-MiniLM-L6-v2";

/// A base by where it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseSpec {
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// A model on the hub.
    Hub {
        /// `org/name`, or a bare name as `bert-base-uncased`.
        id: String,
        /// Branch, tag or commit; `None` is the main branch.
        revision: Option<String>,
    },
}

impl BaseSpec {
    /// The base that is meant: `given` (the flag `--base`), else `$BITFIT_BASE`, else the folder that
    /// `scripts/fetch-base.sh` fills if it is there, else the hub id [`DEFAULT_ID`].
    ///
    /// # Errors
    ///
    /// As [`BaseSpec::parse`].
    pub fn resolve(given: Option<&str>) -> Result<BaseSpec> {
        if let Some(text) = given {
            return BaseSpec::parse(text);
        }
        // An empty variable is how a shell unsets one for a single command.
        if let Some(text) = std::env::var_os("BITFIT_BASE").filter(|text| !text.is_empty()) {
            let text = text.to_str().ok_or_else(|| {
                Error::setting("$BITFIT_BASE", "a folder or hub id in UTF-8", format_args!("{}", text.display()))
            })?;
            return BaseSpec::parse(text);
        }
        match default_folder().filter(|folder| folder.is_dir()) {
            Some(folder) => Ok(BaseSpec::Folder(folder)),
            None => Ok(BaseSpec::Hub { id: DEFAULT_ID.to_string(), revision: None }),
        }
    }

    /// Reads a base as a user types it. A folder that exists is a folder; otherwise `org/name`, `name`, or either with
    /// `@revision`, is a hub id.
    ///
    /// # Errors
    ///
    /// Text that can only be a path (`./x`, `../x`, `/x`, `a/b/c`) where no folder is, a file, and text that is
    /// neither a path nor a hub id.
    pub fn parse(text: &str) -> Result<BaseSpec> {
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(BaseSpec::Folder(path.to_path_buf()));
        }
        if path.is_file() {
            return Err(Error::setting("base", "a folder (give the one that this file is in) or a hub id", text));
        }
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let is_path = text.starts_with(['/', '.', '~']) || id.ends_with('/') || id.matches('/').count() > 1;
        if is_path || id.contains('\\') {
            let reason = "no such folder; a base is a folder with config.json, a tokenizer and weights, or a hub id \
                          as org/name";
            return Err(Error::io("open base", path)(std::io::Error::new(std::io::ErrorKind::NotFound, reason)));
        }
        let name = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(allowed) && !part.starts_with('.') && !part.contains("..")
        };
        // The revision becomes part of a path in the hub's cache, so nothing in it may climb out of there.
        if !id.split('/').all(name) || !revision.is_none_or(|r| r.split('/').all(name)) {
            return Err(Error::setting(
                "base",
                "a folder that exists, or a hub id as org/name, name or org/name@revision",
                format_args!("`{text}`"),
            ));
        }
        Ok(BaseSpec::Hub { id: id.to_string(), revision: revision.map(str::to_string) })
    }
}

impl fmt::Display for BaseSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BaseSpec::Folder(path) => path.display().fmt(f),
            BaseSpec::Hub { id, revision: None } => f.write_str(id),
            BaseSpec::Hub { id, revision: Some(revision) } => write!(f, "{id}@{revision}"),
        }
    }
}

/// Where `scripts/fetch-base.sh` puts the default base, whether it is there or not; `None` without a home.
pub fn default_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("bitfit").join("all-MiniLM-L6-v2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(id: &str, revision: Option<&str>) -> BaseSpec {
        BaseSpec::Hub { id: id.to_string(), revision: revision.map(str::to_string) }
    }

    #[test]
    fn a_folder_that_exists_is_a_folder_and_a_name_is_a_hub_id() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().to_str().unwrap();
        assert_eq!(BaseSpec::parse(text).unwrap(), BaseSpec::Folder(folder.path().to_path_buf()));
        assert_eq!(BaseSpec::parse("bert-base-uncased").unwrap(), hub("bert-base-uncased", None));
        assert_eq!(BaseSpec::parse("google/bert_uncased_L-2").unwrap(), hub("google/bert_uncased_L-2", None));
        assert_eq!(BaseSpec::parse("org/name@v1.0").unwrap(), hub("org/name", Some("v1.0")));
        assert_eq!(BaseSpec::parse("org/name@refs/pr/1").unwrap(), hub("org/name", Some("refs/pr/1")));
    }

    #[test]
    fn what_looks_like_a_path_and_is_not_there_is_a_missing_folder() {
        for path in
            ["./nothing-here", "/nothing/here", "../nothing-here", "nothing/here/at-all", "nothing-here/", "~/x"]
        {
            let error = BaseSpec::parse(path).unwrap_err();
            assert_eq!(error.kind(), crate::Kind::Io, "{path}");
            let message = error.to_string();
            assert!(message.contains(path) && message.contains("no such folder"), "{message}");
        }
    }

    #[test]
    fn a_file_and_text_that_is_no_id_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = BaseSpec::parse(file.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(message.contains("the one that this file is in"), "{message}");
        for text in ["", "org/na me", "@v1", "org/name@", "org/name@a/../../b", "org/..", "org/name@/etc", "a/.b"] {
            let error = BaseSpec::parse(text).unwrap_err();
            assert_eq!(error.kind(), crate::Kind::Usage, "{text}: {error}");
        }
    }

    #[test]
    fn a_spec_prints_as_it_is_typed() {
        for text in ["bert-base-uncased", "org/name", "org/name@v1"] {
            assert_eq!(BaseSpec::parse(text).unwrap().to_string(), text);
        }
    }
}
