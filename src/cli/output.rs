//! What goes to standard output, and words as a shell takes them.

use std::fmt;
use std::io::{self, Write};

use bitfit::{Error, Result};

/// As `println!`, but a reader that has gone or a full disk is an error for the command to report, and no panic.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::cli::output::line(format_args!($($text)*))?
    };
}
pub(super) use say;

/// Writes a line to standard output.
pub fn line(text: fmt::Arguments) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Error::io("write to", "standard output"))
}

/// A word as a shell takes it.
pub fn quoted(word: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:=@,+".contains(&b);
    if !word.is_empty() && word.bytes().all(is_plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The command that was given, with --resume in place of --overwrite.
pub fn resume_command() -> String {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let words = words.filter(|word| word != "--overwrite" && word != "--resume").chain(["--resume".to_string()]);
    let words: Vec<String> = words.map(|word| quoted(&word)).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_spaces_or_quotes_is_quoted_for_the_shell() {
        assert_eq!(quoted("/usr/bin/bitfit"), "/usr/bin/bitfit");
        assert_eq!(quoted("/my tools/bitfit"), "'/my tools/bitfit'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
