//! Header extensions ("Header extensions" in the specification): type, length, data, padded to 8 bytes.

use crate::error::{HeaderError, HeaderErrorKind};
use alloc::format;
use alloc::vec::Vec;

/// The types of extension that the specification names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtensionKind {
    /// 0xE2792ACA: backing file format name.
    BackingFormat,
    /// 0x6803f857: feature name table.
    FeatureNames,
    /// 0x23852875: bitmaps.
    Bitmaps,
    /// 0x0537be77: full disk encryption header pointer.
    Encryption,
    /// 0x44415441: external data file name.
    DataFile,
    /// Any other; to be kept as it is.
    Unknown(u32),
}

impl ExtensionKind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_u32(value: u32) -> Self {
        match value {
            0xE279_2ACA => Self::BackingFormat,
            0x6803_F857 => Self::FeatureNames,
            0x2385_2875 => Self::Bitmaps,
            0x0537_BE77 => Self::Encryption,
            0x4441_5441 => Self::DataFile,
            other => Self::Unknown(other),
        }
    }

    /// The number of the kind.
    #[must_use]
    pub const fn to_u32(self) -> u32 {
        match self {
            Self::BackingFormat => 0xE279_2ACA,
            Self::FeatureNames => 0x6803_F857,
            Self::Bitmaps => 0x2385_2875,
            Self::Encryption => 0x0537_BE77,
            Self::DataFile => 0x4441_5441,
            Self::Unknown(value) => value,
        }
    }
}

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub kind: ExtensionKind,
    /// Byte offset of the extension (its type field) in the file.
    pub offset: u64,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

impl Extension {
    /// Parse the extensions in `area` (the bytes of the first cluster from the end of the header to the
    /// backing file name or the end of the cluster), which begins at file offset `start`.
    pub(crate) fn parse_all(area: &[u8], start: u64) -> Result<Vec<Self>, HeaderError> {
        let mut found = Vec::new();
        let mut at = 0usize;
        // A header may end with the area itself instead of an end marker.
        while let Some(head) = area.get(at..at + 8) {
            let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            if kind == 0 {
                return Ok(found);
            }
            let offset = start.saturating_add(at as u64);
            let data = usize::try_from(length)
                .ok()
                .and_then(|l| (at + 8).checked_add(l))
                .and_then(|end| area.get(at + 8..end));
            let Some(data) = data else {
                return Err(HeaderError::new(
                    HeaderErrorKind::Corrupt,
                    offset,
                    format!("header extension 0x{kind:08x} of {length} bytes does not fit into the first cluster"),
                ));
            };
            found.push(Self { kind: ExtensionKind::from_u32(kind), offset, data: data.to_vec() });
            at += 8 + data.len().div_ceil(8) * 8;
        }
        Ok(found)
    }
}

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub class: u8,
    /// Bit number within the class.
    pub bit: u8,
    /// Name as it stands in the image, without padding. Hostile.
    pub name: Vec<u8>,
}

impl FeatureName {
    /// Parse the data of a feature name table: entries of 48 bytes; a rest is ignored.
    #[must_use]
    pub fn parse_table(data: &[u8]) -> Vec<Self> {
        data.chunks_exact(48)
            .map(|entry| Self {
                class: entry[0],
                bit: entry[1],
                name: entry[2..].iter().copied().take_while(|&b| b != 0).collect(),
            })
            .collect()
    }
}

/// The bitmaps extension ("Bitmaps extension" in the specification).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// Number of bitmaps, at least 1 in a valid image.
    pub count: u32,
    /// Size of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Byte offset of the bitmap directory in the file.
    pub directory_offset: u64,
}

impl Bitmaps {
    /// Parse the data of a bitmaps extension; `None` if it is too short.
    #[must_use]
    pub fn parse(data: &[u8]) -> Option<Self> {
        let count = data.get(0..4)?;
        let size = data.get(8..16)?;
        let offset = data.get(16..24)?;
        Some(Self {
            count: u32::from_be_bytes(count.try_into().ok()?),
            directory_size: u64::from_be_bytes(size.try_into().ok()?),
            directory_offset: u64::from_be_bytes(offset.try_into().ok()?),
        })
    }
}
