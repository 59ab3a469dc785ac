//! What a commit prints.

use super::CommitRunResult;
use crate::cli::output::{print, print_json_indented};
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
    match output {
        OutputFormat::Json => print_json_indented(out, &Value::Object(object(result)), INDENT),
        OutputFormat::Human if quiet => Ok(()),
        OutputFormat::Human => print(out, "Image committed.\n"),
    }
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
            print_json_indented(out, &Value::Object(map), INDENT)
        }
        OutputFormat::Human => {
            let growth = result.backing_grows_to.map(|size| format!(", which would grow to {size} bytes"));
            print(
                out,
                &format!(
                    "Would commit {} clusters ({} bytes) of '{}' into '{}'{}. Nothing was changed.\n",
                    result.clusters_committed,
                    result.bytes_committed,
                    escape_path(&result.overlay),
                    escape_path(&result.backing),
                    growth.unwrap_or_default()
                ),
            )
        }
    }
}

/// The lines for warnings.
#[must_use]
pub fn render_warnings(warnings: &[String]) -> String {
    warnings.iter().map(|warning| format!("instar: warning: {}\n", printable(warning))).collect()
}

/// The error as one line, or as one JSON object.
#[must_use]
pub fn render_commit_error(error: &Error, output: OutputFormat) -> String {
    match output {
        OutputFormat::Human => format!("instar: {}\n", printable(&error.message)),
        OutputFormat::Json => {
            let value = json!({
                "error": {"code": error.code.number(), "name": error.code.name(), "message": error.message}
            });
            format!("{value}\n")
        }
    }
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
