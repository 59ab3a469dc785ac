//! What a commit prints.

use super::output::{print_json_indented, unprinted_but, OutputFormat};
use super::paragraph::print_sentences;
use instar::bytes::format_size;
use instar::bytes::Bytes;
use instar::commit::{AtomicWay, CommitOutcome, DiskDigest, Preview};
use instar::error::Error;
use instar::escape::{escape_path, printable};
use std::fmt::Write as _;
use std::io::Write;

/// Indentation of the JSON that the contract shows.
const INDENT: &[u8] = b"  ";

/// Print the result of a commit.
///
/// # Errors
/// When it cannot be written.
pub fn render_commit_success(
    result: &CommitOutcome,
    output: OutputFormat,
    quiet: bool,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let printed = match output {
        OutputFormat::Json => print_json_indented(out, result, INDENT),
        OutputFormat::Human if quiet => Ok(()),
        OutputFormat::Human => print_sentences(
            out,
            &format!(
                "Image committed.\n{}{}{}{}{}",
                bitmaps(result, false),
                verified(result),
                digest(result),
                relinked(result),
                deleted(result)
            ),
        ),
    };
    printed.map_err(|error| unprinted_but("the commit is done", &result.overlay_given, &error))
}

/// The line about bitmaps; those that are skipped had a line each before the first change.
fn bitmaps(result: &CommitOutcome, would: bool) -> String {
    let Some(bitmaps) = &result.bitmaps else { return String::new() };
    let count = |result: &str| bitmaps.iter().filter(|bitmap| bitmap.result == result).count();
    let (merged, made) = (count("merged"), count("made"));
    let skipped = bitmaps.len() - merged - made;
    if bitmaps.is_empty() {
        return String::new();
    }
    match would {
        true => format!("{merged} bitmaps would be merged, {made} made, and {skipped} skipped.\n"),
        false => format!("{merged} bitmaps were merged, {made} made, and {skipped} skipped.\n"),
    }
}

/// The line about what was read back.
fn verified(result: &CommitOutcome) -> String {
    let line =
        |bytes| format!("{} were read back from '{}', and are right.\n", Bytes(bytes), escape_path(&result.backing));
    result.verified_bytes.map(line).unwrap_or_default()
}

/// The line about the digest of the disk.
fn digest(result: &CommitOutcome) -> String {
    let line = |digest: &DiskDigest| {
        let same = if digest.after.is_some() { ", before and after" } else { "" };
        format!("SHA-256 of the disk, {}{same}: {}\n", Bytes(digest.length), digest.before)
    };
    result.digest.as_ref().map(line).unwrap_or_default()
}

/// The line about the overlay's file.
fn deleted(result: &CommitOutcome) -> String {
    match result.overlay_deleted {
        Some(true) => format!("'{}' was removed.\n", escape_path(&result.overlay_given)),
        _ => String::new(),
    }
}

/// The lines about the overlay's children. That nothing names the overlay any more is not known: an image may lie anywhere.
fn relinked(result: &CommitOutcome) -> String {
    let Some(children) = &result.relinked else { return String::new() };
    let (overlay, backing) = (escape_path(&result.overlay_given), escape_path(&result.backing));
    let count = children.len();
    let named = match count {
        0 => format!("No image was found that names '{overlay}'"),
        1 => format!("One image that named '{overlay}' names '{backing}' now"),
        _ => format!("{count} images that named '{overlay}' name '{backing}' now"),
    };
    match result.overlay_deleted {
        Some(true) => format!("{named}.\n"),
        _ => format!("{named}. Once no other image names '{overlay}', it can be removed.\n"),
    }
}

/// How a target changes whole or not at all.
fn whole(way: AtomicWay, preview: &Preview) -> String {
    let Preview { undo_log_bytes, undo_free_bytes, .. } = *preview;
    let bytes = Bytes(undo_log_bytes.unwrap_or(0));
    match (way, undo_free_bytes) {
        (AtomicWay::Clone, _) => "A clone of it would take its place when it is complete. ".to_owned(),
        (AtomicWay::UndoLog, None) => format!(
            "An undo log beside it would keep what it was until it is complete, and take {bytes} more at most. "
        ),
        (AtomicWay::UndoLog, Some(free)) => format!(
            "An undo log would keep what it was until it is complete, and take {bytes} at most in its directory, which has {} free. ",
            Bytes(free)
        ),
    }
}

/// Print what a commit would do: the same keys, and `dry_run`.
///
/// # Errors
/// When it cannot be written.
pub fn render_dry_run(result: &CommitOutcome, output: OutputFormat, out: &mut dyn Write) -> Result<(), Error> {
    match output {
        OutputFormat::Json => print_json_indented(out, result, INDENT),
        OutputFormat::Human => {
            let disk = result.backing_grows_to.map(|size| format!(", whose disk would grow to {}", Bytes(size)));
            let preview = result.preview.unwrap_or_default();
            let free =
                preview.free_bytes.map(|free| format!(", of which its file system has {} free", format_size(free)));
            let lacking = preview.lacking_bytes.map(|bytes| {
                let bytes = Bytes(bytes);
                format!("That may be {bytes} more than there is room for: make room first, or the commit may stop halfway. ")
            });
            let plural = if result.clusters_committed == 1 { "" } else { "s" };
            let children = result.relinked.iter().flatten().filter(|child| !child.already).count();
            let relinked = result.relinked.as_ref().map(|_| match children {
                1 => "1 image would name the target instead of the overlay. ".to_owned(),
                _ => format!("{children} images would name the target instead of the overlay. "),
            });
            let verified = result.verified_bytes.map(|_| "What is written would be read back. ");
            let deleted = result.overlay_deleted.map(|_| "The overlay's file would be removed. ");
            print_sentences(
                out,
                &format!(
                    "Would commit {} cluster{plural} of '{}', {}, into '{}'{}. The target's file would grow by {} at \
                     most, and take {} more of the disk{}. {}{}{}{}{}{}Nothing was changed.\n{}",
                    result.clusters_committed,
                    escape_path(&result.overlay_given),
                    Bytes(result.bytes_committed),
                    escape_path(&result.backing),
                    disk.unwrap_or_default(),
                    Bytes(preview.backing_growth_bytes),
                    Bytes(preview.backing_space_bytes),
                    free.unwrap_or_default(),
                    result.atomic.map(|way| whole(way, &preview)).unwrap_or_default(),
                    lacking.unwrap_or_default(),
                    bitmaps(result, true).replace('\n', " "),
                    relinked.unwrap_or_default(),
                    verified.unwrap_or_default(),
                    deleted.unwrap_or_default(),
                    digest(result),
                ),
            )
        }
    }
}

/// Lines of `-v` about what was measured.
#[must_use]
pub fn render_verbose(result: &CommitOutcome) -> String {
    let mut text = String::new();
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let mut line = |line: String| {
        let _ = writeln!(text, "instar: {}", printable(&line));
    };
    for (part, time) in result.timing.parts() {
        line(format!("time: {:.3} ms {part}", ms(*time)));
    }
    let report = &result.run.report;
    for (part, time) in [
        ("creating the sandbox", report.time_create),
        ("loading the guest modules", report.time_load),
        ("from entering the guest to its first exit", report.time_first_exit),
        ("running it", report.time_run),
        ("of that in the guest", report.time_guest),
    ] {
        line(format!("time: {:.3} ms {part}", ms(time)));
    }
    if let Some(bytes) = result.verified_bytes {
        line(format!("read back: {} of the disk", Bytes(bytes)));
    }
    text
}
