//! Records of a CSV or TSV file, with the line that each begins on.
//!
//! The crate `csv` does the splitting. Two things that it does not tell, a user needs: the line a record begins on
//! (its own count is off after blank lines and with CR LF ends), and that a quoted field never ends (it takes the rest
//! of the file for one field). [`Watch`] follows the same grammar over the bytes on their way to the crate and knows
//! both.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use csv::{ByteRecord, ErrorKind, ReaderBuilder};

use super::lines::{Source, utf8, without_mark};
use crate::error::{Error, Result};

/// A file with a header row. Fields are quoted as in RFC 4180, and as pandas writes them, in TSV too. A quote that is
/// part of a text and not written so would swallow what follows it, without a word: where that shows, it is refused.
pub(super) struct Delimited {
    path: PathBuf,
    reader: csv::Reader<Watch>,
    record: ByteRecord,
    header: Vec<String>,
    separator: char,
}

impl Delimited {
    /// Reads the header.
    pub(super) fn new(source: Source, separator: char, path: &Path) -> Result<Self> {
        let source = without_mark(source).map_err(Error::io("read", path))?;
        let reader = ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(separator as u8)
            .from_reader(Watch::new(source, separator as u8));
        let mut file =
            Delimited { path: path.to_path_buf(), reader, record: ByteRecord::new(), header: Vec::new(), separator };
        match file.advance()? {
            Some((_, line)) => file.header = file.texts(line)?,
            None => return Err(Error::content(path, "the file is empty; expected a header row and at least one more")),
        }
        Ok(file)
    }

    /// The columns' names, in the order of the file.
    pub(super) fn header(&self) -> &[String] {
        &self.header
    }

    /// Where a column stands.
    pub(super) fn place(&self, column: &str) -> Result<usize> {
        let places: Vec<usize> = (0..self.header.len()).filter(|&i| self.header[i] == column).collect();
        match places[..] {
            [place] => Ok(place),
            [] => {
                let found = self.header.join("`, `");
                let mut message = format!("there is no column `{column}`; the header has `{found}`");
                if let ([only], ',') = (&self.header[..], self.separator)
                    && only.contains([';', '\t'])
                {
                    message.push_str("; fields of a .csv file are separated by commas, of a .tsv file by tabs");
                }
                Err(Error::line(&self.path, 1, message))
            }
            _ => Err(Error::line(&self.path, 1, format!("the header has the column `{column}` more than once"))),
        }
    }

    /// Goes to the next record and tells the byte and the line that it begins on; `None` after the last. Blank lines are
    /// passed over. The byte is the crate's, which counts line ends and blank lines before a record to it: a number that
    /// grows from record to record and depends on the file alone.
    pub(super) fn advance(&mut self) -> Result<Option<(u64, u64)>> {
        let more = self.reader.read_byte_record(&mut self.record).map_err(|e| match e.into_kind() {
            ErrorKind::Io(e) => Error::io("read", &self.path)(e),
            other => Error::content(&self.path, format!("not a table: {other:?}")),
        })?;
        if let Some(line) = self.reader.get_ref().open_quote() {
            let message = "a field that begins with a double quote here is never closed; write a quote that is part \
                           of the text twice, inside a quoted field";
            return Err(Error::line(&self.path, line, message));
        }
        if !more {
            return Ok(None);
        }
        let watch = self.reader.get_mut();
        let line = watch.starts.pop_front().unwrap_or(0);
        let in_this_record = |bad: &u64| watch.starts.front().is_none_or(|next| bad < next);
        if let Some(bad) = watch.stray.filter(in_this_record) {
            let message = "a double quote at the beginning of a field here does not end it; write a quote that is part \
                           of the text twice, inside a quoted field, or give the rows as JSONL";
            return Err(Error::line(&self.path, bad, message));
        }
        Ok(Some((self.record.position().map_or(0, |position| position.byte()), line)))
    }

    /// The fields of the record at hand, as many as the header has.
    pub(super) fn fields(&self, line: u64) -> Result<Vec<String>> {
        if self.record.len() != self.header.len() {
            let message = format!(
                "expected {} fields as in the header, found {}; a field that holds the separator, a quote or a line \
                 break is written in double quotes, and a quote inside it twice",
                self.header.len(),
                self.record.len(),
            );
            return Err(Error::line(&self.path, line, message));
        }
        self.texts(line)
    }

    fn texts(&self, line: u64) -> Result<Vec<String>> {
        self.record.iter().map(|field| Ok(utf8(field, &self.path, line)?.to_string())).collect()
    }
}

/// Passes bytes on and notes where records begin and whether a quote is open.
struct Watch {
    source: Source,
    at: At,
    line: u64,
    /// Lines on which the records begin that were read but not yet asked for.
    starts: VecDeque<u64>,
    /// Line of the last quote that opened a field.
    quote: u64,
    /// Line of the first field whose quotes are not those of a table: text behind the closing one, or, in TSV, where
    /// it is all but always a quote of the text, a line break inside.
    stray: Option<u64>,
    separator: u8,
    ended: bool,
}

