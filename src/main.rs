//! The command `bitfit`: arguments, work, and one line where something went wrong.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    match command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bitfit: {error:#}");
            cli::exit_code(&error)
        }
    }
}
