//! `instar recover`: options, and what is printed.

use super::opening::parse_seconds;
use super::output::{print_json_indented, unprinted_but, OutputFormat};
use super::paragraph::print_sentences;
use clap::Args;
use instar::bytes::Bytes;
use instar::error::Error;
use instar::escape::escape_path;
use instar::operation::Session;
use instar::recover::{run_recover, RecoverOutcome, RecoverRequest};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Indentation of JSON.
const INDENT: &[u8] = b"  ";

/// Give an image back what it was before an atomic commit into it that did not end
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// Print nothing on success
    #[arg(short, long)]
    pub quiet: bool,
    /// Wait up to SECONDS for an image that is in use
    #[arg(long, value_name = "SECONDS", default_value_t, allow_negative_numbers = true, value_parser = parse_seconds)]
    pub wait: u64,
    /// The directory with the undo log of a block device: the one that `instar commit --undo-dir` was told
    #[arg(long, value_name = "DIR")]
    pub undo_dir: Option<PathBuf>,
    /// Apply the log although the image was written since by something else than the commit
    #[arg(long)]
    pub force: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
}

/// Run the command.
///
/// # Errors
/// When the image has an undo log that does not count, or cannot be written.
pub fn run(args: &RecoverArgs, session: &Session, out: &mut dyn Write) -> Result<(), Error> {
    let config = super::configuration(args.output)?;
    let request = RecoverRequest {
        image: args.filename.clone(),
        wait: args.wait,
        undo_directory: args.undo_dir.clone().or_else(|| config.undo_path()),
        force: args.force,
    };
    let outcome = run_recover(&request, session)?;
    let printed = match args.output {
        OutputFormat::Json => print_json_indented(out, &outcome, INDENT),
        OutputFormat::Human if args.quiet => Ok(()),
        OutputFormat::Human => print_sentences(out, &text(args, &outcome)),
    };
    printed.map_err(|error| unprinted_but("the image is recovered", &args.filename, &error))
}

fn text(args: &RecoverArgs, outcome: &RecoverOutcome) -> String {
    let image = escape_path(&args.filename);
    match (outcome.log, outcome.restored) {
        (false, _) => match &outcome.searched {
            Some(directory) => format!(
                "'{image}' has no undo log in '{}': there is nothing to recover, unless `--undo-dir` of the commit named another \
                 directory.\n",
                escape_path(Path::new(directory))
            ),
            None => format!("'{image}' has no undo log: there is nothing to recover.\n"),
        },
        (true, true) => {
            format!(
                "'{image}' is what it was before the commit: {} were written back.\n",
                Bytes(outcome.bytes_restored)
            )
        }
        (true, false) => format!("The commit into '{image}' was complete; what was left of its undo log is removed.\n"),
    }
}
