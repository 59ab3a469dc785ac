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
/// Bytes of a grain of a new image.
pub const NEW_GRAIN_BYTES: u64 = GRAIN * SECTOR;
/// Sectors of an extent of a disk that is split: 2 GiB.
const SPLIT_SECTORS: u64 = (2 << 30) / SECTOR;
/// Most extents of a new disk: as many as can be worked on.
const MAX_EXTENTS: u64 = 500;
/// Highest sector that an entry of 32 bits can name.
const MAX_SECTOR: u64 = u32::MAX as u64;

/// Kind of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subformat {
    /// `monolithicSparse`.
    MonolithicSparse,
    /// `streamOptimized`: compressed grains.
    StreamOptimized,
    /// `monolithicFlat`: a descriptor, and the plain bytes in a file of their own.
    MonolithicFlat,
    /// `twoGbMaxExtentSparse`: a descriptor, and sparse extents of up to 2 GiB.
    SplitSparse,
    /// `twoGbMaxExtentFlat`: a descriptor, and files of up to 2 GiB with the plain bytes.
    SplitFlat,
}

impl Subformat {
    /// As the descriptor names it.
    const fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::StreamOptimized => "streamOptimized",
            Self::MonolithicFlat => "monolithicFlat",
            Self::SplitSparse => "twoGbMaxExtentSparse",
            Self::SplitFlat => "twoGbMaxExtentFlat",
        }
    }

    /// Whether the extents are plain bytes.
    const fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::SplitFlat)
    }
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

/// A new disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// The file that it is named by.
    pub image: NewImage,
    /// Its extents, if they are in files of their own.
    pub files: Vec<NewFile>,
}

/// A new file beside the one that a disk is named by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Its name, without a directory.
    pub name: Vec<u8>,
    /// What is in it.
    pub image: NewImage,
}

/// The bytes of a new file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Length of the file in bytes.
    pub length: u64,
    /// The bytes that are not zero, with their offset.
    pub regions: Vec<(u64, Vec<u8>)>,
}

/// The bytes of an empty disk.
///
/// # Errors
/// When it cannot be as large as that, a name cannot stand in a descriptor, or the kind cannot have a parent.
pub fn create(options: &CreateOptions) -> Result<NewDisk, FormatError> {
    let capacity = options.virtual_size.div_ceil(SECTOR);
    if capacity == 0 {
        return Err(FormatError::unsupported("a disk of 0 bytes cannot be stored in a vmdk: give it a size"));
    }
    let kind = options.subformat;
    if matches!(kind, Subformat::MonolithicSparse | Subformat::StreamOptimized) {
        let mut line = format!("RW {capacity} SPARSE \"").into_bytes();
        line.extend_from_slice(&options.file_name);
        line.push(b'"');
        let text = descriptor(options, capacity, &[line])?;
        if text.len() as u64 >= DESCRIPTOR_SECTORS * SECTOR {
            return Err(FormatError::unsupported("the file names are too long for the descriptor"));
        }
        let mut image = sparse(options, capacity)?;
        image.regions.insert(1, (SECTOR, text));
        return Ok(NewDisk { image, files: Vec::new() });
    }
    if kind.is_flat() && options.parent.is_some() {
        return Err(FormatError::unsupported("a flat vmdk cannot have a backing file: use twoGbMaxExtentSparse"));
    }
    let most = if kind == Subformat::MonolithicFlat { capacity } else { SPLIT_SECTORS };
    if capacity.div_ceil(most) > MAX_EXTENTS || capacity > i64::MAX as u64 / SECTOR {
        return Err(FormatError::unsupported(
            "the disk is too large for a vmdk of this kind: it would have too many files",
        ));
    }
    let (mut files, mut lines, mut start) = (Vec::new(), Vec::new(), 0);
    while start < capacity {
        let sectors = most.min(capacity - start);
        let name = extent_name(&options.file_name, kind, files.len() + 1);
        let (word, end) = if kind.is_flat() { ("FLAT", "\" 0") } else { ("SPARSE", "\"") };
        lines.push([format!("RW {sectors} {word} \"").as_bytes(), &name, end.as_bytes()].concat());
        let image = if kind.is_flat() {
            NewImage { length: sectors * SECTOR, regions: Vec::new() }
        } else {
            sparse(options, sectors)?
        };
        files.push(NewFile { name, image });
        start += sectors;
    }
    let text = descriptor(options, capacity, &lines)?;
    let length = text.len() as u64;
    if length > crate::MAX_DESCRIPTOR_BYTES {
        return Err(FormatError::unsupported("the disk has too many files for a descriptor: choose another kind"));
    }
    Ok(NewDisk { image: NewImage { length, regions: vec![(0, text)] }, files })
}

