//! From texts to predictions: every route that answers goes through here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

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
}

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
        let mut live = Vec::with_capacity(tasks.len());
        for task in tasks {
            live.push(self.registry.get(task).await?);
        }
        for (i, input) in inputs.iter().enumerate() {
            live.iter().try_for_each(|live| live.patch.check(input, i))?;
        }

        let n_inputs = inputs.len();
        let texts = self.tokenised(&live, inputs).await?;
        let question =
            |task: usize, i: usize| Question { task, text: texts[&live[task].patch.metadata().max_length][i].clone() };
        let questions = (0..live.len()).flat_map(|task| (0..n_inputs).map(move |i| (task, i)));
        let call = Call { tasks: live.clone(), questions: questions.map(|(task, i)| question(task, i)).collect() };
        let found = self.batcher.ask(call, deadline).await.map_err(|refused| self.problem(refused))?;

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

    fn check(&self, tasks: &[TaskName], inputs: &[Input]) -> Result<(), Problem> {
        if tasks.is_empty() {
            return Err(Problem::invalid("tasks: expected at least one, found none"));
        }
        if let Some(twice) = (1..tasks.len()).find(|i| tasks[..*i].contains(&tasks[*i])) {
            return Err(Problem::invalid(format!("tasks: {} is named twice", tasks[twice])));
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

    /// The texts as their tasks read them, by maximum length: once a length, not once a task.
    async fn tokenised(
        &self,
        live: &[Arc<Live>],
        inputs: Vec<Input>,
    ) -> Result<BTreeMap<usize, Vec<Arc<Encoding>>>, Problem> {
        let lengths: Vec<usize> = live.iter().map(|live| live.patch.metadata().max_length).collect();
        let encoder = self.encoder.clone();
        let tokenise = move || tokenise(encoder.base().tokenizer()?, &inputs, lengths);
        // Long texts take milliseconds, in which this thread would serve nobody else.
        let done = tokio::task::spawn_blocking(tokenise).await;
        Ok(done.map_err(|e| Problem::internal(format!("tokenising: {e}")))??)
    }

    fn problem(&self, refused: Refused) -> Problem {
        match refused {
            Refused::Full { after } => Problem::queue_full(after.as_secs_f64().ceil() as u64),
            Refused::Draining => Problem::draining(),
            Refused::Late => Problem::late(self.options.deadline.as_millis()),
            Refused::Failed(error) => Problem::internal(error.to_string()),
        }
    }
}
