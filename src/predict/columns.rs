//! What each task adds to a row: the names of its columns and what stands in them.

use super::answer::Prediction;
use super::json;
use super::tasks::TaskPatch;
use crate::base::problem::Problem;

/// Each task's name in an output; two patches of one name are told apart by the beginning of their content hash.
pub fn names(tasks: &[TaskPatch]) -> Vec<String> {
    let shared = |name: &str| tasks.iter().filter(|task| task.name() == name).count() > 1;
    let of = |task: &TaskPatch| match shared(task.name()) {
        true => format!("{}@{}", task.name(), &task.content_hash()[..8]),
        false => task.name().to_string(),
    };
    tasks.iter().map(of).collect()
}

/// The columns of a task that goes by `name`: `NAME.label` and `NAME.score`, or `NAME.value`.
pub(super) fn columns(name: &str, problem: &Problem) -> Vec<String> {
    match problem {
        Problem::Classes(_) => vec![format!("{name}.label"), format!("{name}.score")],
        Problem::Value => vec![format!("{name}.value")],
    }
}

/// A prediction as the cells of a row: label and score, or the value.
pub fn cells(problem: &Problem, prediction: &Prediction) -> Vec<String> {
    match (problem, prediction) {
        (Problem::Classes(labels), Prediction::Class { class, scores }) => {
            vec![labels[*class].clone(), json::number(scores[*class]).to_string()]
        }
        (_, Prediction::Value(value)) => vec![json::number(*value).to_string()],
        (Problem::Value, Prediction::Class { .. }) => vec![],
    }
}
