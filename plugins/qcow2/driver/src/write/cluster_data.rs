//! The data of a window: what goes into which host cluster, from where. It is step 1 of [`window`](crate::write::window).

use crate::image::{overflow, Image};
use crate::refcount::space::{Reserved, BATCH};
use crate::write::action::Action;
use crate::write::backing::Backing;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::{Fill, Old};
use crate::write::remap::Remap;
use crate::write::subclusters::Place;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{Batch, BlockIo, DriverResult, ReadBelow};
use instar_qcow2_format::{ClusterSize, GuestCluster, HostCluster, HostOffset, L2Entry};

/// What follows from the data of a window.
pub(crate) struct Written {
    /// The entries to change.
    pub(crate) remaps: Vec<Remap>,
    /// Clusters to free.
    pub(crate) freed: Vec<HostCluster>,
    /// Clusters of the data file that are not referred to any more.
    pub(crate) unmapped: Vec<GuestCluster>,
}

/// Writes the data of windows into a backing. Requests are merged where they go on from each other.
pub(crate) struct DataWriter<'a> {
    pub(crate) backing: &'a mut Backing,
    requests: Batch,
}

impl<'a> DataWriter<'a> {
    pub(crate) fn new(backing: &'a mut Backing) -> Self {
        Self { backing, requests: Batch::new() }
    }

    pub(crate) fn push(&mut self, io: &mut dyn BlockIo, request: Request) -> DriverResult<()> {
        self.requests.push(request);
        if self.requests.len() >= BATCH {
            self.requests.submit(io)?;
        }
        Ok(())
    }

    /// Submit the data of a window.
    pub(crate) fn write(
        mut self,
        io: &mut dyn BlockIo,
        groups: &[&[ClusterExtent]],
        actions: &[Action],
        reserved: &mut Reserved,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<Written> {
        let mut remaps = Vec::new();
        let (mut freed, mut unmapped) = (Vec::new(), Vec::new());
        let outside = self.backing.image.data.is_some();
        let mut drops = |cluster: GuestCluster, old: Old, size: ClusterSize| match old {
            Old::Nothing => {}
            _ if outside => unmapped.push(cluster),
            old => freed.extend(old.host_clusters(size)),
        };
        let size = self.backing.image.cluster_size();
        for (group, action) in groups.iter().zip(actions) {
            let Some(cluster) = group.first().map(|extent| extent.cluster) else { continue };
            match *action {
                Action::Nothing => {}
                Action::InPlace(host) => self.write_extents(io, group, host, false)?,
                Action::Revive(host) => {
                    // The bytes that are there are stale: they were behind the zero flag.
                    self.zero_gaps(io, group, host)?;
                    self.zero_past_disk(io, cluster, host, size.bytes())?;
                    self.write_extents(io, group, host, false)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::CopyUp(host) => {
                    self.copy_up_gaps(io, group, host, below)?;
                    self.zero_past_disk(io, cluster, host, size.bytes())?;
                    self.write_extents(io, group, host, false)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::Allocate(fill, old) => {
                    let host = self.backing.image.host_offset(reserved.next()?)?;
                    match fill {
                        Fill::Zero => {}
                        Fill::Below => self.fill_gaps(io, group, host, below)?,
                        Fill::Cluster(from) => self.copy_gaps(io, group, from, host)?,
                        Fill::Compressed(descriptor) => {
                            let Backing { compressed, image, .. } = &mut *self.backing;
                            let bytes = compressed.read_whole(io, image, cluster, descriptor)?;
                            self.write_gaps(io, group, host, &bytes)?;
                        }
                    }
                    drops(cluster, old, size);
                    self.write_extents(io, group, host, true)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::MakeZero(zero_flag, old) => {
                    let entry =
                        if zero_flag { L2Entry::Zero { offset: None, copied: false } } else { L2Entry::Unallocated };
                    remaps.push(Remap::standard(cluster, entry));
                    drops(cluster, old, size);
                }
                Action::Subclusters(change) => {
                    let host = match change.place {
                        Place::Nowhere => None,
                        Place::Here(host, copied) => Some((host, copied)),
                        Place::New => Some((self.backing.image.host_offset(reserved.next()?)?, true)),
                    };
                    if let Some((host, _)) = host {
                        self.write_change(io, (group, &change), host, below)?;
                    }
                    drops(cluster, change.old, size);
                    if change.remaps() {
                        remaps.push(Remap::extended(cluster, host, change.after));
                    }
                }
            }
        }
        self.requests.submit(io)?;
        Ok(Written { remaps, freed, unmapped })
    }

    /// Write the extents of a cluster to its host cluster. New clusters read as zeroes already.
    pub(crate) fn write_extents(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        host: HostOffset,
        fresh: bool,
    ) -> DriverResult<()> {
        let device = self.backing.image.data_device();
        for extent in group {
            if extent.is_zero() {
                if !fresh {
                    self.zero(io, host.0 + extent.start, extent.length)?;
                }
                continue;
            }
            let request = extent.content.request(device, host.0 + extent.start, extent.length)?;
            self.backing.writes_data(host.0 + extent.start + extent.length);
            self.push(io, request)?;
        }
        Ok(())
    }

    fn zero_gaps(&mut self, io: &mut dyn BlockIo, group: &[ClusterExtent], host: HostOffset) -> DriverResult<()> {
        for (start, length) in gaps(&self.backing.image, group) {
            self.zero(io, host.0 + start, length)?;
        }
        Ok(())
    }

    /// A cluster that the disk ends within gets an entry for data: zero its bytes from the disk's end up to byte `end`, as far as
    /// the file has any. They may be stale, and a program that lengthens the disk takes them for the guest's.
    pub(crate) fn zero_past_disk(
        &mut self,
        io: &mut dyn BlockIo,
        cluster: GuestCluster,
        host: HostOffset,
        end: u64,
    ) -> DriverResult<()> {
        let image = &self.backing.image;
        let visible = image.visible_bytes(cluster);
        let at = host.0 + visible;
        let held = image.data.map_or(image.file_length, |data| data.file_length).saturating_sub(at);
        match end.saturating_sub(visible).min(held) {
            0 => Ok(()),
            length => self.zero(io, at, length),
        }
    }

    /// Make bytes of the guest read as zeroes. Past the end of a data file, they do already. They do past the end of the image,
    /// too, but the entry that will refer to them says that the file holds them: it becomes longer first. A crash leaves a
    /// cluster as it was, in a longer file.
    pub(crate) fn zero(&mut self, io: &mut dyn BlockIo, at: u64, length: u64) -> DriverResult<()> {
        let length = self.backing.image.data.map_or(length, |data| data.held(at, length));
        if length == 0 {
            return Ok(());
        }
        if self.backing.image.data.is_none() {
            self.backing.hold_last_cluster(io, at + length)?;
        }
        self.backing.data_out().written();
        self.push(io, Request::zero(self.backing.image.data_device(), at, length))
    }

    /// Copy from the old cluster what the extents leave open.
    fn copy_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        from: HostOffset,
        to: HostOffset,
    ) -> DriverResult<()> {
        let device = self.backing.image.device;
        for (start, length) in gaps(&self.backing.image, group) {
            self.backing.out.written();
            self.push(io, Request::copy(device, from.0 + start, device, to.0 + start, length))?;
        }
        Ok(())
    }

    /// Copy up what the image's ancestors have where the extents leave gaps in a new cluster.
    fn fill_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        host: HostOffset,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let Some(first) = group.first() else { return Ok(()) };
        let base = first.cluster.0 << self.backing.image.cluster_size().bits();
        for (start, length) in gaps(&self.backing.image, group) {
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("a gap"))?];
            below.read(io, base + start, &mut bytes)?;
            self.write_unless_zero(io, host.0 + start, &bytes)?;
        }
        Ok(())
    }

