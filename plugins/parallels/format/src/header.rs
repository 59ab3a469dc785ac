//! The header (the specification, "Header"), and what QEMU demands of it (`parallels_open`).

use crate::{FormatError, ENTRY_BYTES, SECTOR};
use alloc::format;

/// Bytes of the header. The BAT follows.
pub const HEADER_BYTES: usize = 64;
/// The most sectors of a cluster that QEMU takes (`INT32_MAX / 513`): clusters of almost 2 GiB.
pub const MOST_TRACKS: u32 = i32::MAX.cast_unsigned() / 513;
/// The most entries of a BAT that QEMU takes (`INT_MAX / sizeof(uint32_t)`).
pub const MOST_ENTRIES: u32 = i32::MAX.cast_unsigned() / 4;

const VERSION: u32 = 2;
/// `in_use` of an image that is open for writing, or was not closed.
const OPEN: u32 = 0x746f_6e59;
/// `in_use` of an image that was closed.
const CLOSED: u32 = 0x312e_3276;
/// The bit of `flags` that says that the image is empty.
const EMPTY: u32 = 1;

/// Byte offsets of the fields.
pub mod field {
    /// The format's version, 4 bytes: 2.
    pub const VERSION: usize = 16;
    /// Sectors of a cluster, 4 bytes.
    pub const TRACKS: usize = 28;
    /// Entries of the BAT, 4 bytes: the first of the fields that are ever changed.
    pub const ENTRIES: usize = 32;
    /// Sectors of the disk, 8 bytes, of which older images use 4.
    pub const SECTORS: usize = 36;
    /// Whether the image was closed, 4 bytes.
    pub const IN_USE: usize = 44;
    /// The sector in which the data begins, 4 bytes.
    pub const DATA_OFF: usize = 48;
    /// Flags, 4 bytes.
    pub const FLAGS: usize = 52;
    /// The sector in which the format extension begins, 8 bytes; 0 without one.
    pub const EXT_OFF: usize = 56;
}

/// What entries of the BAT count, which the magic word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Sectors: `WithoutFreeSpace`.
    Sectors,
    /// Clusters: `WithouFreSpacExt`.
    Clusters,
}

impl Variant {
    /// The magic word.
    #[must_use]
    pub const fn magic(self) -> &'static [u8; 16] {
        match self {
            Self::Sectors => b"WithoutFreeSpace",
            Self::Clusters => b"WithouFreSpacExt",
        }
    }

    /// What the first 16 bytes of a file say.
    #[must_use]
    pub fn of(magic: &[u8]) -> Option<Self> {
        [Self::Sectors, Self::Clusters].into_iter().find(|variant| magic == variant.magic())
    }
}

/// Whether the image was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// Somebody has it open for writing, or did not close it.
    Open,
    /// It was closed.
    Closed,
    /// It was closed by a program that knows no format extension: QEMU, for one.
    ClosedByOld,
}

/// A header whose numbers make sense by themselves; what they say of the file is not verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What entries count.
    pub variant: Variant,
    /// Sectors of a cluster, from 1 to [`MOST_TRACKS`].
    pub tracks: u32,
    /// Entries of the BAT, at least as many as the disk has clusters.
    pub entries: u32,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Whether it was closed.
    pub in_use: InUse,
    /// The sector in which the data begins, behind the BAT; 0 in older images, where it begins right there.
    pub data_off: u32,
    /// All flags.
    pub flags: u32,
    /// The sector in which the format extension begins; 0 without one.
    pub ext_off: u64,
}

