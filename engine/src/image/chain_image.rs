//! An image of a chain, once it is open and its format is known.

use super::advice::{RecordedRole, Recorder};
use super::open::OpenedFile;
use crate::plugins::{ImageRead, Mark, Plugin};
use instar_plugin_api::ImageFacts;
use std::path::Path;

/// An image of a chain: open, locked, and looked at.
#[derive(Debug)]
pub struct ChainImage<'r> {
    /// The open file.
    pub opened: OpenedFile,
    /// The plugin of its format.
    pub plugin: &'r Plugin,
    /// The facts from its header.
    pub facts: ImageFacts,
    /// The disk to read, as in [`DeviceConfig::snapshot`](instar_guest_abi::DeviceConfig::snapshot).
    pub snapshot: u32,
    /// Its other files, once they are open.
    pub files: Vec<ExtraFile>,
    /// Whether only its record of the parent changes: a few bytes of its own file, which is open for writing. Such an image is
    /// neither emptied nor a target.
    pub follows: bool,
    /// Whether the operator named its format and is believed.
    pub insisted: bool,
    /// The signature of another format in a file that is called raw.
    pub mark: Option<Mark>,
    /// A reason to write to it only where that cannot change a header.
    pub doubt: Option<Doubt>,
}

/// A file of an image that has several.
#[derive(Debug)]
pub struct ExtraFile {
    /// The open file.
    pub opened: OpenedFile,
    /// Whether it may become longer.
    pub grows: bool,
    /// It holds plain bytes, each at a fixed place.
    pub plain: bool,
}

/// A reason to doubt that a file is raw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// The mark of another format.
    pub mark: Mark,
    /// The problem, and how to insist, in one clause.
    pub clause: String,
}

impl ChainImage<'_> {
    /// Return the identity that this image gets when data is written into it from `child` or the layers above that; empty if it
    /// keeps its own.
    #[must_use]
    pub fn next_identity(&self, child: &ImageFacts) -> Vec<u8> {
        self.plugin.next_identity(&self.facts, child)
    }

    /// Whether writing into `parent` from this image changes what this one records of it.
    #[must_use]
    pub fn has_to_follow(&self, parent: &ChainImage<'_>) -> bool {
        self.facts.follows(&parent.next_identity(&self.facts))
    }

    /// Iterate over all files of the image, its own first.
    pub fn all_files(&self) -> impl Iterator<Item = &OpenedFile> {
        std::iter::once(&self.opened).chain(self.files.iter().map(|file| &file.opened))
    }

    /// Return their combined length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.all_files().map(|opened| opened.file.length()).fold(0, u64::saturating_add)
    }

    /// The warning about names in the image that do not lead to its `parent`, which the operator named `given`.
    #[must_use]
    pub fn does_not_lead_to(&self, parent: &ChainImage<'_>, given: &Path) -> String {
        self.recorder(RecordedRole::Target).unnamed(&parent.opened.path, given, parent.facts.format.as_str())
    }

    /// The image as one that records a name.
    pub(super) fn recorder(&self, role: RecordedRole) -> Recorder<'_> {
        let (path, directory) = (self.opened.path.as_path(), &self.opened.directory);
        Recorder { path, format: self.facts.format.as_str(), directory, role }
    }
}
