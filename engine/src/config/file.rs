//! One configuration file.

use crate::error::{Error, Role};
use crate::plugins::{Distrust, TrustedDirectory};
use crate::sandbox::SandboxChoice;
use instar_guest_abi::ErrorCode;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Longest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The content of a configuration file.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Content {
    /// Directories that recorded backings may lie in.
    pub allow_backing_dirs: Vec<PathBuf>,
    /// Directories with plugins.
    pub plugin_dirs: Vec<PathBuf>,
    /// The directory of the undo logs of block devices.
    pub undo_dir: Option<PathBuf>,
    /// Which sandbox is used.
    #[serde(deserialize_with = "sandbox")]
    pub sandbox: Option<SandboxChoice>,
}

/// The name of a sandbox.
fn sandbox<'de, D: Deserializer<'de>>(value: D) -> Result<Option<SandboxChoice>, D::Error> {
    let name = String::deserialize(value)?;
    let unknown = || D::Error::custom(format!("sandbox is kvm, process or auto, and not {name:?}"));
    SandboxChoice::from_name(&name).ok_or_else(unknown).map(Some)
}

impl Content {
    /// Read a file; `None` if it does not exist.
    pub fn read(path: &Path) -> Result<Option<Self>, Error> {
        let refused = |why: String| {
            Error::image(path, ErrorCode::OpenFailed, format!("configuration: {why}")).in_role(Role::Configuration)
        };
        let distrusted = |why: Distrust| refused(why.clause);
        match path.symlink_metadata() {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(error) => {
                let error = Error::io(path, ErrorCode::OpenFailed, "configuration: cannot be read", &error);
                return Err(error.in_role(Role::Configuration));
            }
            Ok(_) => {}
        }
        let absolute = std::path::absolute(path).map_err(|error| refused(format!("cannot be read: {error}")))?;
        let (Some(directory), Some(name)) = (absolute.parent(), absolute.file_name().and_then(|name| name.to_str()))
        else {
            return Err(refused("is no file".into()));
        };
        let Some(directory) = TrustedDirectory::open(directory).map_err(distrusted)? else { return Ok(None) };
        let (file, _) = directory.open_file(name).map_err(distrusted)?;
        let mut text = String::new();
        file.take(MAX_BYTES)
            .read_to_string(&mut text)
            .map_err(|error| refused(format!("cannot be read as text: {error}")))?;
        let content: Self = toml::from_str(&text).map_err(|error| refused(explain(&text, &error)))?;
        let directories: [(&str, &[PathBuf]); 3] = [
            ("allow-backing-dirs", &content.allow_backing_dirs),
            ("plugin-dirs", &content.plugin_dirs),
            ("undo-dir", content.undo_dir.as_slice()),
        ];
        for (key, directories) in directories {
            if let Some(relative) = directories.iter().find(|directory| !directory.is_absolute()) {
                return Err(refused(format!("{key}: \"{}\" is not an absolute path", relative.display())));
            }
        }
        Ok(Some(content))
    }
}

/// An error of the parser as one clause, with the line.
fn explain(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().lines().collect::<Vec<_>>().join(" ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {message}", before.matches('\n').count() + 1),
        None => message,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn read(text: &str, mode: u32) -> Result<Option<Content>, String> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        Content::read(&path).map_err(|error| error.message)
    }

    #[test]
    fn what_it_may_say() {
        assert_eq!(read("", 0o644), Ok(Some(Content::default())));
        let text = "# a comment\nallow-backing-dirs = [\"/no/a\", \"/no/b\"]\nplugin-dirs = []\n";
        assert_eq!(read(text, 0o600).unwrap().unwrap().allow_backing_dirs, ["/no/a", "/no/b"].map(PathBuf::from));
        assert_eq!(Content::read(Path::new("/no/such/file")).unwrap(), None);
    }

    #[test]
    fn what_it_may_not_say() {
        for (text, mode, words) in [
            ("\n\nplugin-dir = []\n", 0o644, ["line 3", "plugin-dir"]),
            ("plugin-dirs = \"/a\"\n", 0o644, ["line 1", "sequence"]),
            ("\nsandbox = \"Kvm\"\n", 0o644, ["line 2", "sandbox is kvm, process or auto"]),
            ("plugin-dirs = [\"a\"]\n", 0o644, ["plugin-dirs", "\"a\" is not an absolute path"]),
            ("undo-dir = \"a\"\n", 0o644, ["undo-dir", "\"a\" is not an absolute path"]),
            ("allow-backing-dirs = [1]\n", 0o644, ["line 1", "string"]),
            ("\n= 3\n", 0o644, ["line 2", "key"]),
            ("", 0o666, ["writable by others", "chmod go-w"]),
        ] {
            let error = read(text, mode).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
