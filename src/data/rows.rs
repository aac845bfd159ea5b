//! The rows of a user's file, one at a time: CSV, TSV, JSONL or Parquet, each with all that stood in it.
//!
//! Rows stream, so a file may be larger than memory, and keep their other columns, so an output can repeat them. Both
//! a training table and the input of a prediction are read by this; the latter may ask for a part of the rows.

use std::fmt;
use std::path::{Path, PathBuf};

use arrow_schema::SchemaRef;
use serde_json::{Map, Value};

use super::columnar::{Parquet, Record};
use super::delimited::Delimited;
use super::lines::{Lines, Source, open};
use super::part::{Part, Wanted};
use crate::error::{Error, Result};

/// The column (CSV, TSV, Parquet) or key (JSONL) of each part of an example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// The first text, or the only one.
    pub text: String,
    /// The second text of a task of two.
    pub text_pair: Option<String>,
    /// What should be predicted; `None` where it is not known, or not wanted.
    pub label: Option<String>,
}

/// How a file of rows is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A header row, then fields separated by commas, quoted as in RFC 4180.
    Csv,
    /// The same with tabs. A field that begins with a double quote is a quoted field, as pandas reads and writes it.
    Tsv,
    /// A JSON object a line.
    Jsonl,
    /// Apache Parquet: columns with types of their own.
    Parquet,
}

impl Format {
    /// The format that a file's extension names, in upper or lower case.
    ///
    /// # Errors
    ///
    /// Where the extension is not `.csv`, `.tsv`, `.jsonl` or `.parquet`.
    pub fn of(path: &Path) -> Result<Format> {
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        let named = |format: &Format| extension.as_deref() == Some(format.extension());
        [Format::Csv, Format::Tsv, Format::Jsonl, Format::Parquet].into_iter().find(named).ok_or_else(|| {
            Error::setting("input file", "a name that ends in .csv, .tsv, .jsonl or .parquet", path.display())
        })
    }

    /// How the name of such a file ends, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Csv => "csv",
            Format::Tsv => "tsv",
            Format::Jsonl => "jsonl",
            Format::Parquet => "parquet",
        }
    }
}

/// All that stood in a row, in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Fields {
    /// One value a column; [`Rows::header`] has the names.
    Columns(Vec<String>),
    /// The object of a JSONL line, its keys in the order they were written.
    Object(Map<String, Value>),
    /// The place of a Parquet file's row among those decoded with it.
    Record(Record),
}

/// One row of a user's file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line it begins on, counted from 1; in a Parquet file, which has no lines, the number of the row.
    pub line: u64,
    /// The first text, or the only one; never blank.
    pub text: String,
    /// The second text, where a column for it was named; never blank.
    pub text_pair: Option<String>,
    /// The label, where a column for it was named: trimmed, never empty. Numbers and booleans of JSONL are given as
    /// they are written, those of Parquet in their shortest form.
    pub label: Option<String>,
    /// The whole row.
    pub fields: Fields,
}

/// Streams the rows of a file. Ends after the first error; a file without a row is an error, not an empty stream (a part
/// of a file may have none).
pub struct Rows {
    path: PathBuf,
    columns: Columns,
    format: Format,
    reader: Reader,
    wanted: Wanted,
    /// Bytes or rows of the part, where that is known.
    extent: Option<u64>,
    ended: bool,
}

enum Reader {
    Delimited { file: Box<Delimited>, text: usize, text_pair: Option<usize>, label: Option<usize> },
    Jsonl(Lines),
    Parquet(Box<Parquet>),
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("path", &self.path).field("columns", &self.columns).finish_non_exhaustive()
    }
}

impl Rows {
    /// Opens a file by its extension; `-` is JSONL from standard input.
    ///
    /// # Errors
    ///
    /// Where the file cannot be opened or is empty, its extension is unknown, or its header lacks a column, which
    /// lists those that it has; where a column of a Parquet file is of a type that holds no texts or labels.
    pub fn open(path: &Path, columns: &Columns) -> Result<Rows> {
        Rows::open_part(path, columns, Part::default())
    }

