//! A new, empty image.

use crate::footer::{Footer, Kind, MAX_SECTORS};
use crate::header::{Header, HEADER_BYTES, UNUSED};
use crate::{FormatError, Parent, SECTOR};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a block of a new image: "Default is 0x00200000".
pub const DEFAULT_BLOCK: u32 = 2 << 20;
/// Byte offset of the block allocation table of an image without a parent: behind footer and header, as QEMU has it.
pub const BAT_OFFSET: u64 = SECTOR + HEADER_BYTES as u64;
/// The data of a block that this library allocates begins at a multiple of this many bytes, if the block is much
/// longer: so does tapdisk ("ensure data region of segment begins on page boundary"), and file systems share whole
/// pages only.
pub const DATA_ALIGNMENT: u64 = 4096;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, rounded up to sectors.
    pub virtual_size: u64,
    /// The new unique ID.
    pub unique_id: [u8; 16],
    /// Seconds since the year 2000.
    pub time: u32,
    /// All of the disk from the beginning.
    pub fixed: bool,
    /// Bytes of a block: a power of two.
    pub block_size: u32,
    /// The parent of a differencing image.
    pub parent: Option<Parent>,
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
/// When it cannot be as large as that, or a name cannot stand in a VHD.
pub fn create(options: &CreateOptions) -> Result<NewImage, FormatError> {
    let size = options.virtual_size.div_ceil(SECTOR).saturating_mul(SECTOR);
    if size == 0 || size / SECTOR > MAX_SECTORS {
        let text = format!("a VHD of {} bytes cannot be made: it holds 512 bytes to 2040 GiB", options.virtual_size);
        return Err(FormatError::unsupported(text));
    }
    let footer = |kind| Footer::new(kind, size, options.unique_id, options.time);
    if options.fixed {
        if options.parent.is_some() {
            return Err(FormatError::unsupported("a fixed VHD cannot have a backing file: leave out subformat=fixed"));
        }
        let regions = vec![(size, footer(Kind::Fixed).encode().to_vec())];
        return Ok(NewImage { length: size + SECTOR, regions });
    }
    let kind = if options.parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
    let entries = u32::try_from(size.div_ceil(u64::from(options.block_size.max(1)))).unwrap_or(u32::MAX);
    // Names stand in front of the table: programs that know nothing of them allocate behind it.
    let names = options.parent.as_ref().map_or(Ok(Vec::new()), |parent| parent.names(true))?;
    let (mut at, mut locators, mut regions) = (BAT_OFFSET, Vec::new(), Vec::new());
    for name in names {
        locators.push(name.at(at));
        at += name.room();
        regions.push((locators[locators.len() - 1].offset, name.bytes));
    }
    let mut header = Header::new(at, entries, options.block_size);
    if let Some(parent) = &options.parent {
        header = header.with_parent(parent, &locators);
    }
    let header = Header::parse(&header.encode())?;
    let end = at + header.table_bytes();
    let footer = footer(kind).encode().to_vec();
    let table = vec![UNUSED.to_be_bytes()[0]; usize::try_from(header.table_bytes()).unwrap_or(0)];
    regions.extend([(0, footer.clone()), (SECTOR, header.encode().to_vec()), (at, table), (end, footer)]);
    regions.sort_by_key(|(offset, _)| *offset);
    Ok(NewImage { length: end + SECTOR, regions })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{codes, Footers, Locator};
    use alloc::string::String;

    fn options() -> CreateOptions {
        CreateOptions {
            virtual_size: (50 << 20) + 1,
            unique_id: [7; 16],
            time: 0,
            fixed: false,
            block_size: DEFAULT_BLOCK,
            parent: None,
        }
    }

    fn bytes(image: &NewImage) -> Vec<u8> {
        let mut file = vec![0; usize::try_from(image.length).unwrap()];
        for (offset, bytes) in &image.regions {
            let at = usize::try_from(*offset).unwrap();
            assert!(file[at..at + bytes.len()].iter().all(|&b| b == 0), "regions do not overlap");
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    }

    fn footers(file: &[u8]) -> Footers {
        let at = file.len() - 512;
        let choice = Footers::choose(file.first_chunk().unwrap(), file.last_chunk().unwrap(), at as u64);
        choice.unwrap().unwrap()
    }

    #[test]
    fn what_is_made_can_be_read() {
        let path = String::from("sub/bäse %.vhd");
        let child = CreateOptions { parent: Some(Parent { id: [9; 16], path }), ..options() };
        for options in [options(), child] {
            let file = bytes(&create(&options).unwrap());
            let found = footers(&file);
            assert!(found.are_whole());
            assert_eq!(found.footer.virtual_size(), (50 << 20) + 512);
            let header = Header::parse(file[512..1536].first_chunk().unwrap()).unwrap();
            let at = usize::try_from(header.table_offset()).unwrap();
            assert_eq!((header.entries(), at + 512 + 512), (26, file.len()));
            assert!(file[at..at + 512].iter().all(|&byte| byte == 0xff));
            let Some(parent) = options.parent else { continue };
            assert_eq!(header.parent_id(), parent.id);
            assert_eq!(String::from_utf16(&header.parent_name().collect::<Vec<_>>()).unwrap(), "bäse %.vhd");
            let read = |locator: Locator| {
                let at = usize::try_from(locator.offset).unwrap();
                file[at..at + locator.length as usize].to_vec()
            };
            let names: Vec<_> = header.locators().map(|locator| (locator.code, read(locator))).collect();
            let wide: Vec<u8> = ".\\sub\\bäse %.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect();
            let url = b"file://./sub/b%C3%A4se%20%25.vhd".to_vec();
            assert_eq!(names, [(codes::W2RU, wide), (codes::MACX, url)]);
        }
    }

    #[test]
    fn fixed_disks_are_their_bytes_and_a_footer() {
        let image = create(&CreateOptions { fixed: true, virtual_size: 4096, ..options() }).unwrap();
        let file = bytes(&image);
        assert_eq!((file.len(), footers(&file).footer.kind()), (4608, Kind::Fixed));
    }

    #[test]
    fn what_cannot_be_made() {
        let parent = |path: &str| Some(Parent { id: [9; 16], path: path.into() });
        for refused in [
            CreateOptions { virtual_size: 0, ..options() },
            CreateOptions { virtual_size: (2040 << 30) + 1, ..options() },
            CreateOptions { virtual_size: u64::MAX, ..options() },
            CreateOptions { block_size: 3000, ..options() },
            CreateOptions { parent: parent("a\\b"), ..options() },
            CreateOptions { parent: parent("a/"), ..options() },
            CreateOptions { parent: parent(&"a/".repeat(40000)), ..options() },
            CreateOptions { fixed: true, parent: parent("a"), ..options() },
        ] {
            assert!(create(&refused).is_err(), "{refused:?}");
        }
        assert!(create(&CreateOptions { virtual_size: 2040 << 30, ..options() }).is_ok());
    }
}
