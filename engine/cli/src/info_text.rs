//! `instar info` for people.

use super::color::Paint;
use super::paragraph::{filled, Indent};
use super::snapshot_text;
use instar::bytes::format_size;
use instar::escape::{escape, escape_bytes, escape_path, printable};
use instar::info::ImageInfo;
use serde_json::Value;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;

/// A sentence below its heading.
const NOTE: Indent = Indent { first: "    ", rest: "      " };

/// The lines of `qemu-img info`. Whatever came from the image is escaped. On a terminal with `width` columns, sentences are
/// broken between words; names stay whole, so that they can be copied.
pub(super) fn human(image: &ImageInfo, paint: Paint, width: Option<usize>) -> String {
    let facts = &image.facts;
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        let _ = writeln!(text, "{}: {value}", paint.label(label));
    };
    line("image", &paint.heading(&escape_path(&image.filename)));
    line("file format", &facts.format);
    line("virtual size", &format!("{} ({} bytes)", format_size(facts.virtual_size), facts.virtual_size));
    line("disk size", &format_size(image.actual_size));
    if facts.encrypted {
        line("encrypted", &paint.warning("yes"));
    }
    if facts.cluster_size != 0 {
        line("cluster_size", &facts.cluster_size.to_string());
    }
    if facts.dirty {
        line("cleanly shut down", &paint.warning("no"));
    }
    if let Some((recorded, format)) = image.backing() {
        let name = escape_bytes(recorded);
        match &image.backing_path {
            None => line("backing file", &paint.warning(&format!("{name} (not a plain file name: not followed)"))),
            Some(path) if path.as_os_str().as_bytes() == recorded => line("backing file", &name),
            Some(path) => line("backing file", &format!("{name} (actual path: {})", escape_path(path))),
        }
        if let Some(format) = format {
            line("backing file format", &escape_bytes(format));
        }
    }
    if let Some(snapshots) = image.snapshots() {
        text.push_str(&snapshot_text::human(&snapshots));
    }
    let mut features = image.specific().peekable();
    if features.peek().is_some() {
        let _ = writeln!(text, "{}", paint.heading("Format specific information:"));
    }
    for (name, value) in features {
        feature(&mut text, paint, 1, &name, &value);
    }
    if !image.notes.is_empty() {
        let _ = writeln!(text, "{}", paint.warning("Notes:"));
    }
    for note in &image.notes {
        let _ = writeln!(text, "{}", filled(&printable(note), NOTE, width));
    }
    text
}

/// A feature, lists and objects indented below their name.
fn feature(text: &mut String, paint: Paint, depth: usize, name: &str, value: &Value) {
    let indent = "    ".repeat(depth);
    let damaged = name == "corrupt" && *value == Value::Bool(true);
    let name = paint.label(&escape(&name.replace('-', " ")));
    let children: Vec<(String, &Value)> = match value {
        Value::Array(list) => list.iter().enumerate().map(|(i, value)| (format!("[{i}]"), value)).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::String(string) => {
            let _ = writeln!(text, "{indent}{name}: {}", escape(string));
            return;
        }
        _ if damaged => {
            let _ = writeln!(text, "{indent}{name}: {}", paint.bad("true"));
            return;
        }
        other => {
            let _ = writeln!(text, "{indent}{name}: {other}");
            return;
        }
    };
    let _ = writeln!(text, "{indent}{name}:");
    for (key, value) in children {
        feature(text, paint, depth + 1, &key, value);
    }
}
