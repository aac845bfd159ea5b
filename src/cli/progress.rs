//! What moves on a terminal while a command runs. Where standard error is no terminal: one line an epoch of training, and
//! nothing of rows that are answered.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Instant;

use bitfit::base::Download;
use bitfit::predict::Progress;
use bitfit::train::Event;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows a training run's events on standard error.
pub struct TrainProgress {
    bar: ProgressBar,
    is_terminal: bool,
    steps: u64,
    /// Of the steps since the last evaluation.
    losses: (f64, u64),
    tokens_per_s: f64,
    latest: String,
}

impl TrainProgress {
    /// Nothing is shown before the first event.
    pub fn new() -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        TrainProgress { bar, is_terminal, steps: 0, losses: (0.0, 0), tokens_per_s: 0.0, latest: String::new() }
    }

    /// Shows an event.
    pub fn show(&mut self, event: Event) {
        match event {
            Event::Started { step, steps, parameters, data } => {
                self.steps = steps;
                let rows = data.iter().map(|(split, of)| format!("{split} {}", of.examples));
                let rows: Vec<String> = rows.collect();
                let from = if step > 0 { format!(", from step {step}") } else { String::new() };
                eprintln!(
                    "training {} parameters ({} encoder, {} pooler, {} head) for {steps} steps{from}; rows: {}",
                    parameters.total(),
                    parameters.encoder,
                    parameters.pooler,
                    parameters.head,
                    rows.join(", ")
                );
                if self.is_terminal {
                    let style = "{bar:12} {pos}/{len}  {eta} left  {wide_msg}";
                    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
                    self.bar.set_style(style);
                    self.bar.set_length(steps);
                    self.bar.set_position(step);
                    self.bar.reset_eta();
                    self.bar.set_draw_target(ProgressDrawTarget::stderr());
                }
            }
            Event::Step { step, epoch, loss, tokens_per_s, .. } => {
                self.losses = (self.losses.0 + loss, self.losses.1 + 1);
                self.tokens_per_s = tokens_per_s;
                let latest = &self.latest;
                self.bar.set_message(format!("epoch {epoch}  loss {loss:.4}{latest}  {tokens_per_s:.0} tokens/s"));
                self.bar.set_position(step);
            }
            Event::Evaluated { step, epoch, split, main_metric, metrics, .. } => {
                if let Some(value) = metrics.get(main_metric) {
                    self.latest = format!("  {split} {main_metric} {value:.4}");
                }
                let (sum, n) = std::mem::take(&mut self.losses);
                let loss = if n > 0 { format!("loss {:.4}  ", sum / n as f64) } else { String::new() };
                let line = format!(
                    "epoch {epoch}  step {step}/{}  {loss}{split}: {}  {:.0} tokens/s",
                    self.steps,
                    shown(metrics),
                    self.tokens_per_s
                );
                if self.is_terminal { self.bar.println(line) } else { eprintln!("{line}") }
            }
            _ => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Steps of the bar that shows how much of an input has been read.
const READ: u64 = 1000;

/// Shows on a terminal how many rows are answered.
pub struct RowsProgress {
    bar: ProgressBar,
    started: Instant,
}

impl RowsProgress {
    /// Nothing is shown where it is not `wanted`, or standard error is no terminal.
    pub fn new(wanted: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if wanted && std::io::stderr().is_terminal() {
            bar.set_style(
                ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        RowsProgress { bar, started: Instant::now() }
    }

    /// Shows how far it is.
    pub fn show(&mut self, at: &Progress) {
        if let Some(share) = at.share {
            if self.bar.length().is_none() {
                let style = ProgressStyle::with_template("{bar:12} {percent}%  {eta} left  {wide_msg}");
                self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                self.bar.set_length(READ);
                self.bar.reset_eta();
            }
            self.bar.set_position((share * READ as f64) as u64);
        }
        let rate = (at.rows - at.resumed) as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        self.bar.set_message(format!("{} rows  {rate:.0} rows/s", at.rows));
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Shows on a terminal how a download goes. Clones show one bar.
#[derive(Clone)]
pub struct DownloadProgress {
    bar: ProgressBar,
}

impl DownloadProgress {
    /// Nothing is shown before the first bytes, nor where standard error is no terminal.
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{bar:12} {bytes}/{total_bytes}  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        DownloadProgress { bar }
    }

    /// Shows how far it is.
    pub fn show(&self, download: &Download) {
        self.bar.set_length(download.total);
        self.bar.set_position(download.bytes);
        self.bar.set_message(download.file.clone());
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Metrics for people: `accuracy 0.8456, f1 0.8912`.
pub fn shown(metrics: &BTreeMap<String, f64>) -> String {
    let one = |(name, value): (&String, &f64)| format!("{name} {value:.4}");
    metrics.iter().map(one).collect::<Vec<_>>().join(", ")
}
