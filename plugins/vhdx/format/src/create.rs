//! A new, empty image.

use crate::metadata::{encode, items, OF_DISK, OF_FILE};
use crate::{
    ids, Entry, FormatError, Guid, Header, Layout, Locator, Parent, Region, RegionTable, ALIGNMENT, HEADER_OFFSETS,
    MAX_SIZE, REGION_TABLE_OFFSETS, SIGNATURE,
};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a block of a new image without a parent: what Windows takes (`New-VHD`).
pub const DEFAULT_BLOCK: u32 = 32 << 20;
/// Bytes of a block of a new image with a parent: what Windows takes (`New-VHD`).
pub const DEFAULT_CHILD_BLOCK: u32 = 2 << 20;

const LOG_LENGTH: u32 = 1 << 20;
const METADATA_LENGTH: u32 = 1 << 20;
const CREATOR: &str = "instar";
/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, rounded up to logical sectors.
    pub virtual_size: u64,
    /// Bytes of a block: a power of two from 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector: u32,
    /// All blocks are there from the beginning.
    pub fixed: bool,
    /// The identity of the file's bytes.
    pub file_write: Guid,
    /// The identity of what a guest reads.
    pub data_write: Guid,
    /// The identity of the disk; a child has its parent's (2.6.1.2).
    pub disk_id: Guid,
    /// The parent of a differencing image.
    pub parent: Option<Parent>,
}

/// The bytes of a new file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Length of the file in bytes, whole MiB.
    pub length: u64,
    /// The bytes that are not zero, with their offset.
    pub regions: Vec<(u64, Vec<u8>)>,
}

/// The bytes of an empty disk.
///
/// # Errors
/// When it cannot be as large as that, with sectors or blocks of that size, or a name cannot stand in a VHDX.
pub fn create(options: &CreateOptions) -> Result<NewImage, FormatError> {
    let refuse = |text: String| Err(FormatError::unsupported(0, text));
    let sector = u64::from(options.logical_sector);
    if [options.logical_sector, options.physical_sector].iter().any(|bytes| ![512, 4096].contains(bytes)) {
        return refuse("the size of a sector has to be 512 or 4096".into());
    }
    let block_size = u64::from(options.block_size);
    if !block_size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block_size) {
        return refuse(format!("a block of {block_size} bytes is no power of two from 1 MiB to 256 MiB"));
    }
    let size = options.virtual_size.div_ceil(sector).saturating_mul(sector);
    if size == 0 || size > MAX_SIZE {
        return refuse(format!("a VHDX of {} bytes cannot be made: it holds a sector to 64 TiB", options.virtual_size));
    }
    if options.fixed && options.parent.is_some() {
        return refuse("a fixed VHDX cannot have a backing file: leave out subformat=fixed".into());
    }
    let layout = Layout { block_size, sector, size, has_parent: options.parent.is_some() };
    let table_length = (layout.entries() * 8).next_multiple_of(ALIGNMENT);
    let metadata = metadata(options, size)?;
    let log_offset = ALIGNMENT;
    let metadata_offset = log_offset + u64::from(LOG_LENGTH);
    let bat_offset = metadata_offset + u64::from(METADATA_LENGTH);
    let end = bat_offset + table_length;
    let region = |id, offset, length| Region { id, offset, length, required: true };
    let table_length = u32::try_from(table_length).unwrap_or(u32::MAX);
    let regions =
        vec![region(ids::BAT, bat_offset, table_length), region(ids::METADATA, metadata_offset, METADATA_LENGTH)];
    let regions = RegionTable { regions, both: true }.encode();
    let mut mark = SIGNATURE.to_vec();
    mark.extend(CREATOR.encode_utf16().flat_map(u16::to_le_bytes));
    let header = |sequence| Header::new(sequence, options.file_write, options.data_write, log_offset, LOG_LENGTH);
    let mut image = NewImage {
        length: end,
        regions: vec![
            (0, mark),
            (HEADER_OFFSETS[0], header(1).encode().to_vec()),
            (HEADER_OFFSETS[1], header(2).encode().to_vec()),
            (REGION_TABLE_OFFSETS[0], regions.clone()),
            (REGION_TABLE_OFFSETS[1], regions),
            (metadata_offset, metadata),
        ],
    };
    if options.fixed {
        let mut table = vec![0; usize::try_from(layout.entries() * 8).unwrap_or(0)];
        for block in 0..layout.blocks() {
            let at = usize::try_from(layout.payload_entry(block) * 8).unwrap_or(usize::MAX);
            crate::put(&mut table, at, &Entry::present(end + block * block_size, false).0.to_le_bytes());
        }
        image.regions.push((bat_offset, table));
        image.length = end + layout.blocks() * block_size;
    }
    Ok(image)
}

