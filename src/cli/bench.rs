//! `bitfit bench`: what a step of training, or a forward pass, costs on this machine.
//!
//! Training is measured through the step that `train` takes, dropout, clipping and AdamW included; a forward pass
//! through the one that predictions take. Tokens are random and every sequence has full length, so nothing is packed
//! away.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bitfit::base::{Base, BaseSpec, Config};
use bitfit::data::Sequence;
use bitfit::device::batch::{Batch, DropoutKey, Target};
use bitfit::device::{DeviceName, Placement, PrecisionName};
use bitfit::encoder::Encoder;
use bitfit::patch::{Method, Selection, parse_layers, parse_terms};
use bitfit::train::{Options, Progress, start, step};
use bitfit::{Error, Result};
use serde_json::json;

use super::args::{DeviceArgs, parse_size, refuse};
use super::output::say;

/// Steps that are not counted: they fill the pool of buffers and the caches.
const WARM_UP: usize = 3;
/// Tokens of the shortest text that trains: [CLS], one, [SEP].
const MIN_LENGTH: usize = 3;
/// Bytes in a megabyte, as Linux and the PyTorch yardstick count them.
const MB: f64 = 1024.0 * 1024.0;

/// Flags of `bitfit bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// minilm, base or large with random weights, or a BASE: a folder or hub id
    #[arg(long, value_name = "SHAPE", default_value = "minilm")]
    shape: String,
    /// What is measured: bitfit, full, frozen, random or forward
    #[arg(long, value_name = "METHOD", default_value = "bitfit")]
    method: String,
    /// Sequences a batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, value_name = "N", default_value_t = 128)]
    length: usize,
    /// Train these bias terms alone, and the pooler's (comma-separated)
    #[arg(long, value_name = "LIST")]
    terms: Option<String>,
    /// Train these layers alone: from 0, B excluded
    #[arg(long, value_name = "A..B")]
    layers: Option<String>,
    /// Split the batch among this many tasks; several counts (comma-separated) are measured step by step in turn
    #[arg(long, value_name = "K[,K..]", value_delimiter = ',', default_value = "1")]
    tasks: Vec<usize>,
    /// Dropout at every place [default: what the base's config says, 0.1]
    #[arg(long, value_name = "P")]
    dropout: Option<f32>,
    /// The most memory that a training step's activations take, as in `train`
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
    /// Steps that are counted, after 3 that are not; their median is shown
    #[arg(long, value_name = "N", default_value_t = 7)]
    steps: usize,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What is measured.
enum Work {
    Forward,
    Train(Selection),
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let work = args.work()?;
    let placement = match work {
        Work::Forward => args.device.check()?,
        Work::Train(_) => args.device.check_training()?,
    };
    let Placement { device, precision, n_threads } = placement;
    let base = args.base()?;
    check_range("--length", args.length, base.config().max_position_embeddings)?;
    let encoder = args.device.encoder(&base)?;
    if matches!(work, Work::Train(_)) {
        encoder.prepare_training();
    }
    // What is resident now is the model; what comes on top is the step's.
    let resident = match encoder.memory() {
        Some(memory) => Some(memory.taken as f64),
        None => memory("VmRSS:"),
    };
    let counted_from_here = encoder.memory().is_some() || reset_peak();
    let steps = args.tasks.iter().map(|k| args.step(&encoder, &work, *k)).collect::<Result<Vec<_>>>()?;
    let times = args.timed(steps)?;
    let peak = match encoder.memory() {
        Some(memory) => Some(memory.peak as f64),
        None => memory("VmHWM:"),
    };

