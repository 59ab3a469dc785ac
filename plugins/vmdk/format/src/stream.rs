//! What a stream-optimized extent has besides a hosted one ("Stream-Optimized Compressed Sparse Extents"): compressed grains,
//! each behind its marker, markers in front of metadata, and a footer.
//!
//! VMware writes such an extent from front to end, so that it learns last where its tables are: `gdOffset` of the header is
//! `GD_AT_END` (−1) then, and the footer, which precedes the end-of-stream marker, has the real one. QEMU writes the same
//! grains behind tables that are in front, with neither footer nor markers of metadata (`vmdk_write_extent`).

use crate::{FormatError, Header, HEADER_BYTES, SECTOR, TABLE_BYTES};

/// Footer marker, footer and end-of-stream marker, a sector each: the last bytes of a file whose header says that the directory
/// is at the end.
pub const FOOTER_BYTES: usize = 3 * 512;
/// Bytes of the marker in front of a metadata block: its sector.
pub const METADATA_MARKER_BYTES: u64 = SECTOR;

/// Type of the marker in front of a grain table (`MARKER_GT`).
const MARKER_TABLE: u32 = 1;
/// Type of the marker in front of the footer (`MARKER_FOOTER`).
const MARKER_FOOTER: u32 = 3;

/// The marker of a compressed grain, with the zlib stream (RFC 1950) directly behind it. Both are padded to whole sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrainMarker {
    /// `val`, the first sector of the grain on the disk.
    pub sector: u64,
    /// `size`, the length of the stream in bytes. With 0, it would be the marker of something else.
    pub length: u32,
}

impl GrainMarker {
    /// Bytes of a marker.
    pub const BYTES: usize = 12;

    /// Take a marker apart.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, length @ ..] = *bytes;
        Self { sector: u64::from_le_bytes([a, b, c, d, e, f, g, h]), length: u32::from_le_bytes(length) }
    }

    /// The bytes of a marker.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Marker and stream together, in bytes.
    #[must_use]
    pub fn stored(&self) -> u64 {
        Self::BYTES as u64 + u64::from(self.length)
    }

    /// The most that marker and stream of a grain of `grain` bytes take here, in bytes, whole sectors. What does not shrink is
    /// stored in deflate blocks of 16 KiB or more, with 5 bytes in front of each; header and checksum of zlib take 6.
    #[must_use]
    pub const fn longest(grain: u64) -> u64 {
        let blocks = grain.div_ceil(16 << 10).saturating_mul(5).saturating_add(64);
        grain.saturating_add(blocks).saturating_add(Self::BYTES as u64).div_ceil(SECTOR).saturating_mul(SECTOR)
    }
}

/// The sector in front of a grain table: `val` is the table's length in sectors, `size` is 0.
#[must_use]
pub fn table_marker() -> [u8; 512] {
    let mut marker = [0; 512];
    marker[..8].copy_from_slice(&(TABLE_BYTES / SECTOR).to_le_bytes());
    marker[12..16].copy_from_slice(&MARKER_TABLE.to_le_bytes());
    marker
}

impl Header {
    /// The header that stands in the last [`FOOTER_BYTES`] of a file.
    ///
    /// # Errors
    /// As [`Header::parse`]; when the markers around it are not what they have to be.
    pub fn parse_footer(bytes: &[u8; FOOTER_BYTES]) -> Result<Self, FormatError> {
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if field(8) != 0 || field(12) != MARKER_FOOTER || field(1024 + 8) != 0 || field(1024 + 12) != 0 {
            return Err(FormatError::corrupt("the file does not end with a footer between its markers"));
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&bytes[512..1024]);
        match Self::parse(&header)? {
            header if header.directory_is_at_the_end() => {
                Err(FormatError::corrupt("the footer does not say where the grain directory is"))
            }
            header => Ok(header),
        }
    }

    /// What holds of a file whose header says that the directory is at the end: what the footer says, and the place of the
    /// descriptor, which only the header in front has.
    ///
    /// # Errors
    /// As [`Header::parse_footer`].
    pub fn with_footer(&self, bytes: &[u8; FOOTER_BYTES]) -> Result<Self, FormatError> {
        let Self { descriptor_offset, descriptor_size, .. } = *self;
        Ok(Self { descriptor_offset, descriptor_size, ..Self::parse_footer(bytes)? })
    }

    /// The bytes of the header of the same image without its footer: [`Header::with_footer`] in front.
    #[must_use]
    pub fn in_front(front: &[u8; HEADER_BYTES], footer: &[u8; FOOTER_BYTES]) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&footer[512..1024]);
        header[28..44].copy_from_slice(&front[28..44]);
        header
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn markers() {
        // As QEMU 10.0 writes it in front of the second grain of 64 KiB of a disk.
        let bytes = [0x80, 0, 0, 0, 0, 0, 0, 0, 0x55, 0, 0, 0];
        let marker = GrainMarker::parse(&bytes);
        assert_eq!(marker, GrainMarker { sector: 128, length: 0x55 });
        assert_eq!((marker.encode(), marker.stored()), (bytes, 0x55 + 12));
        assert_eq!(GrainMarker { length: u32::MAX, ..marker }.stored(), 0x1_0000_000b);
        assert_eq!([512, 65536, 1 << 20].map(GrainMarker::longest), [1024, 66048, (1 << 20) + 512]);
        assert_eq!((table_marker()[0], table_marker()[12]), (4, 1));
        let others = (0..512).filter(|at| ![0, 12].contains(at));
        assert!(others.map(|at| table_marker()[at]).all(|byte| byte == 0));
    }

    #[test]
    fn a_footer_moves_to_the_front() {
        let made = |directory, (descriptor_offset, descriptor_size)| Header {
            version: 3,
            flags: 0x30001,
            capacity: 4096,
            grain: 128,
            descriptor_offset,
            descriptor_size,
            redundant_directory: 0,
            directory,
            overhead: 128,
        };
        let front = made(u64::MAX, (1, 20));
        let mut footer = [0; FOOTER_BYTES];
        (footer[0], footer[12]) = (1, 3);
        footer[512..1024].copy_from_slice(&made(77, (0, 0)).encode());
        assert_eq!(Header::parse_footer(&footer), Ok(made(77, (0, 0))));
        assert_eq!(front.with_footer(&footer), Ok(made(77, (1, 20))));
        assert_eq!(Header::parse(&Header::in_front(&front.encode(), &footer)), Ok(made(77, (1, 20))));
        footer[512..1024].copy_from_slice(&front.encode());
        assert!(Header::parse_footer(&footer).unwrap_err().text.contains("grain directory"));
        footer[12] = 0;
        assert!(Header::parse_footer(&footer).unwrap_err().text.contains("markers"));
    }
}
