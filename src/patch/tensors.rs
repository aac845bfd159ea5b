//! Names and shapes of the tensors in a patch file, and what each of them is.
//!
//! The head is stored whole, under names that begin with `classifier.`; every other tensor is a difference to the
//! base's tensor of that name: whole, or as `NAME.indices` and `NAME.values`. A head's own pooler therefore is
//! `classifier.pooler.dense.*`: a reader who does not know of it meets an unknown name, and cannot add it to anything.

use std::collections::BTreeMap;

use super::header::{Entry, Type, shown, sort};
use crate::base::config::Config;
use crate::base::delta::{Change, Delta};
use crate::base::parameters::parameters;

const WEIGHT: &str = "classifier.weight";
const BIAS: &str = "classifier.bias";
const POOLER_WEIGHT: &str = "classifier.pooler.dense.weight";
const POOLER_BIAS: &str = "classifier.pooler.dense.bias";
const INDICES: &str = ".indices";
const VALUES: &str = ".values";

/// What a tensor of the file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// `classifier.weight`, (C, H).
    Weight,
    /// `classifier.bias`, (C).
    Bias,
    /// `classifier.pooler.dense.weight`, (H, H).
    PoolerWeight,
    /// `classifier.pooler.dense.bias`, (H).
    PoolerBias,
    /// A difference to the whole of the base's tensor.
    Dense,
    /// The flat positions of a difference to this tensor of the base.
    Indices(String),
    /// The values at those positions.
    Values(String),
}

/// A tensor's values in a delta.
pub(super) enum Data<'a> {
    Positions(&'a [u64]),
    Floats(&'a [f32]),
}

/// The tensor table of a delta, in the order of the data; `shapes` has those of its dense changes.
pub(super) fn table(delta: &Delta, shapes: &BTreeMap<String, Vec<u64>>, floats: Type) -> Vec<Entry> {
    let mut table = Vec::new();
    let mut add = |name: String, dtype, shape| table.push(Entry { name, dtype, shape });
    for (name, change) in &delta.changes {
        match change {
            Change::Dense(values) => {
                let shape = shapes.get(name).cloned().unwrap_or_else(|| vec![values.len() as u64]);
                add(name.clone(), floats, shape);
            }
            Change::Sparse { indices, .. } => {
                let n = indices.len() as u64;
                add(format!("{name}{INDICES}"), Type::I64, vec![n]);
                add(format!("{name}{VALUES}"), floats, vec![n]);
            }
        }
    }
    let outputs = delta.head.n_outputs as u64;
    let hidden = delta.head.weight.len() as u64 / outputs.max(1);
    add(WEIGHT.into(), floats, vec![outputs, hidden]);
    add(BIAS.into(), floats, vec![outputs]);
    if delta.head.pooler.is_some() {
        add(POOLER_WEIGHT.into(), floats, vec![hidden, hidden]);
        add(POOLER_BIAS.into(), floats, vec![hidden]);
    }
    sort(&mut table);
    table
}

/// The values of the tensor of this name in the file; `None` where the delta has none.
pub(super) fn data<'a>(delta: &'a Delta, name: &str) -> Option<Data<'a>> {
    let head = &delta.head;
    let floats = match name {
        WEIGHT => &head.weight,
        BIAS => &head.bias,
        POOLER_WEIGHT => &head.pooler.as_ref()?.0,
        POOLER_BIAS => &head.pooler.as_ref()?.1,
        _ => match delta.changes.get(name) {
            Some(Change::Dense(values)) => values,
            Some(Change::Sparse { .. }) => return None,
            None => {
                let (of, positions) = match name.strip_suffix(INDICES) {
                    Some(of) => (of, true),
                    None => (name.strip_suffix(VALUES)?, false),
                };
                match delta.changes.get(of)? {
                    Change::Sparse { indices, .. } if positions => return Some(Data::Positions(indices)),
                    Change::Sparse { values, .. } => values,
                    Change::Dense(_) => return None,
                }
            }
        },
    };
    Some(Data::Floats(floats))
}

