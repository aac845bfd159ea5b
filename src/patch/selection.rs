//! Which parameters of the base train beside the task's head.
//!
//! A [`Selection`] is what a user asks for; [`Selection::resolve`] turns it into one request a tensor, in the terms
//! of the base's parameter table. Nothing else in the crate decides what trains, so what is counted, trained, stored
//! and audited is the same set.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::random;
use crate::base::config::Config;
use crate::base::delta::Request;
use crate::base::parameters::{Parameter, Role, Term, parameters};
use crate::base::problem::Problem;
use crate::error::{Error, Result};

/// How the trained parameters are chosen. The head trains with every one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Method {
    /// Every bias, or those of the terms named (BitFit: Ben Zaken, Ravfogel, Goldberg, ACL 2022).
    Bitfit,
    /// Nothing but the head.
    Frozen,
    /// A number of scalars drawn over all parameters of the base: the paper's control.
    Random,
    /// Every parameter: ordinary fine-tuning.
    Full,
}

impl Method {
    /// All methods, in the order a help text lists them.
    pub const ALL: [Method; 4] = [Method::Bitfit, Method::Frozen, Method::Random, Method::Full];

    /// The name a user types.
    pub fn name(self) -> &'static str {
        match self {
            Method::Bitfit => "bitfit",
            Method::Frozen => "frozen",
            Method::Random => "random",
            Method::Full => "full",
        }
    }
}

/// How the names in `terms` find tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TermsMatch {
    /// A term is one bias of a layer, or of the two ends.
    #[default]
    Exact,
    /// As in the authors' script, where a term's tensor name may stand anywhere in a parameter's name: `output`
    /// (`output.dense.bias`) also trains `attention.output.dense.bias`, and `output_layernorm` also trains
    /// `attention.output.LayerNorm.bias`. Only for parity with that script; no other term differs.
    Substring,
}

/// Which parameters of the base train. Fields that a method has no use for must be left at their defaults;
/// [`Selection::check`] refuses anything else, so that no setting is ignored in silence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// How parameters are chosen.
    pub method: Method,
    /// The bias terms of [`Method::Bitfit`], to which the pooler's bias is always added; `None` means all.
    pub terms: Option<Vec<Term>>,
    /// How `terms` find tensors; default [`TermsMatch::Exact`].
    pub terms_match: TermsMatch,
    /// Narrows the selection to these encoder layers, counted from 0, the end excluded; `None` means all. Embeddings
    /// then train only where the range starts at 0; the pooler always does. Not for [`Method::Frozen`].
    pub layers: Option<Range<usize>>,
    /// How many scalars [`Method::Random`] draws, from 1 to the number of parameters it draws from; `None` means as
    /// many as there are biases among these.
    pub random_count: Option<u64>,
    /// The run's seed, from which [`Method::Random`] draws; other methods do not read it.
    pub seed: u64,
}

/// Trained scalars, by where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// In embeddings and encoder layers.
    pub encoder: u64,
    /// In the base's pooler; 0 where the base has none to share.
    pub pooler: u64,
    /// In the task's own head: the classifier and, where the base has no pooler, the head's.
    pub head: u64,
}

impl Counts {
    /// All trained scalars.
    pub fn total(&self) -> u64 {
        self.encoder + self.pooler + self.head
    }
}

impl Selection {
    /// A selection of this method with nothing narrowed: all terms, all layers, seed 0.
    pub fn new(method: Method) -> Self {
        Selection { method, terms: None, terms_match: TermsMatch::Exact, layers: None, random_count: None, seed: 0 }
    }

    /// Whether this selection means something for a base of this config.
    ///
    /// # Errors
    ///
    /// A setting that the method has no use for, a term list that cannot learn or that names what the layers leave
    /// out, layers that the model does not have, or a count that cannot be drawn.
    pub fn check(&self, config: &Config, has_pooler: bool) -> Result<()> {
        let method = self.method;
        if self.terms.is_some() && method != Method::Bitfit {
            return Err(unused("--terms", "bias terms are chosen by `--method bitfit`", method));
        }
        if self.terms.is_none() && self.terms_match == TermsMatch::Substring {
            return Err(Error::Usage(
                "--terms-match substring: there are no terms to match; name them with --terms, or leave it out".into(),
            ));
        }
        if self.random_count.is_some() && method != Method::Random {
            return Err(unused("--random-count", "scalars are drawn by `--method random`", method));
        }
        if let Some(range) = &self.layers {
            if method == Method::Frozen {
                return Err(unused("--layers", "no layer trains with `--method frozen`", method));
            }
            check_layers(range, config.num_hidden_layers)?;
        }
        if let Some(terms) = &self.terms {
            self.check_terms(terms, has_pooler)?;
        }
        if let Some(count) = self.random_count {
            let n = self.pool(config, has_pooler).iter().map(|p| p.len() as u64).sum::<u64>();
            if count == 0 || count > n {
                let among = if self.layers.is_some() { "parameters in these layers" } else { "parameters of the base" };
                return Err(Error::setting("--random-count", format!("1 to {n}, the {among}"), count));
            }
        }
        Ok(())
    }

