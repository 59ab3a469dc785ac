//! The facts of a commit after the plugins and the engine have admitted it.

use super::outcome::Units;
use super::plan::PlanBounds;
use crate::image::Doubt;
use crate::operation::Space;
use instar_guest_protocol::commit::Relinked as Wanted;
use std::path::PathBuf;

/// The facts after the plugins and the engine have admitted the commit.
pub struct Admitted {
    /// Formats of the overlay and the backing.
    pub formats: (String, String),
    /// The layers between them.
    pub stale: Vec<PathBuf>,
    /// The virtual size in bytes that the backing gets, if it grows.
    pub backing_grows_to: Option<u64>,
    /// Whether the overlay stays as it is.
    pub keep_overlay: bool,
    /// The bounds of the guest's plan.
    pub bounds: PlanBounds,
    /// The space that the backing has, as far as it is known.
    pub space: Option<Space>,
    /// The mark of another format that the backing also looks like.
    pub doubt: Option<Doubt>,
    /// The records of the children after the commit.
    pub wanted: Option<Wanted>,
    /// Bytes of the overlay's files.
    pub overlay_length: u64,
    /// Bytes of the overlay's disk.
    pub virtual_size: u64,
    /// Bitmaps of the backing, and of the committed layers.
    pub bitmaps: u64,
    /// Whether the backing was not closed, so that the commit repairs it first.
    pub repairs: bool,
    /// Bytes of the backing's files.
    pub length: u64,
    /// Bytes of the disk that they take.
    pub taken: Option<u64>,
    /// Bytes that their file system has free.
    pub free: Option<u64>,
    /// Images and files of which an undo log says what they are.
    pub sources: u64,
    /// Bytes that their file system allocates at once.
    pub block: u64,
}

impl Admitted {
    /// The units in which space is counted.
    pub fn units(&self) -> Units {
        let PlanBounds { overlay_cluster, backing_cluster, .. } = self.bounds;
        Units { overlay: overlay_cluster, backing: backing_cluster, block: self.block }
    }
}
