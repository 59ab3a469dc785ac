//! The meaning of a recorded name: a file on this machine, or something else.
//!
//! QEMU takes everything with a colon before the first slash for a protocol (`path_has_protocol` in QEMU's `block.c`).
//! Two of them, in their plainest form, are names of local files, and management tools record them: `file:PATH`, and a
//! `json:{…}` that consists of a format and a file name.

use crate::escape::escape;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// Longest recorded name that is looked at, in bytes (`PATH_MAX`).
const MAX_NAME: usize = 4096;

/// A recorded name that means a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileName<'n> {
    /// The path.
    pub path: Cow<'n, [u8]>,
    /// A relative path begins at the working directory, and not at the image that records it: so QEMU takes paths behind a
    /// protocol.
    pub from_working_directory: bool,
    /// The format, if the name says that, too.
    pub format: Option<String>,
}

/// The reason why a recorded name does not mean a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoFile {
    /// Nothing is recorded.
    Empty,
    /// Longer than any path, or with a zero byte.
    Nonsense,
    /// It ends in a slash, in `.` or in `..`.
    Directory,
    /// `C:\…`.
    Windows,
    /// `nbd://…`, `rbd:…`, a `json:` whose driver is no file.
    Protocol,
    /// A `json:` that says more of the disk than a file name: an option by this name, which changes what is read, or is not
    /// known here.
    Option(String),
    /// A `json:` that is no JSON object, or says two things at once.
    Json,
}

impl fmt::Display for NoFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "is empty",
            Self::Nonsense => "is no file name",
            Self::Directory => "names a directory",
            Self::Windows => "is a Windows path",
            Self::Protocol => "is a network or protocol address, not a local file",
            Self::Option(name) => return write!(f, "has the option '{}' beside a file name", escape(name)),
            Self::Json => "is not understood",
        })
    }
}

/// Whether a name begins with a protocol, as QEMU sees it: a colon before the first slash.
fn is_protocol(name: &[u8]) -> bool {
    let end = name.iter().position(|&byte| byte == b'/').unwrap_or(name.len());
    name[..end].contains(&b':')
}

/// Interpret a recorded name.
///
/// # Errors
/// Why it means no file.
pub fn file_name(name: &[u8]) -> Result<FileName<'_>, NoFile> {
    if !is_protocol(name) {
        let path = Cow::Borrowed(plausible(name)?);
        return Ok(FileName { path, from_working_directory: false, format: None });
    }
    if let Some(path) = name.strip_prefix(b"file:") {
        let path = Cow::Borrowed(plausible(path)?);
        return Ok(FileName { path, from_working_directory: true, format: None });
    }
    if let Some(text) = name.strip_prefix(b"json:") {
        let Local { filename, format } = local(text)?;
        plausible(filename.as_bytes())?;
        return Ok(FileName { path: Cow::Owned(filename.into_bytes()), from_working_directory: true, format });
    }
    match name {
        [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic() => Err(NoFile::Windows),
        _ => Err(NoFile::Protocol),
    }
}

/// Whether these bytes can be the path of a file.
fn plausible(path: &[u8]) -> Result<&[u8], NoFile> {
    if path.is_empty() {
        return Err(NoFile::Empty);
    }
    if path.len() > MAX_NAME || path.contains(&0) {
        return Err(NoFile::Nonsense);
    }
    match path.rsplit(|&byte| byte == b'/').next() {
        Some(b"" | b"." | b"..") | None => Err(NoFile::Directory),
        Some(_) => Ok(path),
    }
}

/// A JSON name that means a plain local file.
struct Local {
    filename: String,
    format: Option<String>,
}

/// What the options of a block device say, as far as they may be said of a plain local file.
#[derive(Default)]
struct Options {
    /// The first of the others: it changes what is read (an offset, a size, another file below), or is not known here.
    other: Option<String>,
    driver: Option<String>,
    filename: Option<String>,
    file: Option<Box<Options>>,
    inner_driver: Option<String>,
    inner_filename: Option<String>,
}

/// Options that say how a file is opened and not which bytes it has (`BlockdevOptions`, `BlockdevOptionsFile` and
/// `BlockdevOptionsQcow2` of QEMU's QAPI).
const HARMLESS: [&str; 24] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "cache",
    "aio",
    "aio-max-batch",
    "locking",
    "discard",
    "detect-zeroes",
    "force-share",
    "pr-manager",
    "drop-cache",
    "x-check-cache-dropped",
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
];
/// Groups of such options.
const HARMLESS_GROUPS: [&str; 2] = ["cache.", "overlap-check."];

