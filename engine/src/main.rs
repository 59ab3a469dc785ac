//! The `instar` program: see the library for everything it does.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    instar_engine::cli::main(started)
}
