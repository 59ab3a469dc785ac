//! Notice a full disk before the first change: compare the plan's needs with the image's file system.
//!
//! A change that would fit must not be refused, so only certain needs count. File systems that may share or compress
//! copied data (all but the few that are known not to) are not asked.

use super::GuestFailure;
use crate::bytes::Bytes;
use crate::image::{ChainImage, OpenedFile};
use crate::sandbox::BadRequest;
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use rustix::fs::{fstatfs, fstatvfs};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// `f_type` of ext2, ext3 and ext4 (statfs(2)).
const EXT: u64 = 0xef53;
/// `f_type` of tmpfs.
const TMPFS: u64 = 0x0102_1994;

/// The needs of a plan in the image that is written to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanNeeds {
    /// The number of new clusters for data.
    pub data_clusters: u64,
    /// The number of new clusters for metadata.
    pub metadata_clusters: u64,
    /// Bytes of decoded data, which takes its full size, however little space the layers take.
    pub encoded_bytes: u64,
    /// The final length of the file in bytes.
    pub final_length: u64,
}

/// The facts about space before the first change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that the image's file system has free for this user.
    free: u64,
    /// Length of the image's file in bytes.
    length: u64,
    /// Bytes of a cluster of the image.
    cluster: u64,
    /// Maximum of the data in bytes, except for decoded data: for layers, the bytes of the disk that their files take.
    data: u64,
}

/// Bytes that an image's file system has free for this user; `None` for a block device, and if the file system does not
/// report them.
#[must_use]
pub fn free_space(image: &ChainImage<'_>) -> Option<u64> {
    if image.opened.block_device {
        return None;
    }
    free_in(image.opened.file.file())
}

/// Bytes that the file system of a file or directory has free for this user; `None` where it does not say.
#[must_use]
pub fn free_in(file: impl AsFd) -> Option<u64> {
    let system = fstatvfs(file).ok()?;
    let blocks = if rustix::process::geteuid().is_root() { system.f_bfree } else { system.f_bavail };
    Some(blocks.saturating_mul(system.f_frsize))
}

/// Bytes that the file system of an image allocates at once.
#[must_use]
pub fn block_size(image: &ChainImage<'_>) -> u64 {
    fstatvfs(image.opened.file.file()).map_or(1, |system| system.f_bsize.max(1))
}

/// Bytes of the disk that the files of an image take; `None` for a block device.
#[must_use]
pub fn taken_space(image: &ChainImage<'_>) -> Option<u64> {
    image.all_files().filter(|opened| !opened.block_device).map(taken).reduce(u64::saturating_add)
}

/// Bytes of the disk that a file takes.
fn taken(opened: &OpenedFile) -> u64 {
    opened.file.file().metadata().map_or(u64::MAX, |found| found.blocks().saturating_mul(512))
}

impl Space {
    /// Collect the facts before data of these layers is written into an image; `None` for a block device, several files, a
    /// format without clusters, and other file systems.
    #[must_use]
    pub fn of(target: &ChainImage<'_>, layers: &[&ChainImage<'_>]) -> Option<Self> {
        let files = layers.iter().flat_map(|layer| layer.all_files());
        Self::for_data(target, files.map(taken).fold(0, u64::saturating_add)).filter(|space| space.cluster > 1)
    }

    /// Collect them before `data` bytes are written; a format without clusters counts as one with clusters of one byte.
    #[must_use]
    pub fn for_data(target: &ChainImage<'_>, data: u64) -> Option<Self> {
        let file = target.opened.file.file();
        let usable = !target.opened.block_device && target.files.is_empty();
        let known = fstatfs(file).is_ok_and(|system| [EXT, TMPFS].contains(&system.f_type.cast_unsigned()));
        let free = free_space(target).filter(|_| usable && known)?;
        Some(Self { free, length: target.facts.file_length, cluster: target.facts.cluster_size.max(1), data })
    }

    /// The bytes that are needed and the bytes that are free, if these certainly do not suffice.
    #[must_use]
    pub fn lacking(&self, needs: &PlanNeeds) -> Option<(u64, u64)> {
        let bytes = |clusters: u64| clusters.saturating_mul(self.cluster);
        let data = self.data.saturating_add(needs.encoded_bytes);
        let new = bytes(needs.data_clusters).min(data).saturating_add(bytes(needs.metadata_clusters));
        // New clusters within the file may have their space already.
        let needed = new.min(needs.final_length.saturating_sub(self.length));
        (needed > self.free).then_some((needed, self.free))
    }
}

/// The room for a change: compared with the plan, and remembered for the message if it does not suffice.
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    space: Option<Space>,
    /// The bytes that the plan needs and the bytes that are free, if a lack of space ended the guest.
    lacking: Option<(u64, u64)>,
}

impl Room {
    /// The room that these facts about space leave; without facts, every plan is admitted.
    #[must_use]
    pub fn of(space: Option<Space>) -> Self {
        Self { space, lacking: None }
    }

    /// Admit a plan with these needs.
    ///
    /// # Errors
    /// It certainly needs more space than there is.
    pub fn admit(&mut self, needs: &PlanNeeds) -> Result<(), BadRequest> {
        self.lacking = self.space.and_then(|space| space.lacking(needs));
        self.lacking.map_or(Ok(()), |_| Err(BadRequest("more space than there is".to_owned())))
    }

    /// The end of a guest: the refusal of its plan, if that was not admitted, in which `what` needs the space.
    ///
    /// # Errors
    /// The refusal, or that of `end`.
    pub fn judge<T>(&self, what: &str, end: Result<T, GuestFailure>) -> Result<T, GuestFailure> {
        self.lacking.map_or(end, |lacking| Err(no_space(what, lacking)))
    }
}

/// The refusal of a change that needs more space than the file system of the image has; `what` needs it.
fn no_space(what: &str, (needed, free): (u64, u64)) -> GuestFailure {
    let text = format!("{what} needs {} more of the file system, which has {} free", Bytes(needed), Bytes(free));
    GuestFailure { device: Some(DEVICE_OUTPUT), ..GuestFailure::ended(ErrorCode::NoSpace, text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_is_lacking() {
        let space = Space { free: 1000, length: 5000, cluster: 100, data: 3000 };
        let plan = |data, metadata, length| PlanNeeds {
            data_clusters: data,
            metadata_clusters: metadata,
            final_length: length,
            ..PlanNeeds::default()
        };
        assert_eq!(space.lacking(&plan(9, 1, 6000)), None);
        assert_eq!(space.lacking(&plan(10, 1, 6100)), Some((1100, 1000)));
        assert_eq!(space.lacking(&plan(10, 1, 5900)), None, "the others are free clusters within the file");
        assert_eq!(Space { data: 800, ..space }.lacking(&plan(10, 1, 6100)), None, "the data has holes");
        let decoded = PlanNeeds { encoded_bytes: 200, ..plan(10, 1, 6100) };
        assert_eq!(Space { data: 800, ..space }.lacking(&decoded), Some((1100, 1000)), "but decoded data has none");
        assert_eq!(space.lacking(&plan(u64::MAX, u64::MAX, u64::MAX)), Some((u64::MAX - 5000, 1000)));
    }
}
