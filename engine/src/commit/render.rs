//! What a commit prints.

use super::CommitRunResult;
use crate::cli::output::{print, print_json_indented, render_error, unprinted_but};
use crate::cli::OutputFormat;
use crate::error::Error;
use crate::escape::{escape_path, printable};
use serde_json::{json, Map, Value};
use std::fmt::Write as _;
use std::io::Write;

/// Indentation of the JSON that the contract shows.
const INDENT: &[u8] = b"  ";

/// A path as JSON text: bytes that are no UTF-8 are shown as replacement characters.
fn text(path: &std::path::Path) -> Value {
    Value::String(path.to_string_lossy().into_owned())
}

fn object(result: &CommitRunResult) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("overlay".into(), text(&result.overlay));
    map.insert("overlay_format".into(), json!(result.overlay_format));
    map.insert("backing".into(), text(&result.backing));
    map.insert("backing_format".into(), json!(result.backing_format));
    map.insert("clusters_committed".into(), json!(result.clusters_committed));
    map.insert("bytes_committed".into(), json!(result.bytes_committed));
    map.insert("overlay_clusters_cleared".into(), json!(result.overlay_clusters_cleared));
    // Only there if there is something to say.
    if !result.stale.is_empty() {
        map.insert("stale".into(), result.stale.iter().map(|path| text(path)).collect());
    }
    if !result.warnings.is_empty() {
        map.insert("warnings".into(), json!(result.warnings));
    }
    map
}

/// Print the result of a commit.
///
/// # Errors
/// When it cannot be written.
pub fn render_commit_success(
    result: &CommitRunResult,
    output: OutputFormat,
    quiet: bool,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let printed = match output {
        OutputFormat::Json => print_json_indented(out, &Value::Object(object(result)), INDENT),
        OutputFormat::Human if quiet => Ok(()),
        OutputFormat::Human => print(out, "Image committed.\n"),
    };
    printed.map_err(|error| unprinted_but("the commit is done", &result.overlay_given, &error))
}

/// Print what a commit would do: the same keys, and `dry_run`.
///
/// # Errors
/// When it cannot be written.
pub fn render_dry_run(result: &CommitRunResult, output: OutputFormat, out: &mut dyn Write) -> Result<(), Error> {
    match output {
        OutputFormat::Json => {
            let mut map = object(result);
            map.insert("dry_run".into(), json!(true));
            map.insert("backing_growth_bytes".into(), json!(result.run.growth.bytes));
            map.insert("backing_space_bytes".into(), json!(result.run.growth.space));
            map.insert("free_bytes".into(), json!(result.run.growth.free));
            print_json_indented(out, &Value::Object(map), INDENT)
        }
        OutputFormat::Human => {
            let disk = result.backing_grows_to.map(|size| format!(", whose disk would grow to {size} bytes"));
            let growth = result.run.growth;
            let free = growth.free.map(|free| format!(", of which its file system has {free} free"));
            let plural = if result.clusters_committed == 1 { "" } else { "s" };
            print(
                out,
                &format!(
                    "Would commit {} cluster{plural} ({} bytes) of '{}' into '{}'{}. The target's file would grow by {} bytes \
                     at most, and take {} more bytes of the disk{}. Nothing was changed.\n",
                    result.clusters_committed,
                    result.bytes_committed,
                    escape_path(&result.overlay_given),
                    escape_path(&result.backing),
                    disk.unwrap_or_default(),
                    growth.bytes,
                    growth.space,
                    free.unwrap_or_default(),
                ),
            )
        }
    }
}

/// The line for a warning.
#[must_use]
pub fn render_warning(warning: &str) -> String {
    format!("instar: warning: {}\n", printable(warning))
}

/// The error as one line, or as one JSON object.
#[must_use]
pub fn render_commit_error(error: &Error, output: OutputFormat) -> String {
    render_error(error, output)
}

/// Lines of `-v` about what was measured.
#[must_use]
pub fn render_verbose(result: &CommitRunResult) -> String {
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
        ("creating the virtual machine", report.time_create),
        ("loading the guest modules", report.time_load),
        ("from entering the guest to its first exit", report.time_first_exit),
        ("running it", report.time_run),
        ("of that in the guest", report.time_guest),
    ] {
        line(format!("time: {:.3} ms {part}", ms(time)));
    }
    line(format!(
        "guest: ring {}, {} exits, {} doorbells, {} requests, {} messages",
        report.ring, report.exits, report.doorbells, report.requests, report.messages
    ));
    line(format!("moved: {}", result.run.statistics));
    for logged in &result.run.log {
        line(format!("guest says: {logged}"));
    }
    text
}
