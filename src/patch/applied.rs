//! The whole model of a task: base plus differences plus head, one tensor at a time.

use crate::base::Base;
use crate::base::delta::Delta;
use crate::error::Result;

/// A tensor of a task's model, by the name that Hugging Face's `BertForSequenceClassification` gives it without the
/// `bert.` prefix.
pub(super) struct Piece {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// All tensors of a task's model: the base's, in the order of the network, a head's own pooler in its place, and the
/// classifier. Without a delta, the base's alone.
pub(super) fn pieces(base: &Base, delta: Option<&Delta>) -> Vec<Piece> {
    let piece = |name: &str, shape: &[usize]| Piece { name: name.into(), shape: shape.to_vec() };
    let mut pieces: Vec<Piece> = base.parameters().iter().map(|p| piece(&p.name, &p.shape)).collect();
    if let Some(Delta { head, .. }) = delta {
        let hidden = base.config().hidden_size;
        if head.pooler.is_some() {
            pieces.push(piece("pooler.dense.weight", &[hidden, hidden]));
            pieces.push(piece("pooler.dense.bias", &[hidden]));
        }
        pieces.push(piece("classifier.weight", &[head.n_outputs, hidden]));
        pieces.push(piece("classifier.bias", &[head.n_outputs]));
    }
    pieces
}

/// The values of one of [`pieces`], row-major. The delta has been checked against the base.
pub(super) fn values(base: &Base, delta: Option<&Delta>, name: &str) -> Result<Vec<f32>> {
    if let Some(Delta { head, .. }) = delta {
        let own = match (name, &head.pooler) {
            ("classifier.weight", _) => Some(&head.weight),
            ("classifier.bias", _) => Some(&head.bias),
            ("pooler.dense.weight", Some((weight, _))) => Some(weight),
            ("pooler.dense.bias", Some((_, bias))) => Some(bias),
            _ => None,
        };
        if let Some(own) = own {
            return Ok(own.clone());
        }
    }
    let mut tensor = base.tensor(name)?;
    if let Some(change) = delta.and_then(|d| d.changes.get(name)) {
        change.add_to(name, &mut tensor)?;
    }
    Ok(tensor)
}
