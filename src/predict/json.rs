//! Predictions as JSON: the same from the command and over HTTP.
//!
//! One task: `{"task": .., "patch": "<content hash>", "predictions": [P, ..]}`; many: `{"results": [one task, ..]}`.
//! P of classes: `{"label": .., "score": .., "scores": {label: score, ..}}`, labels in the task's order; P of a value:
//! `{"value": ..}`. Numbers are in the shortest form that reads back to the same f32.

use serde_json::{Map, Value, json};

use super::answer::Prediction;
use super::tasks::{Predictions, TaskPatch};
use crate::base::problem::Problem;

/// An f32 as its shortest decimal form.
pub fn number(x: f32) -> Value {
    // Rust writes the shortest digits that read back to the same f32; as f64 they are written out the same.
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

/// P: one prediction of a task.
pub fn prediction(problem: &Problem, prediction: &Prediction) -> Value {
    match (problem, prediction) {
        (Problem::Classes(labels), Prediction::Class { class, scores }) => {
            let of = labels.iter().zip(scores).map(|(label, score)| (label.clone(), number(*score)));
            let label = labels.get(*class);
            json!({"label": label, "score": scores.get(*class).map(|s| number(*s)), "scores": of.collect::<Map<_, _>>()})
        }
        (_, Prediction::Value(value)) => json!({"value": number(*value)}),
        (Problem::Value, Prediction::Class { .. }) => Value::Null,
    }
}

/// One task's answers.
pub fn task(task: &TaskPatch, predictions: &[Prediction]) -> Value {
    let problem = &task.metadata().problem;
    let predictions: Vec<Value> = predictions.iter().map(|p| prediction(problem, p)).collect();
    json!({"task": task.name(), "patch": task.content_hash(), "predictions": predictions})
}

/// One task's answers up to the first of them; `]}` ends it.
pub(super) fn task_head(of: &TaskPatch) -> String {
    let mut head = task(of, &[]).to_string();
    head.truncate(head.len() - "]}".len());
    head
}

/// Many tasks' answers, in the order of the tasks.
pub fn results(tasks: &[TaskPatch], predictions: &Predictions) -> Value {
    let of = tasks.iter().zip(&predictions.of_tasks).map(|(t, p)| task(t, p));
    json!({"results": of.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_back_to_the_same_f32_and_are_as_short_as_that_allows() {
        for x in [0.93f32, 0.1, 1.0, 1e-20, 3.402_823e38, 0.333_333_34, -2.5, 16_777_216.0] {
            let text = number(x).to_string();
            assert_eq!(text.parse::<f32>().unwrap(), x, "{text}");
        }
        assert_eq!(number(0.93).to_string(), "0.93");
    }

    #[test]
    fn classes_and_values_have_the_shapes_of_the_wire() {
        let problem = Problem::Classes(vec!["no".into(), "yes".into()]);
        let p = Prediction::Class { class: 1, scores: vec![0.07, 0.93] };
        let text = r#"{"label":"yes","score":0.93,"scores":{"no":0.07,"yes":0.93}}"#;
        assert_eq!(prediction(&problem, &p).to_string(), text);
        assert_eq!(prediction(&Problem::Value, &Prediction::Value(3.71)).to_string(), r#"{"value":3.71}"#);
    }
}
