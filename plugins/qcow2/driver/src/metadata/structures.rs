//! All structures of an image: what each cluster of the file is used for.
//!
//! This is the only place that knows which structures there are, and what refers to each of them ("Host cluster
//! management" in the specification; QEMU has the same list in `Qcow2MetadataOverlap`, `block/qcow2.h`). Code that
//! checks, counts, maps or gives back clusters says which [`Kinds`] it wants, and takes one [`Reference`] after the
//! other.
//!
//! Tables are read from front to back, in batches, holes in them are passed over, and nothing is held but the snapshot
//! table and the bitmap directory. What L2 entries refer to is a walk of its own, [`L2Tables`](super::l2_tables::Tables):
//! tables may be shared, and each is read once.

use crate::image::Image;
use crate::metadata::bitmap_directory::{BitmapDirectory, DirectoryPlace};
use crate::metadata::entries::{scan_bitmap_table, scan_l1_at, scan_refcount_table};
use crate::metadata::reference::{Reference, Structure};
use crate::metadata::snapshot_table::SnapshotTable;
use core::ops::BitOr;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostOffset;

/// Which structures are visited. They come in the order of this list, whatever the order of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kinds(u8);

impl Kinds {
    /// Header, refcount table and L1 table.
    pub(crate) const HEADER: Self = Self(1);
    /// Snapshot table and the snapshots' L1 tables.
    pub(crate) const SNAPSHOTS: Self = Self(1 << 1);
    /// Refcount blocks.
    pub(crate) const REFCOUNT_BLOCKS: Self = Self(1 << 2);
    /// The bitmap directory and the bitmaps' tables.
    pub(crate) const BITMAP_TABLES: Self = Self(1 << 3);
    /// The bitmaps' data.
    pub(crate) const BITMAP_DATA: Self = Self(1 << 4);
    /// L2 tables of the active state that map a part of the virtual disk.
    pub(crate) const MAPPED_L2: Self = Self(1 << 5);
    /// All L2 tables of the active state, also those past the end of the disk.
    pub(crate) const ACTIVE_L2: Self = Self(1 << 6);
    /// The snapshots' L2 tables, each as often as L1 entries refer to it.
    pub(crate) const INACTIVE_L2: Self = Self(1 << 7);

    const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Kinds {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What takes one reference after the other.
pub(crate) type EachReference<'a> = &'a mut dyn FnMut(Reference) -> DriverResult<()>;

/// What the header refers to: itself, refcount table, L1 table. Reads nothing.
pub(crate) fn header_structures(image: &Image) -> impl Iterator<Item = Reference> {
    let header = &image.header;
    let all = [
        (Structure::Header, HostOffset(0), 1, 0),
        (Structure::RefcountTable, header.refcount_table, header.refcount_table_bytes(), 48),
        (Structure::ActiveL1, header.l1_table, header.l1_bytes(), 40),
    ];
    let all = all.map(|(structure, offset, bytes, at)| Reference::one(image, structure, offset, bytes, at));
    all.into_iter().filter(|reference| reference.run.count != 0)
}

/// The structures of one image.
pub(crate) struct Structures<'a> {
    image: &'a Image,
    /// What was read so far: neither is, until it is asked for.
    snapshots: Option<SnapshotTable>,
    bitmaps: Option<BitmapDirectory>,
}

impl<'a> Structures<'a> {
    /// The structures of this image; nothing is read yet.
    pub(crate) fn new(image: &'a Image) -> Self {
        Self { image, snapshots: None, bitmaps: None }
    }

    /// The same, of an image whose bitmap directory was read.
    pub(crate) fn with_bitmaps(image: &'a Image, bitmaps: BitmapDirectory) -> Self {
        Self { image, snapshots: None, bitmaps: Some(bitmaps) }
    }

    /// The image.
    pub(crate) fn image(&self) -> &'a Image {
        self.image
    }

    /// The snapshot table, which is read once.
    ///
    /// # Errors
    /// As [`SnapshotTable::read`].
    pub(crate) fn snapshots(&mut self, io: &mut dyn BlockIo) -> DriverResult<&SnapshotTable> {
        let read = match self.snapshots.take() {
            Some(read) => read,
            None => SnapshotTable::read(io, self.image)?,
        };
        Ok(self.snapshots.insert(read))
    }

