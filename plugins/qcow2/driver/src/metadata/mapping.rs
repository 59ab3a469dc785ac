//! The tables that map the guest's clusters, as slices that can be changed: the active L1 table and its L2 tables.

use crate::image::Image;
use crate::metadata::entries::decode_l1;
use crate::metadata::l2_entry::{decode_halves, verify_place, Mapped};
use crate::metadata::slice_cache::SliceCache;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{incompatible, GuestCluster, HostOffset, L2Entry};

/// Slices of the L1 table that stay held from one window to the next.
const L1_SLICES: usize = 512;

/// Slices of the mapping of one image.
pub struct Mapping {
    /// Slices of the L1 table.
    pub(crate) l1: SliceCache,
    /// Slices of L2 tables.
    pub(crate) l2: SliceCache,
}

/// Byte offset in the file of the L1 entry that maps a cluster, and its index.
pub(crate) fn l1_position(image: &Image, cluster: GuestCluster) -> (u64, u64) {
    let index = cluster.0 / image.header.l2_entries();
    (image.header.l1_table.0 + index * 8, index)
}

impl Mapping {
    /// The mapping of an image; nothing is read yet.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let size = image.slice_size();
        Self { l1: SliceCache::new(image.device, size), l2: SliceCache::new(image.device, size) }
    }

    /// Load the L1 entry of a cluster.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn load_l1(&mut self, io: &mut dyn BlockIo, image: &Image, cluster: GuestCluster) -> DriverResult<()> {
        let (at, _) = l1_position(image, cluster);
        if self.l1.slice_of(at) == at {
            self.l1.shrink(L1_SLICES);
        }
        self.l1.load(io, [at])
    }

    /// Load the L1 entries of these clusters, and the slices of the L2 tables that exist.
    ///
    /// # Errors
    /// Corruption of the L1 table; I/O errors.
    pub(crate) fn load(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        clusters: impl Iterator<Item = GuestCluster> + Clone,
    ) -> DriverResult<()> {
        self.l1.shrink(L1_SLICES);
        self.forget_l2();
        self.l1.load(io, clusters.clone().map(|cluster| l1_position(image, cluster).0))?;
        let mut offsets = Vec::new();
        for cluster in clusters {
            if let Some(at) = self.l2_position(image, cluster)? {
                let slice = self.l2.slice_of(at);
                if offsets.last() != Some(&slice) {
                    offsets.push(slice);
                }
            }
        }
        self.l2.load(io, offsets)
    }

    /// Make room: forget the L2 tables. Changes that a repair is about to make stay.
    pub(crate) fn forget_l2(&mut self) {
        self.l2.shrink(0);
    }

    /// The L2 table that maps a cluster, with its COPIED flag; its L1 entry was loaded.
    ///
    /// # Errors
    /// Corruption of the L1 entry.
    pub(crate) fn l2_table(&self, image: &Image, cluster: GuestCluster) -> DriverResult<Option<(HostOffset, bool)>> {
        let (at, index) = l1_position(image, cluster);
        if index >= u64::from(image.header.l1_entries) {
            // The table is about to grow.
            return Ok(None);
        }
        decode_l1(image, index, at, self.l1.entry(at)?)
    }

    /// Byte offset in the file of the L2 entry of a cluster, if there is a table; its L1 entry was loaded.
    ///
    /// # Errors
    /// Corruption of the L1 entry.
    pub(crate) fn l2_position(&self, image: &Image, cluster: GuestCluster) -> DriverResult<Option<u64>> {
        let in_table = cluster.0 % image.header.l2_entries() * image.header.l2_entry_bytes();
        Ok(self.l2_table(image, cluster)?.map(|(table, _)| table.0 + in_table))
    }

    /// The L2 entry of a cluster whose mapping was loaded.
    ///
    /// # Errors
    /// Corruption of its entries.
    pub(crate) fn l2_entry(&self, image: &Image, cluster: GuestCluster) -> DriverResult<Mapped> {
        let guest = cluster.0 << image.cluster_size().bits();
        let Some(at) = self.l2_position(image, cluster)? else {
            return Ok(Mapped { guest, at: 0, entry: L2Entry::Unallocated, subclusters: None });
        };
        let first = self.l2.entry(at)?;
        let second = if image.header.has(incompatible::EXTENDED_L2) { self.l2.entry(at + 8)? } else { 0 };
        let (entry, subclusters) = decode_halves(image, first, second)
            .map_err(|error| image.corrupt(at, format!("the L2 entry of guest offset {guest} {error}")))?;
        let mapped = Mapped { guest, at, entry, subclusters };
        verify_place(image, &mapped)?;
        Ok(mapped)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_qcow2_testkit::builder::{Spec, State};

    #[test]
    fn entries_are_those_of_the_file() {
        let (mut io, image) = open(&Spec::new(9, 300 << 9).with([(3, State::Data(1)), (200, State::Zero)]));
        let mut mapping = Mapping::new(&image);
        let clusters = [3, 4, 100, 200].map(GuestCluster);
        mapping.load(&mut io, &image, clusters.into_iter()).unwrap();
        let entries = clusters.map(|cluster| mapping.l2_entry(&image, cluster).unwrap());
        assert!(matches!(entries[0].entry, L2Entry::Data { copied: true, .. }));
        assert_eq!(entries[1].entry, L2Entry::Unallocated);
        assert_eq!((entries[2].entry, entries[2].at), (L2Entry::Unallocated, 0));
        assert_eq!(entries[3].entry, L2Entry::Zero { offset: None, copied: false });
        let table = mapping.l2_table(&image, clusters[0]).unwrap().unwrap().0;
        assert_eq!((entries[0].at, entries[1].at), (table.0 + 24, table.0 + 32));
        assert_eq!(mapping.l2_table(&image, clusters[2]).unwrap(), None);
    }

    #[test]
    fn a_table_that_is_about_to_grow_maps_nothing_past_its_end() {
        let (mut io, mut image) = open(&Spec::new(9, 300 << 9).with([(200, State::Data(1))]));
        let mut mapping = Mapping::new(&image);
        image.header.l1_entries = 2;
        mapping.load(&mut io, &image, core::iter::once(GuestCluster(200))).unwrap();
        assert_eq!(mapping.l2_entry(&image, GuestCluster(200)).unwrap().entry, L2Entry::Unallocated);
    }
}