/// What each tensor of a table is, where the table is that of a patch: names of a BERT, one type of floats, a head of
/// `n_outputs` rows, shapes that agree, no half of a pair missing. The error says what is not. What only the base
/// can tell (its layers and sizes) is checked against the base.
pub(super) fn classify(table: &[Entry], n_outputs: u64) -> Result<Vec<Kind>, String> {
    let by_name: BTreeMap<&str, &Entry> = table.iter().map(|e| (e.name.as_str(), e)).collect();
    let hidden = match by_name.get(WEIGHT).map(|e| e.shape.as_slice()) {
        Some(&[_, hidden]) => hidden,
        Some(shape) => return Err(format!("tensor {WEIGHT}: expected two dimensions, found {shape:?}")),
        None => return Err(format!("tensor {WEIGHT} is missing: a patch holds its task's head")),
    };
    for (name, with) in [(BIAS, WEIGHT), (POOLER_WEIGHT, POOLER_BIAS), (POOLER_BIAS, POOLER_WEIGHT)] {
        if by_name.contains_key(with) && !by_name.contains_key(name) {
            return Err(format!("tensor {name} is missing beside {with}"));
        }
    }
    let known = known_ranks();
    let floats = by_name[WEIGHT].dtype;
    let mut kinds = Vec::with_capacity(table.len());
    for entry in table {
        let name = entry.name.as_str();
        let (kind, shape) = match name {
            WEIGHT => (Kind::Weight, vec![n_outputs, hidden]),
            BIAS => (Kind::Bias, vec![n_outputs]),
            POOLER_WEIGHT => (Kind::PoolerWeight, vec![hidden, hidden]),
            POOLER_BIAS => (Kind::PoolerBias, vec![hidden]),
            _ => change(entry, &by_name, &known)?,
        };
        if entry.shape != shape {
            return Err(format!("tensor {name}: expected shape {shape:?}, found {:?}", entry.shape));
        }
        let expected = if matches!(kind, Kind::Indices(_)) { Type::I64 } else { floats };
        if entry.dtype != expected || floats == Type::I64 {
            let ruled = "positions are I64, and all others one of F32 and F16";
            return Err(format!("tensor {name}: found {:?}, but {ruled}", entry.dtype));
        }
        kinds.push(kind);
    }
    Ok(kinds)
}

/// What a tensor that is not of the head is, and the shape it must have.
fn change(
    entry: &Entry,
    by_name: &BTreeMap<&str, &Entry>,
    known: &BTreeMap<String, usize>,
) -> Result<(Kind, Vec<u64>), String> {
    let name = entry.name.as_str();
    let rank = |name: &str| known.get(&first_layer(name)?).copied();
    if let Some(rank) = rank(name) {
        return if entry.shape.len() == rank {
            Ok((Kind::Dense, entry.shape.clone()))
        } else {
            Err(format!("tensor {name}: expected {rank} dimensions, found {:?}", entry.shape))
        };
    }
    let pair = [(INDICES, VALUES), (VALUES, INDICES)].into_iter().find_map(|(own, other)| {
        let of = name.strip_suffix(own)?;
        rank(of).map(|_| (of.to_string(), own, format!("{of}{other}")))
    });
    let Some((of, own, other)) = pair else {
        return Err(format!("tensor {}: no name of a BERT's tensor, nor of a head's", shown(name)));
    };
    if by_name.contains_key(of.as_str()) {
        return Err(format!("tensor {name}: {of} is there as a whole too"));
    }
    let other = by_name.get(other.as_str()).ok_or_else(|| format!("tensor {other} is missing beside {name}"))?;
    if entry.shape.len() != 1 {
        return Err(format!("tensor {name}: expected one dimension, found {:?}", entry.shape));
    }
    // Named by the one that has it wrong: values are held to their positions.
    let shape = if own == VALUES { other.shape.clone() } else { entry.shape.clone() };
    Ok((if own == INDICES { Kind::Indices(of) } else { Kind::Values(of) }, shape))
}

/// The name as it would be in layer 0; `None` where the layer's number is not a plain one.
fn first_layer(name: &str) -> Option<String> {
    const PREFIX: &str = "encoder.layer.";
    let Some(rest) = name.strip_prefix(PREFIX) else { return Some(name.to_string()) };
    let (number, rest) = rest.split_once('.')?;
    let plain = number.parse::<u16>().is_ok_and(|n| n.to_string() == number);
    plain.then(|| format!("{PREFIX}0.{rest}"))
}

