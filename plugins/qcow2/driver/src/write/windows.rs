//! Extents cut into pieces of clusters, in windows that bounded memory can hold.

use crate::image::overflow;
use crate::metadata::mapping::l1_position;
use crate::write::backing::Backing;
use crate::write::cluster_extent::ClusterExtent;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult, Extent};
use instar_qcow2_format::GuestCluster;

/// Clusters that are worked on between two sets of flushes, at most.
const WINDOW_CLUSTERS: usize = 1 << 16;
/// Slices of L2 tables that are held at once, at most.
const WINDOW_SLICES: usize = 2048;

/// Cuts extents at clusters, and hands them out in windows of whole clusters, in order.
///
/// Zeroes are left out where nothing is mapped that they would change: a short layer below a large overlay makes an extent
/// of them that reaches to the end of the disk, however little either file holds.
pub(crate) struct Windows<'a> {
    extents: core::slice::Iter<'a, Extent>,
    /// Whether zeroes matter where nothing is mapped.
    every_zero: bool,
    now: Option<Cut>,
    /// What was cut off and did not fit into the last window.
    pending: Option<ClusterExtent>,
    window: Vec<ClusterExtent>,
    clusters: usize,
    /// How many clusters a window has at most.
    most: usize,
    slices: usize,
    last: Option<GuestCluster>,
}

/// An extent that is being cut.
#[derive(Clone, Copy)]
struct Cut {
    extent: Extent,
    /// The first guest byte that was not cut off, and the one after the last.
    at: u64,
    end: u64,
    /// Up to here it is known that an L2 table maps the extent.
    mapped: u64,
}

impl<'a> Windows<'a> {
    /// The windows of these extents. Zeroes where no L2 table is read as zeroes in an image that has nothing below it;
    /// `bitmaps` says that it has bitmaps, which record them nevertheless.
    pub(crate) fn new(backing: &Backing, extents: &'a [Extent], bitmaps: bool) -> Self {
        Self {
            extents: extents.iter(),
            every_zero: backing.has_backing || bitmaps,
            now: None,
            pending: None,
            window: Vec::new(),
            clusters: 0,
            most: WINDOW_CLUSTERS,
            slices: 0,
            last: None,
        }
    }

    /// The same, of at most `clusters` clusters each, but at least one.
    pub(crate) fn of_at_most(self, clusters: u64) -> Self {
        let most = usize::try_from(clusters).unwrap_or(WINDOW_CLUSTERS).clamp(1, WINDOW_CLUSTERS);
        Self { most, ..self }
    }

    /// The next window; `None` after the last one.
    ///
    /// # Errors
    /// As [`Extent::end_within`], for extents past the end of the disk; corruption of the L1 table; I/O errors.
    pub(crate) fn next(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
    ) -> DriverResult<Option<&[ClusterExtent]>> {
        self.window.clear();
        (self.clusters, self.slices) = (0, 0);
        let per_slice = backing.image.slice_size() as u64 / backing.image.header.l2_entry_bytes();
        loop {
            let piece = match self.pending.take() {
                Some(piece) => piece,
                None => match self.cut(io, backing)? {
                    Some(piece) => piece,
                    None => break,
                },
            };
            if self.last != Some(piece.cluster) {
                let new_slice = self.last.is_none_or(|last| last.0 / per_slice != piece.cluster.0 / per_slice);
                if self.clusters == self.most || (new_slice && self.slices == WINDOW_SLICES) {
                    self.pending = Some(piece);
                    break;
                }
                self.slices += usize::from(new_slice || self.clusters == 0);
                self.clusters += 1;
                self.last = Some(piece.cluster);
            }
            self.window.push(piece);
        }
        Ok((!self.window.is_empty()).then_some(&self.window))
    }

