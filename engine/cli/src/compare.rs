//! `instar compare`: options, and what is printed, in the words of `qemu-img compare`.

use super::cache_mode::CacheMode;
use super::opening::OpeningArgs;
use super::output::{print, print_json, OutputFormat};
use super::print_error;
use super::progress_args::ProgressArgs;
use super::told::Told;
use super::unsupported::UnsupportedArgs;
use clap::Args;
use instar::compare::{run_compare, CompareOutcome, CompareRequest, Difference};
use instar::error::Error;
use instar::operation::Cancel;
use instar_guest_abi::ErrorCode;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;

/// Exit status for images that differ.
const DIFFERENT: u8 = 1;
/// Exit status where an image could not be opened, or not be compared to the end.
const FAILED: u8 = 2;
/// Exit status where the metadata of an image could not be read.
const METADATA: u8 = 3;
/// Exit status where the data of an image could not be read.
const UNREADABLE: u8 = 4;

/// Compare two images, each with what is below it, as the disks that they are
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// Format of the first image. Detected if not given; an image of another format is refused, but raw is believed of any file
    #[arg(short, long, alias = "a-format", value_name = "FMT")]
    pub format: Option<String>,
    /// Format of the second image, likewise
    #[arg(short = 'F', long = "other-format", alias = "b-format", value_name = "FMT")]
    pub other_format: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    /// Print nothing; the exit status tells
    #[arg(short, long)]
    pub quiet: bool,
    /// Fail also where sizes, or what is allocated, differ
    #[arg(short, long)]
    pub strict: bool,
    /// Read the images even if they are in use; a change meanwhile may look like a difference
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, how the process is confined, how large the disks are, and what the guest logs
    #[arg(short, long)]
    pub verbose: bool,
    /// Accepted for scripts: nothing is written
    #[arg(short = 'T', long = "cache", hide = true, value_enum, value_name = "MODE")]
    pub cache: Option<CacheMode>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub unsupported: UnsupportedArgs,
    /// The first image
    #[arg(value_name = "FILENAME1")]
    pub first: PathBuf,
    /// The second image
    #[arg(value_name = "FILENAME2")]
    pub second: PathBuf,
}

/// Run the command; the exit status.
pub fn run(args: &CompareArgs, out: &mut dyn Write) -> u8 {
    match compare(args, out) {
        Ok(status) => status,
        Err(error) => {
            print_error(&error, args.output);
            match error.code {
                ErrorCode::OverlayIo | ErrorCode::BackingIo => UNREADABLE,
                ErrorCode::OverlayCorrupt | ErrorCode::BackingCorrupt | ErrorCode::ParseFailed => METADATA,
                _ => FAILED,
            }
        }
    }
}

fn compare(args: &CompareArgs, out: &mut dyn Write) -> Result<u8, Error> {
    args.unsupported.refuse()?;
    let told = Rc::new(Told { verbose: args.verbose, ..Told::of("compare", &args.progress, args.quiet)? });
    let result = compared(args, &told);
    told.end(false, result.as_ref());
    let outcome = result?;
    match args.output {
        _ if args.quiet => {}
        OutputFormat::Human => print(out, &text(&outcome, args.strict))?,
        OutputFormat::Json => print_json(out, &outcome)?,
    }
    Ok(if outcome.difference.is_some() { DIFFERENT } else { 0 })
}

fn compared(args: &CompareArgs, told: &Rc<Told>) -> Result<CompareOutcome, Error> {
    let config = super::configuration(args.output)?;
    let request = CompareRequest {
        images: [args.first.clone(), args.second.clone()],
        formats: [args.format.clone(), args.other_format.clone()],
        strict: args.strict,
        force_share: args.force_share,
        settings: args.opening.settings(&config),
    };
    run_compare(&request, &told.session(Cancel::new()))
}

/// What is said to people.
fn text(outcome: &CompareOutcome, strict: bool) -> String {
    let [first, second] = outcome.virtual_sizes;
    // Past the end of the shorter one, the longer one was looked at by itself.
    let beyond = match outcome.difference {
        Some(Difference::Content(at)) => at >= first.min(second),
        Some(Difference::Size | Difference::Allocation(_)) => false,
        None => true,
    };
    let warning = if first != second && beyond && !strict { "Warning: Image size mismatch!\n" } else { "" };
    let line = match outcome.difference {
        None => "Images are identical.".to_owned(),
        Some(Difference::Size) => "Strict mode: Image size mismatch!".to_owned(),
        Some(Difference::Allocation(at)) => format!("Strict mode: Offset {at} block status mismatch!"),
        Some(Difference::Content(at)) => format!("Content mismatch at offset {at}!"),
    };
    format!("{warning}{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_those_of_qemu_img() {
        let said =
            |virtual_sizes, difference| text(&CompareOutcome { virtual_sizes, sandbox: "kvm", difference }, false);
        assert_eq!(said([7, 7], None), "Images are identical.\n");
        assert_eq!(said([7, 9], None), "Warning: Image size mismatch!\nImages are identical.\n");
        assert_eq!(said([9, 7], Some(Difference::Content(3))), "Content mismatch at offset 3!\n");
        let beyond = "Warning: Image size mismatch!\nContent mismatch at offset 7!\n";
        assert_eq!(said([9, 7], Some(Difference::Content(7))), beyond);
        let strict = CompareOutcome { virtual_sizes: [7, 9], sandbox: "kvm", difference: Some(Difference::Size) };
        assert_eq!(text(&strict, true), "Strict mode: Image size mismatch!\n");
    }
}
