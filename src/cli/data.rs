//! `bitfit data`: GLUE's files, brought from the hub.

use std::path::PathBuf;

use bitfit::Result;
use bitfit::data::official::{DATASET, fetch};
use bitfit::data::task::TASKS;
use bitfit::data::{GlueTask, task};

use super::output::say;
use super::progress::DownloadProgress;

/// Flags of `bitfit data`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Bring a GLUE task's rows from the hub (nyu-mll/glue) and write them as the official files that --data reads
    Fetch(Fetch),
}

#[derive(Debug, clap::Args)]
struct Fetch {
    /// A GLUE task (cola sst2 mrpc stsb qqp mnli qnli rte wnli ax), or all
    #[arg(value_name = "TASK")]
    task: String,
    /// The data folder; the files go into CoLA/, SST-2/, MRPC/ and so on inside it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace files that are there already
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Command::Fetch(args) = args.command;
    let tasks: Vec<&'static GlueTask> = match args.task.as_str() {
        "all" => TASKS.iter().collect(),
        name => vec![glue(name)?],
    };
    let progress = DownloadProgress::new();
    let watch = progress.clone();
    let mut said = Ok(());
    let print = |line: String| -> Result<()> {
        say!("{line}");
        Ok(())
    };
    let fetched = fetch(&tasks, &args.out, args.overwrite, move |download| watch.show(download), &mut |written| {
        progress.finish();
        let path = written.path.display();
        if written.replaced > 0 {
            eprintln!("{path}: {} texts held a tab or a line break; a space stands for each", written.replaced);
        }
        let line = print(format!("{path}  {} rows", written.rows));
        said = std::mem::replace(&mut said, Ok(())).and(line);
    });
    progress.finish();
    fetched?;
    said?;
    eprintln!("from {DATASET}; the licences are those of the data sets themselves");
    Ok(())
}

/// A task of GLUE; a table of one's own, which [`task`] would speak of, is nothing to fetch.
fn glue(name: &str) -> Result<&'static GlueTask> {
    task(name).map_err(|_| {
        let known: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
        bitfit::Error::setting("TASK", format!("one of {}, or all", known.join(", ")), format_args!("`{name}`"))
    })
}
