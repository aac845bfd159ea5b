//! Rows of a Parquet file, decoded some hundreds at a time.
//!
//! The crate `parquet` decodes. What is added: which rows of the file are wanted (whole row groups that hold none of
//! them are not read), texts and labels of whatever type the column has, and an error where a damaged file makes the
//! crate fail, however it fails.

use std::fmt::Display;
use std::fs::File;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, SchemaRef};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::ParquetMetaData;

use super::part::Part;
use super::rows::Columns;
use crate::error::{Error, Result};

/// Rows that are decoded at once.
const BATCH: usize = 512;

/// A column of a row group that says of itself that it unpacks to more than this, and to more than [`MOST_TIMES`] its
/// size in the file, is taken for one that was made to exhaust memory.
const LARGE_BYTES: i64 = 1 << 30;
const MOST_TIMES: i64 = 1000;

/// Where a row of a Parquet file lies: what is needed to write all its columns again, whatever their types.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The rows that were decoded together.
    pub batch: Arc<RecordBatch>,
    /// Which of them it is.
    pub row: usize,
}

/// The parts of a row that have a meaning here; `None` stands for a null.
#[derive(Debug)]
pub(super) struct ParquetRow {
    /// The row's number in the file, counted from 1.
    pub(super) number: u64,
    pub(super) text: Option<String>,
    /// Of the columns that were asked for.
    pub(super) text_pair: Option<Option<String>>,
    pub(super) label: Option<Option<String>>,
    pub(super) record: Record,
}

/// A Parquet file that is being read.
pub(super) struct Parquet {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    schema: SchemaRef,
    header: Vec<String>,
    text: usize,
    text_pair: Option<usize>,
    label: Option<usize>,
    /// Rows of the file, counted from 0, that are still to come.
    rows: Range<u64>,
    n_rows_in_file: u64,
    decoded: Option<Decoded>,
}

struct Decoded {
    batch: Arc<RecordBatch>,
    next: usize,
    text: Vec<Option<String>>,
    text_pair: Option<Vec<Option<String>>>,
    label: Option<Vec<Option<String>>>,
}

impl Parquet {
    /// Opens a file for the rows of a part.
    pub(super) fn open(path: &Path, columns: &Columns, part: Part) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let builder = guarded(path, || ParquetRecordBatchReaderBuilder::try_new(file))?;
        let (schema, metadata) = (builder.schema().clone(), builder.metadata().clone());
        let counts = row_counts(path, &metadata)?;
        let n_rows_in_file = counts.iter().sum();
        let share = part.shard.share(n_rows_in_file);
        let rows = share.end.min(share.start.saturating_add(part.skip))..share.end;

        let place = |column: &String, what: Kind| place(path, &schema, column, what);
        let text = place(&columns.text, Kind::Text)?;
        let text_pair = columns.text_pair.as_ref().map(|c| place(c, Kind::Text)).transpose()?;
        let label = columns.label.as_ref().map(|c| place(c, Kind::Label)).transpose()?;

        let (groups, offset) = groups_of(&counts, &rows);
        let n_wanted = (rows.end - rows.start) as usize;
        let reader = guarded(path, || {
            let builder = builder.with_row_groups(groups).with_batch_size(BATCH);
            builder.with_offset(offset as usize).with_limit(n_wanted).build()
        })?;
        let header = schema.fields().iter().map(|field| field.name().clone()).collect();
        let path = path.to_path_buf();
        Ok(Parquet { path, reader, schema, header, text, text_pair, label, rows, n_rows_in_file, decoded: None })
    }

    /// The columns' names, in the order of the file.
    pub(super) fn header(&self) -> &[String] {
        &self.header
    }

    /// The columns' names and types, and what the file says of itself.
    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// How many rows the whole file has.
    pub(super) fn n_rows_in_file(&self) -> u64 {
        self.n_rows_in_file
    }

    /// How many rows are still to come.
    pub(super) fn n_left(&self) -> u64 {
        self.rows.end - self.rows.start
    }

    /// The next row of the part; `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<ParquetRow>> {
        if self.rows.is_empty() {
            return Ok(None);
        }
        let decoded = match self.decoded.take().filter(|decoded| decoded.next < decoded.batch.num_rows()) {
            Some(decoded) => self.decoded.insert(decoded),
            None => {
                let decoded = self.decode()?;
                self.decoded.insert(decoded)
            }
        };
        let row = decoded.next;
        decoded.next += 1;
        self.rows.start += 1;
        let of = |texts: &mut Vec<Option<String>>| texts[row].take();
        Ok(Some(ParquetRow {
            number: self.rows.start,
            text: of(&mut decoded.text),
            text_pair: decoded.text_pair.as_mut().map(of),
            label: decoded.label.as_mut().map(of),
            record: Record { batch: decoded.batch.clone(), row },
        }))
    }

    fn decode(&mut self) -> Result<Decoded> {
        let next = guarded(&self.path, || self.reader.next().transpose())?;
        let Some(batch) = next.filter(|batch| batch.num_rows() > 0) else {
            let message = format!("it ends {} rows before the number of rows that it names", self.n_left());
            return Err(damaged(&self.path, &message));
        };
        let path = &self.path;
        let column = |place: usize| guarded(path, || Ok::<_, String>(words(batch.column(place))));
        Ok(Decoded {
            next: 0,
            text: column(self.text)?,
            text_pair: self.text_pair.map(column).transpose()?,
            label: self.label.map(column).transpose()?,
            batch: Arc::new(batch),
        })
    }
}

