//! Fine-tune the biases of a BERT on a table: `cargo run --release --example train TABLE.csv RUN_FOLDER`.
//! The table has columns `text` and `label`; a tenth of it is held out to choose the best epoch by.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use bitfit::base::{Base, BaseSpec};
use bitfit::data::{Columns, hold_out, load_table};
use bitfit::device::Placement;
use bitfit::encoder::Encoder;
use bitfit::train::{Event, Existing, Job, Options, run};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, table, out] = &args[..] else { anyhow::bail!("usage: train TABLE.csv RUN_FOLDER") };
    let base = Base::load(&BaseSpec::resolve(None)?)?;
    let encoder = Encoder::new(&base, Placement::default())?; // all cores
    let columns = Columns { text: "text".into(), text_pair: None, label: Some("label".into()) };
    let (train, dev) = hold_out(&load_table(Path::new(table), &columns, false, None)?, 0.1, 0)?;

    let config = Options { epochs: 5, ..Options::default() }.check(&base)?;
    let dev = [("held_out".to_string(), dev)];
    let job = Job {
        config: &config,
        train: &train,
        dev: &dev,
        out: Path::new(out),
        existing: Existing::Refuse,
        memory_budget: None,
    };
    let mut show = |event: Event| {
        if let Event::Evaluated { epoch, metrics, .. } = event {
            println!("epoch {epoch}: {metrics:?}");
        }
    };
    let outcome = run(&encoder, &job, &mut show, &AtomicBool::new(false))?;
    println!("{out}/patch.safetensors: {}", outcome.patch.content_hash());
    Ok(())
}
