//! The header of a hosted sparse extent ("Hosted sparse extents", structure `SparseExtentHeader`), little-endian.

use crate::{FormatError, Layout, SECTOR, TABLE_ENTRIES, TABLE_ENTRIES_FIELD};
use alloc::format;

/// `"KDMV"`, the first four bytes.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// Bytes of the header.
pub const HEADER_BYTES: usize = 512;
/// Most entries of a grain directory that are worked with, so that what is known of the tables fits into the guest's memory:
/// enough for 8 TiB with grains of 64 KiB. (The entries of grain tables reach 2 TiB.)
pub const MAX_DIRECTORY: u64 = 1 << 18;
/// Longest descriptor that is read, in bytes.
pub const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;

/// The byte of the header that is not 0 while the extent is open for writing (`uncleanShutdown`).
pub const UNCLEAN_SHUTDOWN: usize = 72;

/// Largest grain in sectors: 64 MiB.
const MAX_GRAIN: u64 = 1 << 17;
/// `gdOffset` of a header whose directory is at the end (`GD_AT_END`): the footer has the real one.
const DIRECTORY_AT_END: u64 = u64::MAX;
/// The bytes that a transfer as text would change: `singleEndLineChar` and those after it.
const END_OF_LINE: [u8; 4] = *b"\n \r\n";

/// Bits of [`Header::flags`].
pub mod flags {
    /// The end-of-line bytes are valid.
    pub const NEWLINE_TEST: u32 = 1;
    /// There is a second, redundant grain directory with tables of its own.
    pub const REDUNDANT: u32 = 2;
    /// Entry 1 of a grain table means a grain of zeroes.
    pub const ZEROED_GRAINS: u32 = 4;
    /// Grains are compressed.
    pub const COMPRESSED: u32 = 1 << 16;
    /// There are markers in front of compressed grains and metadata.
    pub const MARKERS: u32 = 1 << 17;
}

/// The fields of a header that are used. Offsets and sizes in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `version`: 1 to 3.
    pub version: u32,
    /// `flags`: bits of [`flags`].
    pub flags: u32,
    /// `capacity`: size of the disk.
    pub capacity: u64,
    /// `grainSize`: a power of two.
    pub grain: u64,
    /// `descriptorOffset`: 0 if there is no descriptor in this file.
    pub descriptor_offset: u64,
    /// `descriptorSize`.
    pub descriptor_size: u64,
    /// `rgdOffset`: the redundant grain directory, valid with [`flags::REDUNDANT`].
    pub redundant_directory: u64,
    /// `gdOffset`: the grain directory.
    pub directory: u64,
    /// `overHead`: where grains may begin.
    pub overhead: u64,
}

/// What the header of a hosted extent says of a disk that has grown. All in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderGrowth {
    /// Size of the extent.
    pub capacity: u64,
    /// Where the grain directory begins.
    pub directory: u64,
    /// Where the second one begins, if there is one.
    pub redundant_directory: Option<u64>,
}

