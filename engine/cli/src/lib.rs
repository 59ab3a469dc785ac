//! The `instar` command: arguments, signals, and everything that is printed. What it does is the library's.

// A print that panics ends the program in the middle of a commit: `terminal` and `output` cannot.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod cache_mode;
pub mod check;
mod check_text;
pub mod color;
pub mod commit;
mod commit_args;
mod commit_by_adoption;
mod commit_text;
pub mod compare;
pub mod config;
pub mod convert;
pub mod create;
pub mod doctor;
pub mod explain;
mod explain_text;
mod format_options;
pub mod info;
mod info_text;
pub mod map;
mod map_picture;
mod map_text;
pub mod measure;
mod opening;
pub mod output;
mod paragraph;
pub mod plugins;
mod progress;
mod progress_args;
mod progress_lines;
pub mod rebase;
mod rebase_member;
mod rebase_several;
pub mod recover;
pub mod resize;
mod said;
mod signals;
pub mod size;
mod snapshot_text;
mod terminal;
mod told;
mod unsupported;
mod usage;
pub mod worker;

pub use output::OutputFormat;
pub use usage::{main, say_panics};

use clap::{Parser, Subcommand};
use instar::config::Config;
use instar::confine::trap::report_as_json;
use instar::error::Error;
use instar::operation::{Cancel, Session};
use instar_guest_abi::ErrorCode;
use std::io::Write;
use std::rc::Rc;
use told::Told;

/// Exit status of a command that was refused or failed.
const FAILED: u8 = 1;

/// The command line. What `--help` begins with is the description in `Cargo.toml`, which packages have as well
#[derive(Parser, Debug)]
#[command(name = "instar", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands. The options of those that are not called are not made.
#[derive(Subcommand, Debug)]
#[command(defer = true)]
pub enum Command {
    /// Merge a copy-on-write overlay into the image below it, and empty the overlay
    Commit(commit_args::CommitArgs),
    /// Check the consistency of an image, and repair it
    Check(check::CheckArgs),
    /// Show what an image is
    Info(info::InfoArgs),
    /// Show which layer of a chain holds which bytes of the virtual disk, and where
    Map(map::MapArgs),
    /// Compare two images, each with what is below it, as the disks that they are
    Compare(compare::CompareArgs),
    /// Make a new image of the disk that an image shows, with everything below it
    Convert(convert::ConvertArgs),
    /// Put another image below an overlay, or none, and keep what it reads
    Rebase(rebase::RebaseArgs),
    /// Give an image back what it was before an atomic commit into it that did not end
    Recover(recover::RecoverArgs),
    /// Say how long the file of a new image would be, or how long a commit would make one
    Measure(measure::MeasureArgs),
    /// Give an image another virtual size
    Resize(resize::ResizeArgs),
    /// Make a new, empty image
    Create(create::CreateArgs),
    /// List the format plugins
    Plugins(plugins::PluginsArgs),
    /// Show what is configured, and where
    Config(config::ConfigArgs),
    /// Find out whether commits work on this machine, and what to do if they do not
    Doctor(doctor::DoctorArgs),
    /// Say what an error code means, and what to do about it
    Explain(explain::ExplainArgs),
    /// Do what another program asks for, in a process of its own
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
}

impl Command {
    /// How its result, and what goes wrong, is printed.
    fn output(&self) -> OutputFormat {
        match self {
            Self::Commit(args) => args.output,
            Self::Check(args) => args.output,
            Self::Info(args) => args.output,
            Self::Map(args) => args.output,
            Self::Measure(args) => args.output,
            Self::Compare(args) => args.output,
            Self::Resize(args) => args.output,
            Self::Convert(args) => args.output,
            Self::Rebase(args) => args.output,
            Self::Recover(args) => args.output,
            Self::Plugins(args) => args.output,
            Self::Config(args) => args.output,
            Self::Create(_) | Self::Worker(_) => OutputFormat::Human,
            Self::Doctor(args) => args.output,
            Self::Explain(args) => args.output,
        }
    }
}

/// Run a command; the exit status.
pub fn run(cli: &Cli, out: &mut dyn Write) -> u8 {
    if cli.command.output() == OutputFormat::Json {
        report_as_json();
    }
    let (done, output) = match &cli.command {
        Command::Commit(args) => return commit::run(args, out),
        Command::Check(args) => return check::run(args, out),
        Command::Compare(args) => return compare::run(args, out),
        Command::Resize(args) => return resize::run(args, out),
        Command::Rebase(args) => return rebase_several::run(args, out),
        Command::Doctor(args) => return doctor::run(args, out),
        Command::Worker(args) => return worker::run(args),
        Command::Info(args) => (info::run(args, &reading(false), out), args.output),
        Command::Map(args) => (map::run(args, out), args.output),
        Command::Measure(args) => (measure::run(args, out), args.output),
        Command::Convert(args) => (convert::run(args, out), args.output),
        Command::Recover(args) => (recover::run(args, &reading(false), out), args.output),
        Command::Create(args) => (create::run(args, out), OutputFormat::Human),
        Command::Plugins(args) => (plugins::run(args, out), args.output),
        Command::Config(args) => (config::run(args, out), args.output),
        Command::Explain(args) => (explain::run(args, out), args.output),
    };
    match done {
        Ok(()) => 0,
        Err(error) => print_error(&error, output),
    }
}

/// The configuration. People are told what of it does not count.
fn configuration(output: OutputFormat) -> Result<Config, Error> {
    let config = Config::load()?;
    if output == OutputFormat::Human {
        config.warnings.iter().for_each(|warning| said::say_warning(warning));
    }
    Ok(config)
}

/// The session of a command that only reads: a signal ends the process.
fn reading(verbose: bool) -> Session {
    Session::confined(Rc::new(Told { verbose, ..Told::default() }), Cancel::new())
}

/// Print an error on stderr; the exit status.
fn print_error(error: &Error, output: OutputFormat) -> u8 {
    if !progress_lines::error_is_told() {
        said::say_error(error, output);
    }
    if error.code == ErrorCode::BadUsage {
        usage::USAGE
    } else {
        FAILED
    }
}
