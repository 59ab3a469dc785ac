//! Entries of L1 tables, L2 tables and the refcount table ("Cluster mapping", "Refcount table").

use crate::types::{ClusterSize, HostOffset};
use crate::Version;
use core::fmt;

/// Bit 63 of an L1 or standard L2 entry: the cluster's refcount is exactly 1.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bits 9 to 55: the host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 0 of a standard L2 entry (version 3): the cluster reads as zeroes.
const ZERO: u64 = 1;

/// What is wrong with a table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryError {
    /// Bits are set that must be zero.
    Reserved(u64),
    /// The offset is not the start of a cluster.
    Unaligned(HostOffset),
    /// The COPIED flag claims a cluster, but there is none.
    OwnsNothing,
    /// The COPIED flag claims a compressed cluster, which others may share.
    OwnsCompressed,
    /// A compressed cluster in an image whose clusters stand in another file.
    CompressedOutside,
    /// The bitmap of subclusters contradicts itself, or the offset.
    Subclusters(u64),
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved(bits) => write!(f, "has reserved bits set (0x{bits:x})"),
            Self::Unaligned(offset) => write!(f, "points to offset {offset}, which is not the start of a cluster"),
            Self::OwnsNothing => write!(f, "claims a cluster (COPIED) but points to none"),
            Self::Subclusters(bitmap) => write!(f, "has an impossible bitmap of subclusters (0x{bitmap:x})"),
            Self::OwnsCompressed => write!(f, "claims a compressed cluster (COPIED)"),
            Self::CompressedOutside => write!(f, "is of a compressed cluster, which an external data file cannot hold"),
        }
    }
}

pub(crate) fn aligned(size: ClusterSize, offset: u64) -> Result<HostOffset, EntryError> {
    if size.offset_in(offset) == 0 {
        Ok(HostOffset(offset))
    } else {
        Err(EntryError::Unaligned(HostOffset(offset)))
    }
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: everything below is unallocated.
    Unallocated,
    /// An L2 table.
    Table {
        /// Where the table begins.
        offset: HostOffset,
        /// [`COPIED`] is set.
        copied: bool,
    },
}

impl L1Entry {
    /// Decode an entry.
    ///
    /// # Errors
    /// [`EntryError`] for reserved bits (0 to 8 and 56 to 62), offsets within a cluster, and COPIED without an offset.
    pub fn decode(raw: u64, size: ClusterSize) -> Result<Self, EntryError> {
        let reserved = raw & !(OFFSET_MASK | COPIED);
        if reserved != 0 {
            return Err(EntryError::Reserved(reserved));
        }
        let offset = aligned(size, raw & OFFSET_MASK)?;
        match (offset.0, raw & COPIED != 0) {
            (0, false) => Ok(Self::Unallocated),
            (0, true) => Err(EntryError::OwnsNothing),
            (_, copied) => Ok(Self::Table { offset, copied }),
        }
    }

    /// Encode an entry.
    #[must_use]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table { offset, copied } => offset.0 | if copied { COPIED } else { 0 },
        }
    }
}

/// A standard entry of an L2 table (images without extended L2 entries).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Reads from the backing file.
    Unallocated,
    /// Reads as zeroes; `offset` is a cluster that is kept for it, whose bytes are stale.
    Zero {
        /// The preallocated cluster, if there is one.
        offset: Option<HostOffset>,
        /// [`COPIED`] is set.
        copied: bool,
    },
    /// A cluster of plain data.
    Data {
        /// Where the cluster begins.
        offset: HostOffset,
        /// [`COPIED`] is set.
        copied: bool,
    },
    /// A compressed cluster: `descriptor` is for [`CompressedRange`](crate::CompressedRange).
    Compressed {
        /// Bits 0 to 61 of the entry.
        descriptor: u64,
    },
}

impl L2Entry {
    /// Decode an entry.
    ///
    /// # Errors
    /// [`EntryError`] for reserved bits (1 to 8, 56 to 61, and bit 0 in version 2), offsets within a cluster, and
    /// COPIED without an offset or with a compressed cluster.
    pub fn decode(raw: u64, size: ClusterSize, version: Version) -> Result<Self, EntryError> {
        if raw & COMPRESSED != 0 {
            if raw & COPIED != 0 {
                return Err(EntryError::OwnsCompressed);
            }
            return Ok(Self::Compressed { descriptor: raw & !COMPRESSED });
        }
        let known = OFFSET_MASK | COPIED | if version == Version::V3 { ZERO } else { 0 };
        if raw & !known != 0 {
            return Err(EntryError::Reserved(raw & !known));
        }
        let offset = aligned(size, raw & OFFSET_MASK)?;
        let copied = raw & COPIED != 0;
        Ok(match (raw & ZERO != 0, offset.0) {
            (true, 0) => Self::Zero { offset: None, copied },
            (true, _) => Self::Zero { offset: Some(offset), copied },
            (false, 0) if copied => return Err(EntryError::OwnsNothing),
            (false, 0) => Self::Unallocated,
            (false, _) => Self::Data { offset, copied },
        })
    }

    /// Decode an entry of an image with an external data file. There, offset 0 with COPIED is the first cluster of the disk
    /// ("Standard Cluster Descriptor").
    ///
    /// # Errors
    /// As [`decode`](Self::decode), and for compressed clusters.
    pub fn decode_outside(raw: u64, size: ClusterSize, version: Version) -> Result<Self, EntryError> {
        match Self::decode(raw, size, version) {
            Err(EntryError::OwnsNothing) => Ok(Self::Data { offset: HostOffset(0), copied: true }),
            Ok(Self::Compressed { .. }) | Err(EntryError::OwnsCompressed) => Err(EntryError::CompressedOutside),
            decoded => decoded,
        }
    }

    /// Encode an entry.
    #[must_use]
    pub const fn encode(self) -> u64 {
        const fn flag(copied: bool) -> u64 {
            if copied {
                COPIED
            } else {
                0
            }
        }
        match self {
            Self::Unallocated => 0,
            Self::Zero { offset: Some(offset), copied } => offset.0 | flag(copied) | ZERO,
            Self::Zero { offset: None, copied } => flag(copied) | ZERO,
            Self::Data { offset, copied } => offset.0 | flag(copied),
            Self::Compressed { descriptor } => descriptor | COMPRESSED,
        }
    }

    /// The plain host cluster that the entry refers to, with its COPIED flag.
    #[must_use]
    pub const fn host(self) -> Option<(HostOffset, bool)> {
        match self {
            Self::Data { offset, copied } | Self::Zero { offset: Some(offset), copied } => Some((offset, copied)),
            _ => None,
        }
    }
}

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefcountTableEntry {
    /// No refcount block: everything it would describe has refcount 0.
    Unallocated,
    /// A refcount block.
    Block(HostOffset),
}

impl RefcountTableEntry {
    /// Decode an entry.
    ///
    /// # Errors
    /// [`EntryError`] for reserved bits (0 to 8) and offsets within a cluster.
    pub fn decode(raw: u64, size: ClusterSize) -> Result<Self, EntryError> {
        if raw & 0x1ff != 0 {
            return Err(EntryError::Reserved(raw & 0x1ff));
        }
        let offset = aligned(size, raw)?;
        Ok(if offset.0 == 0 { Self::Unallocated } else { Self::Block(offset) })
    }
}
