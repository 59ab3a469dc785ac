//! `instar worker`: does what a program that uses the library asks for, in a process of its own.

use super::print_error;
use super::signals::cancel_on_signals;
use super::OutputFormat;
use clap::Args;
use instar::error::Error;
use instar::worker::serve;
use instar_guest_abi::ErrorCode;
use std::fs::File;
use std::path::PathBuf;

/// Do what another program asks for, in a process of its own. Only the instar library starts it
#[derive(Args, Debug)]
pub struct WorkerArgs {
    /// Where the request is read from
    #[arg(value_name = "REQUEST")]
    pub request: PathBuf,
}

/// Run the command; the exit status. How the operation went is told on standard output.
pub fn run(args: &WorkerArgs) -> u8 {
    // Nobody waits for it any more once its caller is gone: it ends at a safe point.
    // SAFETY: the call takes numbers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM, 0, 0, 0) };
    let opened = File::open(&args.request)
        .map_err(|error| Error::io(&args.request, ErrorCode::OpenFailed, "cannot be opened", &error));
    match opened.and_then(|request| serve(request, std::io::stdout(), cancel_on_signals())) {
        Ok(()) => 0,
        Err(error) => print_error(&error, OutputFormat::Human),
    }
}
