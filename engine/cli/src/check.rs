//! `instar check`: options, and its exit status.

use super::cache_mode::CacheMode;
use super::check_text::{findings, json, kept, repaired, summary};
use super::color::{ColorArgs, Paint};
use super::opening::OpeningArgs;
use super::output::{print, print_json, OutputFormat};
use super::print_error;
use super::progress_args::ProgressArgs;
use super::said::broken;
use super::signals::cancel_on_signals;
use super::terminal::say;
use super::told::Told;
use super::usage::{bad_usage, CHECK_USAGE};
use clap::{Args, ValueEnum};
use instar::check::{run_check, CheckOutcome, CheckRequest};
use instar::error::Error;
use instar::escape::escape_path;
use instar::operation::Cancel;
use instar_guest_abi::{CheckSummary, ErrorCode, Repair};
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;

/// Exit status for an image with corruption.
const CORRUPT: u8 = 2;
/// Exit status for an image that leaks space and is right otherwise.
const LEAKY: u8 = 3;
/// Exit status for a format that cannot be checked.
const NOT_SUPPORTED: u8 = 63;

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairMode {
    /// Give leaked clusters back, and clear marks of an image in which nothing else is wrong
    Leaks,
    /// Mend corruptions as well, as far as nothing is lost by it
    All,
}

/// Check the consistency of an image, and repair it
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Format of the image. Detected if not given; an image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub color: ColorArgs,
    /// Print no summary
    #[arg(short, long)]
    pub quiet: bool,
    /// Read the image even if it is in use; a change meanwhile may look like damage
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, how the process is confined, and what the guest logs
    #[arg(short, long)]
    pub verbose: bool,
    /// Repair what is found, unless something would be lost: that is said, and stays. Without this, nothing is changed
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<RepairMode>,
    /// Say what -r would repair, and change nothing
    #[arg(long, requires = "repair")]
    pub dry_run: bool,
    /// Accepted for scripts: a repair always flushes between its steps
    #[arg(short = 'T', long = "cache", hide = true, value_enum, value_name = "MODE")]
    pub cache: Option<CacheMode>,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
}

/// Run the command; the exit status.
pub fn run(args: &CheckArgs, out: &mut dyn Write) -> u8 {
    match check(args, out) {
        Ok(status) => status,
        Err(error) => {
            let failed = print_error(&error, args.output);
            match error.code {
                ErrorCode::NotImplemented => NOT_SUPPORTED,
                ErrorCode::BadUsage => CHECK_USAGE,
                _ => failed,
            }
        }
    }
}

fn check(args: &CheckArgs, out: &mut dyn Write) -> Result<u8, Error> {
    if args.repair.is_some() && args.force_share {
        return Err(bad_usage("-r changes the image, which nothing else may use then: leave -U out"));
    }
    let config = super::configuration(args.output)?;
    let request = CheckRequest {
        image: args.filename.clone(),
        format: args.format.clone(),
        force_share: args.force_share,
        repair: args.repair.map(|what| match what {
            RepairMode::Leaks => Repair::Leaks,
            RepairMode::All => Repair::All,
        }),
        dry_run: args.dry_run,
        settings: args.opening.settings(&config),
    };
    // A confined process can ask the terminal nothing.
    let (paint, aside) = (args.color.stdout(), args.color.stderr());
    let told = Rc::new(Told { verbose: args.verbose, ..Told::of("check", &args.progress, args.quiet)? });
    // A repair that is cancelled ends between two requests.
    let changes = args.repair.is_some() && !args.dry_run;
    let cancel = if changes { cancel_on_signals() } else { Cancel::new() };
    let result = run_check(&request, &told.session(cancel));
    let file = escape_path(&args.filename).to_string();
    let lines = told.findings_are_lines();
    let (first, second) = match &result {
        Ok(result) => texts(result, if lines { Paint::PLAIN } else { aside }),
        Err(_) => Default::default(),
    };
    if lines {
        told.findings(&(first.clone() + &second));
    }
    told.end(args.dry_run, result.as_ref().map(|result| json(result, &file)).as_ref().map_err(|error| *error));
    let result = result?;
    if !lines {
        say(&broken(&first));
    }
    if let Some(repair) = result.repair.as_ref().filter(|_| !args.quiet && args.output == OutputFormat::Human) {
        print(out, &repaired(repair))?;
    }
    if !lines {
        say(&broken(&second));
    }
    match args.output {
        _ if args.quiet => {}
        OutputFormat::Human => print(out, &summary(&result, paint))?,
        OutputFormat::Json => print_json(out, &json(&result, &file))?,
    }
    Ok(status(&result.found))
}

/// The findings before a repair and what it keeps, and the findings that there are now, unless that would say the same twice.
fn texts(result: &CheckOutcome, paint: Paint) -> (String, String) {
    let now = || findings(&result.found, &result.findings, paint);
    match &result.repair {
        None => (String::new(), now()),
        Some(repair) if repair.changed() => (findings(&repair.before, &repair.findings, paint) + &kept(repair), now()),
        Some(repair) => (now() + &kept(repair), String::new()),
    }
}

fn status(found: &CheckSummary) -> u8 {
    match (found.corruptions, found.leaks) {
        (0, 0) => 0,
        (0, _) => LEAKY,
        _ => CORRUPT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_that_of_the_worst() {
        let found = |corruptions, leaks| CheckSummary { corruptions, leaks, ..CheckSummary::default() };
        assert_eq!([found(0, 0), found(0, 1), found(1, 0), found(1, 1)].map(|found| status(&found)), [0, 3, 2, 2]);
        assert_eq!(crate::FAILED, 1);
    }
}