/// The metadata region.
fn metadata(options: &CreateOptions, size: u64) -> Result<Vec<u8>, FormatError> {
    let kind = u32::from(options.fixed) | u32::from(options.parent.is_some()) << 1;
    let parameters = [options.block_size.to_le_bytes(), kind.to_le_bytes()].concat();
    let mut new = vec![
        (items::FILE_PARAMETERS, OF_FILE, 0x10000, parameters),
        (items::SIZE, OF_DISK, 0x10008, size.to_le_bytes().to_vec()),
        (items::LOGICAL_SECTOR, OF_DISK, 0x10010, options.logical_sector.to_le_bytes().to_vec()),
        (items::PHYSICAL_SECTOR, OF_DISK, 0x10014, options.physical_sector.to_le_bytes().to_vec()),
        (items::DISK_ID, OF_DISK, 0x10018, options.disk_id.0.to_vec()),
    ];
    if let Some(parent) = &options.parent {
        // At a page, so that both linkages lie in it.
        new.push((items::PARENT_LOCATOR, OF_FILE, 0x11000, Locator::of_parent(parent)?));
    }
    Ok(encode(&new))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{keys, Opened, Record};

    fn options() -> CreateOptions {
        CreateOptions {
            virtual_size: 10 << 20,
            block_size: 1 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            fixed: false,
            file_write: Guid([1; 16]),
            data_write: Guid([2; 16]),
            disk_id: Guid([3; 16]),
            parent: None,
        }
    }

    fn open(options: &CreateOptions) -> Opened {
        let image = create(options).unwrap();
        let mut file = vec![0; usize::try_from(image.length).unwrap()];
        for (offset, bytes) in &image.regions {
            crate::put(&mut file, usize::try_from(*offset).unwrap(), bytes);
        }
        let read = &mut |offset: u64, buffer: &mut [u8]| {
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&file[at..at + buffer.len()]);
            Ok::<(), ()>(())
        };
        Opened::load(image.length, read).unwrap()
    }

    #[test]
    fn what_is_made_is_read() {
        let opened = open(&options());
        let metadata = &opened.metadata;
        assert_eq!((metadata.size, metadata.block_size, metadata.disk_id), (10 << 20, 1 << 20, Guid([3; 16])));
        assert!(!metadata.has_parent && !metadata.leave_allocated && opened.replay.is_none() && opened.regions.both);
        assert_eq!((opened.headers.current.data_write, opened.headers.slot), (Guid([2; 16]), 1));
        let fixed =
            open(&CreateOptions { fixed: true, logical_sector: 4096, virtual_size: (10 << 20) + 1, ..options() });
        assert!(fixed.metadata.leave_allocated);
        assert_eq!((fixed.metadata.size, fixed.file_length), ((10 << 20) + 4096, (4 + 11) << 20));
        let path = format!("{}base.vhdx", "a/".repeat(2000));
        let parent = Some(Parent { data_write: Guid([9; 16]), path });
        let child = open(&CreateOptions { parent, ..options() });
        let lineage = child.lineage().unwrap();
        assert_eq!((lineage.parent(), lineage.announced), (Guid([9; 16]), None));
        assert!(matches!(lineage.record, Record::Locator { .. }));
        let recorded = child.locator.unwrap().value(keys::RELATIVE).unwrap().text().unwrap();
        assert!(recorded.starts_with(r".\a\a\") && recorded.ends_with(r"\base.vhdx"));
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let refused = |options: CreateOptions| create(&options).unwrap_err().text;
        assert!(refused(CreateOptions { virtual_size: 0, ..options() }).contains("64 TiB"));
        assert!(refused(CreateOptions { virtual_size: MAX_SIZE + 1, ..options() }).contains("64 TiB"));
        assert!(refused(CreateOptions { block_size: 3 << 20, ..options() }).contains("power of two"));
        assert!(refused(CreateOptions { block_size: 1 << 29, ..options() }).contains("power of two"));
        assert!(refused(CreateOptions { logical_sector: 1024, ..options() }).contains("512 or 4096"));
        for path in ["", "a/", "a\\b", "a\0b", &"x".repeat(32_001)] {
            let parent = Some(Parent { data_write: Guid([9; 16]), path: path.into() });
            assert!(refused(CreateOptions { parent, ..options() }).contains("cannot stand"), "{path:?}");
        }
        let parent = Some(Parent { data_write: Guid([9; 16]), path: "base".into() });
        assert!(refused(CreateOptions { parent, fixed: true, ..options() }).contains("fixed"));
        assert!(create(&CreateOptions { virtual_size: MAX_SIZE, block_size: 256 << 20, ..options() }).is_ok());
    }
}