/// The name of an extent's file: as that of the disk, with a number before its ending.
fn extent_name(disk: &[u8], kind: Subformat, number: usize) -> Vec<u8> {
    let dot = disk.iter().rposition(|&byte| byte == b'.').unwrap_or(disk.len());
    let (stem, ending) = disk.split_at(dot);
    let middle = match kind {
        Subformat::MonolithicFlat => String::from("-flat"),
        Subformat::SplitFlat => format!("-f{number:03}"),
        _ => format!("-s{number:03}"),
    };
    [stem, middle.as_bytes(), ending].concat()
}

/// An empty sparse extent, without a descriptor in it.
fn sparse(options: &CreateOptions, capacity: u64) -> Result<NewImage, FormatError> {
    let tables = capacity.div_ceil(GRAIN * crate::TABLE_ENTRIES);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let copy_sectors = directory_sectors + tables * (TABLE_BYTES / SECTOR);
    let redundant = 1 + DESCRIPTOR_SECTORS;
    let primary = redundant + copy_sectors;
    let overhead = (primary + copy_sectors).next_multiple_of(GRAIN);
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
    let regions = vec![
        (0, header.encode().to_vec()),
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
pub(crate) fn quotable(name: &[u8]) -> bool {
    !name.is_empty() && !name.iter().any(|&b| b == b'"' || b < b' ')
}

/// The text of a descriptor with these extent lines.
fn descriptor(options: &CreateOptions, capacity: u64, extents: &[Vec<u8>]) -> Result<Vec<u8>, FormatError> {
    let names = core::iter::once(&options.file_name).chain(options.parent.iter().map(|(name, _)| name));
    if !names.into_iter().all(|name| quotable(name)) {
        return Err(FormatError::unsupported("a file name with quotes or control characters cannot stand in a vmdk"));
    }
    let parent_id = options.parent.as_ref().map_or(NO_PARENT, |(_, id)| *id);
    let kind = options.subformat.name();
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
    text.extend_from_slice(b"\n# Extent description\n");
    text.extend_from_slice(&extents.join(&b'\n'));
    // The geometry that QEMU gives: 63 sectors, 16 heads for IDE and 255 for the others.
    let heads = if options.adapter_type == "ide" { 16 } else { 255 };
    let cylinders = capacity / (63 * heads);
    text.extend_from_slice(
        format!(
            "\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n",
            options.hardware_version, options.adapter_type
        )
        .as_bytes(),
    );
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
        let image = create(&options()).unwrap().image;
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
    fn disks_in_several_files() {
        for (subformat, names, flat) in [
            (Subformat::MonolithicFlat, ["x y-flat.vmdk", ""], true),
            (Subformat::SplitFlat, ["x y-f001.vmdk", "x y-f002.vmdk"], true),
            (Subformat::SplitSparse, ["x y-s001.vmdk", "x y-s002.vmdk"], false),
        ] {
            let parent = options().parent.filter(|_| !flat);
            let disk = create(&CreateOptions { subformat, virtual_size: 3 << 30, parent, ..options() }).unwrap();
            let found: Vec<_> = disk.files.iter().map(|file| file.name.clone()).collect();
            let expected: Vec<_> = names.iter().filter(|n| !n.is_empty()).map(|n| n.as_bytes().to_vec()).collect();
            assert_eq!(found, expected);
            let extents = Descriptor::parse(&disk.image.regions[0].1).unwrap().disk_extents().unwrap();
            assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), 3 << 30);
            assert_eq!(extents.len(), disk.files.len());
        }
        assert!(create(&CreateOptions { subformat: Subformat::SplitFlat, ..options() }).is_err(), "a parent");
        let large = CreateOptions { subformat: Subformat::SplitSparse, virtual_size: 1 << 50, ..options() };
        assert!(create(&large).is_err());
    }

    #[test]
    fn what_cannot_be_made() {
        assert!(create(&CreateOptions { virtual_size: 0, ..options() }).is_err());
        assert!(create(&CreateOptions { virtual_size: 2 << 40, ..options() }).is_err());
        assert!(create(&CreateOptions { file_name: b"a\"b".to_vec(), ..options() }).is_err());
        assert!(create(&CreateOptions { file_name: vec![b'a'; 20000], ..options() }).is_err());
    }
}
