//! Compressed clusters have no host clusters of their own: they stand one behind the other, wherever a byte is free, and each
//! that touches a host cluster has a reference to it.

use crate::image::overflow;
use crate::refcount::space::Reserved;
use crate::write::backing::Backing;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset};

/// The host cluster that the last stream ends in.
#[derive(Clone, Copy, Debug)]
struct Tail {
    cluster: HostCluster,
    /// Bytes that are taken.
    used: u64,
    /// Its refcount.
    references: u64,
}

/// What bounds a host cluster: its bytes, and the largest refcount.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    bytes: u64,
    references: u64,
}

/// Puts streams one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Packer {
    tail: Option<Tail>,
}

impl Packer {
    /// Find places for streams of these lengths, each of which is shorter than a cluster, in new clusters and behind the last
    /// stream of before. Their refcounts are set, and nothing refers to them yet.
    ///
    /// # Errors
    /// As [`Backing::reserve`].
    pub(crate) fn place(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        lengths: &[u64],
    ) -> DriverResult<Vec<HostOffset>> {
        let bounds =
            Bounds { bytes: backing.image.cluster_size().bytes(), references: backing.space.refcounts.order().max() };
        self.look_at_tail(io, backing)?;
        // As many as are needed if all follow each other, in one go; where they do not, streams do not reach from one into the
        // next, and a few more are needed.
        let mut wanted = 0;
        let mut imagined = self.tail;
        for &length in lengths {
            put(&mut imagined, length, bounds, &mut |tail| {
                wanted += 1;
                Ok(HostCluster(tail.map_or(0, |tail| tail.cluster.0 + 1)))
            })?;
        }
        let mut reserved: Reserved = backing.reserve(io, wanted)?;
        let mut offsets = Vec::with_capacity(lengths.len());
        // Each with how many references it has besides the one that comes with a new cluster.
        let mut counted: Vec<(HostCluster, u64)> = Vec::new();
        for &length in lengths {
            let placed = put(&mut self.tail, length, bounds, &mut |_| {
                if wanted == 0 {
                    reserved = backing.reserve(io, 1)?;
                    wanted = 1;
                }
                wanted -= 1;
                reserved.next()
            })?;
            if let Some(shared) = placed.shared {
                match counted.last_mut() {
                    Some((last, more)) if *last == shared => *more += 1,
                    _ => counted.push((shared, 1)),
                }
            }
            let start = backing.image.host_offset(placed.cluster)?;
            offsets.push(HostOffset(start.0 + placed.start));
        }
        let Backing { image, space, .. } = backing;
        space.refcounts.load(io, image, counted.iter().map(|&(cluster, _)| cluster))?;
        for (cluster, more) in counted {
            let count = space.refcounts.get(image, cluster)?;
            let count = count.checked_add(more).ok_or_else(|| overflow("a refcount"))?;
            space.refcounts.set(image, cluster, count)?;
        }
        Ok(offsets)
    }

    /// All streams in the last cluster may have been given up since: then it is nobody's, or somebody else's.
    fn look_at_tail(&mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        let Some(tail) = &mut self.tail else { return Ok(()) };
        let Backing { image, space, .. } = backing;
        space.refcounts.load(io, image, core::iter::once(tail.cluster))?;
        tail.references = space.refcounts.get(image, tail.cluster)?;
        if tail.references == 0 {
            self.tail = None;
        }
        Ok(())
    }
}

/// Where a stream was put.
struct Placed {
    /// The host cluster in which it begins, and at which of its bytes.
    cluster: HostCluster,
    start: u64,
    /// The cluster that it shares with the streams before.
    shared: Option<HostCluster>,
}