    /// Opens a file for some of its rows.
    ///
    /// # Errors
    ///
    /// As for [`Rows::open`]; a part of standard input, or of anything else that has no length.
    pub fn open_part(path: &Path, columns: &Columns, part: Part) -> Result<Rows> {
        if path == Path::new("-") {
            if part != Part::default() {
                return Err(Error::Usage("standard input is read once, by one process: it has no parts".into()));
            }
            return Rows::new(Box::new(std::io::stdin()), Format::Jsonl, Path::new("standard input"), columns);
        }
        let format = Format::of(path)?;
        if format == Format::Parquet {
            let file = Parquet::open(path, columns, part)?;
            let wanted = Wanted { any: file.n_rows_in_file() > 0, ..Wanted::all() };
            let (path, columns, extent) = (path.to_path_buf(), columns.clone(), Some(file.n_left()));
            let reader = Reader::Parquet(Box::new(file));
            return Ok(Rows { path, columns, format, reader, wanted, extent, ended: false });
        }
        let mut rows = Rows::new(open(path)?, format, path, columns)?;
        let about = std::fs::metadata(path).map_err(Error::io("read", path))?;
        if about.is_file() {
            let share = part.shard.share(about.len());
            rows.extent = Some(share.end - share.start);
            // The whole is what comes until the end, also where the file grows.
            rows.wanted.bytes = if part.shard.is_whole() { 0..u64::MAX } else { share };
        } else if !part.shard.is_whole() {
            let message = format!("{} is no file, so its length is not known and it has no parts", path.display());
            return Err(Error::Usage(message));
        }
        rows.wanted.skip = part.skip;
        Ok(rows)
    }

    /// Rows of anything that can be read; `name` stands for it in errors.
    ///
    /// # Errors
    ///
    /// As for [`Rows::open`]; Parquet, which is not read from its beginning to its end.
    pub fn new(source: Box<dyn std::io::Read + Send>, format: Format, name: &Path, columns: &Columns) -> Result<Rows> {
        let delimited = |source: Source, separator| -> Result<Reader> {
            let file = Delimited::new(source, separator, name)?;
            Ok(Reader::Delimited {
                text: file.place(&columns.text)?,
                text_pair: columns.text_pair.as_ref().map(|c| file.place(c)).transpose()?,
                label: columns.label.as_ref().map(|c| file.place(c)).transpose()?,
                file: Box::new(file),
            })
        };
        let reader = match format {
            Format::Csv => delimited(source, ',')?,
            Format::Tsv => delimited(source, '\t')?,
            Format::Jsonl => Reader::Jsonl(Lines::new(source, name)?),
            Format::Parquet => return Err(Error::Usage(format!("{}: Parquet is read from a file", name.display()))),
        };
        let (path, columns) = (name.to_path_buf(), columns.clone());
        Ok(Rows { path, columns, format, reader, wanted: Wanted::all(), extent: None, ended: false })
    }

    /// How the file is written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The names of the columns in the order of the file; `None` for JSONL, whose rows each carry their own keys.
    pub fn header(&self) -> Option<&[String]> {
        match &self.reader {
            Reader::Delimited { file, .. } => Some(file.header()),
            Reader::Jsonl(_) => None,
            Reader::Parquet(file) => Some(file.header()),
        }
    }

    /// The names and types of a Parquet file's columns, and what the file says of itself.
    pub fn schema(&self) -> Option<&SchemaRef> {
        match &self.reader {
            Reader::Parquet(file) => Some(file.schema()),
            Reader::Delimited { .. } | Reader::Jsonl(_) => None,
        }
    }

    /// How much of the part has been read, from 0 to 1, by bytes or by rows; `None` where its length is not known.
    pub fn share_read(&self) -> Option<f64> {
        let extent = self.extent?;
        let read = match &self.reader {
            Reader::Parquet(file) => extent - file.n_left(),
            Reader::Delimited { .. } | Reader::Jsonl(_) => self.wanted.at.saturating_sub(self.wanted.bytes.start),
        };
        Some(if extent == 0 { 1.0 } else { (read as f64 / extent as f64).min(1.0) })
    }

