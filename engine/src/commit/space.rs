//! Notice a full disk before the first change: compare the plan's needs with the backing's file system.
//!
//! A commit that would fit must not be refused, so only certain needs count. File systems that may share or compress
//! copied data (all but the few that are known not to) are not asked.

use crate::image::{ChainImage, OpenedFile};
use instar_guest_protocol::commit::Plan;
use rustix::fs::{fstatfs, fstatvfs};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// `f_type` of ext2, ext3 and ext4 (statfs(2)).
const EXT: u64 = 0xef53;
/// `f_type` of tmpfs.
const TMPFS: u64 = 0x0102_1994;

/// The facts about space before a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that the backing's file system has free for this user.
    free: u64,
    /// Length of the backing's file in bytes.
    length: u64,
    /// Bytes of a cluster of the backing.
    cluster: u64,
    /// Bytes of the disk that the files of the merged layers take, which bounds their data, except for decoded data.
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
    /// Collect the facts; `None` for a block device, several files, a format without clusters, and other file systems.
    #[must_use]
    pub fn of(backing: &ChainImage<'_>, merged: &[&ChainImage<'_>]) -> Option<Self> {
        let file = backing.opened.file.file();
        let usable = !backing.opened.block_device && backing.files.is_empty() && backing.facts.cluster_size > 1;
        let known = fstatfs(file).is_ok_and(|system| [EXT, TMPFS].contains(&system.f_type.cast_unsigned()));
        let free = free_space(backing).filter(|_| usable && known)?;
        let files = merged.iter().flat_map(|layer| layer.all_files());
        Some(Self {
            free,
            length: backing.facts.file_length,
            cluster: backing.facts.cluster_size,
            data: files.map(taken).fold(0, u64::saturating_add),
        })
    }

    /// The bytes that are needed and the bytes that are free, if these certainly do not suffice.
    #[must_use]
    pub fn lacking(&self, plan: &Plan) -> Option<(u64, u64)> {
        let bytes = |clusters: u64| clusters.saturating_mul(self.cluster);
        // Decoded data takes its full size, however little space the layers take.
        let data = self.data.saturating_add(plan.encoded_bytes);
        let new = bytes(plan.new_data_clusters).min(data).saturating_add(bytes(plan.new_metadata_clusters));
        // New clusters within the file may have their space already.
        let needed = new.min(plan.backing_final_length.saturating_sub(self.length));
        (needed > self.free).then_some((needed, self.free))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_is_lacking() {
        let space = Space { free: 1000, length: 5000, cluster: 100, data: 3000 };
        let plan = |data, metadata, length| Plan {
            new_data_clusters: data,
            new_metadata_clusters: metadata,
            backing_final_length: length,
            ..Plan::default()
        };
        assert_eq!(space.lacking(&plan(9, 1, 6000)), None);
        assert_eq!(space.lacking(&plan(10, 1, 6100)), Some((1100, 1000)));
        assert_eq!(space.lacking(&plan(10, 1, 5900)), None, "the others are free clusters within the file");
        assert_eq!(Space { data: 800, ..space }.lacking(&plan(10, 1, 6100)), None, "the data has holes");
        let decoded = Plan { encoded_bytes: 200, ..plan(10, 1, 6100) };
        assert_eq!(Space { data: 800, ..space }.lacking(&decoded), Some((1100, 1000)), "but decoded data has none");
        assert_eq!(space.lacking(&plan(u64::MAX, u64::MAX, u64::MAX)), Some((u64::MAX - 5000, 1000)));
    }
}