/// How many dimensions each tensor of a BERT's ends and first layer has. The sizes play no part.
fn known_ranks() -> BTreeMap<String, usize> {
    let one_layer = Config { num_hidden_layers: 1, ..Config::tiny() };
    parameters(&one_layer, true).into_iter().map(|p| (p.name, p.shape.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, dtype: Type, shape: &[u64]) -> Entry {
        Entry { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn head() -> Vec<Entry> {
        vec![entry(WEIGHT, Type::F32, &[2, 4]), entry(BIAS, Type::F32, &[2])]
    }

    fn with(more: &[(&str, Type, &[u64])]) -> Result<Vec<Kind>, String> {
        let mut table = head();
        table.extend(more.iter().map(|(name, dtype, shape)| entry(name, *dtype, shape)));
        classify(&table, 2)
    }

    const BIAS_3: &str = "encoder.layer.3.output.dense.bias";

    #[test]
    fn the_tensors_of_every_method_have_their_kinds() {
        assert_eq!(with(&[]).unwrap(), [Kind::Weight, Kind::Bias]);
        assert_eq!(with(&[(BIAS_3, Type::F32, &[4])]).unwrap()[2], Kind::Dense);
        let name = "embeddings.word_embeddings.weight";
        let (indices, values) = (format!("{name}.indices"), format!("{name}.values"));
        let kinds = with(&[(&indices, Type::I64, &[3]), (&values, Type::F32, &[3])]).unwrap();
        assert_eq!(kinds[2..], [Kind::Indices(name.into()), Kind::Values(name.into())]);
        let kinds = with(&[(POOLER_WEIGHT, Type::F32, &[4, 4]), (POOLER_BIAS, Type::F32, &[4])]).unwrap();
        assert_eq!(kinds[2..], [Kind::PoolerWeight, Kind::PoolerBias]);
    }

    #[test]
    fn a_name_that_no_bert_has_is_refused() {
        for name in [
            "",
            "bert.pooler.dense.bias",
            "classifier.dense.bias",
            "encoder.layer..output.dense.bias",
            "encoder.layer.03.output.dense.bias",
            "encoder.layer.+3.output.dense.bias",
            "encoder.layer.99999999999.output.dense.bias",
            "encoder.layer.3.output.dense.bias\u{1b}",
            "encoder.layer.3.crossattention.self.query.bias",
            "embeddings.position_ids",
            "pooler.dense.bias.indices.indices",
            "classifier.weight.indices",
        ] {
            assert!(with(&[(name, Type::F32, &[4])]).unwrap_err().contains("no name of"), "{name:?}");
        }
    }

    #[test]
    fn a_table_that_does_not_agree_with_itself_is_refused() {
        let name = |suffix: &str| format!("{BIAS_3}{suffix}");
        let (i, v) = (name(INDICES), name(VALUES));
        for (more, expected) in [
            (vec![(i.as_str(), Type::I64, &[3u64][..])], "values is missing"),
            (vec![(v.as_str(), Type::F32, &[3])], "indices is missing"),
            (vec![(&i, Type::I64, &[3]), (&v, Type::F32, &[2])], "expected shape [3]"),
            (vec![(&i, Type::I64, &[3, 1]), (&v, Type::F32, &[3, 1])], "one dimension"),
            (vec![(&i, Type::F32, &[3]), (&v, Type::F32, &[3])], "positions are I64"),
            (vec![(&i, Type::I64, &[3]), (&v, Type::I64, &[3])], "positions are I64"),
            (vec![(&i, Type::I64, &[3]), (&v, Type::F32, &[3]), (BIAS_3, Type::F32, &[4])], "as a whole too"),
            (vec![(BIAS_3, Type::F32, &[2, 2])], "expected 1 dimensions"),
            (vec![(BIAS_3, Type::F16, &[4])], "one of F32 and F16"),
            (vec![(BIAS_3, Type::I64, &[4])], "one of F32 and F16"),
            (vec![(POOLER_BIAS, Type::F32, &[4])], "classifier.pooler.dense.weight is missing"),
            (vec![(POOLER_WEIGHT, Type::F32, &[4, 4])], "classifier.pooler.dense.bias is missing"),
            (vec![(POOLER_WEIGHT, Type::F32, &[4, 3]), (POOLER_BIAS, Type::F32, &[4])], "expected shape [4, 4]"),
        ] {
            let found = with(&more).unwrap_err();
            assert!(found.contains(expected), "{expected}: {found}");
        }
        assert!(classify(&head()[1..], 2).unwrap_err().contains("classifier.weight is missing"));
        assert!(classify(&head()[..1], 2).unwrap_err().contains("classifier.bias is missing"));
        assert!(classify(&head(), 3).unwrap_err().contains("expected shape [3, 4], found [2, 4]"));
        assert!(classify(&[entry(WEIGHT, Type::F32, &[8])], 2).unwrap_err().contains("two dimensions"));
        let whole = [entry(WEIGHT, Type::I64, &[2, 4]), entry(BIAS, Type::I64, &[2])];
        assert!(classify(&whole, 2).unwrap_err().contains("one of F32 and F16"));
    }
}
