//! The `instar` command.

#![deny(clippy::print_stdout, clippy::print_stderr)]

use instar::confine::descriptors::close_inherited;
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: nothing was opened before.
    unsafe { close_inherited(std::env::args_os()) };
    let arguments: Vec<OsString> = std::env::args_os().collect();
    ExitCode::from(instar_cli::main(&arguments, &mut std::io::stdout().lock()))
}
