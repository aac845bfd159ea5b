//! What the layers above hold of the encoder: a base laid out on a device, the tasks attached to it, and a forward of
//! any mixture of them.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;

use super::in_use::{Attached, BaseBias, InUse};
use super::network::{Network, check_batch};
use super::split_logits;
use super::stages::{self, Stage};
use super::trainer::{Run, Trainer, Training};
use crate::base::base::Base;
use crate::base::config::{Activation as ConfigActivation, Config};
use crate::base::delta::Delta;
use crate::base::parameters::{Parameter, Role, Term};
use crate::device::batch::Batch;
use crate::device::cpu::{Bf16, Cpu, F32, Int8, Precision};
#[cfg(feature = "cuda")]
use crate::device::cuda;
use crate::device::ops::{Activation, Arithmetic, Dropout, MemoryUse, Ops};
use crate::device::{DeviceName, Placement, PrecisionName};
use crate::error::{Error, Result};

/// A base laid out on a device, ready to run. Clones share it; a forward takes it for itself while it runs.
#[derive(Clone)]
pub struct Encoder {
    base: Base,
    precision: PrecisionName,
    engine: Arc<dyn Engine>,
}

/// A task's values, attached to an [`Encoder`]: its biases summed with the base's, and its head. Cheap to clone.
#[derive(Clone)]
pub struct Task {
    values: Arc<dyn Any + Send + Sync>,
    n_outputs: usize,
    alone: bool,
    begins: usize,
    size_bytes: usize,
}

impl Task {
    /// Outputs a sequence: classes, or 1 for a value.
    pub fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// Whether the task has weights of its own (`full`, `random`), so that it runs in batches of its own.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    /// The lowest layer that is not as the base has it, from 0; the number of layers where the head, or the pooler,
    /// alone differs. Tasks share what lies below over equal texts of a batch.
    pub fn begins(&self) -> usize {
        self.begins
    }

    /// What it takes in memory beside the base: its biases and head; the whole model's where it has weights of its own.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }
}

impl Encoder {
    /// Lays a base out on a device.
    ///
    /// # Errors
    ///
    /// Where a tensor cannot be read, or the device cannot be had.
    pub fn new(base: &Base, placement: Placement) -> Result<Self> {
        fn on_cpu<P: Precision>(base: &Base, n_threads: usize) -> Result<Arc<dyn Engine>> {
            let cpu = Cpu::<P>::new(arithmetic(base.config()), n_threads)?;
            Ok(Arc::new(Runtime::new(cpu, base)?))
        }
        #[cfg(feature = "cuda")]
        fn on_card<N: cuda::Numbers>(base: &Base, ordinal: usize) -> Result<Arc<dyn Engine>> {
            let config = base.config();
            let [hidden, intermediate] = [config.hidden_size, config.intermediate_size];
            let card = cuda::Gpu::new(ordinal, N::PRECISION)?;
            let cuda = cuda::Cuda::<_, N>::new(card, arithmetic(config), hidden, intermediate)?;
            Ok(Arc::new(Runtime::new(cuda, base)?))
        }
        placement.check()?;
        let Placement { device, precision, n_threads } = placement;
        let engine = match (device, precision) {
            (DeviceName::Cpu, PrecisionName::F32 | PrecisionName::Tf32) => on_cpu::<F32>(base, n_threads)?,
            (DeviceName::Cpu, PrecisionName::Bf16) => on_cpu::<Bf16>(base, n_threads)?,
            (DeviceName::Cpu, PrecisionName::Int8) => on_cpu::<Int8>(base, n_threads)?,
            #[cfg(feature = "cuda")]
            (DeviceName::Cuda(ordinal), PrecisionName::Tf32) => on_card::<cuda::Tf32>(base, ordinal)?,
            #[cfg(feature = "cuda")]
            (DeviceName::Cuda(ordinal), PrecisionName::Bf16) => on_card::<cuda::Bf16>(base, ordinal)?,
            #[cfg(feature = "cuda")]
            (DeviceName::Cuda(ordinal), _) => on_card::<cuda::F32>(base, ordinal)?,
            #[cfg(not(feature = "cuda"))]
            (DeviceName::Cuda(_), _) => return Err(crate::device::without_cuda()),
        };
        Ok(Encoder { base: base.clone(), precision, engine })
    }

    /// What it computes in.
    pub fn precision(&self) -> PrecisionName {
        self.precision
    }

    /// The base.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// Attaches a task's values.
    ///
    /// # Errors
    ///
    /// Where a tensor is not the base's or has another size.
    pub fn attach(&self, delta: &Delta) -> Result<Task> {
        self.engine.attach(delta)
    }