impl<'de> Deserialize<'de> for Options {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Options;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Options, A::Error> {
                let mut options = Options::default();
                // A key that comes twice means one thing to one reader and another to the next.
                fn once<T, E: serde::de::Error>(slot: &mut Option<T>, value: T) -> Result<(), E> {
                    slot.replace(value).map_or(Ok(()), |_| Err(E::custom("a key comes twice")))
                }
                while let Some(key) = map.next_key::<String>()? {
                    let plain = key.strip_prefix("file.").unwrap_or(&key);
                    match key.as_str() {
                        "driver" => once(&mut options.driver, map.next_value()?)?,
                        "filename" => once(&mut options.filename, map.next_value()?)?,
                        "file" => once(&mut options.file, map.next_value()?)?,
                        "file.driver" => once(&mut options.inner_driver, map.next_value()?)?,
                        "file.filename" => once(&mut options.inner_filename, map.next_value()?)?,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            let group = HARMLESS_GROUPS.iter().any(|group| plain.starts_with(group));
                            if !group && !HARMLESS.contains(&plain) {
                                options.other.get_or_insert(key);
                            }
                        }
                    }
                }
                Ok(options)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// A layer of options that is a file, and nothing below it: its name.
fn plain_file(options: Options) -> Result<String, NoFile> {
    if !matches!(options.driver.as_deref(), None | Some("file" | "host_device")) {
        return Err(NoFile::Protocol);
    }
    if let Some(other) = options.other {
        return Err(NoFile::Option(other));
    }
    let Options { driver, filename: Some(name), file: None, inner_driver: None, inner_filename: None, .. } = options
    else {
        return Err(NoFile::Json);
    };
    // Where no driver is named, QEMU finds it by the name.
    if driver.is_none() && is_protocol(name.as_bytes()) {
        return Err(NoFile::Protocol);
    }
    Ok(name)
}

fn local(text: &[u8]) -> Result<Local, NoFile> {
    if text.len() > MAX_NAME {
        return Err(NoFile::Nonsense);
    }
    let options: Options = serde_json::from_slice(text).map_err(|_| NoFile::Json)?;
    let (filename, format, other) = match options {
        Options { driver, filename: None, file: Some(file), inner_driver: None, inner_filename: None, other } => {
            (plain_file(*file)?, driver, other)
        }
        Options { driver, filename: None, file: None, inner_driver, inner_filename: Some(inner), other } => {
            let inner = Options { driver: inner_driver, filename: Some(inner), ..Options::default() };
            (plain_file(inner)?, driver, other)
        }
        plain => (plain_file(plain)?, None, None),
    };
    other.map_or(Ok(Local { filename, format }), |other| Err(NoFile::Option(other)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn path(name: &str) -> Result<(String, bool, Option<String>), NoFile> {
        let found = file_name(name.as_bytes())?;
        Ok((String::from_utf8(found.path.into_owned()).unwrap(), found.from_working_directory, found.format))
    }

    #[test]
    fn plain_names() {
        for name in ["base", "./a:b", "sub/../base", "/x/y", "a\n\u{1b}[31m", "sub/a:b", ".hidden", "x//y"] {
            assert_eq!(path(name), Ok((name.to_owned(), false, None)), "{name}");
        }
    }

    #[test]
    fn names_of_local_files_behind_a_protocol() {
        let qcow2 = Some("qcow2".to_owned());
        for (name, wanted, format) in [
            ("file:base", "base", None),
            ("file:/x/base", "/x/base", None),
            ("file:///x/base", "///x/base", None),
            ("file:a:b", "a:b", None),
            (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/x/b"}}"#, "/x/b", qcow2.clone()),
            (r#"json:{"file": {"driver": "file", "filename": "/x/b"}}"#, "/x/b", None),
            (r#"json:{"driver":"qcow2","file":{"driver":"host_device","filename":"/dev/v"}}"#, "/dev/v", qcow2.clone()),
            (r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"b"}"#, "b", qcow2.clone()),
            (r#"json:{"driver":"qcow2","file.filename":"b","file.aio":"native"}"#, "b", qcow2.clone()),
            (r#"json:{"driver":"qcow2","lazy-refcounts":true,"l2-cache-size":4096,"file.filename":"b"}"#, "b", qcow2),
            (r#"json:{"driver":"file","filename":"b"}"#, "b", None),
            (r#"json:{"filename":"b","cache":{"direct":true}}"#, "b", None),
            (r#"json:{"driver":"file","filename":"a:b"}"#, "a:b", None),
        ] {
            assert_eq!(path(name), Ok((wanted.to_owned(), true, format)), "{name}");
        }
    }

    #[test]
    fn what_is_no_file() {
        for (name, why) in [
            ("", NoFile::Empty),
            ("file:", NoFile::Empty),
            ("a\0b", NoFile::Nonsense),
            ("..", NoFile::Directory),
            ("sub/", NoFile::Directory),
            ("sub/.", NoFile::Directory),
            ("/", NoFile::Directory),
            ("C:\\VMs\\base.vmdk", NoFile::Windows),
            ("d:/base", NoFile::Windows),
            ("nbd:localhost:10809", NoFile::Protocol),
            ("nbd://host/x", NoFile::Protocol),
            ("fat:rw:.", NoFile::Protocol),
            ("host_device:/dev/null", NoFile::Protocol),
            ("a:b", NoFile::Protocol),
            ("json:{}", NoFile::Json),
            ("json:nonsense", NoFile::Json),
            (r#"json:{"driver":"nbd","host":"x"}"#, NoFile::Protocol),
            (r#"json:{"file":{"driver":"https","filename":"x"}}"#, NoFile::Protocol),
            (r#"json:{"file":{"filename":"nbd://x"}}"#, NoFile::Protocol),
            (r#"json:{"driver":"raw","offset":512,"file":{"filename":"/x"}}"#, NoFile::Option("offset".to_owned())),
            (r#"json:{"driver":"raw","size":512,"file.filename":"/x"}"#, NoFile::Option("size".to_owned())),
            (r#"json:{"driver":"file","filename":"/x","filename":"/y"}"#, NoFile::Json),
            (
                r#"json:{"driver":"qcow2","backing":null,"file":{"filename":"/x"}}"#,
                NoFile::Option("backing".to_owned()),
            ),
            (r#"json:{"driver":"qcow2","file":{"driver":"blkdebug","image":{"filename":"/x"}}}"#, NoFile::Protocol),
            (r#"json:{"file":{"filename":"/x"},"file.filename":"/y"}"#, NoFile::Json),
        ] {
            assert_eq!(path(name), Err(why), "{name}");
        }
        assert_eq!(path(&"x".repeat(5000)), Err(NoFile::Nonsense));
        let deep = format!("json:{}", r#"{"file":"#.repeat(400));
        assert_eq!(path(&deep), Err(NoFile::Json));
    }
}
