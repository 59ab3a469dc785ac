//! The data of a cluster that has an extended L2 entry, subcluster by subcluster.

use crate::image::{overflow, Image};
use crate::write::backing::Backing;
use crate::write::cluster_data::{gaps, DataWriter};
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::Fill;
use crate::write::subclusters::{subcluster_bytes, Place, SubclusterChange};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow};
use instar_qcow2_format::{GuestCluster, HostOffset};

impl DataWriter<'_> {
    /// Submit the data of a changed cluster that stands at `host` afterwards.
    pub(crate) fn write_change(
        &mut self,
        io: &mut dyn BlockIo,
        (group, change): (&[ClusterExtent], &SubclusterChange),
        host: HostOffset,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let Some(cluster) = group.first().map(|extent| extent.cluster) else { return Ok(()) };
        let fresh = change.place == Place::New;
        let decoded = match change.fill {
            Fill::Compressed(descriptor) => {
                let Backing { compressed, image, .. } = &mut *self.backing;
                compressed.read_whole(io, image, cluster, descriptor)?
            }
            _ => Vec::new(),
        };
        for (start, length) in gaps(&self.backing.image, group) {
            for (start, length, which) in split(&self.backing.image, start, length, change.written) {
                let at = host.0 + start;
                if !decoded.is_empty() {
                    self.write_part(io, host, (start, length), &decoded)?;
                } else if change.before.allocated & which != 0 {
                    if let Fill::Cluster(from) = change.fill {
                        let device = self.backing.image.device;
                        self.backing.out.written();
                        self.push(io, Request::copy(device, from.0 + start, device, at, length))?;
                    }
                } else if change.before.zero & which != 0 || !self.backing.has_backing {
                    // Stale bytes, if the host cluster is not new.
                    if !fresh {
                        self.zero(io, at, length)?;
                    }
                } else {
                    self.copy_up(io, (cluster, host, fresh), (start, length), below)?;
                }
            }
        }
        if !fresh {
            let (each, visible) = (subcluster_bytes(&self.backing.image), self.backing.image.visible_bytes(cluster));
            // The subcluster that the disk ends within, if it gets bytes.
            let last = split(&self.backing.image, visible.saturating_sub(1), visible.min(1), change.written);
            if !last.is_empty() {
                self.zero_past_disk(io, cluster, host, visible.next_multiple_of(each))?;
            }
        }
        for extent in group {
            let end = extent.start + extent.length;
            if !extent.is_zero() {
                self.write_extents(io, core::slice::from_ref(extent), host, fresh)?;
            } else if !fresh {
                for (start, length, _) in split(&self.backing.image, extent.start, end - extent.start, change.written) {
                    self.zero(io, host.0 + start, length)?;
                }
            }
        }
        Ok(())
    }

    /// Bytes of the cluster from what lies below the image; zeroes, too, where there may be stale bytes.
    fn copy_up(
        &mut self,
        io: &mut dyn BlockIo,
        (cluster, host, fresh): (GuestCluster, HostOffset, bool),
        (start, length): (u64, u64),
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let base = cluster.0 << self.backing.image.cluster_size().bits();
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("a gap"))?];
        below.read(io, base + start, &mut bytes)?;
        if fresh {
            return self.write_unless_zero(io, host.0 + start, &bytes);
        }
        self.write_bytes(io, host.0 + start, &bytes)
    }
}

/// The parts of a range of bytes that fall into each of these subclusters, with the bit of the subcluster.
fn split(image: &Image, start: u64, length: u64, subclusters: u32) -> Vec<(u64, u64, u32)> {
    let (each, end) = (subcluster_bytes(image), start + length);
    let parts = (start / each..end.div_ceil(each)).map(|index| {
        let (from, to) = (start.max(index * each), end.min((index + 1) * each));
        (from, to - from, 1u32.checked_shl(u32::try_from(index).unwrap_or(u32::MAX)).unwrap_or(0))
    });
    parts.filter(|&(_, _, which)| subclusters & which != 0).collect()
}