/// The little-endian number in `length` bytes.
fn number(bytes: &[u8; HEADER_BYTES], at: usize, length: usize) -> u64 {
    bytes.iter().skip(at).take(length).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl Header {
    /// Parse a header.
    ///
    /// # Errors
    /// One clause that names the field.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let variant = Variant::of(bytes.get(..16).unwrap_or_default());
        let variant = variant.ok_or_else(|| FormatError::corrupt("the magic word is not one of Parallels"))?;
        let small = |at: usize| u32::try_from(number(bytes, at, 4)).unwrap_or(u32::MAX);
        let version = small(field::VERSION);
        if version != VERSION {
            return Err(FormatError::unsupported(format!("version {version} is not version 2")));
        }
        let (tracks, entries) = (small(field::TRACKS), small(field::ENTRIES));
        if tracks == 0 || tracks > MOST_TRACKS {
            return Err(FormatError::corrupt(format!("a cluster has {tracks} sectors, not from 1 to {MOST_TRACKS}")));
        }
        if entries > MOST_ENTRIES {
            return Err(FormatError::corrupt(format!("the BAT has {entries} entries, more than {MOST_ENTRIES}")));
        }
        let in_use = match small(field::IN_USE) {
            0 => InUse::ClosedByOld,
            OPEN => InUse::Open,
            CLOSED => InUse::Closed,
            other => {
                return Err(FormatError::corrupt(format!(
                    "in_use is {other:#x}, which says neither that the image is open nor that it was closed"
                )))
            }
        };
        // The high half of the size counts for the one magic word only.
        let width = if variant == Variant::Sectors { 4 } else { 8 };
        let header = Self {
            variant,
            tracks,
            entries,
            sectors: number(bytes, field::SECTORS, width),
            in_use,
            data_off: small(field::DATA_OFF),
            flags: small(field::FLAGS),
            ext_off: number(bytes, field::EXT_OFF, 8),
        };
        header.verified()
    }

    fn verified(self) -> Result<Self, FormatError> {
        let Self { entries, sectors, data_off, .. } = self;
        if sectors > i64::MAX as u64 / SECTOR {
            return Err(FormatError::corrupt(format!("the disk has {sectors} sectors, more than any")));
        }
        let needed = self.disk_clusters();
        if u64::from(entries) < needed {
            let text = format!("the BAT has {entries} entries, and the disk {needed} clusters");
            return Err(FormatError::corrupt(text));
        }
        let calculated = data_off == 0 && self.variant == Variant::Sectors;
        if !calculated && u64::from(data_off) * SECTOR < self.bat_end() {
            let text = format!("data_off is sector {data_off}, in front of the end of the BAT");
            return Err(FormatError::corrupt(text));
        }
        Ok(self)
    }

    /// Bytes of the disk.
    #[must_use]
    pub const fn virtual_size(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Bytes of a cluster: any number of sectors.
    #[must_use]
    pub const fn cluster_bytes(&self) -> u64 {
        self.tracks as u64 * SECTOR
    }

    /// The largest power of two that divides a cluster, in bytes: what the image is said to have as the size of its clusters.
    #[must_use]
    pub const fn unit(&self) -> u64 {
        1 << self.cluster_bytes().trailing_zeros()
    }

    /// Clusters of the disk, the last of which may reach past its end. The BAT may have more entries than that.
    #[must_use]
    pub const fn disk_clusters(&self) -> u64 {
        self.sectors.div_ceil(self.tracks as u64)
    }

    /// Where the entry of a cluster stands in the file.
    #[must_use]
    pub const fn entry_place(cluster: u64) -> u64 {
        (HEADER_BYTES as u64).saturating_add(cluster.saturating_mul(ENTRY_BYTES))
    }

    /// Where the BAT ends in the file.
    #[must_use]
    pub const fn bat_end(&self) -> u64 {
        Self::entry_place(self.entries as u64)
    }

    /// Where the data begins in the file, in bytes (the specification, `data_off`).
    #[must_use]
    pub const fn data_start(&self) -> u64 {
        if self.data_off == 0 {
            self.bat_end().next_multiple_of(SECTOR)
        } else {
            self.data_off as u64 * SECTOR
        }
    }

    /// Whether the data begins where the specification lets it. In an image whose entries count clusters it has to be the start
    /// of one. QEMU breaks that itself where a cluster's size is no power of two (`ROUND_UP` in `parallels_test_data_off`):
    /// the clusters of such an image can be told, and QEMU reads them, but nobody could say where the next one may go.
    #[must_use]
    pub const fn data_is_aligned(&self) -> bool {
        matches!(self.variant, Variant::Sectors) || self.data_off.is_multiple_of(self.tracks)
    }

    /// The lowest byte of the file at which a cluster may begin.
    #[must_use]
    pub const fn floor(&self) -> u64 {
        if self.data_is_aligned() {
            self.data_start()
        } else {
            self.bat_end()
        }
    }

    /// Where a cluster lies in the file whose entry is this number, which is not 0.
    #[must_use]
    pub const fn offset(&self, entry: u32) -> u64 {
        let sectors = match self.variant {
            Variant::Sectors => entry as u64,
            Variant::Clusters => entry as u64 * self.tracks as u64,
        };
        sectors * SECTOR
    }

    /// The entry for a cluster that begins at this byte of the file; `None` beyond those that entries reach.
    #[must_use]
    pub fn entry(&self, offset: u64) -> Option<u32> {
        let unit = match self.variant {
            Variant::Sectors => SECTOR,
            Variant::Clusters => self.cluster_bytes(),
        };
        u32::try_from(offset / unit).ok().filter(|&entry| entry != 0 && self.offset(entry) == offset)
    }

    /// The number of a cluster of the file that begins at this byte. `None` for one that no cluster may begin at: in front of
    /// the data, or not at a whole number of clusters behind its start.
    #[must_use]
    pub const fn slot(&self, offset: u64) -> Option<u64> {
        let base = match self.variant {
            Variant::Sectors => self.data_start(),
            Variant::Clusters => 0,
        };
        if offset < self.floor() || !(offset - base).is_multiple_of(self.cluster_bytes()) {
            return None;
        }
        Some((offset - base) / self.cluster_bytes())
    }

    /// Whether the image says that it holds nothing, whatever its BAT says.
    #[must_use]
    pub const fn says_empty(&self) -> bool {
        self.flags & EMPTY != 0
    }

    /// The same image as one that is open for writing, which it is before anything of it changes: it no longer says that it is
    /// empty, and has no format extension any more, because what that says of the image's content would be wrong.
    #[must_use]
    pub const fn opened(self) -> Self {
        Self { in_use: InUse::Open, flags: self.flags & !EMPTY, ext_off: 0, ..self }
    }

    /// The bytes from [`field::ENTRIES`] to the header's end: one write within the first sector, so that a power loss leaves
    /// them as they were, or as they are.
    #[must_use]
    pub fn update(&self) -> [u8; HEADER_BYTES - field::ENTRIES] {
        let in_use = match self.in_use {
            InUse::Open => OPEN,
            InUse::Closed => CLOSED,
            InUse::ClosedByOld => 0,
        };
        let mut bytes = [0; HEADER_BYTES - field::ENTRIES];
        let at = |field: usize| field - field::ENTRIES;
        bytes[..4].copy_from_slice(&self.entries.to_le_bytes());
        bytes[at(field::SECTORS)..at(field::IN_USE)].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[at(field::IN_USE)..at(field::DATA_OFF)].copy_from_slice(&in_use.to_le_bytes());
        bytes[at(field::DATA_OFF)..at(field::FLAGS)].copy_from_slice(&self.data_off.to_le_bytes());
        bytes[at(field::FLAGS)..at(field::EXT_OFF)].copy_from_slice(&self.flags.to_le_bytes());
        bytes[at(field::EXT_OFF)..].copy_from_slice(&self.ext_off.to_le_bytes());
        bytes
    }
}
