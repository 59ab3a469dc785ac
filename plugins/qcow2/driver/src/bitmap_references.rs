//! Which host clusters the persistent bitmaps of an image have: directory, tables, data ("Bitmaps" in the specification).

use crate::image::{overflow, Image};
use crate::scan::scan_table;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{autoclear, HostCluster, HostOffset};

/// Longest directory that is taken, in bytes; 65,535 bitmaps with names of 40 bytes.
const MAX_DIRECTORY: u64 = 4 << 20;
/// Bytes of a directory entry before extra data and name ("Bitmap directory").
const ENTRY: usize = 24;
/// Bits 9 to 55 of an entry of a bitmap table: the offset of a cluster of bitmap data ("Bitmap table").
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Call `each` with the byte offset of what refers to it, and every cluster of the image's bitmaps. There are none if the
/// autoclear feature bit of the bitmaps is off: a program that does not know them has changed the image.
///
/// # Errors
/// Corruption: what lies outside the file or makes no sense; [`ErrorCode::ScratchTooSmall`]; I/O errors; what `each`
/// returns.
pub(crate) fn each_bitmap_cluster(
    io: &mut dyn BlockIo,
    image: &Image,
    each: &mut dyn FnMut(u64, HostCluster) -> DriverResult<()>,
) -> DriverResult<()> {
    let size = image.cluster_size();
    let Some(bitmaps) = image.header.bitmaps().filter(|_| image.header.autoclear & autoclear::BITMAPS != 0) else {
        return Ok(());
    };
    let (base, length) = (HostOffset(bitmaps.directory_offset), bitmaps.directory_size);
    if length > MAX_DIRECTORY {
        return Err(DriverError::new(ErrorCode::ScratchTooSmall, "the image has too many bitmaps"));
    }
    span(image, base, length, "the bitmap directory", base.0, each)?;
    let mut directory = vec![0; usize::try_from(length).map_err(|_| overflow("the bitmap directory"))?];
    io.read(image.device, base.0, &mut directory)?;
    for (at, table, entries) in tables(image, &directory, base.0, bitmaps.count)? {
        span(image, table, entries * 8, "a bitmap table", at, each)?;
        scan_table(io, image, table, entries, &mut |_, at, raw| {
            let offset = HostOffset(raw & OFFSET);
            if offset.0 == 0 {
                return Ok(());
            }
            if size.offset_in(offset.0) != 0 || !image.holds_cluster(offset) {
                return Err(image.corrupt(at, format!("a bitmap table points to offset {offset}, outside the file")));
            }
            each(at, size.host_cluster(offset))
        })?;
    }
    Ok(())
}

/// Byte offset of the directory entry, offset and number of entries of every bitmap table.
fn tables(image: &Image, directory: &[u8], base: u64, count: u32) -> DriverResult<Vec<(u64, HostOffset, u64)>> {
    let mut found = Vec::new();
    let mut rest = directory;
    for _ in 0..count {
        let at = base + (directory.len() - rest.len()) as u64;
        let cut = || image.corrupt(at, "the bitmap directory ends within an entry");
        let (entry, variable) = rest.split_first_chunk::<ENTRY>().ok_or_else(cut)?;
        let u32_at = |at: usize| entry.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
        let offset = u64::from(u32_at(0)) << 32 | u64::from(u32_at(4));
        let (entries, extra) = (u32_at(8), u32_at(20));
        let name = u16::from_be_bytes([entry[18], entry[19]]);
        let length = (u64::from(extra) + u64::from(name)).next_multiple_of(8);
        rest = usize::try_from(length).ok().and_then(|length| variable.get(length..)).ok_or_else(cut)?;
        found.push((at, HostOffset(offset), u64::from(entries)));
    }
    Ok(found)
}

/// The clusters of a structure, which is to lie in the file.
fn span(
    image: &Image,
    offset: HostOffset,
    bytes: u64,
    what: &str,
    at: u64,
    each: &mut dyn FnMut(u64, HostCluster) -> DriverResult<()>,
) -> DriverResult<()> {
    let size = image.cluster_size();
    if size.offset_in(offset.0) != 0 || !image.holds_bytes(offset, bytes) {
        return Err(image.corrupt(at, format!("{what} at offset {offset} does not lie in the file")));
    }
    let first = size.host_cluster(offset).0;
    (first..first + size.count_for(bytes)).try_for_each(|cluster| each(at, HostCluster(cluster)))
}