    fn row(&mut self) -> Result<Option<Row>> {
        let (path, columns) = (&self.path, &self.columns);
        match &mut self.reader {
            Reader::Delimited { file, text, text_pair, label } => loop {
                let Some((byte, line)) = file.advance()? else { return Ok(None) };
                match self.wanted.row_at(byte) {
                    None => return Ok(None),
                    Some(false) => continue,
                    Some(true) => {}
                }
                let fields = file.fields(line)?;
                let field = |place: usize| fields[place].clone();
                return Ok(Some(Row {
                    line,
                    text: not_blank(field(*text), path, line, &columns.text)?,
                    text_pair: text_pair.map(|p| not_blank(field(p), path, line, &file.header()[p])).transpose()?,
                    label: label.map(|p| label_of(&field(p), path, line, &file.header()[p])).transpose()?,
                    fields: Fields::Columns(fields),
                }));
            },
            Reader::Jsonl(lines) => loop {
                let Some((byte, line, json)) = lines.next_at()? else { return Ok(None) };
                if json.trim().is_empty() {
                    continue;
                }
                match self.wanted.row_at(byte) {
                    None => return Ok(None),
                    Some(false) => continue,
                    Some(true) => {}
                }
                let object = object(json, path, line)?;
                let text = |key: &String| match value(&object, key, path, line)? {
                    Value::String(text) => not_blank(text.clone(), path, line, key),
                    other => Err(wrong_type("text", key, other, path, line)),
                };
                let label = |key: &String| match value(&object, key, path, line)? {
                    Value::String(label) => label_of(label, path, line, key),
                    scalar @ (Value::Number(_) | Value::Bool(_)) => Ok(scalar.to_string()),
                    other => Err(wrong_type("a label", key, other, path, line)),
                };
                return Ok(Some(Row {
                    line,
                    text: text(&columns.text)?,
                    text_pair: columns.text_pair.as_ref().map(text).transpose()?,
                    label: columns.label.as_ref().map(label).transpose()?,
                    fields: Fields::Object(object),
                }));
            },
            Reader::Parquet(file) => {
                let Some(row) = file.next()? else { return Ok(None) };
                let line = row.number;
                let text = |found: Option<String>, column: &str| match found {
                    Some(text) => not_blank(text, path, line, column),
                    None => Err(null("text", path, line, column)),
                };
                let label = |found: Option<String>, column: &str| match found {
                    Some(label) => label_of(&label, path, line, column),
                    None => Err(null("label", path, line, column)),
                };
                let pair = row.text_pair.zip(columns.text_pair.as_deref());
                let labelled = row.label.zip(columns.label.as_deref());
                Ok(Some(Row {
                    line,
                    text: text(row.text, &columns.text)?,
                    text_pair: pair.map(|(found, column)| text(found, column)).transpose()?,
                    label: labelled.map(|(found, column)| label(found, column)).transpose()?,
                    fields: Fields::Record(row.record),
                }))
            }
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.ended {
            return None;
        }
        let next = match self.row() {
            Ok(Some(row)) => Ok(row),
            Ok(None) if !self.wanted.any => Err(Error::content(&self.path, "there is no row in it")),
            Ok(None) => {
                self.ended = true;
                return None;
            }
            Err(error) => Err(error),
        };
        self.ended = next.is_err();
        Some(next)
    }
}

fn not_blank(text: String, path: &Path, line: u64, column: &str) -> Result<String> {
    if text.trim().is_empty() {
        return Err(Error::line(path, line, format!("the text in `{column}` is empty; fill it or remove the row")));
    }
    Ok(text)
}

/// A label without the white space around it, which would make two classes of one word.
fn label_of(label: &str, path: &Path, line: u64, column: &str) -> Result<String> {
    match label.trim() {
        "" => Err(Error::line(path, line, format!("the label in `{column}` is empty; fill it or remove the row"))),
        label => Ok(label.to_string()),
    }
}

fn null(what: &str, path: &Path, line: u64, column: &str) -> Error {
    Error::line(path, line, format!("the {what} in `{column}` is null; fill it or remove the row"))
}

fn object(json: &str, path: &Path, line: u64) -> Result<Map<String, Value>> {
    match serde_json::from_str(json) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            let message = format!("expected a JSON object a line, found {}", kind(&other));
            Err(Error::line(path, line, message))
        }
        // serde_json ends its message with a position whose line is always 1 here.
        Err(e) => {
            let text = e.to_string();
            let reason = text.split(" at line ").next().unwrap_or(&text);
            let message = format!("expected a JSON object a line: {reason} at column {}", e.column());
            Err(Error::line(path, line, message))
        }
    }
}

fn value<'a>(object: &'a Map<String, Value>, key: &str, path: &Path, line: u64) -> Result<&'a Value> {
    object.get(key).ok_or_else(|| {
        let keys: Vec<&str> = object.keys().map(String::as_str).collect();
        let message = format!("there is no key `{key}`; the object has `{}`", keys.join("`, `"));
        Error::line(path, line, message)
    })
}

