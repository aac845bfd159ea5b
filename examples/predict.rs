//! Answer one text with many tasks in one batch: `cargo run --release --example predict TEXT PATCH [PATCH ..]`.

use std::path::Path;

use bitfit::base::problem::Problem;
use bitfit::base::{Base, BaseSpec};
use bitfit::device::Placement;
use bitfit::encoder::Encoder;
use bitfit::predict::{Input, Prediction, TaskPatch, predict};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, text, patches @ ..] = &args[..] else { anyhow::bail!("usage: predict TEXT PATCH [PATCH ..]") };
    let base = Base::load(&BaseSpec::resolve(None)?)?;
    let encoder = Encoder::new(&base, Placement::default())?; // all cores
    let load = |path: &String| TaskPatch::load(Path::new(path), &encoder);
    let tasks: Vec<TaskPatch> = patches.iter().map(load).collect::<bitfit::Result<_>>()?;

    let inputs = [Input { text: text.clone(), text_pair: None }];
    let predictions = predict(&encoder, &tasks, &inputs)?;
    for (task, answers) in tasks.iter().zip(&predictions.of_tasks) {
        match (&task.metadata().problem, &answers[0]) {
            (Problem::Classes(labels), Prediction::Class { class, scores }) => {
                println!("{}: {} ({:.3})", task.name(), labels[*class], scores[*class]);
            }
            (_, Prediction::Value(value)) => println!("{}: {value:.2}", task.name()),
            (Problem::Value, Prediction::Class { .. }) => unreachable!("a task of values gives values"),
        }
    }
    Ok(())
}
