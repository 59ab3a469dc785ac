//! A new, empty image, laid out as `vdiInitHeader` and `vdiImageCreateFile` lay it out.

use crate::header::{PLUS_BYTES, VERSION};
use crate::{
    field, Entry, FormatError, ImageType, Uuid, ENTRY_BYTES, HEADER_BYTES, SECTOR, SIGNATURE, SIGNATURE_OFFSET,
};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a block (`VDI_IMAGE_DEFAULT_BLOCK_SIZE`), the only size that QEMU reads.
pub const NEW_BLOCK_BYTES: u64 = 1 << 20;
/// Most blocks of a new image: a disk of 64 TiB, whose map is written as a whole.
pub const MAX_NEW_BLOCKS: u64 = 1 << 26;

/// Map and data begin at multiples of this (`VDI_DATA_ALIGN`).
const ALIGNMENT: u64 = 1 << 20;
/// What the first bytes say to people.
const TEXT: &[u8] = b"<<< instar VDI Disk Image >>>\n";

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to whole sectors.
    pub virtual_size: u64,
    /// All blocks are there from the beginning.
    pub preallocated: bool,
    /// `uuidCreate`.
    pub create: Uuid,
    /// `uuidModify`.
    pub modify: Uuid,
    /// The parent's `uuidCreate` and `uuidModify`.
    pub parent: Option<(Uuid, Uuid)>,
}

/// A file of zeroes with regions written over them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Bytes of the file.
    pub length: u64,
    /// Where blocks begin, in bytes.
    pub data_offset: u64,
    /// What is not zero, by byte offsets.
    pub regions: Vec<(u64, Vec<u8>)>,
}

/// How many blocks a new disk has, and where the first begins in the file.
///
/// # Errors
/// When no such disk is made.
pub fn data_offset_of(virtual_size: u64) -> Result<(u32, u64), FormatError> {
    let blocks = virtual_size.div_ceil(NEW_BLOCK_BYTES);
    if blocks == 0 || blocks > MAX_NEW_BLOCKS {
        let most = MAX_NEW_BLOCKS * NEW_BLOCK_BYTES;
        let text = format!("a disk of {virtual_size} bytes cannot be made: it has to have from 1 to {most}");
        return Err(FormatError::unsupported(text));
    }
    let map = (blocks * ENTRY_BYTES).next_multiple_of(ALIGNMENT);
    let blocks = u32::try_from(blocks).map_err(|_| FormatError::unsupported("the disk has too many blocks"))?;
    Ok((blocks, ALIGNMENT + map))
}

/// Make an image.
///
/// # Errors
/// When there is no such image.
pub fn create(options: &CreateOptions) -> Result<NewImage, FormatError> {
    if options.preallocated && options.parent.is_some() {
        return Err(FormatError::unsupported("a static image has no parent"));
    }
    let (blocks, data_offset) = data_offset_of(options.virtual_size)?;
    let image_type = match (options.preallocated, &options.parent) {
        (true, _) => ImageType::Static,
        (false, Some(_)) => ImageType::Differencing,
        (false, None) => ImageType::Dynamic,
    };
    let allocated = if options.preallocated { blocks } else { 0 };
    let mut header = vec![0; HEADER_BYTES];
    header[..TEXT.len()].copy_from_slice(TEXT);
    header[SIGNATURE_OFFSET..SIGNATURE_OFFSET + 4].copy_from_slice(&SIGNATURE);
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    for (at, number) in [
        (SIGNATURE_OFFSET + 4, VERSION),
        (field::HEADER_SIZE, PLUS_BYTES),
        (field::TYPE, image_type as u32),
        (field::MAP_OFFSET, narrow(ALIGNMENT)),
        (field::DATA_OFFSET, narrow(data_offset)),
        (field::SECTOR_SIZE, narrow(SECTOR)),
        (field::BLOCK_SIZE, narrow(NEW_BLOCK_BYTES)),
        (field::BLOCKS, blocks),
        (field::ALLOCATED, allocated),
        (field::GEOMETRY + 12, narrow(SECTOR)),
    ] {
        header[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }
    let size = options.virtual_size.div_ceil(SECTOR) * SECTOR;
    header[field::DISK_SIZE..field::BLOCK_SIZE].copy_from_slice(&size.to_le_bytes());
    let (link, parent_modify) = options.parent.unwrap_or((Uuid::NULL, Uuid::NULL));
    for (at, uuid) in [
        (field::CREATE, options.create),
        (field::MODIFY, options.modify),
        (field::LINK, link),
        (field::PARENT_MODIFY, parent_modify),
    ] {
        header[at..at + 16].copy_from_slice(&uuid.0);
    }
    let entry = |block| if options.preallocated { Entry::Slot(block) } else { Entry::Free };
    let map = (0..blocks).flat_map(|block| entry(block).encode().to_le_bytes()).collect();
    let length = data_offset + u64::from(allocated) * NEW_BLOCK_BYTES;
    Ok(NewImage { length, data_offset, regions: vec![(0, header), (ALIGNMENT, map)] })
}
