//! Growing an image: a longer L1 table, and then the size in the header.
//!
//! The order, and what a crash leaves:
//! 1. what the last cluster holds past the old end becomes zeroes, and its entries follow as [for any other
//!    write](crate::write). This is past the end of the disk;
//! 2. where the L1 table has too few entries, a longer copy of it behind everything that is used, which nothing refers to;
//! 3. *flush*; then the size and the place of the L1 table, in one write within the first sector: the disk is the old one or
//!    the new one. The old table is lost space from then on. The flush is that of whatever comes next: new clusters are
//!    flushed before the first entry of either table points to them.

use crate::image::Image;
use crate::write::{l1_bytes, Writer};
use alloc::format;
use alloc::vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::table::ClusterParts;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, ReadBelow};
use instar_qcow_format::{field, Entry, Header, MOST_L1_ENTRIES};

/// How an image is to grow.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the L1 table, if a longer one is needed.
    pub l1_bytes: Option<u64>,
}

fn unsupported(image: &Image, text: impl Into<alloc::string::String>) -> DriverError {
    DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0)
}

impl Growth {
    /// Verify that the disk can become `size` bytes long; `beyond` entries of the tables are for clusters behind its end.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot.
    pub fn plan(image: &Image, size: u64, below_length: u64, beyond: u64) -> DriverResult<Self> {
        let header = &image.header;
        if below_length > header.virtual_size() {
            let text =
                "the image cannot grow: what lies below it is longer, and the format has no zeroes to hide that with";
            return Err(unsupported(image, text));
        }
        if beyond > 0 {
            let text = format!("the image cannot grow: it holds {beyond} clusters past the end of the disk");
            return Err(unsupported(image, text));
        }
        if !size.is_multiple_of(512) {
            return Err(unsupported(image, format!("the new size of {size} bytes is no multiple of 512")));
        }
        let entries = size.div_ceil(header.coverage());
        if entries > MOST_L1_ENTRIES {
            return Err(unsupported(image, format!("the L1 table cannot map a disk of {size} bytes")));
        }
        Ok(Self { size, l1_bytes: (entries > header.l1_entries()).then(|| l1_bytes(entries)) })
    }

    /// Bytes that the file becomes longer by at most, besides what arrives: the table, the last cluster if it is compressed,
    /// and up to a cluster behind each of them.
    pub fn bytes(&self, image: &Image) -> u64 {
        let size = image.header.cluster_size();
        self.l1_bytes.map_or(0, |length| length.next_multiple_of(size)).saturating_add(size)
    }

    /// Grow. Nothing of what arrives was written yet.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn apply(&self, io: &mut dyn BlockIo, writer: &mut Writer, below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.cut_last_cluster(io, writer, below)?;
        let Header { l1_offset, .. } = writer.image.header;
        let mut place = l1_offset;
        if let Some(length) = self.l1_bytes {
            place = writer.take(length)?;
            writer.clear(place, length);
            writer.submit(io)?;
            let old = l1_bytes(writer.image.header.l1_entries());
            writer.out.copy(io, l1_offset, place, old)?;
            writer.lengthen(io)?;
        }
        writer.out.barrier(io)?;
        let bytes = writer.image.header.resized(self.size, place);
        writer.out.write(io, field::SIZE as u64, &bytes)?;
        (writer.image.header.size, writer.image.header.l1_offset) = (self.size, place);
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
        let (size, cluster) = (writer.image.header.virtual_size(), writer.image.header.cluster_size());
        let (end, last) = (size.next_multiple_of(cluster), size / cluster);
        let held = end > size && writer.lookup(io, last)? != Entry::Free;
        if held {
            // All of the cluster, although the disk may end within it again.
            let disk = writer.image.disk(end);
            let parts = vec![Extent::zero(size, end - size)];
            writer.write_cluster(io, disk, &ClusterParts { cluster: last, parts }, below)?;
        }
        writer.step(io)
    }
}
