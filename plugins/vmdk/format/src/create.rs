//! A new, empty image: header, descriptor, two grain directories with their tables, as QEMU lays them out.

use crate::{flags, FormatError, Header, NO_PARENT, SECTOR, TABLE_BYTES};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Sectors of the descriptor.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Sectors of a grain: 64 KiB.
const GRAIN: u64 = 128;
/// Highest sector that an entry of 32 bits can name.
const MAX_SECTOR: u64 = u32::MAX as u64;

/// Kind of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subformat {
    /// `monolithicSparse`.
    MonolithicSparse,
    /// `streamOptimized`: compressed grains.
    StreamOptimized,
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, rounded up to sectors.
    pub virtual_size: u64,
    /// Name of the file, as its extent line gives it. May hold no quotes and no control characters.
    pub file_name: Vec<u8>,
    /// The new content ID.
    pub content_id: u32,
    /// Name and content ID of the parent.
    pub parent: Option<(Vec<u8>, u32)>,
    /// Kind of image.
    pub subformat: Subformat,
    /// Whether grains of zeroes may be entries without a place.
    pub zeroed_grains: bool,
    /// `ddb.adapterType`.
    pub adapter_type: String,
    /// `ddb.virtualHWVersion`.
    pub hardware_version: String,
}

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Length of the file in bytes.
    pub length: u64,
    /// The bytes that are not zero, with their offset.
    pub regions: Vec<(u64, Vec<u8>)>,
}

/// The bytes of an empty image.
///
/// # Errors
/// When it cannot be as large as that, or a name cannot stand in a descriptor.
pub fn create(options: &CreateOptions) -> Result<NewImage, FormatError> {
    let capacity = options.virtual_size.div_ceil(SECTOR);
    let tables = capacity.div_ceil(GRAIN * crate::TABLE_ENTRIES);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let copy_sectors = directory_sectors + tables * (TABLE_BYTES / SECTOR);
    let redundant = 1 + DESCRIPTOR_SECTORS;
    let primary = redundant + copy_sectors;
    let overhead = (primary + copy_sectors).next_multiple_of(GRAIN);
    if capacity == 0 {
        return Err(FormatError::unsupported("a disk of 0 bytes cannot be stored in a vmdk: give it a size"));
    }
    if capacity.saturating_add(overhead) > MAX_SECTOR {
        return Err(FormatError::unsupported("the disk is too large: a sparse vmdk holds up to 2 TiB"));
    }
    let compressed = options.subformat == Subformat::StreamOptimized;
    let mut bits = flags::NEWLINE_TEST | flags::REDUNDANT;
    bits |= if options.zeroed_grains { flags::ZEROED_GRAINS } else { 0 };
    bits |= if compressed { flags::COMPRESSED | flags::MARKERS } else { 0 };
    let header = Header {
        version: if compressed {
            3
        } else if options.zeroed_grains {
            2
        } else {
            1
        },
        flags: bits,
        capacity,
        grain: GRAIN,
        descriptor_offset: 1,
        descriptor_size: DESCRIPTOR_SECTORS,
        redundant_directory: redundant,
        directory: primary,
        overhead,
    };
    let text = descriptor(options, capacity)?;
    let regions = vec![
        (0, header.encode().to_vec()),
        (SECTOR, text),
        (redundant * SECTOR, directory(redundant + directory_sectors, tables)),
        (primary * SECTOR, directory(primary + directory_sectors, tables)),
    ];
    Ok(NewImage { length: overhead * SECTOR, regions })
}

/// The entries of a directory whose tables begin at sector `first`, one after the other.
fn directory(first: u64, tables: u64) -> Vec<u8> {
    // `create` has seen to it that every sector fits.
    let sector = |index: u64| u32::try_from(first + index * (TABLE_BYTES / SECTOR)).unwrap_or(0);
    (0..tables).flat_map(|index| sector(index).to_le_bytes()).collect()
}