    /// Write what the image's ancestors have where the extents leave gaps in a cluster of the data file, zeroes, too: what
    /// stands there is stale.
    fn copy_up_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        host: HostOffset,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        for (start, length) in gaps(&self.backing.image, group) {
            let at = host.0 + start;
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("a gap"))?];
            below.read(io, at, &mut bytes)?;
            self.write_bytes(io, at, &bytes)?;
        }
        Ok(())
    }

    /// Write bytes of the guest to where they stand in the file.
    pub(crate) fn write_bytes(&mut self, io: &mut dyn BlockIo, at: u64, bytes: &[u8]) -> DriverResult<()> {
        self.backing.writes_data(at + bytes.len() as u64);
        self.backing.data_out().write(io, at, bytes)
    }

    /// Write what the extents leave open of a new cluster from `bytes`, which are a whole cluster.
    fn write_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[ClusterExtent],
        host: HostOffset,
        bytes: &[u8],
    ) -> DriverResult<()> {
        gaps(&self.backing.image, group).into_iter().try_for_each(|gap| self.write_part(io, host, gap, bytes))
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
            self.write_bytes(io, at, bytes)?;
        }
        Ok(())
    }
}

/// Byte ranges of a cluster, up to the end of the virtual disk, that no piece covers.
pub(crate) fn gaps(image: &Image, group: &[ClusterExtent]) -> Vec<(u64, u64)> {
    let Some(first) = group.first() else { return Vec::new() };
    let mut gaps = Vec::new();
    let mut at = 0;
    for extent in group {
        if extent.start > at {
            gaps.push((at, extent.start - at));
        }
        at = extent.start + extent.length;
    }
    let end = image.visible_bytes(first.cluster);
    if at < end {
        gaps.push((at, end - at));
    }
    gaps
}