/// How many rows each row group has, in a file whose figures are those of a file that could be.
fn row_counts(path: &Path, metadata: &ParquetMetaData) -> Result<Vec<u64>> {
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let (unpacked, packed) = (column.uncompressed_size(), column.compressed_size());
        if is_bomb(packed, unpacked) {
            let message = format!("a column of {packed} bytes says that it unpacks to {unpacked}");
            return Err(damaged(path, &message));
        }
    }
    let counts = metadata.row_groups().iter().map(|group| u64::try_from(group.num_rows()).ok());
    let counts: Option<Vec<u64>> = counts.collect();
    let sum = counts.as_ref().and_then(|counts| counts.iter().try_fold(0u64, |sum, n| sum.checked_add(*n)));
    match (counts, sum, u64::try_from(metadata.file_metadata().num_rows())) {
        (Some(counts), Some(sum), Ok(n_rows)) if sum == n_rows => Ok(counts),
        _ => Err(damaged(path, "its row groups do not have the number of rows that it names")),
    }
}

fn is_bomb(packed: i64, unpacked: i64) -> bool {
    packed < 0 || unpacked < 0 || (unpacked > LARGE_BYTES && unpacked / MOST_TIMES > packed)
}

/// The row groups that hold any of `rows`, and how many rows of the first come before them.
fn groups_of(counts: &[u64], rows: &Range<u64>) -> (Vec<usize>, u64) {
    let (mut groups, mut offset, mut start) = (Vec::new(), 0, 0);
    for (group, count) in counts.iter().enumerate() {
        let end = start + count;
        if start < rows.end && end > rows.start {
            if groups.is_empty() {
                offset = rows.start.saturating_sub(start);
            }
            groups.push(group);
        }
        start = end;
    }
    (groups, offset)
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Label,
}

