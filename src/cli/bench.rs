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
use bitfit::device::Placement;
use bitfit::device::batch::{Batch, DropoutKey, Target};
use bitfit::device::cpu::Arch;
use bitfit::encoder::Encoder;
use bitfit::patch::{Method, Selection, parse_layers, parse_terms};
use bitfit::train::{Options, Progress, start, step};
use bitfit::{Error, Result};
use serde_json::json;

use super::args::DeviceArgs;
use super::output::say;

/// Steps that are not counted: they fill the pool of buffers and the caches.
const WARM_UP: usize = 3;
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
    /// Dropout at every place [default: what the base's config says, 0.1]
    #[arg(long, value_name = "P")]
    dropout: Option<f32>,
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
    let Placement { precision, n_threads, .. } = match work {
        Work::Forward => args.device.check()?,
        Work::Train(_) => args.device.check_training()?,
    };
    let base = args.base()?;
    check_range("--length", args.length, base.config().max_position_embeddings)?;
    let encoder = args.device.encoder(&base)?;
    if matches!(work, Work::Train(_)) {
        encoder.prepare_training();
    }
    // What is resident now is the model; what comes on top is the step's.
    let resident = memory("VmRSS:");
    let counted_from_here = reset_peak();
    let times = match &work {
        Work::Forward => args.forward(&encoder)?,
        Work::Train(selection) => args.train(&encoder, selection)?,
    };
    let peak = memory("VmHWM:");

    let step_s = median(times);
    let tokens = args.batch * args.length;
    let gflops = operations(base.config(), tokens, args.length, &work) / step_s / 1e9;
    let over = |peak: f64, resident: f64| ((peak - resident) / MB).max(0.0);
    let mb = |bytes: Option<f64>| bytes.map(|bytes| (bytes / MB).round());
    let over_model = peak.zip(resident).map(|(peak, resident)| over(peak, resident).round());
    let threads = if n_threads == 0 { std::thread::available_parallelism()?.get() } else { n_threads };
    let found = json!({
        "shape": args.shape,
        "method": args.method,
        "batch": args.batch,
        "length": args.length,
        "threads": threads,
        "precision": precision.to_string(),
        "processor": processor(),
        "path": Arch::chosen()?.name(),
        "steps": args.steps,
        "step_s": step_s,
        "tokens_per_s": tokens as f64 / step_s,
        "gflops": gflops,
        "model_mb": mb(resident),
        "peak_mb": mb(peak),
        "peak_over_model_mb": over_model,
        "peak_since_loading": counted_from_here,
    });
    if args.json {
        say!("{found}");
        return Ok(());
    }
    say!("{} {}, {} x {} tokens, {precision}, {threads} threads", args.shape, args.method, args.batch, args.length);
    say!("{}, by {}", processor(), Arch::chosen()?.name());
    say!("");
    say!("  {:<24}{step_s:>10.4} s (median of {})", "a step", args.steps);
    say!("  {:<24}{:>10.0}", "tokens a second", tokens as f64 / step_s);
    say!("  {:<24}{gflops:>10.1}", "GFLOP/s");
    if let (Some(resident), Some(over_model)) = (resident, over_model) {
        say!("  {:<24}{:>10.0} MB", "the model", resident / MB);
        say!("  {:<24}{over_model:>10.0} MB", "peak over the model");
    }
    Ok(())
}

impl Args {
    fn work(&self) -> Result<Work> {
        check_range("--batch", self.batch, 1 << 16)?;
        check_range("--length", self.length, 1 << 16)?;
        check_range("--steps", self.steps, 1 << 20)?;
        if self.method == "forward" {
            if self.terms.is_some() || self.layers.is_some() || self.dropout.is_some() {
                let message = "--terms, --layers and --dropout are of training; a forward pass has none";
                return Err(Error::Usage(message.into()));
            }
            return Ok(Work::Forward);
        }
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

    fn train(&self, encoder: &Encoder, selection: &Selection) -> Result<Vec<f64>> {
        let base = encoder.base();
        let options = Options {
            selection: selection.clone(),
            batch_size: self.batch,
            max_steps: Some((WARM_UP + self.steps) as u64),
            max_length: Some(self.length),
            dropout: self.dropout,
            ..Options::default()
        };
        let config = options.check(base)?;
        let run = start(base, &config.selection, 2, config.seed)?;
        let mut trainer = encoder.trainer(std::slice::from_ref(&run))?;
        let mut progress = [Progress::new(&config, self.sequences(base.config()), 0)?];
        self.timed(|| step(&mut *trainer, &mut progress).map(drop))
    }

    fn forward(&self, encoder: &Encoder) -> Result<Vec<f64>> {
        let base = encoder.base();
        let run = start(base, &Selection::new(Method::Frozen), 2, 0)?;
        let task = [Some(encoder.attach(&run.start)?)];
        let mut batch = Batch::new();
        for s in self.sequences(base.config()) {
            batch.push(&s.ids, &s.type_ids, 0, DropoutKey::default(), None);
        }
        let batch = Arc::new(batch);
        self.timed(|| encoder.forward(&batch, &task).map(drop))
    }

    fn timed(&self, mut step: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let mut times = Vec::with_capacity(self.steps);
        for i in 0..WARM_UP + self.steps {
            let began = Instant::now();
            step()?;
            if i >= WARM_UP {
                times.push(began.elapsed().as_secs_f64());
            }
        }
        Ok(times)
    }
}

fn check_range(flag: &str, found: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&found) { Ok(()) } else { Err(Error::setting(flag, format!("1 to {most}"), found)) }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Floating-point operations of a step: products and attention of a forward, twice where the way back goes through the
/// layers, three times where weights train too. The short last layer is counted whole, so that figures compare with
/// others'.
fn operations(config: &Config, tokens: usize, length: usize, work: &Work) -> f64 {
    let [t, l, h, i] = [tokens, length, config.hidden_size, config.intermediate_size].map(|n| n as f64);
    let forward = config.num_hidden_layers as f64 * (2.0 * t * (4.0 * h * h + 2.0 * h * i) + 4.0 * t * l * h);
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
