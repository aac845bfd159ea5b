//! One queue for the questions of all tasks, and one thread that owns the encoder and answers them.
//!
//! A question is a text of a task. Whenever the encoder is free, a batch is filled from the queue up to a budget of
//! tokens: first each waiting request gets an equal share of it, the oldest first, then what is left goes to the oldest.
//! So a request of a thousand texts does not hold up one of a single text, and the oldest always moves. A batch is
//! ordered by patch, so that each forms one group of rows.
//!
//! What nobody waits for is not computed: requests whose client has gone and those past their deadline leave the queue
//! when a batch is filled.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::registry::Live;
use crate::base::tokenizer::Encoding;
use crate::device::batch::{Batch, DropoutKey};
use crate::encoder::{Encoder, Task};
use crate::error::{Error, Result};

/// A text of a task.
pub(super) struct Question {
    /// An index into the call's tasks.
    pub task: usize,
    /// The text, as the task reads it.
    pub text: Arc<Encoding>,
}

/// What a request asks: its tasks, held at the versions it began with, and its questions.
pub(super) struct Call {
    pub tasks: Vec<Arc<Live>>,
    pub questions: Vec<Question>,
}

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Refused {
    /// There is no room; there should be after so long.
    Full { after: Duration },
    /// The server stops.
    Draining,
    /// The deadline passed.
    Late,
    /// The encoder failed.
    Failed(Arc<Error>),
}

/// The logits of each of a call's questions, in order.
pub(super) type Answers = Vec<Vec<f32>>;

/// The queue's near end, for those who ask. The thread behind it ends when [`Batcher::close`] was called and all that
/// had been accepted is answered.
pub(super) struct Batcher {
    shared: Arc<Shared>,
    owner: Mutex<Option<std::thread::JoinHandle<()>>>,
    capacity: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Something was asked, or the server stops.
    asked: Condvar,
    counts: Counts,
}

/// What the batcher has done since it began.
#[derive(Default)]
pub(super) struct Counts {
    /// Questions answered.
    pub questions: AtomicU64,
    /// Tokens that went through the encoder.
    pub tokens: AtomicU64,
    /// Forwards.
    pub batches: AtomicU64,
    /// Microseconds that forwards took.
    pub forward_us: AtomicU64,
    /// Questions that were dropped: nobody waited, or too long.
    pub dropped: AtomicU64,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Questions not yet answered.
    questions: usize,
    /// Their tokens.
    tokens: usize,
    closed: bool,
}

struct Job {
    call: Call,
    /// The first question that no batch has taken.
    next: usize,
    answers: Answers,
    unanswered: usize,
    deadline: Instant,
    reply: oneshot::Sender<Result<Answers, Refused>>,
}

/// A question taken into a batch: whose, and which.
#[derive(Clone, Copy)]
struct Taken {
    job: usize,
    question: usize,
}

impl Batcher {
    /// Starts the owner of `encoder`. At most `capacity` questions wait; a forward takes about `budget` tokens.
    pub(super) fn start(encoder: Encoder, capacity: usize, budget: usize) -> Result<Batcher> {
        let shared = Arc::new(Shared { queue: Mutex::default(), asked: Condvar::new(), counts: Counts::default() });
        let of_owner = shared.clone();
        let owner = std::thread::Builder::new()
            .name("encoder".into())
            .spawn(move || of_owner.answer_all(&encoder, budget))
            .map_err(|e| Error::Device(format!("cannot start the encoder's thread: {e}")))?;
        Ok(Batcher { shared, owner: Mutex::new(Some(owner)), capacity })
    }

    /// Queues a call and waits for its answers. Dropping the future takes what is not yet computed out of the queue.
    pub(super) async fn ask(&self, call: Call, deadline: Instant) -> Result<Answers, Refused> {
        if call.questions.is_empty() {
            return Ok(Vec::new());
        }
        let (reply, answer) = oneshot::channel();
        self.enqueue(call, deadline, reply)?;
        let in_time = tokio::time::timeout_at(deadline.into(), answer).await;
        match in_time {
            Ok(Ok(answer)) => answer,
            // The owner ends only when the queue is closed and empty.
            Ok(Err(_)) => Err(Refused::Draining),
            Err(_) => Err(Refused::Late),
        }
    }