/// Where a column stands whose values can be read as texts or labels.
fn place(path: &Path, schema: &SchemaRef, column: &str, kind: Kind) -> Result<usize> {
    let fields = schema.fields();
    let places: Vec<usize> = (0..fields.len()).filter(|&i| fields[i].name() == column).collect();
    let [place] = places[..] else {
        let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
        return Err(Error::content(
            path,
            match places.len() {
                0 => format!("there is no column `{column}`; the file has `{}`", names.join("`, `")),
                _ => format!("the file has the column `{column}` more than once"),
            },
        ));
    };
    let found = fields[place].data_type();
    let value = match found {
        DataType::Dictionary(_, value) => value.as_ref(),
        other => other,
    };
    let is_text = matches!(value, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    let is_label = is_text
        || *value == DataType::Boolean
        || value.is_integer()
        || matches!(value, DataType::Float32 | DataType::Float64);
    let (fits, expected) = match kind {
        Kind::Text => (is_text, "text (a string column)"),
        Kind::Label => (is_label, "labels (a column of strings, whole numbers, booleans or floats)"),
    };
    if !fits {
        return Err(Error::content(path, format!("expected {expected} in `{column}`, found the type {found}")));
    }
    Ok(place)
}

/// The values of a column as they would be written in a table: nulls, and numbers that are none, are `None`.
fn words(array: &dyn Array) -> Vec<Option<String>> {
    let Some(dictionary) = array.as_any_dictionary_opt() else {
        return (0..array.len()).map(|row| word(array, row)).collect();
    };
    if dictionary.values().is_empty() {
        return vec![None; array.len()];
    }
    let keys = dictionary.normalized_keys();
    let of = |(row, key)| dictionary.is_valid(row).then(|| word(dictionary.values(), key)).flatten();
    keys.into_iter().enumerate().map(of).collect()
}

fn word(array: &dyn Array, row: usize) -> Option<String> {
    if array.is_null(row) {
        return None;
    }
    /// A float without a fraction is written as a whole number: pandas makes floats of whole numbers that have a gap.
    fn float(x: impl Into<f64> + Display) -> Option<String> {
        let text = x.to_string();
        (!x.into().is_nan()).then_some(text)
    }
    match array.data_type() {
        DataType::Utf8 => Some(array.as_string::<i32>().value(row).to_string()),
        DataType::LargeUtf8 => Some(array.as_string::<i64>().value(row).to_string()),
        DataType::Utf8View => Some(array.as_string_view().value(row).to_string()),
        DataType::Boolean => Some(array.as_boolean().value(row).to_string()),
        DataType::Int8 => Some(array.as_primitive::<Int8Type>().value(row).to_string()),
        DataType::Int16 => Some(array.as_primitive::<Int16Type>().value(row).to_string()),
        DataType::Int32 => Some(array.as_primitive::<Int32Type>().value(row).to_string()),
        DataType::Int64 => Some(array.as_primitive::<Int64Type>().value(row).to_string()),
        DataType::UInt8 => Some(array.as_primitive::<UInt8Type>().value(row).to_string()),
        DataType::UInt16 => Some(array.as_primitive::<UInt16Type>().value(row).to_string()),
        DataType::UInt32 => Some(array.as_primitive::<UInt32Type>().value(row).to_string()),
        DataType::UInt64 => Some(array.as_primitive::<UInt64Type>().value(row).to_string()),
        DataType::Float32 => float(array.as_primitive::<Float32Type>().value(row)),
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(row)),
        // [`place`] lets no other type in.
        _ => None,
    }
}

/// Runs a call of the crate on bytes that anybody may have written: an error or a panic of it is a damaged file.
fn guarded<T, E: Display>(path: &Path, call: impl FnOnce() -> Result<T, E>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| damaged(path, &e.to_string())),
        Err(_) => Err(damaged(path, "its decoder gave it up")),
    }
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::content(
        path,
        format!("no Parquet file, a damaged one, or of a kind that is not read: {what}; write it anew"),
    )
}

