//! The footer ("Hard Disk Footer Format"): the last sector of every VHD, with a copy at the front unless the disk is fixed.

use crate::checksum::checksum;
use crate::geometry::Geometry;
use crate::{put, u32_at, u64_at, FormatError, SECTOR};
use alloc::format;

/// `"conectix"`, the first eight bytes.
pub const COOKIE: [u8; 8] = *b"conectix";
/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 512;
/// Most sectors of a disk: 2040 GiB ("the maximum size of a dynamic hard disk is 2040 GB"), which QEMU bounds fixed ones by, too.
pub const MAX_SECTORS: u64 = 0xff00_0000;

/// "File Format Version".
const VERSION: u32 = 0x0001_0000;
const FEATURES: usize = 8;
const DATA_OFFSET: usize = 16;
const TIME: usize = 24;
const CREATOR: usize = 28;
const CREATOR_VERSION: usize = 32;
const ORIGINAL_SIZE: usize = 40;
const CURRENT_SIZE: usize = 48;
const GEOMETRY: usize = 56;
const TYPE: usize = 60;
const CHECKSUM: usize = 64;
const UNIQUE_ID: usize = 68;
const SAVED_STATE: usize = 84;
/// XenServer's: the image is not to be offered to guests. Early versions changed it and not the checksum.
const HIDDEN: usize = 85;

/// "Creator Application", of those that matter.
pub mod creators {
    /// Virtual PC, whose disks are as large as their geometry says.
    pub const VIRTUAL_PC: [u8; 4] = *b"vpc ";
    /// QEMU, for a size that was rounded up to a geometry.
    pub const QEMU: [u8; 4] = *b"qemu";
    /// QEMU with `force_size`: the current size counts, for every version of every program that is known.
    pub const QEMU_EXACT: [u8; 4] = *b"qem2";
    /// XenServer's blktap.
    pub const XEN: [u8; 4] = *b"tap\0";
}

/// "Disk Type".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of the disk, one sector after the other, then the footer.
    Fixed,
    /// Blocks that are allocated when they are written.
    Dynamic,
    /// As dynamic; what no sector bitmap says is there shows from the parent.
    Differencing,
}

impl Kind {
    const fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    /// Its name in the specification.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

/// A footer, with all of its bytes: what this library does not know is kept when it is written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    bytes: [u8; FOOTER_BYTES],
    kind: Kind,
}

