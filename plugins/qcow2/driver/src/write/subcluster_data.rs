//! The sink role with extended L2 entries: how pieces fall onto the subclusters of a cluster.
//!
//! Nothing is allocated or copied for a subcluster that no piece touches, unless the whole cluster has to move. A
//! subcluster that reads as zeroes afterwards as a whole is only marked so; one that is written in part gets the rest
//! of its bytes from where they are now.

use crate::image::overflow;
use crate::write::cluster_data::DataWriter;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::{Fill, Old};
use crate::write::sink::Qcow2Sink;
use crate::write::subclusters::{covered, states, touched, Place, SubclusterChange};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow};
use instar_qcow2_format::{GuestCluster, HostOffset, L2Entry, Subclusters, SUBCLUSTERS};

impl Qcow2Sink {
    /// Bytes of a subcluster.
    fn subcluster_bytes(&self) -> u64 {
        self.image.cluster_size().bytes() / u64::from(SUBCLUSTERS)
    }

    /// What is to be done with a cluster, given its extended entry and the pieces that fall into it; `None` if it reads
    /// as it should already.
    pub(crate) fn change(
        &self,
        pieces: &[ClusterExtent],
        entry: L2Entry,
        mixed: Option<Subclusters>,
    ) -> Option<SubclusterChange> {
        let (each, visible) = (self.subcluster_bytes(), self.visible_bytes(pieces.first()?.cluster));
        let all = touched(0, visible, each);
        let before = states(entry, mixed);
        let (mut data, mut partly_zero, mut zero) = (0, 0, 0);
        // Zeroes that follow each other, in whatever pieces, cover subclusters together.
        for run in pieces.chunk_by(|a, b| a.is_zero() == b.is_zero() && a.start + a.length == b.start) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let (start, end) = (first.start, last.start + last.length);
            if first.is_zero() {
                zero |= covered(start, end, each, visible);
                partly_zero |= touched(start, end, each);
            } else {
                data |= touched(start, end, each);
            }
        }
        let compressed = matches!(entry, L2Entry::Compressed { .. });
        let reads_zero = before.zero | if self.has_backing || compressed { 0 } else { !before.allocated };
        // Zeroes over what reads as zeroes already are nothing to do.
        partly_zero &= !reads_zero;
        zero &= !reads_zero;
        let written = data | (partly_zero & !zero);
        if written | zero == 0 {
            return None;
        }
        let after = Subclusters {
            allocated: (before.allocated & !zero | written) & all,
            zero: (before.zero & !written | zero) & all,
        };
        let decoded = |descriptor| {
            let stays = all & !zero;
            let after = Subclusters { allocated: stays, zero };
            let place = if stays == 0 { Place::Nowhere } else { Place::New };
            let fill = if stays == 0 { Fill::Zero } else { Fill::Compressed(descriptor) };
            SubclusterChange { place, fill, old: Old::Compressed(descriptor), before, after, written: stays }
        };
        let change = |place, fill, old| SubclusterChange { place, fill, old, before, after, written };
        Some(match (entry, entry.host()) {
            (L2Entry::Compressed { descriptor }, _) => decoded(descriptor),
            (_, Some((host, _))) if after.allocated == 0 => change(Place::Nowhere, Fill::Zero, Old::Cluster(host)),
            // Shared with a snapshot: copy on write. Without a byte to write the two can go on sharing it.
            (_, Some((host, false))) if written != 0 => SubclusterChange {
                written: after.allocated,
                ..change(Place::New, Fill::Cluster(host), Old::Cluster(host))
            },
            (_, Some((host, copied))) => change(Place::Here(host, copied), Fill::Zero, Old::Nothing),
            (_, None) if after.allocated == 0 => change(Place::Nowhere, Fill::Zero, Old::Nothing),
            (_, None) => change(Place::New, Fill::Zero, Old::Nothing),
        })
    }

    /// Submit the data of a changed cluster that stands at `host` afterwards.
    pub(crate) fn write_change(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        (group, change): (&[ClusterExtent], &SubclusterChange),
        host: HostOffset,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let Some(cluster) = group.first().map(|piece| piece.cluster) else { return Ok(()) };
        let fresh = change.place == Place::New;
        let decoded = match change.fill {
            Fill::Compressed(descriptor) => self.decode(io, cluster, descriptor)?,
            _ => Vec::new(),
        };
        for (start, length) in self.gaps(group) {
            for (start, length, which) in self.split(start, length, change.written) {
                let at = host.0 + start;
                self.out.written();
                if !decoded.is_empty() {
                    self.write_part(io, host, (start, length), &decoded)?;
                } else if change.before.allocated & which != 0 {
                    if let Fill::Cluster(from) = change.fill {
                        let device = self.image.device;
                        writer.push(io, Request::copy(device, from.0 + start, device, at, length))?;
                    }
                } else if change.before.zero & which != 0 || !self.has_backing {
                    // Stale bytes, if the host cluster is not new.
                    if !fresh {
                        writer.push(io, Request::zero(self.image.device, at, length))?;
                    }
                } else {
                    self.copy_up(io, (cluster, host, fresh), (start, length), below)?;
                }
            }
        }
        for piece in group {
            let end = piece.start + piece.length;
            if !piece.is_zero() {
                self.write_pieces(io, writer, core::slice::from_ref(piece), host, fresh)?;
            } else if !fresh {
                for (start, length, _) in self.split(piece.start, end - piece.start, change.written) {
                    self.out.written();
                    writer.push(io, Request::zero(self.image.device, host.0 + start, length))?;
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
        let base = cluster.0 << self.image.cluster_size().bits();
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("a gap"))?];
        below.read(io, base + start, &mut bytes)?;
        if fresh {
            return self.write_unless_zero(io, host.0 + start, &bytes);
        }
        self.out.write(io, host.0 + start, &bytes)
    }

    /// The parts of a range of bytes that fall into each of these subclusters, with the bit of the subcluster.
    fn split(&self, start: u64, length: u64, subclusters: u32) -> Vec<(u64, u64, u32)> {
        let (each, end) = (self.subcluster_bytes(), start + length);
        let parts = (start / each..end.div_ceil(each)).map(|index| {
            let (from, to) = (start.max(index * each), end.min((index + 1) * each));
            (from, to - from, 1u32.checked_shl(u32::try_from(index).unwrap_or(u32::MAX)).unwrap_or(0))
        });
        parts.filter(|&(_, _, which)| subclusters & which != 0).collect()
    }
}