#[cfg(test)]
mod tests {
    use arrow_array::builder::{StringDictionaryBuilder, StringViewBuilder};
    use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array, LargeStringArray, StringArray};
    use parquet::arrow::ArrowWriter;
    use parquet::file::properties::WriterProperties;
    use proptest::prelude::*;

    use super::*;
    use crate::data::Shard;

    const TEXTS: [Option<&str>; 3] = [Some("a"), None, Some("c")];

    fn columns(text: &str, label: Option<&str>) -> Columns {
        Columns { text: text.into(), text_pair: None, label: label.map(String::from) }
    }

    /// A file of these columns, `rows_in_group` rows a row group.
    fn file(columns: Vec<(&str, ArrayRef)>, rows_in_group: usize) -> tempfile::NamedTempFile {
        let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap();
        let file = tempfile::Builder::new().suffix(".parquet").tempfile().unwrap();
        let properties = WriterProperties::builder().set_max_row_group_row_count(Some(rows_in_group)).build();
        let mut writer = ArrowWriter::try_new(file.reopen().unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        file
    }

    fn read(path: &Path, columns: &Columns, part: Part) -> Result<Vec<ParquetRow>> {
        let mut file = Parquet::open(path, columns, part)?;
        let mut rows = Vec::new();
        while let Some(row) = file.next()? {
            rows.push(row);
        }
        assert_eq!(file.n_left(), 0);
        Ok(rows)
    }

    #[test]
    fn every_kind_of_text_column_gives_the_same_texts() {
        let mut dictionary = StringDictionaryBuilder::<Int16Type>::new();
        let mut view = StringViewBuilder::new();
        for text in TEXTS {
            dictionary.append_option(text);
            view.append_option(text);
        }
        let file = file(
            vec![
                ("plain", Arc::new(StringArray::from(TEXTS.to_vec()))),
                ("large", Arc::new(LargeStringArray::from(TEXTS.to_vec()))),
                ("view", Arc::new(view.finish())),
                ("dictionary", Arc::new(dictionary.finish())),
            ],
            2,
        );
        for column in ["plain", "large", "view", "dictionary"] {
            let rows = read(file.path(), &columns(column, None), Part::default()).unwrap();
            let texts: Vec<Option<&str>> = rows.iter().map(|row| row.text.as_deref()).collect();
            assert_eq!(texts, TEXTS, "{column}");
            assert_eq!(rows.iter().map(|row| row.number).collect::<Vec<_>>(), [1, 2, 3]);
            assert_eq!(rows[2].record.batch.column(0).as_string::<i32>().value(rows[2].record.row), "c");
        }
    }

    #[test]
    fn labels_of_any_simple_type_are_words() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
        let labels: Vec<(ArrayRef, [Option<&str>; 2])> = vec![
            (Arc::new(Int64Array::from(vec![Some(-3), None])), [Some("-3"), None]),
            (Arc::new(BooleanArray::from(vec![true, false])), [Some("true"), Some("false")]),
            (Arc::new(Float64Array::from(vec![2.0, 2.5])), [Some("2"), Some("2.5")]),
            (Arc::new(Float64Array::from(vec![f64::NAN, 1e-3])), [None, Some("0.001")]),
            (Arc::new(StringArray::from(vec!["x", "y"])), [Some("x"), Some("y")]),
        ];
        for (array, expected) in labels {
            let file = file(vec![("text", texts.clone()), ("label", array)], 10);
            let rows = read(file.path(), &columns("text", Some("label")), Part::default()).unwrap();
            let found: Vec<Option<&str>> = rows.iter().map(|row| row.label.as_ref().unwrap().as_deref()).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_column_that_is_missing_or_no_text_is_refused_by_name_and_type() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
        let file = file(vec![("text", texts), ("id", Arc::new(Int64Array::from(vec![1])))], 10);
        let refusal = |column| read(file.path(), &columns(column, None), Part::default()).unwrap_err().to_string();
        assert!(refusal("body").contains("no column `body`; the file has `text`, `id`"));
        assert!(refusal("id").contains("expected text (a string column) in `id`, found the type Int64"));
    }

    #[test]
    fn a_column_that_unpacks_to_a_thousand_times_its_size_and_a_gigabyte_is_not_read() {
        assert!(is_bomb(-1, 10) && is_bomb(10, -1));
        assert!(is_bomb(1 << 20, (1 << 30) + 1) && is_bomb(1000, i64::MAX));
        assert!(!is_bomb(1 << 10, 1 << 30) && !is_bomb(1 << 24, 1 << 33), "large or well packed alone is neither");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_row_is_of_exactly_one_part_whatever_the_row_groups(
            n in 1usize..1500, rows_in_group in 1usize..700, count in 1u32..9, skip in 0u64..700,
        ) {
            let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("text {i}"))));
            let file = file(vec![("text", texts)], rows_in_group);
            let mut numbers = Vec::new();
            for index in 0..count {
                let part = Part { shard: Shard::new(index, count).unwrap(), skip: 0 };
                let rows = read(file.path(), &columns("text", None), part).unwrap();
                for row in &rows {
                    prop_assert_eq!(row.text.clone().unwrap(), format!("text {}", row.number - 1));
                }
                let after = read(file.path(), &columns("text", None), Part { skip, ..part }).unwrap();
                let skipped = rows.len().min(skip as usize);
                prop_assert!(after.iter().map(|r| r.number).eq(rows[skipped..].iter().map(|r| r.number)));
                numbers.extend(rows.iter().map(|row| row.number));
            }
            prop_assert!(numbers.into_iter().eq(1..=n as u64));
        }

        /// Bytes that are changed, or cut off, give rows or an error, and never a panic or more memory than there is.
        #[test]
        fn a_damaged_file_is_an_error_and_no_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            keep in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let n = 300;
            let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("text {}", i % 7))));
            let labels: ArrayRef = Arc::new(Int64Array::from_iter_values(0..n));
            let file = file(vec![("text", texts), ("label", labels)], 100);
            let mut bytes = std::fs::read(file.path()).unwrap();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(keep) = keep {
                bytes.truncate(keep.index(bytes.len()));
            }
            std::fs::write(file.path(), bytes).unwrap();
            if let Err(error) = read(file.path(), &columns("text", Some("label")), Part::default()) {
                let message = error.to_string();
                prop_assert!(message.contains(file.path().to_str().unwrap()), "{}", message);
            }
        }
    }
}
