//! Walking a whole table of 64-bit entries once.

use crate::image::Image;
use crate::metadata::table_reader::TableReader;
use alloc::format;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{BitmapTableEntry, HostOffset, L1Entry, RefcountTableEntry};

/// Call `each` with index, byte offset in the file and value of every entry that is not 0 of a table.
///
/// # Errors
/// I/O errors, and what `each` returns.
pub fn scan_table(
    io: &mut dyn BlockIo,
    image: &Image,
    base: HostOffset,
    entries: u64,
    each: &mut dyn FnMut(u64, u64, u64) -> DriverResult<()>,
) -> DriverResult<()> {
    let mut reader = TableReader::new(image.device, base.0, entries);
    let mut next = 0;
    while let Some((index, raw)) = reader.next(io, next, entries)? {
        each(index, reader.at(index), raw)?;
        next = index + 1;
    }
    Ok(())
}

/// Call `each` with index, position and offset of every refcount block; all are verified to lie in the file.
///
/// # Errors
/// Corruption of the refcount table, I/O errors, and what `each` returns.
pub fn scan_refcount_table(
    io: &mut dyn BlockIo,
    image: &Image,
    each: &mut dyn FnMut(u64, u64, HostOffset) -> DriverResult<()>,
) -> DriverResult<()> {
    let entries = image.header.refcount_table_bytes() / 8;
    scan_table(io, image, image.header.refcount_table, entries, &mut |index, at, raw| {
        let entry = RefcountTableEntry::decode(raw, image.cluster_size())
            .map_err(|error| image.corrupt(at, format!("refcount table entry {index} {error}")))?;
        match entry {
            RefcountTableEntry::Unallocated => Ok(()),
            RefcountTableEntry::Block(offset) if image.holds_cluster(offset) => each(index, at, offset),
            RefcountTableEntry::Block(offset) => Err(image.corrupt(
                at,
                format!("refcount table entry {index} points to offset {offset}, past the end of the file"),
            )),
        }
    })
}

/// L1 entry `index`, which stands at byte `at` of the file: the L2 table, verified to lie in the file, and
/// its COPIED flag.
///
/// # Errors
/// Corruption of the entry.
pub fn decode_l1(image: &Image, index: u64, at: u64, raw: u64) -> DriverResult<Option<(HostOffset, bool)>> {
    let entry = L1Entry::decode(raw, image.cluster_size())
        .map_err(|error| image.corrupt(at, format!("L1 entry {index} {error}")))?;
    match entry {
        L1Entry::Unallocated => Ok(None),
        L1Entry::Table { offset, copied } if image.holds_bytes(offset, image.cluster_size().bytes()) => {
            Ok(Some((offset, copied)))
        }
        L1Entry::Table { offset, .. } => {
            Err(image.corrupt(at, format!("L1 entry {index} points to offset {offset}, past the end of the file")))
        }
    }
}

/// Call `each` with index, position and offset of every L2 table that an L1 table refers to; all are verified to lie in
/// the file.
///
/// # Errors
/// Corruption of the L1 table, I/O errors, and what `each` returns.
pub fn scan_l1_at(
    io: &mut dyn BlockIo,
    image: &Image,
    table: HostOffset,
    entries: u64,
    each: &mut dyn FnMut(u64, u64, HostOffset) -> DriverResult<()>,
) -> DriverResult<()> {
    scan_l1_flags(io, image, table, entries, &mut |index, at, table, _| each(index, at, table))
}

/// [`scan_l1_at`] with the COPIED flags.
///
/// # Errors
/// As [`scan_l1_at`].
pub fn scan_l1_flags(
    io: &mut dyn BlockIo,
    image: &Image,
    table: HostOffset,
    entries: u64,
    each: &mut dyn FnMut(u64, u64, HostOffset, bool) -> DriverResult<()>,
) -> DriverResult<()> {
    scan_table(io, image, table, entries, &mut |index, at, raw| match decode_l1(image, index, at, raw)? {
        Some((table, copied)) => each(index, at, table, copied),
        None => Ok(()),
    })
}

/// Call `each` with the offset of every cluster of a bitmap's data; all are verified to lie in the file.
///
/// # Errors
/// Corruption of the bitmap table, I/O errors, and what `each` returns.
pub fn scan_bitmap_table(
    io: &mut dyn BlockIo,
    image: &Image,
    table: HostOffset,
    entries: u64,
    each: &mut dyn FnMut(HostOffset) -> DriverResult<()>,
) -> DriverResult<()> {
    scan_table(io, image, table, entries, &mut |index, at, raw| {
        let entry = BitmapTableEntry::decode(raw, image.cluster_size())
            .map_err(|error| image.corrupt(at, format!("bitmap table entry {index} {error}")))?;
        match entry {
            BitmapTableEntry::Zeroes | BitmapTableEntry::Ones => Ok(()),
            BitmapTableEntry::Data(offset) if image.holds_cluster(offset) => each(offset),
            BitmapTableEntry::Data(offset) => Err(image.corrupt(
                at,
                format!("bitmap table entry {index} points to offset {offset}, past the end of the file"),
            )),
        }
    })
}
