//! Making text from images safe for a terminal.
//!
//! A name can hold escape sequences that rewrite the screen, line feeds that forge a second line, and characters
//! that reverse the direction of writing. They are shown as `\x1b`, `\x0a`, `\u{202e}`. A backslash is itself, as in the
//! names of Windows (`C:\new`), unless it would begin one of these: then it is `\x5c`. So two names never look the same.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether a character must not reach a terminal unescaped: control characters, and invisible characters that change how others
/// are shown.
#[must_use]
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Escape the hidden characters in a text of the program that may hold parts of images.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(is_hidden) {
        let mut out = String::with_capacity(text.len() + 16);
        text.chars().for_each(|c| push(&mut out, c));
        Cow::Owned(out)
    } else {
        Cow::Borrowed(text)
    }
}

/// Escape text from an image unambiguously: hidden characters, and backslashes that would look like the beginning of an escape.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        match c {
            '\\' if begins_an_escape(text.as_bytes().get(at + 1..).unwrap_or_default()) => out.push_str("\\x5c"),
            c => push(&mut out, c),
        }
    }
    out
}

/// Whether a backslash before these bytes would be read as one of the escapes that [`push`] writes.
fn begins_an_escape(rest: &[u8]) -> bool {
    match rest {
        [b'x', high, low, ..] => high.is_ascii_hexdigit() && low.is_ascii_hexdigit(),
        [b'u', b'{', ..] => true,
        _ => false,
    }
}

/// Escape bytes from an image as [`escape`] does, and bytes that are not UTF-8 as `\xNN`.
#[must_use]
pub fn escape_bytes(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(&escape(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Quote bytes as one word of a shell, because a person may paste advice whose words an image has chosen. Bytes that must not
/// reach a terminal become `$'\\xNN'`, which POSIX has since 2024.
#[must_use]
pub fn shell_word(bytes: &[u8]) -> String {
    if let Some(text) = std::str::from_utf8(bytes).ok().filter(|text| !text.chars().any(is_hidden)) {
        return format!("'{}'", text.replace('\'', r"'\''"));
    }
    let mut word = String::from("$'");
    for &byte in bytes {
        match byte {
            b'\'' | b'\\' => word.extend(['\\', char::from(byte)]),
            b' '..=b'~' => word.push(char::from(byte)),
            _ => {
                let _ = write!(word, "\\x{byte:02x}");
            }
        }
    }
    word + "'"
}

/// [`shell_word`] of a path.
#[must_use]
pub fn shell_path(path: &Path) -> String {
    shell_word(path.as_os_str().as_bytes())
}

/// Escape a path of any origin.
#[must_use]
pub fn escape_path(path: &Path) -> String {
    escape_bytes(path.as_os_str().as_bytes())
}

/// Replace hidden characters in JSON by `\uNNNN`. JSON allows them only within strings.
#[must_use]
pub fn escape_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if is_hidden(c) && c != '\n' {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    out
}

fn push(out: &mut String, c: char) {
    match c {
        c if is_hidden(c) && u32::from(c) < 0x100 => {
            let _ = write!(out, "\\x{:02x}", u32::from(c));
        }
        c if is_hidden(c) => {
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        }
        c => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_takes_a_word_for_what_it_was() {
        for bytes in [
            &b"plain"[..],
            b"it's",
            b"a';touch x;'",
            b"$(x) `y` \"z\" \\",
            b"new\nline'",
            b"\xff\x80'\\",
            "\u{202e}x".as_bytes(),
        ] {
            let word = shell_word(bytes);
            assert!(!word.chars().any(is_hidden), "{word}");
            let said = std::process::Command::new("bash").args(["-c", &format!("printf %s {word}")]).output();
            assert!(said.is_ok_and(|said| said.stdout == bytes), "{word}");
        }
    }

    #[test]
    fn what_moves_a_cursor_is_shown_instead() {
        assert_eq!(escape("a\x1b[2Jb\nc\u{202e}e\u{9b}é"), "a\\x1b[2Jb\\x0ac\\u{202e}e\\x9bé");
        assert_eq!(escape_bytes(b"ok \xff\xfe \xc3\xa9"), "ok \\xff\\xfe é");
        assert_eq!(printable("C:\\x\r"), "C:\\x\\x0d");
        assert!(matches!(printable("plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_backslash_is_itself_unless_it_would_begin_an_escape() {
        for name in [r"C:\VMs\new\base.vhdx", r"\\server\share\x.vhd", r"a\", r"\x1", r"\xg0", r"\u202e"] {
            assert_eq!(escape(name), name);
        }
        assert_eq!(escape(r"a\x1b"), r"a\x5cx1b");
        assert_eq!(escape(r"a\u{202e}"), r"a\x5cu{202e}");
        assert_eq!(escape("\\\x1b"), r"\\x1b");
    }

    #[test]
    fn two_names_never_look_the_same() {
        // All names of up to five of the bytes that escapes consist of, a line feed and one that is not UTF-8.
        let alphabet = b"\\x0au{\n\xff";
        let mut names = vec![Vec::new()];
        let mut shown = std::collections::HashSet::new();
        for _ in 0..5 {
            names = names
                .iter()
                .flat_map(|name: &Vec<u8>| alphabet.iter().map(move |&byte| [&name[..], &[byte]].concat()))
                .collect();
            for name in &names {
                let text = escape_bytes(name);
                assert!(!text.chars().any(is_hidden) && shown.insert(text), "{name:?}");
            }
        }
    }

    #[test]
    fn json_stays_json() {
        let text = "a\u{9b}b\u{202e}c\u{7f}d\u{e0001}";
        let json = escape_json(&serde_json::to_string_pretty(&vec![text]).unwrap_or_default());
        assert!(json.is_ascii(), "{json}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&json).unwrap_or_default(), [text]);
    }
}