/// Where in the grammar the next byte stands.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Record,
    Field,
    Plain,
    Quoted,
    /// After a quote inside a quoted field: its end, or the first half of a doubled quote.
    Quote,
}

impl Watch {
    fn new(source: Source, separator: u8) -> Self {
        Watch {
            source,
            at: At::Record,
            line: 1,
            starts: VecDeque::new(),
            quote: 0,
            stray: None,
            separator,
            ended: false,
        }
    }

    fn pass(&mut self, byte: u8) {
        if self.at == At::Record && !matches!(byte, b'\r' | b'\n') {
            self.starts.push_back(self.line);
            self.at = At::Field;
        }
        let ends = byte == self.separator || matches!(byte, b'\r' | b'\n' | b'"');
        let breaks = self.separator == b'\t' && byte == b'\n';
        if (self.at == At::Quote && !ends) || (self.at == At::Quoted && breaks) {
            self.stray.get_or_insert(self.quote);
        }
        self.at = match (self.at, byte) {
            (At::Quoted, b'"') => At::Quote,
            (At::Quoted, _) | (At::Quote, b'"') => At::Quoted,
            (_, b'\r' | b'\n') => At::Record,
            (_, byte) if byte == self.separator => At::Field,
            (At::Field, b'"') => {
                self.quote = self.line;
                At::Quoted
            }
            _ => At::Plain,
        };
        self.line += u64::from(byte == b'\n');
    }

    /// The line of a quote that the end of the file leaves open.
    fn open_quote(&self) -> Option<u64> {
        (self.ended && self.at == At::Quoted).then_some(self.quote)
    }
}

impl Read for Watch {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buffer)?;
        for &byte in &buffer[..n] {
            self.pass(byte);
        }
        self.ended |= n == 0 && !buffer.is_empty();
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn table(text: &str) -> Result<Delimited> {
        Delimited::new(Box::new(Cursor::new(text.as_bytes().to_vec())), ',', Path::new("a.csv"))
    }

    fn records(text: &str) -> Result<Vec<(u64, Vec<String>)>> {
        let mut table = table(text)?;
        let mut records = Vec::new();
        while let Some((_, line)) = table.advance()? {
            records.push((line, table.fields(line)?));
        }
        Ok(records)
    }

    fn lines(text: &str) -> Vec<u64> {
        records(text).unwrap().iter().map(|r| r.0).collect()
    }

    #[test]
    fn a_record_knows_the_line_it_begins_on() {
        assert_eq!(lines("a,b\n1,2\n3,4\n"), [2, 3]);
        assert_eq!(lines("a,b\r\n1,2\r\n3,4"), [2, 3]);
        assert_eq!(lines("\n\na,b\n\n1,2\n\n\n3,4\n\n"), [5, 8]);
        assert_eq!(lines("a,b\n\"1\n\nx\",2\n3,\"4 \"\"quoted\"\"\n\"\n5,6\n"), [2, 5, 7]);
        assert_eq!(lines("\u{feff}\"a\",b\n,\n\"\",2\n5 \" inch,6\n"), [2, 3, 4]);
    }

    #[test]
    fn lines_are_right_across_the_readers_buffer() {
        let mut text = String::from("a,b\r\n");
        for i in 0..5000 {
            text.push_str(&format!("\"row {i}, it said \"\"yes\"\"\",x\r\n"));
        }
        assert!(lines(&text).into_iter().eq(2..5002));
    }

    #[test]
    fn a_quote_that_is_never_closed_is_refused_where_it_opens() {
        for text in ["a,b\n1,2\n3,\"4\n5,6\n7,8\n", "a,b\n1,2\n3,\"4 \"\"\n"] {
            let error = records(text).unwrap_err().to_string();
            assert!(error.starts_with("a.csv:3: a field that begins with a double quote"), "{error}");
        }
        assert_eq!(records("a,b\n1,\"2\"").unwrap().len(), 1, "a quote closed by the last byte is closed");
    }

    #[test]
    fn a_ragged_record_is_refused_with_its_line() {
        let error = records("a,b\n1,2\n\n3,4,5\n").unwrap_err().to_string();
        assert!(error.starts_with("a.csv:4: expected 2 fields as in the header, found 3"), "{error}");
    }

    #[test]
    fn a_missing_column_lists_those_that_are_there() {
        let error = table("text;label\n").unwrap().place("text").unwrap_err().to_string();
        assert!(error.contains("no column `text`; the header has `text;label`; fields of a .csv"), "{error}");
        let error = table("a,b,a\n").unwrap().place("a").unwrap_err().to_string();
        assert!(error.contains("more than once"), "{error}");
        assert_eq!(table("a,b,a\n").unwrap().place("b").unwrap(), 1);
    }
}