impl Footer {
    /// Take a footer apart. One whose cookie or checksum is wrong is no footer: `None`.
    ///
    /// # Errors
    /// A clause about the field that cannot be taken.
    pub fn parse(bytes: &[u8; FOOTER_BYTES]) -> Result<Option<Self>, FormatError> {
        if bytes[..8] != COOKIE || !checksum_fits(bytes) {
            return Ok(None);
        }
        let version = u32_at(bytes, 12);
        if version >> 16 != VERSION >> 16 {
            return Err(FormatError::unsupported(format!("version {version:#x} of the footer is not known")));
        }
        let kind = match u32_at(bytes, TYPE) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => return Err(FormatError::unsupported(format!("disk type {other} is not known"))),
        };
        let footer = Self { bytes: *bytes, kind };
        let sectors = footer.virtual_size() / SECTOR;
        if sectors == 0 || sectors > MAX_SECTORS {
            let text = format!("a disk of {sectors} sectors is none: there are 1 to {MAX_SECTORS}");
            return Err(FormatError::corrupt(text));
        }
        Ok(Some(footer))
    }

    /// A new footer for a disk of `size` bytes, whole sectors. `time` is in seconds since the year 2000.
    #[must_use]
    pub fn new(kind: Kind, size: u64, unique_id: [u8; 16], time: u32) -> Self {
        let mut bytes = [0; FOOTER_BYTES];
        let data_offset = if kind == Kind::Fixed { u64::MAX } else { SECTOR };
        put(&mut bytes, 0, &COOKIE);
        // "This bit must always be set to 1."
        put(&mut bytes, FEATURES, &2u32.to_be_bytes());
        put(&mut bytes, 12, &VERSION.to_be_bytes());
        put(&mut bytes, DATA_OFFSET, &data_offset.to_be_bytes());
        put(&mut bytes, TIME, &time.to_be_bytes());
        put(&mut bytes, CREATOR, &creators::QEMU_EXACT);
        // What QEMU writes there: Virtual PC's 5.3.
        put(&mut bytes, CREATOR_VERSION, &0x0005_0003u32.to_be_bytes());
        put(&mut bytes, 36, b"Wi2k");
        put(&mut bytes, ORIGINAL_SIZE, &size.to_be_bytes());
        put(&mut bytes, TYPE, &kind.number().to_be_bytes());
        put(&mut bytes, UNIQUE_ID, &unique_id);
        Self { bytes, kind }.with_size(size)
    }

    /// The same footer for a disk of `size` bytes, whole sectors.
    #[must_use]
    pub fn with_size(mut self, size: u64) -> Self {
        put(&mut self.bytes, CURRENT_SIZE, &size.to_be_bytes());
        put(&mut self.bytes, GEOMETRY, &Geometry::of(size / SECTOR).encode());
        if self.is_measured_by_geometry() && self.geometry().total() != size / SECTOR {
            // No geometry has that size: from now on the current size has to count.
            put(&mut self.bytes, CREATOR, &creators::QEMU_EXACT);
        }
        self.summed()
    }

    /// The same footer with the dynamic header at byte `offset`.
    #[must_use]
    pub fn with_data_offset(mut self, offset: u64) -> Self {
        put(&mut self.bytes, DATA_OFFSET, &offset.to_be_bytes());
        self.summed()
    }

    fn summed(mut self) -> Self {
        let sum = checksum(&self.bytes, CHECKSUM);
        put(&mut self.bytes, CHECKSUM, &sum.to_be_bytes());
        self
    }

    /// Its bytes.
    #[must_use]
    pub const fn encode(&self) -> [u8; FOOTER_BYTES] {
        self.bytes
    }

    /// What kind of disk it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Byte offset of the dynamic header. Of no meaning for a fixed disk.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        u64_at(&self.bytes, DATA_OFFSET)
    }

    /// "Creator Application".
    #[must_use]
    pub fn creator(&self) -> [u8; 4] {
        u32_at(&self.bytes, CREATOR).to_be_bytes()
    }

    /// "Creator Version", of which the higher 16 bits are the major one.
    #[must_use]
    pub fn creator_version(&self) -> u32 {
        u32_at(&self.bytes, CREATOR_VERSION)
    }

    /// "Current Size" in bytes, which is not the size of the disk for every creator.
    #[must_use]
    pub fn current_size(&self) -> u64 {
        u64_at(&self.bytes, CURRENT_SIZE)
    }

    /// "Disk Geometry".
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry::decode(u32_at(&self.bytes, GEOMETRY).to_be_bytes())
    }

    /// Whether the size of the disk is that of its geometry: QEMU 10.0 (`block/vpc.c`, `vpc_open`) takes it so of Virtual PC's
    /// and its own disks, and the current size of those of all others, and of every disk with the largest geometry.
    #[must_use]
    pub fn is_measured_by_geometry(&self) -> bool {
        let by_geometry = matches!(self.creator(), creators::VIRTUAL_PC | creators::QEMU);
        by_geometry && !self.geometry().is_largest()
    }

    /// Size of the disk in bytes: whole sectors, any number of them.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        if self.is_measured_by_geometry() {
            self.geometry().total() * SECTOR
        } else {
            self.current_size() / SECTOR * SECTOR
        }
    }

    /// "Unique ID", which children record.
    #[must_use]
    pub fn unique_id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&self.bytes[UNIQUE_ID..UNIQUE_ID + 16]);
        id
    }

    /// "Saved State": the machine was suspended; the disk must not be compacted or expanded.
    #[must_use]
    pub const fn has_saved_state(&self) -> bool {
        self.bytes[SAVED_STATE] == 1
    }

    /// Whether the other footer is the same but for what changes when a disk grows, is suspended, hidden or gets another parent:
    /// times, sizes, and where the header is. A crash between the two copies leaves such a pair.
    #[must_use]
    pub fn is_version_of(&self, other: &Self) -> bool {
        let changing = |at: usize| matches!(at, DATA_OFFSET..CREATOR_VERSION | CURRENT_SIZE..TYPE | CHECKSUM..UNIQUE_ID | SAVED_STATE | HIDDEN);
        (0..FOOTER_BYTES).all(|at| changing(at) || self.bytes[at] == other.bytes[at])
    }
}

