//! candle's users keep their candle: a base and a patch as a `VarBuilder` run a task in candle's own BertModel, and it
//! agrees with this crate's encoder.

use std::path::Path;
use std::sync::Arc;

use bitfit::base::problem::{Problem, Texts};
use bitfit::base::{Base, spec};
use bitfit::device::Placement;
use bitfit::device::batch::{Batch, DropoutKey};
use bitfit::encoder::Encoder;
use bitfit::patch::{Method, Patch, Selection, candle};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::bert::BertModel;

/// Largest difference of a hidden state; both sides compute in f32.
const STATES: f32 = 1e-4;

/// A patch of every bias over a base, with differences large enough to be seen.
fn patch(base: &Base) -> Patch {
    let classes = Problem::Classes(vec!["a".into(), "b".into()]);
    Patch::random(base, &Selection::new(Method::Bitfit), classes, Texts::One, 1).unwrap()
}

fn agrees(base: &Base, texts: &[&str]) {
    let patch = patch(base);
    let encoder = Encoder::new(base, Placement { n_threads: 2, ..Placement::default() }).unwrap();
    let task = encoder.attach(patch.delta()).unwrap();
    let weights = candle::var_builder(base, Some(&patch), DType::F32, &Device::Cpu).unwrap();
    let bert = BertModel::load(weights.clone(), &candle::bert_config(base.config())).unwrap();
    for text in texts {
        let encoding = base.tokenizer().unwrap().encode(text, None, 32).unwrap();
        let mut batch = Batch::new();
        batch.push(&encoding.ids, &encoding.type_ids, 0, DropoutKey::default(), None);
        let batch = Arc::new(batch);
        let ours = encoder.hidden_states(&batch, &[Some(task.clone())]).unwrap().pop().unwrap();

        let row = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let (ids, types) = (row(&encoding.ids), row(&encoding.type_ids));
        let theirs = bert.forward(&ids, &types, None).unwrap().squeeze(0).unwrap();
        let difference = (ours - &theirs).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < STATES, "{}: {text:?}: {difference:e}", base.id());

        // Pooler and classifier, which candle's BertModel leaves to its users.
        let h = base.config().hidden_size;
        let linear = |name: &str, n: usize, x: &Tensor| {
            let w = weights.get((n, h), &format!("{name}.weight")).unwrap();
            let b = weights.get(n, &format!("{name}.bias")).unwrap();
            x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap()
        };
        let pooled = linear("pooler.dense", h, &theirs.narrow(0, 0, 1).unwrap()).tanh().unwrap();
        let theirs: Vec<f32> = linear("classifier", 2, &pooled).flatten_all().unwrap().to_vec1().unwrap();
        let ours = encoder.forward(&batch, &[Some(task.clone())]).unwrap().concat();
        let difference = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(ours.len() == 2 && difference < STATES, "{}: logits of {text:?}: {difference:e}", base.id());
    }
}

#[test]
fn candle_runs_a_patch_over_a_tiny_base() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
    agrees(&Base::from_folder(&tiny).unwrap(), &["a", "the cat", "a b c d e f g h"]);
}

#[test]
fn candle_runs_a_patch_over_the_default_base() {
    let folder = spec::default_folder().expect("a home folder");
    let base = Base::from_folder(&folder).expect("the default base; scripts/fetch-base.sh brings it");
    agrees(
        &base,
        &["The train leaves at noon.", "Why did nobody tell us that the kitchen closes so early on Mondays?"],
    );
}
