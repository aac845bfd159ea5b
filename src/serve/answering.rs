//! From texts to predictions: every route that answers goes through here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;

use super::batcher::{Batcher, Call, Question, Refused};
use super::name::TaskName;
use super::options::Options;
use super::problem::Problem;
use super::registry::{Live, Registry};
use crate::base::tokenizer::Encoding;
use crate::encoder::Encoder;
use crate::predict::{Input, Prediction, tokenise};

/// What answers texts, and what limits it.
pub(super) struct Answering {
    pub encoder: Encoder,
    pub registry: Arc<Registry>,
    pub batcher: Batcher,
    pub options: Options,
    /// A place a core: more at once would only take the processor from the encoder.
    pub tokenising: Semaphore,
}

/// Texts as tasks read them, by maximum length.
type Texts = BTreeMap<usize, Vec<Arc<Encoding>>>;

/// A task's answers to a request's texts.
pub(super) struct Answered {
    pub live: Arc<Live>,
    /// One a text, in order.
    pub predictions: Vec<Prediction>,
    /// The numbers that the predictions were made from.
    pub logits: Vec<Vec<f32>>,
}

impl Answering {
    /// Answers every text with every task, each in the order given. All of it waits in one batch or several beside
    /// whatever else is asked; the tasks' versions are those of now.
    ///
    /// # Errors
    ///
    /// Where a task is unknown, a text is none that a task can answer, a limit is passed, or there is no answer in
    /// time: nothing is answered then.
    pub(super) async fn answer(
        &self,
        tasks: &[TaskName],
        inputs: Vec<Input>,
        deadline: Instant,
    ) -> Result<Vec<Answered>, Problem> {
        self.check(tasks, &inputs)?;
        let n_inputs = inputs.len();
        // What will not find room is not loaded and tokenised for, which would take the processor from what has.
        self.batcher.check_room(tasks.len() * n_inputs).map_err(Self::problem)?;
        let ready = tokio::time::timeout_at(deadline.into(), self.ready(tasks, inputs)).await;
        let (live, texts) = ready.map_err(|_| Problem::late())??;
        let question =
            |task: usize, i: usize| Question { task, text: texts[&live[task].patch.metadata().max_length][i].clone() };
        let questions = (0..live.len()).flat_map(|task| (0..n_inputs).map(move |i| (task, i)));
        let call = Call { tasks: live.clone(), questions: questions.map(|(task, i)| question(task, i)).collect() };
        let found = self.batcher.ask(call, deadline).await.map_err(Self::problem)?;

        let mut of_task = found.into_iter();
        let mut answered = Vec::with_capacity(live.len());
        for live in live {
            let logits: Vec<Vec<f32>> = of_task.by_ref().take(n_inputs).collect();
            let precision = self.encoder.precision();
            let of = logits.iter().enumerate().map(|(i, z)| live.patch.prediction(z, precision, i));
            let predictions = of.collect::<Result<_, _>>()?;
            answered.push(Answered { live, predictions, logits });
        }
        Ok(answered)
    }

    /// The tasks' versions of now, and the texts as these read them.
    async fn ready(&self, tasks: &[TaskName], inputs: Vec<Input>) -> Result<(Vec<Arc<Live>>, Texts), Problem> {
        let mut live = Vec::with_capacity(tasks.len());
        for task in tasks {
            live.push(self.registry.get(task).await?);
        }
        for (i, input) in inputs.iter().enumerate() {
            live.iter().try_for_each(|live| live.patch.check(input, i))?;
        }
        let texts = self.tokenised(&live, inputs).await?;
        Ok((live, texts))
    }

    fn check(&self, tasks: &[TaskName], inputs: &[Input]) -> Result<(), Problem> {
        if tasks.is_empty() {
            return Err(Problem::invalid("tasks: expected at least one, found none"));
        }
        if inputs.is_empty() {
            return Err(Problem::invalid("inputs: expected at least one text, found none"));
        }
        let most = self.options.max_inputs;
        if inputs.len() > most {
            return Err(Problem::too_large(format!("inputs: expected at most {most}, found {}", inputs.len())));
        }
        let questions = inputs.len().saturating_mul(tasks.len());
        if questions > self.batcher.capacity() {
            let message = format!("expected at most {} texts times tasks, found {questions}", self.batcher.capacity());
            return Err(Problem::too_large(message));
        }
        let mut named = BTreeSet::new();
        if let Some(twice) = tasks.iter().find(|task| !named.insert(*task)) {
            return Err(Problem::invalid(format!("tasks: {twice} is named twice")));
        }
        let most = self.options.max_text;
        for (i, input) in inputs.iter().enumerate() {
            input.check(i)?;
            let bytes = input.text.len() + input.text_pair.as_ref().map_or(0, String::len);
            if bytes > most {
                return Err(Problem::too_large(format!(
                    "input {}: expected at most {most} bytes of text, found {bytes}",
                    i + 1
                )));
            }
        }
        Ok(())
    }

    /// The texts as their tasks read them: once a length, not once a task.
    async fn tokenised(&self, live: &[Arc<Live>], inputs: Vec<Input>) -> Result<Texts, Problem> {
        let lengths: Vec<usize> = live.iter().map(|live| live.patch.metadata().max_length).collect();
        let encoder = self.encoder.clone();
        let tokenise = move || tokenise(encoder.base().tokenizer()?, &inputs, lengths);
        let closed = |_| Problem::internal("no text can be tokenised");
        let _one_of_few = self.tokenising.acquire().await.map_err(closed)?;
        // Long texts take milliseconds, in which this thread would serve nobody else.
        let done = tokio::task::spawn_blocking(tokenise).await;
        Ok(done.map_err(|e| Problem::internal(format!("tokenising: {e}")))??)
    }

    fn problem(refused: Refused) -> Problem {
        match refused {
            Refused::Full { after } => Problem::queue_full(after.as_secs_f64().ceil() as u64),
            Refused::Draining => Problem::draining(),
            Refused::Late => Problem::late(),
            Refused::Failed(error) => Problem::internal(error.to_string()),
        }
    }
}