/// Put a stream behind the others; `next` gives a new cluster.
fn put(
    tail: &mut Option<Tail>,
    length: u64,
    bounds: Bounds,
    next: &mut dyn FnMut(Option<Tail>) -> DriverResult<HostCluster>,
) -> DriverResult<Placed> {
    let last = tail.filter(|tail| tail.used < bounds.bytes && tail.references < bounds.references);
    if let Some(last) = last.filter(|last| bounds.bytes - last.used >= length) {
        *tail = Some(Tail { used: last.used + length, references: last.references + 1, ..last });
        return Ok(Placed { cluster: last.cluster, start: last.used, shared: Some(last.cluster) });
    }
    let cluster = next(*tail)?;
    // It reaches into the next cluster only if that is the one behind it in the file.
    let Some(last) = last.filter(|last| last.cluster.0.checked_add(1) == Some(cluster.0)) else {
        *tail = Some(Tail { cluster, used: length, references: 1 });
        return Ok(Placed { cluster, start: 0, shared: None });
    };
    *tail = Some(Tail { cluster, used: length - (bounds.bytes - last.used), references: 1 });
    Ok(Placed { cluster: last.cluster, start: last.used, shared: Some(last.cluster) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use alloc::vec;
    use instar_guest_sdk::memory::MemoryDevices;
    use instar_qcow2_testkit::builder::Spec;

    fn parts(refcount_order: u32) -> (MemoryDevices, Backing) {
        let (io, image) = open(&Spec { refcount_order, ..Spec::new(9, 300 << 9) });
        (io, Backing::new(image, false))
    }

    /// Where streams go, from the begin of the first, with the refcounts of the clusters from there on.
    fn placed(refcount_order: u32, calls: &[&[u64]]) -> (Vec<u64>, Vec<u64>) {
        let (mut io, mut backing) = parts(refcount_order);
        let mut packer = Packer::default();
        let mut offsets = Vec::new();
        for lengths in calls {
            offsets.extend(packer.place(&mut io, &mut backing, lengths).unwrap());
            backing.publish(&mut io).unwrap();
        }
        let first = offsets[0].0 >> 9;
        let end = backing.image.file_length >> 9;
        let Backing { image, space, .. } = &mut backing;
        space.refcounts.load(&mut io, image, (first..end).map(HostCluster)).unwrap();
        let counts = (first..end).map(|cluster| space.refcounts.get(image, HostCluster(cluster)).unwrap()).collect();
        (offsets.iter().map(|offset| offset.0 - (first << 9)).collect(), counts)
    }

    #[test]
    fn streams_follow_each_other_and_count() {
        assert_eq!(placed(4, &[&[100, 400, 300, 300]]), (vec![0, 100, 500, 800], vec![3, 2, 1]));
        // The next ones go on in the same cluster, and reach into a new one.
        assert_eq!(placed(4, &[&[100, 400], &[300]]), (vec![0, 100, 500], vec![3, 1]));
        assert_eq!(placed(4, &[&[256, 256], &[256]]), (vec![0, 256, 512], vec![2, 1]));
    }

    #[test]
    fn a_refcount_of_one_bit_takes_one_stream_for_each_cluster() {
        assert_eq!(placed(0, &[&[100, 100], &[100]]), (vec![0, 512, 1024], vec![1, 1, 1]));
        // Of two bits, three; the fourth begins in the next cluster.
        assert_eq!(placed(1, &[&[10, 10, 10, 10, 510]]), (vec![0, 10, 20, 512, 522], vec![3, 2, 1]));
    }

    #[test]
    fn what_does_not_follow_begins_anew() {
        let (mut io, mut backing) = parts(4);
        let mut packer = Packer::default();
        let first = packer.place(&mut io, &mut backing, &[300]).unwrap()[0].0;
        backing.reserve(&mut io, 1).unwrap();
        assert_eq!(
            packer.place(&mut io, &mut backing, &[300, 200]).unwrap(),
            [first + 1024, first + 1324].map(HostOffset)
        );
        // The cluster that the last one stands in was given up.
        let tail = HostCluster(first / 512 + 2);
        backing.publish(&mut io).unwrap();
        backing.release(&mut io, vec![tail, tail]).unwrap();
        assert_eq!(packer.place(&mut io, &mut backing, &[5]).unwrap(), [HostOffset(first + 1536)]);
    }
}