    let operations = |whole| operations(base.config(), args.batch, args.length, whole, &work);
    let threads = if n_threads == 0 { std::thread::available_parallelism()?.get() } else { n_threads };
    let most = Placement { n_threads: threads, ..placement }.peak()?;
    let found = Found {
        step_s: median(times[0].clone()),
        tokens: (args.batch * args.length) as f64,
        operations: operations(true),
        done: operations(false),
        // What the way back leaves out where a part of the terms or layers trains is not counted.
        most: most.filter(|_| args.terms.is_none() && args.layers.is_none()),
        model: resident,
        // Several counts lie beside each other: the sum says nothing of one.
        over_model: peak.zip(resident).filter(|_| times.len() == 1).map(|(peak, resident)| (peak - resident).max(0.0)),
        peak,
        paired: args.tasks.iter().zip(&times).map(|(k, own)| Paired::of(*k, own, &times[0])).collect(),
    };
    let path = placement.describe()?;
    if args.json {
        let mut json = json!({
            "shape": args.shape,
            "method": args.method,
            "batch": args.batch,
            "length": args.length,
            "threads": threads,
            "precision": precision.to_string(),
            "device": device.to_string(),
            "processor": processor(),
            "path": path,
            "steps": args.steps,
            "peak_since_loading": counted_from_here,
        });
        found.write(&mut json);
        say!("{json}");
    } else {
        let Args { shape, method, batch, length, steps, .. } = &args;
        match device {
            DeviceName::Cpu => {
                say!("{shape} {method}, {batch} x {length} tokens, {precision}, {threads} threads");
                say!("{}, by {path}", processor());
            }
            DeviceName::Cuda(_) => {
                say!("{shape} {method}, {batch} x {length} tokens, {precision}, {device}");
                say!("{path}");
            }
        }
        say!("");
        found.show(*steps)?;
    }
    Ok(())
}

/// What was measured, in seconds, operations and bytes.
struct Found {
    step_s: f64,
    tokens: f64,
    /// As others count them, the last layer whole.
    operations: f64,
    /// What is left of them where the last layer is short.
    done: f64,
    /// Operations a second that the device can do at most.
    most: Option<f64>,
    model: Option<f64>,
    peak: Option<f64>,
    over_model: Option<f64>,
    paired: Vec<Paired>,
}

impl Found {
    fn per_second(&self) -> f64 {
        self.operations / self.step_s
    }

    /// Of what the device can do at most, by the operations that are done.
    fn share(&self) -> Option<f64> {
        self.most.map(|most| self.done / self.step_s / most)
    }

    fn write(&self, json: &mut serde_json::Value) {
        let mb = |bytes: Option<f64>| bytes.map(|bytes| (bytes / MB).round());
        let values = json!({
            "step_s": self.step_s,
            "tokens_per_s": self.tokens / self.step_s,
            "gflops": self.per_second() / 1e9,
            "peak_gflops": self.most.map(|most| most / 1e9),
            "share_of_peak": self.share(),
            "model_mb": mb(self.model),
            "peak_mb": mb(self.peak),
            "peak_over_model_mb": mb(self.over_model),
            "tasks": self.paired.iter().map(Paired::json).collect::<Vec<_>>(),
        });
        if let (Some(to), serde_json::Value::Object(values)) = (json.as_object_mut(), values) {
            to.extend(values);
        }
    }

    fn show(&self, steps: usize) -> anyhow::Result<()> {
        say!("  {:<24}{:>10.4} s (median of {steps})", "a step", self.step_s);
        say!("  {:<24}{:>10.0}", "tokens a second", self.tokens / self.step_s);
        say!("  {:<24}{:>10.1}", "GFLOP/s", self.per_second() / 1e9);
        if let (Some(share), Some(most)) = (self.share(), self.most) {
            let share = 100.0 * share;
            say!("  {:<24}{share:>10.0} % of {:.0} GFLOP/s, the short last layer as it is", "of the peak", most / 1e9);
        }
        if let (Some(model), Some(over_model)) = (self.model, self.over_model) {
            say!("  {:<24}{:>10.0} MB", "the model", model / MB);
            say!("  {:<24}{:>10.0} MB", "peak over the model", over_model / MB);
        }
        for paired in &self.paired[1..] {
            let Paired { tasks, step_s, ratio, interval } = paired;
            let name = if *tasks == 1 { "1 task".to_string() } else { format!("{tasks} tasks") };
            say!("  {name:<24}{step_s:>10.4} s, {ratio:.3} ({:.3}..{:.3}) of the first", interval.0, interval.1);
        }
        Ok(())
    }
}

