//! What an atomic commit takes its data from, as an undo log [says](Source): the overlay, the layers between it and the target, and the
//! files that belong to them.

use crate::error::Error;
use crate::image::{undo_directory, ChainImage, OpenedFile};
use crate::undo::Source;
use instar_guest_abi::ErrorCode;
use rustix::fs::fsync;
use rustix::io::retry_on_intr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// One of them.
#[derive(Debug)]
struct Open {
    /// Where it is found again after a restart.
    path: PathBuf,
    file: File,
    length: u64,
    /// What a block device is.
    subject: [u8; 32],
}

/// The sources of a commit.
#[derive(Debug, Default)]
pub struct Sources {
    all: Vec<Open>,
    /// The one that could not be looked at.
    failed: Option<usize>,
}

impl Open {
    fn of(opened: &OpenedFile) -> Result<Self, Error> {
        let cannot = |error: &io::Error| Error::io(&opened.path, ErrorCode::OpenFailed, "cannot be looked at", error);
        // Of a device, the name that was given: what a link leads to is another device after a restart.
        let path = match opened.place() {
            Ok((directory, name)) if !opened.block_device => directory.really().path().join(name),
            _ => opened.settled_path(),
        };
        let undo = undo_directory().filter(|_| opened.block_device);
        let subject = undo.and_then(|undo| undo.identify(opened).ok()).map_or([0; 32], |identity| identity.digest);
        let file = opened.file.file().try_clone().map_err(|error| cannot(&error))?;
        let open = Self { path, file, length: opened.length(), subject };
        if !Source::has_room_for(&open.path) {
            let clause =
                "has a path that is too long for an undo log: commit without --atomic, or give it a shorter one";
            return Err(Error::image(&opened.path, ErrorCode::OpenFailed, clause));
        }
        Ok(open)
    }

    /// What it is now, durably: after a crash, it looks no older.
    fn settle(&self) -> io::Result<Source> {
        // Not fdatasync: that leaves its time behind.
        retry_on_intr(|| fsync(&self.file))?;
        Source::look(&self.file, &self.path, self.length, self.subject)
    }
}

impl Sources {
    /// Those of a commit that merges these images.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn of(merged: &[&ChainImage<'_>]) -> Result<Self, Error> {
        let own = merged.iter().map(|image| &image.opened);
        let others = merged.iter().flat_map(|image| &image.files).map(|file| &file.opened);
        Self::of_files(own.chain(others))
    }

    /// Those of a commit that takes its data from these files.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn of_files<'o>(files: impl Iterator<Item = &'o OpenedFile>) -> Result<Self, Error> {
        Ok(Self { all: files.map(Open::of).collect::<Result<_, _>>()?, failed: None })
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.all.len()).unwrap_or(u32::MAX)
    }

    /// Flush them, and return what the log with this number says of them.
    ///
    /// # Errors
    /// The kernel's: [`failed`](Self::failed) says of which.
    pub fn settle(&mut self, nonce: &[u8; 16]) -> io::Result<Vec<u8>> {
        let mut says = Vec::new();
        for (index, open) in (0..).zip(&self.all) {
            let source = open.settle().inspect_err(|_| self.failed = usize::try_from(index).ok())?;
            says.extend(source.encode(nonce, index).unwrap_or_default());
        }
        Ok(says)
    }

    /// The one that could not be flushed or looked at.
    pub fn failed(&self) -> Option<&Path> {
        Some(&self.all.get(self.failed?)?.path)
    }
}
