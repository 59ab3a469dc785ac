//! The persistent bitmaps of a backing that grows: their tables get entries for the new part of the disk.
//!
//! QEMU opens no image in which the table of a bitmap is longer or shorter than disk and granularity call for, and tables
//! and virtual size cannot change at one stroke. So a bitmap whose table changes says meanwhile that it was not saved
//! (`in_use`), as all do while QEMU has an image open. The order, with the crash that each step survives:
//!
//! 1. A longer copy of each table, in new clusters, in the order of [`window`](crate::write::window), *then a flush*. A
//!    crash leaves leaks.
//! 2. The directory gets the offsets of the new tables (8 bytes within one sector each), which begin as the old ones, and
//!    the `in_use` flags, *then a flush*. A crash within it leaves tables that are as good as the old ones, and leaks;
//!    from here on, bitmaps that say of themselves that they are not to be used: a backup that goes by them has to be a
//!    full one, as after a crash of QEMU.
//! 3. The lengths of the tables (4 bytes within one sector each), *then a flush*. The new clusters are there.
//! 4. The image grows: see [`grow`](crate::grow).
//! 5. The `in_use` flags go, *then a flush*. Tables and disk agree, durably.
//! 6. The clusters of the old tables are freed. A crash leaves leaks.
//!
//! One that was not saved before stays as it is: its length means nothing. Stale ones (no autoclear bit) stay, too.

use crate::image::Image;
use crate::metadata::bitmap_directory::BitmapDirectory;
use crate::metadata::cluster_run::ClusterRun;
use crate::write::backing::Backing;
use crate::write::enabled_bitmaps::EnabledBitmaps;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{Bitmap, ClusterSize, HostCluster, BITMAP_FLAGS_FIELD, BITMAP_TABLE_SIZE_FIELD};

/// A bitmap whose table becomes longer.
#[derive(Clone, Copy, Debug)]
struct BitmapGrowth {
    /// Where its directory entry begins, in bytes.
    at: u64,
    /// The entry as it was.
    old: Bitmap,
    /// Entries of the new table.
    entries: u32,
    /// Which of the bitmaps that are kept up it is, if it is one.
    recorded: Option<usize>,
}

/// The bitmaps whose tables become longer.
#[derive(Debug, Default)]
pub(crate) struct BitmapTables {
    growing: Vec<BitmapGrowth>,
}

impl BitmapTables {
    /// Which bitmaps need a longer table for a disk of `size` bytes. Those that are kept up count as having it.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for a bitmap that would be too long; corruption; I/O errors.
    pub(crate) fn plan(
        io: &mut dyn BlockIo,
        image: &Image,
        recorded: &mut EnabledBitmaps,
        size: u64,
    ) -> DriverResult<Self> {
        let mut growing = Vec::new();
        let mut kept_up = 0..;
        for entry in BitmapDirectory::read(io, image, &mut |_| Ok(()))?.entries {
            let (at, old) = (entry.at, entry.bitmap);
            let number = if old.is_recording() { kept_up.next() } else { None };
            if old.in_use {
                continue;
            }
            let entries = old.entries_for(size, image.cluster_size()).ok_or_else(|| {
                let text = format!("the image cannot grow to {size} bytes: {}would be too long", entry.what());
                DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, at)
            })?;
            if entries > old.table_entries {
                growing.push(BitmapGrowth { at, old, entries, recorded: number });
                if let Some(recorded) = number.and_then(|number| recorded.recorded.get_mut(number)) {
                    recorded.entries = u64::from(entries);
                }
            }
        }
        Ok(Self { growing })
    }

    /// Clusters that the new tables take.
    pub(crate) fn clusters(&self, size: ClusterSize) -> u64 {
        self.growing.iter().map(|growth| size.count_for(u64::from(growth.entries) * 8)).sum()
    }

    /// Steps 1 to 3.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn lengthen(
        &self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        recorded: &mut EnabledBitmaps,
    ) -> DriverResult<()> {
        if self.growing.is_empty() {
            return Ok(());
        }
        let size = backing.image.cluster_size();
        let device = backing.image.device;
        let first = backing.reserve_run(io, self.clusters(size))?;
        let mut requests = Vec::with_capacity(self.growing.len());
        let (mut offsets, mut lengths) = (Vec::new(), Vec::new());
        let mut next = first.0;
        for growth in &self.growing {
            let table = backing.image.host_offset(HostCluster(next))?;
            next += size.count_for(u64::from(growth.entries) * 8);
            requests.push(Request::copy(device, growth.old.table.0, device, table.0, growth.old.table_bytes()));
            offsets.push((growth.at, table.0.to_be_bytes().to_vec()));
            offsets.push((growth.at + BITMAP_FLAGS_FIELD, growth.old.flags(true).to_be_bytes().to_vec()));
            lengths.push((growth.at + BITMAP_TABLE_SIZE_FIELD, growth.entries.to_be_bytes().to_vec()));
            // From now on its bits go by the new table.
            if let Some(recorded) = growth.recorded.and_then(|number| recorded.recorded.get_mut(number)) {
                (recorded.table, recorded.held) = (table, recorded.entries);
            }
        }
        recorded.tables.clear();
        backing.out.run(io, &mut requests)?;
        backing.publish(io)?;
        backing.space.referenced();
        write_fields(io, device, &offsets)?;
        write_fields(io, device, &lengths)
    }

    /// Steps 5 and 6.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn release_old(&self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        let size = backing.image.cluster_size();
        let flags =
            |growth: &BitmapGrowth| (growth.at + BITMAP_FLAGS_FIELD, growth.old.flags(false).to_be_bytes().to_vec());
        write_fields(io, backing.image.device, &self.growing.iter().map(flags).collect::<Vec<_>>())?;
        let old = |growth: &BitmapGrowth| ClusterRun::of(size, growth.old.table, growth.old.table_bytes());
        let clusters = self.growing.iter().flat_map(|growth| old(growth).clusters()).collect();
        backing.release(io, clusters)
    }
}