/// Whether the checksum is right, also as early versions of XenServer left it.
fn checksum_fits(bytes: &[u8; FOOTER_BYTES]) -> bool {
    let recorded = u32_at(bytes, CHECKSUM);
    let mut shown = *bytes;
    shown[HIDDEN] = 0;
    recorded == checksum(bytes, CHECKSUM)
        || (bytes[CREATOR..CREATOR + 3] == *b"tap" && recorded == checksum(&shown, CHECKSUM))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parsed(bytes: &[u8; FOOTER_BYTES]) -> Footer {
        Footer::parse(bytes).unwrap().unwrap()
    }

    /// The same bytes with other ones at `at`, and the checksum that goes with them.
    fn changed(footer: &Footer, at: usize, field: &[u8]) -> [u8; FOOTER_BYTES] {
        let mut bytes = footer.encode();
        put(&mut bytes, at, field);
        let sum = checksum(&bytes, CHECKSUM);
        put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
        bytes
    }

    #[test]
    fn what_is_made_can_be_read() {
        let footer = Footer::new(Kind::Differencing, 50 << 20, [7; 16], 1234);
        assert_eq!(parsed(&footer.encode()), footer);
        assert_eq!((footer.kind(), footer.data_offset(), footer.virtual_size()), (Kind::Differencing, 512, 50 << 20));
        assert_eq!((footer.unique_id(), footer.has_saved_state()), ([7; 16], false));
        assert_eq!(Footer::new(Kind::Fixed, 512, [7; 16], 0).data_offset(), u64::MAX);
    }

    #[test]
    fn damage_makes_it_none_and_nonsense_is_refused() {
        let good = Footer::new(Kind::Dynamic, 1 << 20, [7; 16], 0);
        for at in [0, 12, 48, 64, 70, 511] {
            let mut bytes = good.encode();
            bytes[at] ^= 1;
            assert_eq!(Footer::parse(&bytes), Ok(None), "{at}");
        }
        for (at, field, word) in [
            (12, &[0, 2, 0, 0][..], "version"),
            (60, &[0, 0, 0, 6], "type"),
            (48, &[0; 8], "sectors"),
            (48, &[0, 0, 2, 0, 0, 0, 0, 0], "sectors"),
        ] {
            let error = Footer::parse(&changed(&good, at, field)).unwrap_err();
            assert!(error.text.contains(word), "{error}");
        }
    }

    #[test]
    fn the_size_depends_on_the_creator() {
        let size = 50 << 20;
        let chs = Geometry::of(size / SECTOR).total() * SECTOR;
        assert!(chs < size);
        for (creator, wanted) in [(b"vpc ", chs), (b"qemu", chs), (b"win ", size), (b"qem2", size), (b"tap\0", size)] {
            let footer = parsed(&changed(&Footer::new(Kind::Dynamic, size, [7; 16], 0), CREATOR, creator));
            assert_eq!(footer.virtual_size(), wanted, "{creator:?}");
            // One that grows is as large as it was asked to be, for everybody.
            assert_eq!(footer.with_size(60 << 20).virtual_size(), 60 << 20);
        }
        let large = Footer::new(Kind::Dynamic, 200 << 30, [7; 16], 0);
        assert_eq!(parsed(&changed(&large, CREATOR, b"vpc ")).virtual_size(), 200 << 30);
        let odd = changed(&Footer::new(Kind::Dynamic, 1024, [7; 16], 0), CURRENT_SIZE, &1500u64.to_be_bytes());
        assert_eq!(parsed(&odd).virtual_size(), 1024);
    }

    #[test]
    fn a_hidden_image_of_an_early_xenserver_is_one() {
        let xen = changed(&Footer::new(Kind::Dynamic, 1 << 20, [7; 16], 0), CREATOR, b"tap\0");
        let mut hidden = xen;
        hidden[HIDDEN] = 1;
        assert!(parsed(&hidden).is_version_of(&parsed(&xen)));
        let mut other = Footer::new(Kind::Dynamic, 1 << 20, [7; 16], 0).encode();
        other[HIDDEN] = 1;
        assert_eq!(Footer::parse(&other), Ok(None));
    }

    #[test]
    fn versions_of_one_footer() {
        let footer = Footer::new(Kind::Dynamic, 1 << 20, [7; 16], 0);
        assert!(footer.is_version_of(&footer.with_size(2 << 20)));
        let moved = parsed(&footer.with_data_offset(4096).encode());
        assert!(moved.data_offset() == 4096 && footer.is_version_of(&moved) && moved.with_data_offset(512) == footer);
        assert!(!footer.is_version_of(&Footer::new(Kind::Dynamic, 1 << 20, [8; 16], 0)));
        assert!(!footer.is_version_of(&Footer::new(Kind::Differencing, 1 << 20, [7; 16], 0)));
    }
}
