//! `bitfit serve`: every task over HTTP, from one base.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use bitfit::base::problem::Texts;
use bitfit::serve::{Options, Server, Store, TaskName};

use super::args::{BaseArgs, DeviceArgs, parse_size};
use super::output::say;

/// Flags of `bitfit serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    base: BaseArgs,
    /// Where patches lie: a folder (TASK.safetensors or TASK/patch.safetensors), s3://, gs://, az://, http(s)://
    #[arg(long, value_name = "DIR_OR_URL")]
    patches: String,
    /// Where to listen. TLS is left to a proxy in front
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: String,
    /// Memory for patches; those least recently used are dropped until they are asked for again [default: no limit]
    #[arg(long, value_name = "SIZE")]
    patch_memory: Option<String>,
    /// A task that is loaded at the start and never dropped; give several
    #[arg(long, value_name = "TASK")]
    pin: Vec<String>,
    /// Load every task at the start, as far as --patch-memory goes
    #[arg(long)]
    preload: bool,
    /// Questions (a text of a task) that may wait; past it, 429
    #[arg(long, value_name = "N", default_value_t = Options::default().queue)]
    queue: usize,
    /// Tokens of one forward
    #[arg(long, value_name = "N", default_value_t = Options::default().batch_tokens)]
    batch_tokens: usize,
    /// Milliseconds after which a request is given up (504); a request may ask for less by x-deadline-ms
    #[arg(long, value_name = "MS", default_value_t = Options::default().deadline.as_millis() as u64)]
    deadline: u64,
    /// Seconds between looks at the store for changes; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = Options::default().poll.as_secs_f64())]
    poll: f64,
    /// Refuse uploads, removals and rollbacks
    #[arg(long)]
    read_only: bool,
    /// A file of API keys, a line each: `read HASH` or `admin HASH`, HASH as printf %s "$KEY" | sha256sum prints it
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// The largest JSON body
    #[arg(long, value_name = "SIZE", default_value = "2MB")]
    max_body: String,
    /// The longest text
    #[arg(long, value_name = "SIZE", default_value = "100KB")]
    max_text: String,
    /// Texts of a request
    #[arg(long, value_name = "N", default_value_t = Options::default().max_inputs)]
    max_inputs: usize,
    /// Connections at once; more wait
    #[arg(long, value_name = "N", default_value_t = Options::default().max_connections)]
    max_connections: usize,
    /// Seconds that accepted requests are waited for when the server stops
    #[arg(long, value_name = "SECONDS", default_value_t = Options::default().drain.as_secs_f64())]
    drain: f64,
    /// How logs are written to standard error: text, or json [default: text on a terminal, else json]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Which logs: error, warn, info, debug, or a filter as tracing's EnvFilter reads it
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    fn options(&self) -> bitfit::Result<Options> {
        let seconds = |flag: &str, x: f64| {
            let refuse = || bitfit::Error::setting(flag, "seconds, 0 or more", x);
            Duration::try_from_secs_f64(x).map_err(|_| refuse())
        };
        let options = Options {
            patch_memory: self
                .patch_memory
                .as_deref()
                .map_or(Ok(usize::MAX), |text| parse_size("--patch-memory", text))?,
            pins: self.pin.iter().map(|name| name.parse()).collect::<bitfit::Result<Vec<TaskName>>>()?,
            preload: self.preload,
            queue: self.queue,
            batch_tokens: self.batch_tokens,
            deadline: Duration::from_millis(self.deadline),
            poll: seconds("--poll", self.poll)?,
            read_only: self.read_only,
            max_body: parse_size("--max-body", &self.max_body)?,
            max_text: parse_size("--max-text", &self.max_text)?,
            max_inputs: self.max_inputs,
            max_connections: self.max_connections,
            drain: seconds("--drain", self.drain)?,
            api_keys: self.api_keys.clone(),
        };
        options.check()?;
        Ok(options)
    }

    fn start_logs(&self) -> bitfit::Result<()> {
        let refuse = |expected: &str, found: &str| bitfit::Error::setting("--log-format", expected, found);
        let json = match self.log_format.as_deref() {
            None => !std::io::stderr().is_terminal(),
            Some("json") => true,
            Some("text") => false,
            Some(other) => return Err(refuse("text or json", other)),
        };
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log)
            .map_err(|e| bitfit::Error::setting("--log", "error, warn, info, debug or a filter", e))?;
        let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        if json {
            logs.json().init()
        } else {
            logs.with_ansi(std::io::stderr().is_terminal()).init()
        }
        Ok(())
    }
}

/// Runs the command until it is told to stop.
pub fn run(args: Args) -> anyhow::Result<()> {
    let options = args.options()?;
    args.device.check()?;
    args.start_logs()?;
    let store = Store::open(&args.patches)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let Args { base, device, listen, .. } = args;
    let ended = runtime.block_on(async {
        let mut stop = std::pin::pin!(stopped()?);
        // The first process of a container ignores a signal that it does not wait for, and a base may be long in coming.
        let loading = tokio::task::spawn_blocking(move || device.encoder(&base.load()?));
        let server = async {
            let encoder = loading.await.context("loading the base has panicked")??;
            anyhow::Ok(Server::start(encoder, store, &listen, options).await?)
        };
        let server = tokio::select! {
            started = server => started?,
            () = &mut stop => return Ok(()),
        };
        let (url, tasks) = (format!("http://{}", server.address()), server.tasks());
        say!("serving {} at {url}", counted(tasks.len()));
        // A line that can be pasted as it stands.
        let (task, texts) = server.example().unwrap_or(("TASK".into(), Texts::One));
        let pair = if texts == Texts::Two { ", \"text_pair\": \"Another.\"" } else { "" };
        say!("  curl {url}/v1/tasks/{task}/predict -d '{{\"inputs\": [{{\"text\": \"A text.\"{pair}}}]}}'");
        server.run(stop).await;
        anyhow::Ok(())
    });
    // A download that goes on is not waited for: what it has written is gone on with at the next start.
    runtime.shutdown_background();
    ended
}

fn counted(tasks: usize) -> String {
    if tasks == 1 { "1 task".into() } else { format!("{tasks} tasks") }
}

/// Ends when the process is asked to stop: SIGINT, or on Unix SIGTERM.
fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    let mut terminated =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    Ok(async move {
        #[cfg(unix)]
        tokio::select! {
            _ = terminated.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        #[cfg(not(unix))]
        tokio::signal::ctrl_c().await.ok();
    })
}
