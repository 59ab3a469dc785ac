//! The persistent bitmaps of a backing that grows: their tables get entries for the new part of the disk.
//!
//! QEMU opens no image in which the table of a bitmap is longer or shorter than disk and granularity call for, and tables
//! and virtual size cannot change at one stroke. So a bitmap whose table changes says meanwhile that it was not saved
//! (`in_use`), as all do while QEMU has an image open. The order, with the crash that each step survives:
//!
//! 1. A longer copy of each table, in new clusters, in the order of [`window`](crate::write::window), *then a flush*. A crash
//!    leaves leaks.
//! 2. The directory gets the offsets of the new tables (8 bytes within one sector each), which begin as the old ones, and
//!    the `in_use` flags, *then a flush*. A crash within it leaves tables that are as good as the old ones, and leaks; from
//!    here on, bitmaps that say of themselves that they are not to be used: a backup that goes by them has to be a full
//!    one, as after a crash of QEMU.
//! 3. The lengths of the tables (4 bytes within one sector each), *then a flush*. The new clusters are there.
//! 4. The image grows: see [`grow`](crate::grow).
//! 5. The `in_use` flags go, *then a flush*. Tables and disk agree, durably.
//! 6. The clusters of the old tables are freed. A crash leaves leaks.
//!
//! One that was not saved before stays as it is: its length means nothing. Stale ones (no autoclear bit) stay, too.

use crate::grow::planned::BitmapGrowth;
use crate::image::overflow;
use crate::metadata::bitmap_directory::BitmapDirectory;
use crate::write::sink::Qcow2Sink;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{HostCluster, BITMAP_FLAGS_FIELD, BITMAP_TABLE_SIZE_FIELD};

impl Qcow2Sink {
    /// Which bitmaps need a longer table for a disk of `size` bytes.
    pub(crate) fn plan_bitmap_growth(&mut self, io: &mut dyn BlockIo, size: u64) -> DriverResult<Vec<BitmapGrowth>> {
        let mut growing = Vec::new();
        let (image, recorded) = (&self.image, &mut self.bitmaps.recorded);
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
                if let Some(recorded) = number.and_then(|number| recorded.get_mut(number)) {
                    recorded.entries = u64::from(entries);
                }
            }
        }
        Ok(growing)
    }

    /// Clusters that the new tables take.
    pub(crate) fn bitmap_table_clusters(&self, growing: &[BitmapGrowth]) -> u64 {
        let size = self.image.cluster_size();
        growing.iter().map(|growth| size.count_for(u64::from(growth.entries) * 8)).sum()
    }

    /// Steps 1 to 3.
    pub(crate) fn lengthen_bitmap_tables(
        &mut self,
        io: &mut dyn BlockIo,
        growing: &[BitmapGrowth],
    ) -> DriverResult<()> {
        if growing.is_empty() {
            return Ok(());
        }
        let size = self.image.cluster_size();
        let device = self.image.device;
        let count = self.bitmap_table_clusters(growing);
        let first = self.reserve_run(io, count)?;
        let mut requests = Vec::with_capacity(growing.len());
        let (mut offsets, mut lengths) = (Vec::new(), Vec::new());
        let mut next = first.0;
        for growth in growing {
            let table = size.host_offset(HostCluster(next)).ok_or_else(|| overflow("a host offset"))?;
            next += size.count_for(u64::from(growth.entries) * 8);
            requests.push(Request::copy(device, growth.old.table.0, device, table.0, growth.old.table_bytes()));
            offsets.push((growth.at, table.0.to_be_bytes().to_vec()));
            offsets.push((growth.at + BITMAP_FLAGS_FIELD, growth.old.flags(true).to_be_bytes().to_vec()));
            lengths.push((growth.at + BITMAP_TABLE_SIZE_FIELD, growth.entries.to_be_bytes().to_vec()));
            // From now on its bits go by the new table.
            if let Some(recorded) = growth.recorded.and_then(|number| self.bitmaps.recorded.get_mut(number)) {
                (recorded.table, recorded.held) = (table, recorded.entries);
            }
        }
        self.bitmaps.tables.clear();
        self.out.run(io, &mut requests)?;
        self.publish(io)?;
        self.space.referenced();
        self.write_fields(io, &offsets)?;
        self.write_fields(io, &lengths)
    }

    /// Steps 5 and 6.
    pub(crate) fn release_bitmap_tables(&mut self, io: &mut dyn BlockIo, growing: &[BitmapGrowth]) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let flags =
            |growth: &BitmapGrowth| (growth.at + BITMAP_FLAGS_FIELD, growth.old.flags(false).to_be_bytes().to_vec());
        self.write_fields(io, &growing.iter().map(flags).collect::<Vec<_>>())?;
        let clusters = growing.iter().flat_map(|growth| {
            let first = size.host_cluster(growth.old.table).0;
            (first..first + size.count_for(growth.old.table_bytes())).map(HostCluster)
        });
        self.free(io, clusters.collect())
    }

    /// Write small fields (byte offset, bytes), durably.
    fn write_fields(&self, io: &mut dyn BlockIo, fields: &[(u64, Vec<u8>)]) -> DriverResult<()> {
        if fields.is_empty() {
            return Ok(());
        }
        let device = self.image.device;
        let mut requests: Vec<Request> = fields
            .iter()
            .map(|(at, bytes)| Request::write(device, *at, bytes.as_ptr() as u64, bytes.len() as u64))
            .collect();
        requests.push(Request::flush(device));
        io.run(&mut requests)
    }
}