    /// Runs a batch in which group `g` belongs to `tasks[g]`, dropout off. One row a sequence, in order: the logits of
    /// its task, or the pooled output (H) where the group has none.
    ///
    /// # Errors
    ///
    /// Where a task that runs alone is beside others, a group without a task meets a base without a pooler, a batch
    /// does not fit the base, or the device fails.
    pub fn forward(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<Vec<f32>>> {
        self.check(batch, tasks)?;
        self.engine.forward(batch, tasks)
    }

    /// The hidden states of every token, from the embeddings' output to the last layer's, each (T, H) as candle's
    /// tensor on its CPU, in the order of the packed batch.
    ///
    /// # Errors
    ///
    /// As [`Encoder::forward`].
    pub fn hidden_states(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<Tensor>> {
        self.check(batch, tasks)?;
        let states = self.engine.hidden_states(batch, tasks)?;
        states.into_iter().map(|s| self.tensor(s, batch.n_tokens())).collect()
    }

    /// The pooled output of every sequence (S, H), as candle's tensor on its CPU.
    ///
    /// # Errors
    ///
    /// As [`Encoder::forward`].
    pub fn pooled(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Tensor> {
        self.check(batch, tasks)?;
        self.tensor(self.engine.pooled(batch, tasks)?, batch.n_sequences())
    }

    fn tensor(&self, values: Vec<f32>, rows: usize) -> Result<Tensor> {
        let shape = (rows, self.base.config().hidden_size);
        Tensor::from_vec(values, shape, &candle_core::Device::Cpu).map_err(|e| Error::Device(e.to_string()))
    }

    /// Lays out runs to train together in one step; each is a group. They share this encoder's frozen weights.
    ///
    /// # Errors
    ///
    /// See [`Trainer::new`]; and where the precision is for inference alone.
    pub fn trainer(&self, runs: &[Run]) -> Result<Box<dyn Training>> {
        self.trainer_within(runs, None)
    }

    /// As [`Encoder::trainer`], where the activations of a step take at most so many bytes: layers are computed again
    /// on the way back as needed, to the same bits. A batch that does not fit even so is an error of its step.
    ///
    /// # Errors
    ///
    /// As [`Encoder::trainer`], and where a run trains weights.
    pub fn trainer_within(&self, runs: &[Run], memory_budget: Option<usize>) -> Result<Box<dyn Training>> {
        if self.precision == PrecisionName::Int8 {
            return Err(Error::Usage("int8 is for inference: train in f32 or bf16".into()));
        }
        self.engine.trainer(runs, memory_budget)
    }

    /// Lays out what training reads and inference does not; without this the first training step does.
    pub fn prepare_training(&self) {
        self.engine.prepare_training();
    }

    /// SHA-256 over the frozen weights as they are laid out.
    pub fn weights_hash(&self) -> String {
        self.engine.weights_hash()
    }

    /// What of the device's own memory is in use; `None` on the CPU, which has none of its own.
    pub fn memory(&self) -> Option<MemoryUse> {
        self.engine.memory()
    }

    fn check(&self, batch: &Batch, tasks: &[Option<Task>]) -> Result<()> {
        if batch.n_groups() > tasks.len() {
            return Err(Error::setting("tasks of a batch", format!("{}", batch.n_groups()), tasks.len()));
        }
        if tasks.len() > 1 && tasks.iter().flatten().any(Task::is_alone) {
            return Err(Error::Usage("a task with weights of its own runs in batches of its own".into()));
        }
        if !self.base.has_pooler() && tasks.iter().any(Option::is_none) {
            let id = self.base.id();
            return Err(Error::Usage(format!("base {id} has no pooler, so it has no output without a task's patch")));
        }
        check_batch(self.base.config(), batch)
    }
}

/// The arithmetic of a config.
pub(super) fn arithmetic(config: &Config) -> Arithmetic {
    Arithmetic {
        n_heads: config.num_attention_heads,
        layer_norm_eps: config.layer_norm_eps,
        activation: match config.hidden_act {
            ConfigActivation::Gelu => Activation::Gelu,
            ConfigActivation::GeluTanh => Activation::GeluTanh,
            ConfigActivation::Relu => Activation::Relu,
        },
    }
}

/// An encoder on some device.
pub(super) trait Engine: Send + Sync {
    fn attach(&self, delta: &Delta) -> Result<Task>;
    fn forward(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<Vec<f32>>>;
    fn hidden_states(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<Vec<f32>>>;
    fn pooled(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<f32>>;
    fn trainer(&self, runs: &[Run], memory_budget: Option<usize>) -> Result<Box<dyn Training>>;
    fn prepare_training(&self);
    fn weights_hash(&self) -> String;
    fn memory(&self) -> Option<MemoryUse>;
}

/// A base on a device.
pub(super) struct Runtime<D: Ops> {
    base: Base,
    network: Network<D>,
    biases: Vec<BaseBias>,
    context: Mutex<D>,
    /// For what is laid out while a forward runs: tasks are attached without waiting for one.
    beside: Mutex<D>,
}

impl<D: Ops> Runtime<D> {
    pub(super) fn new(mut context: D, base: &Base) -> Result<Self> {
        let network = context.run(|d| Network::load(d, base))?;
        context.finish()?;
        context.settle();
        let mut biases = Vec::new();
        for p in base.parameters() {
            if let Role::Bias(term) = p.role {
                let values = base.tensor(&p.name)?;
                biases.push(BaseBias { name: p.name.clone(), term, layer: p.layer, values });
            }
        }
        let beside = Mutex::new(context.fork());
        Ok(Runtime { base: base.clone(), network, biases, context: Mutex::new(context), beside })
    }

    fn context(&self) -> MutexGuard<'_, D> {
        // A context begins every pass anew, so one that a panic left behind is as good as new.
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lays something out beside a forward that may run.
    fn lay_out<T: Send>(&self, f: impl FnOnce(&mut D) -> T + Send) -> Result<T> {
        let mut d = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
        let laid_out = d.run(f);
        d.finish()?;
        Ok(laid_out)
    }

    /// A trainer over this network.
    pub(super) fn train(&self, runs: &[Run], memory_budget: Option<usize>) -> Result<Trainer<D>> {
        let context = self.context().fork();
        Trainer::new(context, &self.base, &self.network, runs, memory_budget)
    }

    fn in_use<'t>(&'t self, tasks: impl IntoIterator<Item = Option<&'t Task>>) -> Result<InUse<'t, D>> {
        let attached = |task: Option<&'t Task>| -> Result<Option<&'t Attached<D>>> {
            let Some(task) = task else { return Ok(None) };
            let foreign = || Error::Usage("a task was attached to an encoder on another device".into());
            task.values.downcast_ref().map(Some).ok_or_else(foreign)
        };
        let tasks = tasks.into_iter().map(attached).collect::<Result<_>>()?;
        Ok(InUse::new(&self.base, &self.network, &self.biases, tasks))
    }
}

impl<D: Ops> Engine for Runtime<D> {
    fn attach(&self, delta: &Delta) -> Result<Task> {
        let config = self.base.config();
        let h = config.hidden_size;
        let head = delta.head.clone();
        check_len("classifier.weight", head.n_outputs * h, head.weight.len())?;
        check_len("classifier.bias", head.n_outputs, head.bias.len())?;
        let pooler = match (self.base.has_pooler(), &head.pooler) {
            (true, None) => None,
            (false, Some((weight, bias))) => {
                check_len("pooler.dense.weight", h * h, weight.len())?;
                check_len("pooler.dense.bias", h, bias.len())?;
                Some(Arc::new(self.lay_out(|d| d.weight(h, h, weight.clone()))?))
            }
            (true, Some(_)) => return Err(Error::setting("head", "no pooler: the base has one to share", "a pooler")),
            (false, None) => return Err(Error::setting("head", "a pooler: the base has none", "no pooler")),
        };
        let mut biases: Vec<Vec<f32>> = self.biases.iter().map(|b| b.values.clone()).collect();
        let mut network: Option<Network<D>> = None;
        for (name, change) in &delta.changes {
            if let Some(i) = self.biases.iter().position(|b| &b.name == name) {
                change.add_to(name, &mut biases[i])?;
                continue;
            }
            let unknown = || Error::setting("tensor of a patch", "a tensor of the base", format_args!("`{name}`"));
            let p = self.base.parameters().iter().find(|p| &p.name == name).ok_or_else(unknown)?;
            let mut values = self.base.tensor(name)?;
            change.add_to(name, &mut values)?;
            let own = network.get_or_insert_with(|| self.network.clone());
            self.lay_out(|d| own.replace(d, p, values))?;
        }
        let (n_outputs, alone) = (head.n_outputs, network.is_some());
        let changed = |p: &&Parameter| delta.changes.contains_key(&p.name);
        let begins = self.base.parameters().iter().filter(changed).map(|p| begins(p, config.num_hidden_layers)).min();
        let begins = begins.unwrap_or(config.num_hidden_layers);
        let of_head =
            head.weight.len() + head.bias.len() + head.pooler.as_ref().map_or(0, |(w, b)| 2 * w.len() + b.len());
        let of_network =
            if alone { self.base.parameters().iter().map(|p| p.shape.iter().product::<usize>()).sum() } else { 0 };
        let n_values = biases.iter().map(Vec::len).sum::<usize>() + of_head + of_network;
        let values = Arc::new(Attached { biases, head, pooler, network });
        Ok(Task { values, n_outputs, alone, begins, size_bytes: n_values * size_of::<f32>() })
    }

    fn forward(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<Vec<f32>>> {
        let n_layers = self.base.config().num_hidden_layers;
        let begins: Vec<usize> = tasks.iter().map(|t| t.as_ref().map_or(n_layers, Task::begins)).collect();
        let stages = stages::plan(batch, &begins, n_layers);
        let of_stage = |stage: &Stage| self.in_use(stage.groups.iter().map(|g| g.and_then(|g| tasks[g].as_ref())));
        let in_use: Vec<InUse<D>> = stages.iter().map(of_stage).collect::<Result<_>>()?;
        let bare = tasks.iter().any(Option::is_none);
        let mut d = self.context();
        let (logits, pooled) = d.run(|d| {
            d.begin(stages[0].batch.clone(), Dropout::NONE);
            let mut x = in_use[0].embed(d);
            for (stage, in_use) in stages.iter().zip(&in_use) {
                if !stage.from.is_empty() {
                    x = d.branch(x, stage.batch.clone(), &stage.from);
                }
                x = in_use.layers(d, stage.layers.clone(), x, true, |_, _| ());
            }
            // The last stage is the batch itself.
            let in_use = &in_use[in_use.len() - 1];
            let pooled = in_use.pooled(d, &x);
            let logits = in_use.classifier(d).map(|classifier| {
                let logits = d.classify(&pooled, &classifier);
                (d.read_rows(&logits), classifier.n_outputs)
            });
            (logits, bare.then(|| d.read_act(&pooled)))
        });
        d.finish()?;
        let mut rows = match logits {
            Some((logits, n_outputs)) => split_logits(&logits, batch, &n_outputs),
            None => vec![Vec::new(); batch.n_sequences()],
        };
        if let Some(pooled) = pooled {
            let of_sequence = pooled.chunks(self.base.config().hidden_size);
            for ((row, pooled), g) in rows.iter_mut().zip(of_sequence).zip(batch.groups()) {
                if tasks[*g].is_none() {
                    *row = pooled.to_vec();
                }
            }
        }
        Ok(rows)
    }

    fn hidden_states(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<Vec<f32>>> {
        let mut d = self.context();
        let in_use = self.in_use(tasks.iter().map(Option::as_ref))?;
        let mut states = Vec::new();
        d.run(|d| {
            d.begin(batch.clone(), Dropout::NONE);
            let x = in_use.embed(d);
            states.push(d.read_stream(&x));
            let layers = 0..self.network.layers.len();
            in_use.layers(d, layers, x, false, |d, state| states.push(d.read_stream(state)));
        });
        d.finish()?;
        Ok(states)
    }

    fn pooled(&self, batch: &Arc<Batch>, tasks: &[Option<Task>]) -> Result<Vec<f32>> {
        let mut d = self.context();
        let in_use = self.in_use(tasks.iter().map(Option::as_ref))?;
        let pooled = d.run(|d| {
            d.begin(batch.clone(), Dropout::NONE);
            let x = in_use.embed(d);
            let first = in_use.layers(d, 0..self.network.layers.len(), x, true, |_, _| ());
            let pooled = in_use.pooled(d, &first);
            d.read_act(&pooled)
        });
        d.finish()?;
        Ok(pooled)
    }

    fn trainer(&self, runs: &[Run], memory_budget: Option<usize>) -> Result<Box<dyn Training>> {
        Ok(Box::new(self.train(runs, memory_budget)?))
    }

    fn prepare_training(&self) {
        self.context().run(|d| {
            self.network.prepare_backward(d);
            d.settle();
        });
    }

    fn weights_hash(&self) -> String {
        self.network.hash(&*self.context())
    }

    fn memory(&self) -> Option<MemoryUse> {
        self.context().memory()
    }
}

/// The lowest layer whose output a change of `p` changes.
fn begins(p: &Parameter, n_layers: usize) -> usize {
    match p.role {
        Role::Bias(Term::Pooler) | Role::Matrix(Term::Pooler) => n_layers,
        _ => p.layer.unwrap_or(0),
    }
}

fn check_len(tensor: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::setting(tensor, format!("{expected} values"), found))
}
