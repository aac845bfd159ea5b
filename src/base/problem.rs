//! What a task asks: classes or a value, of one text or of two.

use serde::{Deserialize, Serialize};

/// What is predicted. The serialised names are those of `problem_type` in Hugging Face's config.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Problem {
    /// One class of several; the labels in the order of the classifier's rows, at least two, all different.
    #[serde(rename = "single_label_classification")]
    Classes(Vec<String>),
    /// One number, learned by squared error on its raw scale.
    #[serde(rename = "regression")]
    Value,
}

impl Problem {
    /// Rows of the classifier: the number of classes, or 1 for a value.
    pub fn n_outputs(&self) -> usize {
        match self {
            Problem::Classes(labels) => labels.len(),
            Problem::Value => 1,
        }
    }

    /// The name of the problem type in Hugging Face's config.json.
    pub fn name(&self) -> &'static str {
        match self {
            Problem::Classes(_) => "single_label_classification",
            Problem::Value => "regression",
        }
    }
}

/// How many texts an input of a task has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Texts {
    /// A single text.
    One,
    /// A pair of texts.
    Two,
}

impl Texts {
    /// 1 or 2.
    pub fn count(self) -> usize {
        match self {
            Texts::One => 1,
            Texts::Two => 2,
        }
    }
}
