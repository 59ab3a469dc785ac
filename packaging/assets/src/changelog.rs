//! `CHANGELOG.md` in Debian's form (`deb-changelog(5)`).

use crate::Result;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::Timestamp;
use std::fmt::Write as _;

/// Where packages take the maintainer from: this line of `engine/cli/Cargo.toml`.
const MAINTAINER_KEY: &str = "maintainer = ";
/// Longest line, in columns.
const WIDTH: usize = 79;

/// A version and what changed in it.
#[derive(Default)]
struct Entry {
    version: String,
    date: String,
    changes: Vec<String>,
}

/// The maintainer of the packages, as `engine/cli/Cargo.toml` names it.
///
/// # Errors
/// A manifest that names none.
pub fn maintainer(manifest: &str) -> Result<String> {
    let line = manifest.lines().find_map(|line| line.strip_prefix(MAINTAINER_KEY));
    line.map(|value| value.trim_matches('"').to_owned())
        .ok_or_else(|| "engine/cli/Cargo.toml: no maintainer".to_owned())
}

/// What is unreleased has the version of the sources, and their date: a package that is built releases it.
///
/// # Errors
/// A heading that names no version or a date that is none; a changelog that says nothing of this version.
pub fn debian(markdown: &str, sources: Timestamp, maintainer: &str) -> Result<String> {
    let mut text = String::new();
    let entries = entries(markdown);
    let this = env!("CARGO_PKG_VERSION");
    if !entries.first().is_some_and(|entry| entry.version == this || entry.version == "Unreleased") {
        return Err(format!("CHANGELOG.md: the first section is neither [Unreleased] nor [{this}]"));
    }
    for Entry { version, date, changes } in entries {
        let (version, date) = if version == "Unreleased" {
            if changes.is_empty() {
                continue;
            }
            (this.to_owned(), sources)
        } else {
            let day =
                date.parse::<Date>().map_err(|error| format!("CHANGELOG.md: [{version}]: \"{date}\": {error}"))?;
            let start = day.to_zoned(TimeZone::UTC).map_err(|error| format!("CHANGELOG.md: [{version}]: {error}"))?;
            (version, start.timestamp())
        };
        // Writing into a string cannot fail.
        let _ = writeln!(text, "instar ({version}) unstable; urgency=medium\n");
        let options = textwrap::Options::new(WIDTH).initial_indent("  * ").subsequent_indent("    ");
        for change in changes {
            let _ = writeln!(text, "{}", textwrap::fill(&change, &options));
        }
        let date = date.to_zoned(TimeZone::UTC).strftime("%a, %d %b %Y %H:%M:%S +0000");
        let _ = writeln!(text, "\n -- {maintainer}  {date}\n");
    }
    Ok(text)
}

/// The sections `## [VERSION] - DATE`, and their items.
fn entries(markdown: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in markdown.lines() {
        if let Some(heading) = line.strip_prefix("## [") {
            let (version, rest) = heading.split_once(']').unwrap_or((heading, ""));
            let date = rest.trim_start_matches([' ', '-']).trim().to_owned();
            entries.push(Entry { version: version.to_owned(), date, changes: Vec::new() });
        } else if let Some(entry) = entries.last_mut() {
            if let Some(change) = line.strip_prefix("- ") {
                entry.changes.push(change.replace('`', ""));
            } else if let (Some(more), Some(change)) = (line.strip_prefix("  "), entry.changes.last_mut()) {
                change.push(' ');
                change.push_str(&more.trim().replace('`', ""));
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: Timestamp = Timestamp::UNIX_EPOCH;

    #[test]
    fn entries_are_debians() {
        let words = "word ".repeat(30);
        let markdown = format!(
            "# Log\n\n## [Unreleased]\n\n### Added\n\n- `One`, which\n  goes on.\n- {words}\n\n\
            ## [0.0.9] - 2026-01-02\n\n### Fixed\n\n- Two.\n"
        );
        let text = debian(&markdown, DATE, "me <m@e>").unwrap_or_else(|error| error);
        let expected = format!(
            "instar ({}) unstable; urgency=medium\n\n  * One, which goes on.\n  * word",
            env!("CARGO_PKG_VERSION")
        );
        assert!(text.starts_with(&expected), "{text}");
        assert!(
            text.contains(
                "  Thu, 01 Jan 1970 00:00:00 +0000\n\ninstar (0.0.9) unstable; urgency=medium\n\n  * Two.\n\n -- me <m@e>  "
            ),
            "{text}"
        );
        assert!(text.ends_with("  Fri, 02 Jan 2026 00:00:00 +0000\n\n"), "{text}");
        assert!(text.lines().all(|line| line.len() < 80), "{text}");
    }

    #[test]
    fn a_changelog_of_another_version_is_refused() {
        for (markdown, words) in [
            ("## [99.0.0] - 2026-01-02\n- x\n", "neither"),
            ("nothing\n", "neither"),
            ("## [Unreleased]\n\n## [0.0.1] - yesterday\n- x\n", "yesterday"),
        ] {
            assert!(debian(markdown, DATE, "").is_err_and(|error| error.contains(words)), "{markdown}");
        }
    }
}
