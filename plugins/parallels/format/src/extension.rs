//! The format extension (the specification, "Format Extension"): one cluster with sections, most of all dirty bitmaps.

use crate::{FormatError, SECTOR};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use md5::{Digest, Md5};

/// The first 8 bytes of a format extension.
pub const EXTENSION_MAGIC: u64 = 0xab23_4cef_23dc_ea87;
/// The magic number of a section that is a dirty bitmap.
pub const DIRTY_BITMAP: u64 = 0x2038_5fae_252c_b34a;
/// Bytes of magic number and checksum, in front of the sections. The checksum is that of everything behind them.
pub const EXTENSION_HEAD: usize = 24;

/// Bytes of a section in front of its data: magic number, flags, length of the data, 4 bytes for nothing.
const SECTION_HEAD: usize = 24;
/// Who cannot load the section must not change the file.
const NECESSARY: u64 = 1;
/// Who does not know the section has to leave it as it is.
const TRANSIT: u64 = 2;

/// A section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is: [`DIRTY_BITMAP`], or something that is not specified.
    pub magic: u64,
    /// What may be done to it by whom.
    pub flags: u64,
    /// Of a dirty bitmap: where its clusters lie in the file, in bytes.
    pub clusters: Vec<u64>,
}

/// What a format extension says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extension {
    /// Its sections, in their order, without the one that marks the end.
    pub sections: Vec<Section>,
}

/// The little-endian number in the `width` bytes at `at`; `None` past the end.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let raw = bytes.get(at..at.checked_add(width)?)?;
    Some(raw.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// The clusters that the L1 table of a dirty bitmap names ("Dirty bitmaps feature"): 0 and 1 stand for a cluster of that bit.
fn clusters(data: &[u8]) -> Option<Vec<u64>> {
    let count = usize::try_from(number(data, 28, 4)?).ok()?;
    let table = data.get(32..32usize.checked_add(count.checked_mul(8)?)?)?;
    let entries = table.chunks_exact(8).filter_map(|entry| number(entry, 0, 8));
    entries.filter(|&entry| entry > 1).map(|entry| entry.checked_mul(SECTOR)).collect()
}

/// The checksum of these bytes of a format extension, an MD5. It guards against accidents, and against nobody.
#[must_use]
pub fn checksum(bytes: &[u8]) -> [u8; 16] {
    Md5::digest(bytes).into()
}

impl Extension {
    /// Parse the cluster of a format extension.
    ///
    /// # Errors
    /// One clause on the first thing that is wrong.
    pub fn parse(cluster: &[u8]) -> Result<Self, FormatError> {
        if number(cluster, 0, 8) != Some(EXTENSION_MAGIC) {
            return Err(FormatError::corrupt("the format extension does not begin with its magic number"));
        }
        let sum = cluster.get(8..EXTENSION_HEAD).unwrap_or_default();
        if sum != checksum(cluster.get(EXTENSION_HEAD..).unwrap_or_default()) {
            return Err(FormatError::corrupt("the checksum of the format extension is wrong"));
        }
        let mut at = EXTENSION_HEAD;
        let mut sections = Vec::new();
        loop {
            let past = || FormatError::corrupt("a section of the format extension goes past its end");
            let field = |offset: usize, width| number(cluster, at.saturating_add(offset), width).ok_or_else(past);
            let (magic, flags, length) = (field(0, 8)?, field(8, 8)?, field(16, 4)?);
            if magic == 0 {
                return Ok(Self { sections });
            }
            let start = at.saturating_add(SECTION_HEAD);
            let end = usize::try_from(length).ok().and_then(|length| start.checked_add(length)).ok_or_else(past)?;
            let data = cluster.get(start..end).ok_or_else(past)?;
            let clusters = if magic == DIRTY_BITMAP { clusters(data) } else { Some(Vec::new()) };
            let clusters = clusters.ok_or_else(|| FormatError::corrupt("the table of a dirty bitmap is cut off"))?;
            sections.push(Section { magic, flags, clusters });
            at = end.next_multiple_of(8);
        }
    }

    /// How many dirty bitmaps there are.
    #[must_use]
    pub fn bitmaps(&self) -> usize {
        self.sections.iter().filter(|section| section.magic == DIRTY_BITMAP).count()
    }

    /// Why the extension cannot go, in one clause; `None` if the specification lets a program remove it that does not
    /// keep it up to date. A bitmap says what has changed since a backup, so that it is wrong after any change that it
    /// does not record.
    #[must_use]
    pub fn must_stay(&self) -> Option<String> {
        self.sections.iter().find_map(|section| {
            let Section { magic, flags, .. } = section;
            let known = *magic == DIRTY_BITMAP;
            if flags & NECESSARY != 0 {
                let text = "section {} of the format extension says that the image must not be changed without it";
                Some(text.replace("{}", &format!("{magic:#018x}")))
            } else if flags & TRANSIT != 0 && !known {
                Some(format!(
                    "section {magic:#018x} of the format extension is to be kept, and its meaning is not known"
                ))
            } else {
                None
            }
        })
    }
}