    fn enqueue(
        &self,
        call: Call,
        deadline: Instant,
        reply: oneshot::Sender<Result<Answers, Refused>>,
    ) -> Result<(), Refused> {
        let n = call.questions.len();
        let mut queue = self.shared.lock();
        self.room(&queue, n)?;
        queue.questions += n;
        queue.tokens += call.tokens(0..n);
        queue.jobs.push_back(Job { call, next: 0, answers: vec![Vec::new(); n], unanswered: n, deadline, reply });
        drop(queue);
        self.shared.asked.notify_one();
        Ok(())
    }

    /// Whether so many questions would find room now.
    pub(super) fn check_room(&self, n: usize) -> Result<(), Refused> {
        self.room(&self.shared.lock(), n)
    }

    fn room(&self, queue: &Queue, n: usize) -> Result<(), Refused> {
        if queue.closed {
            return Err(Refused::Draining);
        }
        if queue.questions + n > self.capacity {
            return Err(Refused::Full { after: self.shared.counts.time_of(queue.tokens) });
        }
        Ok(())
    }

    /// Questions that wait or are being answered, and their tokens.
    pub(super) fn waiting(&self) -> (usize, usize) {
        let queue = self.shared.lock();
        (queue.questions, queue.tokens)
    }

    /// The most questions that may wait.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// What was done so far.
    pub(super) fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Accepts no more, and waits until all that was accepted is answered.
    pub(super) fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.asked.notify_one();
        let owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(owner) = owner
            && owner.join().is_err()
        {
            tracing::error!("the encoder's thread has panicked");
        }
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.close();
    }
}

impl Counts {
    /// How long so many tokens have taken so far, at least a second: what a client of a full queue is told to wait.
    fn time_of(&self, tokens: usize) -> Duration {
        let (us, done) = (self.forward_us.load(Ordering::Relaxed), self.tokens.load(Ordering::Relaxed));
        let us_a_token = us as f64 / done.max(1) as f64;
        Duration::from_secs_f64((us_a_token * tokens as f64 / 1e6).clamp(1.0, 600.0))
    }
}

impl Call {
    fn length(&self, question: usize) -> usize {
        self.questions[question].text.ids.len()
    }

