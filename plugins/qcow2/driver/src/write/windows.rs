//! Extents cut into pieces of clusters, in windows that bounded memory can hold.

use crate::image::overflow;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::sink::{Qcow2Sink, WINDOW_SLICES};
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult, Extent};
use instar_qcow2_format::GuestCluster;

/// Clusters that are worked on between two sets of flushes, at most.
const WINDOW_CLUSTERS: usize = 1 << 16;
/// What is done with a window: the pieces of whole clusters, in order.
type EachWindow<'e> = dyn FnMut(&mut Qcow2Sink, &mut dyn BlockIo, &[ClusterExtent]) -> DriverResult<()> + 'e;

impl Qcow2Sink {
    /// Cut extents into pieces and hand them to `each` in windows of whole clusters that bounded memory can
    /// hold. Zeroes are left out where nothing is mapped that they would change: a short layer below a large overlay makes
    /// an extent of them that reaches to the end of the disk, however little either file holds.
    pub(crate) fn windows(
        &mut self,
        io: &mut dyn BlockIo,
        extents: &[Extent],
        each: &mut EachWindow<'_>,
    ) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let per_slice = self.image.slice_size() as u64 / self.image.header.l2_entry_bytes();
        let mut pieces: Vec<ClusterExtent> = Vec::new();
        let (mut clusters, mut slices) = (0, 0);
        let mut last: Option<GuestCluster> = None;
        for extent in extents {
            let end = extent.end_within(self.image.header.virtual_size)?;
            let mut at = extent.guest_offset;
            let mut mapped = at;
            while at < end {
                if extent.is_zero() && at >= mapped {
                    (at, mapped) = self.next_mapped(io, at, end)?;
                    if at >= end {
                        break;
                    }
                }
                let cluster = GuestCluster(at >> size.bits());
                if last != Some(cluster) {
                    let new_slice = last.is_none_or(|l| l.0 / per_slice != cluster.0 / per_slice);
                    if clusters == WINDOW_CLUSTERS || (new_slice && slices == WINDOW_SLICES) {
                        each(self, io, &pieces)?;
                        pieces.clear();
                        (clusters, slices) = (0, 0);
                    }
                    slices += usize::from(new_slice || clusters == 0);
                    clusters += 1;
                    last = Some(cluster);
                }
                let start = size.offset_in(at);
                let length = (size.bytes() - start).min(end - at);
                let part = extent.clip(at..at + length).ok_or_else(|| overflow("an extent"))?;
                pieces.push(ClusterExtent { cluster, start, length, content: part.content });
                at += length;
            }
        }
        if pieces.is_empty() {
            return Ok(());
        }
        each(self, io, &pieces)
    }

    /// Where, from guest offset `at` on, the first byte before `end` is that zeroes may have to be written to (`end` if
    /// there is none), and where the range of its L2 table ends. Without a table, an image with nothing below it reads as
    /// zeroes; a bitmap records them all the same.
    fn next_mapped(&mut self, io: &mut dyn BlockIo, mut at: u64, end: u64) -> DriverResult<(u64, u64)> {
        if self.has_backing || !self.bitmaps.recorded.is_empty() {
            return Ok((at, end));
        }
        let coverage = self.image.header.l2_coverage();
        while at < end {
            let next = (at / coverage + 1).saturating_mul(coverage);
            let cluster = GuestCluster(at >> self.image.cluster_size().bits());
            let (entry_at, index) = self.l1_position(cluster);
            if index >= u64::from(self.image.header.l1_entries) {
                return Ok((end, end));
            }
            if self.l1.slice_of(entry_at) == entry_at {
                self.l1.shrink(WINDOW_SLICES / 4);
            }
            self.l1.load(io, [entry_at])?;
            if self.l2_table(cluster)?.is_some() {
                return Ok((at, next));
            }
            at = next.min(end);
        }
        Ok((end, end))
    }
}
