//! Growing an image: more entries behind the BAT, and then the sizes in the header.
//!
//! The data begins right behind the BAT, so that there is room for a longer one only if some of the first clusters go.
//!
//! The order, and what a crash leaves:
//! 1. what the last cluster holds past the old end of the disk becomes zeroes. This is past the end;
//! 2. the clusters in the way are copied behind all others; a *flush*; then their entries, each of which names the old place or
//!    the new one, and both hold the same until the next flush;
//! 3. *flush*; then the new entries, all 0, where nothing lies any more;
//! 4. *flush*; then the number of entries, the size of the disk and the start of the data, in one write within the first sector:
//!    the disk is the old one or the new one. The flush is that of whatever comes next: new clusters are durable before the
//!    first entry names them.

use crate::image::Image;
use crate::mark::write_header;
use crate::survey::{each_entry, Survey};
use crate::write::Writer;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::table::ClusterParts;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, ReadBelow};
use instar_parallels_format::{Header, Variant, MOST_ENTRIES, SECTOR};

/// Clusters that are moved at most: their list takes 1 MiB.
const MOST_MOVED: usize = 1 << 16;

/// How an image is to grow.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// Bytes of the disk.
    pub size: u64,
    /// The header as it will be.
    header: Header,
    /// Clusters that are in the way of a longer BAT.
    moved: u64,
}

fn unsupported(image: &Image, text: impl Into<alloc::string::String>) -> DriverError {
    DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0)
}

/// The clusters of the disk that lie in front of byte `start` of the file, each with its place.
fn in_front(io: &mut dyn BlockIo, image: &Image, start: u64) -> DriverResult<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    if start > image.header.floor() {
        each_entry(io, image, &mut |cluster, entry| {
            let offset = image.header.offset(entry);
            if offset < start && found.len() == MOST_MOVED {
                let text =
                    format!("more than {MOST_MOVED} clusters are in the way of the longer BAT: grow in smaller steps");
                return Err(unsupported(image, text));
            }
            if offset < start {
                found.push((cluster, offset));
            }
            Ok(())
        })?;
    }
    Ok(found)
}

impl Growth {
    /// Verify that the disk can become `size` bytes long.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot; I/O errors.
    pub fn plan(
        io: &mut dyn BlockIo,
        image: &Image,
        size: u64,
        below_length: u64,
        survey: &Survey,
    ) -> DriverResult<Self> {
        let header = image.header;
        if below_length > header.virtual_size() {
            let text =
                "the image cannot grow: what lies below it is longer, and the format has no zeroes to hide that with";
            return Err(unsupported(image, text));
        }
        if survey.beyond > 0 {
            let text = format!("the image cannot grow: it holds {} clusters past the end of the disk", survey.beyond);
            return Err(unsupported(image, text));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(unsupported(image, format!("the new size of {size} bytes is no multiple of 512")));
        }
        if header.variant == Variant::Sectors && size / SECTOR > u32::MAX.into() {
            let text = format!("the older header cannot say that a disk has {size} bytes: 4 bytes count its sectors");
            return Err(unsupported(image, text));
        }
        let too_large = || unsupported(image, format!("the BAT cannot map a disk of {size} bytes"));
        let needed = size.div_ceil(header.cluster_bytes());
        let entries = u32::try_from(needed).ok().filter(|&entries| entries <= MOST_ENTRIES).ok_or_else(too_large)?;
        let entries = entries.max(header.entries);
        let (base, end) = (header.data_start(), Header::entry_place(entries.into()));
        let whole = end.saturating_sub(base).checked_next_multiple_of(header.cluster_bytes());
        let start = whole.and_then(|whole| base.checked_add(whole)).ok_or_else(too_large)?;
        let mut grown = Header { entries, sectors: size / SECTOR, ..header };
        if start > base || entries > header.entries {
            grown.data_off = u32::try_from(start / SECTOR).map_err(|_| too_large())?;
        }
        let moved = in_front(io, image, start)?.len() as u64;
        Ok(Self { size, header: grown, moved })
    }

    /// Clusters that are new besides those that arrive.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    /// Where clusters begin in the file then.
    pub fn start(&self) -> u64 {
        self.header.data_start()
    }

    /// Grow. Nothing of what arrives was written yet.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn apply(&self, io: &mut dyn BlockIo, writer: &mut Writer, below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.cut_last_cluster(io, writer, below)?;
        writer.slots.skip_to(self.start());
        for (cluster, from) in in_front(io, &writer.image, self.start())? {
            let to = writer.new_cluster(io)?;
            writer.copy_cluster(io, from, to)?;
            writer.set_place(io, cluster, to)?;
            if writer.is_full() {
                writer.step(io)?;
            }
        }
        writer.step(io)?;
        writer.out.barrier(io)?;
        let Header { entries, sectors, data_off, .. } = self.header;
        let (from, to) = (writer.image.header.bat_end(), self.header.bat_end());
        if to > from {
            writer.lengthen(io)?;
            writer.out.zero(io, from, to - from)?;
            writer.out.barrier(io)?;
        }
        let header = &mut writer.image.header;
        (header.entries, header.sectors, header.data_off) = (entries, sectors, data_off);
        write_header(io, &writer.image, &mut writer.out)?;
        writer.forget();
        Ok(())
    }

    /// Have the last cluster read as zeroes past the old end of the disk. If the image does not hold it, what is below does:
    /// that is no longer than the disk was.
    fn cut_last_cluster(
        &self,
        io: &mut dyn BlockIo,
        writer: &mut Writer,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (size, cluster) = (writer.image.header.virtual_size(), writer.image.header.cluster_bytes());
        let end = size.checked_next_multiple_of(cluster).ok_or_else(|| overflow("the end of the disk"))?;
        let last = size / cluster;
        if end > size && writer.place(io, last)?.is_some() {
            // All of the cluster, although the disk may end within it again.
            let disk = writer.image.disk(end);
            let parts = vec![Extent::zero(size, end - size)];
            writer.write_cluster(io, disk, &ClusterParts { cluster: last, parts }, below)?;
        }
        writer.step(io)
    }
}
