//! The directory of persistent bitmaps: which bitmaps an image has, and where their tables are.
//!
//! Bitmaps count only while the autoclear bit says so ("Header", `autoclear_features`): without it, a program that does
//! not know them has changed the image, and there are none.

use crate::image::{overflow, Image};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{
    autoclear, Bitmap, BitmapError, Bitmaps as Directory, ExtensionKind, HostOffset, BITMAP_ENTRY_BYTES,
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

/// Where a directory is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirectoryPlace {
    pub(crate) offset: HostOffset,
    /// Length in bytes.
    pub(crate) bytes: u64,
    /// Byte offset in the file of the header extension that refers to it.
    pub(crate) named_at: u64,
}

/// An entry of the directory: a bitmap whose table lies in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirectoryEntry {
    /// Its number, counted from 1.
    number: u32,
    /// Byte offset in the file where it begins.
    pub(crate) at: u64,
    pub(crate) bitmap: Bitmap,
}

impl DirectoryEntry {
    /// What messages call it; a space follows.
    pub(crate) fn what(&self) -> String {
        format!("bitmap {} of the directory ", self.number)
    }
}

/// The bitmaps of an image.
#[derive(Debug, Default)]
pub(crate) struct BitmapDirectory {
    /// `None` if there are no bitmaps that count.
    pub(crate) place: Option<DirectoryPlace>,
    /// The bitmaps, in the order of the directory.
    pub(crate) entries: Vec<DirectoryEntry>,
}

impl BitmapDirectory {
    /// Read the directory; each entry is handed to `verify` before the next one is looked at. Nothing is read from an
    /// image without bitmaps that count.
    ///
    /// # Errors
    /// Corruption; [`ErrorCode::UnsupportedFormat`] for what the specification does not know; I/O errors; what `verify`
    /// returns.
    pub(crate) fn read(
        io: &mut dyn BlockIo,
        image: &Image,
        verify: &mut dyn FnMut(&DirectoryEntry) -> DriverResult<()>,
    ) -> DriverResult<Self> {
        let Some((named_at, directory)) = find_directory(image)? else {
            return Ok(Self::default());
        };
        let (offset, bytes) = (HostOffset(directory.directory_offset), directory.directory_size);
        let mut found = Self { place: Some(DirectoryPlace { offset, bytes, named_at }), entries: Vec::new() };
        read_entries(io, image, directory, &mut |entry| {
            verify(&entry)?;
            found.entries.push(entry);
            Ok(())
        })?;
        Ok(found)
    }
}

/// The bitmap directory, if the autoclear bit says that it counts, and where the extension stands that refers to it. It
/// lies in the file.
fn find_directory(image: &Image) -> DriverResult<Option<(u64, Directory)>> {
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
    Ok(Some((extension.offset, directory)))
}

/// Call `each` with every entry of the directory. The directory lies in the file, and so does each table.
fn read_entries(
    io: &mut dyn BlockIo,
    image: &Image,
    directory: Directory,
    each: &mut dyn FnMut(DirectoryEntry) -> DriverResult<()>,
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
        each(DirectoryEntry { number, at, bitmap })?;
        at = next;
    }
    if at != end {
        let text = format!("the bitmap directory has {} bytes after its last entry", end - at);
        return Err(image.corrupt(at, text));
    }
    Ok(())
}
