//! What is known of a commit once everybody has admitted it.

use super::outcome::Units;
use super::plan::PlanBounds;
use super::space::Space;
use crate::image::Doubt;
use instar_guest_protocol::commit::Relinked as Wanted;
use std::path::PathBuf;

/// What is known once everybody has admitted the commit.
pub struct Admitted {
    /// Of the overlay and the backing.
    pub formats: (String, String),
    /// The layers between them.
    pub stale: Vec<PathBuf>,
    /// The virtual size in bytes that the backing gets, if it grows.
    pub backing_grows_to: Option<u64>,
    /// Leave the overlay as it is.
    pub keep_overlay: bool,
    /// What the guest's plan may say.
    pub bounds: PlanBounds,
    /// What is known of the space for the backing.
    pub space: Option<Space>,
    /// The backing looks like an image of another format, too.
    pub doubt: Option<Doubt>,
    /// What the children are to record.
    pub wanted: Option<Wanted>,
    /// Bytes of the overlay's files.
    pub overlay_length: u64,
    /// Bytes of the overlay's disk.
    pub virtual_size: u64,
    /// Bitmaps of the backing, and of what is committed.
    pub bitmaps: u64,
    /// The backing was not closed, and is repaired first.
    pub repairs: bool,
    /// Bytes of the backing's files.
    pub length: u64,
    /// Bytes that they take of the disk.
    pub taken: Option<u64>,
    /// Bytes that their file system has free.
    pub free: Option<u64>,
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
