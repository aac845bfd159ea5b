//! A task's name, which is also that of its file: checked once, so that no name leads out of the store.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A name of 1 to 64 of `A-Z a-z 0-9 . _ -`, without a leading dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskName(String);

impl TaskName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The task whose patch is at this path of a store, relative to its root: `TASK.safetensors` or
    /// `TASK/patch.safetensors`.
    pub(super) fn of_path(path: &str) -> Option<TaskName> {
        let name = path.strip_suffix("/patch.safetensors").or_else(|| path.strip_suffix(".safetensors"))?;
        name.parse().ok()
    }

    /// Where a store may hold the task's patch, the first that is there counts.
    pub(super) fn paths(&self) -> [String; 2] {
        [format!("{self}.safetensors"), format!("{self}/patch.safetensors")]
    }
}

impl FromStr for TaskName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let plain = s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain || s.starts_with('.') || !(1..=64).contains(&s.len()) {
            let expected = "1 to 64 of the characters A-Z a-z 0-9 . _ - without a leading dot";
            let shown: String = s.chars().take(64).collect();
            return Err(Error::setting("task name", expected, format_args!("{shown:?}")));
        }
        Ok(TaskName(s.to_string()))
    }
}

impl fmt::Display for TaskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<Path> for TaskName {
    fn as_ref(&self) -> &Path {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_a_folder() {
        for bad in ["", ".", "..", ".versions", "a/b", "a\\b", "a b", "a\0", "é", "%2e", &"a".repeat(65)] {
            assert!(bad.parse::<TaskName>().is_err(), "{bad:?}");
        }
        for good in ["mrpc", "A.b_c-9", "patch", &"a".repeat(64)] {
            assert_eq!(good.parse::<TaskName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn only_patches_of_tasks_count_in_a_store() {
        let name = |path| TaskName::of_path(path).map(|name| name.to_string());
        assert_eq!(name("mrpc.safetensors").as_deref(), Some("mrpc"));
        assert_eq!(name("mrpc/patch.safetensors").as_deref(), Some("mrpc"));
        for other in [
            "mrpc/checkpoint/epoch-1.safetensors",
            ".versions/mrpc/0a.safetensors",
            ".mrpc.safetensors",
            "mrpc.json",
            "mrpc/run.json",
            "a/b/patch.safetensors",
            "patch",
        ] {
            assert_eq!(name(other), None, "{other}");
        }
    }
}
