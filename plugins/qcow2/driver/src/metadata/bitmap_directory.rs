//! The directory of persistent bitmaps: which bitmaps an image has, and where their tables are.
//!
//! Bitmaps count only while the autoclear bit says so ("Header", `autoclear_features`): without it, a program that does not
//! know them has changed the image, and there are none.

use crate::image::{overflow, Image};
use crate::metadata::entries::scan_bitmap_table;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{
    autoclear, Bitmap, BitmapError, Bitmaps as Directory, ExtensionKind, HostCluster, HostOffset, BITMAP_ENTRY_BYTES,
};

/// Bytes of the directory that are read at once.
const DIRECTORY_WINDOW: u64 = 64 << 10;

/// An error of the format library, about the structure at byte `at`.
pub(crate) fn refusal(image: &Image, at: u64, what: &str, error: BitmapError) -> DriverError {
    match error {
        BitmapError::Corrupt(text) => image.corrupt(at, format!("{what}{text}")),
        BitmapError::Unsupported(text) => {
            DriverError::new(ErrorCode::UnsupportedFormat, format!("{what}{text}")).at(image.device, at)
        }
    }
}

/// The bitmap directory, if the autoclear bit says that it counts; it lies in the file.
pub(crate) fn find_directory(image: &Image) -> DriverResult<Option<Directory>> {
    // Version 2 has no autoclear bits.
    if image.header.autoclear & autoclear::BITMAPS == 0 {
        return Ok(None);
    }
    let mut extensions = image.header.extensions.iter().filter(|e| e.kind == ExtensionKind::Bitmaps);
    let Some(extension) = extensions.next() else {
        return Ok(None);
    };
    if let Some(second) = extensions.next() {
        return Err(image.corrupt(second.offset, "there is a second bitmaps extension"));
    }
    let directory = Directory::checked(&extension.data, image.cluster_size())
        .map_err(|error| refusal(image, extension.offset, "", error))?;
    let offset = HostOffset(directory.directory_offset);
    if !image.holds_bytes(offset, directory.directory_size) {
        let text = format!("the bitmap directory at offset {offset} lies past the end of the file");
        return Err(image.corrupt(extension.offset, text));
    }
    Ok(Some(directory))
}

/// Call `each` with every cluster of the image's bitmaps (directory, tables, data), and the byte offset of what refers to
/// it. There are none if the autoclear bit of the bitmaps is off: a program that does not know them changed the image.
///
/// # Errors
/// Corruption of the directory or a table; I/O errors; what `each` returns.
pub(crate) fn each_bitmap_cluster(
    io: &mut dyn BlockIo,
    image: &Image,
    each: &mut dyn FnMut(u64, HostCluster) -> DriverResult<()>,
) -> DriverResult<()> {
    let Some(directory) = find_directory(image)? else {
        return Ok(());
    };
    let size = image.cluster_size();
    let clusters = |offset: HostOffset, bytes| {
        let first = size.host_cluster(offset).0;
        (first..first + size.count_for(bytes)).map(HostCluster)
    };
    let base = directory.directory_offset;
    clusters(HostOffset(base), directory.directory_size).try_for_each(|cluster| each(base, cluster))?;
    let mut bitmaps = Vec::new();
    read_directory(io, image, directory, &mut |at, _, bitmap| {
        bitmaps.push((at, bitmap));
        Ok(())
    })?;
    for (at, bitmap) in bitmaps {
        clusters(bitmap.table, bitmap.table_bytes()).try_for_each(|cluster| each(at, cluster))?;
        let entries = u64::from(bitmap.table_entries);
        scan_bitmap_table(io, image, bitmap.table, entries, &mut |data| each(at, size.host_cluster(data)))?;
    }
    Ok(())
}

/// Call `each` with every bitmap of the directory, where its entry stands, and what to call it. The directory lies in the
/// file, and so does each table.
pub(crate) fn read_directory(
    io: &mut dyn BlockIo,
    image: &Image,
    directory: Directory,
    each: &mut dyn FnMut(u64, &str, Bitmap) -> DriverResult<()>,
) -> DriverResult<()> {
    let size = image.cluster_size();
    let end = directory.directory_offset.saturating_add(directory.directory_size);
    let mut at = directory.directory_offset;
    let mut window: Vec<u8> = Vec::new();
    let mut window_at = at;
    for number in 1..=directory.count {
        let what = format!("bitmap {number} of the directory ");
        let cut_off = |at| image.corrupt(at, format!("{what}lies past the directory's end"));
        let fixed_end = at.checked_add(BITMAP_ENTRY_BYTES as u64).filter(|&fixed| fixed <= end);
        if fixed_end.ok_or_else(|| cut_off(at))? > window_at + window.len() as u64 {
            let length = (end - at).min(DIRECTORY_WINDOW);
            window = vec![0; usize::try_from(length).map_err(|_| overflow("the bitmap directory"))?];
            window_at = at;
            io.read(image.device, at, &mut window)?;
        }
        let start = usize::try_from(at - window_at).map_err(|_| overflow("the bitmap directory"))?;
        let fixed = window.get(start..).and_then(|rest| rest.first_chunk::<BITMAP_ENTRY_BYTES>());
        let fixed = fixed.ok_or_else(|| overflow("the bitmap directory"))?;
        let bitmap = Bitmap::parse(fixed, size).map_err(|error| refusal(image, at, &what, error))?;
        let next = at.checked_add(bitmap.entry_bytes()).filter(|&next| next <= end).ok_or_else(|| cut_off(at))?;
        if !image.holds_bytes(bitmap.table, bitmap.table_bytes()) {
            let text = format!("{what}has its table at offset {}, past the end of the file", bitmap.table);
            return Err(image.corrupt(at, text));
        }
        each(at, &what, bitmap)?;
        at = next;
    }
    if at != end {
        let text = format!("the bitmap directory has {} bytes after its last entry", end - at);
        return Err(image.corrupt(at, text));
    }
    Ok(())
}