    /// The bitmap directory, which is read once.
    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<&BitmapDirectory> {
        let read = match self.bitmaps.take() {
            Some(read) => read,
            None => BitmapDirectory::read(io, self.image, &mut |_| Ok(()))?,
        };
        Ok(self.bitmaps.insert(read))
    }

    /// Call `each` with every structure of these kinds, and what refers to it. All lie in the file.
    ///
    /// # Errors
    /// Corruption of a table that is read; I/O errors; what `each` returns.
    pub(crate) fn visit(&mut self, io: &mut dyn BlockIo, kinds: Kinds, each: EachReference<'_>) -> DriverResult<()> {
        let image = self.image;
        if kinds.has(Kinds::HEADER) {
            header_structures(image).try_for_each(&mut *each)?;
        }
        if kinds.has(Kinds::SNAPSHOTS) {
            self.snapshots(io)?.structures(image).try_for_each(&mut *each)?;
        }
        if kinds.has(Kinds::REFCOUNT_BLOCKS) {
            scan_refcount_table(io, image, &mut |index, at, block| {
                each(Reference::one(image, Structure::RefcountBlock(index), block, 1, at))
            })?;
        }
        if kinds.has(Kinds::BITMAP_TABLES | Kinds::BITMAP_DATA) {
            self.bitmaps(io)?;
            self.visit_bitmaps(io, kinds, each)?;
        }
        let (l1, entries) = (image.header.l1_table, u64::from(image.header.l1_entries));
        if kinds.has(Kinds::MAPPED_L2 | Kinds::ACTIVE_L2) {
            let entries = if kinds.has(Kinds::ACTIVE_L2) { entries } else { image.used_l1_entries() };
            scan_l1_at(io, image, l1, entries, &mut |index, at, table| {
                each(Reference::one(image, Structure::ActiveL2(index), table, 1, at))
            })?;
        }
        if kinds.has(Kinds::INACTIVE_L2) {
            for (number, snapshot) in self.snapshots(io)?.entries.iter().enumerate() {
                let entries = u64::from(snapshot.l1_entries);
                scan_l1_at(io, image, snapshot.l1_table, entries, &mut |_, at, table| {
                    each(Reference::one(image, Structure::InactiveL2(number), table, 1, at))
                })?;
            }
        }
        Ok(())
    }

    fn visit_bitmaps(&self, io: &mut dyn BlockIo, kinds: Kinds, each: EachReference<'_>) -> DriverResult<()> {
        let image = self.image;
        let Some(directory) = &self.bitmaps else { return Ok(()) };
        if let Some(place) = directory.place.filter(|_| kinds.has(Kinds::BITMAP_TABLES)) {
            let DirectoryPlace { offset, bytes, named_at } = place;
            each(Reference::one(image, Structure::BitmapDirectory, offset, bytes, named_at))?;
        }
        for (number, entry) in directory.entries.iter().enumerate() {
            if kinds.has(Kinds::BITMAP_TABLES) {
                let (table, bytes) = (entry.bitmap.table, entry.bitmap.table_bytes());
                each(Reference::one(image, Structure::BitmapTable(number), table, bytes, entry.at))?;
            }
            if kinds.has(Kinds::BITMAP_DATA) {
                self.visit_bitmap_data(io, number, each)?;
            }
        }
        Ok(())
    }

