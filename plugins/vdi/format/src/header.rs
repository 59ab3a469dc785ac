//! The header (`VDIPREHEADER`, `VDIHEADER1` and `VDIHEADER1PLUS` in `VDICore.h`), little-endian.

use crate::{FormatError, Uuid, ENTRY_BYTES, SECTOR, UUID_BYTES};
use alloc::format;
use core::ops::Range;

/// Bytes of the file that the header has to itself: neither map nor data begins before them.
pub const HEADER_BYTES: usize = 512;
/// `VDI_IMAGE_SIGNATURE`, as bytes …
pub const SIGNATURE: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
/// … behind 64 bytes of text that is "for eyes only".
pub const SIGNATURE_OFFSET: usize = 64;
/// `VDI_IMAGE_VERSION`: 1.1, the only one that VirtualBox has written since 2007.
pub(crate) const VERSION: u32 = 0x0001_0001;
/// `cbHeader` of a header with the geometry at its end (`VDIHEADER1PLUS`).
pub(crate) const PLUS_BYTES: u32 = 400;
/// Bytes of [`Header::identity`].
pub const IDENTITY_BYTES: usize = 2 * UUID_BYTES;

/// `cbHeader` of a header without it (`VDIHEADER1`), the shortest that is taken (`vdiValidateHeader`).
const LEAST_BYTES: u32 = 384;
/// Bits of `fFlags` that VirtualBox takes: `VD_VDI_IMAGE_FLAGS_MASK`, shifted as `getImageFlags` does. The first asks for
/// zeroes in new blocks, the others repeat the type.
const KNOWN_FLAGS: u32 = 0x301;
/// The bit of [`field::UNUSED`] that says that the parent is yet to get `uuidParentModify`.
///
/// The field was the BIOS's translation of geometry, a small number, and is "now unused" (`u32Dummy`): VirtualBox writes
/// back whatever it has read there, and QEMU does not look at it.
const ANNOUNCED: u32 = 1 << 31;

/// Where fields stand, in bytes from the begin of the file. All lie in the first sector: one write replaces any of them.
pub mod field {
    /// `cbHeader`.
    pub const HEADER_SIZE: usize = 72;
    /// `u32Type`.
    pub const TYPE: usize = 76;
    /// `fFlags`.
    pub const FLAGS: usize = 80;
    /// `szComment`, 256 bytes.
    pub const COMMENT: usize = 84;
    /// `offBlocks`.
    pub const MAP_OFFSET: usize = 340;
    /// `offData`.
    pub const DATA_OFFSET: usize = 344;
    /// `LegacyGeometry.cbSector`.
    pub const SECTOR_SIZE: usize = 360;
    /// `u32Dummy`.
    pub const UNUSED: usize = 364;
    /// `cbDisk`.
    pub const DISK_SIZE: usize = 368;
    /// `cbBlock`.
    pub const BLOCK_SIZE: usize = 376;
    /// `cbBlockExtra`.
    pub const BLOCK_EXTRA: usize = 380;
    /// `cBlocks`.
    pub const BLOCKS: usize = 384;
    /// `cBlocksAllocated`.
    pub const ALLOCATED: usize = 388;
    /// `uuidCreate`.
    pub const CREATE: usize = 392;
    /// `uuidModify`.
    pub const MODIFY: usize = 408;
    /// `uuidLinkage`.
    pub const LINK: usize = 424;
    /// `uuidParentModify`.
    pub const PARENT_MODIFY: usize = 440;
    /// `LCHSGeometry`: cylinders, heads, sectors, and the size of a sector. Only in a header of 400 bytes and more.
    pub const GEOMETRY: usize = 456;
}

/// What kind of image it is (`VDIIMAGETYPE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageType {
    /// A base that takes space as it is written.
    Dynamic = 1,
    /// A base whose blocks are all there from the beginning.
    Static = 2,
    /// What is written may be thrown away: treated as a differencing image, as VirtualBox does.
    Undo = 3,
    /// The changes to another image.
    Differencing = 4,
}

