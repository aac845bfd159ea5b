//! Text lines with their numbers: what GLUE's files and JSONL are read by.
//!
//! A line ends with LF or CR LF; a byte-order mark at the head is dropped; anything that is not UTF-8 is refused with
//! its line, because a wrong encoding read as another is a text that nobody wrote.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What rows are read from: a file or standard input.
pub(super) type Source = Box<dyn Read + Send>;

/// Opens a file for reading.
pub(super) fn open(path: &Path) -> Result<Source> {
    Ok(Box::new(File::open(path).map_err(Error::io("open", path))?))
}

/// The same bytes without the UTF-8 byte-order mark that some editors, and GLUE's MRPC, put first.
pub(super) fn without_mark(mut source: Source) -> io::Result<Source> {
    let mut head = Vec::with_capacity(3);
    source.by_ref().take(3).read_to_end(&mut head)?;
    if head == [0xEF, 0xBB, 0xBF] {
        head.clear();
    }
    Ok(Box::new(Cursor::new(head).chain(source)))
}

/// The text of `bytes`, or the error that says how to get UTF-8.
pub(super) fn utf8<'a>(bytes: &'a [u8], path: &Path, line: u64) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let found = match bytes {
            [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => "UTF-16".to_string(),
            _ => format!("the byte 0x{:02X}", bytes[e.valid_up_to()]),
        };
        Error::line(
            path,
            line,
            format!("expected UTF-8 text, found {found}; save the file as UTF-8 (`iconv -f LATIN1 -t UTF-8`)"),
        )
    })
}

/// The lines of a file, one at a time.
pub(super) struct Lines {
    path: PathBuf,
    reader: BufReader<Source>,
    number: u64,
    /// Bytes up to the end of the last line.
    end: u64,
    buffer: Vec<u8>,
}

impl Lines {
    pub(super) fn new(source: Source, path: &Path) -> Result<Self> {
        let reader = BufReader::new(without_mark(source).map_err(Error::io("read", path))?);
        Ok(Lines { path: path.to_path_buf(), reader, number: 0, end: 0, buffer: Vec::new() })
    }

    /// The next line and its number, counted from 1, without its end; `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &str)>> {
        Ok(self.next_at()?.map(|(_, number, line)| (number, line)))
    }

    /// The same, and first the byte that the line begins at, the byte-order mark not counted.
    pub(super) fn next_at(&mut self) -> Result<Option<(u64, u64, &str)>> {
        self.buffer.clear();
        let length = self.reader.read_until(b'\n', &mut self.buffer).map_err(Error::io("read", &self.path))?;
        if length == 0 {
            return Ok(None);
        }
        let start = self.end;
        self.end += length as u64;
        self.number += 1;
        let line = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        Ok(Some((start, self.number, utf8(line, &self.path, self.number)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<(u64, String)>> {
        let mut lines = Lines::new(Box::new(Cursor::new(bytes.to_vec())), Path::new("a.tsv"))?;
        let mut found = Vec::new();
        while let Some((number, line)) = lines.next()? {
            found.push((number, line.to_string()));
        }
        Ok(found)
    }

    #[test]
    fn both_line_ends_are_taken_and_the_mark_is_dropped() {
        let expected = vec![(1, "a".to_string()), (2, String::new()), (3, "b\rc".to_string())];
        assert_eq!(all(b"\xEF\xBB\xBFa\r\n\nb\rc").unwrap(), expected);
        assert_eq!(all(b"").unwrap(), []);
        assert_eq!(all(b"\xEF\xBB\xBF").unwrap(), []);
    }

    #[test]
    fn another_encoding_is_refused_with_its_line() {
        let error = all(b"caf\xC3\xA9\ncaf\xE9\n").unwrap_err().to_string();
        assert!(error.starts_with("a.tsv:2: expected UTF-8 text, found the byte 0xE9"), "{error}");
        let error = all(b"\xFF\xFEa\0\n\0").unwrap_err().to_string();
        assert!(error.contains("a.tsv:1") && error.contains("UTF-16"), "{error}");
    }
}