fn wrong_type(expected: &str, key: &str, found: &Value, path: &Path, line: u64) -> Error {
    Error::line(path, line, format!("expected {expected} in `{key}`, found {}", kind(found)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn rows(text: &str, format: Format, columns: [Option<&str>; 3]) -> Result<Vec<Row>> {
        let [text_column, text_pair, label] = columns.map(|c| c.map(String::from));
        let columns = Columns { text: text_column.unwrap(), text_pair, label };
        Rows::new(Box::new(Cursor::new(text.as_bytes().to_vec())), format, Path::new("in"), &columns)?.collect()
    }

    fn refusal(text: &str, format: Format) -> String {
        rows(text, format, [Some("text"), None, Some("label")]).unwrap_err().to_string()
    }

    #[test]
    fn the_three_formats_give_the_same_rows() {
        let columns = [Some("text"), Some("other"), Some("label")];
        let csv = rows("label,text,other,id\nyes,\"a, b\",c \"d\",7\n", Format::Csv, columns).unwrap();
        let tsv = rows("label\ttext\tother\tid\r\n yes \ta, b\tc \"d\"\t7\r\n", Format::Tsv, columns).unwrap();
        let jsonl = rows(
            "\n{\"label\": \"yes\", \"text\": \"a, b\", \"other\": \"c \\\"d\\\"\", \"id\": 7}\n\n",
            Format::Jsonl,
            columns,
        )
        .unwrap();
        for found in [&csv, &tsv, &jsonl] {
            assert_eq!(found.len(), 1);
            assert_eq!((found[0].line, found[0].text.as_str()), (2, "a, b"));
            assert_eq!(found[0].text_pair.as_deref(), Some("c \"d\""));
            assert_eq!(found[0].label.as_deref(), Some("yes"));
        }
        assert_eq!(csv[0].fields, Fields::Columns(["yes", "a, b", "c \"d\"", "7"].map(String::from).to_vec()));
        let Fields::Object(object) = &jsonl[0].fields else { panic!("JSONL keeps its object") };
        assert!(object.keys().eq(["label", "text", "other", "id"]), "keys keep their order");
    }

    #[test]
    fn labels_of_jsonl_may_be_numbers_and_booleans() {
        let text =
            "{\"text\": \"a\", \"label\": 2}\n{\"text\": \"a\", \"label\": 2.5}\n{\"text\": \"a\", \"label\": true}\n";
        let found = rows(text, Format::Jsonl, [Some("text"), None, Some("label")]).unwrap();
        let labels: Vec<_> = found.iter().map(|r| r.label.clone().unwrap()).collect();
        assert_eq!(labels, ["2", "2.5", "true"]);
    }

    #[test]
    fn a_bad_row_is_refused_with_its_line() {
        for (text, format, expected) in [
            ("text,label\na,x\n  ,x\n", Format::Csv, "in:3: the text in `text` is empty"),
            ("text,label\na,x\nb,\n", Format::Csv, "in:3: the label in `label` is empty"),
            (
                "{\"text\": \"a\", \"label\": 1}\n[1]\n",
                Format::Jsonl,
                "in:2: expected a JSON object a line, found an array",
            ),
            (
                "{\"text\": \"a\", \"label\": 1\n",
                Format::Jsonl,
                "in:1: expected a JSON object a line: EOF while parsing",
            ),
            ("{\"text\": \"a\"}\n", Format::Jsonl, "in:1: there is no key `label`; the object has `text`"),
            ("{\"text\": 3, \"label\": 1}\n", Format::Jsonl, "in:1: expected text in `text`, found a number"),
            ("{\"text\": \"a\", \"label\": null}\n", Format::Jsonl, "in:1: expected a label in `label`, found null"),
            ("{\"text\": \" \", \"label\": 1}\n", Format::Jsonl, "in:1: the text in `text` is empty"),
        ] {
            let error = refusal(text, format);
            assert!(error.starts_with(expected), "{error}\n  should start with {expected}");
        }
    }

    #[test]
    fn a_file_without_rows_is_refused_in_every_format() {
        for (text, format) in
            [("", Format::Csv), ("text,label\n", Format::Csv), ("", Format::Jsonl), ("\n \n", Format::Jsonl)]
        {
            let error = refusal(text, format);
            assert!(error.contains("empty") || error.contains("no row"), "{error}");
        }
    }

    #[test]
    fn an_unknown_extension_is_refused() {
        assert_eq!(Format::of(Path::new("A.CSV")).unwrap(), Format::Csv);
        assert_eq!(Format::of(Path::new("a.parquet")).unwrap(), Format::Parquet);
        for name in ["a.json", "a", "a.txt"] {
            let error = Format::of(Path::new(name)).unwrap_err().to_string();
            assert!(error.contains(".csv, .tsv, .jsonl or .parquet") && error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_stream_ends_after_its_first_error() {
        let columns = Columns { text: "text".into(), text_pair: None, label: None };
        let text = "text,b\na,b\nragged\nc,d\n".as_bytes().to_vec();
        let rows = Rows::new(Box::new(Cursor::new(text)), Format::Csv, Path::new("in"), &columns).unwrap();
        let found: Vec<bool> = rows.map(|row| row.is_ok()).collect();
        assert_eq!(found, [true, false]);
    }
}
