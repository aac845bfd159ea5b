//! The header of a safetensors file, in the one form this crate writes: canonical JSON, names in sorted order.
//!
//! The data follow the order of the table: positions (I64) first, then floats, by name within each, so that every
//! tensor is aligned and the offsets follow from types and shapes alone. What is read is written again and compared,
//! so no two headers mean the same.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

/// A header above this size is refused before it is read: the largest patch of the largest BERT needs a tenth of it,
/// and the rest is for labels.
pub(super) const MAX_HEADER_BYTES: u64 = 4 << 20;

/// The length in front of the header.
pub(super) const LENGTH_BYTES: u64 = 8;

const METADATA: &str = "__metadata__";

/// What an entry of a tensor is on disk. The order is that of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(super) enum Type {
    I64,
    F32,
    F16,
}

impl Type {
    pub(super) fn size(self) -> u64 {
        match self {
            Type::I64 => 8,
            Type::F32 => 4,
            Type::F16 => 2,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Type::I64 => "I64",
            Type::F32 => "F32",
            Type::F16 => "F16",
        }
    }
}

/// A line of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Type,
    pub(super) shape: Vec<u64>,
}

impl Entry {
    /// Number of entries; `None` where a hostile shape overflows.
    pub(super) fn len(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))
    }

    fn n_bytes(&self) -> Option<u64> {
        self.len()?.checked_mul(self.dtype.size())
    }
}

/// Brings a table into the order of the data.
pub(super) fn sort(table: &mut [Entry]) {
    table.sort_by(|a, b| (a.dtype, &a.name).cmp(&(b.dtype, &b.name)));
}

/// The header's JSON without length and padding; `table` is in the order of the data and its sizes do not overflow.
pub(super) fn json(metadata: &BTreeMap<&str, String>, table: &[Entry]) -> String {
    let mut end = 0;
    let mut lines = BTreeMap::new();
    for entry in table {
        let begin = end;
        end += entry.n_bytes().unwrap_or(0);
        lines.insert(&entry.name, (begin, end, entry));
    }
    let mut out = format!("{{{}:{{", quoted(METADATA));
    for (i, (key, value)) in metadata.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        write!(out, "{comma}{}:{}", quoted(key), quoted(value)).ok(); // a String takes everything
    }
    out.push('}');
    for (name, (begin, end, entry)) in lines {
        let shape: Vec<_> = entry.shape.iter().map(u64::to_string).collect();
        let (name, dtype, shape) = (quoted(name), entry.dtype.name(), shape.join(","));
        let line = format!(r#",{name}:{{"data_offsets":[{begin},{end}],"dtype":"{dtype}","shape":[{shape}]}}"#);
        out.push_str(&line);
    }
    out.push('}');
    out
}

/// The beginning of the file: the header's length, the header, and spaces up to a multiple of 8 bytes.
pub(super) fn framed(json: &str) -> Vec<u8> {
    let length = json.len().next_multiple_of(8);
    let mut bytes = Vec::with_capacity(8 + length);
    bytes.extend((length as u64).to_le_bytes());
    bytes.extend(json.as_bytes());
    bytes.resize(8 + length, b' ');
    bytes
}

/// A header as it was read: metadata, the table in the order of the data, and the bytes that the data take.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) table: Vec<Entry>,
    pub(super) data_bytes: u64,
}

/// Reads a header. The error says what is wrong with it.
///
/// Any JSON that is not the header's own shape is refused by its first token that does not fit, so nesting has no
/// depth to it.
pub(super) fn parse(bytes: &[u8]) -> Result<Header, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("its header is not UTF-8: {e}"))?;
    let raw: RawHeader = serde_json::from_str(text).map_err(|e| format!("its header is not one of a patch: {e}"))?;
    let metadata = raw.metadata.ok_or("its header has no `__metadata__`, so it is a safetensors file but no patch")?;
    let mut table: Vec<Entry> = Vec::with_capacity(raw.tensors.len());
    let mut offsets = BTreeMap::new();
    for (name, RawTensor { dtype, shape: Shape(shape), data_offsets }) in raw.tensors {
        offsets.insert(name.clone(), data_offsets);
        table.push(Entry { name, dtype, shape });
    }
    sort(&mut table);
    let mut end = 0u64;
    for entry in &table {
        let begin = end;
        let n_bytes = entry.n_bytes().filter(|&n| n > 0);
        end = n_bytes.and_then(|n| begin.checked_add(n)).ok_or_else(|| {
            format!("tensor {}: a shape of {:?} is empty or too large", shown(&entry.name), entry.shape)
        })?;
        let found = offsets[&entry.name];
        if found != (begin, end) {
            return Err(format!(
                "tensor {}: expected data_offsets [{begin},{end}], found [{},{}]",
                shown(&entry.name),
                found.0,
                found.1
            ));
        }
    }
    Ok(Header { metadata, table, data_bytes: end })
}

/// A string from a file, fit for a message: escaped, and not longer than a line.
pub(super) fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(80).collect();
    if short.len() < text.len() {
        short.push_str("..");
    }
    format!("{short:?}")
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A header as the JSON says it. Maps that name a key twice, fields it does not have, and shapes of more than two
/// dimensions end the reading at once.
struct RawHeader {
    metadata: Option<BTreeMap<String, String>>,
    tensors: BTreeMap<String, RawTensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: Type,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<u64>);

struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { metadata: None, tensors: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    let again = if name == METADATA {
                        header.metadata.replace(map.next_value::<Strings>()?.0).is_some()
                    } else {
                        header.tensors.insert(name.clone(), map.next_value()?).is_some()
                    };
                    if again {
                        return Err(twice(&name));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Header)
    }
}

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Metadata;
        impl<'de> Visitor<'de> for Metadata {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if strings.insert(key.clone(), value).is_some() {
                        return Err(twice(&key));
                    }
                }
                Ok(Strings(strings))
            }
        }
        deserializer.deserialize_map(Metadata)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a shape of one or two dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::with_capacity(2);
                while let Some(dimension) = seq.next_element()? {
                    if shape.len() == 2 {
                        return Err(de::Error::invalid_length(3, &self));
                    }
                    shape.push(dimension);
                }
                if shape.is_empty() { Err(de::Error::invalid_length(0, &self)) } else { Ok(Shape(shape)) }
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

fn twice<E: de::Error>(key: &str) -> E {
    E::custom(format_args!("{} stands there twice", shown(key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<Entry> {
        let entry = |name: &str, dtype, shape: &[u64]| Entry { name: name.into(), dtype, shape: shape.to_vec() };
        let mut table = vec![entry("b", Type::F32, &[3]), entry("c", Type::I64, &[2]), entry("a", Type::F32, &[2, 2])];
        sort(&mut table);
        table
    }

    fn metadata() -> BTreeMap<&'static str, String> {
        [("task", "a \"quoted\" é".to_string()), ("aa", String::new())].into()
    }

    #[test]
    fn a_header_has_one_form() {
        let json = json(&metadata(), &table());
        assert_eq!(
            json,
            concat!(
                r#"{"__metadata__":{"aa":"","task":"a \"quoted\" é"},"#,
                r#""a":{"data_offsets":[16,32],"dtype":"F32","shape":[2,2]},"#,
                r#""b":{"data_offsets":[32,44],"dtype":"F32","shape":[3]},"#,
                r#""c":{"data_offsets":[0,16],"dtype":"I64","shape":[2]}}"#
            )
        );
        let framed = framed(&json);
        assert_eq!(framed.len() % 8, 0);
        let header = parse(&framed[8..]).unwrap();
        assert_eq!((header.table, header.data_bytes), (table(), 44));
        assert_eq!(header.metadata.len(), 2);
    }

    fn refusal(json: &str) -> String {
        parse(json.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_header_of_another_shape_is_refused() {
        let with = |tensors: &str| refusal(&format!(r#"{{"__metadata__":{{}},{tensors}}}"#));
        let tensor = |rest: &str| with(&format!(r#""a":{{{rest}}}"#));
        assert!(refusal("{}").contains("no `__metadata__`"));
        assert!(refusal("[]").contains("map of tensors"));
        assert!(refusal(r#"{"__metadata__":{"a":1}}"#).contains("expected a string"));
        assert!(refusal(r#"{"__metadata__":{"a":"","a":""}}"#).contains("\"a\" stands there twice"));
        assert!(refusal(r#"{"__metadata__":{},"__metadata__":{}}"#).contains("twice"));
        assert!(refusal(&"[".repeat(100_000)).contains("map of tensors"));
        assert!(refusal(&r#"{"a":"#.repeat(100_000)).contains("unknown field"));
        let a = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        assert!(with(&format!("{a},{a}")).contains("twice"));
        assert!(tensor(r#""dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]"#).contains("duplicate field"));
        assert!(tensor(r#""dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1"#).contains("unknown field"));
        assert!(tensor(r#""dtype":"BF16","shape":[1],"data_offsets":[0,2]"#).contains("BF16"));
        assert!(tensor(r#""dtype":"F32","shape":[1]"#).contains("data_offsets"));
        assert!(tensor(r#""dtype":"F32","shape":[],"data_offsets":[0,4]"#).contains("one or two dimensions"));
        assert!(tensor(r#""dtype":"F32","shape":[1,1,1],"data_offsets":[0,4]"#).contains("one or two dimensions"));
        assert!(tensor(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#).contains("-1"));
        assert!(tensor(r#""dtype":"F32","shape":[1.0],"data_offsets":[0,4]"#).contains("1.0"));
    }

    #[test]
    fn offsets_that_do_not_follow_from_the_shapes_are_refused() {
        let one = |shape: &str, offsets: &str| {
            refusal(&format!(
                r#"{{"__metadata__":{{}},"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#
            ))
        };
        assert!(one("[1]", "[4,8]").contains("expected data_offsets [0,4], found [4,8]"));
        assert!(one("[2]", "[0,4]").contains("expected data_offsets [0,8]"));
        assert!(one("[1]", "[4,0]").contains("found [4,0]"));
        assert!(one("[0]", "[0,0]").contains("empty or too large"));
        assert!(one("[1000000000000000000,1000000000000000000]", "[0,4]").contains("empty or too large"));
        assert!(one("[18446744073709551615]", "[0,4]").contains("empty or too large"));
        let overlapping = concat!(
            r#"{"__metadata__":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
            r#""b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#
        );
        assert!(refusal(overlapping).contains("\"b\": expected data_offsets [8,12], found [4,8]"));
    }
}