/// One count of tasks beside the first, step by step.
struct Paired {
    tasks: usize,
    step_s: f64,
    /// The median of its steps' ratios to the first count's.
    ratio: f64,
    /// The 5th and 95th percentile of those ratios.
    interval: (f64, f64),
}

impl Paired {
    fn of(tasks: usize, own: &[f64], first: &[f64]) -> Self {
        let mut ratios: Vec<f64> = own.iter().zip(first).map(|(own, first)| own / first).collect();
        ratios.sort_by(f64::total_cmp);
        let at = |share: f64| ratios[((ratios.len() - 1) as f64 * share).round() as usize];
        Paired { tasks, step_s: median(own.to_vec()), ratio: median(ratios.clone()), interval: (at(0.05), at(0.95)) }
    }

    fn json(&self) -> serde_json::Value {
        json!({"tasks": self.tasks, "step_s": self.step_s, "ratio": self.ratio, "interval": [self.interval.0, self.interval.1]})
    }
}

/// A step of one count of tasks.
type Step<'e> = Box<dyn FnMut() -> Result<()> + 'e>;

impl Args {
    fn work(&self) -> Result<Work> {
        check_range("--batch", self.batch, 1 << 16)?;
        check_range("--length", self.length, 1 << 16)?;
        check_range("--steps", self.steps, 1 << 20)?;
        for k in &self.tasks {
            check_range("--tasks", *k, self.batch)?;
        }
        if self.method == "forward" {
            let of_training = [
                ("--terms", self.terms.is_some()),
                ("--layers", self.layers.is_some()),
                ("--dropout", self.dropout.is_some()),
                ("--memory-budget", self.memory_budget.is_some()),
            ];
            refuse("a --method that trains", &of_training)?;
            return Ok(Work::Forward);
        }
        if self.device.check()?.precision == PrecisionName::Int8 {
            let expected = "f32 or bf16 for a step that trains; int8 goes with --method forward";
            return Err(Error::setting("--precision", expected, "`int8`"));
        }
        if self.length < MIN_LENGTH {
            let expected = format!("at least {MIN_LENGTH} for a step that trains");
            return Err(Error::setting("--length", expected, self.length));
        }
        self.memory_budget.as_deref().map(|text| parse_size("--memory-budget", text)).transpose()?;
        let method: Method = self.method.parse().map_err(|_| {
            Error::setting("--method", "bitfit, full, frozen, random or forward", format_args!("`{}`", self.method))
        })?;
        Ok(Work::Train(Selection {
            terms: self.terms.as_deref().map(parse_terms).transpose()?,
            layers: self.layers.as_deref().map(parse_layers).transpose()?,
            ..Selection::new(method)
        }))
    }

    fn base(&self) -> Result<Base> {
        let config = match self.shape.as_str() {
            "minilm" => Config::minilm(),
            "base" => Config::base(),
            "large" => Config::large(),
            other => return Base::load(&BaseSpec::resolve(Some(other))?),
        };
        Ok(Base::random(config, 0))
    }

    /// Sequences of random tokens: the same at each call, spread over the vocabulary by a linear congruence.
    fn sequences(&self, config: &Config) -> Vec<Sequence> {
        let vocabulary = config.vocab_size as u64;
        let of = |s: usize| {
            let token = |i: usize| ((s * self.length + i) as u64 * 7919 + 1013) % vocabulary;
            Sequence {
                ids: (0..self.length).map(|i| token(i) as u32).collect(),
                type_ids: vec![0; self.length],
                target: Some(Target::Class((s % 2) as u32)),
            }
        };
        (0..self.batch).map(of).collect()
    }

