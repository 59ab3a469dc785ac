//! Manual pages that are written by hand: the files in `docs/man` whose names end in a section, `NAME.7`.

use crate::{read, Result};
use jiff::tz::TimeZone;
use jiff::Timestamp;
use std::path::{Path, PathBuf};

/// The date of a page, as `man(7)` wants it.
pub fn day(date: Timestamp) -> String {
    date.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d").to_string()
}

/// The pages of a folder, with `@DATE@` and `@VERSION@` filled in.
///
/// # Errors
/// A folder or file that cannot be read.
pub fn by_hand(folder: &Path, date: Timestamp) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let unreadable = |error| format!("{}: {error}", folder.display());
    let mut pages = Vec::new();
    for entry in folder.read_dir().map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let section = path.extension().and_then(|section| section.to_str()).unwrap_or_default();
        let (Some(name), true) = (path.file_name(), matches!(section.as_bytes(), [b'1'..=b'9'])) else { continue };
        let page = read(&path)?.replace("@DATE@", &day(date)).replace("@VERSION@", env!("CARGO_PKG_VERSION"));
        pages.push((Path::new("man").join(name), tidy(&page).into_bytes()));
    }
    Ok(pages)
}

/// As the formatters want it: outside of literal text no empty lines, and no line that is longer than 80 bytes; no blanks at
/// ends; no macro for a paragraph or a line break where there is one already.
pub fn tidy(page: &str) -> String {
    let mut text = String::new();
    let (mut before, mut literal) = ("", false);
    for line in page.lines().map(str::trim_end) {
        let doubled = (line == ".br" && before == ".br") || (line == ".PP" && before.starts_with(".SH"));
        if !literal && (doubled || line.is_empty()) {
            continue;
        }
        literal = match line.split(' ').next() {
            Some(".EX" | ".nf" | ".TS" | ".Bd") => true,
            Some(".EE" | ".fi" | ".TE" | ".Ed") => false,
            _ => literal,
        };
        // The line after .TP is a tag.
        if literal || before == ".TP" || line.starts_with(['.', '\'']) || line.ends_with('\\') {
            text.push_str(line);
        } else {
            text.push_str(&filled(line));
        }
        text.push('\n');
        before = line;
    }
    text
}

/// In lines of 80 bytes at most, none of which begins with what begins a request.
fn filled(line: &str) -> String {
    let options = textwrap::Options::new(80)
        .word_separator(textwrap::WordSeparator::AsciiSpace)
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .break_words(false);
    let lines = textwrap::wrap(line, options);
    lines
        .into_iter()
        .map(|line| if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.into_owned() })
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_tidied() {
        let long = format!("{}.hidden words", "a-b ".repeat(20));
        let text = tidy(&format!(".SH X\n.PP\n\n{long}\n.br\n.br\n.TP\n{long}\n.EX\n{long}\n\nb\n.EE\n\n"));
        let tail = "a-b ".repeat(20);
        assert_eq!(
            text,
            format!(".SH X\n{}\n\\&.hidden words\n.br\n.TP\n{long}\n.EX\n{long}\n\nb\n.EE\n", tail.trim_end())
        );
    }
}
