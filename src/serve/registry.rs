//! The live patches: loaded on first use, replaced at once, dropped by least recent use.
//!
//! A version becomes visible only after all of it was read, checked and attached; until then, and where that fails, the
//! one before goes on. A [`Live`] is never changed: whoever holds one has that version to the end.

mod slot;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};

pub(super) use self::slot::{Listed, Live};
use self::slot::{Slot, State};
use super::name::TaskName;
use super::problem::Problem;
use super::store::{Store, Tag, Version};
use crate::encoder::Encoder;
use crate::error::{Error, Kind, Result};
use crate::patch::Patch;
use crate::predict::TaskPatch;

/// Patches that are read and attached at once: each holds its file in memory meanwhile.
const LOADS_AT_ONCE: usize = 4;

/// How long a failure of the store to hand out a patch stands for those who ask next.
const FAILED_FOR: Duration = Duration::from_secs(1);
/// How long a name that is not in the store is not looked for again.
const MISSING_FOR: Duration = Duration::from_secs(1);
/// Names that are remembered as missing; more are simply looked for.
const MISSING_NAMES: usize = 10_000;

/// See the module.
pub(super) struct Registry {
    store: Store,
    encoder: Encoder,
    memory: usize,
    pins: BTreeSet<TaskName>,
    slots: RwLock<BTreeMap<TaskName, Arc<Slot>>>,
    missing: Mutex<HashMap<TaskName, Instant>>,
    loads: Semaphore,
    clock: AtomicU64,
}

impl Registry {
    pub(super) fn new(store: Store, encoder: Encoder, memory: usize, pins: &[TaskName]) -> Registry {
        Registry {
            store,
            encoder,
            memory,
            pins: pins.iter().cloned().collect(),
            slots: RwLock::default(),
            missing: Mutex::default(),
            loads: Semaphore::new(LOADS_AT_ONCE),
            clock: AtomicU64::new(0),
        }
    }

    /// Looks at the store for the first time, and loads the pinned tasks, or all.
    ///
    /// # Errors
    ///
    /// Where the store cannot be listed though its kind can, or a pinned task does not load.
    pub(super) async fn start(self: &Arc<Self>, preload: bool) -> Result<()> {
        for (task, tag) in self.store.list().await?.into_iter().flatten() {
            self.slot_or_new(&task).state().tag = Some(tag);
        }
        let pins: Vec<TaskName> = self.pins.iter().cloned().collect();
        for task in &pins {
            let problem = |p: Problem| Error::Usage(format!("--pin {task}: {}", p.message));
            self.get(task).await.map_err(problem)?;
        }
        if self.live_bytes() > self.memory {
            let pinned = self.live_bytes();
            let expected = format!("at least {pinned} bytes, which the pinned tasks take");
            return Err(Error::setting("--patch-memory", expected, self.memory));
        }
        if preload {
            let tasks: Vec<TaskName> = self.slots().keys().cloned().collect();
            for task in tasks {
                // Beyond the memory, loading one would only drop another.
                let mean = self.live_bytes() / self.n_live().max(1);
                if self.live_bytes().saturating_add(mean) > self.memory {
                    tracing::warn!("--patch-memory is full: the other tasks are loaded when they are asked for");
                    break;
                }
                if let Err(problem) = self.get(&task).await {
                    tracing::warn!(%task, reason = problem.message, "a patch was not loaded");
                }
            }
        }
        Ok(())
    }

    /// A task's live version; loads it where it is not.
    pub(super) async fn get(self: &Arc<Self>, task: &TaskName) -> Result<Arc<Live>, Problem> {
        let slot = self.known(task).await?;
        slot.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if let Some(live) = slot.live() {
            return Ok(live);
        }
        self.load(task, slot, Load::Missing).await
    }

