//! The command line.

pub mod check;
pub mod commit;
pub mod config;
pub mod create;
mod create_file;
pub mod doctor;
pub mod info;
mod info_text;
pub mod map;
pub mod output;
pub mod plugins;
pub mod size;
mod snapshot_text;
mod usage;

pub use output::OutputFormat;
pub use usage::main;

use crate::commit::render_warning;
use crate::config::Config;
use crate::confine::trap::report_as_json;
use crate::error::Error;
use crate::escape::printable;
use crate::terminal::say;
use clap::{Parser, Subcommand};
use instar_guest_abi::ErrorCode;
use output::render_error;
use std::io::Write;

/// Exit status of a command that was refused or failed.
const FAILED: u8 = 1;

/// Commit disk images, safely: image metadata is handled inside a virtual machine, formats are plugins
#[derive(Parser, Debug)]
#[command(name = "instar", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Merge a copy-on-write overlay into the image below it, and empty the overlay
    Commit(commit::CommitArgs),
    /// Check the consistency of an image
    Check(check::CheckArgs),
    /// Show what an image is
    Info(info::InfoArgs),
    /// Show which layer of a chain holds which bytes of the virtual disk, and where
    Map(map::MapArgs),
    /// Make a new, empty image
    Create(create::CreateArgs),
    /// List the format plugins
    Plugins(plugins::PluginsArgs),
    /// Show what is configured, and where
    Config(config::ConfigArgs),
    /// Find out whether commits work on this machine, and what to do if they do not
    Doctor(doctor::DoctorArgs),
}

impl Command {
    /// How its result, and what goes wrong, is printed.
    fn output(&self) -> OutputFormat {
        match self {
            Self::Commit(args) => args.output,
            Self::Check(args) => args.output,
            Self::Info(args) => args.output,
            Self::Map(args) => args.output,
            Self::Plugins(args) => args.output,
            Self::Config(args) => args.output,
            Self::Create(_) => OutputFormat::Human,
            Self::Doctor(args) => args.output,
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
        Command::Doctor(args) => return doctor::run(args, out),
        Command::Info(args) => (info::run(args, out), args.output),
        Command::Map(args) => (map::run(args, out), args.output),
        Command::Create(args) => (create::run(args, out), OutputFormat::Human),
        Command::Plugins(args) => (plugins::run(args, out), args.output),
        Command::Config(args) => (config::run(args, out), args.output),
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
        config.warnings.iter().for_each(|warning| say(&render_warning(warning)));
    }
    Ok(config)
}

/// The lines that a guest logged, for a terminal.
fn guest_lines(log: &[String]) -> String {
    log.iter().map(|line| format!("instar: guest says: {}\n", printable(line))).collect()
}

/// Print an error on stderr; the exit status.
fn print_error(error: &Error, output: OutputFormat) -> u8 {
    say(&render_error(error, output));
    if error.code == ErrorCode::BadUsage {
        usage::USAGE
    } else {
        FAILED
    }
}