    /// Cut off the next piece.
    fn cut(&mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<Option<ClusterExtent>> {
        let size = backing.image.cluster_size();
        loop {
            if self.now.is_none_or(|cut| cut.at >= cut.end) {
                let Some(extent) = self.extents.next() else { return Ok(None) };
                self.now = Some(begin(extent, backing)?);
            }
            let Some(cut) = self.now.as_mut().filter(|cut| cut.at < cut.end) else { continue };
            if cut.extent.is_zero() && cut.at >= cut.mapped {
                (cut.at, cut.mapped) =
                    if self.every_zero { (cut.at, cut.end) } else { next_mapped(io, backing, cut.at, cut.end)? };
                if cut.at >= cut.end {
                    continue;
                }
            }
            let cluster = GuestCluster(cut.at >> size.bits());
            let start = size.offset_in(cut.at);
            let length = (size.bytes() - start).min(cut.end - cut.at);
            let part = cut.extent.clip(cut.at..cut.at + length).ok_or_else(|| overflow("an extent"))?;
            cut.at += length;
            return Ok(Some(ClusterExtent { cluster, start, length, content: part.content }));
        }
    }
}

fn begin(extent: &Extent, backing: &Backing) -> DriverResult<Cut> {
    let end = extent.end_within(backing.image.header.virtual_size)?;
    Ok(Cut { extent: *extent, at: extent.guest_offset, end, mapped: extent.guest_offset })
}

/// Where, from guest offset `at` on, the first byte before `end` is that an L2 table maps (`end` if there is none), and
/// where the range of that table ends.
fn next_mapped(io: &mut dyn BlockIo, backing: &mut Backing, mut at: u64, end: u64) -> DriverResult<(u64, u64)> {
    let (image, mapping) = (&backing.image, &mut backing.mapping);
    let coverage = image.header.l2_coverage();
    while at < end {
        let next = (at / coverage + 1).saturating_mul(coverage);
        let cluster = GuestCluster(at >> image.cluster_size().bits());
        if l1_position(image, cluster).1 >= u64::from(image.header.l1_entries) {
            return Ok((end, end));
        }
        mapping.load_l1(io, image, cluster)?;
        if mapping.l2_table(image, cluster)?.is_some() {
            return Ok((at, next));
        }
        at = next.min(end);
    }
    Ok((end, end))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_guest_sdk::abi::ErrorCode;
    use instar_guest_sdk::memory::MemoryDevices;
    use instar_guest_sdk::Content;
    use instar_qcow2_testkit::builder::{Spec, State};

    /// The windows, each as guest offsets and lengths.
    fn cut(io: &mut MemoryDevices, backing: &mut Backing, extents: &[Extent], bitmaps: bool) -> Vec<Vec<(u64, u64)>> {
        let mut windows = Windows::new(backing, extents, bitmaps);
        let mut found = Vec::new();
        while let Some(window) = windows.next(io, backing).unwrap() {
            found.push(window.iter().map(|part| ((part.cluster.0 << 9) + part.start, part.length)).collect());
        }
        found
    }

    #[test]
    fn extents_are_cut_at_clusters() {
        let (mut io, image) = open(&Spec::new(9, 100 << 9));
        let mut backing = Backing::new(image, false);
        let extents = [Extent::data(100, 1000, 0, 1 << 20), Extent::data(1100, 436, 0, 1 << 20)];
        let found = cut(&mut io, &mut backing, &extents, false);
        assert_eq!(found, [[(100, 412), (512, 512), (1024, 76), (1100, 436)]]);
        let mut windows = Windows::new(&backing, &extents, false);
        let window = windows.next(&mut io, &mut backing).unwrap().unwrap();
        let places: Vec<Content> = window.iter().map(|part| part.content).collect();
        let data = |offset: u64| Content::Data { device: 0, offset: (1 << 20) + offset };
        assert_eq!(places, [data(0), data(412), data(924), data(0)]);
        let past = [Extent::data((100 << 9) - 1, 2, 0, 1 << 20)];
        let error = Windows::new(&backing, &past, false).next(&mut io, &mut backing).unwrap_err();
        assert_eq!(error.code, ErrorCode::BackingTooSmall);
    }

    #[test]
    fn zeroes_count_where_a_table_maps_anything() {
        // The second of five L2 tables is there: clusters 64 to 127.
        let (mut io, image) = open(&Spec::new(9, 300 << 9).with([(100, State::Data(1))]));
        let zeroes = [Extent::zero(0, 300 << 9)];
        for (has_backing, bitmaps, expected) in [(false, false, 64), (true, false, 300), (false, true, 300)] {
            let mut backing = Backing::new(image.clone(), has_backing);
            let found = cut(&mut io, &mut backing, &zeroes, bitmaps);
            assert_eq!(found.iter().map(Vec::len).sum::<usize>(), expected);
        }
        let mut backing = Backing::new(image, false);
        assert_eq!(cut(&mut io, &mut backing, &[Extent::zero(0, 64 << 9)], false), [[]; 0]);
    }

    #[test]
    fn a_window_has_no_more_tables_than_memory_holds() {
        let (mut io, image) = open(&Spec::new(9, 2500 * (64 << 9)));
        let mut backing = Backing::new(image, false);
        // Two pieces in one cluster of each table.
        let extents: Vec<Extent> = (0..2500)
            .flat_map(|table| [0, 100].map(|start| Extent::data(table * (64 << 9) + start, 100, 0, 1 << 20)))
            .collect();
        let found = cut(&mut io, &mut backing, &extents, false);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [2 * WINDOW_SLICES, 2 * (2500 - WINDOW_SLICES)]);
        let flat: Vec<(u64, u64)> = found.into_iter().flatten().collect();
        assert!(flat.iter().zip(&extents).all(|(&(at, length), extent)| (at, length) == (extent.guest_offset, 100)));
    }
}
