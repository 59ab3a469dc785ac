//! The message about a recorded name that is not followed: the image that records it, and the remedy.

use super::names::NoFile;
use crate::error::Error;
use crate::escape::{escape_bytes, escape_path, shell_path, shell_word};
use crate::lookup::Directory;
use instar_guest_abi::ErrorCode;
use std::path::Path;

/// The role of the file that a recorded name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordedRole {
    /// The file that is committed into.
    Target,
    /// An image below the one that records it.
    Ancestor,
    /// Another file of the image that records it.
    File,
}

/// An image that records a name.
#[derive(Clone, Copy, Debug)]
pub struct Recorder<'a> {
    /// Its path, for people.
    pub path: &'a Path,
    /// The name of its format.
    pub format: &'a str,
    /// The directory at which relative names in it begin.
    pub directory: &'a Directory,
    /// The role of the file behind the name.
    pub role: RecordedRole,
}

impl Recorder<'_> {
    pub(super) fn refuse(&self, name: &[u8], why: &str, advice: &str) -> Error {
        let clause = format!("the recorded name '{}' {why}: {advice}", escape_bytes(name));
        Error::image(self.path, ErrorCode::WriteTargetNotAllowed, clause)
    }

    /// The refusal of a name that leads where nobody allowed it to; `path` is as much as may be told of where that is.
    pub(super) fn outside(&self, name: &[u8], path: &Path) -> Error {
        let directory = path.parent().unwrap_or(Path::new("/"));
        let named = format!("commit into it with -b {}", shell_path(path));
        let allow = if directory == Path::new("/dev") {
            // All devices of the machine are more than most want to allow.
            "allow a directory with --allow-backing-dir: that of a link which leads to it, or /dev, and with that every \
             device of the machine"
                .to_owned()
        } else {
            format!("allow its directory with --allow-backing-dir {}", shell_path(directory))
        };
        let mut advice = if self.role == RecordedRole::Target {
            format!("if no image in another directory is on it, {named}, or {allow}")
        } else {
            allow
        };
        // Whole paths come from other machines as well, where nobody may look whether this one has such a file: `/vmfs/volumes/…`.
        if name.starts_with(b"/") {
            advice += &format!("; if the file was moved, {}", self.record("its new name"));
        }
        self.refuse(name, "leads outside the image's own directory", &advice)
    }

    /// How `instar rebase -u` names the format of another backing file for images of this format, where those record a name at
    /// all: one of their own, or any.
    fn rebases_onto(&self) -> Option<&str> {
        match self.format {
            "qcow2" | "qcow" => Some("FMT"),
            "vmdk" | "vhdx" | "vpc" | "parallels" => Some(self.format),
            _ => None,
        }
    }

    /// Whether a command can record a name of the parent in an image of this format.
    pub(super) fn takes_a_name(&self) -> bool {
        self.rebases_onto().is_some()
    }

    /// The warning about an image whose names do not lead to its `parent`, of the format `format`. The operator named that `given`.
    pub(super) fn unnamed(&self, parent: &Path, given: &Path, format: &str) -> String {
        let (path, parent) = (escape_path(self.path), escape_path(parent));
        let advice = if self.takes_a_name() {
            let (given, path) = (shell_path(given), shell_path(self.path));
            format!("record that name with `instar rebase -u -b {given} -F {format} {path}`")
        } else {
            "to read it, give that file the name that `instar info` shows as its backing file".to_owned()
        };
        format!("'{path}' does not lead to '{parent}', whose identity alone proves that it is the parent: {advice}")
    }

    /// How another name gets into the image. `what` is to be recorded.
    pub(super) fn record(&self, what: &str) -> String {
        match self.rebases_onto().filter(|_| self.role != RecordedRole::File) {
            Some(format) => {
                format!("record {what} with `instar rebase -u -b NEW -F {format} {}`", shell_path(self.path))
            }
            None => self.edit(what),
        }
    }

    /// Advise how to make the image record that the file behind this name is raw.
    #[must_use]
    pub fn record_raw(&self, name: &[u8]) -> String {
        if self.format == "qcow2" {
            let (name, path) = (shell_word(name), shell_path(self.path));
            format!("record that with `instar rebase -u -b {name} -F raw {path}`")
        } else if self.format == "qcow" {
            // It has no place for it.
            let (name, path) = (shell_word(name), shell_path(self.path));
            format!(
                "let a qcow2 take its place, which records that: `instar convert -O qcow2 -B {name} -F raw {path} NEW`"
            )
        } else {
            format!("record that in '{}'", escape_path(self.path))
        }
    }

    /// How another name gets into an image where no command changes it.
    fn edit(&self, what: &str) -> String {
        match self.linked() {
            Some(linked) => format!("allow its directory with --allow-backing-dir, or {linked}"),
            None => format!("write {what} into the image"),
        }
    }

    /// How a file gets the name of a parent that an image of this format has, if nothing but a file can have it: a vdi records no
    /// name, and this one is made of the parent's identifier.
    fn linked(&self) -> Option<&'static str> {
        let is_parent = matches!(self.role, RecordedRole::Target | RecordedRole::Ancestor);
        (is_parent && self.format == "vdi").then_some("give it that name here with `ln -s`")
    }

    pub(super) fn no_file(&self, name: &[u8], why: &NoFile) -> Error {
        if name.is_empty() && self.role != RecordedRole::File && self.format != "qcow2" {
            let clause =
                "records which image is below it, but no name of its file: only a commit can be told that, with -b";
            return Error::image(self.path, ErrorCode::BackingNotFound, clause);
        }
        let advice = match why {
            // Another name would make another disk of it.
            NoFile::Option(_) => {
                "instar takes a format and a file name: use the program that recorded the other options".to_owned()
            }
            _ => self.record("the name of a local file"),
        };
        self.refuse(name, &why.to_string(), &advice)
    }

    /// The name leads through procfs.
    pub(super) fn through_proc(&self, name: &[u8]) -> Error {
        let why = "leads through /proc, where links lead where no text says";
        self.refuse(name, why, &self.record("the file's own name"))
    }

    /// There is no such file. `allowing`: the command has an option to allow directories.
    pub(super) fn missing(&self, path: &Path, allowing: bool) -> Error {
        let recorder = escape_path(self.path);
        let role = match self.role {
            RecordedRole::File => "as one of its files",
            RecordedRole::Target | RecordedRole::Ancestor => "as its backing file",
        };
        let moved = match self.linked().filter(|_| !allowing) {
            Some(linked) => linked.to_owned(),
            None => self.record("its new name"),
        };
        let clause =
            format!("does not exist, and '{recorder}' records it {role}: put it back, or, if it was moved, {moved}");
        Error::image(path, ErrorCode::BackingNotFound, clause).with_errno(libc::ENOENT)
    }

    /// The name leads to a file, or through a directory, that begins with a dot.
    pub(super) fn hidden(&self, name: &[u8], path: &Path) -> Error {
        let advice = match self.role {
            RecordedRole::Target => format!("if that is right, commit into it with -b {}", shell_path(path)),
            // What the operator allows is not hidden, but what an image chooses there may be.
            _ if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) => {
                format!("rename the file, and {}", self.record("its new name"))
            }
            _ => {
                let directory = path.parent().unwrap_or(Path::new("/"));
                format!("if that is right, allow its directory with --allow-backing-dir {}", shell_path(directory))
            }
        };
        self.refuse(name, "leads to something hidden, which an image may not choose", &advice)
    }

    /// The name leads to a file that can be executed.
    pub(super) fn executable(&self, name: &[u8], path: &Path) -> Error {
        let path = shell_path(path);
        let advice = match self.role {
            RecordedRole::Target => format!("if that is right, commit into it with -b {path}"),
            RecordedRole::Ancestor | RecordedRole::File => format!("if it is part of a disk, `chmod a-x {path}`"),
        };
        self.refuse(name, "leads to an executable file, which an image may not choose", &advice)
    }

    /// The name leads to a file that is no whole number of sectors.
    pub(super) fn uneven(&self, name: &[u8], path: &Path, length: u64) -> Error {
        let path = shell_path(path);
        let why =
            format!("leads to a file of {length} bytes, no multiple of 512, which an image may not choose as a disk");
        let advice = match self.role {
            RecordedRole::Target => format!("if that is right, commit into it with -b {path}"),
            RecordedRole::Ancestor | RecordedRole::File => {
                format!("if it is part of a disk, `truncate -s %512 {path}`")
            }
        };
        self.refuse(name, &why, &advice)
    }

    /// The device is in use by the kernel.
    pub(super) fn claimed(&self, path: &Path) -> Error {
        let mut clause = "is mounted, or part of another device, so that an image may not choose it".to_owned();
        if self.role == RecordedRole::Target {
            clause += &format!(": if that is right, commit into it with -b {}", shell_path(path));
        } else {
            clause += ": unmount it first";
        }
        Error::image(path, ErrorCode::WriteTargetNotAllowed, clause)
    }
}