/// The fields of a header that are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The bytes of the first sector, as they stand in the file or are to stand there.
    pub bytes: [u8; HEADER_BYTES],
    /// `u32Type`.
    pub image_type: ImageType,
    /// `offBlocks`: byte offset of the map, a multiple of [`SECTOR`].
    pub map_offset: u64,
    /// `offData`: byte offset of the first block, behind the map.
    pub data_offset: u64,
    /// `cbDisk`: bytes of the disk, which need not be whole sectors.
    pub disk_size: u64,
    /// `cbBlock`: a power of two, from [`SECTOR`] on.
    pub block_size: u64,
    /// `cbBlockExtra`: bytes in front of each block's data, 0 or a power of two.
    pub block_extra: u64,
    /// `cBlocks`: entries of the map; as many as the disk has blocks, or more.
    pub blocks: u32,
    /// `cBlocksAllocated`: where the next block goes.
    pub allocated: u32,
    /// `uuidCreate`: which image it is.
    pub create: Uuid,
    /// `uuidModify`: which content it has.
    pub modify: Uuid,
    /// `uuidLinkage`: the parent's `uuidCreate`, null without a parent.
    pub link: Uuid,
    /// `uuidParentModify`: the parent's `uuidModify`.
    pub parent_modify: Uuid,
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn uuid_at(bytes: &[u8; HEADER_BYTES], at: usize) -> Uuid {
    let mut uuid = [0; UUID_BYTES];
    uuid.copy_from_slice(&bytes[at..at + UUID_BYTES]);
    Uuid(uuid)
}