    /// Call `each` with the clusters that have the bits of one bitmap, of an image whose bitmap directory was read. What
    /// refers to them is, to the reader of a message, the directory's entry.
    ///
    /// # Errors
    /// As [`Structures::visit`].
    pub(crate) fn visit_bitmap_data(
        &self,
        io: &mut dyn BlockIo,
        number: usize,
        each: EachReference<'_>,
    ) -> DriverResult<()> {
        let image = self.image;
        let entry = self.bitmaps.as_ref().and_then(|directory| directory.entries.get(number));
        let Some(entry) = entry else { return Ok(()) };
        let entries = u64::from(entry.bitmap.table_entries);
        scan_bitmap_table(io, image, entry.bitmap.table, entries, &mut |data| {
            each(Reference::one(image, Structure::BitmapData(number), data, 1, entry.at))
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::metadata::l2_tables::L2Tables;
    use crate::refcount::blocks::Refcounts;
    use crate::testing::open;
    use alloc::collections::BTreeMap;
    use alloc::vec;
    use instar_guest_sdk::abi::DEVICE_OUTPUT;
    use instar_qcow2_format::HostCluster;
    use instar_qcow2_testkit::bitmaps::{BitmapSpec, Bits, AUTO};
    use instar_qcow2_testkit::builder::{Spec, State};

    /// Snapshots that share everything, bitmaps, and clusters of every kind.
    fn spec(bits: u32) -> Spec {
        let bitmaps =
            vec![BitmapSpec::new(AUTO, 9, &[Bits::Bytes(0x81), Bits::None]), BitmapSpec::new(0, 9, &[Bits::All])];
        let states = [(0, State::Data(1)), (1, State::Zero), (2, State::ZeroAllocated(3)), (70, State::Data(4))];
        let compressed = [(7, State::Deflated(5)), (8, State::Deflated(6))];
        let spec = Spec { snapshots: 2, bitmaps, autoclear: 1, ..Spec::new(bits, 96 << bits) };
        spec.with(states).with(compressed)
    }

    #[test]
    fn every_cluster_is_referred_to_as_often_as_its_refcount_says() {
        for bits in [9, 12] {
            let (mut io, image) = open(&spec(bits));
            let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
            let mut add = |reference: Reference| {
                reference.run.clusters().for_each(|c| *counts.entry(c.0).or_default() += u64::from(reference.times));
                Ok(())
            };
            let mut structures = Structures::new(&image);
            let bitmaps = Kinds::BITMAP_TABLES | Kinds::BITMAP_DATA;
            let tables = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
            let all = Kinds::HEADER | Kinds::SNAPSHOTS | Kinds::REFCOUNT_BLOCKS | bitmaps | tables;
            structures.visit(&mut io, all, &mut add).unwrap();
            let l2_tables = L2Tables::read(&mut io, &mut structures).unwrap();
            l2_tables.each_entry(&mut io, &image, &mut add).unwrap();
            let clusters = 0..image.file_length >> bits;
            let mut refcounts = Refcounts::new(&image);
            refcounts.load(&mut io, &image, clusters.clone().map(HostCluster)).unwrap();
            for cluster in clusters {
                let refcount = refcounts.get(&image, HostCluster(cluster)).unwrap();
                assert_eq!(counts.get(&cluster).copied().unwrap_or(0), refcount, "cluster {cluster} of 2^{bits} bytes");
            }
        }
    }

    #[test]
    fn what_refers_to_a_structure_says_where_it_is() {
        let (mut io, image) = open(&spec(9));
        let file = io.files[&DEVICE_OUTPUT].clone();
        let mut structures = Structures::new(&image);
        let kinds = Kinds::HEADER | Kinds::SNAPSHOTS | Kinds::REFCOUNT_BLOCKS | Kinds::BITMAP_TABLES;
        let mut seen = 0;
        structures
            .visit(&mut io, kinds | Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2, &mut |reference| {
                let at = usize::try_from(reference.at).unwrap();
                let raw = u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
                match reference.structure {
                    Structure::Header => assert_eq!(reference.offset, HostOffset(0)),
                    // The extension's data has its number and length in front.
                    Structure::BitmapDirectory => {
                        assert!(file[at..at + 40].windows(8).any(|bytes| bytes == reference.offset.0.to_be_bytes()))
                    }
                    structure => assert_eq!(raw & !(1 << 63), reference.offset.0, "{structure}"),
                }
                seen += 1;
                Ok(())
            })
            .unwrap();
        // Header, refcount table, L1; snapshot table and two L1; a block; directory and two tables; two L2 of three states.
        assert_eq!(seen, 3 + 3 + 1 + 3 + 3 * 2);
    }

    #[test]
    fn tables_past_the_end_of_the_disk_are_told_from_those_that_map_it() {
        let (mut io, mut image) = open(&Spec::new(9, 96 << 9).with([(0, State::Data(1)), (70, State::Data(4))]));
        image.header.virtual_size = 64 << 9;
        let mut count = |kinds| {
            let mut found = 0;
            let each = &mut |_| {
                found += 1;
                Ok(())
            };
            Structures::new(&image).visit(&mut io, kinds, each).unwrap();
            found
        };
        assert_eq!((count(Kinds::MAPPED_L2), count(Kinds::ACTIVE_L2)), (1, 2));
    }
}
