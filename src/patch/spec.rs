//! The text forms of a selection: the lists and ranges of the command line, and the one line that a patch records.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::selection::{Method, Selection, TermsMatch};
use crate::base::parameters::Term;
use crate::error::{Error, Result};

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Method::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| {
            let known: Vec<_> = Method::ALL.iter().map(|m| m.name()).collect();
            Error::setting("method", format!("one of {}", known.join(", ")), format_args!("`{s}`"))
        })
    }
}

impl fmt::Display for TermsMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TermsMatch::Exact => "exact",
            TermsMatch::Substring => "substring",
        })
    }
}

impl FromStr for TermsMatch {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "exact" => Ok(TermsMatch::Exact),
            "substring" => Ok(TermsMatch::Substring),
            _ => Err(Error::setting("--terms-match", "exact or substring", format_args!("`{s}`"))),
        }
    }
}

/// Reads a list of bias terms, as `query,intermediate`.
///
/// # Errors
///
/// A name that is no term (the message lists them), an empty item, or a term named twice.
pub fn parse_terms(list: &str) -> Result<Vec<Term>> {
    let mut terms = Vec::new();
    for name in list.split(',') {
        let term: Term = name.trim().parse()?;
        if terms.contains(&term) {
            return Err(Error::setting("--terms", "each term once", format_args!("`{term}` twice in `{list}`")));
        }
        terms.push(term);
    }
    Ok(terms)
}

/// Reads a range of layers, as `8..12`: from 0, the end excluded.
///
/// # Errors
///
/// Anything but two whole numbers with `..` between them. Whether the model has these layers, [`Selection::check`]
/// tells.
pub fn parse_layers(text: &str) -> Result<Range<usize>> {
    let number = |s: &str| s.trim().parse::<usize>().ok().filter(|_| s.trim().bytes().all(|b| b.is_ascii_digit()));
    text.split_once("..")
        .and_then(|(a, b)| Some(number(a)?..number(b)?))
        .ok_or_else(|| Error::setting("--layers", "A..B, as 8..12 for layers 8 to 11", format_args!("`{text}`")))
}

impl Selection {
    /// The selection on one line, as `bitfit terms=query,intermediate layers=8..12`: equal selections have equal
    /// lines, and [`Selection::parse`] reads them. The seed stands there for [`Method::Random`] alone, which is all
    /// that reads it.
    pub fn spec(&self) -> String {
        let mut line = self.method.to_string();
        if let Some(terms) = &self.terms {
            let mut terms = terms.clone();
            terms.sort_unstable();
            terms.dedup();
            let names: Vec<_> = terms.iter().map(|t| t.name()).collect();
            line += &format!(" terms={}", names.join(","));
        }
        if self.terms_match == TermsMatch::Substring {
            line += " terms-match=substring";
        }
        if let Some(range) = &self.layers {
            line += &format!(" layers={}..{}", range.start, range.end);
        }
        if self.method == Method::Random {
            if let Some(count) = self.random_count {
                line += &format!(" count={count}");
            }
            line += &format!(" seed={}", self.seed);
        }
        line
    }

    /// Reads the line that [`Selection::spec`] writes. Whether it fits a model, [`Selection::check`] tells.
    ///
    /// # Errors
    ///
    /// A line that no selection writes.
    pub fn parse(spec: &str) -> Result<Selection> {
        let expected = "a method and its settings, as `bitfit terms=query,intermediate layers=8..12`";
        let refuse = || Error::setting("selection", expected, format_args!("`{spec}`"));
        let mut words = spec.split(' ');
        let mut selection = Selection::new(words.next().unwrap_or_default().parse()?);
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(refuse)?;
            match key {
                "terms" => selection.terms = Some(parse_terms(value)?),
                "terms-match" => selection.terms_match = value.parse()?,
                "layers" => selection.layers = Some(parse_layers(value)?),
                "count" => selection.random_count = Some(value.parse().map_err(|_| refuse())?),
                "seed" => selection.seed = value.parse().map_err(|_| refuse())?,
                _ => return Err(refuse()),
            }
        }
        if selection.spec() == spec { Ok(selection) } else { Err(refuse()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_selection_reads_back_from_its_line() {
        for line in [
            "bitfit",
            "frozen",
            "full layers=0..2",
            "bitfit terms=query,intermediate layers=8..12",
            "bitfit terms=output terms-match=substring",
            "random seed=42",
            "random layers=1..2 count=100000 seed=18446744073709551615",
        ] {
            assert_eq!(Selection::parse(line).unwrap().spec(), line);
        }
    }

    #[test]
    fn the_line_does_not_depend_on_the_order_of_terms() {
        let selection = |list| Selection { terms: Some(parse_terms(list).unwrap()), ..Selection::new(Method::Bitfit) };
        assert_eq!(selection("intermediate,query").spec(), selection("query, intermediate").spec());
    }

    #[test]
    fn a_line_that_no_selection_writes_is_refused() {
        for line in [
            "",
            " bitfit",
            "bitfit ",
            "BitFit",
            "bitfit terms=",
            "bitfit terms=intermediate,query",
            "bitfit seed=1",
            "bitfit layers=1..",
            "bitfit layers=01..2",
            "bitfit layers=1..2 terms=query",
            "bitfit colour=red",
            "random",
            "random seed=-1",
            "random-rows seed=1",
        ] {
            assert!(Selection::parse(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn unknown_and_repeated_terms_are_refused_by_name() {
        let text = parse_terms("query,querry").unwrap_err().to_string();
        assert!(text.contains("`querry`") && text.contains("attention_layernorm"), "{text}");
        assert!(parse_terms("query,query").unwrap_err().to_string().contains("`query` twice"));
        assert!(parse_terms("").is_err());
        assert!(parse_terms("query,").is_err());
    }

    #[test]
    fn layers_are_two_whole_numbers() {
        assert_eq!(parse_layers("0..12").unwrap(), 0..12);
        for text in ["", "..", "3", "3..", "..3", "3..=4", "-1..2", "+1..2", "a..b", "1.5..2"] {
            assert!(parse_layers(text).is_err(), "{text}");
        }
    }
}
