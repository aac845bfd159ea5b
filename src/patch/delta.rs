//! The values of a task: what a new one starts from, whether they fit a base's table, and how they are applied.
//!
//! A difference is stored and trained as it is, and added to the base's tensor where that is used, so what is saved
//! and loaded again is bit for bit what was trained.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::base::delta::{Change, Delta, Head, Request};
use crate::base::parameters::Parameter;
use crate::error::{Error, Result};

/// The delta that training starts from: zero for everything requested (see [`Selection::resolve`]), and this head.
///
/// Requests for tensors that are not in `table` are left out; [`check`] finds what else does not fit.
///
/// [`Selection::resolve`]: super::Selection::resolve
pub fn zeros(requests: &BTreeMap<String, Request>, table: &[Parameter], head: Head) -> Delta {
    let zero = |parameter: &Parameter| match requests.get(&parameter.name)? {
        Request::Dense => Some(Change::Dense(vec![0.0; parameter.len()])),
        Request::Entries(indices) => {
            Some(Change::Sparse { indices: indices.clone(), values: vec![0.0; indices.len()] })
        }
    };
    Delta { changes: table.iter().filter_map(|p| Some((p.name.clone(), zero(p)?))).collect(), head }
}

/// Whether a delta fits a base: every tensor in the base's table and of its size, positions strictly increasing and
/// inside the tensor, all values finite, the classifier `n_outputs` by the table's hidden size, and a pooler in the
/// head just where the base has none.
///
/// `origin` is the patch, as messages should name it.
///
/// # Errors
///
/// The first tensor that does not fit, with what it should be.
pub fn check(delta: &Delta, table: &[Parameter], n_outputs: usize, origin: &Path) -> Result<()> {
    let by_name: BTreeMap<&str, &Parameter> = table.iter().map(|p| (p.name.as_str(), p)).collect();
    for (name, change) in &delta.changes {
        let parameter = by_name.get(name.as_str()).ok_or_else(|| {
            wrong(origin, name, format!("a tensor of the base, which has {}", layers(table)), "a name it does not have")
        })?;
        check_change(change, parameter, origin)?;
    }
    let hidden = by_name.get("embeddings.LayerNorm.bias").map_or(0, |p| p.len());
    check_head(&delta.head, n_outputs, hidden, !by_name.contains_key("pooler.dense.bias"), origin)
}

fn check_change(change: &Change, parameter: &Parameter, origin: &Path) -> Result<()> {
    let (name, len) = (&parameter.name, parameter.len());
    match change {
        Change::Dense(values) => {
            let shape = format!("{:?}, {len} values", parameter.shape);
            if values.len() != len {
                return Err(wrong(origin, name, shape, format!("{} values", values.len())));
            }
            check_finite(values, name, origin)
        }
        Change::Sparse { indices, values } => {
            if indices.is_empty() || indices.len() != values.len() {
                let found = format!("{} positions for {} values", indices.len(), values.len());
                return Err(wrong(origin, name, "as many positions as values, and at least one", found));
            }
            check_increasing(indices, name, origin)?;
            match indices.last() {
                Some(&last) if last >= len as u64 => {
                    Err(wrong(origin, name, format!("positions below {len}"), format!("position {last}")))
                }
                _ => check_finite(values, name, origin),
            }
        }
    }
}

fn check_head(head: &Head, n_outputs: usize, hidden: usize, own_pooler: bool, origin: &Path) -> Result<()> {
    let mut parts = vec![
        ("classifier.weight", n_outputs.saturating_mul(hidden), &head.weight),
        ("classifier.bias", n_outputs, &head.bias),
    ];
    if head.n_outputs != n_outputs {
        let found = format!("{} rows", head.n_outputs);
        return Err(wrong(origin, "classifier.weight", format!("{n_outputs} rows, as the task has outputs"), found));
    }
    match (&head.pooler, own_pooler) {
        (Some((weight, bias)), true) => parts.extend([
            ("classifier.pooler.dense.weight", hidden.saturating_mul(hidden), weight),
            ("classifier.pooler.dense.bias", hidden, bias),
        ]),
        (None, false) => {}
        (Some(_), false) => {
            let expected = "none: this base has a pooler, which its tasks share";
            return Err(wrong(origin, "classifier.pooler.dense.weight", expected, "a pooler of the patch's own"));
        }
        (None, true) => {
            let expected = "a pooler in the head: this base has none to share";
            return Err(wrong(origin, "classifier.pooler.dense.weight", expected, "none"));
        }
    }
    for (name, len, values) in parts {
        if values.len() != len {
            return Err(wrong(origin, name, format!("{len} values"), format!("{} values", values.len())));
        }
        check_finite(values, name, origin)?;
    }
    Ok(())
}

/// Refuses NaN and infinities, naming the first.
pub(super) fn check_finite(values: &[f32], name: &str, origin: &Path) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(wrong(origin, name, "finite numbers", format!("{} at position {i}", values[i]))),
    }
}

/// Refuses positions that are not strictly increasing, naming the first.
pub(super) fn check_increasing(indices: &[u64], name: &str, origin: &Path) -> Result<()> {
    match indices.windows(2).find(|pair| pair[0] >= pair[1]) {
        None => Ok(()),
        Some(pair) => {
            let found = format!("{} after {}", pair[1], pair[0]);
            Err(wrong(origin, name, "strictly increasing positions", found))
        }
    }
}

