//! The metadata region: a table of items, and the items that are known (2.6).

use crate::{u16_at, u32_at, u64_at, FormatError, Guid, LoadError, Read, Region, MAX_SIZE};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// GUIDs of the known items (2.6.2).
pub mod items {
    use crate::Guid;

    /// Block size, and what kind of disk it is.
    pub const FILE_PARAMETERS: Guid =
        Guid::of(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
    /// Bytes of the disk.
    pub const SIZE: Guid = Guid::of(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
    /// Which disk it is.
    pub const DISK_ID: Guid = Guid::of(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
    /// Bytes of a logical sector.
    pub const LOGICAL_SECTOR: Guid =
        Guid::of(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
    /// Bytes of a physical sector.
    pub const PHYSICAL_SECTOR: Guid =
        Guid::of(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
    /// Which image is the parent, and where.
    pub const PARENT_LOCATOR: Guid =
        Guid::of(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);
}

/// Bytes of the table, behind which the items stand.
pub const TABLE_BYTES: usize = 64 << 10;

const SIGNATURE: [u8; 8] = *b"metadata";
const MOST: u16 = 2047;
const ENTRY_BYTES: usize = 32;
const ITEM_IN_ENTRY: usize = 16;
const PAGE: u64 = 4096;
const MOST_BYTES: u32 = 1 << 20;
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;

/// A known item: its place in the metadata region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Byte offset in the region.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

impl Item {
    /// The bytes of the table that give its place.
    #[must_use]
    pub fn encode(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        crate::put(&mut bytes, 0, &self.offset.to_le_bytes());
        crate::put(&mut bytes, 4, &self.length.to_le_bytes());
        bytes
    }
}

/// What the metadata of a disk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a payload block: a power of two from 1 MiB to 256 MiB.
    pub block_size: u64,
    /// All blocks are to stay allocated: a fixed disk.
    pub leave_allocated: bool,
    /// What is not in this file shows from a parent.
    pub has_parent: bool,
    /// Bytes of the disk: whole logical sectors, at most 64 TiB.
    pub size: u64,
    /// Where that stands.
    pub size_item: Item,
    /// Which disk it is; a child has its parent's.
    pub disk_id: Guid,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector: u64,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector: u64,
    /// The parent locator, of an image with a parent.
    pub locator: Option<Item>,
    /// An item that belongs to the disk and that nobody here knows: a merge would have to carry it to the parent (2.6.1.2).
    pub foreign: Option<Guid>,
}

#[derive(Clone, Copy, Debug)]
struct TableEntry {
    id: Guid,
    item: Item,
    flags: u32,
}

/// Take the table apart.
fn table(bytes: &[u8], region: &Region) -> Result<Vec<TableEntry>, FormatError> {
    let corrupt = |text| Err(FormatError::corrupt(region.offset, text));
    let count = u16_at(bytes, 10);
    if bytes.get(..8) != Some(&SIGNATURE) {
        return corrupt(format!("the metadata table at byte {} has no signature", region.offset));
    }
    if count > MOST {
        return corrupt(format!("the metadata table has {count} entries, more than the {MOST} that there may be"));
    }
    let entry = |index: u16| {
        let at = ENTRY_BYTES + usize::from(index) * ENTRY_BYTES;
        let place = at + ITEM_IN_ENTRY;
        let item = Item { offset: u32_at(bytes, place), length: u32_at(bytes, place + 4) };
        TableEntry { id: Guid::at(bytes, at), item, flags: u32_at(bytes, at + 24) }
    };
    let entries: Vec<TableEntry> = (0..count).map(entry).collect();
    let mut places = Vec::new();
    for TableEntry { id, item, .. } in &entries {
        let end = u64::from(item.offset) + u64::from(item.length);
        if (*item == Item { offset: 0, length: 0 }) {
            continue;
        }
        if (item.offset as usize) < TABLE_BYTES || item.length > MOST_BYTES || end > u64::from(region.length) {
            return corrupt(format!(
                "metadata item {id} of {} bytes at byte {} does not lie in the metadata region",
                item.length, item.offset
            ));
        }
        places.push(u64::from(item.offset)..end);
    }
    places.sort_unstable_by_key(|place| (place.start, place.end));
    if let Some(pair) = places.windows(2).find(|pair| pair[0].end > pair[1].start) {
        return corrupt(format!("two metadata items overlap at byte {} of the region", pair[1].start));
    }
    let mut keys: Vec<(Guid, u32)> = entries.iter().map(|entry| (entry.id, entry.flags & IS_USER)).collect();
    keys.sort_unstable();
    if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
        return corrupt(format!("there are two metadata items {}", pair[0].0));
    }
    Ok(entries)
}

impl Metadata {
    /// Read the metadata of a region; `read` reads from a byte of the file.
    ///
    /// # Errors
    /// For an item that is missing, not known although it is required, or makes no sense; those of `read`.
    pub fn load<E>(region: &Region, read: Read<'_, E>) -> Result<Self, LoadError<E>> {
        let mut bytes = vec![0; TABLE_BYTES];
        read(region.offset, &mut bytes).map_err(LoadError::Read)?;
        let entries = table(&bytes, region)?;
        let known = [
            items::FILE_PARAMETERS,
            items::SIZE,
            items::DISK_ID,
            items::LOGICAL_SECTOR,
            items::PHYSICAL_SECTOR,
            items::PARENT_LOCATOR,
        ];
        let is_known = |entry: &TableEntry| entry.flags & IS_USER == 0 && known.contains(&entry.id);
        if let Some(entry) = entries.iter().find(|entry| !is_known(entry) && entry.flags & IS_REQUIRED != 0) {
            let text = format!("the metadata item {} is required to be known, and is not", entry.id);
            return Err(FormatError::unsupported(region.offset, text).into());
        }
        let foreign = entries.iter().find(|entry| !is_known(entry) && entry.flags & IS_VIRTUAL_DISK != 0);
        let find = |id| entries.iter().find(|entry| is_known(entry) && entry.id == id).map(|entry| entry.item);
        let mut item = |id, what: &str, bytes: &mut [u8]| {
            let found = find(id).filter(|item| item.length as usize >= bytes.len());
            let found = found.ok_or_else(|| {
                FormatError::corrupt(region.offset, format!("the metadata item {what} is missing or too short"))
            })?;
            read(region.offset.saturating_add(found.offset.into()), bytes).map_err(LoadError::Read)?;
            Ok::<Item, LoadError<E>>(found)
        };
        let (mut eight, mut sixteen) = ([0; 8], [0; 16]);
        item(items::FILE_PARAMETERS, "File Parameters", &mut eight)?;
        let (block_size, kind) = (u64::from(u32_at(&eight, 0)), u32_at(&eight, 4));
        let size_item = item(items::SIZE, "Virtual Disk Size", &mut eight)?;
        let size = u64_at(&eight, 0);
        item(items::DISK_ID, "Virtual Disk ID", &mut sixteen)?;
        item(items::LOGICAL_SECTOR, "Logical Sector Size", &mut eight[..4])?;
        let logical_sector = u64::from(u32_at(&eight, 0));
        item(items::PHYSICAL_SECTOR, "Physical Sector Size", &mut eight[..4])?;
        let metadata = Self {
            block_size,
            leave_allocated: kind & 1 != 0,
            has_parent: kind & 2 != 0,
            size,
            size_item,
            disk_id: Guid(sixteen),
            logical_sector,
            physical_sector: u64::from(u32_at(&eight, 0)),
            locator: find(items::PARENT_LOCATOR),
            foreign: foreign.map(|entry| entry.id),
        };
        metadata.verify(kind, region.offset)?;
        Ok(metadata)
    }

    /// Where the parent locator can stand with `length` bytes, by the table of the region: at the first page that has room for
    /// it, so that its linkages are not torn. With it comes the byte of the region at which the table says so, as
    /// [`Item::encode`] has it. `None` if there is no room, or no locator.
    ///
    /// # Errors
    /// For a table that makes no sense.
    pub fn place_locator(bytes: &[u8], region: &Region, length: u32) -> Result<Option<(Item, u32)>, FormatError> {
        let entries = table(bytes, region)?;
        let is_locator = |entry: &TableEntry| entry.flags & IS_USER == 0 && entry.id == items::PARENT_LOCATOR;
        let Some(index) = entries.iter().position(is_locator) else { return Ok(None) };
        let others = entries.iter().filter(|entry| !is_locator(entry)).map(|entry| entry.item);
        let mut others: Vec<Item> = others.filter(|item| item.length > 0).collect();
        others.sort_unstable_by_key(|item| item.offset);
        let mut at = TABLE_BYTES as u64;
        for other in others {
            if at + u64::from(length) > u64::from(other.offset) {
                at = at.max(u64::from(other.offset) + u64::from(other.length)).next_multiple_of(PAGE);
            }
        }
        let offset = u32::try_from(at).ok().filter(|_| at + u64::from(length) <= region.length.into());
        let entry = u32::try_from(ENTRY_BYTES * (1 + index) + ITEM_IN_ENTRY).unwrap_or(0);
        Ok(offset.filter(|_| length <= MOST_BYTES).map(|offset| (Item { offset, length }, entry)))
    }

    fn verify(&self, kind: u32, offset: u64) -> Result<(), FormatError> {
        let corrupt = |text: String| Err(FormatError::corrupt(offset, text));
        let sector = |bytes| bytes == 512 || bytes == 4096;
        if !self.block_size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&self.block_size) {
            return corrupt(format!(
                "BlockSize is {}, which is no power of two from 1 MiB to 256 MiB",
                self.block_size
            ));
        }
        if kind > 3 {
            return corrupt(format!("File Parameters have reserved bits: {kind:#x}"));
        }
        if !sector(self.logical_sector) || !sector(self.physical_sector) {
            return corrupt(format!(
                "the sizes of a sector are {} and {}: either has to be 512 or 4096",
                self.logical_sector, self.physical_sector
            ));
        }
        if self.size == 0 || self.size > MAX_SIZE || !self.size.is_multiple_of(self.logical_sector) {
            return corrupt(format!(
                "Virtual Disk Size is {}, which is not from one logical sector of {} bytes to 64 TiB in whole ones",
                self.size, self.logical_sector
            ));
        }
        if self.has_parent && self.locator.is_none_or(|locator| locator.length == 0) {
            return corrupt("the disk has a parent, and no parent locator".into());
        }
        Ok(())
    }
}

/// The bytes of a table and of items behind it, for a new image: the GUID, the flags and the bytes of each. Each begins at the
/// offset that is given, in bytes from the beginning of the region.
pub(crate) fn encode(new: &[(Guid, u32, u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = vec![0; TABLE_BYTES];
    crate::put(&mut bytes, 0, &SIGNATURE);
    crate::put(&mut bytes, 10, &u16::try_from(new.len()).unwrap_or(0).to_le_bytes());
    for (index, (id, flags, offset, item)) in new.iter().enumerate() {
        let at = ENTRY_BYTES + index * ENTRY_BYTES;
        crate::put(&mut bytes, at, &id.0);
        let place = Item { offset: *offset, length: u32::try_from(item.len()).unwrap_or(0) };
        crate::put(&mut bytes, at + ITEM_IN_ENTRY, &place.encode());
        crate::put(&mut bytes, at + 24, &flags.to_le_bytes());
        let place = *offset as usize;
        bytes.resize(bytes.len().max(place.saturating_add(item.len())), 0);
        crate::put(&mut bytes, place, item);
    }
    bytes
}

/// Flags of the items that a child has from its parent.
pub(crate) const OF_DISK: u32 = IS_VIRTUAL_DISK | IS_REQUIRED;
/// Flags of the items that each file has for itself.
pub(crate) const OF_FILE: u32 = IS_REQUIRED;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const REGION: Region = Region { id: crate::ids::METADATA, offset: 2 << 20, length: 1 << 20, required: true };

    type New = Vec<(Guid, u32, u32, Vec<u8>)>;

    fn new() -> New {
        let parameters = [(1u32 << 20).to_le_bytes(), 0u32.to_le_bytes()].concat();
        vec![
            (items::FILE_PARAMETERS, OF_FILE, 65536, parameters),
            (items::SIZE, OF_DISK, 65544, (10u64 << 20).to_le_bytes().to_vec()),
            (items::DISK_ID, OF_DISK, 65552, vec![7; 16]),
            (items::LOGICAL_SECTOR, OF_DISK, 65568, 512u32.to_le_bytes().to_vec()),
            (items::PHYSICAL_SECTOR, OF_DISK, 65572, 4096u32.to_le_bytes().to_vec()),
        ]
    }

    fn load(new: &New) -> Result<Metadata, FormatError> {
        let bytes = encode(new);
        let read = &mut |offset: u64, buffer: &mut [u8]| {
            let at = usize::try_from(offset - REGION.offset).unwrap();
            buffer.copy_from_slice(&bytes[at..at + buffer.len()]);
            Ok::<(), ()>(())
        };
        Metadata::load(&REGION, read).map_err(|error| match error {
            LoadError::Format(error) => error,
            LoadError::Read(()) => unreachable!(),
        })
    }

    fn refused(change: impl FnOnce(&mut New)) -> alloc::string::String {
        let mut items = new();
        change(&mut items);
        load(&items).unwrap_err().text
    }

    #[test]
    fn what_is_made_is_read() {
        let metadata = load(&new()).unwrap();
        assert_eq!((metadata.block_size, metadata.size, metadata.disk_id), (1 << 20, 10 << 20, Guid([7; 16])));
        assert_eq!((metadata.logical_sector, metadata.physical_sector), (512, 4096));
        assert_eq!((metadata.size_item, metadata.has_parent), (Item { offset: 65544, length: 8 }, false));
        let mut more = new();
        more.push((Guid([9; 16]), IS_USER | IS_VIRTUAL_DISK, 70000, vec![1]));
        more.push((Guid([8; 16]), 0, 0, vec![]));
        // The user's items may have any GUID.
        more.push((items::SIZE, IS_USER, 70001, vec![1]));
        assert_eq!(load(&more).unwrap(), Metadata { foreign: Some(Guid([9; 16])), ..metadata });
    }

    #[test]
    fn a_locator_goes_to_the_first_page_with_room() {
        let with = |place: u32, length: usize, others: &[(u32, usize)]| {
            let mut items = new();
            items.push((items::PARENT_LOCATOR, OF_FILE, place, vec![1; length]));
            for (number, (place, length)) in (9..).zip(others) {
                items.push((Guid([number; 16]), IS_USER, *place, vec![1; *length]));
            }
            encode(&items)
        };
        let place = |bytes: &[u8], length| Metadata::place_locator(bytes, &REGION, length).unwrap();
        let item = |offset, length| Some((Item { offset, length }, 32 + 5 * 32 + 16));
        assert_eq!(place(&with(0x11000, 300, &[]), 5000), item(0x11000, 5000), "longer, in its place");
        assert_eq!(place(&with(0x10100, 300, &[]), 200), item(0x11000, 200), "not at a page before");
        let between = with(0x11000, 300, &[(0x12000, 8), (0x13001, 10)]);
        assert_eq!(place(&between, 4096), item(0x11000, 4096));
        assert_eq!(place(&between, 4097), item(0x14000, 4097));
        assert_eq!(place(&between, (1 << 20) - 0x14000), item(0x14000, (1 << 20) - 0x14000));
        assert_eq!(place(&between, (1 << 20) - 0x14000 + 1), None);
        assert_eq!(place(&encode(&new()), 10), None, "no locator");
        let (moved, entry) = place(&between, 4097).unwrap();
        let mut bytes = between.clone();
        crate::put(&mut bytes, entry as usize, &moved.encode());
        assert_eq!(table(&bytes, &REGION).unwrap()[5].item, moved);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(refused(|new| drop(new.remove(2))).contains("Virtual Disk ID is missing"));
        assert!(refused(|new| new[1].3.truncate(7)).contains("Virtual Disk Size is missing or too short"));
        assert!(refused(|new| new.push((Guid([9; 16]), IS_REQUIRED, 70000, vec![1]))).contains("required to be known"));
        assert!(refused(|new| new.push((Guid([9; 16]), 0, 65550, vec![1]))).contains("overlap"));
        assert!(refused(|new| new.push((Guid([9; 16]), 0, 4096, vec![1]))).contains("does not lie"));
        assert!(refused(|new| new.push((Guid([9; 16]), 0, (1 << 20) - 1, vec![1, 2]))).contains("does not lie"));
        assert!(refused(|new| new.push((items::SIZE, 0, 70000, vec![1]))).contains("two metadata items"));
        for (at, value, words) in [
            (0, (3u32 << 20).to_le_bytes(), "BlockSize is 3145728"),
            (0, (512u32 << 20).to_le_bytes(), "BlockSize"),
            (0, (1u32 << 19).to_le_bytes(), "BlockSize"),
            (4, 2u32.to_le_bytes(), "no parent locator"),
            (4, 8u32.to_le_bytes(), "reserved bits"),
        ] {
            assert!(refused(|new| crate::put(&mut new[0].3, at, &value)).contains(words), "{words}");
        }
        for size in [0, 100, MAX_SIZE + 512] {
            assert!(refused(|new| new[1].3 = size.to_le_bytes().to_vec()).contains("Virtual Disk Size is"));
        }
        assert!(refused(|new| new[3].3[0] = 1).contains("sizes of a sector are 513 and 4096"));
        assert!(refused(|new| new[4].3 = vec![0; 4]).contains("512 and 0"));
    }
}
