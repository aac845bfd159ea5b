//! The audit of every run: what was selected receives a gradient, and what is frozen does not change.
//!
//! Gradients that are cut somewhere make no noise: the loss still falls, only less. So the gradients of the first step
//! are looked at, tensor by tensor, before anything is built on them.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::Base;
use crate::base::delta::Request;
use crate::base::parameters::{Parameter, Role, Table, Term};
use crate::data::Sequence;
use crate::encoder::Run;
use crate::error::{Error, Result};

/// Below this loss, gradients may round to zero and tell nothing.
const SATURATED: f64 = 1e-6;

/// Which rows of the embeddings' tables a step read: only these get gradients.
#[derive(Debug, Default)]
pub struct RowsRead {
    ids: BTreeSet<u64>,
    type_ids: BTreeSet<u64>,
    n_positions: u64,
}

impl RowsRead {
    /// The rows that these sequences read.
    pub fn of<'s>(sequences: impl IntoIterator<Item = &'s Sequence>) -> Self {
        let mut read = RowsRead::default();
        for s in sequences {
            read.ids.extend(s.ids.iter().map(|id| u64::from(*id)));
            read.type_ids.extend(s.type_ids.iter().map(|id| u64::from(*id)));
            read.n_positions = read.n_positions.max(s.ids.len() as u64);
        }
        read
    }

    fn holds(&self, table: Table, row: u64) -> bool {
        match table {
            Table::Word => self.ids.contains(&row),
            Table::TokenType => self.type_ids.contains(&row),
            Table::Position => row < self.n_positions,
        }
    }
}

/// Whether a step's gradients, by tensor name, are what the run's selection promises: none missing, none that is zero
/// throughout, the key bias alone exactly zero. Of the tables, rows that the step did not read are exempt. `Ok(false)`
/// where the loss is so small that all gradients have rounded to zero, so that a later step must be asked.
///
/// # Errors
///
/// [`Error::Audit`], which names every tensor that breaks the promise.
pub fn gradients(
    base: &Base,
    run: &Run,
    found: &BTreeMap<String, Vec<f32>>,
    loss: f64,
    read: &RowsRead,
) -> Result<bool> {
    if loss < SATURATED && found.values().flatten().all(|g| *g == 0.0) {
        return Ok(false);
    }
    let mut broken = Vec::new();
    for p in base.parameters() {
        let Some(request) = run.requests.get(&p.name) else {
            if found.contains_key(&p.name) {
                broken.push(format!("{} is frozen and received a gradient", p.name));
            }
            continue;
        };
        let wrong = match found.get(&p.name) {
            None => Some("received no gradient".to_string()),
            Some(gradient) => problem_with(p, request, gradient, read),
        };
        broken.extend(wrong.map(|wrong| format!("{} {wrong}", p.name)));
    }
    let mut head = vec!["classifier.weight", "classifier.bias"];
    if !base.has_pooler() {
        head.extend(["pooler.dense.weight", "pooler.dense.bias"]);
    }
    for name in head {
        if found.get(name).is_none_or(|gradient| gradient.iter().all(|g| *g == 0.0)) {
            broken.push(format!("{name} received no gradient"));
        }
    }
    if broken.is_empty() {
        return Ok(true);
    }
    Err(Error::Audit(format!(
        "the gradients of a step are not those of the selection: {}; nothing that this run learns can be trusted, \
         please report it",
        broken.join("; ")
    )))
}

/// What is wrong with a trained tensor's gradient.
fn problem_with(p: &Parameter, request: &Request, gradient: &[f32], read: &RowsRead) -> Option<String> {
    let n = match request {
        Request::Dense => p.len(),
        Request::Entries(entries) => entries.len(),
    };
    if gradient.len() != n {
        return Some(format!("received {} values of gradient for {n} that train", gradient.len()));
    }
    match p.role {
        Role::Bias(Term::Key) => {
            let drifts = gradient.iter().any(|g| *g != 0.0);
            drifts.then(|| "received a gradient, and a key bias has none by definition".to_string())
        }
        Role::Table(table) => {
            let width = *p.shape.last()? as u64;
            let position = |i: usize| match request {
                Request::Dense => i as u64,
                Request::Entries(entries) => entries[i],
            };
            let mut rows: BTreeMap<u64, bool> = BTreeMap::new();
            for (i, g) in gradient.iter().enumerate() {
                *rows.entry(position(i) / width).or_default() |= *g != 0.0;
            }
            let cut = rows.iter().find(|(row, any)| !**any && read.holds(table, **row));
            let stray = rows.iter().find(|(row, any)| **any && !read.holds(table, **row));
            match (cut, stray) {
                (Some((row, _)), _) => Some(format!("received no gradient in row {row}, which the step read")),
                (_, Some((row, _))) => Some(format!("received a gradient in row {row}, which the step did not read")),
                _ => None,
            }
        }
        _ => gradient.iter().all(|g| *g == 0.0).then(|| "received no gradient".to_string()),
    }
}