    /// A step in which the batch is split among `tasks` tasks, as evenly as it goes.
    fn step<'e>(&self, encoder: &'e Encoder, work: &Work, tasks: usize) -> Result<Step<'e>> {
        let rows = |g: usize| self.batch * g / tasks..self.batch * (g + 1) / tasks;
        let base = encoder.base();
        let sequences = self.sequences(base.config());
        let Work::Train(selection) = work else {
            let run = start(base, &Selection::new(Method::Frozen), 2, 0)?;
            let attached = (0..tasks).map(|_| encoder.attach(&run.start).map(Some)).collect::<Result<Vec<_>>>()?;
            let mut batch = Batch::new();
            for g in 0..tasks {
                for s in &sequences[rows(g)] {
                    batch.push(&s.ids, &s.type_ids, g, DropoutKey::default(), None);
                }
            }
            let batch = Arc::new(batch);
            return Ok(Box::new(move || encoder.forward(&batch, &attached).map(drop)));
        };
        let mut runs = Vec::with_capacity(tasks);
        let mut progress = Vec::with_capacity(tasks);
        for g in 0..tasks {
            let options = Options {
                selection: selection.clone(),
                batch_size: rows(g).len(),
                max_steps: Some((WARM_UP + self.steps) as u64),
                max_length: Some(self.length),
                dropout: self.dropout,
                seed: g as u64,
                ..Options::default()
            };
            let config = options.check(base)?;
            runs.push(start(base, &config.selection, 2, config.seed)?);
            progress.push(Progress::new(&config, sequences[rows(g)].to_vec(), 0)?);
        }
        let memory_budget =
            self.memory_budget.as_deref().map(|text| parse_size("--memory-budget", text)).transpose()?;
        let mut trainer = encoder.trainer_within(&runs, memory_budget)?;
        Ok(Box::new(move || step(&mut *trainer, &mut progress).map(drop)))
    }

    /// The seconds of each step of each count of tasks, in turn.
    fn timed(&self, mut steps: Vec<Step<'_>>) -> Result<Vec<Vec<f64>>> {
        let mut times = vec![Vec::with_capacity(self.steps); steps.len()];
        for i in 0..WARM_UP + self.steps {
            for (step, times) in steps.iter_mut().zip(&mut times) {
                let began = Instant::now();
                step()?;
                if i >= WARM_UP {
                    times.push(began.elapsed().as_secs_f64());
                }
            }
        }
        Ok(times)
    }
}

fn check_range(flag: &str, found: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&found) { Ok(()) } else { Err(Error::setting(flag, format!("1 to {most}"), found)) }
}

/// The middle one, or the mean of the middle two.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let n = times.len();
    (times[(n - 1) / 2] + times[n / 2]) / 2.0
}

/// Floating-point operations of a step: products and attention of a forward, twice where the way back goes through the
/// layers, three times where weights train too. With `whole`, the last layer is counted for every token, as others
/// compute it, so that figures compare; else as it is: all but keys and values for one token a sequence.
fn operations(config: &Config, batch: usize, length: usize, whole: bool, work: &Work) -> f64 {
    let [s, l, h, i] = [batch, length, config.hidden_size, config.intermediate_size].map(|n| n as f64);
    let layer = |rows: f64| 2.0 * rows * (2.0 * h * h + 2.0 * h * i) + 4.0 * rows * l * h + 2.0 * s * l * 2.0 * h * h;
    let last = layer(if whole { s * l } else { s });
    let forward = (config.num_hidden_layers as f64 - 1.0) * layer(s * l) + last;
    forward
        * match work {
            Work::Forward => 1.0,
            Work::Train(selection) => match selection.method {
                Method::Frozen => 1.0,
                Method::Bitfit | Method::Random => 2.0,
                Method::Full => 3.0,
            },
        }
}

/// A figure of this process's memory in bytes, where the system tells it (Linux).
fn memory(key: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kb| kb * 1024.0)
}

/// Makes the peak count from here on; false where the system does not allow it, and loading's own peak then counts.
fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The processor's name and the widest vector instructions that its flags tell.
fn processor() -> String {
    let info = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let flags: Vec<&str> = field("flags").split_whitespace().collect();
    let widest = [("avx512_bf16", "AVX-512 with bf16"), ("avx512f", "AVX-512"), ("avx2", "AVX2")];
    let widest = widest.iter().find(|(flag, _)| flags.contains(flag)).map_or("no AVX2", |(_, name)| name);
    match field("model name") {
        "" => std::env::consts::ARCH.to_string(),
        name => format!("{name} ({widest})"),
    }
}
