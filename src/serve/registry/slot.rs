//! A task of the store, as the registry knows it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::predict::TaskPatch;
use crate::serve::name::TaskName;
use crate::serve::problem::Problem;
use crate::serve::store::Tag;

/// A version of a task, attached.
pub struct Live {
    /// Different for every version that was ever attached here.
    pub id: u64,
    /// The task's name in the store, and what answers it.
    pub patch: TaskPatch,
}

/// What a task is, for those who list it.
pub struct Listed {
    pub task: TaskName,
    pub live: Option<Arc<Live>>,
    pub is_pinned: bool,
    /// What is wrong with the patch that the store holds now.
    pub error: Option<String>,
}

/// A task of the store.
#[derive(Default)]
pub struct Slot {
    /// Held by whoever loads or changes the task; never while a request is answered.
    pub changing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// When it was last asked for, by the registry's clock.
    pub used: AtomicU64,
}

#[derive(Default)]
pub struct State {
    pub live: Option<Arc<Live>>,
    /// The file that `live` or `refused` is of.
    pub tag: Option<Tag>,
    /// What was wrong with that file.
    pub refused: Option<Problem>,
    /// When the store last failed to hand the file out, and how.
    pub failed: Option<(Instant, Problem)>,
}

impl Slot {
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state whole: it changes in single assignments.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn live(&self) -> Option<Arc<Live>> {
        self.state().live.clone()
    }

    /// Whether the store has no such task, as far as is known.
    pub fn is_absent(&self) -> bool {
        let state = self.state();
        state.live.is_none() && state.tag.is_none() && state.refused.is_none()
    }
}