    /// The base's tensors that train, by canonical name, each with what trains of it. The head is not among them.
    ///
    /// The key bias is selected by [`Method::Bitfit`] like any other bias: the paper counts it, and it is stored,
    /// though its gradient, and so its difference, is zero.
    ///
    /// # Errors
    ///
    /// As [`Selection::check`].
    pub fn resolve(&self, config: &Config, has_pooler: bool) -> Result<BTreeMap<String, Request>> {
        self.check(config, has_pooler)?;
        let pool = self.pool(config, has_pooler);
        let dense = |p: Parameter| (p.name, Request::Dense);
        Ok(match self.method {
            Method::Frozen => BTreeMap::new(),
            Method::Full => pool.into_iter().map(dense).collect(),
            Method::Bitfit => {
                let wanted = self.wanted(config);
                pool.into_iter().filter(|p| bias_term(p).is_some_and(|t| wanted.contains(&t))).map(dense).collect()
            }
            Method::Random => {
                let biases = || pool.iter().filter(|p| bias_term(p).is_some()).map(|p| p.len() as u64).sum();
                random::draw(&pool, self.random_count.unwrap_or_else(biases), self.seed)
                    .into_iter()
                    .map(|(name, entries)| (name, Request::Entries(entries)))
                    .collect()
            }
        })
    }

    /// How many scalars train, by where they are.
    ///
    /// # Errors
    ///
    /// As [`Selection::check`].
    pub fn counts(&self, config: &Config, has_pooler: bool, problem: &Problem) -> Result<Counts> {
        let requests = self.resolve(config, has_pooler)?;
        let (hidden, outputs) = (config.hidden_size as u64, problem.n_outputs() as u64);
        let own_pooler = if has_pooler { 0 } else { hidden * hidden + hidden };
        let mut counts = Counts { head: outputs * hidden + outputs + own_pooler, ..Counts::default() };
        for parameter in parameters(config, has_pooler) {
            let n = match requests.get(&parameter.name) {
                None => continue,
                Some(Request::Dense) => parameter.len() as u64,
                Some(Request::Entries(entries)) => entries.len() as u64,
            };
            if is_pooler(&parameter) {
                counts.pooler += n;
            } else {
                counts.encoder += n;
            }
        }
        Ok(counts)
    }

    /// The parameters that the layers leave to choose from, in the order of the network.
    fn pool(&self, config: &Config, has_pooler: bool) -> Vec<Parameter> {
        let mut all = parameters(config, has_pooler);
        if let Some(range) = &self.layers {
            all.retain(|p| match p.layer {
                Some(layer) => range.contains(&layer),
                None => range.start == 0 || is_pooler(p),
            });
        }
        all
    }

    /// The bias terms that [`Method::Bitfit`] trains.
    fn wanted(&self, config: &Config) -> BTreeSet<Term> {
        let Some(terms) = &self.terms else { return Term::ALL.into() };
        let mut wanted: BTreeSet<Term> = terms.iter().copied().chain([Term::Pooler]).collect();
        if self.terms_match == TermsMatch::Substring {
            // One layer shows every bias there is, and a layer's prefix is no part of a term's tensor name.
            let one = Config { num_hidden_layers: 1, ..config.clone() };
            let table = parameters(&one, true);
            let biases: Vec<_> = table.iter().filter_map(|p| Some((without_layer(&p.name), bias_term(p)?))).collect();
            let found: Vec<Term> = biases
                .iter()
                .filter(|(name, _)| biases.iter().any(|(part, term)| wanted.contains(term) && name.contains(part)))
                .map(|(_, term)| *term)
                .collect();
            wanted.extend(found);
        }
        wanted
    }

