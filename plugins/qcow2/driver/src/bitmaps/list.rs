//! The bitmaps of an image, with their names.

use crate::image::Image;
use crate::metadata::bitmap_directory::{refusal, BitmapDirectory, DirectoryEntry};
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{Bitmap, BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{BitmapError, BITMAP_ENTRY_BYTES};

/// Most bytes of names that are held.
const NAMES: usize = 4 << 20;

/// What of a bitmap is held against the image.
pub(crate) type Verify = fn(&Image, &DirectoryEntry) -> DriverResult<()>;

/// The bitmaps that count, in the order of the directory, and what the directory says of them.
///
/// # Errors
/// Corruption, two bitmaps of one name included; [`ErrorCode::UnsupportedFormat`] for what the specification does not know;
/// [`ErrorCode::ScratchTooSmall`]; I/O errors.
pub(crate) fn list(
    io: &mut dyn BlockIo,
    image: &Image,
    verify: Verify,
) -> DriverResult<(Vec<Bitmap>, Vec<DirectoryEntry>)> {
    let entries = BitmapDirectory::read(io, image, &mut |entry| verify(image, entry))?.entries;
    let (mut bitmaps, mut names, mut bytes) = (Vec::with_capacity(entries.len()), BTreeSet::new(), 0);
    for entry in &entries {
        let bitmap = &entry.bitmap;
        let at = entry.at + BITMAP_ENTRY_BYTES as u64 + u64::from(bitmap.extra_data_bytes);
        let mut name = vec![0; usize::from(bitmap.name_bytes)];
        bytes += name.len();
        if bytes > NAMES {
            let text = "the names of its bitmaps are too long to merge them: leave out --bitmaps";
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(image.device, entry.at));
        }
        io.read(image.device, at, &mut name)?;
        if !names.insert(name.clone()) {
            return Err(image.corrupt(entry.at, format!("{}has the name of another one", entry.what())));
        }
        bitmaps.push(Bitmap::new(name, 1 << bitmap.granularity_bits, bitmap.auto, bitmap.in_use));
    }
    Ok((bitmaps, entries))
}

/// A bitmap that was saved has a bit for each granule of the disk, and nothing that is unknown.
pub(crate) fn usable(image: &Image, entry: &DirectoryEntry) -> DriverResult<()> {
    let (bitmap, at) = (&entry.bitmap, entry.at);
    if bitmap.in_use {
        return Ok(());
    }
    if bitmap.coverage(image.cluster_size()) < image.header.virtual_size {
        let text = format!("{}has a table of {} entries, too few for the disk", entry.what(), bitmap.table_entries);
        return Err(image.corrupt(at, text));
    }
    if bitmap.extra_data_bytes != 0 && !bitmap.extra_data_compatible {
        let text = format!("{}has extra data that nothing is known of", entry.what());
        return Err(refusal(image, at, "", BitmapError::Unsupported(text)));
    }
    Ok(())
}

/// Of a backing, [`EnabledBitmaps::load`](crate::write::enabled_bitmaps::EnabledBitmaps::load) has held everything against the
/// disk, which may be about to grow.
#[allow(clippy::unnecessary_wraps, reason = "it stands for `usable`")]
pub(crate) fn verified(_: &Image, _: &DirectoryEntry) -> DriverResult<()> {
    Ok(())
}
