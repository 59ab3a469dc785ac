//! The bytes of whole clusters as they read afterwards, for code that has to look at them: the arriving bytes, and the
//! image's own bytes around them.

use crate::image::overflow;
use crate::metadata::l2_entry::Mapped;
use crate::refcount::space::BATCH;
use crate::write::backing::Backing;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::subclusters::subcluster_bytes;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{Batch, BlockIo, Content, DriverResult, ReadBelow};
use instar_qcow2_format::{L2Entry, Subclusters, SUBCLUSTERS};

/// What arrives in a cluster, and what the image has there.
#[derive(Clone, Copy)]
pub(crate) struct Arrival<'a> {
    /// The parts of extents, all of one cluster; what one of them says holds instead of what those before it say.
    pub(crate) group: &'a [ClusterExtent],
    /// The cluster before.
    pub(crate) mapped: Mapped,
}

fn index(bytes: u64) -> DriverResult<usize> {
    usize::try_from(bytes).map_err(|_| overflow("an offset in a window"))
}

/// Fill `buffer`, which is zero, with the clusters of these arrivals, one behind the other. Behind the end of the disk they stay
/// zero.
///
/// # Errors
/// Corruption of what has to be decoded; I/O errors.
pub(crate) fn gather(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    arrivals: &[Arrival<'_>],
    below: &mut dyn ReadBelow,
    buffer: &mut [u8],
) -> DriverResult<()> {
    let size = index(backing.image.cluster_size().bytes())?;
    // Done last: what is in memory never comes behind what is on a device, and nothing else overlaps.
    let mut reads = Batch::new();
    for (arrival, bytes) in arrivals.iter().zip(buffer.chunks_exact_mut(size)) {
        let Some(first) = arrival.group.first() else { continue };
        let visible = backing.image.visible_bytes(first.cluster);
        if !covers(arrival.group, visible) {
            let shown = bytes.get_mut(..index(visible)?).ok_or_else(|| overflow("the end of the disk"))?;
            current(io, backing, &arrival.mapped, below, shown)?;
        }
        for part in arrival.group {
            let range = index(part.start)?..index(part.start + part.length)?;
            let place = bytes.get_mut(range).ok_or_else(|| overflow("a part of a cluster"))?;
            match part.content {
                Content::Data { device, offset } => {
                    reads.push(Request::read(device, offset, place.as_mut_ptr() as u64, part.length));
                }
                content => content.read(io, place)?,
            }
        }
        if reads.len() >= BATCH {
            reads.submit(io)?;
        }
    }
    reads.submit(io)
}

/// Whether ascending parts leave nothing open of the first `visible` bytes of their cluster.
fn covers(group: &[ClusterExtent], visible: u64) -> bool {
    let end = group.iter().try_fold(0, |end: u64, part| (part.start <= end).then(|| end.max(part.start + part.length)));
    end.is_some_and(|end| end >= visible)
}

/// The first bytes of a cluster as they read now; `bytes` is zero.
fn current(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    mapped: &Mapped,
    below: &mut dyn ReadBelow,
    bytes: &mut [u8],
) -> DriverResult<()> {
    if let L2Entry::Compressed { descriptor } = mapped.entry {
        let Backing { compressed, image, .. } = backing;
        return compressed.read(io, image, (mapped.guest, descriptor), 0, bytes);
    }
    let uniform = match mapped.entry {
        L2Entry::Data { .. } => Subclusters { allocated: u32::MAX, zero: 0 },
        L2Entry::Zero { .. } => Subclusters { allocated: 0, zero: u32::MAX },
        L2Entry::Unallocated | L2Entry::Compressed { .. } => Subclusters { allocated: 0, zero: 0 },
    };
    let each = if mapped.subclusters.is_some() { subcluster_bytes(&backing.image) } else { bytes.len() as u64 };
    let states = mapped.subclusters.unwrap_or(uniform);
    for (range, data, zero) in parts(states, each, bytes.len() as u64) {
        let place = bytes.get_mut(index(range.start)?..index(range.end)?).ok_or_else(|| overflow("a subcluster"))?;
        match mapped.entry.host() {
            Some((host, _)) if data => io.read(backing.image.device, host.0 + range.start, place)?,
            _ if !zero && backing.has_backing => below.read(io, mapped.guest + range.start, place)?,
            _ => {}
        }
    }
    Ok(())
}

/// The subclusters of `each` bytes up to byte `end`, those in the same state together: whether it has data, or reads as zeroes.
fn parts(states: Subclusters, each: u64, end: u64) -> Vec<(Range<u64>, bool, bool)> {
    let mut parts: Vec<(Range<u64>, bool, bool)> = Vec::new();
    for subcluster in 0..SUBCLUSTERS {
        let start = u64::from(subcluster) * each;
        if start >= end {
            break;
        }
        let (data, zero) = (states.allocated >> subcluster & 1 != 0, states.zero >> subcluster & 1 != 0);
        let range = start..(start + each).min(end);
        match parts.last_mut() {
            Some((last, was_data, was_zero)) if (*was_data, *was_zero) == (data, zero) => last.end = range.end,
            _ => parts.push((range, data, zero)),
        }
    }
    parts
}