impl Header {
    /// Take a header apart and look at its values, as `vdiValidatePreHeader` and `vdiValidateHeader` do, and as QEMU does
    /// where it asks for more: map and data begin at whole sectors.
    ///
    /// `allocated` is taken as it is: what it should be, only the map says.
    ///
    /// # Errors
    /// A clause about the field that cannot be taken.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[SIGNATURE_OFFSET..SIGNATURE_OFFSET + 4] != SIGNATURE {
            return Err(FormatError::corrupt("the signature is not that of a VDI"));
        }
        let version = u32_at(bytes, 68);
        if version != VERSION {
            let text = format!("version {}.{} of the header is not supported", version >> 16, version & 0xffff);
            return Err(FormatError::unsupported(text));
        }
        let (header_size, flags) = (u32_at(bytes, field::HEADER_SIZE), u32_at(bytes, field::FLAGS));
        let sizes = (u32_at(bytes, field::DISK_SIZE), u32_at(bytes, field::DISK_SIZE + 4));
        let number = u32_at(bytes, field::TYPE);
        let header = Self {
            bytes: *bytes,
            image_type: ImageType::from_number(number)?,
            map_offset: u32_at(bytes, field::MAP_OFFSET).into(),
            data_offset: u32_at(bytes, field::DATA_OFFSET).into(),
            disk_size: u64::from(sizes.1) << 32 | u64::from(sizes.0),
            block_size: u32_at(bytes, field::BLOCK_SIZE).into(),
            block_extra: u32_at(bytes, field::BLOCK_EXTRA).into(),
            blocks: u32_at(bytes, field::BLOCKS),
            allocated: u32_at(bytes, field::ALLOCATED),
            create: uuid_at(bytes, field::CREATE),
            modify: uuid_at(bytes, field::MODIFY),
            link: uuid_at(bytes, field::LINK),
            parent_modify: uuid_at(bytes, field::PARENT_MODIFY),
        };
        let Self { map_offset, data_offset, block_size, block_extra, blocks, .. } = header;
        let sector = if header_size >= PLUS_BYTES { u32_at(bytes, field::GEOMETRY + 12) } else { 512 };
        if header_size < LEAST_BYTES {
            return Err(FormatError::corrupt(format!("cbHeader is {header_size}, and {LEAST_BYTES} at least")));
        }
        if flags & !KNOWN_FLAGS != 0 {
            return Err(FormatError::unsupported(format!("fFlags is {flags:#x}, which has bits that are not known")));
        }
        // Some writers leave it zero (FATtools); VirtualBox does not take their images.
        if sector != 512 && sector != 0 || u32_at(bytes, field::SECTOR_SIZE) != 512 {
            return Err(FormatError::unsupported("sectors of another size than 512 bytes are not supported"));
        }
        if !block_size.is_power_of_two() || block_size < SECTOR {
            let text = format!("cbBlock is {block_size}, and has to be a power of two from {SECTOR} on");
            return Err(FormatError::corrupt(text));
        }
        if block_extra != 0 && !block_extra.is_power_of_two() {
            let text = format!("cbBlockExtra is {block_extra}, and has to be 0 or a power of two");
            return Err(FormatError::corrupt(text));
        }
        let fits = u128::from(block_size) * u128::from(blocks) >= u128::from(header.disk_size);
        if header.disk_size == 0 || blocks == 0 || !fits || header.disk_size > i64::MAX as u64 - SECTOR {
            let text = format!("a disk of {} bytes in {blocks} blocks of {block_size} is none", header.disk_size);
            return Err(FormatError::corrupt(text));
        }
        for (name, offset) in [("offBlocks", map_offset), ("offData", data_offset)] {
            if offset < HEADER_BYTES as u64 || !offset.is_multiple_of(SECTOR) {
                let text = format!("{name} is {offset}, and has to be a multiple of 512 behind the header");
                return Err(FormatError::corrupt(text));
            }
        }
        if data_offset < map_offset + header.map_bytes() {
            let text = format!("offData is {data_offset}, within the map of {blocks} entries at {map_offset}");
            return Err(FormatError::corrupt(text));
        }
        for (name, uuid) in [("uuidCreate", header.create), ("uuidModify", header.modify)] {
            if uuid.is_null() {
                return Err(FormatError::corrupt(format!("{name} is null")));
            }
        }
        Ok(header)
    }

    /// Size of the disk in bytes: whole sectors. QEMU rounds an odd size up, as is done here, VirtualBox down.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.disk_size.div_ceil(SECTOR) * SECTOR
    }

    /// Bytes of the map.
    #[must_use]
    pub fn map_bytes(&self) -> u64 {
        u64::from(self.blocks) * ENTRY_BYTES
    }

    /// Bytes from one block of the data area to the next.
    #[must_use]
    pub fn stride(&self) -> u64 {
        self.block_size + self.block_extra
    }

    /// Where the data of a slot begins in the file, in bytes.
    #[must_use]
    pub fn slot_offset(&self, slot: u32) -> u64 {
        self.data_offset + u64::from(slot) * self.stride() + self.block_extra
    }

    /// Whether the image records a parent. VirtualBox judges by the link, and not by the type.
    #[must_use]
    pub fn has_parent(&self) -> bool {
        !self.link.is_null()
    }

    /// What tells the image and its content from all others: `uuidCreate`, `uuidModify`.
    #[must_use]
    pub fn identity(&self) -> [u8; IDENTITY_BYTES] {
        pair(self.create, self.modify)
    }

    /// The identity that is recorded of the parent.
    #[must_use]
    pub fn parent_identity(&self) -> Option<[u8; IDENTITY_BYTES]> {
        self.has_parent().then(|| pair(self.link, self.parent_modify))
    }

    /// Whether the parent is yet to get `uuidParentModify`, because a commit into it was interrupted.
    #[must_use]
    pub fn parent_announced(&self) -> bool {
        u32_at(&self.bytes, field::UNUSED) & ANNOUNCED != 0
    }

    /// The comment, up to its first zero byte.
    #[must_use]
    pub fn comment(&self) -> &[u8] {
        let comment = &self.bytes[field::COMMENT..field::MAP_OFFSET];
        comment.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    /// Why nothing can be written into the disk; `None` if it can.
    #[must_use]
    pub fn why_not_written(&self) -> Option<&'static str> {
        if self.block_extra != 0 {
            return Some(
                "its blocks have extra bytes (cbBlockExtra), which QEMU takes for data: copy it into a new image",
            );
        }
        let odd = !self.disk_size.is_multiple_of(SECTOR);
        odd.then_some(
            "its size is no multiple of 512 bytes, which VirtualBox rounds down and QEMU up: copy it into a new image",
        )
    }

    /// Why the image makes no sense as a part of a chain; `None` if it does.
    #[must_use]
    pub fn contradiction(&self) -> Option<&'static str> {
        match (self.image_type, self.has_parent()) {
            (ImageType::Differencing | ImageType::Undo, false) => {
                Some("it is a differencing image and does not say of which one (uuidLinkage is null)")
            }
            (ImageType::Static, true) => Some("it is a static image, and has a parent (uuidLinkage)"),
            _ => None,
        }
    }

    /// Put another parent's state into [`Header::bytes`]; `announced` if the parent is yet to get it. Returns the bytes that
    /// have to be written for that.
    pub fn record_parent(&mut self, modify: Uuid, announced: bool) -> Range<usize> {
        let unused = u32_at(&self.bytes, field::UNUSED) & !ANNOUNCED;
        let unused = unused | if announced { ANNOUNCED } else { 0 };
        self.bytes[field::UNUSED..field::UNUSED + 4].copy_from_slice(&unused.to_le_bytes());
        self.bytes[field::PARENT_MODIFY..field::GEOMETRY].copy_from_slice(&modify.0);
        self.parent_modify = modify;
        field::UNUSED..field::GEOMETRY
    }

    /// Put another parent, or the null UUIDs for none, into [`Header::bytes`], with the type that goes with that
    /// (`VDI_IMAGE_TYPE_DIFF`, `VDI_IMAGE_TYPE_NORMAL`).
    pub fn set_parent(&mut self, link: Uuid, modify: Uuid) {
        self.record_parent(modify, false);
        self.link = link;
        self.bytes[field::LINK..field::PARENT_MODIFY].copy_from_slice(&link.0);
        let image_type = match (self.image_type, link.is_null()) {
            (ImageType::Dynamic, false) => ImageType::Differencing,
            (ImageType::Differencing | ImageType::Undo, true) => ImageType::Dynamic,
            (image_type, _) => image_type,
        };
        self.image_type = image_type;
        self.bytes[field::TYPE..field::FLAGS].copy_from_slice(&image_type.number().to_le_bytes());
    }

    /// Put the fields that this plugin changes of an image that is written to into [`Header::bytes`]: places, sizes and
    /// numbers of blocks, `uuidModify`. A geometry for a disk of another size would be wrong: it becomes "not calculated"
    /// (`vdiInitHeader`). Returns the bytes that have to be written for that.
    pub fn update(&mut self) -> Range<usize> {
        let resized = self.bytes[field::DISK_SIZE..field::BLOCK_SIZE] != self.disk_size.to_le_bytes();
        let narrow = |offset: u64| u32::try_from(offset).unwrap_or(u32::MAX);
        for (at, number) in [
            (field::MAP_OFFSET, narrow(self.map_offset)),
            (field::DATA_OFFSET, narrow(self.data_offset)),
            (field::BLOCKS, self.blocks),
            (field::ALLOCATED, self.allocated),
        ] {
            self.bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        self.bytes[field::DISK_SIZE..field::BLOCK_SIZE].copy_from_slice(&self.disk_size.to_le_bytes());
        self.bytes[field::MODIFY..field::LINK].copy_from_slice(&self.modify.0);
        let mut end = field::LINK;
        if resized && u32_at(&self.bytes, field::HEADER_SIZE) >= PLUS_BYTES {
            end = field::GEOMETRY + 12;
            self.bytes[field::GEOMETRY..end].fill(0);
        }
        field::MAP_OFFSET..end
    }
}

fn pair(image: Uuid, content: Uuid) -> [u8; IDENTITY_BYTES] {
    let mut identity = [0; IDENTITY_BYTES];
    identity[..UUID_BYTES].copy_from_slice(&image.0);
    identity[UUID_BYTES..].copy_from_slice(&content.0);
    identity
}

impl ImageType {
    fn from_number(number: u32) -> Result<Self, FormatError> {
        Ok(match number {
            1 => Self::Dynamic,
            2 => Self::Static,
            3 => Self::Undo,
            4 => Self::Differencing,
            _ => return Err(FormatError::unsupported(format!("image type {number} is not known"))),
        })
    }

    /// Its number, `u32Type`.
    const fn number(self) -> u32 {
        match self {
            Self::Dynamic => 1,
            Self::Static => 2,
            Self::Undo => 3,
            Self::Differencing => 4,
        }
    }

    /// What people call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Static => "static",
            Self::Undo => "undo",
            Self::Differencing => "differencing",
        }
    }
}