impl HeaderGrowth {
    /// The bytes of a header, which says that, and everything else as before.
    #[must_use]
    pub fn apply(&self, header: &[u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let mut bytes = *header;
        let fields = [(12, Some(self.capacity)), (48, self.redundant_directory), (56, Some(self.directory))];
        for (at, value) in fields {
            value.into_iter().for_each(|value| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()));
        }
        bytes
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

impl Header {
    /// Take a header apart and look at its values. One whose directory is at the end [needs its
    /// footer](Self::directory_is_at_the_end).
    ///
    /// # Errors
    /// A clause about the field that cannot be taken.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..4] != MAGIC {
            return Err(FormatError::corrupt("the magic is not that of a sparse extent"));
        }
        let header = Self {
            version: u32_at(bytes, 4),
            flags: u32_at(bytes, 8),
            capacity: u64_at(bytes, 12),
            grain: u64_at(bytes, 20),
            descriptor_offset: u64_at(bytes, 28),
            descriptor_size: u64_at(bytes, 36),
            redundant_directory: u64_at(bytes, 48),
            directory: u64_at(bytes, 56),
            overhead: u64_at(bytes, 64),
        };
        if !(1..=3).contains(&header.version) {
            return Err(FormatError::unsupported(format!("version {} of the header is not known", header.version)));
        }
        if header.has(flags::NEWLINE_TEST) && bytes[73..77] != END_OF_LINE {
            return Err(FormatError::corrupt(
                "the end-of-line bytes of the header were changed, by a transfer as text",
            ));
        }
        if !header.grain.is_power_of_two() || header.grain > MAX_GRAIN {
            let text = format!("grainSize is {} sectors, and has to be a power of two up to {MAX_GRAIN}", header.grain);
            return Err(FormatError::corrupt(text));
        }
        let entries = u32_at(bytes, 44);
        if entries != TABLE_ENTRIES_FIELD {
            let text = format!("numGTEsPerGT is {entries}: only grain tables of {TABLE_ENTRIES} entries are known");
            return Err(FormatError::unsupported(text));
        }
        if header.capacity == 0 || header.capacity > i64::MAX as u64 / SECTOR {
            return Err(FormatError::unsupported(format!("the capacity of {} sectors is no disk's", header.capacity)));
        }
        if header.directory_entries() > MAX_DIRECTORY {
            let text = format!(
                "a grain directory of {} entries is longer than the {MAX_DIRECTORY} that are supported",
                header.directory_entries()
            );
            return Err(FormatError::unsupported(text));
        }
        let algorithm = u16::from_le_bytes([bytes[77], bytes[78]]);
        match (header.has(flags::COMPRESSED), header.has(flags::MARKERS), algorithm) {
            (false, _, _) | (true, true, 1) => Ok(header),
            (true, false, 1) => Err(FormatError::unsupported("compressed grains without markers are not supported")),
            (true, ..) => Err(FormatError::unsupported(format!("compression algorithm {algorithm} is not known"))),
        }
    }

    /// Whether the grain directory's place is in the footer.
    #[must_use]
    pub fn directory_is_at_the_end(&self) -> bool {
        self.directory == DIRECTORY_AT_END
    }

    /// Whether a bit of [`flags`] is set.
    #[must_use]
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.capacity * SECTOR
    }

    /// Bytes of a grain.
    #[must_use]
    pub fn grain_bytes(&self) -> u64 {
        self.grain * SECTOR
    }

    /// Entries of the grain directory, one for each grain table.
    #[must_use]
    pub fn directory_entries(&self) -> u64 {
        self.layout().directory_entries()
    }

    /// Where everything is.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let layout = Layout {
            capacity: self.capacity,
            grain: self.grain,
            table_entries: TABLE_ENTRIES,
            header: 1,
            descriptor_offset: self.descriptor_offset,
            descriptor_size: self.descriptor_size,
            directory: self.directory,
            directory_sectors: 0,
            redundant_directory: self.has(flags::REDUNDANT).then_some(self.redundant_directory),
            overhead: self.overhead,
            zeroed_grains: self.has(flags::ZEROED_GRAINS),
            compressed: self.has(flags::COMPRESSED),
            next_free: None,
        };
        // The header does not give the directory's length.
        Layout { directory_sectors: (layout.directory_entries() * 4).div_ceil(SECTOR), ..layout }
    }

    /// The bytes of a header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[44..48].copy_from_slice(&TABLE_ENTRIES_FIELD.to_le_bytes());
        let fields = [
            (12, self.capacity),
            (20, self.grain),
            (28, self.descriptor_offset),
            (36, self.descriptor_size),
            (48, self.redundant_directory),
            (56, self.directory),
            (64, self.overhead),
        ];
        for (at, value) in fields {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[73..77].copy_from_slice(&END_OF_LINE);
        bytes[77..79].copy_from_slice(&u16::from(self.has(flags::COMPRESSED)).to_le_bytes());
        bytes
    }
}