    /// Loads what the store holds now, whatever is live.
    pub(super) async fn reload(self: &Arc<Self>, task: &TaskName) -> Result<Arc<Live>, Problem> {
        // It may have been put there this very moment.
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).remove(task);
        let slot = self.known(task).await?;
        self.load(task, slot, Load::Anew).await
    }

    /// Puts a patch into the store and in the place of what is live; whether the task is new.
    pub(super) async fn replace(self: &Arc<Self>, task: &TaskName, bytes: Bytes) -> Result<(Arc<Live>, bool), Problem> {
        let (this, task) = (self.clone(), task.clone());
        // A client that goes away must not leave a change half done.
        finish(async move {
            let slot = this.slot_or_new(&task);
            let _changing = slot.changing.lock().await;
            let done = this.replace_in(&task, &slot, bytes).await;
            if done.is_err() {
                this.clear_away(&task, &slot);
            }
            done
        })
        .await
    }

    async fn replace_in(&self, task: &TaskName, slot: &Slot, bytes: Bytes) -> Result<(Arc<Live>, bool), Problem> {
        let _place = self.place().await?;
        let live = self.attach(task, bytes.clone()).await?;
        let is_new = !self.keep(task).await?;
        self.store.keep_version(task, live.patch.content_hash(), bytes.clone()).await?;
        let tag = self.store.write(task, bytes).await?;
        self.publish(task, slot, live.clone(), Some(tag));
        Ok((live, is_new))
    }

    /// Takes a task out of the store; a version of it stays for a rollback.
    pub(super) async fn remove(self: &Arc<Self>, task: &TaskName) -> Result<(), Problem> {
        let (this, task) = (self.clone(), task.clone());
        if this.pins.contains(&task) {
            return Err(Problem::invalid(format!(
                "task {task} is pinned on this server (--pin) and cannot be removed"
            )));
        }
        finish(async move {
            let slot = this.known(&task).await?;
            let _changing = slot.changing.lock().await;
            let _place = this.place().await?;
            let mut was_there = false;
            // A task may have a file at either of its two paths: behind the first the second shows up.
            while this.keep(&task).await? {
                this.store.remove(&task).await?;
                was_there = true;
            }
            this.forget(&task, &slot);
            if !was_there {
                return Err(Problem::unknown_task(task.as_str()));
            }
            tracing::info!(%task, "removed");
            Ok(())
        })
        .await
    }

    /// The versions that are kept of a task, the newest first.
    pub(super) async fn versions(&self, task: &TaskName) -> Result<Vec<Version>, Problem> {
        let versions = self.store.versions(task).await?;
        if versions.is_empty() && self.store.tag(task).await?.is_none() {
            return Err(Problem::unknown_task(task.as_str()));
        }
        Ok(versions)
    }

    /// Puts a kept version back in place.
    pub(super) async fn roll_back(self: &Arc<Self>, task: &TaskName, patch: &str) -> Result<Arc<Live>, Problem> {
        let unknown = || {
            let shown: String = patch.chars().take(64).collect();
            let message =
                format!("there is no version {shown:?} of task {task}; GET /v1/tasks/{task}/versions lists them");
            Problem::new(StatusCode::NOT_FOUND, "unknown_version", message)
        };
        // Only what a content hash looks like becomes a path.
        if patch.len() != 64 || !patch.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(unknown());
        }
        let bytes = self.store.read_version(task, patch).await?.ok_or_else(unknown)?;
        Ok(self.replace(task, bytes).await?.0)
    }

    /// What the store holds of a task that is not live, without keeping it; the live version otherwise.
    pub(super) async fn inspect(self: &Arc<Self>, task: &TaskName) -> Result<Arc<Live>, Problem> {
        let slot = self.known(task).await?;
        if let Some(live) = slot.live() {
            return Ok(live);
        }
        let refused = slot.state().refused.clone();
        if let Some(problem) = refused {
            return Err(problem);
        }
        let _place = self.place().await?;
        let bytes = self.store.read(task).await?.ok_or_else(|| Problem::unknown_task(task.as_str()))?.0;
        self.attach(task, bytes).await
    }

    /// Every known task, by name.
    pub(super) fn list(&self) -> Vec<Listed> {
        let known = self.slots();
        known.iter().filter(|(_, slot)| !slot.is_absent()).map(|(task, slot)| self.described(task, slot)).collect()
    }

    /// What is known of one task.
    pub(super) fn listed(&self, task: &TaskName) -> Option<Listed> {
        let slot = self.slots().get(task).filter(|slot| !slot.is_absent()).cloned()?;
        Some(self.described(task, &slot))
    }

    fn described(&self, task: &TaskName, slot: &Slot) -> Listed {
        let state = slot.state();
        Listed {
            task: task.clone(),
            live: state.live.clone(),
            is_pinned: self.pins.contains(task),
            error: state.refused.as_ref().map(|p| p.message.clone()),
        }
    }

    /// Live tasks.
    pub(super) fn n_live(&self) -> usize {
        self.slots().values().filter(|slot| slot.live().is_some()).count()
    }

    /// Bytes that live patches take.
    pub(super) fn live_bytes(&self) -> usize {
        self.slots().values().filter_map(|slot| slot.live()).map(|live| live.patch.task().size_bytes()).sum()
    }

    /// Whether the store answers; it is asked for nothing but a list or a name.
    pub(super) async fn poll(self: &Arc<Self>) {
        let found = match self.store.list().await {
            Ok(found) => found,
            Err(error) => {
                metrics::counter!("bitfit_store_errors_total").increment(1);
                tracing::warn!(%error, "the store did not answer; loaded tasks go on");
                return;
            }
        };
        let known: Vec<(TaskName, Arc<Slot>)> = self.slots().iter().map(|(t, s)| (t.clone(), s.clone())).collect();
        for (task, slot) in known {
            let listed = match &found {
                Some(found) => found.get(&task).cloned(),
                // A store that cannot be listed is asked for what was asked for alone.
                None if slot.live().is_none() && slot.state().refused.is_none() => continue,
                None => match self.store.tag(&task).await {
                    Ok(tag) => tag,
                    Err(_) => continue,
                },
            };
            let (same, is_live) = {
                let state = slot.state();
                (state.tag == listed, state.live.is_some())
            };
            if same {
                continue;
            }
            match listed {
                None => self.forget_if_gone(&task, &slot).await,
                Some(_) if is_live => {
                    // Its outcome is in the list of tasks and in the log.
                    self.load(&task, slot, Load::Anew).await.ok();
                }
                Some(tag) => {
                    let mut state = slot.state();
                    (state.tag, state.refused) = (Some(tag), None);
                }
            }
        }
        for (task, tag) in found.into_iter().flatten() {
            if !self.slots().contains_key(&task) {
                self.slot_or_new(&task).state().tag = Some(tag);
            }
        }
    }

    fn slots(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<TaskName, Arc<Slot>>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_or_new(&self, task: &TaskName) -> Arc<Slot> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.entry(task.clone()).or_default().clone()
    }

    /// The task is not in the store, as whoever holds its `changing` has found.
    fn forget(&self, task: &TaskName, slot: &Arc<Slot>) {
        *slot.state() = State::default();
        self.clear_away(task, slot);
    }

    /// Takes away the slot of a task that is absent; whether it was. A slot that somebody else waits to change stays: two
    /// slots of one task would be two locks.
    fn clear_away(&self, task: &TaskName, slot: &Arc<Slot>) -> bool {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if !slot.is_absent() {
            return false;
        }
        if Arc::strong_count(slot) <= 2 {
            slots.remove(task);
        }
        true
    }

    /// Drops a task that a list no longer had, unless it is there again: lists are older than they look.
    async fn forget_if_gone(&self, task: &TaskName, slot: &Arc<Slot>) {
        let _changing = slot.changing.lock().await;
        if let Ok(None) = self.store.tag(task).await {
            if self.pins.contains(task) {
                tracing::warn!(%task, "a pinned task is no longer in the store; it goes on until this server stops");
                return;
            }
            self.forget(task, slot);
            tracing::info!(%task, "no longer in the store");
        }
    }

    /// A task's slot, where the store has the task.
    async fn known(&self, task: &TaskName) -> Result<Arc<Slot>, Problem> {
        let slot = self.slots().get(task).cloned();
        if let Some(slot) = slot.as_ref().filter(|slot| !slot.is_absent()) {
            return Ok(slot.clone());
        }
        let unknown = || Problem::unknown_task(task.as_str());
        let missing = || self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing().get(task).is_some_and(|since| since.elapsed() < MISSING_FOR) {
            return Err(unknown());
        }
        // It may be there since the last look at the store.
        match self.store.tag(task).await? {
            Some(tag) => {
                missing().remove(task);
                let slot = self.slot_or_new(task);
                slot.state().tag.get_or_insert(tag);
                Ok(slot)
            }
            None => {
                if slot.is_some_and(|slot| !self.clear_away(task, &slot)) {
                    // It has come in the meantime.
                    return Box::pin(self.known(task)).await;
                }
                let mut missing = missing();
                if missing.len() >= MISSING_NAMES {
                    missing.clear();
                }
                missing.insert(task.clone(), Instant::now());
                Err(unknown())
            }
        }
    }

    /// Reads, checks, attaches and publishes what the store holds of a task.
    async fn load(self: &Arc<Self>, task: &TaskName, slot: Arc<Slot>, why: Load) -> Result<Arc<Live>, Problem> {
        let (this, task) = (self.clone(), task.clone());
        finish(async move {
            let _changing = slot.changing.lock().await;
            // Somebody else may have loaded it while this waited, or found that it cannot be.
            if why == Load::Missing {
                let state = slot.state();
                if let Some(live) = &state.live {
                    return Ok(live.clone());
                }
                if let Some(problem) = &state.refused {
                    return Err(problem.clone());
                }
                // Those who waited meanwhile share a failure of the store; each trying for itself they would wait in
                // turn, one patience after the other.
                if let Some((_, problem)) = state.failed.as_ref().filter(|(when, _)| when.elapsed() < FAILED_FOR) {
                    return Err(problem.clone());
                }
            }
            let _place = this.place().await?;
            let failed = |problem: Problem| {
                slot.state().failed = Some((Instant::now(), problem.clone()));
                problem
            };
            let (bytes, tag) = match this.store.read(&task).await {
                Ok(Some(found)) => found,
                Ok(None) => {
                    this.forget(&task, &slot);
                    return Err(Problem::unknown_task(task.as_str()));
                }
                // What is too large to be a patch is refused like any file that is none.
                Err(error) if error.kind() == Kind::Content => {
                    let tag = this.store.tag(&task).await.map_err(|error| failed(error.into()))?;
                    return Err(this.refuse(&task, &slot, tag, error.into()));
                }
                Err(error) => return Err(failed(error.into())),
            };
            let live =
                this.attach(&task, bytes).await.map_err(|why| this.refuse(&task, &slot, Some(tag.clone()), why))?;
            this.publish(&task, &slot, live.clone(), Some(tag));
            Ok(live)
        })
        .await
    }

    /// Remembers what is wrong with the file that has this tag; what is live goes on.
    fn refuse(&self, task: &TaskName, slot: &Slot, tag: Option<Tag>, problem: Problem) -> Problem {
        metrics::counter!("bitfit_patches_refused_total").increment(1);
        let old = if slot.live().is_some() { "the version before goes on" } else { "the task has no version" };
        tracing::warn!(%task, reason = problem.message, "a patch of the store was refused; {old}");
        let mut state = slot.state();
        (state.tag, state.refused) = (tag, Some(problem.clone()));
        problem
    }

    /// Waits for one of the few places in which a patch's file is held in memory.
    async fn place(&self) -> Result<SemaphorePermit<'_>, Problem> {
        self.loads.acquire().await.map_err(|_| Problem::internal("no patch can be loaded"))
    }

    /// Checks a patch and attaches it, seen by nobody yet. The caller has a place.
    async fn attach(&self, task: &TaskName, bytes: Bytes) -> Result<Arc<Live>, Problem> {
        let (encoder, name, id) = (self.encoder.clone(), task.clone(), self.clock.fetch_add(1, Ordering::Relaxed));
        let attach = move || -> Result<Live> {
            let patch = Patch::from_bytes(&bytes, Path::new(name.as_str()))?;
            patch.check_base(encoder.base())?;
            if let Some(weights) = weights_of(&patch) {
                let line = format!("it changes weights ({weights}), and a server takes biases and heads alone");
                return Err(Error::Usage(format!("patch of task {name}: {line}; train it with --method bitfit")));
            }
            Ok(Live { id, patch: TaskPatch::attach(patch, &encoder)?.named(name.as_str()) })
        };
        let attached = tokio::task::spawn_blocking(attach).await;
        let live = attached.map_err(|e| Problem::internal(format!("loading the patch of task {task}: {e}")))??;
        let size = live.patch.task().size_bytes();
        if size > self.memory {
            let message = format!("the patch of task {task} takes {size} bytes, and --patch-memory is {}", self.memory);
            return Err(Problem::too_large(message));
        }
        Ok(Arc::new(live))
    }

    /// Keeps what is about to be replaced or removed as a version, where it is a patch and not kept already; whether the
    /// store has anything of the task.
    async fn keep(&self, task: &TaskName) -> Result<bool, Problem> {
        // What was put there by other hands and is no patch, or too large for one, is no version.
        let bytes = match self.store.read(task).await {
            Ok(Some((bytes, _))) => bytes,
            Ok(None) => return Ok(false),
            Err(error) if error.kind() == Kind::Content => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let Ok(patch) = Patch::from_bytes(&bytes, Path::new(task.as_str())) else { return Ok(true) };
        if self.store.read_version(task, patch.content_hash()).await?.is_none() {
            self.store.keep_version(task, patch.content_hash(), bytes).await?;
        }
        Ok(true)
    }

    /// From here on requests get this version.
    fn publish(&self, task: &TaskName, slot: &Slot, live: Arc<Live>, tag: Option<Tag>) {
        metrics::counter!("bitfit_patch_loads_total").increment(1);
        tracing::info!(%task, patch = live.patch.content_hash(), "loaded");
        slot.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        *slot.state() = State { live: Some(live), tag, ..State::default() };
        self.evict(task);
    }

    /// Drops least recently used patches until the rest fits, but neither pinned ones nor `newest`, nor those whose file is
    /// no longer what is live: they could not come back.
    fn evict(&self, newest: &TaskName) {
        let mut bytes = self.live_bytes();
        if bytes <= self.memory {
            return;
        }
        let evictable = |task: &TaskName| task != newest && !self.pins.contains(task);
        let mut candidates: Vec<(u64, Arc<Slot>)> = self
            .slots()
            .iter()
            .filter(|(task, slot)| evictable(task) && slot.state().refused.is_none())
            .map(|(_, slot)| (slot.used.load(Ordering::Relaxed), slot.clone()))
            .collect();
        candidates.sort_by_key(|(used, _)| *used);
        for (_, slot) in candidates {
            if bytes <= self.memory {
                break;
            }
            if let Some(live) = slot.state().live.take() {
                bytes -= live.patch.task().size_bytes();
                metrics::counter!("bitfit_patches_evicted_total").increment(1);
                tracing::info!(task = live.patch.name(), "dropped until it is asked for again");
            }
        }
    }
}

/// Why a patch is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    /// Nothing is live; what was refused is not read again.
    Missing,
    /// The store has another file than before, or somebody asks for it.
    Anew,
}

/// The weights that a patch changes, by the name of the first, where it changes any.
fn weights_of(patch: &Patch) -> Option<String> {
    patch.delta().changes.keys().find(|name| !name.ends_with(".bias")).cloned()
}

/// Runs to the end even where the caller's future is dropped.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, Problem>> + Send + 'static,
) -> Result<T, Problem> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(Problem::internal(format!("a change of the store has failed: {e}"))))
}