    fn tokens(&self, questions: std::ops::Range<usize>) -> usize {
        questions.map(|q| self.length(q)).sum()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic elsewhere leaves the queue whole: its changes are single steps.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The owner's work, until the queue is closed and empty.
    fn answer_all(&self, encoder: &Encoder, budget: usize) {
        loop {
            let (batch, groups, order) = {
                let mut queue = self.lock();
                loop {
                    let dropped = queue.drop_unwanted(Instant::now());
                    self.counts.dropped.fetch_add(dropped as u64, Ordering::Relaxed);
                    if !queue.jobs.is_empty() {
                        break;
                    }
                    if queue.closed {
                        return;
                    }
                    queue = self.asked.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                let taken = queue.take(budget);
                queue.pack(taken)
            };
            let began = Instant::now();
            // A defect in an op must not end the server: the questions of its batch fail, others go on.
            let found = catch_unwind(AssertUnwindSafe(|| encoder.forward(&batch, &groups)))
                .unwrap_or_else(|_| Err(Error::Audit("a forward has panicked; its request is in the log".into())));
            let us = began.elapsed().as_micros() as u64;
            self.counts.forward_us.fetch_add(us, Ordering::Relaxed);
            self.counts.batches.fetch_add(1, Ordering::Relaxed);
            self.counts.tokens.fetch_add(batch.n_tokens() as u64, Ordering::Relaxed);
            self.counts.questions.fetch_add(order.len() as u64, Ordering::Relaxed);
            metrics::histogram!("bitfit_batch_tokens").record(batch.n_tokens() as f64);
            metrics::histogram!("bitfit_forward_seconds").record(us as f64 / 1e6);
            self.lock().deliver(&order, found);
        }
    }
}

impl Queue {
    /// Takes out what nobody waits for; gives the number of its questions.
    fn drop_unwanted(&mut self, now: Instant) -> usize {
        let before = self.questions;
        for job in std::mem::take(&mut self.jobs) {
            if job.reply.is_closed() {
                self.forget(&job);
            } else if job.deadline <= now {
                self.forget(&job);
                // One that has gone since is not owed an answer.
                job.reply.send(Err(Refused::Late)).ok();
            } else {
                self.jobs.push_back(job);
            }
        }
        before - self.questions
    }

    /// No longer counts a job's questions. Nothing of it is in a batch.
    fn forget(&mut self, job: &Job) {
        self.questions -= job.unanswered;
        self.tokens -= job.call.tokens(job.next..job.call.questions.len());
    }

    /// The questions of the next batch, at least one. There is a job.
    fn take(&mut self, budget: usize) -> Vec<Taken> {
        let (mut taken, mut left) = (Vec::new(), budget);
        let share = budget / self.jobs.len();
        for round_share in [share, budget] {
            for (i, job) in self.jobs.iter_mut().enumerate() {
                let mut of_job = round_share;
                while job.next < job.call.questions.len() {
                    let length = job.call.length(job.next);
                    let first_of_job = of_job == round_share;
                    let fits = length <= left && (length <= of_job || first_of_job);
                    // A text longer than the whole budget runs alone.
                    if !fits && !taken.is_empty() {
                        break;
                    }
                    taken.push(Taken { job: i, question: job.next });
                    job.next += 1;
                    left = left.saturating_sub(length);
                    of_job = of_job.saturating_sub(length);
                }
                // What the oldest could not have, the younger must not take for ever.
                if job.next < job.call.questions.len() && left < job.call.length(job.next) {
                    return taken;
                }
            }
        }
        taken
    }

    /// The batch of what was taken: questions by patch, a group a patch.
    fn pack(&self, taken: Vec<Taken>) -> (Arc<Batch>, Vec<Option<Task>>, Vec<Taken>) {
        let live = |t: &Taken| {
            let call = &self.jobs[t.job].call;
            &call.tasks[call.questions[t.question].task]
        };
        let mut order = taken;
        order.sort_by_key(|t| (live(t).id, t.job, t.question));
        let (mut batch, mut groups, mut last) = (Batch::new(), Vec::new(), None);
        for t in &order {
            let live = live(t);
            if last != Some(live.id) {
                groups.push(Some(live.patch.task().clone()));
                last = Some(live.id);
            }
            let text = &self.jobs[t.job].call.questions[t.question].text;
            batch.push(&text.ids, &text.type_ids, groups.len() - 1, DropoutKey::default(), None);
        }
        (Arc::new(batch), groups, order)
    }

    /// Hands a batch's answers to their jobs, and what is complete to those who wait. Jobs stand where they stood when
    /// the batch was taken: others only came behind them.
    fn deliver(&mut self, order: &[Taken], found: Result<Vec<Vec<f32>>>) {
        let found = found.map_err(Arc::new);
        let mut failed = vec![false; self.jobs.len()];
        for (i, t) in order.iter().enumerate() {
            let job = &mut self.jobs[t.job];
            self.tokens -= job.call.length(t.question);
            self.questions -= 1;
            job.unanswered -= 1;
            match &found {
                Ok(rows) => job.answers[t.question].clone_from(&rows[i]),
                Err(_) => failed[t.job] = true,
            }
        }
        for (job, failed) in std::mem::take(&mut self.jobs).into_iter().zip(failed) {
            // Where the receiver has gone, nobody is owed the answer.
            match &found {
                Err(error) if failed => {
                    self.forget(&job);
                    job.reply.send(Err(Refused::Failed(error.clone()))).ok();
                }
                _ if job.unanswered == 0 => {
                    job.reply.send(Ok(job.answers)).ok();
                }
                _ => self.jobs.push_back(job),
            }
        }
    }
}

#[cfg(test)]
mod tests;
