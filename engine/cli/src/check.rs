//! `instar check`: options, and what is printed, in the words of `qemu-img check`.

use super::commit::CacheMode;
use super::opening::OpeningArgs;
use super::output::{print, print_json, OutputFormat};
use super::terminal::say;
use super::usage::CHECK_USAGE;
use super::{print_error, reading};
use clap::Args;
use instar::check::{run_check, CheckOutcome, CheckRequest};
use instar::error::Error;
use instar::escape::{escape_path, printable};
use instar_guest_abi::{CheckSummary, ErrorCode, FindingKind};
use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// Exit status for an image with corruption.
const CORRUPT: u8 = 2;
/// Exit status for an image that leaks space and is right otherwise.
const LEAKY: u8 = 3;
/// Exit status for a format that cannot be checked.
const NOT_SUPPORTED: u8 = 63;

/// Check the consistency of an image, without changing it
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Format of the image. Detected if not given; an image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Print no summary
    #[arg(short, long)]
    pub quiet: bool,
    /// Read the image even if it is in use; a change meanwhile may look like damage
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, how the process is confined, and what the guest logs
    #[arg(short, long)]
    pub verbose: bool,
    /// An option of `qemu-img check`, for a sentence about it
    #[arg(short, long, hide = true, value_name = "WHAT")]
    pub repair: Option<String>,
    /// Taken for the sake of scripts: nothing is written
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
    if args.repair.is_some() {
        let clause =
            "instar does not repair images outside of a commit: use `qemu-img check -r`, if it knows the format";
        return Err(Error::image(&args.filename, ErrorCode::BadUsage, clause));
    }
    let config = super::configuration(args.output)?;
    let request = CheckRequest {
        image: args.filename.clone(),
        format: args.format.clone(),
        force_share: args.force_share,
        settings: args.opening.settings(&config),
    };
    let result = run_check(&request, &reading(args.verbose))?;
    say(&findings(&result));
    match args.output {
        _ if args.quiet => {}
        OutputFormat::Human => print(out, &summary(&result.found))?,
        OutputFormat::Json => print_json(out, &json(&result, &escape_path(&args.filename).to_string()))?,
    }
    Ok(status(&result.found))
}

fn status(found: &CheckSummary) -> u8 {
    match (found.corruptions, found.leaks) {
        (0, 0) => 0,
        (0, _) => LEAKY,
        _ => CORRUPT,
    }
}

/// The findings, one line each.
fn findings(result: &CheckOutcome) -> String {
    let mut text = String::new();
    for (kind, finding) in &result.findings {
        let word = match kind {
            FindingKind::Corruption => "ERROR",
            FindingKind::Leak => "Leaked",
        };
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{word} {}", printable(finding));
    }
    let all = result.found.corruptions.saturating_add(result.found.leaks);
    let more = all.saturating_sub(result.findings.len() as u64);
    if more != 0 {
        let _ = writeln!(text, "… and {more} more");
    }
    text
}

/// The summary for people.
fn summary(found: &CheckSummary) -> String {
    let mut text = String::new();
    if found.corruptions == 0 && found.leaks == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    // Writing into a string cannot fail.
    if found.corruptions != 0 {
        let _ = writeln!(
            text,
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.",
            found.corruptions
        );
    }
    if found.leaks != 0 {
        let _ = writeln!(
            text,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
            found.leaks
        );
    }
    let (allocated, total) = (found.allocated_clusters, found.total_clusters);
    if allocated != 0 && total != 0 {
        #[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(found.fragmented_clusters, allocated),
            percent(found.compressed_clusters, allocated)
        );
    }
    if found.image_end_offset != 0 {
        let _ = writeln!(text, "Image end offset: {}", found.image_end_offset);
    }
    if found.unused_tail != 0 {
        let _ = writeln!(text, "Unused behind it: {} bytes of the file", found.unused_tail);
    }
    text
}

/// `qemu-img check`'s keys, and `unused-tail`; those of counts that are 0 are left out, as there.
fn json(result: &CheckOutcome, filename: &str) -> Value {
    let found = &result.found;
    let mut object = Map::new();
    let counts = [
        ("image-end-offset", found.image_end_offset, false),
        ("total-clusters", found.total_clusters, false),
        ("fragmented-clusters", found.fragmented_clusters, false),
        ("compressed-clusters", found.compressed_clusters, false),
        ("corruptions", found.corruptions, false),
        ("check-errors", 0, true),
        ("leaks", found.leaks, false),
        ("allocated-clusters", found.allocated_clusters, false),
        ("unused-tail", found.unused_tail, false),
    ];
    for (key, count, always) in counts {
        if always || count != 0 {
            object.insert(key.to_owned(), count.into());
        }
    }
    object.insert("filename".to_owned(), filename.into());
    object.insert("format".to_owned(), result.format.as_str().into());
    object.insert("sandbox".to_owned(), result.sandbox.into());
    Value::Object(object)
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

    #[test]
    fn findings_are_safe_and_counted() {
        let found = CheckSummary { leaks: 5, corruptions: 2, ..CheckSummary::default() };
        let findings_of =
            vec![(FindingKind::Leak, "a\x1b[2J\nb".to_owned()), (FindingKind::Corruption, "c".to_owned())];
        let text = findings(&CheckOutcome { format: "x".into(), sandbox: "kvm", found, findings: findings_of });
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("ERROR c\n… and 5 more") && !text.contains('\x1b'), "{text}");
    }
}