/// Whether a name can stand between quotes in a line.
fn quotable(name: &[u8]) -> bool {
    !name.is_empty() && !name.iter().any(|&b| b == b'"' || b < b' ')
}

fn descriptor(options: &CreateOptions, capacity: u64) -> Result<Vec<u8>, FormatError> {
    let names = core::iter::once(&options.file_name).chain(options.parent.iter().map(|(name, _)| name));
    if !names.into_iter().all(|name| quotable(name)) {
        return Err(FormatError::unsupported("a file name with quotes or control characters cannot stand in a vmdk"));
    }
    let parent_id = options.parent.as_ref().map_or(NO_PARENT, |(_, id)| *id);
    let kind = match options.subformat {
        Subformat::MonolithicSparse => "monolithicSparse",
        Subformat::StreamOptimized => "streamOptimized",
    };
    let mut text = format!(
        "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID={parent_id:08x}\ncreateType=\"{kind}\"\n",
        options.content_id
    )
    .into_bytes();
    if let Some((name, _)) = &options.parent {
        text.extend_from_slice(b"parentFileNameHint=\"");
        text.extend_from_slice(name);
        text.extend_from_slice(b"\"\n");
    }
    text.extend_from_slice(format!("\n# Extent description\nRW {capacity} SPARSE \"").as_bytes());
    text.extend_from_slice(&options.file_name);
    // The geometry that QEMU gives: 63 sectors, 16 heads for IDE and 255 for the others.
    let heads = if options.adapter_type == "ide" { 16 } else { 255 };
    let cylinders = capacity / (63 * heads);
    text.extend_from_slice(
        format!(
            "\"\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n",
            options.hardware_version, options.adapter_type
        )
        .as_bytes(),
    );
    if text.len() as u64 >= DESCRIPTOR_SECTORS * SECTOR {
        return Err(FormatError::unsupported("the file names are too long for the descriptor"));
    }
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Descriptor, HEADER_BYTES};

    fn options() -> CreateOptions {
        CreateOptions {
            virtual_size: (10 << 20) - 1,
            file_name: b"x y.vmdk".to_vec(),
            content_id: 0xabc,
            parent: Some((b"../base.vmdk".to_vec(), 7)),
            subformat: Subformat::MonolithicSparse,
            zeroed_grains: true,
            adapter_type: "ide".into(),
            hardware_version: "4".into(),
        }
    }

    #[test]
    fn what_is_made_can_be_read() {
        let image = create(&options()).unwrap();
        let mut file = vec![0; usize::try_from(image.length).unwrap()];
        for (offset, bytes) in &image.regions {
            let at = usize::try_from(*offset).unwrap();
            assert!(file[at..at + bytes.len()].iter().all(|&b| b == 0), "regions do not overlap");
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        let header: [u8; HEADER_BYTES] = file[..512].try_into().unwrap();
        let header = Header::parse(&header).unwrap();
        assert_eq!((header.virtual_size(), header.grain_bytes(), header.directory_entries()), (10 << 20, 65536, 1));
        assert_eq!((header.redundant_directory, header.directory, header.overhead), (21, 26, 128));
        assert!(header.has(flags::ZEROED_GRAINS) && header.has(flags::REDUNDANT));
        let descriptor = Descriptor::parse(&file[512..21 * 512]).unwrap();
        assert_eq!((descriptor.content_id.value, descriptor.parent()), (0xabc, Some(7)));
        assert_eq!(descriptor.parent_hint.unwrap(), b"../base.vmdk");
    }

    #[test]
    fn what_cannot_be_made() {
        assert!(create(&CreateOptions { virtual_size: 0, ..options() }).is_err());
        assert!(create(&CreateOptions { virtual_size: 2 << 40, ..options() }).is_err());
        assert!(create(&CreateOptions { file_name: b"a\"b".to_vec(), ..options() }).is_err());
        assert!(create(&CreateOptions { file_name: vec![b'a'; 20000], ..options() }).is_err());
    }
}