    fn check_terms(&self, terms: &[Term], has_pooler: bool) -> Result<()> {
        let others: BTreeSet<Term> = terms.iter().copied().filter(|&t| t != Term::Pooler).collect();
        if terms.is_empty() {
            return Err(Error::setting("--terms", "at least one bias term", "an empty list"));
        }
        if others == BTreeSet::from([Term::Key]) {
            return Err(Error::Usage(
                "--terms key: the key bias alone cannot learn. It adds the same amount to every score of a query's row, \
                 which the softmax takes out again, so its gradient is zero by definition; name another term with it \
                 (`value` and `query` learn), or use `--method frozen`"
                    .into(),
            ));
        }
        if others.is_empty() && !has_pooler {
            return Err(Error::Usage(
                "--terms pooler: this base has no pooler, so its tasks have one of their own in the head, which always \
                 trains; use `--method frozen` to train the head alone"
                    .into(),
            ));
        }
        match &self.layers {
            Some(range) if range.start > 0 && others.contains(&Term::EmbeddingsLayernorm) => {
                Err(Error::Usage(format!(
                    "--terms embeddings_layernorm with --layers {}..{}: the embeddings train only where the layers start \
                 at 0; leave the term out, or start the range at 0",
                    range.start, range.end
                )))
            }
            _ => Ok(()),
        }
    }
}

fn check_layers(range: &Range<usize>, n_layers: usize) -> Result<()> {
    if range.start < range.end && range.end <= n_layers {
        return Ok(());
    }
    let expected = format!(
        "A..B with A below B and B at most {n_layers}, for this model's layers 0 to {}",
        n_layers.saturating_sub(1)
    );
    Err(Error::setting("--layers", expected, format_args!("{}..{}", range.start, range.end)))
}

fn unused(flag: &str, why: &str, method: Method) -> Error {
    Error::Usage(format!("{flag} means nothing with --method {method}: {why}; leave it out or change the method"))
}

fn bias_term(parameter: &Parameter) -> Option<Term> {
    match parameter.role {
        Role::Bias(term) => Some(term),
        _ => None,
    }
}

fn is_pooler(parameter: &Parameter) -> bool {
    parameter.name.starts_with("pooler.")
}

