//! The `instar` command.

use clap::Parser;
use instar_engine::cli::{run, Cli};
use instar_engine::confine::descriptors::close_inherited;
use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: nothing was opened before.
    unsafe { close_inherited(std::env::args_os()) };
    // Bad usage ends here with status 2.
    let cli = Cli::parse();
    ExitCode::from(run(&cli, &mut std::io::stdout().lock()))
}
