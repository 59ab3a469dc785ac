//! The command line.

pub mod args;
pub mod commit;
pub mod create;
mod create_file;
pub mod error;
pub mod escape;
pub mod info;
mod info_text;
pub mod output;
pub mod plugins;
pub mod size;

pub use error::CliError;
pub use output::OutputFormat;

use args::{Cli, Command};
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

/// Refused or failed.
const EXIT_FAILED: u8 = 1;

/// Run the program. Bad usage ends it with exit status 2.
#[must_use]
pub fn main(started: Instant) -> ExitCode {
    let cli = Cli::parse();
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let result = match &cli.command {
        Command::Commit(args) => {
            return match commit::run(args, started, &mut out) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    commit::report(&error, args, &mut err);
                    ExitCode::from(EXIT_FAILED)
                }
            };
        }
        Command::Info(args) => info::run(args, &mut out),
        Command::Create(args) => create::run(args, &mut out),
        Command::Plugins(args) => plugins::run(args, &mut out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody to tell if stderr is gone.
            let _ = writeln!(err, "instar: {error}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}