/// Write small fields (byte offset, bytes), durably.
fn write_fields(io: &mut dyn BlockIo, device: u32, fields: &[(u64, Vec<u8>)]) -> DriverResult<()> {
    if fields.is_empty() {
        return Ok(());
    }
    let mut requests: Vec<Request> = fields
        .iter()
        .map(|(at, bytes)| Request::write(device, *at, bytes.as_ptr() as u64, bytes.len() as u64))
        .collect();
    requests.push(Request::flush(device));
    io.run(&mut requests)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use alloc::vec;
    use instar_guest_sdk::abi::DEVICE_OUTPUT;
    use instar_qcow2_testkit::bitmaps::{BitmapSpec, Bits, AUTO, IN_USE};
    use instar_qcow2_testkit::builder::Spec;

    #[test]
    fn tables_that_are_too_short_become_longer() {
        // A cluster of 512 bytes has bits for 4,096 granules of 512 bytes: 2 MiB of the disk.
        let bitmap = |flags, granularity| BitmapSpec::new(flags, granularity, &[Bits::Bytes(0x81)]);
        let bitmaps = vec![bitmap(AUTO, 9), bitmap(AUTO | IN_USE, 9), bitmap(0, 9), bitmap(AUTO, 12)];
        let (mut io, image) = open(&Spec { bitmaps, autoclear: 1, ..Spec::new(9, 1 << 20) });
        let mut backing = Backing::new(image, false);
        let (mut recorded, _) = EnabledBitmaps::load(&mut io, &backing.image, &mut backing.space.refcounts).unwrap();
        let tables = BitmapTables::plan(&mut io, &backing.image, &mut recorded, 5 << 20).unwrap();
        // Not the one that was not saved, nor the coarse one.
        let planned: Vec<_> = tables.growing.iter().map(|growth| (growth.entries, growth.recorded)).collect();
        assert_eq!(planned, [(3, Some(0)), (3, None)]);
        assert_eq!(tables.clusters(backing.image.cluster_size()), 2);
        let kept: Vec<_> = recorded.recorded.iter().map(|bitmap| (bitmap.entries, bitmap.held)).collect();
        assert_eq!(kept, [(3, 1), (1, 1)]);
        assert!(io.log.is_empty());
        tables.lengthen(&mut io, &mut backing, &mut recorded).unwrap();
        let directory = BitmapDirectory::read(&mut io, &backing.image, &mut |_| Ok(())).unwrap().entries;
        let now: Vec<_> = directory.iter().map(|entry| (entry.bitmap.table_entries, entry.bitmap.in_use)).collect();
        assert_eq!(now, [(3, true), (1, true), (3, true), (1, false)]);
        // The new table begins as the old one, and its new entries are zero.
        let word = |at: u64| {
            let at = usize::try_from(at).unwrap();
            u64::from_be_bytes(io.files[&DEVICE_OUTPUT][at..at + 8].try_into().unwrap())
        };
        let (old, new) = (tables.growing[0].old.table.0, directory[0].bitmap.table.0);
        assert_ne!(old, new);
        assert_eq!([word(new), word(new + 8), word(new + 16)], [word(old), 0, 0]);
        assert_eq!((recorded.recorded[0].table.0, recorded.recorded[0].held), (new, 3));
        tables.release_old(&mut io, &mut backing).unwrap();
        let directory = BitmapDirectory::read(&mut io, &backing.image, &mut |_| Ok(())).unwrap().entries;
        let now: Vec<_> = directory.iter().map(|entry| entry.bitmap.in_use).collect();
        assert_eq!(now, [false, true, false, false]);
    }
}
