//! The command line: flags to a checked config to a call of the library, and what is printed of its result.
//!
//! Results go to standard output, everything else to standard error. A file a command; [`args`] holds the flags that
//! several share, and [`progress`] what moves on a terminal while one waits.

mod args;
mod bench;
mod data;
mod eval;
mod output;
mod patch;
mod predict;
mod progress;
mod quickstart;
#[cfg(feature = "serve")]
mod serve;
mod train;

use std::process::ExitCode;

use bitfit::Kind;
use clap::{Parser, Subcommand};

/// Fine-tune only the bias terms of BERT, and run many tasks from one frozen base.
#[derive(Debug, Parser)]
#[command(name = "bitfit", version, max_term_width = 110, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train three small tasks that ship with the program, and answer all three in one batch
    Quickstart(quickstart::Args),
    /// Train a task on GLUE or on a table of your own
    Train(Box<train::Args>),
    /// Score a patch on rows with labels
    Eval(eval::Args),
    /// Answer texts with one task or many, over one base in one batch
    Predict(predict::Args),
    /// Look into a patch file, check it, take it out of a run, or merge it into a whole model
    Patch(patch::Args),
    /// Serve every task over HTTP, from one base
    #[cfg(feature = "serve")]
    Serve(Box<serve::Args>),
    /// Bring GLUE's files from the hub
    Data(data::Args),
    /// Measure a training step or a forward pass: time and memory
    Bench(bench::Args),
}

impl Cli {
    /// Does what was asked.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Quickstart(args) => quickstart::run(args),
            Command::Train(args) => train::run(*args),
            Command::Eval(args) => eval::run(args),
            Command::Predict(args) => predict::run(args),
            Command::Patch(args) => patch::run(args),
            #[cfg(feature = "serve")]
            Command::Serve(args) => serve::run(*args),
            Command::Data(args) => data::run(args),
            Command::Bench(args) => bench::run(args),
        }
    }
}

/// 1 failed, 2 wrong usage, 130 stopped by Ctrl-C: scripts depend on these.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<bitfit::Error>()).map(bitfit::Error::kind);
    ExitCode::from(match kind {
        Some(Kind::Usage) => 2,
        Some(Kind::Interrupted) => 130,
        _ => 1,
    })
}
