//! The `instar` command.

use clap::Parser;
use instar_engine::cli::{run, Cli};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Bad usage ends here with status 2.
    let cli = Cli::parse();
    ExitCode::from(run(&cli, &mut std::io::stdout().lock()))
}
