//! Paths of Windows, as images of Microsoft's formats record them, as names of files on this machine.
//!
//! Nobody knows where a drive or a server's share is here, but images that belong together are mostly moved together: the parent
//! is looked for below the directory of the image that records it, by as much of the path as there is there. Nothing here
//! knows a format; whether a name may be followed, the engine decides.

use instar_plugin_api::std_types::ROption;
use instar_plugin_api::BackingPointer;

/// Longest name of a file in bytes (`PATH_MAX` without its end).
const LONGEST_NAME: usize = 4095;
/// Other names of a backing pointer, at most.
const OTHER_NAMES: usize = 16;
/// Most components of a recorded path that are looked for.
const COMPONENTS: usize = 3;

/// The names that a path may stand for, the likeliest first and the base name last; none for a path without a base name.
///
/// A relative path (`.\sub\base.vhd`) is taken from the image's own directory. Of an absolute one (`C:\a\b\base.vhd`,
/// `\\server\share\a\base.vhd`), the whole and its last components are looked for below that directory. One that begins with a
/// single backslash or a slash is an absolute path of this machine as well: programs that run here record their own so.
#[must_use]
pub fn candidates(path: &str) -> Vec<String> {
    let slashes = path.replace('\\', "/");
    let (drive, rest) = match slashes.as_bytes() {
        [letter, b':', ..] if letter.is_ascii_alphabetic() => (true, &slashes[2..]),
        _ => (false, slashes.as_str()),
    };
    // \\?\C:\… and \\?\UNC\server\share\… are the long forms of the others.
    if let Some(long) = rest.strip_prefix("//?/").filter(|_| !drive) {
        return match long.strip_prefix("UNC/") {
            Some(share) => candidates(&format!("//{share}")),
            None => candidates(long),
        };
    }
    let share = !drive && rest.starts_with("//");
    let absolute = drive || rest.starts_with('/');
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let Some(base) = parts.last().filter(|base| **base != "..") else { return Vec::new() };
    let mut names = Vec::new();
    if !absolute {
        names.push(parts.join("/"));
    } else {
        if !drive && !share {
            names.push(format!("/{}", parts.join("/")));
        }
        // Of a share, the first component is the server.
        let below: Vec<&str> = parts.iter().skip(usize::from(share)).copied().collect();
        if !below.contains(&"..") {
            names.push(below.join("/"));
            let last = below.len().saturating_sub(COMPONENTS)..below.len();
            names.extend(last.map(|first| below[first..].join("/")));
        }
    }
    names.push((*base).to_owned());
    let mut unique: Vec<String> = Vec::new();
    for name in names.into_iter().filter(|name| !name.is_empty()).map(plain) {
        if !unique.contains(&name) {
            unique.push(name);
        }
    }
    unique
}

/// The pointer to an image of this format that has one of these names, the likeliest first. Each counts once.
#[must_use]
pub fn pointer(names: impl IntoIterator<Item = String>, format: &str) -> BackingPointer {
    let mut unique: Vec<Vec<u8>> = Vec::new();
    for name in names.into_iter().map(String::into_bytes).filter(|name| name.len() <= LONGEST_NAME) {
        if !unique.contains(&name) && unique.len() <= OTHER_NAMES {
            unique.push(name);
        }
    }
    let mut unique = unique.into_iter();
    BackingPointer {
        name: unique.next().unwrap_or_default().into(),
        other_names: unique.map(Into::into).collect(),
        format: ROption::RSome(format.as_bytes().to_vec().into()),
    }
}

/// The last component of a path; `None` if it has none.
#[must_use]
pub fn base_name(path: &str) -> Option<String> {
    candidates(path).pop()
}

/// A name that nobody takes for a protocol: a colon before the first slash would make it one.
fn plain(name: String) -> String {
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') {
        format!("./{name}")
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_windows_become_names() {
        let checks: &[(&str, &[&str])] = &[
            (r".\base.vhd", &["base.vhd"]),
            (r"base.vhd", &["base.vhd"]),
            (r".\sub\base.vhd", &["sub/base.vhd", "base.vhd"]),
            (r"..\up\base.vhd", &["../up/base.vhd", "base.vhd"]),
            (r"C:\base.vhd", &["base.vhd"]),
            (r"c:\VMs\disk\base.vhd", &["VMs/disk/base.vhd", "disk/base.vhd", "base.vhd"]),
            (r"C:\a\b\c\d\base.vhd", &["a/b/c/d/base.vhd", "c/d/base.vhd", "d/base.vhd", "base.vhd"]),
            ("D:/a/base.vhd", &["a/base.vhd", "base.vhd"]),
            (r"\\server\share\a\base.vhd", &["share/a/base.vhd", "a/base.vhd", "base.vhd"]),
            (r"\\?\C:\a\base.vhd", &["a/base.vhd", "base.vhd"]),
            (r"\\?\UNC\server\share\base.vhd", &["share/base.vhd", "base.vhd"]),
            (r"\srv\vm\base.vhd", &["/srv/vm/base.vhd", "srv/vm/base.vhd", "vm/base.vhd", "base.vhd"]),
            ("/srv/base.vhd", &["/srv/base.vhd", "srv/base.vhd", "base.vhd"]),
            (r"C:\a\..\base.vhd", &["base.vhd"]),
            (r".\größe 1.vhd", &["größe 1.vhd"]),
            (r".\a:b.vhd", &["./a:b.vhd"]),
            (r"C:\", &[]),
            (r"..", &[]),
            ("", &[]),
        ];
        for (path, wanted) in checks {
            assert_eq!(candidates(path), *wanted, "{path}");
            assert_eq!(base_name(path).as_deref(), wanted.last().copied(), "{path}");
        }
    }
}
