//! `instar info` for people.

use super::size::format_size;
use super::snapshot_text;
use instar::escape::{escape, escape_bytes, escape_path, printable};
use instar::info::ImageInfo;
use serde_json::Value;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;

/// The lines of `qemu-img info`. Whatever came from the image is escaped.
pub(super) fn human(image: &ImageInfo) -> String {
    let facts = &image.facts;
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        let _ = writeln!(text, "{label}: {value}");
    };
    line("image", &escape_path(&image.filename));
    line("file format", &facts.format);
    line("virtual size", &format!("{} ({} bytes)", format_size(facts.virtual_size), facts.virtual_size));
    line("disk size", &format_size(image.actual_size));
    if facts.encrypted {
        line("encrypted", "yes");
    }
    if facts.cluster_size != 0 {
        line("cluster_size", &facts.cluster_size.to_string());
    }
    if facts.dirty {
        line("cleanly shut down", "no");
    }
    if let Some((recorded, format)) = image.backing() {
        let name = escape_bytes(recorded);
        match &image.backing_path {
            None => line("backing file", &format!("{name} (not a plain file name: not followed)")),
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
        text.push_str("Format specific information:\n");
    }
    for (name, value) in features {
        feature(&mut text, 1, &name, &value);
    }
    if !image.notes.is_empty() {
        text.push_str("Notes:\n");
    }
    for note in &image.notes {
        let _ = writeln!(text, "    {}", printable(note));
    }
    text
}

/// A feature, lists and objects indented below their name.
fn feature(text: &mut String, depth: usize, name: &str, value: &Value) {
    let indent = "    ".repeat(depth);
    let name = escape(&name.replace('-', " "));
    let children: Vec<(String, &Value)> = match value {
        Value::Array(list) => list.iter().enumerate().map(|(i, value)| (format!("[{i}]"), value)).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::String(string) => {
            let _ = writeln!(text, "{indent}{name}: {}", escape(string));
            return;
        }
        other => {
            let _ = writeln!(text, "{indent}{name}: {other}");
            return;
        }
    };
    let _ = writeln!(text, "{indent}{name}:");
    for (key, value) in children {
        feature(text, depth + 1, &key, value);
    }
}
