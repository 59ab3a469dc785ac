//! The directory at which the names in an image begin, or that the operator allowed.

use std::io;
use std::path::{Component, Path, PathBuf};

/// A directory, as it was named and as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageDirectory {
    named: PathBuf,
    absolute: PathBuf,
    canonical: PathBuf,
}

impl ImageDirectory {
    /// This directory.
    ///
    /// # Errors
    /// When it does not exist, or may not be looked at.
    pub fn new(path: &Path) -> io::Result<Self> {
        let named = path.to_owned();
        let usable = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let canonical = usable.canonicalize()?;
        if !canonical.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { named, absolute: lexical(&std::path::absolute(usable)?), canonical })
    }

    /// The directory that an image is in, by the name of the image: not where a link leads.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_image(image: &Path) -> io::Result<Self> {
        Self::new(image.parent().unwrap_or(Path::new("")))
    }

    /// The name that `name` in this directory has for people.
    #[must_use]
    pub fn join(&self, name: &Path) -> PathBuf {
        self.named.join(name)
    }

    /// Without links.
    #[must_use]
    pub fn canonical(&self) -> &Path {
        &self.canonical
    }

    /// What is left of an absolute name without `..` within this directory, by either of its names.
    #[must_use]
    pub fn strip(&self, absolute: &Path) -> Option<PathBuf> {
        let inside = |root: &Path| absolute.strip_prefix(root).ok().map(Path::to_owned);
        inside(&self.canonical).or_else(|| inside(&self.absolute))
    }
}

/// An absolute path without `.` and `..`, by its text alone.
#[must_use]
pub(super) fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                // The parent of the root is the root.
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_go_by_text() {
        for (path, expected) in [("/a/./b/../c", "/a/c"), ("/../x", "/x"), ("/a/../..", "/"), ("/", "/")] {
            assert_eq!(lexical(Path::new(path)), PathBuf::from(expected));
        }
    }
}