/// `output.dense.bias` of `encoder.layer.3.output.dense.bias`; names outside the layers stay as they are.
fn without_layer(name: &str) -> &str {
    name.strip_prefix("encoder.layer.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patch::spec::parse_terms;

    fn two() -> Problem {
        Problem::Classes(vec!["no".into(), "yes".into()])
    }
    fn with_terms(list: &str) -> Selection {
        Selection { terms: Some(parse_terms(list).unwrap()), ..Selection::new(Method::Bitfit) }
    }
    fn names(selection: &Selection, config: &Config) -> Vec<String> {
        selection.resolve(config, true).unwrap().into_keys().collect()
    }
    fn refusal(selection: &Selection) -> String {
        selection.check(&Config::minilm(), true).unwrap_err().to_string()
    }

    #[test]
    fn bitfit_counts_every_bias_of_minilm_base_and_large() {
        for (config, biases) in [(Config::minilm(), 26_112), (Config::base(), 102_912), (Config::large(), 272_384)] {
            let counts = Selection::new(Method::Bitfit).counts(&config, true, &two()).unwrap();
            assert_eq!(counts.encoder + counts.pooler, biases);
            assert_eq!(counts.pooler, config.hidden_size as u64);
            assert_eq!(counts.head, 2 * config.hidden_size as u64 + 2);
            assert_eq!(counts.total(), biases + counts.head);
        }
    }

    #[test]
    fn query_and_intermediate_are_the_papers_small_variant() {
        let counts = with_terms("query,intermediate").counts(&Config::base(), true, &Problem::Value).unwrap();
        assert_eq!(counts, Counts { encoder: 46_080, pooler: 768, head: 769 });
    }

    #[test]
    fn frozen_trains_the_head_alone() {
        let selection = Selection::new(Method::Frozen);
        assert!(selection.resolve(&Config::base(), true).unwrap().is_empty());
        assert_eq!(
            selection.counts(&Config::base(), true, &two()).unwrap(),
            Counts { encoder: 0, pooler: 0, head: 1538 }
        );
    }

    #[test]
    fn full_trains_every_parameter() {
        let counts = Selection::new(Method::Full).counts(&Config::base(), true, &Problem::Value).unwrap();
        assert_eq!(counts.encoder + counts.pooler, 109_482_240); // BERT-base uncased
    }

    #[test]
    fn random_draws_as_many_scalars_as_there_are_biases_or_as_asked() {
        let mut selection = Selection { seed: 42, ..Selection::new(Method::Random) };
        let counts = selection.counts(&Config::minilm(), true, &two()).unwrap();
        assert_eq!(counts.encoder + counts.pooler, 26_112);
        selection.random_count = Some(100_000);
        let counts = selection.counts(&Config::base(), true, &two()).unwrap();
        assert_eq!(counts.encoder + counts.pooler, 100_000);
    }

    #[test]
    fn a_random_count_that_cannot_be_drawn_is_refused() {
        let n: u64 = parameters(&Config::minilm(), true).iter().map(|p| p.len() as u64).sum();
        for count in [0, n + 1] {
            let selection = Selection { random_count: Some(count), ..Selection::new(Method::Random) };
            assert!(refusal(&selection).contains(&format!("1 to {n}")), "{}", refusal(&selection));
        }
    }

    #[test]
    fn without_a_pooler_in_the_base_the_head_has_one_of_its_own() {
        let counts = Selection::new(Method::Bitfit).counts(&Config::minilm(), false, &two()).unwrap();
        assert_eq!(counts, Counts { encoder: 26_112 - 384, pooler: 0, head: 770 + 384 * 384 + 384 });
    }

    #[test]
    fn layers_narrow_a_selection_and_leave_the_pooler() {
        let mut selection = Selection { layers: Some(1..3), ..Selection::new(Method::Bitfit) };
        let found = names(&selection, &Config::minilm());
        assert_eq!(found.len(), 2 * 8 + 1);
        assert!(found.contains(&"pooler.dense.bias".to_string()));
        assert!(!found.iter().any(|n| n.starts_with("embeddings.") || n.starts_with("encoder.layer.0.")));
        selection.layers = Some(0..1);
        assert!(names(&selection, &Config::minilm()).contains(&"embeddings.LayerNorm.bias".to_string()));
        selection = Selection { layers: Some(5..6), ..Selection::new(Method::Full) };
        assert_eq!(names(&selection, &Config::minilm()).len(), 16 + 2);
        selection = Selection { layers: Some(5..6), ..Selection::new(Method::Random) };
        let counts = selection.counts(&Config::minilm(), true, &two()).unwrap();
        assert_eq!(counts.encoder + counts.pooler, 384 * 8 + 1536);
    }

    #[test]
    fn layers_outside_the_model_or_empty_are_refused() {
        for (start, end) in [(0, 7), (6, 7), (3, 3), (4, 2)] {
            let selection = Selection { layers: Some(Range { start, end }), ..Selection::new(Method::Bitfit) };
            assert!(refusal(&selection).contains("at most 6"), "{}", refusal(&selection));
        }
    }

    #[test]
    fn the_key_bias_trains_beside_others_and_never_alone() {
        assert_eq!(names(&with_terms("key,query"), &Config::minilm()).len(), 2 * 6 + 1);
        assert!(refusal(&with_terms("key")).contains("cannot learn"));
        assert!(refusal(&with_terms("key,pooler")).contains("cannot learn"));
    }

    #[test]
    fn exact_terms_and_the_authors_substrings_differ_in_output_alone() {
        let count = |list: &str, terms_match| {
            let selection = Selection { terms_match, ..with_terms(list) };
            names(&selection, &Config::minilm()).len() - 1
        };
        for (term, exact, substring) in [
            ("output", 6, 12),
            ("output_layernorm", 6, 12),
            ("attention_output", 6, 6),
            ("attention_layernorm", 6, 6),
            ("intermediate", 6, 6),
            ("query", 6, 6),
            ("embeddings_layernorm", 1, 1),
        ] {
            assert_eq!(count(term, TermsMatch::Exact), exact, "{term}");
            assert_eq!(count(term, TermsMatch::Substring), substring, "{term}");
        }
    }

    #[test]
    fn a_setting_that_the_method_does_not_use_is_refused() {
        let terms = Some(vec![Term::Query]);
        for method in [Method::Frozen, Method::Full, Method::Random] {
            assert!(refusal(&Selection { terms: terms.clone(), ..Selection::new(method) }).starts_with("--terms "));
        }
        assert!(refusal(&Selection { layers: Some(0..1), ..Selection::new(Method::Frozen) }).starts_with("--layers "));
        let count = Selection { random_count: Some(5), ..Selection::new(Method::Bitfit) };
        assert!(refusal(&count).starts_with("--random-count "));
        let substring = Selection { terms_match: TermsMatch::Substring, ..Selection::new(Method::Bitfit) };
        assert!(refusal(&substring).contains("no terms to match"));
    }

    #[test]
    fn a_term_that_the_base_or_the_layers_leave_out_is_refused() {
        let late = Selection { layers: Some(2..4), ..with_terms("query,embeddings_layernorm") };
        assert!(refusal(&late).contains("start at 0"), "{}", refusal(&late));
        assert!(with_terms("pooler").check(&Config::minilm(), true).is_ok());
        assert!(with_terms("pooler").check(&Config::minilm(), false).unwrap_err().to_string().contains("no pooler"));
        assert!(with_terms("query,pooler").check(&Config::minilm(), false).is_ok());
        let none = Selection { terms: Some(Vec::new()), ..Selection::new(Method::Bitfit) };
        assert!(refusal(&none).contains("at least one"));
    }
}
