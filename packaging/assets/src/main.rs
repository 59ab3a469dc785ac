//! `instar-assets OUTDIR`: what packages hold beside the program and the plugins.
//!
//! Manual pages and completions are made from the same `clap` definitions as `--help`, so they name the same options. It is
//! a program of its own so that the product carries none of it.

mod changelog;
mod completions;
mod man;
mod notices;
mod pages;

use clap::{Command, CommandFactory};
use instar_cli::Cli;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What ends the program: one line.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instar-assets: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(folder), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        return Err("usage: SOURCE_DATE_EPOCH=SECONDS instar-assets OUTDIR".to_owned());
    };
    let date = date()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut written = man::pages(&command(), &root.join("packaging/assets/sections"), &pages::day(date))?;
    written.extend(pages::by_hand(&root.join("docs/man"), date)?);
    written.extend(completions::all(command()));
    let maintainer = changelog::maintainer(&read(&root.join("engine/cli/Cargo.toml"))?)?;
    let changelog = changelog::debian(&read(&root.join("CHANGELOG.md"))?, date, &maintainer)?;
    written.push((PathBuf::from("changelog"), changelog.into_bytes()));
    written.push((PathBuf::from("third-party.txt"), notices::collect(&root)?.into_bytes()));
    for (name, content) in written {
        write(&folder.join(name), &content)?;
    }
    Ok(())
}

/// The commands as `--help` shows them.
fn command() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

/// When the sources were last changed, so that the same sources give the same bytes.
fn date() -> Result<jiff::Timestamp> {
    let text = std::env::var("SOURCE_DATE_EPOCH").map_err(|_| "SOURCE_DATE_EPOCH is not set: seconds since 1970")?;
    let seconds = text.parse().map_err(|_| format!("SOURCE_DATE_EPOCH: \"{text}\" is no number of seconds"))?;
    jiff::Timestamp::from_second(seconds).map_err(|error| format!("SOURCE_DATE_EPOCH: {error}"))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::write(path, content))
        .map_err(|error| format!("{}: {error}", path.display()))
}
