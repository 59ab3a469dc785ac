//! The data of a window: what goes into which host cluster, from where. It is step 1 of [`window`](crate::write::window).

use crate::image::overflow;
use crate::refcount::space::{Reserved, BATCH};
use crate::write::action::Action;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::Fill;
use crate::write::remap::Remap;
use crate::write::sink::Qcow2Sink;
use crate::write::subclusters::Place;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{Batch, BlockIo, DriverResult, ReadBelow};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

/// Data requests, merged where they go on from each other.
pub(crate) struct DataWriter {
    requests: Batch,
}

impl DataWriter {
    pub(crate) fn push(&mut self, io: &mut dyn BlockIo, request: Request) -> DriverResult<()> {
        self.requests.push(request);
        if self.requests.len() >= BATCH {
            self.requests.submit(io)?;
        }
        Ok(())
    }
}

impl Qcow2Sink {
    /// Submit the data of a window. Returns the entries to change and the clusters to free.
    pub(crate) fn write_data(
        &mut self,
        io: &mut dyn BlockIo,
        groups: &[&[ClusterExtent]],
        actions: &[Action],
        reserved: &mut Reserved,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<(Vec<Remap>, Vec<HostCluster>)> {
        let mut writer = DataWriter { requests: Batch::new() };
        let mut remaps = Vec::new();
        let mut freed = Vec::new();
        for (group, action) in groups.iter().zip(actions) {
            let Some(cluster) = group.first().map(|piece| piece.cluster) else { continue };
            match *action {
                Action::Nothing => {}
                Action::InPlace(host) => self.write_pieces(io, &mut writer, group, host, false)?,
                Action::Revive(host) => {
                    // The bytes that are there are stale: they were behind the zero flag.
                    self.zero_gaps(io, &mut writer, group, host)?;
                    self.write_pieces(io, &mut writer, group, host, false)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::Allocate(fill, old) => {
                    let host = self.host_offset(reserved.next()?)?;
                    match fill {
                        Fill::Zero => {}
                        Fill::Below => self.fill_gaps(io, group, host, below)?,
                        Fill::Cluster(from) => self.copy_gaps(io, &mut writer, group, from, host)?,
                        Fill::Compressed(descriptor) => {
                            let bytes = self.decode(io, cluster, descriptor)?;
                            self.write_gaps(io, group, host, &bytes)?;
                        }
                    }
                    freed.extend(old.host_clusters(self.image.cluster_size()));
                    self.write_pieces(io, &mut writer, group, host, true)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::MakeZero(zero_flag, old) => {
                    let entry =
                        if zero_flag { L2Entry::Zero { offset: None, copied: false } } else { L2Entry::Unallocated };
                    remaps.push(Remap::standard(cluster, entry));
                    freed.extend(old.host_clusters(self.image.cluster_size()));
                }
                Action::Subclusters(change) => {
                    let host = match change.place {
                        Place::Nowhere => None,
                        Place::Here(host, copied) => Some((host, copied)),
                        Place::New => Some((self.host_offset(reserved.next()?)?, true)),
                    };
                    if let Some((host, _)) = host {
                        self.write_change(io, &mut writer, (group, &change), host, below)?;
                    }
                    freed.extend(change.old.host_clusters(self.image.cluster_size()));
                    if change.remaps() {
                        remaps.push(Remap::extended(cluster, host, change.after));
                    }
                }
            }
        }
        writer.requests.submit(io)?;
        Ok((remaps, freed))
    }

    /// Write the pieces of a cluster to its host cluster. New clusters read as zeroes already.
    pub(crate) fn write_pieces(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        group: &[ClusterExtent],
        host: HostOffset,
        fresh: bool,
    ) -> DriverResult<()> {
        let device = self.image.device;
        for piece in group {
            if fresh && piece.is_zero() {
                continue;
            }
            let request = piece.content.request(device, host.0 + piece.start, piece.length)?;
            self.out.written();
            writer.push(io, request)?;
        }
        Ok(())
    }

    /// Byte ranges of a cluster, up to the end of the virtual disk, that no piece covers.
    pub(crate) fn gaps(&self, group: &[ClusterExtent]) -> Vec<(u64, u64)> {
        let Some(first) = group.first() else { return Vec::new() };
        let mut gaps = Vec::new();
        let mut at = 0;
        for piece in group {
            if piece.start > at {
                gaps.push((at, piece.start - at));
            }
            at = piece.start + piece.length;
        }
        let end = self.visible_bytes(first.cluster);
        if at < end {
            gaps.push((at, end - at));
        }
        gaps
    }

    fn zero_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        group: &[ClusterExtent],
        host: HostOffset,
    ) -> DriverResult<()> {
        for (start, length) in self.gaps(group) {
            self.out.written();
            writer.push(io, Request::zero(self.image.device, host.0 + start, length))?;
        }
        Ok(())
    }

    /// Copy from the old cluster what the pieces leave open.
    fn copy_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        group: &[ClusterExtent],
        from: HostOffset,
        to: HostOffset,
    ) -> DriverResult<()> {
        let device = self.image.device;
        for (start, length) in self.gaps(group) {
            self.out.written();
            writer.push(io, Request::copy(device, from.0 + start, device, to.0 + start, length))?;
        }
        Ok(())
    }

    /// Copy up what the image's ancestors have where the pieces leave gaps in a new cluster.
    fn fill_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        host: HostOffset,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let Some(first) = group.first() else { return Ok(()) };
        let base = first.cluster.0 << self.image.cluster_size().bits();
        for (start, length) in self.gaps(group) {
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("a gap"))?];
            below.read(io, base + start, &mut bytes)?;
            self.write_unless_zero(io, host.0 + start, &bytes)?;
        }
        Ok(())
    }

    /// Write what the pieces leave open of a new cluster from `bytes`, which are a whole cluster.
    fn write_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        host: HostOffset,
        bytes: &[u8],
    ) -> DriverResult<()> {
        self.gaps(group).into_iter().try_for_each(|gap| self.write_part(io, host, gap, bytes))
    }

    /// Write a part of a new cluster (first byte, length) from `bytes`, which are a whole cluster.
    pub(crate) fn write_part(
        &mut self,
        io: &mut dyn BlockIo,
        host: HostOffset,
        (start, length): (u64, u64),
        bytes: &[u8],
    ) -> DriverResult<()> {
        let range = usize::try_from(start).ok().zip(usize::try_from(start + length).ok());
        let part = range.and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| overflow("a gap"))?;
        self.write_unless_zero(io, host.0 + start, part)
    }

    /// Write bytes of a new cluster, which is zero.
    pub(crate) fn write_unless_zero(&mut self, io: &mut dyn BlockIo, at: u64, bytes: &[u8]) -> DriverResult<()> {
        if bytes.iter().any(|&byte| byte != 0) {
            self.out.write(io, at, bytes)?;
        }
        Ok(())
    }
}