pub(super) fn wrong(origin: &Path, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
    Error::Tensor { path: origin.to_path_buf(), tensor: tensor.into(), expected: expected.into(), found: found.into() }
}

fn layers(table: &[Parameter]) -> String {
    let layers: BTreeSet<usize> = table.iter().filter_map(|p| p.layer).collect();
    format!("{} layers", layers.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::parameters::{Role, Term};

    fn table() -> Vec<Parameter> {
        [
            ("embeddings.LayerNorm.bias", vec![2], Role::Bias(Term::EmbeddingsLayernorm)),
            ("encoder.layer.0.output.dense.weight", vec![2, 4], Role::Matrix(Term::Output)),
            ("encoder.layer.0.output.dense.bias", vec![2], Role::Bias(Term::Output)),
            ("pooler.dense.bias", vec![2], Role::Bias(Term::Pooler)),
        ]
        .map(|(name, shape, role)| Parameter { name: name.into(), shape, layer: None, role })
        .into()
    }

    fn head() -> Head {
        Head { n_outputs: 1, weight: vec![0.5; 2], bias: vec![0.0], pooler: None }
    }

    fn delta(name: &str, change: Change) -> Delta {
        Delta { changes: [(name.to_string(), change)].into(), head: head() }
    }

    fn refusal(delta: &Delta) -> String {
        check(delta, &table(), 1, Path::new("p")).unwrap_err().to_string()
    }

    const MATRIX: &str = "encoder.layer.0.output.dense.weight";

    fn sparse(indices: &[u64], values: &[f32]) -> Delta {
        delta(MATRIX, Change::Sparse { indices: indices.to_vec(), values: values.to_vec() })
    }

    #[test]
    fn a_new_delta_is_zero_where_it_trains_and_fits_its_base() {
        let requests =
            [("pooler.dense.bias".to_string(), Request::Dense), (MATRIX.to_string(), Request::Entries(vec![1, 7]))];
        let delta = zeros(&requests.into(), &table(), head());
        assert_eq!(delta.changes["pooler.dense.bias"], Change::Dense(vec![0.0; 2]));
        assert_eq!(delta.changes[MATRIX], Change::Sparse { indices: vec![1, 7], values: vec![0.0; 2] });
        check(&delta, &table(), 1, Path::new("p")).unwrap();
    }

    #[test]
    fn a_change_is_added_to_the_base() {
        let mut tensor = vec![1.0; 8];
        Change::Sparse { indices: vec![0, 7], values: vec![0.5, -2.0] }.add_to(MATRIX, &mut tensor).unwrap();
        assert_eq!(tensor, [1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0]);
        Change::Dense(vec![1.0; 8]).add_to(MATRIX, &mut tensor).unwrap();
        assert_eq!(tensor, [2.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0]);
    }

    #[test]
    fn a_change_that_does_not_fit_its_tensor_is_refused_by_name() {
        assert!(refusal(&delta("encoder.layer.1.output.dense.bias", Change::Dense(vec![0.0; 2]))).contains("layer.1"));
        assert!(refusal(&delta("pooler.dense.bias", Change::Dense(vec![0.0; 3]))).contains("3 values"));
        assert!(refusal(&delta("pooler.dense.bias", Change::Dense(vec![0.0, f32::NAN]))).contains("NaN at position 1"));
        assert!(refusal(&sparse(&[1, 1], &[0.0; 2])).contains("1 after 1"));
        assert!(refusal(&sparse(&[3, 2], &[0.0; 2])).contains("2 after 3"));
        assert!(refusal(&sparse(&[1, 8], &[0.0; 2])).contains("position 8"));
        assert!(refusal(&sparse(&[1], &[0.0; 2])).contains("1 positions for 2 values"));
        assert!(refusal(&sparse(&[], &[])).contains("at least one"));
        assert!(refusal(&sparse(&[1], &[f32::INFINITY])).contains("inf"));
    }

    #[test]
    fn a_head_that_does_not_fit_is_refused() {
        let change = || Change::Dense(vec![0.0; 2]);
        let with_head = |head| Delta { head, ..delta("pooler.dense.bias", change()) };
        assert!(refusal(&with_head(Head { n_outputs: 2, ..head() })).contains("1 rows"));
        assert!(refusal(&with_head(Head { weight: vec![0.0; 3], ..head() })).contains("3 values"));
        assert!(refusal(&with_head(Head { bias: vec![], ..head() })).contains("classifier.bias"));
        assert!(refusal(&with_head(Head { bias: vec![f32::NEG_INFINITY], ..head() })).contains("-inf"));
        let own = Head { pooler: Some((vec![0.0; 4], vec![0.0; 2])), ..head() };
        assert!(refusal(&with_head(own.clone())).contains("which its tasks share"));
        let mut without = table();
        without.pop();
        let bare = |head| Delta { changes: BTreeMap::new(), head };
        assert!(check(&bare(own), &without, 1, Path::new("p")).is_ok());
        assert!(check(&bare(head()), &without, 1, Path::new("p")).unwrap_err().to_string().contains("none to share"));
    }
}
