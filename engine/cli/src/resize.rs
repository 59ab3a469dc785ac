//! `instar resize`: options, and what is printed.

use super::opening::OpeningArgs;
use super::output::{print_json, unprinted_but, OutputFormat};
use super::paragraph::print_sentences;
use super::print_error;
use super::progress_args::ProgressArgs;
use super::signals::cancel_on_signals;
use super::size::parse_bytes;
use super::told::Told;
use super::unsupported::UnsupportedArgs;
use clap::{Args, ValueEnum};
use instar::bytes::Bytes;
use instar::error::Error;
use instar::resize::{run_resize, NewSize, ResizeOutcome, ResizeRequest};
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;

/// Give an image another virtual size
#[derive(Args, Debug)]
pub struct ResizeArgs {
    /// Format of the image. Detected if not given; an image of another format is refused, but raw is believed of any file
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Let the image become smaller, which deletes what is past its new end
    #[arg(long)]
    pub shrink: bool,
    /// Choose whether what is new of the disk takes its space at once
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub preallocation: Preallocation,
    /// Resize although other images have this one as their backing, and would read something else or not open any more
    #[arg(long)]
    pub ignore_overlays: bool,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print nothing on success
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, how the process is confined, and what the guest logs
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub unsupported: UnsupportedArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
    /// The new size in bytes, or with + or - by how much the size changes; with a suffix k, M, G, T, P or E, which multiplies by
    /// powers of 1024
    #[arg(value_name = "[+|-]SIZE", allow_hyphen_values = true, value_parser = parse_new_size)]
    pub size: NewSize,
}

/// What becomes of the space of what is new, with qemu-img's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Preallocation {
    /// It takes no space before something is written (default)
    #[default]
    Off,
    /// It has its place in the image, and takes no space in the file: not for raw images
    Metadata,
    /// The file system reserves it, as fallocate(1) does
    Falloc,
    /// Zeroes are written, which takes their time
    Full,
}

impl From<Preallocation> for instar::resize::Preallocation {
    fn from(mode: Preallocation) -> Self {
        match mode {
            Preallocation::Off => Self::Off,
            Preallocation::Metadata => Self::Metadata,
            Preallocation::Falloc => Self::Falloc,
            Preallocation::Full => Self::Full,
        }
    }
}

/// A size, or a difference to it.
///
/// # Errors
/// What is wrong, in one clause.
fn parse_new_size(text: &str) -> Result<NewSize, String> {
    match text.split_at_checked(1) {
        Some(("+", bytes)) => parse_bytes(bytes).map(NewSize::More),
        Some(("-", bytes)) => parse_bytes(bytes).map(NewSize::Less),
        _ => parse_bytes(text).map(NewSize::Exactly),
    }
}

/// Run the command; the exit status.
pub fn run(args: &ResizeArgs, out: &mut dyn Write) -> u8 {
    match resize(args, out) {
        Ok(()) => 0,
        Err(error) => print_error(&error, args.output),
    }
}

fn resize(args: &ResizeArgs, out: &mut dyn Write) -> Result<(), Error> {
    args.unsupported.refuse()?;
    let warns = !args.quiet && args.output == OutputFormat::Human;
    let told = Rc::new(Told { verbose: args.verbose, warns, ..Told::of("resize", &args.progress, args.quiet)? });
    let result = resized(args, &told);
    told.end(args.dry_run, result.as_ref());
    let outcome = result?;
    let printed = match args.output {
        _ if args.quiet => Ok(()),
        OutputFormat::Human => print_sentences(out, &text(&outcome)),
        OutputFormat::Json => print_json(out, &outcome),
    };
    let done = if args.dry_run { "nothing was changed" } else { "the image has its new size" };
    printed.map_err(|error| unprinted_but(done, &args.filename, &error))
}

fn resized(args: &ResizeArgs, told: &Rc<Told>) -> Result<ResizeOutcome, Error> {
    let config = super::configuration(args.output)?;
    let request = ResizeRequest {
        image: args.filename.clone(),
        format: args.format.clone(),
        size: args.size,
        shrink: args.shrink,
        preallocation: args.preallocation.into(),
        ignore_overlays: args.ignore_overlays,
        dry_run: args.dry_run,
        settings: args.opening.settings(&config),
    };
    run_resize(&request, &told.session(cancel_on_signals()))
}

/// What is said to people: where it is done, the words of `qemu-img`.
fn text(outcome: &ResizeOutcome) -> String {
    let ResizeOutcome { old_virtual_size: old, virtual_size: new, dry_run, .. } = outcome;
    match (old == new, dry_run) {
        (true, _) => format!("The image has {} already.\n", Bytes(*new)),
        (false, true) => {
            format!("The image would be resized from {} to {}. Nothing was changed.\n", Bytes(*old), Bytes(*new))
        }
        (false, false) => "Image resized.\n".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_new_size("1.5k"), Ok(NewSize::Exactly(1536)));
        assert_eq!(parse_new_size("+10G"), Ok(NewSize::More(10 << 30)));
        assert_eq!(parse_new_size("-512"), Ok(NewSize::Less(512)));
        for text in ["", "+", "-", "--1", "+-1", "1x", "é"] {
            assert!(parse_new_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_was_done_is_said() {
        let said = |old_virtual_size, virtual_size, dry_run| {
            let warnings = Vec::new();
            text(&ResizeOutcome {
                format: "raw".to_owned(),
                old_virtual_size,
                virtual_size,
                dry_run,
                sandbox: "kvm",
                warnings,
            })
        };
        assert_eq!(said(512, 1024, false), "Image resized.\n");
        assert_eq!(
            said(512, 1024, true),
            "The image would be resized from 512 bytes to 1024 bytes (1 KiB). Nothing was changed.\n"
        );
        assert_eq!(said(512, 512, false), "The image has 512 bytes already.\n");
    }
}