/// Whether the frozen weights are what they were when the run began.
///
/// # Errors
///
/// [`Error::Audit`] where the hashes differ.
pub fn frozen(before: &str, after: &str) -> Result<()> {
    if before == after {
        return Ok(());
    }
    Err(Error::Audit(format!("the frozen weights changed in the run: their hash was {before} and is {after}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Config;
    use crate::patch::{Method, Selection};
    use crate::train::start;

    fn sequence() -> Sequence {
        Sequence { ids: vec![2, 5, 3], type_ids: vec![0; 3], target: None }
    }

    /// Gradients as a working step would give them.
    fn working(base: &Base, run: &Run) -> BTreeMap<String, Vec<f32>> {
        let mut all: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for p in base.parameters().iter().filter(|p| run.requests.contains_key(&p.name)) {
            let width = *p.shape.last().unwrap();
            let value = |i: usize| match p.role {
                Role::Bias(Term::Key) => 0.0,
                Role::Table(Table::Word) => f32::from([2, 5, 3].contains(&(i / width))),
                Role::Table(Table::Position) => f32::from(i / width < 3),
                Role::Table(Table::TokenType) => f32::from(i / width == 0),
                _ => 0.5,
            };
            all.insert(p.name.clone(), (0..p.len()).map(value).collect());
        }
        all.insert("classifier.weight".into(), vec![0.1; run.start.head.weight.len()]);
        all.insert("classifier.bias".into(), vec![0.1; run.start.head.bias.len()]);
        all
    }

    fn setting(method: Method) -> (Base, Run) {
        let base = Base::random(Config::tiny(), 0);
        let run = start(&base, &Selection::new(method), 2, 0).unwrap();
        (base, run)
    }

    fn audit(base: &Base, run: &Run, found: &BTreeMap<String, Vec<f32>>) -> Result<bool> {
        gradients(base, run, found, 0.7, &RowsRead::of([&sequence()]))
    }

    #[test]
    fn gradients_of_a_working_step_pass() {
        for method in [Method::Bitfit, Method::Full, Method::Frozen] {
            let (base, run) = setting(method);
            assert!(audit(&base, &run, &working(&base, &run)).unwrap(), "{method}");
        }
    }

    #[test]
    fn a_tensor_without_a_gradient_is_reported_whichever_it_is() {
        for method in [Method::Bitfit, Method::Full] {
            let (base, run) = setting(method);
            let good = working(&base, &run);
            for name in good.keys() {
                if !name.ends_with("key.bias") {
                    let mut zeroed = good.clone();
                    zeroed.get_mut(name).unwrap().fill(0.0);
                    assert!(audit(&base, &run, &zeroed).unwrap_err().to_string().contains(name.as_str()), "{name}");
                }
                let mut missing = good.clone();
                missing.remove(name);
                assert!(audit(&base, &run, &missing).unwrap_err().to_string().contains(name.as_str()), "{name}");
            }
        }
    }

    #[test]
    fn a_key_bias_with_a_gradient_is_reported() {
        let (base, run) = setting(Method::Bitfit);
        let mut found = working(&base, &run);
        found.get_mut("encoder.layer.0.attention.self.key.bias").unwrap()[3] = 1e-9;
        let message = audit(&base, &run, &found).unwrap_err().to_string();
        assert!(message.contains("encoder.layer.0.attention.self.key.bias received a gradient"), "{message}");
    }

    #[test]
    fn a_frozen_tensor_with_a_gradient_is_reported() {
        let (base, run) = setting(Method::Frozen);
        let mut found = working(&base, &run);
        found.insert("pooler.dense.bias".into(), vec![1.0]);
        assert!(audit(&base, &run, &found).unwrap_err().to_string().contains("pooler.dense.bias is frozen"));
    }

    #[test]
    fn an_embedding_row_is_exempt_only_where_the_step_did_not_read_it() {
        let (base, run) = setting(Method::Full);
        let h = base.config().hidden_size;
        let name = "embeddings.word_embeddings.weight";
        let mut found = working(&base, &run);
        found.get_mut(name).unwrap()[5 * h..6 * h].fill(0.0);
        assert!(audit(&base, &run, &found).unwrap_err().to_string().contains("no gradient in row 5"));
        let mut found = working(&base, &run);
        found.get_mut(name).unwrap()[7 * h] = 1.0;
        assert!(audit(&base, &run, &found).unwrap_err().to_string().contains("a gradient in row 7"));
    }

    #[test]
    fn a_loss_of_nothing_tells_nothing_and_one_above_it_does() {
        let (base, run) = setting(Method::Bitfit);
        let mut found = working(&base, &run);
        found.values_mut().for_each(|g| g.fill(0.0));
        let read = RowsRead::of([&sequence()]);
        assert!(!gradients(&base, &run, &found, 1e-9, &read).unwrap());
        assert!(gradients(&base, &run, &found, 0.1, &read).is_err());
    }

    #[test]
    fn changed_weights_are_reported() {
        assert!(frozen("a", "a").is_ok());
        assert!(frozen("a", "b").unwrap_err().to_string().contains("changed"));
    }
}
