//! What a bitmap calls dirty, a cluster of bits at a time ("Bitmap table" and "Bitmap data" in the specification).

use crate::image::{overflow, Image};
use crate::metadata::table_reader::TableReader;
use alloc::format;
use alloc::vec;
use instar_guest_sdk::{BlockIo, DirtyRanges, DriverResult};
use instar_qcow2_format::{Bitmap, BitmapTableEntry};

/// Bytes of bits that are read at once.
const WINDOW: u64 = 64 << 10;
/// Table entries that are gone through in one call, at most, so that the caller is heard from now and then.
const ENTRIES: u64 = 4096;

/// Push what is dirty from guest byte `from` on; returns where to go on.
///
/// # Errors
/// Corruption; I/O errors.
pub(crate) fn dirty(
    io: &mut dyn BlockIo,
    image: &Image,
    bitmap: &Bitmap,
    from: u64,
    out: &mut DirtyRanges,
) -> DriverResult<u64> {
    let size = image.header.virtual_size;
    let cluster = image.cluster_size();
    let granularity = 1u64 << bitmap.granularity_bits.min(63);
    // Guest bytes whose bits are in one cluster.
    let covered = cluster.bytes().saturating_mul(8).saturating_mul(granularity);
    let mut table = TableReader::new(image.device, bitmap.table.0, u64::from(bitmap.table_entries));
    let first = from / covered;
    let last = first.saturating_add(ENTRIES);
    let mut index = first;
    while let Some((entry, raw)) = table.next(io, index, last)? {
        let start = entry.saturating_mul(covered);
        if start >= size {
            return Ok(size);
        }
        let decoded = BitmapTableEntry::decode(raw, cluster)
            .map_err(|error| image.corrupt(table.at(entry), format!("an entry of a bitmap table {error}")))?;
        match decoded {
            BitmapTableEntry::Zeroes => {}
            BitmapTableEntry::Ones => {
                let start = start.max(from);
                if !out.push(start, (entry + 1).saturating_mul(covered).min(size)) {
                    return Ok(start);
                }
            }
            BitmapTableEntry::Data(place) => {
                if !image.holds_cluster(place) {
                    let text = format!("a bitmap's bits are at offset {place}, past the end of the file");
                    return Err(image.corrupt(table.at(entry), text));
                }
                let bits = Bits { at: place.0, start, granularity, size };
                if let Some(next) = bits.push(io, image, from, cluster.bytes(), out)? {
                    return Ok(next);
                }
            }
        }
        index = entry + 1;
    }
    Ok(last.min(u64::from(bitmap.table_entries)).saturating_mul(covered).min(size).max(from.saturating_add(1)))
}

/// A cluster of bits.
struct Bits {
    /// Byte offset in the file.
    at: u64,
    /// The guest byte of its first bit.
    start: u64,
    granularity: u64,
    /// Virtual size in bytes.
    size: u64,
}

impl Bits {
    /// Push what is dirty from guest byte `from` on; returns where to go on if there is no room.
    fn push(
        &self,
        io: &mut dyn BlockIo,
        image: &Image,
        from: u64,
        bytes: u64,
        out: &mut DirtyRanges,
    ) -> DriverResult<Option<u64>> {
        let per_byte = self.granularity.saturating_mul(8);
        let mut at = from.saturating_sub(self.start) / per_byte;
        while at < bytes && self.start.saturating_add(at.saturating_mul(per_byte)) < self.size {
            let left = (self.size - self.start).div_ceil(per_byte).min(bytes) - at;
            let mut window = vec![0; usize::try_from(left.min(WINDOW)).map_err(|_| overflow("a window of bits"))?];
            io.read(image.device, self.at + at, &mut window)?;
            for (byte, number) in window.iter().zip(at..) {
                if *byte == 0 {
                    continue;
                }
                for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                    let start = self.start + (number * 8 + bit) * self.granularity;
                    let (start, end) = (start.max(from), start.saturating_add(self.granularity).min(self.size));
                    if start < end && !out.push(start, end) {
                        return Ok(Some(start));
                    }
                }
            }
            at += window.len() as u64;
        }
        Ok(None)
    }
}
